// Arguments as in muon.cpp.
#include "../../../csrc/cuda/normuon.cu"

#include "reader.h"

using namespace nanochat;

// List params, list copies or 0, list second_momentums, then update (count, M, K), count, M, K, param DType, lr, weight_decay, scale,
// cautious, lr_address, weight_decay_address, beta2, eps, renormalise, norm_eps, workspace, its bytes
ENTRY(normuon_update) {
    Reader read{arguments};
    NorMuonUpdate a = {};
    a.params = static_cast<void**>(read);
    a.copies = static_cast<void**>(read);
    a.second_momentums = static_cast<float**>(read);
    a.update = read;
    a.count = read;
    a.M = read;
    a.K = read;
    a.numel = a.M * a.K;
    a.param_dtype = read;
    a.lr = read;
    a.weight_decay = read;
    a.scale = read;
    a.cautious = read;
    a.lr_address = read;
    a.weight_decay_address = read;
    a.beta2 = read;
    a.eps = read;
    a.renormalise = read;
    a.norm_eps = read;
    a.execution.workspace = read;
    require_workspace(read, cuda::normuon_update_workspace_bytes(a));
    cuda::normuon_update(a);
}
