// Kernels that normalise rows: a row is read from memory once, and it is in the cache when its second pass begins.
// Threads share the rows, so the results do not depend on their number.
#pragma once

#include "elementwise.h"

namespace nanochat::NANOCHAT_ISA {

// v as a row of T holds it.
template <class T>
NANOCHAT_INLINE Vec<Compute<T>> rounded(Vec<Compute<T>> v) {
    T lanes[kLanes<Compute<T>>];
    store(lanes, v);
    return load(lanes);
}

// The sum of term(i, part) over the vectors of C elements. Four sums do not wait for each other.
template <class T, class Term>
NANOCHAT_INLINE T sum_over(int64_t C, const Term& term) {
    constexpr int W = kLanes<T>, sums = 4;
    Vec<T> sum[sums] = {};
    int64_t i = 0;
    for (; i + sums * W <= C; i += sums * W)
#pragma GCC unroll 4
        for (int s = 0; s < sums; s++) sum[s] += term(i + s * W, Whole{});
    for (; i + W <= C; i += W) sum[0] += term(i, Whole{});
    if (i < C) sum[1] += term(i, Part{static_cast<size_t>(C - i)});
    return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Calls row(n) for each of N rows of C elements.
template <class Row>
NANOCHAT_INLINE void for_each_row(int64_t N, int64_t C, int threads, const Row& row) {
    const int64_t worthwhile = maximum<int64_t>(1, N * C / kLeastPerThread);
    const int team = static_cast<int>(minimum<int64_t>(threads, worthwhile));
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t n = 0; n < N; n++) row(n);
}

}   // namespace nanochat::NANOCHAT_ISA
