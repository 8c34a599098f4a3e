// The operators on CUDA tensors: check, allocate, call csrc/kernels.h on the current stream of the tensors' device.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "tensor_checks.h"

namespace nanochat {
namespace {

// A cudaStream_t. Through the generic interface: torch's own CUDA headers do not compile against a CPU-only torch.
void* current_stream(at::Device device) {
    return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

void adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
            int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
            bool stochastic_rounding, int64_t seed) {
    std::vector<AdamWTensor> tensors;
    const AdamW arguments = adamw_arguments(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps,
                                            weight_decay, stochastic_rounding, seed, tensors);
    const c10::DeviceGuard guard(params[0].device());
    run_kernel([&] { cuda::adamw(arguments, current_stream(params[0].device())); });
    for (at::TensorList updated : {params, exp_avgs, exp_avg_sqs}) mark_updated(updated);
}

}   // namespace
}   // namespace nanochat

TORCH_LIBRARY_IMPL(nanochat_native, CUDA, m) { m.impl("adamw_", nanochat::adamw_); }
