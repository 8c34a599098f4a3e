// Query heads that share a key/value head are packed into one tile. The rows of a tile are (query, head of the group),
// head fastest, so that the heads share every load of keys and values. A head group is a batch and `heads_per_tile`
// heads of it; it has Tq * heads_per_tile rows: row r is query r / heads_per_tile of head r % heads_per_tile.
#pragma once

#include "attention_mask.cuh"
#include "attention_scheduler.cuh"

namespace nanochat::cuda::attention {

// The number of heads of a group where it is a power of two: rows are divided by a shift.
struct PowerOfTwo {
    int shift;

    NANOCHAT_ANYWHERE operator int() const { return 1 << shift; }
    NANOCHAT_ANYWHERE friend int operator/(int a, PowerOfTwo b) { return a >> b.shift; }
    NANOCHAT_ANYWHERE friend int operator*(int a, PowerOfTwo b) { return a << b.shift; }
};

// The rows of a head group in a (B, T, H, D) tensor.
template <class T>
struct PackedRows {
    T* base;
    int64_t t, h;
    int heads_per_tile;

    NANOCHAT_DEVICE T* operator()(int row) const {
        const int query = row / heads_per_tile;
        return base + query * t + (row - query * heads_per_tile) * h;
    }
};

struct HeadGroup {
    int batch, head, kv_head;   // head: the first head of the group
};

NANOCHAT_ANYWHERE HeadGroup make_head_group(int head_group, int H, int Hkv, int heads_per_tile) {
    const int per_batch = H / heads_per_tile, batch = head_group / per_batch;
    const int head = (head_group - batch * per_batch) * heads_per_tile;
    return {batch, head, head / (H / Hkv)};
}

template <class T>
NANOCHAT_DEVICE PackedRows<T> packed_rows(T* tensor, const Strides& strides, const HeadGroup& head_group,
                                          int heads_per_tile) {
    return {tensor + head_group.batch * strides.b + head_group.head * strides.h, strides.t, strides.h, heads_per_tile};
}

// The index of a row in a (B, H, Tq) array. `a` has mask, heads_per_tile and H.
template <class Arguments>
NANOCHAT_DEVICE int64_t row_index(const Arguments& a, const HeadGroup& head_group, int row) {
    const int query = row / a.heads_per_tile, head = head_group.head + row - query * a.heads_per_tile;
    return (static_cast<int64_t>(head_group.batch) * a.H + head) * a.mask.Tq + query;
}

// A tile of rows of one head group.
struct RowTile {
    HeadGroup head_group;
    int head_group_index;
    int first, count;   // the first row, and the number of the tile's rows that exist
    int row_count;      // of the head group

    template <class Heads>
    NANOCHAT_DEVICE int query(int row, Heads heads_per_tile) const {
        return (first + row) / heads_per_tile;
    }

    // Up to `rows` rows of the tile from row `begin` on. There may be none: count is then not positive.
    NANOCHAT_DEVICE RowTile part(int begin, int rows) const {
        return {head_group, head_group_index, first + begin, min(rows, count - begin), row_count};
    }
};

// `a` has mask, heads_per_tile, H and Hkv.
template <class Arguments>
NANOCHAT_DEVICE RowTile row_tile(const Arguments& a, const TileScheduler& scheduler, int rows, int item) {
    const TileCoord coord = scheduler.coord(item);
    const int first = coord.tile * rows, row_count = a.mask.Tq * a.heads_per_tile;
    return {make_head_group(coord.head_group, a.H, a.Hkv, a.heads_per_tile), coord.head_group, first,
            min(rows, row_count - first), row_count};
}

// The blocks of `size` keys of which at least one of the tile's rows sees a key.
template <class Heads>
NANOCHAT_DEVICE Range visible_key_blocks(const RowTile& tile, const AttentionMask& mask, Heads heads_per_tile,
                                         int size) {
    const Range seen = mask.visible_keys(tile.query(0, heads_per_tile), tile.query(tile.count - 1, heads_per_tile));
    return {seen.begin / size, divide_up(seen.end, size)};
}

}   // namespace nanochat::cuda::attention
