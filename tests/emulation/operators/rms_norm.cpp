// DType: integers. All addresses are the device's; one that may be null is 0.
#include "../../../csrc/cuda/rms_norm.cu"

#include "reader.h"

using namespace nanochat;

// x, residual or 0, sum or 0, y (N, C), r (N) float32, N, C, DType, eps
ENTRY(rms_norm) {
    Reader read{arguments};
    RMSNorm a = {};
    a.x = read;
    a.residual = read;
    a.sum = read;
    a.y = read;
    a.r = read;
    a.N = read;
    a.C = read;
    a.dtype = read;
    a.eps = read;
    cuda::rms_norm(a);
}

// dy, y (N, C), r (N) float32, dsum (N, C) or 0, dx (N, C), N, C, DType
ENTRY(rms_norm_backward) {
    Reader read{arguments};
    RMSNormBackward a = {};
    a.dy = read;
    a.y = read;
    a.r = read;
    a.dsum = read;
    a.dx = read;
    a.N = read;
    a.C = read;
    a.dtype = read;
    cuda::rms_norm_backward(a);
}

// table (V, C), tokens (N) int64, y (N, C), r (N) float32, N, C, V, DType of the table, DType of y, eps
ENTRY(embedding_rms_norm) {
    Reader read{arguments};
    EmbeddingRMSNorm a = {};
    a.table = read;
    a.tokens = read;
    a.y = read;
    a.r = read;
    a.N = read;
    a.C = read;
    a.V = read;
    a.table_dtype = read;
    a.dtype = read;
    a.eps = read;
    cuda::embedding_rms_norm(a);
}
