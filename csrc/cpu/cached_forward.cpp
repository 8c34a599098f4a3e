// The whole model on a KV cache, in one call: generation multiplies matrices by few rows, so it is bound by reading the
// weights once, and by what lies between two products. One team of threads runs all of it with barriers of its own.
//
// Every number is computed by one chain of operations that neither the other rows nor the number of threads change, so
// a token has the same bits whatever it is batched with and however its prompt is cut.
#include <omp.h>
#include <sched.h>

#include "../kernels.h"
#include "runtime.h"
#include "simd.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

using cpu::BlockWeights;
using cpu::CachedForward;

constexpr float kEps = 1.1920929e-7f;   // 2^-23, of every RMSNorm
constexpr int W = kLanes<float>;
constexpr int64_t kKeys = 128;   // scores of a query that are computed, and normalised, at a time
constexpr int kSpins = 4096;     // some 50 us: longer than a barrier takes, unless another program has the core

// --- the team ---

struct Barrier {
    int arrived, passed;
};

NANOCHAT_INLINE void wait_for_all(Barrier* barrier, int team) {
    if (team == 1) return;
    const int passed = __atomic_load_n(&barrier->passed, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == team) {
        __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&barrier->passed, passed + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&barrier->passed, __ATOMIC_ACQUIRE) == passed; spins++)
        if (spins < kSpins)
            __builtin_ia32_pause();
        else
            sched_yield();
}

struct Team {
    int rank, size;
    Barrier* barrier;
    NANOCHAT_INLINE void wait() const { wait_for_all(barrier, size); }
    // This thread's share of n things, in whole multiples of `unit`.
    NANOCHAT_INLINE int64_t begin(int64_t n, int64_t unit = 1) const { return ceil_div(n, unit) * rank / size * unit; }
    NANOCHAT_INLINE int64_t end(int64_t n, int64_t unit = 1) const {
        return minimum(n, ceil_div(n, unit) * (rank + 1) / size * unit);
    }
};

// --- products ---

NANOCHAT_INLINE Vec<float> load_part(const float* p, int64_t n) {
    Vec<float> v{};
    __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
    return v;
}

// Lane i of the result is the sum of the lanes of v[i], each added up in the same order.
NANOCHAT_INLINE Vec<float> sum_each(Vec<float> (&v)[W]) {
    typedef Vec<int32_t> Index;
#pragma GCC unroll 4
    for (int s = W / 2; s > 0; s /= 2) {
        Index own, other;
#pragma GCC unroll 16
        for (int lane = 0; lane < W; lane++) {
            own[lane] = lane & s ? W + lane : lane;
            other[lane] = lane & s ? W + lane - s : lane + s;
        }
#pragma GCC unroll 8
        for (int i = 0; i < s; i++)
            v[i] = __builtin_shuffle(v[i], v[i + s], own) + __builtin_shuffle(v[i], v[i + s], other);
    }
    return v[0];
}

// x[r] . w[j] of R rows of x and W / R rows of w, in lane r * (W / R) + j; rows are x_stride and w_stride apart.
template <int R, bool prefetch>
NANOCHAT_INLINE Vec<float> dot_tile(int64_t K, const float* x, int64_t x_stride, const float* w, int64_t w_stride) {
    constexpr int J = W / R;
    Vec<float> sums[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) sums[i] = Vec<float>{};
    for (int64_t k = 0; k < K; k += W) {
        Vec<float> rows[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) rows[r] = load(x + r * x_stride + k);
#pragma GCC unroll 16
        for (int j = 0; j < J; j++) {
            if (prefetch) __builtin_prefetch(w + j * w_stride + k + W * K, 0, 2);   // the strip that comes next
            const Vec<float> weights = load(w + j * w_stride + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[r * J + j] += rows[r] * weights;
        }
    }
    return sum_each(sums);
}

// The same of one row each, in every lane, for K that is no multiple of W: the rest is filled up with zeros.
NANOCHAT_INLINE Vec<float> dot_part(int64_t K, const float* x, const float* w) {
    Vec<float> sums[W] = {};
    for (int64_t k = 0; k < K; k += W)
        sums[0] += load_part(x + k, minimum<int64_t>(W, K - k)) * load_part(w + k, minimum<int64_t>(W, K - k));
#pragma GCC unroll 16
    for (int i = 1; i < W; i++) sums[i] = sums[0];
    return sum_each(sums);
}

// put(row, output, sum) for R rows of x (rows, K), from `row` on, and the rows of w (outputs, K) in [begin, end).
template <int R, class Put>
NANOCHAT_INLINE void multiply_tile(int64_t K, const float* x, int64_t row, const float* w, int64_t begin, int64_t end,
                                   bool prefetch, const Put& put) {
    constexpr int J = W / R;
    if (K % W || end - begin < J) {
        for (int r = 0; r < R; r++)
            for (int64_t o = begin; o < end; o++)
                put(row + r, o,
                    K % W ? dot_part(K, x + (row + r) * K, w + o * K)[0]
                          : dot_tile<1, false>(K, x + (row + r) * K, 0, w + o * K, 0)[0]);
        return;
    }
    const float *rows = x + row * K, *weights = w + begin * K;
    float sums[W];
    store(sums, prefetch ? dot_tile<R, true>(K, rows, K, weights, K) : dot_tile<R, false>(K, rows, K, weights, K));
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int j = 0; j < J; j++) put(row + r, begin + j, sums[r * J + j]);
}

// put(row, output, sum) for all rows of x (rows, K) and the rows of w (outputs, K) in [begin, end). Weights are read
// once: few rows of them stay in L1 while all rows of x pass by.
template <class Put>
__attribute__((noinline)) void multiply(int64_t K, const float* x, int64_t rows, const float* w, int64_t begin,
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

// --- norms and positions ---

NANOCHAT_INLINE float inverse_rms(const float* x, int64_t n) {
    Vec<float> sum{};
    int64_t i = 0;
    for (; i + W <= n; i += W) sum += load(x + i) * load(x + i);
    if (i < n) sum += load_part(x + i, n - i) * load_part(x + i, n - i);
    return 1.0f / __builtin_sqrtf(sum_lanes<float>(sum) / static_cast<float>(n) + kEps);
}

// to = norm(x rotated by its position's angles), D numbers: (x1 cos + x2 sin, x2 cos - x1 sin) of the halves.
NANOCHAT_INLINE void rotate_and_norm(const float* x, const float* cos, const float* sin, int64_t D, float* to) {
    const int64_t half = D / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        to[i] = a * cos[i] + b * sin[i];
        to[half + i] = b * cos[i] - a * sin[i];
    }
    const float scale = inverse_rms(to, D);
    for (int64_t i = 0; i < D; i++) to[i] *= scale;
}

// --- attention ---

// What one chunk of keys says to one query: the largest score, the sum of exp(score - largest), and the values weighted
// by that.
struct Partial {
    float largest, sum;
};

// Keys [first, last) of one chunk, at most kKeys of them; keys and values of a head are `stride` apart.
NANOCHAT_INLINE Partial attend(const float* q, const float* keys, const float* values, int64_t stride, int64_t D,
                               int64_t first, int64_t last, float scale, float* out) {
    float scores[kKeys];
    Vec<float> largest = broadcast(-__builtin_inff());
    const int64_t count = last - first;
    for (int64_t i = 0; i < count; i += W) {
        const float* key = keys + (first + i) * stride;
        Vec<float> tile;
        if (D % W || i + W > count) {
            tile = broadcast(-__builtin_inff());
            for (int64_t j = 0; j < minimum<int64_t>(W, count - i); j++)
                tile[j] =
                    D % W ? dot_part(D, q, key + j * stride)[0] : dot_tile<1, false>(D, q, 0, key + j * stride, 0)[0];
        } else
            tile = dot_tile<1, false>(D, q, 0, key, stride);
        store(scores + i, tile * scale);
        largest = maximum_lanes<float>(largest, tile * scale);
    }
    const float m = max_lanes<float>(largest);
    Vec<float> sum{};
    for (int64_t i = 0; i < count; i += W) {
        const Vec<float> weights = exp_lanes(load(scores + i) - m);   // 0 beyond the last key
        store(scores + i, weights);
        sum += weights;
    }
    const auto weigh = [&](const auto& add) __attribute__((always_inline)) {
        for (int64_t key = 0; key < count; key++) add(broadcast(scores[key]), values + (first + key) * stride);
    };
    constexpr int most = 8;   // vectors of the output that are summed at a time
    int64_t d = 0;
    for (; d + most * W <= D; d += most * W) {
        Vec<float> total[most] = {};
        weigh([&](Vec<float> weight, const float* value) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int v = 0; v < most; v++) total[v] += weight * load(value + d + v * W);
        });
#pragma GCC unroll 8
        for (int v = 0; v < most; v++) store(out + d + v * W, total[v]);
    }
    for (; d < D; d += W) {
        const int64_t n = minimum<int64_t>(W, D - d);
        Vec<float> total{};
        weigh([&](Vec<float> weight, const float* value)
                  __attribute__((always_inline)) { total += weight * load_part(value + d, n); });
        __builtin_memcpy(out + d, &total, static_cast<size_t>(n) * sizeof(float));
    }
    return {m, sum_lanes<float>(sum)};
}

// out = the chunks' values, weighted by what each says of the others.
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

struct Pass {
    const CachedForward& args;
    int64_t N, heads, chunks;   // rows; heads of q, k and v together; most chunks of keys that a row sees
    float *x = nullptr, *qkv = nullptr, *q = nullptr, *attended = nullptr, *hidden = nullptr, *values = nullptr;
    Partial* partials = nullptr;
    float* inverse = nullptr;   // (threads, N)
    Barrier* barrier = nullptr;

    void lay_out(cpu::Arena& arena) {
        const int64_t F = args.F, HD = args.H * args.D;
        x = arena.take<float>(N * args.C);
        qkv = arena.take<float>(N * heads * args.D);
        q = arena.take<float>(N * HD);
        attended = arena.take<float>(N * HD);
        hidden = arena.take<float>(N * F);
        values = arena.take<float>(N * args.H * chunks * args.D);
        partials = arena.take<Partial>(N * args.H * chunks);
        inverse = arena.take<float>(args.threads * N);
        barrier = arena.take<Barrier>(1);
    }

    NANOCHAT_INLINE int64_t position(int64_t row) const { return args.starts[row / args.T] + row % args.T; }
    NANOCHAT_INLINE int64_t first_key(int64_t row, int64_t window) const {
        return window < 0 ? 0 : maximum<int64_t>(0, position(row) - window);
    }
    NANOCHAT_INLINE float* cell(int64_t layer, int64_t slot, int64_t at) const {
        return args.cache + ((layer * args.slot_count + slot) * args.capacity + at) * 2 * args.Hkv * args.D;
    }

    NANOCHAT_INLINE const float* norms_of(const Team& team, const float* rows) const {
        float* own = inverse + team.rank * N;
        for (int64_t n = 0; n < N; n++) own[n] = inverse_rms(rows + n * args.C, args.C);
        return own;
    }

    NANOCHAT_INLINE void embed(const Team& team) const {
        const int64_t C = args.C;
        for (int64_t n = team.begin(N); n < team.end(N); n++) {
            const float* from = args.wte + args.tokens[n] * C;
            const float scale = inverse_rms(from, C);
            for (int64_t c = 0; c < C; c++) x[n * C + c] = from[c] * scale;
        }
    }

    NANOCHAT_INLINE void project(const Team& team, const BlockWeights& block) const {
        const float* scale = norms_of(team, x);
        const int64_t D = args.D, width = heads * D, begin = team.begin(width, W), end = team.end(width, W);
        const float* matrices[3] = {block.q, block.k, block.v};
        const int64_t sizes[3] = {args.H * D, args.Hkv * D, args.Hkv * D};
        for (int64_t m = 0, at = 0; m < 3; at += sizes[m++])
            multiply(args.C, x, N, matrices[m], maximum<int64_t>(begin - at, 0), minimum(end - at, sizes[m]),
                     [&](int64_t n, int64_t o, float sum) { qkv[n * width + at + o] = sum * scale[n]; });
    }

    NANOCHAT_INLINE void place(const Team& team, int64_t layer) const {
        const int64_t D = args.D, H = args.H, Hkv = args.Hkv;
        for (int64_t i = team.begin(N * heads); i < team.end(N * heads); i++) {
            const int64_t n = i / heads, head = i % heads, at = position(n);
            const float *from = qkv + i * D, *cos = args.cos + at * args.cos_stride, *sin = args.sin + at * D / 2;
            float* to = cell(layer, args.slots[n / args.T], at) + (head - H) * D;
            if (head < H)
                rotate_and_norm(from, cos, sin, D, q + (n * H + head) * D);
            else if (head < H + Hkv)
                rotate_and_norm(from, cos, sin, D, to);
            else
                for (int64_t d = 0; d < D; d++) to[d] = from[d];
        }
    }

    // A unit of work: a chunk of keys of a head, for all rows of a sequence and all query heads that share it.
    NANOCHAT_INLINE void attend_all(const Team& team, int64_t layer, int64_t window) const {
        const int64_t D = args.D, H = args.H, Hkv = args.Hkv, group = H / Hkv, stride = 2 * Hkv * D;
        const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(D));
        int64_t unit = 0;
        for (int64_t b = 0; b < args.B; b++) {
            const int64_t oldest = first_key(b * args.T, window) / kKeys,
                          newest = position(b * args.T + args.T - 1) / kKeys;
            for (int64_t c = oldest; c <= newest; c++)
                for (int64_t head = 0; head < Hkv; head++, unit++) {
                    if (unit % team.size != team.rank) continue;
                    const float* keys = cell(layer, args.slots[b], c * kKeys) + head * D;
                    for (int64_t n = b * args.T; n < (b + 1) * args.T; n++) {
                        const int64_t first = maximum<int64_t>(0, first_key(n, window) - c * kKeys);
                        const int64_t last = minimum<int64_t>(kKeys, position(n) + 1 - c * kKeys);
                        if (first >= last) continue;
                        for (int64_t h = head * group; h < (head + 1) * group; h++) {
                            const int64_t place = (n * H + h) * chunks + c - first_key(n, window) / kKeys;
                            partials[place] = attend(q + (n * H + h) * D, keys, keys + Hkv * D, stride, D, first, last,
                                                     scale, values + place * D);
                        }
                    }
                }
        }
    }

    NANOCHAT_INLINE void combine_all(const Team& team, int64_t window) const {
        const int64_t D = args.D, H = args.H;
        for (int64_t i = team.begin(N * H); i < team.end(N * H); i++) {
            const int64_t n = i / H, count = position(n) / kKeys - first_key(n, window) / kKeys + 1;
            combine(partials + i * chunks, values + i * chunks * D, count, D, attended + i * D);
        }
    }

    // x += from w^T
    NANOCHAT_INLINE void add_product(const Team& team, int64_t K, const float* from, const float* w) const {
        multiply(K, from, N, w, team.begin(args.C, W), team.end(args.C, W),
                 [&](int64_t n, int64_t c, float sum) { x[n * args.C + c] += sum; });
    }

    NANOCHAT_INLINE void run_block(const Team& team, int64_t layer) const {
        const BlockWeights& block = args.blocks[layer];
        project(team, block);
        team.wait();
        place(team, layer);
        team.wait();
        attend_all(team, layer, block.window);
        team.wait();
        combine_all(team, block.window);
        team.wait();
        add_product(team, args.H * args.D, attended, block.out);
        team.wait();
        const float* scale = norms_of(team, x);
        multiply(args.C, x, N, block.fc, team.begin(args.F, W), team.end(args.F, W),
                 [&](int64_t n, int64_t f, float sum) {
                     const float positive = maximum(sum * scale[n], 0.0f);
                     hidden[n * args.F + f] = positive * positive;
                 });
        team.wait();
        add_product(team, args.F, hidden, block.proj);
        team.wait();
    }

    // Of each sequence's last row.
    NANOCHAT_INLINE void predict(const Team& team) const {
        const int64_t C = args.C, T = args.T, V = args.V, begin = team.begin(V, W), end = team.end(V, W);
        float* last = q;   // of no use any more, and one row of C a sequence fits: C = H D
        for (int64_t b = team.begin(args.B); b < team.end(args.B); b++) {
            const float* from = x + (b * T + T - 1) * C;
            const float scale = inverse_rms(from, C);
            for (int64_t c = 0; c < C; c++) last[b * C + c] = from[c] * scale;
        }
        team.wait();
        multiply(C, last, args.B, args.lm_head, begin, end,
                 [&](int64_t b, int64_t v, float sum) { args.logits[b * V + v] = sum; });
        const float cap = static_cast<float>(args.softcap);
        if (cap == 0) return;
        for (int64_t b = 0; b < args.B; b++)
            for (int64_t v = begin; v < end; v += W) {
                float* at = args.logits + b * V + v;
                const int64_t n = minimum<int64_t>(W, end - v);
                const Vec<float> capped = tanh_lanes<float>(load_part(at, n) / cap) * cap;
                __builtin_memcpy(at, &capped, static_cast<size_t>(n) * sizeof(float));
            }
    }
};

}   // namespace

void cached_forward(const CachedForward& args) {
    Pass pass{.args = args, .N = args.B * args.T, .heads = args.H + 2 * args.Hkv, .chunks = 1};
    for (int64_t layer = 0; layer < args.layers; layer++)
        for (int64_t n = 0; n < pass.N; n++) {
            const int64_t first = pass.first_key(n, args.blocks[layer].window);
            pass.chunks = maximum(pass.chunks, pass.position(n) / kKeys - first / kKeys + 1);
        }
    cpu::Arena arena;
    pass.lay_out(arena);
    arena = {static_cast<char*>(cpu::workspace(arena.used))};
    pass.lay_out(arena);
    *pass.barrier = {};
#pragma omp parallel num_threads(args.threads)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads(), pass.barrier};
        pass.embed(team);
        team.wait();
        for (int64_t layer = 0; layer < args.layers; layer++) pass.run_block(team, layer);
        if (args.logits) pass.predict(team);
    }
}

}   // namespace nanochat::NANOCHAT_ISA
