// Squared ReLU and its gradient, one pass over memory each, in place or not.
#include "relu_squared.h"

#include <omp.h>

#include "elementwise.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

// Calls visit(begin, end) for each thread's share of `numel` elements.
template <class Visit>
void for_each_range(int64_t numel, int threads, const Visit& visit) {
#pragma omp parallel num_threads(threads)
    for_each_share(1, [&](int64_t) { return numel; }, [&](int64_t, int64_t begin, int64_t end) { visit(begin, end); });
}

template <class T>
void relu_squared_typed(const ReluSquared& a) {
    for_each_range(a.numel, a.execution.threads, [&](int64_t begin, int64_t end) {
        for_each_vector<1>(
            begin, end, [](int64_t, T* y, const T* x) { store(y, squared_relu<Compute<T>>(load(x))); },
            std::make_index_sequence<2>(), static_cast<T*>(a.y), static_cast<const T*>(a.x));
    });
}

template <class T>
void relu_squared_backward_typed(const ReluSquaredBackward& a) {
    for_each_range(a.numel, a.execution.threads, [&](int64_t begin, int64_t end) {
        for_each_vector<1>(
            begin, end,
            [](int64_t, T* dx, const T* dy, const T* y) {
                store(dx, squared_relu_gradient<Compute<T>>(load(dy), load(y)));
            },
            std::make_index_sequence<3>(), static_cast<T*>(a.dx), static_cast<const T*>(a.dy),
            static_cast<const T*>(a.y));
    });
}

}   // namespace

void relu_squared(const ReluSquared& a) {
    if (a.dtype == DType::float64) return relu_squared_typed<double>(a);
    a.dtype == DType::bfloat16 ? relu_squared_typed<bfloat16>(a) : relu_squared_typed<float>(a);
}

void relu_squared_backward(const ReluSquaredBackward& a) {
    if (a.dtype == DType::float64) return relu_squared_backward_typed<double>(a);
    a.dtype == DType::bfloat16 ? relu_squared_backward_typed<bfloat16>(a) : relu_squared_backward_typed<float>(a);
}

}   // namespace nanochat::NANOCHAT_ISA
