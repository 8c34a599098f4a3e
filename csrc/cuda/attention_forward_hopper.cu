// Attention forward on Hopper: tensor copies, wgmma, and the schedule of FlashAttention-3, arXiv:2407.08608. A consumer
// starts the scores of the next keys before it multiplies the values of the current ones, and computes the softmax while
// both products run.
#include "attention_hopper.cuh"

namespace nanochat::cuda::attention::hopper {
namespace {

struct Arguments {
    void* out;
    float* lse;
    Strides out_strides;
    AttentionMask mask;
    Scale scale;
    int H, Hkv, D, heads_per_tile;
    TileScheduler scheduler;
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_forward_hopper_kernel(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                                    const __grid_constant__ TensorMap v_map, const __grid_constant__ Arguments a) {
#ifdef NANOCHAT_HOPPER
    constexpr int D = Tile::D, keys = Tile::keys, consumers = Tile::consumers, stages = Tile::stages;
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t start = device::shared_address(shared), tile_q = (start + 1023) & ~1023u;
    const uint32_t tile_out = tile_q + consumers * Tile::group_bytes;
    const uint32_t tile_k = tile_out + consumers * Tile::group_bytes, tile_v = tile_k + stages * Tile::k_bytes;
    const Ring<1> q_ring = {tile_q + Tile::tiles_bytes};
    const Ring<stages> k_ring = {q_ring.barriers + ring_bytes(1)}, v_ring = {k_ring.barriers + ring_bytes(stages)};
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
                load_tile_panels<D, kGroupRows>(tile_q + c * Tile::group_bytes, q_map, q_ring.full(turn),
                                                tile.head_group.head, tile.query(c * kGroupRows, a.heads_per_tile),
                                                tile.head_group.batch);
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
    const int consumer = group - 1, lane = threadIdx.x % 32, warp_row = threadIdx.x % kGroupThreads / 32 * 16;
    const uint32_t own_q = tile_q + consumer * Tile::group_bytes;
    unsigned char* const own_out = shared + (tile_out + consumer * Tile::group_bytes - start);
    const PingPongBarrier<consumers> ping_pong(consumer);
    for (int item = blockIdx.x, turn = 0, n = 0; item < a.scheduler.items(); item += gridDim.x) {
        const RowTile tile = row_tile(a, a.scheduler, Tile::rows, item);
        const Range blocks = visible_key_blocks(tile, a.mask, a.heads_per_tile, keys);
        // A consumer may have no rows: last_row is then below first_row.
        const int first_row = consumer * kGroupRows, last_row = min(first_row + kGroupRows, tile.count) - 1;
        const Range full =
            a.mask.full_blocks(tile.query(first_row, a.heads_per_tile), tile.query(last_row, a.heads_per_tile), keys);

        float sums[D / 2], scores[keys / 2];
        uint32_t weights[keys / 16][4];
        Softmax softmax;
#pragma unroll
        for (int i = 0; i < D / 2; ++i) sums[i] = 0;
        const auto softmax_step = [&](int block, float (&rescale)[2]) {
            if (a.scale.negated) {
                const float minus[2] = {-1, -1};
                scale_rows(scores, minus);
            }
            if (block < full.begin || block >= full.end) {
                const int row = tile.first + device::opaque(first_row) + warp_row + lane / 4;
                mask_scores(scores, a.mask, block * keys + 2 * (lane % 4), a.heads_per_tile, row, -INFINITY);
            }
            softmax.step(scores, a.scale.magnitude, rescale);
        };
        const auto place = [&](int number) { return Ring<stages>::stage(number) * Tile::k_bytes; };

        if (blocks.begin < blocks.end) {
            float rescale[2];
            q_ring.consumer_wait(turn);
            k_ring.consumer_wait(n);
            ping_pong.wait();
            start_scores<T, D, keys>(scores, own_q, tile_k + place(n));
            ping_pong.arrive_next();
            wait_for_products<0>(scores);
            k_ring.consumer_release(n);
            softmax_step(blocks.end - 1, rescale);
            as_a_operands<T, keys>(weights, scores);
            if (blocks.end - 1 > blocks.begin) k_ring.consumer_wait(n + 1);
#pragma unroll 1
            for (int block = blocks.end - 2; block >= blocks.begin; --block, ++n) {
                ping_pong.wait();
                start_scores<T, D, keys>(scores, own_q, tile_k + place(n + 1));
                v_ring.consumer_wait(n);
                start_sums<T, D, keys>(sums, weights, tile_v + place(n));
                ping_pong.arrive_next();
                wait_for_products<1>(scores);
                k_ring.consumer_release(n + 1);
                softmax_step(block, rescale);
                // This wait is here because its branch keeps ptxas from moving the wait for the sums above the softmax.
                if (block > blocks.begin) k_ring.consumer_wait(n + 2);
                wait_for_products<0>(sums);
                v_ring.consumer_release(n);
                scale_rows(sums, rescale);
                as_a_operands<T, keys>(weights, scores);
            }
            q_ring.consumer_release(turn++);
            v_ring.consumer_wait(n);
            start_sums<T, D, keys>(sums, weights, tile_v + place(n));
            wait_for_products<0>(sums);
            v_ring.consumer_release(n++);
        }

        float inverse[2], lse[2];
        softmax.finish(a.scale.magnitude, inverse, lse);
        scale_rows(sums, inverse);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first_row + warp_row + lane / 4 + 8 * h;
            if (row >= tile.count || lane % 4 != 0) continue;
            a.lse[row_index(a, tile.head_group, tile.first + row)] = lse[h] * kLn2;
        }
        const auto out_rows = packed_rows(static_cast<T*>(a.out), a.out_strides, tile.head_group, a.heads_per_tile);
        store_rows<T, D, kGroupRows>(own_out, sums, warp_row, a.D, [&](int r) {
            return first_row + r < tile.count ? out_rows(tile.first + first_row + r) : nullptr;
        });
    }
#endif
}

template <class T, class Tile>
void launch(const AttentionForward& f, Arguments a) {
    using P = SmemLayout<Tile::D>;
    const AttentionShape& s = f.shape;
    const int head_groups = static_cast<int>(s.B * s.H / a.heads_per_tile),
              rows = static_cast<int>(s.Tq) * a.heads_per_tile;
    a.scheduler = make_scheduler(divide_up(rows, Tile::rows), head_groups, 4 * s.Tk * s.D, a.mask.causal);
    device::launch("attention_forward", attention_forward_hopper_kernel<T, Tile>,
                   dim3(static_cast<unsigned>(persistent_blocks(f.execution.device, a.scheduler))), dim3(Tile::threads),
                   Tile::shared_bytes, f.execution.stream,
                   map_of(f.dtype, f.q, s.B, s.Tq, s.H, s.D, f.q_strides, P::columns, a.heads_per_tile,
                          kGroupRows / a.heads_per_tile, P::swizzle),
                   map_of(f.dtype, f.k, s.B, s.Tk, s.Hkv, s.D, f.k_strides, P::columns, 1, Tile::keys, P::swizzle),
                   map_of(f.dtype, f.v, s.B, s.Tk, s.Hkv, s.D, f.v_strides, P::columns, 1, Tile::keys, P::swizzle), a);
}

template <class T>
void launch(const AttentionForward& f, const Arguments& a) {
    choose_forward(tile_columns(a.D), [&](auto tile) { launch<T, decltype(tile)>(f, a); });
}

}   // namespace

void forward(const AttentionForward& f) {
    const AttentionShape& s = f.shape;
    const Arguments arguments = {
        .out = f.out,
        .lse = static_cast<float*>(f.lse),
        .out_strides = f.out_strides,
        .mask = make_mask(s),
        .scale = make_scale(s.scale),
        .H = static_cast<int>(s.H),
        .Hkv = static_cast<int>(s.Hkv),
        .D = static_cast<int>(s.D),
        .heads_per_tile = choose_heads_per_tile(s, true),
        .scheduler = {},   // depends on the tile
    };
    f.dtype == DType::float16 ? launch<float16>(f, arguments) : launch<bfloat16>(f, arguments);
}

}   // namespace nanochat::cuda::attention::hopper
