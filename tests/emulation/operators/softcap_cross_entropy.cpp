// DType, bool: integers. A list is the addresses of its tensors; `numels` and lists lie on the host, all else on the
// device. An address that may be null is 0.
#include "../../../csrc/cuda/softcap_cross_entropy.cu"

#include "reader.h"

using namespace nanochat;

// logits (rows, V), targets (rows) int64, loss (rows) float32, grad_scale (1) float32 or 0, rows, V, DType,
// ignore_index, softcap
ENTRY(softcap_cross_entropy) {
    Reader read{arguments};
    cuda::SoftcapCrossEntropy a = {};
    a.logits = read;
    a.targets = read;
    a.loss = read;
    a.grad_scale = read;
    a.rows = read;
    a.V = read;
    a.dtype = read;
    a.ignore_index = read;
    a.softcap = read;
    cuda::softcap_cross_entropy(a);
}
