// Every width that wgmma takes, by both ways that a comes.
#include "wgmma.cuh"

namespace {

template <int N = 8>
void choose_width(const Argument* arguments) {
    if (arguments[4].integer == N) {
        arguments[5].integer ? run_wgmma<N, bfloat16, Major::k, Major::mn, true>(arguments)
                             : run_wgmma<N, bfloat16, Major::k, Major::k, false>(arguments);
    } else if constexpr (N < 256) {
        choose_width<N + 8>(arguments);
    }
}

}   // namespace

// As run_wgmma, bfloat16, then N; whether a is in registers and b MN-major (else both in shared memory, K-major)
ENTRY(wgmma_width) { choose_width(arguments); }
