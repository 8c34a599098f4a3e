// Tiles of 16-bit elements in shared memory, as cp.async and tensor copies write them and mma.sync and wgmma read them.
#pragma once

#include <cstdint>

#include "device/primitives.cuh"

namespace nanochat::cuda {

using device::bfloat16;
using device::float16;
using device::Swizzle;
using device::to_float;

NANOCHAT_ANYWHERE constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// A tile of rows x D 16-bit elements lies in panels side by side, each with rows of 128 bytes (64 where D is no
// multiple of 64), in the swizzle of that width: what tensor copies write and wgmma reads, and free of bank conflicts
// for ldmatrix. Tiles begin at multiples of 1024 bytes.
template <int D>
struct Panels {
    static_assert(D % 32 == 0);
    static constexpr Swizzle swizzle = D % 64 == 0 ? Swizzle::bytes128 : Swizzle::bytes64;
    static constexpr int width = device::swizzle_bytes(swizzle), columns = width / 2, count = D / columns;
    static constexpr int chunks = width / 16;   // of 8 elements, in a row of a panel
};

template <int D>
NANOCHAT_ANYWHERE constexpr int tile_bytes(int rows) {
    return rows * D * 2;
}

// The places of one lane's row: of chunk `chunk`, `further` rows below (a multiple of 8). Where half is 1, of the chunk
// after an even one.
template <int D, int rows>
struct Cursor {
    using P = Panels<D>;
    uint32_t row, twist;

    NANOCHAT_DEVICE Cursor(uint32_t tile, int r, int half = 0)
        : row(tile + r * P::width),
          twist(device::swizzled(r * P::width, P::swizzle) ^ static_cast<uint32_t>(r * P::width) ^
                static_cast<uint32_t>(half << 4)) {}
    NANOCHAT_DEVICE uint32_t operator()(int chunk, int further = 0) const {
        return row + (chunk / P::chunks * rows + further) * P::width + (twist ^ (chunk % P::chunks << 4));
    }
};

// Rows as ldmatrix_x4 wants them: of a left operand (or a transposed right one) from row `first` on, 16 rows, and of a
// right operand, whose 16 columns are rows here.
template <int D, int rows>
NANOCHAT_DEVICE Cursor<D, rows> left_cursor(uint32_t tile, int first, int lane) {
    return {tile, first + lane % 16, lane / 16};
}
template <int D, int rows>
NANOCHAT_DEVICE Cursor<D, rows> right_cursor(uint32_t tile, int lane) {
    return {tile, lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

template <int D, int threads>
constexpr int rows_a_pass = threads / Panels<D>::chunks;

// Copies `rows` rows into a tile in the background, by `threads` threads: row r from row_address(r), of which the first
// `D_given` elements exist, where r < count; all else becomes zero. row_address is asked for ascending rows,
// rows_a_pass<D, threads> apart, and for addresses alone where there is no row.
template <int D, int rows, int threads, class RowAddress>
NANOCHAT_DEVICE void load_rows(uint32_t tile, RowAddress row_address, int count, int D_given) {
    using P = Panels<D>;
    constexpr int step = rows_a_pass<D, threads>;
    static_assert(rows % step == 0);
    const int thread = threadIdx.x, chunk = thread % P::chunks;
    const Cursor<D, rows> cursor(tile, thread / P::chunks);
#pragma unroll
    for (int pass = 0; pass < rows / step; ++pass) {
        const int r = thread / P::chunks + pass * step;
        const auto* from = row_address(r);
#pragma unroll
        for (int panel = 0; panel < P::count; ++panel) {
            const int column = panel * P::columns + chunk * 8;
            const bool exists = r < count && column < D_given;
            device::cp_async_16(cursor(panel * P::chunks + chunk, pass * step), from + column, exists ? 16 : 0);
        }
    }
}

// The rows of a matrix, for load_rows: one address that moves on, instead of one a pass.
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
NANOCHAT_DEVICE StridedRows<T, rows_a_pass<D, threads>> strided_rows(const T* first, int64_t stride) {
    return {first + static_cast<int>(threadIdx.x) / Panels<D>::chunks * stride, stride};
}

// --- accumulators of mma.sync and wgmma ---

// Elements 4 n .. 4 n + 3 of an accumulator: a lane's part of columns 8 n to 8 n + 7.
template <int count>
NANOCHAT_DEVICE float (&fragment(float (&d)[count], int n))[4] {
    return reinterpret_cast<float (&)[4]>(d[4 * n]);
}

// Puts 16 rows of sums, a warp's, as T into rows first .. first + 15 of a tile, which are the warp's own.
template <class T, int D, int rows>
NANOCHAT_DEVICE void stage_rows(unsigned char* tile, const float (&sums)[D / 2], int first) {
    const int lane = threadIdx.x % 32;
    __syncwarp();   // other lanes may still read these rows
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const Cursor<D, rows> cursor(0, first + lane / 4 + 8 * h);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            *reinterpret_cast<uint32_t*>(tile + cursor(n) + 4 * (lane % 4)) =
                device::pack<T>(sums[4 * n + 2 * h], sums[4 * n + 2 * h + 1]);
        }
    }
    __syncwarp();
}

// Stores them from there in accesses of 16 bytes. chunk_address(r, chunk): where 8 elements of the tile's row r go;
// null if nowhere.
template <class T, int D, int rows, class ChunkAddress>
NANOCHAT_DEVICE void store_chunks(const unsigned char* tile, int first, const ChunkAddress& chunk_address) {
#pragma unroll
    for (int i = threadIdx.x % 32; i < 2 * D; i += 32) {
        const int row = first + i / (D / 8), chunk = i % (D / 8);
        T* const to = chunk_address(row, chunk);
        if (!to) continue;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(tile + Cursor<D, rows>(0, row)(chunk));
    }
}

// Both, of the first D_given columns. row_address(r): where the tile's row r goes; null if nowhere.
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
