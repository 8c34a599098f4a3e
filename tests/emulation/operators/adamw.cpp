// DType, bool: integers. A list is the addresses of its tensors; `numels` and lists lie on the host, all else on the
// device. An address that may be null is 0.
#include "../../../csrc/cuda/adamw.cu"

#include <vector>

#include "reader.h"

using namespace nanochat;

// Lists params, grads, exp_avgs, exp_avg_sqs, list copies or 0, then numels (count) int64, count, param DType, moment DType, step, lr,
// beta1, beta2, eps, weight_decay, stochastic_rounding, seed, cautious, step_address, lr_address, weight_decay_address,
// workspace, its bytes, multiprocessors
ENTRY(adamw) {
    Reader read{arguments};
    void **params = read, **grads = read, **exp_avgs = read, **exp_avg_sqs = read, **copies = read;
    const int64_t* numels = read;
    AdamW a = {};
    a.count = read;
    std::vector<AdamWTensor> tensors;
    for (int64_t i = 0; i < a.count; ++i) {
        tensors.push_back({params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], copies ? copies[i] : nullptr, numels[i]});
    }
    a.tensors = tensors.data();
    a.param_dtype = read;
    a.moment_dtype = read;
    a.step = read;
    a.lr = read;
    a.beta1 = read;
    a.beta2 = read;
    a.eps = read;
    a.weight_decay = read;
    a.stochastic_rounding = read;
    a.seed = read;
    a.cautious = read;
    a.step_address = read;
    a.lr_address = read;
    a.weight_decay_address = read;
    a.execution.workspace = read;
    require_workspace(read, cuda::adamw_workspace_bytes(a));
    const int64_t multiprocessors = read;
    a.execution.device.multiprocessors = static_cast<int>(multiprocessors);
    cuda::adamw(a);
}
