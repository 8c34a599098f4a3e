// Every primitive that CUDA C++ does not offer, each with two bodies: PTX for the device, and a call of csrc/emulation for
// the host, where tests run the same kernels. This is the only file with inline PTX, and the only one of csrc/cuda/ptx
// that kernels include.
//
// Kernels use the names of CUDA C++ itself (threadIdx, __syncthreads, __syncwarp, __shfl_*_sync, votes, atomicAdd, ...)
// directly; the emulation supplies them too. Shared memory is declared with NANOCHAT_SHARED and NANOCHAT_DYNAMIC_SHARED,
// and kernels are started with launch().
//
// Shared-memory addresses are the 32-bit ones of shared_address(). PTX ISA 8.7 describes each instruction by its name.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.h"
#include "layouts.h"

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#define NANOCHAT_DEVICE __device__ __forceinline__
#define NANOCHAT_SHARED(type, name) __shared__ nanochat::device::Same<type> name
#define NANOCHAT_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define NANOCHAT_LINE
#define NANOCHAT_ONLY_LINE
#define ON_DEVICE(...) __VA_ARGS__
#define ON_HOST(...)
#else
#ifndef NANOCHAT_EMULATION
#error "CUDA kernels are compiled by nvcc, or for the host with -include csrc/emulation/emulation.h"
#endif
#define NANOCHAT_DEVICE inline
#define NANOCHAT_SHARED(type, name)   \
    static const char name##_key = 0; \
    auto& name = ::nanochat::emulation::static_shared<::nanochat::device::Same<type>>(&name##_key)
#define NANOCHAT_DYNAMIC_SHARED(name) unsigned char* name = ::nanochat::emulation::dynamic_shared()
#define NANOCHAT_ONLY_LINE int line = __builtin_LINE()   // of the caller, for reports of deadlocks
#define NANOCHAT_LINE , NANOCHAT_ONLY_LINE
#define ON_DEVICE(...)
#define ON_HOST(...) __VA_ARGS__
#endif

// Instructions of Hopper exist in code for sm_90a only: kernels that use them have an empty body elsewhere.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NANOCHAT_HOPPER 1
#endif

namespace nanochat::device {

template <class T>
using Same = T;   // lets a macro take array types: NANOCHAT_SHARED(float[32], sums)

// Bits of the two 16-bit formats, as they lie in memory.
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// --- launch (host) ---

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
using Stream = cudaStream_t;

inline void launch_check(cudaError_t status, const char* name) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(name) + ": " + cudaGetErrorName(status) + ", " +
                                 cudaGetErrorString(status));
    }
}

// Raises the limit of a kernel's dynamic shared memory, once for each kernel and device.
inline void allow_shared_memory(const char* name, const void* kernel, size_t bytes) {
    if (bytes <= 48 * 1024) return;
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, size_t> allowed;
    int device = 0, most = 0;
    launch_check(cudaGetDevice(&device), name);
    const std::lock_guard lock(mutex);
    size_t& known = allowed[{kernel, device}];
    if (bytes <= known) return;
    launch_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
    if (bytes > static_cast<size_t>(most)) {
        throw std::runtime_error(std::string(name) + ": needs " + std::to_string(bytes) +
                                 " bytes of shared memory per block; this GPU has " + std::to_string(most));
    }
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) cudaGetLastError();   // forgets it: the next launch would report it again
    launch_check(error, name);
    known = bytes;
}

// Enqueues kernel(arguments...). Throws std::runtime_error, with `name`, if the launch fails.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments&&... arguments) {
    allow_shared_memory(name, reinterpret_cast<const void*>(kernel), shared_bytes);
    kernel<<<grid, block, shared_bytes, static_cast<Stream>(stream)>>>(static_cast<Arguments&&>(arguments)...);
    launch_check(cudaGetLastError(), name);
}

// The same with options.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            LaunchOptions options, Arguments&&... arguments) {
    allow_shared_memory(name, reinterpret_cast<const void*>(kernel), shared_bytes);
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<Stream>(stream);
    config.attrs = attributes;
    if (options.cluster != 1) {
        cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = static_cast<unsigned>(options.cluster);
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    }
    if (options.overlaps_previous) {
        cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
    launch_check(cudaGetLastError(), name);
}
#else
using emulation::launch;
using emulation::TensorMap;
#endif

// --- numbers ---

NANOCHAT_DEVICE float to_float(float x) { return x; }
NANOCHAT_DEVICE float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
NANOCHAT_DEVICE float to_float(float16 x) {
    float wide;
    ON_DEVICE(asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits)));
    ON_HOST(wide = emulation::half_to_float(x.bits));
    return wide;
}

// Two numbers, rounded to nearest even and packed for mma, with `low` in the low half.
template <class T>
NANOCHAT_DEVICE uint32_t pack(float low, float high);
template <>
NANOCHAT_DEVICE uint32_t pack<bfloat16>(float low, float high) {
    uint32_t packed;
    ON_DEVICE(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low)));
    ON_HOST(packed = emulation::float_to_bfloat16(low) | uint32_t{emulation::float_to_bfloat16(high)} << 16);
    return packed;
}
template <>
NANOCHAT_DEVICE uint32_t pack<float16>(float low, float high) {
    uint32_t packed;
    ON_DEVICE(asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low)));
    ON_HOST(packed = emulation::float_to_half(low) | uint32_t{emulation::float_to_half(high)} << 16);
    return packed;
}

// 2^x, 1/x and tanh(x) by the special function unit, with relative errors of 2^-22, 2^-23 and 2^-11. Subnormals are zero.
// sqrt(x) has 2^-23 and takes subnormals. sqrtf has a slow path for x = 0; this instruction has none.
NANOCHAT_DEVICE float exp2_approx(float x) {
    float y;
    ON_DEVICE(asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)));
    ON_HOST(y = exp2f(x));
    return y;
}
NANOCHAT_DEVICE float reciprocal_approx(float x) {
    float y;
    ON_DEVICE(asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)));
    ON_HOST(y = 1 / x);
    return y;
}
NANOCHAT_DEVICE float sqrt_approx(float x) {
    float y;
    ON_DEVICE(asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x)));
    ON_HOST(y = sqrtf(x));
    return y;
}
NANOCHAT_DEVICE float tanh_approx(float x) {
    float y;
    ON_DEVICE(asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)));
    ON_HOST(y = tanhf(x));
    return y;
}

// Returns x, but the compiler does not know that: values derived from the result are recomputed, not kept in registers.
NANOCHAT_DEVICE int opaque(int x) {
    ON_DEVICE(asm volatile("" : "+r"(x)));
    return x;
}

// --- global memory ---

// Stores 8 or 16 bytes at an address that is a multiple of as many, in one access. nvcc splits some ordinary stores into
// words, each of which then touches as many sectors of memory as the whole.
NANOCHAT_DEVICE void store_8(void* to, const uint32_t (&words)[2]) {
    ON_DEVICE(asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1]) : "memory"));
    ON_HOST(emulation::store_8(to, words));
}
NANOCHAT_DEVICE void store_16(void* to, const uint32_t (&words)[4]) {
    ON_DEVICE(asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]),
                           "r"(words[2]), "r"(words[3]) : "memory"));
    ON_HOST(emulation::store_16(to, words));
}

// --- order between threads ---

// Named barriers: bar_sync waits until `threads` threads of the block, a multiple of 32, have arrived at barrier `id`, 0 to
// 15. bar_arrive arrives without waiting.
NANOCHAT_DEVICE void bar_sync(int id, int threads NANOCHAT_LINE) {
    ON_DEVICE(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"));
    ON_HOST(emulation::bar_sync(id, threads, line));
}
NANOCHAT_DEVICE void bar_arrive(int id, int threads) {
    ON_DEVICE(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"));
    ON_HOST(emulation::bar_arrive(id, threads));
}

// Adds and returns the old value. A thread of the device that sees the sum also sees what this thread wrote before.
NANOCHAT_DEVICE uint32_t atomic_add_ordered(uint32_t* counter, uint32_t value) {
    uint32_t old;
    ON_DEVICE(asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter),
                           "r"(value) : "memory"));
    ON_HOST(old = emulation::atomic_add_ordered(counter, value));
    return old;
}

// Adds. A thread of the device that sees the sum by wait_for_count also sees what this thread wrote before.
NANOCHAT_DEVICE void add_release(uint32_t* counter, uint32_t value) {
    ON_DEVICE(asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory"));
    ON_HOST(emulation::add_release(counter, value));
}
// Waits until *counter >= count. The blocks that add to it must run or have run: no block starts in place of one that
// waits.
NANOCHAT_DEVICE void wait_for_count(const uint32_t* counter, uint32_t count NANOCHAT_LINE) {
    ON_DEVICE(uint32_t seen;
              do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
              while (seen < count));
    ON_HOST(emulation::wait_for_count(counter, count, line));
}

// With LaunchOptions::overlaps_previous: wait_for_previous_grid waits until the grid before has ended and its results are
// visible; start_next_grid lets the next grid start once all blocks have called it or left.
NANOCHAT_DEVICE void wait_for_previous_grid() {
    ON_DEVICE(asm volatile("griddepcontrol.wait;" :: : "memory"));
    ON_HOST(emulation::wait_for_previous_grid());
}
NANOCHAT_DEVICE void start_next_grid() { ON_DEVICE(asm volatile("griddepcontrol.launch_dependents;" :: : "memory")); }

// True in one lane of the converged warp.
NANOCHAT_DEVICE bool elect_one() {
    uint32_t elected;
    ON_DEVICE(asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected)));
    ON_HOST(elected = emulation::elect_one());
    return elected;
}

// --- shared memory and warp-wide matrix instructions (sm_80) ---

NANOCHAT_DEVICE uint32_t shared_address(const void* pointer) {
    ON_DEVICE(return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)));
    ON_HOST(return emulation::shared_address(pointer));
}

// Loads 8 bytes at an address that is a multiple of 8, in one access. nvcc splits an ordinary load of two numbers.
NANOCHAT_DEVICE void load_shared_pair(float& first, float& second, uint32_t from) {
    ON_DEVICE(asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(first), "=f"(second) : "r"(from) : "memory"));
    ON_HOST(emulation::load_shared_pair(first, second, from));
}

// Copies 16 bytes from global to shared memory, both aligned to 16, in the background; of the 16 the last
// 16 - source_bytes are zeros that are not read. A commit closes a group, wait<n> leaves the n newest groups in flight.
// Only this thread may read the copied bytes before a barrier.
NANOCHAT_DEVICE void cp_async_16(uint32_t target, const void* source, int source_bytes = 16) {
    ON_DEVICE(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                           "r"(source_bytes) : "memory"));
    ON_HOST(emulation::cp_async(target, source, source_bytes));
}
NANOCHAT_DEVICE void cp_async_commit() {
    ON_DEVICE(asm volatile("cp.async.commit_group;" :: : "memory"));
    ON_HOST(emulation::cp_async_commit());
}
template <int newest>
NANOCHAT_DEVICE void cp_async_wait() {
    ON_DEVICE(asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory"));
    ON_HOST(emulation::cp_async_wait(newest));
}

// Four 8x8 matrices of 16-bit elements: lane 8 i + r names row r of matrix i; lane l gets elements 2 (l % 4) and the
// next of row l / 4 of each, or of column l / 4 where transposed.
NANOCHAT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
    ON_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]),
                           "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory"));
    ON_HOST(emulation::ldmatrix(r, row, 4, false));
}
NANOCHAT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
    ON_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
                           "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory"));
    ON_HOST(emulation::ldmatrix(r, row, 4, true));
}
NANOCHAT_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {
    ON_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                           "=r"(r[1]) : "r"(row) : "memory"));
    ON_HOST(emulation::ldmatrix(r, row, 2, false));
}
NANOCHAT_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) {
    ON_DEVICE(asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                           "=r"(r[1]) : "r"(row) : "memory"));
    ON_HOST(emulation::ldmatrix(r, row, 2, true));
}

// The reverse of ldmatrix (sm_90).
NANOCHAT_DEVICE void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
    ON_DEVICE(asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                           "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
    ON_HOST(emulation::stmatrix(row, r, 4, false));
}
NANOCHAT_DEVICE void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
    ON_DEVICE(asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                           "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
    ON_HOST(emulation::stmatrix(row, r, 4, true));
}

// d (16, 8) += a (16, 16) b (16, 8), float32 sums. Lane l holds, with g = l / 4 and t = 2 (l % 4):
//   d[i] = D[g + 8 (i / 2)][t + i % 2];   a[i] = A[g + 8 (i % 2)][t + 8 (i / 2)] and the next of the row;
//   b[i] = B[t + 8 i][g] and the next of the column.
template <class T>
NANOCHAT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
NANOCHAT_DEVICE void mma_m16n8k16<bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ON_DEVICE(asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
        "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])));
    ON_HOST(emulation::mma_m16n8k16(d, a, b, emulation::Half::bfloat16));
}
template <>
NANOCHAT_DEVICE void mma_m16n8k16<float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ON_DEVICE(asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
        "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])));
    ON_HOST(emulation::mma_m16n8k16(d, a, b, emulation::Half::float16));
}

// --- mbarriers (sm_90) ---

// A barrier of 8 bytes in shared memory. A phase ends when `count` arrivals have come and the bytes that were announced
// by expect_tx have landed; wait returns once the phase of the given parity (the first is 0) has ended.
NANOCHAT_DEVICE void mbarrier_init(uint32_t barrier, int count) {
    ON_DEVICE(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory"));
    ON_HOST(emulation::mbarrier_init(barrier, count));
}
// Makes initialised barriers visible to the asynchronous proxy. A barrier of the block must follow, or of
// the cluster.
NANOCHAT_DEVICE void fence_mbarrier_init() {
    ON_DEVICE(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
    ON_HOST(emulation::fence_mbarrier_init());
}
NANOCHAT_DEVICE void mbarrier_arrive(uint32_t barrier) {
    ON_DEVICE(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"));
    ON_HOST(emulation::mbarrier_arrive(barrier, 0));
}
NANOCHAT_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
    ON_DEVICE(
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory"));
    ON_HOST(emulation::mbarrier_arrive(barrier, bytes));
}
NANOCHAT_DEVICE bool mbarrier_try_wait(uint32_t barrier, int parity) {
    uint32_t done;
    ON_DEVICE(
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.b32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier),
                     "r"(parity) : "memory"));
    ON_HOST(done = emulation::mbarrier_try_wait(barrier, parity));
    return done;
}
NANOCHAT_DEVICE void mbarrier_wait(uint32_t barrier, int parity NANOCHAT_LINE) {
    ON_DEVICE(while (!mbarrier_try_wait(barrier, parity)){});
    ON_HOST(emulation::mbarrier_wait(barrier, parity, line));
}

// --- clusters (sm_90): the blocks of LaunchOptions::cluster, which run side by side ---

// The place of this block in its cluster.
NANOCHAT_DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    ON_DEVICE(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
    ON_HOST(rank = emulation::cluster_rank());
    return rank;
}
// A barrier of all threads of the cluster: each arrives, and then waits until all that have not left have arrived. What
// was written before an arrival is visible after the wait. By whole warps.
NANOCHAT_DEVICE void cluster_arrive(NANOCHAT_ONLY_LINE) {
    ON_DEVICE(asm volatile("barrier.cluster.arrive.aligned;" :: : "memory"));
    ON_HOST(emulation::cluster_arrive(line));
}
NANOCHAT_DEVICE void cluster_wait(NANOCHAT_ONLY_LINE) {
    ON_DEVICE(asm volatile("barrier.cluster.wait.aligned;" :: : "memory"));
    ON_HOST(emulation::cluster_wait(line));
}
// Arrives at the mbarrier that block `rank` of the cluster has at the address `barrier`. That block may not have left.
NANOCHAT_DEVICE void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
    ON_DEVICE(
        asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                     "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
                     "r"(rank) : "memory"));
    ON_HOST(emulation::mbarrier_arrive_cluster(barrier, rank));
}

// --- tensor copies (sm_90): boxes of global tensors, by one thread, in the background ---

// Orders this thread's ordinary accesses to shared memory before the asynchronous proxy's (tensor copies, wgmma).
NANOCHAT_DEVICE void fence_proxy_async() {
    ON_DEVICE(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
    ON_HOST(emulation::fence_proxy_async());
}
// The same for global memory, in both directions: between what is written in the ordinary way, or by another block, and a
// copy that touches the same place.
NANOCHAT_DEVICE void fence_proxy_async_global() {
    ON_DEVICE(asm volatile("fence.proxy.async.global;" :: : "memory"));
    ON_HOST(emulation::fence_proxy_async_global());
}
NANOCHAT_DEVICE void tma_prefetch(const TensorMap& map) {
    ON_DEVICE(asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"));
    ON_HOST((void)map);
}

// Loads the box whose first element has the coordinates c0 (innermost), c1, ... into shared memory at `target`, and
// then counts its bytes at the mbarrier. What lies outside the tensor is zero.
NANOCHAT_DEVICE void tma_load(uint32_t target, const TensorMap& map, uint32_t barrier, int c0, int c1) {
    ON_DEVICE(
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4}], [%2];" ::"r"(target),
                     "l"(&map), "r"(barrier), "r"(c0), "r"(c1) : "memory"));
    ON_HOST(emulation::tma_load(target, map, barrier, {c0, c1}));
}
NANOCHAT_DEVICE void tma_load(uint32_t target, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2) {
    ON_DEVICE(
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
                     "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2) : "memory"));
    ON_HOST(emulation::tma_load(target, map, barrier, {c0, c1, c2}));
}
NANOCHAT_DEVICE void tma_load(uint32_t target, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
    ON_DEVICE(
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
                     "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory"));
    ON_HOST(emulation::tma_load(target, map, barrier, {c0, c1, c2, c3}));
}

// The same into every block of the cluster whose rank has a bit in `mask`: at the same address, and with the mbarrier at
// the same address.
NANOCHAT_DEVICE void tma_load_multicast(uint32_t target, const TensorMap& map, uint32_t barrier, uint16_t mask, int c0,
                                        int c1, int c2) {
    ON_DEVICE(
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(target),
                     "l"(&map), "r"(barrier), "h"(mask), "r"(c0), "r"(c1), "r"(c2) : "memory"));
    ON_HOST(emulation::tma_load_multicast(target, map, barrier, mask, {c0, c1, c2}));
}

// Stores a box, or adds it to what is there; elements outside the tensor are left out. tma_commit closes a group;
// wait_read<n> lets `source` be overwritten and wait<n> makes the result visible, for all but the n newest groups.
NANOCHAT_DEVICE void tma_store(const TensorMap& map, uint32_t source, int c0, int c1) {
    ON_DEVICE(asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                           "r"(source), "r"(c0), "r"(c1) : "memory"));
    ON_HOST(emulation::tma_store(map, source, {c0, c1}, false));
}
NANOCHAT_DEVICE void tma_store(const TensorMap& map, uint32_t source, int c0, int c1, int c2) {
    ON_DEVICE(
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                     "r"(source), "r"(c0), "r"(c1), "r"(c2) : "memory"));
    ON_HOST(emulation::tma_store(map, source, {c0, c1, c2}, false));
}
NANOCHAT_DEVICE void tma_store(const TensorMap& map, uint32_t source, int c0, int c1, int c2, int c3) {
    ON_DEVICE(
        asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                     "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory"));
    ON_HOST(emulation::tma_store(map, source, {c0, c1, c2, c3}, false));
}
NANOCHAT_DEVICE void tma_reduce_add(const TensorMap& map, uint32_t source, int c0, int c1) {
    ON_DEVICE(
        asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group "
                     "[%0, {%2, %3}], [%1];" ::"l"(&map),
                     "r"(source), "r"(c0), "r"(c1) : "memory"));
    ON_HOST(emulation::tma_store(map, source, {c0, c1}, true));
}
NANOCHAT_DEVICE void tma_reduce_add(const TensorMap& map, uint32_t source, int c0, int c1, int c2) {
    ON_DEVICE(
        asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group "
                     "[%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                     "r"(source), "r"(c0), "r"(c1), "r"(c2) : "memory"));
    ON_HOST(emulation::tma_store(map, source, {c0, c1, c2}, true));
}
NANOCHAT_DEVICE void tma_reduce_add(const TensorMap& map, uint32_t source, int c0, int c1, int c2, int c3) {
    ON_DEVICE(
        asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group "
                     "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                     "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory"));
    ON_HOST(emulation::tma_store(map, source, {c0, c1, c2, c3}, true));
}
// The same for `bytes` that lie side by side, a multiple of 16 at multiples of 16; bulk_reduce_add adds float32.
NANOCHAT_DEVICE void bulk_store(void* to, uint32_t source, int bytes) {
    ON_DEVICE(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(source),
                           "r"(bytes) : "memory"));
    ON_HOST(emulation::bulk_store(to, source, bytes, false));
}
NANOCHAT_DEVICE void bulk_reduce_add(float* to, uint32_t source, int bytes) {
    ON_DEVICE(asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                           "r"(source), "r"(bytes) : "memory"));
    ON_HOST(emulation::bulk_store(to, source, bytes, true));
}
NANOCHAT_DEVICE void tma_commit() {
    ON_DEVICE(asm volatile("cp.async.bulk.commit_group;" :: : "memory"));
    ON_HOST(emulation::tma_commit());
}
template <int newest>
NANOCHAT_DEVICE void tma_wait_read() {
    ON_DEVICE(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(newest) : "memory"));
    ON_HOST(emulation::tma_wait(newest, true));
}
template <int newest>
NANOCHAT_DEVICE void tma_wait() {
    ON_DEVICE(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(newest) : "memory"));
    ON_HOST(emulation::tma_wait(newest, false));
}

// --- warpgroup matrix instructions (sm_90a), by 128 threads together ---

// Before the first wgmma, and whenever registers of an accumulator or of A were touched since the last one.
NANOCHAT_DEVICE void wgmma_fence() {
    ON_DEVICE(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"));
    ON_HOST(emulation::wgmma_fence());
}
NANOCHAT_DEVICE void wgmma_commit() {
    ON_DEVICE(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"));
    ON_HOST(emulation::wgmma_commit());
}
// Until then accumulators may not be touched, nor shared memory that the products read be overwritten.
template <int newest>
NANOCHAT_DEVICE void wgmma_wait() {
    ON_DEVICE(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(newest) : "memory"));
    ON_HOST(emulation::wgmma_wait(newest));
}
// Keeps the compiler from moving accesses to an accumulator across this place.
template <int count>
NANOCHAT_DEVICE void pin_registers(float (&d)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
        ON_DEVICE(asm volatile("" : "+f"(d[i])::"memory"));
        ON_HOST((void)d);
    }
}

// Registers of each thread of the warpgroup from here on: a multiple of 8 from 24 to 256. All four warps call it; one
// that asks for more waits until enough have been given back. The kernel needs __launch_bounds__(threads, 1).
template <int registers>
NANOCHAT_DEVICE void setmaxnreg_increase() {
    static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
    ON_DEVICE(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)));
    ON_HOST(emulation::setmaxnreg(registers, true));
}
template <int registers>
NANOCHAT_DEVICE void setmaxnreg_decrease() {
    static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
    ON_DEVICE(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)));
    ON_HOST(emulation::setmaxnreg(registers, false));
}

// d (64, N) = a (64, 16) b (16, N) + (accumulate ? d : 0), started; N a multiple of 8 up to 256. a from shared memory
// through a descriptor, or K-major from registers; b through a descriptor; float32 sums. Warp w of the group holds rows
// 16 w to 16 w + 15; its lane l, with g = l / 4 and t = 2 (l % 4):
//   d[i] = D[16 w + g + 8 (i / 2 % 2)][8 (i / 4) + t + i % 2];   a as in mma_m16n8k16.
template <int N, class T>
struct Wgmma;
template <int N, class T, Major major_a = Major::k, Major major_b = Major::k>
NANOCHAT_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    ON_DEVICE(
        (Wgmma<N, T>::template from_shared<static_cast<int>(major_a), static_cast<int>(major_b)>(d, a, b, accumulate)));
    ON_HOST(emulation::wgmma(d, N, nullptr, a, b, accumulate, major_a, major_b, emulation::half_of<T>()));
}
template <int N, class T, Major major_b = Major::k>
NANOCHAT_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    ON_DEVICE((Wgmma<N, T>::template from_registers<static_cast<int>(major_b)>(d, a, b, accumulate)));
    ON_HOST(emulation::wgmma(d, N, a, 0, b, accumulate, Major::k, major_b, emulation::half_of<T>()));
}

#ifdef __CUDACC__
// The accumulator's registers, four more for every 8 columns: their places in the text, and as operands.
#define NANOCHAT_REGISTERS_1 "%0, %1, %2, %3"
#define NANOCHAT_REGISTERS_2 NANOCHAT_REGISTERS_1 ", %4, %5, %6, %7"
#define NANOCHAT_REGISTERS_3 NANOCHAT_REGISTERS_2 ", %8, %9, %10, %11"
#define NANOCHAT_REGISTERS_4 NANOCHAT_REGISTERS_3 ", %12, %13, %14, %15"
#define NANOCHAT_REGISTERS_5 NANOCHAT_REGISTERS_4 ", %16, %17, %18, %19"
#define NANOCHAT_REGISTERS_6 NANOCHAT_REGISTERS_5 ", %20, %21, %22, %23"
#define NANOCHAT_REGISTERS_7 NANOCHAT_REGISTERS_6 ", %24, %25, %26, %27"
#define NANOCHAT_REGISTERS_8 NANOCHAT_REGISTERS_7 ", %28, %29, %30, %31"
#define NANOCHAT_REGISTERS_9 NANOCHAT_REGISTERS_8 ", %32, %33, %34, %35"
#define NANOCHAT_REGISTERS_10 NANOCHAT_REGISTERS_9 ", %36, %37, %38, %39"
#define NANOCHAT_REGISTERS_11 NANOCHAT_REGISTERS_10 ", %40, %41, %42, %43"
#define NANOCHAT_REGISTERS_12 NANOCHAT_REGISTERS_11 ", %44, %45, %46, %47"
#define NANOCHAT_REGISTERS_13 NANOCHAT_REGISTERS_12 ", %48, %49, %50, %51"
#define NANOCHAT_REGISTERS_14 NANOCHAT_REGISTERS_13 ", %52, %53, %54, %55"
#define NANOCHAT_REGISTERS_15 NANOCHAT_REGISTERS_14 ", %56, %57, %58, %59"
#define NANOCHAT_REGISTERS_16 NANOCHAT_REGISTERS_15 ", %60, %61, %62, %63"
#define NANOCHAT_REGISTERS_17 NANOCHAT_REGISTERS_16 ", %64, %65, %66, %67"
#define NANOCHAT_REGISTERS_18 NANOCHAT_REGISTERS_17 ", %68, %69, %70, %71"
#define NANOCHAT_REGISTERS_19 NANOCHAT_REGISTERS_18 ", %72, %73, %74, %75"
#define NANOCHAT_REGISTERS_20 NANOCHAT_REGISTERS_19 ", %76, %77, %78, %79"
#define NANOCHAT_REGISTERS_21 NANOCHAT_REGISTERS_20 ", %80, %81, %82, %83"
#define NANOCHAT_REGISTERS_22 NANOCHAT_REGISTERS_21 ", %84, %85, %86, %87"
#define NANOCHAT_REGISTERS_23 NANOCHAT_REGISTERS_22 ", %88, %89, %90, %91"
#define NANOCHAT_REGISTERS_24 NANOCHAT_REGISTERS_23 ", %92, %93, %94, %95"
#define NANOCHAT_REGISTERS_25 NANOCHAT_REGISTERS_24 ", %96, %97, %98, %99"
#define NANOCHAT_REGISTERS_26 NANOCHAT_REGISTERS_25 ", %100, %101, %102, %103"
#define NANOCHAT_REGISTERS_27 NANOCHAT_REGISTERS_26 ", %104, %105, %106, %107"
#define NANOCHAT_REGISTERS_28 NANOCHAT_REGISTERS_27 ", %108, %109, %110, %111"
#define NANOCHAT_REGISTERS_29 NANOCHAT_REGISTERS_28 ", %112, %113, %114, %115"
#define NANOCHAT_REGISTERS_30 NANOCHAT_REGISTERS_29 ", %116, %117, %118, %119"
#define NANOCHAT_REGISTERS_31 NANOCHAT_REGISTERS_30 ", %120, %121, %122, %123"
#define NANOCHAT_REGISTERS_32 NANOCHAT_REGISTERS_31 ", %124, %125, %126, %127"

#define NANOCHAT_INOUT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NANOCHAT_INOUT_1 NANOCHAT_INOUT(0)
#define NANOCHAT_INOUT_2 NANOCHAT_INOUT_1, NANOCHAT_INOUT(4)
#define NANOCHAT_INOUT_3 NANOCHAT_INOUT_2, NANOCHAT_INOUT(8)
#define NANOCHAT_INOUT_4 NANOCHAT_INOUT_3, NANOCHAT_INOUT(12)
#define NANOCHAT_INOUT_5 NANOCHAT_INOUT_4, NANOCHAT_INOUT(16)
#define NANOCHAT_INOUT_6 NANOCHAT_INOUT_5, NANOCHAT_INOUT(20)
#define NANOCHAT_INOUT_7 NANOCHAT_INOUT_6, NANOCHAT_INOUT(24)
#define NANOCHAT_INOUT_8 NANOCHAT_INOUT_7, NANOCHAT_INOUT(28)
#define NANOCHAT_INOUT_9 NANOCHAT_INOUT_8, NANOCHAT_INOUT(32)
#define NANOCHAT_INOUT_10 NANOCHAT_INOUT_9, NANOCHAT_INOUT(36)
#define NANOCHAT_INOUT_11 NANOCHAT_INOUT_10, NANOCHAT_INOUT(40)
#define NANOCHAT_INOUT_12 NANOCHAT_INOUT_11, NANOCHAT_INOUT(44)
#define NANOCHAT_INOUT_13 NANOCHAT_INOUT_12, NANOCHAT_INOUT(48)
#define NANOCHAT_INOUT_14 NANOCHAT_INOUT_13, NANOCHAT_INOUT(52)
#define NANOCHAT_INOUT_15 NANOCHAT_INOUT_14, NANOCHAT_INOUT(56)
#define NANOCHAT_INOUT_16 NANOCHAT_INOUT_15, NANOCHAT_INOUT(60)
#define NANOCHAT_INOUT_17 NANOCHAT_INOUT_16, NANOCHAT_INOUT(64)
#define NANOCHAT_INOUT_18 NANOCHAT_INOUT_17, NANOCHAT_INOUT(68)
#define NANOCHAT_INOUT_19 NANOCHAT_INOUT_18, NANOCHAT_INOUT(72)
#define NANOCHAT_INOUT_20 NANOCHAT_INOUT_19, NANOCHAT_INOUT(76)
#define NANOCHAT_INOUT_21 NANOCHAT_INOUT_20, NANOCHAT_INOUT(80)
#define NANOCHAT_INOUT_22 NANOCHAT_INOUT_21, NANOCHAT_INOUT(84)
#define NANOCHAT_INOUT_23 NANOCHAT_INOUT_22, NANOCHAT_INOUT(88)
#define NANOCHAT_INOUT_24 NANOCHAT_INOUT_23, NANOCHAT_INOUT(92)
#define NANOCHAT_INOUT_25 NANOCHAT_INOUT_24, NANOCHAT_INOUT(96)
#define NANOCHAT_INOUT_26 NANOCHAT_INOUT_25, NANOCHAT_INOUT(100)
#define NANOCHAT_INOUT_27 NANOCHAT_INOUT_26, NANOCHAT_INOUT(104)
#define NANOCHAT_INOUT_28 NANOCHAT_INOUT_27, NANOCHAT_INOUT(108)
#define NANOCHAT_INOUT_29 NANOCHAT_INOUT_28, NANOCHAT_INOUT(112)
#define NANOCHAT_INOUT_30 NANOCHAT_INOUT_29, NANOCHAT_INOUT(116)
#define NANOCHAT_INOUT_31 NANOCHAT_INOUT_30, NANOCHAT_INOUT(120)
#define NANOCHAT_INOUT_32 NANOCHAT_INOUT_31, NANOCHAT_INOUT(124)

// The places in the text after the accumulator are the inputs': p0, p1, ...
#define NANOCHAT_WGMMA_OF(N, fours, type, name, p0, p1, p2, p3, p4, p5, p6)                                          \
    template <>                                                                                                      \
    struct Wgmma<N, type> {                                                                                          \
        template <int major_a, int major_b>                                                                          \
        NANOCHAT_DEVICE static void from_shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {         \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p2                                                      \
                         ", 0;\n"                                                                                    \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name                             \
                         " {" NANOCHAT_REGISTERS_##fours "}, " p0 ", " p1 ", p, 1, 1, " p3 ", " p4 ";\n}"            \
                         : NANOCHAT_INOUT_##fours                                                                    \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(major_a), "n"(major_b)                               \
                         : "memory");                                                                                \
        }                                                                                                            \
        template <int major_b>                                                                                       \
        NANOCHAT_DEVICE static void from_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,            \
                                                   int accumulate) {                                                 \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p5                                                      \
                         ", 0;\n"                                                                                    \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name                             \
                         " {" NANOCHAT_REGISTERS_##fours "}, {" p0 ", " p1 ", " p2 ", " p3 "}, " p4 ", p, 1, 1, " p6 \
                                                         ";\n}"                                                      \
                         : NANOCHAT_INOUT_##fours                                                                    \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(major_b)         \
                         : "memory");                                                                                \
        }                                                                                                            \
    };
#define NANOCHAT_WGMMA(N, fours, ...)                          \
    NANOCHAT_WGMMA_OF(N, fours, bfloat16, "bf16", __VA_ARGS__) \
    NANOCHAT_WGMMA_OF(N, fours, float16, "f16", __VA_ARGS__)

NANOCHAT_WGMMA(8, 1, "%4", "%5", "%6", "%7", "%8", "%9", "%10")
NANOCHAT_WGMMA(16, 2, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
NANOCHAT_WGMMA(24, 3, "%12", "%13", "%14", "%15", "%16", "%17", "%18")
NANOCHAT_WGMMA(32, 4, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
NANOCHAT_WGMMA(40, 5, "%20", "%21", "%22", "%23", "%24", "%25", "%26")
NANOCHAT_WGMMA(48, 6, "%24", "%25", "%26", "%27", "%28", "%29", "%30")
NANOCHAT_WGMMA(56, 7, "%28", "%29", "%30", "%31", "%32", "%33", "%34")
NANOCHAT_WGMMA(64, 8, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
NANOCHAT_WGMMA(72, 9, "%36", "%37", "%38", "%39", "%40", "%41", "%42")
NANOCHAT_WGMMA(80, 10, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
NANOCHAT_WGMMA(88, 11, "%44", "%45", "%46", "%47", "%48", "%49", "%50")
NANOCHAT_WGMMA(96, 12, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
NANOCHAT_WGMMA(104, 13, "%52", "%53", "%54", "%55", "%56", "%57", "%58")
NANOCHAT_WGMMA(112, 14, "%56", "%57", "%58", "%59", "%60", "%61", "%62")
NANOCHAT_WGMMA(120, 15, "%60", "%61", "%62", "%63", "%64", "%65", "%66")
NANOCHAT_WGMMA(128, 16, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
NANOCHAT_WGMMA(136, 17, "%68", "%69", "%70", "%71", "%72", "%73", "%74")
NANOCHAT_WGMMA(144, 18, "%72", "%73", "%74", "%75", "%76", "%77", "%78")
NANOCHAT_WGMMA(152, 19, "%76", "%77", "%78", "%79", "%80", "%81", "%82")
NANOCHAT_WGMMA(160, 20, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
NANOCHAT_WGMMA(168, 21, "%84", "%85", "%86", "%87", "%88", "%89", "%90")
NANOCHAT_WGMMA(176, 22, "%88", "%89", "%90", "%91", "%92", "%93", "%94")
NANOCHAT_WGMMA(184, 23, "%92", "%93", "%94", "%95", "%96", "%97", "%98")
NANOCHAT_WGMMA(192, 24, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
NANOCHAT_WGMMA(200, 25, "%100", "%101", "%102", "%103", "%104", "%105", "%106")
NANOCHAT_WGMMA(208, 26, "%104", "%105", "%106", "%107", "%108", "%109", "%110")
NANOCHAT_WGMMA(216, 27, "%108", "%109", "%110", "%111", "%112", "%113", "%114")
NANOCHAT_WGMMA(224, 28, "%112", "%113", "%114", "%115", "%116", "%117", "%118")
NANOCHAT_WGMMA(232, 29, "%116", "%117", "%118", "%119", "%120", "%121", "%122")
NANOCHAT_WGMMA(240, 30, "%120", "%121", "%122", "%123", "%124", "%125", "%126")
NANOCHAT_WGMMA(248, 31, "%124", "%125", "%126", "%127", "%128", "%129", "%130")
NANOCHAT_WGMMA(256, 32, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#endif

// --- streams of global memory ---

// Load and store 8 or 16 bytes, at an address that is a multiple of that, in one access. Nothing reads the bytes again
// soon, so the caches drop them first.
NANOCHAT_DEVICE void load_streamed(uint32_t (&words)[2], const void* from) {
    ON_DEVICE(
        asm volatile("ld.global.cs.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from) : "memory"));
    ON_HOST(emulation::load_global(words, from, 8));
}
NANOCHAT_DEVICE void load_streamed(uint32_t (&words)[4], const void* from) {
    ON_DEVICE(asm volatile("ld.global.cs.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(words[0]), "=r"(words[1]),
                           "=r"(words[2]), "=r"(words[3]) : "l"(from) : "memory"));
    ON_HOST(emulation::load_global(words, from, 16));
}
NANOCHAT_DEVICE void store_streamed(void* to, const uint32_t (&words)[4]) {
    ON_DEVICE(asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]),
                           "r"(words[2]), "r"(words[3]) : "memory"));
    ON_HOST(emulation::store_16(to, words));
}

}   // namespace nanochat::device
