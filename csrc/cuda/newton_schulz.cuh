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

// Whether all elements of a strip exist.
NANOCHAT_DEVICE bool is_inside(const Product& p, int row, int column) {
    return row + 16 <= p.m && column + kStripColumns <= p.n;
}

// Calls use(i, place, count) for each pair of elements that the lane holds of the upper or lower half of a strip. sums[i]
// is the first element, `place` its index in the matrix of n columns, and `count` how many of the pair exist; it may be
// zero or negative. `inside`: all exist.
template <bool inside, class Use>
NANOCHAT_DEVICE void for_each_pair(const Product& p, int row, int column, int h, const Use& use) {
    const int lane = threadIdx.x % 32, r = row + lane / 4 + 8 * h;
#pragma unroll
    for (int n = 0; n < kStripColumns / 8; ++n) {
        const int c = column + 8 * n + 2 * (lane % 4);
        use(4 * n + 2 * h, int64_t{r} * p.n + c, inside ? 2 : r < p.m ? p.n - c : 0);
    }
}

template <bool inside, class P>
NANOCHAT_DEVICE void update_params(P* params, bfloat16* copy, const Product& p, const Rates& rates,
                                   const float (&sums)[kStripColumns / 2], int row, int column, bool aligned) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        Pack<P, 2> packs[kStripColumns / 8];
        for_each_pair<inside>(p, row, column, h, [&](int i, int64_t place, int count) {
            packs[i / 4] = load<2>(params + place, count, aligned);   // all loads before the first use
        });
        for_each_pair<inside>(p, row, column, h, [&](int i, int64_t place, int count) {
            Pack<P, 2>& pack = packs[i / 4];
            set_pair(pack, 0, updated(element(pack, 0), sums[i], rates), updated(element(pack, 1), sums[i + 1], rates));
            store(params + place, pack, count, aligned);
            store_copy(copy, place, pack, count, aligned);
        });
    }
}

// The same where most strips need no test of their elements, which would be most of the code that runs.
template <class P>
NANOCHAT_DEVICE void update_params(P* params, bfloat16* copy, const Product& p, const Rates& rates,
                                   const float (&sums)[kStripColumns / 2], int row, int column) {
    const bool aligned = p.n % 2 == 0 && is_aligned<2>(params) && is_aligned<2>(copy);
    if (aligned && is_inside(p, row, column)) {
        update_params<true>(params, copy, p, rates, sums, row, column, true);
    } else {
        update_params<false>(params, copy, p, rates, sums, row, column, aligned);
    }
}

template <bool inside>
NANOCHAT_DEVICE void write_floats(float* out, const Product& p, const float (&sums)[kStripColumns / 2], int row,
                                  int column, bool aligned) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        for_each_pair<inside>(p, row, column, h, [&](int i, int64_t place, int count) {
            Pack<float, 2> pack;
            set_pair(pack, 0, sums[i], sums[i + 1]);
            store(out + place, pack, count, aligned);
        });
    }
}

NANOCHAT_DEVICE void write_output(const Product& p, const OutputEpilogue& output,
                                  const float (&sums)[kStripColumns / 2], int matrix, int row, int column) {
    if (output.out) {
        float* const out = output.out + int64_t{matrix} * p.m * p.n;
        const bool aligned = p.n % 2 == 0;
        if (aligned && is_inside(p, row, column)) {
            write_floats<true>(out, p, sums, row, column, true);
        } else {
            write_floats<false>(out, p, sums, row, column, aligned);
        }
        return;
    }
    const Rates rates = rates_of(output.rates);
    void* const params = output.params[matrix];
    bfloat16* const copy = static_cast<bfloat16*>(output.copies[matrix]);
    if (output.param_dtype == DType::bfloat16) {
        update_params(static_cast<bfloat16*>(params), copy, p, rates, sums, row, column);
    } else {
        update_params(static_cast<float*>(params), copy, p, rates, sums, row, column);
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
