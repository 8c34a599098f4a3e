// What the operators check before a kernel gets raw pointers. Every message names the operator, the argument, what it
// got and what it takes.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../csrc/kernels.h"

namespace nanochat {

// A kernel's own refusals reach Python as ValueError.
template <class Kernel>
void run_kernel(Kernel&& kernel) {
    try {
        kernel();
    } catch (const std::invalid_argument& error) {
        TORCH_CHECK_VALUE(false, error.what());
    }
}

inline DType dtype_of(const char* op, const char* name, const at::Tensor& tensor, at::ArrayRef<at::ScalarType> taken) {
    if (std::find(taken.begin(), taken.end(), tensor.scalar_type()) == taken.end()) {
        TORCH_CHECK_TYPE(false, op, ": ", name, " is ", tensor.scalar_type(), "; takes ", taken);
    }
    switch (tensor.scalar_type()) {
        case at::kDouble:
            return DType::float64;
        case at::kBFloat16:
            return DType::bfloat16;
        case at::kHalf:
            return DType::float16;
        default:
            return DType::float32;
    }
}

inline void check_like(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype,
                       at::Device device, at::IntArrayRef shape) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, " is ", tensor.scalar_type(), "; takes ", dtype);
    TORCH_CHECK_VALUE(tensor.device() == device, op, ": ", name, " is on ", tensor.device(), "; takes ", device);
    TORCH_CHECK_VALUE(tensor.sizes() == shape, op, ": ", name, " has shape ", tensor.sizes(), "; takes ", shape);
}

// A list of tensors that a kernel reads or updates through bare pointers.
struct TensorList {
    const char* name;
    at::TensorList tensors;
    bool updated;
};

// Each tensor: contiguous, and of the shape of the first list's tensor at its place.
inline void check_lists(const char* op, const std::vector<TensorList>& lists) {
    const TensorList& first = lists[0];
    for (const TensorList& list : lists) {
        TORCH_CHECK_VALUE(list.tensors.size() == first.tensors.size(), op, ": ", list.name, " has ",
                          list.tensors.size(), " tensors; takes ", first.tensors.size(), ", as ", first.name);
        for (size_t i = 0; i < list.tensors.size(); ++i) {
            const at::Tensor& tensor = list.tensors[i];
            check_like(op, list.name, tensor, list.tensors[0].scalar_type(), first.tensors[0].device(),
                       first.tensors[i].sizes());
            TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", list.name, "[", i, "] has strides ", tensor.strides(),
                              "; takes a contiguous tensor");
        }
    }
}

// No updated tensor may share memory with another one of the lists (all contiguous).
inline void check_no_overlap(const char* op, const std::vector<TensorList>& lists) {
    struct Span {
        const char *begin, *end;
        const TensorList* list;
        size_t index;
    };
    std::vector<Span> spans;
    for (const TensorList& list : lists) {
        for (size_t i = 0; i < list.tensors.size(); ++i) {
            const char* begin = static_cast<const char*>(list.tensors[i].const_data_ptr());
            if (list.tensors[i].numel() > 0) spans.push_back({begin, begin + list.tensors[i].nbytes(), &list, i});
        }
    }
    std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    const Span *furthest = nullptr, *furthest_updated = nullptr;
    for (const Span& span : spans) {
        const Span* other = span.list->updated ? furthest : furthest_updated;
        TORCH_CHECK_VALUE(!other || other->end <= span.begin, op, ": ", span.list->name, "[", span.index, "] and ",
                          other ? other->list->name : "", "[", other ? other->index : 0,
                          "] share memory; takes tensors that do not overlap");
        if (!furthest || span.end > furthest->end) furthest = &span;
        if (span.list->updated && (!furthest_updated || span.end > furthest_updated->end)) furthest_updated = &span;
    }
}

// Tells autograd that a tensor it may have saved has changed.
inline void mark_updated(at::TensorList tensors) {
    for (const at::Tensor& tensor : tensors) {
        if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    }
}

// Where a number lies that a tensor stands for: 0-d, of T, on `device`. Null without a tensor.
template <class T>
const T* number_address(const char* op, const char* name, const std::optional<at::Tensor>& tensor, at::Device device) {
    if (!tensor) return nullptr;
    check_like(op, name, *tensor, c10::CppTypeToScalarType<T>::value, device, {});
    return tensor->const_data_ptr<T>();
}

inline void check_not_empty(const char* op, const char* name, at::TensorList tensors) {
    TORCH_CHECK_VALUE(!tensors.empty(), op, ": ", name, " is empty; takes at least one tensor");
}

// At least one tensor, all of one shape.
inline void check_one_shape(const char* op, const char* name, at::TensorList tensors) {
    check_not_empty(op, name, tensors);
    for (const at::Tensor& tensor : tensors) {
        TORCH_CHECK_VALUE(tensor.sizes() == tensors[0].sizes(), op, ": ", name, " has shapes ", tensors[0].sizes(),
                          " and ", tensor.sizes(), "; takes one shape");
    }
}

// (count, *shape), of tensors of one shape.
inline std::vector<int64_t> stacked_shape(at::TensorList tensors) {
    std::vector<int64_t> shape = tensors[0].sizes().vec();
    shape.insert(shape.begin(), static_cast<int64_t>(tensors.size()));
    return shape;
}

// --- attention: checks and native arguments ---

inline AttentionShape check_attention(const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      bool causal, int64_t window, double scale,
                                      const std::optional<at::Tensor>& lengths) {
    TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, op, ": q has shape ", q.sizes(), ", k ", k.sizes(),
                      "; takes (B, Tq, H, D) and (B, Tk, Hkv, D)");
    TORCH_CHECK_VALUE(q.size(0) == k.size(0) && q.size(3) == k.size(3) && q.size(3) > 0, op, ": q ", q.sizes(),
                      " and k ", k.sizes(), " do not fit; takes the same B and D, D at least 1");
    TORCH_CHECK_VALUE(k.size(2) > 0 && q.size(2) > 0 && q.size(2) % k.size(2) == 0, op, ": H is ", q.size(2),
                      ", Hkv is ", k.size(2), "; takes H a multiple of Hkv");
    TORCH_CHECK_VALUE(window >= -1, op, ": window is ", window, "; takes -1 (none) or the number of earlier keys");
    check_like(op, "k", k, q.scalar_type(), q.device(), k.sizes());
    check_like(op, "v", v, q.scalar_type(), q.device(), k.sizes());
    if (lengths) check_like(op, "lengths", *lengths, at::kLong, q.device(), {q.size(0)});
    return {
        .B = q.size(0),
        .Tq = q.size(1),
        .Tk = k.size(1),
        .H = q.size(2),
        .Hkv = k.size(2),
        .D = q.size(3),
        .causal = causal || window >= 0,
        .window = window,
        .scale = scale,
    };
}

inline void check_attention_results(const char* op, const AttentionShape& shape, const at::Tensor& q,
                                    const at::Tensor& dout, const at::Tensor& out, const at::Tensor& lse,
                                    at::ScalarType lse_type) {
    check_like(op, "dout", dout, q.scalar_type(), q.device(), q.sizes());
    check_like(op, "out", out, q.scalar_type(), q.device(), q.sizes());
    check_like(op, "lse", lse, lse_type, q.device(), {shape.B, shape.H, shape.Tq});
}

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

// --- The optimizers' checks and native arguments, from the operators' arguments in the order of the schema; `storage`
// is what the native arguments point to.

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
    // A GPU's memory is not read: the host would wait for its stream.
    const int64_t known_step = step_address && device.is_cpu() ? *step_address : step;
    TORCH_CHECK_VALUE(known_step >= 1, op, ": step is ", known_step, "; takes at least 1");
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

// Holds the results too, which are allocated once the arguments are checked.
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
    TORCH_CHECK_VALUE(update.is_contiguous(), op, ": update has strides ", update.strides(),
                      "; takes a contiguous tensor");
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

// What the arguments point to.
struct NewtonSchulzStorage {
    at::Tensor g, norms;   // contiguous
};

inline NewtonSchulz newton_schulz_arguments(const char* op, const char* name, const at::Tensor& g,
                                            at::ArrayRef<double> coefficients, double norm_factor,
                                            const std::optional<at::Tensor>& norms, at::ArrayRef<at::ScalarType> taken,
                                            NewtonSchulzStorage& storage) {
    TORCH_CHECK_VALUE(g.dim() >= 2, op, ": ", name, " has shape ", g.sizes(), "; takes (..., M, K)");
    TORCH_CHECK_VALUE(!coefficients.empty() && coefficients.size() % 3 == 0, op, ": coefficients has ",
                      coefficients.size(), " numbers; takes three for each step");
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

// The two of newton_schulz_update_, of which `update` is newton_schulz's g.
inline std::pair<NewtonSchulz, MuonUpdate> newton_schulz_update_arguments(
    at::TensorList params, const at::Tensor& update, at::ArrayRef<double> coefficients, double norm_factor,
    const std::optional<at::Tensor>& norms, double lr, double weight_decay, double scale, bool cautious,
    const std::optional<at::Tensor>& lr_tensor, const std::optional<at::Tensor>& weight_decay_tensor,
    NewtonSchulzStorage& newton_schulz_storage, std::vector<void*>& storage) {
    const char* op = "newton_schulz_update_";
    const MuonUpdate muon = muon_update_arguments(op, params, update, lr, weight_decay, scale, cautious, lr_tensor,
                                                  weight_decay_tensor, storage);
    TORCH_CHECK_VALUE(params[0].dim() >= 2, op, ": params has shape ", params[0].sizes(), "; takes (..., M, K)");
    return {newton_schulz_arguments(op, "update", update, coefficients, norm_factor, norms, {at::kFloat},
                                    newton_schulz_storage),
            muon};
}

// All of linear_cross_entropy's, except that the targets' range is for those who may read it. Returns x's type.
inline DType check_linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& targets,
                                        double softcap, c10::string_view reduction,
                                        at::ArrayRef<at::ScalarType> taken) {
    const char* op = "linear_cross_entropy";
    TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && weight.numel() > 0, op,
                      ": x has shape ", x.sizes(), ", weight ", weight.sizes(), "; takes (N, C) and (V, C)");
    TORCH_CHECK_VALUE(softcap >= 0, op, ": softcap is ", softcap, "; takes at least 0");
    TORCH_CHECK_VALUE(reduction == "mean" || reduction == "sum" || reduction == "none", op, ": reduction is ",
                      reduction, "; takes mean, sum or none");
    const DType dtype = dtype_of(op, "x", x, taken);
    check_like(op, "weight", weight, x.scalar_type(), x.device(), weight.sizes());
    check_like(op, "targets", targets, at::kLong, x.device(), {x.size(0)});
    return dtype;
}

}   // namespace nanochat
