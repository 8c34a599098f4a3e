// Shared by all attention kernels. Letters as in kernels.h.
#pragma once

#include "../check.h"
#include "../kernels.h"
#include "attention_mask.cuh"
#include "attention_mma.cuh"
#include "attention_packing.cuh"
#include "attention_scheduler.cuh"
#include "attention_softmax.cuh"

namespace nanochat::cuda::attention {

// The D of the kernel that serves a given D.
constexpr int tile_columns(int64_t D) { return D <= 64 ? 64 : D <= 96 ? 96 : 128; }

// Throws if D is not supported, or if the numbers of positions, rows and blocks do not fit 32 bits.
inline void require_shape(const char* op, const AttentionShape& s) {
    require(s.D >= 8 && s.D <= 128 && s.D % 8 == 0, op, ": D must be a multiple of 8 up to 128, got ", s.D);
    require((s.Tq + s.Tk) * (s.H / s.Hkv) < 1 << 30 && s.B * s.H < 1 << 30 &&
                s.B * s.H * ((s.Tq + s.Tk) / 64 + 2) < INT32_MAX,
            op, ": the shape must give fewer than 2^31 tiles of 64 rows, got B ", s.B, ", H ", s.H, ", Tq ", s.Tq,
            ", Tk ", s.Tk);
}

namespace hopper {
void forward(const AttentionForward&);
}

}   // namespace nanochat::cuda::attention
