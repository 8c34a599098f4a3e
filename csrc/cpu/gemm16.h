// Products of bfloat16 matrices with float32 sums, for instruction sets that multiply pairs of bfloat16: AMX (a tile of
// 16 x 16 sums, 32 products deep) and AVX512-BF16 (a vector of 16 sums, 2 deep).
//
// Both read the same packed operands, so that there is one packing. A is packed in blocks of 16 rows x 32 deep, row
// after row; B in blocks of 32 deep x 16 columns, where the two numbers of a pair of rows lie side by side: the
// multiply instructions take one 32-bit pair of A against one of B. A block is 1 KB, which is one tile. The blocks of a
// strip of 16 rows (of A) or of a panel of 16 columns (of B) follow each other over the depth.
#pragma once

#include "amx.h"
#include "gemm.h"

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
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = kHasTiles;
#endif

constexpr int64_t kBlock16 = 16;        // rows of a block of A, columns of a block of B
constexpr int64_t kBlock16Depth = 32;   // depth of both
constexpr int64_t kBlock16Size = kBlock16 * kBlock16Depth;

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

NANOCHAT_INLINE void transpose_pairs(Pairs (&square)[16]) {
#pragma GCC unroll 4
    for (int s = 1; s < 16; s *= 2) {
        Pairs low, high;
#pragma GCC unroll 16
        for (int lane = 0; lane < 16; lane++) {
            low[lane] = lane & s ? 16 + lane - s : lane;
            high[lane] = lane & s ? 16 + lane : lane + s;
        }
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            if (!(r & s)) {
                const Pairs upper = square[r], lower = square[r + s];
                square[r] = __builtin_shuffle(upper, lower, low);
                square[r + s] = __builtin_shuffle(upper, lower, high);
            }
    }
}

// The numbers X(i, k) of an operand, i < count and k < depth: X is A, or the transpose of B. By rows: p[i * stride + k];
// by columns: p[k * stride + i].
template <class S>
struct Operand {
    const S* p;
    int64_t stride;
    Layout layout;
};

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
    if (by_rows == as_b) transpose_pairs(square);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) store_pairs(to + 32 * r, square[r]);
}

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

// A product of packed operands, in blocks. The blocks of a strip of A are `a_strip` elements apart, and so on.
struct Packed {
    const bfloat16* a;
    int64_t a_strip;
    const bfloat16* b;
    int64_t b_panel;
    int64_t depth;   // in blocks
};

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
