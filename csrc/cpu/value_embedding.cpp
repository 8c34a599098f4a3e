// Adds gated rows of an embedding to the values of attention, and the gradients. A value is read and written once. Threads
// share the rows, or blocks of them, so the results do not depend on their number.
#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "gate.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

constexpr int kGateScale = 3;   // a gate is kGateScale times its sigmoid

// read_part and write_part of numbers of T that are computed in S.
template <class S, class T, class P>
NANOCHAT_INLINE Vec<S> read_as(const T* p, P part) {
    if constexpr (std::is_same_v<S, Compute<T>>) {
        return read_part(p, part);
    } else {
        int64_t count = kLanes<S>;
        if constexpr (std::is_same_v<P, Part>) count = static_cast<int64_t>(part.count);
        S lanes[kLanes<S>] = {};
        for (int64_t i = 0; i < count; i++) lanes[i] = read(p + i);
        return load(lanes);
    }
}
template <class S, class T, class P>
NANOCHAT_INLINE void write_as(T* p, Vec<S> v, P part) {
    if constexpr (std::is_same_v<S, Compute<T>>) {
        write_part(p, v, part);
    } else {
        int64_t count = kLanes<S>;
        if constexpr (std::is_same_v<P, Part>) count = static_cast<int64_t>(part.count);
        S lanes[kLanes<S>];
        store(lanes, v);
        for (int64_t i = 0; i < count; i++) write(p + i, lanes[i]);
    }
}

template <class T, class Row>
void add_typed(const AddValueEmbedding& a) {
    using S = Compute<T>;
    const int64_t D = a.D, width = a.Hkv * D;
    const T *v = static_cast<const T*>(a.v), *h = static_cast<const T*>(a.h);
    const Row* table = static_cast<const Row*>(a.table);
    T* out = static_cast<T*>(a.out);
    Gates<S> gates;
    carve_workspace([&](cpu::Arena& arena) { gates = padded_gates<S>(arena, a.gate, a.Hkv, a.I); });
    for_each_row(a.N, width, a.execution.threads, [&](int64_t n) {
        S inputs[kMostGateInputs] = {};
        read_inputs(h + n * a.h_stride, a.I, inputs);
        const Row* row = table + a.ids[n] * width;
        for (int64_t first = 0; first < a.Hkv; first += kLanes<S>) {
            const Vec<S> factors = S(kGateScale) * gates.values(first, inputs);
            for (int64_t g = first; g < minimum(a.Hkv, first + kLanes<S>); g++) {
                const S factor = factors[g - first];
                const int64_t at = n * width + g * D;
                for_each_part<S>(D, [&](int64_t i, auto part) {
                    const Vec<S> sum = read_part(v + at + i, part) + read_as<S>(row + g * D + i, part) * factor;
                    write_part(out + at + i, sum, part);
                });
            }
        }
    });
}

template <class T, class Row>
void backward_typed(const AddValueEmbeddingBackward& a) {
    using S = Compute<T>;
    const int64_t D = a.D, width = a.Hkv * D;
    const T *dout = static_cast<const T*>(a.dout), *h = static_cast<const T*>(a.h);
    const Row* table = static_cast<const Row*>(a.table);
    T* dh = static_cast<T*>(a.dh);
    Row* drows = static_cast<Row*>(a.drows);
    Gates<S> gates;
    S* sums = nullptr;
    const int64_t stride = padded_inputs<S>(a.I), size = a.Hkv * stride;
    carve_workspace([&](cpu::Arena& arena) {
        gates = padded_gates<S>(arena, a.gate, a.Hkv, a.I);
        sums = arena.take<S>(ceil_div(a.N, kBlockRows) * size);
    });
    const auto backward_row = [&](int64_t n, S* dgate) {
        S inputs[kMostGateInputs] = {}, dinputs[kMostGateInputs] = {};
        read_inputs(h + n * a.h_stride, a.I, inputs);
        const Row* row = table + a.ids[n] * width;
        for (int64_t first = 0; first < a.Hkv; first += kLanes<S>) {
            const Vec<S> sigmoids = gates.values(first, inputs);
            for (int64_t g = first; g < minimum(a.Hkv, first + kLanes<S>); g++) {
                const S s = sigmoids[g - first];
                const T* own = dout + n * width + g * D;
                const S product = sum_over<S>(D, [&](int64_t i, auto part) {
                    const Vec<S> dout_part = read_part(own + i, part);
                    write_as<S>(drows + n * width + g * D + i, dout_part * (kGateScale * s), part);
                    return dout_part * read_as<S>(row + g * D + i, part);
                });
                const S dz = kGateScale * s * (1 - s) * product;
                for (int64_t i = 0; i < stride; i += kLanes<S>) {
                    store(dgate + g * stride + i, load(dgate + g * stride + i) + load(inputs + i) * dz);
                    store(dinputs + i, load(dinputs + i) + load(gates.weights + g * stride + i) * dz);
                }
            }
        }
        for (int64_t i = 0; i < a.I; i++) write(dh + n * a.I + i, dinputs[i]);
    };
    for_each_block(a.N, width, a.execution.threads, size, sums, [&](int64_t first, int64_t end, S* dgate) {
        for (int64_t n = first; n < end; n++) backward_row(n, dgate);
    });
    for (int64_t g = 0; g < a.Hkv; g++)
        for (int64_t i = 0; i < a.I; i++)
            static_cast<S*>(a.dgate)[g * a.I + i] = sum_of_blocks(a.N, size, sums, g * stride + i);
}

}   // namespace

void add_value_embedding(const AddValueEmbedding& a) {
    const bool same = a.table_dtype == a.dtype;
    if (a.dtype == DType::float64) return same ? add_typed<double, double>(a) : add_typed<double, float>(a);
    if (a.dtype == DType::bfloat16) return same ? add_typed<bfloat16, bfloat16>(a) : add_typed<bfloat16, float>(a);
    add_typed<float, float>(a);
}

void add_value_embedding_backward(const AddValueEmbeddingBackward& a) {
    const bool same = a.table_dtype == a.dtype;
    if (a.dtype == DType::float64) return same ? backward_typed<double, double>(a) : backward_typed<double, float>(a);
    if (a.dtype == DType::bfloat16)
        return same ? backward_typed<bfloat16, bfloat16>(a) : backward_typed<bfloat16, float>(a);
    backward_typed<float, float>(a);
}

}   // namespace nanochat::NANOCHAT_ISA
