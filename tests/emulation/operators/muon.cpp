// DType, bool: integers. A list is the addresses of its tensors; `numels` and lists lie on the host, all else on the
// device. An address that may be null is 0.
#include "../../../csrc/cuda/muon.cu"

#include "reader.h"

using namespace nanochat;

// Lists grads, momentum_buffers, then update (count, numel), norms (count) float64 or 0, count, numel, grad DType,
// momentum, nesterov, momentum_address, workspace, its bytes, multiprocessors
ENTRY(muon_momentum) {
    Reader read{arguments};
    MuonMomentum a = {};
    a.grads = static_cast<const void* const*>(static_cast<void**>(read));
    a.momentum_buffers = static_cast<float**>(read);
    a.update = read;
    a.norms = read;
    a.count = read;
    a.numel = read;
    a.grad_dtype = read;
    a.momentum = read;
    a.nesterov = read;
    a.momentum_address = read;
    a.execution.workspace = read;
    require_workspace(read, cuda::muon_momentum_workspace_bytes(a));
    const int64_t multiprocessors = read;
    a.execution.device.multiprocessors = static_cast<int>(multiprocessors);
    cuda::muon_momentum(a);
}

// List params, list copies or 0, then update (count, numel), count, numel, param DType, lr, weight_decay, scale, cautious, lr_address,
// weight_decay_address, multiprocessors
ENTRY(muon_update) {
    Reader read{arguments};
    MuonUpdate a = {};
    a.params = static_cast<void**>(read);
    a.copies = static_cast<void**>(read);
    a.update = read;
    a.count = read;
    a.numel = read;
    a.param_dtype = read;
    a.lr = read;
    a.weight_decay = read;
    a.scale = read;
    a.cautious = read;
    a.lr_address = read;
    a.weight_decay_address = read;
    const int64_t multiprocessors = read;
    a.execution.device.multiprocessors = static_cast<int>(multiprocessors);
    cuda::muon_update(a);
}
