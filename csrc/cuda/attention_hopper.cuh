// Shared by the attention kernels for Hopper. One warpgroup, the producer, loads tiles by tensor copies into rings of
// stages. The others, the consumers, multiply them by wgmma, 64 rows each. Blocks of threads are persistent: they take
// one work item after another, so that the loads of the next item continue while the last one is written out.
#pragma once

#include "attention_tiles.h"
#include "hopper.cuh"
#include "tensor_map.h"

namespace nanochat::cuda::attention::hopper {

using device::Major;
using device::TensorMap;

// --- copies ---

// The map of a (B, T, H, D) tensor whose boxes are one panel of D, `heads` heads and `length` positions. The stride of a
// dimension of size 1 is never used, but must be valid.
inline TensorMap map_of(DType dtype, const void* tensor, int64_t B, int64_t T, int64_t H, int64_t D,
                        const Strides& strides, int columns, int heads, int length, Swizzle swizzle) {
    const auto bytes = [&](int64_t size, int64_t stride) { return 2 * (size == 1 ? D : stride); };
    return make_tensor_map(dtype, tensor, {D, H, T, B}, {bytes(H, strides.h), bytes(T, strides.t), bytes(B, strides.b)},
                           {columns, heads, length, 1}, swizzle);
}

// Loads a tile of `rows` rows: the boxes of all panels at (head, position, batch).
template <int D, int rows>
NANOCHAT_DEVICE void load_tile_panels(uint32_t tile, const TensorMap& map, uint32_t barrier, int head, int position,
                                      int batch) {
    using P = SmemLayout<D>;
#pragma unroll
    for (int panel = 0; panel < P::count; ++panel) {
        device::tma_load(tile + panel * rows * P::width, map, barrier, panel * P::columns, head, position, batch);
    }
}

// Writes the 16 rows of a warp's accumulator as T into rows `first` to first + 15 of a tile, once the warp's last copy has
// read them, and starts their copy to (head, query, batch). The boxes of `map` are a panel of 16 rows.
template <class T, int D>
NANOCHAT_DEVICE void start_store(uint32_t tile, const float (&sums)[D / 2], int first, const TensorMap& map, int head,
                                 int query, int batch) {
    using P = SmemLayout<D>;
    const int lane = threadIdx.x % 32;
    const auto row = a_fragment_rows<D, kGroupRows>(tile, first, lane);
    if (lane == 0) device::tma_wait_read<0>();
    __syncwarp();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        uint32_t words[4];
        as_a_operand<T>(words, sums, step);
        device::stmatrix_x4(row(2 * step), words);
    }
    device::fence_proxy_async();
    __syncwarp();
    if (lane != 0) return;
#pragma unroll
    for (int panel = 0; panel < P::count; ++panel) {
        device::tma_store(map, tile + (panel * kGroupRows + first) * P::width, panel * P::columns, head, query, batch);
    }
    device::tma_commit();
}

// --- products ---

// Starts scores (64, N) = A (64, D) B (N, D)^T, with A and B in shared memory. A may be 64 rows of a tile of more.
template <class T, int D, int N, int a_rows = kGroupRows>
NANOCHAT_DEVICE void start_scores(float (&scores)[N / 2], uint32_t a, uint32_t b) {
    const TileOperand<Major::k, D, a_rows> left(a);
    const TileOperand<Major::k, D, N> right(b);
    device::pin_registers(scores);
    device::wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) device::wgmma<N, T>(scores, left(step), right(step), step > 0);
    device::wgmma_commit();
}

// Starts sums (64, D) += weights (64, N) B (N, D), with the weights in registers.
template <class T, int D, int N>
NANOCHAT_DEVICE void start_sums(float (&sums)[D / 2], const uint32_t (&weights)[N / 16][4], uint32_t b) {
    const TileOperand<Major::mn, D, N> right(b);
    device::pin_registers(sums);
    device::wgmma_fence();
#pragma unroll
    for (int step = 0; step < N / 16; ++step) device::wgmma<D, T, Major::mn>(sums, weights[step], right(step), true);
    device::wgmma_commit();
}

template <class T, int N>
NANOCHAT_DEVICE void as_a_operands(uint32_t (&weights)[N / 16][4], const float (&scores)[N / 2]) {
#pragma unroll
    for (int step = 0; step < N / 16; ++step) as_a_operand<T>(weights[step], scores, step);
}

// --- the ping-pong of FlashAttention-3, arXiv:2407.08608 ---

// Makes consumers start their products in turn, so that the softmax of one runs beside the products of the others. Uses
// the named barriers 1, 2, ...
template <int consumers>
struct PingPongBarrier {
    int consumer;

    NANOCHAT_DEVICE explicit PingPongBarrier(int consumer) : consumer(consumer) {
        if (consumer == consumers - 1) arrive_next();
    }
    NANOCHAT_DEVICE void wait() const { device::bar_sync(1 + consumer, 2 * kGroupThreads); }
    NANOCHAT_DEVICE void arrive_next() const { device::bar_arrive(1 + (consumer + 1) % consumers, 2 * kGroupThreads); }
};

inline int persistent_blocks(const Device& device, const TileScheduler& scheduler) {
    return std::min(device.multiprocessors, scheduler.items());
}

}   // namespace nanochat::cuda::attention::hopper
