// The operators on CUDA tensors: check, allocate, call csrc/kernels.h on the current stream of the tensors' device.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "tensor_checks.h"

namespace nanochat {
namespace {

using at::Tensor;

// Returns a cudaStream_t, through the generic interface: torch's own CUDA headers do not compile with a CPU-only torch.
void* current_stream(at::Device device) {
    return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// The tensor may be freed before the kernel has run: torch's allocator reuses its memory on the same stream only.
Tensor workspace(int64_t bytes, at::Device device) {
    return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
}

// Runs a kernel on the current stream of `device`, with the workspace that it asks for. `workspace_bytes` may be null.
template <class Arguments>
void launch(void (*kernel)(const Arguments&), int64_t (*workspace_bytes)(const Arguments&), Arguments arguments,
            at::Device device) {
    run_kernel([&] {
        const Tensor space = workspace(workspace_bytes ? workspace_bytes(arguments) : 0, device);
        arguments.execution.workspace = space.mutable_data_ptr();
        arguments.execution.stream = current_stream(device);
        kernel(arguments);
    });
}

// The current GPU; what the runtime refuses is a Python error.
cuda::Device current_gpu() {
    cuda::Device gpu = {};
    run_kernel([&] { gpu = cuda::current_device(); });
    return gpu;
}

// --- attention ---

// Copies a tensor that the kernels cannot read in chunks of 16 bytes at multiples of 16, or that expand() repeats.
Tensor with_whole_chunks(const Tensor& tensor) {
    constexpr int64_t kChunk = 16;
    const int64_t bytes = tensor.element_size();
    bool whole = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kChunk == 0 && tensor.stride(3) == 1;
    for (int i = 0; i < 3; ++i) {
        if (tensor.size(i) > 1) whole = whole && tensor.stride(i) > 0 && tensor.stride(i) * bytes % kChunk == 0;
    }
    return whole ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

constexpr at::ScalarType kAttentionTypes[] = {at::kBFloat16, at::kHalf};

// The kernel clamps `lengths`: a check here would have to wait for the stream.
std::tuple<Tensor, Tensor> attention_forward(const Tensor& q_, const Tensor& k_, const Tensor& v_, bool causal,
                                             int64_t window, double scale, const std::optional<Tensor>& lengths_) {
    const char* op = "attention_forward";
    const AttentionShape shape = check_attention(op, q_, k_, v_, causal, window, scale, lengths_);
    const DType dtype = dtype_of(op, "q", q_, kAttentionTypes);
    const at::Device device = q_.device();
    const c10::DeviceGuard guard(device);
    Tensor out = at::empty(q_.sizes(), q_.options());
    Tensor lse = at::empty({shape.B, shape.H, shape.Tq}, q_.options().dtype(at::kFloat));
    if (k_.numel() == 0 || q_.numel() == 0) {
        return {out.zero_(), lse.fill_(-std::numeric_limits<double>::infinity())};
    }
    const Tensor q = with_whole_chunks(q_), k = with_whole_chunks(k_), v = with_whole_chunks(v_);
    const Tensor lengths = lengths_ ? lengths_->contiguous() : Tensor();
    AttentionForward arguments = attention_forward_arguments(shape, dtype, q, k, v, out, lse, lengths);
    arguments.execution.device = current_gpu();
    launch(cuda::attention_forward, cuda::attention_forward_workspace_bytes, arguments, device);
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout_, const Tensor& q_, const Tensor& k_,
                                                      const Tensor& v_, const Tensor& out_, const Tensor& lse_,
                                                      bool causal, int64_t window, double scale) {
    const char* op = "attention_backward";
    const AttentionShape shape = check_attention(op, q_, k_, v_, causal, window, scale, std::nullopt);
    const DType dtype = dtype_of(op, "q", q_, kAttentionTypes);
    check_attention_results(op, shape, q_, dout_, out_, lse_, at::kFloat);
    const at::Device device = q_.device();
    const c10::DeviceGuard guard(device);
    Tensor dq = at::empty(q_.sizes(), q_.options());
    Tensor dk = at::empty(k_.sizes(), k_.options());
    Tensor dv = at::empty(v_.sizes(), v_.options());
    if (k_.numel() == 0 || q_.numel() == 0) {
        return {dq.zero_(), dk.zero_(), dv.zero_()};
    }
    const Tensor q = with_whole_chunks(q_), k = with_whole_chunks(k_), v = with_whole_chunks(v_);
    const Tensor dout = with_whole_chunks(dout_), out = with_whole_chunks(out_), lse = lse_.contiguous();
    AttentionBackward arguments = attention_backward_arguments(shape, dtype, q, k, v, out, dout, lse, dq, dk, dv);
    arguments.execution.device = current_gpu();
    launch(cuda::attention_backward, cuda::attention_backward_workspace_bytes, arguments, device);
    return {dq, dk, dv};
}

// --- the norms, the rotation and relu_squared ---

constexpr at::ScalarType kElementTypes[] = {at::kFloat, at::kBFloat16};

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const std::optional<Tensor>& residual, double eps) {
    const c10::DeviceGuard guard(x.device());
    RMSNormStorage storage;
    const RMSNorm arguments = rms_norm_arguments(x, residual, eps, kElementTypes, storage);
    launch(cuda::rms_norm, {}, arguments, x.device());
    return {storage.sum, storage.y, storage.r};
}

Tensor rms_norm_backward(const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& y, const Tensor& r) {
    const c10::DeviceGuard guard(y.device());
    RMSNormBackwardStorage storage;
    const RMSNormBackward arguments = rms_norm_backward_arguments(dy, dsum, y, r, kElementTypes, storage);
    launch(cuda::rms_norm_backward, {}, arguments, y.device());
    return storage.dx;
}

// The host does not check the range of the tokens: it would have to wait for the stream. See kernels.h.
std::tuple<Tensor, Tensor> embedding_rms_norm(const Tensor& tokens, const Tensor& table, at::ScalarType dtype,
                                              double eps) {
    const c10::DeviceGuard guard(table.device());
    EmbeddingRMSNormStorage storage;
    const EmbeddingRMSNorm arguments = embedding_rms_norm_arguments(tokens, table, dtype, eps, kElementTypes, storage);
    launch(cuda::embedding_rms_norm, {}, arguments, table.device());
    return {storage.y, storage.r};
}

// Nor that of the ids.
Tensor add_value_embedding(const Tensor& v, const Tensor& h, const Tensor& gate, const Tensor& table,
                           const Tensor& ids) {
    const c10::DeviceGuard guard(v.device());
    AddValueEmbeddingStorage storage;
    const AddValueEmbedding arguments = add_value_embedding_arguments(v, h, gate, table, ids, kElementTypes, storage);
    launch(cuda::add_value_embedding, {}, arguments, v.device());
    return storage.out;
}

std::tuple<Tensor, Tensor, Tensor> add_value_embedding_backward(const Tensor& dout, const Tensor& h, const Tensor& gate,
                                                                const Tensor& table, const Tensor& ids) {
    const c10::DeviceGuard guard(dout.device());
    AddValueEmbeddingBackwardStorage storage;
    const AddValueEmbeddingBackward arguments =
        add_value_embedding_backward_arguments(dout, h, gate, table, ids, kElementTypes, storage);
    launch(cuda::add_value_embedding_backward, cuda::add_value_embedding_backward_workspace_bytes, arguments,
           dout.device());
    return {storage.dh, storage.dgate, storage.drows};
}

Tensor smear(const Tensor& x, const Tensor& gate, const Tensor& lambda) {
    const c10::DeviceGuard guard(x.device());
    SmearStorage storage;
    const Smear arguments = smear_arguments(x, gate, lambda, kElementTypes, storage);
    launch(cuda::smear, {}, arguments, x.device());
    return storage.out;
}

std::tuple<Tensor, Tensor, Tensor> smear_backward(const Tensor& dout, const Tensor& x, const Tensor& gate,
                                                  const Tensor& lambda) {
    const c10::DeviceGuard guard(x.device());
    SmearBackwardStorage storage;
    const SmearBackward arguments = smear_backward_arguments(dout, x, gate, lambda, kElementTypes, storage);
    launch(cuda::smear_backward, cuda::smear_backward_workspace_bytes, arguments, x.device());
    return {storage.dx, storage.dgate, storage.dlambda};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_rms_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                                        const Tensor& x0, const Tensor& x_scale, const Tensor& x0_scale,
                                                        double eps) {
    const c10::DeviceGuard guard(x.device());
    MixRMSNormStorage storage;
    const MixRMSNorm arguments =
        mix_rms_norm_arguments(x, residual, x0, x_scale, x0_scale, eps, kElementTypes, storage);
    launch(cuda::mix_rms_norm, {}, arguments, x.device());
    return {storage.z, storage.mixed, storage.y, storage.r};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_rms_norm_backward(const Tensor& dy, const std::optional<Tensor>& dz,
                                                                 const std::optional<Tensor>& dmixed,
                                                                 const std::optional<Tensor>& add_to, const Tensor& y,
                                                                 const Tensor& r, const Tensor& z, const Tensor& x0,
                                                                 const Tensor& x_scale, const Tensor& x0_scale) {
    const c10::DeviceGuard guard(y.device());
    MixRMSNormBackwardStorage storage;
    const MixRMSNormBackward arguments =
        mix_rms_norm_backward_arguments(dy, dz, dmixed, add_to, y, r, z, x0, x_scale, x0_scale, kElementTypes, storage);
    launch(cuda::mix_rms_norm_backward, cuda::mix_rms_norm_backward_workspace_bytes, arguments, y.device());
    return {storage.dx, storage.dx0, storage.dx_scale, storage.dx0_scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rotary_norm(const Tensor& q, const Tensor& k, const Tensor& cos,
                                                       const Tensor& sin, double eps, double scale) {
    const c10::DeviceGuard guard(q.device());
    RotaryNormStorage storage;
    const RotaryNorm arguments = rotary_norm_arguments(q, k, cos, sin, eps, scale, kElementTypes, storage);
    launch(cuda::rotary_norm, {}, arguments, q.device());
    return {storage.q_out, storage.k_out, storage.q_r, storage.k_r};
}

std::tuple<Tensor, Tensor> rotary_norm_backward(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q_out,
                                                const Tensor& k_out, const Tensor& q_r, const Tensor& k_r,
                                                const Tensor& cos, const Tensor& sin, double scale) {
    const c10::DeviceGuard guard(dq_out.device());
    RotaryNormBackwardStorage storage;
    const RotaryNormBackward arguments =
        rotary_norm_backward_arguments(dq_out, dk_out, q_out, k_out, q_r, k_r, cos, sin, scale, kElementTypes, storage);
    launch(cuda::rotary_norm_backward, {}, arguments, dq_out.device());
    return {storage.dq, storage.dk};
}

Tensor run_relu_squared(const Tensor& x, bool in_place) {
    const c10::DeviceGuard guard(x.device());
    ReluSquaredStorage storage;
    const ReluSquared arguments = relu_squared_arguments(x, in_place, kElementTypes, storage);
    launch(cuda::relu_squared, {}, arguments, x.device());
    return storage.y;
}

Tensor relu_squared(const Tensor& x) { return run_relu_squared(x, false); }

void relu_squared_(const Tensor& x) {
    run_relu_squared(x, true);
    mark_updated(x);
}

Tensor run_relu_squared_backward(const Tensor& dy, const Tensor& y, bool in_place) {
    const c10::DeviceGuard guard(dy.device());
    ReluSquaredBackwardStorage storage;
    const ReluSquaredBackward arguments = relu_squared_backward_arguments(dy, y, in_place, kElementTypes, storage);
    launch(cuda::relu_squared_backward, {}, arguments, dy.device());
    return storage.dx;
}

Tensor relu_squared_backward(const Tensor& dy, const Tensor& y) { return run_relu_squared_backward(dy, y, false); }

void relu_squared_backward_(const Tensor& dy, const Tensor& y) {
    run_relu_squared_backward(dy, y, true);
    mark_updated(dy);
}

// --- newton_schulz ---

void run_newton_schulz(NewtonSchulz arguments, at::Device device) {
    arguments.execution.device = current_gpu();
    arguments.form = cuda::newton_schulz_form(arguments);
    launch(cuda::newton_schulz, cuda::newton_schulz_workspace_bytes, arguments, device);
}

Tensor newton_schulz(const Tensor& g, at::ArrayRef<double> coefficients, double norm_factor,
                     const std::optional<Tensor>& norms, const std::optional<Tensor>& scales, bool allow_bfloat16) {
    const c10::DeviceGuard guard(g.device());
    NewtonSchulzStorage storage;
    NewtonSchulz arguments = newton_schulz_arguments("newton_schulz", "g", g, coefficients, norm_factor, norms, scales,
                                                     allow_bfloat16, {at::kFloat}, storage);
    Tensor out = at::empty(g.sizes(), g.options());
    arguments.out = out.mutable_data_ptr();
    if (arguments.batch > 0) run_newton_schulz(arguments, g.device());
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
    const at::Device device = params[0].device();
    const c10::DeviceGuard guard(device);
    arguments.execution.device = current_gpu();
    launch(cuda::adamw, cuda::adamw_workspace_bytes, arguments, device);
    for (at::TensorList updated : {params, exp_avgs, exp_avg_sqs, copies}) mark_updated(updated);
}

std::tuple<Tensor, Tensor> muon_momentum_(at::TensorList grads, at::TensorList momentum_buffers, double momentum,
                                          bool nesterov, bool with_norms, const std::optional<Tensor>& momentum_tensor,
                                          bool with_row_norms) {
    MuonMomentumStorage storage;
    MuonMomentum arguments = muon_momentum_arguments(grads, momentum_buffers, momentum, nesterov, with_norms,
                                                     momentum_tensor, with_row_norms, storage);
    const at::Device device = grads[0].device();
    const c10::DeviceGuard guard(device);
    arguments.execution.device = current_gpu();
    launch(cuda::muon_momentum, cuda::muon_momentum_workspace_bytes, arguments, device);
    mark_updated(momentum_buffers);
    if (with_row_norms && arguments.numel > 0)
        return {storage.update, at::linalg_vector_norm(storage.update, 2, {-1}).to(at::kDouble)};
    return {storage.update, storage.norms};
}

void muon_update_(at::TensorList params, const Tensor& update, at::TensorList copies, double lr, double weight_decay,
                  double scale, bool cautious, const std::optional<Tensor>& lr_tensor,
                  const std::optional<Tensor>& weight_decay_tensor) {
    MuonUpdateStorage storage;
    MuonUpdate arguments = muon_update_arguments("muon_update_", params, update, copies, lr, weight_decay, scale,
                                                 cautious, lr_tensor, weight_decay_tensor, storage);
    const at::Device device = params[0].device();
    const c10::DeviceGuard guard(device);
    arguments.execution.device = current_gpu();
    launch(cuda::muon_update, {}, arguments, device);
    for (at::TensorList updated : {params, copies}) mark_updated(updated);
}

void normuon_update_(at::TensorList params, const Tensor& update, at::TensorList second_momentums,
                     at::TensorList copies, double lr, double weight_decay, double scale, bool cautious, double beta2,
                     double eps, bool renormalise, double norm_eps, const std::optional<Tensor>& lr_tensor,
                     const std::optional<Tensor>& weight_decay_tensor) {
    NorMuonUpdateStorage storage;
    const NorMuonUpdate arguments = normuon_update_arguments(params, update, second_momentums, copies, lr, weight_decay,
                                                             scale, cautious, beta2, eps, renormalise, norm_eps,
                                                             lr_tensor, weight_decay_tensor, storage);
    const at::Device device = params[0].device();
    const c10::DeviceGuard guard(device);
    if (arguments.count > 0) launch(cuda::normuon_update, cuda::normuon_update_workspace_bytes, arguments, device);
    for (at::TensorList updated : {params, second_momentums, copies}) mark_updated(updated);
}

// The epilogue of the last product updates the parameters, which saves a pass over memory and a tensor.
void newton_schulz_update_(at::TensorList params, const Tensor& update, at::TensorList copies,
                           at::ArrayRef<double> coefficients, double norm_factor, const std::optional<Tensor>& norms,
                           double lr, double weight_decay, double scale, bool cautious,
                           const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& weight_decay_tensor,
                           bool allow_bfloat16) {
    const c10::DeviceGuard guard(update.device());
    NewtonSchulzStorage newton_schulz_storage;
    MuonUpdateStorage storage, matrices;
    auto [orthogonalise, arguments] = newton_schulz_update_arguments(
        params, update, copies, coefficients, norm_factor, norms, lr, weight_decay, scale, cautious, lr_tensor,
        weight_decay_tensor, allow_bfloat16, newton_schulz_storage, storage);
    // A parameter may hold several matrices.
    const int64_t numel = orthogonalise.M * orthogonalise.K;
    const auto split = [&](const std::vector<void*>& whole, int64_t element_size, std::vector<void*>& parts) {
        for (void* tensor : whole) {
            for (int64_t i = 0; i < orthogonalise.batch / arguments.count; ++i) {
                parts.push_back(static_cast<char*>(tensor) + i * numel * element_size);
            }
        }
    };
    split(storage.params, params[0].element_size(), matrices.params);
    split(storage.copies, sizeof(uint16_t), matrices.copies);
    arguments.params = matrices.params.data();
    if (arguments.copies) arguments.copies = matrices.copies.data();
    arguments.count = orthogonalise.batch;
    arguments.numel = numel;
    orthogonalise.update = &arguments;
    if (orthogonalise.batch > 0) run_newton_schulz(orthogonalise, update.device());
    for (at::TensorList updated : {params, copies}) mark_updated(updated);
}

// --- linear_cross_entropy ---

// The logits of one chunk of rows take at most this many bytes: 2,048 rows of 65,536 in bfloat16. The three products then
// fill a large GPU, and a pass over the (V, C) gradient of the weight takes a tenth of the time of its product.
constexpr int64_t kLogitBytes = int64_t{256} << 20;
constexpr int64_t kRowTile = 128;   // of the library's products; chunks are multiples of it if possible

// kLogitBytes, or the environment variable that overrides it.
int64_t logit_bytes() {
    const char* text = std::getenv("NANOCHAT_LOGIT_BYTES");
    if (!text || !*text) return kLogitBytes;
    int64_t bytes = 0;
    const char* end = text + std::strlen(text);
    const auto [stopped, error] = std::from_chars(text, end, bytes);
    TORCH_CHECK_VALUE(error == std::errc() && stopped == end && bytes > 0,
                      "NANOCHAT_LOGIT_BYTES must be a number of bytes > 0, got ", text);
    return bytes;
}

int64_t chunk_rows(int64_t N, int64_t row_bytes) {
    const int64_t most = std::max<int64_t>(1, logit_bytes() / row_bytes), chunks = (N + most - 1) / most;
    const int64_t even = chunks > 0 ? (N + chunks - 1) / chunks : 0;
    return std::min(most, (even + kRowTile - 1) / kRowTile * kRowTile);
}

// out = a b, or out += a b, with torch's library. Factors of bfloat16 may have float32 sums: torch
// can add to these since pull request 167931, before 2.11.
void multiply(Tensor out, const Tensor& a, const Tensor& b, bool accumulate = false) {
    const at::ScalarType type = out.scalar_type();
    if (type == a.scalar_type()) {
        accumulate ? at::addmm_out(out, out, a, b) : at::mm_out(out, a, b);
    } else {
        accumulate ? at::addmm_out(out, out, a, b, type) : at::mm_out(out, a, b, type);
    }
}

// The host never waits for the device. It neither checks the targets (see kernels.h) nor knows how many are not ignored.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& x_, const Tensor& weight_, const Tensor& targets_,
                                                        double softcap, int64_t ignore_index,
                                                        c10::string_view reduction, bool needs_grad_x,
                                                        bool needs_grad_weight) {
    const DType dtype =
        check_linear_cross_entropy(x_, weight_, targets_, softcap, reduction, {at::kFloat, at::kBFloat16});
    const at::Device device = x_.device();
    const int64_t N = x_.size(0), C = x_.size(1), V = weight_.size(0);
    const c10::DeviceGuard guard(device);
    const at::AutoDispatchBelowADInplaceOrView no_autograd;   // it would reject the products' out=
    const Tensor x = x_.contiguous(), weight = weight_.contiguous(), targets = targets_.contiguous();
    const at::TensorOptions float32 = x.options().dtype(at::kFloat);
    const bool mean = reduction == "mean", gradients = needs_grad_x || needs_grad_weight;
    const int64_t rows = chunk_rows(N, V * x.element_size());

    Tensor count, grad_scale;
    if (mean) count = at::sum(at::ne(targets, ignore_index));
    // If all targets are ignored, this is infinity, and nothing is multiplied by it.
    if (gradients) grad_scale = mean ? at::reciprocal(count.to(at::kFloat)) : at::ones({}, float32);

    Tensor losses = at::empty({N}, float32);
    const Tensor grad_x = needs_grad_x ? at::empty({N, C}, x.options()) : at::empty({0}, x.options());
    // In float32 if several chunks add to it, so that it is rounded only once.
    Tensor grad_weight = at::empty({0}, x.options());
    if (needs_grad_weight) grad_weight = at::empty({V, C}, N > rows ? float32 : x.options());
    if (N == 0) grad_weight.zero_();
    const Tensor buffer = at::empty({std::min(rows, N), V}, x.options());
    for (int64_t first = 0; first < N; first += rows) {
        const int64_t own = std::min(rows, N - first);
        const Tensor chunk = x.narrow(0, first, own), logits = buffer.narrow(0, 0, own);
        multiply(logits, chunk, weight.t());
        const cuda::SoftcapCrossEntropy arguments = {
            .rows = own,
            .V = V,
            .dtype = dtype,
            .logits = logits.mutable_data_ptr(),
            .targets = targets.const_data_ptr<int64_t>() + first,
            .ignore_index = ignore_index,
            .softcap = softcap,
            .grad_scale = gradients ? grad_scale.const_data_ptr<float>() : nullptr,
            .loss = losses.mutable_data_ptr<float>() + first,
            .execution = {},
        };
        launch(cuda::softcap_cross_entropy, {}, arguments, device);
        if (needs_grad_x) multiply(grad_x.narrow(0, first, own), logits, weight);
        if (needs_grad_weight) multiply(grad_weight, logits.t(), chunk, first > 0);
    }
    grad_weight = grad_weight.to(x.scalar_type());

    if (reduction == "none") return {losses, grad_x, grad_weight};
    const Tensor total = at::sum(losses, at::kDouble);
    return {(mean ? at::div(total, count) : total).to(at::kFloat), grad_x, grad_weight};
}

}   // namespace
}   // namespace nanochat

TORCH_LIBRARY_IMPL(nanochat_native, CUDA, m) {
    m.impl("attention_forward", nanochat::attention_forward);
    m.impl("attention_backward", nanochat::attention_backward);
    m.impl("rms_norm", nanochat::rms_norm);
    m.impl("rms_norm_backward", nanochat::rms_norm_backward);
    m.impl("embedding_rms_norm", nanochat::embedding_rms_norm);
    m.impl("add_value_embedding", nanochat::add_value_embedding);
    m.impl("add_value_embedding_backward", nanochat::add_value_embedding_backward);
    m.impl("smear", nanochat::smear);
    m.impl("smear_backward", nanochat::smear_backward);
    m.impl("mix_rms_norm", nanochat::mix_rms_norm);
    m.impl("mix_rms_norm_backward", nanochat::mix_rms_norm_backward);
    m.impl("rotary_norm", nanochat::rotary_norm);
    m.impl("rotary_norm_backward", nanochat::rotary_norm_backward);
    m.impl("relu_squared", nanochat::relu_squared);
    m.impl("relu_squared_", nanochat::relu_squared_);
    m.impl("relu_squared_backward", nanochat::relu_squared_backward);
    m.impl("relu_squared_backward_", nanochat::relu_squared_backward_);
    m.impl("adamw_", nanochat::adamw_);
    m.impl("muon_momentum_", nanochat::muon_momentum_);
    m.impl("muon_update_", nanochat::muon_update_);
    m.impl("normuon_update_", nanochat::normuon_update_);
    m.impl("newton_schulz", nanochat::newton_schulz);
    m.impl("newton_schulz_update_", nanochat::newton_schulz_update_);
    m.impl("linear_cross_entropy", nanochat::linear_cross_entropy);
}
