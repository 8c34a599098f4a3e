// The squared ReLU (arXiv:2109.08668) and its gradient, in one pass each. With 2 or 4 bytes per element:
//   relu_squared: 2 elements per element; relu_squared_backward: 3
#include <cstdint>

#include "../check.h"
#include "../kernels.h"
#include "packs.cuh"

namespace nanochat::cuda::relu_squared_kernels {
namespace {

constexpr int kThreads = 256;
// Per thread: 64 bytes of loads in flight for each tensor, at least 80 KB per multiprocessor.
constexpr int kPacks = 4;
// Blocks that share a multiprocessor, which leaves 48 registers per thread.
constexpr int kBlocksResident = 5;

template <class T>
constexpr int64_t kBlockElements = kPacks * kThreads * kPack<T>;

template <class T, int N>
NANOCHAT_DEVICE Pack<T, N> squared(const Pack<T, N>& x) {
    Pack<T, N> y;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float positive = element(x, i + j) <= 0 ? 0 : element(x, i + j);   // NaN stays
            pair[j] = positive * positive;
        }
        set_pair(y, i, pair[0], pair[1]);
    }
    return y;
}

template <class T, int N>
NANOCHAT_DEVICE Pack<T, N> gradient(const Pack<T, N>& dy, const Pack<T, N>& y) {
    Pack<T, N> dx;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) pair[j] = 2 * device::sqrt_approx(element(y, i + j)) * element(dy, i + j);
        set_pair(dx, i, pair[0], pair[1]);
    }
    return dx;
}

// Where a thread's packs lie: `start`, and every `stride` elements, kPacks of them.
template <class T>
struct Span {
    static constexpr int N = kPack<T>, stride = kThreads * N;
    int64_t block, start, end;
    bool whole;   // all of the block's packs exist and are aligned

    NANOCHAT_DEVICE Span(int64_t numel, bool aligned)
        : block(int64_t{blockIdx.x} * kBlockElements<T>),
          start(block + threadIdx.x * N),
          end(min(numel, block + kBlockElements<T>)),
          whole(aligned && block + kBlockElements<T> <= numel) {}
};

// y may be x, and dx may be dy: one thread reads and writes an element.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksResident) relu_squared_kernel(const T* x, T* y, int64_t numel) {
    constexpr int N = kPack<T>;
    const bool aligned = is_aligned<N>(x) && is_aligned<N>(y);
    const Span<T> span(numel, aligned);
    if (span.whole) {
        Pack<T, N> pack[kPacks];
#pragma unroll
        for (int i = 0; i < kPacks; ++i) pack[i] = load<N>(x + span.start + i * span.stride);
#pragma unroll
        for (int i = 0; i < kPacks; ++i) store(y + span.start + i * span.stride, squared(pack[i]));
        return;
    }
#pragma unroll 1
    for (int64_t first = span.start; first < span.end; first += span.stride) {
        const Pack<T, N> pack = load<N>(x + first, span.end - first, aligned);
        store(y + first, squared(pack), span.end - first, aligned);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksResident)
    relu_squared_backward_kernel(const T* dy, const T* y, T* dx, int64_t numel) {
    constexpr int N = kPack<T>;
    const bool aligned = is_aligned<N>(dy) && is_aligned<N>(y) && is_aligned<N>(dx);
    const Span<T> span(numel, aligned);
    if (span.whole) {
        Pack<T, N> gradients[kPacks], results[kPacks];
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            gradients[i] = load<N>(dy + span.start + i * span.stride);
            results[i] = load<N>(y + span.start + i * span.stride);
        }
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            store(dx + span.start + i * span.stride, gradient(gradients[i], results[i]));
        }
        return;
    }
#pragma unroll 1
    for (int64_t first = span.start; first < span.end; first += span.stride) {
        const Pack<T, N> own = load<N>(dy + first, span.end - first, aligned);
        const Pack<T, N> result = load<N>(y + first, span.end - first, aligned);
        store(dx + first, gradient(own, result), span.end - first, aligned);
    }
}

template <class T>
dim3 blocks(const char* op, int64_t numel) {
    const int64_t count = (numel + kBlockElements<T> - 1) / kBlockElements<T>;
    require(count <= INT32_MAX, op, ": takes at most ", int64_t{INT32_MAX} * kBlockElements<T>, " elements, got ",
            numel);
    return dim3(static_cast<uint32_t>(count));
}

template <class T>
void launch(const ReluSquared& a) {
    device::launch("relu_squared", relu_squared_kernel<T>, blocks<T>("relu_squared", a.numel), dim3(kThreads), 0,
                   a.execution.stream, static_cast<const T*>(a.x), static_cast<T*>(a.y), a.numel);
}

template <class T>
void launch(const ReluSquaredBackward& a) {
    device::launch("relu_squared_backward", relu_squared_backward_kernel<T>,
                   blocks<T>("relu_squared_backward", a.numel), dim3(kThreads), 0, a.execution.stream,
                   static_cast<const T*>(a.dy), static_cast<const T*>(a.y), static_cast<T*>(a.dx), a.numel);
}

}   // namespace
}   // namespace nanochat::cuda::relu_squared_kernels

namespace nanochat::cuda {

void relu_squared(const ReluSquared& a) {
    using namespace relu_squared_kernels;
    if (a.numel == 0) return;
    a.dtype == DType::bfloat16 ? launch<bfloat16>(a) : launch<float>(a);
}

void relu_squared_backward(const ReluSquaredBackward& a) {
    using namespace relu_squared_kernels;
    if (a.numel == 0) return;
    a.dtype == DType::bfloat16 ? launch<bfloat16>(a) : launch<float>(a);
}

}   // namespace nanochat::cuda
