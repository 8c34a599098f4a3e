// The memory-bound parts of Muon before and after Newton-Schulz: momentum and update, optionally with cautious weight
// decay (arXiv:2510.12402). One pass over every tensor each. The update also writes the bfloat16 copies of float32
// parameters. NorMuon's update reads the orthogonalised matrices once more, for the sums of their squares: its
// renormalisation and its division by the second momentum are one factor for each row or column.
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

// The momentum of a vector of elements: returns the update.
struct Momentum {
    float keep, rest;
    bool nesterov;

    explicit Momentum(const MuonMomentum& a) : nesterov(a.nesterov) {
        const double momentum = resolve_scalar(a.momentum_address, a.momentum);
        keep = static_cast<float>(momentum);
        rest = static_cast<float>(1 - momentum);
    }
    template <class G>
    NANOCHAT_INLINE Vec<float> operator()(float* buffer, float* update, const G* grad) const {
        const Vec<float> g = load(grad);
        const Vec<float> b = load(buffer) * keep + g * rest;
        const Vec<float> u = nesterov ? b * keep + g * rest : b;
        store(buffer, b);
        store(update, u);
        return u;
    }
};

template <class G, bool with_norms>
void momentum_typed(const MuonMomentum& a) {
    const Momentum step(a);
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
                        const Vec<float> u = step(buffer, update, grad);
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
void momentum_of_rows(const MuonMomentum& a) {
    const Momentum step(a);
    const int64_t rows = a.columns > 0 ? a.numel / a.columns : 0;   // of each tensor
#pragma omp parallel for num_threads(a.execution.threads)
    for (int64_t item = 0; item < a.count * rows; item++) {
        const int64_t index = item / rows, begin = item % rows * a.columns;
        Vec<double> sums = {};
        for_each_vector<2>(
            begin, begin + a.columns,
            [&](int64_t, float* buffer, float* update, const G* grad) {
                add_squares(sums, step(buffer, update, grad));
            },
            std::make_index_sequence<3>(), a.momentum_buffers[index], a.update + index * a.numel,
            static_cast<const G*>(a.grads[index]));
        a.row_norms[item] = __builtin_sqrt(sum_lanes<double>(sums));
    }
}

template <class G>
void momentum_norms(const MuonMomentum& a) {
    if (a.row_norms) return momentum_of_rows<G>(a);
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

// --- NorMuon ---

constexpr int64_t kBlockRows = 32;   // of a matrix, that one thread reads at a time
constexpr int64_t kRowsAtOnce = 4;   // whose squares are added before the sums of the columns are written

// Writes the sum of the squares of each row.
NANOCHAT_INLINE void sum_rows(const float* x, int64_t rows, int64_t K, double* sums) {
    for (int64_t row = 0; row < rows; row++) {
        Vec<double> sum = {};
        for_each_vector<0>(
            row * K, (row + 1) * K, [&](int64_t, const float* from) { add_squares(sum, load(from)); },
            std::make_index_sequence<1>(), x);
        sums[row] = sum_lanes<double>(sum);
    }
}

// Writes the sum of the squares of each column.
NANOCHAT_INLINE void sum_columns(const float* x, int64_t rows, int64_t K, double* sums) {
    typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
    constexpr int64_t W = kLanes<double>;
    for (int64_t j = 0; j < K; j++) sums[j] = 0;
    for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
        const int64_t end = minimum(row + kRowsAtOnce, rows);
        int64_t j = 0;
        for (; j + W <= K; j += W) {
            Vec<double> sum = load(sums + j);
            for (int64_t i = row; i < end; i++) {
                Half narrow;
                __builtin_memcpy(&narrow, x + i * K + j, sizeof narrow);
                const Vec<double> wide = __builtin_convertvector(narrow, Vec<double>);
                sum += wide * wide;
            }
            store(sums + j, sum);
        }
        for (; j < K; j++)
            for (int64_t i = row; i < end; i++) sums[j] += static_cast<double>(x[i * K + j]) * x[i * K + j];
    }
}

// Updates the second momentum of a matrix whose lines have the sums of squares `sums`, and returns the factor of each
// line of the orthogonalised matrix in `factors`.
NANOCHAT_INLINE void reduce_variance(const NorMuonUpdate& a, const double* sums, float* second, float* factors) {
    const int64_t lines = maximum(a.M, a.K), length = minimum(a.M, a.K);
    double total = 0;
    for (int64_t i = 0; i < lines; i++) total += sums[i];
    double norm = __builtin_sqrt(total), alpha = 1;
    if (a.renormalise) {
        alpha = __builtin_sqrt(static_cast<double>(length)) / (norm < a.norm_eps ? a.norm_eps : norm);
        if (norm == 0) alpha = 0;   // also where norm_eps is 0
        norm *= alpha;
    }
    const double rest = 1 - a.beta2;
    double after = 0;
    for (int64_t i = 0; i < lines; i++) {
        const double square = alpha * alpha * sums[i];
        second[i] = static_cast<float>(second[i] + rest * (square / static_cast<double>(length) - second[i]));
        after += square / (second[i] < a.eps ? a.eps : second[i]);
    }
    const double rescale = norm == 0 ? 0 : alpha * norm / __builtin_sqrt(after);
    for (int64_t i = 0; i < lines; i++)
        factors[i] = static_cast<float>(rescale / __builtin_sqrt(second[i] < a.eps ? a.eps : second[i]));
}

template <class P, bool cautious>
void normuon_typed(const NorMuonUpdate& a) {
    const double lr = resolve_scalar(a.lr_address, a.lr);
    const double weight_decay = resolve_scalar(a.weight_decay_address, a.weight_decay);
    const float decay = static_cast<float>(1 - lr * weight_decay), rate = static_cast<float>(lr * a.scale);
    const bool tall = a.M >= a.K;
    const int64_t lines = maximum(a.M, a.K), blocks = ceil_div(a.M, kBlockRows);
    double *partial, *sums;
    float* factors;
    const auto carve_workspace = [&](cpu::Arena arena) {
        partial = arena.take<double>(tall ? 0 : a.count * blocks * lines);
        sums = arena.take<double>(a.count * lines);
        factors = arena.take<float>(a.count * lines);
        return arena.used;
    };
    carve_workspace({static_cast<char*>(cpu::workspace(carve_workspace({})))});
#pragma omp parallel num_threads(a.execution.threads)
    {
#pragma omp for
        for (int64_t item = 0; item < a.count * blocks; item++) {
            const int64_t index = item / blocks, row = item % blocks * kBlockRows,
                          rows = minimum(kBlockRows, a.M - row);
            const float* x = a.update + index * a.numel + row * a.K;
            tall ? sum_rows(x, rows, a.K, sums + index * lines + row)
                 : sum_columns(x, rows, a.K, partial + item * lines);
        }
#pragma omp for
        for (int64_t index = 0; index < a.count; index++) {
            if (!tall) {
                for (int64_t j = 0; j < lines; j++) sums[index * lines + j] = partial[index * blocks * lines + j];
                for (int64_t block = 1; block < blocks; block++)
                    for (int64_t j = 0; j < lines; j++)
                        sums[index * lines + j] += partial[(index * blocks + block) * lines + j];
            }
            reduce_variance(a, sums + index * lines, a.second_momentums[index], factors + index * lines);
        }
#pragma omp for
        for (int64_t item = 0; item < a.count * a.M; item++) {
            const int64_t index = item / a.M, row = item % a.M;
            P* const param = static_cast<P*>(a.params[index]) + row * a.K;
            const float *update = a.update + item * a.K, *factor = factors + index * lines;
            const Vec<float> row_factor = broadcast(tall ? factor[row] : 0.0f);
            // Returns the updated parameters.
            const auto step = [&](P* p, const float* from, const float* column_factor) {
                const Vec<float> change = load(from) * (tall ? row_factor : load(column_factor));
                const Vec<float> updated = decayed<cautious>(load(p), decay, change) - change * rate;
                store(p, updated);
                return updated;
            };
            // A tall matrix has a factor for each of at least K rows, so that K of them can be read.
            if constexpr (std::is_same_v<P, float>) {
                if (a.copies) {
                    for_each_vector<2>(
                        0, a.K,
                        [&](int64_t, P* p, bfloat16* copy, const float* u, const float* f) {
                            store(copy, step(p, u, f));
                        },
                        std::make_index_sequence<4>(), param, static_cast<bfloat16*>(a.copies[index]) + row * a.K,
                        update, factor);
                    continue;
                }
            }
            for_each_vector<1>(
                0, a.K, [&](int64_t, P* p, const float* u, const float* f) { step(p, u, f); },
                std::make_index_sequence<3>(), param, update, factor);
        }
    }
}

template <class P>
void normuon_cautious(const NorMuonUpdate& a) {
    a.cautious ? normuon_typed<P, true>(a) : normuon_typed<P, false>(a);
}

}   // namespace

void muon_momentum(const MuonMomentum& a) {
    a.grad_dtype == DType::bfloat16 ? momentum_norms<bfloat16>(a) : momentum_norms<float>(a);
}

void muon_update(const MuonUpdate& a) {
    a.param_dtype == DType::bfloat16 ? update_cautious<bfloat16>(a) : update_cautious<float>(a);
}

void normuon_update(const NorMuonUpdate& a) {
    a.param_dtype == DType::bfloat16 ? normuon_cautious<bfloat16>(a) : normuon_cautious<float>(a);
}

}   // namespace nanochat::NANOCHAT_ISA
