// One warpgroup multiplies tiles that it has laid out itself, in every form that wgmma takes.
#pragma once

#include "../../../csrc/cuda/ptx/primitives.cuh"
#include "../entry.h"

namespace {

using namespace nanochat::device;

// d (64, N) = a (64, 64) b (64, N), operands as they lie in global memory: a by rows of K (K-major) or of M, b by rows
// of K (MN-major) or of N. `swizzle` of both tiles.
template <int N, class T, Major major_a, Major major_b, bool registers>
__global__ void __launch_bounds__(128, 1) wgmma_tile(const uint16_t* a, const uint16_t* b, float* d, Swizzle swizzle) {
#ifdef NANOCHAT_HOPPER
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t base = (shared_address(shared) + 1023) & ~1023u, skipped = base - shared_address(shared);
    const uint32_t tile_b = base + 64 * 64 * 2, width = swizzle_bytes(swizzle);
    // Atoms of 8 rows x `width` bytes, those along a row first, 8 rows of them `stride` bytes after the last 8.
    const auto place = [&](uint32_t tile, int row, int column, int columns) {
        const uint32_t byte = 2 * static_cast<uint32_t>(column), across = (2 * columns + width - 1) / width;
        return swizzled(tile + (row / 8 * across + byte / width) * 8 * width + row % 8 * width + byte % width, swizzle);
    };
    const int columns_b = major_b == Major::k ? 64 : N, rows_b = major_b == Major::k ? N : 64;
    const auto put = [&](uint32_t address, uint16_t x) {
        *reinterpret_cast<uint16_t*>(shared + skipped + (address - base)) = x;
    };
    for (int i = threadIdx.x; i < 64 * 64; i += 128) put(place(base, i / 64, i % 64, 64), a[i]);
    for (int i = threadIdx.x; i < rows_b * columns_b; i += 128) {
        put(place(tile_b, i / columns_b, i % columns_b, columns_b), b[i]);
    }
    fence_proxy_async();
    __syncthreads();

    const int thread = threadIdx.x, lane = thread % 32;
    // The descriptor of the 16 along K from k on.
    const auto tile_at = [&](uint32_t tile, Major major, int columns, int k) {
        const uint32_t atom = 8 * width, across = (2 * columns + width - 1) / width;
        if (major == Major::k) {
            const uint32_t byte = 2 * static_cast<uint32_t>(k);
            const uint32_t start = tile + byte / width * atom + byte % width;
            return wgmma_descriptor(start, atom, across * atom, swizzle);
        }
        // Without a swizzle the two distances of MN-major tiles change places.
        const uint32_t start = tile + k / 8 * across * atom;
        return swizzle == Swizzle::none ? wgmma_descriptor(start, across * atom, atom, swizzle)
                                        : wgmma_descriptor(start, atom, across * atom, swizzle);
    };
    float sums[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[i] = 0;
    uint32_t fragments[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = thread / 32 * 16 + lane / 4 + 8 * (i % 2), column = 16 * k + 2 * (lane % 4) + 8 * (i / 2);
            fragments[k][i] = a[row * 64 + column] | static_cast<uint32_t>(a[row * 64 + column + 1]) << 16;
        }
    }
    pin_registers(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint64_t right = tile_at(tile_b, major_b, columns_b, 16 * k);
        if constexpr (registers) {
            wgmma<N, T, major_b>(sums, fragments[k], right, k > 0);
        } else {
            wgmma<N, T, major_a, major_b>(sums, tile_at(base, major_a, 64, 16 * k), right, k > 0);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin_registers(sums);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const int row = thread / 32 * 16 + lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        d[row * N + column] = sums[i];
    }
#endif
}

// a (64, 64), b (64 x N), d (64, N) float32, Swizzle
template <int N, class T, Major major_a, Major major_b, bool registers>
void run_wgmma(const Argument* arguments) {
    launch("wgmma_tile", wgmma_tile<N, T, major_a, major_b, registers>, dim3(1), dim3(128),
           1024 + 64 * 64 * 2 + 64 * 256 * 2, nullptr, arguments[0].to<const uint16_t>(),
           arguments[1].to<const uint16_t>(), arguments[2].to<float>(), static_cast<Swizzle>(arguments[3].integer));
}

}   // namespace
