// Builds the kernels' structs of csrc/kernels.h from the operators' arguments, which are in the order of the schema. What
// a struct points to lives in the tensors, or in `storage`.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <utility>
#include <vector>

#include "../csrc/kernels.h"
#include "tensor_checks.h"

namespace nanochat {

// Returns the address of the number in a 0-d tensor of T on `device`, or null if there is no tensor.
template <class T>
const T* number_address(const char* op, const char* name, const std::optional<at::Tensor>& tensor, at::Device device) {
    if (!tensor) return nullptr;
    check_like(op, name, *tensor, c10::CppTypeToScalarType<T>::value, device, {});
    return tensor->const_data_ptr<T>();
}

// Returns (count, *shape) for tensors of one shape.
inline std::vector<int64_t> stacked_shape(at::TensorList tensors) {
    std::vector<int64_t> shape = tensors[0].sizes().vec();
    shape.insert(shape.begin(), static_cast<int64_t>(tensors.size()));
    return shape;
}

// --- attention ---

inline Strides strides_of(const at::Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

inline AttentionForward attention_forward_arguments(const AttentionShape& shape, DType dtype, const at::Tensor& q,
                                                    const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                                                    const at::Tensor& lse, const at::Tensor& lengths) {
    return {.shape = shape,
            .dtype = dtype,
            .q = q.const_data_ptr(),
            .k = k.const_data_ptr(),
            .v = v.const_data_ptr(),
            .out = out.mutable_data_ptr(),
            .q_strides = strides_of(q),
            .k_strides = strides_of(k),
            .v_strides = strides_of(v),
            .out_strides = strides_of(out),
            .lse = lse.mutable_data_ptr(),
            .lengths = lengths.defined() ? lengths.const_data_ptr<int64_t>() : nullptr};
}

inline AttentionBackward attention_backward_arguments(const AttentionShape& shape, DType dtype, const at::Tensor& q,
                                                      const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                                                      const at::Tensor& dout, const at::Tensor& lse,
                                                      const at::Tensor& dq, const at::Tensor& dk,
                                                      const at::Tensor& dv) {
    return {.shape = shape,
            .dtype = dtype,
            .q = q.const_data_ptr(),
            .k = k.const_data_ptr(),
            .v = v.const_data_ptr(),
            .out = out.const_data_ptr(),
            .dout = dout.const_data_ptr(),
            .lse = lse.const_data_ptr(),
            .dq = dq.mutable_data_ptr(),
            .dk = dk.mutable_data_ptr(),
            .dv = dv.mutable_data_ptr(),
            .q_strides = strides_of(q),
            .k_strides = strides_of(k),
            .v_strides = strides_of(v),
            .out_strides = strides_of(out),
            .dout_strides = strides_of(dout),
            .dq_strides = strides_of(dq),
            .dk_strides = strides_of(dk),
            .dv_strides = strides_of(dv)};
}

// --- optimizers ---

inline AdamW adamw_arguments(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                             at::TensorList exp_avg_sqs, int64_t step, double lr, double beta1, double beta2,
                             double eps, double weight_decay, bool stochastic_rounding, int64_t seed, bool cautious,
                             const std::optional<at::Tensor>& step_tensor, const std::optional<at::Tensor>& lr_tensor,
                             const std::optional<at::Tensor>& weight_decay_tensor, std::vector<AdamWTensor>& storage) {
    const char* op = "adamw_";
    check_not_empty(op, "params", params);
    const std::vector<TensorList> lists = {{"params", params, true},
                                           {"grads", grads, false},
                                           {"exp_avgs", exp_avgs, true},
                                           {"exp_avg_sqs", exp_avg_sqs, true}};
    check_lists(op, lists);
    check_no_overlap(op, lists);
    const at::Device device = params[0].device();
    const int64_t* step_address = number_address<int64_t>(op, "step", step_tensor, device);
    // The number in a GPU's memory is not checked: the host would have to wait for the stream.
    const int64_t known_step = step_address && device.is_cpu() ? *step_address : step;
    TORCH_CHECK_VALUE(known_step >= 1, op, ": step must be at least 1, got ", known_step);
    const DType param_dtype = dtype_of(op, "params", params[0], {at::kFloat, at::kBFloat16});
    const DType moment_dtype = dtype_of(op, "exp_avgs", exp_avgs[0], {at::kFloat, params[0].scalar_type()});
    dtype_of(op, "grads", grads[0], {params[0].scalar_type()});
    dtype_of(op, "exp_avg_sqs", exp_avg_sqs[0], {exp_avgs[0].scalar_type()});
    for (size_t i = 0; i < params.size(); ++i) {
        storage.push_back({
            .param = params[i].mutable_data_ptr(),
            .grad = grads[i].const_data_ptr(),
            .exp_avg = exp_avgs[i].mutable_data_ptr(),
            .exp_avg_sq = exp_avg_sqs[i].mutable_data_ptr(),
            .numel = params[i].numel(),
        });
    }
    return {.tensors = storage.data(),
            .count = static_cast<int64_t>(storage.size()),
            .param_dtype = param_dtype,
            .moment_dtype = moment_dtype,
            .step = step,
            .lr = lr,
            .beta1 = beta1,
            .beta2 = beta2,
            .eps = eps,
            .weight_decay = weight_decay,
            .stochastic_rounding = stochastic_rounding,
            .seed = static_cast<uint64_t>(seed),
            .cautious = cautious,
            .step_address = step_address,
            .lr_address = number_address<double>(op, "lr", lr_tensor, device),
            .weight_decay_address = number_address<double>(op, "weight_decay", weight_decay_tensor, device)};
}

// Also holds the results, which are allocated after the arguments have been checked.
struct MuonMomentumStorage {
    std::vector<const void*> grads;
    std::vector<float*> momentum_buffers;
    at::Tensor update, norms;
};

inline MuonMomentum muon_momentum_arguments(at::TensorList grads, at::TensorList momentum_buffers, double momentum,
                                            bool nesterov, bool with_norms,
                                            const std::optional<at::Tensor>& momentum_tensor,
                                            MuonMomentumStorage& storage) {
    const char* op = "muon_momentum_";
    check_one_shape(op, "grads", grads);
    const std::vector<TensorList> lists = {{"grads", grads, false}, {"momentum_buffers", momentum_buffers, true}};
    check_lists(op, lists);
    check_no_overlap(op, lists);
    const DType grad_dtype = dtype_of(op, "grads", grads[0], {at::kFloat, at::kBFloat16});
    dtype_of(op, "momentum_buffers", momentum_buffers[0], {at::kFloat});
    const double* momentum_address = number_address<double>(op, "momentum", momentum_tensor, grads[0].device());
    const int64_t count = static_cast<int64_t>(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
        storage.grads.push_back(grads[i].const_data_ptr());
        storage.momentum_buffers.push_back(momentum_buffers[i].mutable_data_ptr<float>());
    }
    storage.update = at::empty(stacked_shape(grads), grads[0].options().dtype(at::kFloat));
    storage.norms = at::empty({with_norms ? count : 0}, grads[0].options().dtype(at::kDouble));
    return {.grads = storage.grads.data(),
            .momentum_buffers = storage.momentum_buffers.data(),
            .update = storage.update.mutable_data_ptr<float>(),
            .norms = with_norms ? storage.norms.mutable_data_ptr<double>() : nullptr,
            .count = count,
            .numel = grads[0].numel(),
            .grad_dtype = grad_dtype,
            .momentum = momentum,
            .nesterov = nesterov,
            .momentum_address = momentum_address};
}

inline MuonUpdate muon_update_arguments(const char* op, at::TensorList params, const at::Tensor& update, double lr,
                                        double weight_decay, double scale, bool cautious,
                                        const std::optional<at::Tensor>& lr_tensor,
                                        const std::optional<at::Tensor>& weight_decay_tensor,
                                        std::vector<void*>& storage) {
    check_one_shape(op, "params", params);
    const std::vector<TensorList> lists = {{"params", params, true}};
    check_lists(op, lists);
    const at::Device device = params[0].device();
    check_like(op, "update", update, at::kFloat, device, stacked_shape(params));
    TORCH_CHECK_VALUE(update.is_contiguous(), op, ": update must be contiguous, got strides ", update.strides());
    check_no_overlap(op, {lists[0], {"update", update, false}});
    const DType param_dtype = dtype_of(op, "params", params[0], {at::kFloat, at::kBFloat16});
    for (const at::Tensor& param : params) storage.push_back(param.mutable_data_ptr());
    return {.params = storage.data(),
            .update = update.const_data_ptr<float>(),
            .count = static_cast<int64_t>(params.size()),
            .numel = params[0].numel(),
            .param_dtype = param_dtype,
            .lr = lr,
            .weight_decay = weight_decay,
            .scale = scale,
            .cautious = cautious,
            .lr_address = number_address<double>(op, "lr", lr_tensor, device),
            .weight_decay_address = number_address<double>(op, "weight_decay", weight_decay_tensor, device)};
}

// --- newton_schulz ---

struct NewtonSchulzStorage {
    at::Tensor g, norms;   // contiguous
};

inline NewtonSchulz newton_schulz_arguments(const char* op, const char* name, const at::Tensor& g,
                                            at::ArrayRef<double> coefficients, double norm_factor,
                                            const std::optional<at::Tensor>& norms, at::ArrayRef<at::ScalarType> taken,
                                            NewtonSchulzStorage& storage) {
    TORCH_CHECK_VALUE(g.dim() >= 2, op, ": ", name, " must have shape (..., M, K), got ", g.sizes());
    TORCH_CHECK_VALUE(!coefficients.empty() && coefficients.size() % 3 == 0, op,
                      ": coefficients must have three numbers for each step, got ", coefficients.size(), " numbers");
    const DType dtype = dtype_of(op, name, g, taken);
    if (norms) check_like(op, "norms", *norms, at::kDouble, g.device(), g.sizes().slice(0, g.dim() - 2));
    storage = {g.contiguous(), norms ? norms->contiguous() : at::Tensor()};
    const int64_t M = g.size(-2), K = g.size(-1);
    return {.batch = g.numel() > 0 ? g.numel() / (M * K) : 0,
            .M = M,
            .K = K,
            .dtype = dtype,
            .g = storage.g.const_data_ptr(),
            .out = nullptr,
            .norms = norms ? storage.norms.const_data_ptr<double>() : nullptr,
            .coefficients = coefficients.data(),
            .steps = static_cast<int64_t>(coefficients.size() / 3),
            .norm_factor = norm_factor};
}

// The arguments of the two parts of newton_schulz_update_. Its `update` is the g of newton_schulz.
inline std::pair<NewtonSchulz, MuonUpdate> newton_schulz_update_arguments(
    at::TensorList params, const at::Tensor& update, at::ArrayRef<double> coefficients, double norm_factor,
    const std::optional<at::Tensor>& norms, double lr, double weight_decay, double scale, bool cautious,
    const std::optional<at::Tensor>& lr_tensor, const std::optional<at::Tensor>& weight_decay_tensor,
    NewtonSchulzStorage& newton_schulz_storage, std::vector<void*>& storage) {
    const char* op = "newton_schulz_update_";
    const MuonUpdate muon = muon_update_arguments(op, params, update, lr, weight_decay, scale, cautious, lr_tensor,
                                                  weight_decay_tensor, storage);
    TORCH_CHECK_VALUE(params[0].dim() >= 2, op, ": params must have shape (..., M, K), got ", params[0].sizes());
    return {newton_schulz_arguments(op, "update", update, coefficients, norm_factor, norms, {at::kFloat},
                                    newton_schulz_storage),
            muon};
}

}   // namespace nanochat
