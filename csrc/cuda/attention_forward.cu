// Attention forward with mma.sync (every GPU from sm_80 on): the online softmax of FlashAttention-2, arXiv:2307.08691.
//
// Four warps share a tile of rows. Each keeps its scores, weights and sums in registers. A block of keys and values
// arrives by cp.async while the previous one is computed. For few rows (a step of generation) the keys are split among
// blocks of threads, and a second kernel combines their parts in a fixed order.
#include "attention_tiles.h"

namespace nanochat::cuda::attention {
namespace {

struct Arguments {
    const void *q, *k, *v;
    void* out;
    float* lse;
    Strides q_strides, k_strides, v_strides, out_strides;
    const int64_t* lengths;   // (B,) or null
    AttentionMask mask;
    Scale scale;
    int H, Hkv, D, heads_per_tile;
    TileScheduler scheduler;
    // If keys are split: (splits, head_groups, rows of a head group, D), and the same without D.
    float *parts, *part_lses;
    int splits;
};

// The mask of a sequence, which has lengths[b] keys if there are lengths.
NANOCHAT_DEVICE AttentionMask mask_of_sequence(const Arguments& a, int batch) {
    AttentionMask mask = a.mask;
    if (a.lengths) mask.Tk = static_cast<int>(max(int64_t{0}, min(a.lengths[batch], int64_t{mask.Tk})));
    return mask;
}

// The part of the blocks of keys that belongs to split blockIdx.y.
NANOCHAT_DEVICE Range split(const Arguments& a, Range blocks) {
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

    RowTile tile = row_tile(a, a.scheduler, rows, blockIdx.x);
    const AttentionMask mask = mask_of_sequence(a, tile.head_group.batch);
    const int first_query = tile.query(0, a.heads_per_tile), last_query = tile.query(tile.count - 1, a.heads_per_tile);
    const Range full = mask.full_blocks(first_query, last_query, keys);
    const Range blocks = split(a, visible_key_blocks(tile, mask, a.heads_per_tile, keys));

    const T* k = static_cast<const T*>(a.k) + tile.head_group.batch * a.k_strides.b +
                 tile.head_group.kv_head * a.k_strides.h;
    const T* v = static_cast<const T*>(a.v) + tile.head_group.batch * a.v_strides.b +
                 tile.head_group.kv_head * a.v_strides.h;
    const auto stage_of = [&](int block) { return tile_q + Tile::q_bytes + block % 2 * Tile::stage_bytes; };
    const auto load_block = [&](int block) {
        const int first = block * keys, count = mask.Tk - first;
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
        const auto q_rows = packed_rows(static_cast<const T*>(a.q), a.q_strides, tile.head_group, a.heads_per_tile);
        load_rows<D, rows, kThreads>(tile_q, [&](int r) { return q_rows(tile.first + r); }, tile.count, a.D);
        load_block(blocks.end - 1);
    }
    const auto q_fragment_rows = a_fragment_rows<D, rows>(tile_q, warp_row, lane);
#pragma unroll 1
    for (int block = blocks.end - 1; block >= blocks.begin; --block) {
        device::cp_async_wait<0>();
        __syncthreads();   // this block has landed, and no thread reads the previous one
        if (block > blocks.begin) load_block(block - 1);
        float scores[fragments][keys / 2];
        multiply<T, D>(scores, q_fragment_rows, b_fragment_rows<D, keys>(stage_of(block), lane));
        if (a.scale.negated) {
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
                mask_scores(scores[f], mask, block * keys + 2 * (lane % 4), a.heads_per_tile, row, -INFINITY);
            }
        }
#pragma unroll
        for (int f = 0; f < fragments; ++f) {
            float rescale[2];
            softmax[f].step(scores[f], a.scale.magnitude, rescale);
            scale_rows(sums[f], rescale);
        }
        add_product<T, D>(sums, scores, a_fragment_rows<D, keys>(stage_of(block) + Tile::k_bytes, 0, lane));
    }

    tile = row_tile(a, a.scheduler, rows, device::opaque(blockIdx.x));
    const int64_t part = static_cast<int64_t>(blockIdx.y) * a.scheduler.head_groups + tile.head_group_index;
    const int64_t part_row = part * tile.row_count + tile.first;
    const PackedRows<T> out_rows =
        packed_rows(static_cast<T*>(a.out), a.out_strides, tile.head_group, a.heads_per_tile);
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
        float inverse[2], lse[2];
        softmax[f].finish(a.scale.magnitude, inverse, lse);
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
                a.lse[row_index(a, tile.head_group, tile.first + r)] = lse[h] * kLn2;
            }
        }
        if (a.splits == 1) {   // staged in the warp's own rows of the tile of queries
            store_rows<T, D, rows>(shared + (tile_q - device::shared_address(shared)), sums[f], warp_row + 16 * f, a.D,
                                   [&](int r) { return r < tile.count ? out_rows(tile.first + r) : nullptr; });
        }
    }
}

// Each warp combines the parts of one row: out = sum 2^(lse_s - lse) out_s, in the order of s.
template <class T, int D>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % 32, rows = a.mask.Tq * a.heads_per_tile;
    const int64_t all = static_cast<int64_t>(a.scheduler.head_groups) * rows;
    const int64_t place = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    if (place >= all) return;
    const int row = static_cast<int>(place % rows);
    const HeadGroup head_group = make_head_group(static_cast<int>(place / rows), a.H, a.Hkv, a.heads_per_tile);

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
            const float2 pair = *reinterpret_cast<const float2*>(from + column);
            sums[i][0] += weight * pair.x;
            sums[i][1] += weight * pair.y;
        }
    }
    T* to = packed_rows(static_cast<T*>(a.out), a.out_strides, head_group, a.heads_per_tile)(row);
#pragma unroll
    for (int i = 0; i < divide_up(D, 64); ++i) {
        const int column = 64 * i + 2 * lane;
        if (column < a.D) *reinterpret_cast<uint32_t*>(to + column) = device::pack<T>(sums[i][0], sums[i][1]);
    }
    if (lane == 0) a.lse[row_index(a, head_group, row)] = lse * kLn2;
}

// --- choice and launch ---

// A head group with at most this many rows uses the small tile, and its keys are split if that fills the GPU.
constexpr int kFewRows = 64;
// Blocks of threads with the small tile that run on a multiprocessor at the same time.
constexpr int kBlocksPerMultiprocessor = 3;
// Blocks of keys that a split must have to be worth combining.
constexpr int kLeastBlocks = 2;

struct Plan {
    int heads_per_tile, rows, splits;
};

Plan plan(const AttentionShape& s, const Device& device) {
    const int heads_per_tile = static_cast<int>(s.H / s.Hkv);
    const int64_t rows = s.Tq * heads_per_tile, head_groups = s.B * s.Hkv;
    if (rows > kFewRows) return {heads_per_tile, 128, 1};
    const AttentionMask mask = make_mask(s);
    const Range seen = mask.visible_keys(0, mask.Tq - 1);
    const int blocks = divide_up(seen.end - seen.begin, 64);
    const int64_t wanted = kBlocksPerMultiprocessor * device.multiprocessors / std::max<int64_t>(1, head_groups);
    return {heads_per_tile, 64, static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max(1, blocks / kLeastBlocks)))};
}

template <class T, class Tile>
void launch(const Arguments& a, void* stream) {
    device::launch("attention_forward", attention_forward_kernel<T, Tile>,
                   dim3(static_cast<unsigned>(a.scheduler.items()), static_cast<unsigned>(a.splits)), dim3(kThreads),
                   Tile::shared_bytes, stream, a);
    if (a.splits == 1) return;
    const int rows = a.scheduler.head_groups * a.mask.Tq * a.heads_per_tile;
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
    const auto [heads_per_tile, rows, splits] = attention::plan(a.shape, a.execution.device);
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
    const auto [heads_per_tile, rows, splits] = plan(s, device);
    if (device.hopper && rows == 128 && !a.lengths) return hopper::forward(a);
    const int tiles = divide_up(static_cast<int>(s.Tq) * heads_per_tile, rows),
              head_groups = static_cast<int>(s.B * s.Hkv);
    const AttentionMask mask = make_mask(s);
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
        .mask = mask,
        .scale = make_scale(s.scale),
        .H = static_cast<int>(s.H),
        .Hkv = static_cast<int>(s.Hkv),
        .D = static_cast<int>(s.D),
        .heads_per_tile = heads_per_tile,
        .scheduler = make_scheduler(tiles, head_groups, 4 * s.Tk * s.D, mask.causal),
        .parts = parts,
        .part_lses = parts + int64_t{splits} * head_groups * s.Tq * heads_per_tile * tile_columns(s.D),
        .splits = splits,
    };
    a.dtype == DType::float16 ? launch<float16>(arguments, rows, stream) : launch<bfloat16>(arguments, rows, stream);
}

}   // namespace nanochat::cuda
