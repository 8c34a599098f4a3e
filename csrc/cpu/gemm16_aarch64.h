// Products of blocks of bfloat16 by BFMMLA: a vector of 2 x 2 sums, 4 products deep.
//
// A is packed in blocks of 16 rows x 32 deep, row after row; B in blocks of 32 deep x 16 columns, where 4 numbers of a
// column that follow each other over the depth lie side by side.
#pragma once

#include "gemm16_blocks.h"

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

namespace nanochat::NANOCHAT_ISA {

// There are no tiles to configure.
struct TileScope {
    TileScope() {}
};

// Writes numbers of an operand.
NANOCHAT_INLINE void store_operand(bfloat16* p, Vec<float> x) { store(p, x); }

typedef uint16_t Quad __attribute__((vector_size(8)));

// The first `count` of 4 numbers as bfloat16, rounded to nearest even; the others are zero.
NANOCHAT_INLINE Quad read_quad(const bfloat16* p, int64_t count) {
    Quad x = {};
    if (count >= 4)
        __builtin_memcpy(&x, p, sizeof x);
    else
        for (int64_t i = 0; i < count; i++) x[i] = p[i].bits;
    return x;
}
NANOCHAT_INLINE Quad read_quad(const float* p, int64_t count) {
    float numbers[4] = {};
    if (count >= 4)
        __builtin_memcpy(numbers, p, sizeof numbers);
    else
        for (int64_t i = 0; i < count; i++) numbers[i] = p[i];
    bfloat16 narrow[4];
    store(narrow, load(numbers));
    return read_quad(narrow, 4);
}

// One block of 16 x 32 in the form of A, or, with `as_b`, of B. Numbers outside count x depth are zero.
template <bool as_b, class S>
NANOCHAT_INLINE void pack_block(const Operand<S>& x, int64_t i, int64_t count, int64_t k, int64_t depth, bfloat16* to) {
    const auto put = [&](int64_t row, int64_t d, Quad quad) {
        __builtin_memcpy(to + (as_b ? d * kBlock16 + 4 * row : row * kBlock16Depth + d), &quad, sizeof quad);
    };
    if (x.layout == Layout::rows) {
        for (int64_t row = 0; row < kBlock16; row++)
            for (int64_t d = 0; d < kBlock16Depth; d += 4)
                put(row, d, read_quad(x.p + (i + row) * x.stride + k + d, row < count ? depth - d : 0));
        return;
    }
    for (int64_t d = 0; d < kBlock16Depth; d += 4)
        for (int64_t row = 0; row < kBlock16; row += 4) {
            Quad square[4];
#pragma GCC unroll 4
            for (int64_t e = 0; e < 4; e++)
                square[e] = read_quad(x.p + (k + d + e) * x.stride + i + row, d + e < depth ? count - row : 0);
            transpose_square<1>(square);
#pragma GCC unroll 4
            for (int64_t r = 0; r < 4; r++) put(row + r, d, square[r]);
        }
}

constexpr int kGroupRows = 1, kGroupColumns = 1;   // blocks of sums
constexpr int64_t kDepth16 = 256;                  // 16 columns of B, 8 KB, stay in L1

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)

constexpr bool kMultipliesBfloat16 = true;

NANOCHAT_INLINE uint64x2_t load_eight(const bfloat16* p) {
    uint64x2_t x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

// c (8, 8) = A B, or += with `accumulate`, `depth` blocks deep: 4 x 4 vectors of sums, 8 of A and 4 of B fill 28 of 32
// registers. sum[i][j] holds rows 2 i and 2 i + 1, columns 2 j and 2 j + 1.
NANOCHAT_INLINE void multiply_eighths(const bfloat16* a, const bfloat16* b, int64_t depth, float* c, int64_t c_stride,
                                      bool accumulate) {
    float32x4_t sum[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 4; j += 2) {
            const float* from = c + 2 * i * c_stride + 2 * j;
            const float32x4_t upper = accumulate ? vld1q_f32(from) : vdupq_n_f32(0);
            const float32x4_t lower = accumulate ? vld1q_f32(from + c_stride) : vdupq_n_f32(0);
            sum[i][j] = vcombine_f32(vget_low_f32(upper), vget_low_f32(lower));
            sum[i][j + 1] = vcombine_f32(vget_high_f32(upper), vget_high_f32(lower));
        }
    for (int64_t k = 0; k < depth * kBlock16Size; k += kBlock16Size)
        for (int d = 0; d < kBlock16Depth; d += 8) {
            bfloat16x8_t rows[2][4];   // of the first and the last 4 of 8 products, 2 rows each
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const bfloat16* from = a + k + 2 * i * kBlock16Depth + d;
                const uint64x2_t upper = load_eight(from), lower = load_eight(from + kBlock16Depth);
                rows[0][i] = vreinterpretq_bf16_u64(vzip1q_u64(upper, lower));
                rows[1][i] = vreinterpretq_bf16_u64(vzip2q_u64(upper, lower));
            }
#pragma GCC unroll 2
            for (int quad = 0; quad < 2; quad++) {
                bfloat16x8_t columns[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    columns[j] = vreinterpretq_bf16_u64(load_eight(b + k + (d + 4 * quad) * kBlock16 + 8 * j));
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) sum[i][j] = vbfmmlaq_f32(sum[i][j], rows[quad][i], columns[j]);
            }
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 4; j += 2) {
            float* to = c + 2 * i * c_stride + 2 * j;
            vst1q_f32(to, vcombine_f32(vget_low_f32(sum[i][j]), vget_low_f32(sum[i][j + 1])));
            vst1q_f32(to + c_stride, vcombine_f32(vget_high_f32(sum[i][j]), vget_high_f32(sum[i][j + 1])));
        }
}

// c (16, 16) = A B, or += with `accumulate`.
template <int MT, int NT>
NANOCHAT_INLINE void multiply_blocks(const Packed& p, float* c, int64_t c_stride, bool accumulate) {
    static_assert(MT == 1 && NT == 1);
    for (int row = 0; row < kBlock16; row += 8)
        for (int column = 0; column < kBlock16; column += 8)
            multiply_eighths(p.a + row * kBlock16Depth, p.b + 4 * column, p.depth, c + row * c_stride + column,
                             c_stride, accumulate);
}

#else

constexpr bool kMultipliesBfloat16 = false;

template <int, int>
NANOCHAT_INLINE void multiply_blocks(const Packed&, float*, int64_t, bool) {}

#endif

}   // namespace nanochat::NANOCHAT_ISA
