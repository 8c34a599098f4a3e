// The memory-bound parts of Muon before and after Newton-Schulz: momentum and update, optionally with cautious weight
// decay (arXiv:2510.12402). One pass over every tensor each. The update also writes the bfloat16 copies of float32
// parameters.
#include <omp.h>

#include "elementwise.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

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
    const double momentum = resolve_scalar(a.momentum_address, a.momentum);
    const float rest = static_cast<float>(1 - momentum), keep = static_cast<float>(momentum);
    const int64_t grains = ceil_div(a.numel, kGrain);   // of each tensor
    double* squares = nullptr;                          // (count, grains), the sum over each grain of the update
    if constexpr (with_norms) {
        cpu::Arena arena{static_cast<char*>(cpu::workspace(static_cast<size_t>(a.count * grains) * sizeof(double)))};
        squares = arena.take<double>(a.count * grains);
    }
#pragma omp parallel num_threads(a.execution.threads)
    for_each_share(
        a.count, [&](int64_t) { return a.numel; },
        [&](int64_t index, int64_t begin, int64_t end) {
            const int64_t width = with_norms ? kGrain : end - begin;
            for (int64_t from = begin; from < end; from += width) {
                Vec<double> sums = {};
                for_each_vector<2>(
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
    const double lr = resolve_scalar(a.lr_address, a.lr);
    const double weight_decay = resolve_scalar(a.weight_decay_address, a.weight_decay);
    const float decay = static_cast<float>(1 - lr * weight_decay), rate = static_cast<float>(lr * a.scale);
#pragma omp parallel num_threads(a.execution.threads)
    for_each_share(
        a.count, [&](int64_t) { return a.numel; },
        [&](int64_t index, int64_t begin, int64_t end) {
            // Returns the updated parameters.
            const auto step = [&](int64_t, P* param, const float* update) {
                const Vec<float> change = load(update);
                const Vec<float> p = decayed<cautious>(load(param), decay, change) - change * rate;
                store(param, p);
                return p;
            };
            P* const param = static_cast<P*>(a.params[index]);
            const float* update = a.update + index * a.numel;
            if constexpr (std::is_same_v<P, float>) {
                if (a.copies) {
                    for_each_vector<2>(
                        begin, end,
                        [&](int64_t i, P* p, bfloat16* copy, const float* u) { store(copy, step(i, p, u)); },
                        std::make_index_sequence<3>(), param, static_cast<bfloat16*>(a.copies[index]), update);
                    return;
                }
            }
            for_each_vector<1>(begin, end, step, std::make_index_sequence<2>(), param, update);
        });
}

template <class P>
void update_cautious(const MuonUpdate& a) {
    a.cautious ? update_typed<P, true>(a) : update_typed<P, false>(a);
}

}   // namespace

void muon_momentum(const MuonMomentum& a) {
    a.grad_dtype == DType::bfloat16 ? momentum_norms<bfloat16>(a) : momentum_norms<float>(a);
}

void muon_update(const MuonUpdate& a) {
    a.param_dtype == DType::bfloat16 ? update_cautious<bfloat16>(a) : update_cautious<float>(a);
}

}   // namespace nanochat::NANOCHAT_ISA
