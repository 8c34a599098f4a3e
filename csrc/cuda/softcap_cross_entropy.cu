// Softcap, cross-entropy and its gradient on one chunk of logits (rows, V), in place: the part of linear_cross_entropy
// between the matrix products. One block per row.
//
//   r = 1 / (1 + 2^(2 log2(e) x / softcap)),   z = softcap tanh(x / softcap) = softcap (1 - 2 r),
//   loss = log(sum e^z) - z[target],   d loss / d x = (softmax(z) - onehot) 4 (r - r^2).
//
// Moves 4 bytes per element of bfloat16, 2 without the gradient. That is 4.6 elements per cycle for a multiprocessor of an
// H200, so an element has time for 3.5 operations of the special function unit and 28 instructions. To stay below that:
//   - z <= softcap, so e^(z - softcap) = 2^(-2 softcap log2(e) r) needs neither a maximum nor a second pass over x;
//   - for the gradient the thread keeps only e^z (r - r^2) of an element, until the sum of the row is known.
// So an element takes 3 special operations (two 2^x and 1/x) and about 17 instructions.
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../check.h"
#include "../kernels.h"
#include "packs.cuh"

namespace nanochat::cuda::softcap_cross_entropy_kernels {
namespace {

using device::exp2_approx;
using device::reciprocal_approx;

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// Rows that fit are held by the threads: 512 for V = 32,768 in bfloat16 (two blocks per multiprocessor), 1,024 for 65,536.
// Longer rows are read again for the gradient, mostly from the L2 cache.
constexpr int kMaxThreads = 1024;

// none: z = x. bounded: softcap takes the place of the row's maximum; e^(z - softcap) >= e^-60 for the largest such
// softcap, which leaves 2^-39 of float32's range to the factor r - r^2. wide: needs a true maximum, like none.
enum class Cap { none, bounded, wide };
constexpr double kLargestBound = 30;

// Per thread: 128 bytes of loads in flight, 32 of 64 registers. The exact tanh of `wide` needs more registers.
template <Cap cap>
constexpr int kHeldPacks = cap == Cap::wide ? 4 : 8;
constexpr int kPassingPacks = 2;   // of longer rows, beside the held ones

struct Arguments {
    void* logits;
    const int64_t* targets;
    const float* grad_scale;
    float* loss;
    int64_t ignore_index;
    int V;
    float inner, outer;   // bounded: 2 log2(e) / softcap, 2 softcap log2(e); wide: 1 / softcap, softcap log2(e)
};

// z log2(e) (bounded: less the softcap's), and dz/dx (bounded: a quarter of it).
struct Point {
    float exponent, slope;
};

template <Cap cap>
NANOCHAT_DEVICE Point point(float x, const Arguments& a) {
    if (cap == Cap::none) return {x * kLog2e, 1};
    if (cap == Cap::wide) {   // 1 - 2 r has an absolute error, which a large softcap would multiply
        const float tanh = tanhf(a.inner * x);
        return {a.outer * tanh, 1 - tanh * tanh};
    }
    const float r = reciprocal_approx(1 + exp2_approx(a.inner * x));
    return {-a.outer * r, r - r * r};
}

// sum 2^(exponent - top) over elements of a row. top is 0 for a bounded row, else the largest exponent.
struct Total {
    float top, sum;
};

template <Cap cap>
NANOCHAT_DEVICE Total merged(const Total& a, const Total& b) {
    if (cap == Cap::bounded) return {0, a.sum + b.sum};
    const float top = fmaxf(a.top, b.top);
    return {top, a.sum * exp2_approx(a.top - top) + b.sum * exp2_approx(b.top - top)};
}

template <Cap cap>
NANOCHAT_DEVICE Total nothing() {
    return {cap == Cap::bounded ? 0 : -FLT_MAX, 0};   // -FLT_MAX: a row may hold -infinity
}

// Merges the totals of a warp in a fixed order; every lane gets the result.
template <Cap cap>
NANOCHAT_DEVICE Total warp_total(Total total) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        total = merged<cap>(total, {__shfl_xor_sync(0xFFFFFFFF, total.top, distance),
                                    __shfl_xor_sync(0xFFFFFFFF, total.sum, distance)});
    }
    return total;
}

// Stores the weights 2^exponent (r - r^2) of a bounded row in place of its logits. The weights are in [0, 1], so the upper
// two of their 32 bits are zero. For bfloat16 the next 16 bits are kept, 7 of the exponent and 9 of the mantissa, which
// adds a quarter to the error of the final rounding.
template <int N>
NANOCHAT_DEVICE void hold_pair(Pack<float, N>& pack, int i, float low, float high) {
    set_pair(pack, i, low, high);
}
template <int N>
NANOCHAT_DEVICE void hold_pair(Pack<bfloat16, N>& pack, int i, float low, float high) {
    const uint32_t rounded_low = (__float_as_uint(low) << 2) + 0x8000;
    const uint32_t rounded_high = (__float_as_uint(high) << 2) + 0x8000;
    pack.words[i / 2] = rounded_low >> 16 | (rounded_high & 0xFFFF0000);
}
template <int N>
NANOCHAT_DEVICE float held(const Pack<float, N>& pack, int i) {
    return element(pack, i);
}
template <int N>
NANOCHAT_DEVICE float held(const Pack<bfloat16, N>& pack, int i) {
    return __uint_as_float(__float_as_uint(element(pack, i)) >> 2);
}

// Adds the elements of a pack; `hold` replaces them by their weights.
template <Cap cap, bool hold, class T, int N>
NANOCHAT_DEVICE void add(Total& total, Pack<T, N>& pack, const Arguments& a) {
    if (cap == Cap::bounded) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const Point low = point<cap>(element(pack, i), a), high = point<cap>(element(pack, i + 1), a);
            const float e_low = exp2_approx(low.exponent), e_high = exp2_approx(high.exponent);
            total.sum += e_low + e_high;
            if (hold) hold_pair(pack, i, e_low * low.slope, e_high * high.slope);
        }
    } else {
        float exponent[N];
        float top = total.top;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            exponent[i] = point<cap>(element(pack, i), a).exponent;
            top = fmaxf(top, exponent[i]);
        }
        total.sum *= exp2_approx(total.top - top);
        total.top = top;
#pragma unroll
        for (int i = 0; i < N; ++i) total.sum += exp2_approx(exponent[i] - top);
    }
}

template <Cap cap>
NANOCHAT_DEVICE float gradient(float x, float top, float factor, const Arguments& a) {
    const Point p = point<cap>(x, a);
    return exp2_approx(p.exponent - top) * p.slope * factor;
}

// Turns a pack into its gradient without the target's term: from the weights if it was held, else from the logits.
template <Cap cap, bool was_held, class T, int N>
NANOCHAT_DEVICE void differentiate(Pack<T, N>& pack, float top, float factor, const Arguments& a) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        if (cap == Cap::bounded && was_held) {
            set_pair(pack, i, held(pack, i) * factor, held(pack, i + 1) * factor);
        } else {
            const float low = element(pack, i), high = element(pack, i + 1);
            set_pair(pack, i, gradient<cap>(low, top, factor, a), gradient<cap>(high, top, factor, a));
        }
    }
}

NANOCHAT_DEVICE void store_one(float* to, float x) { *to = x; }
NANOCHAT_DEVICE void store_one(bfloat16* to, float x) {
    to->bits = static_cast<uint16_t>(device::pack<bfloat16>(x, 0));
}

// A row is `packs` aligned packs from `body` on, with up to N - 1 single elements before and after them, `edges` in all.
// Each of the first threads handles one of those.
template <class T>
struct Row {
    static constexpr int N = kPack<T>;
    T *start, *body;
    int head, packs, edges;

    NANOCHAT_DEVICE Row(T* row, int V) : start(row) {
        const int beyond = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
        head = beyond == 0 ? 0 : min(N - beyond, V);
        body = row + head;
        packs = (V - head) / N;
        edges = V - packs * N;
    }
    NANOCHAT_DEVICE T* edge(int i) const { return start + (i < head ? i : packs * N + i); }
    // The thread that writes element i.
    NANOCHAT_DEVICE int owner(int i) const {
        if (i < head) return i;
        const int pack = (i - head) / N;
        return pack < packs ? pack % static_cast<int>(blockDim.x) : i - packs * N;
    }
};

template <class T>
NANOCHAT_DEVICE void fill(const Row<T>& row, float value) {
    Pack<T, Row<T>::N> pack;
#pragma unroll
    for (int i = 0; i < Row<T>::N; i += 2) set_pair(pack, i, value, value);
    const int thread = threadIdx.x;
    for (int p = thread; p < row.packs; p += blockDim.x) store(row.body + p * Row<T>::N, pack);
    if (thread < row.edges) store_one(row.edge(thread), value);
}

template <class T, Cap cap>
__global__ void __launch_bounds__(kMaxThreads) softcap_cross_entropy_kernel(const Arguments a) {
    constexpr int N = Row<T>::N, held_packs = kHeldPacks<cap>;
    const int thread = threadIdx.x, threads = blockDim.x;
    const Row<T> row(static_cast<T*>(a.logits) + blockIdx.x * int64_t{a.V}, a.V);

    // All loads are issued before the first is used.
    const int64_t target = a.targets[blockIdx.x];
    const float grad_scale = a.grad_scale ? *a.grad_scale : 0;
    const bool has_edge = thread < row.edges;
    const float edge = has_edge ? to_float(*row.edge(thread)) : 0;
    Pack<T, N> pack[held_packs];
#pragma unroll
    for (int i = 0; i < held_packs; ++i) {
        const int p = i * threads + thread;
        if (p < row.packs) pack[i] = load<N>(row.body + p * N);
    }
    __syncwarp();   // keeps the compiler from moving the loads behind the branch

    const bool ignored = target == a.ignore_index;
    if (ignored || target < 0 || target >= a.V) {
        const float value = ignored ? 0 : NAN;
        if (a.grad_scale) fill(row, value);
        if (thread == 0) a.loss[blockIdx.x] = value;
        return;
    }
    const float target_logit = to_float(row.start[target]);

    Total total = nothing<cap>();
#pragma unroll
    for (int i = 0; i < held_packs; ++i) {
        if (i * threads + thread < row.packs) add<cap, true>(total, pack[i], a);
    }
#pragma unroll 1
    for (int first = held_packs * threads + thread; first < row.packs; first += kPassingPacks * threads) {
        Pack<T, N> passing[kPassingPacks];
#pragma unroll
        for (int i = 0; i < kPassingPacks; ++i) {
            const int p = first + i * threads;
            if (p < row.packs) passing[i] = load<N>(row.body + p * N);
        }
#pragma unroll
        for (int i = 0; i < kPassingPacks; ++i) {
            if (first + i * threads < row.packs) add<cap, false>(total, passing[i], a);
        }
    }
    if (has_edge) {
        const float exponent = point<cap>(edge, a).exponent;
        total = merged<cap>(total, cap == Cap::bounded ? Total{0, exp2_approx(exponent)} : Total{exponent, 1});
    }

    NANOCHAT_SHARED(Total[kMaxThreads / 32], warps);
    total = warp_total<cap>(total);
    if (thread % 32 == 0) warps[thread / 32] = total;
    __syncthreads();
    total = warp_total<cap>(thread % 32 < threads / 32 ? warps[thread % 32] : nothing<cap>());

    const Point target_point = point<cap>(target_logit, a);
    if (thread == 0) a.loss[blockIdx.x] = logf(total.sum) + kLn2 * (total.top - target_point.exponent);
    if (!a.grad_scale) return;

    const float factor = grad_scale * (cap == Cap::bounded ? 4 : 1) / total.sum;
#pragma unroll
    for (int i = 0; i < held_packs; ++i) {
        const int p = i * threads + thread;
        if (p < row.packs) {
            differentiate<cap, true>(pack[i], total.top, factor, a);
            store(row.body + p * N, pack[i]);
        }
    }
#pragma unroll 1
    for (int first = held_packs * threads + thread; first < row.packs; first += kPassingPacks * threads) {
#pragma unroll
        for (int i = 0; i < kPassingPacks; ++i) {
            const int p = first + i * threads;
            if (p < row.packs) pack[i] = load<N>(row.body + p * N);
        }
#pragma unroll
        for (int i = 0; i < kPassingPacks; ++i) {
            const int p = first + i * threads;
            if (p < row.packs) {
                differentiate<cap, false>(pack[i], total.top, factor, a);
                store(row.body + p * N, pack[i]);
            }
        }
    }
    if (has_edge) store_one(row.edge(thread), gradient<cap>(edge, total.top, factor, a));
    if (thread == row.owner(static_cast<int>(target))) {   // after its own store
        const float others = exp2_approx(target_point.exponent - total.top) - total.sum;
        store_one(row.start + target, others * target_point.slope * factor);
    }
}

template <class T, Cap cap>
void launch(const SoftcapCrossEntropy& a, void* stream) {
    const int packs = static_cast<int>(a.V / kPack<T>);
    const int threads = std::clamp((packs + kHeldPacks<cap> - 1) / kHeldPacks<cap>, 32, kMaxThreads);
    const double log2e = 1 / std::log(2.0), inner = cap == Cap::bounded ? 2 * log2e / a.softcap : 1 / a.softcap;
    const Arguments arguments = {
        .logits = a.logits,
        .targets = a.targets,
        .grad_scale = a.grad_scale,
        .loss = a.loss,
        .ignore_index = a.ignore_index,
        .V = static_cast<int>(a.V),
        .inner = static_cast<float>(inner),
        .outer = static_cast<float>((cap == Cap::bounded ? 2 : 1) * log2e * a.softcap),
    };
    device::launch("linear_cross_entropy", softcap_cross_entropy_kernel<T, cap>, dim3(static_cast<uint32_t>(a.rows)),
                   dim3((threads + 31) / 32 * 32), 0, stream, arguments);
}

template <class T>
void launch(const SoftcapCrossEntropy& a, void* stream) {
    if (a.softcap == 0) {
        launch<T, Cap::none>(a, stream);
    } else if (a.softcap <= kLargestBound) {
        launch<T, Cap::bounded>(a, stream);
    } else {
        launch<T, Cap::wide>(a, stream);
    }
}

}   // namespace
}   // namespace nanochat::cuda::softcap_cross_entropy_kernels

namespace nanochat::cuda {

void softcap_cross_entropy(const SoftcapCrossEntropy& a) {
    using namespace softcap_cross_entropy_kernels;
    void* const stream = a.execution.stream;
    require(a.rows <= INT32_MAX && a.V >= 1 && a.V <= INT32_MAX / 2,
            "linear_cross_entropy: the chunk must have at most ", INT32_MAX, " rows of ", INT32_MAX / 2,
            " logits, got ", a.rows, " of ", a.V);
    if (a.rows == 0) return;
    a.dtype == DType::bfloat16 ? launch<bfloat16>(a, stream) : launch<float>(a, stream);
}

}   // namespace nanochat::cuda
