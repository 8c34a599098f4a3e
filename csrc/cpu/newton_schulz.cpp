// Newton-Schulz orthogonalisation (Bernstein & Newhouse 2024; Jordan et al., "Muon", 2024) of a batch of matrices.
//
// Every matrix is held tall, X (L, R) with R <= L, so that X^T X is the smaller Gram matrix and every product reads its
// operands by rows. For symmetric products (X^T X and its polynomials), one half is computed and mirrored.
//
// Per triple (a, b, c) the factor of the step is F = a I + b G + c G^2 with G = X^T X, and X becomes X F. The Gram form
// runs all steps on the small side: every F is a polynomial of the first G, so they commute, G becomes F G F, their
// product Q stays symmetric, and X is multiplied once, by Q. The rounding of G is amplified by the square of the factor
// by which the steps amplify the smallest singular values (485^2 for five quintic steps). In float that would lose to
// the plain form, so the small side is held in double, and the result is more exact than the plain form's. The last
// product runs in double too, because the large part of Q cancels in it.
// Work in units of R^3, with r = L / R:  plain 5 (3 r + 1),  Gram 6 r + 34.
#include <omp.h>

#include "../kernels.h"
#include "newton_schulz16.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

constexpr int64_t kGramAspect = 4;
constexpr int64_t kNormRows = 64;

// Sum of squares in double: squares of the smallest floats would vanish in float.
template <class T>
NANOCHAT_INLINE double sum_of_squares(const T* x, int64_t count) {
    double lanes[16] = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int l = 0; l < 16; l++) lanes[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
    for (; i < count; i++) lanes[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    for (int width = 8; width > 0; width /= 2)
        for (int l = 0; l < width; l++) lanes[l] += lanes[l + width];
    return lanes[0];
}

template <class T>
struct Batch {
    int64_t count, L, R;
    const double* coefficients;
    int64_t steps;
    int threads;
    T* scratch;   // of this thread

    // c = alpha a b + beta source, whose (R, R) results are symmetric.
    template <class In>
    void symmetric(const In* a, Layout layout, int64_t depth, const In* b, T* c, T alpha, const T* source,
                   T beta) const {
        const Product<T, In, In, T> product = {
            .M = R,
            .N = R,
            .K = depth,
            .a = a,
            .a_stride = R,
            .a_layout = layout,
            .b = b,
            .b_stride = R,
            .c = c,
            .c_stride = R,
            .alpha = alpha,
            .beta = beta,
            .source = source,
            .source_stride = R,
            .lower = true,
            .batch = count,
            .a_batch = depth * R,
            .b_batch = depth * R,
            .c_batch = R * R,
            .source_batch = R * R,
        };
        multiply_team(product, threads, scratch);
    }
    // out = x (scale I + factor)
    template <class Out>
    void apply(const Out* x, const T* factor, T scale, Out* out) const {
        const Product<T, Out, T, Out> product = {
            .M = L,
            .N = R,
            .K = R,
            .a = x,
            .a_stride = R,
            .a_layout = Layout::rows,
            .b = factor,
            .b_stride = R,
            .c = out,
            .c_stride = R,
            .alpha = T(1),
            .beta = scale,
            .source = scale != 0 ? x : nullptr,
            .source_stride = R,
            .lower = false,
            .batch = count,
            .a_batch = L * R,
            .b_batch = R * R,
            .c_batch = L * R,
            .source_batch = L * R,
        };
        multiply_team(product, threads, scratch);
    }
};

// G, F: (count, R, R). The result is in x after an even number of steps, and in `other` after an odd one.
template <class T>
void plain_form(const Batch<T>& batch, T* x, T* other, T* G, T* F) {
    for (int64_t step = 0; step < batch.steps; step++) {
        const double* triple = batch.coefficients + 3 * step;
        batch.symmetric(x, Layout::columns, batch.L, x, G, T(1), nullptr, T(0));
        batch.symmetric(G, Layout::rows, batch.R, G, F, static_cast<T>(triple[2]), G, static_cast<T>(triple[1]));
        batch.apply(x, F, static_cast<T>(triple[0]), other);
        T* previous = x;
        x = other;
        other = previous;
    }
}

// square: four batches of (count, R, R).
void gram_form(const Batch<double>& batch, const float* x, double* const (&square)[4], float* out) {
    const int64_t R = batch.R;
    double *G = square[0], *F = square[1], *product = square[2], *spare = square[3];
    double scale = 0;   // the product of the factors so far is scale I + product
    batch.symmetric(x, Layout::columns, batch.L, x, G, 1.0, nullptr, 0.0);
    for (int64_t step = 0; step < batch.steps; step++) {
        const double a = batch.coefficients[3 * step], b = batch.coefficients[3 * step + 1],
                     c = batch.coefficients[3 * step + 2];
        double* factor = step == 0 ? product : F;   // this step's factor is a I + factor
        batch.symmetric(G, Layout::rows, R, G, factor, c, G, b);
        if (step == 0) {
            scale = a;
        } else {
#pragma omp for
            for (int64_t row = 0; row < batch.count * R; row++)
                for (int64_t j = row * R; j < (row + 1) * R; j++) spare[j] = scale * factor[j] + a * product[j];
            batch.symmetric(product, Layout::rows, R, factor, spare, 1.0, spare, 1.0);
            double* freed = product;
            product = spare;
            spare = freed;
            scale *= a;
        }
        if (step + 1 == batch.steps) continue;
        batch.symmetric(factor, Layout::rows, R, G, spare, 1.0, G, a);
        batch.symmetric(spare, Layout::rows, R, factor, G, 1.0, spare, a);
    }
#pragma omp for
    for (int64_t i = 0; i < batch.count * R; i++) product[i / R * R * R + i % R * (R + 1)] += scale;
    batch.apply(x, product, 0.0, out);
}

// The first pass: the sums of squares of parts of kNormRows rows, if no norms are known, and the factors of the rows.
template <class T>
struct Scaling {
    const NewtonSchulz& args;
    const int64_t parts = ceil_div(args.M, kNormRows);
    double* partial = nullptr;   // (batch, parts)

    explicit Scaling(const NewtonSchulz& args) : args(args) {}

    void carve(cpu::Arena& arena) { partial = arena.take<double>(args.norms || args.scales ? 0 : args.batch * parts); }

    // Calls visit(index, row, rows) for each part. All threads call this together; it ends with a barrier.
    template <class Visit>
    void for_each_part(const Visit& visit) const {
#pragma omp for
        for (int64_t item = 0; item < args.batch * parts; item++) {
            const int64_t row = item % parts * kNormRows;
            visit(item / parts, row, minimum(kNormRows, args.M - row));
        }
    }

    void sum_squares() const {
        if (args.norms || args.scales) return;
        const int64_t K = args.K;
        for_each_part([&](int64_t index, int64_t row, int64_t rows) {
            partial[index * parts + row / kNormRows] =
                sum_of_squares(static_cast<const T*>(args.g) + (index * args.M + row) * K, rows * K);
        });
    }

    // The factor of all rows of a matrix, if there are no scales.
    double of_matrix(int64_t index) const {
        if (args.scales) return 0;
        double norm = 0;
        if (args.norms) {
            norm = args.norms[index];
        } else {
            for (int64_t part = 0; part < parts; part++) norm += partial[index * parts + part];
            norm = __builtin_sqrt(norm);
        }
        return norm == 0 ? 0 : 1 / (args.norm_factor * norm);
    }

    double of_row(int64_t index, int64_t row, double of_matrix) const {
        return args.scales ? args.scales[index * args.M + row] : of_matrix;
    }
};

void run16(const NewtonSchulz& args) {
    Scaling<float> scaling{args};
    NewtonSchulz16 iteration{args};
    const auto carve_workspace = [&](cpu::Arena arena) {
        scaling.carve(arena);
        iteration.carve(arena);
        return arena.used;
    };
    carve_workspace({static_cast<char*>(cpu::workspace(carve_workspace({})))});
#pragma omp parallel num_threads(args.execution.threads)
    {
        const TileScope tiles;
        float* own = iteration.sums + omp_get_thread_num() * kScratch16 / 4;
        scaling.sum_squares();
        scaling.for_each_part([&](int64_t index, int64_t row, int64_t rows) {
            const double factor = scaling.of_matrix(index);
            iteration.pack_scaled(index, row, rows, [&](int64_t r) { return scaling.of_row(index, r, factor); }, own);
        });
        iteration.run(own);
    }
}

template <class T>
void run(const NewtonSchulz& args) {
    const int threads = args.execution.threads;
    const int64_t batch = args.batch, M = args.M, K = args.K;
    const bool wide = M < K;
    const int64_t L = wide ? K : M, R = wide ? M : K, size = M * K;
    const bool gram = std::is_same_v<T, float> && L >= kGramAspect * R && args.steps > 1;
    T* out = static_cast<T*>(args.out);

    Scaling<T> scaling{args};
    double *square[4], *double_scratch;
    T *spare, *second, *G, *F, *scratch;
    const auto carve_workspace = [&](cpu::Arena arena) {
        scaling.carve(arena);
        spare = arena.take<T>(batch * size);
        second = arena.take<T>(wide ? batch * size : 0);
        F = arena.take<T>(gram ? 0 : batch * R * R);
        G = arena.take<T>(gram ? 0 : batch * R * R);
        for (double*& matrices : square) matrices = arena.take<double>(gram ? batch * R * R : 0);
        double_scratch = arena.take<double>(gram ? threads * kScratch<double> : 0);
        scratch = arena.take<T>(gram ? 0 : threads * kScratch<T>);
        return arena.used;
    };
    carve_workspace({static_cast<char*>(cpu::workspace(carve_workspace({})))});
    // X alternates between two buffers; the result of a tall matrix must end in `out`.
    T* const last = wide ? second : out;
    T* const x = gram || args.steps % 2 ? spare : last;
    T* const other = x == last ? spare : last;

#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
        scaling.sum_squares();
        scaling.for_each_part([&](int64_t index, int64_t row, int64_t rows) {
            const T* from = static_cast<const T*>(args.g) + index * size + row * K;
            T* scaled = (wide ? other : x) + index * size + row * K;
            const double of_matrix = scaling.of_matrix(index);
            for (int64_t i = 0; i < rows; i++) {
                const double factor = scaling.of_row(index, row + i, of_matrix);
                for (int64_t j = i * K; j < (i + 1) * K; j++)
                    scaled[j] = static_cast<T>(static_cast<double>(from[j]) * factor);
            }
            if (wide) transpose(rows, K, scaled, K, x + index * size + row, M);
        });
        const auto batch_with = [&]<class U>(U* thread_scratch) {
            return Batch<U>{
                .count = batch,
                .L = L,
                .R = R,
                .coefficients = args.coefficients,
                .steps = args.steps,
                .threads = threads,
                .scratch = thread_scratch,
            };
        };
        if constexpr (std::is_same_v<T, float>)
            if (gram) gram_form(batch_with(double_scratch + thread * kScratch<double>), x, square, last);
        if (!gram) plain_form<T>(batch_with(scratch + thread * kScratch<T>), x, other, G, F);
        if (wide) {
#pragma omp for
            for (int64_t index = 0; index < batch; index++)
                transpose(L, R, last + index * size, R, out + index * size, L);
        }
    }
}

}   // namespace

void newton_schulz(const NewtonSchulz& args) {
    if (args.dtype == DType::float64) return run<double>(args);
    if constexpr (kMultipliesBfloat16)
        if (args.allow_bfloat16) return run16(args);
    run<float>(args);
}

}   // namespace nanochat::NANOCHAT_ISA
