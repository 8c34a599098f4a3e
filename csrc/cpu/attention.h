// Shared by the forward and the backward pass of attention: the keys that a query sees, and copies of strided rows.
#pragma once

#include <cstring>

#include "../kernels.h"
#include "gemm.h"

namespace nanochat::NANOCHAT_ISA {

constexpr double kInfinity = __builtin_inf();

struct Range {
    int64_t begin, end;
};

NANOCHAT_INLINE Range intersect(Range a, Range b) {
    const int64_t begin = maximum(a.begin, b.begin);
    return {begin, maximum(begin, minimum(a.end, b.end))};
}

// The keys that query i sees.
NANOCHAT_INLINE Range visible_keys(const AttentionShape& s, int64_t i) {
    const int64_t diagonal = i + s.Tk - s.Tq;
    const bool causal = s.causal || s.window >= 0;
    const int64_t end = causal ? minimum(s.Tk, diagonal + 1) : s.Tk;
    const int64_t begin = s.window >= 0 ? maximum<int64_t>(0, diagonal - s.window) : 0;
    return {minimum(begin, maximum<int64_t>(end, 0)), maximum<int64_t>(end, 0)};
}

// The keys that any of the queries [i, i + count) sees.
NANOCHAT_INLINE Range visible_keys(const AttentionShape& s, int64_t i, int64_t count) {
    return {visible_keys(s, i).begin, visible_keys(s, i + count - 1).end};
}

// The address of row (b, t, h) of a (B, T, H, D) tensor.
template <class S>
NANOCHAT_INLINE S* row(S* tensor, const Strides& strides, int64_t b, int64_t t, int64_t h) {
    return tensor + b * strides.b + t * strides.t + h * strides.h;
}

template <class T, class S>
NANOCHAT_INLINE void read_row(const S* from, int64_t D, T factor, T* to, int64_t padded) {
    int64_t d = 0;
    for (; d + kLanes<T> <= D; d += kLanes<T>) store(to + d, load(from + d) * factor);
    for (; d < D; d++) to[d] = read(from + d) * factor;
    for (; d < padded; d++) to[d] = 0;
}

template <class T, class S>
NANOCHAT_INLINE void write_row(const T* from, int64_t D, T factor, S* to) {
    int64_t d = 0;
    for (; d + kLanes<T> <= D; d += kLanes<T>) store(to + d, load(from + d) * factor);
    for (; d < D; d++) write(to + d, from[d] * factor);
}

// Copies rows x D of a strided tensor to rows_padded x padded; the rest becomes zero.
template <class T, class S>
void read_rows(const S* from, int64_t stride, int64_t rows, int64_t D, T factor, T* to, int64_t rows_padded,
               int64_t padded) {
    for (int64_t r = 0; r < rows; r++) read_row(from + r * stride, D, factor, to + r * padded, padded);
    memset(to + rows * padded, 0, (rows_padded - rows) * padded * sizeof(T));
}

// Lane l holds x if first <= column + l < end, and `outside` if not.
template <class T>
NANOCHAT_INLINE Vec<T> keep_range(Vec<T> x, int64_t column, int64_t first, int64_t end, T outside) {
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
    constexpr int64_t W = kLanes<T>;
    if (column >= first && column + W <= end) return x;
    const Index low = static_cast<Index>(minimum(W, maximum<int64_t>(0, first - column)));
    const Index high = static_cast<Index>(minimum(W, maximum<int64_t>(0, end - column)));
    Vec<Index> lane;
    for (int l = 0; l < W; l++) lane[l] = l;
    return ((lane >= low) & (lane < high)) ? x : broadcast<T>(outside);
}

// Copies one panel of keys (or values), transposed: panel[d][n] = row n, zero beyond `rows`. `copy` holds
// kTileColumns rows of `padded`.
template <class T, class S>
void read_panel(const S* from, int64_t stride, int64_t rows, int64_t D, T* panel, T* copy, int64_t padded) {
    constexpr int64_t NR = kTileColumns<T>;
    read_rows(from, stride, minimum(rows, NR), D, T(1), copy, NR, padded);
    transpose(NR, D, copy, padded, panel, NR);
}

}   // namespace nanochat::NANOCHAT_ISA
