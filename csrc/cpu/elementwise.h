// Passes over lists of tensors, for the optimizers. Each thread takes an equal run of the elements of a list, cut at
// multiples of kGrain, so that every element meets the same vector arithmetic whatever the number of threads.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "../kernels.h"
#include "simd.h"

namespace nanochat::NANOCHAT_ISA {

constexpr int64_t kGrain = 1024;

// Calls visit(tensor, begin, end) for this thread's share of `count` tensors. size(tensor) is the number of elements of
// a tensor.
template <class Size, class Visit>
NANOCHAT_INLINE void for_each_share(int64_t count, int threads, int thread, const Size& size, const Visit& visit) {
    int64_t grains = 0;
    for (int64_t i = 0; i < count; i++) grains += ceil_div(size(i), kGrain);
    const int64_t begin = grains * thread / threads, end = grains * (thread + 1) / threads;
    int64_t first = 0;   // of the current tensor
    for (int64_t i = 0; i < count && first < end; i++) {
        const int64_t own = ceil_div(size(i), kGrain);
        const int64_t from = maximum(begin, first) - first, to = minimum(end, first + own) - first;
        if (from < to) visit(i, from * kGrain, minimum(to * kGrain, size(i)));
        first += own;
    }
}

// Calls step(i, pointers) for each whole vector. The last, partial vector goes through padded copies; the first
// `written` of them are copied back.
template <int written, class Step, size_t... I, class... Types>
NANOCHAT_INLINE void for_each_vector(int64_t begin, int64_t end, const Step& step, std::index_sequence<I...>,
                                     Types*... arrays) {
    constexpr int W = kLanes<float>;
    int64_t i = begin;
    for (; i + W <= end; i += W) step(i, (arrays + i)...);
    const size_t left = static_cast<size_t>(end - i);
    if (left == 0) return;
    alignas(64) unsigned char copies[sizeof...(arrays)][kVectorBytes] = {};
    (memcpy(copies[I], arrays + i, left * sizeof(Types)), ...);
    step(i, reinterpret_cast<Types*>(copies[I])...);
    ((I < written ? (void)memcpy(const_cast<std::remove_const_t<Types>*>(arrays + i), copies[I], left * sizeof(Types))
                  : (void)0),
     ...);
}

// The number at `address`, or `number` if `address` is null.
template <class T>
NANOCHAT_INLINE T resolve_scalar(const T* address, T number) {
    return address ? *address : number;
}

// p after weight decay. The cautious form decays only where the update and p have the same sign, or one of them is 0; a
// NaN does not decay.
template <bool cautious>
NANOCHAT_INLINE Vec<float> decayed(Vec<float> p, float decay, Vec<float> update) {
    if constexpr (cautious)
        return update * p >= 0.0f ? p * decay : p;
    else
        return p * decay;
}

}   // namespace nanochat::NANOCHAT_ISA
