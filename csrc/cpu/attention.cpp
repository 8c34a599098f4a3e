// Attention with the online softmax of FlashAttention-2 (Dao, 2023), on the CPU.
//
// Strips of 6 queries pass over blocks of keys that stay in L2; of every block a strip computes only the panels (64
// keys with AVX-512) that one of its rows can see. Keys lie transposed, in panels, so that scores come from the same
// register tile as every other product.
//
// Forward:  a work item is a tile of queries of one head. The longest items come first.
// Backward: a work item is a range of keys of one key/value head and owns the dK and dV of that range. It passes over
//           the queries of every head of the group:
//               P = exp(S - lse),  dS = P (dO V^T - rowsum(dO O)),
//               dV += P^T dO,      dK += dS^T Q,                    dQ += dS K.
//           If a head has several ranges, each range writes its part of dQ, and the parts are added in order.
// Item sizes depend only on the shape, never on the number of threads, so the same holds for the bits of the result.
#include <omp.h>

#include "../kernels.h"
#include "gemm.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

// Forward: 16 strips share a block of keys.
constexpr int64_t kQueryTile = 96;
// Forward: 512 x 64 floats of K and of V fill a quarter of a 1 MB L2, and the scores of a strip fit L1.
constexpr int64_t kKeyBlock = 512;
// Backward: P and dS of a 96 x 256 block take 192 KB.
constexpr int64_t kBackwardQueries = 96;
constexpr int64_t kBackwardKeys = 256;
// Up to two thirds of a strip, transposing the keys costs more than it saves.
constexpr int64_t kFewQueries = 4;
// Backward: heads are cut into ranges of keys until there are about this many items.
constexpr int64_t kItems = 16;

constexpr double kInfinity = __builtin_inf();

struct KeyRange {
    int64_t begin, end;
};

// Keys that query i sees.
NANOCHAT_INLINE KeyRange visible(const AttentionShape& s, int64_t i) {
    const int64_t diagonal = i + s.Tk - s.Tq;
    const bool causal = s.causal || s.window >= 0;
    const int64_t end = causal ? minimum(s.Tk, diagonal + 1) : s.Tk;
    const int64_t begin = s.window >= 0 ? maximum<int64_t>(0, diagonal - s.window) : 0;
    return {minimum(begin, maximum<int64_t>(end, 0)), maximum<int64_t>(end, 0)};
}

// Keys that any of the queries [i, i + count) sees.
NANOCHAT_INLINE KeyRange visible(const AttentionShape& s, int64_t i, int64_t count) {
    return {visible(s, i).begin, visible(s, i + count - 1).end};
}

NANOCHAT_INLINE KeyRange intersect(KeyRange a, KeyRange b) {
    const int64_t begin = maximum(a.begin, b.begin);
    return {begin, maximum(begin, minimum(a.end, b.end))};
}

template <class T, class S>
NANOCHAT_INLINE void read_row(const S* from, int64_t D, T factor, T* to, int64_t padded) {
    int64_t d = 0;
    for (; d + kLanes<T> <= D; d += kLanes<T>) store(to + d, load(from + d) * factor);
    for (; d < D; d++) to[d] = read(from + d) * factor;
    for (; d < padded; d++) to[d] = 0;
}

template <class T, class S>
NANOCHAT_INLINE void write_row(const T* from, int64_t D, T factor, S* to) {
    int64_t d = 0;
    for (; d + kLanes<T> <= D; d += kLanes<T>) store(to + d, load(from + d) * factor);
    for (; d < D; d++) write(to + d, from[d] * factor);
}

// rows x D of a strided tensor to rows_padded x padded, zero beyond.
template <class T, class S>
void read_rows(const S* from, int64_t stride, int64_t rows, int64_t D, T factor, T* to, int64_t rows_padded,
               int64_t padded) {
    for (int64_t r = 0; r < rows; r++) read_row(from + r * stride, D, factor, to + r * padded, padded);
    memset(to + rows * padded, 0, (rows_padded - rows) * padded * sizeof(T));
}

// One panel of keys (or values): panel[d][n] = row n, zero beyond `rows`. `copy` holds kTileColumns rows of `padded`.
template <class T, class S>
void read_panel(const S* from, int64_t stride, int64_t rows, int64_t D, T* panel, T* copy, int64_t padded) {
    constexpr int64_t NR = kTileColumns<T>;
    read_rows(from, stride, minimum(rows, NR), D, T(1), copy, NR, padded);
    transpose(NR, D, copy, padded, panel, NR);
}

// Lane l holds x where first <= column + l < end, else `outside`.
template <class T>
NANOCHAT_INLINE Vec<T> keep_range(Vec<T> x, int64_t column, int64_t first, int64_t end, T outside) {
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index;
    constexpr int64_t W = kLanes<T>;
    if (column >= first && column + W <= end) return x;
    const Index low = static_cast<Index>(minimum(W, maximum<int64_t>(0, first - column)));
    const Index high = static_cast<Index>(minimum(W, maximum<int64_t>(0, end - column)));
    Vec<Index> lane;
    for (int l = 0; l < W; l++) lane[l] = l;
    return (lane >= low) & (lane < high) ? x : broadcast<T>(outside);
}

// ---- forward ----

// One strip of 6 queries against the keys of one block: scores, the softmax's running maximum and sum, and out = out *
// rescale + P V.
template <class T>
void attend_strip(const AttentionShape& s, int64_t i, int64_t rows, KeyRange block, const T* q, const T* k_panels,
                  const T* v, T* scores, T* row_max, T* row_sum, T* out, int64_t padded) {
    constexpr int64_t NR = kTileColumns<T>, W = kLanes<T>;
    const KeyRange keys = intersect(block, visible(s, i, rows));
    if (keys.begin == keys.end) return;
    const int64_t first = keys.begin / NR * NR, columns = round_up(keys.end, NR) - first;
    for (int64_t j = 0; j < columns; j += NR)
        multiply_strip<T, Layout::rows, false>(s.D, q, padded, k_panels + (first + j) * s.D, NR, scores + j, kKeyBlock,
                                               NR);
    for (int64_t r = 0; r < kTileRows; r++) {
        T* row = scores + r * kKeyBlock;
        const KeyRange seen = r < rows ? visible(s, i + r) : KeyRange{0, 0};
        Vec<T> top = broadcast<T>(-kInfinity);
        for (int64_t j = 0; j < columns; j += W) {
            const Vec<T> x = keep_range<T>(load(row + j), first + j, seen.begin, seen.end, -kInfinity);
            store(row + j, x);
            top = x > top ? x : top;
        }
        const T previous = row_max[r], current = maximum(previous, max_lanes<T>(top));
        const T reference = current > -kInfinity ? current : T(0);
        const T rescale = exp_lanes(broadcast<T>(previous - reference))[0];
        Vec<T> sum = Vec<T>{};
        for (int64_t j = 0; j < columns; j += W) {
            const Vec<T> p = exp_lanes(load(row + j) - reference);
            store(row + j, p);
            sum += p;
        }
        row_max[r] = current;
        row_sum[r] = row_sum[r] * rescale + sum_lanes<T>(sum);
        if (rescale != 1)
            for (int64_t d = 0; d < padded; d += W) store(out + r * padded + d, load(out + r * padded + d) * rescale);
    }
    multiply_strip<T, Layout::rows, true>(keys.end - keys.begin, scores + keys.begin - first, kKeyBlock,
                                          v + keys.begin * padded, padded, out, padded, padded);
}

template <class T, class S>
void write_out(const AttentionForward& a, int64_t b, int64_t h, int64_t i, const T* out, T row_max, T row_sum) {
    const AttentionShape& s = a.shape;
    S* to = static_cast<S*>(a.out) + b * a.out_strides.b + i * a.out_strides.t + h * a.out_strides.h;
    write_row(out, s.D, row_sum == 0 ? T(0) : 1 / row_sum, to);
    static_cast<T*>(a.lse)[(b * s.H + h) * s.Tq + i] =
        row_sum == 0 ? T(-kInfinity) : row_max + static_cast<T>(__builtin_log(static_cast<double>(row_sum)));
}

template <class T, class S>
void forward(const AttentionForward& a) {
    constexpr int64_t NR = kTileColumns<T>;
    const AttentionShape& s = a.shape;
    const int64_t padded = round_up(s.D, kLanes<T>), Tk_padded = round_up(s.Tk, NR), tiles = ceil_div(s.Tq, kQueryTile);
    const int64_t group = s.H / s.Hkv;
    const S *q = static_cast<const S*>(a.q), *k = static_cast<const S*>(a.k), *v = static_cast<const S*>(a.v);

    T *k_panels, *v_rows, *scratch;
    constexpr int64_t score_size = kTileRows * kKeyBlock;
    const int64_t scratch_size = score_size + 2 * kQueryTile * padded + 2 * kQueryTile + NR * padded;
    const auto lay_out = [&](cpu::Arena arena) {
        k_panels = arena.take<T>(s.B * s.Hkv * Tk_padded * s.D);
        v_rows = arena.take<T>(s.B * s.Hkv * Tk_padded * padded);
        scratch = arena.take<T>(a.execution.threads * scratch_size);
        return arena.used;
    };
    lay_out({static_cast<char*>(cpu::workspace(lay_out({})))});

#pragma omp parallel num_threads(a.execution.threads)
    {
        T* scores = scratch + omp_get_thread_num() * scratch_size;
        T* queries = scores + score_size;
        T* out = queries + kQueryTile * padded;
        T* row_max = out + kQueryTile * padded;
        T* row_sum = row_max + kQueryTile;
        T* copy = row_sum + kQueryTile;
        const int64_t panels = Tk_padded / NR;
#pragma omp for
        for (int64_t item = 0; item < s.B * s.Hkv * panels; item++) {
            const int64_t head = item / panels, j = item % panels * NR, b = head / s.Hkv, h = head % s.Hkv;
            const S* from_k = k + b * a.k_strides.b + j * a.k_strides.t + h * a.k_strides.h;
            const S* from_v = v + b * a.v_strides.b + j * a.v_strides.t + h * a.v_strides.h;
            read_panel(from_k, a.k_strides.t, s.Tk - j, s.D, k_panels + (head * Tk_padded + j) * s.D, copy, padded);
            read_rows(from_v, a.v_strides.t, minimum(NR, s.Tk - j), s.D, T(1), v_rows + (head * Tk_padded + j) * padded,
                      NR, padded);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < tiles * s.B * s.H; item++) {
            const int64_t i0 = (tiles - 1 - item / (s.B * s.H)) * kQueryTile, b = item / s.H % s.B, h = item % s.H;
            const int64_t count = minimum(kQueryTile, s.Tq - i0), head = b * s.Hkv + h / group;
            read_rows(q + b * a.q_strides.b + i0 * a.q_strides.t + h * a.q_strides.h, a.q_strides.t, count, s.D,
                      static_cast<T>(s.scale), queries, round_up(count, kTileRows), padded);
            memset(out, 0, kQueryTile * padded * sizeof(T));
            for (int64_t r = 0; r < kQueryTile; r++) {
                row_max[r] = -kInfinity;
                row_sum[r] = 0;
            }
            const KeyRange keys = visible(s, i0, count);
            for (int64_t j = keys.begin / kKeyBlock * kKeyBlock; j < keys.end; j += kKeyBlock)
                for (int64_t r = 0; r < count; r += kTileRows)
                    attend_strip(s, i0 + r, minimum<int64_t>(kTileRows, count - r), {j, minimum(j + kKeyBlock, s.Tk)},
                                 queries + r * padded, k_panels + head * Tk_padded * s.D,
                                 v_rows + head * Tk_padded * padded, scores, row_max + r, row_sum + r, out + r * padded,
                                 padded);
            for (int64_t r = 0; r < count; r++)
                write_out<T, S>(a, b, h, i0 + r, out + r * padded, row_max[r], row_sum[r]);
        }
    }
}

// A few queries (a step of generation): one pass over the keys and one over the values, where they lie.
template <class T, class S>
void forward_few(const AttentionForward& a) {
    constexpr int64_t W = kLanes<T>;
    const AttentionShape& s = a.shape;
    const int64_t padded = round_up(s.D, W), scratch_size = 2 * padded + round_up(s.Tk, W), group = s.H / s.Hkv;
    T* scratch = static_cast<T*>(cpu::workspace(a.execution.threads * scratch_size * sizeof(T)));
    const S *q = static_cast<const S*>(a.q), *k = static_cast<const S*>(a.k), *v = static_cast<const S*>(a.v);
#pragma omp parallel for schedule(dynamic, 1) num_threads(a.execution.threads)
    for (int64_t item = 0; item < s.B * s.H * s.Tq; item++) {
        const int64_t b = item / (s.H * s.Tq), h = item / s.Tq % s.H, i = item % s.Tq;
        T* query = scratch + omp_get_thread_num() * scratch_size;
        T* out = query + padded;
        T* scores = out + padded;
        read_row(q + b * a.q_strides.b + i * a.q_strides.t + h * a.q_strides.h, s.D, static_cast<T>(s.scale), query,
                 padded);
        memset(out, 0, padded * sizeof(T));
        const KeyRange keys = visible(s, i);
        T top = -kInfinity, total = 0;
        for (int64_t j = keys.begin; j < keys.end; j++) {
            const S* key = k + b * a.k_strides.b + j * a.k_strides.t + h / group * a.k_strides.h;
            Vec<T> sum = Vec<T>{};
            int64_t d = 0;
            for (; d + W <= s.D; d += W) sum += load(query + d) * load(key + d);
            T score = sum_lanes<T>(sum);
            for (; d < s.D; d++) score += query[d] * read(key + d);
            scores[j] = score;
            top = maximum(top, score);
        }
        const T reference = top > -kInfinity ? top : T(0);
        for (int64_t j = keys.begin; j < keys.end; j++) {
            const S* value = v + b * a.v_strides.b + j * a.v_strides.t + h / group * a.v_strides.h;
            const T p = exp_lanes(broadcast<T>(scores[j] - reference))[0];
            total += p;
            int64_t d = 0;
            for (; d + W <= s.D; d += W) store(out + d, load(out + d) + load(value + d) * p);
            for (; d < s.D; d++) out[d] += read(value + d) * p;
        }
        write_out<T, S>(a, b, h, i, out, top, total);
    }
}

// ---- backward ----

template <class T>
struct BackwardScratch {
    T *k_panels, *v_panels, *k_rows, *dk, *dv;   // of a range of keys
    T *queries, *dout, *dq;                      // of a block of queries (kBackwardQueries, padded)
    T *p, *ds;                                   // (kBackwardQueries, kBackwardKeys)
    T *lse, *delta, *copy;

    size_t lay_out(cpu::Arena arena, int64_t range, int64_t D, int64_t padded) {
        const int64_t rows = round_up(range, kTileRows * kTileColumns<T>);   // panels and strips of 6 both end inside
        k_panels = arena.take<T>(rows * D);
        v_panels = arena.take<T>(rows * D);
        k_rows = arena.take<T>(rows * padded);
        dk = arena.take<T>(rows * padded);
        dv = arena.take<T>(rows * padded);
        queries = arena.take<T>(kBackwardQueries * padded);
        dout = arena.take<T>(kBackwardQueries * padded);
        dq = arena.take<T>(kBackwardQueries * padded);
        p = arena.take<T>(kBackwardQueries * (kBackwardKeys + kTileColumns<T>));
        ds = arena.take<T>(kBackwardQueries * (kBackwardKeys + kTileColumns<T>));
        lse = arena.take<T>(kBackwardQueries);
        delta = arena.take<T>(kBackwardQueries);
        copy = arena.take<T>(kTileColumns<T> * padded);
        return arena.used;
    }
};

// Queries [i0, i0 + count) against keys [j0, j0 + width) of the range that begins at `origin`.
template <class T>
void backward_block(const AttentionShape& s, const BackwardScratch<T>& m, int64_t i0, int64_t count, int64_t j0,
                    int64_t width, int64_t origin, int64_t padded) {
    constexpr int64_t NR = kTileColumns<T>, W = kLanes<T>, stride = kBackwardKeys + NR;
    const KeyRange block{j0, j0 + width};
    for (int64_t r = 0; r < count; r += kTileRows) {
        const KeyRange keys = intersect(block, visible(s, i0 + r, minimum<int64_t>(kTileRows, count - r)));
        const int64_t first = (keys.begin - j0) / NR * NR,
                      end = keys.begin == keys.end ? first : round_up(keys.end - j0, NR);
        for (int64_t j = first; j < end; j += NR) {
            const int64_t panel = (j0 - origin + j) * s.D;
            multiply_strip<T, Layout::rows, false>(s.D, m.queries + r * padded, padded, m.k_panels + panel, NR,
                                                   m.p + r * stride + j, stride, NR);
            multiply_strip<T, Layout::rows, false>(s.D, m.dout + r * padded, padded, m.v_panels + panel, NR,
                                                   m.ds + r * stride + j, stride, NR);
        }
        for (int64_t row = r; row < r + kTileRows; row++) {
            T *p = m.p + row * stride, *ds = m.ds + row * stride;
            const KeyRange seen = row < count ? visible(s, i0 + row) : KeyRange{0, 0};
            for (int64_t j = first; j < end; j += W) {
                const Vec<T> weight =
                    keep_range<T>(exp_lanes(load(p + j) - m.lse[row]), j0 + j, seen.begin, seen.end, T(0));
                store(p + j, weight);
                store(ds + j,
                      keep_range<T>(weight * (load(ds + j) - m.delta[row]), j0 + j, seen.begin, seen.end, T(0)));
            }
            // Six keys of the products below may reach into the panels beside those computed.
            const int64_t before = maximum<int64_t>(0, first - NR);
            memset(p + before, 0, (first - before) * sizeof(T));
            memset(ds + before, 0, (first - before) * sizeof(T));
            memset(p + end, 0, NR * sizeof(T));
            memset(ds + end, 0, NR * sizeof(T));
        }
        if (keys.begin < keys.end)
            multiply_strip<T, Layout::rows, true>(keys.end - keys.begin, m.ds + r * stride + keys.begin - j0, stride,
                                                  m.k_rows + (keys.begin - origin) * padded, padded, m.dq + r * padded,
                                                  padded, padded);
    }
    const int64_t offset = s.Tk - s.Tq, last = round_up(count, kTileRows);
    const bool causal = s.causal || s.window >= 0;
    for (int64_t j = 0; j < width; j += kTileRows) {
        // Queries of this block that see one of the keys j0 + j ... j0 + j + 5.
        const int64_t begin = causal ? maximum<int64_t>(0, j0 + j - offset - i0) : 0;
        const int64_t end = s.window >= 0 ? minimum(last, j0 + j + kTileRows - offset + s.window - i0) : last;
        if (begin >= end) continue;
        const int64_t at = (j0 - origin + j) * padded;
        multiply_strip<T, Layout::columns, true>(end - begin, m.p + begin * stride + j, stride, m.dout + begin * padded,
                                                 padded, m.dv + at, padded, padded);
        multiply_strip<T, Layout::columns, true>(end - begin, m.ds + begin * stride + j, stride,
                                                 m.queries + begin * padded, padded, m.dk + at, padded, padded);
    }
}

template <class T, class S>
void backward(const AttentionBackward& a) {
    constexpr int64_t NR = kTileColumns<T>;
    const AttentionShape& s = a.shape;
    const int64_t padded = round_up(s.D, kLanes<T>), group = s.H / s.Hkv;
    const int64_t ranges =
        maximum<int64_t>(1, minimum(ceil_div(kItems, maximum<int64_t>(1, s.B * s.Hkv)), ceil_div(s.Tk, kBackwardKeys)));
    const int64_t range = round_up(ceil_div(maximum<int64_t>(s.Tk, 1), ranges), kBackwardKeys);
    const S *q = static_cast<const S*>(a.q), *k = static_cast<const S*>(a.k), *v = static_cast<const S*>(a.v);
    const S *out = static_cast<const S*>(a.out), *dout = static_cast<const S*>(a.dout);
    S *dq = static_cast<S*>(a.dq), *dk = static_cast<S*>(a.dk), *dv = static_cast<S*>(a.dv);

    const int64_t scratch_size = static_cast<int64_t>(BackwardScratch<T>{}.lay_out({}, range, s.D, padded));
    T* dq_parts;
    char* scratch;
    const auto lay_out = [&](cpu::Arena arena) {
        dq_parts = arena.take<T>(ranges > 1 ? ranges * s.B * s.H * s.Tq * s.D : 0);
        scratch = arena.take<char>(a.execution.threads * scratch_size);
        return arena.used;
    };
    lay_out({static_cast<char*>(cpu::workspace(lay_out({})))});

#pragma omp parallel num_threads(a.execution.threads)
    {
        BackwardScratch<T> m;
        m.lay_out({scratch + omp_get_thread_num() * scratch_size}, range, s.D, padded);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < ranges * s.B * s.Hkv; item++) {
            const int64_t part = item / (s.B * s.Hkv), b = item / s.Hkv % s.B, hkv = item % s.Hkv;
            const int64_t origin = part * range, keys_end = minimum(s.Tk, origin + range);
            const S* from_k = k + b * a.k_strides.b + hkv * a.k_strides.h;
            const S* from_v = v + b * a.v_strides.b + hkv * a.v_strides.h;
            for (int64_t j = origin; j < keys_end; j += NR) {
                const int64_t rows = minimum(NR, keys_end - j);
                read_panel(from_v + j * a.v_strides.t, a.v_strides.t, rows, s.D, m.v_panels + (j - origin) * s.D,
                           m.copy, padded);
                T* k_rows = m.k_rows + (j - origin) * padded;
                read_rows(from_k + j * a.k_strides.t, a.k_strides.t, rows, s.D, T(1), k_rows, NR, padded);
                transpose(NR, s.D, k_rows, padded, m.k_panels + (j - origin) * s.D, NR);
            }
            const int64_t held = round_up(maximum<int64_t>(0, keys_end - origin), kTileRows) * padded;
            memset(m.dk, 0, held * sizeof(T));
            memset(m.dv, 0, held * sizeof(T));

            for (int64_t h = hkv * group; h < (hkv + 1) * group; h++)
                for (int64_t i0 = 0; i0 < s.Tq; i0 += kBackwardQueries) {
                    const int64_t count = minimum(kBackwardQueries, s.Tq - i0), strips = round_up(count, kTileRows);
                    const KeyRange keys = intersect({origin, maximum(origin, keys_end)}, visible(s, i0, count));
                    memset(m.dq, 0, strips * padded * sizeof(T));
                    if (keys.begin < keys.end) {
                        read_rows(q + b * a.q_strides.b + i0 * a.q_strides.t + h * a.q_strides.h, a.q_strides.t, count,
                                  s.D, static_cast<T>(s.scale), m.queries, strips, padded);
                        read_rows(dout + b * a.dout_strides.b + i0 * a.dout_strides.t + h * a.dout_strides.h,
                                  a.dout_strides.t, count, s.D, T(1), m.dout, strips, padded);
                        for (int64_t r = 0; r < count; r++) {
                            const S* row = out + b * a.out_strides.b + (i0 + r) * a.out_strides.t + h * a.out_strides.h;
                            T sum = 0;
                            for (int64_t d = 0; d < s.D; d++) sum += read(row + d) * m.dout[r * padded + d];
                            m.delta[r] = sum;
                            m.lse[r] = static_cast<const T*>(a.lse)[(b * s.H + h) * s.Tq + i0 + r];
                        }
                        for (int64_t r = count; r < strips; r++) m.delta[r] = m.lse[r] = 0;
                        for (int64_t j = keys.begin / kBackwardKeys * kBackwardKeys; j < keys.end; j += kBackwardKeys)
                            backward_block(s, m, i0, count, j, minimum(kBackwardKeys, keys_end - j), origin, padded);
                    }
                    for (int64_t r = 0; r < count; r++) {
                        const T* row = m.dq + r * padded;
                        if (ranges > 1)
                            write_row(row, s.D, T(1), dq_parts + (((part * s.B + b) * s.H + h) * s.Tq + i0 + r) * s.D);
                        else
                            write_row(row, s.D, static_cast<T>(s.scale),
                                      dq + b * a.dq_strides.b + (i0 + r) * a.dq_strides.t + h * a.dq_strides.h);
                    }
                }
            for (int64_t j = origin; j < keys_end; j++) {
                write_row(m.dk + (j - origin) * padded, s.D, T(1),
                          dk + b * a.dk_strides.b + j * a.dk_strides.t + hkv * a.dk_strides.h);
                write_row(m.dv + (j - origin) * padded, s.D, T(1),
                          dv + b * a.dv_strides.b + j * a.dv_strides.t + hkv * a.dv_strides.h);
            }
        }
        if (ranges > 1) {
            const int64_t rows = s.B * s.H * s.Tq;
#pragma omp for
            for (int64_t row = 0; row < rows; row++) {
                const int64_t b = row / (s.H * s.Tq), h = row / s.Tq % s.H, i = row % s.Tq;
                T* sum = dq_parts + row * s.D;
                for (int64_t part = 1; part < ranges; part++)
                    for (int64_t d = 0; d < s.D; d++) sum[d] += dq_parts[(part * rows + row) * s.D + d];
                write_row(sum, s.D, static_cast<T>(s.scale),
                          dq + b * a.dq_strides.b + i * a.dq_strides.t + h * a.dq_strides.h);
            }
        }
    }
}

}   // namespace

static void attention_forward_batch(const AttentionForward& a) {
    const bool few = a.shape.Tq <= kFewQueries;
    if (a.dtype == DType::float64) return few ? forward_few<double, double>(a) : forward<double, double>(a);
    if (a.dtype == DType::bfloat16) return few ? forward_few<float, bfloat16>(a) : forward<float, bfloat16>(a);
    few ? forward_few<float, float>(a) : forward<float, float>(a);
}

// The arguments of one sequence of a batch whose sequences have numbers of keys of their own.
static AttentionForward sequence(AttentionForward a, int64_t b) {
    const int64_t element = a.dtype == DType::float64 ? 8 : a.dtype == DType::bfloat16 ? 2 : 4;
    const int64_t lse_element = a.dtype == DType::float64 ? 8 : 4;
    a.q = static_cast<const char*>(a.q) + b * a.q_strides.b * element;
    a.k = static_cast<const char*>(a.k) + b * a.k_strides.b * element;
    a.v = static_cast<const char*>(a.v) + b * a.v_strides.b * element;
    a.out = static_cast<char*>(a.out) + b * a.out_strides.b * element;
    a.lse = static_cast<char*>(a.lse) + b * a.shape.H * a.shape.Tq * lse_element;
    a.shape.B = 1;
    a.shape.Tk = a.lengths[b];
    return a;
}

void attention_forward(const AttentionForward& a) {
    if (!a.lengths) return attention_forward_batch(a);
    for (int64_t b = 0; b < a.shape.B; b++) attention_forward_batch(sequence(a, b));
}

void attention_backward(const AttentionBackward& a) {
    if (a.dtype == DType::float64) return backward<double, double>(a);
    if (a.dtype == DType::bfloat16) return backward<float, bfloat16>(a);
    backward<float, float>(a);
}

}   // namespace nanochat::NANOCHAT_ISA
