// The residual sum, mixed with another stream by two learned factors, and the norm of the mix; and the gradient, which
// includes that of the factors. Each row gives a term of the factors' gradients, and the terms are added in the order of
// the rows.
#include <cstring>

#include "../kernels.h"
#include "rows.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

// Writes z = x + residual unless `residual` is null, mixed = x_scale z + x0_scale x0, and y = mixed r. Returns r.
template <class T, class A = Compute<T>>
NANOCHAT_INLINE A mix_row(int64_t C, double eps, const T* x, const T* residual, const T* x0, A x_scale, A x0_scale,
                          T* z, T* mixed, T* y) {
    const A squares = sum_over<A>(C, [&](int64_t i, auto part) {
        Vec<A> v = read_part(x + i, part);
        if (residual) {
            v = rounded<T>(v + read_part(residual + i, part));
            write_part(z + i, v, part);
        }
        const Vec<A> mix = rounded<T>(v * x_scale + read_part(x0 + i, part) * x0_scale);
        write_part(mixed + i, mix, part);
        return mix * mix;
    });
    const A r = 1 / square_root(squares / static_cast<A>(C) + static_cast<A>(eps));
    for_each_part<A>(C, [&](int64_t i, auto part) { write_part(y + i, read_part(mixed + i, part) * r, part); });
    return r;
}

// A row of each tensor of the backward pass.
template <class T>
struct BackwardRow {
    const T *dy, *dz, *dmixed, *add_to, *y, *z, *x0;
    T *dx, *dx0;
};

template <class A>
struct Factors {
    A x, x0;
};

// Writes dx and dx0, and returns the row's terms of the gradients of the factors.
template <class T, class A = Compute<T>>
NANOCHAT_INLINE Factors<A> backward_row(int64_t C, const BackwardRow<T>& row, A r, Factors<A> scale) {
    const A mean =
        sum_over<A>(C, [&](int64_t i, auto part) { return read_part(row.dy + i, part) * read_part(row.y + i, part); }) /
        static_cast<A>(C);
    Vec<A> with_z = {}, with_x0 = {};
    for_each_part<A>(C, [&](int64_t i, auto part) {
        const Vec<A> through_norm = (read_part(row.dy + i, part) - read_part(row.y + i, part) * mean) * r;
        const Vec<A> ds = read_part(row.dmixed + i, part) + through_norm;
        with_z += ds * read_part(row.z + i, part);
        with_x0 += ds * read_part(row.x0 + i, part);
        write_part(row.dx + i, read_part(row.dz + i, part) + ds * scale.x, part);
        write_part(row.dx0 + i, read_part(row.add_to + i, part) + ds * scale.x0, part);
    });
    return {sum_lanes<A>(with_z), sum_lanes<A>(with_x0)};
}

template <class T>
void mix_rms_norm_typed(const MixRMSNorm& a) {
    using A = Compute<T>;
    const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
    const T* x0 = static_cast<const T*>(a.x0);
    const A x_scale = *static_cast<const A*>(a.x_scale), x0_scale = *static_cast<const A*>(a.x0_scale);
    T *z = static_cast<T*>(a.z), *mixed = static_cast<T*>(a.mixed), *y = static_cast<T*>(a.y);
    A* r = static_cast<A*>(a.r);
    const int64_t C = a.C;
    for_each_row(a.N, C, a.execution.threads, [&](int64_t n) {
        const int64_t at = n * C;
        if (residual)
            r[n] = mix_row<T>(C, a.eps, x + at, residual + at, x0 + at, x_scale, x0_scale, z + at, mixed + at, y + at);
        else
            r[n] = mix_row<T>(C, a.eps, x + at, nullptr, x0 + at, x_scale, x0_scale, nullptr, mixed + at, y + at);
    });
}

template <class T>
void mix_rms_norm_backward_typed(const MixRMSNormBackward& a) {
    using A = Compute<T>;
    const Factors<A> scale = {*static_cast<const A*>(a.x_scale), *static_cast<const A*>(a.x0_scale)};
    const A* r = static_cast<const A*>(a.r);
    const int64_t C = a.C;
    Factors<A>* terms = nullptr;
    T* zeros = nullptr;   // a row in place of those of a tensor that is null; it stays in the cache
    const auto carve_workspace = [&](cpu::Arena arena) {
        terms = arena.take<Factors<A>>(a.N);
        zeros = arena.take<T>(C);
        return arena.used;
    };
    carve_workspace({static_cast<char*>(cpu::workspace(carve_workspace({})))});
    memset(zeros, 0, static_cast<size_t>(C) * sizeof(T));
    for_each_row(a.N, C, a.execution.threads, [&](int64_t n) {
        const auto own = [&](const void* tensor) { return tensor ? static_cast<const T*>(tensor) + n * C : zeros; };
        const BackwardRow<T> row = {own(a.dy),
                                    own(a.dz),
                                    own(a.dmixed),
                                    own(a.add_to),
                                    own(a.y),
                                    own(a.z),
                                    own(a.x0),
                                    static_cast<T*>(a.dx) + n * C,
                                    static_cast<T*>(a.dx0) + n * C};
        terms[n] = backward_row<T>(C, row, r[n], scale);
    });
    double x = 0, x0 = 0;
    for (int64_t n = 0; n < a.N; n++) {
        x += terms[n].x;
        x0 += terms[n].x0;
    }
    *static_cast<A*>(a.dx_scale) = static_cast<A>(x);
    *static_cast<A*>(a.dx0_scale) = static_cast<A>(x0);
}

}   // namespace

void mix_rms_norm(const MixRMSNorm& a) {
    switch (a.dtype) {
        case DType::float64:
            return mix_rms_norm_typed<double>(a);
        case DType::bfloat16:
            return mix_rms_norm_typed<bfloat16>(a);
        default:
            return mix_rms_norm_typed<float>(a);
    }
}

void mix_rms_norm_backward(const MixRMSNormBackward& a) {
    switch (a.dtype) {
        case DType::float64:
            return mix_rms_norm_backward_typed<double>(a);
        case DType::bfloat16:
            return mix_rms_norm_backward_typed<bfloat16>(a);
        default:
            return mix_rms_norm_backward_typed<float>(a);
    }
}

}   // namespace nanochat::NANOCHAT_ISA
