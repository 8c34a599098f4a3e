// Shared by the backward kernels of attention: their arguments.
#pragma once

#include "attention_tiles.h"

namespace nanochat::cuda::attention {

// The number of rows of a head group is padded to a multiple of the largest tile.
constexpr int kRowPadding = 128;

struct Backward {
    const void *q, *k, *v, *dout;
    void *dq, *dk, *dv;
    Strides q_strides, k_strides, v_strides, dout_strides, dq_strides, dk_strides, dv_strides;
    // (head_groups, padded_rows) each. lses: base 2; infinity for a row that sees no key or does not exist, so that its
    // weights are zero.
    float *lses, *deltas;
    // On Hopper, else null. dq_sums: for each tile of kDqRows rows of a head group the sums of dQ in float32, in the order
    // of the registers of a wgmma: (D / 8, 128 threads, 4). dq_counts: how many tiles of keys have added to them.
    float* dq_sums;
    uint32_t* dq_counts;
    uint32_t* next_item;   // of work, which blocks take in order
    int item_count;
    AttentionMask mask;
    float scale, exponent_scale;   // of the scores; the same for exponents of 2
    int H, Hkv, D, heads_per_tile, head_groups, padded_rows;
    int sharing;                              // head groups that share a key/value head
    int tile_queries;                         // of kDqRows rows
    int64_t kv_bytes;                         // of the keys and values of a head group
    TileScheduler scheduler, row_scheduler;   // of tiles of keys and of rows
};

struct RowLayout {
    int heads_per_tile, head_groups, padded_rows;
    int64_t dq_sums, dq_counts;   // numbers of elements

    int64_t rows() const { return int64_t{head_groups} * padded_rows; }
};

inline RowLayout row_layout_of(const AttentionShape& s, bool hopper) {
    const int heads_per_tile = choose_heads_per_tile(s, hopper);
    RowLayout layout = {heads_per_tile, static_cast<int>(s.B * s.H / heads_per_tile),
                        divide_up(static_cast<int>(s.Tq) * heads_per_tile, kRowPadding) * kRowPadding, 0, 0};
    if (hopper) {
        layout.dq_sums = layout.rows() * hopper::backward_columns(s.D);
        layout.dq_counts = layout.rows() / hopper::kDqRows;
    }
    return layout;
}

inline Backward backward_arguments(const AttentionBackward& a) {
    const AttentionShape& s = a.shape;
    const bool hopper = a.execution.device.hopper;
    const RowLayout layout = row_layout_of(s, hopper);
    auto* const lses = static_cast<float*>(a.execution.workspace);
    float *const deltas = lses + layout.rows(), *const dq_sums = deltas + layout.rows();
    return {
        .q = a.q,
        .k = a.k,
        .v = a.v,
        .dout = a.dout,
        .dq = a.dq,
        .dk = a.dk,
        .dv = a.dv,
        .q_strides = a.q_strides,
        .k_strides = a.k_strides,
        .v_strides = a.v_strides,
        .dout_strides = a.dout_strides,
        .dq_strides = a.dq_strides,
        .dk_strides = a.dk_strides,
        .dv_strides = a.dv_strides,
        .lses = lses,
        .deltas = deltas,
        .dq_sums = hopper ? dq_sums : nullptr,
        .dq_counts = hopper ? reinterpret_cast<uint32_t*>(dq_sums + layout.dq_sums) : nullptr,
        .next_item = hopper ? reinterpret_cast<uint32_t*>(dq_sums + layout.dq_sums) + layout.dq_counts : nullptr,
        .mask = make_mask(s),
        .scale = static_cast<float>(s.scale),
        .exponent_scale = static_cast<float>(s.scale / std::log(2.0)),
        .H = static_cast<int>(s.H),
        .Hkv = static_cast<int>(s.Hkv),
        .D = static_cast<int>(s.D),
        .heads_per_tile = layout.heads_per_tile,
        .head_groups = layout.head_groups,
        .padded_rows = layout.padded_rows,
        .sharing = static_cast<int>(s.H / s.Hkv) / layout.heads_per_tile,
        .tile_queries = hopper::kDqRows / layout.heads_per_tile,
        .kv_bytes = 4 * s.Tk * s.D,
        .scheduler = {},   // both depend on the tile
        .row_scheduler = {},
    };
}

namespace hopper {
void backward(const AttentionBackward&, const Backward&);
}

}   // namespace nanochat::cuda::attention
