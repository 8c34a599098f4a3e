// Shared by the kernels that take rows of C elements: a row belongs to one warp, or to one block if it is long. A kernel
// that normalises holds the first packs of each thread in registers between the sum over the row and their second use.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../check.h"
#include "packs.cuh"

namespace nanochat::cuda {

constexpr int kMaxThreads = 256;   // of a row: they hold 8,192 elements of bfloat16
constexpr int kWarpRows = 4;       // rows of a block if a row takes one warp
// Per thread: 64 bytes of loads in flight for each tensor, at least 64 KB per multiprocessor.
constexpr int kHeldPacks = 4;

// --- on the device ---

// Pack p of a row of C elements. `whole`: C is a multiple of N, and the rows of all tensors are aligned.
template <int N, bool whole, class T>
NANOCHAT_DEVICE Pack<T, N> load_pack(const T* row, int p, int C) {
    const T* from = row + p * N;
    return whole ? load<N>(from) : load<N>(from, C - p * N, is_aligned<N>(from));
}
template <bool whole, class T, int N>
NANOCHAT_DEVICE void store_pack(T* row, int p, int C, const Pack<T, N>& pack) {
    T* to = row + p * N;
    whole ? store(to, pack) : store(to, pack, C - p * N, is_aligned<N>(to));
}

// The row of this thread: a block has blockDim.y rows, of blockDim.x threads each.
NANOCHAT_DEVICE int64_t own_row() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }

// The sum over the threads of a row; all of them get it. Each sum of a kernel has another `place` in shared memory.
template <int place = 0>
NANOCHAT_DEVICE float row_sum(float x) {
    NANOCHAT_SHARED(float[kMaxThreads / 32], warps);
    return blockDim.x == 32 ? warp_sum(x) : block_sum(x, warps);
}

template <class T, int N>
NANOCHAT_DEVICE Pack<T, N> sum_of(const Pack<T, N>& a, const Pack<T, N>& b) {
    Pack<T, N> sum;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        set_pair(sum, i, element(a, i) + element(b, i), element(a, i + 1) + element(b, i + 1));
    }
    return sum;
}

template <class T, int N>
NANOCHAT_DEVICE Pack<T, N> times(const Pack<T, N>& pack, float factor) {
    Pack<T, N> result;
#pragma unroll
    for (int i = 0; i < N; i += 2) set_pair(result, i, element(pack, i) * factor, element(pack, i + 1) * factor);
    return result;
}

template <class T, int N>
NANOCHAT_DEVICE void add_squares(float& sum, const Pack<T, N>& pack) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum += element(pack, i) * element(pack, i);
}

template <class T, int N>
NANOCHAT_DEVICE void add_products(float& sum, const Pack<T, N>& a, const Pack<T, N>& b) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum += element(a, i) * element(b, i);
}

// --- on the host ---

struct Grid {
    dim3 blocks, threads;
};

// For threads that hold `held` packs of each tensor.
inline Grid grid_of(const char* op, int64_t N, int64_t C, int pack, int held) {
    require(C >= 1 && C <= INT32_MAX / 2, op, ": rows must have 1 to ", INT32_MAX / 2, " elements, got ", C);
    const int64_t packs = (C + pack - 1) / pack, warps = (packs + 32 * held - 1) / (32 * held);
    const int64_t threads = std::min<int64_t>(32 * warps, kMaxThreads), rows = threads == 32 ? kWarpRows : 1;
    const int64_t blocks = (N + rows - 1) / rows;
    require(blocks <= INT32_MAX, op, ": takes at most ", INT32_MAX, " rows, got ", N);
    return {dim3(static_cast<uint32_t>(blocks)), dim3(static_cast<uint32_t>(threads), static_cast<uint32_t>(rows))};
}

// Whether all packs of a row can be accessed at once. A null pointer is aligned.
template <class... Pointers>
inline bool is_whole(int64_t C, int pack, Pointers... pointers) {
    return C % pack == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}   // namespace nanochat::cuda
