// Shared by the kernels for Hopper. One warpgroup, the producer, loads tiles by tensor copies into rings of stages. The
// others, the consumers, multiply them by wgmma, 64 rows per product.
#pragma once

#include "tiles.cuh"

namespace nanochat::cuda {

constexpr int kGroupThreads = 128, kGroupRows = 64, kRowsPerWarp = 16;

// A stage has two barriers of 8 bytes: full and empty.
NANOCHAT_ANYWHERE constexpr int ring_bytes(int stages) { return 16 * stages; }

// Registers per thread: the consumers share what the producer leaves of 65,536.
template <int consumers_>
struct WarpgroupConfig {
    static_assert(consumers_ == 2 || consumers_ == 3);
    static constexpr int consumers = consumers_, threads = kGroupThreads * (1 + consumers);
    static constexpr int registers = consumers == 3 ? 160 : 240, producer_registers = consumers == 3 ? 32 : 24;
};

// The thread's warpgroup. The shuffle tells the compiler that all threads of a warp have the same number, so what follows
// from it, such as descriptors, stays in uniform registers.
NANOCHAT_DEVICE int warpgroup_index() {
    return __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
}

// The warp within the warpgroup, likewise.
NANOCHAT_DEVICE int warp_of_group() {
    return __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) % kGroupThreads / 32, 0);
}

// --- stages ---

// The barriers of `stages` stages that are filled and emptied in turn. n counts the fillings.
template <int stages>
struct Ring {
    uint32_t barriers;

    // Divisions of numbers that may be negative would take more instructions.
    NANOCHAT_DEVICE static int stage(int n) { return static_cast<unsigned>(n) % stages; }
    NANOCHAT_DEVICE static int parity(int n) { return static_cast<unsigned>(n) / stages & 1; }
    NANOCHAT_DEVICE uint32_t full(int n) const { return barriers + 16 * stage(n); }
    NANOCHAT_DEVICE uint32_t empty(int n) const { return full(n) + 8; }
    // Called by one thread of the block, before a fence_mbarrier_init and a __syncthreads.
    NANOCHAT_DEVICE void initialise(int consumers, int other_readers = 0) const {
        for (int i = 0; i < stages; ++i) {
            device::mbarrier_init(full(i), 1);
            device::mbarrier_init(empty(i), 4 * consumers + other_readers);   // one arrival per warp
        }
    }
    NANOCHAT_DEVICE void producer_wait(int n) const { device::mbarrier_wait(empty(n), parity(n) ^ 1); }
    // Waits until the stage is free, and announces the bytes that will land there.
    NANOCHAT_DEVICE void producer_acquire(int n, int bytes_expected) const {
        producer_wait(n);
        device::mbarrier_arrive_expect_tx(full(n), bytes_expected);
    }
    // Waits until the stage has been filled.
    NANOCHAT_DEVICE void consumer_wait(int n) const { device::mbarrier_wait(full(n), parity(n)); }
    NANOCHAT_DEVICE void consumer_release(int n) const {
        __syncwarp();   // all lanes have read
        if (threadIdx.x % 32 == 0) device::mbarrier_arrive(empty(n));
    }
};

// --- products ---

// The descriptors of a tile of `rows` rows in SmemLayout<D>, 16 columns for each step of a product that sums over D
// (Major::k), or 16 rows for each step of one that sums over the rows (Major::mn). Only the first is put together.
template <device::Major major, int D, int rows>
struct TileOperand {
    using P = SmemLayout<D>;
    uint64_t first;

    NANOCHAT_DEVICE explicit TileOperand(uint32_t tile)
        : first(major == device::Major::k ? device::wgmma_descriptor(tile, 16, 8 * P::width, P::swizzle)
                                          : device::wgmma_descriptor(tile, rows * P::width, 8 * P::width, P::swizzle)) {
    }
    // `further`: bytes to a tile behind this one.
    NANOCHAT_DEVICE uint64_t operator()(int step, int further = 0) const {
        constexpr int steps = P::columns / 16;   // in a panel
        const int k = step / steps * rows * P::width + step % steps * 32, mn = step * 16 * P::width;
        return device::advanced(first, further + (major == device::Major::k ? k : mn));
    }
};

// Waits for all groups of products but the `newest` ones. `d` is the accumulator of one that is then complete.
template <int newest, int count>
NANOCHAT_DEVICE void wait_for_products(float (&d)[count]) {
    device::wgmma_wait<newest>();
    device::pin_registers(d);
}

}   // namespace nanochat::cuda
