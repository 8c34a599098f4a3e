// Which query sees which key.
#pragma once

#include "../kernels.h"
#include "tiles.cuh"

namespace nanochat::cuda::attention {

struct Range {
    int begin, end;
};

struct AttentionMask {
    int Tq, Tk, window;   // window -1: none
    bool causal;

    // The last key that a query may see if the mask is causal.
    NANOCHAT_ANYWHERE int diagonal(int query) const { return query + Tk - Tq; }

    // The keys that a query sees.
    NANOCHAT_ANYWHERE Range visible_keys(int query) const { return visible_keys(query, query); }

    // The keys that at least one of the queries first .. last sees.
    NANOCHAT_ANYWHERE Range visible_keys(int first, int last) const {
        const int begin = window >= 0 && diagonal(first) > window ? diagonal(first) - window : 0;
        const int end = causal && diagonal(last) + 1 < Tk ? diagonal(last) + 1 : Tk;
        return {begin, end > begin ? end : begin};
    }

    // The queries that see at least one of the keys first .. last.
    NANOCHAT_ANYWHERE Range visible_queries(int first, int last) const {
        const int offset = Tk - Tq;
        const int begin = causal && first > offset ? first - offset : 0;
        const int end = window >= 0 && last - offset + window + 1 < Tq ? last - offset + window + 1 : Tq;
        return {begin, end > begin ? end : begin};
    }

    // The blocks of `size` keys that need no mask: each of the queries first .. last sees all of their keys.
    NANOCHAT_ANYWHERE Range full_blocks(int first, int last, int size) const {
        return {divide_up(visible_keys(last).begin, size), visible_keys(first).end / size};
    }

    // The tiles of `size` rows that need no mask: each of their rows sees all of the keys first .. last.
    NANOCHAT_ANYWHERE Range full_tiles(int first, int last, int heads_per_tile, int size) const {
        return {divide_up(visible_queries(last, last).begin * heads_per_tile, size),
                visible_queries(first, first).end * heads_per_tile / size};
    }
};

inline AttentionMask make_mask(const AttentionShape& s) {
    const bool limited = s.window >= 0 && s.window < s.Tq + s.Tk;   // a wider one hides nothing
    return {static_cast<int>(s.Tq), static_cast<int>(s.Tk), limited ? static_cast<int>(s.window) : -1,
            s.causal || s.window >= 0};
}

// Sets scores[i] to `hidden` where its row does not see its key. The rows of the accumulator are `row` and row + 8 of a
// head group; its columns are keys, and `first_key` is the first key of the lane.
template <int count, class Heads>
NANOCHAT_DEVICE void mask_scores(float (&scores)[count], const AttentionMask& mask, int first_key, Heads heads_per_tile,
                                 int row, float hidden) {
    const Range visible[2] = {mask.visible_keys(row / heads_per_tile), mask.visible_keys((row + 8) / heads_per_tile)};
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const int key = first_key + i / 4 * 8 + i % 2;
        const Range& range = visible[i / 2 % 2];
        if (key < range.begin || key >= range.end) scores[i] = hidden;
    }
}

// Sets p[i] to zero where its row does not see its key. The rows of the accumulator are the keys `key` and key + 8; its
// columns are rows of a head group, and `first_row` is the first row of the lane. No row sees a key that does not exist.
template <int count>
NANOCHAT_DEVICE void mask_scores_transposed(float (&p)[count], const AttentionMask& mask, int first_row,
                                            int heads_per_tile, int key) {
    Range visible[2];   // the rows that see each key, counted from first_row
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int own = key + 8 * h;
        const Range queries = own < mask.Tk ? mask.visible_queries(own, own) : Range{0, 0};
        visible[h] = {queries.begin * heads_per_tile - first_row, queries.end * heads_per_tile - first_row};
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const int row = i / 4 * 8 + i % 2;
        const Range& range = visible[i / 2 % 2];
        if (row < range.begin || row >= range.end) p[i] = 0;
    }
}

}   // namespace nanochat::cuda::attention
