// The products of a warp with mma.sync, and its accumulators.
#pragma once

#include "tiles.cuh"

namespace nanochat::cuda::attention {

// Packs columns 16 k to 16 k + 15 of an accumulator as the operand A of a product.
template <class T, int count>
NANOCHAT_DEVICE void as_a_operand(uint32_t (&a)[4], const float (&d)[count], int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = device::pack<T>(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
}

// scores = A B^T over D, with the rows of A and B that a_rows and b_rows read.
template <class T, int D, int count, int fragments, class ARows, class BRows>
NANOCHAT_DEVICE void multiply(float (&scores)[fragments][count], const ARows& a_rows, const BRows& b_rows) {
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
#pragma unroll
        for (int i = 0; i < count; ++i) scores[f][i] = 0;
    }
#pragma unroll 2   // all of it at once takes registers for loads far ahead
    for (int d = 0; d < D / 16; ++d) {
        uint32_t a[fragments][4];
#pragma unroll
        for (int f = 0; f < fragments; ++f) device::ldmatrix_x4(a[f], a_rows(2 * d, 16 * f));
#pragma unroll
        for (int n = 0; n < count / 4; n += 2) {
            uint32_t b[4];
            device::ldmatrix_x4(b, b_rows(2 * d, 8 * n));
#pragma unroll
            for (int f = 0; f < fragments; ++f) {
                device::mma_m16n8k16<T>(fragment(scores[f], n), a[f], {b[0], b[1]});
                device::mma_m16n8k16<T>(fragment(scores[f], n + 1), a[f], {b[2], b[3]});
            }
        }
    }
}

// sums += A B, with A the weights, rounded to T, and B the tile that b_rows reads transposed.
template <class T, int D, int count, int fragments, class BRows>
NANOCHAT_DEVICE void add_product(float (&sums)[fragments][D / 2], const float (&weights)[fragments][count],
                                 const BRows& b_rows) {
#pragma unroll
    for (int s = 0; s < count / 8; ++s) {
        uint32_t a[fragments][4];
#pragma unroll
        for (int f = 0; f < fragments; ++f) as_a_operand<T>(a[f], weights[f], s);
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t b[4];
            device::ldmatrix_x4_trans(b, b_rows(n, 16 * s));
#pragma unroll
            for (int f = 0; f < fragments; ++f) {
                device::mma_m16n8k16<T>(fragment(sums[f], n), a[f], {b[0], b[1]});
                device::mma_m16n8k16<T>(fragment(sums[f], n + 1), a[f], {b[2], b[3]});
            }
        }
    }
}

// Multiplies the two rows that a thread holds of an accumulator.
template <int count>
NANOCHAT_DEVICE void scale_rows(float (&d)[count], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < count; ++i) d[i] *= factor[i / 2 % 2];
}

}   // namespace nanochat::cuda::attention
