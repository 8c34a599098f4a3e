// C (M, N) = A (M, K) B (N, K)^T, bfloat16, float32 sums: the shape that Hopper's kernels have. One warpgroup loads
// tiles through a ring of stages, two multiply 64 rows each and store through shared memory. For tests of the
// primitives; not tuned.
#include "../../../csrc/cuda/tensor_map.h"
#include "../entry.h"

namespace {

using namespace nanochat::device;

constexpr int kStages = 3, kM = 128, kN = 128, kK = 64;
constexpr int kConsumers = 2;
constexpr int kABytes = kM * kK * 2, kBBytes = kN * kK * 2, kStageBytes = kABytes + kBBytes;
constexpr int kBoxBytes = 64 * 64 * 2;   // what one store takes: 64 rows of the swizzle's width
constexpr int kOutputBytes = kConsumers * kN / 64 * kBoxBytes;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kOutputBytes + 16 * kStages;
constexpr int kRowGroup = 8 * 128;

__global__ void __launch_bounds__(128 * (1 + kConsumers), 1)
    gemm_hopper(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                const __grid_constant__ TensorMap c_map, int K) {
#ifdef NANOCHAT_HOPPER
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t base = (shared_address(shared) + 1023) & ~1023u;
    const uint32_t output = base + kStages * kStageBytes;
    const uint32_t full = output + kOutputBytes, empty = full + 8 * kStages;
    const int group = threadIdx.x / 128, steps = (K + kK - 1) / kK;
    const int m0 = blockIdx.y * kM, n0 = blockIdx.x * kN;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, kConsumers);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    if (group == 0) {
        setmaxnreg_decrease<40>();
        if (threadIdx.x != 0) return;
        for (int i = 0; i < steps; ++i) {
            const int stage = i % kStages, round = i / kStages;
            const uint32_t tile = base + stage * kStageBytes, barrier = full + 8 * stage;
            mbarrier_wait(empty + 8 * stage, (round & 1) ^ 1);
            mbarrier_arrive_expect_tx(barrier, kStageBytes);
            tma_load(tile, a_map, barrier, i * kK, m0);
            tma_load(tile + kABytes, b_map, barrier, i * kK, n0);
        }
        return;
    }
    setmaxnreg_increase<232>();
    const int consumer = group - 1, thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    float sums[kN / 2];
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[i] = 0;
    for (int i = 0; i < steps; ++i) {
        const int stage = i % kStages, round = i / kStages;
        const uint32_t a = base + stage * kStageBytes + consumer * 64 * 128, b = base + stage * kStageBytes + kABytes;
        mbarrier_wait(full + 8 * stage, round & 1);
        pin_registers(sums);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kK / 16; ++k) {
            wgmma<kN, bfloat16>(sums, wgmma_descriptor(a + 32 * k, 16, kRowGroup, Swizzle::bytes128),
                                wgmma_descriptor(b + 32 * k, 16, kRowGroup, Swizzle::bytes128), true);
        }
        wgmma_commit();
        pin_registers(sums);
        wgmma_wait<0>();
        bar_sync(1 + consumer, 128);   // all four warps have read the stage before one thread gives it back
        if (thread == 0) mbarrier_arrive(empty + 8 * stage);
    }

    const uint32_t own = output + consumer * (kN / 64) * kBoxBytes;
#pragma unroll
    for (int column = 0; column < kN; column += 16) {
        const float* d = sums + column / 2;
        const uint32_t packed[4] = {pack<bfloat16>(d[0], d[1]), pack<bfloat16>(d[2], d[3]), pack<bfloat16>(d[4], d[5]),
                                    pack<bfloat16>(d[6], d[7])};
        const int row = warp * 16 + lane % 16, place = column % 64 * 2 + lane / 16 * 16;
        stmatrix_x4(swizzled(own + column / 64 * kBoxBytes + row * 128 + place, Swizzle::bytes128), packed);
    }
    fence_proxy_async();
    bar_sync(1 + consumer, 128);
    if (thread == 0) {
        for (int box = 0; box < kN / 64; ++box) {
            tma_store(c_map, own + box * kBoxBytes, n0 + box * 64, m0 + consumer * 64);
        }
        tma_commit();
        tma_wait_read<0>();
    }
#endif
}

}   // namespace

// a (M, K), b (N, K), c (M, N) bfloat16, M, N, K
ENTRY(gemm_hopper) {
    const int64_t M = arguments[3].integer, N = arguments[4].integer, K = arguments[5].integer;
    const auto map = [](const Argument& matrix, int64_t rows, int64_t columns, int box_rows) {
        return nanochat::cuda::make_tensor_map(nanochat::DType::bfloat16, matrix.pointer, {columns, rows},
                                               {columns * 2}, {64, box_rows}, Swizzle::bytes128);
    };
    const dim3 grid(static_cast<unsigned>((N + kN - 1) / kN), static_cast<unsigned>((M + kM - 1) / kM));
    launch("gemm_hopper", gemm_hopper, grid, dim3(128 * (1 + kConsumers)), kSharedBytes, nullptr,
           map(arguments[0], M, K, kM), map(arguments[1], N, K, kN), map(arguments[2], M, N, 64), static_cast<int>(K));
}
