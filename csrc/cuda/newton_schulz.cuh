// What the products of Newton-Schulz have in common: D = alpha A B + beta S + gamma T on a batch of matrices, of 16-bit
// elements with float32 sums, and what becomes of a tile of D.
//
// In scratch memory a row is a whole number of 16-byte chunks; what lies behind a matrix's last column is zero.
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

// A tile of D is multiplied in steps of kDepth along K. Symmetric results come in blocks of kTile.
constexpr int kTile = 128, kDepth = 64;
constexpr int kStripColumns = 64, kStripBytes = 16 * kStripColumns * 2;   // what a warp writes at a time

constexpr int64_t kChunk = 8;   // elements in 16 bytes
inline int64_t pitch_of(int64_t columns) { return (columns + kChunk - 1) / kChunk * kChunk; }

// `rows` x `columns` in memory, one after another.
struct Matrices {
    void* data;
    int rows, columns, pitch;

    NANOCHAT_ANYWHERE int64_t size() const { return int64_t{rows} * pitch; }
};

// Major::k: the rows of memory are rows of A, or columns of B; Major::mn: they are steps along K.
struct Product {
    Matrices a, b, d;
    Major a_major, b_major;
    bool symmetric;      // D is: its lower half is computed and mirrored
    const void *s, *t;   // (rows, columns) with the pitch of D, or null
    float alpha, beta, gamma;
    int count, m, n, k;
};

// Where the last product's D goes: to `out`, or into the params of a Muon update.
struct Result {
    float* out;
    DType param_dtype;
    UpdateRates rates;
    void* params[kMostMatrices];
};
struct Scratch {};   // D goes to scratch memory, whole ...
struct Mirror {};    // ... or as a lower half and its mirror

// The matrix that a tile belongs to, and its first row and column.
struct TilePlace {
    int matrix, row, column;
};

// --- what becomes of a tile ---

template <class T>
NANOCHAT_DEVICE float low(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
NANOCHAT_DEVICE float high(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// A strip's part of a source, in pairs; zeros where there is none. All loads are issued before one is used.
template <class T>
NANOCHAT_DEVICE void load_source(uint32_t (&pairs)[kStripColumns / 4], const Product& p, const void* source, int matrix,
                                 int row, int column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int r = row + lane / 4 + 8 * h;
        const T* from = static_cast<const T*>(source) + matrix * p.d.size() + int64_t{r} * p.d.pitch;
#pragma unroll
        for (int n = 0; n < kStripColumns / 8; ++n) {
            const int c = column + 8 * n + 2 * (lane % 4);
            const bool exists = source && r < p.m && c < p.d.pitch;
            pairs[2 * n + h] = exists ? *reinterpret_cast<const uint32_t*>(from + c) : 0;
        }
    }
}

// sums = alpha sums + beta S + gamma T
template <class T>
NANOCHAT_DEVICE void add_sources(float (&sums)[kStripColumns / 2], const Product& p, int matrix, int row, int column) {
    uint32_t s[kStripColumns / 4], t[kStripColumns / 4];
    load_source<T>(s, p, p.s, matrix, row, column);
    load_source<T>(t, p, p.t, matrix, row, column);
#pragma unroll
    for (int i = 0; i < kStripColumns / 4; ++i) {
        sums[2 * i] = p.alpha * sums[2 * i] + p.beta * low<T>(s[i]) + p.gamma * low<T>(t[i]);
        sums[2 * i + 1] = p.alpha * sums[2 * i + 1] + p.beta * high<T>(s[i]) + p.gamma * high<T>(t[i]);
    }
}

// Makes what lies on the diagonal of a symmetric D, in blocks of 8 x 8, symmetric to the last bit: where two orders of
// summation differ, D taken for its own transpose would have an error that later steps amplify.
NANOCHAT_DEVICE void mirror_diagonal(float (&sums)[kStripColumns / 2], int row, int column) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = 2 * (lane % 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int n = 0; n < kStripColumns / 8; ++n) {
            if (column + 8 * n != row + 8 * h) continue;
            const float own[2] = {sums[4 * n + 2 * h], sums[4 * n + 2 * h + 1]};
#pragma unroll
            for (int j = 0; j < 2; ++j) {   // element (g, t + j) is that of row t + j, column g
                const int source = (t + j) * 4 + g / 2;
                const float even = __shfl_sync(0xFFFFFFFF, own[0], source);
                const float odd = __shfl_sync(0xFFFFFFFF, own[1], source);
                if (t + j > g) sums[4 * n + 2 * h + j] = g % 2 ? odd : even;
            }
        }
    }
}

// Stores the strip's chunks whose blocks of 8 x 8 are on or below the diagonal, and those below it once more as
// columns: 32 bytes a lane.
template <class T>
NANOCHAT_DEVICE void store_mirrored(const Product& p, const unsigned char* strip, int matrix, int row, int column) {
    T* const d = static_cast<T*>(p.d.data) + matrix * p.d.size();
    store_chunks<T, kStripColumns, 16>(strip, 0, [&](int r, int chunk) {
        const bool stored = row + r < p.m && column + 8 * chunk <= row + r;
        return stored ? d + int64_t{row + r} * p.d.pitch + column + 8 * chunk : nullptr;
    });
#pragma unroll
    for (int i = threadIdx.x % 32; i < 2 * kStripColumns; i += 32) {
        const int c = i / 2, h = i % 2;
        if (column + c >= p.n || row + 8 * h >= p.d.pitch || column + c >= row + 8 * h) continue;
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const Cursor<kStripColumns, 16> cursor(0, 8 * h + j);
            const uint32_t bits = *reinterpret_cast<const uint16_t*>(strip + cursor(c / 8) + 2 * (c % 8));
            words[j / 2] = j % 2 ? words[j / 2] | bits << 16 : bits;
        }
        T* const to = d + int64_t{column + c} * p.d.pitch + row + 8 * h;
        *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    }
}

// Calls use(i, place, count) for each pair of the lane's part of a strip's upper or lower half: sums[i] is its first,
// place where it lies in its matrix of n columns, and count how many of it exist, which may be none.
template <class Use>
NANOCHAT_DEVICE void for_each_pair(const Product& p, int row, int column, int h, const Use& use) {
    const int lane = threadIdx.x % 32, r = row + lane / 4 + 8 * h;
#pragma unroll
    for (int n = 0; n < kStripColumns / 8; ++n) {
        const int c = column + 8 * n + 2 * (lane % 4);
        use(4 * n + 2 * h, int64_t{r} * p.n + c, r < p.m ? p.n - c : 0);
    }
}

template <class P>
NANOCHAT_DEVICE void update_params(P* params, const Product& p, const Rates& rates,
                                   const float (&sums)[kStripColumns / 2], int row, int column) {
    const bool aligned = p.n % 2 == 0 && is_aligned<2>(params);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        Pack<P, 2> packs[kStripColumns / 8];
        for_each_pair(p, row, column, h, [&](int i, int64_t place, int count) {
            packs[i / 4] = load<2>(params + place, count, aligned);   // all before the first is used
        });
        for_each_pair(p, row, column, h, [&](int i, int64_t place, int count) {
            Pack<P, 2>& pack = packs[i / 4];
            set_pair(pack, 0, updated(element(pack, 0), sums[i], rates), updated(element(pack, 1), sums[i + 1], rates));
            store(params + place, pack, count, aligned);
        });
    }
}

NANOCHAT_DEVICE void write_result(const Product& p, const Result& result, const float (&sums)[kStripColumns / 2],
                                  int matrix, int row, int column) {
    if (result.out) {
        float* const out = result.out + int64_t{matrix} * p.m * p.n;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            for_each_pair(p, row, column, h, [&](int i, int64_t place, int count) {
                Pack<float, 2> pack;
                set_pair(pack, 0, sums[i], sums[i + 1]);
                store(out + place, pack, count, p.n % 2 == 0);
            });
        }
        return;
    }
    const Rates rates = rates_of(result.rates);
    void* const params = result.params[matrix];
    if (result.param_dtype == DType::bfloat16) {
        update_params(static_cast<bfloat16*>(params), p, rates, sums, row, column);
    } else {
        update_params(static_cast<float*>(params), p, rates, sums, row, column);
    }
}

// Finishes a strip of 16 rows of a warp, as accumulators of mma.sync and wgmma hold it. `strip`: shared memory of the
// warp's own.
template <class T, class Destination>
NANOCHAT_DEVICE void finish_strip(const Product& p, const Destination& destination, unsigned char* strip,
                                  float (&sums)[kStripColumns / 2], int matrix, int row, int column) {
    constexpr bool symmetric = std::is_same_v<Destination, Mirror>;
    if (symmetric && column > row + 15) return;
    add_sources<T>(sums, p, matrix, row, column);
    if constexpr (std::is_same_v<Destination, Result>) {
        write_result(p, destination, sums, matrix, row, column);
    } else if constexpr (symmetric) {
        mirror_diagonal(sums, row, column);
        stage_rows<T, kStripColumns, 16>(strip, sums, 0);
        store_mirrored<T>(p, strip, matrix, row, column);
    } else {
        T* const d = static_cast<T*>(p.d.data) + matrix * p.d.size() + int64_t{row} * p.d.pitch + column;
        store_rows<T, kStripColumns, 16>(strip, sums, 0, p.d.pitch - column,
                                         [&](int r) { return row + r < p.m ? d + int64_t{r} * p.d.pitch : nullptr; });
    }
}

// --- the host's side ---

// Calls use(major of A, major of B, destination), types, for what kernels are compiled for: Gram matrices of wide and
// tall matrices, products of symmetric ones, and X times a symmetric one from either side.
template <Major major>
using MajorType = std::integral_constant<Major, major>;
using AlongK = MajorType<Major::k>;
using AlongMN = MajorType<Major::mn>;

template <class Use>
void choose_product(const Product& p, const Result* result, const Use& use) {
    if (p.symmetric) {
        return p.a_major == Major::k ? use(AlongK(), AlongK(), Mirror()) : use(AlongMN(), AlongMN(), Mirror());
    }
    if (p.b_major == Major::k) return result ? use(AlongK(), AlongK(), *result) : use(AlongK(), AlongK(), Scratch());
    return result ? use(AlongK(), AlongMN(), *result) : use(AlongK(), AlongMN(), Scratch());
}

// `result`: null where D goes to scratch memory.
namespace hopper {
void multiply(const Product&, DType, const Result* result, const Execution&);
}

}   // namespace nanochat::cuda::newton_schulz_kernels
