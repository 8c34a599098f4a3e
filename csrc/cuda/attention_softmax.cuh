// The online softmax (FlashAttention-2, arXiv:2307.08691).
#pragma once

#include <algorithm>
#include <cmath>

#include "ptx/primitives.cuh"

namespace nanochat::cuda::attention {

using device::exp2_approx;

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// The online softmax of the two rows that a thread holds of an accumulator: rows g and g + 8 of the warp's 16, with
// g = lane / 4. The scores are still to be multiplied by scale > 0, and exponents are of base 2.
struct Softmax {
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0};

    // Turns scores into weights. Earlier sums must be multiplied by `rescale`.
    template <int count>
    NANOCHAT_DEVICE void step(float (&scores)[count], float scale, float (&rescale)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float highest = row_max[h];
#pragma unroll
            for (int i = 0; i < count; i += 4) {
                highest = fmaxf(highest, fmaxf(scores[i + 2 * h], scores[i + 2 * h + 1]));
            }
            highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFF, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFF, highest, 2));
            const float reference = highest == -INFINITY ? 0 : highest * scale;
            rescale[h] = exp2_approx(row_max[h] * scale - reference);
            row_max[h] = highest;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < count; i += 4) {
#pragma unroll
                for (int j = i + 2 * h; j < i + 2 * h + 2; ++j) {
                    scores[j] = exp2_approx(fmaf(scores[j], scale, -reference));
                    sum += scores[j];
                }
            }
            row_sum[h] = row_sum[h] * rescale[h] + sum;
        }
    }

    // Call once, after the last keys. The sums must be multiplied by `inverse`; lse has base 2.
    NANOCHAT_DEVICE void finish(float scale, float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            row_sum[h] += __shfl_xor_sync(0xFFFFFFFF, row_sum[h], 1);
            row_sum[h] += __shfl_xor_sync(0xFFFFFFFF, row_sum[h], 2);
            inverse[h] = row_sum[h] == 0 ? 0 : 1 / row_sum[h];   // 0: the row sees no key; a NaN stays a NaN
            lse[h] = row_sum[h] == 0 ? -INFINITY : row_max[h] * scale + log2f(row_sum[h]);
        }
    }
};

// The scale of the softmax, base 2. With a negative scale, scores are negated and the scale is positive. A scale of zero
// becomes the smallest positive number, so that a masked score stays minus infinity.
struct Scale {
    float magnitude;
    bool negated;
};
inline Scale make_scale(double scale) {
    const auto magnitude = static_cast<float>(std::abs(scale) / std::log(2.0));
    return {std::max(magnitude, 1.17549435e-38f), scale < 0};
}

}   // namespace nanochat::cuda::attention
