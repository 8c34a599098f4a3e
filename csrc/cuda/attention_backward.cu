// Attention backward with mma.sync (every GPU from sm_80 on), arXiv:2307.08691, in kernels that share no sums, so that
// nothing is added atomically and the same inputs give the same bits. Hopper has its own kernel between the first of
// these and finish_dq, which rounds its sums of dQ:
//
//   rows      delta = rowsum(dO O), and the log-sum-exp base 2, of every row
//   dK, dV    a block of threads owns keys and passes over the rows that see them:
//             P^T = 2^(c K Q^T - lse), dV += P^T dO;  dS^T = P^T (V dO^T - delta), dK += dS^T Q
//   dQ        another owns rows and passes over the keys that they see: dQ += dS K
//
// This takes seven products instead of five, but the sums stay in registers. Because the first two products of dK and dV
// are transposed, P^T and dS^T are already in place as the operands A of the next products.
#include "attention_backward.cuh"
#include "packs.cuh"

namespace nanochat::cuda::attention {
namespace {

// --- rows ---

// Sixteen lanes take a row, 8 elements each. The rows that pad a head group are written for the tiles that read them.
constexpr int kRowLanes = 16, kRowsPerBlock = kThreads / kRowLanes;

template <class T>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const __grid_constant__ Backward a, const T* out, const Strides out_strides, const float* lse) {
    const int64_t place = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kRowLanes;
    const int head_group_index = static_cast<int>(place / a.padded_rows), row = static_cast<int>(place % a.padded_rows);
    const int column = threadIdx.x % kRowLanes * 8;
    const HeadGroup head_group = make_head_group(head_group_index, a.H, a.Hkv, a.heads_per_tile);
    float sum = 0, own_lse = -INFINITY;
    if (row < a.mask.Tq * a.heads_per_tile) {
        if (column < a.D) {
            const auto x = load<8>(packed_rows(out, out_strides, head_group, a.heads_per_tile)(row) + column);
            const auto y = load<8>(
                packed_rows(static_cast<const T*>(a.dout), a.dout_strides, head_group, a.heads_per_tile)(row) + column);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum += element(x, i) * element(y, i);
        }
        own_lse = lse[row_index(a, head_group, row)];
    }
#pragma unroll
    for (int distance = kRowLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, distance);
    if (column == 0) {
        a.lses[place] = own_lse == -INFINITY ? INFINITY : own_lse * kLog2e;
        a.deltas[place] = sum;
        if (a.dq_counts && place % hopper::kDqRows == 0) a.dq_counts[place / hopper::kDqRows] = 0;
        if (a.next_item && place == 0) *a.next_item = 0;
    }
}

template <class T>
void prepare_rows(const AttentionBackward& a, const Backward& b) {
    const int64_t blocks = int64_t{b.head_groups} * b.padded_rows / kRowsPerBlock;   // padded_rows is a multiple of it
    device::launch("attention_backward", rows_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                   a.execution.stream, b, static_cast<const T*>(a.out), a.out_strides,
                   static_cast<const float*>(a.lse));
}

// --- dQ on Hopper ---

// Rounds the sums of a tile of rows.
template <class T, int D>
__global__ void __launch_bounds__(kThreads) finish_dq_kernel(const __grid_constant__ Backward a) {
    constexpr int rows = hopper::kDqRows;
    NANOCHAT_SHARED(uint4[tile_bytes<D>(rows) / 16], staged);   // chunks
    const RowTile tile = row_tile(a, a.row_scheduler, rows, blockIdx.x);
    const Range blocks = visible_key_blocks(tile, a.mask, a.heads_per_tile, 1);
    float dq[D / 2] = {};
    if (blocks.begin < blocks.end) {
        const int64_t row = tile.head_group_index * int64_t{a.padded_rows} + tile.first;
        const float* sums = a.dq_sums + row * D + 4 * threadIdx.x;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const auto part = load<4>(sums + n * 4 * kThreads);
#pragma unroll
            for (int i = 0; i < 4; ++i) dq[4 * n + i] = element(part, i);
        }
    }
    const float scale[2] = {a.scale, a.scale};
    scale_rows(dq, scale);
    const auto dq_rows = packed_rows(static_cast<T*>(a.dq), a.dq_strides, tile.head_group, a.heads_per_tile);
    store_rows<T, D, rows>(reinterpret_cast<unsigned char*>(&staged), dq, threadIdx.x / 32 * 16, a.D,
                           [&](int r) { return r < tile.count ? dq_rows(tile.first + r) : nullptr; });
}

template <class T, int D>
void finish_dq(Backward a, void* stream) {
    a.row_scheduler = make_scheduler(divide_up(a.mask.Tq * a.heads_per_tile, hopper::kDqRows), a.head_groups, 0, false);
    device::launch("attention_backward", finish_dq_kernel<T, D>, dim3(static_cast<unsigned>(a.row_scheduler.items())),
                   dim3(kThreads), 0, stream, a);
}

template <class T>
void finish_dq(const Backward& a, void* stream) {
    hopper::backward_columns(a.D) == 64 ? finish_dq<T, 64>(a, stream) : finish_dq<T, 128>(a, stream);
}

// --- dK, dV ---

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, 2) attention_backward_keys_kernel(const __grid_constant__ Backward a) {
    constexpr int D = Tile::D, keys = Tile::keys, rows = Tile::rows, fragments = Tile::fragments;
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t start = device::shared_address(shared), tile_k = (start + 1023) & ~1023u;
    const uint32_t tile_v = tile_k + Tile::k_bytes, stages = tile_v + Tile::k_bytes;
    const uint32_t numbers = stages + 2 * Tile::stage_bytes;
    const int lane = threadIdx.x % 32, warp_key = threadIdx.x / 32 * 16 * fragments;

    const TileCoord place = a.scheduler.coord(blockIdx.x);
    const HeadGroup head_group = make_head_group(place.head_group, a.H, a.Hkv, a.heads_per_tile);
    const int first_key = place.tile * keys, key_count = min(keys, a.mask.Tk - first_key);
    const Range queries = a.mask.visible_queries(first_key, first_key + key_count - 1);
    const Range tiles = {queries.begin * a.heads_per_tile / rows, divide_up(queries.end * a.heads_per_tile, rows)};
    const Range full = a.mask.full_tiles(first_key, first_key + key_count - 1, a.heads_per_tile, rows);

    const auto q_rows = packed_rows(static_cast<const T*>(a.q), a.q_strides, head_group, a.heads_per_tile);
    const auto dout_rows = packed_rows(static_cast<const T*>(a.dout), a.dout_strides, head_group, a.heads_per_tile);
    const auto load_tile = [&](int tile) {
        const int first = tile * rows, count = a.mask.Tq * a.heads_per_tile - first;
        const uint32_t stage = stages + tile % 2 * Tile::stage_bytes;
        load_rows<D, rows, kThreads>(stage, [&](int r) { return q_rows(first + r); }, count, a.D);
        load_rows<D, rows, kThreads>(stage + Tile::q_bytes, [&](int r) { return dout_rows(first + r); }, count, a.D);
        const int i = threadIdx.x;
        if (i < rows / 2) {
            const float* from = i < rows / 4 ? a.lses : a.deltas;
            device::cp_async_16(numbers + (tile % 2 * Tile::row_numbers + 4 * i) * 4,
                                from + place.head_group * int64_t{a.padded_rows} + first + i % (rows / 4) * 4);
        }
        device::cp_async_commit();
    };

    float dk[fragments][D / 2] = {}, dv[fragments][D / 2] = {};
    if (tiles.begin < tiles.end) {
        const T* k = static_cast<const T*>(a.k) + head_group.batch * a.k_strides.b + head_group.kv_head * a.k_strides.h;
        const T* v = static_cast<const T*>(a.v) + head_group.batch * a.v_strides.b + head_group.kv_head * a.v_strides.h;
        load_rows<D, keys, kThreads>(tile_k, strided_rows<D, kThreads>(k + first_key * a.k_strides.t, a.k_strides.t),
                                     key_count, a.D);
        load_rows<D, keys, kThreads>(tile_v, strided_rows<D, kThreads>(v + first_key * a.v_strides.t, a.v_strides.t),
                                     key_count, a.D);
        load_tile(tiles.begin);
    }
    const auto k_fragment_rows = a_fragment_rows<D, keys>(tile_k, warp_key, lane);
    const auto v_fragment_rows = a_fragment_rows<D, keys>(tile_v, warp_key, lane);
#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile) {
        device::cp_async_wait<0>();
        __syncthreads();   // this tile has landed, and no thread reads the previous one
        if (tile + 1 < tiles.end) load_tile(tile + 1);
        const uint32_t tile_q = stages + tile % 2 * Tile::stage_bytes, tile_dout = tile_q + Tile::q_bytes;
        const auto* lses = reinterpret_cast<const float*>(shared + (numbers - start)) + tile % 2 * Tile::row_numbers;
        const float* deltas = lses + rows;

        float p[fragments][rows / 2], ds[fragments][rows / 2];
        multiply<T, D>(p, k_fragment_rows, b_fragment_rows<D, rows>(tile_q, lane));
#pragma unroll
        for (int i = 0; i < rows / 2; ++i) {
            const float lse = lses[i / 4 * 8 + 2 * (lane % 4) + i % 2];
#pragma unroll
            for (int f = 0; f < fragments; ++f) p[f][i] = exp2_approx(fmaf(p[f][i], a.exponent_scale, -lse));
        }
        if (tile < full.begin || tile >= full.end) {
#pragma unroll
            for (int f = 0; f < fragments; ++f) {
                mask_scores_transposed(p[f], a.mask, tile * rows + 2 * (lane % 4), a.heads_per_tile,
                                       first_key + warp_key + 16 * f + lane / 4);
            }
        }
        multiply<T, D>(ds, v_fragment_rows, b_fragment_rows<D, rows>(tile_dout, lane));
#pragma unroll
        for (int i = 0; i < rows / 2; ++i) {
            const float delta = deltas[i / 4 * 8 + 2 * (lane % 4) + i % 2];
#pragma unroll
            for (int f = 0; f < fragments; ++f) ds[f][i] = p[f][i] * (ds[f][i] - delta);
        }
        add_product<T, D>(dv, p, a_fragment_rows<D, rows>(tile_dout, 0, lane));
        add_product<T, D>(dk, ds, a_fragment_rows<D, rows>(tile_q, 0, lane));
    }

    const TileCoord again = a.scheduler.coord(device::opaque(blockIdx.x));
    const HeadGroup owner = make_head_group(again.head_group, a.H, a.Hkv, a.heads_per_tile);
    const auto store = [&](const float (&sums)[D / 2], uint32_t tile, int f, void* tensor, const Strides& strides) {
        T* first = static_cast<T*>(tensor) + owner.batch * strides.b + owner.kv_head * strides.h +
                   again.tile * keys * strides.t;
        store_rows<T, D, keys>(shared + (tile - start), sums, warp_key + 16 * f, a.D, [&](int r) {
            return again.tile * keys + r < a.mask.Tk ? first + r * strides.t : nullptr;
        });
    };
#pragma unroll
    for (int f = 0; f < fragments; ++f) {   // staged in the warp's own rows of K and V
        const float scale[2] = {a.scale, a.scale};
        scale_rows(dk[f], scale);
        store(dk[f], tile_k, f, a.dk, a.dk_strides);
        store(dv[f], tile_v, f, a.dv, a.dv_strides);
    }
}

// --- dQ ---

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, 2) attention_backward_rows_kernel(const __grid_constant__ Backward a) {
    constexpr int D = Tile::D, keys = Tile::keys, rows = Tile::rows, fragments = Tile::fragments;
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t start = device::shared_address(shared), tile_q = (start + 1023) & ~1023u;
    const uint32_t tile_dout = tile_q + Tile::q_bytes, stages = tile_dout + Tile::q_bytes;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * fragments;

    const RowTile tile = row_tile(a, a.row_scheduler, rows, blockIdx.x);
    const HeadGroup& head_group = tile.head_group;
    const int first = tile.first, first_query = tile.query(0, a.heads_per_tile),
              last_query = tile.query(tile.count - 1, a.heads_per_tile);
    const Range full = a.mask.full_blocks(first_query, last_query, keys);
    const Range blocks = visible_key_blocks(tile, a.mask, a.heads_per_tile, keys);

    const T* k = static_cast<const T*>(a.k) + head_group.batch * a.k_strides.b + head_group.kv_head * a.k_strides.h;
    const T* v = static_cast<const T*>(a.v) + head_group.batch * a.v_strides.b + head_group.kv_head * a.v_strides.h;
    const auto load_block = [&](int block) {
        const int key = block * keys, key_count = a.mask.Tk - key;
        const uint32_t stage = stages + block % 2 * Tile::stage_bytes;
        load_rows<D, keys, kThreads>(stage, strided_rows<D, kThreads>(k + key * a.k_strides.t, a.k_strides.t),
                                     key_count, a.D);
        load_rows<D, keys, kThreads>(stage + Tile::k_bytes,
                                     strided_rows<D, kThreads>(v + key * a.v_strides.t, a.v_strides.t), key_count, a.D);
        device::cp_async_commit();
    };

    float dq[fragments][D / 2] = {}, lse[fragments][2], delta[fragments][2];
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t row = tile.head_group_index * int64_t{a.padded_rows} + first + warp_row + 16 * f + lane / 4 +
                                8 * h;
            lse[f][h] = a.lses[row];
            delta[f][h] = a.deltas[row];
        }
    }
    if (blocks.begin < blocks.end) {
        const auto q_rows = packed_rows(static_cast<const T*>(a.q), a.q_strides, head_group, a.heads_per_tile);
        const auto dout_rows = packed_rows(static_cast<const T*>(a.dout), a.dout_strides, head_group, a.heads_per_tile);
        load_rows<D, rows, kThreads>(tile_q, [&](int r) { return q_rows(first + r); }, tile.count, a.D);
        load_rows<D, rows, kThreads>(tile_dout, [&](int r) { return dout_rows(first + r); }, tile.count, a.D);
        load_block(blocks.begin);
    }
    const auto q_fragment_rows = a_fragment_rows<D, rows>(tile_q, warp_row, lane);
    const auto dout_fragment_rows = a_fragment_rows<D, rows>(tile_dout, warp_row, lane);
#pragma unroll 1
    for (int block = blocks.begin; block < blocks.end; ++block) {
        device::cp_async_wait<0>();
        __syncthreads();   // this block has landed, and no thread reads the previous one
        if (block + 1 < blocks.end) load_block(block + 1);
        const uint32_t stage = stages + block % 2 * Tile::stage_bytes;

        float p[fragments][keys / 2], ds[fragments][keys / 2];
        multiply<T, D>(p, q_fragment_rows, b_fragment_rows<D, keys>(stage, lane));
        const bool border = block < full.begin || block >= full.end;
#pragma unroll
        for (int f = 0; f < fragments; ++f) {
#pragma unroll
            for (int i = 0; i < keys / 2; ++i) {
                p[f][i] = exp2_approx(fmaf(p[f][i], a.exponent_scale, -lse[f][i / 2 % 2]));
            }
            if (border) {
                const int row = device::opaque(first) + warp_row + 16 * f + lane / 4;
                mask_scores(p[f], a.mask, block * keys + 2 * (lane % 4), a.heads_per_tile, row, 0);
            }
        }
        multiply<T, D>(ds, dout_fragment_rows, b_fragment_rows<D, keys>(stage + Tile::k_bytes, lane));
#pragma unroll
        for (int f = 0; f < fragments; ++f) {
#pragma unroll
            for (int i = 0; i < keys / 2; ++i) ds[f][i] = p[f][i] * (ds[f][i] - delta[f][i / 2 % 2]);
        }
        add_product<T, D>(dq, ds, a_fragment_rows<D, keys>(stage, 0, lane));
    }

    const RowTile again = row_tile(a, a.row_scheduler, rows, device::opaque(blockIdx.x));
    const auto dq_rows = packed_rows(static_cast<T*>(a.dq), a.dq_strides, again.head_group, a.heads_per_tile);
#pragma unroll
    for (int f = 0; f < fragments; ++f) {   // staged in the warp's own rows of Q
        const float scale[2] = {a.scale, a.scale};
        scale_rows(dq[f], scale);
        store_rows<T, D, rows>(shared + (tile_q - start), dq[f], warp_row + 16 * f, a.D,
                               [&](int r) { return r < again.count ? dq_rows(again.first + r) : nullptr; });
    }
}

// --- choice and launch ---

template <class T, class Keys, class Rows>
void launch(Backward a, void* stream) {
    static_assert(kRowPadding % Keys::rows == 0 && kRowPadding % Rows::rows == 0);
    const int rows = a.mask.Tq * a.heads_per_tile;
    a.scheduler = make_scheduler(divide_up(a.mask.Tk, Keys::keys), a.head_groups, a.kv_bytes,
                                 false);   // the first keys are seen by most queries
    a.row_scheduler = make_scheduler(divide_up(rows, Rows::rows), a.head_groups, a.kv_bytes, a.mask.causal);
    device::launch("attention_backward", attention_backward_keys_kernel<T, Keys>,
                   dim3(static_cast<unsigned>(a.scheduler.items())), dim3(kThreads), Keys::shared_bytes, stream, a);
    device::launch("attention_backward", attention_backward_rows_kernel<T, Rows>,
                   dim3(static_cast<unsigned>(a.row_scheduler.items())), dim3(kThreads), Rows::shared_bytes, stream, a);
}

template <class T>
void launch(const Backward& a, void* stream) {
    choose_backward(tile_columns(a.D),
                    [&](auto keys, auto rows) { launch<T, decltype(keys), decltype(rows)>(a, stream); });
}

}   // namespace
}   // namespace nanochat::cuda::attention

namespace nanochat::cuda {

int64_t attention_backward_workspace_bytes(const AttentionBackward& a) {
    const attention::RowLayout layout = attention::row_layout_of(a.shape, a.execution.device.hopper);
    return 4 * (2 * layout.rows() + layout.dq_sums + layout.dq_counts + (layout.dq_counts ? 1 : 0));
}

void attention_backward(const AttentionBackward& a) {
    using namespace attention;
    require_shape("attention_backward", a.shape);
    const Backward arguments = backward_arguments(a);
    void* const stream = a.execution.stream;
    const bool half = a.dtype == DType::float16;
    half ? prepare_rows<float16>(a, arguments) : prepare_rows<bfloat16>(a, arguments);
    if (a.execution.device.hopper) {
        hopper::backward(a, arguments);
        return half ? finish_dq<float16>(arguments, stream) : finish_dq<bfloat16>(arguments, stream);
    }
    half ? launch<float16>(arguments, stream) : launch<bfloat16>(arguments, stream);
}

}   // namespace nanochat::cuda
