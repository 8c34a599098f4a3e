// Index arithmetic of Hopper's shared-memory layouts: the swizzles of the tensor copy engine and the descriptors that
// wgmma reads its operands through. Pure functions; kernels, their launchers and the emulation share them.
// PTX ISA 8.7, "Asynchronous Warpgroup Level Matrix Instructions"; tests/emulation compares them with CuTe's.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NANOCHAT_ANYWHERE __host__ __device__ __forceinline__
#else
#define NANOCHAT_ANYWHERE inline
#endif

namespace nanochat::device {

// The number of bytes of a row; the 16-byte chunks of rows are permuted within groups of 8 rows. The values are those of
// the descriptor's field.
enum class Swizzle : uint32_t { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

// Whether the elements of a row (along K, the summed dimension) or of a column (along M or N) are contiguous.
enum class Major : int { k = 0, mn = 1 };

NANOCHAT_ANYWHERE constexpr uint32_t swizzle_bytes(Swizzle swizzle) {
    return swizzle == Swizzle::none ? 16u : 256u >> static_cast<uint32_t>(swizzle);
}

// The swizzled address of the byte at `address` of an unswizzled tile whose base is aligned to 8 rows: the number of its
// chunk, bits 4 to 6, is XORed with bits 7 to 9, as many of them as the width has.
NANOCHAT_ANYWHERE constexpr uint32_t swizzled(uint32_t address, Swizzle swizzle) {
    return address ^ ((address >> 7 & (swizzle_bytes(swizzle) / 16 - 1)) << 4);
}

// The descriptor of a tile in shared memory, for wgmma. leading and stride are distances in bytes, multiples of 16:
//   K-major, swizzled: stride between groups of 8 rows; leading is not read.
//   MN-major, swizzled: leading between atoms of one swizzle's width along MN, stride between groups of 8 along K.
//   not swizzled, either order: between core matrices of 8 rows x 16 bytes, leading along K, stride along MN.
NANOCHAT_ANYWHERE constexpr uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                                      Swizzle swizzle) {
    return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>((leading & 0x3FFFF) >> 4) << 16 |
           static_cast<uint64_t>((stride & 0x3FFFF) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// The descriptor of the same tile `bytes` further, a multiple of 16: one addition to the low word, whose address does not
// overflow within shared memory.
NANOCHAT_ANYWHERE constexpr uint64_t advanced(uint64_t descriptor, uint32_t bytes) {
    return (descriptor & ~uint64_t{0xFFFFFFFF}) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

}   // namespace nanochat::device
