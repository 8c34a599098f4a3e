// Shared by the memory-bound kernels: packs, which are the consecutive elements that a thread moves in one access, and
// sums over a block in a fixed order.
//
// A pack has as many elements as 16 bytes hold of the widest type of a kernel. (With more, such as 8 of bfloat16 and
// float32, a warp's access to the float32 would touch each 32-byte sector twice.) An H200 keeps its memory busy with
// 4.3 TB/s x 0.8 us = 26 KB of loads in flight on each of its 132 multiprocessors (Little's law), so a thread issues the
// loads of several packs before it uses the first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernels.h"
#include "ptx/primitives.cuh"

namespace nanochat::cuda {

using device::bfloat16;
using device::to_float;

// A list of tensors is passed as a kernel argument of up to this many bytes (CUDA 12.1, sm_70). That needs no copy to the
// device, and none that a CUDA graph would have to keep.
constexpr int kArgumentBytes = 32764;

template <class... Types>
constexpr int kPack = 16 / static_cast<int>(std::max({sizeof(Types)...}));

// N elements of type T, as 32-bit words of memory.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
    static constexpr int kElementsPerWord = 4 / sizeof(T);
    uint32_t words[N / kElementsPerWord];
};

NANOCHAT_DEVICE uint32_t to_bits(float x) { return __float_as_uint(x); }
NANOCHAT_DEVICE uint32_t to_bits(bfloat16 x) { return x.bits; }
NANOCHAT_DEVICE void from_bits(float& x, uint32_t bits) { x = __uint_as_float(bits); }
NANOCHAT_DEVICE void from_bits(bfloat16& x, uint32_t bits) { x.bits = static_cast<uint16_t>(bits); }

// --- memory ---

template <int N, class T>
NANOCHAT_DEVICE bool is_aligned(const T* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(Pack<T, N>) == 0;
}

template <int N, class T>
NANOCHAT_DEVICE Pack<T, N> load(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}
// `to` is in global memory.
template <class T, int N>
NANOCHAT_DEVICE void store(T* to, const Pack<T, N>& pack) {
    if constexpr (sizeof pack == 16) {
        device::store_16(to, pack.words);
    } else if constexpr (sizeof pack == 8) {
        device::store_8(to, pack.words);
    } else {
        *reinterpret_cast<Pack<T, N>*>(to) = pack;
    }
}

// For global memory that is used once.
template <int N, class T>
NANOCHAT_DEVICE Pack<T, N> load_streamed(const T* from) {
    Pack<T, N> pack;
    device::load_streamed(pack.words, from);
    return pack;
}
template <class T, int N>
NANOCHAT_DEVICE void store_streamed(T* to, const Pack<T, N>& pack) {
    device::store_streamed(to, pack.words);
}

// The same, element by element, for a pack that is not aligned or of which only `count` elements exist.
template <int N, class T>
NANOCHAT_DEVICE Pack<T, N> load(const T* from, int64_t count, bool aligned) {
    if (aligned && count >= N) return load<N>(from);
    Pack<T, N> pack = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
        constexpr int per_word = Pack<T, N>::kElementsPerWord;
        if (i < count) pack.words[i / per_word] |= to_bits(from[i]) << (i % per_word * 16);
    }
    return pack;
}
template <class T, int N>
NANOCHAT_DEVICE void store(T* to, const Pack<T, N>& pack, int64_t count, bool aligned) {
    if (aligned && count >= N) return store(to, pack);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        constexpr int per_word = Pack<T, N>::kElementsPerWord;
        if (i < count) from_bits(to[i], pack.words[i / per_word] >> (i % per_word * 16));
    }
}

// --- numbers ---

template <int N>
NANOCHAT_DEVICE float element(const Pack<float, N>& pack, int i) {
    return __uint_as_float(pack.words[i]);
}
template <int N>
NANOCHAT_DEVICE float element(const Pack<bfloat16, N>& pack, int i) {
    return __uint_as_float(i % 2 ? pack.words[i / 2] & 0xFFFF0000 : pack.words[i / 2] << 16);
}
template <int N>
NANOCHAT_DEVICE float element(const Pack<device::float16, N>& pack, int i) {
    return to_float(device::float16{static_cast<uint16_t>(pack.words[i / 2] >> (i % 2 * 16))});
}

// Forces the compiler to unpack the numbers again at their next use. Otherwise it would hold them in two or more registers
// per word of bfloat16.
template <class T, int N>
NANOCHAT_DEVICE void hold_packed(Pack<T, N>& pack) {
#pragma unroll
    for (uint32_t& word : pack.words) word = static_cast<uint32_t>(device::opaque(static_cast<int>(word)));
}

// Sets elements i and i + 1, with i even; rounds to nearest, ties to even.
template <int N>
NANOCHAT_DEVICE void set_pair(Pack<float, N>& pack, int i, float low, float high) {
    pack.words[i] = __float_as_uint(low);
    pack.words[i + 1] = __float_as_uint(high);
}
template <int N>
NANOCHAT_DEVICE void set_pair(Pack<bfloat16, N>& pack, int i, float low, float high) {
    pack.words[i / 2] = device::pack<bfloat16>(low, high);
}

// Stores the bfloat16 copy of float32 parameters, rounded to nearest even, if `copy` is not null. `first` is the place of
// the pack.
template <int N>
NANOCHAT_DEVICE void store_copy(bfloat16* copy, int64_t first, const Pack<float, N>& params, int64_t count,
                                bool aligned) {
    if (!copy) return;
    Pack<bfloat16, N> rounded;
#pragma unroll
    for (int i = 0; i < N; i += 2) set_pair(rounded, i, element(params, i), element(params, i + 1));
    store(copy + first, rounded, count, aligned);
}
template <int N>
NANOCHAT_DEVICE void store_copy(bfloat16*, int64_t, const Pack<bfloat16, N>&, int64_t, bool) {}

// --- host ---

// The blocks that take chunks of work in turn: as many as `resident` on each multiprocessor.
inline dim3 resident_blocks(const Device& device, int resident, int64_t chunks) {
    return dim3(static_cast<uint32_t>(std::min<int64_t>(chunks, int64_t{device.multiprocessors} * resident)));
}

// --- sums over a block, in the same order every time ---

template <class T>
NANOCHAT_DEVICE T warp_sum(T x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, distance);
    return x;
}

// Called by all threads of the block, which has whole warps; all of them get the sum. `warps` is shared memory with no
// other use.
template <class T, int count>
NANOCHAT_DEVICE T block_sum(T x, T (&warps)[count]) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : T(0));
}

}   // namespace nanochat::cuda
