// Chooses the instruction set once, at run time, and forwards every call to its copy of the kernels.
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

#define NANOCHAT_DECLARE(isa)                                  \
    namespace nanochat::isa {                                  \
    void attention_forward(const AttentionForward&, int);      \
    void attention_backward(const AttentionBackward&, int);    \
    void newton_schulz(const NewtonSchulz&, int threads);      \
    void adamw(const AdamW&, int threads);                     \
    void muon_momentum(const MuonMomentum&, int threads);      \
    void muon_update(const MuonUpdate&, int threads);          \
    void linear_cross_entropy(const cpu::LinearCrossEntropy&); \
    void linear(const cpu::Linear&);                           \
    void cached_forward(const cpu::CachedForward&);            \
    }
NANOCHAT_DECLARE(baseline)
NANOCHAT_DECLARE(avx2)
NANOCHAT_DECLARE(avx512)

namespace nanochat::cpu {
namespace {

struct Kernels {
    const char* name;
    bool (*supported)();
    decltype(&avx512::attention_forward) attention_forward;
    decltype(&avx512::attention_backward) attention_backward;
    decltype(&avx512::newton_schulz) newton_schulz;
    decltype(&avx512::adamw) adamw;
    decltype(&avx512::muon_momentum) muon_momentum;
    decltype(&avx512::muon_update) muon_update;
    decltype(&avx512::linear_cross_entropy) linear_cross_entropy;
    decltype(&avx512::linear) linear;
    decltype(&avx512::cached_forward) cached_forward;
};

#define NANOCHAT_KERNELS(isa, supported_)               \
    {.name = #isa,                                      \
     .supported = supported_,                           \
     .attention_forward = isa::attention_forward,       \
     .attention_backward = isa::attention_backward,     \
     .newton_schulz = isa::newton_schulz,               \
     .adamw = isa::adamw,                               \
     .muon_momentum = isa::muon_momentum,               \
     .muon_update = isa::muon_update,                   \
     .linear_cross_entropy = isa::linear_cross_entropy, \
     .linear = isa::linear,                             \
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
    throw std::invalid_argument(std::string("NANOCHAT_CPU_ISA=") + wanted + ": takes avx512, avx2 or baseline");
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

// A forked child inherits the state of the OpenMP pool but none of its threads: a parallel region there would wait for
// ever.
bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int team(int threads) { return forked || registered != 0 || omp_in_parallel() || threads < 1 ? 1 : threads; }

template <class Arguments>
Arguments with_team(Arguments arguments) {
    arguments.threads = team(arguments.threads);
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

void attention_forward(const AttentionForward& a, int threads) { kernels().attention_forward(a, team(threads)); }
void attention_backward(const AttentionBackward& a, int threads) { kernels().attention_backward(a, team(threads)); }
void newton_schulz(const NewtonSchulz& a, int threads) { kernels().newton_schulz(a, team(threads)); }
void adamw(const AdamW& a, int threads) { kernels().adamw(a, team(threads)); }
void muon_momentum(const MuonMomentum& a, int threads) { kernels().muon_momentum(a, team(threads)); }
void muon_update(const MuonUpdate& a, int threads) { kernels().muon_update(a, team(threads)); }
void linear_cross_entropy(const LinearCrossEntropy& a) { kernels().linear_cross_entropy(with_team(a)); }
void linear(const Linear& a) { kernels().linear(with_team(a)); }
void cached_forward(const CachedForward& a) { kernels().cached_forward(with_team(a)); }

}   // namespace nanochat::cpu
