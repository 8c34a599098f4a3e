// Products of bfloat16 matrices with float32 sums, for instruction sets that multiply bfloat16. The blocks of a strip of
// 16 rows (of A) or of a panel of 16 columns (of B) follow each other over the depth.
#pragma once

#if defined(__x86_64__)
#include "gemm16_x86_64.h"
#elif defined(__aarch64__)
#include "gemm16_aarch64.h"
#endif

namespace nanochat::NANOCHAT_ISA {

// Elements of a packed operand of `count` rows (of A) or columns (of B).
NANOCHAT_INLINE int64_t packed_size(int64_t count, int64_t depth) {
    return round_up(count, kBlock16) * round_up(depth, kBlock16Depth);
}

// Packs rows (of A) or columns (of B) [i, i + count) and [k, k + depth). At least one block is written; with no numbers it
// is zeros.
template <bool as_b, class S>
void pack(const Operand<S>& x, int64_t i, int64_t count, int64_t k, int64_t depth, bfloat16* to) {
    for (int64_t r = 0; r < count || r == 0; r += kBlock16)
        for (int64_t d = 0; d < depth || d == 0; d += kBlock16Depth, to += kBlock16Size)
            pack_block<as_b>(x, i + r, minimum(kBlock16, count - r), k + d, minimum(kBlock16Depth, depth - d), to);
}

constexpr int kTwoColumns = kGroupColumns < 2 ? 1 : 2;

// c (16 rows, 16 columns; `rows` and `columns` in blocks) = A B, or += with `accumulate`. The thread is in a TileScope.
// Every sum is formed in the order of the depth, in the same way wherever it lies in c.
NANOCHAT_INLINE void multiply_packed(Packed p, int64_t rows, int64_t columns, float* c, int64_t c_stride,
                                     bool accumulate) {
    const bfloat16* const a = p.a;
    for (int64_t j = 0; j < columns; j += kGroupColumns) {
        const int64_t width = minimum<int64_t>(kGroupColumns, columns - j);
        for (int64_t i = 0; i < rows; i += kGroupRows) {
            p.a = a + i * p.a_strip;
            float* to = c + 16 * (i * c_stride + j);
            const bool full = i + kGroupRows <= rows;
            if (width == 3)
                multiply_blocks<kGroupRows, kGroupColumns>(p, to, c_stride, accumulate);
            else if (width == 2)
                full ? multiply_blocks<kGroupRows, kTwoColumns>(p, to, c_stride, accumulate)
                     : multiply_blocks<1, kTwoColumns>(p, to, c_stride, accumulate);
            else
                full ? multiply_blocks<kGroupRows, 1>(p, to, c_stride, accumulate)
                     : multiply_blocks<1, 1>(p, to, c_stride, accumulate);
        }
        p.b += kGroupColumns * p.b_panel;
    }
}

// c (16 rows, 16 columns; in blocks) = A B, or += with `accumulate`; A and B are packed `depth` deep.
NANOCHAT_INLINE void multiply_deep(const bfloat16* a, const bfloat16* b, int64_t depth, int64_t rows, int64_t columns,
                                   float* c, int64_t c_stride, bool accumulate) {
    const int64_t size = packed_size(kBlock16, depth);
    for (int64_t k = 0; k < depth || k == 0; k += kDepth16) {
        const int64_t blocks_deep = ceil_div(minimum(kDepth16, depth - k), kBlock16Depth);
        multiply_packed({a + k * kBlock16, size, b + k * kBlock16, size, blocks_deep}, rows, columns, c, c_stride,
                        accumulate || k > 0);
    }
}

// Rows and columns of the sums that a thread holds in its L2 while it multiplies.
constexpr int64_t kItemRows = 128, kItemColumns = 512;
constexpr int64_t kScratch16 = 4 * kItemRows * kItemColumns;   // bytes of one thread's scratch

// c (M, N), row-major, = A B, for packed A (M, K) and B (K, N). All threads of the enclosing parallel region call this
// together, each in a TileScope and with kScratch16 bytes of its own in `sums`; it ends with a barrier. The result does
// not depend on the number of threads.
inline void multiply_team16(int64_t M, int64_t N, int64_t K, const bfloat16* a, const bfloat16* b, bfloat16* c,
                            int threads, float* sums) {
    const int64_t strips = ceil_div(N, kItemColumns);
    int64_t item_rows = kItemRows;
    while (item_rows > 32 && strips * ceil_div(M, item_rows) < 4 * threads) item_rows /= 2;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < strips * ceil_div(M, item_rows); item++) {
        const int64_t row = item / strips * item_rows, column = item % strips * kItemColumns;
        const int64_t rows = minimum(item_rows, M - row), columns = minimum(kItemColumns, N - column);
        multiply_deep(a + packed_size(row, K), b + packed_size(column, K), K, ceil_div(rows, kBlock16),
                      ceil_div(columns, kBlock16), sums, kItemColumns, false);
        for (int64_t r = 0; r < rows; r++) {
            const float* from = sums + r * kItemColumns;
            bfloat16* to = c + (row + r) * N + column;
            int64_t j = 0;
            for (; j + kLanes<float> <= columns; j += kLanes<float>) store(to + j, load(from + j));
            for (; j < columns; j++) write(to + j, from[j]);
        }
    }
}

}   // namespace nanochat::NANOCHAT_ISA
