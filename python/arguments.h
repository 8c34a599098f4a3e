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

// --- rms_norm ---

// The inputs as the kernel reads them, contiguous, and the results, which are allocated after the arguments have been
// checked.
struct RMSNormStorage {
    at::Tensor x, residual, sum, y, r;
};

// `taken` are the types that the kernel takes. N may be 0.
inline RMSNorm rms_norm_arguments(const at::Tensor& x, const std::optional<at::Tensor>& residual, double eps,
                                  at::ArrayRef<at::ScalarType> taken, RMSNormStorage& storage) {
    const char* op = "rms_norm";
    const DType dtype = check_rows(op, "x", x, taken);
    check_eps(op, eps);
    if (residual) check_like(op, "residual", *residual, x.scalar_type(), x.device(), x.sizes());
    storage = {.x = x.contiguous(),
               .residual = residual ? residual->contiguous() : at::Tensor(),
               .sum = residual ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options()),
               .y = at::empty(x.sizes(), x.options()),
               .r = at::empty(shape_of_rows(x), x.options().dtype(accumulate_type(x.scalar_type())))};
    return {.N = x.numel() / x.size(-1),
            .C = x.size(-1),
            .dtype = dtype,
            .x = storage.x.const_data_ptr(),
            .residual = residual ? storage.residual.const_data_ptr() : nullptr,
            .sum = residual ? storage.sum.mutable_data_ptr() : nullptr,
            .y = storage.y.mutable_data_ptr(),
            .r = storage.r.mutable_data_ptr(),
            .eps = eps};
}

struct RMSNormBackwardStorage {
    at::Tensor dy, dsum, y, r, dx;
};

inline RMSNormBackward rms_norm_backward_arguments(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
                                                   const at::Tensor& y, const at::Tensor& r,
                                                   at::ArrayRef<at::ScalarType> taken,
                                                   RMSNormBackwardStorage& storage) {
    const char* op = "rms_norm_backward";
    const DType dtype = check_rows(op, "y", y, taken);
    check_like(op, "dy", dy, y.scalar_type(), y.device(), y.sizes());
    if (dsum) check_like(op, "dsum", *dsum, y.scalar_type(), y.device(), y.sizes());
    check_like(op, "r", r, accumulate_type(y.scalar_type()), y.device(), shape_of_rows(y));
    storage = {.dy = dy.contiguous(),
               .dsum = dsum ? dsum->contiguous() : at::Tensor(),
               .y = y.contiguous(),
               .r = r.contiguous(),
               .dx = at::empty(y.sizes(), y.options())};
    return {.N = y.numel() / y.size(-1),
            .C = y.size(-1),
            .dtype = dtype,
            .dy = storage.dy.const_data_ptr(),
            .y = storage.y.const_data_ptr(),
            .r = storage.r.const_data_ptr(),
            .dsum = dsum ? storage.dsum.const_data_ptr() : nullptr,
            .dx = storage.dx.mutable_data_ptr()};
}

struct EmbeddingRMSNormStorage {
    at::Tensor tokens, table, y, r;
};

// Does not check the range of the tokens. `taken` are the types of the table and of y.
inline EmbeddingRMSNorm embedding_rms_norm_arguments(const at::Tensor& tokens, const at::Tensor& table,
                                                     at::ScalarType dtype, double eps,
                                                     at::ArrayRef<at::ScalarType> taken,
                                                     EmbeddingRMSNormStorage& storage) {
    const char* op = "embedding_rms_norm";
    TORCH_CHECK_VALUE(table.dim() == 2 && table.numel() > 0, op,
                      ": table must have the shape (V, C), V and C at least 1, got ", table.sizes());
    const DType table_dtype = dtype_of(op, "table", table.scalar_type(), taken);
    const DType y_dtype = dtype_of(op, "dtype", dtype, taken);
    check_like(op, "tokens", tokens, at::kLong, table.device(), tokens.sizes());
    check_eps(op, eps);
    std::vector<int64_t> shape = tokens.sizes().vec();
    shape.push_back(table.size(1));
    storage = {.tokens = tokens.contiguous(),
               .table = table.contiguous(),
               .y = at::empty(shape, table.options().dtype(dtype)),
               .r = at::empty(tokens.sizes(), table.options().dtype(accumulate_type(dtype)))};
    return {.N = tokens.numel(),
            .C = table.size(1),
            .V = table.size(0),
            .table_dtype = table_dtype,
            .dtype = y_dtype,
            .table = storage.table.const_data_ptr(),
            .tokens = storage.tokens.const_data_ptr<int64_t>(),
            .y = storage.y.mutable_data_ptr(),
            .r = storage.r.mutable_data_ptr(),
            .eps = eps};
}

// --- mix_rms_norm ---

// Checks one of the two factors, for rows like x.
inline void check_factor(const char* op, const char* name, const at::Tensor& factor, const at::Tensor& x) {
    TORCH_CHECK_VALUE(factor.numel() == 1, op, ": ", name, " must hold one number, got shape ", factor.sizes());
    check_like(op, name, factor, accumulate_type(x.scalar_type()), x.device(), factor.sizes());
}

// The address of a tensor that need not exist.
inline const void* address_or_null(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

inline at::Tensor contiguous_or_none(const std::optional<at::Tensor>& tensor) {
    return tensor ? tensor->contiguous() : at::Tensor();
}

struct MixRMSNormStorage {
    at::Tensor x, residual, x0, z, mixed, y, r;
};

inline MixRMSNorm mix_rms_norm_arguments(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                         const at::Tensor& x0, const at::Tensor& x_scale, const at::Tensor& x0_scale,
                                         double eps, at::ArrayRef<at::ScalarType> taken, MixRMSNormStorage& storage) {
    const char* op = "mix_rms_norm";
    const DType dtype = check_rows(op, "x", x, taken);
    check_eps(op, eps);
    if (residual) check_like(op, "residual", *residual, x.scalar_type(), x.device(), x.sizes());
    check_like(op, "x0", x0, x.scalar_type(), x.device(), x.sizes());
    check_factor(op, "x_scale", x_scale, x);
    check_factor(op, "x0_scale", x0_scale, x);
    const auto empty = [&] { return at::empty(x.sizes(), x.options()); };
    storage = {x.contiguous(), contiguous_or_none(residual), x0.contiguous()};
    storage.z = residual ? empty() : at::empty({0}, x.options());
    storage.mixed = empty();
    storage.y = empty();
    storage.r = at::empty(shape_of_rows(x), x_scale.options());
    return {.N = x.numel() / x.size(-1),
            .C = x.size(-1),
            .dtype = dtype,
            .x = storage.x.const_data_ptr(),
            .residual = address_or_null(storage.residual),
            .x0 = storage.x0.const_data_ptr(),
            .x_scale = x_scale.const_data_ptr(),
            .x0_scale = x0_scale.const_data_ptr(),
            .z = residual ? storage.z.mutable_data_ptr() : nullptr,
            .mixed = storage.mixed.mutable_data_ptr(),
            .y = storage.y.mutable_data_ptr(),
            .r = storage.r.mutable_data_ptr(),
            .eps = eps};
}

struct MixRMSNormBackwardStorage {
    at::Tensor dy, dz, dmixed, add_to, y, r, z, x0, dx, dx0, dx_scale, dx0_scale;
};

inline MixRMSNormBackward mix_rms_norm_backward_arguments(
    const at::Tensor& dy, const std::optional<at::Tensor>& dz, const std::optional<at::Tensor>& dmixed,
    const std::optional<at::Tensor>& add_to, const at::Tensor& y, const at::Tensor& r, const at::Tensor& z,
    const at::Tensor& x0, const at::Tensor& x_scale, const at::Tensor& x0_scale, at::ArrayRef<at::ScalarType> taken,
    MixRMSNormBackwardStorage& storage) {
    const char* op = "mix_rms_norm_backward";
    const DType dtype = check_rows(op, "y", y, taken);
    const auto check = [&](const char* name, const at::Tensor& tensor) {
        check_like(op, name, tensor, y.scalar_type(), y.device(), y.sizes());
    };
    check("dy", dy);
    if (dz) check("dz", *dz);
    if (dmixed) check("dmixed", *dmixed);
    if (add_to) check("add_to", *add_to);
    check("z", z);
    check("x0", x0);
    check_like(op, "r", r, accumulate_type(y.scalar_type()), y.device(), shape_of_rows(y));
    check_factor(op, "x_scale", x_scale, y);
    check_factor(op, "x0_scale", x0_scale, y);
    storage.dy = dy.contiguous();
    storage.dz = contiguous_or_none(dz);
    storage.dmixed = contiguous_or_none(dmixed);
    storage.add_to = contiguous_or_none(add_to);
    storage.y = y.contiguous();
    storage.r = r.contiguous();
    storage.z = z.contiguous();
    storage.x0 = x0.contiguous();
    storage.dx = at::empty(y.sizes(), y.options());
    storage.dx0 = at::empty(y.sizes(), y.options());
    storage.dx_scale = at::empty(x_scale.sizes(), x_scale.options());
    storage.dx0_scale = at::empty(x0_scale.sizes(), x0_scale.options());
    return {.N = y.numel() / y.size(-1),
            .C = y.size(-1),
            .dtype = dtype,
            .dy = storage.dy.const_data_ptr(),
            .dz = address_or_null(storage.dz),
            .dmixed = address_or_null(storage.dmixed),
            .add_to = address_or_null(storage.add_to),
            .y = storage.y.const_data_ptr(),
            .r = storage.r.const_data_ptr(),
            .z = storage.z.const_data_ptr(),
            .x0 = storage.x0.const_data_ptr(),
            .x_scale = x_scale.const_data_ptr(),
            .x0_scale = x0_scale.const_data_ptr(),
            .dx = storage.dx.mutable_data_ptr(),
            .dx0 = storage.dx0.mutable_data_ptr(),
            .dx_scale = storage.dx_scale.mutable_data_ptr(),
            .dx0_scale = storage.dx0_scale.mutable_data_ptr()};
}

// --- rotary_norm ---

// The tensor itself, or a contiguous copy if its last dimension does not have unit stride.
inline at::Tensor with_unit_stride(const at::Tensor& tensor) {
    return tensor.size(-1) == 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// --- add_value_embedding ---

// Checks v, or its gradient, and the other arguments except the range of the ids. Returns their sizes and types.
inline AddValueEmbedding check_value_embedding(const char* op, const char* v_name, const at::Tensor& v,
                                               const at::Tensor& h, const at::Tensor& gate, const at::Tensor& table,
                                               const at::Tensor& ids, at::ArrayRef<at::ScalarType> taken) {
    TORCH_CHECK_VALUE(v.dim() >= 2 && v.size(-1) >= 1 && v.size(-2) >= 1, op, ": ", v_name,
                      " must have shape (..., Hkv, D), Hkv and D at least 1, got ", v.sizes());
    const at::IntArrayRef leading = v.sizes().slice(0, v.dim() - 2);
    const int64_t Hkv = v.size(-2), D = v.size(-1), I = h.dim() >= 1 ? h.size(-1) : 0;
    const DType dtype = dtype_of(op, v_name, v, taken);
    TORCH_CHECK_VALUE(I >= 1 && I <= kMostGateInputs, op, ": h must have shape (..., I), I from 1 to ", kMostGateInputs,
                      ", got ", h.sizes());
    std::vector<int64_t> shape = leading.vec();
    shape.push_back(I);
    check_like(op, "h", h, v.scalar_type(), v.device(), shape);
    check_like(op, "gate", gate, accumulate_type(v.scalar_type()), v.device(), {Hkv, I});
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) >= 1, op,
                      ": table must have the shape (V, Hkv D), V at least 1, got ", table.sizes());
    const DType table_dtype = dtype_of(op, "table", table, {v.scalar_type(), at::kFloat});
    check_like(op, "table", table, table.scalar_type(), v.device(), {table.size(0), Hkv * D});
    check_like(op, "ids", ids, at::kLong, v.device(), leading);
    return {
        .N = ids.numel(), .Hkv = Hkv, .D = D, .I = I, .V = table.size(0), .dtype = dtype, .table_dtype = table_dtype};
}

// The inputs as the kernel reads them, and the result.
struct AddValueEmbeddingStorage {
    at::Tensor v, h, gate, table, ids, out;
};

inline AddValueEmbedding add_value_embedding_arguments(const at::Tensor& v, const at::Tensor& h, const at::Tensor& gate,
                                                       const at::Tensor& table, const at::Tensor& ids,
                                                       at::ArrayRef<at::ScalarType> taken,
                                                       AddValueEmbeddingStorage& storage) {
    AddValueEmbedding a = check_value_embedding("add_value_embedding", "v", v, h, gate, table, ids, taken);
    storage = {.v = v.contiguous(),
               .h = with_unit_stride(h.reshape({a.N, a.I})),
               .gate = gate.contiguous(),
               .table = table.contiguous(),
               .ids = ids.contiguous(),
               .out = at::empty(v.sizes(), v.options())};
    a.v = storage.v.const_data_ptr();
    a.h = storage.h.const_data_ptr();
    a.h_stride = storage.h.stride(0);
    a.gate = storage.gate.const_data_ptr();
    a.table = storage.table.const_data_ptr();
    a.ids = storage.ids.const_data_ptr<int64_t>();
    a.out = storage.out.mutable_data_ptr();
    return a;
}

// The inputs as the kernel reads them, and the results.
struct AddValueEmbeddingBackwardStorage {
    at::Tensor dout, h, gate, table, ids;
    at::Tensor dh, dgate, drows;
};

inline AddValueEmbeddingBackward add_value_embedding_backward_arguments(const at::Tensor& dout, const at::Tensor& h,
                                                                        const at::Tensor& gate, const at::Tensor& table,
                                                                        const at::Tensor& ids,
                                                                        at::ArrayRef<at::ScalarType> taken,
                                                                        AddValueEmbeddingBackwardStorage& storage) {
    const AddValueEmbedding checked =
        check_value_embedding("add_value_embedding_backward", "dout", dout, h, gate, table, ids, taken);
    std::vector<int64_t> shape = ids.sizes().vec();
    shape.push_back(checked.Hkv * checked.D);
    storage = {.dout = dout.contiguous(),
               .h = with_unit_stride(h.reshape({checked.N, checked.I})),
               .gate = gate.contiguous(),
               .table = table.contiguous(),
               .ids = ids.contiguous(),
               .dh = at::empty(h.sizes(), h.options()),
               .dgate = at::empty(gate.sizes(), gate.options()),
               .drows = at::empty(shape, table.options())};
    return {.N = checked.N,
            .Hkv = checked.Hkv,
            .D = checked.D,
            .I = checked.I,
            .V = checked.V,
            .dtype = checked.dtype,
            .table_dtype = checked.table_dtype,
            .dout = storage.dout.const_data_ptr(),
            .h = storage.h.const_data_ptr(),
            .h_stride = storage.h.stride(0),
            .gate = storage.gate.const_data_ptr(),
            .table = storage.table.const_data_ptr(),
            .ids = storage.ids.const_data_ptr<int64_t>(),
            .dh = storage.dh.mutable_data_ptr(),
            .dgate = storage.dgate.mutable_data_ptr(),
            .drows = storage.drows.mutable_data_ptr()};
}

// --- smear ---

inline DType check_smear(const char* op, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& lambda,
                         at::ArrayRef<at::ScalarType> taken) {
    TORCH_CHECK_VALUE(x.dim() == 3 && x.size(1) >= 1 && x.size(2) >= 1, op,
                      ": x must have shape (B, T, C), T and C at least 1, got ", x.sizes());
    const int64_t most = std::min(x.size(2), kMostGateInputs);
    TORCH_CHECK_VALUE(gate.dim() == 2 && gate.size(0) == 1 && gate.size(1) >= 1 && gate.size(1) <= most, op,
                      ": gate must have shape (1, I), I from 1 to ", most, ", got ", gate.sizes());
    const DType dtype = dtype_of(op, "x", x, taken);
    const at::ScalarType type = accumulate_type(x.scalar_type());
    check_like(op, "gate", gate, type, x.device(), gate.sizes());
    check_like(op, "smear_lambda", lambda, type, x.device(), {1});
    return dtype;
}

// The inputs, contiguous, and the result.
struct SmearStorage {
    at::Tensor x, gate, out;
};

inline Smear smear_arguments(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& lambda,
                             at::ArrayRef<at::ScalarType> taken, SmearStorage& storage) {
    const DType dtype = check_smear("smear", x, gate, lambda, taken);
    storage = {.x = x.contiguous(), .gate = gate.contiguous(), .out = at::empty(x.sizes(), x.options())};
    return {.B = x.size(0),
            .T = x.size(1),
            .C = x.size(2),
            .I = gate.size(1),
            .dtype = dtype,
            .x = storage.x.const_data_ptr(),
            .gate = storage.gate.const_data_ptr(),
            .lambda = lambda.const_data_ptr(),
            .out = storage.out.mutable_data_ptr()};
}

// The inputs, contiguous, and the results.
struct SmearBackwardStorage {
    at::Tensor dout, x, gate;
    at::Tensor dx, dgate, dlambda;
};

inline SmearBackward smear_backward_arguments(const at::Tensor& dout, const at::Tensor& x, const at::Tensor& gate,
                                              const at::Tensor& lambda, at::ArrayRef<at::ScalarType> taken,
                                              SmearBackwardStorage& storage) {
    const char* op = "smear_backward";
    const DType dtype = check_smear(op, x, gate, lambda, taken);
    check_like(op, "dout", dout, x.scalar_type(), x.device(), x.sizes());
    storage = {.dout = dout.contiguous(),
               .x = x.contiguous(),
               .gate = gate.contiguous(),
               .dx = at::empty(x.sizes(), x.options()),
               .dgate = at::empty(gate.sizes(), gate.options()),
               .dlambda = at::empty(lambda.sizes(), lambda.options())};
    return {.B = x.size(0),
            .T = x.size(1),
            .C = x.size(2),
            .I = gate.size(1),
            .dtype = dtype,
            .dout = storage.dout.const_data_ptr(),
            .x = storage.x.const_data_ptr(),
            .gate = storage.gate.const_data_ptr(),
            .lambda = lambda.const_data_ptr(),
            .dx = storage.dx.mutable_data_ptr(),
            .dgate = storage.dgate.mutable_data_ptr(),
            .dlambda = storage.dlambda.mutable_data_ptr()};
}

// --- rotary_norm ---

// Checks q and k, or tensors of their shapes, and the tables.
inline void check_rotary_norm(const char* op, const char* q_name, const at::Tensor& q, const char* k_name,
                              const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin, double scale,
                              at::ArrayRef<at::ScalarType> taken) {
    constexpr int64_t kLargestD = 256;
    dtype_of(op, q_name, q, taken);
    TORCH_CHECK_VALUE(
        q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3), op,
        ": ", q_name, " and ", k_name, " must have the shapes (B, T, H, D) and (B, T, Hkv, D), got ", q.sizes(),
        " and ", k.sizes());
    const int64_t T = q.size(1), D = q.size(3);
    TORCH_CHECK_VALUE(D % 2 == 0 && D >= 2 && D <= kLargestD, op, ": D must be even, from 2 to ", kLargestD, ", got ",
                      D);
    TORCH_CHECK_VALUE(scale > 0, op, ": scale must be positive, got ", scale);
    check_like(op, k_name, k, q.scalar_type(), q.device(), k.sizes());
    check_like(op, "cos", cos, accumulate_type(q.scalar_type()), q.device(), {T, D / 2});
    check_like(op, "sin", sin, accumulate_type(q.scalar_type()), q.device(), {T, D / 2});
}

// The inputs with unit stride in D, and the results, which are allocated after the arguments have been checked.
struct RotaryNormStorage {
    at::Tensor q, k, cos, sin;
    at::Tensor q_out, k_out, q_r, k_r;
};

// The caller skips the kernel if both results are empty.
inline RotaryNorm rotary_norm_arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                                        const at::Tensor& sin, double eps, double scale,
                                        at::ArrayRef<at::ScalarType> taken, RotaryNormStorage& storage) {
    const char* op = "rotary_norm";
    check_rotary_norm(op, "q", q, "k", k, cos, sin, scale, taken);
    TORCH_CHECK_VALUE(eps >= 0, op, ": eps must be at least 0, got ", eps);
    const at::TensorOptions r_options = q.options().dtype(accumulate_type(q.scalar_type()));
    storage = {.q = with_unit_stride(q),
               .k = with_unit_stride(k),
               .cos = with_unit_stride(cos),
               .sin = with_unit_stride(sin),
               .q_out = at::empty(q.sizes(), q.options()),
               .k_out = at::empty(k.sizes(), k.options()),
               .q_r = at::empty(q.sizes().slice(0, 3), r_options),
               .k_r = at::empty(k.sizes().slice(0, 3), r_options)};
    return {.B = q.size(0),
            .T = q.size(1),
            .H = q.size(2),
            .Hkv = k.size(2),
            .D = q.size(3),
            .dtype = dtype_of(op, "q", q, taken),
            .q = storage.q.const_data_ptr(),
            .k = storage.k.const_data_ptr(),
            .q_strides = strides_of(storage.q),
            .k_strides = strides_of(storage.k),
            .cos = storage.cos.const_data_ptr(),
            .sin = storage.sin.const_data_ptr(),
            .cos_stride = storage.cos.stride(0),
            .sin_stride = storage.sin.stride(0),
            .eps = eps,
            .scale = scale,
            .q_out = storage.q_out.mutable_data_ptr(),
            .k_out = storage.k_out.mutable_data_ptr(),
            .q_r = storage.q_r.mutable_data_ptr(),
            .k_r = storage.k_r.mutable_data_ptr()};
}

// The inputs as the kernel reads them, and the results.
struct RotaryNormBackwardStorage {
    at::Tensor dq_out, dk_out, q_out, k_out, q_r, k_r, cos, sin;
    at::Tensor dq, dk;
};

// The caller skips the kernel if both results are empty.
inline RotaryNormBackward rotary_norm_backward_arguments(const at::Tensor& dq_out, const at::Tensor& dk_out,
                                                         const at::Tensor& q_out, const at::Tensor& k_out,
                                                         const at::Tensor& q_r, const at::Tensor& k_r,
                                                         const at::Tensor& cos, const at::Tensor& sin, double scale,
                                                         at::ArrayRef<at::ScalarType> taken,
                                                         RotaryNormBackwardStorage& storage) {
    const char* op = "rotary_norm_backward";
    check_rotary_norm(op, "dq_out", dq_out, "dk_out", dk_out, cos, sin, scale, taken);
    const at::ScalarType r_type = accumulate_type(dq_out.scalar_type());
    check_like(op, "q_out", q_out, dq_out.scalar_type(), dq_out.device(), dq_out.sizes());
    check_like(op, "k_out", k_out, dq_out.scalar_type(), dq_out.device(), dk_out.sizes());
    check_like(op, "q_r", q_r, r_type, dq_out.device(), dq_out.sizes().slice(0, 3));
    check_like(op, "k_r", k_r, r_type, dq_out.device(), dk_out.sizes().slice(0, 3));
    storage = {.dq_out = with_unit_stride(dq_out),
               .dk_out = with_unit_stride(dk_out),
               .q_out = q_out.contiguous(),
               .k_out = k_out.contiguous(),
               .q_r = q_r.contiguous(),
               .k_r = k_r.contiguous(),
               .cos = with_unit_stride(cos),
               .sin = with_unit_stride(sin),
               .dq = at::empty(dq_out.sizes(), dq_out.options()),
               .dk = at::empty(dk_out.sizes(), dk_out.options())};
    return {.B = dq_out.size(0),
            .T = dq_out.size(1),
            .H = dq_out.size(2),
            .Hkv = dk_out.size(2),
            .D = dq_out.size(3),
            .dtype = dtype_of(op, "dq_out", dq_out, taken),
            .dq_out = storage.dq_out.const_data_ptr(),
            .dk_out = storage.dk_out.const_data_ptr(),
            .dq_out_strides = strides_of(storage.dq_out),
            .dk_out_strides = strides_of(storage.dk_out),
            .q_out = storage.q_out.const_data_ptr(),
            .k_out = storage.k_out.const_data_ptr(),
            .q_r = storage.q_r.const_data_ptr(),
            .k_r = storage.k_r.const_data_ptr(),
            .cos = storage.cos.const_data_ptr(),
            .sin = storage.sin.const_data_ptr(),
            .cos_stride = storage.cos.stride(0),
            .sin_stride = storage.sin.stride(0),
            .scale = scale,
            .dq = storage.dq.mutable_data_ptr(),
            .dk = storage.dk.mutable_data_ptr()};
}

// --- relu_squared ---

// The form in place: y is x, which must then be contiguous. Otherwise y is allocated. The caller skips the kernel if numel
// is 0.
struct ReluSquaredStorage {
    at::Tensor x;   // contiguous
    at::Tensor y;
};

inline void check_contiguous(const char* op, const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ", tensor.strides());
}

inline ReluSquared relu_squared_arguments(const at::Tensor& x, bool in_place, at::ArrayRef<at::ScalarType> taken,
                                          ReluSquaredStorage& storage) {
    const char* op = in_place ? "relu_squared_" : "relu_squared";
    const DType dtype = dtype_of(op, "x", x, taken);
    if (in_place) check_contiguous(op, "x", x);
    storage.x = x.contiguous();
    storage.y = in_place ? storage.x : at::empty(x.sizes(), x.options());
    return {.numel = x.numel(), .dtype = dtype, .x = storage.x.const_data_ptr(), .y = storage.y.mutable_data_ptr()};
}

struct ReluSquaredBackwardStorage {
    at::Tensor dy, y;   // contiguous
    at::Tensor dx;
};

inline ReluSquaredBackward relu_squared_backward_arguments(const at::Tensor& dy, const at::Tensor& y, bool in_place,
                                                           at::ArrayRef<at::ScalarType> taken,
                                                           ReluSquaredBackwardStorage& storage) {
    const char* op = in_place ? "relu_squared_backward_" : "relu_squared_backward";
    const DType dtype = dtype_of(op, "dy", dy, taken);
    check_like(op, "y", y, dy.scalar_type(), dy.device(), dy.sizes());
    if (in_place) {
        check_contiguous(op, "dy", dy);
        check_contiguous(op, "y", y);
        check_no_overlap(op, {{"dy", {dy}, true}, {"y", {y}, false}});
    }
    storage.dy = dy.contiguous();
    storage.y = y.contiguous();
    storage.dx = in_place ? storage.dy : at::empty(dy.sizes(), dy.options());
    return {.numel = dy.numel(),
            .dtype = dtype,
            .dy = storage.dy.const_data_ptr(),
            .y = storage.y.const_data_ptr(),
            .dx = storage.dx.mutable_data_ptr()};
}

// --- optimizers ---

// Checks the bfloat16 copies of float32 parameters, of which there may be none, and adds them to the lists of an operator.
inline void add_copies(const char* op, at::TensorList params, at::TensorList copies, std::vector<TensorList>& lists) {
    if (copies.empty()) return;
    TORCH_CHECK_TYPE(params[0].scalar_type() == at::kFloat, op, ": params must be float32 if there are copies, got ",
                     params[0].scalar_type());
    dtype_of(op, "copies", copies[0], {at::kBFloat16});
    lists.push_back({"copies", copies, true});
}

inline AdamW adamw_arguments(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                             at::TensorList exp_avg_sqs, at::TensorList copies, int64_t step, double lr, double beta1,
                             double beta2, double eps, double weight_decay, bool stochastic_rounding, int64_t seed,
                             bool cautious, const std::optional<at::Tensor>& step_tensor,
                             const std::optional<at::Tensor>& lr_tensor,
                             const std::optional<at::Tensor>& weight_decay_tensor, std::vector<AdamWTensor>& storage) {
    const char* op = "adamw_";
    check_not_empty(op, "params", params);
    std::vector<TensorList> lists = {{"params", params, true},
                                     {"grads", grads, false},
                                     {"exp_avgs", exp_avgs, true},
                                     {"exp_avg_sqs", exp_avg_sqs, true}};
    add_copies(op, params, copies, lists);
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
            .copy = copies.empty() ? nullptr : copies[i].mutable_data_ptr(),
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
                                            const std::optional<at::Tensor>& momentum_tensor, bool with_row_norms,
                                            MuonMomentumStorage& storage) {
    const char* op = "muon_momentum_";
    check_one_shape(op, "grads", grads);
    const std::vector<TensorList> lists = {{"grads", grads, false}, {"momentum_buffers", momentum_buffers, true}};
    check_lists(op, lists);
    check_no_overlap(op, lists);
    const DType grad_dtype = dtype_of(op, "grads", grads[0], {at::kFloat, at::kBFloat16});
    dtype_of(op, "momentum_buffers", momentum_buffers[0], {at::kFloat});
    const double* momentum_address = number_address<double>(op, "momentum", momentum_tensor, grads[0].device());
    TORCH_CHECK_VALUE(!with_row_norms || (!with_norms && grads[0].dim() >= 1), op,
                      ": with_row_norms needs grads with rows and excludes with_norms, got shape ", grads[0].sizes());
    const int64_t count = static_cast<int64_t>(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
        storage.grads.push_back(grads[i].const_data_ptr());
        storage.momentum_buffers.push_back(momentum_buffers[i].mutable_data_ptr<float>());
    }
    storage.update = at::empty(stacked_shape(grads), grads[0].options().dtype(at::kFloat));
    const std::vector<int64_t> norms_shape = with_row_norms ? shape_of_rows(storage.update).vec()
                                                            : std::vector<int64_t>{with_norms ? count : 0};
    storage.norms = at::empty(norms_shape, grads[0].options().dtype(at::kDouble));
    if (grads[0].numel() == 0) storage.norms.zero_();
    return {.grads = storage.grads.data(),
            .momentum_buffers = storage.momentum_buffers.data(),
            .update = storage.update.mutable_data_ptr<float>(),
            .norms = with_norms ? storage.norms.mutable_data_ptr<double>() : nullptr,
            .count = count,
            .numel = grads[0].numel(),
            .grad_dtype = grad_dtype,
            .momentum = momentum,
            .nesterov = nesterov,
            .momentum_address = momentum_address,
            .row_norms = with_row_norms ? storage.norms.mutable_data_ptr<double>() : nullptr,
            .columns = with_row_norms ? grads[0].size(-1) : 1};
}

struct MuonUpdateStorage {
    std::vector<void*> params, copies;
};

inline MuonUpdate muon_update_arguments(const char* op, at::TensorList params, const at::Tensor& update,
                                        at::TensorList copies, double lr, double weight_decay, double scale,
                                        bool cautious, const std::optional<at::Tensor>& lr_tensor,
                                        const std::optional<at::Tensor>& weight_decay_tensor,
                                        MuonUpdateStorage& storage) {
    check_one_shape(op, "params", params);
    std::vector<TensorList> lists = {{"params", params, true}};
    add_copies(op, params, copies, lists);
    check_lists(op, lists);
    const at::Device device = params[0].device();
    check_like(op, "update", update, at::kFloat, device, stacked_shape(params));
    TORCH_CHECK_VALUE(update.is_contiguous(), op, ": update must be contiguous, got strides ", update.strides());
    lists.push_back({"update", update, false});
    check_no_overlap(op, lists);
    const DType param_dtype = dtype_of(op, "params", params[0], {at::kFloat, at::kBFloat16});
    for (const at::Tensor& param : params) storage.params.push_back(param.mutable_data_ptr());
    for (const at::Tensor& copy : copies) storage.copies.push_back(copy.mutable_data_ptr());
    return {.params = storage.params.data(),
            .copies = copies.empty() ? nullptr : storage.copies.data(),
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

// `params`, `copies` and `second_momentums` of each matrix.
struct NorMuonUpdateStorage {
    MuonUpdateStorage tensors;
    std::vector<void*> params, copies;
    std::vector<float*> second_momentums;
};

inline NorMuonUpdate normuon_update_arguments(at::TensorList params, const at::Tensor& update,
                                              at::TensorList second_momentums, at::TensorList copies, double lr,
                                              double weight_decay, double scale, bool cautious, double beta2,
                                              double eps, bool renormalise, double norm_eps,
                                              const std::optional<at::Tensor>& lr_tensor,
                                              const std::optional<at::Tensor>& weight_decay_tensor,
                                              NorMuonUpdateStorage& storage) {
    const char* op = "normuon_update_";
    NorMuonUpdate a = {muon_update_arguments(op, params, update, copies, lr, weight_decay, scale, cautious, lr_tensor,
                                             weight_decay_tensor, storage.tensors)};
    TORCH_CHECK_VALUE(params[0].dim() >= 2, op, ": params must have shape (..., M, K), got ", params[0].sizes());
    TORCH_CHECK_VALUE(second_momentums.size() == params.size(), op, ": second_momentums must have ", params.size(),
                      " tensors, as params, got ", second_momentums.size());
    a.M = params[0].size(-2);
    a.K = params[0].size(-1);
    const int64_t lines = std::max(a.M, a.K);
    std::vector<int64_t> shape = params[0].sizes().vec();
    shape[shape.size() - (a.M >= a.K ? 1 : 2)] = 1;
    for (const at::Tensor& second : second_momentums) {
        check_like(op, "second_momentums", second, at::kFloat, params[0].device(), shape);
        check_contiguous(op, "second_momentums", second);
    }
    check_no_overlap(op, {{"params", params, true},
                          {"second_momentums", second_momentums, true},
                          {"copies", copies, true},
                          {"update", update, false}});
    a.beta2 = beta2;
    a.eps = eps;
    a.renormalise = renormalise;
    a.norm_eps = norm_eps;
    // A parameter may hold several matrices.
    const int64_t matrices = a.numel > 0 ? a.numel / (a.M * a.K) : 0;
    a.numel = a.M * a.K;
    for (size_t i = 0; i < params.size(); ++i) {
        for (int64_t matrix = 0; matrix < matrices; ++matrix) {
            const int64_t offset = matrix * a.numel;
            storage.params.push_back(static_cast<char*>(a.params[i]) + offset * params[0].element_size());
            if (a.copies) storage.copies.push_back(static_cast<uint16_t*>(a.copies[i]) + offset);
            storage.second_momentums.push_back(second_momentums[i].mutable_data_ptr<float>() + matrix * lines);
        }
    }
    a.count = static_cast<int64_t>(storage.params.size());
    a.params = storage.params.data();
    if (a.copies) a.copies = storage.copies.data();
    a.second_momentums = storage.second_momentums.data();
    return a;
}

// --- newton_schulz ---

struct NewtonSchulzStorage {
    at::Tensor g, norms, scales;   // contiguous
};

inline NewtonSchulz newton_schulz_arguments(const char* op, const char* name, const at::Tensor& g,
                                            at::ArrayRef<double> coefficients, double norm_factor,
                                            const std::optional<at::Tensor>& norms,
                                            const std::optional<at::Tensor>& scales, bool allow_bfloat16,
                                            at::ArrayRef<at::ScalarType> taken, NewtonSchulzStorage& storage) {
    TORCH_CHECK_VALUE(g.dim() >= 2, op, ": ", name, " must have shape (..., M, K), got ", g.sizes());
    TORCH_CHECK_VALUE(!coefficients.empty() && coefficients.size() % 3 == 0, op,
                      ": coefficients must have three numbers for each step, got ", coefficients.size(), " numbers");
    const DType dtype = dtype_of(op, name, g, taken);
    if (norms) check_like(op, "norms", *norms, at::kDouble, g.device(), g.sizes().slice(0, g.dim() - 2));
    if (scales) check_like(op, "scales", *scales, at::kDouble, g.device(), shape_of_rows(g));
    TORCH_CHECK_VALUE(!norms || !scales, op, ": norms and scales exclude each other, got both");
    storage = {g.contiguous(), norms ? norms->contiguous() : at::Tensor(),
               scales ? scales->contiguous() : at::Tensor()};
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
            .norm_factor = norm_factor,
            .scales = scales ? storage.scales.const_data_ptr<double>() : nullptr,
            .allow_bfloat16 = allow_bfloat16};
}

// The arguments of the two parts of newton_schulz_update_. Its `update` is the g of newton_schulz.
inline std::pair<NewtonSchulz, MuonUpdate> newton_schulz_update_arguments(
    at::TensorList params, const at::Tensor& update, at::TensorList copies, at::ArrayRef<double> coefficients,
    double norm_factor, const std::optional<at::Tensor>& norms, double lr, double weight_decay, double scale,
    bool cautious, const std::optional<at::Tensor>& lr_tensor, const std::optional<at::Tensor>& weight_decay_tensor,
    bool allow_bfloat16, NewtonSchulzStorage& newton_schulz_storage, MuonUpdateStorage& storage) {
    const char* op = "newton_schulz_update_";
    const MuonUpdate muon = muon_update_arguments(op, params, update, copies, lr, weight_decay, scale, cautious,
                                                  lr_tensor, weight_decay_tensor, storage);
    TORCH_CHECK_VALUE(params[0].dim() >= 2, op, ": params must have shape (..., M, K), got ", params[0].sizes());
    return {newton_schulz_arguments(op, "update", update, coefficients, norm_factor, norms, {}, allow_bfloat16,
                                    {at::kFloat}, newton_schulz_storage),
            muon};
}

}   // namespace nanochat
