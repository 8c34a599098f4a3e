// AdamW (arXiv:1711.05101), optionally with cautious weight decay (arXiv:2510.12402), on a list of tensors in one launch.
//
// Memory-bound: 28 bytes per float32 parameter, 30 with its bfloat16 copy, 22 per bfloat16 parameter with float32 moments,
// 14 if all are bfloat16.
// In that time an H200 can issue 190, 150 and 96 instructions per element. The kernel needs 43, 73 and 66, the last two
// with stochastic rounding.
//
// The blocks stay on the GPU and take chunks of the tensors in turn. The caches give up gradients and moments first, and
// keep the copies, which the next kernels read.
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../check.h"
#include "../kernels.h"
#include "packs.cuh"

namespace nanochat::cuda::adamw_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kThreadElements = 8;   // 64 to 128 bytes of loads in flight, 48 to 128 KB per multiprocessor
constexpr int64_t kChunk = int64_t{kThreads} * kThreadElements;   // elements that a block updates at a time

// Blocks that share a multiprocessor, which leaves 64 registers per thread, or the 80 that packs of 8 need.
template <int N>
constexpr int kBlocksResident = N == 8 ? 3 : 4;

// A launch with the large table takes a few microseconds more.
constexpr int kFewTensors = 64, kManyTensors = 620;

template <int capacity>
struct Table {
    AdamWTensor tensors[capacity];
    uint32_t first_chunk[capacity + 1];   // tensor i has chunks first_chunk[i] .. first_chunk[i + 1] - 1
    int count;
};

struct Numbers {
    int64_t step;
    double lr, beta1, beta2, eps, weight_decay;
};

struct Constants {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inverse_sqrt_correction2, eps;
    uint32_t step;
};

struct Options {
    uint64_t seed;
    uint32_t first_tensor;
    bool cautious;
};
static_assert(sizeof(Table<kManyTensors>) + sizeof(Constants) + sizeof(void*) + sizeof(Options) <= kArgumentBytes);

NANOCHAT_ANYWHERE Constants derive(const Numbers& n) {
    const double correction1 = 1 - pow(n.beta1, static_cast<double>(n.step));
    const double correction2 = 1 - pow(n.beta2, static_cast<double>(n.step));
    return {
        .beta1 = static_cast<float>(n.beta1),
        .one_minus_beta1 = static_cast<float>(1 - n.beta1),
        .beta2 = static_cast<float>(n.beta2),
        .one_minus_beta2 = static_cast<float>(1 - n.beta2),
        .decay = static_cast<float>(1 - n.lr * n.weight_decay),
        .step_size = static_cast<float>(n.lr / correction1),
        .inverse_sqrt_correction2 = static_cast<float>(1 / sqrt(correction2)),
        .eps = static_cast<float>(n.eps),
        .step = static_cast<uint32_t>(n.step),
    };
}

// Runs on one thread, for all threads of the next kernel: double precision is slow on many GPUs.
__global__ void derive_kernel(Numbers numbers, const int64_t* step, const double* lr, const double* weight_decay,
                              Constants* constants) {
    if (step) numbers.step = *step;
    if (lr) numbers.lr = *lr;
    if (weight_decay) numbers.weight_decay = *weight_decay;
    *constants = derive(numbers);
}

// Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"), with its published constants.
// A call returns 16 random bits for each of 8 elements. They depend only on the place of the element.
constexpr int kPhiloxElements = 8;
struct Philox {
    uint32_t words[4];
};

NANOCHAT_DEVICE Philox philox(uint64_t seed, uint64_t counter, uint32_t tensor, uint32_t step) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = tensor, c3 = step;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
}

// Rounds to the bfloat16 below or above, with the probabilities that make x the expectation: adds 16 random bits below the
// last bit that is kept, and truncates. That is unbiased for both signs. Infinity and NaN are kept.
NANOCHAT_DEVICE uint32_t round_randomly(float x, uint32_t noise) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t quiet = bits | ((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x400000 : 0);
    return ((bits & 0x7F800000) == 0x7F800000 ? quiet : bits + noise) >> 16;
}
template <int N>
NANOCHAT_DEVICE void set_pair_randomly(Pack<bfloat16, N>& pack, int i, float low, float high, uint32_t noise) {
    pack.words[i / 2] = round_randomly(low, noise & 0xFFFF) | round_randomly(high, noise >> 16) << 16;
}
template <int N>
NANOCHAT_DEVICE void set_pair_randomly(Pack<float, N>&, int, float, float, uint32_t) {}

// The exact root and quotient branch for rare cases such as zero, and take 30 instructions per element. The approximate
// ones take 10, with errors of 2^-22.
NANOCHAT_DEVICE float root(float x) { return x * rsqrtf(fminf(fmaxf(x, FLT_MIN), FLT_MAX)); }

// `first` is the index of the packs' first element in their tensor, a multiple of N.
template <bool stochastic, class P, class M, int N>
NANOCHAT_DEVICE void update(Pack<P, N>& param, const Pack<P, N>& grad, Pack<M, N>& exp_avg, Pack<M, N>& exp_avg_sq,
                            int64_t first, uint32_t tensor, const Options& options, const Constants& c) {
    Philox noise = {};
    if (stochastic) {
        noise = philox(options.seed, static_cast<uint64_t>(first) / kPhiloxElements, tensor, c.step);
        if (N < kPhiloxElements && first % kPhiloxElements != 0) {
            noise.words[0] = noise.words[2];
            noise.words[1] = noise.words[3];
        }
    }
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        float p[2], m[2], v[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float g = element(grad, i + j), old = element(param, i + j);
            m[j] = c.beta1 * element(exp_avg, i + j) + c.one_minus_beta1 * g;
            v[j] = c.beta2 * element(exp_avg_sq, i + j) + c.one_minus_beta2 * g * g;
            const float decay = !options.cautious || m[j] * old >= 0 ? c.decay : 1;
            const float denominator = root(v[j]) * c.inverse_sqrt_correction2 + c.eps;
            p[j] = decay * old - c.step_size * m[j] * device::reciprocal_approx(denominator);
        }
        if (stochastic) {
            set_pair_randomly(param, i, p[0], p[1], noise.words[i / 2]);
        } else {
            set_pair(param, i, p[0], p[1]);
        }
        set_pair(exp_avg, i, m[0], m[1]);
        set_pair(exp_avg_sq, i, v[0], v[1]);
    }
}

// Updates chunk `chunk` of a tensor.
template <bool stochastic, class P, class M>
NANOCHAT_DEVICE void update_chunk(const AdamWTensor& tensor, uint32_t number, int64_t chunk, const Constants& given,
                                  const Constants* derived, const Options& options) {
    constexpr int N = kPack<P, M>, packs = kThreadElements / N;
    const int64_t start = (chunk * packs * kThreads + threadIdx.x) * N;
    const int64_t end = tensor.numel;
    P* param = static_cast<P*>(tensor.param);
    const P* grad = static_cast<const P*>(tensor.grad);
    M* exp_avg = static_cast<M*>(tensor.exp_avg);
    M* exp_avg_sq = static_cast<M*>(tensor.exp_avg_sq);
    bfloat16* copy = static_cast<bfloat16*>(tensor.copy);
    // A tensor in a bucket may start at any element.
    const bool aligned = is_aligned<N>(param) && is_aligned<N>(grad) && is_aligned<N>(exp_avg) &&
                         is_aligned<N>(exp_avg_sq) && is_aligned<N>(copy);

    if (aligned && (chunk + 1) * kChunk <= end) {
        Pack<P, N> p[packs], g[packs];
        Pack<M, N> m[packs], v[packs];
#pragma unroll
        for (int i = 0; i < packs; ++i) {
            const int64_t first = start + i * kThreads * N;
            g[i] = load_streamed<N>(grad + first);
            m[i] = load_streamed<N>(exp_avg + first);
            v[i] = load_streamed<N>(exp_avg_sq + first);
            p[i] = load<N>(param + first);
        }
        const Constants c = derived ? *derived : given;   // read after the loads are issued: their latencies overlap
#pragma unroll
        for (int i = 0; i < packs; ++i) {
            const int64_t first = start + i * kThreads * N;
            update<stochastic>(p[i], g[i], m[i], v[i], first, number, options, c);
            store_streamed(exp_avg + first, m[i]);
            store_streamed(exp_avg_sq + first, v[i]);
            store(param + first, p[i]);
            store_copy(copy, first, p[i], N, true);
        }
        return;
    }
    const Constants c = derived ? *derived : given;
#pragma unroll 1
    for (int64_t first = start; first < end && first < start + kChunk; first += kThreads * N) {
        Pack<P, N> p = load<N>(param + first, end - first, aligned);
        const Pack<P, N> g = load<N>(grad + first, end - first, aligned);
        Pack<M, N> m = load<N>(exp_avg + first, end - first, aligned);
        Pack<M, N> v = load<N>(exp_avg_sq + first, end - first, aligned);
        update<stochastic>(p, g, m, v, first, number, options, c);
        store(exp_avg + first, m, end - first, aligned);
        store(exp_avg_sq + first, v, end - first, aligned);
        store(param + first, p, end - first, aligned);
        store_copy(copy, first, p, end - first, aligned);
    }
}

// Returns the index of the tensor that has a chunk. `index` is the result for an earlier chunk, or 0: in a long tensor it
// stays the same.
template <int capacity>
NANOCHAT_DEVICE int tensor_of(const Table<capacity>& table, uint32_t chunk, int index) {
    if (chunk < table.first_chunk[index + 1]) return index;
    for (int above = table.count; above - index > 1;) {   // the last tensor whose first chunk is not after this one
        const int middle = (index + above) / 2;
        if (table.first_chunk[middle] <= chunk) {
            index = middle;
        } else {
            above = middle;
        }
    }
    return index;
}

template <bool stochastic, class P, class M, int capacity>
__global__ void __launch_bounds__(kThreads, (kBlocksResident<kPack<P, M>>))
    adamw_kernel(const __grid_constant__ Table<capacity> table, const Constants given, const Constants* derived,
                 const Options options) {
    const uint32_t chunks = table.first_chunk[table.count];
    int index = 0;
#pragma unroll 1
    for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        index = tensor_of(table, chunk, index);
        update_chunk<stochastic, P, M>(table.tensors[index], options.first_tensor + index,
                                       chunk - table.first_chunk[index], given, derived, options);
    }
}

template <bool stochastic, class P, class M, int capacity>
void launch(const AdamW& a, const Constants& given, const Constants* derived) {
    for (int64_t start = 0; start < a.count; start += capacity) {
        Table<capacity> table;
        table.count = static_cast<int>(std::min<int64_t>(a.count - start, capacity));
        int64_t chunks = 0;
        for (int i = 0; i < table.count; ++i) {
            table.tensors[i] = a.tensors[start + i];
            table.first_chunk[i] = static_cast<uint32_t>(chunks);
            chunks += (table.tensors[i].numel + kChunk - 1) / kChunk;
        }
        require(chunks <= INT32_MAX, "adamw_: the tensors must need at most ", INT32_MAX, " chunks of ", kChunk,
                " elements, got ", chunks);
        table.first_chunk[table.count] = static_cast<uint32_t>(chunks);
        if (chunks == 0) continue;
        const Options options = {.seed = a.seed, .first_tensor = static_cast<uint32_t>(start), .cautious = a.cautious};
        device::launch("adamw_", adamw_kernel<stochastic, P, M, capacity>,
                       resident_blocks(a.execution.device, kBlocksResident<kPack<P, M>>, chunks), dim3(kThreads), 0,
                       a.execution.stream, table, given, derived, options);
    }
}

template <bool stochastic, class P, class M>
void launch(const AdamW& a, const Constants& given, const Constants* derived) {
    a.count <= kFewTensors ? launch<stochastic, P, M, kFewTensors>(a, given, derived)
                           : launch<stochastic, P, M, kManyTensors>(a, given, derived);
}

}   // namespace
}   // namespace nanochat::cuda::adamw_kernels

namespace nanochat::cuda {

int64_t adamw_workspace_bytes(const AdamW& a) {
    return a.step_address || a.lr_address || a.weight_decay_address ? sizeof(adamw_kernels::Constants) : 0;
}

void adamw(const AdamW& a) {
    using namespace adamw_kernels;
    const Numbers numbers = {
        .step = a.step,
        .lr = a.lr,
        .beta1 = a.beta1,
        .beta2 = a.beta2,
        .eps = a.eps,
        .weight_decay = a.weight_decay,
    };
    const Constants given = derive(numbers);
    Constants* derived = nullptr;
    if (adamw_workspace_bytes(a) > 0) {
        derived = static_cast<Constants*>(a.execution.workspace);
        device::launch("adamw_", derive_kernel, dim3(1), dim3(1), 0, a.execution.stream, numbers, a.step_address,
                       a.lr_address, a.weight_decay_address, derived);
    }
    const bool half_moments = a.moment_dtype == DType::bfloat16;
    if (a.param_dtype == DType::float32) {
        launch<false, float, float>(a, given, derived);
    } else if (a.stochastic_rounding) {
        half_moments ? launch<true, bfloat16, bfloat16>(a, given, derived)
                     : launch<true, bfloat16, float>(a, given, derived);
    } else {
        half_moments ? launch<false, bfloat16, bfloat16>(a, given, derived)
                     : launch<false, bfloat16, float>(a, given, derived);
    }
}

}   // namespace nanochat::cuda
