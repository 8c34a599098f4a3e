// CUDA kernels on the CPU, for tests: g++ -x c++ -include csrc/emulation/emulation.h kernel.cu. The unchanged source of
// the kernels runs; csrc/cuda/ptx/primitives.cuh calls the functions declared here instead of PTX. No shipped binary
// contains it.
//
// A CUDA thread is a fiber. The fibers of a block run by one of four schedules, which the seed chooses (in order, in
// reverse, random lanes, one warp ahead of the others). Blocks run one after another, until one waits for another: by
// wait_for_count, or in a cluster. From then on up to 160 of them run side by side, and the same schedule chooses among
// them. Whatever the hardware leaves undefined is decided against the kernel:
//   - shared memory starts as NaN (0xFF), its dynamic part at a multiple of 16 bytes and no more; so does the kernel's
//     stack, or where a sanitizer is, local variables as 0xFE (-1.7e38), by -ftrivial-auto-var-init=pattern;
//   - copies in the background fill their target with NaN at once and land late: cp.async at its wait, tensor loads in
//     any order when the schedule pleases, and in each block of a cluster by themselves; the source of a tensor store may
//     not change before its wait, and a result that nobody waits for comes at the end of the grid;
//   - wgmma takes the accumulators away at once and computes when it is waited for;
//   - collectives check that the right threads take part with the same arguments; misuse of barriers, addresses,
//     alignment and descriptors is an error; so is leaving with copies or products in flight, and touching the shared
//     memory of a block that has left.
// Errors are std::runtime_error, with block and thread; a deadlock names the place of every thread, of six blocks.
// Built with -fsanitize=thread, each CUDA thread is a thread of its own to ThreadSanitizer, ordered by nothing but the
// kernel's own synchronisation: races show whatever the schedule. The asynchronous proxy is one more identity, which
// sees ordinary writes only through fence.proxy.async; in global memory too, for which it is another one. Blocks too have
// identities of their own, the first two to eight of a grid (the fewer, the larger they are); each other block counts as
// ordered with those whose identities it shares.
// Under -fsanitize=address,undefined, buffers have red zones.
//
// Not seen: speed, bank conflicts, spills; errors in the PTX text; the rounding of tensor cores and of approximate
// instructions; weak memory beyond happens-before; grids that overlap (one ends before the next starts, which must wait
// for it all the same); whether as many blocks fit on a GPU as wait for each other; changes to wgmma's A registers while
// it runs; plain code between synchronisations is never interleaved (ThreadSanitizer sees it).
// x86-64 Linux, one operating system's thread at a time.
#pragma once

#ifdef __CUDACC__
#error "emulation.h is for the host's compiler"
#endif
#define NANOCHAT_EMULATION 1

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../cuda/ptx/launch.h"
#include "../cuda/ptx/layouts.h"
#include "../kernels.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace nanochat {

namespace device {
struct bfloat16;
struct float16;
}   // namespace device

namespace emulation {

// --- for tests ---

struct Schedule {
    uint64_t seed = 1;
    uint32_t misalignment = 16;           // of the dynamic shared memory's base, in bytes: a multiple of 16 below 1024
    uint32_t shared_limit = 227 * 1024;   // bytes of dynamic shared memory that the GPU gives to a block
};
Schedule& schedule();

// --- launch ---

struct Launch {
    const char* name;
    dim3 grid, block;
    size_t shared_bytes;
    void (*call)(void* context);   // runs the kernel as one thread
    void* context;
    size_t argument_bytes;
    void* stream;
    device::LaunchOptions options;
};
// Throws std::runtime_error, its text beginning with the name.
void run(const Launch& launch);

// Sets the padding of an argument to 0: it could hold an old address, which a check of the arguments would find.
// Not in types of over 256 bytes, where GCC 12 can clear other bytes. An empty one may share its byte with its neighbour.
template <class T>
void clear_padding([[maybe_unused]] T& argument) {
#if !defined(__clang__)
    if constexpr (std::is_class_v<T> && std::is_trivially_copyable_v<T> && !std::is_empty_v<T> && sizeof(T) <= 256) {
        __builtin_clear_padding(&argument);
    }
#endif
}

// Parameters that are values are copied to every thread's stack.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            device::LaunchOptions options, Arguments&&... arguments) {
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<std::decay_t<Parameters>...> arguments;
    };
    alignas(Call) unsigned char space[sizeof(Call)] = {};   // the padding could hold old addresses
    Call& call = *new (space) Call{kernel, {std::forward<Arguments>(arguments)...}};
    std::apply([](auto&... each) { (clear_padding(each), ...); }, call.arguments);
    const auto body = [](void* context) {
        std::apply(static_cast<Call*>(context)->kernel, static_cast<Call*>(context)->arguments);
    };
    run({
        .name = name,
        .grid = grid,
        .block = block,
        .shared_bytes = shared_bytes,
        .call = body,
        .context = &call,
        .argument_bytes = sizeof call,
        .stream = stream,
        .options = options,
    });
}
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments&&... arguments) {
    launch(name, kernel, grid, block, shared_bytes, stream, device::LaunchOptions{},
           std::forward<Arguments>(arguments)...);
}

// --- the thread that runs ---

struct Position {
    uint3 thread, block;
    dim3 block_size, grid_size;
};
const Position& position();
int lane();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- threads together ---

void sync_warp(uint32_t mask, int line);
uint64_t shuffle(const char* operation, int line, uint32_t mask, uint64_t bits, int source);
uint32_t ballot(int line, uint32_t mask, bool predicate);
bool elect_one();

void sync_threads(int line);
void bar_sync(int id, int threads, int line);
void bar_arrive(int id, int threads);
inline uint32_t atomic_add_ordered(uint32_t* counter, uint32_t value) {
    return __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
}

// Lets other threads and blocks run until a counter that is below `count` may have changed.
void wait_for_change(const uint32_t* counter, uint32_t count, int line);
// Lets them run now, perhaps.
void offer_change();
inline void add_release(uint32_t* counter, uint32_t value) {
    __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
    offer_change();
}
inline void wait_for_count(const uint32_t* counter, uint32_t count, int line) {
    while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) < count) wait_for_change(counter, count, line);
}
void wait_for_previous_grid();

uint32_t cluster_rank();
void cluster_arrive(int line);
void cluster_wait(int line);

// --- global memory ---

void store_8(void* to, const uint32_t* words);
void store_16(void* to, const uint32_t* words);
void load_global(uint32_t* words, const void* from, int bytes);

// --- shared memory ---

void* static_shared(const void* key, size_t bytes);
template <class T>
T& static_shared(const void* key) {
    return *static_cast<T*>(static_shared(key, sizeof(T)));
}
unsigned char* dynamic_shared();
uint32_t shared_address(const void* pointer);

void load_shared_pair(float& first, float& second, uint32_t from);

void cp_async(uint32_t target, const void* source, int source_bytes);
void cp_async_commit();
void cp_async_wait(int newest);

void mbarrier_init(uint32_t barrier, int count);
void mbarrier_arrive(uint32_t barrier, int expected_bytes);
bool mbarrier_try_wait(uint32_t barrier, int parity);
void mbarrier_wait(uint32_t barrier, int parity, int line);
void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank);

// --- tensor copies ---

struct alignas(64) TensorMap {
    unsigned char* address;
    int64_t sizes[4], strides[4];   // innermost first; strides in bytes, the innermost is an element
    int32_t box[4], box_bytes;
    int32_t rank;
    DType dtype;
    device::Swizzle swizzle;
    uint32_t mark;
    uint32_t zeros[5];   // in place of padding, which could hold old addresses
};
TensorMap make_tensor_map(DType dtype, const void* address, int rank, const int64_t* sizes, const int64_t* strides,
                          const int32_t* box, device::Swizzle swizzle);

void fence_proxy_async();
void fence_proxy_async_global();
inline void fence_mbarrier_init() { fence_proxy_async(); }
void tma_load(uint32_t target, const TensorMap& map, uint32_t barrier, std::initializer_list<int> coordinates);
void tma_load_multicast(uint32_t target, const TensorMap& map, uint32_t barrier, uint32_t mask,
                        std::initializer_list<int> coordinates);
void tma_store(const TensorMap& map, uint32_t source, std::initializer_list<int> coordinates, bool add);
void bulk_store(void* to, uint32_t source, int bytes, bool add);
void tma_commit();
void tma_wait(int newest, bool read_only);

// --- tensor cores ---

using Half = DType;   // float16 or bfloat16
template <class T>
constexpr Half half_of() {
    static_assert(std::is_same_v<T, device::bfloat16> || std::is_same_v<T, device::float16>);
    return std::is_same_v<T, device::bfloat16> ? Half::bfloat16 : Half::float16;
}
float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat16(float x);

void ldmatrix(uint32_t* registers, uint32_t row, int count, bool transposed);
void stmatrix(uint32_t row, const uint32_t* registers, int count, bool transposed);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Half type);

// a: four registers, or null for the descriptor a_tile.
void wgmma(float* d, int N, const uint32_t* a, uint64_t a_tile, uint64_t b_tile, bool accumulate, device::Major major_a,
           device::Major major_b, Half type);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int newest);
void setmaxnreg(int registers, bool increase);

}   // namespace emulation
}   // namespace nanochat

// --- CUDA C++'s own names ---

#define threadIdx (::nanochat::emulation::position().thread)
#define blockIdx (::nanochat::emulation::position().block)
#define blockDim (::nanochat::emulation::position().block_size)
#define gridDim (::nanochat::emulation::position().grid_size)
#define warpSize 32
#define __trap() ::nanochat::emulation::fail("__trap, line %d", __LINE__)

inline void __syncthreads(int line = __builtin_LINE()) { nanochat::emulation::sync_threads(line); }
inline void __syncwarp(uint32_t mask = ~0u, int line = __builtin_LINE()) { nanochat::emulation::sync_warp(mask, line); }

template <class T>
T nanochat_shuffle(const char* operation, int line, uint32_t mask, T value, int source) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    bits = nanochat::emulation::shuffle(operation, line, mask, bits, source);
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    const int first = nanochat::emulation::lane() & ~(width - 1);
    return nanochat_shuffle("__shfl_sync", line, mask, value, first | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
    const int lane = nanochat::emulation::lane(), source = lane ^ bits, last = lane | (width - 1);
    return nanochat_shuffle("__shfl_xor_sync", line, mask, value, source <= last ? source : lane);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int distance, int width = 32, int line = __builtin_LINE()) {
    const int lane = nanochat::emulation::lane(), place = lane % width + distance;
    return nanochat_shuffle("__shfl_down_sync", line, mask, value, place < width ? lane + distance : lane);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance, int width = 32, int line = __builtin_LINE()) {
    const int lane = nanochat::emulation::lane(), place = lane % width - distance;
    return nanochat_shuffle("__shfl_up_sync", line, mask, value, place >= 0 ? lane - distance : lane);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
    return nanochat::emulation::ballot(line, mask, predicate);
}
inline int __any_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
    return nanochat::emulation::ballot(line, mask, predicate) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
    return nanochat::emulation::ballot(line, mask, !predicate) == 0;
}

// Atomics are relaxed, as CUDA's are: they order nothing else.
template <class T, class Combine>
T nanochat_atomic(T* address, Combine combine) {
    T old, updated;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do updated = combine(old);
    while (!__atomic_compare_exchange(address, &old, &updated, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
    return nanochat_atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
    return nanochat_atomic(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
    return nanochat_atomic(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
    return nanochat_atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
    return nanochat_atomic(address, [=](T old) { return old == expected ? value : old; });
}

template <class T>
T __ldg(const T* p) {
    return *p;
}

inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float __uint_as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
using std::max;
using std::min;
