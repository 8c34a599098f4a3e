// DType: integers. Strides: b, t, h, in elements. All addresses are the device's.
#include "../../../csrc/cuda/rotary_norm.cu"

#include "attention_reader.h"

using namespace nanochat;

namespace {

// B, T, H, Hkv, D, DType, then cos and sin (T, D / 2) float32 and their strides between rows
template <class Arguments>
void read_problem(Reader& read, Arguments& a) {
    a.B = read;
    a.T = read;
    a.H = read;
    a.Hkv = read;
    a.D = read;
    a.dtype = read;
    a.cos = read;
    a.sin = read;
    a.cos_stride = read;
    a.sin_stride = read;
}

}   // namespace

// The problem, q (B, T, H, D), k (B, T, Hkv, D), their strides, q_out, k_out contiguous, q_r (B, T, H), k_r (B, T, Hkv)
// float32, eps, scale
ENTRY(rotary_norm) {
    Reader read{arguments};
    RotaryNorm a = {};
    read_problem(read, a);
    a.q = read;
    a.k = read;
    read_strides(read, a.q_strides);
    read_strides(read, a.k_strides);
    a.q_out = read;
    a.k_out = read;
    a.q_r = read;
    a.k_r = read;
    a.eps = read;
    a.scale = read;
    cuda::rotary_norm(a);
}

// The problem, dq_out, dk_out, their strides, q_out, k_out, q_r, k_r of rotary_norm, dq, dk contiguous, scale
ENTRY(rotary_norm_backward) {
    Reader read{arguments};
    RotaryNormBackward a = {};
    read_problem(read, a);
    a.dq_out = read;
    a.dk_out = read;
    read_strides(read, a.dq_out_strides);
    read_strides(read, a.dk_out_strides);
    a.q_out = read;
    a.k_out = read;
    a.q_r = read;
    a.k_r = read;
    a.dq = read;
    a.dk = read;
    a.scale = read;
    cuda::rotary_norm_backward(a);
}
