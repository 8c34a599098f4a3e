// What the attention kernels have in common: who sees whom, the order of the work, products of a warp, and the
// online softmax (FlashAttention-2, arXiv:2307.08691).
//
// Heads that share a key/value head are packed: rows of a tile are (query, head of the group), head fastest, so that a
// group's heads share every load of keys and values. A unit is what a tile belongs to: a batch and `pack` heads.
//
// Letters as in kernels.h; a row is one of the Tq * pack of a unit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../check.h"
#include "../kernels.h"
#include "tiles.cuh"

namespace nanochat::cuda::attention {

using device::exp2_approx;

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// --- who sees whom ---

struct Span {
    int begin, end;
};

struct Sight {
    int Tq, Tk, window;   // window -1: none
    bool causal;

    // The newest key that a query may see, where causal.
    NANOCHAT_ANYWHERE int newest(int query) const { return query + Tk - Tq; }

    // Keys that query sees.
    NANOCHAT_ANYWHERE Span keys(int query) const { return keys(query, query); }

    // Keys that one of the queries first .. last sees.
    NANOCHAT_ANYWHERE Span keys(int first, int last) const {
        const int begin = window >= 0 && newest(first) > window ? newest(first) - window : 0;
        const int end = causal && newest(last) + 1 < Tk ? newest(last) + 1 : Tk;
        return {begin, end > begin ? end : begin};
    }

    // Queries that see one of the keys first .. last.
    NANOCHAT_ANYWHERE Span queries(int first, int last) const {
        const int offset = Tk - Tq;
        const int begin = causal && first > offset ? first - offset : 0;
        const int end = window >= 0 && last - offset + window + 1 < Tq ? last - offset + window + 1 : Tq;
        return {begin, end > begin ? end : begin};
    }

    // Blocks of `size` keys of which each of the queries first .. last sees all.
    NANOCHAT_ANYWHERE Span full_blocks(int first, int last, int size) const {
        return {divide_up(keys(last).begin, size), keys(first).end / size};
    }

    // Tiles of `size` rows, `pack` a query, each of which sees all of the keys first .. last.
    NANOCHAT_ANYWHERE Span full_tiles(int first, int last, int pack, int size) const {
        return {divide_up(queries(last, last).begin * pack, size), queries(first, first).end * pack / size};
    }
};

inline Sight sight_of(const AttentionShape& s) {
    const bool limited = s.window >= 0 && s.window < s.Tq + s.Tk;   // a wider one hides nothing
    return {static_cast<int>(s.Tq), static_cast<int>(s.Tk), limited ? static_cast<int>(s.window) : -1,
            s.causal || s.window >= 0};
}

// --- the order of the work ---

struct Place {
    int tile, unit;
};

// Item -> place. Tiles in one order for all units, those with most work first; units in sections, whose keys and values
// stay in the L2 cache while the section's tiles pass over them.
struct Order {
    int tiles, units, section;
    bool last_first;

    NANOCHAT_ANYWHERE int items() const { return tiles * units; }
    NANOCHAT_ANYWHERE Place operator()(int item) const {
        const int first = item / (section * tiles) * section, rest = item - first * tiles;
        const int width = units - first < section ? units - first : section, tile = rest / width;
        return {last_first ? tiles - 1 - tile : tile, first + rest - tile * width};
    }
};

constexpr int64_t kSectionBytes = int64_t{24} << 20;   // half of an H100's L2

inline Order order_of(int tiles, int units, int64_t unit_bytes, bool last_first) {
    const int64_t section = std::max<int64_t>(1, kSectionBytes / std::max<int64_t>(1, unit_bytes));
    return {tiles, units, static_cast<int>(std::min<int64_t>(section, std::max(1, units))), last_first};
}

// --- rows of a unit ---

// Of a (B, T, H, D) tensor: row r is query r / pack of head r % pack of the unit.
template <class T>
struct PackedRows {
    T* base;
    int64_t t, h;
    int pack;

    NANOCHAT_DEVICE T* operator()(int row) const {
        const int query = row / pack;
        return base + query * t + (row - query * pack) * h;
    }
};

struct Unit {
    int batch, head, kv_head;   // head: the first
};

NANOCHAT_ANYWHERE Unit unit_of(int unit, int H, int Hkv, int pack) {
    const int units_a_batch = H / pack, batch = unit / units_a_batch, head = (unit - batch * units_a_batch) * pack;
    return {batch, head, head / (H / Hkv)};
}

template <class T>
NANOCHAT_DEVICE PackedRows<T> packed_rows(T* tensor, const Strides& strides, const Unit& unit, int pack) {
    return {tensor + unit.batch * strides.b + unit.head * strides.h, strides.t, strides.h, pack};
}

// Where a row of a unit stands in (B, H, Tq); `a` has sight, pack and H.
template <class Arguments>
NANOCHAT_DEVICE int64_t row_index(const Arguments& a, const Unit& unit, int row) {
    const int query = row / a.pack, head = unit.head + row - query * a.pack;
    return (static_cast<int64_t>(unit.batch) * a.H + head) * a.sight.Tq + query;
}

// A tile of rows of one unit; `a` has order, sight, pack, H and Hkv.
struct RowTile {
    Unit unit;
    int number;         // of the unit
    int first, count;   // the first row, and how many of the tile's rows exist
    int all;            // rows of the unit

    NANOCHAT_DEVICE int query(int row, int pack) const { return (first + row) / pack; }
};

template <class Arguments>
NANOCHAT_DEVICE RowTile row_tile(const Arguments& a, const Order& order, int rows, int item) {
    const Place place = order(item);
    const int first = place.tile * rows, all = a.sight.Tq * a.pack;
    return {unit_of(place.unit, a.H, a.Hkv, a.pack), place.unit, first, min(rows, all - first), all};
}

// The blocks of `size` keys that one of the tile's rows sees something of.
NANOCHAT_DEVICE Span blocks_of(const RowTile& tile, const Sight& sight, int pack, int size) {
    const Span seen = sight.keys(tile.query(0, pack), tile.query(tile.count - 1, pack));
    return {seen.begin / size, divide_up(seen.end, size)};
}

// --- products of a warp ---

// The accumulator's columns 16 k to 16 k + 15 as a left operand.
template <class T, int count>
NANOCHAT_DEVICE void to_left(uint32_t (&a)[4], const float (&d)[count], int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = device::pack<T>(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
}

// scores = left rows times all rows of `right`, over D.
template <class T, int D, int count, int fragments, class Left, class Right>
NANOCHAT_DEVICE void multiply(float (&scores)[fragments][count], const Left& left_rows, const Right& right_rows) {
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
#pragma unroll
        for (int i = 0; i < count; ++i) scores[f][i] = 0;
    }
#pragma unroll 2   // all of it at once takes registers for loads far ahead
    for (int d = 0; d < D / 16; ++d) {
        uint32_t left[fragments][4];
#pragma unroll
        for (int f = 0; f < fragments; ++f) device::ldmatrix_x4(left[f], left_rows(2 * d, 16 * f));
#pragma unroll
        for (int n = 0; n < count / 4; n += 2) {
            uint32_t right[4];
            device::ldmatrix_x4(right, right_rows(2 * d, 8 * n));
#pragma unroll
            for (int f = 0; f < fragments; ++f) {
                device::mma_m16n8k16<T>(fragment(scores[f], n), left[f], {right[0], right[1]});
                device::mma_m16n8k16<T>(fragment(scores[f], n + 1), left[f], {right[2], right[3]});
            }
        }
    }
}

// sums += weights, rounded to T, times the tile that `right_rows` reads transposed.
template <class T, int D, int count, int fragments, class Right>
NANOCHAT_DEVICE void add_product(float (&sums)[fragments][D / 2], const float (&weights)[fragments][count],
                                 const Right& right_rows) {
#pragma unroll
    for (int s = 0; s < count / 8; ++s) {
        uint32_t left[fragments][4];
#pragma unroll
        for (int f = 0; f < fragments; ++f) to_left<T>(left[f], weights[f], s);
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t right[4];
            device::ldmatrix_x4_trans(right, right_rows(n, 16 * s));
#pragma unroll
            for (int f = 0; f < fragments; ++f) {
                device::mma_m16n8k16<T>(fragment(sums[f], n), left[f], {right[0], right[1]});
                device::mma_m16n8k16<T>(fragment(sums[f], n + 1), left[f], {right[2], right[3]});
            }
        }
    }
}

// --- the online softmax ---

// Two rows of a thread, g and g + 8 of a warp's 16 with g = lane / 4, as accumulators hold them. Scores count in units
// of 1 / scale, scale > 0, and exponents are of 2.
struct Softmax {
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};

    // Turns scores into weights; shrink: what earlier sums are to be multiplied by.
    template <int count>
    NANOCHAT_DEVICE void step(float (&scores)[count], float scale, float (&shrink)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float highest = top[h];
#pragma unroll
            for (int i = 0; i < count; i += 4) {
                highest = fmaxf(highest, fmaxf(scores[i + 2 * h], scores[i + 2 * h + 1]));
            }
            highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFF, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xFFFFFFFF, highest, 2));
            const float reference = highest == -INFINITY ? 0 : highest * scale;
            shrink[h] = exp2_approx(top[h] * scale - reference);
            top[h] = highest;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < count; i += 4) {
#pragma unroll
                for (int j = i + 2 * h; j < i + 2 * h + 2; ++j) {
                    scores[j] = exp2_approx(fmaf(scores[j], scale, -reference));
                    sum += scores[j];
                }
            }
            total[h] = total[h] * shrink[h] + sum;
        }
    }

    // Once all keys have passed. inverse: the factor of what was summed; lse: base 2.
    NANOCHAT_DEVICE void finish(float scale, float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            total[h] += __shfl_xor_sync(0xFFFFFFFF, total[h], 1);
            total[h] += __shfl_xor_sync(0xFFFFFFFF, total[h], 2);
            inverse[h] = total[h] == 0 ? 0 : 1 / total[h];   // no key was seen; a NaN stays one
            lse[h] = total[h] == 0 ? -INFINITY : top[h] * scale + log2f(total[h]);
        }
    }
};

// Multiplies an accumulator's rows.
template <int count>
NANOCHAT_DEVICE void scale_rows(float (&d)[count], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < count; ++i) d[i] *= factor[i / 2 % 2];
}

// Hides scores[i] of the keys that its row does not see: an accumulator whose rows are rows of a unit, `row` and row +
// 8, and whose columns are keys, the lane's first being `first_key`.
template <int count>
NANOCHAT_DEVICE void hide_keys(float (&scores)[count], const Sight& sight, int first_key, int pack, int row,
                               float hidden) {
    const Span visible[2] = {sight.keys(row / pack), sight.keys((row + 8) / pack)};
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const int key = first_key + i / 4 * 8 + i % 2;
        const Span& span = visible[i / 2 % 2];
        if (key < span.begin || key >= span.end) scores[i] = hidden;
    }
}

// The scale of the softmax, base 2. A negative one counts as positive scores of the opposite sign; none at all is the
// smallest, so that a hidden score stays minus infinity.
struct Scale {
    float size;
    bool negative;
};
inline Scale scale_of(double scale) {
    const auto size = static_cast<float>(std::abs(scale) / std::log(2.0));
    return {std::max(size, 1.17549435e-38f), scale < 0};
}

// --- the host's side ---

// Of the kernels that take D.
constexpr int tile_columns(int64_t D) { return D <= 64 ? 64 : D <= 96 ? 96 : 128; }

// Positions, rows and blocks are counted in 32 bits.
inline void require_shape(const char* op, const AttentionShape& s) {
    require(s.D >= 8 && s.D <= 128 && s.D % 8 == 0, op, ": D is ", s.D, "; takes a multiple of 8 up to 128");
    require((s.Tq + s.Tk) * (s.H / s.Hkv) < 1 << 30 && s.B * s.H < 1 << 30 &&
                s.B * s.H * ((s.Tq + s.Tk) / 64 + 2) < INT32_MAX,
            op, ": B is ", s.B, ", H ", s.H, ", Tq ", s.Tq, ", Tk ", s.Tk, "; takes fewer than 2^31 tiles of 64 rows");
}

namespace hopper {
void forward(const AttentionForward&);
}

}   // namespace nanochat::cuda::attention
