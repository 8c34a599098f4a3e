// Arguments as in adamw.cpp.
#include "../../../csrc/cuda/attention_forward.cu"
#include "../../../csrc/cuda/attention_forward_hopper.cu"

#include "attention_reader.h"

using namespace nanochat;

// q, k, v, out, lse, then their strides (q, k, v, out: b, t, h each), lengths (B) int64 or 0, B, Tq, Tk, H, Hkv, D,
// causal, window, scale, DType, multiprocessors, hopper, workspace, its bytes
ENTRY(attention_forward) {
    Reader read{arguments};
    AttentionForward a = {};
    a.q = read;
    a.k = read;
    a.v = read;
    a.out = read;
    a.lse = read;
    for (Strides* strides : {&a.q_strides, &a.k_strides, &a.v_strides, &a.out_strides}) read_strides(read, *strides);
    a.lengths = read;
    read_shape(read, a.shape);
    a.dtype = read;
    a.execution.device = read_device(read);
    a.execution.workspace = read;
    require_workspace(read, cuda::attention_forward_workspace_bytes(a));
    cuda::attention_forward(a);
}

// tiles, units, section, last_first, then (tiles * units, 2) int32 on the host: tile and unit of each item
ENTRY(places) {
    Reader read{arguments};
    const int64_t tiles = read, units = read, section = read;
    const cuda::attention::Order order = {static_cast<int>(tiles), static_cast<int>(units), static_cast<int>(section),
                                          read};
    int* to = read;
    for (int item = 0; item < order.items(); ++item) {
        const auto [tile, unit] = order(item);
        *to++ = tile;
        *to++ = unit;
    }
}
