// Chooses the instruction set once, at run time, and forwards every call to the copy of the kernels compiled for it.
#include <cpuid.h>
#include <omp.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "runtime.h"

// Every kernel and its struct of arguments: those with code for AMX, and the others.
#define NANOCHAT_FOR_EACH_TILE_KERNEL(use)                                              \
    use(attention_forward, AttentionForward) use(attention_backward, AttentionBackward) \
        use(linear_cross_entropy, cpu::LinearCrossEntropy)
#define NANOCHAT_FOR_EACH_OTHER_KERNEL(use)                                                              \
    use(newton_schulz, NewtonSchulz) use(linear, cpu::Linear) use(rms_norm, RMSNorm)                     \
        use(rms_norm_backward, RMSNormBackward) use(embedding_rms_norm, EmbeddingRMSNorm)                \
            use(mix_rms_norm, MixRMSNorm) use(mix_rms_norm_backward, MixRMSNormBackward)                 \
                use(add_value_embedding, AddValueEmbedding)                                              \
                    use(add_value_embedding_backward, AddValueEmbeddingBackward) use(smear, Smear)       \
                        use(smear_backward, SmearBackward) use(rotary_norm, RotaryNorm)                  \
                            use(rotary_norm_backward, RotaryNormBackward) use(relu_squared, ReluSquared) \
                                use(relu_squared_backward, ReluSquaredBackward) use(adamw, AdamW)        \
                                    use(muon_momentum, MuonMomentum) use(muon_update, MuonUpdate)        \
                                        use(normuon_update, NorMuonUpdate) use(cached_forward, cpu::CachedForward)
#define NANOCHAT_FOR_EACH_KERNEL(use)  \
    NANOCHAT_FOR_EACH_TILE_KERNEL(use) \
    NANOCHAT_FOR_EACH_OTHER_KERNEL(use)

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
namespace avx512_bf16 {
NANOCHAT_FOR_EACH_KERNEL(NANOCHAT_DECLARE)
}
namespace amx {
NANOCHAT_FOR_EACH_TILE_KERNEL(NANOCHAT_DECLARE)
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

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The kernel of Linux saves the tiles only of processes that ask for it (ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA). From
// then on it refuses signal stacks that are too small for them.
bool has_amx() {
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The kernels of a set; those without code for AMX are of the set `others`.
#define NANOCHAT_KERNELS(isa, others, supported_)                          \
    {.name = #isa,                                                         \
     .supported = supported_,                                              \
     .attention_forward = isa::attention_forward,                          \
     .attention_backward = isa::attention_backward,                        \
     .linear_cross_entropy = isa::linear_cross_entropy,                    \
     .newton_schulz = others::newton_schulz,                               \
     .linear = others::linear,                                             \
     .rms_norm = others::rms_norm,                                         \
     .rms_norm_backward = others::rms_norm_backward,                       \
     .embedding_rms_norm = others::embedding_rms_norm,                     \
     .mix_rms_norm = others::mix_rms_norm,                                 \
     .mix_rms_norm_backward = others::mix_rms_norm_backward,               \
     .add_value_embedding = others::add_value_embedding,                   \
     .add_value_embedding_backward = others::add_value_embedding_backward, \
     .smear = others::smear,                                               \
     .smear_backward = others::smear_backward,                             \
     .rotary_norm = others::rotary_norm,                                   \
     .rotary_norm_backward = others::rotary_norm_backward,                 \
     .relu_squared = others::relu_squared,                                 \
     .relu_squared_backward = others::relu_squared_backward,               \
     .adamw = others::adamw,                                               \
     .muon_momentum = others::muon_momentum,                               \
     .muon_update = others::muon_update,                                   \
     .normuon_update = others::normuon_update,                             \
     .cached_forward = others::cached_forward}

const Kernels kKernels[] = {
    NANOCHAT_KERNELS(amx, avx512_bf16, has_amx),
    NANOCHAT_KERNELS(avx512_bf16, avx512_bf16, has_avx512_bf16),
    NANOCHAT_KERNELS(avx512, avx512, has_avx512),
    NANOCHAT_KERNELS(avx2, avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }),
    NANOCHAT_KERNELS(baseline, baseline, [] { return true; }),
};

// On Intel's processors the products of avx512_bf16 are slower than those of float32: 88 against 148 GFLOP/s (MKL) on one
// core of a Xeon with AMX.
bool pays(const Kernels& kernels) {
    return kernels.attention_forward != avx512_bf16::attention_forward || !__builtin_cpu_is("intel");
}

const Kernels& choose() {
    const char* wanted = std::getenv("NANOCHAT_CPU_ISA");
    const bool asked = wanted && *wanted;
    for (const Kernels& kernels : kKernels) {
        if (asked ? std::strcmp(wanted, kernels.name) != 0 : !pays(kernels)) continue;
        if (kernels.supported()) return kernels;
        if (asked)
            throw std::invalid_argument(std::string("NANOCHAT_CPU_ISA=") + wanted +
                                        ": this processor does not have it, or its operating system does not allow it");
    }
    throw std::invalid_argument(
        std::string("NANOCHAT_CPU_ISA must be amx, avx512_bf16, avx512, avx2 or baseline, got ") + wanted);
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
