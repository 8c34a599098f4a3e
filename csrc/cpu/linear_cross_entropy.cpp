// Language-model head, softcap and cross-entropy without the (N, V) logits, and both gradients in the same call.
//
// For a chunk of R rows the transposed logits Z (V, R) = W X^T are formed, so that rows of the batch lie along the
// vector lanes. Maxima and sums over the vocabulary then need no work across lanes, and all three products read their
// operands in place (but for those of bfloat16, which gemm16.h multiplies packed):
//   Z = W X^T,   dW += dZ X,   dX = dZ^T W.
// dZ = g (softmax(z) - onehot) (1 - (z / softcap)^2). No logit exceeds the softcap, so that with a small one the
// exponentials need no maximum: what depends on z, exp(z - softcap) (1 - (z / softcap)^2), replaces Z while its block is
// in the cache, and dZ is that times a number per row. Sums over the vocabulary run in blocks of fixed size and order.
#include <omp.h>

#include "../kernels.h"
#include "gemm16.h"
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

// Rows of Z to prefetch ahead where only a part of each is read.
constexpr int64_t kRowsAhead = 8;

// Up to this softcap exp(z - softcap) >= e^-60, and no sum of them underflows.
constexpr double kLargestSmallSoftcap = 30;

// Writes softcapped logits to z, from `count` rows of x W^T, which may lie there too. Their maximum and sum of
// exponentials go to block_max and block_sum.
template <class T>
void cap_and_reduce(const T* from, int64_t count, int64_t R, T softcap, T* z, T* block_max, T* block_sum) {
    constexpr int W = kLanes<T>;
    const T inverse = softcap > 0 ? 1 / softcap : 0;
    for (int64_t r = 0; r < R; r += W) {
        store(block_max + r, broadcast<T>(-__builtin_inf()));
        store(block_sum + r, Vec<T>{});
    }
    for (int64_t v = 0; v < count; v++)
        for (int64_t r = 0; r < R; r += W) {
            Vec<T> x = load(from + v * R + r);
            if (softcap > 0) x = tanh_lanes<T>(x * inverse) * softcap;
            store(z + v * R + r, x);
            const Vec<T> top = load(block_max + r);
            store(block_max + r, x > top ? x : top);
        }
    for (int64_t v = 0; v < count; v++)
        for (int64_t r = 0; r < R; r += W) {
            const Vec<T> top = load(block_max + r), finite = top > -__builtin_inf() ? top : Vec<T>{};
            store(block_sum + r, load(block_sum + r) + exp_lanes(load(z + v * R + r) - finite));
        }
}

// The same for a small softcap, which takes the place of the maximum. With `keep`, z becomes
// exp(z - softcap) (1 - (z / softcap)^2).
template <bool keep, class T>
void cap_and_sum(const T* from, int64_t count, int64_t R, T softcap, T* z, T* block_sum) {
    constexpr int W = kLanes<T>;
    const T inverse = 1 / softcap;
    for (int64_t r = 0; r < R; r += W) store(block_sum + r, Vec<T>{});
    for (int64_t v = 0; v < count; v++)
        for (int64_t r = 0; r < R; r += W) {
            const Vec<T> tanh = tanh_lanes<T>(load(from + v * R + r) * inverse);
            const Vec<T> exponential = exp_in_range(tanh * softcap - softcap);
            store(block_sum + r, load(block_sum + r) + exponential);
            if constexpr (keep) store(z + v * R + r, exponential * (1 - tanh * tanh));
        }
}

// What a call has in all forms of its products: the logits of a chunk of rows, and what becomes of them. T is the type
// of the computation.
template <class T>
struct ChunkOfLogits {
    static constexpr int W = kLanes<T>;

    const cpu::LinearCrossEntropy& args;
    const int64_t N = args.N, C = args.C, V = args.V;
    const int64_t R;   // rows of a chunk; the last chunk may have fewer
    const int64_t blocks = ceil_div(V, kBlockRows);
    const T softcap = static_cast<T>(args.softcap), inverse = softcap > 0 ? 1 / softcap : 0;
    const bool small_softcap = args.softcap > 0 && args.softcap <= kLargestSmallSoftcap;
    const bool gradients = args.grad_x || args.grad_weight;
    T* z = nullptr;                                 // (V, R), if there are gradients
    T *block_max = nullptr, *block_sum = nullptr;   // (blocks, R)
    T *lse = nullptr, *target_logit = nullptr;      // (R,)
    T* row_scale = nullptr;                         // (R,), of dZ; 0 for a row without a target

    // `multiple`: R is a multiple of it.
    explicit ChunkOfLogits(const cpu::LinearCrossEntropy& args, int64_t multiple = 1)
        : args(args), R(round_up(chunk_rows<T>(args.N, args.V), multiple)) {}

    void carve_logits(cpu::Arena& arena) {
        z = arena.take<T>(gradients ? V * R : 0);
        block_max = arena.take<T>(blocks * R);
        block_sum = arena.take<T>(blocks * R);
        lse = arena.take<T>(R);
        target_logit = arena.take<T>(R);
        row_scale = arena.take<T>(R);
    }

    // Takes what the loss needs from a block of x W^T, and writes to Z what differentiate() needs.
    void reduce_block(int64_t n0, int64_t rows, int64_t block, T* from) const {
        const int64_t v0 = block * kBlockRows, count = minimum(kBlockRows, V - v0);
        T* const to = gradients ? z + v0 * R : from;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t v = args.targets[n0 + r] - v0;
            if (v < 0 || v >= count) continue;
            const T logit = from[v * R + r];
            target_logit[r] = softcap > 0 ? tanh_lanes<T>(broadcast<T>(logit * inverse))[0] * softcap : logit;
        }
        T* const sum = block_sum + block * R;
        if (!small_softcap)
            cap_and_reduce(from, count, R, softcap, to, block_max + block * R, sum);
        else if (gradients)
            cap_and_sum<true>(from, count, R, softcap, to, sum);
        else
            cap_and_sum<false>(from, count, R, softcap, to, sum);
    }

    // The log-sum-exp and the loss of each row, from the blocks' maxima and sums.
    void compute_loss(int64_t n0, int64_t rows) const {
        T* loss = static_cast<T*>(args.loss);
#pragma omp for
        for (int64_t r0 = 0; r0 < R; r0 += W) {
            Vec<T> top = broadcast<T>(small_softcap ? softcap : -__builtin_inf()), sum = Vec<T>{};
            if (small_softcap) {
                for (int64_t block = 0; block < blocks; block++) sum += load(block_sum + block * R + r0);
            } else {
                for (int64_t block = 0; block < blocks; block++)
                    top = maximum_lanes<T>(top, load(block_max + block * R + r0));
                for (int64_t block = 0; block < blocks; block++) {
                    const Vec<T> peak = load(block_max + block * R + r0);
                    const Vec<T> exponent = peak > -__builtin_inf() ? peak - top : Vec<T>{};
                    sum += load(block_sum + block * R + r0) * exp_lanes(exponent);
                }
            }
            for (int64_t r = r0; r < r0 + W; r++) {
                const T total = sum[r - r0];
                lse[r] = top[r - r0] + static_cast<T>(__builtin_log(static_cast<double>(total)));
                const int64_t target = r < rows ? args.targets[n0 + r] : args.ignore_index;
                const bool counted = target != args.ignore_index;
                if (r < rows) loss[n0 + r] = counted ? lse[r] - target_logit[r] : T(0);
                row_scale[r] = counted ? static_cast<T>(args.grad_scale) : T(0);
                if (counted && gradients && small_softcap) {   // onehot belongs to what row_scale multiplies
                    const T tanh = target_logit[r] * inverse;
                    z[target * R + r] -= total * (1 - tanh * tanh);
                    row_scale[r] /= total;
                }
            }
        }
    }

    // differentiate() for a small softcap: Z lacks nothing but the number of the row.
    void scale_rows(int64_t v0, int64_t count, int64_t r0, int64_t r1, T* dz, int64_t stride) const {
        for (int64_t v = 0; v < count; v++) {
            if (v0 + v + kRowsAhead < V) prefetch_row(z + (v0 + v + kRowsAhead) * R + r0, r1 - r0);
            for (int64_t r = r0; r < r1; r += W) {
                const Vec<T> x = load(z + (v0 + v) * R + r), scale = load(row_scale + r);
                store(dz + v * stride + r - r0, scale != 0 ? x * scale : Vec<T>{});
            }
        }
    }

    // dZ of `count` rows of the vocabulary from v0 on and of rows [r0, r1) of the chunk. dz may be the place of Z.
    void differentiate(int64_t n0, int64_t rows, int64_t v0, int64_t count, int64_t r0, int64_t r1, T* dz,
                       int64_t stride) const {
        if (small_softcap) return scale_rows(v0, count, r0, r1, dz, stride);
        for (int64_t v = 0; v < count; v++)
            for (int64_t r = r0; r < r1; r += W) {
                const Vec<T> logit = load(z + (v0 + v) * R + r), scale = load(row_scale + r);
                const Vec<T> tanh = logit * inverse, slope = 1 - tanh * tanh;
                const Vec<T> gradient = exp_lanes(logit - load(lse + r)) * slope * scale;
                store(dz + v * stride + r - r0, scale != 0 ? gradient : Vec<T>{});
            }
        for (int64_t r = r0; r < minimum(rows, r1); r++) {
            const int64_t v = args.targets[n0 + r] - v0;
            const T tanh = target_logit[r] * inverse;
            if (row_scale[r] != 0 && v >= 0 && v < count) dz[v * stride + r - r0] -= row_scale[r] * (1 - tanh * tanh);
        }
    }
};

// A call: the phases below, in order, for one chunk of rows after another. The threads of a team call each of them
// together; it ends with a barrier. S is the type of the tensors.
template <class T, class S>
struct LossAndGradients : ChunkOfLogits<T> {
    using Base = ChunkOfLogits<T>;
    using Base::args, Base::N, Base::C, Base::V, Base::R, Base::blocks, Base::z, Base::W;
    static constexpr bool converts = !std::is_same_v<T, S>;

    T *weight = nullptr, *grad_weight = nullptr;     // (V, C), the tensors themselves or their copies in T
    T* x_transposed = nullptr;                       // (C, R)
    T *x_chunk = nullptr, *grad_x_chunk = nullptr;   // (R, C), copies in T
    T* scratch = nullptr;                            // (threads, kScratch)
    T* block_z = nullptr;                            // (threads, block_size), for a loss alone
    const int64_t block_size = minimum(kBlockRows, V) * R;

    explicit LossAndGradients(const cpu::LinearCrossEntropy& args) : Base(args) {}

    size_t carve_workspace(cpu::Arena arena) {
        this->carve_logits(arena);
        x_transposed = arena.take<T>(C * R);
        block_z = arena.take<T>(this->gradients ? 0 : args.execution.threads * block_size);
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

    // Z = W X^T, reduced for the loss block by block.
    void compute_logits(int64_t n0, int64_t rows) const {
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t v0 = block * kBlockRows, count = minimum(kBlockRows, V - v0);
            const Product<T> logits = {
                .M = count,
                .N = R,
                .K = C,
                .a = weight + v0 * C,
                .a_stride = C,
                .a_layout = Layout::rows,
                .b = x_transposed,
                .b_stride = R,
                .c = this->gradients ? z + v0 * R : block_z + omp_get_thread_num() * block_size,
                .c_stride = R,
            };
            multiply_rows(logits, 0, 0, count, 0, R, own_scratch());
            this->reduce_block(n0, rows, block, logits.c);
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
            this->differentiate(n0, rows, v0, count, 0, R, z + v0 * R, R);
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
                compute_logits(n0, rows);
                this->compute_loss(n0, rows);
                if (this->gradients) compute_grad_weight(n0, rows, chunk);
                if (args.grad_x) compute_grad_x(n0, rows);
            }
            if constexpr (converts)
                if (args.grad_weight && N > 0) narrow(grad_weight, V, grad_weight_out);
        }
    }
};

// The same with products of bfloat16 and float32 sums. W, X and dZ are rounded to bfloat16 where they are multiplied.
struct LossAndGradients16 : ChunkOfLogits<float> {
    const int64_t stride = round_up(C, kBlock16);                 // of float32 sums with C columns
    bfloat16 *weight_rows = nullptr, *weight_columns = nullptr;   // W as A of X W^T, and as B of dZ^T W
    bfloat16 *x_columns = nullptr, *x_rows = nullptr;             // the chunk as B of W X^T, and of dZ X
    bfloat16* dz_columns = nullptr;                               // as A of dZ^T W
    float* grad_weight = nullptr;                                 // (V, C), rows `stride` apart
    char* scratch = nullptr;                                      // (threads, scratch_size)

    // A part of dZ that is packed while it lies in L1, and the distance of its rows, which fall into different sets.
    static constexpr int64_t kPartRows = kBlock16Depth, kPartColumns = 256, kPartStride = kPartColumns + 16;
    static constexpr int64_t kPartSize = kPartRows * kPartStride;
    // A thread's scratch holds a block of X W^T; then such a part and a block of dZ as A of dZ X; then sums of dX.
    const int64_t block_rows = minimum(kBlockRows, round_up(V, kBlock16));
    const int64_t scratch_size = maximum<int64_t>(
        maximum<int64_t>(block_rows * R * 4, kPartSize * 4 + packed_size(block_rows, R) * 2), kScratch16);

    explicit LossAndGradients16(const cpu::LinearCrossEntropy& args) : ChunkOfLogits<float>(args, kBlock16) {}

    size_t carve_workspace(cpu::Arena arena) {
        carve_logits(arena);
        weight_rows = arena.take<bfloat16>(packed_size(V, C));
        weight_columns = arena.take<bfloat16>(args.grad_x ? packed_size(C, V) : 0);
        x_columns = arena.take<bfloat16>(packed_size(R, C));
        x_rows = arena.take<bfloat16>(args.grad_weight ? packed_size(C, R) : 0);
        dz_columns = arena.take<bfloat16>(args.grad_x ? packed_size(R, V) : 0);
        grad_weight = arena.take<float>(args.grad_weight ? round_up(V, kBlock16) * stride : 0);
        scratch = arena.take<char>(args.execution.threads * scratch_size);
        return arena.used;
    }

    float* own_scratch() const { return reinterpret_cast<float*>(scratch + omp_get_thread_num() * scratch_size); }

    void pack_weight() const {
        const bfloat16* weight = static_cast<const bfloat16*>(args.weight);
#pragma omp for
        for (int64_t v = 0; v < V; v += kBlock16Depth) {
            const int64_t count = minimum(kBlock16Depth, V - v);
            pack<false>(Operand<bfloat16>{weight, C, Layout::rows}, v, count, 0, C, weight_rows + packed_size(v, C));
            if (args.grad_x)
                for (int64_t c = 0; c < C; c += kBlock16)
                    pack<true>(Operand<bfloat16>{weight, C, Layout::columns}, c, minimum(kBlock16, C - c), v, count,
                               weight_columns + packed_size(c, V) + v * kBlock16);
        }
    }

    void pack_chunk(int64_t n0, int64_t rows) const {
        const bfloat16* x = static_cast<const bfloat16*>(args.x) + n0 * C;
#pragma omp for
        for (int64_t r = 0; r < R; r += kBlock16)
            pack<true>(Operand<bfloat16>{x, C, Layout::rows}, r, minimum(kBlock16, rows - r), 0, C,
                       x_columns + packed_size(r, C));
        if (!args.grad_weight) return;
#pragma omp for
        for (int64_t c = 0; c < C; c += kBlock16)
            pack<true>(Operand<bfloat16>{x, C, Layout::columns}, c, minimum(kBlock16, C - c), 0, rows,
                       x_rows + packed_size(c, rows));
    }

    void compute_logits(int64_t n0, int64_t rows) const {
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t v0 = block * kBlockRows, count = minimum(kBlockRows, V - v0);
            multiply_deep(weight_rows + packed_size(v0, C), x_columns, C, ceil_div(count, kBlock16), R / kBlock16,
                          own_scratch(), R, false);
            reduce_block(n0, rows, block, own_scratch());
        }
    }

    static void pack_part(const float* part, Layout layout, int64_t i, int64_t count, int64_t k, int64_t depth,
                          bfloat16* to) {
        const Operand<float> x = {part, kPartStride, layout};
        if (count >= kBlock16 && depth >= kBlock16Depth)
            pack_block<false>(x, i, kBlock16, k, kBlock16Depth, to);
        else
            pack_block<false>(x, i, minimum(kBlock16, count), k, minimum(kBlock16Depth, depth), to);
    }

    // Packs rows [v0, v0 + count) of dZ for both products: to dz_columns, and to `as_rows`.
    void pack_gradient(int64_t n0, int64_t rows, int64_t v0, int64_t count, float* part, bfloat16* as_rows) const {
        for (int64_t r0 = 0; r0 < rows; r0 += kPartColumns)
            for (int64_t v = 0; v < count; v += kPartRows) {
                const int64_t height = minimum(kPartRows, count - v), end = minimum(r0 + kPartColumns, R);
                differentiate(n0, rows, v0 + v, height, r0, end, part, kPartStride);
                const int64_t width = minimum(end, rows) - r0;
                if (args.grad_x)
                    for (int64_t r = 0; r < width; r += kBlock16)
                        pack_part(part, Layout::columns, r, width - r, 0, height,
                                  dz_columns + packed_size(r0 + r, V) + (v0 + v) * kBlock16);
                if (args.grad_weight)
                    for (int64_t i = 0; i < height; i += kBlock16)
                        for (int64_t r = 0; r < width; r += kBlock16Depth)
                            pack_part(part, Layout::rows, i, height - i, r, width - r,
                                      as_rows + packed_size(v + i, rows) + (r0 + r) * kBlock16);
            }
    }

    // Packs dZ for both products, and dW += dZ X; the first chunk writes dW.
    void compute_grad_weight(int64_t n0, int64_t rows) const {
        float* const part = own_scratch();
        bfloat16* const as_rows = reinterpret_cast<bfloat16*>(part + kPartSize);
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t v0 = block * kBlockRows, count = minimum(kBlockRows, V - v0);
            pack_gradient(n0, rows, v0, count, part, as_rows);
            if (args.grad_weight)
                multiply_deep(as_rows, x_rows, rows, ceil_div(count, kBlock16), stride / kBlock16,
                              grad_weight + v0 * stride, stride, n0 > 0);
        }
    }

    // dX = dZ^T W
    void compute_grad_x(int64_t n0, int64_t rows) const {
        multiply_team16(rows, C, V, dz_columns, weight_columns, static_cast<bfloat16*>(args.grad_x) + n0 * C,
                        args.execution.threads, own_scratch());
    }

    void write_grad_weight() const {
        bfloat16* out = static_cast<bfloat16*>(args.grad_weight);
#pragma omp for
        for (int64_t v = 0; v < V; v++)
            for (int64_t c = 0; c < C; c++) write(out + v * C + c, grad_weight[v * stride + c]);
    }

    void run() {
        carve_workspace({static_cast<char*>(cpu::workspace(carve_workspace({})))});
        if (args.grad_weight && N == 0) memset(args.grad_weight, 0, V * C * sizeof(bfloat16));
#pragma omp parallel num_threads(args.execution.threads)
        {
            const TileScope tiles;
            pack_weight();
            for (int64_t n0 = 0; n0 < N; n0 += R) {
                const int64_t rows = minimum(R, N - n0);
                pack_chunk(n0, rows);
                compute_logits(n0, rows);
                compute_loss(n0, rows);
                if (gradients) compute_grad_weight(n0, rows);
                if (args.grad_x) compute_grad_x(n0, rows);
            }
            if (args.grad_weight && N > 0) write_grad_weight();
        }
    }
};

}   // namespace

void linear_cross_entropy(const cpu::LinearCrossEntropy& args) {
    if (args.dtype == DType::float64) return LossAndGradients<double, double>{args}.run();
    if (args.dtype == DType::bfloat16) {
        if constexpr (kMultipliesBfloat16)
            return LossAndGradients16{args}.run();
        else
            return LossAndGradients<float, bfloat16>{args}.run();
    }
    LossAndGradients<float, float>{args}.run();
}

}   // namespace nanochat::NANOCHAT_ISA
