// The residual sum mixed with another stream by two learned factors, the norm of the mix, and the gradient, which includes
// that of the factors.
//
// Each element is read and written once. With 2 or 4 bytes per element, a row of C elements takes
//   mix_rms_norm:            6 C elements, 4 C without a residual, and 4 bytes for r
//   mix_rms_norm_backward:   9 C elements, less C for each gradient that is null, 4 bytes of r and 8 for its terms
// A row stays in the registers of its threads between the sum and the second use of its elements, as in rms_norm.cu. Each
// row leaves one term of the gradient of each factor, and a second kernel adds the terms, in float64 and always in the
// same order.
#include <cstdint>

#include "../kernels.h"
#include "rows.cuh"

namespace nanochat::cuda::mix_rms_norm_kernels {
namespace {

// Per thread: 64 bytes of loads in flight for each of three tensors, 32 for each of seven.
constexpr int kForwardPacks = 4, kBackwardPacks = 2;
// Blocks of kMaxThreads that share a multiprocessor, which leaves 80 and 128 registers per thread.
constexpr int kForwardBlocks = 3, kBackwardBlocks = 2;

// --- forward ---

template <class T, int N>
NANOCHAT_DEVICE Pack<T, N> mix_of(const Pack<T, N>& z, float z_factor, const Pack<T, N>& x0, float x0_factor) {
    Pack<T, N> mixed;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) pair[j] = z_factor * element(z, i + j) + x0_factor * element(x0, i + j);
        set_pair(mixed, i, pair[0], pair[1]);
    }
    return mixed;
}

struct MixArguments {
    const void *x, *residual, *x0;
    const float *x_scale, *x0_scale;
    void *z, *mixed, *y;
    float* r;
    int64_t N;
    int C;
    float inverse_C, eps;
};

template <class T, bool add, bool whole>
__global__ void __launch_bounds__(kMaxThreads, kForwardBlocks) mix_rms_norm_kernel(const MixArguments a) {
    constexpr int N = kPack<T>;
    const int64_t row = own_row();
    if (row >= a.N) return;
    const int64_t start = row * a.C;
    const T *x = static_cast<const T*>(a.x) + start, *x0 = static_cast<const T*>(a.x0) + start;
    const T* residual = add ? static_cast<const T*>(a.residual) + start : nullptr;
    T* z = add ? static_cast<T*>(a.z) + start : nullptr;
    T *mixed = static_cast<T*>(a.mixed) + start, *y = static_cast<T*>(a.y) + start;
    const int thread = threadIdx.x, threads = blockDim.x, packs = (a.C + N - 1) / N;

    // All loads are issued before the first is used.
    const float x_scale = *a.x_scale, x0_scale = *a.x0_scale;
    Pack<T, N> held[kForwardPacks] = {}, other[kForwardPacks] = {}, held_x0[kForwardPacks] = {};
#pragma unroll
    for (int i = 0; i < kForwardPacks; ++i) {
        const int p = i * threads + thread;
        if (p < packs) {
            held[i] = load_pack<N, whole>(x, p, a.C);
            if (add) other[i] = load_pack<N, whole>(residual, p, a.C);
            held_x0[i] = load_pack<N, whole>(x0, p, a.C);
        }
    }
    // Writes z and the mix of pack p, and returns the mix.
    const auto write_mix = [&](int p, Pack<T, N> sum, const Pack<T, N>& own_residual, const Pack<T, N>& own_x0) {
        if (add) {
            sum = sum_of(sum, own_residual);
            store_pack<whole>(z, p, a.C, sum);
        }
        const Pack<T, N> mix = mix_of(sum, x_scale, own_x0, x0_scale);
        store_pack<whole>(mixed, p, a.C, mix);
        return mix;
    };
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kForwardPacks; ++i) {
        const int p = i * threads + thread;
        if (p < packs) {
            held[i] = write_mix(p, held[i], other[i], held_x0[i]);
            add_squares(squares, held[i]);
        }
    }
#pragma unroll 1
    for (int p = kForwardPacks * threads + thread; p < packs; p += threads) {
        Pack<T, N> own_residual = {};
        if (add) own_residual = load_pack<N, whole>(residual, p, a.C);
        const Pack<T, N> own_x = load_pack<N, whole>(x, p, a.C), own_x0 = load_pack<N, whole>(x0, p, a.C);
        add_squares(squares, write_mix(p, own_x, own_residual, own_x0));
    }
    const float r = 1 / sqrtf(row_sum(squares) * a.inverse_C + a.eps);
    if (thread == 0) a.r[row] = r;
#pragma unroll
    for (int i = 0; i < kForwardPacks; ++i) {
        const int p = i * threads + thread;
        hold_packed(held[i]);
        if (p < packs) store_pack<whole>(y, p, a.C, times(held[i], r));
    }
#pragma unroll 1
    for (int p = kForwardPacks * threads + thread; p < packs; p += threads) {
        store_pack<whole>(y, p, a.C, times(load_pack<N, whole>(mixed, p, a.C), r));
    }
}

// --- backward ---

struct BackwardArguments {
    const void *dy, *dz, *dmixed, *add_to, *y, *z, *x0;
    const float *r, *x_scale, *x0_scale;
    void *dx, *dx0;
    float* terms;   // (2, N), of x_scale and of x0_scale
    int64_t N;
    int C;
    float inverse_C;
};

// One pack of each tensor. A gradient that is null has zeros.
template <class T, int N>
struct Packs {
    Pack<T, N> dy, dz, dmixed, add_to, y, z, x0;
};

template <class T, bool whole>
__global__ void __launch_bounds__(kMaxThreads, kBackwardBlocks)
    mix_rms_norm_backward_kernel(const BackwardArguments a) {
    constexpr int N = kPack<T>;
    const int64_t row = own_row();
    if (row >= a.N) return;
    const int64_t start = row * a.C;
    const int thread = threadIdx.x, threads = blockDim.x, packs = (a.C + N - 1) / N;
    const auto load_from = [&](const void* tensor, int p) {
        return load_pack<N, whole>(static_cast<const T*>(tensor) + start, p, a.C);
    };
    const auto load_packs = [&](int p) {
        Packs<T, N> own = {};
        own.dy = load_from(a.dy, p);
        own.y = load_from(a.y, p);
        if (a.dz) own.dz = load_from(a.dz, p);
        if (a.dmixed) own.dmixed = load_from(a.dmixed, p);
        if (a.add_to) own.add_to = load_from(a.add_to, p);
        own.z = load_from(a.z, p);
        own.x0 = load_from(a.x0, p);
        return own;
    };

    // All loads are issued before the first is used.
    const float r = a.r[row], x_scale = *a.x_scale, x0_scale = *a.x0_scale;
    Packs<T, N> held[kBackwardPacks] = {};
#pragma unroll
    for (int i = 0; i < kBackwardPacks; ++i) {
        const int p = i * threads + thread;
        if (p < packs) held[i] = load_packs(p);
    }
    float products = 0;
#pragma unroll
    for (int i = 0; i < kBackwardPacks; ++i) add_products(products, held[i].dy, held[i].y);
#pragma unroll 1
    for (int p = kBackwardPacks * threads + thread; p < packs; p += threads) {
        add_products(products, load_from(a.dy, p), load_from(a.y, p));
    }
    const float mean = row_sum<0>(products) * a.inverse_C;

    float with_z = 0, with_x0 = 0;
    const auto write_gradients = [&](int p, const Packs<T, N>& own) {
        Pack<T, N> dx, dx0;
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            float dx_pair[2], dx0_pair[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int k = i + j;
                const float ds = element(own.dmixed, k) + r * (element(own.dy, k) - element(own.y, k) * mean);
                with_z += ds * element(own.z, k);
                with_x0 += ds * element(own.x0, k);
                dx_pair[j] = element(own.dz, k) + x_scale * ds;
                dx0_pair[j] = element(own.add_to, k) + x0_scale * ds;
            }
            set_pair(dx, i, dx_pair[0], dx_pair[1]);
            set_pair(dx0, i, dx0_pair[0], dx0_pair[1]);
        }
        store_pack<whole>(static_cast<T*>(a.dx) + start, p, a.C, dx);
        store_pack<whole>(static_cast<T*>(a.dx0) + start, p, a.C, dx0);
    };
#pragma unroll
    for (int i = 0; i < kBackwardPacks; ++i) {
        const int p = i * threads + thread;
        hold_packed(held[i].dy);
        hold_packed(held[i].y);
        hold_packed(held[i].dz);
        hold_packed(held[i].dmixed);
        hold_packed(held[i].add_to);
        hold_packed(held[i].z);
        hold_packed(held[i].x0);
        if (p < packs) write_gradients(p, held[i]);
    }
#pragma unroll 1
    for (int p = kBackwardPacks * threads + thread; p < packs; p += threads) write_gradients(p, load_packs(p));

    with_z = row_sum<1>(with_z);
    with_x0 = row_sum<2>(with_x0);
    if (thread == 0) {
        a.terms[row] = with_z;
        a.terms[a.N + row] = with_x0;
    }
}

constexpr int kSumThreads = 1024;

// Adds the N terms of a factor's gradient. A block has one factor.
__global__ void __launch_bounds__(kSumThreads)
    factor_gradients_kernel(const float* terms, int64_t N, float* dx_scale, float* dx0_scale) {
    NANOCHAT_SHARED(double[kSumThreads / 32], warps);
    const float* own = terms + blockIdx.x * N;
    double sum = 0;
#pragma unroll 8
    for (int64_t n = threadIdx.x; n < N; n += kSumThreads) sum += static_cast<double>(own[n]);
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) *(blockIdx.x == 0 ? dx_scale : dx0_scale) = static_cast<float>(sum);
}

// --- launches ---

template <class T, bool add>
void launch_mix(const MixRMSNorm& a, const Grid& grid) {
    const MixArguments arguments = {
        .x = a.x,
        .residual = a.residual,
        .x0 = a.x0,
        .x_scale = static_cast<const float*>(a.x_scale),
        .x0_scale = static_cast<const float*>(a.x0_scale),
        .z = a.z,
        .mixed = a.mixed,
        .y = a.y,
        .r = static_cast<float*>(a.r),
        .N = a.N,
        .C = static_cast<int>(a.C),
        .inverse_C = static_cast<float>(1.0 / a.C),
        .eps = static_cast<float>(a.eps),
    };
    const bool whole = is_whole(a.C, kPack<T>, a.x, a.residual, a.x0, a.z, a.mixed, a.y);
    device::launch("mix_rms_norm", whole ? mix_rms_norm_kernel<T, add, true> : mix_rms_norm_kernel<T, add, false>,
                   grid.blocks, grid.threads, 0, a.execution.stream, arguments);
}

template <class T>
void launch_mix(const MixRMSNorm& a) {
    const Grid grid = grid_of("mix_rms_norm", a.N, a.C, kPack<T>, kForwardPacks);
    a.residual ? launch_mix<T, true>(a, grid) : launch_mix<T, false>(a, grid);
}

template <class T>
void launch_backward(const MixRMSNormBackward& a) {
    const Grid grid = grid_of("mix_rms_norm_backward", a.N, a.C, kPack<T>, kBackwardPacks);
    const BackwardArguments arguments = {
        .dy = a.dy,
        .dz = a.dz,
        .dmixed = a.dmixed,
        .add_to = a.add_to,
        .y = a.y,
        .z = a.z,
        .x0 = a.x0,
        .r = static_cast<const float*>(a.r),
        .x_scale = static_cast<const float*>(a.x_scale),
        .x0_scale = static_cast<const float*>(a.x0_scale),
        .dx = a.dx,
        .dx0 = a.dx0,
        .terms = static_cast<float*>(a.execution.workspace),
        .N = a.N,
        .C = static_cast<int>(a.C),
        .inverse_C = static_cast<float>(1.0 / a.C),
    };
    const bool whole = is_whole(a.C, kPack<T>, a.dy, a.dz, a.dmixed, a.add_to, a.y, a.z, a.x0, a.dx, a.dx0);
    device::launch("mix_rms_norm_backward",
                   whole ? mix_rms_norm_backward_kernel<T, true> : mix_rms_norm_backward_kernel<T, false>, grid.blocks,
                   grid.threads, 0, a.execution.stream, arguments);
}

}   // namespace
}   // namespace nanochat::cuda::mix_rms_norm_kernels

namespace nanochat::cuda {

void mix_rms_norm(const MixRMSNorm& a) {
    using namespace mix_rms_norm_kernels;
    if (a.N == 0) return;
    a.dtype == DType::bfloat16 ? launch_mix<bfloat16>(a) : launch_mix<float>(a);
}

int64_t mix_rms_norm_backward_workspace_bytes(const MixRMSNormBackward& a) {
    return 2 * a.N * static_cast<int64_t>(sizeof(float));
}

void mix_rms_norm_backward(const MixRMSNormBackward& a) {
    using namespace mix_rms_norm_kernels;
    if (a.N > 0) a.dtype == DType::bfloat16 ? launch_backward<bfloat16>(a) : launch_backward<float>(a);
    device::launch("mix_rms_norm_backward", factor_gradients_kernel, dim3(2), dim3(kSumThreads), 0, a.execution.stream,
                   static_cast<const float*>(a.execution.workspace), a.N, static_cast<float*>(a.dx_scale),
                   static_cast<float*>(a.dx0_scale));
}

}   // namespace nanochat::cuda
