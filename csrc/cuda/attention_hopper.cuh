// What the attention kernels of Hopper have in common. One warpgroup loads tiles by tensor copies into rings of stages;
// the others, the consumers, multiply them by wgmma, 64 rows each. Blocks of threads stay and take one item of the
// order after another, so that loads for the next go on while the last is written out.
#pragma once

#include "attention_tiles.h"
#include "hopper.cuh"
#include "tensor_map.h"

namespace nanochat::cuda::attention::hopper {

using device::Major;
using device::TensorMap;

// --- copies ---

// Boxes of (B, T, H, D): one panel of D, `heads` heads, `length` positions. Strides of a dimension with one entry are
// of no account, but the engine wants some.
inline TensorMap map_of(DType dtype, const void* tensor, int64_t B, int64_t T, int64_t H, int64_t D,
                        const Strides& strides, int columns, int heads, int length, Swizzle swizzle) {
    const auto bytes = [&](int64_t size, int64_t stride) { return 2 * (size == 1 ? D : stride); };
    return make_tensor_map(dtype, tensor, {D, H, T, B}, {bytes(H, strides.h), bytes(T, strides.t), bytes(B, strides.b)},
                           {columns, heads, length, 1}, swizzle);
}

// Loads a tile of `rows` rows: all panels of the boxes at (head, position, batch).
template <int D, int rows>
NANOCHAT_DEVICE void load_panels(uint32_t tile, const TensorMap& map, uint32_t barrier, int head, int position,
                                 int batch) {
    using P = Panels<D>;
#pragma unroll
    for (int panel = 0; panel < P::count; ++panel) {
        device::tma_load(tile + panel * rows * P::width, map, barrier, panel * P::columns, head, position, batch);
    }
}

// --- products ---

// Starts scores (64, N) = left (64, D) right (N, D)^T, both in shared memory.
template <class T, int D, int N>
NANOCHAT_DEVICE void start_scores(float (&scores)[N / 2], uint32_t left, uint32_t right) {
    device::pin_registers(scores);
    device::wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        device::wgmma<N, T>(scores, along_columns<D, kGroupRows>(left, step), along_columns<D, N>(right, step),
                            step > 0);
    }
    device::wgmma_commit();
}

// Starts sums (64, D) += weights (64, N) right (N, D), the weights in registers.
template <class T, int D, int N>
NANOCHAT_DEVICE void start_sums(float (&sums)[D / 2], const uint32_t (&weights)[N / 16][4], uint32_t right) {
    device::pin_registers(sums);
    device::wgmma_fence();
#pragma unroll
    for (int step = 0; step < N / 16; ++step) {
        device::wgmma<D, T, Major::mn>(sums, weights[step], along_rows<D, N>(right, step), true);
    }
    device::wgmma_commit();
}

template <class T, int N>
NANOCHAT_DEVICE void all_to_left(uint32_t (&weights)[N / 16][4], const float (&scores)[N / 2]) {
#pragma unroll
    for (int step = 0; step < N / 16; ++step) to_left<T>(weights[step], scores, step);
}

// --- turns ---

// Consumers start their products in turn, so that the softmax of one runs beside the products of the others (named
// barriers 1, 2, ...; the ping-pong of FlashAttention-3, arXiv:2407.08608).
template <int consumers>
struct Turns {
    int consumer;

    NANOCHAT_DEVICE explicit Turns(int consumer) : consumer(consumer) {
        if (consumer == consumers - 1) pass();
    }
    NANOCHAT_DEVICE void wait() const { device::bar_sync(1 + consumer, 2 * kGroupThreads); }
    NANOCHAT_DEVICE void pass() const { device::bar_arrive(1 + (consumer + 1) % consumers, 2 * kGroupThreads); }
};

inline int persistent_blocks(const Device& device, const Order& order) {
    return std::min(device.multiprocessors, order.items());
}

}   // namespace nanochat::cuda::attention::hopper
