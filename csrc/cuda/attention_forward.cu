// Attention forward with mma.sync (every GPU from sm_80 on): the online softmax of FlashAttention-2, arXiv:2307.08691.
//
// Four warps share a tile of rows; each keeps its scores, weights and sums in registers. A block of keys and values
// arrives by cp.async while the one before is worked on. For few rows (a step of generation) the keys are split among
// blocks of threads, whose parts a second kernel combines in a fixed order.
#include "attention_tiles.h"

namespace nanochat::cuda::attention {
namespace {

struct Arguments {
    const void *q, *k, *v;
    void* out;
    float* lse;
    Strides q_strides, k_strides, v_strides, out_strides;
    const int64_t* lengths;   // (B,) or null
    Sight sight;
    Scale scale;
    int H, Hkv, D, pack;
    Order order;
    // Where keys are split: (splits, units, rows of a unit, D) and the same without D.
    float *parts, *part_lses;
    int splits;
};

// With lengths, a sequence's keys are its first lengths[b].
NANOCHAT_DEVICE Sight sight_of_batch(const Arguments& a, int batch) {
    Sight sight = a.sight;
    if (a.lengths) sight.Tk = static_cast<int>(max(int64_t{0}, min(a.lengths[batch], int64_t{sight.Tk})));
    return sight;
}

// The part of blockIdx.y's among a.splits.
NANOCHAT_DEVICE Span split(const Arguments& a, Span blocks) {
    const int share = divide_up(blocks.end - blocks.begin, a.splits);
    const int begin = min(blocks.end, blocks.begin + static_cast<int>(blockIdx.y) * share);
    return {begin, min(blocks.end, begin + share)};
}

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::blocks)
    attention_forward_kernel(const __grid_constant__ Arguments a) {
    constexpr int D = Tile::D, rows = Tile::rows, keys = Tile::keys, fragments = Tile::fragments;
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t tile_q = (device::shared_address(shared) + 1023) & ~1023u;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * fragments;

    RowTile tile = row_tile(a, a.order, rows, blockIdx.x);
    const Sight sight = sight_of_batch(a, tile.unit.batch);
    const int first_query = tile.query(0, a.pack), last_query = tile.query(tile.count - 1, a.pack);
    const Span full = sight.full_blocks(first_query, last_query, keys);
    const Span blocks = split(a, blocks_of(tile, sight, a.pack, keys));

    const T* k = static_cast<const T*>(a.k) + tile.unit.batch * a.k_strides.b + tile.unit.kv_head * a.k_strides.h;
    const T* v = static_cast<const T*>(a.v) + tile.unit.batch * a.v_strides.b + tile.unit.kv_head * a.v_strides.h;
    const auto stage_of = [&](int block) { return tile_q + Tile::q_bytes + block % 2 * Tile::stage_bytes; };
    const auto load_block = [&](int block) {
        const int first = block * keys, count = sight.Tk - first;
        const uint32_t stage = stage_of(block);
        load_rows<D, keys, kThreads>(stage, strided_rows<D, kThreads>(k + first * a.k_strides.t, a.k_strides.t), count,
                                     a.D);
        load_rows<D, keys, kThreads>(stage + Tile::k_bytes,
                                     strided_rows<D, kThreads>(v + first * a.v_strides.t, a.v_strides.t), count, a.D);
        device::cp_async_commit();
    };

    float sums[fragments][D / 2] = {};
    Softmax softmax[fragments];
    if (blocks.begin < blocks.end) {
        const auto q_rows = packed_rows(static_cast<const T*>(a.q), a.q_strides, tile.unit, a.pack);
        load_rows<D, rows, kThreads>(tile_q, [&](int r) { return q_rows(tile.first + r); }, tile.count, a.D);
        load_block(blocks.end - 1);
    }
    const auto q_left = left_cursor<D, rows>(tile_q, warp_row, lane);
#pragma unroll 1
    for (int block = blocks.end - 1; block >= blocks.begin; --block) {
        device::cp_async_wait<0>();
        __syncthreads();   // this block has landed, and nobody reads the last one any more
        if (block > blocks.begin) load_block(block - 1);
        float scores[fragments][keys / 2];
        multiply<T, D>(scores, q_left, right_cursor<D, keys>(stage_of(block), lane));
        if (a.scale.negative) {
#pragma unroll
            for (int f = 0; f < fragments; ++f) {
                const float minus[2] = {-1, -1};
                scale_rows(scores[f], minus);
            }
        }
        if (block < full.begin || block >= full.end) {
#pragma unroll
            for (int f = 0; f < fragments; ++f) {
                const int row = tile.first + warp_row + 16 * f + lane / 4;
                hide_keys(scores[f], sight, block * keys + 2 * (lane % 4), a.pack, row, -INFINITY);
            }
        }
#pragma unroll
        for (int f = 0; f < fragments; ++f) {
            float shrink[2];
            softmax[f].step(scores[f], a.scale.size, shrink);
            scale_rows(sums[f], shrink);
        }
        add_product<T, D>(sums, scores, left_cursor<D, keys>(stage_of(block) + Tile::k_bytes, 0, lane));
    }

    tile = row_tile(a, a.order, rows, device::opaque(blockIdx.x));
    const int64_t part_row = (static_cast<int64_t>(blockIdx.y) * a.order.units + tile.number) * tile.all + tile.first;
    const PackedRows<T> out_rows = packed_rows(static_cast<T*>(a.out), a.out_strides, tile.unit, a.pack);
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
        float inverse[2], lse[2];
        softmax[f].finish(a.scale.size, inverse, lse);
        scale_rows(sums[f], inverse);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = warp_row + 16 * f + lane / 4 + 8 * h;
            if (r >= tile.count) continue;
            if (a.splits > 1) {
                float* to = a.parts + (part_row + r) * D + 2 * (lane % 4);
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    *reinterpret_cast<float2*>(to + 8 * n) = {sums[f][4 * n + 2 * h], sums[f][4 * n + 2 * h + 1]};
                }
                if (lane % 4 == 0) a.part_lses[part_row + r] = lse[h];
            } else if (lane % 4 == 0) {
                a.lse[row_index(a, tile.unit, tile.first + r)] = lse[h] * kLn2;
            }
        }
        if (a.splits == 1) {   // through the warp's own rows of the queries' tile
            store_rows<T, D, rows>(shared + (tile_q - device::shared_address(shared)), sums[f], warp_row + 16 * f, a.D,
                                   [&](int r) { return r < tile.count ? out_rows(tile.first + r) : nullptr; });
        }
    }
}

// Each warp combines the parts of a row: out = sum 2^(lse_s - lse) out_s, in the order of s.
template <class T, int D>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % 32, rows = a.sight.Tq * a.pack;
    const int64_t all = static_cast<int64_t>(a.order.units) * rows;
    const int64_t place = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    if (place >= all) return;
    const int row = static_cast<int>(place % rows);
    const Unit unit = unit_of(static_cast<int>(place / rows), a.H, a.Hkv, a.pack);

    float top = -INFINITY, total = 0;
    for (int s = 0; s < a.splits; ++s) top = fmaxf(top, a.part_lses[s * all + place]);
    const float reference = top == -INFINITY ? 0 : top;
    for (int s = 0; s < a.splits; ++s) total += exp2_approx(a.part_lses[s * all + place] - reference);
    const float lse = total == 0 ? -INFINITY : reference + log2f(total);

    float sums[divide_up(D, 64)][2] = {};
    for (int s = 0; s < a.splits; ++s) {
        const float weight = total == 0 ? 0 : exp2_approx(a.part_lses[s * all + place] - lse);
        const float* from = a.parts + (s * all + place) * D;
#pragma unroll
        for (int i = 0; i < divide_up(D, 64); ++i) {
            const int column = 64 * i + 2 * lane;
            if (column >= D) continue;
            const float2 part = *reinterpret_cast<const float2*>(from + column);
            sums[i][0] += weight * part.x;
            sums[i][1] += weight * part.y;
        }
    }
    T* to = packed_rows(static_cast<T*>(a.out), a.out_strides, unit, a.pack)(row);
#pragma unroll
    for (int i = 0; i < divide_up(D, 64); ++i) {
        const int column = 64 * i + 2 * lane;
        if (column < a.D) *reinterpret_cast<uint32_t*>(to + column) = device::pack<T>(sums[i][0], sums[i][1]);
    }
    if (lane == 0) a.lse[row_index(a, unit, row)] = lse * kLn2;
}

// --- choice and launch ---

// Up to so many rows of a unit take the small tile, and keys are split where that fills the GPU.
constexpr int kFewRows = 64;
constexpr int kBlocksAMultiprocessor = 3;   // of the small tile, that run at the same time
constexpr int kLeastBlocks = 2;             // of keys, for a split to pay for its combination

struct Plan {
    int pack, rows, splits;
};

Plan plan(const AttentionShape& s, const Device& device) {
    const int pack = static_cast<int>(s.H / s.Hkv);
    const int64_t rows = s.Tq * pack, units = s.B * s.Hkv;
    if (rows > kFewRows) return {pack, 128, 1};
    const Sight sight = sight_of(s);
    const Span seen = sight.keys(0, sight.Tq - 1);
    const int blocks = divide_up(seen.end - seen.begin, 64);
    const int64_t wanted = kBlocksAMultiprocessor * device.multiprocessors / std::max<int64_t>(1, units);
    return {pack, 64, static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max(1, blocks / kLeastBlocks)))};
}

template <class T, class Tile>
void launch(const Arguments& a, void* stream) {
    device::launch("attention_forward", attention_forward_kernel<T, Tile>,
                   dim3(static_cast<unsigned>(a.order.items()), static_cast<unsigned>(a.splits)), dim3(kThreads),
                   Tile::shared_bytes, stream, a);
    if (a.splits == 1) return;
    const int rows = a.order.units * a.sight.Tq * a.pack;
    device::launch("attention_forward", combine_kernel<T, Tile::D>,
                   dim3(static_cast<unsigned>(divide_up(rows, kWarps))), dim3(kThreads), 0, stream, a);
}

template <class T>
void launch(const Arguments& a, int rows, void* stream) {
    choose_forward(tile_columns(a.D), rows, [&](auto tile) { launch<T, decltype(tile)>(a, stream); });
}

}   // namespace
}   // namespace nanochat::cuda::attention

namespace nanochat::cuda {

int64_t attention_forward_workspace_bytes(const AttentionForward& a) {
    const auto [pack, rows, splits] = attention::plan(a.shape, a.execution.device);
    if (splits == 1) return 0;
    const int64_t all = a.shape.B * a.shape.H * a.shape.Tq;
    return splits * all * (attention::tile_columns(a.shape.D) + 1) * 4;
}

void attention_forward(const AttentionForward& a) {
    using namespace attention;
    const AttentionShape& s = a.shape;
    require_shape("attention_forward", s);
    const Device& device = a.execution.device;
    void* const stream = a.execution.stream;
    const auto [pack, rows, splits] = plan(s, device);
    if (device.hopper && rows == 128 && !a.lengths) return hopper::forward(a);
    const int tiles = divide_up(static_cast<int>(s.Tq) * pack, rows), units = static_cast<int>(s.B * s.Hkv);
    const Sight sight = sight_of(s);
    auto* parts = static_cast<float*>(a.execution.workspace);
    const Arguments arguments = {
        .q = a.q,
        .k = a.k,
        .v = a.v,
        .out = a.out,
        .lse = static_cast<float*>(a.lse),
        .q_strides = a.q_strides,
        .k_strides = a.k_strides,
        .v_strides = a.v_strides,
        .out_strides = a.out_strides,
        .lengths = a.lengths,
        .sight = sight,
        .scale = scale_of(s.scale),
        .H = static_cast<int>(s.H),
        .Hkv = static_cast<int>(s.Hkv),
        .D = static_cast<int>(s.D),
        .pack = pack,
        .order = order_of(tiles, units, 4 * s.Tk * s.D, sight.causal),
        .parts = parts,
        .part_lses = parts + int64_t{splits} * units * s.Tq * pack * tile_columns(s.D),
        .splits = splits,
    };
    a.dtype == DType::float16 ? launch<float16>(arguments, rows, stream) : launch<bfloat16>(arguments, rows, stream);
}

}   // namespace nanochat::cuda
