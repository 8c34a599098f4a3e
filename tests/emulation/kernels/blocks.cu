// Blocks that work together: through counters in global memory, in clusters, and in grids that overlap.
#include "../../../csrc/cuda/tensor_map.h"
#include "../entry.h"

namespace {

using namespace nanochat::device;

[[maybe_unused]] constexpr int kTile = 256;   // float32

// Block after block, each adds its tile to the sums, and half of the row of the block before to its own row.
__global__ void take_turns(const float* x, float* sums, float* rows, uint32_t* counter, bool backwards) {
#ifdef NANOCHAT_HOPPER
    NANOCHAT_SHARED(uint4[kTile / 4], storage);
    auto* tile = reinterpret_cast<float*>(&storage);
    const uint32_t source = shared_address(&storage), turn = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int thread = threadIdx.x;
    if (thread == 0) wait_for_count(counter, turn);
    __syncthreads();
    for (int i = thread; i < kTile; i += blockDim.x) {
        const float before = turn ? rows[(turn - 1) * kTile + i] : 0;
        tile[i] = x[blockIdx.x * kTile + i] + 0.5f * before;
    }
    fence_proxy_async();
    __syncthreads();
    if (thread == 0) {
        fence_proxy_async_global();   // another block has added to the sums
        bulk_store(rows + turn * kTile, source, kTile * 4);
        bulk_reduce_add(sums, source, kTile * 4);
        tma_commit();
        tma_wait<0>();
        add_release(counter, 1);
    }
#endif
}

// Blocks of a cluster load a part of each tile for all of them, in turns through a ring of stages.
constexpr int kStages = 2, kRows = 8, kColumns = 32, kPartBytes = kRows * kColumns * 4;

__global__ void share_loads(const __grid_constant__ TensorMap x, float* out, int steps, int size) {
#ifdef NANOCHAT_HOPPER
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t base = (shared_address(shared) + 1023) & ~1023u, skipped = base - shared_address(shared);
    const uint32_t full = base + kStages * size * kPartBytes, empty = full + 8 * kStages, rank = cluster_rank();
    const int thread = threadIdx.x, elements = size * kRows * kColumns;
    if (thread == 0) {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, size);
        }
        fence_mbarrier_init();
    }
    cluster_arrive();
    cluster_wait();
    for (int step = 0; step < steps && (thread == 0 || thread >= 32); ++step) {
        const int stage = step % kStages, parity = step / kStages & 1;
        const uint32_t tile = stage * size * kPartBytes;
        if (thread == 0) {
            mbarrier_wait(empty + 8 * stage, parity ^ 1);
            mbarrier_arrive_expect_tx(full + 8 * stage, size * kPartBytes);
            tma_load_multicast(base + tile + rank * kPartBytes, x, full + 8 * stage,
                               static_cast<uint16_t>((1 << size) - 1), 0, (step * size + rank) * kRows,
                               blockIdx.x / size);
        } else {
            mbarrier_wait(full + 8 * stage, parity);
            const auto* values = reinterpret_cast<const float*>(shared + skipped + tile);
            for (int i = thread - 32; i < elements; i += 64) {
                out[blockIdx.x * elements + i] += (rank + 1 + step) * values[i];
            }
            bar_sync(1, 64);
            if (thread == 32) {
                for (int i = 0; i < size; ++i) mbarrier_arrive_cluster(empty + 8 * stage, i);
            }
        }
    }
    __syncwarp();
    cluster_arrive();   // no block leaves while another one can arrive at its mbarriers
    cluster_wait();
#endif
}

__global__ void write_numbers(float* out) {
#ifdef NANOCHAT_HOPPER
    start_next_grid();
    out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(threadIdx.x);
#endif
}
__global__ void double_numbers(float* out) {
#ifdef NANOCHAT_HOPPER
    wait_for_previous_grid();
    out[blockIdx.x * blockDim.x + threadIdx.x] *= 2;
#endif
}

}   // namespace

// x (blocks, 256) float32, sums (256), rows (blocks, 256), counter (1) int32, blocks, backwards
ENTRY(take_turns) {
    launch("take_turns", take_turns, dim3(static_cast<unsigned>(arguments[4].integer)), dim3(64), 0, nullptr,
           arguments[0].to<const float>(), arguments[1].to<float>(), arguments[2].to<float>(),
           arguments[3].to<uint32_t>(), arguments[5].integer != 0);
}

// x (clusters, steps size 8, 32) float32, out (clusters size, size 8, 32), clusters, steps, size: blocks in a cluster
ENTRY(share_loads) {
    const int64_t clusters = arguments[2].integer, steps = arguments[3].integer, size = arguments[4].integer;
    const int64_t rows = steps * size * kRows;
    const auto x = nanochat::cuda::make_tensor_map(nanochat::DType::float32, arguments[0].pointer,
                                                   {kColumns, rows, clusters}, {4 * kColumns, 4 * kColumns * rows},
                                                   {kColumns, kRows, 1}, Swizzle::none);
    const auto bytes = static_cast<size_t>(1024 + kStages * (size * kPartBytes + 16));
    const LaunchOptions options{.cluster = static_cast<int>(size)};
    launch("share_loads", share_loads, dim3(static_cast<unsigned>(clusters * size)), dim3(96), bytes, nullptr, options,
           x, arguments[1].to<float>(), static_cast<int>(steps), static_cast<int>(size));
}

// out (4, 32) float32
ENTRY(overlap) {
    const LaunchOptions options{.overlaps_previous = true};
    launch("write_numbers", write_numbers, dim3(4), dim3(32), 0, nullptr, arguments[0].to<float>());
    launch("double_numbers", double_numbers, dim3(4), dim3(32), 0, nullptr, options, arguments[0].to<float>());
}
