// Gates, sigmoid(w . x) of a few channels x of a row, and the gradients of their weights: sums over all rows in a fixed
// order, first over blocks of rows, then over the blocks.
#pragma once

#include <cmath>
#include <cstdint>

#include "../check.h"
#include "../kernels.h"
#include "packs.cuh"

namespace nanochat::cuda::gate_kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kBlockRows = 64;   // whose products a block sums up

NANOCHAT_DEVICE float sigmoid(float z) { return 1 / (1 + expf(-z)); }

// The sum over `lanes` neighbouring lanes, a power of two; all of them get it. All threads of the warp call it.
NANOCHAT_DEVICE float sum_of_lanes(float x, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, distance);
    return x;
}

// This lane's part of w . x.
template <class T>
NANOCHAT_DEVICE float part_of_dot(const float* weights, const T* x, int inputs, int lane, int lanes) {
    float sum = 0;
    for (int i = lane; i < inputs; i += lanes) sum += weights[i] * to_float(x[i]);
    return sum;
}

template <class T>
NANOCHAT_DEVICE void write(T* to, float x) {
    Pack<T, 2> pack;
    set_pair(pack, 0, x, 0);
    from_bits(*to, pack.words[0]);
}

// With dz, the gradient of w . x for each of N rows and G gates:
//   dweights[g, i] = sum of dz[n, g] x[n, i] over n;  dx[n, i] = sum of dz[n, g] weights[g, i] over g
// and the sum of `extra` over n.
struct SumArguments {
    const void* x;   // (N, I), rows x_stride apart
    int64_t x_stride;
    const float *weights, *dz;   // (G, I) and (N, G)
    const float* extra;          // (N,), or null
    void* dx;                    // (N, I), or null
    float* partials;             // (blocks, G I + 1)
    int64_t N;
    int G, I;
};

template <class T>
__global__ void __launch_bounds__(kThreads) partial_sums_kernel(const SumArguments a) {
    const int64_t first = int64_t{blockIdx.x} * kBlockRows;
    const int rows = static_cast<int>(min(int64_t{kBlockRows}, a.N - first));
    const T* x = static_cast<const T*>(a.x) + first * a.x_stride;
    const float* dz = a.dz + first * a.G;
    const int outputs = a.G * a.I;
    float* partials = a.partials + int64_t{blockIdx.x} * (outputs + 1);
    for (int o = threadIdx.x; o <= outputs; o += kThreads) {
        const int g = o / a.I, i = o % a.I;
        float sum = 0;
        if (o < outputs) {
#pragma unroll 4
            for (int n = 0; n < rows; ++n) sum += dz[n * a.G + g] * to_float(x[n * a.x_stride + i]);
        } else if (a.extra) {
#pragma unroll 4
            for (int n = 0; n < rows; ++n) sum += a.extra[first + n];
        }
        partials[o] = sum;
    }
    if (!a.dx) return;
    T* dx = static_cast<T*>(a.dx) + first * a.I;
    for (int e = threadIdx.x; e < rows * a.I; e += kThreads) {
        const int n = e / a.I, i = e % a.I;
        float sum = 0;
        for (int g = 0; g < a.G; ++g) sum += dz[n * a.G + g] * a.weights[g * a.I + i];
        write(dx + e, sum);
    }
}

// A warp adds up the partial sums of a number of dweights, or of the sum of `extra`, which is the last.
__global__ void __launch_bounds__(32)
    total_sums_kernel(const float* partials, int64_t blocks, float* dweights, float* dextra) {
    const int64_t o = blockIdx.x, outputs = gridDim.x - 1;
    double sum = 0;
#pragma unroll 4
    for (int64_t block = threadIdx.x; block < blocks; block += 32) sum += partials[block * (outputs + 1) + o];
    sum = warp_sum(sum);
    if (threadIdx.x != 0) return;
    if (o < outputs) {
        dweights[o] = static_cast<float>(sum);
    } else if (dextra) {
        *dextra = static_cast<float>(sum);
    }
}

int64_t blocks_of(int64_t N) { return (N + kBlockRows - 1) / kBlockRows; }

// The workspace of a backward pass: `numbers` for each row, then the partial sums.
int64_t workspace_bytes(int64_t N, int64_t numbers, int64_t G, int64_t I) {
    return (N * numbers + blocks_of(N) * (G * I + 1)) * static_cast<int64_t>(sizeof(float));
}

void require_sizes(const char* op, int64_t G, int64_t I) {
    require(I >= 1 && I <= kMostGateInputs, op, ": a gate must have 1 to ", kMostGateInputs, " channels, got ", I);
    require(G >= 1 && G <= INT32_MAX / kMostGateInputs, op, ": takes at most ", INT32_MAX / kMostGateInputs,
            " gates, got ", G);
}

// `x` has type T. `dextra` may be null.
template <class T>
void launch_sums(const char* op, const SumArguments& a, void* dweights, void* dextra, void* stream) {
    const int64_t blocks = blocks_of(a.N);
    if (blocks > 0) {
        device::launch(op, partial_sums_kernel<T>, dim3(static_cast<uint32_t>(blocks)), dim3(kThreads), 0, stream, a);
    }
    device::launch(op, total_sums_kernel, dim3(static_cast<uint32_t>(a.G * a.I + 1)), dim3(32), 0, stream,
                   static_cast<const float*>(a.partials), blocks, static_cast<float*>(dweights),
                   static_cast<float*>(dextra));
}

}   // namespace
}   // namespace nanochat::cuda::gate_kernels
