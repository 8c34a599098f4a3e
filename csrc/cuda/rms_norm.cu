// RMS norm of rows, with the residual sum before it, its gradient, and the norm of rows of an embedding table.
//
// Each element is read and written once. With 2 or 4 bytes per element, a row of C elements takes
//   rms_norm:            2 C elements, 4 C with the residual sum, and 4 bytes for r
//   rms_norm_backward:   3 C elements, 4 C with the gradient of the sum, and 4 bytes of r
//   embedding_rms_norm:  C elements of the table and C of the result, 8 bytes of the token and 4 for r
// A row stays in the registers of its threads between the sum and the second use of its elements: one warp for up to
// 1,024 elements of bfloat16, then a block. Longer rows than a block holds are read again, mostly from the L2 cache.
#include <cmath>
#include <cstdint>

#include "../kernels.h"
#include "rows.cuh"

namespace nanochat::cuda::rms_norm_kernels {
namespace {

// Blocks of kMaxThreads that share a multiprocessor, which leaves 64 and 128 registers per thread.
constexpr int kForwardBlocks = 4, kBackwardBlocks = 2;

// --- forward ---

template <class T, class From, int N>
NANOCHAT_DEVICE Pack<T, N> rounded(const Pack<From, N>& pack) {
    Pack<T, N> result;
#pragma unroll
    for (int i = 0; i < N; i += 2) set_pair(result, i, element(pack, i), element(pack, i + 1));
    return result;
}

// What the kernels need of a row beside its source. `sum` may be null.
template <class T>
struct Result {
    T *sum, *y;
    float* r;
    int C;
    float inverse_C, eps;
};

// Normalises a row. `held` has this thread's first packs, or zeros behind the end of the row; `load_again` returns any.
template <bool whole, class T, int N, class Load>
NANOCHAT_DEVICE void normalise(Pack<T, N> (&held)[kHeldPacks], const Load& load_again, const Result<T>& to) {
    const int thread = threadIdx.x, threads = blockDim.x, packs = (to.C + N - 1) / N;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) {
        const int p = i * threads + thread;
        if (to.sum && p < packs) store_pack<whole>(to.sum, p, to.C, held[i]);
        add_squares(squares, held[i]);
    }
#pragma unroll 1
    for (int p = kHeldPacks * threads + thread; p < packs; p += threads) {
        const Pack<T, N> pack = load_again(p);
        if (to.sum) store_pack<whole>(to.sum, p, to.C, pack);
        add_squares(squares, pack);
    }
    const float r = 1 / sqrtf(row_sum(squares) * to.inverse_C + to.eps);
    if (thread == 0) *to.r = r;
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) {
        const int p = i * threads + thread;
        hold_packed(held[i]);
        if (p < packs) store_pack<whole>(to.y, p, to.C, times(held[i], r));
    }
#pragma unroll 1
    for (int p = kHeldPacks * threads + thread; p < packs; p += threads) {
        store_pack<whole>(to.y, p, to.C, times(load_again(p), r));
    }
}

struct NormArguments {
    const void *x, *residual;
    void *sum, *y;
    float* r;
    int64_t N;
    int C;
    float inverse_C, eps;
};

template <class T, bool add, bool whole>
__global__ void __launch_bounds__(kMaxThreads, kForwardBlocks) rms_norm_kernel(const NormArguments a) {
    constexpr int N = kPack<T>;
    const int64_t row = own_row();
    if (row >= a.N) return;
    const int64_t start = row * a.C;
    const T *x = static_cast<const T*>(a.x) + start, *residual = static_cast<const T*>(a.residual) + start;
    const int packs = (a.C + N - 1) / N;

    Pack<T, N> held[kHeldPacks] = {}, other[kHeldPacks] = {};
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) {
        const int p = i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
        if (p < packs) {
            held[i] = load_pack<N, whole>(x, p, a.C);
            if (add) other[i] = load_pack<N, whole>(residual, p, a.C);
        }
    }
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) {
        if (add) held[i] = sum_of(held[i], other[i]);
    }
    const auto load_again = [&](int p) {
        const Pack<T, N> pack = load_pack<N, whole>(x, p, a.C);
        return add ? sum_of(pack, load_pack<N, whole>(residual, p, a.C)) : pack;
    };
    T* sum = a.sum ? static_cast<T*>(a.sum) + start : nullptr;
    normalise<whole>(held, load_again,
                     Result<T>{sum, static_cast<T*>(a.y) + start, a.r + row, a.C, a.inverse_C, a.eps});
}

struct EmbeddingArguments {
    const void* table;
    const int64_t* tokens;
    void* y;
    float* r;
    int64_t N, V;
    int C;
    float inverse_C, eps;
};

template <class Table, class T, bool whole>
__global__ void __launch_bounds__(kMaxThreads, kForwardBlocks) embedding_rms_norm_kernel(const EmbeddingArguments a) {
    constexpr int N = kPack<Table, T>;
    const int64_t row = own_row();
    if (row >= a.N) return;
    const int64_t token = a.tokens[row];
    const bool known = token >= 0 && token < a.V;
    const Table* x = static_cast<const Table*>(a.table) + (known ? token * a.C : 0);
    const int packs = (a.C + N - 1) / N;

    Pack<Table, N> loaded[kHeldPacks] = {};
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) {
        const int p = i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
        if (p < packs) loaded[i] = load_pack<N, whole>(x, p, a.C);
    }
    Pack<T, N> held[kHeldPacks];
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) held[i] = rounded<T>(loaded[i]);
    const auto load_again = [&](int p) { return rounded<T>(load_pack<N, whole>(x, p, a.C)); };
    const float eps = known ? a.eps : NAN;   // of an unknown token: makes r and the row NaN
    normalise<whole>(held, load_again,
                     Result<T>{nullptr, static_cast<T*>(a.y) + row * a.C, a.r + row, a.C, a.inverse_C, eps});
}

// --- backward ---

struct BackwardArguments {
    const void *dy, *y, *dsum;
    const float* r;
    void* dx;
    int64_t N;
    int C;
    float inverse_C;
};

// dsum + r (dy - y mean)
template <class T, int N>
NANOCHAT_DEVICE Pack<T, N> gradient(const Pack<T, N>& dy, const Pack<T, N>& y, const Pack<T, N>& dsum, float r,
                                    float mean) {
    Pack<T, N> dx;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            pair[j] = element(dsum, i + j) + r * (element(dy, i + j) - element(y, i + j) * mean);
        }
        set_pair(dx, i, pair[0], pair[1]);
    }
    return dx;
}

template <class T, bool add, bool whole>
__global__ void __launch_bounds__(kMaxThreads, kBackwardBlocks) rms_norm_backward_kernel(const BackwardArguments a) {
    constexpr int N = kPack<T>;
    const int64_t row = own_row();
    if (row >= a.N) return;
    const int64_t start = row * a.C;
    const T *dy = static_cast<const T*>(a.dy) + start, *y = static_cast<const T*>(a.y) + start;
    const T* dsum = static_cast<const T*>(a.dsum) + start;
    T* dx = static_cast<T*>(a.dx) + start;
    const int thread = threadIdx.x, threads = blockDim.x, packs = (a.C + N - 1) / N;

    // All loads are issued before the first is used.
    const float r = a.r[row];
    Pack<T, N> held_dy[kHeldPacks] = {}, held_y[kHeldPacks] = {}, held_dsum[kHeldPacks] = {};
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) {
        const int p = i * threads + thread;
        if (p < packs) {
            held_dy[i] = load_pack<N, whole>(dy, p, a.C);
            held_y[i] = load_pack<N, whole>(y, p, a.C);
            if (add) held_dsum[i] = load_pack<N, whole>(dsum, p, a.C);
        }
    }
    float products = 0;
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) add_products(products, held_dy[i], held_y[i]);
#pragma unroll 1
    for (int p = kHeldPacks * threads + thread; p < packs; p += threads) {
        add_products(products, load_pack<N, whole>(dy, p, a.C), load_pack<N, whole>(y, p, a.C));
    }
    const float mean = row_sum(products) * a.inverse_C;
#pragma unroll
    for (int i = 0; i < kHeldPacks; ++i) {
        const int p = i * threads + thread;
        hold_packed(held_dy[i]);
        hold_packed(held_y[i]);
        hold_packed(held_dsum[i]);
        if (p < packs) store_pack<whole>(dx, p, a.C, gradient(held_dy[i], held_y[i], held_dsum[i], r, mean));
    }
#pragma unroll 1
    for (int p = kHeldPacks * threads + thread; p < packs; p += threads) {
        const Pack<T, N> own_dy = load_pack<N, whole>(dy, p, a.C), own_y = load_pack<N, whole>(y, p, a.C);
        Pack<T, N> own_dsum = {};
        if (add) own_dsum = load_pack<N, whole>(dsum, p, a.C);
        store_pack<whole>(dx, p, a.C, gradient(own_dy, own_y, own_dsum, r, mean));
    }
}

// --- launches ---

template <class T, bool add>
void launch_norm(const RMSNorm& a, const Grid& grid) {
    const NormArguments arguments = {
        .x = a.x,
        .residual = a.residual,
        .sum = a.sum,
        .y = a.y,
        .r = static_cast<float*>(a.r),
        .N = a.N,
        .C = static_cast<int>(a.C),
        .inverse_C = static_cast<float>(1.0 / a.C),
        .eps = static_cast<float>(a.eps),
    };
    const bool whole = is_whole(a.C, kPack<T>, a.x, a.residual, a.sum, a.y);
    device::launch("rms_norm", whole ? rms_norm_kernel<T, add, true> : rms_norm_kernel<T, add, false>, grid.blocks,
                   grid.threads, 0, a.execution.stream, arguments);
}

template <class T>
void launch_norm(const RMSNorm& a) {
    const Grid grid = grid_of("rms_norm", a.N, a.C, kPack<T>, kHeldPacks);
    a.residual ? launch_norm<T, true>(a, grid) : launch_norm<T, false>(a, grid);
}

template <class T, bool add>
void launch_backward(const RMSNormBackward& a, const Grid& grid) {
    const BackwardArguments arguments = {
        .dy = a.dy,
        .y = a.y,
        .dsum = a.dsum,
        .r = static_cast<const float*>(a.r),
        .dx = a.dx,
        .N = a.N,
        .C = static_cast<int>(a.C),
        .inverse_C = static_cast<float>(1.0 / a.C),
    };
    const bool whole = is_whole(a.C, kPack<T>, a.dy, a.y, a.dsum, a.dx);
    device::launch("rms_norm_backward",
                   whole ? rms_norm_backward_kernel<T, add, true> : rms_norm_backward_kernel<T, add, false>,
                   grid.blocks, grid.threads, 0, a.execution.stream, arguments);
}

template <class T>
void launch_backward(const RMSNormBackward& a) {
    const Grid grid = grid_of("rms_norm_backward", a.N, a.C, kPack<T>, kHeldPacks);
    a.dsum ? launch_backward<T, true>(a, grid) : launch_backward<T, false>(a, grid);
}

template <class Table, class T>
void launch_embedding(const EmbeddingRMSNorm& a) {
    const EmbeddingArguments arguments = {
        .table = a.table,
        .tokens = a.tokens,
        .y = a.y,
        .r = static_cast<float*>(a.r),
        .N = a.N,
        .V = a.V,
        .C = static_cast<int>(a.C),
        .inverse_C = static_cast<float>(1.0 / a.C),
        .eps = static_cast<float>(a.eps),
    };
    const Grid grid = grid_of("embedding_rms_norm", a.N, a.C, kPack<Table, T>, kHeldPacks);
    const bool whole = is_whole(a.C, kPack<Table, T>, a.table, a.y);
    device::launch("embedding_rms_norm",
                   whole ? embedding_rms_norm_kernel<Table, T, true> : embedding_rms_norm_kernel<Table, T, false>,
                   grid.blocks, grid.threads, 0, a.execution.stream, arguments);
}

template <class Table>
void launch_embedding(const EmbeddingRMSNorm& a) {
    a.dtype == DType::bfloat16 ? launch_embedding<Table, bfloat16>(a) : launch_embedding<Table, float>(a);
}

}   // namespace
}   // namespace nanochat::cuda::rms_norm_kernels

namespace nanochat::cuda {

void rms_norm(const RMSNorm& a) {
    using namespace rms_norm_kernels;
    if (a.N == 0) return;
    a.dtype == DType::bfloat16 ? launch_norm<bfloat16>(a) : launch_norm<float>(a);
}

void rms_norm_backward(const RMSNormBackward& a) {
    using namespace rms_norm_kernels;
    if (a.N == 0) return;
    a.dtype == DType::bfloat16 ? launch_backward<bfloat16>(a) : launch_backward<float>(a);
}

void embedding_rms_norm(const EmbeddingRMSNorm& a) {
    using namespace rms_norm_kernels;
    if (a.N == 0) return;
    a.table_dtype == DType::bfloat16 ? launch_embedding<bfloat16>(a) : launch_embedding<float>(a);
}

}   // namespace nanochat::cuda
