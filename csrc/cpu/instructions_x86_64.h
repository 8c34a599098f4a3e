// Instructions of x86-64 that the kernels name.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace nanochat::NANOCHAT_ISA {

// GCC takes a conversion from 8 to 32 bits apart, so the instruction is named where there is one.
NANOCHAT_INLINE Vec<float> load(const int8_t* p) {
#if defined(__AVX512F__)
    const auto wide = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return __builtin_convertvector(__builtin_bit_cast(Vec<int32_t>, wide), Vec<float>);
#elif defined(__AVX2__)
    const auto wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return __builtin_convertvector(__builtin_bit_cast(Vec<int32_t>, wide), Vec<float>);
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; i++) v[i] = static_cast<float>(p[i]);
    return v;
#endif
}

// Passes a little time in a loop that waits for another thread.
NANOCHAT_INLINE void pause() { __builtin_ia32_pause(); }

}   // namespace nanochat::NANOCHAT_ISA
