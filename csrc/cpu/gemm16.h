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
    for (int64_t j = 0; j < columns;) {
        // Four blocks are two and two: one alone has too few sums to hide the latency of an instruction.
        const int64_t width = columns - j == 4 ? kTwoColumns : minimum<int64_t>(kGroupColumns, columns - j);
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
        p.b += width * p.b_panel;
        j += width;
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

// The products A B of a batch of packed matrices, A (M, K) and B (K, N). `lower`: they are known to be symmetric, and what
// lies right of an item's last row on the diagonal is left out.
struct Product16 {
    int64_t M, N, K;
    const bfloat16 *a, *b;
    bool lower = false;
    int64_t batch = 1;
    int64_t a_batch = 0, b_batch = 0;   // elements from one of the batch to the next
};

// Calls store(index, row, rows, column, columns, sums) for each item: rows [row, row + rows) and columns [column, column +
// columns) of a product, whose rows of sums are kItemColumns apart. `row` and `column` are multiples of 32. All threads of
// the enclosing parallel region call this together, each in a TileScope and with kScratch16 bytes of its own in `sums`; it
// ends with a barrier. The sums do not depend on the number of threads.
template <class Store>
void multiply_team16(const Product16& p, int threads, float* sums, const Store& store) {
    const int64_t strips = ceil_div(p.N, kItemColumns);
    int64_t item_rows = kItemRows;
    while (item_rows > 32 && p.batch * strips * ceil_div(p.M, item_rows) < 4 * threads) item_rows /= 2;
    const int64_t blocks = ceil_div(p.M, item_rows);
    // From the last rows up, because the longest rows of a lower triangle come first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < p.batch * strips * blocks; item++) {
        const int64_t index = item / (strips * blocks);
        const int64_t row = (blocks - 1 - item / strips % blocks) * item_rows, column = item % strips * kItemColumns;
        const int64_t rows = minimum(item_rows, p.M - row);
        const int64_t columns = minimum(kItemColumns, (p.lower ? row + rows : p.N) - column);
        if (columns <= 0) continue;
        multiply_deep(p.a + index * p.a_batch + packed_size(row, p.K),
                      p.b + index * p.b_batch + packed_size(column, p.K), p.K, ceil_div(rows, kBlock16),
                      ceil_div(columns, kBlock16), sums, kItemColumns, false);
        store(index, row, rows, column, columns, sums);
    }
}

// c (M, N), row-major, = A B, for packed A (M, K) and B (K, N), as above.
inline void multiply_team16(int64_t M, int64_t N, int64_t K, const bfloat16* a, const bfloat16* b, bfloat16* c,
                            int threads, float* sums) {
    const auto write_item = [=](int64_t, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                const float* from) {
        for (int64_t r = 0; r < rows; r++, from += kItemColumns) {
            bfloat16* to = c + (row + r) * N + column;
            int64_t j = 0;
            for (; j + kLanes<float> <= columns; j += kLanes<float>) store(to + j, load(from + j));
            for (; j < columns; j++) write(to + j, from[j]);
        }
    };
    multiply_team16({.M = M, .N = N, .K = K, .a = a, .b = b}, threads, sums, write_item);
}

}   // namespace nanochat::NANOCHAT_ISA
