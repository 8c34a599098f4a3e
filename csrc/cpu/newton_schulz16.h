// Newton-Schulz with products of bfloat16 and float32 sums, in the plain form. X, G = X^T X and F = b G + c G^2 are rounded to
// bfloat16 where they are packed. The last X is not rounded.
#pragma once

#include "../kernels.h"
#include "gemm16.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {

// What is kept of a matrix X (L, R); null if it is not needed.
struct PackedForms {
    bfloat16* a = nullptr;              // X as A
    bfloat16* a_transposed = nullptr;   // X^T as A
    bfloat16* b = nullptr;              // X as B
};

// Packs the tile at (row, column) of X, or, with `transposed`, of X^T. Both are multiples of 32, and the tile ends at such a
// multiple or with the matrix.
template <bool transposed>
NANOCHAT_INLINE void pack_tile(const float* tile, int64_t stride, int64_t row, int64_t rows, int64_t column,
                               int64_t columns, int64_t L, int64_t R, const PackedForms& to) {
    const Operand<float> by_rows = {tile, stride, Layout::rows}, by_columns = {tile, stride, Layout::columns};
    bfloat16 *const a_of_rows = transposed ? to.a_transposed : to.a, *const b_of_rows = transposed ? to.b : nullptr;
    bfloat16 *const a_of_columns = transposed ? to.a : to.a_transposed, *const b_of_columns = transposed ? nullptr
                                                                                                         : to.b;
    for (int64_t r = 0; r < rows; r += kBlock16) {
        const int64_t place = packed_size(row + r, transposed ? L : R) + column * kBlock16;
        if (a_of_rows) pack<false>(by_rows, r, minimum(kBlock16, rows - r), 0, columns, a_of_rows + place);
        if (b_of_rows) pack<true>(by_rows, r, minimum(kBlock16, rows - r), 0, columns, b_of_rows + place);
    }
    for (int64_t c = 0; c < columns; c += kBlock16) {
        const int64_t place = packed_size(column + c, transposed ? R : L) + row * kBlock16;
        if (a_of_columns) pack<false>(by_columns, c, minimum(kBlock16, columns - c), 0, rows, a_of_columns + place);
        if (b_of_columns) pack<true>(by_columns, c, minimum(kBlock16, columns - c), 0, rows, b_of_columns + place);
    }
}

struct NewtonSchulz16 {
    const NewtonSchulz& args;
    const bool wide = args.M < args.K;
    const int64_t batch = args.batch, L = wide ? args.K : args.M, R = wide ? args.M : args.K;   // X is (L, R), R <= L
    const int64_t size_a = packed_size(L, R), size_b = packed_size(R, L), size_square = packed_size(R, R);
    PackedForms x, G, F;             // of the first matrix of the batch
    bfloat16* following = nullptr;   // the next X as A
    float* sums = nullptr;           // (threads, kScratch16 bytes)

    explicit NewtonSchulz16(const NewtonSchulz& args) : args(args) {}

    void carve(cpu::Arena& arena) {
        x = {arena.take<bfloat16>(batch * size_a), arena.take<bfloat16>(batch * size_b),
             arena.take<bfloat16>(batch * size_b)};
        G = {.a = arena.take<bfloat16>(batch * size_square), .b = arena.take<bfloat16>(batch * size_square)};
        F = {.b = arena.take<bfloat16>(batch * size_square)};
        following = arena.take<bfloat16>(batch * size_a);
        sums = arena.take<float>(args.execution.threads * kScratch16 / 4);
    }

    PackedForms x_of(int64_t index) const {
        return {x.a + index * size_a, x.a_transposed + index * size_b, x.b + index * size_b};
    }

    // Packs rows [row, row + rows) of a matrix of g, each times scale(row). `own` is the scratch of this thread.
    template <class Scale>
    void pack_scaled(int64_t index, int64_t row, int64_t rows, const Scale& scale, float* own) const {
        const int64_t K = args.K;
        const float* from = static_cast<const float*>(args.g) + index * args.M * K + row * K;
        for (int64_t column = 0; column < K; column += kItemColumns) {
            const int64_t columns = minimum(kItemColumns, K - column);
            for (int64_t r = 0; r < rows; r++) {
                const double factor = scale(row + r);
                for (int64_t c = 0; c < columns; c++)
                    own[r * kItemColumns + c] =
                        static_cast<float>(static_cast<double>(from[r * K + column + c]) * factor);
            }
            wide ? pack_tile<true>(own, kItemColumns, row, rows, column, columns, L, R, x_of(index))
                 : pack_tile<false>(own, kItemColumns, row, rows, column, columns, L, R, x_of(index));
        }
    }

    // sums = scale sums + source_scale S, for the same place of S (.., R), which is packed as A.
    void combine(float* item, int64_t row, int64_t rows, int64_t column, int64_t columns, float scale,
                 const bfloat16* S, float source_scale) const {
        for (int64_t r = 0; r < rows; r++, item += kItemColumns) {
            const int64_t strip = (row + r) / kBlock16 * kBlock16, line = (row + r) % kBlock16;
            for (int64_t c = 0; c < columns; c += kBlock16Depth) {
                const bfloat16* from = S + packed_size(strip, R) + (column + c) * kBlock16 + line * kBlock16Depth;
                for (int64_t lane = 0; lane < kBlock16Depth; lane += kLanes<float>)
                    store(item + c + lane, load(item + c + lane) * scale + load(from + lane) * source_scale);
            }
        }
    }

    // to = scale A B + source_scale source, for packed symmetric (R, R) results.
    void symmetric(const bfloat16* a, const bfloat16* b, int64_t depth, float scale, const bfloat16* source,
                   float source_scale, const PackedForms& to, float* own) const {
        const Product16 product = {
            .M = R,
            .N = R,
            .K = depth,
            .a = a,
            .b = b,
            .lower = true,
            .batch = batch,
            .a_batch = packed_size(R, depth),
            .b_batch = packed_size(R, depth),
        };
        const auto store_item = [&](int64_t index, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                    float* item) {
            if (source) combine(item, row, rows, column, columns, scale, source + index * size_square, source_scale);
            const PackedForms forms = {.a = to.a ? to.a + index * size_square : nullptr,
                                       .b = to.b + index * size_square};
            pack_tile<false>(item, kItemColumns, row, rows, column, columns, R, R, forms);
            if (column < row)
                pack_tile<true>(item, kItemColumns, row, rows, column, minimum(columns, row - column), R, R, forms);
        };
        multiply_team16(product, args.execution.threads, own, store_item);
    }

    // All steps, for X that is packed. All threads of the enclosing parallel region call this together, each in a
    // TileScope.
    void run(float* own) const {
        PackedForms now = x;
        bfloat16* next = following;
        for (int64_t step = 0; step < args.steps; step++) {
            const double* triple = args.coefficients + 3 * step;
            const auto a = static_cast<float>(triple[0]), b = static_cast<float>(triple[1]),
                       c = static_cast<float>(triple[2]);
            symmetric(now.a_transposed, now.b, L, 1.0f, nullptr, 0.0f, G, own);
            symmetric(G.a, G.b, R, c, G.a, b, F, own);
            const Product16 product = {
                .M = L,
                .N = R,
                .K = R,
                .a = now.a,
                .b = F.b,
                .batch = batch,
                .a_batch = size_a,
                .b_batch = size_square,
            };
            const bool last = step + 1 == args.steps;
            const auto store_item = [&](int64_t index, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                        float* item) {
                combine(item, row, rows, column, columns, 1.0f, now.a + index * size_a, a);
                if (last) {
                    write_result(index, row, rows, column, columns, item);
                } else {
                    PackedForms forms = x_of(index);
                    forms.a = next + index * size_a;
                    pack_tile<false>(item, kItemColumns, row, rows, column, columns, L, R, forms);
                }
            };
            multiply_team16(product, args.execution.threads, own, store_item);
            bfloat16* previous = now.a;
            now.a = next;
            next = previous;
        }
    }

    void write_result(int64_t index, int64_t row, int64_t rows, int64_t column, int64_t columns,
                      const float* item) const {
        float* out = static_cast<float*>(args.out) + index * L * R;
        if (wide) return transpose(rows, columns, item, kItemColumns, out + column * L + row, L);
        for (int64_t r = 0; r < rows; r++)
            memcpy(out + (row + r) * R + column, item + r * kItemColumns, columns * sizeof(float));
    }
};

}   // namespace nanochat::NANOCHAT_ISA
