// The signature of every operator. ops_cpu.cpp and ops_cuda.cpp implement them; nanochat_native/ops adds fakes, gradients
// and the documentation of the arguments.
#include <torch/library.h>

TORCH_LIBRARY(nanochat_native, m) {
    const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

    // window -1: none. lengths (B,): the number of keys of each sequence. lse (B, H, Tq): the log-sum-exp of the scaled
    // scores, for the backward pass.
    m.def(
        "attention_forward(Tensor q, Tensor k, Tensor v, bool causal, int window, float scale, Tensor? lengths=None) "
        "-> (Tensor out, Tensor lse)",
        tags);
    m.def(
        "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, "
        "int window, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
        tags);

    // sum = x + residual and its norm y; r: 1 / root mean square of each row. sum is empty without a residual.
    m.def("rms_norm(Tensor x, Tensor? residual, float eps) -> (Tensor sum, Tensor y, Tensor r)", tags);
    m.def("rms_norm_backward(Tensor dy, Tensor? dsum, Tensor y, Tensor r) -> Tensor dx", tags);
    m.def("embedding_rms_norm(Tensor tokens, Tensor table, ScalarType dtype, float eps) -> (Tensor y, Tensor r)", tags);

    // z = x + residual, mixed = x_scale z + x0_scale x0, and its norm y. x_scale and x0_scale hold one number each. z is
    // empty without a residual. The backward pass takes x for it, and dx0 includes add_to.
    m.def(
        "mix_rms_norm(Tensor x, Tensor? residual, Tensor x0, Tensor x_scale, Tensor x0_scale, float eps) "
        "-> (Tensor z, Tensor mixed, Tensor y, Tensor r)",
        tags);
    m.def(
        "mix_rms_norm_backward(Tensor dy, Tensor? dz, Tensor? dmixed, Tensor? add_to, Tensor y, Tensor r, Tensor z, "
        "Tensor x0, Tensor x_scale, Tensor x0_scale) -> (Tensor dx, Tensor dx0, Tensor dx_scale, Tensor dx0_scale)",
        tags);

    // v (..., Hkv, D), h (..., I), gate (Hkv, I), table (V, Hkv D), ids (...). drows: the gradient of table[ids].
    m.def("add_value_embedding(Tensor v, Tensor h, Tensor gate, Tensor table, Tensor ids) -> Tensor", tags);
    m.def(
        "add_value_embedding_backward(Tensor dout, Tensor h, Tensor gate, Tensor table, Tensor ids) "
        "-> (Tensor dh, Tensor dgate, Tensor drows)",
        tags);

    // x (B, T, C), gate (1, I), smear_lambda (1).
    m.def("smear(Tensor x, Tensor gate, Tensor smear_lambda) -> Tensor", tags);
    m.def(
        "smear_backward(Tensor dout, Tensor x, Tensor gate, Tensor smear_lambda) "
        "-> (Tensor dx, Tensor dgate, Tensor dlambda)",
        tags);

    // q (B, T, H, D), k (B, T, Hkv, D), cos and sin (T, D / 2).
    m.def(
        "rotary_norm(Tensor q, Tensor k, Tensor cos, Tensor sin, float eps, float scale) "
        "-> (Tensor q_out, Tensor k_out, Tensor q_r, Tensor k_r)",
        tags);
    m.def(
        "rotary_norm_backward(Tensor dq_out, Tensor dk_out, Tensor q_out, Tensor k_out, Tensor q_r, Tensor k_r, "
        "Tensor cos, Tensor sin, float scale) -> (Tensor dq, Tensor dk)",
        tags);

    // The backward pass takes the result y. The forms with _ overwrite x and dy.
    m.def("relu_squared(Tensor x) -> Tensor", tags);
    m.def("relu_squared_(Tensor(a!) x) -> ()", tags);
    m.def("relu_squared_backward(Tensor dy, Tensor y) -> Tensor", tags);
    m.def("relu_squared_backward_(Tensor(a!) dy, Tensor y) -> ()", tags);

    // coefficients: a, b, c of each step, in order.
    // scales (..., M): the factors of the rows of g, which replace norm_factor and norms.
    // allow_bfloat16: see NewtonSchulz. CUDA ignores it.
    m.def(
        "newton_schulz(Tensor g, float[] coefficients, float norm_factor, Tensor? norms, Tensor? scales=None, "
        "bool allow_bfloat16=False) -> Tensor",
        tags);

    // copies: the updated float32 params in bfloat16, or an empty list.
    // A *_tensor, 0-d and on the device, replaces the number of the same name (step int64, the others float64). A captured
    // CUDA graph reads it on each replay.
    m.def(
        "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] "
        "copies, *, int step, float lr, float beta1, float beta2, float eps, float weight_decay, "
        "bool stochastic_rounding, int seed, bool cautious, Tensor? step_tensor, Tensor? lr_tensor, "
        "Tensor? weight_decay_tensor) -> ()",
        tags);
    // norms: float64, (count,) if with_norms, the shape of update without its last dimension if with_row_norms, else empty.
    m.def(
        "muon_momentum_(Tensor[] grads, Tensor(a!)[] momentum_buffers, float momentum, bool nesterov, bool with_norms, "
        "Tensor? momentum_tensor, bool with_row_norms=False) -> (Tensor update, Tensor norms)",
        tags);
    m.def(
        "muon_update_(Tensor(a!)[] params, Tensor update, Tensor(b!)[] copies, float lr, float weight_decay, "
        "float scale, bool cautious, Tensor? lr_tensor, Tensor? weight_decay_tensor) -> ()",
        tags);

    // second_momentums: (..., M, 1) for params (..., M, K) if M >= K, else (..., 1, K).
    m.def(
        "normuon_update_(Tensor(a!)[] params, Tensor update, Tensor(b!)[] second_momentums, Tensor(c!)[] copies, "
        "float lr, float weight_decay, float scale, bool cautious, float beta2, float eps, bool renormalise, "
        "float norm_eps, Tensor? lr_tensor, Tensor? weight_decay_tensor) -> ()",
        tags);

    // newton_schulz and muon_update_ in one.
    m.def(
        "newton_schulz_update_(Tensor(a!)[] params, Tensor update, Tensor(b!)[] copies, float[] coefficients, "
        "float norm_factor, Tensor? norms, float lr, float weight_decay, float scale, bool cautious, "
        "Tensor? lr_tensor, Tensor? weight_decay_tensor, bool allow_bfloat16=False) -> ()",
        tags);

    // x (N, I), weight (O, I), dy (N, O). A gradient that is not needed is empty.
    m.def("linear(Tensor x, Tensor weight) -> Tensor", tags);
    m.def(
        "linear_backward(Tensor dy, Tensor x, Tensor weight, bool needs_grad_x, bool needs_grad_weight, "
        "Tensor? add_to=None) -> (Tensor dx, Tensor dweight)",
        tags);

    // relu_squared(linear(x, weight)), and the gradients of linear(relu_squared(h), weight) for h, x being relu_squared(h).
    m.def("linear_relu_squared(Tensor x, Tensor weight) -> Tensor", tags);
    m.def("linear_backward_relu_squared(Tensor dy, Tensor x, Tensor weight) -> (Tensor dh, Tensor dweight)", tags);

    // blocks: c_q, c_k, c_v, c_proj, c_fc, c_proj of each layer, in order. windows: one per layer, -1 none. value_gates and
    // value_tables: none, or one per layer, which may be None. previous: B tokens with smear, -1 none. tokens: (B, T), or
    // (N,) with B lengths. logits: (B, V) if requested, else empty.
    m.def(
        "cached_forward_(Tensor tokens, int[] slots, int[] starts, Tensor wte, Tensor[] blocks, Tensor lm_head, "
        "int[] windows, Tensor cos, Tensor sin, Tensor(a!) cache, float softcap, bool with_logits, float qk_scale, "
        "Tensor?[] value_gates, Tensor?[] value_tables, Tensor? resid_lambdas, Tensor? x0_lambdas, "
        "Tensor? smear_gate, Tensor? smear_lambda, int[] previous, Tensor? backout_lambda, int[] lengths, "
        "Tensor[] scales) -> Tensor logits",
        tags);

    // x (N, C), weight (V, C), targets (N,); reduction "mean", "sum" or "none". A gradient that is not needed is empty.
    m.def(
        "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, float softcap, int ignore_index, str reduction, "
        "bool needs_grad_x, bool needs_grad_weight) -> (Tensor loss, Tensor grad_x, Tensor grad_weight)",
        tags);
}
