// DType: integers. All addresses are the device's; one that may be null is 0.
#include "../../../csrc/cuda/mix_rms_norm.cu"

#include "reader.h"

using namespace nanochat;

// x, residual or 0, x0 (N, C), x_scale, x0_scale float32, z or 0, mixed, y (N, C), r (N) float32, N, C, DType, eps
ENTRY(mix_rms_norm) {
    Reader read{arguments};
    MixRMSNorm a = {};
    a.x = read;
    a.residual = read;
    a.x0 = read;
    a.x_scale = read;
    a.x0_scale = read;
    a.z = read;
    a.mixed = read;
    a.y = read;
    a.r = read;
    a.N = read;
    a.C = read;
    a.dtype = read;
    a.eps = read;
    cuda::mix_rms_norm(a);
}

// dy (N, C), dz, dmixed, add_to (N, C) or 0, y (N, C), r (N) float32, z, x0 (N, C), x_scale, x0_scale float32, dx, dx0
// (N, C), dx_scale, dx0_scale float32, N, C, DType, workspace, its bytes
ENTRY(mix_rms_norm_backward) {
    Reader read{arguments};
    MixRMSNormBackward a = {};
    a.dy = read;
    a.dz = read;
    a.dmixed = read;
    a.add_to = read;
    a.y = read;
    a.r = read;
    a.z = read;
    a.x0 = read;
    a.x_scale = read;
    a.x0_scale = read;
    a.dx = read;
    a.dx0 = read;
    a.dx_scale = read;
    a.dx0_scale = read;
    a.N = read;
    a.C = read;
    a.dtype = read;
    a.execution.workspace = read;
    require_workspace(read, cuda::mix_rms_norm_backward_workspace_bytes(a));
    cuda::mix_rms_norm_backward(a);
}
