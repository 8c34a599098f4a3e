// Chooses the instruction set once, at run time, and forwards every call to the copy of the kernels compiled for it.
#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "runtime.h"

// Every kernel and its struct of arguments.
#define NANOCHAT_FOR_EACH_KERNEL(use)                                                                                 \
    use(attention_forward, AttentionForward) use(attention_backward, AttentionBackward) use(rms_norm, RMSNorm) use(   \
        rms_norm_backward, RMSNormBackward) use(embedding_rms_norm, EmbeddingRMSNorm) use(mix_rms_norm, MixRMSNorm)   \
        use(mix_rms_norm_backward, MixRMSNormBackward) use(add_value_embedding, AddValueEmbedding)                    \
            use(add_value_embedding_backward, AddValueEmbeddingBackward) use(smear, Smear)                            \
                use(smear_backward, SmearBackward) use(rotary_norm, RotaryNorm)                                       \
                    use(rotary_norm_backward, RotaryNormBackward) use(relu_squared, ReluSquared)                      \
                        use(relu_squared_backward, ReluSquaredBackward) use(newton_schulz, NewtonSchulz)              \
                            use(adamw, AdamW) use(muon_momentum, MuonMomentum) use(muon_update, MuonUpdate)           \
                                use(normuon_update, NorMuonUpdate) use(linear_cross_entropy, cpu::LinearCrossEntropy) \
                                    use(linear, cpu::Linear) use(cached_forward, cpu::CachedForward)

#define NANOCHAT_DECLARE(kernel, Arguments) void kernel(const Arguments&);
namespace nanochat {
namespace baseline {
NANOCHAT_FOR_EACH_KERNEL(NANOCHAT_DECLARE)
}
namespace avx2 {
NANOCHAT_FOR_EACH_KERNEL(NANOCHAT_DECLARE)
}
namespace avx512 {
NANOCHAT_FOR_EACH_KERNEL(NANOCHAT_DECLARE)
}
}   // namespace nanochat

namespace nanochat::cpu {
namespace {

#define NANOCHAT_MEMBER(kernel, Arguments) void (*kernel)(const Arguments&);
struct Kernels {
    const char* name;
    bool (*supported)();
    NANOCHAT_FOR_EACH_KERNEL(NANOCHAT_MEMBER)
};

#define NANOCHAT_KERNELS(isa, supported_)                               \
    {.name = #isa,                                                      \
     .supported = supported_,                                           \
     .attention_forward = isa::attention_forward,                       \
     .attention_backward = isa::attention_backward,                     \
     .rms_norm = isa::rms_norm,                                         \
     .rms_norm_backward = isa::rms_norm_backward,                       \
     .embedding_rms_norm = isa::embedding_rms_norm,                     \
     .mix_rms_norm = isa::mix_rms_norm,                                 \
     .mix_rms_norm_backward = isa::mix_rms_norm_backward,               \
     .add_value_embedding = isa::add_value_embedding,                   \
     .add_value_embedding_backward = isa::add_value_embedding_backward, \
     .smear = isa::smear,                                               \
     .smear_backward = isa::smear_backward,                             \
     .rotary_norm = isa::rotary_norm,                                   \
     .rotary_norm_backward = isa::rotary_norm_backward,                 \
     .relu_squared = isa::relu_squared,                                 \
     .relu_squared_backward = isa::relu_squared_backward,               \
     .newton_schulz = isa::newton_schulz,                               \
     .adamw = isa::adamw,                                               \
     .muon_momentum = isa::muon_momentum,                               \
     .muon_update = isa::muon_update,                                   \
     .normuon_update = isa::normuon_update,                             \
     .linear_cross_entropy = isa::linear_cross_entropy,                 \
     .linear = isa::linear,                                             \
     .cached_forward = isa::cached_forward}

const Kernels kKernels[] = {
    NANOCHAT_KERNELS(avx512,
                     [] {
                         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                __builtin_cpu_supports("fma");
                     }),
    NANOCHAT_KERNELS(avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }),
    NANOCHAT_KERNELS(baseline, [] { return true; }),
};

const Kernels& choose() {
    const char* wanted = std::getenv("NANOCHAT_CPU_ISA");
    for (const Kernels& kernels : kKernels) {
        if (wanted && *wanted && std::strcmp(wanted, kernels.name) != 0) continue;
        if (kernels.supported()) return kernels;
        if (wanted && *wanted)
            throw std::invalid_argument(std::string("NANOCHAT_CPU_ISA=") + wanted +
                                        ": this processor does not have it");
    }
    throw std::invalid_argument(std::string("NANOCHAT_CPU_ISA must be avx512, avx2 or baseline, got ") + wanted);
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

// A forked child inherits the state of the OpenMP pool but none of its threads. A parallel region there would never end.
bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// The arguments with the number of threads that may run here.
template <class Arguments>
Arguments with_team(Arguments arguments) {
    int& threads = arguments.execution.threads;
    if (forked || registered != 0 || omp_in_parallel() || threads < 1) threads = 1;
    return arguments;
}

constexpr size_t kHugePage = size_t{2} << 20;

struct Free {
    void operator()(void* p) const { std::free(p); }
};

struct Workspace {
    std::unique_ptr<void, Free> memory;
    size_t size = 0;
};

}   // namespace

void* workspace(size_t bytes) {
    thread_local Workspace space;
    if (bytes > space.size) {
        space.memory.reset();
        space.size = 0;
        const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        space.memory.reset(std::aligned_alloc(kHugePage, rounded));
        if (!space.memory) throw std::bad_alloc();
        madvise(space.memory.get(), rounded, MADV_HUGEPAGE);
        space.size = rounded;
    }
    return space.memory.get();
}

const char* instruction_set() { return kernels().name; }
bool linear_pays() { return !__builtin_cpu_is("intel") && kernels().linear != baseline::linear; }

#define NANOCHAT_FORWARD(kernel, Arguments) \
    void kernel(const Arguments& arguments) { kernels().kernel(with_team(arguments)); }
NANOCHAT_FOR_EACH_KERNEL(NANOCHAT_FORWARD)

}   // namespace nanochat::cpu
