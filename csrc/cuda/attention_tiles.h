// Every tile configuration of attention and its choice, a line each. tests/emulation/test_ptxas.py checks that each fits
// the registers. D is the D of the kernel: tile_columns() of the D that was given.
#pragma once

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
};

// dK, dV: a block of threads owns keys and passes over rows.
template <int D_, int fragments_, int rows_>
struct KeyTile {
    static constexpr int D = D_, fragments = fragments_, keys = 16 * kWarps * fragments, rows = rows_;
    static constexpr int k_bytes = tile_bytes<D>(keys), q_bytes = tile_bytes<D>(rows), stage_bytes = 2 * q_bytes;
    static constexpr int row_numbers = 2 * rows;   // log-sum-exp and delta
    static constexpr int shared_bytes = 1024 + 2 * k_bytes + 2 * stage_bytes + 2 * row_numbers * 4;
};

// dQ: a block of threads owns rows and passes over keys.
template <int D_, int fragments_, int keys_>
struct QueryTile {
    static constexpr int D = D_, fragments = fragments_, rows = 16 * kWarps * fragments, keys = keys_;
    static constexpr int q_bytes = tile_bytes<D>(rows), k_bytes = tile_bytes<D>(keys), stage_bytes = 2 * k_bytes;
    static constexpr int shared_bytes = 1024 + 2 * q_bytes + 2 * stage_bytes;
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

template <int D_, int consumers_, int keys_>
struct ForwardTile : WarpgroupConfig<consumers_> {
    static constexpr int D = D_, rows = kGroupRows * consumers_, keys = keys_, stages = 2;
    static constexpr int group_bytes = tile_bytes<D>(kGroupRows), k_bytes = tile_bytes<D>(keys);
    static constexpr int tiles_bytes = 2 * consumers_ * group_bytes + 2 * stages * k_bytes;   // Q and O, K and V
    static constexpr int shared_bytes = 1024 + tiles_bytes + ring_bytes(1) + 2 * ring_bytes(stages);
};

template <int D_, int rows_, int stages_>
struct KeyTile : WarpgroupConfig<2> {
    static constexpr int D = D_, keys = kGroupRows * consumers, rows = rows_, stages = stages_;
    static constexpr int group_bytes = tile_bytes<D>(kGroupRows), q_bytes = tile_bytes<D>(rows);
    static constexpr int number_bytes = rows * 4;   // of log-sum-exp or delta
    static constexpr int tiles_bytes = 3 * consumers * group_bytes + 2 * stages * (q_bytes + number_bytes);
    static constexpr int shared_bytes = 1024 + tiles_bytes + ring_bytes(1) + 2 * ring_bytes(stages);
};

template <int D_, int keys_>
struct QueryTile : WarpgroupConfig<2> {
    static constexpr int D = D_, rows = kGroupRows * consumers, keys = keys_, stages = 2;
    static constexpr int group_bytes = tile_bytes<D>(kGroupRows), k_bytes = tile_bytes<D>(keys);
    static constexpr int tiles_bytes = 3 * consumers * group_bytes + 2 * stages * k_bytes;
    static constexpr int shared_bytes = 1024 + tiles_bytes + ring_bytes(1) + 2 * ring_bytes(stages);
};

// D 128: scores, sums and weights take 160 of 240 registers. D 64 leaves room for a third consumer, whose products hide
// more of the softmax.
template <class Use>
void choose_forward(int D, const Use& use) {
    if (D == 64) return use(ForwardTile<64, 3, 128>());
    if (D == 96) return use(ForwardTile<96, 2, 128>());
    return use(ForwardTile<128, 2, 128>());
}

// dK, dV: two sums and two scores; with 128 rows those of D 64 spill, those of D 128 do not fit. dQ: one sum less.
template <class Use>
void choose_backward(int D, const Use& use) {
    if (D == 64) return use(KeyTile<64, 64, 3>(), QueryTile<64, 128>());
    if (D == 96) return use(KeyTile<96, 64, 3>(), QueryTile<96, 128>());
    return use(KeyTile<128, 64, 3>(), QueryTile<128, 128>());
}

}   // namespace hopper

// Returns how many heads a head group has: all that share a key/value head. A tensor copy loads the rows of a warpgroup,
// so that it takes all of these heads or one.
inline int choose_heads_per_tile(const AttentionShape& s, bool tensor_copies) {
    const int group = static_cast<int>(s.H / s.Hkv);
    return tensor_copies && kGroupRows % group ? 1 : group;
}

}   // namespace nanochat::cuda::attention
