// Arguments as in adamw.cpp.
#include "../../../csrc/cuda/attention_backward.cu"
#include "../../../csrc/cuda/attention_backward_hopper.cu"

#include "attention_reader.h"

using namespace nanochat;

// q, k, v, out, dout, lse, dq, dk, dv, then their strides (q, k, v, out, dout, dq, dk, dv: b, t, h each), B, Tq, Tk, H,
// Hkv, D, causal, window, scale, DType, multiprocessors, hopper, workspace, its bytes
ENTRY(attention_backward) {
    Reader read{arguments};
    AttentionBackward a = {};
    a.q = read;
    a.k = read;
    a.v = read;
    a.out = read;
    a.dout = read;
    a.lse = read;
    a.dq = read;
    a.dk = read;
    a.dv = read;
    for (Strides* strides : {&a.q_strides, &a.k_strides, &a.v_strides, &a.out_strides, &a.dout_strides, &a.dq_strides,
                             &a.dk_strides, &a.dv_strides}) {
        read_strides(read, *strides);
    }
    read_shape(read, a.shape);
    a.dtype = read;
    a.execution.device = read_device(read);
    a.execution.workspace = read;
    require_workspace(read, cuda::attention_backward_workspace_bytes(a));
    cuda::attention_backward(a);
}
