// AdamW (Loshchilov & Hutter, 2019), optionally with cautious weight decay (arXiv:2510.12402), in one pass over every
// tensor, which also writes the bfloat16 copies of float32 parameters.
#include <omp.h>

#include "elementwise.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

// 32 random bits for each of the elements i ... i + lanes: a counter through two rounds of a 32-bit finaliser (Wellons'
// lowbias32).
NANOCHAT_INLINE Vec<uint32_t> random_bits(uint64_t key, int64_t i) {
    Vec<uint32_t> x;
    for (int l = 0; l < kLanes<float>; l++) x[l] = static_cast<uint32_t>(l);
    x += static_cast<uint32_t>(i);
    const uint32_t keys[2] = {static_cast<uint32_t>(key) ^ static_cast<uint32_t>(i >> 32),
                              static_cast<uint32_t>(key >> 32)};
    for (int round = 0; round < 2; round++) {
        x ^= keys[round];
        x ^= x >> 16;
        x *= 0x7feb352du;
        x ^= x >> 15;
        x *= 0x846ca68bu;
        x ^= x >> 16;
    }
    return x;
}

NANOCHAT_INLINE uint64_t mix(uint64_t x) {   // splitmix64's finaliser
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

NANOCHAT_INLINE void store_stochastic(bfloat16* p, Vec<float> x, Vec<uint32_t> random) {
    const Vec<uint32_t> u = __builtin_bit_cast(Vec<uint32_t>, x);
    // Infinity and NaN keep their bits; a NaN keeps at least one of its mantissa.
    const Vec<uint32_t> special = u | ((u & 0x7fffffffu) > 0x7f800000u ? Vec<uint32_t>{} + 0x400000u : Vec<uint32_t>{});
    const Vec<uint32_t> rounded = (u & 0x7f800000u) == 0x7f800000u ? special : u + (random & 0xffffu);
    const HalfWords h = narrow(rounded >> 16);
    __builtin_memcpy(p, &h, sizeof h);
}

template <class P, class Moment, bool stochastic, bool cautious>
void adamw_typed(const AdamW& a) {
    const int64_t step = resolve_scalar(a.step_address, a.step);
    const double lr = resolve_scalar(a.lr_address, a.lr);
    const double weight_decay = resolve_scalar(a.weight_decay_address, a.weight_decay);
    const double correction1 = 1 - __builtin_pow(a.beta1, static_cast<double>(step));
    const double correction2 = 1 - __builtin_pow(a.beta2, static_cast<double>(step));
    const float beta1 = static_cast<float>(a.beta1), rest1 = static_cast<float>(1 - a.beta1);
    const float beta2 = static_cast<float>(a.beta2), rest2 = static_cast<float>(1 - a.beta2);
    const float decay = static_cast<float>(1 - lr * weight_decay), rate = static_cast<float>(lr / correction1);
    const float root = static_cast<float>(1 / __builtin_sqrt(correction2)), eps = static_cast<float>(a.eps);
#pragma omp parallel num_threads(a.execution.threads)
    for_each_share(
        a.count, [&](int64_t i) { return a.tensors[i].numel; },
        [&](int64_t index, int64_t begin, int64_t end) {
            const AdamWTensor& t = a.tensors[index];
            const uint64_t key =
                mix(mix(a.seed + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(step)) + static_cast<uint64_t>(index));
            // Returns the updated parameters.
            const auto update = [&](int64_t i, P* param, Moment* exp_avg, Moment* exp_avg_sq, const P* grad) {
                const Vec<float> g = load(grad);
                const Vec<float> m = load(exp_avg) * beta1 + g * rest1;
                const Vec<float> v = load(exp_avg_sq) * beta2 + g * g * rest2;
                const Vec<float> p = decayed<cautious>(load(param), decay, m) -
                                     rate * (m / (sqrt_lanes<float>(v) * root + eps));
                store(exp_avg, m);
                store(exp_avg_sq, v);
                if constexpr (stochastic)
                    store_stochastic(param, p, random_bits(key, i));
                else
                    store(param, p);
                return p;
            };
            P* const param = static_cast<P*>(t.param);
            Moment *const exp_avg = static_cast<Moment*>(t.exp_avg), *exp_avg_sq = static_cast<Moment*>(t.exp_avg_sq);
            const P* grad = static_cast<const P*>(t.grad);
            if constexpr (std::is_same_v<P, float>) {
                if (t.copy) {
                    for_each_vector<4>(
                        begin, end,
                        [&](int64_t i, P* p, Moment* m, Moment* v, bfloat16* copy, const P* g) {
                            store(copy, update(i, p, m, v, g));
                        },
                        std::make_index_sequence<5>(), param, exp_avg, exp_avg_sq, static_cast<bfloat16*>(t.copy),
                        grad);
                    return;
                }
            }
            for_each_vector<3>(begin, end, update, std::make_index_sequence<4>(), param, exp_avg, exp_avg_sq, grad);
        });
}

template <class P, class Moment, bool stochastic>
void adamw_moments(const AdamW& a) {
    a.cautious ? adamw_typed<P, Moment, stochastic, true>(a) : adamw_typed<P, Moment, stochastic, false>(a);
}

}   // namespace

void adamw(const AdamW& a) {
    if (a.param_dtype != DType::bfloat16) return adamw_moments<float, float, false>(a);
    if (a.moment_dtype == DType::bfloat16)
        return a.stochastic_rounding ? adamw_moments<bfloat16, bfloat16, true>(a)
                                     : adamw_moments<bfloat16, bfloat16, false>(a);
    a.stochastic_rounding ? adamw_moments<bfloat16, float, true>(a) : adamw_moments<bfloat16, float, false>(a);
}

}   // namespace nanochat::NANOCHAT_ISA
