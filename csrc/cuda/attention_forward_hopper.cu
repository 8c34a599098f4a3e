// Attention forward on Hopper: tensor copies, wgmma, and the schedule of FlashAttention-3, arXiv:2407.08608. A consumer
// starts the scores of the next keys before it multiplies the values of the current ones, and computes the softmax while
// both products run. It starts the first scores of the next tile before it writes out the current one.
#include "attention_hopper.cuh"

namespace nanochat::cuda::attention::hopper {
namespace {

struct Arguments {
    float* lse;
    AttentionMask mask;
    Scale scale;
    int H, Hkv;
    PowerOfTwo heads_per_tile;
    TileScheduler scheduler;
};

// What a consumer has of an item: its rows, the blocks of keys that the tile passes over, and those of them of which one
// of the rows sees a key.
struct Part {
    RowTile rows;
    Range blocks, seen;
};

template <class Tile>
NANOCHAT_DEVICE Part part_of(const Arguments& a, int item, int consumer) {
    const RowTile tile = row_tile(a, a.scheduler, Tile::rows, item);
    const RowTile rows = tile.part(consumer * kGroupRows, kGroupRows);
    const Range blocks = visible_key_blocks(tile, a.mask, a.heads_per_tile, Tile::keys);
    if (rows.count <= 0) return {rows, blocks, {blocks.begin, blocks.begin}};
    return {rows, blocks, visible_key_blocks(rows, a.mask, a.heads_per_tile, Tile::keys)};
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_forward_hopper_kernel(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                                    const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap out_map,
                                    const __grid_constant__ Arguments a) {
#ifdef NANOCHAT_HOPPER
    constexpr int D = Tile::D, keys = Tile::keys, consumers = Tile::consumers, stages = Tile::stages;
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t tile_q = (device::shared_address(shared) + 1023) & ~1023u;
    const uint32_t tile_out = tile_q + Tile::q_stages * consumers * Tile::group_bytes;
    const uint32_t tile_k = tile_out + consumers * Tile::group_bytes, tile_v = tile_k + stages * Tile::k_bytes;
    const Ring<Tile::q_stages> q_ring = {tile_q + Tile::tiles_bytes};
    const Ring<stages> k_ring = {q_ring.barriers + ring_bytes(Tile::q_stages)},
                       v_ring = {k_ring.barriers + ring_bytes(stages)};
    const auto q_tile = [&](int turn, int consumer) {
        return tile_q + (Ring<Tile::q_stages>::stage(turn) * consumers + consumer) * Tile::group_bytes;
    };
    const int group = warpgroup_index();
    if (threadIdx.x == 0) {
        q_ring.initialise(consumers);
        k_ring.initialise(consumers);
        v_ring.initialise(consumers);
        device::fence_mbarrier_init();
    }
    __syncthreads();

    if (group == 0) {
        device::setmaxnreg_decrease<Tile::producer_registers>();
        if (threadIdx.x != 0) return;
        for (int item = blockIdx.x, turn = 0, n = 0; item < a.scheduler.items(); item += gridDim.x) {
            const RowTile tile = row_tile(a, a.scheduler, Tile::rows, item);
            const Range blocks = visible_key_blocks(tile, a.mask, a.heads_per_tile, keys);
            if (blocks.begin >= blocks.end) continue;
            q_ring.producer_acquire(turn, consumers * Tile::group_bytes);
            for (int c = 0; c < consumers; ++c) {
                load_tile_panels<D, kGroupRows>(q_tile(turn, c), q_map, q_ring.full(turn), tile.head_group.head,
                                                tile.query(c * kGroupRows, a.heads_per_tile), tile.head_group.batch);
            }
            ++turn;
            for (int block = blocks.end - 1; block >= blocks.begin; --block, ++n) {
                const int place = Ring<stages>::stage(n) * Tile::k_bytes;
                k_ring.producer_acquire(n, Tile::k_bytes);
                load_tile_panels<D, keys>(tile_k + place, k_map, k_ring.full(n), tile.head_group.kv_head, block * keys,
                                          tile.head_group.batch);
                v_ring.producer_acquire(n, Tile::k_bytes);
                load_tile_panels<D, keys>(tile_v + place, v_map, v_ring.full(n), tile.head_group.kv_head, block * keys,
                                          tile.head_group.batch);
            }
        }
        return;
    }

    device::setmaxnreg_increase<Tile::registers>();
    const int consumer = group - 1, lane = threadIdx.x % 32, warp_row = warp_of_group() * kRowsPerWarp;
    const uint32_t own_out = tile_out + consumer * Tile::group_bytes;
    const PingPongBarrier<consumers> ping_pong(consumer);
    int turn = 0, n = 0;
    float sums[D / 2] = {};   // ptxas of CUDA 12.8 serialises all products where they begin undefined
    float scores[keys / 2];
    const auto place = [&](int number) { return Ring<stages>::stage(number) * Tile::k_bytes; };
    // Takes no part in blocks that the other consumers see, but keeps the order of turns and stages.
    const auto skip_blocks = [&](int count) {
#pragma unroll 1
        for (; count > 0; --count, ++n) {
            ping_pong.wait();
            ping_pong.arrive_next();
            k_ring.consumer_wait(n);
            k_ring.consumer_release(n);
            v_ring.consumer_wait(n);
            v_ring.consumer_release(n);
        }
    };
    RowTile own = {};
    Softmax softmax;
    const auto write_out = [&] {
        float inverse[2], lse[2];
        softmax.finish(a.scale.magnitude, inverse, lse);
        scale_rows(sums, inverse);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = warp_row + lane / 4 + 8 * h;
            if (row >= own.count || lane % 4 != 0) continue;
            a.lse[row_index(a, own.head_group, own.first + row)] = lse[h] * kLn2;
        }
        const int query = own.query(warp_row, a.heads_per_tile), head = own.first + warp_row - query * a.heads_per_tile;
        start_store<T, D>(own_out, sums, warp_row, out_map, own.head_group.head + head, query, own.head_group.batch);
    };
    for (int item = blockIdx.x; true; item += gridDim.x) {
        const bool more = item < a.scheduler.items();
        const Part part = more ? part_of<Tile>(a, item, consumer) : Part{};
        const Range blocks = part.blocks, seen = part.seen;
        const uint32_t own_q = q_tile(turn, consumer);
        const bool first = item == static_cast<int>(blockIdx.x);
        if (blocks.begin < blocks.end) q_ring.consumer_wait(turn);
        skip_blocks(blocks.end - seen.end);
        if (seen.begin < seen.end) {
            k_ring.consumer_wait(n);
            ping_pong.wait();
            start_scores<T, D, keys>(scores, own_q, tile_k + place(n));
            ping_pong.arrive_next();
            wait_for_products<1>(sums);   // ptxas does not know that they are complete
            if (!first) write_out();
            wait_for_products<0>(scores);
            k_ring.consumer_release(n);
        } else if (!first) {
            write_out();
        }
        if (!more) break;
        own = part.rows;
        softmax = {};
        const Range full =
            a.mask.full_blocks(own.query(0, a.heads_per_tile), own.query(own.count - 1, a.heads_per_tile), keys);
        uint32_t weights[keys / 16][4];
        const auto softmax_step = [&](int block, float (&rescale)[2]) {
            if (a.scale.negated) {
                const float minus[2] = {-1, -1};
                scale_rows(scores, minus);
            }
            if (block < full.begin || block >= full.end) {
                const int row = device::opaque(own.first) + warp_row + lane / 4;
                mask_scores(scores, a.mask, block * keys + 2 * (lane % 4), a.heads_per_tile, row, -INFINITY);
            }
            softmax.step(scores, a.scale.magnitude, rescale);
        };

#pragma unroll
        for (int i = 0; i < D / 2; ++i) sums[i] = 0;
        if (seen.begin < seen.end) {
            float rescale[2];
            softmax_step(seen.end - 1, rescale);
            as_a_operands<T, keys>(weights, scores);
            if (seen.end - 1 > seen.begin) k_ring.consumer_wait(n + 1);
#pragma unroll 1
            for (int block = seen.end - 2; block >= seen.begin; --block, ++n) {
                ping_pong.wait();
                start_scores<T, D, keys>(scores, own_q, tile_k + place(n + 1));
                v_ring.consumer_wait(n);
                start_sums<T, D, keys>(sums, weights, tile_v + place(n));
                ping_pong.arrive_next();
                wait_for_products<1>(scores);
                k_ring.consumer_release(n + 1);
                softmax_step(block, rescale);
                // This wait is here because its branch keeps ptxas from moving the wait for the sums above the softmax.
                if (block > seen.begin) k_ring.consumer_wait(n + 2);
                wait_for_products<0>(sums);
                v_ring.consumer_release(n);
                scale_rows(sums, rescale);
                as_a_operands<T, keys>(weights, scores);
            }
            v_ring.consumer_wait(n);
            start_sums<T, D, keys>(sums, weights, tile_v + place(n));
            wait_for_products<0>(sums);
            v_ring.consumer_release(n++);
        }
        if (blocks.begin < blocks.end) q_ring.consumer_release(turn++);
        skip_blocks(seen.begin - blocks.begin);
    }
    if (lane == 0) device::tma_wait_read<0>();   // until then the block needs its shared memory
#endif
}

template <class T, class Tile>
void launch(const AttentionForward& f, Arguments a) {
    using P = SmemLayout<Tile::D>;
    const AttentionShape& s = f.shape;
    const int heads = a.heads_per_tile, stored_heads = std::min(heads, kRowsPerWarp);
    const int head_groups = static_cast<int>(s.B * s.H / heads), rows = static_cast<int>(s.Tq) * heads;
    a.scheduler = make_scheduler(divide_up(rows, Tile::rows), head_groups, 4 * s.Tk * s.D, a.mask.causal);
    device::launch(
        "attention_forward", attention_forward_hopper_kernel<T, Tile>,
        dim3(static_cast<unsigned>(persistent_blocks(f.execution.device, a.scheduler))), dim3(Tile::threads),
        Tile::shared_bytes, f.execution.stream,
        map_of(f.dtype, f.q, s.B, s.Tq, s.H, s.D, f.q_strides, P::columns, heads, kGroupRows / heads, P::swizzle),
        map_of(f.dtype, f.k, s.B, s.Tk, s.Hkv, s.D, f.k_strides, P::columns, 1, Tile::keys, P::swizzle),
        map_of(f.dtype, f.v, s.B, s.Tk, s.Hkv, s.D, f.v_strides, P::columns, 1, Tile::keys, P::swizzle),
        map_of(f.dtype, f.out, s.B, s.Tq, s.H, s.D, f.out_strides, P::columns, stored_heads,
               kRowsPerWarp / stored_heads, P::swizzle),
        a);
}

template <class T>
void launch(const AttentionForward& f, const Arguments& a) {
    choose_forward(f.shape, f.execution.device, [&](auto tile) { launch<T, decltype(tile)>(f, a); });
}

}   // namespace

void forward(const AttentionForward& f) {
    const AttentionShape& s = f.shape;
    const Arguments arguments = {
        .lse = static_cast<float*>(f.lse),
        .mask = make_mask(s),
        .scale = make_scale(s.scale),
        .H = static_cast<int>(s.H),
        .Hkv = static_cast<int>(s.Hkv),
        .heads_per_tile = {__builtin_ctz(choose_heads_per_tile(s, true))},   // divides 64
        .scheduler = {},                                                     // depends on the tile
    };
    f.dtype == DType::float16 ? launch<float16>(f, arguments) : launch<bfloat16>(f, arguments);
}

}   // namespace nanochat::cuda::attention::hopper
