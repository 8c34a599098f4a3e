// Instructions of aarch64 that the kernels name.
#pragma once

#include <arm_neon.h>

#include "simd.h"

namespace nanochat::NANOCHAT_ISA {

NANOCHAT_INLINE Vec<float> load(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    const int8x8_t narrow = vreinterpret_s8_s32(vdup_n_s32(four));
    return __builtin_bit_cast(Vec<float>, vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(narrow)))));
}

// Passes a little time in a loop that waits for another thread. Most processors take `yield` for no operation.
NANOCHAT_INLINE void pause() { asm volatile("isb" ::: "memory"); }

}   // namespace nanochat::NANOCHAT_ISA
