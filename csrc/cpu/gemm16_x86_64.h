// Products of blocks of bfloat16 by AMX (a tile of 16 x 16 sums, 32 products deep) and by AVX512-BF16 (a vector of 16
// sums, 2 deep).
//
// Both read the same packed operands. A is packed in blocks of 16 rows x 32 deep, row after row; B in blocks of 32 deep x
// 16 columns, where the two numbers of a pair of rows lie side by side: the multiply instructions take one 32-bit pair of
// A against one of B. A block is 1 KB, which is one tile.
#pragma once

#include "amx.h"
#include "gemm16_blocks.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace nanochat::NANOCHAT_ISA {

#if defined(__AMX_BF16__) || defined(NANOCHAT_EMULATE_AMX)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
#if defined(__AVX512BF16__)
constexpr bool kMultipliesBfloat16 = true;
#else
constexpr bool kMultipliesBfloat16 = kHasTiles;
#endif

typedef uint32_t Pairs __attribute__((vector_size(64)));   // 16 pairs of bfloat16, the first in the low half
typedef float Sums __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

NANOCHAT_INLINE Sums load_sums(const float* p) {
    Sums x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
NANOCHAT_INLINE void store_sums(float* p, Sums x) { __builtin_memcpy(p, &x, sizeof x); }
NANOCHAT_INLINE Pairs load_pairs(const bfloat16* p) {
    Pairs x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
NANOCHAT_INLINE void store_pairs(bfloat16* p, Pairs x) { __builtin_memcpy(p, &x, sizeof x); }

// The 16 numbers as bfloat16, rounded to nearest even. The instruction takes denormals for zeros, as the products do.
NANOCHAT_INLINE Halves narrow(Sums x) {
#if defined(__AVX512BF16__)
    return __builtin_bit_cast(Halves, _mm512_cvtneps_pbh(__builtin_bit_cast(__m512, x)));
#else
    const Pairs u = __builtin_bit_cast(Pairs, x);
    const Pairs rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
    return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, Halves);
#endif
}

// Writes numbers of an operand. As in the products, denormals may become zeros.
NANOCHAT_INLINE void store_operand(bfloat16* p, Vec<float> x) {
#if defined(__AVX512BF16__)
    const Halves h = narrow(x);
    __builtin_memcpy(p, &h, sizeof h);
#else
    store(p, x);
#endif
}

// Lane i holds first[i] in its low half and second[i] in its high half.
NANOCHAT_INLINE Pairs interleave(Halves first, Halves second) {
    return __builtin_convertvector(first, Pairs) | __builtin_convertvector(second, Pairs) << 16;
}

// The first `count` of 16 numbers, at most 16; the others are zero.
NANOCHAT_INLINE Halves read_halves(const bfloat16* p, int64_t count) {
    Halves x = {};
    if (count >= 16)
        __builtin_memcpy(&x, p, sizeof x);
    else
        for (int64_t i = 0; i < count; i++) x[i] = p[i].bits;
    return x;
}
NANOCHAT_INLINE Halves read_halves(const float* p, int64_t count) {
    if (count >= 16) return narrow(load_sums(p));
    Sums x = {};
    for (int64_t i = 0; i < count; i++) x[i] = p[i];
    return narrow(x);
}

// One block of 16 x 32 in the form of A, or, with `as_b`, of B. Numbers outside count x depth are zero.
template <bool as_b, class S>
NANOCHAT_INLINE void pack_block(const Operand<S>& x, int64_t i, int64_t count, int64_t k, int64_t depth, bfloat16* to) {
    const bool by_rows = x.layout == Layout::rows;
    Pairs square[16];
    if (by_rows) {
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) {
            const S* from = x.p + (i + r) * x.stride + k;
            const Halves first = read_halves(from, r < count ? depth : 0);
            const Halves second = read_halves(from + 16, r < count ? depth - 16 : 0);
            __builtin_memcpy(reinterpret_cast<char*>(&square[r]), &first, 32);
            __builtin_memcpy(reinterpret_cast<char*>(&square[r]) + 32, &second, 32);
        }
    } else {
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) {
            const S* from = x.p + (k + 2 * r) * x.stride + i;
            square[r] = interleave(read_halves(from, 2 * r < depth ? count : 0),
                                   read_halves(from + x.stride, 2 * r + 1 < depth ? count : 0));
        }
    }
    if (by_rows == as_b) transpose_square<1>(square);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) store_pairs(to + 32 * r, square[r]);
}

#if defined(__AMX_BF16__) || defined(NANOCHAT_EMULATE_AMX)

// c (16 MT, 16 NT) = A B, or += with `accumulate`.
template <int MT, int NT>
NANOCHAT_INLINE void multiply_blocks(const Packed& p, float* c, int64_t c_stride, bool accumulate) {
    const int64_t row = c_stride * 4, down = 16 * c_stride;
    if (accumulate) {
        tile_load<0>(c, row);
        if constexpr (NT > 1) tile_load<1>(c + 16, row);
        if constexpr (MT > 1) tile_load<2>(c + down, row);
        if constexpr (MT > 1 && NT > 1) tile_load<3>(c + down + 16, row);
    } else {
        tile_zero<0>();
        if constexpr (NT > 1) tile_zero<1>();
        if constexpr (MT > 1) tile_zero<2>();
        if constexpr (MT > 1 && NT > 1) tile_zero<3>();
    }
    for (int64_t k = 0; k < p.depth * kBlock16Size; k += kBlock16Size) {
        tile_load<4>(p.a + k, 64);
        tile_load<6>(p.b + k, 64);
        tile_dot<0, 4, 6>();
        if constexpr (NT > 1) {
            tile_load<7>(p.b + p.b_panel + k, 64);
            tile_dot<1, 4, 7>();
        }
        if constexpr (MT > 1) {
            tile_load<5>(p.a + p.a_strip + k, 64);
            tile_dot<2, 5, 6>();
        }
        if constexpr (MT > 1 && NT > 1) tile_dot<3, 5, 7>();
    }
    tile_store<0>(c, row);
    if constexpr (NT > 1) tile_store<1>(c + 16, row);
    if constexpr (MT > 1) tile_store<2>(c + down, row);
    if constexpr (MT > 1 && NT > 1) tile_store<3>(c + down + 16, row);
}
constexpr int kGroupRows = 2, kGroupColumns = 2;   // blocks of sums that the registers hold
constexpr int64_t kDepth16 = 512;                  // of A and B, 32 rows and 32 columns take 64 KB

#elif defined(__AVX512BF16__)

// 8 rows at a time: 8 x 3 sums, 3 vectors of B and 1 of A fill 28 of 32 registers.
template <int MT, int NT>
NANOCHAT_INLINE void multiply_blocks(const Packed& p, float* c, int64_t c_stride, bool accumulate) {
    for (int half = 0; half < 2 * MT; half++) {
        const bfloat16* a = p.a + half / 2 * p.a_strip + half % 2 * 8 * kBlock16Depth;
        float* to = c + half * 8 * c_stride;
        __m512 sum[8][NT];
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
#pragma GCC unroll 3
            for (int v = 0; v < NT; v++)
                sum[r][v] = accumulate ? __builtin_bit_cast(__m512, load_sums(to + r * c_stride + 16 * v)) : __m512{};
        for (int64_t k = 0; k < p.depth * kBlock16Size; k += kBlock16Size)
            for (int pair = 0; pair < 16; pair++) {
                Pairs columns[NT];
#pragma GCC unroll 3
                for (int v = 0; v < NT; v++) columns[v] = load_pairs(p.b + v * p.b_panel + k + 32 * pair);
#pragma GCC unroll 8
                for (int r = 0; r < 8; r++) {
                    uint32_t x;
                    __builtin_memcpy(&x, a + k + r * kBlock16Depth + 2 * pair, sizeof x);
                    const __m512bh left = __builtin_bit_cast(__m512bh, x - Pairs{});
#pragma GCC unroll 3
                    for (int v = 0; v < NT; v++)
                        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, __builtin_bit_cast(__m512bh, columns[v]));
                }
            }
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
#pragma GCC unroll 3
            for (int v = 0; v < NT; v++) store_sums(to + r * c_stride + 16 * v, __builtin_bit_cast(Sums, sum[r][v]));
    }
}
constexpr int kGroupRows = 1, kGroupColumns = 3;
constexpr int64_t kDepth16 = 256;   // 48 columns of B, 24 KB, stay in L1

#else

template <int, int>
NANOCHAT_INLINE void multiply_blocks(const Packed&, float*, int64_t, bool) {}
constexpr int kGroupRows = 1, kGroupColumns = 1;
constexpr int64_t kDepth16 = 256;

#endif

}   // namespace nanochat::NANOCHAT_ISA
