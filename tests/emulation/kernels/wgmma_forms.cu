// Operands from shared memory and registers, in both major orders, of both types.
#include "wgmma.cuh"

namespace {

template <int N, class T>
void choose_form(const Argument* arguments) {
    constexpr Major k = Major::k, mn = Major::mn;
    const bool registers = arguments[6].integer, mn_a = arguments[7].integer, mn_b = arguments[8].integer;
    if (registers) {
        mn_b ? run_wgmma<N, T, k, mn, true>(arguments) : run_wgmma<N, T, k, k, true>(arguments);
    } else if (mn_a) {
        mn_b ? run_wgmma<N, T, mn, mn, false>(arguments) : run_wgmma<N, T, mn, k, false>(arguments);
    } else {
        mn_b ? run_wgmma<N, T, k, mn, false>(arguments) : run_wgmma<N, T, k, k, false>(arguments);
    }
}

}   // namespace

// As run_wgmma, then N (64 or 256), whether float16 (else bfloat16); a in registers, MN-major a, MN-major b
ENTRY(wgmma_form) {
    const bool half = arguments[5].integer;
    if (arguments[4].integer == 64) {
        half ? choose_form<64, float16>(arguments) : choose_form<64, bfloat16>(arguments);
    } else {
        half ? choose_form<256, float16>(arguments) : choose_form<256, bfloat16>(arguments);
    }
}
