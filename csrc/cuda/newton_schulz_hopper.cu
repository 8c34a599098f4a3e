// The products of Newton-Schulz on Hopper. One warpgroup loads by tensor copies; two multiply 128 x 128 each and share
// the columns. Blocks of threads are persistent, so that the loads of the next tile continue while one is written out.
#include "hopper.cuh"
#include "newton_schulz.cuh"
#include "tensor_map.h"

namespace nanochat::cuda::newton_schulz_kernels::hopper {
namespace {

using device::TensorMap;

// 256 x 128 reads 48 bytes from the L2 cache for 4,096 FLOP, a multiprocessor's work of one cycle; 128 x 128 would read
// 64.
struct Tile : WarpgroupConfig<2> {
    static constexpr int rows = kTile * consumers, stages = 4;
    static constexpr int block_bytes = tile_bytes<kDepth>(kTile);   // kTile x kDepth
    static constexpr int stage_bytes = (consumers + 1) * block_bytes, strips_bytes = 4 * consumers * kStripBytes;
    static constexpr int tiles_bytes = stages * stage_bytes + strips_bytes;
    static constexpr int shared_bytes = 1024 + tiles_bytes + ring_bytes(stages);
};

// Returns whether a consumer has work in a tile: its block exists, and is not the mirror image of another one.
NANOCHAT_DEVICE bool has_work(const Product& p, const TileCoord& coord, int consumer) {
    const int row = coord.row + consumer * kTile;
    return row < p.m && !(p.symmetric && row < coord.column);
}

// The numbers of tiles of one matrix in which both consumers have work, and in which one has.
struct Tiles {
    int whole, half;
};

NANOCHAT_ANYWHERE Tiles tiles_of(const Product& p) {
    const int rows = divide_up(p.m, kTile), columns = divide_up(p.n, kTile), pairs = rows / 2;
    if (p.symmetric) return {pairs * pairs, pairs + (rows % 2 ? columns : 0)};
    return {pairs * columns, rows % 2 ? columns : 0};
}

// The whole tiles of all matrices come first, so that the half ones balance the work at the end. Row i of a symmetric
// result has 2 i + 1 whole tiles and ends with a half one.
NANOCHAT_DEVICE TileCoord tile_coord(const Product& p, const Tiles& tiles, int item) {
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

// Loads a block of an operand: kTile rows or columns, and kDepth along K from k on.
template <Major major>
NANOCHAT_DEVICE void load_block(uint32_t block, const TensorMap& map, uint32_t barrier, int first, int k, int matrix) {
    if constexpr (major == Major::k) {
        device::tma_load(block, map, barrier, k, first, matrix);
    } else {
        using P = SmemLayout<kTile>;
#pragma unroll
        for (int panel = 0; panel < P::count; ++panel) {
            device::tma_load(block + panel * kDepth * P::width, map, barrier, first + panel * P::columns, k, matrix);
        }
    }
}

// A block as an operand: kTile rows of kDepth, or the reverse. Either way the last 64 rows or columns of the operand begin
// in the middle.
template <Major major>
using Block =
    std::conditional_t<major == Major::k, TileOperand<Major::k, kDepth, kTile>, TileOperand<Major::mn, kTile, kDepth>>;

template <class T, Major major_a, Major major_b, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, 1)
    product_hopper_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                          const __grid_constant__ Product p, const __grid_constant__ Epilogue epilogue) {
#ifdef NANOCHAT_HOPPER
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t start = device::shared_address(shared), stages = (start + 1023) & ~1023u;
    const Ring<Tile::stages> ring = {stages + Tile::tiles_bytes};
    const int group = warpgroup_index();
    const Tiles tiles = tiles_of(p);
    const int items = (tiles.whole + tiles.half) * p.count, steps = divide_up(p.k, kDepth);
    if (threadIdx.x == 0) {
        ring.initialise(Tile::consumers);
        device::fence_mbarrier_init();
    }
    __syncthreads();

    if (group == 0) {
        device::setmaxnreg_decrease<Tile::producer_registers>();
        if (threadIdx.x != 0) return;
        for (int item = blockIdx.x, n = 0; item < items; item += gridDim.x) {
            const TileCoord coord = tile_coord(p, tiles, item);
            const bool work[2] = {has_work(p, coord, 0), has_work(p, coord, 1)};
            const int bytes = (1 + work[0] + work[1]) * Tile::block_bytes;
            for (int step = 0; step < steps; ++step, ++n) {
                const uint32_t stage = stages + ring.stage(n) * Tile::stage_bytes;
                ring.producer_acquire(n, bytes);
#pragma unroll
                for (int c = 0; c < Tile::consumers; ++c) {
                    if (!work[c]) continue;
                    load_block<major_a>(stage + c * Tile::block_bytes, a_map, ring.full(n), coord.row + c * kTile,
                                        step * kDepth, coord.matrix);
                }
                load_block<major_b>(stage + Tile::consumers * Tile::block_bytes, b_map, ring.full(n), coord.column,
                                    step * kDepth, coord.matrix);
            }
        }
        return;
    }

    device::setmaxnreg_increase<Tile::registers>();
    const int consumer = group - 1, warp = warp_of_group();
    const uint32_t own_strip = stages + Tile::stages * Tile::stage_bytes + (consumer * 4 + warp) * kStripBytes;
    unsigned char* const strip = shared + (own_strip - start);
    for (int item = blockIdx.x, n = 0; item < items; item += gridDim.x) {
        const TileCoord coord = tile_coord(p, tiles, item);
        if (!has_work(p, coord, consumer)) {
            for (int step = 0; step < steps; ++step, ++n) {
                ring.consumer_wait(n);
                ring.consumer_release(n);
            }
            continue;
        }
        float sums[2][kTile / 2] = {};
        device::pin_registers(sums[0]);
        device::pin_registers(sums[1]);
#pragma unroll 1
        for (int step = 0; step < steps; ++step, ++n) {
            const uint32_t stage = stages + ring.stage(n) * Tile::stage_bytes;
            const Block<major_a> a(stage + consumer * Tile::block_bytes);
            const Block<major_b> b(stage + Tile::consumers * Tile::block_bytes);
            ring.consumer_wait(n);
            device::wgmma_fence();
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    device::wgmma<kTile, T, major_a, major_b>(sums[half], a(k, half * Tile::block_bytes / 2), b(k),
                                                              true);
                }
            }
            device::wgmma_commit();
            device::wgmma_wait<1>();   // of the step before
            if (step > 0) ring.consumer_release(n - 1);
        }
        wait_for_products<0>(sums[0]);
        device::pin_registers(sums[1]);
        ring.consumer_release(n - 1);
        const int first_row = coord.row + consumer * kTile;
        constexpr int parts = kTile / kStripColumns;
        auto& own = reinterpret_cast<float (&)[2 * parts][kStripColumns / 2]>(sums);
        finish_strips<T>(p, epilogue, strip, own, [&](int i) {
            return TileCoord{coord.matrix, first_row + i / parts * 64 + 16 * warp,
                             coord.column + i % parts * kStripColumns};
        });
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
void launch(const Product& p, DType dtype, const OutputEpilogue* output, const Execution& execution) {
    const Tiles tiles = tiles_of(p);
    const int blocks = std::min(execution.device.multiprocessors, (tiles.whole + tiles.half) * p.count);
    choose_product(p, output, [&](auto major_a, auto major_b, const auto& epilogue) {
        using Epilogue = std::decay_t<decltype(epilogue)>;
        device::launch("newton_schulz",
                       product_hopper_kernel<T, decltype(major_a)::value, decltype(major_b)::value, Epilogue>,
                       dim3(static_cast<unsigned>(blocks)), dim3(Tile::threads), Tile::shared_bytes, execution.stream,
                       map_of(dtype, p.a, p.a_major, p.count), map_of(dtype, p.b, p.b_major, p.count), p, epilogue);
    });
}

}   // namespace

void multiply(const Product& p, DType dtype, const OutputEpilogue* output, const Execution& execution) {
    dtype == DType::float16 ? launch<float16>(p, dtype, output, execution)
                            : launch<bfloat16>(p, dtype, output, execution);
}

}   // namespace nanochat::cuda::newton_schulz_kernels::hopper
