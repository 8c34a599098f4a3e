// The memory-bound halves of the optimizers: AdamW (Loshchilov & Hutter, 2019) and Muon's momentum and update. One pass
// over every tensor; each thread takes an equal run of the list's elements, cut at multiples of kGrain so that every
// element meets the same vector arithmetic whatever the number of threads.
#include <omp.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "../kernels.h"
#include "runtime.h"
#include "simd.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

constexpr int64_t kGrain = 1024;

// Calls visit(tensor, begin, end) for this thread's share of `count` tensors; size(tensor) is a tensor's number of
// elements.
template <class Size, class Visit>
NANOCHAT_INLINE void share(int64_t count, int threads, int thread, const Size& size, const Visit& visit) {
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

// Runs step(i, pointers) over whole vectors; the last, partial one through padded copies, of which the first `written`
// are copied back.
template <int written, class Step, size_t... I, class... Types>
NANOCHAT_INLINE void over_vectors(int64_t begin, int64_t end, const Step& step, std::index_sequence<I...>,
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
    const HalfWords h = __builtin_convertvector(rounded >> 16, HalfWords);
    __builtin_memcpy(p, &h, sizeof h);
}

// `number`, unless an address replaces it.
template <class T>
NANOCHAT_INLINE T at_address(const T* address, T number) {
    return address ? *address : number;
}

// Where the sign of the update is the parameter's, or either is 0. A NaN does not decay.
template <bool cautious>
NANOCHAT_INLINE Vec<float> decayed(Vec<float> p, float decay, Vec<float> update) {
    if constexpr (cautious)
        return update * p >= 0.0f ? p * decay : p;
    else
        return p * decay;
}

template <class P, class Moment, bool stochastic, bool cautious>
void adamw_typed(const AdamW& a) {
    const int64_t step = at_address(a.step_address, a.step);
    const double lr = at_address(a.lr_address, a.lr);
    const double weight_decay = at_address(a.weight_decay_address, a.weight_decay);
    const double correction1 = 1 - __builtin_pow(a.beta1, static_cast<double>(step));
    const double correction2 = 1 - __builtin_pow(a.beta2, static_cast<double>(step));
    const float beta1 = static_cast<float>(a.beta1), rest1 = static_cast<float>(1 - a.beta1);
    const float beta2 = static_cast<float>(a.beta2), rest2 = static_cast<float>(1 - a.beta2);
    const float decay = static_cast<float>(1 - lr * weight_decay), rate = static_cast<float>(lr / correction1);
    const float root = static_cast<float>(1 / __builtin_sqrt(correction2)), eps = static_cast<float>(a.eps);
#pragma omp parallel num_threads(a.execution.threads)
    share(
        a.count, a.execution.threads, omp_get_thread_num(), [&](int64_t i) { return a.tensors[i].numel; },
        [&](int64_t index, int64_t begin, int64_t end) {
            const AdamWTensor& t = a.tensors[index];
            const uint64_t key =
                mix(mix(a.seed + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(step)) + static_cast<uint64_t>(index));
            over_vectors<3>(
                begin, end,
                [&](int64_t i, P* param, Moment* exp_avg, Moment* exp_avg_sq, const P* grad) {
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
                },
                std::make_index_sequence<4>(), static_cast<P*>(t.param), static_cast<Moment*>(t.exp_avg),
                static_cast<Moment*>(t.exp_avg_sq), static_cast<const P*>(t.grad));
        });
}

template <class P, class Moment, bool stochastic>
void adamw_moments(const AdamW& a) {
    a.cautious ? adamw_typed<P, Moment, stochastic, true>(a) : adamw_typed<P, Moment, stochastic, false>(a);
}

// Adds the squares of x in double: squares of the smallest floats would vanish in float.
NANOCHAT_INLINE void add_squares(Vec<double>& sums, Vec<float> x) {
    typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
    Half halves[2];
    __builtin_memcpy(halves, &x, sizeof x);
    for (const Half& half : halves) {
        const Vec<double> wide = __builtin_convertvector(half, Vec<double>);
        sums += wide * wide;
    }
}

template <class G, bool with_norms>
void momentum_typed(const MuonMomentum& a) {
    const double momentum = at_address(a.momentum_address, a.momentum);
    const float rest = static_cast<float>(1 - momentum), keep = static_cast<float>(momentum);
    const int64_t grains = ceil_div(a.numel, kGrain);   // of each tensor
    double* squares = nullptr;                          // (count, grains), the sum over each grain of the update
    if constexpr (with_norms) {
        cpu::Arena arena{static_cast<char*>(cpu::workspace(static_cast<size_t>(a.count * grains) * sizeof(double)))};
        squares = arena.take<double>(a.count * grains);
    }
#pragma omp parallel num_threads(a.execution.threads)
    share(
        a.count, a.execution.threads, omp_get_thread_num(), [&](int64_t) { return a.numel; },
        [&](int64_t index, int64_t begin, int64_t end) {
            const int64_t width = with_norms ? kGrain : end - begin;
            for (int64_t from = begin; from < end; from += width) {
                Vec<double> sums = {};
                over_vectors<2>(
                    from, minimum(from + width, end),
                    [&](int64_t, float* buffer, float* update, const G* grad) {
                        const Vec<float> g = load(grad);
                        const Vec<float> b = load(buffer) * keep + g * rest;
                        const Vec<float> u = a.nesterov ? b * keep + g * rest : b;
                        store(buffer, b);
                        store(update, u);
                        if constexpr (with_norms) add_squares(sums, u);
                    },
                    std::make_index_sequence<3>(), a.momentum_buffers[index], a.update + index * a.numel,
                    static_cast<const G*>(a.grads[index]));
                if constexpr (with_norms) squares[index * grains + from / kGrain] = sum_lanes<double>(sums);
            }
        });
    if constexpr (with_norms) {
        for (int64_t index = 0; index < a.count; index++) {
            double sum = 0;
            for (int64_t grain = 0; grain < grains; grain++) sum += squares[index * grains + grain];
            a.norms[index] = __builtin_sqrt(sum);
        }
    }
}

template <class G>
void momentum_norms(const MuonMomentum& a) {
    a.norms ? momentum_typed<G, true>(a) : momentum_typed<G, false>(a);
}

template <class P, bool cautious>
void update_typed(const MuonUpdate& a) {
    const double lr = at_address(a.lr_address, a.lr);
    const double weight_decay = at_address(a.weight_decay_address, a.weight_decay);
    const float decay = static_cast<float>(1 - lr * weight_decay), rate = static_cast<float>(lr * a.scale);
#pragma omp parallel num_threads(a.execution.threads)
    share(
        a.count, a.execution.threads, omp_get_thread_num(), [&](int64_t) { return a.numel; },
        [&](int64_t index, int64_t begin, int64_t end) {
            over_vectors<1>(
                begin, end,
                [&](int64_t, P* param, const float* update) {
                    const Vec<float> change = load(update);
                    store(param, decayed<cautious>(load(param), decay, change) - change * rate);
                },
                std::make_index_sequence<2>(), static_cast<P*>(a.params[index]), a.update + index * a.numel);
        });
}

template <class P>
void update_cautious(const MuonUpdate& a) {
    a.cautious ? update_typed<P, true>(a) : update_typed<P, false>(a);
}

}   // namespace

void adamw(const AdamW& a) {
    if (a.param_dtype != DType::bfloat16) return adamw_moments<float, float, false>(a);
    if (a.moment_dtype == DType::bfloat16)
        return a.stochastic_rounding ? adamw_moments<bfloat16, bfloat16, true>(a)
                                     : adamw_moments<bfloat16, bfloat16, false>(a);
    a.stochastic_rounding ? adamw_moments<bfloat16, float, true>(a) : adamw_moments<bfloat16, float, false>(a);
}

void muon_momentum(const MuonMomentum& a) {
    a.grad_dtype == DType::bfloat16 ? momentum_norms<bfloat16>(a) : momentum_norms<float>(a);
}

void muon_update(const MuonUpdate& a) {
    a.param_dtype == DType::bfloat16 ? update_cautious<bfloat16>(a) : update_cautious<float>(a);
}

}   // namespace nanochat::NANOCHAT_ISA
