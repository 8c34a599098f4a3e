// The host side of Newton-Schulz: the products in their order, the form, the 16-bit type, and the workspace.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "newton_schulz.cuh"

namespace nanochat::cuda::newton_schulz_kernels {

constexpr int kThreads = 256;
constexpr int kElements = 8;     // per thread: 16 bytes of X
constexpr int kMostParts = 64;   // blocks of threads per matrix

struct NormaliseArguments {
    const float* g;         // (count, rows, columns)
    const double* scales;   // (count, rows), or null:
    const double* norms;    // (count,), or null:
    double* partials;       // (count, parts) sums of squares
    double norm_factor;
    Matrices x;
};

// Both are defined beside their kernels, in newton_schulz.cu. `output`: null where D goes to scratch memory.
template <class T>
void normalise(const NormaliseArguments&, dim3 grid, void* stream);
template <class T>
void multiply(const Product&, const OutputEpilogue* output, void* stream);

// With few singular values the Gram form's error can exceed that of the plain form in bfloat16.
constexpr int64_t kLeastGram = 64;

// Returns the number of steps that are taken on each Gram matrix, in turn.
inline std::vector<int> restart_schedule(const NewtonSchulz& a, NewtonSchulzForm form) {
    // Beyond this growth, rounding loses too much. The quintic's three steps have 41, Polar Express's first three 128.
    constexpr double kMostGrowth = 150;
    std::vector<int> phases;
    for (int64_t step = 0; step < a.steps;) {
        const int most = form == NewtonSchulzForm::plain ? 1 : step == 0 ? 3 : 2;
        int length = 0;
        for (double growth = 1; length < most && step < a.steps; ++length, ++step) {
            growth *= std::abs(a.coefficients[3 * step]);
            if (length > 0 && growth > kMostGrowth) break;
        }
        phases.push_back(length);
    }
    return phases;
}

// Returns the work in tiles of kTile x kTile, times their depth. Symmetric products count the tiles of the lower half.
inline double cost_in_tiles(const NewtonSchulz& a, NewtonSchulzForm form) {
    const auto [R, L] = std::minmax(a.M, a.K);
    const auto tiles = [](int64_t size) { return static_cast<double>((size + kTile - 1) / kTile); };
    const double half = tiles(R) * (tiles(R) + 1) / 2;
    double work = 0;
    for (const int length : restart_schedule(a, form)) {
        const int products = length + 3 * (length - 1);   // Z; G twice, and P
        work += half * static_cast<double>(L + products * R) + tiles(R) * tiles(L) * static_cast<double>(R);
    }
    return work;
}

// Returns whether float16 holds all intermediate numbers, with a margin, by bounds on polynomials of singular values.
inline bool fits_float16(const NewtonSchulz& a, const std::vector<int>& phases) {
    constexpr double kMost = 8192;
    constexpr int kPoints = 256;
    double top = 1 / a.norm_factor;   // no singular value is larger
    const double* triple = a.coefficients;
    for (const int length : phases) {
        double product = 1;
        for (int i = 0; i < length; ++i, triple += 3) {
            double next = 0, factor = 0;
            for (int j = 0; j <= kPoints; ++j) {
                const double x = top * j / kPoints, squared = x * x;
                const double value = triple[0] + triple[1] * squared + triple[2] * squared * squared;
                factor = std::max({factor, std::abs(value), std::abs(value - triple[0])});
                next = std::max(next, std::abs(value) * x);
            }
            product *= factor;
            // False for NaN.
            if (!(top * top * factor * factor <= kMost && product <= kMost && next <= kMost)) return false;
            top = next;
        }
    }
    return true;
}

inline int norm_parts(const NewtonSchulz& a) {
    const int64_t items = a.M * pitch_of(a.K) / kElements, wanted = (items + 4 * kThreads - 1) / (4 * kThreads);
    return static_cast<int>(std::clamp<int64_t>(wanted, 1, kMostParts));
}

// The workspace for `count` matrices.
struct Workspace {
    Matrices x[2], square[5];
    double* partials;
    int64_t bytes = 0;

    Workspace(const NewtonSchulz& a, const std::vector<int>& phases, int64_t count, void* memory) {
        const auto take = [&](int64_t size) {
            char* const place = static_cast<char*>(memory) + bytes;
            bytes += (size + 255) / 256 * 256;   // tensor copies need multiples of 16
            return static_cast<void*>(place);
        };
        const auto matrices = [&](int64_t rows, int64_t columns, bool needed) {
            const int64_t pitch = pitch_of(columns);
            return Matrices{take(needed ? 2 * count * rows * pitch : 0), static_cast<int>(rows),
                            static_cast<int>(columns), static_cast<int>(pitch)};
        };
        const int64_t R = std::min(a.M, a.K);
        const bool gram = *std::max_element(phases.begin(), phases.end()) > 1;
        for (int i = 0; i < 2; ++i) x[i] = matrices(a.M, a.K, i == 0 || phases.size() > 1);
        for (int i = 0; i < 5; ++i) square[i] = matrices(R, R, i < 2 || gram);
        partials = static_cast<double*>(
            take(a.norms || a.scales ? 0 : count * norm_parts(a) * static_cast<int64_t>(sizeof(double))));
    }
};

template <class T>
struct Iteration {
    const NewtonSchulz& a;
    const std::vector<int>& phases;
    Workspace workspace;
    int count;

    void run(const Product& p, const OutputEpilogue* output = nullptr) const {
        const DType dtype = std::is_same_v<T, float16> ? DType::float16 : DType::bfloat16;
        a.execution.device.hopper ? hopper::multiply(p, dtype, output, a.execution)
                                  : multiply<T>(p, output, a.execution.stream);
    }

    // d = alpha a b + beta a + gamma b, for symmetric matrices whose product is symmetric.
    void symmetric_product(const Matrices& d, const Matrices& a, const Matrices& b, double alpha, double beta,
                           double gamma) const {
        run({
            .a = a,
            .b = b,
            .d = d,
            .a_major = Major::k,
            .b_major = Major::k,
            .symmetric = true,
            .s = beta != 0 ? a.data : nullptr,
            .t = gamma != 0 ? b.data : nullptr,
            .alpha = static_cast<float>(alpha),
            .beta = static_cast<float>(beta),
            .gamma = static_cast<float>(gamma),
            .count = count,
            .m = d.rows,
            .n = d.rows,
            .k = d.rows,
        });
    }

    // scales and norms: those of the first matrix, or null.
    void operator()(const float* g, const double* scales, const double* norms, OutputEpilogue& output) const {
        const Matrices *x = &workspace.x[0], *other = &workspace.x[1];
        const NormaliseArguments arguments = {
            .g = g,
            .scales = scales,
            .norms = norms,
            .partials = workspace.partials,
            .norm_factor = a.norm_factor,
            .x = *x,
        };
        const dim3 grid(static_cast<unsigned>(norm_parts(a)), static_cast<unsigned>(count));
        normalise<T>(arguments, grid, a.execution.stream);

        const bool wide = x->rows <= x->columns;
        const double* triple = a.coefficients;
        for (size_t phase = 0; phase < phases.size(); ++phase) {
            Matrices G = workspace.square[0], Z = workspace.square[1], P = workspace.square[2],
                     spare = workspace.square[3], Y = workspace.square[4];
            const Major along = wide ? Major::k : Major::mn;
            run({
                .a = *x,
                .b = *x,
                .d = G,
                .a_major = along,
                .b_major = along,
                .symmetric = true,
                .s = nullptr,
                .t = nullptr,
                .alpha = 1,
                .beta = 0,
                .gamma = 0,
                .count = count,
                .m = G.rows,
                .n = G.rows,
                .k = wide ? x->columns : x->rows,
            });
            double scale = triple[0];   // the product of the factors so far is scale I + P
            symmetric_product(phases[phase] > 1 ? P : Z, G, G, triple[2], triple[1], 0);
            const Matrices* newest = phases[phase] > 1 ? &P : &Z;
            for (int i = 1; i < phases[phase]; ++i) {
                symmetric_product(Y, G, *newest, 1, triple[0], 0);
                symmetric_product(G, *newest, Y, 1, 0, triple[0]);
                triple += 3;
                symmetric_product(Z, G, G, triple[2], triple[1], 0);
                symmetric_product(spare, P, Z, 1, triple[0], scale);
                scale *= triple[0];
                std::swap(P, spare);
                newest = &Z;
            }
            triple += 3;
            const Matrices& factor = phases[phase] > 1 ? P : Z;
            const bool last = phase + 1 == phases.size();
            const Product apply = {
                .a = wide ? factor : *x,
                .b = wide ? *x : factor,
                .d = *other,
                .a_major = Major::k,
                .b_major = wide ? Major::mn : Major::k,
                .symmetric = false,
                .s = x->data,
                .t = nullptr,
                .alpha = 1,
                .beta = static_cast<float>(scale),
                .gamma = 0,
                .count = count,
                .m = x->rows,
                .n = x->columns,
                .k = G.rows,
            };
            run(apply, last ? &output : nullptr);
            std::swap(x, other);
        }
    }
};

}   // namespace nanochat::cuda::newton_schulz_kernels
