// Products of int8 weights with rows of float32, by the dot products of bytes of AVX512-VNNI. For cached_forward.cpp only.
//
// The instruction multiplies unsigned by signed bytes and adds four products to an int32. A row is rounded to 24 bits, as
// many as float32 has: x = scale (65536 high + 256 middle + low), all three of them signed bytes. A weight w becomes the
// unsigned w + 128, and so sums begin with -128 times the sum of the bytes of x. Sums of integers are exact, so their order
// changes no bit.
#pragma once

#include "simd.h"

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace nanochat::NANOCHAT_ISA {

constexpr int kDigits = 3;   // bytes of a number, the high one first

// Rows of x (rows, K), rounded. `bytes` holds for each row and digit `padded` bytes; zeros follow the K numbers. `offsets` are
// what sums of their products begin with.
struct RoundedRows {
    int64_t rows, K, padded;
    int8_t* bytes;
    float* scales;
    int32_t (*offsets)[kDigits][16];
};

constexpr int64_t kInt8Line = 64;
constexpr int kInt8Outputs = 8;   // sums of a tile: rows of x times rows of w

#if defined(__AVX512VNNI__)

constexpr bool kMultipliesInt8 = true;

typedef Vec<int32_t> Ints;

// Rounds rows [begin, end) to nearest. The largest absolute value becomes about 127 * 65536, which leaves room for the rounding of
// its product with the inverse scale. If a number is NaN or infinite, the scale is, and so are the products.
inline void round_rows(const float* x, int64_t begin, int64_t end, const RoundedRows& to) {
    constexpr int W = kLanes<float>;
    constexpr float kLargest = 127 * 65536, kZero = 1e-30f;   // the inverse of a smaller number may be infinite
    for (int64_t r = begin; r < end; r++) {
        const auto load_at = [&](int64_t k) {
            Vec<float> v = {};
            __builtin_memcpy(&v, x + r * to.K + k, static_cast<size_t>(minimum<int64_t>(W, to.K - k)) * sizeof(float));
            return v;
        };
        Ints largest = {};   // compared as integers, NaN is above all numbers
        for (int64_t k = 0; k < to.K; k += W) {
            const Ints magnitude = __builtin_bit_cast(Ints, load_at(k)) & INT32_MAX;
            largest = magnitude > largest ? magnitude : largest;
        }
        const auto top = __builtin_bit_cast(float, _mm512_reduce_max_epi32(__builtin_bit_cast(__m512i, largest)));
        const float inverse = top > kZero ? kLargest / top : 0;
        to.scales[r] = top / kLargest;
        int8_t* bytes = to.bytes + r * kDigits * to.padded;
        for (int64_t k = 0; k < to.padded; k += W) {
            const Vec<float> scaled = k < to.K ? load_at(k) * inverse : Vec<float>{};
            Ints rest = __builtin_bit_cast(Ints, _mm512_cvtps_epi32(__builtin_bit_cast(__m512, scaled)));
#pragma GCC unroll 3
            for (int digit = kDigits - 1; digit >= 0; digit--) {
                const __m128i narrow = _mm512_cvtepi32_epi8(__builtin_bit_cast(__m512i, rest));
                __builtin_memcpy(bytes + digit * to.padded + k, &narrow, sizeof narrow);
                rest = (rest + 128) >> 8;
            }
        }
        for (int digit = 0; digit < kDigits; digit++) {
            __m512i sums = _mm512_setzero_si512();
            for (int64_t k = 0; k < to.padded; k += kInt8Line)
                sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(INT8_MIN),
                                           _mm512_loadu_si512(bytes + digit * to.padded + k));
            _mm512_storeu_si512(to.offsets[r][digit], _mm512_sub_epi32(_mm512_setzero_si512(), sums));
        }
    }
}

// Sums of a digit, of R rows of x and J rows of w.
struct DigitSums {
    Ints v[kDigits][kInt8Outputs];
};

// Adds the products of R rows of bytes, from `bytes` on, and J rows of w, from `own` on and K numbers apart. `part` are the
// bytes of the line that belong to the rows.
template <int R, int J, bool whole>
NANOCHAT_INLINE void add_int8_products(const RoundedRows& x, const int8_t* bytes, const int8_t* own, __mmask64 part,
                                       DigitSums& sums) {
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
        const int8_t* const at = own + j * x.K;
        const __m512i bits = whole ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(part, at);
        const __m512i weights = _mm512_xor_si512(bits, _mm512_set1_epi8(INT8_MIN));
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 3
            for (int digit = 0; digit < kDigits; digit++) {
                Ints& sum = sums.v[digit][r * J + j];
                sum = __builtin_bit_cast(
                    Ints, _mm512_dpbusd_epi32(__builtin_bit_cast(__m512i, sum), weights,
                                              _mm512_loadu_si512(bytes + (kDigits * r + digit) * x.padded)));
            }
    }
}

// sums[r * J + j] = x[row + r] . w[o + j], for R rows of x and J rows of w (outputs, K), with the scales of both.
template <int R, int J, bool prefetch>
__attribute__((noinline)) void tile_of_int8_products(const RoundedRows& x, int64_t row, const int8_t* w,
                                                     const float* scales, int64_t o, float* sums) {
    typedef int32_t Half __attribute__((vector_size(4 * kInt8Outputs)));
    typedef float Floats __attribute__((vector_size(4 * kInt8Outputs)));
    const int8_t *bytes = x.bytes + row * kDigits * x.padded, *own = w + o * x.K, *ahead = own + 2 * J * x.K;
    DigitSums total;
#pragma GCC unroll 3
    for (int digit = 0; digit < kDigits; digit++)
#pragma GCC unroll 8
        for (int i = 0; i < kInt8Outputs; i++)
            total.v[digit][i] = i < R * J ? __builtin_bit_cast(Ints, _mm512_loadu_si512(x.offsets[row + i / J][digit]))
                                          : Ints{};
    int64_t k = 0;
    for (; k + kInt8Line <= x.K; k += kInt8Line) {
        if (prefetch)
#pragma GCC unroll 8
            for (int j = 0; j < J; j++) __builtin_prefetch(ahead + k * J + j * kInt8Line, 0, 2);
        add_int8_products<R, J, true>(x, bytes + k, own + k, 0, total);
    }
    if (k < x.K) add_int8_products<R, J, false>(x, bytes + k, own + k, (__mmask64{1} << (x.K - k)) - 1, total);

    SumVectors<int32_t> upper, lower;
#pragma GCC unroll 8
    for (int i = 0; i < kInt8Outputs; i++) {
        upper.v[i] = total.v[0][i];
        upper.v[i + kInt8Outputs] = total.v[1][i];
        lower.v[i] = total.v[2][i];
        lower.v[i + kInt8Outputs] = Ints{};
    }
    const Ints each[2] = {sum_each(upper), sum_each(lower)};
    Half found[kDigits];
    __builtin_memcpy(found, each, sizeof found);
    float factors[kInt8Outputs] = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int j = 0; j < J; j++) factors[r * J + j] = x.scales[row + r] * scales[o + j];
    Floats result = {}, factor;
#pragma GCC unroll 3
    for (int digit = 0; digit < kDigits; digit++)
        result = result * 256.0f + __builtin_convertvector(found[digit], Floats);
    __builtin_memcpy(&factor, factors, sizeof factor);
    result *= factor;
    __builtin_memcpy(sums, &result, sizeof result);
}

#else

constexpr bool kMultipliesInt8 = false;
inline void round_rows(const float*, int64_t, int64_t, const RoundedRows&) {}
template <int R, int J, bool prefetch>
void tile_of_int8_products(const RoundedRows&, int64_t, const int8_t*, const float*, int64_t, float*) {}

#endif

}   // namespace nanochat::NANOCHAT_ISA
