// Attention backward (FlashAttention-2; Dao, 2023), on the CPU, with the strips and panels of attention_forward.cpp.
//
// A work item is a range of keys of one key/value head and owns the dK and dV of that range. It passes over the queries
// of every head of the group:
//     P = exp(S - lse),  dS = P (dO V^T - rowsum(dO O)),
//     dV += P^T dO,      dK += dS^T Q,                    dQ += dS K.
// If a head has several ranges, each range writes its part of dQ, and the parts are added in order. Item sizes depend
// only on the shape, never on the number of threads, so the same holds for the bits of the result.
#include <omp.h>

#include "attention.h"
#include "gemm16.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

// P and dS of a 96 x 256 block take 192 KB.
constexpr int64_t kQueryBlock = 96;
constexpr int64_t kKeyBlock = 256;
// Heads are cut into ranges of keys until there are about this many items.
constexpr int64_t kItems = 16;

template <class T>
struct Scratch {
    T *k_panels, *v_panels, *k_rows, *dk, *dv;   // of a range of keys
    T *queries, *dout, *dq;                      // of a block of queries (kQueryBlock, padded)
    T *p, *ds;                                   // (kQueryBlock, kKeyBlock)
    T *lse, *delta, *copy;

    size_t carve_workspace(cpu::Arena arena, int64_t range, int64_t D, int64_t padded) {
        const int64_t rows = round_up(range, kTileRows * kTileColumns<T>);   // panels and strips of 6 both end inside
        k_panels = arena.take<T>(rows * D);
        v_panels = arena.take<T>(rows * D);
        k_rows = arena.take<T>(rows * padded);
        dk = arena.take<T>(rows * padded);
        dv = arena.take<T>(rows * padded);
        queries = arena.take<T>(kQueryBlock * padded);
        dout = arena.take<T>(kQueryBlock * padded);
        dq = arena.take<T>(kQueryBlock * padded);
        p = arena.take<T>(kQueryBlock * (kKeyBlock + kTileColumns<T>));
        ds = arena.take<T>(kQueryBlock * (kKeyBlock + kTileColumns<T>));
        lse = arena.take<T>(kQueryBlock);
        delta = arena.take<T>(kQueryBlock);
        copy = arena.take<T>(kTileColumns<T> * padded);
        return arena.used;
    }
};

// Queries [i0, i0 + count) against keys [j0, j0 + width) of the range that begins at `origin`.
template <class T>
void backward_block(const AttentionShape& s, const Scratch<T>& m, int64_t i0, int64_t count, int64_t j0, int64_t width,
                    int64_t origin, int64_t padded) {
    constexpr int64_t NR = kTileColumns<T>, W = kLanes<T>, stride = kKeyBlock + NR;
    const Range block{j0, j0 + width};
    for (int64_t r = 0; r < count; r += kTileRows) {
        const Range keys = intersect(block, visible_keys(s, i0 + r, minimum<int64_t>(kTileRows, count - r)));
        const int64_t first = minimum(keys.begin - j0, width) / NR * NR;   // a window may begin behind the block
        const int64_t end = keys.begin == keys.end ? first : round_up(keys.end - j0, NR);
        for (int64_t j = first; j < end; j += NR) {
            const int64_t panel = (j0 - origin + j) * s.D;
            multiply_strip<T, Layout::rows, false>(s.D, m.queries + r * padded, padded, m.k_panels + panel, NR,
                                                   m.p + r * stride + j, stride, NR);
            multiply_strip<T, Layout::rows, false>(s.D, m.dout + r * padded, padded, m.v_panels + panel, NR,
                                                   m.ds + r * stride + j, stride, NR);
        }
        for (int64_t i = r; i < r + kTileRows; i++) {
            T *p = m.p + i * stride, *ds = m.ds + i * stride;
            const Range visible = i < count ? visible_keys(s, i0 + i) : Range{0, 0};
            for (int64_t j = first; j < end; j += W) {
                const auto masked = [&](Vec<T> x) {
                    return keep_range<T>(x, j0 + j, visible.begin, visible.end, T(0));
                };
                const Vec<T> weight = masked(exp_below(load(p + j) - m.lse[i]));
                store(p + j, weight);
                store(ds + j, masked(weight * (load(ds + j) - m.delta[i])));
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
struct Backward {
    const AttentionBackward& a;
    const AttentionShape& s = a.shape;
    const int64_t padded = round_up(s.D, 16), group = s.H / s.Hkv;
    const int64_t wanted_ranges = ceil_div(kItems, maximum<int64_t>(1, s.B* s.Hkv));
    const int64_t ranges = maximum<int64_t>(1, minimum(wanted_ranges, ceil_div(s.Tk, kKeyBlock)));
    const int64_t range = round_up(ceil_div(maximum<int64_t>(s.Tk, 1), ranges), kKeyBlock);
    const S *q = static_cast<const S*>(a.q), *k = static_cast<const S*>(a.k), *v = static_cast<const S*>(a.v);
    const S *out = static_cast<const S*>(a.out), *dout = static_cast<const S*>(a.dout);
    const T* lse = static_cast<const T*>(a.lse);
    S *dq = static_cast<S*>(a.dq), *dk = static_cast<S*>(a.dk), *dv = static_cast<S*>(a.dv);
    T* dq_parts = nullptr;   // (ranges, B, H, Tq, D) where there are several ranges

    // Copies keys and values [origin, end) of a head, and sets their gradients to zero.
    void load_keys(const Scratch<T>& m, int64_t b, int64_t hkv, int64_t origin, int64_t end) const {
        constexpr int64_t NR = kTileColumns<T>;
        for (int64_t j = origin; j < end; j += NR) {
            const int64_t rows = minimum(NR, end - j);
            read_panel(row(v, a.v_strides, b, j, hkv), a.v_strides.t, rows, s.D, m.v_panels + (j - origin) * s.D,
                       m.copy, padded);
            T* k_rows = m.k_rows + (j - origin) * padded;
            read_rows(row(k, a.k_strides, b, j, hkv), a.k_strides.t, rows, s.D, T(1), k_rows, NR, padded);
            transpose(NR, s.D, k_rows, padded, m.k_panels + (j - origin) * s.D, NR);
        }
        const int64_t held = round_up(maximum<int64_t>(0, end - origin), kTileRows) * padded;
        memset(m.dk, 0, held * sizeof(T));
        memset(m.dv, 0, held * sizeof(T));
    }

    // The sum of x y over the D elements of two rows.
    template <class Y>
    T dot(const S* x, const Y* y) const {
        Vec<T> sums = {};
        int64_t d = 0;
        for (; d + kLanes<T> <= s.D; d += kLanes<T>) sums += load(x + d) * load(y + d);
        T sum = sum_lanes<T>(sums);
        for (; d < s.D; d++) sum += read(x + d) * read(y + d);
        return sum;
    }

    // Copies queries [i0, i0 + count) of a head with what belongs to their rows.
    void load_queries(const Scratch<T>& m, int64_t b, int64_t h, int64_t i0, int64_t count) const {
        const int64_t strips = round_up(count, kTileRows);
        read_rows(row(q, a.q_strides, b, i0, h), a.q_strides.t, count, s.D, static_cast<T>(s.scale), m.queries, strips,
                  padded);
        read_rows(row(dout, a.dout_strides, b, i0, h), a.dout_strides.t, count, s.D, T(1), m.dout, strips, padded);
        for (int64_t r = 0; r < count; r++) {
            m.delta[r] = dot(row(out, a.out_strides, b, i0 + r, h), m.dout + r * padded);
            m.lse[r] = lse[(b * s.H + h) * s.Tq + i0 + r];
        }
        for (int64_t r = count; r < strips; r++) m.delta[r] = m.lse[r] = 0;
    }

    // rows: (count, padded), without the factor `scale`.
    void store_dq(const T* rows, int64_t part, int64_t b, int64_t h, int64_t i0, int64_t count) const {
        for (int64_t r = 0; r < count; r++) {
            const T* from = rows + r * padded;
            if (ranges > 1)
                write_row(from, s.D, T(1), dq_parts + (((part * s.B + b) * s.H + h) * s.Tq + i0 + r) * s.D);
            else
                write_row(from, s.D, static_cast<T>(s.scale), row(dq, a.dq_strides, b, i0 + r, h));
        }
    }

    // One work item.
    void key_range(const Scratch<T>& m, int64_t part, int64_t b, int64_t hkv) const {
        const int64_t origin = part * range, keys_end = minimum(s.Tk, origin + range);
        load_keys(m, b, hkv, origin, keys_end);
        for (int64_t h = hkv * group; h < (hkv + 1) * group; h++)
            for (int64_t i0 = 0; i0 < s.Tq; i0 += kQueryBlock) {
                const int64_t count = minimum(kQueryBlock, s.Tq - i0);
                const Range keys = intersect({origin, maximum(origin, keys_end)}, visible_keys(s, i0, count));
                memset(m.dq, 0, round_up(count, kTileRows) * padded * sizeof(T));
                if (keys.begin < keys.end) {
                    load_queries(m, b, h, i0, count);
                    for (int64_t j = keys.begin / kKeyBlock * kKeyBlock; j < keys.end; j += kKeyBlock)
                        backward_block(s, m, i0, count, j, minimum(kKeyBlock, keys_end - j), origin, padded);
                }
                store_dq(m.dq, part, b, h, i0, count);
            }
        for (int64_t j = origin; j < keys_end; j++) {
            const int64_t at = (j - origin) * padded;
            write_row(m.dk + at, s.D, T(1), row(dk, a.dk_strides, b, j, hkv));
            write_row(m.dv + at, s.D, T(1), row(dv, a.dv_strides, b, j, hkv));
        }
    }

    // Adds the parts of dQ; all threads of the team call this together.
    void sum_dq_parts() const {
        const int64_t rows = s.B * s.H * s.Tq;
#pragma omp for
        for (int64_t r = 0; r < rows; r++) {
            T* sum = dq_parts + r * s.D;
            for (int64_t part = 1; part < ranges; part++)
                for (int64_t d = 0; d < s.D; d++) sum[d] += dq_parts[(part * rows + r) * s.D + d];
            const int64_t b = r / (s.H * s.Tq), h = r / s.Tq % s.H, i = r % s.Tq;
            write_row(sum, s.D, static_cast<T>(s.scale), row(dq, a.dq_strides, b, i, h));
        }
    }

    // Carves the scratch of each thread, M, and calls key_range(scratch, part, b, kv head) for every work item.
    template <class M, class KeyRange>
    void run_with(const KeyRange& key_range) {
        const int threads = a.execution.threads;
        const auto scratch_size = static_cast<int64_t>(M{}.carve_workspace({}, range, s.D, padded));
        char* scratch;
        const auto carve_workspace = [&](cpu::Arena arena) {
            dq_parts = arena.take<T>(ranges > 1 ? ranges * s.B * s.H * s.Tq * s.D : 0);
            scratch = arena.take<char>(threads * scratch_size);
            return arena.used;
        };
        carve_workspace({static_cast<char*>(cpu::workspace(carve_workspace({})))});
#pragma omp parallel num_threads(threads)
        {
            M m;
            m.carve_workspace({scratch + omp_get_thread_num() * scratch_size}, range, s.D, padded);
#pragma omp for schedule(dynamic, 1)
            for (int64_t item = 0; item < ranges * s.B * s.Hkv; item++)
                key_range(m, item / (s.B * s.Hkv), item / s.Hkv % s.B, item % s.Hkv);
            if (ranges > 1) sum_dq_parts();
        }
    }

    void run() {
        run_with<Scratch<T>>(
            [this](const Scratch<T>& m, int64_t part, int64_t b, int64_t hkv) { key_range(m, part, b, hkv); });
    }
};

// --- products of bfloat16 ---

// The gradients of keys and values are held transposed, dV^T += dO^T P, so that P and dS are packed without a transpose.
constexpr int64_t kStrip16 = 32, kQueryBlock16 = 128;

struct Scratch16 {
    bfloat16 *keys, *values, *key_rows;   // of a range: as B of Q K^T, of dO V^T and of dS K
    float *dk, *dv;                       // (padded, range), transposed
    bfloat16 *queries, *dout;             // of a block of queries, as A of Q K^T and of dO V^T
    bfloat16 *queries_t, *dout_t;         // as A of Q^T dS and of dO^T P
    bfloat16 *p, *ds, *ds_rows;   // (kQueryBlock16, kKeyBlock) as B of dO^T P and of Q^T dS; a strip as A of dS K
    float *scores, *dp, *dq;      // (kStrip16, kKeyBlock) twice; (kQueryBlock16, padded)
    float *lse, *delta, *copy;

    size_t carve_workspace(cpu::Arena arena, int64_t range, int64_t D, int64_t padded) {
        keys = arena.take<bfloat16>(packed_size(range, D));
        values = arena.take<bfloat16>(packed_size(range, D));
        key_rows = arena.take<bfloat16>(packed_size(D, range));
        dk = arena.take<float>(padded * range);
        dv = arena.take<float>(padded * range);
        queries = arena.take<bfloat16>(packed_size(kQueryBlock16, D));
        dout = arena.take<bfloat16>(packed_size(kQueryBlock16, D));
        queries_t = arena.take<bfloat16>(packed_size(D, kQueryBlock16));
        dout_t = arena.take<bfloat16>(packed_size(D, kQueryBlock16));
        p = arena.take<bfloat16>(kQueryBlock16 * kKeyBlock);
        ds = arena.take<bfloat16>(kQueryBlock16 * kKeyBlock);
        ds_rows = arena.take<bfloat16>(kStrip16 * kKeyBlock);
        scores = arena.take<float>(kStrip16 * kKeyBlock);
        dp = arena.take<float>(kStrip16 * kKeyBlock);
        dq = arena.take<float>(kQueryBlock16 * padded);
        lse = arena.take<float>(kQueryBlock16);
        delta = arena.take<float>(kQueryBlock16);
        copy = arena.take<float>(kBlock16 * padded);
        return arena.used;
    }
};

struct Backward16 : Backward<float, bfloat16> {
    static_assert(kKeyBlock % kBlock16Depth == 0);
    const int64_t panel = packed_size(kBlock16, s.D), range_panel = packed_size(kBlock16, range);

    explicit Backward16(const AttentionBackward& a) : Backward<float, bfloat16>{a} {}

    Operand<bfloat16> rows_of(const bfloat16* x, const Strides& strides, int64_t b, int64_t t, int64_t h,
                              Layout layout) const {
        return {row(x, strides, b, t, h), strides.t, layout};
    }

    void load_keys16(const Scratch16& m, int64_t b, int64_t hkv, int64_t origin, int64_t end) const {
        for (int64_t j = 0; j < end - origin; j += kBlock16Depth) {
            const int64_t count = minimum(kBlock16Depth, end - origin - j);
            const auto key = rows_of(k, a.k_strides, b, origin + j, hkv, Layout::rows);
            const auto value = rows_of(v, a.v_strides, b, origin + j, hkv, Layout::rows);
            const auto key_column = rows_of(k, a.k_strides, b, origin + j, hkv, Layout::columns);
            for (int64_t r = 0; r < kBlock16Depth; r += kBlock16) {
                pack<true>(key, r, minimum(kBlock16, count - r), 0, s.D, m.keys + packed_size(j + r, s.D));
                pack<true>(value, r, minimum(kBlock16, count - r), 0, s.D, m.values + packed_size(j + r, s.D));
            }
            for (int64_t d = 0; d < s.D; d += kBlock16)
                pack<true>(key_column, d, minimum(kBlock16, s.D - d), 0, count,
                           m.key_rows + d / kBlock16 * range_panel + j * kBlock16);
        }
        memset(m.dk, 0, padded * range * sizeof(float));
        memset(m.dv, 0, padded * range * sizeof(float));
    }

    void load_queries16(const Scratch16& m, int64_t b, int64_t h, int64_t i0, int64_t count) const {
        pack<false>(rows_of(q, a.q_strides, b, i0, h, Layout::rows), 0, count, 0, s.D, m.queries);
        pack<false>(rows_of(dout, a.dout_strides, b, i0, h, Layout::rows), 0, count, 0, s.D, m.dout);
        pack<false>(rows_of(q, a.q_strides, b, i0, h, Layout::columns), 0, s.D, 0, count, m.queries_t);
        pack<false>(rows_of(dout, a.dout_strides, b, i0, h, Layout::columns), 0, s.D, 0, count, m.dout_t);
        for (int64_t r = 0; r < kQueryBlock16; r++) {
            m.delta[r] = m.lse[r] = 0;
            if (r >= count) continue;
            m.delta[r] = dot(row(out, a.out_strides, b, i0 + r, h), row(dout, a.dout_strides, b, i0 + r, h));
            m.lse[r] = lse[(b * s.H + h) * s.Tq + i0 + r];
        }
    }

    // Queries [i0, i0 + count) against keys [j0, j0 + width) of the range that begins at `origin`.
    void block16(const Scratch16& m, int64_t i0, int64_t count, int64_t j0, int64_t width, int64_t origin) const {
        const Range seen = intersect({j0, j0 + width}, visible_keys(s, i0, count));
        if (seen.begin == seen.end) return;
        const int64_t first = (seen.begin - origin) / kBlock16Depth * kBlock16Depth;   // in the range
        const int64_t columns = round_up(seen.end - origin - first, kBlock16Depth);
        const int64_t depth = round_up(count, kBlock16Depth), depth_panel = depth * kBlock16;
        const int64_t channels = padded / kBlock16, deep = ceil_div(s.D, kBlock16Depth);
        const float scale = static_cast<float>(s.scale);
        for (int64_t r = 0; r < depth; r += kStrip16) {
            const int64_t blocks = ceil_div(minimum(kStrip16, count - r), kBlock16);
            const int64_t query = packed_size(r, s.D), key = packed_size(first, s.D);
            multiply_packed({m.queries + query, panel, m.keys + key, panel, deep}, blocks, columns / kBlock16, m.scores,
                            kKeyBlock, false);
            multiply_packed({m.dout + query, panel, m.values + key, panel, deep}, blocks, columns / kBlock16, m.dp,
                            kKeyBlock, false);
            for (int64_t i = r; i < r + kStrip16; i++) {
                float *p = m.scores + (i - r) * kKeyBlock, *ds = m.dp + (i - r) * kKeyBlock;
                const Range visible = i < count ? visible_keys(s, i0 + i) : Range{0, 0};
                for (int64_t j = 0; j < columns; j += kLanes<float>) {
                    const auto masked = [&](Vec<float> x) {
                        return keep_range<float>(x, origin + first + j, visible.begin, visible.end, 0.0f);
                    };
                    const Vec<float> weight = masked(exp_below(load(p + j) * scale - m.lse[i]));
                    store(p + j, weight);
                    store(ds + j, masked(weight * (load(ds + j) - m.delta[i])));
                }
            }
            for (int64_t j = 0; j < columns; j += kBlock16) {
                const int64_t at = j / kBlock16 * depth_panel + r * kBlock16;
                pack<true>(Operand<float>{m.scores, kKeyBlock, Layout::columns}, j, kBlock16, 0, kStrip16, m.p + at);
                pack<true>(Operand<float>{m.dp, kKeyBlock, Layout::columns}, j, kBlock16, 0, kStrip16, m.ds + at);
            }
            pack<false>(Operand<float>{m.dp, kKeyBlock, Layout::rows}, 0, kStrip16, 0, columns, m.ds_rows);
            multiply_packed(
                {m.ds_rows, columns * kBlock16, m.key_rows + first * kBlock16, range_panel, columns / kBlock16Depth},
                blocks, channels, m.dq + r * padded, padded, true);
        }
        multiply_packed({m.dout_t, depth_panel, m.p, depth_panel, depth / kBlock16Depth}, channels, columns / kBlock16,
                        m.dv + first, range, true);
        multiply_packed({m.queries_t, depth_panel, m.ds, depth_panel, depth / kBlock16Depth}, channels,
                        columns / kBlock16, m.dk + first, range, true);
    }

    void write_transposed(const Scratch16& m, const float* from, int64_t b, int64_t hkv, int64_t origin, int64_t end,
                          float factor, bfloat16* to, const Strides& strides) const {
        for (int64_t j = 0; j < end - origin; j += kBlock16) {
            transpose(padded, kBlock16, from + j, range, m.copy, padded);
            for (int64_t i = 0; i < minimum(kBlock16, end - origin - j); i++)
                write_row(m.copy + i * padded, s.D, factor, row(to, strides, b, origin + j + i, hkv));
        }
    }

    // One work item.
    void key_range16(const Scratch16& m, int64_t part, int64_t b, int64_t hkv) const {
        const TileScope tile_scope;
        const int64_t origin = part * range, keys_end = minimum(s.Tk, origin + range);
        load_keys16(m, b, hkv, origin, keys_end);
        for (int64_t h = hkv * group; h < (hkv + 1) * group; h++)
            for (int64_t i0 = 0; i0 < s.Tq; i0 += kQueryBlock16) {
                const int64_t count = minimum(kQueryBlock16, s.Tq - i0);
                const Range seen = intersect({origin, maximum(origin, keys_end)}, visible_keys(s, i0, count));
                memset(m.dq, 0, kQueryBlock16 * padded * sizeof(float));
                if (seen.begin < seen.end) {
                    load_queries16(m, b, h, i0, count);
                    for (int64_t j = seen.begin / kKeyBlock * kKeyBlock; j < seen.end; j += kKeyBlock)
                        block16(m, i0, count, j, minimum(kKeyBlock, keys_end - j), origin);
                }
                store_dq(m.dq, part, b, h, i0, count);
            }
        write_transposed(m, m.dk, b, hkv, origin, keys_end, static_cast<float>(s.scale), dk, a.dk_strides);
        write_transposed(m, m.dv, b, hkv, origin, keys_end, 1.0f, dv, a.dv_strides);
    }

    void run16() {
        run_with<Scratch16>(
            [this](const Scratch16& m, int64_t part, int64_t b, int64_t hkv) { key_range16(m, part, b, hkv); });
    }
};

}   // namespace

void attention_backward(const AttentionBackward& a) {
    if (a.dtype == DType::float64) return Backward<double, double>{a}.run();
    if (a.dtype == DType::bfloat16) {
        if constexpr (kMultipliesBfloat16)
            return Backward16{a}.run16();
        else
            return Backward<float, bfloat16>{a}.run();
    }
    Backward<float, float>{a}.run();
}

}   // namespace nanochat::NANOCHAT_ISA
