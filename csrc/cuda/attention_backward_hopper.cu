// Attention backward on Hopper: one kernel of five products, with tensor copies and wgmma. A block owns a tile of keys and
// passes over the rows that see them. The transposed scores of a consumer are already in place as the operand A of dV and
// dK, whose sums stay in registers. For dQ both consumers share their dS through shared memory; each multiplies it by half
// of the columns of K.
//
// Each tile of keys adds its part of dQ to float32 sums in global memory, in ascending order of keys, so that the bits of
// dQ do not depend on time. A counter for each tile of rows says how many tiles of keys have added. Items of work are in
// ascending order of keys and are taken in that order, so that a block waits only for items that others have taken. All
// blocks pass over the rows from the last to the first: a tile of keys then begins with rows that the tile before it has
// just passed, also where a causal mask hides the first rows from it.
#include "attention_backward.cuh"
#include "attention_hopper.cuh"

namespace nanochat::cuda::attention::hopper {
namespace {

// p = 2^(p c - lse), with lse(i) the number of element i.
template <int count, class Number>
NANOCHAT_DEVICE void recompute_weights(float (&p)[count], float exponent_scale, const Number& lse) {
#pragma unroll
    for (int i = 0; i < count; ++i) p[i] = exp2_approx(fmaf(p[i], exponent_scale, -lse(i)));
}
template <int count, class Number>
NANOCHAT_DEVICE void differentiate(float (&ds)[count], const float (&p)[count], const Number& delta) {
#pragma unroll
    for (int i = 0; i < count; ++i) ds[i] = p[i] * (ds[i] - delta(i));
}

// Loads the numbers of a lane's columns of an accumulator, two of every 8.
template <int count>
NANOCHAT_DEVICE void load_column_numbers(float (&numbers)[count], uint32_t first) {
#pragma unroll
    for (int i = 0; i < count; i += 2) device::load_shared_pair(numbers[i], numbers[i + 1], first + 16 * i);
}

// Starts dq (rows, N) = ds^T k (keys, N). ds has 64 rows of keys, and k points to N columns of the tile of keys.
template <class T, class Tile>
NANOCHAT_DEVICE void start_dq(float (&dq)[Tile::D / 4], uint32_t ds, uint32_t k) {
    const TileOperand<Major::mn, Tile::rows, Tile::keys> left(ds);
    const TileOperand<Major::mn, Tile::D, Tile::keys> right(k);
    device::pin_registers(dq);
    device::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tile::keys / 16; ++step) {
        device::wgmma<Tile::D / 2, T, Major::mn, Major::mn>(dq, left(step), right(step), step > 0);
    }
    device::wgmma_commit();
}

// The buffer through which the consumers pass a tile's part of dQ to the thread that adds it. n counts the tiles.
struct Handover {
    uint32_t full, empty;   // barriers

    NANOCHAT_DEVICE void initialise(int consumers) const {
        device::mbarrier_init(full, 4 * consumers);   // one arrival per warp
        device::mbarrier_init(empty, 1);
    }
    NANOCHAT_DEVICE void wait_until_empty(int n) const { device::mbarrier_wait(empty, (n & 1) ^ 1); }
    NANOCHAT_DEVICE void wait_until_full(int n) const { device::mbarrier_wait(full, n & 1); }
};

// An item of work: a tile of keys, and the tiles of rows that see it. The last one of a block has tile -1.
struct Item {
    int tile, head_group, rows_begin, rows_end;
};

template <class Tile>
NANOCHAT_DEVICE Item item_of(const Backward& a, int number) {
    const TileCoord coord = a.scheduler.coord(number);
    const int first_key = coord.tile * Tile::keys;
    const Range queries = a.mask.visible_queries(first_key, min(first_key + Tile::keys, a.mask.Tk) - 1);
    return {coord.tile, coord.head_group, queries.begin / a.tile_queries, divide_up(queries.end, a.tile_queries)};
}

struct Maps {
    TensorMap q, k, v, dout, lses, deltas;
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_backward_hopper_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Backward a) {
#ifdef NANOCHAT_HOPPER
    constexpr int D = Tile::D, rows = Tile::rows, keys = Tile::keys, stages = Tile::stages;
    constexpr int kRowBytes = SmemLayout<D>::width;
    static_assert(Tile::item_bytes == 2 * sizeof(Item));
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t start = device::shared_address(shared), tile_k = (start + 1023) & ~1023u;
    const uint32_t tile_v = tile_k + Tile::k_bytes, tile_out = tile_v + Tile::k_bytes;
    const uint32_t tile_ds = tile_out + Tile::k_bytes, tile_dq = tile_ds + 2 * Tile::ds_bytes;
    const uint32_t tile_q = tile_dq + Tile::dq_bytes, tile_dout = tile_q + stages * Tile::q_bytes;
    const uint32_t lses = tile_dout + stages * Tile::q_bytes, deltas = lses + stages * Tile::number_bytes;
    const uint32_t slots = deltas + stages * Tile::number_bytes;
    const Ring<2> item_ring = {slots + Tile::item_bytes};
    const Ring<1> key_ring = {item_ring.barriers + ring_bytes(2)};
    const Ring<stages> q_ring = {key_ring.barriers + ring_bytes(1)}, dout_ring = {q_ring.barriers + ring_bytes(stages)};
    const uint32_t handover_barriers = dout_ring.barriers + ring_bytes(stages);
    const Handover handover = {handover_barriers, handover_barriers + 8};
    Item* const items = reinterpret_cast<Item*>(shared + (slots - start));
    const int group = warpgroup_index();
    if (threadIdx.x == 0) {
        item_ring.initialise(Tile::consumers, 1);
        key_ring.initialise(Tile::consumers);
        q_ring.initialise(Tile::consumers);
        dout_ring.initialise(Tile::consumers);
        handover.initialise(Tile::consumers);
        device::fence_mbarrier_init();
    }
    __syncthreads();

    if (group == 0) {
        device::setmaxnreg_decrease<Tile::producer_registers>();
        const int warp = warp_of_group();
        if (warp == 0 && device::elect_one()) {   // loads
            for (int turn = 0, n = 0;; ++turn) {
                const int number = static_cast<int>(atomicAdd(a.next_item, 1u));
                const Item item = number < a.item_count ? item_of<Tile>(a, number) : Item{-1, 0, 0, 0};
                item_ring.producer_wait(turn);
                items[turn % 2] = item;
                device::mbarrier_arrive(item_ring.full(turn));
                if (item.tile < 0) break;
                const int batch = item.head_group / a.Hkv, kv_head = item.head_group - batch * a.Hkv;
                key_ring.producer_acquire(turn, 2 * Tile::k_bytes);
                load_tile_panels<D, keys>(tile_k, maps.k, key_ring.full(turn), kv_head, item.tile * keys, batch);
                load_tile_panels<D, keys>(tile_v, maps.v, key_ring.full(turn), kv_head, item.tile * keys, batch);
                for (int sub = 0; sub < a.sharing; ++sub) {
                    const int head_group = item.head_group * a.sharing + sub,
                              head = (kv_head * a.sharing + sub) * a.heads_per_tile;
                    for (int tile = item.rows_end - 1; tile >= item.rows_begin; --tile, ++n) {
                        const int stage = Ring<stages>::stage(n), query = tile * a.tile_queries;
                        q_ring.producer_acquire(n, Tile::q_bytes + Tile::number_bytes);
                        load_tile_panels<D, rows>(tile_q + stage * Tile::q_bytes, maps.q, q_ring.full(n), head, query,
                                                  batch);
                        device::tma_load(lses + stage * Tile::number_bytes, maps.lses, q_ring.full(n), tile * rows,
                                         head_group);
                        dout_ring.producer_acquire(n, Tile::q_bytes + Tile::number_bytes);
                        load_tile_panels<D, rows>(tile_dout + stage * Tile::q_bytes, maps.dout, dout_ring.full(n), head,
                                                  query, batch);
                        device::tma_load(deltas + stage * Tile::number_bytes, maps.deltas, dout_ring.full(n),
                                         tile * rows, head_group);
                    }
                }
            }
        } else if (warp == 1 && device::elect_one()) {   // adds dQ
            for (int turn = 0, n = 0;; ++turn) {
                item_ring.consumer_wait(turn);
                const Item item = items[turn % 2];
                device::mbarrier_arrive(item_ring.empty(turn));
                if (item.tile < 0) break;
                for (int sub = 0; sub < a.sharing; ++sub) {
                    const int head_group = item.head_group * a.sharing + sub;
                    for (int tile = item.rows_end - 1; tile >= item.rows_begin; --tile, ++n) {
                        const int row_tile = head_group * (a.padded_rows / rows) + tile;
                        float* const sums = a.dq_sums + int64_t{row_tile} * (rows * D);
                        // Its first row sees the first of the keys that any of its rows sees.
                        const int earlier = item.tile - a.mask.visible_keys(tile * a.tile_queries).begin / keys;
                        handover.wait_until_full(n);
                        if (earlier == 0) {
                            device::bulk_store(sums, tile_dq, Tile::dq_bytes);
                        } else {
                            device::wait_for_count(a.dq_counts + row_tile, earlier);
                            device::fence_proxy_async_global();
                            device::bulk_reduce_add(sums, tile_dq, Tile::dq_bytes);
                        }
                        device::tma_commit();
                        device::tma_wait_read<0>();
                        device::mbarrier_arrive(handover.empty);
                        device::tma_wait<0>();
                        device::fence_proxy_async_global();
                        device::add_release(a.dq_counts + row_tile, 1);
                    }
                }
            }
        }
        return;
    }

    device::setmaxnreg_increase<Tile::registers>();
    const int consumer = group - 1, lane = threadIdx.x % 32, thread = threadIdx.x % kGroupThreads,
              warp_key = thread / 32 * 16;
    const uint32_t own_k = tile_k + consumer * kGroupRows * kRowBytes,
                   own_v = tile_v + consumer * kGroupRows * kRowBytes;
    const uint32_t half_k = tile_k + consumer * (D == 64 ? kRowBytes / 2 : D / 128 * keys * kRowBytes);
    const auto ds_rows = a_fragment_rows<rows, keys>(tile_ds, consumer * kGroupRows + warp_key, lane);
    unsigned char* const own_out = shared + (tile_out + consumer * Tile::group_bytes - start);
    auto* const own_dq = reinterpret_cast<uint4*>(shared + (tile_dq + consumer * (Tile::dq_bytes / 2) - start)) +
                         thread;
    for (int turn = 0, n = 0;; ++turn) {
        item_ring.consumer_wait(turn);
        const Item item = items[turn % 2];
        if (item.tile < 0) break;
        const int group_key = item.tile * keys + consumer * kGroupRows;   // may be beyond the last key
        // dQ sums over all keys of the tile: those that do not exist must be masked.
        const Range full = group_key + kGroupRows <= a.mask.Tk
                               ? a.mask.full_tiles(group_key, group_key + kGroupRows - 1, a.heads_per_tile, rows)
                               : Range{0, 0};

        float dk[D / 2], dv[D / 2];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;
        key_ring.consumer_wait(turn);
        if (item.rows_begin < item.rows_end) {
            float p[rows / 2], dq[D / 4];
            int tile = item.rows_end - 1;
            const auto q_of = [&](int number) { return tile_q + Ring<stages>::stage(number) * Tile::q_bytes; };
            // From complete scores p to the start of dQ.
            const auto start_turn = [&] {
                const int stage = Ring<stages>::stage(n);
                const uint32_t dout = tile_dout + stage * Tile::q_bytes;
                const uint32_t lane_numbers = stage * Tile::number_bytes + 8 * (lane % 4);
                float numbers[rows / 4], ds[rows / 2];
                uint32_t p_operand[rows / 16][4], ds_operand[rows / 16][4];
                dout_ring.consumer_wait(n);
                start_scores<T, D, rows, keys>(ds, own_v, dout);
                load_column_numbers(numbers, lses + lane_numbers);
                recompute_weights(p, a.exponent_scale, [&](int i) { return numbers[i / 4 * 2 + i % 2]; });
                if (tile < full.begin || tile >= full.end) {
                    mask_scores_transposed(p, a.mask, tile * rows + 2 * (lane % 4), a.heads_per_tile,
                                           device::opaque(group_key) + warp_key + lane / 4);
                }
                as_a_operands<T, rows>(p_operand, p);
                start_sums<T, D, rows>(dv, p_operand, dout);
                wait_for_products<1>(ds);
                load_column_numbers(numbers, deltas + lane_numbers);   // earlier, there are no registers for them
                differentiate(ds, p, [&](int i) { return numbers[i / 4 * 2 + i % 2]; });
                as_a_operands<T, rows>(ds_operand, ds);
                // Two buffers: at the barrier, no consumer reads the one of the turn before any more.
                const int buffer = n % 2 * Tile::ds_bytes;
#pragma unroll
                for (int step = 0; step < rows / 16; ++step) {
                    device::stmatrix_x4(ds_rows(2 * step) + buffer, ds_operand[step]);
                }
                device::fence_proxy_async();
                start_sums<T, D, rows>(dk, ds_operand, q_of(n));
                device::bar_sync(1, Tile::consumers * kGroupThreads);
                start_dq<T, Tile>(dq, tile_ds + buffer, half_k);
                wait_for_products<1>(dk);
                device::pin_registers(dv);
                dout_ring.consumer_release(n);
                q_ring.consumer_release(n);
            };
            const auto hand_over = [&] {
                handover.wait_until_empty(n);
#pragma unroll
                for (int i = 0; i < D / 16; ++i) {
                    own_dq[i * kGroupThreads] = {__float_as_uint(dq[4 * i]), __float_as_uint(dq[4 * i + 1]),
                                                 __float_as_uint(dq[4 * i + 2]), __float_as_uint(dq[4 * i + 3])};
                }
                device::fence_proxy_async();
                __syncwarp();
                if (lane == 0) device::mbarrier_arrive(handover.full);
            };
            q_ring.consumer_wait(n);
            start_scores<T, D, rows, keys>(p, own_k, q_of(n));
            wait_for_products<0>(p);
            const int last = n + (item.rows_end - item.rows_begin) * a.sharing - 1;
#pragma unroll 1
            for (; n < last; ++n) {
                start_turn();
                q_ring.consumer_wait(n + 1);
                start_scores<T, D, rows, keys>(p, own_k, q_of(n + 1));
                wait_for_products<1>(dq);
                hand_over();
                wait_for_products<0>(p);
                if (--tile < item.rows_begin) tile = item.rows_end - 1;
            }
            start_turn();
            wait_for_products<0>(dq);
            hand_over();
            ++n;
        }
        key_ring.consumer_release(turn);

        const Item again = items[turn % 2];   // not kept in registers
        const int batch = again.head_group / a.Hkv, kv_head = again.head_group - batch * a.Hkv;
        const int first_key = again.tile * keys + consumer * kGroupRows;
        item_ring.consumer_release(turn);
        const auto store = [&](const float (&sums)[D / 2], void* tensor, const Strides& strides) {
            T* first = static_cast<T*>(tensor) + batch * strides.b + kv_head * strides.h + first_key * strides.t;
            store_rows<T, D, kGroupRows>(own_out, sums, warp_key, a.D, [&](int r) {
                return first_key + r < a.mask.Tk ? first + r * strides.t : nullptr;
            });
        };
        const float scale[2] = {a.scale, a.scale};
        scale_rows(dk, scale);
        store(dk, a.dk, a.dk_strides);
        store(dv, a.dv, a.dv_strides);
    }
#endif
}

// --- choice and launch ---

template <class T, class Tile>
void launch(const AttentionBackward& f, Backward a) {
    using P = SmemLayout<Tile::D>;
    const AttentionShape& s = f.shape;
    const Device& device = f.execution.device;
    const auto map = [&](const void* tensor, int64_t positions, int64_t heads, const Strides& strides, int box_heads,
                         int box_positions) {
        return map_of(f.dtype, tensor, s.B, positions, heads, s.D, strides, P::columns, box_heads, box_positions,
                      P::swizzle);
    };
    const auto q_map = [&](const void* tensor, const Strides& strides) {
        return map(tensor, s.Tq, s.H, strides, a.heads_per_tile, Tile::rows / a.heads_per_tile);
    };
    const auto number_map = [&](const float* numbers) {
        return make_tensor_map(DType::float32, numbers, {a.padded_rows, a.head_groups}, {4 * int64_t{a.padded_rows}},
                               {Tile::rows, 1}, Swizzle::none);
    };
    a.scheduler = make_scheduler(divide_up(a.mask.Tk, Tile::keys), static_cast<int>(s.B * s.Hkv), a.kv_bytes, false);
    a.item_count = a.scheduler.items();
    const Maps maps = {
        .q = q_map(a.q, a.q_strides),
        .k = map(a.k, s.Tk, s.Hkv, a.k_strides, 1, Tile::keys),
        .v = map(a.v, s.Tk, s.Hkv, a.v_strides, 1, Tile::keys),
        .dout = q_map(a.dout, a.dout_strides),
        .lses = number_map(a.lses),
        .deltas = number_map(a.deltas),
    };
    device::launch("attention_backward", attention_backward_hopper_kernel<T, Tile>,
                   dim3(static_cast<unsigned>(persistent_blocks(device, a.scheduler))), dim3(Tile::threads),
                   Tile::shared_bytes, f.execution.stream, maps, a);
}

template <class T>
void launch(const AttentionBackward& f, const Backward& a) {
    choose_backward(a.D, [&](auto tile) { launch<T, decltype(tile)>(f, a); });
}

}   // namespace

void backward(const AttentionBackward& f, const Backward& a) {
    f.dtype == DType::float16 ? launch<float16>(f, a) : launch<bfloat16>(f, a);
}

}   // namespace nanochat::cuda::attention::hopper
