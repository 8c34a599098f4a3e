// The checks of the operators' arguments before a kernel gets raw pointers. Every message names the operator, the
// argument, what was given and what is allowed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/kernels.h"

namespace nanochat {

// Runs a kernel; std::invalid_argument becomes a ValueError in Python.
template <class Kernel>
void run_kernel(Kernel&& kernel) {
    try {
        kernel();
    } catch (const std::invalid_argument& error) {
        TORCH_CHECK_VALUE(false, error.what());
    }
}

inline DType dtype_of(const char* op, const char* name, at::ScalarType type, at::ArrayRef<at::ScalarType> taken) {
    if (std::find(taken.begin(), taken.end(), type) == taken.end()) {
        TORCH_CHECK_TYPE(false, op, ": ", name, " must have one of the dtypes ", taken, ", got ", type);
    }
    switch (type) {
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

inline DType dtype_of(const char* op, const char* name, const at::Tensor& tensor, at::ArrayRef<at::ScalarType> taken) {
    return dtype_of(op, name, tensor.scalar_type(), taken);
}

// The type that numbers of `type` are summed in.
inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_like(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype,
                       at::Device device, at::IntArrayRef shape) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, " must have dtype ", dtype, ", got ",
                     tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.device() == device, op, ": ", name, " must be on ", device, ", got ", tensor.device());
    TORCH_CHECK_VALUE(tensor.sizes() == shape, op, ": ", name, " must have shape ", shape, ", got ", tensor.sizes());
}

inline void check_eps(const char* op, double eps) {
    TORCH_CHECK_VALUE(eps >= 0, op, ": eps must be at least 0, got ", eps);
}

// Checks that a tensor has the shape (..., C), C at least 1, and returns its type.
inline DType check_rows(const char* op, const char* name, const at::Tensor& tensor,
                        at::ArrayRef<at::ScalarType> taken) {
    TORCH_CHECK_VALUE(tensor.dim() >= 1 && tensor.size(-1) >= 1, op, ": ", name,
                      " must have shape (..., C), C at least 1, got ", tensor.sizes());
    return dtype_of(op, name, tensor.scalar_type(), taken);
}

// The shape of a tensor (..., C) without C.
inline at::IntArrayRef shape_of_rows(const at::Tensor& tensor) { return tensor.sizes().slice(0, tensor.dim() - 1); }

// A list of tensors that a kernel reads or updates through bare pointers.
struct TensorList {
    const char* name;
    at::TensorList tensors;
    bool updated;
};

// Checks that the lists have equal lengths, and that each tensor is contiguous and has the shape of the tensor at the same
// place in the first list.
inline void check_lists(const char* op, const std::vector<TensorList>& lists) {
    const TensorList& first = lists[0];
    for (const TensorList& list : lists) {
        TORCH_CHECK_VALUE(list.tensors.size() == first.tensors.size(), op, ": ", list.name, " must have ",
                          first.tensors.size(), " tensors, as ", first.name, ", got ", list.tensors.size());
        for (size_t i = 0; i < list.tensors.size(); ++i) {
            const at::Tensor& tensor = list.tensors[i];
            check_like(op, list.name, tensor, list.tensors[0].scalar_type(), first.tensors[0].device(),
                       first.tensors[i].sizes());
            TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", list.name, "[", i, "] must be contiguous, got strides ",
                              tensor.strides());
        }
    }
}

// Checks that no updated tensor shares memory with another tensor of the lists. All are contiguous.
inline void check_no_overlap(const char* op, const std::vector<TensorList>& lists) {
    struct Memory {
        const char *begin, *end;
        const TensorList* list;
        size_t index;
    };
    std::vector<Memory> spans;
    for (const TensorList& list : lists) {
        for (size_t i = 0; i < list.tensors.size(); ++i) {
            const char* begin = static_cast<const char*>(list.tensors[i].const_data_ptr());
            if (list.tensors[i].numel() > 0) spans.push_back({begin, begin + list.tensors[i].nbytes(), &list, i});
        }
    }
    std::sort(spans.begin(), spans.end(), [](const Memory& a, const Memory& b) { return a.begin < b.begin; });
    const Memory *furthest = nullptr, *furthest_updated = nullptr;
    for (const Memory& span : spans) {
        const Memory* other = span.list->updated ? furthest : furthest_updated;
        TORCH_CHECK_VALUE(!other || other->end <= span.begin, op, ": tensors must not overlap, but ", span.list->name,
                          "[", span.index, "] and ", other ? other->list->name : "", "[", other ? other->index : 0,
                          "] share memory");
        if (!furthest || span.end > furthest->end) furthest = &span;
        if (span.list->updated && (!furthest_updated || span.end > furthest_updated->end)) furthest_updated = &span;
    }
}

// Tells autograd that tensors that it may have saved have changed.
inline void mark_updated(at::TensorList tensors) {
    for (const at::Tensor& tensor : tensors) {
        if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    }
}

inline void check_not_empty(const char* op, const char* name, at::TensorList tensors) {
    TORCH_CHECK_VALUE(!tensors.empty(), op, ": ", name, " must hold at least one tensor, got none");
}

// Checks that there is at least one tensor and that all have one shape.
inline void check_one_shape(const char* op, const char* name, at::TensorList tensors) {
    check_not_empty(op, name, tensors);
    for (const at::Tensor& tensor : tensors) {
        TORCH_CHECK_VALUE(tensor.sizes() == tensors[0].sizes(), op, ": ", name, " must have one shape, got ",
                          tensors[0].sizes(), " and ", tensor.sizes());
    }
}

inline AttentionShape check_attention(const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      bool causal, int64_t window, double scale,
                                      const std::optional<at::Tensor>& lengths) {
    TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4, op,
                      ": q and k must have the shapes (B, Tq, H, D) and (B, Tk, Hkv, D), got ", q.sizes(), " and ",
                      k.sizes());
    TORCH_CHECK_VALUE(q.size(0) == k.size(0) && q.size(3) == k.size(3) && q.size(3) > 0, op,
                      ": q and k must have the same B and D, D at least 1, got ", q.sizes(), " and ", k.sizes());
    TORCH_CHECK_VALUE(k.size(2) > 0 && q.size(2) > 0 && q.size(2) % k.size(2) == 0, op,
                      ": H must be a multiple of Hkv, got ", q.size(2), " and ", k.size(2));
    TORCH_CHECK_VALUE(window >= -1, op, ": window must be -1 (none) or the number of earlier keys, got ", window);
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

// Checks all arguments of linear_cross_entropy except the range of the targets, and returns the type of x.
inline DType check_linear_cross_entropy(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& targets,
                                        double softcap, c10::string_view reduction,
                                        at::ArrayRef<at::ScalarType> taken) {
    const char* op = "linear_cross_entropy";
    TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && weight.numel() > 0, op,
                      ": x and weight must have the shapes (N, C) and (V, C), got ", x.sizes(), " and ",
                      weight.sizes());
    TORCH_CHECK_VALUE(softcap >= 0, op, ": softcap must be at least 0, got ", softcap);
    TORCH_CHECK_VALUE(reduction == "mean" || reduction == "sum" || reduction == "none", op,
                      ": reduction must be mean, sum or none, got ", reduction);
    const DType dtype = dtype_of(op, "x", x, taken);
    check_like(op, "weight", weight, x.scalar_type(), x.device(), weight.sizes());
    check_like(op, "targets", targets, at::kLong, x.device(), {x.size(0)});
    return dtype;
}

}   // namespace nanochat
