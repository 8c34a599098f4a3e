// Language-model head, softcap and cross-entropy without the (N, V) logits, and both gradients in the same call.
//
// For a chunk of R rows the transposed logits Z (V, R) = W X^T are formed, so that rows of the batch lie along the
// vector lanes. Maxima and sums over the vocabulary then need no work across lanes, and all three products read their
// operands in place:
//   Z = W X^T,   dW += dZ X,   dX = dZ^T W.
// dZ = g (softmax(z) - onehot) (1 - (z / softcap)^2) replaces Z in place. Sums over the vocabulary run in blocks of
// fixed size and order.
#include <omp.h>

#include "../kernels.h"
#include "gemm.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

// Bytes of logits at a time: about a shared cache. Larger chunks would pass over dW less often.
constexpr int64_t kChunkBytes = int64_t{24} << 20;

template <class T>
int64_t chunk_rows(int64_t N, int64_t V) {
    constexpr int64_t NR = kTileColumns<T>;
    const int64_t fitting = kChunkBytes / static_cast<int64_t>(sizeof(T)) / maximum<int64_t>(V, 1) / NR * NR;
    return minimum(round_up(N, kLanes<T>), maximum<int64_t>(2 * NR, minimum<int64_t>(fitting, 512)));
}

// Turns rows [v0, v0 + count) of Z, which hold x W^T, into softcapped logits. Their maximum and sum of exponentials go
// to block_max and block_sum.
template <class T>
void cap_and_reduce(T* z, int64_t count, int64_t R, T softcap, T* block_max, T* block_sum) {
    constexpr int W = kLanes<T>;
    const T inverse = softcap > 0 ? 1 / softcap : 0;
    for (int64_t r = 0; r < R; r += W) {
        Vec<T> top = broadcast<T>(-__builtin_inf());
        for (int64_t v = 0; v < count; v++) {
            Vec<T> x = load(z + v * R + r);
            if (softcap > 0) {
                x = tanh_lanes<T>(x * inverse) * softcap;
                store(z + v * R + r, x);
            }
            top = x > top ? x : top;
        }
        const Vec<T> finite = top > -__builtin_inf() ? top : Vec<T>{};
        Vec<T> sum = Vec<T>{};
        for (int64_t v = 0; v < count; v++) sum += exp_lanes(load(z + v * R + r) - finite);
        store(block_max + r, top);
        store(block_sum + r, sum);
    }
}

// A call: the phases below, in order, for one chunk of rows after another. The threads of a team call each of them
// together; it ends with a barrier. T is the type of the computation, S that of the tensors.
template <class T, class S>
struct LossAndGradients {
    static constexpr int W = kLanes<T>;
    static constexpr bool converts = !std::is_same_v<T, S>;

    const cpu::LinearCrossEntropy& args;
    const int64_t N = args.N, C = args.C, V = args.V;
    const int64_t R = chunk_rows<T>(N, V);   // rows of a chunk; the last chunk may have fewer
    const int64_t blocks = ceil_div(V, kBlockRows);
    const T softcap = static_cast<T>(args.softcap), inverse = softcap > 0 ? 1 / softcap : 0;
    T *weight = nullptr, *grad_weight = nullptr;    // (V, C), the tensors themselves or their copies in T
    T *z = nullptr, *x_transposed = nullptr;        // (V, R), (C, R)
    T *block_max = nullptr, *block_sum = nullptr;   // (blocks, R)
    T *lse = nullptr, *target_logit = nullptr, *row_scale = nullptr;   // (R,)
    T *x_chunk = nullptr, *grad_x_chunk = nullptr;                     // (R, C), copies in T
    T* scratch = nullptr;                                              // (threads, kScratch)

    size_t carve_workspace(cpu::Arena arena) {
        z = arena.take<T>(V * R);
        x_transposed = arena.take<T>(C * R);
        block_max = arena.take<T>(blocks * R);
        block_sum = arena.take<T>(blocks * R);
        lse = arena.take<T>(R);
        target_logit = arena.take<T>(R);
        row_scale = arena.take<T>(R);
        scratch = arena.take<T>(args.execution.threads * kScratch<T>);
        x_chunk = arena.take<T>(converts ? R * C : 0);
        grad_x_chunk = arena.take<T>(converts ? R * C : 0);
        weight = arena.take<T>(converts ? V * C : 0);
        grad_weight = arena.take<T>(converts ? V * C : 0);
        return arena.used;
    }

    T* own_scratch() const { return scratch + omp_get_thread_num() * kScratch<T>; }

    void widen(const S* from, int64_t rows, T* to) const {
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            for (int64_t c = 0; c < C; c++) to[row * C + c] = read(from + row * C + c);
    }

    void narrow(const T* from, int64_t rows, S* to) const {
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            for (int64_t c = 0; c < C; c++) write(to + row * C + c, from[row * C + c]);
    }

    // Returns rows [n0, n0 + rows) of x as T.
    const T* load_chunk(int64_t n0, int64_t rows) const {
        const S* chunk = static_cast<const S*>(args.x) + n0 * C;
        if constexpr (converts) {
            widen(chunk, rows, x_chunk);
            return x_chunk;
        } else {
            return chunk;
        }
    }

    void transpose_chunk(const T* chunk, int64_t rows) const {
#pragma omp for
        for (int64_t c = 0; c < C; c += W) {
            const int64_t channels = minimum<int64_t>(W, C - c);
            transpose(rows, channels, chunk + c, C, x_transposed + c * R, R);
            for (int64_t i = 0; i < channels; i++)
                for (int64_t r = rows; r < R; r++) x_transposed[(c + i) * R + r] = 0;
        }
    }

    // Z = softcapped W X^T, with the maximum and the sum of each block of the vocabulary.
    void compute_logits() const {
        const Product<T> logits = {
            .M = V,
            .N = R,
            .K = C,
            .a = weight,
            .a_stride = C,
            .a_layout = Layout::rows,
            .b = x_transposed,
            .b_stride = R,
            .c = z,
            .c_stride = R,
        };
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t v0 = block * kBlockRows, count = minimum(kBlockRows, V - v0);
            multiply_rows(logits, 0, v0, count, 0, R, own_scratch());
            cap_and_reduce(z + v0 * R, count, R, softcap, block_max + block * R, block_sum + block * R);
        }
    }

    // The log-sum-exp and the loss of each row, from the blocks' maxima and sums.
    void compute_loss(int64_t n0, int64_t rows) const {
        T* loss = static_cast<T*>(args.loss);
#pragma omp for
        for (int64_t r = 0; r < R; r++) {
            T top = -__builtin_inf();
            for (int64_t block = 0; block < blocks; block++) top = maximum(top, block_max[block * R + r]);
            T sum = 0;
            for (int64_t block = 0; block < blocks; block++) {
                const T peak = block_max[block * R + r];
                const T exponent = peak > -__builtin_inf() ? peak - top : T(0);
                sum += block_sum[block * R + r] * exp_lanes(broadcast<T>(exponent))[0];
            }
            lse[r] = top + static_cast<T>(__builtin_log(static_cast<double>(sum)));
            const int64_t target = r < rows ? args.targets[n0 + r] : args.ignore_index;
            const bool counted = target != args.ignore_index;
            target_logit[r] = counted ? z[target * R + r] : T(0);
            row_scale[r] = counted ? static_cast<T>(args.grad_scale) : T(0);
            if (r < rows) loss[n0 + r] = counted ? lse[r] - target_logit[r] : T(0);
        }
    }

    // Replaces rows [v0, v0 + count) of Z by dZ.
    void differentiate(int64_t n0, int64_t rows, int64_t v0, int64_t count) const {
        for (int64_t v = v0; v < v0 + count; v++)
            for (int64_t r = 0; r < R; r += W) {
                const Vec<T> logit = load(z + v * R + r), scale = load(row_scale + r);
                const Vec<T> tanh = logit * inverse, slope = 1 - tanh * tanh;
                const Vec<T> gradient = exp_lanes(logit - load(lse + r)) * slope * scale;
                store(z + v * R + r, scale != 0 ? gradient : Vec<T>{});
            }
        for (int64_t r = 0; r < rows; r++) {
            const int64_t target = args.targets[n0 + r];
            const T tanh = target_logit[r] * inverse;
            if (row_scale[r] != 0 && target >= v0 && target < v0 + count)
                z[target * R + r] -= row_scale[r] * (1 - tanh * tanh);
        }
    }

    // Z becomes dZ, and dW += dZ X; the first chunk writes dW.
    void compute_grad_weight(int64_t n0, int64_t rows, const T* chunk) const {
        const Product<T> product = {
            .M = V,
            .N = C,
            .K = rows,
            .a = z,
            .a_stride = R,
            .a_layout = Layout::rows,
            .b = chunk,
            .b_stride = C,
            .c = grad_weight,
            .c_stride = C,
            .beta = static_cast<T>(n0 ? 1 : 0),
            .source = n0 ? grad_weight : nullptr,
            .source_stride = C,
        };
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t v0 = block * kBlockRows, count = minimum(kBlockRows, V - v0);
            differentiate(n0, rows, v0, count);
            if (args.grad_weight) multiply_rows(product, 0, v0, count, 0, C, own_scratch());
        }
    }

    // dX = dZ^T W
    void compute_grad_x(int64_t n0, int64_t rows) const {
        S* grad_x = static_cast<S*>(args.grad_x) + n0 * C;
        T* out = converts ? grad_x_chunk : reinterpret_cast<T*>(grad_x);
        const Product<T> product = {
            .M = rows,
            .N = C,
            .K = V,
            .a = z,
            .a_stride = R,
            .a_layout = Layout::columns,
            .b = weight,
            .b_stride = C,
            .c = out,
            .c_stride = C,
        };
        multiply_team(product, args.execution.threads, own_scratch());
        if constexpr (converts) narrow(grad_x_chunk, rows, grad_x);
    }

    void run() {
        carve_workspace({static_cast<char*>(cpu::workspace(carve_workspace({})))});
        const S* weight_in = static_cast<const S*>(args.weight);
        S* grad_weight_out = static_cast<S*>(args.grad_weight);
        if constexpr (!converts) {
            weight = const_cast<T*>(weight_in);
            grad_weight = grad_weight_out;
        }
        if (args.grad_weight && N == 0) memset(args.grad_weight, 0, V * C * sizeof(S));

#pragma omp parallel num_threads(args.execution.threads)
        {
            if constexpr (converts) widen(weight_in, V, weight);
            for (int64_t n0 = 0; n0 < N; n0 += R) {
                const int64_t rows = minimum(R, N - n0);
                const T* chunk = load_chunk(n0, rows);
                transpose_chunk(chunk, rows);
                compute_logits();
                compute_loss(n0, rows);
                if (args.grad_x || args.grad_weight) compute_grad_weight(n0, rows, chunk);
                if (args.grad_x) compute_grad_x(n0, rows);
            }
            if constexpr (converts)
                if (args.grad_weight && N > 0) narrow(grad_weight, V, grad_weight_out);
        }
    }
};

}   // namespace

void linear_cross_entropy(const cpu::LinearCrossEntropy& args) {
    if (args.dtype == DType::float64) return LossAndGradients<double, double>{args}.run();
    if (args.dtype == DType::bfloat16) return LossAndGradients<float, bfloat16>{args}.run();
    LossAndGradients<float, float>{args}.run();
}

}   // namespace nanochat::NANOCHAT_ISA
