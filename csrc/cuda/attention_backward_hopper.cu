// Attention backward on Hopper: the two kernels of attention_backward.cu with tensor copies and wgmma. The transposed
// scores of a warpgroup are already in place as the operand A of the next product, so that only loaded tiles pass
// through shared memory.
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

// --- dK, dV ---

// Loads the numbers of a lane's columns of an accumulator, two of every 8.
template <int count>
NANOCHAT_DEVICE void load_column_numbers(float (&numbers)[count], uint32_t first) {
#pragma unroll
    for (int i = 0; i < count; i += 2) device::load_shared_pair(numbers[i], numbers[i + 1], first + 16 * i);
}

struct Maps {
    TensorMap q, k, v, dout, lses, deltas;
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_backward_keys_hopper_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Backward a) {
#ifdef NANOCHAT_HOPPER
    constexpr int D = Tile::D, rows = Tile::rows, stages = Tile::stages;
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t start = device::shared_address(shared), tile_k = (start + 1023) & ~1023u;
    const uint32_t tile_v = tile_k + Tile::consumers * Tile::group_bytes,
                   tile_out = tile_v + Tile::consumers * Tile::group_bytes;
    const uint32_t tile_q = tile_out + Tile::consumers * Tile::group_bytes, tile_dout = tile_q + stages * Tile::q_bytes;
    const uint32_t lses = tile_dout + stages * Tile::q_bytes, deltas = lses + stages * Tile::number_bytes;
    const Ring<1> key_ring = {tile_k + Tile::tiles_bytes};
    const Ring<stages> q_ring = {key_ring.barriers + ring_bytes(1)}, dout_ring = {q_ring.barriers + ring_bytes(stages)};
    const int group = warpgroup_index();
    if (threadIdx.x == 0) {
        key_ring.initialise(Tile::consumers);
        q_ring.initialise(Tile::consumers);
        dout_ring.initialise(Tile::consumers);
        device::fence_mbarrier_init();
    }
    __syncthreads();

    // A tile of keys passes over the rows of all head groups that share its key/value head, `subgroups` of them, in turn.
    const int subgroups = a.H / a.Hkv / a.heads_per_tile;
    const auto tiles_of = [&](int first_key) {
        const Range queries = a.mask.visible_queries(first_key, min(first_key + Tile::keys, a.mask.Tk) - 1);
        return Range{queries.begin * a.heads_per_tile / rows, divide_up(queries.end * a.heads_per_tile, rows)};
    };

    if (group == 0) {
        device::setmaxnreg_decrease<Tile::producer_registers>();
        if (threadIdx.x != 0) return;
        for (int item = blockIdx.x, turn = 0, n = 0; item < a.scheduler.items(); item += gridDim.x) {
            const TileCoord place = a.scheduler.coord(item);
            const int batch = place.head_group / a.Hkv, kv_head = place.head_group - batch * a.Hkv;
            const int first_key = place.tile * Tile::keys;
            const Range tiles = tiles_of(first_key);
            if (tiles.begin >= tiles.end) continue;
            key_ring.producer_acquire(turn, 2 * Tile::consumers * Tile::group_bytes);
            for (int c = 0; c < Tile::consumers; ++c) {
                const int key = first_key + c * kGroupRows;
                load_tile_panels<D, kGroupRows>(tile_k + c * Tile::group_bytes, maps.k, key_ring.full(turn), kv_head,
                                                key, batch);
                load_tile_panels<D, kGroupRows>(tile_v + c * Tile::group_bytes, maps.v, key_ring.full(turn), kv_head,
                                                key, batch);
            }
            ++turn;
            for (int sub = 0; sub < subgroups; ++sub) {
                const int head_group = place.head_group * subgroups + sub,
                          head = (kv_head * subgroups + sub) * a.heads_per_tile;
                for (int tile = tiles.begin; tile < tiles.end; ++tile, ++n) {
                    const int stage = Ring<stages>::stage(n), query = tile * rows / a.heads_per_tile;
                    q_ring.producer_acquire(n, Tile::q_bytes + Tile::number_bytes);
                    load_tile_panels<D, rows>(tile_q + stage * Tile::q_bytes, maps.q, q_ring.full(n), head, query,
                                              batch);
                    device::tma_load(lses + stage * Tile::number_bytes, maps.lses, q_ring.full(n), tile * rows,
                                     head_group);
                    dout_ring.producer_acquire(n, Tile::q_bytes + Tile::number_bytes);
                    load_tile_panels<D, rows>(tile_dout + stage * Tile::q_bytes, maps.dout, dout_ring.full(n), head,
                                              query, batch);
                    device::tma_load(deltas + stage * Tile::number_bytes, maps.deltas, dout_ring.full(n), tile * rows,
                                     head_group);
                }
            }
        }
        return;
    }

    device::setmaxnreg_increase<Tile::registers>();
    const int consumer = group - 1, lane = threadIdx.x % 32, warp_key = threadIdx.x % kGroupThreads / 32 * 16;
    const uint32_t own_k = tile_k + consumer * Tile::group_bytes, own_v = tile_v + consumer * Tile::group_bytes;
    unsigned char* const own_out = shared + (tile_out + consumer * Tile::group_bytes - start);
    for (int item = blockIdx.x, turn = 0, n = 0; item < a.scheduler.items(); item += gridDim.x) {
        const TileCoord place = a.scheduler.coord(item);
        const int group_key = place.tile * Tile::keys + consumer * kGroupRows;   // may be beyond the last key
        const Range tiles = tiles_of(place.tile * Tile::keys);
        const Range full =
            a.mask.full_tiles(group_key, min(group_key + kGroupRows, a.mask.Tk) - 1, a.heads_per_tile, rows);

        float dk[D / 2], dv[D / 2];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;
        if (tiles.begin < tiles.end) {
            key_ring.consumer_wait(turn);
            const int end = n + (tiles.end - tiles.begin) * subgroups;
#pragma unroll 1
            for (int tile = tiles.begin; n < end; ++n) {
                const int stage = Ring<stages>::stage(n);
                const uint32_t q = tile_q + stage * Tile::q_bytes, dout = tile_dout + stage * Tile::q_bytes;
                const uint32_t lane_numbers = stage * Tile::number_bytes + 8 * (lane % 4);
                float numbers[rows / 4];
                float p[rows / 2], ds[rows / 2];
                uint32_t p_operand[rows / 16][4], ds_operand[rows / 16][4];
                q_ring.consumer_wait(n);
                start_scores<T, D, rows>(p, own_k, q);
                dout_ring.consumer_wait(n);
                start_scores<T, D, rows>(ds, own_v, dout);
                load_column_numbers(numbers, lses + lane_numbers);
                wait_for_products<1>(p);
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
                start_sums<T, D, rows>(dk, ds_operand, q);
                wait_for_products<1>(dv);
                dout_ring.consumer_release(n);
                wait_for_products<0>(dk);
                q_ring.consumer_release(n);
                if (++tile == tiles.end) tile = tiles.begin;
            }
            key_ring.consumer_release(turn++);
        }

        const int batch = place.head_group / a.Hkv, kv_head = place.head_group - batch * a.Hkv;
        const auto store = [&](const float (&sums)[D / 2], void* tensor, const Strides& strides) {
            T* first = static_cast<T*>(tensor) + batch * strides.b + kv_head * strides.h + group_key * strides.t;
            store_rows<T, D, kGroupRows>(own_out, sums, warp_key, a.D, [&](int r) {
                return group_key + r < a.mask.Tk ? first + r * strides.t : nullptr;
            });
        };
        const float scale[2] = {a.scale, a.scale};
        scale_rows(dk, scale);
        store(dk, a.dk, a.dk_strides);
        store(dv, a.dv, a.dv_strides);
    }
#endif
}

// --- dQ ---

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_backward_rows_hopper_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Backward a) {
#ifdef NANOCHAT_HOPPER
    constexpr int D = Tile::D, keys = Tile::keys, stages = Tile::stages;
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t start = device::shared_address(shared), tile_q = (start + 1023) & ~1023u;
    const uint32_t tile_dout = tile_q + Tile::consumers * Tile::group_bytes;
    const uint32_t tile_out = tile_dout + Tile::consumers * Tile::group_bytes;
    const uint32_t tile_k = tile_out + Tile::consumers * Tile::group_bytes, tile_v = tile_k + stages * Tile::k_bytes;
    const Ring<1> row_ring = {tile_q + Tile::tiles_bytes};
    const Ring<stages> k_ring = {row_ring.barriers + ring_bytes(1)}, v_ring = {k_ring.barriers + ring_bytes(stages)};
    const int group = warpgroup_index();
    if (threadIdx.x == 0) {
        row_ring.initialise(Tile::consumers);
        k_ring.initialise(Tile::consumers);
        v_ring.initialise(Tile::consumers);
        device::fence_mbarrier_init();
    }
    __syncthreads();

    if (group == 0) {
        device::setmaxnreg_decrease<Tile::producer_registers>();
        if (threadIdx.x != 0) return;
        for (int item = blockIdx.x, turn = 0, n = 0; item < a.row_scheduler.items(); item += gridDim.x) {
            const RowTile tile = row_tile(a, a.row_scheduler, Tile::rows, item);
            const Range blocks = visible_key_blocks(tile, a.mask, a.heads_per_tile, keys);
            if (blocks.begin >= blocks.end) continue;
            row_ring.producer_acquire(turn, 2 * Tile::consumers * Tile::group_bytes);
            for (int c = 0; c < Tile::consumers; ++c) {
                const int query = tile.query(c * kGroupRows, a.heads_per_tile);
                load_tile_panels<D, kGroupRows>(tile_q + c * Tile::group_bytes, maps.q, row_ring.full(turn),
                                                tile.head_group.head, query, tile.head_group.batch);
                load_tile_panels<D, kGroupRows>(tile_dout + c * Tile::group_bytes, maps.dout, row_ring.full(turn),
                                                tile.head_group.head, query, tile.head_group.batch);
            }
            ++turn;
            for (int block = blocks.begin; block < blocks.end; ++block, ++n) {
                const int place = Ring<stages>::stage(n) * Tile::k_bytes;
                k_ring.producer_acquire(n, Tile::k_bytes);
                load_tile_panels<D, keys>(tile_k + place, maps.k, k_ring.full(n), tile.head_group.kv_head, block * keys,
                                          tile.head_group.batch);
                v_ring.producer_acquire(n, Tile::k_bytes);
                load_tile_panels<D, keys>(tile_v + place, maps.v, v_ring.full(n), tile.head_group.kv_head, block * keys,
                                          tile.head_group.batch);
            }
        }
        return;
    }

    device::setmaxnreg_increase<Tile::registers>();
    const int consumer = group - 1, lane = threadIdx.x % 32, warp_row = threadIdx.x % kGroupThreads / 32 * 16;
    const uint32_t own_q = tile_q + consumer * Tile::group_bytes, own_dout = tile_dout + consumer * Tile::group_bytes;
    unsigned char* const own_out = shared + (tile_out + consumer * Tile::group_bytes - start);
    for (int item = blockIdx.x, turn = 0, n = 0; item < a.row_scheduler.items(); item += gridDim.x) {
        const RowTile tile = row_tile(a, a.row_scheduler, Tile::rows, item);
        const Range blocks = visible_key_blocks(tile, a.mask, a.heads_per_tile, keys);
        // A consumer may have no rows: last_row is then below first_row.
        const int first_row = consumer * kGroupRows, last_row = min(first_row + kGroupRows, tile.count) - 1;
        const Range full =
            a.mask.full_blocks(tile.query(first_row, a.heads_per_tile), tile.query(last_row, a.heads_per_tile), keys);

        float dq[D / 2], lse[2], delta[2];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dq[i] = 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t row = tile.head_group_index * int64_t{a.padded_rows} + tile.first + first_row + warp_row +
                                lane / 4 + 8 * h;
            lse[h] = a.lses[row];
            delta[h] = a.deltas[row];
        }
        if (blocks.begin < blocks.end) {
            row_ring.consumer_wait(turn);
#pragma unroll 1
            for (int block = blocks.begin; block < blocks.end; ++block, ++n) {
                const int place = Ring<stages>::stage(n) * Tile::k_bytes;
                float p[keys / 2], ds[keys / 2];
                uint32_t left[keys / 16][4];
                k_ring.consumer_wait(n);
                start_scores<T, D, keys>(p, own_q, tile_k + place);
                v_ring.consumer_wait(n);
                start_scores<T, D, keys>(ds, own_dout, tile_v + place);
                wait_for_products<1>(p);
                recompute_weights(p, a.exponent_scale, [&](int i) { return lse[i / 2 % 2]; });
                if (block < full.begin || block >= full.end) {
                    const int row = tile.first + device::opaque(first_row) + warp_row + lane / 4;
                    mask_scores(p, a.mask, block * keys + 2 * (lane % 4), a.heads_per_tile, row, 0);
                }
                wait_for_products<0>(ds);
                v_ring.consumer_release(n);
                differentiate(ds, p, [&](int i) { return delta[i / 2 % 2]; });
                as_a_operands<T, keys>(left, ds);
                start_sums<T, D, keys>(dq, left, tile_k + place);
                wait_for_products<0>(dq);
                k_ring.consumer_release(n);
            }
            row_ring.consumer_release(turn++);
        }
        const float scale[2] = {a.scale, a.scale};
        scale_rows(dq, scale);
        const auto dq_rows = packed_rows(static_cast<T*>(a.dq), a.dq_strides, tile.head_group, a.heads_per_tile);
        store_rows<T, D, kGroupRows>(own_out, dq, warp_row, a.D, [&](int r) {
            return first_row + r < tile.count ? dq_rows(tile.first + first_row + r) : nullptr;
        });
    }
#endif
}

// --- choice and launch ---

template <class T, class Keys, class Rows>
void launch(const AttentionBackward& f, Backward a) {
    static_assert(kRowPadding % Keys::rows == 0 && kRowPadding % Rows::rows == 0);
    using P = SmemLayout<Keys::D>;
    const AttentionShape& s = f.shape;
    const Device& device = f.execution.device;
    void* const stream = f.execution.stream;
    const auto map = [&](const void* tensor, int64_t positions, int64_t heads, const Strides& strides, int box_heads,
                         int box_positions) {
        return map_of(f.dtype, tensor, s.B, positions, heads, s.D, strides, P::columns, box_heads, box_positions,
                      P::swizzle);
    };
    const auto q_map = [&](const void* tensor, const Strides& strides, int rows) {
        return map(tensor, s.Tq, s.H, strides, a.heads_per_tile, rows / a.heads_per_tile);
    };
    const auto k_map = [&](const void* tensor, const Strides& strides, int keys) {
        return map(tensor, s.Tk, s.Hkv, strides, 1, keys);
    };
    const auto number_map = [&](const float* numbers) {
        return make_tensor_map(DType::float32, numbers, {a.padded_rows, a.head_groups}, {4 * int64_t{a.padded_rows}},
                               {Keys::rows, 1}, Swizzle::none);
    };
    a.scheduler = make_scheduler(divide_up(a.mask.Tk, Keys::keys), static_cast<int>(s.B * s.Hkv), a.kv_bytes, false);
    a.row_scheduler =
        make_scheduler(divide_up(a.mask.Tq * a.heads_per_tile, Rows::rows), a.head_groups, a.kv_bytes, a.mask.causal);
    const Maps for_keys = {
        .q = q_map(a.q, a.q_strides, Keys::rows),
        .k = k_map(a.k, a.k_strides, kGroupRows),
        .v = k_map(a.v, a.v_strides, kGroupRows),
        .dout = q_map(a.dout, a.dout_strides, Keys::rows),
        .lses = number_map(a.lses),
        .deltas = number_map(a.deltas),
    };
    const Maps for_rows = {
        .q = q_map(a.q, a.q_strides, kGroupRows),
        .k = k_map(a.k, a.k_strides, Rows::keys),
        .v = k_map(a.v, a.v_strides, Rows::keys),
        .dout = q_map(a.dout, a.dout_strides, kGroupRows),
        .lses = {},   // dQ's kernel reads both without a map
        .deltas = {},
    };
    device::launch("attention_backward", attention_backward_keys_hopper_kernel<T, Keys>,
                   dim3(static_cast<unsigned>(persistent_blocks(device, a.scheduler))), dim3(Keys::threads),
                   Keys::shared_bytes, stream, for_keys, a);
    device::launch("attention_backward", attention_backward_rows_hopper_kernel<T, Rows>,
                   dim3(static_cast<unsigned>(persistent_blocks(device, a.row_scheduler))), dim3(Rows::threads),
                   Rows::shared_bytes, stream, for_rows, a);
}

template <class T>
void launch(const AttentionBackward& f, const Backward& a) {
    choose_backward(tile_columns(a.D), [&](auto keys, auto rows) { launch<T, decltype(keys), decltype(rows)>(f, a); });
}

}   // namespace

void backward(const AttentionBackward& f, const Backward& a) {
    f.dtype == DType::float16 ? launch<float16>(f, a) : launch<bfloat16>(f, a);
}

}   // namespace nanochat::cuda::attention::hopper
