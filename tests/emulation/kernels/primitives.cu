// Each primitive by itself, or the fewest together that show what it does. The same cases run in the emulation and on
// a GPU.
#include "../../../csrc/cuda/tensor_map.h"
#include "../entry.h"

namespace {

using namespace nanochat::device;
using nanochat::DType;

// --- warps and blocks ---

__global__ void warp_exchange(const float* x, float* out, uint32_t* votes) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x, lane = threadIdx.x % 32;
    const float own = x[i];
    out[i] = __shfl_sync(~0u, own, (lane + 5) % 32);
    out[n + i] = __shfl_xor_sync(~0u, own, 9);
    out[2 * n + i] = __shfl_down_sync(~0u, own, 3, 16);
    out[3 * n + i] = __shfl_up_sync(~0u, own, 2, 8);
    if (lane < 20) out[4 * n + i] = __shfl_sync(0xFFFFFu, own, 19 - lane);
    const uint32_t positive = __ballot_sync(~0u, own > 0);
    const int any = __any_sync(~0u, own > 2), all = __all_sync(~0u, own > -2);
#ifdef NANOCHAT_HOPPER
    const bool speaks = elect_one();
#else
    const bool speaks = lane == 0;
#endif
    if (speaks) votes[i / 32] = positive ^ (any ? 1u << 31 : 0) ^ (all ? 1u << 30 : 0);
}

// Sums of blocks, and their total by the block that finishes last.
__global__ void grid_sum(const float* x, int n, float* sums, uint32_t* finished, float* total) {
    NANOCHAT_SHARED(float[32], parts);
    NANOCHAT_SHARED(bool, last);
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = i < n ? x[i] : 0;
    for (int d = 16; d > 0; d /= 2) sum += __shfl_down_sync(~0u, sum, d);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) sum += parts[w];
        sums[blockIdx.x] = sum;
        last = atomic_add_ordered(finished, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x != 0) return;
    float all = 0;
    for (int b = 0; b < static_cast<int>(gridDim.x); ++b) all += sums[b];
    *total = all;
}

__global__ void atomics(const int* x, int n, int* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    atomicAdd(out, x[i]);
    atomicMax(out + 1, x[i]);
    atomicMin(out + 2, x[i]);
    atomicCAS(out + 3, 0, 7);
    atomicExch(out + 4, 5);
}

// Writes x backwards, in words of 16 bytes.
__global__ void reverse(const uint32_t* x, uint32_t* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n / 4) store_16(out + n - 4 * (i + 1), {x[4 * i + 3], x[4 * i + 2], x[4 * i + 1], x[4 * i]});
}

// The same by streamed accesses: loads of 16 bytes, or of two times 8.
__global__ void reverse_streamed(const uint32_t* x, uint32_t* out, int n, bool in_pairs) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n / 4) return;
    uint32_t words[4];
    if (in_pairs) {
        uint32_t first[2], second[2];
        load_streamed(first, x + 4 * i);
        load_streamed(second, x + 4 * i + 2);
        for (int j = 0; j < 2; ++j) words[j] = first[j], words[2 + j] = second[j];
    } else {
        load_streamed(words, x + 4 * i);
    }
    store_streamed(out + n - 4 * (i + 1), {words[3], words[2], words[1], words[0]});
}

// Writes the 32 pairs of x in reverse order.
__global__ void reverse_pairs(const float* x, float* out) {
    NANOCHAT_SHARED(float2[32], pairs);
    const int lane = threadIdx.x;
    pairs[lane] = {x[2 * lane], x[2 * lane + 1]};
    __syncwarp();
    float first, second;
    load_shared_pair(first, second, shared_address(&pairs) + 8 * (31 - lane));
    out[2 * lane] = first;
    out[2 * lane + 1] = second;
}

// Warp 0 hands over, round by round, to warp 1 and back, through two named barriers.
__global__ void hand_over(const float* x, float* out, int rounds) {
    NANOCHAT_SHARED(float[32], box);
    const int lane = threadIdx.x % 32;
    for (int r = 0; r < rounds; ++r) {
        if (threadIdx.x < 32) {
            if (r > 0) bar_sync(2, 64);
            box[lane] = x[r * 32 + lane];
            bar_arrive(1, 64);
        } else {
            bar_sync(1, 64);
            out[r * 32 + lane] = box[31 - lane];
            if (r + 1 < rounds) bar_arrive(2, 64);
        }
    }
}

__global__ void numbers(const float* x, int n, float* out, uint32_t* packed) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    packed[i] = pack<bfloat16>(x[i], x[n - 1 - i]);
    packed[n + i] = pack<float16>(x[i], x[n - 1 - i]);
    out[i] = to_float(bfloat16{static_cast<uint16_t>(packed[i])});
    out[n + i] = to_float(float16{static_cast<uint16_t>(packed[n + i])});
    out[2 * n + i] = exp2_approx(x[i]);
    out[3 * n + i] = reciprocal_approx(x[i]);
    out[4 * n + i] = tanh_approx(x[i]);
    out[5 * n + i] = sqrt_approx(x[i]);
}

// --- sm_80 ---

// Tiles (16, 16) come by cp.async in rows of 32 bytes; the last `absent` bytes of each row are not read.
template <class T>
__global__ void mma_tile(const void* a, const void* b, float* d, int absent) {
    NANOCHAT_SHARED(uint4[64], tiles);
    const uint32_t base = shared_address(&tiles), lane = threadIdx.x;
    const auto load = [&](uint32_t tile, const void* from) {
        const int present = 32 - absent, begin = lane % 2 * 16, left = present - begin;
        cp_async_16(tile + lane * 16, static_cast<const char*>(from) + lane * 16, left < 0 ? 0 : left < 16 ? left : 16);
        cp_async_commit();
    };
    load(base, a);
    load(base + 512, b);
    cp_async_wait<0>();
    __syncwarp();
    uint32_t fragment[4], columns[4], again[2];
    float sums[2][4] = {};
    ldmatrix_x4(fragment, base + lane % 16 * 32 + lane / 16 * 16);
    // b is (K, N): transposed reads give each lane two of a column.
    ldmatrix_x4_trans(columns, base + 512 + lane % 16 * 32 + lane / 16 * 16);
    ldmatrix_x2_trans(again, base + 512 + lane % 16 * 32);
    const uint32_t right[2] = {columns[2], columns[3]};
    mma_m16n8k16<T>(sums[0], fragment, again);
    mma_m16n8k16<T>(sums[1], fragment, right);
    for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 4; ++i) {
            d[(lane / 4 + 8 * (i / 2)) * 16 + 8 * h + 2 * (lane % 4) + i % 2] = sums[h][i];
        }
    }
}

// The registers that ldmatrix fills, element by element.
__global__ void ldmatrix_maps(const uint32_t* tile, uint32_t* out) {
    NANOCHAT_SHARED(uint4[32], rows);
    const uint32_t lane = threadIdx.x;
    for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(&rows)[lane + 32 * i] = tile[lane + 32 * i];
    __syncwarp();
    const uint32_t row = shared_address(&rows) + lane * 16;
    uint32_t plain[4], transposed[4], two[2], two_transposed[2];
    ldmatrix_x4(plain, row);
    ldmatrix_x4_trans(transposed, row);
    ldmatrix_x2(two, row);
    ldmatrix_x2_trans(two_transposed, row);
    for (int i = 0; i < 4; ++i) {
        out[i * 32 + lane] = plain[i];
        out[(4 + i) * 32 + lane] = transposed[i];
    }
    for (int i = 0; i < 2; ++i) {
        out[(8 + i) * 32 + lane] = two[i];
        out[(10 + i) * 32 + lane] = two_transposed[i];
    }
}

// --- sm_90 ---

// What ldmatrix takes apart stmatrix puts together.
__global__ void stmatrix_maps(const uint32_t* tile, uint32_t* out) {
#ifdef NANOCHAT_HOPPER
    NANOCHAT_SHARED(uint4[32], rows);
    auto* words = reinterpret_cast<uint32_t*>(&rows);
    const uint32_t lane = threadIdx.x, row = shared_address(&rows) + lane * 16;
    for (int transposed = 0; transposed < 2; ++transposed) {
        uint32_t registers[4];
        for (int i = 0; i < 4; ++i) registers[i] = tile[i * 32 + lane];
        __syncwarp();
        if (transposed) {
            stmatrix_x4_trans(row, registers);
        } else {
            stmatrix_x4(row, registers);
        }
        __syncwarp();
        for (int i = 0; i < 4; ++i) out[(4 * transposed + i) * 32 + lane] = words[i * 32 + lane];
    }
#endif
}

// A box through shared memory, and its bytes there.
template <int rank>
__global__ void copy_box(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, int c0, int c1,
                         int c2, int c3, int bytes, bool add, unsigned char* image) {
#ifdef NANOCHAT_HOPPER
    NANOCHAT_DYNAMIC_SHARED(shared);
    NANOCHAT_SHARED(uint64_t, barrier_storage);
    const uint32_t tile = (shared_address(shared) + 1023) & ~1023u, barrier = shared_address(&barrier_storage);
    const uint32_t skipped = tile - shared_address(shared);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
        tma_prefetch(from);
        mbarrier_arrive_expect_tx(barrier, bytes);
        if constexpr (rank == 2) tma_load(tile, from, barrier, c0, c1);
        if constexpr (rank == 3) tma_load(tile, from, barrier, c0, c1, c2);
        if constexpr (rank == 4) tma_load(tile, from, barrier, c0, c1, c2, c3);
    }
    __syncthreads();
    while (!mbarrier_try_wait(barrier, 0)) {
    }
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) image[i] = shared[skipped + i];
    if (threadIdx.x == 0) {
        if constexpr (rank == 2) add ? tma_reduce_add(to, tile, c0, c1) : tma_store(to, tile, c0, c1);
        if constexpr (rank == 3) add ? tma_reduce_add(to, tile, c0, c1, c2) : tma_store(to, tile, c0, c1, c2);
        if constexpr (rank == 4) add ? tma_reduce_add(to, tile, c0, c1, c2, c3) : tma_store(to, tile, c0, c1, c2, c3);
        tma_commit();
        tma_wait<0>();
    }
#endif
}

template <int rank>
void run_copy(const Argument* arguments) {
    const auto dtype = static_cast<DType>(arguments[3].integer);
    const auto swizzle = static_cast<Swizzle>(arguments[4].integer);
    const auto* sizes = arguments[6].to<const int64_t>();
    const auto* box = arguments[7].to<const int64_t>();
    const auto* at = arguments[8].to<const int64_t>();
    const int64_t element = dtype == DType::float32 ? 4 : 2;
    const int64_t s1 = sizes[0] * element, s2 = s1 * sizes[1], s3 = s2 * sizes[2];
    const auto b = [&](int i) { return static_cast<int32_t>(box[i]); };
    const auto c = [&](int i) { return static_cast<int>(at[i]); };
    const auto map = [&](const Argument& tensor) {
        if constexpr (rank == 2) {
            return nanochat::cuda::make_tensor_map(dtype, tensor.pointer, {sizes[0], sizes[1]}, {s1}, {b(0), b(1)},
                                                   swizzle);
        } else if constexpr (rank == 3) {
            return nanochat::cuda::make_tensor_map(dtype, tensor.pointer, {sizes[0], sizes[1], sizes[2]}, {s1, s2},
                                                   {b(0), b(1), b(2)}, swizzle);
        } else {
            return nanochat::cuda::make_tensor_map(dtype, tensor.pointer, {sizes[0], sizes[1], sizes[2], sizes[3]},
                                                   {s1, s2, s3}, {b(0), b(1), b(2), b(3)}, swizzle);
        }
    };
    const auto bytes = static_cast<int>(box[0] * box[1] * box[2] * box[3] * element);
    launch("copy_box", copy_box<rank>, dim3(1), dim3(64), 1024 + bytes, nullptr, map(arguments[0]), map(arguments[1]),
           c(0), c(1), c(2), c(3), bytes, arguments[9].integer != 0, arguments[2].to<unsigned char>());
}

}   // namespace

// x (64 blocks) float32, out (5, 64 blocks), votes (2 blocks) int32, blocks
ENTRY(warp_exchange) {
    launch("warp_exchange", warp_exchange, dim3(static_cast<unsigned>(arguments[3].integer)), dim3(64), 0, nullptr,
           arguments[0].to<const float>(), arguments[1].to<float>(), arguments[2].to<uint32_t>());
}

// x (n) float32, sums (blocks), finished (1) int32 zero, total (1), n, blocks
ENTRY(grid_sum) {
    launch("grid_sum", grid_sum, dim3(static_cast<unsigned>(arguments[5].integer)), dim3(96), 0, nullptr,
           arguments[0].to<const float>(), static_cast<int>(arguments[4].integer), arguments[1].to<float>(),
           arguments[2].to<uint32_t>(), arguments[3].to<float>());
}

// x (n) int32, out (5) int32, n
ENTRY(atomics) {
    launch("atomics", atomics, dim3(3), dim3(64), 0, nullptr, arguments[0].to<const int>(),
           static_cast<int>(arguments[2].integer), arguments[1].to<int>());
}

// x (n) int32, out (n), n: a multiple of 4
ENTRY(reverse) {
    const auto n = static_cast<int>(arguments[2].integer);
    launch("reverse", reverse, dim3(static_cast<unsigned>(n / 256 + 1)), dim3(64), 0, nullptr,
           arguments[0].to<const uint32_t>(), arguments[1].to<uint32_t>(), n);
}

// The same, in_pairs
ENTRY(reverse_streamed) {
    const auto n = static_cast<int>(arguments[2].integer);
    launch("reverse_streamed", reverse_streamed, dim3(static_cast<unsigned>(n / 256 + 1)), dim3(64), 0, nullptr,
           arguments[0].to<const uint32_t>(), arguments[1].to<uint32_t>(), n, arguments[3].integer != 0);
}

// x (64) float32, out (64)
ENTRY(reverse_pairs) {
    launch("reverse_pairs", reverse_pairs, dim3(1), dim3(32), 0, nullptr, arguments[0].to<const float>(),
           arguments[1].to<float>());
}

// x (32 rounds) float32, out (32 rounds), rounds
ENTRY(hand_over) {
    launch("hand_over", hand_over, dim3(1), dim3(64), 0, nullptr, arguments[0].to<const float>(),
           arguments[1].to<float>(), static_cast<int>(arguments[2].integer));
}

// x (n) float32, out (5, n), packed (2, n) int32, n
ENTRY(numbers) {
    const auto n = static_cast<int>(arguments[3].integer);
    launch("numbers", numbers, dim3(static_cast<unsigned>((n + 63) / 64)), dim3(64), 0, nullptr,
           arguments[0].to<const float>(), n, arguments[1].to<float>(), arguments[2].to<uint32_t>());
}

// a (16, 16), b (16, 16), d (16, 16) float32, whether float16 (else bfloat16), bytes absent at the end of each row
ENTRY(mma_tile) {
    launch("mma_tile", arguments[3].integer ? mma_tile<float16> : mma_tile<bfloat16>, dim3(1), dim3(32), 0, nullptr,
           arguments[0].to<const void>(), arguments[1].to<const void>(), arguments[2].to<float>(),
           static_cast<int>(arguments[4].integer));
}

// tile (4, 8, 8) of 16 bits, out (12, 32) int32
ENTRY(ldmatrix_maps) {
    launch("ldmatrix_maps", ldmatrix_maps, dim3(1), dim3(32), 0, nullptr, arguments[0].to<const uint32_t>(),
           arguments[1].to<uint32_t>());
}

// registers (4, 32) int32, out (2, 4, 32) int32
ENTRY(stmatrix_maps) {
    launch("stmatrix_maps", stmatrix_maps, dim3(1), dim3(32), 0, nullptr, arguments[0].to<const uint32_t>(),
           arguments[1].to<uint32_t>());
}

// from, to, image (bytes of the box), DType, Swizzle, rank; on the host: sizes (4), box (4), coordinates (4); add
ENTRY(copy_box) {
    const int64_t rank = arguments[5].integer;
    rank == 2 ? run_copy<2>(arguments) : rank == 3 ? run_copy<3>(arguments) : run_copy<4>(arguments);
}
