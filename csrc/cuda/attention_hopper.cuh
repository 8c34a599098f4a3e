// What the attention kernels of Hopper have in common. One warpgroup loads tiles by tensor copies into rings of stages;
// the others, the consumers, multiply them by wgmma, 64 rows each. Blocks of threads stay and take one item of the
// order after another, so that loads for the next go on while the last is written out.
#pragma once

#include "attention_tiles.h"
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

// The barriers of `stages` stages that are filled and emptied in turn; n counts the fillings.
template <int stages>
struct Ring {
    uint32_t barriers;

    NANOCHAT_DEVICE static int stage(int n) { return n % stages; }
    NANOCHAT_DEVICE uint32_t full(int n) const { return barriers + 16 * stage(n); }
    NANOCHAT_DEVICE uint32_t empty(int n) const { return full(n) + 8; }
    // By one thread of the block, before a fence_mbarrier_init and a __syncthreads.
    NANOCHAT_DEVICE void initialise(int consumers) const {
        for (int i = 0; i < stages; ++i) {
            device::mbarrier_init(full(i), 1);
            device::mbarrier_init(empty(i), 4 * consumers);   // an arrival a warp
        }
    }
    // The loader's: waits until the stage is free, and announces what will land there.
    NANOCHAT_DEVICE void start(int n, int bytes_expected) const {
        device::mbarrier_wait(empty(n), (n / stages & 1) ^ 1);
        device::mbarrier_arrive_expect_tx(full(n), bytes_expected);
    }
    // The consumers'.
    NANOCHAT_DEVICE void wait(int n) const { device::mbarrier_wait(full(n), n / stages & 1); }
    NANOCHAT_DEVICE void release(int n) const {
        __syncwarp();   // all lanes have read
        if (threadIdx.x % 32 == 0) device::mbarrier_arrive(empty(n));
    }
};

// --- products ---

// Descriptors of a tile of `rows` rows in Panels<D>: of 16 columns, the summed dimension being D ...
template <int D, int rows>
NANOCHAT_DEVICE uint64_t along_columns(uint32_t tile, int step) {
    using P = Panels<D>;
    constexpr int steps = P::columns / 16;   // in a panel
    return device::wgmma_descriptor(tile + step / steps * rows * P::width + step % steps * 32, 16, 8 * P::width,
                                    P::swizzle);
}
// ... and of 16 rows, the summed dimension being the rows.
template <int D, int rows>
NANOCHAT_DEVICE uint64_t along_rows(uint32_t tile, int step) {
    using P = Panels<D>;
    return device::wgmma_descriptor(tile + step * 16 * P::width, rows * P::width, 8 * P::width, P::swizzle);
}

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

// Waits for all but the `newest` groups of products; `d` holds the result of one that is then done.
template <int newest, int count>
NANOCHAT_DEVICE void finish(float (&d)[count]) {
    device::wgmma_wait<newest>();
    device::pin_registers(d);
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
