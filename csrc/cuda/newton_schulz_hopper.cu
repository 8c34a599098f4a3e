// The products of Newton-Schulz on Hopper: a warpgroup loads by tensor copies, two multiply 128 x 128 each, of which
// they share the columns. Blocks of threads stay, so that the next tile's loads go on while one is written out.
#include "hopper.cuh"
#include "newton_schulz.cuh"
#include "tensor_map.h"

namespace nanochat::cuda::newton_schulz_kernels::hopper {
namespace {

using device::TensorMap;

// 256 x 128: 48 bytes from the L2 cache for 4,096 FLOP, which a multiprocessor needs a cycle for; 128 x 128 would
// be 64.
struct Tile : Groups<2> {
    static constexpr int rows = kTile * consumers, stages = 4;
    static constexpr int block_bytes = tile_bytes<kDepth>(kTile);   // kTile x kDepth
    static constexpr int stage_bytes = (consumers + 1) * block_bytes, strips_bytes = 4 * consumers * kStripBytes;
    static constexpr int tiles_bytes = stages * stage_bytes + strips_bytes;
    static constexpr int shared_bytes = 1024 + tiles_bytes + ring_bytes(stages);
};

// Whether a consumer has work in a tile: its block exists, and is not left to the mirror of the lower half.
NANOCHAT_DEVICE bool has_work(const Product& p, const TilePlace& place, int consumer) {
    const int row = place.row + consumer * kTile;
    return row < p.m && !(p.symmetric && row < place.column);
}

// Tiles of one matrix in which both consumers have work, and in which one has.
struct Tiles {
    int whole, half;
};

NANOCHAT_ANYWHERE Tiles tiles_of(const Product& p) {
    const int rows = divide_up(p.m, kTile), columns = divide_up(p.n, kTile), pairs = rows / 2;
    if (p.symmetric) return {pairs * pairs, pairs + (rows % 2 ? columns : 0)};
    return {pairs * columns, rows % 2 ? columns : 0};
}

// Whole tiles of all matrices come first, so that half ones even out when blocks of threads end. Row i of a symmetric
// result has 2 i + 1 whole tiles, and a half one at its end.
NANOCHAT_DEVICE TilePlace tile_place(const Product& p, const Tiles& tiles, int item) {
    const int columns = divide_up(p.n, kTile), whole = tiles.whole * p.count;
    int matrix, tile, row, column;
    if (item < whole) {
        matrix = item / tiles.whole;
        tile = item - matrix * tiles.whole;
        if (p.symmetric) {
            for (row = 0; tile > 2 * row; ++row) tile -= 2 * row + 1;
            column = tile;
        } else {
            row = tile / columns;
            column = tile - row * columns;
        }
    } else {
        matrix = (item - whole) / tiles.half;
        tile = item - whole - matrix * tiles.half;
        const int diagonal = p.symmetric ? divide_up(p.m, kTile) / 2 : 0;
        row = tile < diagonal ? tile : divide_up(p.m, kTile) / 2;
        column = tile < diagonal ? 2 * tile + 1 : tile - diagonal;
    }
    return {matrix, row * Tile::rows, column * kTile};
}

// A block of kTile rows or columns of an operand, kDepth along K from k on.
template <Major major>
NANOCHAT_DEVICE void load_block(uint32_t block, const TensorMap& map, uint32_t barrier, int first, int k, int matrix) {
    if constexpr (major == Major::k) {
        device::tma_load(block, map, barrier, k, first, matrix);
    } else {
        using P = Panels<kTile>;
#pragma unroll
        for (int panel = 0; panel < P::count; ++panel) {
            device::tma_load(block + panel * kDepth * P::width, map, barrier, first + panel * P::columns, k, matrix);
        }
    }
}

// 16 along K of a block; the first 64 rows or columns, or the last.
template <Major major>
NANOCHAT_DEVICE uint64_t descriptor(uint32_t block, int half, int step) {
    if constexpr (major == Major::k) return along_columns<kDepth, kTile>(block + half * tile_bytes<kDepth>(64), step);
    return along_rows<kTile, kDepth>(block + half * tile_bytes<kDepth>(64), step);
}

template <class T, Major major_a, Major major_b, class Destination>
__global__ void __launch_bounds__(Tile::threads, 1)
    product_hopper_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                          const __grid_constant__ Product p, const __grid_constant__ Destination destination) {
#ifdef NANOCHAT_HOPPER
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t start = device::shared_address(shared), stages = (start + 1023) & ~1023u;
    const Ring<Tile::stages> ring = {stages + Tile::tiles_bytes};
    const int group = threadIdx.x / kGroupThreads;
    const Tiles tiles = tiles_of(p);
    const int items = (tiles.whole + tiles.half) * p.count, steps = divide_up(p.k, kDepth);
    if (threadIdx.x == 0) {
        ring.initialise(Tile::consumers);
        device::fence_mbarrier_init();
    }
    __syncthreads();

    if (group == 0) {
        device::setmaxnreg_decrease<Tile::loader_registers>();
        if (threadIdx.x != 0) return;
        for (int item = blockIdx.x, n = 0; item < items; item += gridDim.x) {
            const TilePlace place = tile_place(p, tiles, item);
            const bool work[2] = {has_work(p, place, 0), has_work(p, place, 1)};
            const int bytes = (1 + work[0] + work[1]) * Tile::block_bytes;
            for (int step = 0; step < steps; ++step, ++n) {
                const uint32_t stage = stages + ring.stage(n) * Tile::stage_bytes;
                ring.start(n, bytes);
#pragma unroll
                for (int c = 0; c < Tile::consumers; ++c) {
                    if (!work[c]) continue;
                    load_block<major_a>(stage + c * Tile::block_bytes, a_map, ring.full(n), place.row + c * kTile,
                                        step * kDepth, place.matrix);
                }
                load_block<major_b>(stage + Tile::consumers * Tile::block_bytes, b_map, ring.full(n), place.column,
                                    step * kDepth, place.matrix);
            }
        }
        return;
    }

    device::setmaxnreg_increase<Tile::registers>();
    const int consumer = group - 1, warp = threadIdx.x % kGroupThreads / 32;
    const uint32_t own_strip = stages + Tile::stages * Tile::stage_bytes + (consumer * 4 + warp) * kStripBytes;
    unsigned char* const strip = shared + (own_strip - start);
    for (int item = blockIdx.x, n = 0; item < items; item += gridDim.x) {
        const TilePlace place = tile_place(p, tiles, item);
        if (!has_work(p, place, consumer)) {
            for (int step = 0; step < steps; ++step, ++n) {
                ring.wait(n);
                ring.release(n);
            }
            continue;
        }
        float sums[2][kTile / 2] = {};
        device::pin_registers(sums[0]);
        device::pin_registers(sums[1]);
#pragma unroll 1
        for (int step = 0; step < steps; ++step, ++n) {
            const uint32_t stage = stages + ring.stage(n) * Tile::stage_bytes;
            const uint32_t a = stage + consumer * Tile::block_bytes, b = stage + Tile::consumers * Tile::block_bytes;
            ring.wait(n);
            device::wgmma_fence();
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    device::wgmma<kTile, T, major_a, major_b>(sums[half], descriptor<major_a>(a, half, k),
                                                              descriptor<major_b>(b, 0, k), true);
                }
            }
            device::wgmma_commit();
            device::wgmma_wait<1>();   // of the step before
            if (step > 0) ring.release(n - 1);
        }
        finish<0>(sums[0]);
        device::pin_registers(sums[1]);
        ring.release(n - 1);
        const int first_row = place.row + consumer * kTile;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int part = 0; part < kTile / kStripColumns; ++part) {
                auto& own = reinterpret_cast<float (&)[kStripColumns / 2]>(sums[half][part * kStripColumns / 2]);
                finish_strip<T>(p, destination, strip, own, place.matrix, first_row + 64 * half + 16 * warp,
                                place.column + part * kStripColumns);
            }
        }
    }
#endif
}

TensorMap map_of(DType dtype, const Matrices& x, Major major, int count) {
    const int64_t row = 2 * int64_t{x.pitch};
    const int rows = major == Major::k ? kTile : kDepth;
    return make_tensor_map(dtype, x.data, {x.columns, x.rows, count}, {row, row * x.rows}, {64, rows, 1},
                           Swizzle::bytes128);
}

template <class T>
void launch(const Product& p, DType dtype, const Result* result, const Execution& execution) {
    const Tiles tiles = tiles_of(p);
    const int blocks = std::min(execution.device.multiprocessors, (tiles.whole + tiles.half) * p.count);
    choose_product(p, result, [&](auto major_a, auto major_b, const auto& destination) {
        using Destination = std::decay_t<decltype(destination)>;
        device::launch("newton_schulz",
                       product_hopper_kernel<T, decltype(major_a)::value, decltype(major_b)::value, Destination>,
                       dim3(static_cast<unsigned>(blocks)), dim3(Tile::threads), Tile::shared_bytes, execution.stream,
                       map_of(dtype, p.a, p.a_major, p.count), map_of(dtype, p.b, p.b_major, p.count), p, destination);
    });
}

}   // namespace

void multiply(const Product& p, DType dtype, const Result* result, const Execution& execution) {
    dtype == DType::float16 ? launch<float16>(p, dtype, result, execution)
                            : launch<bfloat16>(p, dtype, result, execution);
}

}   // namespace nanochat::cuda::newton_schulz_kernels::hopper
