// Squared ReLU of vectors and of numbers: max(x, 0)^2 (So et al., arXiv:2109.08668), and its gradient from the result.
// A NaN stays a NaN.
#pragma once

#include "simd.h"

namespace nanochat::NANOCHAT_ISA {

template <class T>
NANOCHAT_INLINE Vec<T> squared_relu(Vec<T> x) {
    const Vec<T> h = x < Vec<T>{} ? Vec<T>{} : x;
    return h * h;
}
template <class T>
NANOCHAT_INLINE T squared_relu(T x) {
    const T h = x < 0 ? 0 : x;
    return h * h;
}

template <class T>
NANOCHAT_INLINE Vec<T> squared_relu_gradient(Vec<T> dy, Vec<T> y) {
    return dy * (sqrt_lanes<T>(y) * 2);
}
template <class T>
NANOCHAT_INLINE T squared_relu_gradient(T dy, T y) {
    return dy * ((sizeof(T) == 4 ? __builtin_sqrtf(y) : __builtin_sqrt(y)) * 2);
}

}   // namespace nanochat::NANOCHAT_ISA
