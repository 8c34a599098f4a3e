// What the kernels of Hopper have in common: a warpgroup loads tiles by tensor copies into rings of stages, others, the
// consumers, multiply them by wgmma, 64 rows a product.
#pragma once

#include "tiles.cuh"

namespace nanochat::cuda {

constexpr int kGroupThreads = 128, kGroupRows = 64;

// A stage has two barriers of 8 bytes: full and empty.
NANOCHAT_ANYWHERE constexpr int ring_bytes(int stages) { return 16 * stages; }

// Registers of a thread: what the loader leaves of 65,536.
template <int consumers_>
struct Groups {
    static_assert(consumers_ == 2 || consumers_ == 3);
    static constexpr int consumers = consumers_, threads = kGroupThreads * (1 + consumers);
    static constexpr int registers = consumers == 3 ? 160 : 240, loader_registers = consumers == 3 ? 32 : 24;
};

// --- stages ---

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

// Waits for all but the `newest` groups of products; `d` holds the result of one that is then done.
template <int newest, int count>
NANOCHAT_DEVICE void finish(float (&d)[count]) {
    device::wgmma_wait<newest>();
    device::pin_registers(d);
}

}   // namespace nanochat::cuda
