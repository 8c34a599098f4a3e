// Vectors of the instruction set that this file is compiled for. Every kernel file is compiled once per set, with
// NANOCHAT_ISA as the name of the namespace that keeps the copies apart. Neither this file nor a kernel may emit a
// symbol that the linker merges across the copies (no inline function of the standard library): an older processor
// could then run code for a newer one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define NANOCHAT_INLINE inline __attribute__((always_inline))

namespace nanochat::NANOCHAT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileVectors = 4;   // 6 x 4 accumulators, 4 columns and 1 broadcast fill 29 of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileVectors = 2;   // 6 x 2 accumulators, 2 columns and 1 broadcast fill 15 of 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kTileVectors = 4;   // as with AVX-512, of 32 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileVectors = 2;
#endif

struct bfloat16 {
    uint16_t bits;
};

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
NANOCHAT_INLINE T minimum(T a, T b) {
    return b < a ? b : a;
}
template <class T>
NANOCHAT_INLINE T maximum(T a, T b) {
    return a < b ? b : a;
}
NANOCHAT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NANOCHAT_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
NANOCHAT_INLINE Vec<T> broadcast(T x) {
    return x - Vec<T>{};
}
template <class T, class = std::enable_if_t<std::is_floating_point_v<T>>>
NANOCHAT_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class T, class = std::enable_if_t<std::is_floating_point_v<T>>>
NANOCHAT_INLINE void store(T* p, Vec<T> v) {
    __builtin_memcpy(p, &v, sizeof v);
}

NANOCHAT_INLINE float to_float(bfloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

// Rounds to nearest even; a NaN stays a NaN.
NANOCHAT_INLINE bfloat16 to_bfloat16(float x) {
    const uint32_t u = __builtin_bit_cast(uint32_t, x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
    return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

// Conversions between 16 and 32 bits. GCC 12 takes __builtin_convertvector apart into several instructions here. The full masks
// avoid its warnings about the intrinsics without one, whose definitions read a variable that is not set.
NANOCHAT_INLINE Vec<uint32_t> widen(HalfWords h) {
#if defined(__AVX512F__)
    return __builtin_bit_cast(Vec<uint32_t>, _mm512_maskz_cvtepu16_epi32(0xffff, __builtin_bit_cast(__m256i, h)));
#elif defined(__AVX2__)
    return __builtin_bit_cast(Vec<uint32_t>, _mm256_cvtepu16_epi32(__builtin_bit_cast(__m128i, h)));
#else
    return __builtin_convertvector(h, Vec<uint32_t>);
#endif
}
// Takes numbers below 2^16.
NANOCHAT_INLINE HalfWords narrow(Vec<uint32_t> v) {
#if defined(__AVX512F__)
    return __builtin_bit_cast(HalfWords, _mm512_maskz_cvtepi32_epi16(0xffff, __builtin_bit_cast(__m512i, v)));
#elif defined(__AVX2__)
    const auto wide = __builtin_bit_cast(__m256i, v);
    return __builtin_bit_cast(HalfWords,
                              _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
    return __builtin_convertvector(v, HalfWords);
#endif
}

NANOCHAT_INLINE Vec<float> load(const bfloat16* p) {
    HalfWords h;
    __builtin_memcpy(&h, p, sizeof h);
    return __builtin_bit_cast(Vec<float>, widen(h) << 16);
}
NANOCHAT_INLINE void store(bfloat16* p, Vec<float> v) {
    const Vec<uint32_t> u = __builtin_bit_cast(Vec<uint32_t>, v);
    const Vec<uint32_t> rounded = u + 0x7fffu + ((u >> 16) & 1u), quiet = u | 0x400000u;
    const HalfWords h = narrow((v != v ? quiet : rounded) >> 16);
    __builtin_memcpy(p, &h, sizeof h);
}

// Read an element of a tensor as the type that the kernel computes in, and write it back.
NANOCHAT_INLINE float read(const float* p) { return *p; }
NANOCHAT_INLINE double read(const double* p) { return *p; }
NANOCHAT_INLINE float read(const bfloat16* p) { return to_float(*p); }
NANOCHAT_INLINE void write(float* p, float x) { *p = x; }
NANOCHAT_INLINE void write(double* p, double x) { *p = x; }
NANOCHAT_INLINE void write(float* p, double x) { *p = static_cast<float>(x); }
NANOCHAT_INLINE void write(bfloat16* p, float x) { *p = to_bfloat16(x); }

template <class T>
NANOCHAT_INLINE Vec<T> maximum_lanes(Vec<T> a, Vec<T> b) {
    return a < b ? b : a;
}
template <class T>
NANOCHAT_INLINE T sum_lanes(Vec<T> v) {
    T lanes[kLanes<T>];
    __builtin_memcpy(lanes, &v, sizeof v);
    for (int width = kLanes<T> / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}
template <class T>
NANOCHAT_INLINE T max_lanes(Vec<T> v) {
    T lanes[kLanes<T>];
    __builtin_memcpy(lanes, &v, sizeof v);
    for (int width = kLanes<T> / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = maximum(lanes[i], lanes[i + width]);
    return lanes[0];
}

template <class T>
NANOCHAT_INLINE Vec<T> sqrt_lanes(Vec<T> v) {
    T lanes[kLanes<T>];
    __builtin_memcpy(lanes, &v, sizeof v);
    for (int i = 0; i < kLanes<T>; i++)
        lanes[i] = sizeof(T) == 4 ? __builtin_sqrtf(lanes[i]) : __builtin_sqrt(lanes[i]);
    return load(lanes);
}

// The lanes of a and then of b with the numbers `lane`. Clang has no __builtin_shuffle, and GCC 11 no
// __builtin_shufflevector.
template <int... lane, class V>
NANOCHAT_INLINE V shuffle_lanes(V a, V b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, lane...);
#else
    return __builtin_shuffle(a, b, decltype(a < b){lane...});
#endif
}

// Lane i is a[i + from_a], or b[i + from_b] if i has the bit s.
template <int s, int from_a, int from_b, class V, int... i>
NANOCHAT_INLINE V mix_lanes(V a, V b, std::integer_sequence<int, i...>) {
    constexpr int lanes = sizeof...(i);
    return shuffle_lanes<(i & s ? lanes + i + from_b : i + from_a)...>(a, b);
}
template <int s, int from_a, int from_b, class V>
NANOCHAT_INLINE V mix_lanes(V a, V b) {
    return mix_lanes<s, from_a, from_b>(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>());
}

// Transposes a square in registers by exchanging ever larger sub-squares, from s x s on (Eklundh, 1972).
template <int s, class V, int W>
NANOCHAT_INLINE void transpose_square(V (&square)[W]) {
#pragma GCC unroll 16
    for (int r = 0; r < W; r++)
        if (!(r & s)) {
            const V upper = square[r], lower = square[r + s];
            square[r] = mix_lanes<s, 0, -s>(upper, lower);
            square[r + s] = mix_lanes<s, s, 0>(upper, lower);
        }
    if constexpr (2 * s < W) transpose_square<2 * s>(square);
}

// As many vectors as they have lanes.
template <class T>
struct SumVectors {
    Vec<T> v[kLanes<T>];
};

// Adds pairs of lanes that are s apart. v[i] receives the sums of v[i] in the lanes without bit s, and those of v[i + s]
// in the lanes with it.
template <int s, class T>
NANOCHAT_INLINE void fold(SumVectors<T>& sums) {
#pragma GCC unroll 8
    for (int i = 0; i < s; i++) {
        const Vec<T> a = sums.v[i], b = sums.v[i + s];
        sums.v[i] = mix_lanes<s, 0, 0>(a, b) + mix_lanes<s, s, -s>(a, b);
    }
    if constexpr (s > 1) fold<s / 2>(sums);
}

// Lane i of the result is the sum of the lanes of sums.v[i]. All of them are added in the same order.
template <class T>
NANOCHAT_INLINE Vec<T> sum_each(SumVectors<T> sums) {
    fold<kLanes<T> / 2>(sums);
    return sums.v[0];
}

// e^x within 2 ulp. x = n ln 2 + r, |r| <= ln(2) / 2; polynomial in r (Taylor, to the precision of the type); scaled by
// 2^n through the exponent bits. The result is 0 below the smallest normal number and inf above the largest; -inf gives
// 0, and NaN stays NaN.
NANOCHAT_INLINE Vec<float> exp_lanes(Vec<float> x) {
    const Vec<float> lowest = broadcast(-87.33654f), highest = broadcast(88.72283f);
    const Vec<float> clamped = x < lowest ? lowest : (x > highest ? highest : x);
    const float shifter = 12582912.0f;   // 1.5 * 2^23: adding it rounds to the nearest integer
    const Vec<float> shifted = clamped * 1.44269504f + shifter;
    const Vec<float> n = shifted - shifter;
    const Vec<float> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec<float> p = r * 1.98412698e-4f + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    // Two factors, because n reaches 128 and 2^128 would overflow.
    typedef Vec<int32_t> Int;
    const Int exponent = __builtin_bit_cast(Int, shifted) - __builtin_bit_cast(int32_t, shifter);
    const Int half = exponent >> 1;
    const Vec<float> result = p * __builtin_bit_cast(Vec<float>, (half + 127) << 23) *
                              __builtin_bit_cast(Vec<float>, (exponent - half + 127) << 23);
    return x < lowest ? Vec<float>{} : (x > highest ? broadcast(__builtin_inff()) : result);
}
NANOCHAT_INLINE Vec<double> exp_lanes(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; i++) x[i] = __builtin_exp(x[i]);
    return x;
}

// e^x = (1 + fraction) scale for x in [-87, 88]: fraction = e^r - 1 with r as in exp_lanes, by a minimax polynomial, and
// scale = 2^n. NaN gives a fraction of NaN.
struct Exponential {
    Vec<float> fraction, scale;
};
NANOCHAT_INLINE Exponential split_exp(Vec<float> x) {
    typedef Vec<int32_t> Int;
    const float shifter = 12582912.0f;
    const Vec<float> shifted = x * 1.44269504f + shifter;
    const Vec<float> n = shifted - shifter;
    const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec<float> p = r * 1.38825038e-3f + 8.36652145e-3f;
    p = p * r + 4.16672006e-2f;
    p = p * r + 1.66665435e-1f;
    p = p * r + 0.5f;
    const Int exponent = __builtin_bit_cast(Int, shifted) - (__builtin_bit_cast(int32_t, shifter) - 127);
    return {p * (r * r) + r, __builtin_bit_cast(Vec<float>, exponent << 23)};
}

// exp_lanes for x in [-87, 88], or NaN.
NANOCHAT_INLINE Vec<float> exp_in_range(Vec<float> x) {
    const Exponential e = split_exp(x);
    return (1.0f + e.fraction) * e.scale;
}
NANOCHAT_INLINE Vec<double> exp_in_range(Vec<double> x) { return exp_lanes(x); }

// exp_lanes for x of at most 88, or NaN: 0 below -87.7, where the exponent bits of 2^n are 0.
NANOCHAT_INLINE Vec<float> exp_below(Vec<float> x) {
    const Vec<float> lowest = broadcast(-88.0f);
    return exp_in_range(x < lowest ? lowest : x);
}
NANOCHAT_INLINE Vec<double> exp_below(Vec<double> x) { return exp_lanes(x); }

template <class T>
NANOCHAT_INLINE Vec<T> tanh_lanes(Vec<T> x);
// tanh|x| = (1 - e) / (1 + e), e = exp(-2|x|), within 2 ulp. 1 - e comes from the fraction of e, which does not cancel.
template <>
NANOCHAT_INLINE Vec<float> tanh_lanes<float>(Vec<float> x) {
    typedef Vec<int32_t> Int;
    const Int bits = __builtin_bit_cast(Int, x), sign = bits & INT32_MIN;
    const Vec<float> doubled = -2.0f * __builtin_bit_cast(Vec<float>, bits & INT32_MAX), lowest = broadcast(-20.0f);
    const Exponential e = split_exp(doubled < lowest ? lowest : doubled);   // from 10 on tanh is 1
    const Vec<float> one_less = (1.0f - e.scale) - e.fraction * e.scale;
    const Vec<float> one_more = (1.0f + e.scale) + e.fraction * e.scale;
    return __builtin_bit_cast(Vec<float>, __builtin_bit_cast(Int, one_less / one_more) | sign);
}
template <>
NANOCHAT_INLINE Vec<double> tanh_lanes<double>(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; i++) x[i] = __builtin_tanh(x[i]);
    return x;
}

}   // namespace nanochat::NANOCHAT_ISA
