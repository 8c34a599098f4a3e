// What the two backward paths of attention have in common: their arguments, and the numbers of each row.
#pragma once

#include "attention_tiles.h"

namespace nanochat::cuda::attention {

constexpr int kRowPadding = 128;   // rows of a unit end at a multiple of what the largest tile takes

struct Backward {
    const void *q, *k, *v, *dout;
    void *dq, *dk, *dv;
    Strides q_strides, k_strides, v_strides, dout_strides, dq_strides, dk_strides, dv_strides;
    // (units, padded_rows) each. lses: base 2, infinity for a row that sees no key or does not exist, so that its
    // weights are zero.
    float *lses, *deltas;
    Sight sight;
    float scale, exponent_scale;   // of the scores; the same for exponents of 2
    int H, Hkv, D, pack, units, padded_rows;
    int64_t unit_bytes;       // of the keys and values that a unit passes over
    Order order, row_order;   // of tiles of keys and of rows
};

struct Packing {
    int pack, units, padded_rows;
};

inline Packing packing_of(const AttentionShape& s, bool hopper) {
    const int pack = packing(s, hopper);
    return {pack, static_cast<int>(s.B * s.H / pack),
            divide_up(static_cast<int>(s.Tq) * pack, kRowPadding) * kRowPadding};
}

inline Backward backward_arguments(const AttentionBackward& a) {
    const AttentionShape& s = a.shape;
    const auto [pack, units, padded_rows] = packing_of(s, a.execution.device.hopper);
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
        .deltas = workspace + int64_t{units} * padded_rows,
        .sight = sight_of(s),
        .scale = static_cast<float>(s.scale),
        .exponent_scale = static_cast<float>(s.scale / std::log(2.0)),
        .H = static_cast<int>(s.H),
        .Hkv = static_cast<int>(s.Hkv),
        .D = static_cast<int>(s.D),
        .pack = pack,
        .units = units,
        .padded_rows = padded_rows,
        .unit_bytes = 4 * s.Tk * s.D,
        .order = {},   // both depend on the tile
        .row_order = {},
    };
}

// Sets p[i] to zero where its key does not see its row: an accumulator whose rows are keys, `key` and key + 8, and
// whose columns are rows of a unit, the lane's first being `first_row`.
template <int count>
NANOCHAT_DEVICE void hide_rows(float (&p)[count], const Sight& sight, int first_row, int pack, int key) {
#pragma unroll
    for (int i = 0; i < count; i += 4) {
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
            const Span visible = sight.keys((first_row + i * 2 + j - i) / pack);
            if (key < visible.begin || key >= visible.end) p[j] = 0;
            if (key + 8 < visible.begin || key + 8 >= visible.end) p[j + 2] = 0;
        }
    }
}

namespace hopper {
void backward(const AttentionBackward&, const Backward&);
}

}   // namespace nanochat::cuda::attention
