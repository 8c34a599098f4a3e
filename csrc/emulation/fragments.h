// Which element of a matrix each lane of a tensor-core instruction holds, and where wgmma's operands lie in shared
// memory. PTX ISA 8.7, "Matrix Fragments for mma.m16n8k16", "Register Fragments and Shared Memory Matrix Layouts".
// tests/emulation compares every map with CuTe's layouts.
#pragma once

#include "../cuda/ptx/layouts.h"

namespace nanochat::emulation {

struct Place {
    int row, column;
};

// mma.m16n8k16. `i` numbers the 16-bit elements of a fragment (two a register) or the float32 ones of the sums.
constexpr Place mma_a(int lane, int i) { return {lane / 4 + 8 * (i / 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i / 4)}; }
constexpr Place mma_b(int lane, int i) { return {2 * (lane % 4) + i % 2 + 8 * (i / 2), lane / 4}; }
constexpr Place mma_d(int lane, int i) { return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2}; }

// wgmma.m64nNk16, by the thread's number in its warpgroup.
constexpr Place wgmma_a(int thread, int i) {
    const Place place = mma_a(thread % 32, i);
    return {thread / 32 * 16 + place.row, place.column};
}
constexpr Place wgmma_d(int thread, int i) {
    const Place place = mma_d(thread % 32, i % 4);
    return {thread / 32 * 16 + place.row, i / 4 * 8 + place.column};
}

// ldmatrix, stmatrix: the element of one 8x8 matrix that half `i` of a lane's register holds.
constexpr Place ldmatrix_place(int lane, int i, bool transposed) {
    return transposed ? Place{2 * (lane % 4) + i, lane / 4} : Place{lane / 4, 2 * (lane % 4) + i};
}

// Shared-memory address of the 16-bit element (mn, k) of a wgmma operand: mn its row in A or its column in B.
constexpr uint32_t wgmma_address(uint64_t descriptor, device::Major major, int mn, int k) {
    const auto swizzle = static_cast<device::Swizzle>(descriptor >> 62);
    const uint32_t base = (descriptor & 0x3FFF) << 4;
    const uint32_t leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    const uint32_t width = device::swizzle_bytes(swizzle);
    const bool plain = swizzle == device::Swizzle::none;
    uint32_t address = base;
    if (major == device::Major::k) {
        const uint32_t byte = 2 * static_cast<uint32_t>(k), row = static_cast<uint32_t>(mn);
        address += row / 8 * stride + row % 8 * width + (plain ? byte / 16 * leading + byte % 16 : byte);
    } else {
        const uint32_t byte = 2 * static_cast<uint32_t>(mn), row = static_cast<uint32_t>(k);
        const uint32_t along_mn = plain ? stride : leading, along_k = plain ? leading : stride;
        address += byte / width * along_mn + row / 8 * along_k + row % 8 * width + byte % width;
    }
    return device::swizzled(address, swizzle);
}

}   // namespace nanochat::emulation
