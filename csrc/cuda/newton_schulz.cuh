// Shared by the products of Newton-Schulz: D = alpha A B + beta S + gamma T on a batch of matrices, with 16-bit elements
// and float32 sums, and what becomes of the result.
//
// In scratch memory a row is a whole number of 16-byte chunks, and the elements beyond a matrix's last column are zero.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../check.h"
#include "../kernels.h"
#include "muon.cuh"
#include "packs.cuh"
#include "tiles.cuh"

namespace nanochat::cuda::newton_schulz_kernels {

using device::Major;

// A tile of D is multiplied in steps of kDepth along K. With mma.sync it has kTile rows and columns.
constexpr int kTile = 128, kDepth = 64;
constexpr int kStripColumns = 64;   // of a strip, the 16 rows that a warp writes at a time

constexpr int64_t kChunk = 8;   // elements in 16 bytes
inline int64_t pitch_of(int64_t columns) { return (columns + kChunk - 1) / kChunk * kChunk; }

// A batch of matrices of rows x columns, one after another in memory.
struct Matrices {
    void* data;
    int rows, columns, pitch;

    NANOCHAT_ANYWHERE int64_t size() const { return int64_t{rows} * pitch; }
};

// Major::k: the rows in memory are the rows of A, or the columns of B. Major::mn: they are steps along K.
struct Product {
    Matrices a, b, d;
    Major a_major, b_major;
    bool symmetric;      // whether D is symmetric: its lower half is then computed and mirrored
    const void *s, *t;   // (rows, columns) with the pitch of D, or null
    float alpha, beta, gamma;
    int count, m, n, k;
};

// Epilogue of the last product: writes D to `out`, or updates the params of a Muon update and their copies.
struct OutputEpilogue {
    float* out;
    DType param_dtype;
    UpdateRates rates;
    void* params[kMostMatrices];
    void* copies[kMostMatrices];   // null: none
};
struct ScratchEpilogue {};     // writes the whole of D to scratch memory
struct SymmetricEpilogue {};   // writes the lower half of D and its mirror image

// The matrix that a tile belongs to, and its first row and column.
struct TileCoord {
    int matrix, row, column;
};

// --- epilogues ---

template <class T>
NANOCHAT_DEVICE float low(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
NANOCHAT_DEVICE float high(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// The output takes a warp's strips from shared memory, as float32: there a lane has four elements of a row, and all strips
// are in one loop. A strip has 16 rows. The chunks of four elements are permuted, so that stage_floats has no bank conflicts.
constexpr int kFloatRowBytes = 4 * kStripColumns, kFloatStripBytes = 16 * kFloatRowBytes;

NANOCHAT_DEVICE int float_chunk_place(int row, int chunk) {
    return row * kFloatRowBytes + 16 * (chunk ^ 2 * (row % 4));
}

NANOCHAT_DEVICE void stage_floats(unsigned char* strip, const float (&sums)[kStripColumns / 2]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kStripColumns / 8; ++n) {
        unsigned char* const to = strip + float_chunk_place(g, 2 * n) + 8 * t;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            Pack<float, 2> pair;
            set_pair(pair, 0, sums[4 * n + 2 * h], sums[4 * n + 2 * h + 1]);
            *reinterpret_cast<Pack<float, 2>*>(to + 8 * h * kFloatRowBytes) = pair;
        }
    }
}

// A strip that is staged, and its place in the matrix.
struct StagedStrip {
    const unsigned char* floats;
    int row, column;
};

// What becomes of four elements of a row. `place` is the index of the first one in the matrix.
struct Floats {
    struct Loaded {};
    float* out;
    bool aligned;

    NANOCHAT_DEVICE Loaded load(int64_t, int64_t) const { return {}; }
    NANOCHAT_DEVICE void write(int64_t place, int64_t count, const Loaded&, const Pack<float, 4>& sums) const {
        store(out + place, sums, count, aligned);
    }
};

template <class P>
struct Params {
    using Loaded = Pack<P, 4>;
    P* params;
    bfloat16* copy;   // null: none
    Rates rates;
    bool aligned;

    NANOCHAT_DEVICE Loaded load(int64_t place, int64_t count) const {
        return cuda::load<4>(params + place, count, aligned);
    }
    NANOCHAT_DEVICE void write(int64_t place, int64_t count, Loaded pack, const Pack<float, 4>& sums) const {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            set_pair(pack, i, updated(element(pack, i), element(sums, i), rates),
                     updated(element(pack, i + 1), element(sums, i + 1), rates));
        }
        store(params + place, pack, count, aligned);
        store_copy(copy, place, pack, count, aligned);
    }
};

// Writes the strips strip_of(0) to strip_of(strips - 1) of a warp, and calls done(i) once strip i has been read.
template <class Target, class StripOf, class Done>
NANOCHAT_DEVICE void write_strips(const Product& p, const Target& target, int strips, const StripOf& strip_of,
                                  const Done& done) {
    constexpr int kRows = 2, kTurns = 16 / kRows;   // rows that a warp writes at a time
    const int lane = threadIdx.x % 32, r = lane / (32 / kRows), chunk = lane % (32 / kRows);
    const auto place = [&](const StagedStrip& strip, int turn) {
        return int64_t{strip.row + r + kRows * turn} * p.n + strip.column + 4 * chunk;
    };
    const auto write = [&](const StagedStrip& strip, int turn, int64_t count, const typename Target::Loaded& loaded) {
        const unsigned char* const from = strip.floats + float_chunk_place(r + kRows * turn, chunk);
        target.write(place(strip, turn), count, loaded, load<4>(reinterpret_cast<const float*>(from)));
    };
    const StagedStrip first = strip_of(0), last = strip_of(strips - 1);
    const bool inside = last.row + 16 <= p.m && last.column + kStripColumns <= p.n;
    if (target.aligned && inside) {
        typename Target::Loaded loaded[kTurns], next[kTurns];
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) next[turn] = target.load(place(first, turn), 4);
#pragma unroll 1
        for (int i = 0; i < strips; ++i) {
            const StagedStrip strip = strip_of(i), following = strip_of(i + 1);
#pragma unroll
            for (int turn = 0; turn < kTurns; ++turn) loaded[turn] = next[turn];
            if (i + 1 < strips) {
#pragma unroll
                for (int turn = 0; turn < kTurns; ++turn) next[turn] = target.load(place(following, turn), 4);
            }
#pragma unroll
            for (int turn = 0; turn < kTurns; ++turn) write(strip, turn, 4, loaded[turn]);
            done(i);
        }
        return;
    }
#pragma unroll 1
    for (int i = 0; i < strips; ++i) {
        const StagedStrip strip = strip_of(i);
#pragma unroll 1
        for (int turn = 0; turn < kTurns; ++turn) {
            const bool exists = strip.row + r + kRows * turn < p.m;
            const int64_t count = exists ? p.n - strip.column - 4 * chunk : 0;
            write(strip, turn, count, target.load(place(strip, turn), count));
        }
        done(i);
    }
}

template <class StripOf, class Done>
NANOCHAT_DEVICE void write_output(const Product& p, const OutputEpilogue& output, int matrix, int strips,
                                  const StripOf& strip_of, const Done& done) {
    const bool whole = p.n % 4 == 0;
    if (output.out) {
        return write_strips(p, Floats{output.out + int64_t{matrix} * p.m * p.n, whole}, strips, strip_of, done);
    }
    const Rates rates = rates_of(output.rates);
    bfloat16* const copy = static_cast<bfloat16*>(output.copies[matrix]);
    const auto update = [&](auto* params) {
        const bool aligned = whole && is_aligned<4>(params) && is_aligned<4>(copy);
        write_strips(p, Params<std::remove_pointer_t<decltype(params)>>{params, copy, rates, aligned}, strips, strip_of,
                     done);
    };
    void* const params = output.params[matrix];
    if (output.param_dtype == DType::bfloat16) {
        update(static_cast<bfloat16*>(params));
    } else {
        update(static_cast<float*>(params));
    }
}

// --- host ---

// Calls use(major of A, major of B, epilogue) with the types of the kernel for a product. There are kernels for the Gram
// matrices of wide and of tall matrices, for products of symmetric matrices, and for X times a symmetric matrix from
// either side.
template <Major major>
using MajorType = std::integral_constant<Major, major>;
using AlongK = MajorType<Major::k>;
using AlongMN = MajorType<Major::mn>;

template <class Use>
void choose_product(const Product& p, const OutputEpilogue* output, const Use& use) {
    if (p.symmetric) {
        return p.a_major == Major::k ? use(AlongK(), AlongK(), SymmetricEpilogue())
                                     : use(AlongMN(), AlongMN(), SymmetricEpilogue());
    }
    if (p.b_major == Major::k)
        return output ? use(AlongK(), AlongK(), *output) : use(AlongK(), AlongK(), ScratchEpilogue());
    return output ? use(AlongK(), AlongMN(), *output) : use(AlongK(), AlongMN(), ScratchEpilogue());
}

// `output`: null where D goes to scratch memory.
namespace hopper {
void multiply(const Product&, DType, const OutputEpilogue* output, const Execution&);
}

}   // namespace nanochat::cuda::newton_schulz_kernels
