// What the products of bfloat16 matrices share with the instructions that compute them (gemm16_x86_64.h,
// gemm16_aarch64.h): the blocks of packed operands.
#pragma once

#include "gemm.h"

namespace nanochat::NANOCHAT_ISA {

constexpr int64_t kBlock16 = 16;        // rows of a block of A, columns of a block of B
constexpr int64_t kBlock16Depth = 32;   // depth of both
constexpr int64_t kBlock16Size = kBlock16 * kBlock16Depth;

// The numbers X(i, k) of an operand, i < count and k < depth: X is A, or the transpose of B. By rows: p[i * stride + k];
// by columns: p[k * stride + i].
template <class S>
struct Operand {
    const S* p;
    int64_t stride;
    Layout layout;
};

// A product of packed operands, in blocks. The blocks of a strip of A are `a_strip` elements apart, and so on.
struct Packed {
    const bfloat16* a;
    int64_t a_strip;
    const bfloat16* b;
    int64_t b_panel;
    int64_t depth;   // in blocks
};

}   // namespace nanochat::NANOCHAT_ISA
