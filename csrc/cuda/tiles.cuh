// Tiles of 16-bit elements in shared memory, as cp.async and tensor copies write them and mma.sync and wgmma read them.
#pragma once

#include <cstdint>

#include "ptx/primitives.cuh"

namespace nanochat::cuda {

using device::bfloat16;
using device::float16;
using device::Swizzle;
using device::to_float;

// The shared memory that every GPU gives to a block: compute capabilities 8.6, 8.9 and 12.0 have no more.
constexpr int kLeastSharedBytes = 99 * 1024;

NANOCHAT_ANYWHERE constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// The layout of a tile of rows x D 16-bit elements: panels side by side, each with rows of 128 bytes (64 if D is not a
// multiple of 64), in the swizzle of that width. Tensor copies write it and wgmma reads it, and ldmatrix has no bank
// conflicts. Tiles begin at multiples of 1024 bytes.
template <int D>
struct SmemLayout {
    static_assert(D % 32 == 0);
    static constexpr Swizzle swizzle = D % 64 == 0 ? Swizzle::bytes128 : Swizzle::bytes64;
    static constexpr int width = device::swizzle_bytes(swizzle), columns = width / 2, count = D / columns;
    static constexpr int chunks = width / 16;   // of 8 elements, in a row of a panel
};

template <int D>
NANOCHAT_ANYWHERE constexpr int tile_bytes(int rows) {
    return rows * D * 2;
}

// The row of a tile that a lane reads or writes. A call returns the address of chunk `chunk` in the row that is `further`
// rows below (a multiple of 8). If `half` is 1, it returns the odd chunk after an even `chunk`.
template <int D, int rows>
struct SwizzledRow {
    using P = SmemLayout<D>;
    uint32_t row, xor_swizzle;

    NANOCHAT_DEVICE SwizzledRow(uint32_t tile, int r, int half = 0)
        : row(tile + r * P::width),
          xor_swizzle(device::swizzled(r * P::width, P::swizzle) ^ static_cast<uint32_t>(r * P::width) ^
                      static_cast<uint32_t>(half << 4)) {}
    NANOCHAT_DEVICE uint32_t operator()(int chunk, int further = 0) const {
        return row + (chunk / P::chunks * rows + further) * P::width + (xor_swizzle ^ (chunk % P::chunks << 4));
    }
};

// The rows whose addresses a lane passes to ldmatrix_x4: 16 rows of operand A (or of a transposed operand B) from row
// `first` on, or 16 columns of operand B, which are rows here.
template <int D, int rows>
NANOCHAT_DEVICE SwizzledRow<D, rows> a_fragment_rows(uint32_t tile, int first, int lane) {
    return {tile, first + lane % 16, lane / 16};
}
template <int D, int rows>
NANOCHAT_DEVICE SwizzledRow<D, rows> b_fragment_rows(uint32_t tile, int lane) {
    return {tile, lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

template <int D, int threads>
constexpr int rows_per_pass = threads / SmemLayout<D>::chunks;

// Copies `rows` rows into a tile in the background, with `threads` threads. Row r < count comes from row_address(r) and
// has D_given elements; all other elements become zero. row_address is called for ascending rows, rows_per_pass<D,
// threads> apart, also for rows that do not exist.
template <int D, int rows, int threads, class RowAddress>
NANOCHAT_DEVICE void load_rows(uint32_t tile, RowAddress row_address, int count, int D_given) {
    using P = SmemLayout<D>;
    constexpr int step = rows_per_pass<D, threads>;
    static_assert(rows % step == 0);
    const int thread = threadIdx.x, chunk = thread % P::chunks;
    const SwizzledRow<D, rows> smem_row(tile, thread / P::chunks);
#pragma unroll
    for (int pass = 0; pass < rows / step; ++pass) {
        const int r = thread / P::chunks + pass * step;
        const auto* from = row_address(r);
#pragma unroll
        for (int panel = 0; panel < P::count; ++panel) {
            const int column = panel * P::columns + chunk * 8;
            const bool exists = r < count && column < D_given;
            device::cp_async_16(smem_row(panel * P::chunks + chunk, pass * step), from + column, exists ? 16 : 0);
        }
    }
}

// The rows of a matrix, for load_rows: one address that advances, instead of one address per pass.
template <class T, int step>
struct StridedRows {
    const T* next;
    int64_t stride;

    NANOCHAT_DEVICE const T* operator()(int) {
        const T* row = next;
        next += step * stride;
        return row;
    }
};
template <int D, int threads, class T>
NANOCHAT_DEVICE StridedRows<T, rows_per_pass<D, threads>> strided_rows(const T* first, int64_t stride) {
    return {first + static_cast<int>(threadIdx.x) / SmemLayout<D>::chunks * stride, stride};
}

// --- accumulators of mma.sync and wgmma ---

// Elements 4 n .. 4 n + 3 of an accumulator: a lane's part of columns 8 n to 8 n + 7.
template <int count>
NANOCHAT_DEVICE float (&fragment(float (&d)[count], int n))[4] {
    return reinterpret_cast<float (&)[4]>(d[4 * n]);
}

// Writes the 16 rows of a warp's accumulator as T into rows first .. first + 15 of a tile, which belong to the warp.
template <class T, int D, int rows>
NANOCHAT_DEVICE void stage_rows(unsigned char* tile, const float (&sums)[D / 2], int first) {
    const int lane = threadIdx.x % 32;
    __syncwarp();   // other lanes may still read these rows
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const SwizzledRow<D, rows> smem_row(0, first + lane / 4 + 8 * h);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            *reinterpret_cast<uint32_t*>(tile + smem_row(n) + 4 * (lane % 4)) =
                device::pack<T>(sums[4 * n + 2 * h], sums[4 * n + 2 * h + 1]);
        }
    }
    __syncwarp();
}

// Stores these rows in accesses of 16 bytes. chunk_address(r, chunk) is the target of 8 elements of the tile's row r, or
// null to skip them.
template <class T, int D, int rows, class ChunkAddress>
NANOCHAT_DEVICE void store_chunks(const unsigned char* tile, int first, const ChunkAddress& chunk_address) {
#pragma unroll
    for (int i = threadIdx.x % 32; i < 2 * D; i += 32) {
        const int row = first + i / (D / 8), chunk = i % (D / 8);
        T* const to = chunk_address(row, chunk);
        if (!to) continue;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(tile + SwizzledRow<D, rows>(0, row)(chunk));
    }
}

// Does both for the first D_given columns. row_address(r) is the target of the tile's row r, or null to skip it.
template <class T, int D, int rows, class RowAddress>
NANOCHAT_DEVICE void store_rows(unsigned char* tile, const float (&sums)[D / 2], int first, int D_given,
                                const RowAddress& row_address) {
    stage_rows<T, D, rows>(tile, sums, first);
    store_chunks<T, D, rows>(tile, first, [&](int row, int chunk) {
        T* const to = row_address(row);
        return to && chunk * 8 < D_given ? to + chunk * 8 : nullptr;
    });
    __syncwarp();   // the rows may be written again
}

}   // namespace nanochat::cuda
