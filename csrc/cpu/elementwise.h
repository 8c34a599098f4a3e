// Passes over the elements of tensors. Each thread takes an equal run of the elements of a list, cut at
// multiples of kGrain, so that every element meets the same vector arithmetic whatever the number of threads.
#pragma once

#include <omp.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "../kernels.h"
#include "simd.h"

namespace nanochat::NANOCHAT_ISA {

constexpr int64_t kGrain = 1024;

// The type that numbers of type T are computed in.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls visit(tensor, begin, end) for this thread's share of `count` tensors, in a parallel region, which may have fewer
// threads than were asked for. size(tensor) is the number of elements of a tensor.
template <class Size, class Visit>
NANOCHAT_INLINE void for_each_share(int64_t count, const Size& size, const Visit& visit) {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
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
    constexpr int W = (std::is_same_v<std::remove_const_t<Types>, double> || ...) ? kLanes<double> : kLanes<float>;
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

// Fewer elements per thread than this take less time than waking the thread.
constexpr int64_t kLeastPerThread = 16384;

NANOCHAT_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
NANOCHAT_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// A whole vector, or its first `count` lanes, the others of which are 0.
struct Whole {};
struct Part {
    size_t count;
};

template <class T>
NANOCHAT_INLINE Vec<Compute<T>> read_part(const T* p, Whole) {
    return load(p);
}
template <class T>
NANOCHAT_INLINE Vec<Compute<T>> read_part(const T* p, Part part) {
    T lanes[kLanes<Compute<T>>] = {};
    memcpy(lanes, p, part.count * sizeof(T));
    return load(lanes);
}
template <class T>
NANOCHAT_INLINE void write_part(T* p, Vec<Compute<T>> v, Whole) {
    store(p, v);
}
template <class T>
NANOCHAT_INLINE void write_part(T* p, Vec<Compute<T>> v, Part part) {
    T lanes[kLanes<Compute<T>>];
    store(lanes, v);
    memcpy(p, lanes, part.count * sizeof(T));
}

// Calls step(i, part) for the vectors of `count` elements.
template <class T, class Step>
NANOCHAT_INLINE void for_each_part(int64_t count, const Step& step) {
    constexpr int W = kLanes<T>;
    int64_t i = 0;
    for (; i + W <= count; i += W) step(i, Whole{});
    if (i < count) step(i, Part{static_cast<size_t>(count - i)});
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
