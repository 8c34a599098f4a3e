// Every tile configuration of attention and its choice, a line each. tests/emulation/test_ptxas.py checks that each fits
// the registers. D is the D of the kernel: tile_columns() of the D that was given.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.cuh"
#include "hopper.cuh"

namespace nanochat::cuda::attention {

// --- mma.sync: four warps, 16 rows each, or 32 with two fragments, which halves the reads from shared memory ---

constexpr int kWarps = 4, kThreads = 32 * kWarps;

// blocks: the number that share a multiprocessor, which limits the registers per thread.
template <int D_, int rows_, int keys_, int blocks_>
struct ForwardTile {
    static constexpr int D = D_, rows = rows_, keys = keys_, blocks = blocks_, fragments = rows / (16 * kWarps);
    static constexpr int q_bytes = tile_bytes<D>(rows), k_bytes = tile_bytes<D>(keys), stage_bytes = 2 * k_bytes;
    static constexpr int shared_bytes = 1024 + q_bytes + 2 * stage_bytes;
    static_assert(shared_bytes <= kLeastSharedBytes);
};

// dK, dV: a block of threads owns keys and passes over rows.
template <int D_, int fragments_, int rows_>
struct KeyTile {
    static constexpr int D = D_, fragments = fragments_, keys = 16 * kWarps * fragments, rows = rows_;
    static constexpr int k_bytes = tile_bytes<D>(keys), q_bytes = tile_bytes<D>(rows), stage_bytes = 2 * q_bytes;
    static constexpr int row_numbers = 2 * rows;   // log-sum-exp and delta
    static constexpr int shared_bytes = 1024 + 2 * k_bytes + 2 * stage_bytes + 2 * row_numbers * 4;
    static_assert(shared_bytes <= kLeastSharedBytes);
};

// dQ: a block of threads owns rows and passes over keys.
template <int D_, int fragments_, int keys_>
struct QueryTile {
    static constexpr int D = D_, fragments = fragments_, rows = 16 * kWarps * fragments, keys = keys_;
    static constexpr int q_bytes = tile_bytes<D>(rows), k_bytes = tile_bytes<D>(keys), stage_bytes = 2 * k_bytes;
    static constexpr int shared_bytes = 1024 + 2 * q_bytes + 2 * stage_bytes;
    static_assert(shared_bytes <= kLeastSharedBytes);
};

// 128 rows: as many keys as the 255 registers of a thread can hold scores of, beside the sums. 64 rows, for a step of
// generation: as many keys as keep 64 KB of loads in flight in the blocks of a multiprocessor.
template <class Use>
void choose_forward(int D, int rows, const Use& use) {
    if (rows == 128 && D == 64) return use(ForwardTile<64, 128, 64, 2>());
    if (rows == 128 && D == 96) return use(ForwardTile<96, 128, 32, 2>());
    if (rows == 128) return use(ForwardTile<128, 128, 32, 2>());
    if (D == 64) return use(ForwardTile<64, 64, 64, 3>());
    if (D == 96) return use(ForwardTile<96, 64, 64, 2>());
    return use(ForwardTile<128, 64, 64, 2>());
}

// The largest tiles that fit the registers and the 99 KB of shared memory of GeForce GPUs. If D leaves no room for two
// fragments, the tile that passes by is larger.
template <class Use>
void choose_backward(int D, const Use& use) {
    if (D == 64) return use(KeyTile<64, 2, 32>(), QueryTile<64, 2, 64>());
    if (D == 96) return use(KeyTile<96, 1, 64>(), QueryTile<96, 2, 32>());
    return use(KeyTile<128, 1, 64>(), QueryTile<128, 2, 32>());
}

// --- Hopper: a producer, and consumers with 64 rows or keys each ---

namespace hopper {

constexpr int kDqRows = 64;   // of a tile of dQ, which one product makes

template <int D_, int consumers_, int keys_>
struct ForwardTile : WarpgroupConfig<consumers_> {
    static constexpr int D = D_, rows = kGroupRows * consumers_, keys = keys_, stages = 256 / keys;
    static constexpr int q_stages = 2;   // the next queries land while rows of this tile are computed
    static constexpr int group_bytes = tile_bytes<D>(kGroupRows), k_bytes = tile_bytes<D>(keys);
    static constexpr int tiles_bytes = (q_stages + 1) * consumers_ * group_bytes +
                                       2 * stages * k_bytes;   // Q and O, K and V
    static constexpr int shared_bytes = 1024 + tiles_bytes + ring_bytes(q_stages) + 2 * ring_bytes(stages);
};

// A block owns keys and passes over tiles of rows, for dK, dV and dQ. Besides K, V, Q and dO there are dK or dV, two
// buffers of dS, and dQ in float32.
template <int D_, int stages_>
struct BackwardTile : WarpgroupConfig<2> {
    static constexpr int D = D_, keys = kGroupRows * consumers, rows = kDqRows, stages = stages_;
    static constexpr int group_bytes = tile_bytes<D>(kGroupRows), k_bytes = tile_bytes<D>(keys);
    static constexpr int q_bytes = tile_bytes<D>(rows), number_bytes = rows * 4;   // of log-sum-exp or delta
    static constexpr int ds_bytes = tile_bytes<rows>(keys), dq_bytes = 2 * q_bytes;
    static constexpr int tiles_bytes = 3 * k_bytes + 2 * ds_bytes + dq_bytes + 2 * stages * (q_bytes + number_bytes);
    static constexpr int item_bytes = 2 * 16;
    static constexpr int shared_bytes = 1024 + tiles_bytes + item_bytes + ring_bytes(4) + 2 * ring_bytes(stages);
    static_assert(shared_bytes <= 227 << 10);
};

// The keys that a query sees, about, in the mean.
inline int64_t keys_seen(const AttentionShape& s) {
    const bool causal = s.causal || s.window >= 0;
    const int64_t seen = !causal ? s.Tk : s.Tq < s.Tk ? s.Tk - s.Tq / 2 : s.Tk / 2;
    return s.window >= 0 ? std::min(seen, s.window) : seen;
}

constexpr int kFewKeys = 256, kManyKeys = 2048, kManyTiles = 8;   // the tiles: for each multiprocessor

// By the estimates of tests/emulation/budget.py. Where a query sees few keys, blocks are small, as hidden keys of a block
// cost as much as others. D 64 leaves room for a third consumer, whose products hide more of the softmax; but its tiles
// have more hidden keys, and must be many, or they do not spread over the multiprocessors evenly. D 128: scores, sums and
// weights take 160 of 240 registers.
template <class Use>
void choose_forward(const AttentionShape& s, const Device& device, const Use& use) {
    const int D = tile_columns(s.D);
    const int64_t seen = keys_seen(s);
    if (seen <= kFewKeys) {
        if (D == 64) return use(ForwardTile<64, 2, 64>());
        if (D == 96) return use(ForwardTile<96, 2, 64>());
        return use(ForwardTile<128, 2, 64>());
    }
    using Large = ForwardTile<64, 3, 128>;
    const bool many_tiles = s.B * s.H * s.Tq >= int64_t{kManyTiles} * Large::rows * device.multiprocessors;
    if (D == 64 && seen >= kManyKeys && many_tiles) return use(Large());
    if (D == 64) return use(ForwardTile<64, 2, 128>());
    if (D == 96) return use(ForwardTile<96, 2, 128>());
    return use(ForwardTile<128, 2, 128>());
}

// The sums of dK and dV and two tiles of 64 x 64 scores leave no registers for more rows at D 128. At D 96, half of the
// columns of K are no whole panels, so that D 128 serves it.
constexpr int backward_columns(int64_t D) { return D <= 64 ? 64 : 128; }
template <class Use>
void choose_backward(int D, const Use& use) {
    if (backward_columns(D) == 64) return use(BackwardTile<64, 3>());
    return use(BackwardTile<128, 2>());
}

}   // namespace hopper

// Returns how many heads a head group has: all that share a key/value head. A tensor copy loads the rows of a warpgroup,
// so that it takes all of these heads or one.
inline int choose_heads_per_tile(const AttentionShape& s, bool tensor_copies) {
    const int group = static_cast<int>(s.H / s.Hkv);
    return tensor_copies && kGroupRows % group ? 1 : group;
}

}   // namespace nanochat::cuda::attention
