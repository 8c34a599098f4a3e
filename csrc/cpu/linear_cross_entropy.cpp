// Language-model head, softcap and cross-entropy without the (N, V) logits, and both gradients in the same call.
//
// For a chunk of R rows the transposed logits Z (V, R) = W X^T are formed, so that rows of the batch lie along the
// vector lanes: maxima and sums over the vocabulary need no work across lanes, and all three products read their
// operands where they lie:
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

// Rows [v0, v0 + count) of Z, which hold x W^T, become softcapped logits; their maximum and sum of exponentials go to
// block_max and block_sum.
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

template <class T, class S>
void run(const cpu::LinearCrossEntropy& args) {
    constexpr int W = kLanes<T>;
    constexpr bool converts = !std::is_same_v<T, S>;
    const int64_t N = args.N, C = args.C, V = args.V;
    const int64_t R = chunk_rows<T>(N, V);
    const int64_t blocks = ceil_div(V, kBlockRows);
    const bool gradients = args.grad_x || args.grad_weight;
    const S* x = static_cast<const S*>(args.x);
    const S* weight_in = static_cast<const S*>(args.weight);
    S* grad_x = static_cast<S*>(args.grad_x);
    S* grad_weight_out = static_cast<S*>(args.grad_weight);
    T* loss = static_cast<T*>(args.loss);
    const T softcap = static_cast<T>(args.softcap);
    const T inverse = softcap > 0 ? 1 / softcap : 0;

    T *z, *x_transposed, *maxima, *sums, *lse, *target_logit, *row_scale, *scratch, *weight, *grad_weight, *x_chunk,
        *grad_x_chunk;
    const auto lay_out = [&](cpu::Arena arena) {
        z = arena.take<T>(V * R);
        x_transposed = arena.take<T>(C * R);
        maxima = arena.take<T>(blocks * R);
        sums = arena.take<T>(blocks * R);
        lse = arena.take<T>(R);
        target_logit = arena.take<T>(R);
        row_scale = arena.take<T>(R);
        scratch = arena.take<T>(args.execution.threads * kScratch<T>);
        x_chunk = arena.take<T>(converts ? R * C : 0);
        grad_x_chunk = arena.take<T>(converts ? R * C : 0);
        weight = arena.take<T>(converts ? V * C : 0);
        grad_weight = arena.take<T>(converts ? V * C : 0);
        return arena.used;
    };
    lay_out({static_cast<char*>(cpu::workspace(lay_out({})))});
    if constexpr (!converts) {
        weight = const_cast<T*>(weight_in);
        grad_weight = grad_weight_out;
    }
    if (args.grad_weight && N == 0) memset(args.grad_weight, 0, V * C * sizeof(S));

#pragma omp parallel num_threads(args.execution.threads)
    {
        T* own = scratch + omp_get_thread_num() * kScratch<T>;
        if constexpr (converts) {
#pragma omp for
            for (int64_t v = 0; v < V; v++)
                for (int64_t c = 0; c < C; c++) weight[v * C + c] = read(weight_in + v * C + c);
        }
        for (int64_t n0 = 0; n0 < N; n0 += R) {
            const int64_t rows = minimum(R, N - n0);
            const T* chunk;
            if constexpr (converts) {
#pragma omp for
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = 0; c < C; c++) x_chunk[r * C + c] = read(x + (n0 + r) * C + c);
                chunk = x_chunk;
            } else {
                chunk = x + n0 * C;
            }
#pragma omp for
            for (int64_t c = 0; c < C; c += W) {
                const int64_t channels = minimum<int64_t>(W, C - c);
                transpose(rows, channels, chunk + c, C, x_transposed + c * R, R);
                for (int64_t i = 0; i < channels; i++)
                    for (int64_t r = rows; r < R; r++) x_transposed[(c + i) * R + r] = 0;
            }

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
                multiply_rows(logits, 0, v0, count, 0, R, own);
                cap_and_reduce(z + v0 * R, count, R, softcap, maxima + block * R, sums + block * R);
            }

#pragma omp for
            for (int64_t r = 0; r < R; r++) {
                T top = -__builtin_inf();
                for (int64_t block = 0; block < blocks; block++) top = maximum(top, maxima[block * R + r]);
                T sum = 0;
                for (int64_t block = 0; block < blocks; block++) {
                    const T peak = maxima[block * R + r];
                    sum += sums[block * R + r] *
                           exp_lanes(broadcast<T>(peak > -__builtin_inf() ? peak - top : T(0)))[0];
                }
                lse[r] = top + static_cast<T>(__builtin_log(static_cast<double>(sum)));
                const int64_t target = r < rows ? args.targets[n0 + r] : args.ignore_index;
                const bool counted = target != args.ignore_index;
                target_logit[r] = counted ? z[target * R + r] : T(0);
                row_scale[r] = counted ? static_cast<T>(args.grad_scale) : T(0);
                if (r < rows) loss[n0 + r] = counted ? lse[r] - target_logit[r] : T(0);
            }

            if (gradients) {
                const Product<T> to_weight = {
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
                    if (args.grad_weight) multiply_rows(to_weight, 0, v0, count, 0, C, own);
                }
            }
            if (args.grad_x) {
                T* out = converts ? grad_x_chunk : reinterpret_cast<T*>(grad_x + n0 * C);
                const Product<T> to_x = {
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
                multiply_team(to_x, args.execution.threads, own);
                if constexpr (converts) {
#pragma omp for
                    for (int64_t r = 0; r < rows; r++)
                        for (int64_t c = 0; c < C; c++) write(grad_x + (n0 + r) * C + c, grad_x_chunk[r * C + c]);
                }
            }
        }
        if constexpr (converts) {
            if (args.grad_weight && N > 0) {
#pragma omp for
                for (int64_t v = 0; v < V; v++)
                    for (int64_t c = 0; c < C; c++) write(grad_weight_out + v * C + c, grad_weight[v * C + c]);
            }
        }
    }
}

}   // namespace

void linear_cross_entropy(const cpu::LinearCrossEntropy& args) {
    if (args.dtype == DType::float64) return run<double, double>(args);
    if (args.dtype == DType::bfloat16) return run<float, bfloat16>(args);
    run<float, float>(args);
}

}   // namespace nanochat::NANOCHAT_ISA
