// Rotary positions (Su et al., arXiv:2104.09864) and then RMSNorm of each head of q and k, and the gradient: QK-norm
// (Henry et al., arXiv:2010.04245) without weights. A head is read from memory once. Threads share the tokens, so the
// results do not depend on their number.
#include <cstring>

#include "../kernels.h"
#include "elementwise.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

constexpr int64_t kLargestHalf = 128;   // of a head
// Rotates a head x by a row of the tables, writes scale z r and returns r.
template <class T, class S = Compute<T>>
S normalize_head(int64_t half, const T* x, const S* cos, const S* sin, S eps, S scale, T* out) {
    alignas(64) S z[2][kLargestHalf];
    Vec<S> squares[2] = {};
    for_each_part<S>(half, [&](int64_t i, auto part) {
        const Vec<S> x1 = read_part(x + i, part), x2 = read_part(x + half + i, part);
        const Vec<S> c = read_part(cos + i, part), s = read_part(sin + i, part);
        const Vec<S> z1 = x1 * c + x2 * s, z2 = x2 * c - x1 * s;
        store(z[0] + i, z1);
        store(z[1] + i, z2);
        squares[0] += z1 * z1;
        squares[1] += z2 * z2;
    });
    const S mean = sum_lanes<S>(squares[0] + squares[1]) / static_cast<S>(2 * half);
    const S r = 1 / square_root(mean + eps);
    for_each_part<S>(half, [&](int64_t i, auto part) {
        write_part(out + i, load(z[0] + i) * (scale * r), part);
        write_part(out + half + i, load(z[1] + i) * (scale * r), part);
    });
    return r;
}

// dx, the inverse rotation of dz = scale r (dout - n mean(dout n)), where n = out / scale.
template <class T, class S = Compute<T>>
void normalize_head_backward(int64_t half, const T* dout, const T* out, S r, const S* cos, const S* sin, S scale,
                             T* dx) {
    Vec<S> products[2] = {};
    for_each_part<S>(half, [&](int64_t i, auto part) {
        products[0] += read_part(dout + i, part) * read_part(out + i, part);
        products[1] += read_part(dout + half + i, part) * read_part(out + half + i, part);
    });
    const S mean = sum_lanes<S>(products[0] + products[1]) / static_cast<S>(2 * half);
    const S projection = mean / (scale * scale), factor = scale * r;
    for_each_part<S>(half, [&](int64_t i, auto part) {
        const Vec<S> dz1 = (read_part(dout + i, part) - read_part(out + i, part) * projection) * factor;
        const Vec<S> dz2 = (read_part(dout + half + i, part) - read_part(out + half + i, part) * projection) * factor;
        const Vec<S> c = read_part(cos + i, part), s = read_part(sin + i, part);
        write_part(dx + i, dz1 * c - dz2 * s, part);
        write_part(dx + half + i, dz2 * c + dz1 * s, part);
    });
}

// Calls visit(b, t, token) for each token; threads share them.
template <class Arguments, class Visit>
void for_each_token(const Arguments& a, const Visit& visit) {
    const int64_t tokens = a.B * a.T;
    const int64_t useful = maximum<int64_t>(1, tokens * (a.H + a.Hkv) * a.D / kLeastPerThread);
    const int threads = static_cast<int>(minimum<int64_t>(a.execution.threads, useful));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t token = 0; token < tokens; token++) visit(token / a.T, token % a.T, token);
}

template <class T>
void rotary_norm_typed(const RotaryNorm& a) {
    using S = Compute<T>;
    const S eps = static_cast<S>(a.eps), scale = static_cast<S>(a.scale);
    for_each_token(a, [&](int64_t b, int64_t t, int64_t token) {
        const S* cos = static_cast<const S*>(a.cos) + t * a.cos_stride;
        const S* sin = static_cast<const S*>(a.sin) + t * a.sin_stride;
        const auto normalize = [&](int64_t heads, const void* x_, const Strides& strides, void* out_, void* r_) {
            const T* x = static_cast<const T*>(x_) + b * strides.b + t * strides.t;
            T* out = static_cast<T*>(out_) + token * heads * a.D;
            S* r = static_cast<S*>(r_) + token * heads;
            for (int64_t h = 0; h < heads; h++)
                r[h] = normalize_head(a.D / 2, x + h * strides.h, cos, sin, eps, scale, out + h * a.D);
        };
        normalize(a.H, a.q, a.q_strides, a.q_out, a.q_r);
        normalize(a.Hkv, a.k, a.k_strides, a.k_out, a.k_r);
    });
}

template <class T>
void rotary_norm_backward_typed(const RotaryNormBackward& a) {
    using S = Compute<T>;
    const S scale = static_cast<S>(a.scale);
    for_each_token(a, [&](int64_t b, int64_t t, int64_t token) {
        const S* cos = static_cast<const S*>(a.cos) + t * a.cos_stride;
        const S* sin = static_cast<const S*>(a.sin) + t * a.sin_stride;
        const auto normalize = [&](int64_t heads, const void* dout_, const Strides& strides, const void* out_,
                                   const void* r_, void* dx_) {
            const T* dout = static_cast<const T*>(dout_) + b * strides.b + t * strides.t;
            const T* out = static_cast<const T*>(out_) + token * heads * a.D;
            const S* r = static_cast<const S*>(r_) + token * heads;
            T* dx = static_cast<T*>(dx_) + token * heads * a.D;
            for (int64_t h = 0; h < heads; h++)
                normalize_head_backward(a.D / 2, dout + h * strides.h, out + h * a.D, r[h], cos, sin, scale,
                                        dx + h * a.D);
        };
        normalize(a.H, a.dq_out, a.dq_out_strides, a.q_out, a.q_r, a.dq);
        normalize(a.Hkv, a.dk_out, a.dk_out_strides, a.k_out, a.k_r, a.dk);
    });
}

}   // namespace

void rotary_norm(const RotaryNorm& a) {
    if (a.dtype == DType::float64) return rotary_norm_typed<double>(a);
    a.dtype == DType::bfloat16 ? rotary_norm_typed<bfloat16>(a) : rotary_norm_typed<float>(a);
}

void rotary_norm_backward(const RotaryNormBackward& a) {
    if (a.dtype == DType::float64) return rotary_norm_backward_typed<double>(a);
    a.dtype == DType::bfloat16 ? rotary_norm_backward_typed<bfloat16>(a) : rotary_norm_backward_typed<float>(a);
}

}   // namespace nanochat::NANOCHAT_ISA
