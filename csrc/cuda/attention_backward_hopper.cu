// Attention backward on Hopper: the two kernels of attention_backward.cu with tensor copies and wgmma. A warpgroup's
// transposed scores are at once the left operand of the product that follows, so that nothing but what is loaded passes
// through shared memory.
#include "attention_backward.cuh"
#include "attention_hopper.cuh"

namespace nanochat::cuda::attention::hopper {
namespace {

// p = 2^(p c - lse) of a pair of columns that a thread holds in two rows.
template <int count, class Number>
NANOCHAT_DEVICE void weigh(float (&p)[count], float exponent_scale, const Number& lse) {
#pragma unroll
    for (int i = 0; i < count; ++i) p[i] = exp2_approx(fmaf(p[i], exponent_scale, -lse(i)));
}
template <int count, class Number>
NANOCHAT_DEVICE void differentiate(float (&ds)[count], const float (&p)[count], const Number& delta) {
#pragma unroll
    for (int i = 0; i < count; ++i) ds[i] = p[i] * (ds[i] - delta(i));
}

// --- dK, dV ---

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
    const int group = threadIdx.x / kGroupThreads;
    if (threadIdx.x == 0) {
        key_ring.initialise(Tile::consumers);
        q_ring.initialise(Tile::consumers);
        dout_ring.initialise(Tile::consumers);
        device::fence_mbarrier_init();
    }
    __syncthreads();

    // A tile of keys meets the rows of all units that share its key/value head, `subunits` of them, one after another.
    const int subunits = a.H / a.Hkv / a.pack;
    const auto tiles_of = [&](int first_key) {
        const Span queries = a.sight.queries(first_key, min(first_key + Tile::keys, a.sight.Tk) - 1);
        return Span{queries.begin * a.pack / rows, divide_up(queries.end * a.pack, rows)};
    };

    if (group == 0) {
        device::setmaxnreg_decrease<Tile::loader_registers>();
        if (threadIdx.x != 0) return;
        for (int item = blockIdx.x, turn = 0, n = 0; item < a.order.items(); item += gridDim.x) {
            const Place place = a.order(item);
            const int batch = place.unit / a.Hkv, kv_head = place.unit - batch * a.Hkv;
            const int first_key = place.tile * Tile::keys;
            const Span tiles = tiles_of(first_key);
            if (tiles.begin >= tiles.end) continue;
            key_ring.start(turn, 2 * Tile::consumers * Tile::group_bytes);
            for (int c = 0; c < Tile::consumers; ++c) {
                const int key = first_key + c * kGroupRows;
                load_panels<D, kGroupRows>(tile_k + c * Tile::group_bytes, maps.k, key_ring.full(turn), kv_head, key,
                                           batch);
                load_panels<D, kGroupRows>(tile_v + c * Tile::group_bytes, maps.v, key_ring.full(turn), kv_head, key,
                                           batch);
            }
            ++turn;
            for (int sub = 0; sub < subunits; ++sub) {
                const int unit = place.unit * subunits + sub, head = (kv_head * subunits + sub) * a.pack;
                for (int tile = tiles.begin; tile < tiles.end; ++tile, ++n) {
                    const int stage = Ring<stages>::stage(n), query = tile * rows / a.pack;
                    q_ring.start(n, Tile::q_bytes + Tile::number_bytes);
                    load_panels<D, rows>(tile_q + stage * Tile::q_bytes, maps.q, q_ring.full(n), head, query, batch);
                    device::tma_load(lses + stage * Tile::number_bytes, maps.lses, q_ring.full(n), tile * rows, unit);
                    dout_ring.start(n, Tile::q_bytes + Tile::number_bytes);
                    load_panels<D, rows>(tile_dout + stage * Tile::q_bytes, maps.dout, dout_ring.full(n), head, query,
                                         batch);
                    device::tma_load(deltas + stage * Tile::number_bytes, maps.deltas, dout_ring.full(n), tile * rows,
                                     unit);
                }
            }
        }
        return;
    }

    device::setmaxnreg_increase<Tile::registers>();
    const int consumer = group - 1, lane = threadIdx.x % 32, warp_key = threadIdx.x % kGroupThreads / 32 * 16;
    const uint32_t own_k = tile_k + consumer * Tile::group_bytes, own_v = tile_v + consumer * Tile::group_bytes;
    unsigned char* const own_out = shared + (tile_out + consumer * Tile::group_bytes - start);
    for (int item = blockIdx.x, turn = 0, n = 0; item < a.order.items(); item += gridDim.x) {
        const Place place = a.order(item);
        const int group_key = place.tile * Tile::keys + consumer * kGroupRows;   // may lie behind the last key
        const Span tiles = tiles_of(place.tile * Tile::keys);
        const Span full = a.sight.full_tiles(group_key, min(group_key + kGroupRows, a.sight.Tk) - 1, a.pack, rows);

        float dk[D / 2], dv[D / 2];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;
        if (tiles.begin < tiles.end) {
            key_ring.wait(turn);
            const int end = n + (tiles.end - tiles.begin) * subunits;
#pragma unroll 1
            for (int tile = tiles.begin; n < end; ++n) {
                const int stage = Ring<stages>::stage(n);
                const uint32_t q = tile_q + stage * Tile::q_bytes, dout = tile_dout + stage * Tile::q_bytes;
                const auto number_at = [&](uint32_t numbers) {
                    const uint32_t place = numbers + stage * Tile::number_bytes - start;
                    const auto* column = reinterpret_cast<const float*>(shared + place) + 2 * (lane % 4);
                    return [column](int i) { return column[i / 4 * 8 + i % 2]; };
                };
                float p[rows / 2], ds[rows / 2];
                uint32_t p_left[rows / 16][4], ds_left[rows / 16][4];
                q_ring.wait(n);
                start_scores<T, D, rows>(p, own_k, q);
                dout_ring.wait(n);
                start_scores<T, D, rows>(ds, own_v, dout);
                finish<1>(p);
                weigh(p, a.exponent_scale, number_at(lses));
                if (tile < full.begin || tile >= full.end) {
                    hide_rows(p, a.sight, tile * rows + 2 * (lane % 4), a.pack,
                              device::opaque(group_key) + warp_key + lane / 4);
                }
                all_to_left<T, rows>(p_left, p);
                start_sums<T, D, rows>(dv, p_left, dout);
                finish<1>(ds);
                differentiate(ds, p, number_at(deltas));
                all_to_left<T, rows>(ds_left, ds);
                start_sums<T, D, rows>(dk, ds_left, q);
                finish<1>(dv);
                dout_ring.release(n);
                finish<0>(dk);
                q_ring.release(n);
                if (++tile == tiles.end) tile = tiles.begin;
            }
            key_ring.release(turn++);
        }

        const int batch = place.unit / a.Hkv, kv_head = place.unit - batch * a.Hkv;
        const auto store = [&](const float (&sums)[D / 2], void* tensor, const Strides& strides) {
            T* first = static_cast<T*>(tensor) + batch * strides.b + kv_head * strides.h + group_key * strides.t;
            store_rows<T, D, kGroupRows>(own_out, sums, warp_key, a.D, [&](int r) {
                return group_key + r < a.sight.Tk ? first + r * strides.t : nullptr;
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
    const int group = threadIdx.x / kGroupThreads;
    if (threadIdx.x == 0) {
        row_ring.initialise(Tile::consumers);
        k_ring.initialise(Tile::consumers);
        v_ring.initialise(Tile::consumers);
        device::fence_mbarrier_init();
    }
    __syncthreads();

    if (group == 0) {
        device::setmaxnreg_decrease<Tile::loader_registers>();
        if (threadIdx.x != 0) return;
        for (int item = blockIdx.x, turn = 0, n = 0; item < a.row_order.items(); item += gridDim.x) {
            const RowTile tile = row_tile(a, a.row_order, Tile::rows, item);
            const Span blocks = blocks_of(tile, a.sight, a.pack, keys);
            if (blocks.begin >= blocks.end) continue;
            row_ring.start(turn, 2 * Tile::consumers * Tile::group_bytes);
            for (int c = 0; c < Tile::consumers; ++c) {
                const int query = tile.query(c * kGroupRows, a.pack);
                load_panels<D, kGroupRows>(tile_q + c * Tile::group_bytes, maps.q, row_ring.full(turn), tile.unit.head,
                                           query, tile.unit.batch);
                load_panels<D, kGroupRows>(tile_dout + c * Tile::group_bytes, maps.dout, row_ring.full(turn),
                                           tile.unit.head, query, tile.unit.batch);
            }
            ++turn;
            for (int block = blocks.begin; block < blocks.end; ++block, ++n) {
                const int place = Ring<stages>::stage(n) * Tile::k_bytes;
                k_ring.start(n, Tile::k_bytes);
                load_panels<D, keys>(tile_k + place, maps.k, k_ring.full(n), tile.unit.kv_head, block * keys,
                                     tile.unit.batch);
                v_ring.start(n, Tile::k_bytes);
                load_panels<D, keys>(tile_v + place, maps.v, v_ring.full(n), tile.unit.kv_head, block * keys,
                                     tile.unit.batch);
            }
        }
        return;
    }

    device::setmaxnreg_increase<Tile::registers>();
    const int consumer = group - 1, lane = threadIdx.x % 32, warp_row = threadIdx.x % kGroupThreads / 32 * 16;
    const uint32_t own_q = tile_q + consumer * Tile::group_bytes, own_dout = tile_dout + consumer * Tile::group_bytes;
    unsigned char* const own_out = shared + (tile_out + consumer * Tile::group_bytes - start);
    for (int item = blockIdx.x, turn = 0, n = 0; item < a.row_order.items(); item += gridDim.x) {
        const RowTile tile = row_tile(a, a.row_order, Tile::rows, item);
        const Span blocks = blocks_of(tile, a.sight, a.pack, keys);
        // This consumer's rows may end before they begin.
        const int first_row = consumer * kGroupRows, last_row = min(first_row + kGroupRows, tile.count) - 1;
        const Span full = a.sight.full_blocks(tile.query(first_row, a.pack), tile.query(last_row, a.pack), keys);

        float dq[D / 2], lse[2], delta[2];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dq[i] = 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t row = tile.number * int64_t{a.padded_rows} + tile.first + first_row + warp_row + lane / 4 +
                                8 * h;
            lse[h] = a.lses[row];
            delta[h] = a.deltas[row];
        }
        if (blocks.begin < blocks.end) {
            row_ring.wait(turn);
#pragma unroll 1
            for (int block = blocks.begin; block < blocks.end; ++block, ++n) {
                const int place = Ring<stages>::stage(n) * Tile::k_bytes;
                float p[keys / 2], ds[keys / 2];
                uint32_t left[keys / 16][4];
                k_ring.wait(n);
                start_scores<T, D, keys>(p, own_q, tile_k + place);
                v_ring.wait(n);
                start_scores<T, D, keys>(ds, own_dout, tile_v + place);
                finish<1>(p);
                weigh(p, a.exponent_scale, [&](int i) { return lse[i / 2 % 2]; });
                if (block < full.begin || block >= full.end) {
                    const int row = tile.first + device::opaque(first_row) + warp_row + lane / 4;
                    hide_keys(p, a.sight, block * keys + 2 * (lane % 4), a.pack, row, 0);
                }
                finish<0>(ds);
                v_ring.release(n);
                differentiate(ds, p, [&](int i) { return delta[i / 2 % 2]; });
                all_to_left<T, keys>(left, ds);
                start_sums<T, D, keys>(dq, left, tile_k + place);
                finish<0>(dq);
                k_ring.release(n);
            }
            row_ring.release(turn++);
        }
        const float scale[2] = {a.scale, a.scale};
        scale_rows(dq, scale);
        const auto dq_rows = packed_rows(static_cast<T*>(a.dq), a.dq_strides, tile.unit, a.pack);
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
    using P = Panels<Keys::D>;
    const AttentionShape& s = f.shape;
    const Device& device = f.execution.device;
    void* const stream = f.execution.stream;
    const auto map = [&](const void* tensor, int64_t positions, int64_t heads, const Strides& strides, int box_heads,
                         int box_positions) {
        return map_of(f.dtype, tensor, s.B, positions, heads, s.D, strides, P::columns, box_heads, box_positions,
                      P::swizzle);
    };
    const auto q_map = [&](const void* tensor, const Strides& strides, int rows) {
        return map(tensor, s.Tq, s.H, strides, a.pack, rows / a.pack);
    };
    const auto k_map = [&](const void* tensor, const Strides& strides, int keys) {
        return map(tensor, s.Tk, s.Hkv, strides, 1, keys);
    };
    const auto number_map = [&](const float* numbers) {
        return make_tensor_map(DType::float32, numbers, {a.padded_rows, a.units}, {4 * int64_t{a.padded_rows}},
                               {Keys::rows, 1}, Swizzle::none);
    };
    a.order = order_of(divide_up(a.sight.Tk, Keys::keys), static_cast<int>(s.B * s.Hkv), a.unit_bytes, false);
    a.row_order = order_of(divide_up(a.sight.Tq * a.pack, Rows::rows), a.units, a.unit_bytes, a.sight.causal);
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
                   dim3(static_cast<unsigned>(persistent_blocks(device, a.order))), dim3(Keys::threads),
                   Keys::shared_bytes, stream, for_keys, a);
    device::launch("attention_backward", attention_backward_rows_hopper_kernel<T, Rows>,
                   dim3(static_cast<unsigned>(persistent_blocks(device, a.row_order))), dim3(Rows::threads),
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
