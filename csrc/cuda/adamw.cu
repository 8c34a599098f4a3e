// AdamW (arXiv:1711.05101) on a list of tensors, in one launch for every kMaxTensors of them.
//
// Bound by memory: 28 bytes a float32 parameter, 22 with a bfloat16 parameter and float32 moments. Each thread owns
// packs of consecutive elements, of 16 bytes of the parameter's type.
#include <cmath>
#include <cstdint>

#include "../check.h"
#include "../kernels.h"

namespace nanochat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacksPerThread = 4;   // a block's fixed costs (its tensor, the constants) are spread over 4 passes
constexpr int kMaxTensors = 64;      // the table is a kernel argument, of which every architecture takes 4 KB

struct bfloat16 {
    uint16_t bits;
};

template <class T>
constexpr int kPack = 16 / sizeof(T);

// What a pack is copied as: 16 bytes at a time, or less where a pack is smaller.
template <class T, int count>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Pack {
    T values[count];
};

struct Table {
    AdamWTensor tensors[kMaxTensors];
    uint32_t first_block[kMaxTensors + 1];   // tensor i is worked on by blocks first_block[i] .. first_block[i + 1] - 1
    int count;
};

struct Constants {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inverse_sqrt_correction2, eps;
    uint64_t seed;
    uint32_t step, first_tensor;
};

struct Philox {
    uint32_t words[4];
};

// Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"), with its published constants.
__device__ Philox philox(uint64_t seed, uint64_t counter, uint32_t tensor, uint32_t step) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = tensor, c3 = step;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
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

__device__ float to_float(float x) { return x; }
__device__ float to_float(bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

__device__ void round_to(float& out, float x, const Philox*, int) { out = x; }

// To nearest, or with noise: truncation after adding 16 random bits below the last kept one is unbiased for both signs.
__device__ void round_to(bfloat16& out, float x, const Philox* noise, int lane) {
    const uint32_t bits = __float_as_uint(x);
    uint32_t added = 0x7FFF + ((bits >> 16) & 1);
    if (noise) added = (noise->words[lane / 2] >> (lane % 2 * 16)) & 0xFFFF;
    if (isfinite(x)) {
        out.bits = static_cast<uint16_t>((bits + added) >> 16);
    } else {
        out.bits = static_cast<uint16_t>((bits >> 16) | (isnan(x) ? 0x40 : 0));
    }
}

// Elements first .. first + count - 1, count at most N, which `aligned` lets move as whole packs. `first` is a multiple
// of N, so that an element's random bits do not depend on how it is reached.
template <int N, bool stochastic, class P, class M>
__device__ void update(const AdamWTensor& tensor, uint32_t tensor_index, int64_t first, int count, bool aligned,
                       const Constants& c) {
    using ParamPack = Pack<P, N>;
    using MomentPack = Pack<M, N>;
    P* param = static_cast<P*>(tensor.param) + first;
    const P* grad = static_cast<const P*>(tensor.grad) + first;
    M* exp_avg = static_cast<M*>(tensor.exp_avg) + first;
    M* exp_avg_sq = static_cast<M*>(tensor.exp_avg_sq) + first;

    ParamPack p, g;
    MomentPack m, v;
    const bool whole = aligned && count == N;
    if (whole) {
        p = *reinterpret_cast<const ParamPack*>(param);
        g = *reinterpret_cast<const ParamPack*>(grad);
        m = *reinterpret_cast<const MomentPack*>(exp_avg);
        v = *reinterpret_cast<const MomentPack*>(exp_avg_sq);
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i < count)
                p.values[i] = param[i], g.values[i] = grad[i], m.values[i] = exp_avg[i], v.values[i] = exp_avg_sq[i];
        }
    }
    Philox noise;
    if (stochastic) noise = philox(c.seed, static_cast<uint64_t>(first / N), tensor_index, c.step);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i >= count) continue;
        const float gradient = to_float(g.values[i]);
        const float first_moment = c.beta1 * to_float(m.values[i]) + c.one_minus_beta1 * gradient;
        const float second_moment = c.beta2 * to_float(v.values[i]) + c.one_minus_beta2 * gradient * gradient;
        const float denominator = sqrtf(second_moment) * c.inverse_sqrt_correction2 + c.eps;
        round_to(p.values[i], c.decay * to_float(p.values[i]) - c.step_size * first_moment / denominator,
                 stochastic ? &noise : nullptr, i);
        round_to(m.values[i], first_moment, nullptr, i);
        round_to(v.values[i], second_moment, nullptr, i);
    }
    if (whole) {
        *reinterpret_cast<ParamPack*>(param) = p;
        *reinterpret_cast<MomentPack*>(exp_avg) = m;
        *reinterpret_cast<MomentPack*>(exp_avg_sq) = v;
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (i < count) param[i] = p.values[i], exp_avg[i] = m.values[i], exp_avg_sq[i] = v.values[i];
        }
    }
}

template <bool stochastic, class P, class M>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Table table, const Constants c) {
    constexpr int N = kPack<P>;
    int index = 0;
    for (int above = table.count;
         above - index > 1;) {   // bisection: the last tensor whose first block is not after this one
        const int middle = (index + above) / 2;
        if (table.first_block[middle] <= blockIdx.x) {
            index = middle;
        } else {
            above = middle;
        }
    }
    const AdamWTensor& tensor = table.tensors[index];
    // Tensors that lie in a bucket start at any element: without 16-byte alignment, elements are moved one by one.
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(tensor.param) | reinterpret_cast<uintptr_t>(tensor.grad) |
                                reinterpret_cast<uintptr_t>(tensor.exp_avg) |
                                reinterpret_cast<uintptr_t>(tensor.exp_avg_sq);
    const bool aligned = addresses % 16 == 0;
    const int64_t block = blockIdx.x - table.first_block[index];
    for (int pass = 0; pass < kPacksPerThread; ++pass) {
        const int64_t first = ((block * kPacksPerThread + pass) * kThreads + threadIdx.x) * N;
        if (first >= tensor.numel) return;
        const int count = tensor.numel - first < N ? static_cast<int>(tensor.numel - first) : N;
        update<N, stochastic, P, M>(tensor, c.first_tensor + index, first, count, aligned, c);
    }
}

template <bool stochastic, class P, class M>
void launch(const AdamW& a, const Constants& constants, cudaStream_t stream) {
    constexpr int64_t elements_per_block = int64_t{kThreads} * kPacksPerThread * kPack<P>;
    for (int64_t start = 0; start < a.count; start += kMaxTensors) {
        Table table;
        table.count = static_cast<int>(a.count - start < kMaxTensors ? a.count - start : kMaxTensors);
        int64_t blocks = 0;
        for (int i = 0; i < table.count; ++i) {
            table.tensors[i] = a.tensors[start + i];
            table.first_block[i] = static_cast<uint32_t>(blocks);
            blocks += (table.tensors[i].numel + elements_per_block - 1) / elements_per_block;
        }
        require(blocks <= INT32_MAX, "adamw_: ", kMaxTensors, " tensors hold more than ",
                INT32_MAX * elements_per_block, " elements together; takes fewer");
        if (blocks == 0) continue;
        table.first_block[table.count] = static_cast<uint32_t>(blocks);
        Constants c = constants;
        c.first_tensor = static_cast<uint32_t>(start);
        adamw_kernel<stochastic, P, M><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(table, c);
        cuda_check(cudaGetLastError(), "adamw_: launch");
    }
}

}   // namespace

void adamw(const AdamW& a, void* stream) {
    const double correction1 = 1 - std::pow(a.beta1, static_cast<double>(a.step));
    const double correction2 = 1 - std::pow(a.beta2, static_cast<double>(a.step));
    const Constants c = {static_cast<float>(a.beta1),
                         static_cast<float>(1 - a.beta1),
                         static_cast<float>(a.beta2),
                         static_cast<float>(1 - a.beta2),
                         static_cast<float>(1 - a.lr * a.weight_decay),
                         static_cast<float>(a.lr / correction1),
                         static_cast<float>(1 / std::sqrt(correction2)),
                         static_cast<float>(a.eps),
                         a.seed,
                         static_cast<uint32_t>(a.step),
                         0};
    const auto on = static_cast<cudaStream_t>(stream);
    const bool half_moments = a.moment_dtype == DType::bfloat16;
    if (a.param_dtype == DType::float32) {
        launch<false, float, float>(a, c, on);
    } else if (a.stochastic_rounding) {
        half_moments ? launch<true, bfloat16, bfloat16>(a, c, on) : launch<true, bfloat16, float>(a, c, on);
    } else {
        half_moments ? launch<false, bfloat16, bfloat16>(a, c, on) : launch<false, bfloat16, float>(a, c, on);
    }
}

}   // namespace nanochat::cuda
