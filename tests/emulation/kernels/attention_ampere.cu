// Causal attention forward, head size 64, grouped heads, bfloat16: cp.async through two stages, ldmatrix, mma.sync and
// an online softmax, the shape that Ampere's kernels have. For tests of the primitives; not tuned.
#include "../../../csrc/cuda/ptx/primitives.cuh"
#include "../entry.h"

namespace {

using namespace nanochat::device;

constexpr int kRows = 64, kD = 64, kTileBytes = kRows * kD * 2;
constexpr int kSharedBytes = 5 * kTileBytes;   // queries, two stages of keys and values
constexpr float kLog2E = 1.44269504f;

// Chunk `chunk` (8 elements) of a row, so that the 8 rows that ldmatrix reads together lie in different banks.
NANOCHAT_DEVICE uint32_t place(uint32_t tile, int row, int chunk) {
    return tile + row * 128 + ((chunk ^ (row % 8)) << 4);
}

NANOCHAT_DEVICE void load_tile(uint32_t tile, const bfloat16* rows, int64_t stride, int first, int T) {
    for (int i = threadIdx.x; i < kRows * 8; i += blockDim.x) {
        const int row = i / 8, chunk = i % 8, t = first + row;
        const bool inside = t < T;
        cp_async_16(place(tile, row, chunk), rows + (inside ? t : 0) * stride + chunk * 8, inside ? 16 : 0);
    }
}

// q, out (B, T, H, D), k, v (B, T, Hkv, D), lse (B, H, T)
__global__ void __launch_bounds__(128, 2)
    attention_ampere(const bfloat16* q, const bfloat16* k, const bfloat16* v, bfloat16* out, float* lse, int T, int H,
                     int Hkv, float scale) {
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t tile_q = shared_address(shared), tile_k = tile_q + kTileBytes, tile_v = tile_k + 2 * kTileBytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q0 = blockIdx.x * kRows;
    const int head = blockIdx.y % H, batch = blockIdx.y / H, kv_head = head / (H / Hkv);
    const int64_t stride = int64_t{H} * kD, kv_stride = int64_t{Hkv} * kD;
    q += batch * T * stride + head * kD;
    out += batch * T * stride + head * kD;
    k += batch * T * kv_stride + kv_head * kD;
    v += batch * T * kv_stride + kv_head * kD;
    lse += (static_cast<int64_t>(batch) * H + head) * T;

    load_tile(tile_q, q, stride, q0, T);
    load_tile(tile_k, k, kv_stride, 0, T);
    load_tile(tile_v, v, kv_stride, 0, T);
    cp_async_commit();
    float sums[8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    const int tiles = static_cast<int>(blockIdx.x) + 1;
    for (int j = 0; j < tiles; ++j) {
        const uint32_t keys = tile_k + j % 2 * kTileBytes, values = tile_v + j % 2 * kTileBytes;
        if (j + 1 < tiles) {
            load_tile(tile_k + (j + 1) % 2 * kTileBytes, k, kv_stride, (j + 1) * kRows, T);
            load_tile(tile_v + (j + 1) % 2 * kTileBytes, v, kv_stride, (j + 1) * kRows, T);
            cp_async_commit();
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();   // everybody's copies of this stage have landed

        float scores[8][4] = {};
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            uint32_t a[4];
            ldmatrix_x4(a, place(tile_q, warp * 16 + lane % 16, 2 * d + lane / 16));
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t b[4];
                ldmatrix_x4(b, place(keys, n * 8 + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
                mma_m16n8k16<bfloat16>(scores[n], a, {b[0], b[1]});
                mma_m16n8k16<bfloat16>(scores[n + 1], a, {b[2], b[3]});
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = q0 + warp * 16 + lane / 4 + 8 * h;
            float highest = top[h];
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                float& score = scores[i / 2][2 * h + i % 2];
                const int column = j * kRows + i / 2 * 8 + 2 * (lane % 4) + i % 2;
                score = column <= row ? score * scale * kLog2E : -INFINITY;
                highest = fmaxf(highest, score);
            }
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            const float shrink = exp2_approx(top[h] - highest);
            top[h] = highest;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                float& weight = scores[i / 2][2 * h + i % 2];
                weight = exp2_approx(weight - highest);
                sum += weight;
                sums[i / 2][2 * h + i % 2] *= shrink;
            }
            total[h] = total[h] * shrink + sum;
        }
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const uint32_t a[4] = {pack<bfloat16>(scores[2 * s][0], scores[2 * s][1]),
                                   pack<bfloat16>(scores[2 * s][2], scores[2 * s][3]),
                                   pack<bfloat16>(scores[2 * s + 1][0], scores[2 * s + 1][1]),
                                   pack<bfloat16>(scores[2 * s + 1][2], scores[2 * s + 1][3])};
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, place(values, s * 16 + lane % 16, n + lane / 16));
                mma_m16n8k16<bfloat16>(sums[n], a, {b[0], b[1]});
                mma_m16n8k16<bfloat16>(sums[n + 1], a, {b[2], b[3]});
            }
        }
        __syncthreads();   // the stage may be filled again
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        total[h] += __shfl_xor_sync(~0u, total[h], 1);
        total[h] += __shfl_xor_sync(~0u, total[h], 2);
        const int row = q0 + warp * 16 + lane / 4 + 8 * h;
        if (row >= T) continue;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            *reinterpret_cast<uint32_t*>(out + row * stride + n * 8 + 2 * (lane % 4)) =
                pack<bfloat16>(sums[n][2 * h] / total[h], sums[n][2 * h + 1] / total[h]);
        }
        if (lane % 4 == 0) lse[row] = (top[h] + log2f(total[h])) / kLog2E;
    }
}

}   // namespace

// q (B, T, H, 64), k, v (B, T, Hkv, 64), out as q, all bfloat16, lse (B, H, T) float32; B, T, H, Hkv; scale
ENTRY(attention_ampere) {
    const auto B = static_cast<unsigned>(arguments[5].integer);
    const auto T = static_cast<int>(arguments[6].integer), H = static_cast<int>(arguments[7].integer);
    const dim3 grid(static_cast<unsigned>((T + kRows - 1) / kRows), B * static_cast<unsigned>(H));
    launch("attention_ampere", attention_ampere, grid, dim3(128), kSharedBytes, nullptr,
           arguments[0].to<const bfloat16>(), arguments[1].to<const bfloat16>(), arguments[2].to<const bfloat16>(),
           arguments[3].to<bfloat16>(), arguments[4].to<float>(), T, H, static_cast<int>(arguments[8].integer),
           static_cast<float>(arguments[9].number));
}
