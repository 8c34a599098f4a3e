// The whole native API. Every kernel takes one struct of named arguments: raw pointers, sizes, and where it runs.
// Callers check shapes and types. A kernel throws std::invalid_argument only for arguments that it does not support.
//
// Shape letters: B batch, Tq queries, Tk keys, H query heads, Hkv key/value heads, D head size,
//                N rows (tokens), C channels, V vocabulary, (M, K) one matrix.
#pragma once

#include <cstdint>

namespace nanochat {

enum class DType : int32_t { float32, float64, bfloat16, float16 };

// Element strides of a (B, T, H, D) tensor whose D has unit stride.
struct Strides {
    int64_t b, t, h;
};

namespace cuda {

// The properties of a GPU that decide which kernels it runs.
struct Device {
    int multiprocessors;
    bool hopper;   // runs code for sm_90a: tensor copies and wgmma
};

}   // namespace cuda

// Where a kernel runs. CPU kernels read `threads`, CUDA kernels read the rest.
struct Execution {
    int threads = 1;
    cuda::Device device = {};    // read by kernels with a variant for Hopper, and by those whose blocks stay on the GPU
    void* workspace = nullptr;   // as many bytes of device memory as *_workspace_bytes() returns, 16-byte aligned
    void* stream = nullptr;      // a cudaStream_t
};

// Scores are scale * q.k. `causal` is aligned bottom-right: query i sees keys j <= i + Tk - Tq.
// window >= 0 (which implies causal): it sees i + Tk - Tq - window <= j <= i + Tk - Tq. window = -1: no limit.
struct AttentionShape {
    int64_t B, Tq, Tk, H, Hkv, D;
    bool causal;
    int64_t window;
    double scale;
};

struct AttentionForward {
    AttentionShape shape;
    // CPU: float32 | float64 | bfloat16 (computed in float32; avx512_bf16, amx and neon_bf16 multiply bfloat16 numbers
    // and add in float32); CUDA: bfloat16 | float16
    DType dtype;
    const void* q;   // (B, Tq, H, D)
    const void* k;   // (B, Tk, Hkv, D)
    const void* v;   // (B, Tk, Hkv, D)
    void* out;       // (B, Tq, H, D)
    Strides q_strides, k_strides, v_strides, out_strides;
    void* lse;   // (B, H, Tq) contiguous, natural log; float64 if dtype is, else float32; -inf for a masked row
    // (B,) number of keys of each sequence, at most Tk, or null: all have Tk. In the memory of the device that runs the
    // kernel. CUDA clamps them to 0 .. Tk.
    const int64_t* lengths;
    Execution execution;
};

struct AttentionBackward {
    AttentionShape shape;
    DType dtype;
    const void *q, *k, *v, *out, *dout;
    const void* lse;   // as written by attention_forward
    void* dq;          // (B, Tq, H, D)
    void* dk;          // (B, Tk, Hkv, D)
    void* dv;          // (B, Tk, Hkv, D)
    Strides q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides, dk_strides, dv_strides;
    Execution execution;
};

// The residual sum and its norm, of each row of C numbers:
//   sum = x + residual, rounded to dtype; y = sum r, r = 1 / sqrt(mean(sum^2) + eps)
// Computed in float32, or in float64 if dtype is. Everything is contiguous.
struct RMSNorm {
    int64_t N, C;
    DType dtype;            // of x, residual, sum, y. CPU: float32 | float64 | bfloat16; CUDA: float32 | bfloat16
    const void* x;          // (N, C)
    const void* residual;   // (N, C), or null: the sum is x
    void* sum;              // (N, C), or null: it is not written
    void* y;                // (N, C)
    void* r;                // (N,), float64 if dtype is, else float32
    double eps;
    Execution execution;
};

// dx = dsum + r (dy - y mean(dy y)), the gradient of x and of residual.
struct RMSNormBackward {
    int64_t N, C;
    DType dtype;        // of dy, y, dsum, dx, as RMSNorm's
    const void* dy;     // (N, C)
    const void* y;      // (N, C)
    const void* r;      // (N,), as written by rms_norm
    const void* dsum;   // (N, C), the gradient of sum, or null: 0
    void* dx;           // (N, C)
    Execution execution;
};

// y = x r, r = 1 / sqrt(mean(x^2) + eps) for x = table[tokens], rounded to dtype first.
struct EmbeddingRMSNorm {
    int64_t N, C, V;
    DType table_dtype;       // float32 | float64 | bfloat16 (CUDA: not float64)
    DType dtype;             // of y, as RMSNorm's
    const void* table;       // (V, C) contiguous
    const int64_t* tokens;   // (N,). The CPU kernel requires [0, V); on CUDA a token out of range makes its row NaN
    void* y;                 // (N, C)
    void* r;                 // (N,)
    double eps;
    Execution execution;
};

// The residual sum mixed with another stream, and the norm of the mix, of each row of C numbers:
//   z = x + residual; mixed = x_scale z + x0_scale x0; y = mixed r, r = 1 / sqrt(mean(mixed^2) + eps)
// z and mixed are rounded to dtype before they are used. Computed as RMSNorm is; everything is contiguous.
struct MixRMSNorm {
    int64_t N, C;
    DType dtype;            // as RMSNorm's
    const void* x;          // (N, C)
    const void* residual;   // (N, C), or null: z is x
    const void* x0;         // (N, C)
    // One number each, float64 if dtype is, else float32, in the memory of the device that runs the kernel.
    const void *x_scale, *x0_scale;
    void* z;       // (N, C), or null if residual is
    void* mixed;   // (N, C)
    void* y;       // (N, C)
    void* r;       // (N,), float64 if dtype is, else float32
    double eps;
    Execution execution;
};

// With ds = dmixed + r (dy - y mean(dy y)), the gradient of mixed, which is not rounded:
//   dx = x_scale ds + dz, the gradient of x and of residual; dx0 = x0_scale ds + add_to
//   dx_scale = sum(ds z); dx0_scale = sum(ds x0), of each row in the type of r, then over the rows in float64
struct MixRMSNormBackward {
    int64_t N, C;   // N may be 0
    DType dtype;
    const void* dy;                            // (N, C)
    const void *dz, *dmixed, *add_to;          // (N, C), or null: 0
    const void *y, *r;                         // as written by mix_rms_norm
    const void *z, *x0, *x_scale, *x0_scale;   // as given to it
    void *dx, *dx0;                            // (N, C)
    void *dx_scale, *dx0_scale;                // one number each, of the type of r
    Execution execution;
};

constexpr int64_t kMostGateInputs = 64;   // channels that a gate of value embeddings or of smear reads

// out[n, g] = v[n, g] + 3 sigmoid(gate[g] . h[n]) table[ids[n], g], computed in float32, or in float64 if dtype is.
struct AddValueEmbedding {
    int64_t N, Hkv, D, I, V;
    DType dtype;          // of v, h and out, as RMSNorm's
    DType table_dtype;    // dtype, or float32
    const void* v;        // (N, Hkv, D)
    const void* h;        // (N, I), I from 1 to kMostGateInputs
    int64_t h_stride;     // between rows
    const void* gate;     // (Hkv, I), float64 if dtype is, else float32
    const void* table;    // (V, Hkv, D)
    const int64_t* ids;   // (N,). The CPU kernel requires [0, V); on CUDA an id out of range makes its row NaN
    void* out;            // (N, Hkv, D)
    Execution execution;
};

// The gradients but that of v, which is dout. On CUDA a row whose id is out of range adds nothing to them.
struct AddValueEmbeddingBackward {
    int64_t N, Hkv, D, I, V;
    DType dtype, table_dtype;
    const void* dout;   // (N, Hkv, D)
    const void* h;      // (N, I)
    int64_t h_stride;
    const void *gate, *table;
    const int64_t* ids;
    void* dh;      // (N, I), dtype
    void* dgate;   // (Hkv, I), the type of gate
    void* drows;   // (N, Hkv, D), table_dtype: the gradient of table[ids]
    Execution execution;
};

// out[b, t] = x[b, t] + lambda sigmoid(gate . x[b, t, :I]) x[b, t - 1]; out[b, 0] = x[b, 0]. Everything is contiguous.
struct Smear {
    int64_t B, T, C, I;   // I from 1 to C and kMostGateInputs
    DType dtype;          // of x and out, as RMSNorm's
    const void* x;        // (B, T, C)
    const void* gate;     // (I,), float64 if dtype is, else float32
    const void* lambda;   // one number of this type
    void* out;            // (B, T, C)
    Execution execution;
};

struct SmearBackward {
    int64_t B, T, C, I;
    DType dtype;
    const void* dout;   // (B, T, C)
    const void *x, *gate, *lambda;
    void* dx;                // (B, T, C)
    void *dgate, *dlambda;   // as gate and lambda
    Execution execution;
};

// Rotary positions, then the norm, of each head of q and k. For the halves (x1, x2) of a head at position t:
//   z = (x1 cos[t] + x2 sin[t], x2 cos[t] - x1 sin[t]);  out = scale z r, r = 1 / sqrt(mean(z^2) + eps)
struct RotaryNorm {
    int64_t B, T, H, Hkv, D;
    DType dtype;     // of q, k and the results, as RMSNorm's
    const void* q;   // (B, T, H, D)
    const void* k;   // (B, T, Hkv, D)
    Strides q_strides, k_strides;
    const void *cos, *sin;            // (T, D / 2), float64 if dtype is, else float32
    int64_t cos_stride, sin_stride;   // between rows
    double eps, scale;
    void *q_out, *k_out;   // the shapes of q and k, contiguous
    void *q_r, *k_r;       // (B, T, H) and (B, T, Hkv), float64 if dtype is, else float32
    Execution execution;
};

// The inverse rotation of scale r (dout - n mean(dout n)), n = out / scale.
struct RotaryNormBackward {
    int64_t B, T, H, Hkv, D;
    DType dtype;
    const void *dq_out, *dk_out;
    Strides dq_out_strides, dk_out_strides;
    const void *q_out, *k_out, *q_r, *k_r;   // as written by rotary_norm
    const void *cos, *sin;
    int64_t cos_stride, sin_stride;
    double scale;
    void *dq, *dk;   // the shapes of q and k, contiguous
    Execution execution;
};

// y = max(x, 0)^2
struct ReluSquared {
    int64_t numel;
    DType dtype;     // as RMSNorm's
    const void* x;   // (numel,)
    void* y;         // (numel,); may be x
    Execution execution;
};

// dx = 2 sqrt(y) dy, which needs the result only: sqrt(y) is max(x, 0), with half the relative rounding error of y.
struct ReluSquaredBackward {
    int64_t numel;
    DType dtype;
    const void* dy;   // (numel,)
    const void* y;    // (numel,)
    void* dx;         // (numel,); may be dy
    Execution execution;
};

// One parameter tensor of AdamW and its state; all contiguous, `numel` elements each.
struct AdamWTensor {
    void* param;        // float32 | bfloat16, updated in place
    const void* grad;   // same type as param
    void* exp_avg;      // float32 (or bfloat16, see AdamW::moment_dtype)
    void* exp_avg_sq;   // same type as exp_avg
    void* copy;         // bfloat16, or null: the updated float32 param, rounded to nearest even
    int64_t numel;
};

// Decoupled weight decay in PyTorch's form:
//   p *= 1 - lr * weight_decay
//   p -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//
// Each *_address may be null. If not, the number at that address replaces the field of the same name. It lies in the
// memory of the device that runs the kernel, so that a captured CUDA graph reads the current number on each replay.
struct AdamW {
    const AdamWTensor* tensors;   // (count,)
    int64_t count;
    DType param_dtype;    // float32 | bfloat16, of param and grad
    DType moment_dtype;   // float32, or bfloat16 where param_dtype is bfloat16
    int64_t step;         // t, from 1
    double lr, beta1, beta2, eps, weight_decay;
    bool stochastic_rounding;   // of bfloat16 parameters: unbiased, a pure function of (seed, step, tensor, element)
    uint64_t seed;
    bool cautious;   // decay only where m * p >= 0, both in float32 (arXiv:2510.12402)
    const int64_t* step_address;
    const double *lr_address, *weight_decay_address;
    Execution execution;
};

// buf = momentum * buf + (1 - momentum) * g;  update = nesterov ? momentum * buf + (1 - momentum) * g : buf
struct MuonMomentum {
    const void* const* grads;         // (count,) tensors of numel, grad_dtype
    float* const* momentum_buffers;   // (count,) tensors of numel, updated in place
    float* update;                    // (count, numel)
    double* norms;                    // (count,) the Frobenius norm of each update, or null
    int64_t count, numel;
    DType grad_dtype;   // float32 | bfloat16
    double momentum;
    bool nesterov;
    const double* momentum_address;   // as AdamW's
    // Only the CPU kernel computes the norms of rows.
    double* row_norms = nullptr;   // (count, numel / columns), or null; excludes norms
    int64_t columns = 1;           // of a row
    Execution execution;
};

// p = (1 - lr * weight_decay) * p - lr * scale * update
struct MuonUpdate {
    void* const* params;   // (count,) tensors of numel, param_dtype, updated in place
    void* const* copies;   // (count,) bfloat16 tensors for the updated float32 params, rounded to nearest even, or null
    const float* update;   // (count, numel)
    int64_t count, numel;
    DType param_dtype;   // float32 | bfloat16
    double lr, weight_decay, scale;
    bool cautious;                                     // decay only where update * p >= 0, in float32
    const double *lr_address, *weight_decay_address;   // as AdamW's
    Execution execution;
};

// The update of NorMuon (arXiv:2510.05491), for matrices O = update (M, K). A line is a row if M >= K, else a column.
//   O *= sqrt(min(M, K)) / max(|O|_F, norm_eps), if renormalise
//   s += (1 - beta2) (mean(O^2 of the line) - s), for each line
//   W = O / sqrt(max(s, eps)), scaled to the Frobenius norm of O
//   p = (1 - lr * weight_decay) * p - lr * scale * W, as MuonUpdate
struct NorMuonUpdate : MuonUpdate {
    int64_t M, K;
    float* const* second_momentums;   // (count,) s: max(M, K) numbers each, updated in place
    double beta2, eps;
    bool renormalise;
    double norm_eps;
};

// The plain form takes one step after another on X. The Gram form takes several steps on X X^T or X^T X, whichever is
// smaller, then multiplies X once and computes the Gram matrix anew ("restart").
enum class NewtonSchulzForm : int32_t { plain, gram };

// Orthogonalises `batch` matrices:
//   X = g / (norm_factor * |g|_F)
//   for each triple (a, b, c):  A = X X^T,  X = a X + (b A + c A A) X
struct NewtonSchulz {
    int64_t batch, M, K;
    DType dtype;                  // of g and out. CPU: float32 | float64; CUDA: float32, computed in 16 bits
    const void* g;                // (batch, M, K) contiguous
    void* out;                    // (batch, M, K) contiguous; may not overlap g
    const double* norms;          // (batch,) |g|_F where it is known, else null
    const double* coefficients;   // (steps, 3), on the host
    int64_t steps;
    double norm_factor;
    // (batch, M), or null. X is g with each row multiplied by its number instead; |X|_F is at most 1 / norm_factor.
    const double* scales = nullptr;
    // CPU: multiply matrices that are rounded to bfloat16, with float32 sums, if the instruction set does it (not float64).
    bool allow_bfloat16 = false;
    // Only CUDA reads the next two; the CPU kernel chooses its own form.
    NewtonSchulzForm form;      // see cuda::newton_schulz_form
    const MuonUpdate* update;   // null, or: the result updates its params (count = batch, numel = M K) instead of being
                                // written to out, which may then be null. Its own `update` is not read.
    Execution execution;
};

namespace cpu {

// Name of the instruction set that the kernels run on: "amx", "avx512_bf16", "avx512", "avx2" or "baseline" on x86-64,
// "neon_bf16" or "neon" on aarch64. The environment variable NANOCHAT_CPU_ISA selects another. Throws if the variable names
// a set that is unknown or that this processor lacks.
const char* instruction_set();

// Names of the sets that the kernels are compiled for, the most basic first, with a space between two.
const char* instruction_sets();

void attention_forward(const AttentionForward&);
void attention_backward(const AttentionBackward&);

void rms_norm(const RMSNorm&);
void rms_norm_backward(const RMSNormBackward&);
void embedding_rms_norm(const EmbeddingRMSNorm&);
void mix_rms_norm(const MixRMSNorm&);
void mix_rms_norm_backward(const MixRMSNormBackward&);
void add_value_embedding(const AddValueEmbedding&);
void add_value_embedding_backward(const AddValueEmbeddingBackward&);
void smear(const Smear&);
void smear_backward(const SmearBackward&);
void rotary_norm(const RotaryNorm&);
void rotary_norm_backward(const RotaryNormBackward&);
void relu_squared(const ReluSquared&);
void relu_squared_backward(const ReluSquaredBackward&);

void newton_schulz(const NewtonSchulz&);

void adamw(const AdamW&);
void muon_momentum(const MuonMomentum&);
void muon_update(const MuonUpdate&);
void normuon_update(const NorMuonUpdate&);

// z = softcap * tanh(x W^T / softcap), or x W^T if softcap is 0
// loss[n] = logsumexp(z[n]) - z[n, targets[n]], or 0 if the target is ignore_index
// The gradients of grad_scale * sum(loss) are written where they are not null. Logits exist for one chunk of rows at a
// time.
struct LinearCrossEntropy {
    int64_t N, C, V;
    DType dtype;              // float32 | float64 | bfloat16 (as AttentionForward's), of x, weight and both gradients
    const void* x;            // (N, C) contiguous
    const void* weight;       // (V, C) contiguous
    const int64_t* targets;   // (N,), in [0, V) or ignore_index
    int64_t ignore_index;
    double softcap;
    double grad_scale;
    void* loss;          // (N,) float64 if dtype is, else float32
    void* grad_x;        // (N, C) or null
    void* grad_weight;   // (V, C) or null
    Execution execution;
};
void linear_cross_entropy(const LinearCrossEntropy&);

// Whether `linear` is faster here than torch's own product: on x86-64 with AVX-512 on processors that are not Intel's, where
// torch's has the rate of AVX2. On aarch64 this is not known, and the answer is no.
bool linear_pays();

// c = a b in one of the three forms of a linear layer: y = x W^T, dx = dy W, dW = dy^T x.
// All float32, row-major and contiguous.
enum class LinearForm { forward, grad_input, grad_weight };
struct Linear {
    LinearForm form;
    int64_t N, I, O;   // rows, input and output channels
    const float* a;    // forward: x (N, I);  grad_input: dy (N, O);  grad_weight: dy (N, O)
    const float* b;    // forward: W (O, I);  grad_input: W (O, I);   grad_weight: x (N, I)
    float* c;          // forward: y (N, O);  grad_input: dx (N, I);  grad_weight: dW (O, I)
    // forward: y = max(x W^T, 0)^2 instead; grad_input: dx = 2 sqrt(x) (dy W) instead, the gradient of h if x = max(h, 0)^2.
    bool relu_squared = false;
    const float* x = nullptr;        // (N, I), for grad_input with relu_squared
    const float* add_to = nullptr;   // (N, I) or null, for grad_input: dx = add_to + dy W
    Execution execution;
};
void linear(const Linear&);

// The weight of a linear layer, (outputs, inputs): numbers of CachedForward's dtype, or int8, each times its row's scale.
struct WeightMatrix {
    const void* data;
    const float* scales;   // (outputs,); null unless int8
};

// The matrices of one transformer block, (outputs, inputs) row-major.
struct BlockWeights {
    WeightMatrix q, k, v;   // (H D, C), (Hkv D, C), (Hkv D, C)
    WeightMatrix out;       // (C, H D)
    WeightMatrix fc;        // (F, C)
    WeightMatrix proj;      // (C, F)
    int64_t window;         // as AttentionShape's
    // Both or null: (Hkv, value_channels) and (rows of wte, Hkv D), of the value embeddings; of dtype.
    const void *value_gate = nullptr, *value_table = nullptr;
};

// The whole model on a KV cache. B sequences of lengths[b] tokens each continue what the cache holds: token t of
// sequence b has position starts[b] + t of slot slots[b] and sees the positions of that slot up to its own. All
// contiguous; C = H D. Weights are widened to float32 when they are loaded, and all arithmetic is float32; only keys and
// values are rounded to dtype. The bits of a token's numbers depend neither on the other tokens of the call nor on the
// number of threads.
struct CachedForward {
    int64_t B, C, H, Hkv, D, F, V, layers;
    const int64_t* tokens;                     // rows of wte, one sequence after another
    const int64_t *lengths, *slots, *starts;   // (B,), lengths from 1, slots distinct
    DType dtype;                               // float32 | bfloat16
    bool quantized;                            // whether the matrices of the blocks and lm_head are int8
    const void* wte;                           // (V or more, C)
    const BlockWeights* blocks;                // (layers,)
    WeightMatrix lm_head;                      // (V, C)
    const float *cos, *sin;                    // (positions, D / 2); rows of cos are cos_stride apart
    int64_t cos_stride;
    void* cache;   // (layers, slot_count, capacity, 2 Hkv, D) of dtype: keys, then values; written
    int64_t slot_count, capacity;
    double softcap;   // 0: none
    float* logits;    // (B, V) of each sequence's last token, or null
    Execution execution;
    double qk_scale = 1;   // a factor of the normalised queries and keys
    // With value embeddings: v += 3 sigmoid(gate h) table[token] for each key/value head, h being the block's normed input,
    // of which the gate reads the first value_channels numbers.
    int64_t value_channels = 0;
    // Both or null, (layers,). Each block begins with x = resid x + x0_lambda x0, x0 being the input of the first block.
    const float *resid_lambdas = nullptr, *x0_lambdas = nullptr;
    // Both or null, (1, smear_channels) and (1,). Each embedding e becomes e + lambda sigmoid(gate e) f, f being that of the
    // token before, of which previous (B,) holds those before each sequence's first, or -1.
    const float *smear_gate = nullptr, *smear_lambda = nullptr;
    int64_t smear_channels = 0;
    const int64_t* previous = nullptr;
    // (1,) or null. Before the last norm x -= lambda m, m being x after the block layers / 2.
    const float* backout_lambda = nullptr;
};
void cached_forward(const CachedForward&);

}   // namespace cpu

// CUDA kernels enqueue their work on the stream; launch errors throw std::runtime_error. The same inputs give the same
// bits on one kind of GPU.
namespace cuda {

// Asks the runtime about the current GPU, once per GPU. Throws std::runtime_error if there is none. The environment
// variable NANOCHAT_CUDA_ISA, sm_80 or sm_90a, lowers the instruction set. Throws std::invalid_argument if the variable
// names a set that is unknown or that this GPU, or this build, lacks.
Device current_device();

// Versions of CUDA, 12080 for 12.8.
struct Versions {
    int driver;    // the newest that the driver of this machine can run, 0 without a driver
    int runtime;   // of the runtime in this module
};
// Throws std::runtime_error if the runtime cannot say. Needs no GPU.
Versions versions();

// No size is 0; D is a multiple of 8 up to 128; addresses are multiples of 16 bytes, strides of 8 elements.
void attention_forward(const AttentionForward&);
int64_t attention_forward_workspace_bytes(const AttentionForward&);

void attention_backward(const AttentionBackward&);
int64_t attention_backward_workspace_bytes(const AttentionBackward&);

void rms_norm(const RMSNorm&);
void rms_norm_backward(const RMSNormBackward&);
void embedding_rms_norm(const EmbeddingRMSNorm&);
void add_value_embedding(const AddValueEmbedding&);
void add_value_embedding_backward(const AddValueEmbeddingBackward&);
int64_t add_value_embedding_backward_workspace_bytes(const AddValueEmbeddingBackward&);
void smear(const Smear&);
void smear_backward(const SmearBackward&);
int64_t smear_backward_workspace_bytes(const SmearBackward&);
void mix_rms_norm(const MixRMSNorm&);
void mix_rms_norm_backward(const MixRMSNormBackward&);
int64_t mix_rms_norm_backward_workspace_bytes(const MixRMSNormBackward&);
void rotary_norm(const RotaryNorm&);
void rotary_norm_backward(const RotaryNormBackward&);
void relu_squared(const ReluSquared&);
void relu_squared_backward(const ReluSquaredBackward&);

// One launch handles several hundred tensors, so the number of launches hardly grows with the number of tensors.
void adamw(const AdamW&);
int64_t adamw_workspace_bytes(const AdamW&);   // 0: none is needed

void muon_momentum(const MuonMomentum&);
int64_t muon_momentum_workspace_bytes(const MuonMomentum&);

void muon_update(const MuonUpdate&);

void normuon_update(const NorMuonUpdate&);
int64_t normuon_update_workspace_bytes(const NorMuonUpdate&);

// Products of float16 with float32 sums, or of bfloat16 if the coefficients let numbers grow too large for float16. One
// series of launches handles kMostMatrices matrices.
constexpr int64_t kMostMatrices = 512;
void newton_schulz(const NewtonSchulz&);
int64_t newton_schulz_workspace_bytes(const NewtonSchulz&);
NewtonSchulzForm newton_schulz_form(const NewtonSchulz&);   // the form with less work; does not read `form`

// One chunk of rows of linear_cross_entropy, between the library's products, computed in float32:
//   z = softcap * tanh(x / softcap), or x if softcap is 0
//   loss = logsumexp(z) - z[target]
// If grad_scale is not null, the gradient overwrites the logits. A target that is neither in [0, V) nor ignore_index
// makes the loss and the gradient of its row NaN: an error message would need a wait for the stream.
struct SoftcapCrossEntropy {
    int64_t rows, V;
    DType dtype;              // float32 | bfloat16, of logits
    void* logits;             // (rows, V) contiguous; read, and overwritten with grad_scale * d loss / d logits
    const int64_t* targets;   // (rows,)
    int64_t ignore_index;
    double softcap;
    const float* grad_scale;   // one number in device memory; null: logits are only read
    float* loss;               // (rows,), 0 where ignored
    Execution execution;
};
void softcap_cross_entropy(const SoftcapCrossEntropy&);

}   // namespace cuda

}   // namespace nanochat
