// RMSNorm without weights (Zhang & Sennrich, arXiv:1910.07467), with the residual sum before it or the lookup in an
// embedding, and its gradient. A row is read from memory once: it is in the cache when its second pass begins. Threads
// share the rows, so the results do not depend on their number.
#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "rows.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

// Writes y = s r, and s itself if `sum` is not null, for s = x + residual, or x if `residual` is null. Returns r. `sum`
// may be x, and y may be x if `residual` is null.
template <class T>
NANOCHAT_INLINE Compute<T> normalise_row(int64_t C, double eps, const T* x, const T* residual, T* sum, T* y) {
    using A = Compute<T>;
    const auto element = [&](int64_t i, auto part) {
        const Vec<A> v = read_part(x + i, part);
        return residual ? rounded<T>(v + read_part(residual + i, part)) : v;
    };
    const A squares = sum_over<A>(C, [&](int64_t i, auto part) {
        const Vec<A> v = element(i, part);
        if (sum) write_part(sum + i, v, part);
        return v * v;
    });
    const A r = 1 / square_root(squares / static_cast<A>(C) + static_cast<A>(eps));
    for_each_part<A>(C, [&](int64_t i, auto part) {
        const Vec<A> v = sum ? read_part(sum + i, part) : element(i, part);
        write_part(y + i, v * r, part);
    });
    return r;
}

template <class T>
NANOCHAT_INLINE void backward_row(int64_t C, const T* dy, const T* y, Compute<T> r, const T* dsum, T* dx) {
    using A = Compute<T>;
    const A mean =
        sum_over<A>(C, [&](int64_t i, auto part) { return read_part(dy + i, part) * read_part(y + i, part); }) /
        static_cast<A>(C);
    for_each_part<A>(C, [&](int64_t i, auto part) {
        const Vec<A> through_norm = (read_part(dy + i, part) - read_part(y + i, part) * mean) * r;
        write_part(dx + i, dsum ? read_part(dsum + i, part) + through_norm : through_norm, part);
    });
}

// Writes row[i] as T to y[i].
template <class T, class Row>
NANOCHAT_INLINE void convert_row(int64_t C, const Row* row, T* y) {
    if constexpr (std::is_same_v<Compute<T>, float> && std::is_same_v<Compute<Row>, float>)
        for_each_part<float>(C, [&](int64_t i, auto part) { write_part(y + i, read_part(row + i, part), part); });
    else
        for (int64_t i = 0; i < C; i++) write(y + i, read(row + i));
}

template <class T>
void rms_norm_typed(const RMSNorm& a) {
    const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
    T *sum = static_cast<T*>(a.sum), *y = static_cast<T*>(a.y);
    Compute<T>* r = static_cast<Compute<T>*>(a.r);
    const int64_t C = a.C;
    for_each_row(a.N, C, a.execution.threads, [&](int64_t n) {
        const int64_t at = n * C;
        if (residual)
            r[n] = normalise_row<T>(C, a.eps, x + at, residual + at, sum ? sum + at : nullptr, y + at);
        else
            r[n] = normalise_row<T>(C, a.eps, x + at, nullptr, sum ? sum + at : nullptr, y + at);
    });
}

template <class T>
void rms_norm_backward_typed(const RMSNormBackward& a) {
    const T *dy = static_cast<const T*>(a.dy), *y = static_cast<const T*>(a.y), *dsum = static_cast<const T*>(a.dsum);
    const Compute<T>* r = static_cast<const Compute<T>*>(a.r);
    T* dx = static_cast<T*>(a.dx);
    const int64_t C = a.C;
    for_each_row(a.N, C, a.execution.threads, [&](int64_t n) {
        const int64_t at = n * C;
        if (dsum)
            backward_row<T>(C, dy + at, y + at, r[n], dsum + at, dx + at);
        else
            backward_row<T>(C, dy + at, y + at, r[n], nullptr, dx + at);
    });
}

template <class T, class Row>
void embedding_typed(const EmbeddingRMSNorm& a) {
    const Row* table = static_cast<const Row*>(a.table);
    T* y = static_cast<T*>(a.y);
    Compute<T>* r = static_cast<Compute<T>*>(a.r);
    const int64_t C = a.C;
    for_each_row(a.N, C, a.execution.threads, [&](int64_t n) {
        const Row* row = table + a.tokens[n] * C;
        T* own = y + n * C;
        if constexpr (std::is_same_v<T, Row>) {
            r[n] = normalise_row<T>(C, a.eps, row, nullptr, nullptr, own);
        } else {
            convert_row(C, row, own);
            r[n] = normalise_row<T>(C, a.eps, own, nullptr, nullptr, own);
        }
    });
}

template <class T>
void embedding_of_table(const EmbeddingRMSNorm& a) {
    switch (a.table_dtype) {
        case DType::float64:
            return embedding_typed<T, double>(a);
        case DType::bfloat16:
            return embedding_typed<T, bfloat16>(a);
        default:
            return embedding_typed<T, float>(a);
    }
}

}   // namespace

void rms_norm(const RMSNorm& a) {
    switch (a.dtype) {
        case DType::float64:
            return rms_norm_typed<double>(a);
        case DType::bfloat16:
            return rms_norm_typed<bfloat16>(a);
        default:
            return rms_norm_typed<float>(a);
    }
}

void rms_norm_backward(const RMSNormBackward& a) {
    switch (a.dtype) {
        case DType::float64:
            return rms_norm_backward_typed<double>(a);
        case DType::bfloat16:
            return rms_norm_backward_typed<bfloat16>(a);
        default:
            return rms_norm_backward_typed<float>(a);
    }
}

void embedding_rms_norm(const EmbeddingRMSNorm& a) {
    switch (a.dtype) {
        case DType::float64:
            return embedding_of_table<double>(a);
        case DType::bfloat16:
            return embedding_of_table<bfloat16>(a);
        default:
            return embedding_of_table<float>(a);
    }
}

}   // namespace nanochat::NANOCHAT_ISA
