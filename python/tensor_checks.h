// What the operators check before a kernel gets raw pointers. Every message names the operator, the argument, what it
// got and what it takes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <stdexcept>
#include <string>
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

// The checks of adamw_ and its native arguments; `tensors` is the storage that they point to.
inline AdamW adamw_arguments(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                             at::TensorList exp_avg_sqs, int64_t step, double lr, double beta1, double beta2,
                             double eps, double weight_decay, bool stochastic_rounding, int64_t seed,
                             std::vector<AdamWTensor>& tensors) {
    const std::vector<TensorList> lists = {{"params", params, true},
                                           {"grads", grads, false},
                                           {"exp_avgs", exp_avgs, true},
                                           {"exp_avg_sqs", exp_avg_sqs, true}};
    check_lists("adamw_", lists);
    check_no_overlap("adamw_", lists);
    TORCH_CHECK_VALUE(step >= 1, "adamw_: step is ", step, "; takes at least 1");
    const DType param_dtype = dtype_of("adamw_", "params", params[0], {at::kFloat, at::kBFloat16});
    const DType moment_dtype = dtype_of("adamw_", "exp_avgs", exp_avgs[0], {at::kFloat, params[0].scalar_type()});
    dtype_of("adamw_", "grads", grads[0], {params[0].scalar_type()});
    dtype_of("adamw_", "exp_avg_sqs", exp_avg_sqs[0], {exp_avgs[0].scalar_type()});
    for (size_t i = 0; i < params.size(); ++i) {
        tensors.push_back({params[i].mutable_data_ptr(), grads[i].const_data_ptr(), exp_avgs[i].mutable_data_ptr(),
                           exp_avg_sqs[i].mutable_data_ptr(), params[i].numel()});
    }
    return {.tensors = tensors.data(),
            .count = static_cast<int64_t>(tensors.size()),
            .param_dtype = param_dtype,
            .moment_dtype = moment_dtype,
            .step = step,
            .lr = lr,
            .beta1 = beta1,
            .beta2 = beta2,
            .eps = eps,
            .weight_decay = weight_decay,
            .stochastic_rounding = stochastic_rounding,
            .seed = static_cast<uint64_t>(seed)};
}

}   // namespace nanochat
