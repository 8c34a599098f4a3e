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

// B, Tq, Tk, H, Hkv, D, causal, window, scale, DType, multiprocessors, hopper, then (2,) int32 on the host: consumers and
// keys of the tile on Hopper
ENTRY(forward_tile) {
    Reader read{arguments};
    AttentionForward a = {};
    read_shape(read, a.shape);
    a.dtype = read;
    a.execution.device = read_device(read);
    int* to = read;
    cuda::attention::hopper::choose_forward(a.shape, a.execution.device, [&](auto tile) {
        to[0] = decltype(tile)::consumers;
        to[1] = decltype(tile)::keys;
    });
}

// tiles, head_groups, section, last_first, then (tiles * head_groups, 2) int32 on the host: tile and head group of each item
ENTRY(places) {
    Reader read{arguments};
    const int64_t tiles = read, head_groups = read, section = read;
    const cuda::attention::TileScheduler scheduler = {static_cast<int>(tiles), static_cast<int>(head_groups),
                                                      static_cast<int>(section), read};
    int* to = read;
    for (int item = 0; item < scheduler.items(); ++item) {
        const auto [tile, head_group] = scheduler.coord(item);
        *to++ = tile;
        *to++ = head_group;
    }
}
