// Attention forward with the online softmax of FlashAttention-2 (Dao, 2023), on the CPU.
//
// Strips of 6 queries pass over blocks of keys that stay in L2. Of every block, a strip computes only the panels (64
// keys with AVX-512) that one of its rows sees. Keys are transposed into panels, so that scores come from the same
// register tile as every other product.
//
// A work item is a tile of queries of one head. The longest items come first. Item sizes depend only on the shape,
// never on the number of threads, so the same holds for the bits of the result.
#include <omp.h>

#include "attention.h"
#include "gemm16.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

// 16 strips share a block of keys.
constexpr int64_t kQueryTile = 96;
// 512 x 64 floats of K and of V fill a quarter of a 1 MB L2, and the scores of a strip fit L1.
constexpr int64_t kKeyBlock = 512;
// Up to two thirds of a strip, transposing the keys costs more than it saves.
constexpr int64_t kMostDecodeQueries = 4;

// Updates one strip of 6 queries with the keys of one block: computes scores, updates the running maximum and sum of
// the softmax, and sets out = out * rescale + P V.
template <class T>
void attend_strip(const AttentionShape& s, int64_t i, int64_t rows, Range block, const T* q, const T* k_panels,
                  const T* v, T* scores, T* row_max, T* row_sum, T* out, int64_t padded) {
    constexpr int64_t NR = kTileColumns<T>, W = kLanes<T>;
    const Range keys = intersect(block, visible_keys(s, i, rows));
    if (keys.begin == keys.end) return;
    const int64_t first = keys.begin / NR * NR, columns = round_up(keys.end, NR) - first;
    for (int64_t j = 0; j < columns; j += NR)
        multiply_strip<T, Layout::rows, false>(s.D, q, padded, k_panels + (first + j) * s.D, NR, scores + j, kKeyBlock,
                                               NR);
    for (int64_t r = 0; r < kTileRows; r++) {
        T* row_scores = scores + r * kKeyBlock;
        const Range visible = r < rows ? visible_keys(s, i + r) : Range{0, 0};
        Vec<T> top = broadcast<T>(-kInfinity);
        for (int64_t j = 0; j < columns; j += W) {
            const Vec<T> x = keep_range<T>(load(row_scores + j), first + j, visible.begin, visible.end, -kInfinity);
            store(row_scores + j, x);
            top = x > top ? x : top;
        }
        const T previous = row_max[r], current = maximum(previous, max_lanes<T>(top));
        const T reference = current > -kInfinity ? current : T(0);
        const T rescale = exp_lanes(broadcast<T>(previous - reference))[0];
        Vec<T> sum = Vec<T>{};
        for (int64_t j = 0; j < columns; j += W) {
            const Vec<T> p = exp_below(load(row_scores + j) - reference);
            store(row_scores + j, p);
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
    const bool masked = row_sum == 0;
    write_row(out, s.D, masked ? T(0) : 1 / row_sum, row(static_cast<S*>(a.out), a.out_strides, b, i, h));
    T& lse = static_cast<T*>(a.lse)[(b * s.H + h) * s.Tq + i];
    lse = masked ? T(-kInfinity) : row_max + static_cast<T>(__builtin_log(static_cast<double>(row_sum)));
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
    const auto carve_workspace = [&](cpu::Arena arena) {
        k_panels = arena.take<T>(s.B * s.Hkv * Tk_padded * s.D);
        v_rows = arena.take<T>(s.B * s.Hkv * Tk_padded * padded);
        scratch = arena.take<T>(a.execution.threads * scratch_size);
        return arena.used;
    };
    carve_workspace({static_cast<char*>(cpu::workspace(carve_workspace({})))});

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
            read_panel(row(k, a.k_strides, b, j, h), a.k_strides.t, s.Tk - j, s.D,
                       k_panels + (head * Tk_padded + j) * s.D, copy, padded);
            read_rows(row(v, a.v_strides, b, j, h), a.v_strides.t, minimum(NR, s.Tk - j), s.D, T(1),
                      v_rows + (head * Tk_padded + j) * padded, NR, padded);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < tiles * s.B * s.H; item++) {
            const int64_t i0 = (tiles - 1 - item / (s.B * s.H)) * kQueryTile, b = item / s.H % s.B, h = item % s.H;
            const int64_t count = minimum(kQueryTile, s.Tq - i0), head = b * s.Hkv + h / group;
            read_rows(row(q, a.q_strides, b, i0, h), a.q_strides.t, count, s.D, static_cast<T>(s.scale), queries,
                      round_up(count, kTileRows), padded);
            memset(out, 0, kQueryTile * padded * sizeof(T));
            for (int64_t r = 0; r < kQueryTile; r++) {
                row_max[r] = -kInfinity;
                row_sum[r] = 0;
            }
            const Range keys = visible_keys(s, i0, count);
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

// --- products of bfloat16 ---

// A strip of queries is two blocks of A, as AMX multiplies them.
constexpr int64_t kStrip16 = 32;
constexpr int64_t kQueryTile16 = 64;

struct Scratch16 {
    bfloat16 *queries, *weights;   // (kQueryTile16, D) and (kStrip16, kKeyBlock), packed as A
    float *scores, *out;           // (kStrip16, kKeyBlock), (kQueryTile16, padded D)
    float *row_max, *row_sum;      // (kQueryTile16,)

    size_t carve_workspace(cpu::Arena arena, int64_t D) {
        queries = arena.take<bfloat16>(packed_size(kQueryTile16, D));
        weights = arena.take<bfloat16>(kStrip16 * kKeyBlock);
        scores = arena.take<float>(kStrip16 * kKeyBlock);
        out = arena.take<float>(kQueryTile16 * round_up(D, kBlock16));
        row_max = arena.take<float>(kQueryTile16);
        row_sum = arena.take<float>(kQueryTile16);
        return arena.used;
    }
};

// As attend_strip, for queries [i, i + rows) of at most kStrip16, from row `at` of the tile. keys: one head's, packed as
// B of Q K^T; values: as B of P V. The weights are rounded to bfloat16, their sum is of the unrounded ones.
void attend_strip16(const AttentionShape& s, const Scratch16& m, int64_t i, int64_t at, int64_t rows, Range block,
                    const bfloat16* keys, const bfloat16* values) {
    const Range seen = intersect(block, visible_keys(s, i, rows));
    if (seen.begin == seen.end) return;
    const int64_t first = seen.begin / kBlock16Depth * kBlock16Depth;
    const int64_t columns = round_up(seen.end - first, kBlock16Depth), padded = round_up(s.D, kBlock16);
    const int64_t key_panel = packed_size(kBlock16, s.D), value_panel = packed_size(kBlock16, s.Tk);
    const int64_t blocks = ceil_div(rows, kBlock16);
    multiply_packed({m.queries + packed_size(at, s.D), key_panel, keys + first / kBlock16 * key_panel, key_panel,
                     ceil_div(s.D, kBlock16Depth)},
                    blocks, columns / kBlock16, m.scores, kKeyBlock, false);
    const float scale = static_cast<float>(s.scale);
    for (int64_t r = 0; r < blocks * kBlock16; r++) {
        float* scores = m.scores + r * kKeyBlock;
        bfloat16* weights = m.weights + r / kBlock16 * columns * kBlock16 + r % kBlock16 * kBlock16Depth;
        const Range visible = r < rows ? visible_keys(s, i + r) : Range{0, 0};
        constexpr int64_t W = kLanes<float>;
        Vec<float> top = broadcast<float>(-kInfinity);
        for (int64_t j = 0; j < columns; j += W) {
            const Vec<float> x = keep_range<float>(load(scores + j) * scale, first + j, visible.begin, visible.end,
                                                   static_cast<float>(-kInfinity));
            store(scores + j, x);
            top = x > top ? x : top;
        }
        float& row_max = m.row_max[at + r];
        const float previous = row_max, current = maximum(previous, max_lanes<float>(top));
        const float reference = current > -kInfinity ? current : 0.0f;
        const float rescale = exp_lanes(broadcast(previous - reference))[0];
        Vec<float> sum = {};
        for (int64_t j = 0; j < columns; j += W) {
            const Vec<float> p = exp_below(load(scores + j) - reference);
            store_operand(weights + j / kBlock16Depth * kBlock16Size + j % kBlock16Depth, p);
            sum += p;
        }
        row_max = current;
        m.row_sum[at + r] = m.row_sum[at + r] * rescale + sum_lanes<float>(sum);
        float* out = m.out + (at + r) * padded;
        if (rescale != 1)
            for (int64_t d = 0; d < padded; d += W) store(out + d, load(out + d) * rescale);
    }
    multiply_packed({m.weights, columns * kBlock16, values + first * kBlock16, value_panel, columns / kBlock16Depth},
                    blocks, padded / kBlock16, m.out + at * padded, padded, true);
}

[[maybe_unused]] void forward16(const AttentionForward& a) {
    const AttentionShape& s = a.shape;
    const int64_t padded = round_up(s.D, kBlock16), tiles = ceil_div(s.Tq, kQueryTile16), group = s.H / s.Hkv;
    const int64_t keys_size = packed_size(round_up(s.Tk, kBlock16Depth), s.D), values_size = packed_size(s.D, s.Tk);
    const bfloat16 *q = static_cast<const bfloat16*>(a.q), *k = static_cast<const bfloat16*>(a.k),
                   *v = static_cast<const bfloat16*>(a.v);
    const auto scratch_size = static_cast<int64_t>(Scratch16{}.carve_workspace({}, s.D));
    bfloat16 *keys, *values;
    char* scratch;
    const auto carve_workspace = [&](cpu::Arena arena) {
        keys = arena.take<bfloat16>(s.B * s.Hkv * keys_size);
        values = arena.take<bfloat16>(s.B * s.Hkv * values_size);
        scratch = arena.take<char>(a.execution.threads * scratch_size);
        return arena.used;
    };
    carve_workspace({static_cast<char*>(cpu::workspace(carve_workspace({})))});

#pragma omp parallel num_threads(a.execution.threads)
    {
        const TileScope tile_scope;
        Scratch16 m;
        m.carve_workspace({scratch + omp_get_thread_num() * scratch_size}, s.D);
        const int64_t parts = ceil_div(s.Tk, kBlock16Depth);
#pragma omp for
        for (int64_t item = 0; item < s.B * s.Hkv * parts; item++) {
            const int64_t head = item / parts, j = item % parts * kBlock16Depth, b = head / s.Hkv, h = head % s.Hkv;
            const int64_t count = minimum(kBlock16Depth, s.Tk - j);
            for (int64_t r = 0; r < kBlock16Depth; r += kBlock16)
                pack<true>(Operand<bfloat16>{row(k, a.k_strides, b, j, h), a.k_strides.t, Layout::rows}, r,
                           minimum(kBlock16, count - r), 0, s.D, keys + head * keys_size + packed_size(j + r, s.D));
            for (int64_t d = 0; d < s.D; d += kBlock16)
                pack<true>(Operand<bfloat16>{row(v, a.v_strides, b, j, h), a.v_strides.t, Layout::columns}, d,
                           minimum(kBlock16, s.D - d), 0, count,
                           values + head * values_size + packed_size(d, s.Tk) + j * kBlock16);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < tiles * s.B * s.H; item++) {
            const int64_t i0 = (tiles - 1 - item / (s.B * s.H)) * kQueryTile16, b = item / s.H % s.B, h = item % s.H;
            const int64_t count = minimum(kQueryTile16, s.Tq - i0), head = b * s.Hkv + h / group;
            pack<false>(Operand<bfloat16>{row(q, a.q_strides, b, i0, h), a.q_strides.t, Layout::rows}, 0, count, 0, s.D,
                        m.queries);
            memset(m.out, 0, kQueryTile16 * padded * sizeof(float));
            for (int64_t r = 0; r < kQueryTile16; r++) {
                m.row_max[r] = static_cast<float>(-kInfinity);
                m.row_sum[r] = 0;
            }
            const Range seen = visible_keys(s, i0, count);
            for (int64_t j = seen.begin / kKeyBlock * kKeyBlock; j < seen.end; j += kKeyBlock)
                for (int64_t r = 0; r < count; r += kStrip16)
                    attend_strip16(s, m, i0 + r, r, minimum(kStrip16, count - r), {j, minimum(j + kKeyBlock, s.Tk)},
                                   keys + head * keys_size, values + head * values_size);
            for (int64_t r = 0; r < count; r++)
                write_out<float, bfloat16>(a, b, h, i0 + r, m.out + r * padded, m.row_max[r], m.row_sum[r]);
        }
    }
}

// A few queries (a step of generation): one pass over the keys and one over the values, both in place.
template <class T, class S>
void forward_decode(const AttentionForward& a) {
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
        read_row(row(q, a.q_strides, b, i, h), s.D, static_cast<T>(s.scale), query, padded);
        memset(out, 0, padded * sizeof(T));
        const Range keys = visible_keys(s, i);
        T row_max = -kInfinity, row_sum = 0;
        for (int64_t j = keys.begin; j < keys.end; j++) {
            const S* key = row(k, a.k_strides, b, j, h / group);
            Vec<T> sum = Vec<T>{};
            int64_t d = 0;
            for (; d + W <= s.D; d += W) sum += load(query + d) * load(key + d);
            T score = sum_lanes<T>(sum);
            for (; d < s.D; d++) score += query[d] * read(key + d);
            scores[j] = score;
            row_max = maximum(row_max, score);
        }
        const T reference = row_max > -kInfinity ? row_max : T(0);
        for (int64_t j = keys.begin; j < keys.end; j++) {
            const S* value = row(v, a.v_strides, b, j, h / group);
            const T p = exp_lanes(broadcast<T>(scores[j] - reference))[0];
            row_sum += p;
            int64_t d = 0;
            for (; d + W <= s.D; d += W) store(out + d, load(out + d) + load(value + d) * p);
            for (; d < s.D; d++) out[d] += read(value + d) * p;
        }
        write_out<T, S>(a, b, h, i, out, row_max, row_sum);
    }
}

// All sequences of a batch have Tk keys.
void forward_batch(const AttentionForward& a) {
    const bool decode = a.shape.Tq <= kMostDecodeQueries;
    if (a.dtype == DType::float64) return decode ? forward_decode<double, double>(a) : forward<double, double>(a);
    if (a.dtype == DType::bfloat16) {
        if (decode) return forward_decode<float, bfloat16>(a);
        if constexpr (kMultipliesBfloat16)
            return forward16(a);
        else
            return forward<float, bfloat16>(a);
    }
    decode ? forward_decode<float, float>(a) : forward<float, float>(a);
}

// The arguments of sequence b alone, with its own number of keys.
AttentionForward sequence(AttentionForward a, int64_t b) {
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

}   // namespace

void attention_forward(const AttentionForward& a) {
    if (!a.lengths) return forward_batch(a);
    for (int64_t b = 0; b < a.shape.B; b++) forward_batch(sequence(a, b));
}

}   // namespace nanochat::NANOCHAT_ISA
