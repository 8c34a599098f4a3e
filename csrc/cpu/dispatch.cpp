// Chooses the instruction set once, at run time, and forwards every call to the copy of the kernels compiled for it.
#include <omp.h>
#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "runtime.h"
#include "system.h"

#if defined(__x86_64__)
#include "instruction_sets_x86_64.h"
#elif defined(__aarch64__)
#include "instruction_sets_aarch64.h"
#else
#error "The kernels have no instruction sets for this architecture."
#endif

// Every kernel and its struct of arguments: those with code that multiplies bfloat16, and the others.
#define NANOCHAT_FOR_EACH_BFLOAT16_KERNEL(use)                                          \
    use(attention_forward, AttentionForward) use(attention_backward, AttentionBackward) \
        use(linear_cross_entropy, cpu::LinearCrossEntropy) use(newton_schulz, NewtonSchulz)
#define NANOCHAT_FOR_EACH_OTHER_KERNEL(use)                                                            \
    use(linear, cpu::Linear) use(rms_norm, RMSNorm) use(rms_norm_backward, RMSNormBackward)            \
        use(embedding_rms_norm, EmbeddingRMSNorm) use(mix_rms_norm, MixRMSNorm)                        \
            use(mix_rms_norm_backward, MixRMSNormBackward) use(add_value_embedding, AddValueEmbedding) \
                use(add_value_embedding_backward, AddValueEmbeddingBackward) use(smear, Smear)         \
                    use(smear_backward, SmearBackward) use(rotary_norm, RotaryNorm)                    \
                        use(rotary_norm_backward, RotaryNormBackward) use(relu_squared, ReluSquared)   \
                            use(relu_squared_backward, ReluSquaredBackward) use(adamw, AdamW)          \
                                use(muon_momentum, MuonMomentum) use(muon_update, MuonUpdate)          \
                                    use(normuon_update, NorMuonUpdate) use(cached_forward, cpu::CachedForward)
#define NANOCHAT_FOR_EACH_KERNEL(use)      \
    NANOCHAT_FOR_EACH_BFLOAT16_KERNEL(use) \
    NANOCHAT_FOR_EACH_OTHER_KERNEL(use)

#define NANOCHAT_DECLARE(kernel, Arguments) void kernel(const Arguments&);
#define NANOCHAT_DECLARE_SET(isa, ...)         \
    namespace isa {                            \
    NANOCHAT_FOR_EACH_KERNEL(NANOCHAT_DECLARE) \
    }
namespace nanochat {
NANOCHAT_FOR_EACH_INSTRUCTION_SET(NANOCHAT_DECLARE_SET)
}   // namespace nanochat

namespace nanochat::cpu {
namespace {

#define NANOCHAT_MEMBER(kernel, Arguments) void (*kernel)(const Arguments&);
struct Kernels {
    const char* name;
    bool (*supported)();
    NANOCHAT_FOR_EACH_KERNEL(NANOCHAT_MEMBER)
};

// The kernels of a set; generation is that of the set `rows`, and what else multiplies no bfloat16 is of the set `others`.
#define NANOCHAT_KERNELS(isa, others, rows)                                \
    {.name = #isa,                                                         \
     .supported = has_##isa,                                               \
     .attention_forward = isa::attention_forward,                          \
     .attention_backward = isa::attention_backward,                        \
     .linear_cross_entropy = isa::linear_cross_entropy,                    \
     .newton_schulz = isa::newton_schulz,                                  \
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
     .cached_forward = rows::cached_forward},

const Kernels kKernels[] = {NANOCHAT_FOR_EACH_INSTRUCTION_SET(NANOCHAT_KERNELS)};
constexpr size_t kSets = sizeof kKernels / sizeof kKernels[0];

const Kernels& choose() {
    const char* wanted = std::getenv("NANOCHAT_CPU_ISA");
    const bool asked = wanted && *wanted;
    for (const Kernels& kernels : kKernels) {
        if (asked ? std::strcmp(wanted, kernels.name) != 0 : !pays(kernels.name)) continue;
        if (kernels.supported()) return kernels;
        if (asked)
            throw std::invalid_argument(std::string("NANOCHAT_CPU_ISA=") + wanted +
                                        ": this processor does not have it, or its operating system does not allow it");
    }
    std::string names = kKernels[0].name;
    for (size_t i = 1; i < kSets; i++) names += (i + 1 < kSets ? ", " : " or ") + std::string(kKernels[i].name);
    throw std::invalid_argument("NANOCHAT_CPU_ISA must be " + names + ", got " + wanted);
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
        advise_large_pages(space.memory.get(), rounded);
        space.size = rounded;
    }
    return space.memory.get();
}

const char* instruction_set() { return kernels().name; }

const char* instruction_sets() {
    static const std::string names = [] {
        std::string all;
        for (size_t i = kSets; i-- > 0;) all += kKernels[i].name + std::string(i ? " " : "");
        return all;
    }();
    return names.c_str();
}

bool linear_pays() { return linear_pays_with(kernels().name); }

#define NANOCHAT_FORWARD(kernel, Arguments) \
    void kernel(const Arguments& arguments) { kernels().kernel(with_team(arguments)); }
NANOCHAT_FOR_EACH_KERNEL(NANOCHAT_FORWARD)

}   // namespace nanochat::cpu
