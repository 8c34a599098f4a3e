// The whole model on a KV cache, in one call. Generation multiplies matrices by few rows, so its time goes into reading
// the weights once and into the gaps between products. One team of threads runs all of it, with barriers of its own.
//
// Every number is computed by one chain of operations, which depends neither on the other rows nor on the number of
// threads. So a token has the same bits whatever it is batched with and however its prompt is cut.
#include <omp.h>

#include "../kernels.h"
#include "int8_products.h"
#include "runtime.h"
#include "simd.h"
#include "system.h"

#if defined(__x86_64__)
#include "instructions_x86_64.h"
#elif defined(__aarch64__)
#include "instructions_aarch64.h"
#endif

namespace nanochat::NANOCHAT_ISA {

namespace {

using cpu::BlockWeights;
using cpu::CachedForward;
using cpu::WeightMatrix;

constexpr float kEps = 1.1920929e-7f;   // 2^-23, of every RMSNorm
constexpr int W = kLanes<float>;
constexpr int64_t kFewRows = 8;     // rows of activations that each thread prepares for itself
constexpr int64_t kKeyChunk = 64;   // scores of a query that are computed and normalised at a time
template <class T>
constexpr int64_t kAhead = 1;   // strips between a weight and the one that is prefetched with it
constexpr int kSpins = 1000;    // about 50 us: longer than a barrier takes, unless another program has the core

// --- the team ---

struct Barrier {
    int arrived, passed, asleep;
};

// Spins first, because the others usually arrive soon, and then sleeps: a thread that shares its core with the thread
// that it waits for must give up the core.
NANOCHAT_INLINE void wait_for_all(Barrier* barrier, int team) {
    if (team == 1) return;
    const int passed = __atomic_load_n(&barrier->passed, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == team) {
        __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&barrier->passed, passed + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&barrier->asleep, __ATOMIC_SEQ_CST)) cpu::wake_all(&barrier->passed);
        return;
    }
    for (int spins = 0; spins < kSpins; spins++) {
        if (__atomic_load_n(&barrier->passed, __ATOMIC_ACQUIRE) != passed) return;
        pause();
    }
    __atomic_add_fetch(&barrier->asleep, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&barrier->passed, __ATOMIC_SEQ_CST) == passed) cpu::sleep_while(&barrier->passed, passed);
    __atomic_sub_fetch(&barrier->asleep, 1, __ATOMIC_SEQ_CST);
}

struct Team {
    int rank, size;
    Barrier* barrier;
    NANOCHAT_INLINE void wait() const { wait_for_all(barrier, size); }
    // This thread's share of n items, in whole multiples of `unit`.
    NANOCHAT_INLINE int64_t begin(int64_t n, int64_t unit = 1) const { return ceil_div(n, unit) * rank / size * unit; }
    NANOCHAT_INLINE int64_t end(int64_t n, int64_t unit = 1) const {
        return minimum(n, ceil_div(n, unit) * (rank + 1) / size * unit);
    }
};

// --- products ---

// A matrix whose row o has the numbers data[o, k], or data[o, k] scales[o] if T is int8.
template <class T>
struct Matrix {
    const T* data;
    const float* scales;
};

// How rows of x are prepared for products with weights of type T.
template <class T>
constexpr bool kSplitsRows = std::is_same_v<T, bfloat16>;
template <class T>
constexpr bool kRoundsRows = kMultipliesInt8 && std::is_same_v<T, int8_t>;

template <class T>
NANOCHAT_INLINE Vec<float> load_part(const T* p, int64_t n) {
    T lanes[W] = {};
    __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
    return load(lanes);
}

// The numbers of p with even and with odd numbers, of 2 W. A pair of bfloat16 is taken apart by a shift and a mask, without
// a shuffle.
NANOCHAT_INLINE void split_pairs(const bfloat16* p, Vec<float>& even, Vec<float>& odd) {
    Vec<uint32_t> pairs;
    __builtin_memcpy(&pairs, p, sizeof pairs);
    even = __builtin_bit_cast(Vec<float>, pairs << 16);
    odd = __builtin_bit_cast(Vec<float>, pairs & 0xffff0000u);
}
template <int... lane>
NANOCHAT_INLINE void split_pairs(const float* p, Vec<float>& even, Vec<float>& odd,
                                 std::integer_sequence<int, lane...>) {
    const Vec<float> low = load(p), high = load(p + W);
    even = shuffle_lanes<2 * lane...>(low, high);
    odd = shuffle_lanes<2 * lane + 1 ...>(low, high);
}

// Copies a row in the order in which dot_tile multiplies weights that are split: in each 2 W numbers the even ones come first.
NANOCHAT_INLINE void split_row(const float* from, int64_t K, float* to) {
    int64_t k = 0;
    for (; k + 2 * W <= K; k += 2 * W) {
        Vec<float> even, odd;
        split_pairs(from + k, even, odd, std::make_integer_sequence<int, W>());
        store(to + k, even);
        store(to + k + W, odd);
    }
    __builtin_memcpy(to + k, from + k, static_cast<size_t>(K - k) * sizeof(float));
}

// Lane r * (W / R) + j of the result is x[r] . w[j], for R rows of x and W / R rows of w. The rows are x_stride and
// w_stride apart. `split`: w is bfloat16, and the rows of x are those of split_row.
template <int R, bool prefetch, bool split, class T>
NANOCHAT_INLINE Vec<float> dot_tile(int64_t K, const float* x, int64_t x_stride, const T* w, int64_t w_stride) {
    constexpr int64_t line = 64 / sizeof(T);
    constexpr int J = W / R;
    SumVectors<float> sums;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) sums.v[i] = Vec<float>{};
    int64_t k = 0;
    if constexpr (split)
        for (; k + 2 * W <= K; k += 2 * W) {
            if (prefetch && k % line == 0)
#pragma GCC unroll 16
                for (int j = 0; j < J; j++) __builtin_prefetch(w + j * w_stride + k + kAhead<T> * W * K, 0, 2);
            Vec<float> even_rows[R], odd_rows[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                even_rows[r] = load(x + r * x_stride + k);
                odd_rows[r] = load(x + r * x_stride + k + W);
            }
#pragma GCC unroll 16
            for (int j = 0; j < J; j++) {
                Vec<float> even, odd;
                split_pairs(w + j * w_stride + k, even, odd);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sums.v[r * J + j] += even_rows[r] * even;
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) sums.v[r * J + j] += odd_rows[r] * odd;
            }
        }
    for (; k < K; k += W) {
        Vec<float> rows[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) rows[r] = load(x + r * x_stride + k);
        if (prefetch && k % line == 0)
#pragma GCC unroll 16
            for (int j = 0; j < J; j++) __builtin_prefetch(w + j * w_stride + k + kAhead<T> * W * K, 0, 2);
#pragma GCC unroll 16
        for (int j = 0; j < J; j++) {
            const Vec<float> weights = load(w + j * w_stride + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums.v[r * J + j] += rows[r] * weights;
        }
    }
    return sum_each(sums);
}

// The same for one row each and any K, with the result in every lane. Zeros fill the last vector.
template <class T>
NANOCHAT_INLINE Vec<float> dot_part(int64_t K, const float* x, const T* w) {
    SumVectors<float> sums{};
    for (int64_t k = 0; k < K; k += W)
        sums.v[0] += load_part(x + k, minimum<int64_t>(W, K - k)) * load_part(w + k, minimum<int64_t>(W, K - k));
#pragma GCC unroll 16
    for (int i = 1; i < W; i++) sums.v[i] = sums.v[0];
    return sum_each(sums);
}

// Multiplies lane r * J + j by the scale of row `first` + j.
template <int R, class T>
NANOCHAT_INLINE Vec<float> scaled(Vec<float> sums, const float* scales, int64_t first) {
    if constexpr (std::is_same_v<T, int8_t>) {
        constexpr int J = W / R;
        float factors[W];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) __builtin_memcpy(factors + r * J, scales + first, J * sizeof(float));
        sums *= load(factors);
    }
    return sums;
}

// These two are functions of their own: each is needed in a dozen places, and compilers take long for them. They store sums:
// a product is rounded before it is added to anything.

// sums[0] = x . row o of w.
template <class T>
__attribute__((noinline)) void one_product(int64_t K, const float* x, const Matrix<T>& w, int64_t o, float* sums) {
    const T* own = w.data + o * K;
    const Vec<float> sum = K % W ? dot_part(K, x, own) : dot_tile<1, false, kSplitsRows<T>>(K, x, 0, own, 0);
    store(sums, scaled<W, T>(sum, w.scales, o));
}

// sums[r * (W / R) + j] = x[r] . row o + j of w, for R rows of x (R, K) and W / R rows of w.
template <int R, class T>
__attribute__((noinline)) void tile_of_products(int64_t K, const float* x, const Matrix<T>& w, int64_t o, bool prefetch,
                                                float* sums) {
    const T* own = w.data + o * K;
    const Vec<float> tile = prefetch ? dot_tile<R, true, kSplitsRows<T>>(K, x, K, own, K)
                                     : dot_tile<R, false, kSplitsRows<T>>(K, x, K, own, K);
    store(sums, scaled<R, T>(tile, w.scales, o));
}

// Calls put(row, output, sum) for R rows of x (rows, K) from `row` on and the rows of w (outputs, K) in [begin, end).
template <int R, class T, class Put>
NANOCHAT_INLINE void multiply_tile(int64_t K, const float* x, int64_t row, const Matrix<T>& w, int64_t begin,
                                   int64_t end, bool prefetch, const Put& put) {
    constexpr int J = W / R;
    float sums[W];
    if (K % W || end - begin < J) {
        for (int r = 0; r < R; r++)
            for (int64_t o = begin; o < end; o++) {
                one_product(K, x + (row + r) * K, w, o, sums);
                put(row + r, o, sums[0]);
            }
        return;
    }
    tile_of_products<R>(K, x + row * K, w, begin, prefetch, sums);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int j = 0; j < J; j++) put(row + r, begin + j, sums[r * J + j]);
}

// Calls put(row, output, sum) for all rows of x (rows, K) and the rows of w (outputs, K) in [begin, end). Weights are
// read once: a few of their rows stay in L1 while all rows of x pass by.
template <class T, class Put>
__attribute__((noinline)) void multiply(int64_t K, const float* x, int64_t rows, const Matrix<T>& w, int64_t begin,
                                        int64_t end, const Put& put) {
    const auto strip = [&](auto R, int64_t row, int64_t first, int64_t last) __attribute__((always_inline)) {
        for (int64_t o = first; o < last; o += W / R())
            multiply_tile<R()>(K, x, row, w, o, minimum<int64_t>(last, o + W / R()), row == 0, put);
    };
    for (int64_t o = begin; o < end; o += W) {
        const int64_t last = minimum<int64_t>(o + W, end);
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) strip(std::integral_constant<int, 4>(), row, o, last);
        if (row + 2 <= rows) strip(std::integral_constant<int, 2>(), row, o, last), row += 2;
        if (row < rows) strip(std::integral_constant<int, 1>(), row, o, last);
    }
}

// Rows of x (rows, K) as `multiply` takes them with weights of type T.
struct FloatRows {
    int64_t rows, K;
    const float* x;
};
template <class T>
using Rows = std::conditional_t<kRoundsRows<T>, RoundedRows, FloatRows>;

template <class T, class Put>
NANOCHAT_INLINE void multiply(const FloatRows& x, const Matrix<T>& w, int64_t begin, int64_t end, const Put& put) {
    multiply(x.K, x.x, x.rows, w, begin, end, put);
}

// The same for rounded rows.
template <class Put>
__attribute__((noinline)) void multiply(const RoundedRows& x, const Matrix<int8_t>& w, int64_t begin, int64_t end,
                                        const Put& put) {
    const auto tile = [&](auto R, auto J, int64_t row, int64_t o) __attribute__((always_inline)) {
        float sums[kInt8Outputs];
        if (row == 0)
            tile_of_int8_products<R(), J(), true>(x, row, w.data, w.scales, o, sums);
        else
            tile_of_int8_products<R(), J(), false>(x, row, w.data, w.scales, o, sums);
        for (int r = 0; r < R(); r++)
            for (int j = 0; j < J(); j++) put(row + r, o + j, sums[r * J() + j]);
    };
    const auto strip = [&](auto R, int64_t row, int64_t first, int64_t last) __attribute__((always_inline)) {
        constexpr int J = kInt8Outputs / R();
        int64_t o = first;
        for (; o + J <= last; o += J) tile(R, std::integral_constant<int, J>(), row, o);
        for (; o < last; o++) tile(R, std::integral_constant<int, 1>(), row, o);
    };
    for (int64_t o = begin; o < end; o += kInt8Outputs) {
        const int64_t last = minimum<int64_t>(o + kInt8Outputs, end);
        int64_t row = 0;
        for (; row + 4 <= x.rows; row += 4) strip(std::integral_constant<int, 4>(), row, o, last);
        if (row + 2 <= x.rows) strip(std::integral_constant<int, 2>(), row, o, last), row += 2;
        if (row < x.rows) strip(std::integral_constant<int, 1>(), row, o, last);
    }
}

// --- norms, gates and positions ---

template <class T>
NANOCHAT_INLINE float inverse_rms(const T* x, int64_t n) {
    Vec<float> sum{};
    int64_t i = 0;
    for (; i + W <= n; i += W) sum += load(x + i) * load(x + i);
    if (i < n) sum += load_part(x + i, n - i) * load_part(x + i, n - i);
    return 1.0f / __builtin_sqrtf(sum_lanes<float>(sum) / static_cast<float>(n) + kEps);
}

NANOCHAT_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_lanes(broadcast(-x))[0]); }

// For loops whose last vector has only n < W numbers. All numbers then go through one expression: the compiler may fuse
// another product of a x + b y into the sum in a loop of its own for the rest.
template <class T>
NANOCHAT_INLINE Vec<float> load_up_to(const T* p, int64_t n) {
    return n < W ? load_part(p, n) : load(p);
}
NANOCHAT_INLINE void store_up_to(float* p, Vec<float> v, int64_t n) {
    if (n < W)
        __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
    else
        store(p, v);
}

// to = factor norm(x rotated by the angles of its position), D numbers. The halves become (x1 cos + x2 sin,
// x2 cos - x1 sin). `rotated` has room for them.
template <class T>
NANOCHAT_INLINE void rotate_and_norm(const float* x, const float* cos, const float* sin, int64_t D, float factor,
                                     float* rotated, T* to) {
    const int64_t half = D / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        rotated[i] = a * cos[i] + b * sin[i];
        rotated[half + i] = b * cos[i] - a * sin[i];
    }
    const float scale = inverse_rms(rotated, D) * factor;
    for (int64_t i = 0; i < D; i++) write(to + i, rotated[i] * scale);
}

// --- attention ---

// The softmax of one query over one chunk of keys: the largest score and the sum of exp(score - largest). The values,
// weighted by exp(score - largest), are stored beside it.
struct Partial {
    float largest, sum;
};

// Attention of R queries, q_stride apart, over keys [first[r], last[r]) of one chunk, at least one key each. Keys and
// values of a head are `stride` apart. A key that a query does not see has weight 0. The lane of a key depends on its
// place in the chunk alone, so that sums are in one order whatever R is.
template <int R, class T>
__attribute__((noinline)) void attend(const float* q, int64_t q_stride, const T* keys, const T* values, int64_t stride,
                                      int64_t D, const int64_t (&first)[R], const int64_t (&last)[R], float scale,
                                      Partial* const (&partials)[R], float* const (&out)[R]) {
    constexpr int J = W / R;
    float scores[R][kKeyChunk];
    int64_t begin = first[0], end = last[0];
    for (int r = 1; r < R; r++) begin = minimum(begin, first[r]), end = maximum(end, last[r]);
    const int64_t begin_lane = begin / W * W;
    for (int64_t i = begin_lane; i < end; i += W) {
        const T* key = keys + i * stride;
        if (D % W || i + W > end)
            for (int64_t j = 0; j < minimum<int64_t>(W, end - i); j++)
                for (int r = 0; r < R; r++)
                    scores[r][i + j] = D % W
                                           ? dot_part(D, q + r * q_stride, key + j * stride)[0]
                                           : dot_tile<1, false, false>(D, q + r * q_stride, 0, key + j * stride, 0)[0];
        else
            for (int j = 0; j < W; j += J) {
                float tile[W];
                store(tile, dot_tile<R, false, false>(D, q, q_stride, key + j * stride, stride));
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) __builtin_memcpy(&scores[r][i + j], tile + r * J, J * sizeof(float));
            }
    }
    for (int r = 0; r < R; r++) {
        for (int64_t i = begin_lane; i < first[r]; i++) scores[r][i] = -__builtin_inff();
        for (int64_t i = last[r]; i < round_up(end, W); i++) scores[r][i] = -__builtin_inff();
        Vec<float> largest = broadcast(-__builtin_inff()), sum{};
        for (int64_t i = begin_lane; i < end; i += W) largest = maximum_lanes<float>(largest, load(&scores[r][i]));
        const float m = max_lanes<float>(largest);
        for (int64_t i = begin_lane; i < end; i += W) {
            const Vec<float> weights = exp_lanes((load(&scores[r][i]) - m) * scale);
            store(&scores[r][i], weights);
            sum += weights;
        }
        *partials[r] = {m * scale, sum_lanes<float>(sum)};
    }
    constexpr int most = R == 1 ? 8 : kTileVectors;   // vectors of the outputs that are summed at a time
    int64_t d = 0;
    for (; d + most * W <= D; d += most * W) {
        Vec<float> total[R][most] = {};
        for (int64_t key = begin; key < end; key++) {
            Vec<float> value[most];
#pragma GCC unroll 8
            for (int v = 0; v < most; v++) value[v] = load(values + key * stride + d + v * W);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int v = 0; v < most; v++) total[r][v] += broadcast(scores[r][key]) * value[v];
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < most; v++) store(out[r] + d + v * W, total[r][v]);
    }
    for (; d + W <= D; d += W)
        for (int r = 0; r < R; r++) {
            Vec<float> total{};
            for (int64_t key = begin; key < end; key++)
                total += broadcast(scores[r][key]) * load(values + key * stride + d);
            store(out[r] + d, total);
        }
    if (d < D)
        for (int r = 0; r < R; r++) {
            Vec<float> total{};
            for (int64_t key = begin; key < end; key++)
                total += broadcast(scores[r][key]) * load_part(values + key * stride + d, D - d);
            __builtin_memcpy(out[r] + d, &total, static_cast<size_t>(D - d) * sizeof(float));
        }
}

// out = the softmax over all chunks, from the softmax of each.
NANOCHAT_INLINE void combine(const Partial* partials, const float* values, int64_t chunks, int64_t D, float* out) {
    float largest = partials[0].largest, sum = 0;
    for (int64_t c = 1; c < chunks; c++) largest = maximum(largest, partials[c].largest);
    for (int64_t d = 0; d < D; d++) out[d] = 0;
    for (int64_t c = 0; c < chunks; c++) {
        const Vec<float> weight = exp_lanes(broadcast(partials[c].largest - largest));
        sum += weight[0] * partials[c].sum;
        for (int64_t d = 0; d < D; d++) out[d] += weight[0] * values[c * D + d];
    }
    for (int64_t d = 0; d < D; d++) out[d] /= sum;
}

// --- the pass ---

NANOCHAT_INLINE int64_t first_key_of(int64_t position, int64_t window) {
    return window < 0 ? 0 : maximum<int64_t>(0, position - window);
}

// Weight is the type of the matrices, Stored that of the embeddings and the cache. All arithmetic is float32.
template <class Weight, class Stored>
struct Pass {
    const CachedForward& args;
    int64_t N, heads, chunks;   // rows; heads of q, k and v together; chunks of keys that a row sees at most
    const int64_t* lengths;     // of the sequences
    int64_t *sequences = nullptr, *positions = nullptr;   // of the rows
    float *x = nullptr, *qkv = nullptr, *q = nullptr, *attended = nullptr, *hidden = nullptr, *values = nullptr;
    float *x0 = nullptr, *middle = nullptr;   // x before the first block, for the x0 lambdas; x to be backed out
    Partial* partials = nullptr;
    int64_t *ones = nullptr, *last_sequences = nullptr, *last_positions = nullptr;   // of the last rows, (B,)
    float* inverse = nullptr;                                                        // (threads, N)
    float* rotated = nullptr;                                                        // (threads, D)
    float* split_rows = nullptr;                                                     // (prepared rows, widest)
    int8_t* row_bytes = nullptr;                     // (prepared rows, kDigits, widest), of rounded rows
    float* row_scales = nullptr;                     // (prepared rows,)
    int32_t (*row_offsets)[kDigits][16] = nullptr;   // (prepared rows,)
    Barrier* barrier = nullptr;

    void carve_workspace(cpu::Arena& arena) {
        const int64_t F = args.F, HD = args.H * args.D;
        x = arena.take<float>(N * args.C);
        x0 = arena.take<float>(args.x0_lambdas ? N * args.C : 0);
        middle = arena.take<float>(args.backout_lambda ? N * args.C : 0);
        qkv = arena.take<float>(N * heads * args.D);
        q = arena.take<float>(N * HD);
        attended = arena.take<float>(N * HD);
        hidden = arena.take<float>(N * F);
        values = arena.take<float>(N * args.H * chunks * args.D);
        partials = arena.take<Partial>(N * args.H * chunks);
        inverse = arena.take<float>(args.execution.threads * N);
        rotated = arena.take<float>(args.execution.threads * args.D);
        const int64_t prepared = maximum(N, args.execution.threads * minimum(N, kFewRows));
        const int64_t rounded = kRoundsRows<Weight> ? prepared : 0;
        split_rows = arena.take<float>(kSplitsRows<Weight> ? prepared * widest() : 0);
        row_bytes = arena.take<int8_t>(rounded * kDigits * widest());
        row_scales = arena.take<float>(rounded);
        row_offsets = arena.take<int32_t[kDigits][16]>(rounded);
        barrier = arena.take<Barrier>(1);
        sequences = arena.take<int64_t>(N);
        positions = arena.take<int64_t>(N);
        ones = arena.take<int64_t>(args.B);
        last_sequences = arena.take<int64_t>(args.B);
        last_positions = arena.take<int64_t>(args.B);
    }

    NANOCHAT_INLINE int64_t first_key(int64_t row, int64_t window) const {
        return first_key_of(positions[row], window);
    }
    NANOCHAT_INLINE Stored* cache_at(int64_t layer, int64_t slot, int64_t at) const {
        const int64_t place = (layer * args.slot_count + slot) * args.capacity + at;
        return static_cast<Stored*>(args.cache) + place * 2 * args.Hkv * args.D;
    }
    NANOCHAT_INLINE const Stored* embedding_of(int64_t token) const {
        return static_cast<const Stored*>(args.wte) + token * args.C;
    }
    static NANOCHAT_INLINE Matrix<Weight> typed(const WeightMatrix& w) {
        return {static_cast<const Weight*>(w.data), w.scales};
    }

    // Numbers of the widest row that is multiplied, as a rounded row has them.
    NANOCHAT_INLINE int64_t widest() const {
        return round_up(maximum(maximum(args.C, args.F), args.H * args.D), kInt8Line);
    }

    // Rows of x (N, K) for `multiply`. A thread prepares a few rows for itself, which takes less time than a barrier.
    NANOCHAT_INLINE Rows<Weight> prepare(const Team& team, int64_t K, const float* x) const {
        const bool few = N <= kFewRows;
        const int64_t at = few ? team.rank * N : 0, begin = few ? 0 : team.begin(N), end = few ? N : team.end(N);
        if constexpr (kRoundsRows<Weight>) {
            const RoundedRows rows = {
                N, K, round_up(K, kInt8Line), row_bytes + at * kDigits * widest(), row_scales + at, row_offsets + at};
            round_rows(x, begin, end, rows);
            if (!few) team.wait();
            return rows;
        } else if (kSplitsRows<Weight> && K % W == 0) {
            float* rows = split_rows + at * widest();
            for (int64_t n = begin; n < end; n++) split_row(x + n * K, K, rows + n * K);
            if (!few) team.wait();
            return FloatRows{N, K, rows};
        } else {
            return FloatRows{N, K, x};
        }
    }

    NANOCHAT_INLINE const float* norms_of(const Team& team, const float* rows) const {
        float* own = inverse + team.rank * N;
        for (int64_t n = 0; n < N; n++) own[n] = inverse_rms(rows + n * args.C, args.C);
        return own;
    }

    NANOCHAT_INLINE void embed(const Team& team) const {
        const int64_t C = args.C;
        for (int64_t n = team.begin(N); n < team.end(N); n++) {
            const Stored* from = embedding_of(args.tokens[n]);
            const float scale = inverse_rms(from, C);
            for (int64_t c = 0; c < C; c++) x[n * C + c] = read(from + c) * scale;
            if (args.smear_gate) smear(n);
            if (!args.x0_lambdas || !args.layers) continue;
            for (int64_t c = 0; c < C; c++) x0[n * C + c] = x[n * C + c];
            add_x0(n, 0, C, 0);
        }
    }

    // Adds a part of the embedding before it to that of row n, which is in x.
    NANOCHAT_INLINE void smear(int64_t n) const {
        const int64_t C = args.C, b = sequences[n];
        const int64_t token = positions[n] > args.starts[b] ? args.tokens[n - 1] : args.previous[b];
        if (token < 0) return;
        const Stored* before = embedding_of(token);
        float* to = x + n * C;
        const float scale = inverse_rms(before, C);
        const float part = *args.smear_lambda * sigmoid(dot_part(args.smear_channels, to, args.smear_gate)[0]);
        for (int64_t c = 0; c < C; c += W) {
            const int64_t count = minimum<int64_t>(W, C - c);
            store_up_to(to + c, load_up_to(to + c, count) + load_up_to(before + c, count) * scale * part, count);
        }
    }

    // x = resid x + x0_lambda x0 in columns [begin, end) of row n, with which the block `layer` begins.
    NANOCHAT_INLINE void add_x0(int64_t n, int64_t begin, int64_t end, int64_t layer) const {
        const float resid = args.resid_lambdas[layer], lambda = args.x0_lambdas[layer];
        float* to = x + n * args.C;
        for (int64_t c = begin; c < end; c += W) {
            const int64_t count = minimum<int64_t>(W, end - c);
            const Vec<float> first = load_up_to(x0 + n * args.C + c, count);
            store_up_to(to + c, load_up_to(to + c, count) * resid + first * lambda, count);
        }
    }

    NANOCHAT_INLINE void project(const Team& team, const BlockWeights& block, const float* scale) const {
        const int64_t D = args.D, width = heads * D, begin = team.begin(width, W), end = team.end(width, W);
        const WeightMatrix* matrices[3] = {&block.q, &block.k, &block.v};
        const int64_t sizes[3] = {args.H * D, args.Hkv * D, args.Hkv * D};
        const auto rows = prepare(team, args.C, x);
        for (int64_t m = 0, at = 0; m < 3; at += sizes[m++])
            multiply(rows, typed(*matrices[m]), maximum<int64_t>(begin - at, 0), minimum(end - at, sizes[m]),
                     [&](int64_t n, int64_t o, float sum) { qkv[n * width + at + o] = sum * scale[n]; });
    }

    // Writes q, and keys and values into the cache. `scale` are the inverse norms of x.
    NANOCHAT_INLINE void rotate_and_store(const Team& team, int64_t layer, const float* scale) const {
        const int64_t D = args.D, H = args.H, Hkv = args.Hkv;
        const float factor = static_cast<float>(args.qk_scale);
        float* room = rotated + team.rank * D;
        for (int64_t i = team.begin(N * heads); i < team.end(N * heads); i++) {
            const int64_t n = i / heads, head = i % heads, at = positions[n];
            const float *from = qkv + i * D, *cos = args.cos + at * args.cos_stride, *sin = args.sin + at * D / 2;
            Stored* to = cache_at(layer, args.slots[sequences[n]], at) + (head - H) * D;
            if (head < H)
                rotate_and_norm(from, cos, sin, D, factor, room, q + (n * H + head) * D);
            else if (head < H + Hkv)
                rotate_and_norm(from, cos, sin, D, factor, room, to);
            else if (args.blocks[layer].value_table)
                add_value_embedding(args.blocks[layer], n, head - H - Hkv, scale[n], from, to);
            else
                for (int64_t d = 0; d < D; d++) write(to + d, from[d]);
        }
    }

    // to = value + its share of the token's value embedding, for row n and a key/value head.
    NANOCHAT_INLINE void add_value_embedding(const BlockWeights& block, int64_t n, int64_t head, float scale,
                                             const float* value, Stored* to) const {
        const int64_t D = args.D, channels = args.value_channels;
        const auto* embedding = static_cast<const Stored*>(block.value_table) + (args.tokens[n] * args.Hkv + head) * D;
        const auto* weights = static_cast<const Stored*>(block.value_gate) + head * channels;
        const float h = dot_part(channels, x + n * args.C, weights)[0] * scale;
        const float gate = 3.0f * sigmoid(h);
        for (int64_t d = 0; d < D; d++) write(to + d, value[d] + gate * read(embedding + d));
    }

    // A work item is a chunk of keys of one head, for all rows of a sequence and all query heads that share the head.
    NANOCHAT_INLINE void attention(const Team& team, int64_t layer, int64_t window) const {
        const int64_t D = args.D, H = args.H, Hkv = args.Hkv, group = H / Hkv, stride = 2 * Hkv * D;
        const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(D));
        int64_t unit = 0, row = 0;
        for (int64_t b = 0; b < args.B; row += lengths[b++]) {
            const int64_t rows = lengths[b], oldest = first_key(row, window) / kKeyChunk,
                          newest = positions[row + rows - 1] / kKeyChunk;
            for (int64_t c = oldest; c <= newest; c++)
                for (int64_t head = 0; head < Hkv; head++, unit++) {
                    if (unit % team.size != team.rank) continue;
                    const Stored* keys = cache_at(layer, args.slots[b], c * kKeyChunk) + head * D;
                    // Four queries at a time: from neighbouring rows or, if there is one row, neighbouring heads.
                    const int64_t across = rows > 1 ? rows : group, along = rows > 1 ? group : 1;
                    for (int64_t a = 0; a < along; a++) {
                        const int64_t h = head * group + a;
                        int64_t i = 0;
                        while (i < across)
                            i += attend_queries(rows > 1 ? row + i : row, rows > 1 ? h : h + i, rows > 1, across - i, c,
                                                window, keys, stride, scale);
                    }
                }
        }
    }

    // Computes four of the queries that are left from (n, h) on, or one, and returns how many.
    NANOCHAT_INLINE int64_t attend_queries(int64_t n, int64_t h, bool by_rows, int64_t left, int64_t chunk,
                                           int64_t window, const Stored* keys, int64_t stride, float scale) const {
        const int64_t D = args.D, H = args.H;
        const Stored* values = keys + args.Hkv * D;
        int64_t first[4], last[4];
        Partial* to[4];
        float* out[4];
        bool all = left >= 4;
        for (int64_t i = 0; i < minimum<int64_t>(4, left); i++) {
            const int64_t row = by_rows ? n + i : n, oldest = first_key(row, window), from = chunk * kKeyChunk;
            const int64_t place = (row * H + (by_rows ? h : h + i)) * chunks + chunk - oldest / kKeyChunk;
            first[i] = maximum<int64_t>(0, oldest - from);
            last[i] = minimum<int64_t>(kKeyChunk, positions[row] + 1 - from);
            to[i] = partials + place;
            out[i] = this->values + place * D;
            all = all && first[i] < last[i];
        }
        const float* query = q + (n * H + h) * D;
        if (all)
            attend<4>(query, by_rows ? H * D : D, keys, values, stride, D, first, last, scale, to, out);
        else if (first[0] < last[0])
            attend<1>(query, 0, keys, values, stride, D, {first[0]}, {last[0]}, scale, {to[0]}, {out[0]});
        return all ? 4 : 1;
    }

    NANOCHAT_INLINE void combine_chunks(const Team& team, int64_t window) const {
        const int64_t D = args.D, H = args.H;
        for (int64_t i = team.begin(N * H); i < team.end(N * H); i++) {
            const int64_t n = i / H, count = positions[n] / kKeyChunk - first_key(n, window) / kKeyChunk + 1;
            combine(partials + i * chunks, values + i * chunks * D, count, D, attended + i * D);
        }
    }

    // x += from w^T
    NANOCHAT_INLINE void add_product(const Team& team, int64_t K, const float* from, const WeightMatrix& w) const {
        multiply(prepare(team, K, from), typed(w), team.begin(args.C, W), team.end(args.C, W),
                 [&](int64_t n, int64_t c, float sum) { x[n * args.C + c] += sum; });
    }

    // What follows the sums of a block, in the columns of x that this thread has computed.
    NANOCHAT_INLINE void finish_block(const Team& team, int64_t layer) const {
        const int64_t C = args.C, begin = team.begin(C, W), end = team.end(C, W), columns = end - begin;
        const bool last = layer == args.layers - 1;
        for (int64_t n = 0; n < N && columns > 0; n++) {
            float *own = x + n * C + begin, *kept = middle + n * C + begin;
            if (args.backout_lambda && layer == args.layers / 2)
                __builtin_memcpy(kept, own, static_cast<size_t>(columns) * sizeof(float));
            if (args.backout_lambda && last)
                for (int64_t c = 0; c < columns; c += W) {
                    const int64_t count = minimum<int64_t>(W, columns - c);
                    const Vec<float> part = load_up_to(kept + c, count) * *args.backout_lambda;
                    store_up_to(own + c, load_up_to(own + c, count) - part, count);
                }
            if (args.x0_lambdas && !last) add_x0(n, begin, end, layer + 1);
        }
    }

    // The first part of a block: computes q, and writes keys and values into the cache.
    __attribute__((noinline)) void fill_cache(const Team& team, int64_t layer) const {
        const float* scale = norms_of(team, x);
        project(team, args.blocks[layer], scale);
        team.wait();
        rotate_and_store(team, layer, scale);
        team.wait();
    }

    // The rest of a block, with the keys and values of all rows in the cache.
    __attribute__((noinline)) void finish_with_cache(const Team& team, int64_t layer) const {
        const BlockWeights& block = args.blocks[layer];
        attention(team, layer, block.window);
        team.wait();
        combine_chunks(team, block.window);
        team.wait();
        add_product(team, args.H * args.D, attended, block.out);
        team.wait();
        const float* scale = norms_of(team, x);
        multiply(prepare(team, args.C, x), typed(block.fc), team.begin(args.F, W), team.end(args.F, W),
                 [&](int64_t n, int64_t f, float sum) {
                     const float positive = maximum(sum * scale[n], 0.0f);
                     hidden[n * args.F + f] = positive * positive;
                 });
        team.wait();
        add_product(team, args.F, hidden, block.proj);
        finish_block(team, layer);
        team.wait();
    }

    // Copies the last row of each sequence into row b, from the first sequence on, so that no row is overwritten before it
    // is copied.
    NANOCHAT_INLINE void gather_last_rows() const {
        const auto gather = [](float* rows, int64_t from, int64_t to, int64_t width) {
            __builtin_memmove(rows + to * width, rows + from * width, static_cast<size_t>(width) * sizeof(float));
        };
        for (int64_t b = 0, end = 0; b < args.B; b++) {
            end += lengths[b];
            gather(x, end - 1, b, args.C);
            gather(q, end - 1, b, args.H * args.D);
            if (args.backout_lambda) gather(middle, end - 1, b, args.C);
        }
    }

    // The logits of rows that each are a sequence.
    NANOCHAT_INLINE void lm_head(const Team& team) const {
        const int64_t C = args.C, V = args.V, begin = team.begin(V, W), end = team.end(V, W);
        float* last = q;   // no longer needed; rows of C fit, since C = H D
        for (int64_t b = team.begin(args.B); b < team.end(args.B); b++) {
            const float* from = x + b * C;
            const float scale = inverse_rms(from, C);
            for (int64_t c = 0; c < C; c++) last[b * C + c] = from[c] * scale;
        }
        team.wait();
        multiply(prepare(team, C, last), typed(args.lm_head), begin, end,
                 [&](int64_t b, int64_t v, float sum) { args.logits[b * V + v] = sum; });
        const float cap = static_cast<float>(args.softcap);
        if (cap == 0) return;
        for (int64_t b = 0; b < args.B; b++) {
            float* at = args.logits + b * V;
            int64_t v = begin;
            for (; v + W <= end; v += W) store(at + v, tanh_lanes<float>(load(at + v) / cap) * cap);
            const Vec<float> capped = tanh_lanes<float>(load_part(at + v, end - v) / cap) * cap;
            __builtin_memcpy(at + v, &capped, static_cast<size_t>(end - v) * sizeof(float));
        }
    }
};

template <class Weight, class Stored>
void run(const CachedForward& args) {
    Pass<Weight, Stored> pass{
        .args = args, .N = 0, .heads = args.H + 2 * args.Hkv, .chunks = 1, .lengths = args.lengths};
    for (int64_t b = 0; b < args.B; b++) {
        pass.N += args.lengths[b];
        for (int64_t at = args.starts[b]; at < args.starts[b] + args.lengths[b]; at++)
            for (int64_t layer = 0; layer < args.layers; layer++) {
                const int64_t first = first_key_of(at, args.blocks[layer].window);
                pass.chunks = maximum(pass.chunks, at / kKeyChunk - first / kKeyChunk + 1);
            }
    }
    cpu::Arena arena;
    pass.carve_workspace(arena);
    arena = {static_cast<char*>(cpu::workspace(arena.used))};
    pass.carve_workspace(arena);
    *pass.barrier = {};
    for (int64_t b = 0, n = 0; b < args.B; b++) {
        for (int64_t t = 0; t < args.lengths[b]; t++, n++) {
            pass.sequences[n] = b;
            pass.positions[n] = args.starts[b] + t;
        }
        pass.ones[b] = 1;
        pass.last_sequences[b] = b;
        pass.last_positions[b] = args.starts[b] + args.lengths[b] - 1;
    }
    auto last = pass;   // in the same workspace
    last.N = args.B;
    last.lengths = pass.ones;
    last.sequences = pass.last_sequences;
    last.positions = pass.last_positions;
#pragma omp parallel num_threads(args.execution.threads)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads(), pass.barrier};
        pass.embed(team);
        team.wait();
        for (int64_t layer = 0; layer < args.layers - 1; layer++) {
            pass.fill_cache(team, layer);
            pass.finish_with_cache(team, layer);
        }
        // The logits need the last row of each sequence alone, and the other rows of the last block only its cache.
        if (args.layers) pass.fill_cache(team, args.layers - 1);
        if (args.logits) {
            if (pass.N > args.B) {
                if (team.rank == 0) pass.gather_last_rows();
                team.wait();
            }
            if (args.layers) last.finish_with_cache(team, args.layers - 1);
            last.lm_head(team);
        }
    }
}

}   // namespace

void cached_forward(const CachedForward& args) {
    const bool wide = args.dtype == DType::float32;
    if (args.quantized)
        wide ? run<int8_t, float>(args) : run<int8_t, bfloat16>(args);
    else
        wide ? run<float, float>(args) : run<bfloat16, bfloat16>(args);
}

}   // namespace nanochat::NANOCHAT_ISA
