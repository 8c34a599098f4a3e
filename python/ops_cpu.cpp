// The operators on CPU tensors: check the arguments, allocate the results, call csrc/kernels.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "arguments.h"
#include "tensor_checks.h"

namespace nanochat {
namespace {

using at::Tensor;

// The kernels use one thread where they may not start a team: inside a parallel region and in a forked child.
Execution execution() { return {.threads = at::get_num_threads()}; }

// --- attention ---

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q_, const Tensor& k_, const Tensor& v_, bool causal,
                                             int64_t window, double scale, const std::optional<Tensor>& lengths_) {
    const char* op = "attention_forward";
    const AttentionShape shape = check_attention(op, q_, k_, v_, causal, window, scale, lengths_);
    const DType dtype = dtype_of(op, "q", q_, {at::kFloat, at::kDouble, at::kBFloat16});
    const Tensor q = with_unit_stride(q_), k = with_unit_stride(k_), v = with_unit_stride(v_);
    const Tensor lengths = lengths_ ? lengths_->contiguous() : Tensor();
    for (int64_t b = 0; lengths_ && b < shape.B; ++b) {
        const int64_t length = lengths.const_data_ptr<int64_t>()[b];
        TORCH_CHECK_VALUE(length >= 0 && length <= shape.Tk, op, ": lengths must be from 0 to ", shape.Tk, ", got ",
                          length);
    }
    Tensor out = at::empty(q.sizes(), q.options());
    Tensor lse = at::empty({shape.B, shape.H, shape.Tq}, q.options().dtype(accumulate_type(q.scalar_type())));
    if (k.numel() == 0 || q.numel() == 0) {
        return {out.zero_(), lse.fill_(-std::numeric_limits<double>::infinity())};
    }
    AttentionForward arguments = attention_forward_arguments(shape, dtype, q, k, v, out, lse, lengths);
    arguments.execution = execution();
    run_kernel([&] { cpu::attention_forward(arguments); });
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout_, const Tensor& q_, const Tensor& k_,
                                                      const Tensor& v_, const Tensor& out_, const Tensor& lse_,
                                                      bool causal, int64_t window, double scale) {
    const char* op = "attention_backward";
    const AttentionShape shape = check_attention(op, q_, k_, v_, causal, window, scale, std::nullopt);
    const DType dtype = dtype_of(op, "q", q_, {at::kFloat, at::kDouble, at::kBFloat16});
    check_attention_results(op, shape, q_, dout_, out_, lse_, accumulate_type(q_.scalar_type()));
    const Tensor q = with_unit_stride(q_), k = with_unit_stride(k_), v = with_unit_stride(v_);
    const Tensor dout = with_unit_stride(dout_), out = with_unit_stride(out_), lse = lse_.contiguous();
    Tensor dq = at::empty(q.sizes(), q.options());
    Tensor dk = at::empty(k.sizes(), k.options());
    Tensor dv = at::empty(v.sizes(), v.options());
    if (k.numel() == 0 || q.numel() == 0) {
        return {dq.zero_(), dk.zero_(), dv.zero_()};
    }
    AttentionBackward arguments = attention_backward_arguments(shape, dtype, q, k, v, out, dout, lse, dq, dk, dv);
    arguments.execution = execution();
    run_kernel([&] { cpu::attention_backward(arguments); });
    return {dq, dk, dv};
}

// --- rms_norm ---

constexpr at::ScalarType kNormTypes[] = {at::kFloat, at::kDouble, at::kBFloat16};

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const std::optional<Tensor>& residual, double eps) {
    RMSNormStorage storage;
    RMSNorm arguments = rms_norm_arguments(x, residual, eps, kNormTypes, storage);
    arguments.execution = execution();
    if (arguments.N > 0) run_kernel([&] { cpu::rms_norm(arguments); });
    return {storage.sum, storage.y, storage.r};
}

Tensor rms_norm_backward(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& y, const Tensor& r) {
    RMSNormBackwardStorage storage;
    RMSNormBackward arguments = rms_norm_backward_arguments(dy, dsum, y, r, kNormTypes, storage);
    arguments.execution = execution();
    if (arguments.N > 0) run_kernel([&] { cpu::rms_norm_backward(arguments); });
    return storage.dx;
}

void check_rows_of_table(const char* op, const char* name, const int64_t* rows, int64_t N, int64_t V) {
    for (int64_t n = 0; n < N; ++n) {
        TORCH_CHECK_VALUE(rows[n] >= 0 && rows[n] < V, op, ": ", name, " must be from 0 to ", V - 1, ", got ", rows[n]);
    }
}

std::tuple<Tensor, Tensor> embedding_rms_norm(const Tensor& tokens, const Tensor& table, at::ScalarType dtype,
                                              double eps) {
    EmbeddingRMSNormStorage storage;
    EmbeddingRMSNorm arguments = embedding_rms_norm_arguments(tokens, table, dtype, eps, kNormTypes, storage);
    check_rows_of_table("embedding_rms_norm", "tokens", arguments.tokens, arguments.N, arguments.V);
    arguments.execution = execution();
    if (arguments.N > 0) run_kernel([&] { cpu::embedding_rms_norm(arguments); });
    return {storage.y, storage.r};
}

// --- mix_rms_norm ---

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_rms_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                                        const Tensor& x0, const Tensor& x_scale, const Tensor& x0_scale,
                                                        double eps) {
    MixRMSNormStorage storage;
    MixRMSNorm arguments = mix_rms_norm_arguments(x, residual, x0, x_scale, x0_scale, eps, kNormTypes, storage);
    arguments.execution = execution();
    if (arguments.N > 0) run_kernel([&] { cpu::mix_rms_norm(arguments); });
    return {storage.z, storage.mixed, storage.y, storage.r};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_rms_norm_backward(const Tensor& dy, const std::optional<Tensor>& dz,
                                                                 const std::optional<Tensor>& dmixed,
                                                                 const std::optional<Tensor>& add_to, const Tensor& y,
                                                                 const Tensor& r, const Tensor& z, const Tensor& x0,
                                                                 const Tensor& x_scale, const Tensor& x0_scale) {
    MixRMSNormBackwardStorage storage;
    MixRMSNormBackward arguments =
        mix_rms_norm_backward_arguments(dy, dz, dmixed, add_to, y, r, z, x0, x_scale, x0_scale, kNormTypes, storage);
    arguments.execution = execution();
    run_kernel([&] { cpu::mix_rms_norm_backward(arguments); });
    return {storage.dx, storage.dx0, storage.dx_scale, storage.dx0_scale};
}

// --- add_value_embedding and smear ---

Tensor add_value_embedding(const Tensor& v, const Tensor& h, const Tensor& gate, const Tensor& table,
                           const Tensor& ids) {
    AddValueEmbeddingStorage storage;
    AddValueEmbedding arguments = add_value_embedding_arguments(v, h, gate, table, ids, kNormTypes, storage);
    check_rows_of_table("add_value_embedding", "ids", arguments.ids, arguments.N, arguments.V);
    arguments.execution = execution();
    run_kernel([&] { cpu::add_value_embedding(arguments); });
    return storage.out;
}

std::tuple<Tensor, Tensor, Tensor> add_value_embedding_backward(const Tensor& dout, const Tensor& h, const Tensor& gate,
                                                                const Tensor& table, const Tensor& ids) {
    AddValueEmbeddingBackwardStorage storage;
    AddValueEmbeddingBackward arguments =
        add_value_embedding_backward_arguments(dout, h, gate, table, ids, kNormTypes, storage);
    check_rows_of_table("add_value_embedding_backward", "ids", arguments.ids, arguments.N, arguments.V);
    arguments.execution = execution();
    run_kernel([&] { cpu::add_value_embedding_backward(arguments); });
    return {storage.dh, storage.dgate, storage.drows};
}

Tensor smear(const Tensor& x, const Tensor& gate, const Tensor& lambda) {
    SmearStorage storage;
    Smear arguments = smear_arguments(x, gate, lambda, kNormTypes, storage);
    arguments.execution = execution();
    run_kernel([&] { cpu::smear(arguments); });
    return storage.out;
}

std::tuple<Tensor, Tensor, Tensor> smear_backward(const Tensor& dout, const Tensor& x, const Tensor& gate,
                                                  const Tensor& lambda) {
    SmearBackwardStorage storage;
    SmearBackward arguments = smear_backward_arguments(dout, x, gate, lambda, kNormTypes, storage);
    arguments.execution = execution();
    run_kernel([&] { cpu::smear_backward(arguments); });
    return {storage.dx, storage.dgate, storage.dlambda};
}

// --- rotary_norm and relu_squared ---

std::tuple<Tensor, Tensor, Tensor, Tensor> rotary_norm(const Tensor& q, const Tensor& k, const Tensor& cos,
                                                       const Tensor& sin, double eps, double scale) {
    RotaryNormStorage storage;
    RotaryNorm arguments = rotary_norm_arguments(q, k, cos, sin, eps, scale, kNormTypes, storage);
    arguments.execution = execution();
    run_kernel([&] { cpu::rotary_norm(arguments); });
    return {storage.q_out, storage.k_out, storage.q_r, storage.k_r};
}

std::tuple<Tensor, Tensor> rotary_norm_backward(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q_out,
                                                const Tensor& k_out, const Tensor& q_r, const Tensor& k_r,
                                                const Tensor& cos, const Tensor& sin, double scale) {
    RotaryNormBackwardStorage storage;
    RotaryNormBackward arguments =
        rotary_norm_backward_arguments(dq_out, dk_out, q_out, k_out, q_r, k_r, cos, sin, scale, kNormTypes, storage);
    arguments.execution = execution();
    run_kernel([&] { cpu::rotary_norm_backward(arguments); });
    return {storage.dq, storage.dk};
}

Tensor run_relu_squared(const Tensor& x, bool in_place) {
    ReluSquaredStorage storage;
    ReluSquared arguments = relu_squared_arguments(x, in_place, kNormTypes, storage);
    arguments.execution = execution();
    run_kernel([&] { cpu::relu_squared(arguments); });
    return storage.y;
}

Tensor relu_squared(const Tensor& x) { return run_relu_squared(x, false); }

void relu_squared_(const Tensor& x) {
    run_relu_squared(x, true);
    mark_updated(x);
}

Tensor run_relu_squared_backward(const Tensor& dy, const Tensor& y, bool in_place) {
    ReluSquaredBackwardStorage storage;
    ReluSquaredBackward arguments = relu_squared_backward_arguments(dy, y, in_place, kNormTypes, storage);
    arguments.execution = execution();
    run_kernel([&] { cpu::relu_squared_backward(arguments); });
    return storage.dx;
}

Tensor relu_squared_backward(const Tensor& dy, const Tensor& y) { return run_relu_squared_backward(dy, y, false); }

void relu_squared_backward_(const Tensor& dy, const Tensor& y) {
    run_relu_squared_backward(dy, y, true);
    mark_updated(dy);
}

// --- newton_schulz ---

Tensor newton_schulz(const Tensor& g, at::ArrayRef<double> coefficients, double norm_factor,
                     const std::optional<Tensor>& norms, const std::optional<Tensor>& scales, bool allow_bfloat16) {
    NewtonSchulzStorage storage;
    NewtonSchulz arguments = newton_schulz_arguments("newton_schulz", "g", g, coefficients, norm_factor, norms, scales,
                                                     allow_bfloat16, {at::kFloat, at::kDouble}, storage);
    Tensor out = at::empty(g.sizes(), g.options());
    arguments.out = out.mutable_data_ptr();
    arguments.execution = execution();
    if (arguments.batch > 0) run_kernel([&] { cpu::newton_schulz(arguments); });
    return out;
}

// --- optimizers ---

void adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
            at::TensorList copies, int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
            bool stochastic_rounding, int64_t seed, bool cautious, const std::optional<Tensor>& step_tensor,
            const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& weight_decay_tensor) {
    std::vector<AdamWTensor> storage;
    AdamW arguments = adamw_arguments(params, grads, exp_avgs, exp_avg_sqs, copies, step, lr, beta1, beta2, eps,
                                      weight_decay, stochastic_rounding, seed, cautious, step_tensor, lr_tensor,
                                      weight_decay_tensor, storage);
    arguments.execution = execution();
    run_kernel([&] { cpu::adamw(arguments); });
    for (at::TensorList updated : {params, exp_avgs, exp_avg_sqs, copies}) mark_updated(updated);
}

std::tuple<Tensor, Tensor> muon_momentum_(at::TensorList grads, at::TensorList momentum_buffers, double momentum,
                                          bool nesterov, bool with_norms, const std::optional<Tensor>& momentum_tensor,
                                          bool with_row_norms) {
    MuonMomentumStorage storage;
    MuonMomentum arguments = muon_momentum_arguments(grads, momentum_buffers, momentum, nesterov, with_norms,
                                                     momentum_tensor, with_row_norms, storage);
    arguments.execution = execution();
    run_kernel([&] { cpu::muon_momentum(arguments); });
    mark_updated(momentum_buffers);
    return {storage.update, storage.norms};
}

void muon_update_(at::TensorList params, const Tensor& update, at::TensorList copies, double lr, double weight_decay,
                  double scale, bool cautious, const std::optional<Tensor>& lr_tensor,
                  const std::optional<Tensor>& weight_decay_tensor) {
    MuonUpdateStorage storage;
    MuonUpdate arguments = muon_update_arguments("muon_update_", params, update, copies, lr, weight_decay, scale,
                                                 cautious, lr_tensor, weight_decay_tensor, storage);
    arguments.execution = execution();
    run_kernel([&] { cpu::muon_update(arguments); });
    for (at::TensorList updated : {params, copies}) mark_updated(updated);
}

void normuon_update_(at::TensorList params, const Tensor& update, at::TensorList second_momentums,
                     at::TensorList copies, double lr, double weight_decay, double scale, bool cautious, double beta2,
                     double eps, bool renormalise, double norm_eps, const std::optional<Tensor>& lr_tensor,
                     const std::optional<Tensor>& weight_decay_tensor) {
    NorMuonUpdateStorage storage;
    NorMuonUpdate arguments = normuon_update_arguments(params, update, second_momentums, copies, lr, weight_decay,
                                                       scale, cautious, beta2, eps, renormalise, norm_eps, lr_tensor,
                                                       weight_decay_tensor, storage);
    arguments.execution = execution();
    if (arguments.count > 0) run_kernel([&] { cpu::normuon_update(arguments); });
    for (at::TensorList updated : {params, second_momentums, copies}) mark_updated(updated);
}

void newton_schulz_update_(at::TensorList params, const Tensor& update, at::TensorList copies,
                           at::ArrayRef<double> coefficients, double norm_factor, const std::optional<Tensor>& norms,
                           double lr, double weight_decay, double scale, bool cautious,
                           const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& weight_decay_tensor,
                           bool allow_bfloat16) {
    NewtonSchulzStorage newton_schulz_storage;
    MuonUpdateStorage storage;
    auto [orthogonalise, arguments] = newton_schulz_update_arguments(
        params, update, copies, coefficients, norm_factor, norms, lr, weight_decay, scale, cautious, lr_tensor,
        weight_decay_tensor, allow_bfloat16, newton_schulz_storage, storage);
    const Tensor orthogonal = at::empty(update.sizes(), update.options());
    orthogonalise.out = orthogonal.mutable_data_ptr();
    arguments.update = orthogonal.const_data_ptr<float>();
    orthogonalise.execution = arguments.execution = execution();
    if (orthogonalise.batch > 0) {
        run_kernel([&, &orthogonalise = orthogonalise, &arguments = arguments] {
            cpu::newton_schulz(orthogonalise);
            cpu::muon_update(arguments);
        });
    }
    for (at::TensorList updated : {params, copies}) mark_updated(updated);
}

// --- linear ---

void check_linear(const char* op, const Tensor& x, const Tensor& weight) {
    TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), op,
                      ": x and weight must have the shapes (N, I) and (O, I), got ", x.sizes(), " and ",
                      weight.sizes());
    dtype_of(op, "x", x, {at::kFloat});
    check_like(op, "weight", weight, at::kFloat, x.device(), weight.sizes());
}

// `relu_squared` and `x` as in cpu::Linear; `x` may be undefined.
Tensor multiply(cpu::LinearForm form, const Tensor& a, const Tensor& b, int64_t N, int64_t I, int64_t O,
                bool relu_squared = false, const Tensor& x = {}, const Tensor& add_to = {}) {
    const int64_t rows = form == cpu::LinearForm::grad_weight ? O : N;
    Tensor c = at::empty({rows, form == cpu::LinearForm::forward ? O : I}, a.options());
    run_kernel([&] {
        cpu::linear({.form = form,
                     .N = N,
                     .I = I,
                     .O = O,
                     .a = a.const_data_ptr<float>(),
                     .b = b.const_data_ptr<float>(),
                     .c = c.mutable_data_ptr<float>(),
                     .relu_squared = relu_squared,
                     .x = x.defined() ? x.const_data_ptr<float>() : nullptr,
                     .add_to = add_to.defined() ? add_to.const_data_ptr<float>() : nullptr,
                     .execution = execution()});
    });
    return c;
}

Tensor linear(const Tensor& x, const Tensor& weight) {
    check_linear("linear", x, weight);
    return multiply(cpu::LinearForm::forward, x.contiguous(), weight.contiguous(), x.size(0), x.size(1),
                    weight.size(0));
}

Tensor linear_relu_squared(const Tensor& x, const Tensor& weight) {
    check_linear("linear_relu_squared", x, weight);
    return multiply(cpu::LinearForm::forward, x.contiguous(), weight.contiguous(), x.size(0), x.size(1), weight.size(0),
                    true);
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& dy_, const Tensor& x, const Tensor& weight, bool needs_grad_x,
                                           bool needs_grad_weight, const std::optional<Tensor>& add_to) {
    check_linear("linear_backward", x, weight);
    const int64_t N = x.size(0), I = x.size(1), O = weight.size(0);
    check_like("linear_backward", "dy", dy_, at::kFloat, x.device(), {N, O});
    if (add_to) check_like("linear_backward", "add_to", *add_to, at::kFloat, x.device(), {N, I});
    const Tensor dy = dy_.contiguous();
    const Tensor sum = add_to ? add_to->contiguous() : Tensor();
    Tensor dx = needs_grad_x ? multiply(cpu::LinearForm::grad_input, dy, weight.contiguous(), N, I, O, false, {}, sum)
                             : at::empty({0}, x.options());
    Tensor dweight = needs_grad_weight ? multiply(cpu::LinearForm::grad_weight, dy, x.contiguous(), N, I, O)
                                       : at::empty({0}, x.options());
    return {dx, dweight};
}

std::tuple<Tensor, Tensor> linear_backward_relu_squared(const Tensor& dy_, const Tensor& x_, const Tensor& weight) {
    const char* op = "linear_backward_relu_squared";
    check_linear(op, x_, weight);
    const int64_t N = x_.size(0), I = x_.size(1), O = weight.size(0);
    check_like(op, "dy", dy_, at::kFloat, x_.device(), {N, O});
    const Tensor dy = dy_.contiguous(), x = x_.contiguous();
    return {multiply(cpu::LinearForm::grad_input, dy, weight.contiguous(), N, I, O, true, x),
            multiply(cpu::LinearForm::grad_weight, dy, x, N, I, O)};
}

// --- linear_cross_entropy ---

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& x_, const Tensor& weight_, const Tensor& targets_,
                                                        double softcap, int64_t ignore_index,
                                                        c10::string_view reduction, bool needs_grad_x,
                                                        bool needs_grad_weight) {
    const DType dtype =
        check_linear_cross_entropy(x_, weight_, targets_, softcap, reduction, {at::kFloat, at::kDouble, at::kBFloat16});
    const int64_t N = x_.size(0), C = x_.size(1), V = weight_.size(0);
    const Tensor x = x_.contiguous(), weight = weight_.contiguous(), targets = targets_.contiguous();

    const int64_t* target = targets.const_data_ptr<int64_t>();
    int64_t count = 0;
    for (int64_t n = 0; n < N; ++n) {
        if (target[n] == ignore_index) continue;
        TORCH_CHECK_VALUE(target[n] >= 0 && target[n] < V, "linear_cross_entropy: targets must be from 0 to ", V - 1,
                          " or ignore_index ", ignore_index, ", got ", target[n]);
        ++count;
    }

    const bool mean = reduction == "mean";
    const auto loss_type = accumulate_type(x.scalar_type());
    Tensor losses = at::empty({N}, x.options().dtype(loss_type));
    Tensor grad_x = needs_grad_x ? at::empty({N, C}, x.options()) : at::empty({0}, x.options());
    Tensor grad_weight = needs_grad_weight ? at::empty({V, C}, x.options()) : at::empty({0}, x.options());
    if (count == 0) {
        losses.zero_();
        grad_x.zero_();
        grad_weight.zero_();
    } else {
        run_kernel([&] {
            cpu::linear_cross_entropy({.N = N,
                                       .C = C,
                                       .V = V,
                                       .dtype = dtype,
                                       .x = x.const_data_ptr(),
                                       .weight = weight.const_data_ptr(),
                                       .targets = target,
                                       .ignore_index = ignore_index,
                                       .softcap = softcap,
                                       .grad_scale = mean ? 1.0 / static_cast<double>(count) : 1.0,
                                       .loss = losses.mutable_data_ptr(),
                                       .grad_x = needs_grad_x ? grad_x.mutable_data_ptr() : nullptr,
                                       .grad_weight = needs_grad_weight ? grad_weight.mutable_data_ptr() : nullptr,
                                       .execution = execution()});
        });
    }
    if (reduction == "none") return {losses, grad_x, grad_weight};

    double total = 0;
    for (int64_t n = 0; n < N; ++n) {
        total += loss_type == at::kDouble ? losses.const_data_ptr<double>()[n] : losses.const_data_ptr<float>()[n];
    }
    const double loss = mean ? (count ? total / static_cast<double>(count) : std::nan("")) : total;
    return {at::full({}, loss, losses.options()), grad_x, grad_weight};
}

// --- cached_forward_ ---

constexpr size_t kMatrices = 6;   // per block: q, k, v, out, fc, proj

using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;

// Each length is checked against the count before it is added, so that the sum does not overflow.
void check_lengths(const char* op, const std::vector<int64_t>& lengths, int64_t tokens) {
    int64_t left = tokens;
    for (const int64_t length : lengths) {
        TORCH_CHECK_VALUE(length > 0 && length <= left, op, ": lengths must be from 1 and have the sum ", tokens,
                          ", got ", at::IntArrayRef(lengths));
        left -= length;
    }
    TORCH_CHECK_VALUE(left == 0, op, ": lengths must be from 1 and have the sum ", tokens, ", got ",
                      at::IntArrayRef(lengths));
}

Tensor cached_forward_(const Tensor& tokens_, at::IntArrayRef slots, at::IntArrayRef starts, const Tensor& wte,
                       at::TensorList blocks, const Tensor& lm_head, at::IntArrayRef windows, const Tensor& cos,
                       const Tensor& sin, const Tensor& cache, double softcap, bool with_logits, double qk_scale,
                       const OptionalTensors& value_gates, const OptionalTensors& value_tables,
                       const OptionalTensor& resid_lambdas, const OptionalTensor& x0_lambdas,
                       const OptionalTensor& smear_gate, const OptionalTensor& smear_lambda, at::IntArrayRef previous,
                       const OptionalTensor& backout_lambda, at::IntArrayRef lengths_, at::TensorList scales) {
    const char* op = "cached_forward_";
    const auto check_as = [&](at::ScalarType type, const char* name, const Tensor& tensor, at::IntArrayRef shape) {
        check_like(op, name, tensor, type, at::kCPU, shape);
        TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ",
                          tensor.strides());
    };
    const at::ScalarType type = wte.scalar_type();
    const DType dtype = dtype_of(op, "wte", wte, {at::kFloat, at::kBFloat16});
    const auto check = [&](const char* name, const Tensor& tensor, at::IntArrayRef shape) {
        check_as(type, name, tensor, shape);
    };
    const auto check_wide = [&](const char* name, const Tensor& tensor, at::IntArrayRef shape) {
        check_as(at::kFloat, name, tensor, shape);
    };
    // A matrix of the blocks, or lm_head, and its place among the scales.
    const auto matrix = [&](const char* name, const Tensor& tensor, at::IntArrayRef shape, size_t place) {
        check_as(scales.empty() ? type : at::kChar, name, tensor, shape);
        const float* factors = nullptr;
        if (!scales.empty()) {
            check_wide("scales", scales[place], {shape[0]});
            factors = scales[place].const_data_ptr<float>();
        }
        return cpu::WeightMatrix{tensor.const_data_ptr(), factors};
    };
    const bool one_by_one = tokens_.dim() == 1 && !lengths_.empty();
    TORCH_CHECK_VALUE((one_by_one || (tokens_.dim() == 2 && tokens_.size(1) > 0 && lengths_.empty())) &&
                          cache.dim() == 5 && wte.dim() == 2,
                      op,
                      ": tokens, cache and wte must have the shapes (B, T), T from 1, or (N,) with lengths, "
                      "(layers, slots, capacity, 2 Hkv, D) and (V, C), got ",
                      tokens_.sizes(), ", ", cache.sizes(), " and ", wte.sizes(), " with ", lengths_.size(),
                      " lengths");
    std::vector<int64_t> lengths = lengths_.vec();
    if (!one_by_one) lengths.assign(static_cast<size_t>(tokens_.size(0)), tokens_.size(1));
    check_lengths(op, lengths, tokens_.numel());
    const int64_t B = static_cast<int64_t>(lengths.size()), rows = wte.size(0), C = wte.size(1);
    const int64_t V = lm_head.dim() == 2 ? lm_head.size(0) : 0;
    const int64_t layers = cache.size(0), Hkv = cache.size(3) / 2, D = cache.size(4), H = D ? C / D : 0;
    TORCH_CHECK_VALUE(Hkv > 0 && H > 0 && H * D == C && H % Hkv == 0 && D % 2 == 0 && cache.size(3) % 2 == 0, op,
                      ": C is ", C, ", cache has shape ", cache.sizes(), "; they do not fit together");
    TORCH_CHECK_VALUE(static_cast<int64_t>(windows.size()) == layers && blocks.size() == kMatrices * windows.size(), op,
                      ": windows and blocks must have ", layers, " and ", kMatrices * layers, " entries, got ",
                      windows.size(), " and ", blocks.size());
    TORCH_CHECK_VALUE(static_cast<int64_t>(slots.size()) == B && static_cast<int64_t>(starts.size()) == B, op,
                      ": slots and starts must have ", B, " entries, got ", slots.size(), " and ", starts.size());
    check_like(op, "tokens", tokens_, at::kLong, at::kCPU, tokens_.sizes());
    check("wte", wte, {rows, C});
    TORCH_CHECK_VALUE(scales.empty() || scales.size() == blocks.size() + 1, op, ": scales must have ",
                      blocks.size() + 1, " entries or none, got ", scales.size());
    const cpu::WeightMatrix head = matrix("lm_head", lm_head, {V, C}, blocks.size());
    TORCH_CHECK_VALUE(V <= rows, op, ": lm_head must have at most the ", rows, " rows of wte, got ", V);
    check("cache", cache, cache.sizes());
    const int64_t positions = sin.dim() == 2 ? sin.size(0) : 0;
    check_wide("sin", sin, {positions, D / 2});
    check_wide("cos", cos, {positions, D});
    std::vector<cpu::BlockWeights> weights;
    for (int64_t layer = 0; layer < layers; ++layer) {
        const Tensor* own = &blocks[kMatrices * layer];
        const int64_t F = blocks[4].dim() == 2 ? blocks[4].size(0) : 0;
        const int64_t shapes[kMatrices][2] = {{C, C}, {Hkv * D, C}, {Hkv * D, C}, {C, C}, {F, C}, {C, F}};
        const auto data = [&](size_t m) { return matrix("blocks", own[m], shapes[m], kMatrices * layer + m); };
        weights.push_back({
            .q = data(0),
            .k = data(1),
            .v = data(2),
            .out = data(3),
            .fc = data(4),
            .proj = data(5),
            .window = windows[layer],
        });
    }

    TORCH_CHECK_VALUE(std::isfinite(qk_scale), op, ": qk_scale must be finite, got ", qk_scale);
    const auto check_together = [&](const char* a, bool has_a, const char* b, bool has_b) {
        TORCH_CHECK_VALUE(has_a == has_b, op, ": ", a, " and ", b, " must be given together, got ", has_a ? a : b,
                          " alone");
    };
    const auto check_lambdas = [&](const char* name, const OptionalTensor& lambdas, int64_t count) -> const float* {
        if (!lambdas) return nullptr;
        check_wide(name, *lambdas, {count});
        return lambdas->const_data_ptr<float>();
    };
    const auto check_gate = [&](at::ScalarType own, const char* name, const Tensor& gate, int64_t outputs) {
        const int64_t channels = gate.dim() == 2 ? gate.size(1) : 0;
        check_as(own, name, gate, {outputs, channels});
        TORCH_CHECK_VALUE(channels > 0 && channels <= C, op, ": ", name, " must have from 1 to ", C, " columns, got ",
                          channels);
        return channels;
    };
    check_together("resid_lambdas", resid_lambdas.has_value(), "x0_lambdas", x0_lambdas.has_value());
    check_together("smear_gate", smear_gate.has_value(), "smear_lambda", smear_lambda.has_value());
    const int64_t smear_channels = smear_gate ? check_gate(at::kFloat, "smear_gate", *smear_gate, 1) : 0;
    TORCH_CHECK_VALUE(!backout_lambda || layers, op, ": backout_lambda must be None without layers");
    const float *resid = check_lambdas("resid_lambdas", resid_lambdas, layers),
                *x0 = check_lambdas("x0_lambdas", x0_lambdas, layers),
                *smear = check_lambdas("smear_lambda", smear_lambda, 1),
                *backout = check_lambdas("backout_lambda", backout_lambda, 1);
    int64_t value_channels = 0;
    if (!value_gates.empty() || !value_tables.empty()) {
        TORCH_CHECK_VALUE(
            static_cast<int64_t>(value_gates.size()) == layers && static_cast<int64_t>(value_tables.size()) == layers,
            op, ": value_gates and value_tables must have ", layers, " entries or none, got ", value_gates.size(),
            " and ", value_tables.size());
        for (int64_t layer = 0; layer < layers; ++layer) {
            const OptionalTensor gate = value_gates.get(layer), table = value_tables.get(layer);
            check_together("value_gates", gate.has_value(), "value_tables", table.has_value());
            if (!gate) continue;
            const int64_t channels = check_gate(type, "value_gates", *gate, Hkv);
            if (value_channels == 0) value_channels = channels;
            check("value_gates", *gate, {Hkv, value_channels});
            check("value_tables", *table, {rows, Hkv * D});
            weights[layer].value_gate = gate->const_data_ptr();
            weights[layer].value_table = table->const_data_ptr();
        }
    }

    for (int64_t b = 0; b < B; ++b) {
        TORCH_CHECK_VALUE(slots[b] >= 0 && slots[b] < cache.size(1) && starts[b] >= 0 &&
                              starts[b] + lengths[b] <= std::min(cache.size(2), positions),
                          op, ": ", lengths[b], " tokens from position ", starts[b], " of slot ", slots[b],
                          "; there are ", cache.size(1), " slots of ", std::min(cache.size(2), positions),
                          " positions");
        TORCH_CHECK_VALUE(std::find(slots.begin(), slots.begin() + b, slots[b]) == slots.begin() + b, op,
                          ": slots holds ", slots[b], " twice");
    }
    const int64_t entries = smear_gate ? B : 0;
    TORCH_CHECK_VALUE(static_cast<int64_t>(previous.size()) == entries, op, ": previous must have ", entries,
                      " entries ", smear_gate ? "with" : "without", " smear_gate, got ", previous.size());
    for (int64_t b = 0; b < entries; ++b)
        TORCH_CHECK_VALUE(starts[b] ? previous[b] >= 0 && previous[b] < rows : previous[b] == -1, op,
                          ": previous must be -1 at position 0 and a token from 0 to ", rows - 1, " elsewhere, got ",
                          previous[b], " at position ", starts[b]);
    const Tensor tokens = tokens_.contiguous();
    const int64_t* token = tokens.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < tokens.numel(); ++i)
        TORCH_CHECK_VALUE(token[i] >= 0 && token[i] < rows, op, ": tokens must be from 0 to ", rows - 1, ", got ",
                          token[i]);

    Tensor logits = at::empty({with_logits ? B : 0, V}, wte.options().dtype(at::kFloat));
    if (B == 0) return logits;
    run_kernel([&] {
        cpu::cached_forward({.B = B,
                             .C = C,
                             .H = H,
                             .Hkv = Hkv,
                             .D = D,
                             .F = layers ? blocks[4].size(0) : 0,
                             .V = V,
                             .layers = layers,
                             .tokens = token,
                             .lengths = lengths.data(),
                             .slots = slots.data(),
                             .starts = starts.data(),
                             .dtype = dtype,
                             .quantized = !scales.empty(),
                             .wte = wte.const_data_ptr(),
                             .blocks = weights.data(),
                             .lm_head = head,
                             .cos = cos.const_data_ptr<float>(),
                             .sin = sin.const_data_ptr<float>(),
                             .cos_stride = D,
                             .cache = cache.mutable_data_ptr(),
                             .slot_count = cache.size(1),
                             .capacity = cache.size(2),
                             .softcap = softcap,
                             .logits = with_logits ? logits.mutable_data_ptr<float>() : nullptr,
                             .execution = execution(),
                             .qk_scale = qk_scale,
                             .value_channels = value_channels,
                             .resid_lambdas = resid,
                             .x0_lambdas = x0,
                             .smear_gate = smear_gate ? smear_gate->const_data_ptr<float>() : nullptr,
                             .smear_lambda = smear,
                             .smear_channels = smear_channels,
                             .previous = previous.data(),
                             .backout_lambda = backout});
    });
    mark_updated(cache);
    return logits;
}

}   // namespace
}   // namespace nanochat

TORCH_LIBRARY_IMPL(nanochat_native, CPU, m) {
    m.impl("attention_forward", nanochat::attention_forward);
    m.impl("attention_backward", nanochat::attention_backward);
    m.impl("rms_norm", nanochat::rms_norm);
    m.impl("rms_norm_backward", nanochat::rms_norm_backward);
    m.impl("embedding_rms_norm", nanochat::embedding_rms_norm);
    m.impl("mix_rms_norm", nanochat::mix_rms_norm);
    m.impl("mix_rms_norm_backward", nanochat::mix_rms_norm_backward);
    m.impl("add_value_embedding", nanochat::add_value_embedding);
    m.impl("add_value_embedding_backward", nanochat::add_value_embedding_backward);
    m.impl("smear", nanochat::smear);
    m.impl("smear_backward", nanochat::smear_backward);
    m.impl("rotary_norm", nanochat::rotary_norm);
    m.impl("rotary_norm_backward", nanochat::rotary_norm_backward);
    m.impl("relu_squared", nanochat::relu_squared);
    m.impl("relu_squared_", nanochat::relu_squared_);
    m.impl("relu_squared_backward", nanochat::relu_squared_backward);
    m.impl("relu_squared_backward_", nanochat::relu_squared_backward_);
    m.impl("newton_schulz", nanochat::newton_schulz);
    m.impl("adamw_", nanochat::adamw_);
    m.impl("muon_momentum_", nanochat::muon_momentum_);
    m.impl("muon_update_", nanochat::muon_update_);
    m.impl("normuon_update_", nanochat::normuon_update_);
    m.impl("newton_schulz_update_", nanochat::newton_schulz_update_);
    m.impl("linear", nanochat::linear);
    m.impl("linear_backward", nanochat::linear_backward);
    m.impl("linear_relu_squared", nanochat::linear_relu_squared);
    m.impl("linear_backward_relu_squared", nanochat::linear_backward_relu_squared);
    m.impl("linear_cross_entropy", nanochat::linear_cross_entropy);
    m.impl("cached_forward_", nanochat::cached_forward_);
}
