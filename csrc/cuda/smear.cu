// Smear: each token gets a gated part of the token before it, and the gradients.
//
// A row of C elements is read from DRAM once; the rows beside it come from the caches. With 2 or 4 bytes per element it
// takes
//   smear:           2 C elements
//   smear_backward:  3 C elements, and 8 bytes for dz and the product, which two small launches read
#include <cmath>
#include <cstdint>

#include "gate.cuh"
#include "rows.cuh"

namespace nanochat::cuda::smear_kernels {
namespace {

// Blocks of kMaxThreads that share a multiprocessor, which leaves 64 and 80 registers per thread.
constexpr int kForwardBlocks = 4, kBackwardBlocks = 3;
constexpr int kForwardPacks = kHeldPacks, kBackwardPacks = 2;   // of a tensor, that a thread loads before it uses one

struct RowArguments {
    const void *x, *dout;   // dout of the backward pass alone
    const float *gate, *lambda;
    void* out;           // of the backward pass: dx
    float *dz, *terms;   // (N,) each, written by the backward pass: of w . x, and of the sum that is dlambda
    int64_t N, T;
    int C, I;
};

// The gate of a row, by each warp of its threads.
template <class T>
NANOCHAT_DEVICE float gate_of(const RowArguments& a, const T* row) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return gate_kernels::sigmoid(warp_sum(gate_kernels::part_of_dot(a.gate, row, a.I, lane, 32)));
}

// a + factor b
template <class T, int N>
NANOCHAT_DEVICE Pack<T, N> sum_of(const Pack<T, N>& a, const Pack<T, N>& b, float factor) {
    Pack<T, N> sum;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        set_pair(sum, i, element(a, i) + factor * element(b, i), element(a, i + 1) + factor * element(b, i + 1));
    }
    return sum;
}

template <class T, bool whole>
__global__ void __launch_bounds__(kMaxThreads, kForwardBlocks) smear_kernel(const RowArguments a) {
    constexpr int N = kPack<T>;
    const int64_t row = own_row();
    if (row >= a.N) return;
    const bool is_first = row % a.T == 0;
    const T* x = static_cast<const T*>(a.x) + row * a.C;
    const T* before = is_first ? x : x - a.C;
    T* out = static_cast<T*>(a.out) + row * a.C;
    const int threads = blockDim.x, packs = (a.C + N - 1) / N;
    const float factor = is_first ? 0 : *a.lambda * gate_of(a, x);
#pragma unroll 1
    for (int start = threadIdx.x; start < packs; start += kForwardPacks * threads) {
        Pack<T, N> own[kForwardPacks], other[kForwardPacks];
#pragma unroll
        for (int i = 0; i < kForwardPacks; ++i) {
            const int p = start + i * threads;
            if (p >= packs) continue;
            own[i] = load_pack<N, whole>(x, p, a.C);
            other[i] = load_pack<N, whole>(before, p, a.C);
        }
#pragma unroll
        for (int i = 0; i < kForwardPacks; ++i) {
            const int p = start + i * threads;
            if (p < packs) store_pack<whole>(out, p, a.C, is_first ? own[i] : sum_of(own[i], other[i], factor));
        }
    }
}

template <class T, bool whole>
__global__ void __launch_bounds__(kMaxThreads, kBackwardBlocks) smear_backward_kernel(const RowArguments a) {
    constexpr int N = kPack<T>;
    static_assert(kMostGateInputs <= 32 * N, "each thread has at most one pack of the channels of the gate, its first");
    const int64_t row = own_row();
    if (row >= a.N) return;
    const int64_t t = row % a.T;
    const bool is_first = t == 0, is_last = t == a.T - 1;
    const T *x = static_cast<const T*>(a.x) + row * a.C, *dout = static_cast<const T*>(a.dout) + row * a.C;
    const T *before = is_first ? x : x - a.C, *after = is_last ? dout : dout + a.C;
    T* dx = static_cast<T*>(a.out) + row * a.C;
    const int thread = threadIdx.x, threads = blockDim.x, packs = (a.C + N - 1) / N;
    const float lambda = *a.lambda;
    const float gate = is_first ? 0 : gate_of(a, x);
    const float factor = is_last ? 0 : lambda * gate_of(a, x + a.C);

    float product = 0;                          // dout . x of the token before
    Pack<T, N> own_dout = {}, own_after = {};   // of the channels of the gate, whose gradient needs the whole product
#pragma unroll 1
    for (int start = thread; start < packs; start += kBackwardPacks * threads) {
        Pack<T, N> douts[kBackwardPacks] = {}, afters[kBackwardPacks] = {}, befores[kBackwardPacks] = {};
#pragma unroll
        for (int i = 0; i < kBackwardPacks; ++i) {
            const int p = start + i * threads;
            if (p >= packs) continue;
            douts[i] = load_pack<N, whole>(dout, p, a.C);
            if (!is_last) afters[i] = load_pack<N, whole>(after, p, a.C);
            if (!is_first) befores[i] = load_pack<N, whole>(before, p, a.C);
        }
#pragma unroll
        for (int i = 0; i < kBackwardPacks; ++i) {
            const int p = start + i * threads;
#pragma unroll
            for (int j = 0; j < N; ++j) product += element(douts[i], j) * element(befores[i], j);
            if (p * N < a.I) {
                own_dout = douts[i];
                own_after = afters[i];
            } else if (p < packs) {
                store_pack<whole>(dx, p, a.C, sum_of(douts[i], afters[i], factor));
            }
        }
    }
    product = row_sum(product);
    const float dz = lambda * gate * (1 - gate) * product;
    if (thread == 0) {
        a.dz[row] = dz;
        a.terms[row] = gate * product;
    }
    const int first = thread * N;
    if (first >= a.I) return;
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float weight = first + i + j < a.I ? a.gate[first + i + j] : 0;
            pair[j] = element(own_dout, i + j) + factor * element(own_after, i + j) + dz * weight;
        }
        set_pair(pack, i, pair[0], pair[1]);
    }
    store_pack<whole>(dx, thread, a.C, pack);
}

// --- launches ---

// Of Smear or SmearBackward.
template <class Arguments>
RowArguments row_arguments(const char* op, const Arguments& a) {
    gate_kernels::require_sizes(op, 1, a.I);
    require(a.I <= a.C, op, ": a gate must have at most C = ", a.C, " channels, got ", a.I);
    return {
        .x = a.x,
        .gate = static_cast<const float*>(a.gate),
        .lambda = static_cast<const float*>(a.lambda),
        .N = a.B * a.T,
        .T = a.T,
        .C = static_cast<int>(a.C),
        .I = static_cast<int>(a.I),
    };
}

template <class T>
void launch(const Smear& a) {
    const char* op = "smear";
    RowArguments arguments = row_arguments(op, a);
    arguments.out = a.out;
    const Grid grid = grid_of(op, arguments.N, a.C, kPack<T>, kHeldPacks);
    const bool whole = is_whole(a.C, kPack<T>, a.x, a.out);
    device::launch(op, whole ? smear_kernel<T, true> : smear_kernel<T, false>, grid.blocks, grid.threads, 0,
                   a.execution.stream, arguments);
}

template <class T>
void launch(const SmearBackward& a) {
    const char* op = "smear_backward";
    RowArguments arguments = row_arguments(op, a);
    const int64_t N = arguments.N;
    float* dz = static_cast<float*>(a.execution.workspace);
    arguments.dout = a.dout;
    arguments.out = a.dx;
    arguments.dz = dz;
    arguments.terms = dz + N;
    if (N > 0) {
        const Grid grid = grid_of(op, N, a.C, kPack<T>, kHeldPacks);
        const bool whole = is_whole(a.C, kPack<T>, a.x, a.dout, a.dx);
        device::launch(op, whole ? smear_backward_kernel<T, true> : smear_backward_kernel<T, false>, grid.blocks,
                       grid.threads, 0, a.execution.stream, arguments);
    }
    const gate_kernels::SumArguments sums = {
        .x = a.x,
        .x_stride = a.C,
        .weights = arguments.gate,
        .dz = dz,
        .extra = arguments.terms,
        .partials = dz + 2 * N,
        .N = N,
        .G = 1,
        .I = arguments.I,
    };
    gate_kernels::launch_sums<T>(op, sums, a.dgate, a.dlambda, a.execution.stream);
}

}   // namespace
}   // namespace nanochat::cuda::smear_kernels

namespace nanochat::cuda {

void smear(const Smear& a) {
    using namespace smear_kernels;
    if (a.B * a.T == 0) return;
    a.dtype == DType::bfloat16 ? launch<bfloat16>(a) : launch<float>(a);
}

int64_t smear_backward_workspace_bytes(const SmearBackward& a) {
    return gate_kernels::workspace_bytes(a.B * a.T, 2, 1, a.I);
}

void smear_backward(const SmearBackward& a) {
    using namespace smear_kernels;
    a.dtype == DType::bfloat16 ? launch<bfloat16>(a) : launch<float>(a);
}

}   // namespace nanochat::cuda
