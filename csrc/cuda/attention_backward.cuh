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
    AttentionMask mask;
    float scale, exponent_scale;   // of the scores; the same for exponents of 2
    int H, Hkv, D, heads_per_tile, head_groups, padded_rows;
    int64_t kv_bytes;                         // of the keys and values of a head group
    TileScheduler scheduler, row_scheduler;   // of tiles of keys and of rows
};

struct RowLayout {
    int heads_per_tile, head_groups, padded_rows;
};

inline RowLayout row_layout_of(const AttentionShape& s, bool hopper) {
    const int heads_per_tile = choose_heads_per_tile(s, hopper);
    return {heads_per_tile, static_cast<int>(s.B * s.H / heads_per_tile),
            divide_up(static_cast<int>(s.Tq) * heads_per_tile, kRowPadding) * kRowPadding};
}

inline Backward backward_arguments(const AttentionBackward& a) {
    const AttentionShape& s = a.shape;
    const auto [heads_per_tile, head_groups, padded_rows] = row_layout_of(s, a.execution.device.hopper);
    auto* const workspace = static_cast<float*>(a.execution.workspace);
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
        .lses = workspace,
        .deltas = workspace + int64_t{head_groups} * padded_rows,
        .mask = make_mask(s),
        .scale = static_cast<float>(s.scale),
        .exponent_scale = static_cast<float>(s.scale / std::log(2.0)),
        .H = static_cast<int>(s.H),
        .Hkv = static_cast<int>(s.Hkv),
        .D = static_cast<int>(s.D),
        .heads_per_tile = heads_per_tile,
        .head_groups = head_groups,
        .padded_rows = padded_rows,
        .kv_bytes = 4 * s.Tk * s.D,
        .scheduler = {},   // both depend on the tile
        .row_scheduler = {},
    };
}

namespace hopper {
void backward(const AttentionBackward&, const Backward&);
}

}   // namespace nanochat::cuda::attention
