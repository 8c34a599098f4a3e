// Rotary positions and RMS norm of the heads of q and k, forward and backward, one launch for both tensors.
//
// An element is read once and written once: with 2 or 4 bytes per element, forward moves 2 elements per element of q and
// k, backward 3, and both 4 bytes of r per head. cos and sin are 4 bytes per element of one head, mostly read from the L2
// cache, once for all heads that a thread has of a token.
//
// Element i of a head is rotated with element i + D / 2, so a thread has packs of both halves. A head takes `lanes`
// neighbouring threads, a power of two up to a warp, and a group of so many threads has several heads of one token.
#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "../check.h"
#include "../kernels.h"
#include "packs.cuh"

namespace nanochat::cuda::rotary_norm_kernels {
namespace {

constexpr int kThreads = 128;
// Blocks that share a multiprocessor, which leaves 96 registers per thread.
constexpr int kBlocksResident = 5;

// --- heads ---

struct Shape {
    int T, H, Hkv, D;
    int groups;       // of a token; head h, where k's follow q's, belongs to group h % groups
    uint32_t items;   // groups of all tokens
    int lane_bits;    // log2 of the lanes of a head
    const float *cos, *sin;
    int64_t cos_stride, sin_stride;
};

// A head of q or k.
struct Head {
    bool exists, is_q;
    int64_t b, t, h;
    int64_t index;   // in contiguous tensors
};

// The group of heads of this thread, and its place among the lanes of each.
struct Group {
    uint32_t token, b, t;
    int first, lane, lanes;

    NANOCHAT_DEVICE explicit Group(const Shape& shape) {
        const uint32_t item = blockIdx.x * (kThreads >> shape.lane_bits) + (threadIdx.x >> shape.lane_bits);
        token = item / shape.groups;
        b = token / shape.T;
        t = token % shape.T;
        first = item < shape.items ? static_cast<int>(item % shape.groups) : shape.H + shape.Hkv;   // else no head
        lanes = 1 << shape.lane_bits;
        lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    }
    NANOCHAT_DEVICE Head head(const Shape& shape, int i) const {
        const int number = first + i * shape.groups;
        const bool is_q = number < shape.H;
        const int h = is_q ? number : number - shape.H, heads = is_q ? shape.H : shape.Hkv;
        return {number < shape.H + shape.Hkv, is_q, b, t, h, int64_t{token} * heads + h};
    }
};

template <class T>
NANOCHAT_DEVICE const T* strided(const void* tensor, const Strides& strides, const Head& head) {
    return static_cast<const T*>(tensor) + head.b * strides.b + head.t * strides.t + head.h * strides.h;
}

// The sum over the lanes of a head; all of them get it.
NANOCHAT_DEVICE float head_sum(float x, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, distance);
    return x;
}

// --- packs ---

// Pack p of both halves of a head.
template <class T>
struct Halves {
    static constexpr int N = kPack<T>;
    Pack<T, N> first, second;
};

// `whole`: a half is a multiple of N elements, and all packs are aligned.
template <bool whole, class T>
NANOCHAT_DEVICE Halves<T> load_halves(const T* head, int p, int half) {
    constexpr int N = kPack<T>;
    const T *first = head + p * N, *second = first + half;
    if (whole) return {load<N>(first), load<N>(second)};
    const int count = half - p * N;
    return {load<N>(first, count, is_aligned<N>(first)), load<N>(second, count, is_aligned<N>(second))};
}
template <bool whole, class T>
NANOCHAT_DEVICE void store_halves(T* head, int p, int half, const Halves<T>& halves) {
    constexpr int N = kPack<T>;
    T *first = head + p * N, *second = first + half;
    if (whole) {
        store(first, halves.first);
        store(second, halves.second);
        return;
    }
    const int count = half - p * N;
    store(first, halves.first, count, is_aligned<N>(first));
    store(second, halves.second, count, is_aligned<N>(second));
}

// cos and sin of the elements of pack p.
template <class T>
struct Angles {
    static constexpr int N = kPack<float>;
    Pack<float, N> cos[kPack<T> / N], sin[kPack<T> / N];
};

template <bool whole, class T>
NANOCHAT_DEVICE Angles<T> load_angles(const Shape& shape, int64_t t, int p) {
    constexpr int N = Angles<T>::N;
    Angles<T> angles;
#pragma unroll
    for (int i = 0; i < kPack<T> / N; ++i) {
        const int start = p * kPack<T> + i * N;
        const float *cos = shape.cos + t * shape.cos_stride + start, *sin = shape.sin + t * shape.sin_stride + start;
        if (whole) {
            angles.cos[i] = load<N>(cos);
            angles.sin[i] = load<N>(sin);
        } else {
            const int count = shape.D / 2 - start;
            angles.cos[i] = load<N>(cos, count, is_aligned<N>(cos));
            angles.sin[i] = load<N>(sin, count, is_aligned<N>(sin));
        }
    }
    return angles;
}

// Element i of both halves.
struct Point {
    float first, second;
};

template <class T>
NANOCHAT_DEVICE void hold_packed(Halves<T>& x) {
    cuda::hold_packed(x.first);
    cuda::hold_packed(x.second);
}

template <class T>
NANOCHAT_DEVICE Point point(const Halves<T>& x, int i) {
    return {element(x.first, i), element(x.second, i)};
}

// cos and sin of element i.
template <class T>
NANOCHAT_DEVICE Point angle(const Angles<T>& angles, int i) {
    constexpr int N = Angles<T>::N;
    return {element(angles.cos[i / N], i % N), element(angles.sin[i / N], i % N)};
}

NANOCHAT_DEVICE Point rotated(const Point& x, const Point& angle) {
    return {x.first * angle.first + x.second * angle.second, x.second * angle.first - x.first * angle.second};
}
NANOCHAT_DEVICE Point rotated_back(const Point& z, const Point& angle) {
    return {z.first * angle.first - z.second * angle.second, z.first * angle.second + z.second * angle.first};
}

// Sets element i of both halves to value(i), for all i.
template <class T, class Value>
NANOCHAT_DEVICE Halves<T> halves_of(const Value& value) {
    Halves<T> result;
#pragma unroll
    for (int i = 0; i < Halves<T>::N; i += 2) {
        const Point low = value(i), high = value(i + 1);
        set_pair(result.first, i, low.first, high.first);
        set_pair(result.second, i, low.second, high.second);
    }
    return result;
}

// --- the passes: what is loaded of a head, summed over it, and written ---

template <class T>
struct Forward {
    using Element = T;
    using Data = Halves<T>;
    static constexpr int kHeads = 4;   // of a group: 128 bytes of loads in flight per thread

    Shape shape;
    const void *q, *k;
    Strides q_strides, k_strides;
    T *q_out, *k_out;
    float *q_r, *k_r;
    float inverse_D, eps, scale;

    template <bool whole>
    NANOCHAT_DEVICE Data load(const Head& head, int p) const {
        const T* x = head.is_q ? strided<T>(q, q_strides, head) : strided<T>(k, k_strides, head);
        return load_halves<whole>(x, p, shape.D / 2);
    }
    NANOCHAT_DEVICE float sum(const Data& x, const Angles<T>& angles) const {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < Data::N; ++i) {
            const Point z = rotated(point(x, i), angle(angles, i));
            squares += z.first * z.first + z.second * z.second;
        }
        return squares;
    }
    NANOCHAT_DEVICE static void hold(Data& x) { hold_packed(x); }
    // What `result` needs to know of the sum over a head. One lane writes r.
    NANOCHAT_DEVICE float factor(const Head& head, float squares, bool writes) const {
        const float r = 1 / sqrtf(squares * inverse_D + eps);
        if (writes) (head.is_q ? q_r : k_r)[head.index] = r;
        return scale * r;
    }
    NANOCHAT_DEVICE Halves<T> result(const Data& x, const Angles<T>& angles, float factor) const {
        return halves_of<T>([&](int i) {
            const Point z = rotated(point(x, i), angle(angles, i));
            return Point{z.first * factor, z.second * factor};
        });
    }
    NANOCHAT_DEVICE T* target(const Head& head) const { return (head.is_q ? q_out : k_out) + head.index * shape.D; }
};

template <class T>
struct Backward {
    struct Data {
        Halves<T> dout, out;
        float r;
    };
    using Element = T;
    static constexpr int kHeads = 2;   // of a group: 128 bytes of loads in flight per thread

    Shape shape;
    const void *dq_out, *dk_out;
    Strides dq_out_strides, dk_out_strides;
    const T *q_out, *k_out;
    const float *q_r, *k_r;
    T *dq, *dk;
    float mean_factor;   // 1 / (D scale^2): of n mean(dout n) = out sum(dout out) / (D scale^2)
    float scale;

    template <bool whole>
    NANOCHAT_DEVICE Data load(const Head& head, int p) const {
        const T* dout = head.is_q ? strided<T>(dq_out, dq_out_strides, head) : strided<T>(dk_out, dk_out_strides, head);
        const T* out = (head.is_q ? q_out : k_out) + head.index * shape.D;
        return {load_halves<whole>(dout, p, shape.D / 2), load_halves<whole>(out, p, shape.D / 2),
                (head.is_q ? q_r : k_r)[head.index]};
    }
    NANOCHAT_DEVICE float sum(const Data& data, const Angles<T>&) const {
        float products = 0;
#pragma unroll
        for (int i = 0; i < Halves<T>::N; ++i) {
            const Point dout = point(data.dout, i), out = point(data.out, i);
            products += dout.first * out.first + dout.second * out.second;
        }
        return products;
    }
    NANOCHAT_DEVICE static void hold(Data& data) {
        hold_packed(data.dout);
        hold_packed(data.out);
    }
    NANOCHAT_DEVICE float factor(const Head&, float products, bool) const { return products * mean_factor; }
    NANOCHAT_DEVICE Halves<T> result(const Data& data, const Angles<T>& angles, float mean) const {
        const float factor = scale * data.r;
        return halves_of<T>([&](int i) {
            const Point dout = point(data.dout, i), out = point(data.out, i);
            const Point dz = {factor * (dout.first - out.first * mean), factor * (dout.second - out.second * mean)};
            return rotated_back(dz, angle(angles, i));
        });
    }
    NANOCHAT_DEVICE T* target(const Head& head) const { return (head.is_q ? dq : dk) + head.index * shape.D; }
};

// `whole` heads have at most one pack of each half per lane, which stays in registers. Others are read twice.
template <class Pass, bool whole>
__global__ void __launch_bounds__(kThreads, kBlocksResident) rotary_norm_kernel(const Pass pass) {
    using T = typename Pass::Element;
    const Shape& shape = pass.shape;
    const Group group(shape);
    const int half = shape.D / 2, packs = (half + kPack<T> - 1) / kPack<T>;
    if constexpr (whole) {
        // All loads are issued before the first is used.
        typename Pass::Data data[Pass::kHeads] = {};
        Angles<T> angles = {};
        const bool has_pack = group.lane < packs;
#pragma unroll
        for (int i = 0; i < Pass::kHeads; ++i) {
            const Head head = group.head(shape, i);
            if (has_pack && head.exists) data[i] = pass.template load<true>(head, group.lane);
        }
        if (has_pack) angles = load_angles<true, T>(shape, group.t, group.lane);
        float sum[Pass::kHeads];
#pragma unroll
        for (int i = 0; i < Pass::kHeads; ++i) sum[i] = head_sum(pass.sum(data[i], angles), group.lanes);
#pragma unroll
        for (int i = 0; i < Pass::kHeads; ++i) {
            const Head head = group.head(shape, i);
            if (!head.exists || !has_pack) continue;
            Pass::hold(data[i]);
            const float factor = pass.factor(head, sum[i], group.lane == 0);
            store_halves<true>(pass.target(head), group.lane, half, pass.result(data[i], angles, factor));
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < Pass::kHeads; ++i) {
            const Head head = group.head(shape, i);
            const int end = head.exists ? packs : 0;
            float sum = 0;
#pragma unroll 1
            for (int p = group.lane; p < end; p += group.lanes) {
                sum += pass.sum(pass.template load<false>(head, p), load_angles<false, T>(shape, group.t, p));
            }
            sum = head_sum(sum, group.lanes);
#pragma unroll 1
            for (int p = group.lane; p < end; p += group.lanes) {
                const float factor = pass.factor(head, sum, p == 0);
                store_halves<false>(
                    pass.target(head), p, half,
                    pass.result(pass.template load<false>(head, p), load_angles<false, T>(shape, group.t, p), factor));
            }
        }
    }
}

// --- launches ---

// Of RotaryNorm or RotaryNormBackward.
template <class Pass, class Arguments>
Shape shape_of(const char* op, const Arguments& a) {
    require(a.D >= 2 && a.D % 2 == 0 && a.D <= INT32_MAX, op, ": D must be even, got ", a.D);
    const int64_t heads = a.H + a.Hkv, groups = (heads + Pass::kHeads - 1) / Pass::kHeads;
    const int64_t packs = (a.D / 2 + kPack<typename Pass::Element> - 1) / kPack<typename Pass::Element>;
    const auto lanes = std::min<uint64_t>(32, std::bit_ceil(static_cast<uint64_t>(packs)));
    require(heads <= INT32_MAX && a.T <= INT32_MAX && a.B * a.T * groups <= INT32_MAX, op, ": takes at most ",
            INT32_MAX, " groups of ", Pass::kHeads, " heads, got ", a.B, " x ", a.T, " x ", groups);
    return {
        .T = static_cast<int>(a.T),
        .H = static_cast<int>(a.H),
        .Hkv = static_cast<int>(a.Hkv),
        .D = static_cast<int>(a.D),
        .groups = static_cast<int>(groups),
        .items = static_cast<uint32_t>(a.B * a.T * groups),
        .lane_bits = std::countr_zero(lanes),
        .cos = static_cast<const float*>(a.cos),
        .sin = static_cast<const float*>(a.sin),
        .cos_stride = a.cos_stride,
        .sin_stride = a.sin_stride,
    };
}

bool is_aligned_16(std::initializer_list<const void*> pointers) {
    return std::all_of(pointers.begin(), pointers.end(),
                       [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; });
}

bool are_multiples(int pack, const Strides& strides) {
    return strides.b % pack == 0 && strides.t % pack == 0 && strides.h % pack == 0;
}

// Whether all packs of all heads are aligned, and a lane has at most one of each half.
template <class T>
bool is_whole(const Shape& shape, const Strides& q, const Strides& k, std::initializer_list<const void*> pointers) {
    return shape.D / 2 % kPack<T> == 0 && shape.D / 2 <= 32 * kPack<T> && are_multiples(kPack<T>, q) &&
           are_multiples(kPack<T>, k) && shape.cos_stride % kPack<float> == 0 && shape.sin_stride % kPack<float> == 0 &&
           is_aligned_16(pointers) && is_aligned_16({shape.cos, shape.sin});
}

template <class Pass>
void launch(const char* op, const Pass& pass, bool whole, void* stream) {
    const uint32_t items_per_block = kThreads >> pass.shape.lane_bits;
    device::launch(op, whole ? rotary_norm_kernel<Pass, true> : rotary_norm_kernel<Pass, false>,
                   dim3((pass.shape.items + items_per_block - 1) / items_per_block), dim3(kThreads), 0, stream, pass);
}

template <class T>
void launch(const RotaryNorm& a) {
    const char* op = "rotary_norm";
    const Forward<T> pass = {
        .shape = shape_of<Forward<T>>(op, a),
        .q = a.q,
        .k = a.k,
        .q_strides = a.q_strides,
        .k_strides = a.k_strides,
        .q_out = static_cast<T*>(a.q_out),
        .k_out = static_cast<T*>(a.k_out),
        .q_r = static_cast<float*>(a.q_r),
        .k_r = static_cast<float*>(a.k_r),
        .inverse_D = static_cast<float>(1.0 / a.D),
        .eps = static_cast<float>(a.eps),
        .scale = static_cast<float>(a.scale),
    };
    const bool whole = is_whole<T>(pass.shape, a.q_strides, a.k_strides, {a.q, a.k, a.q_out, a.k_out});
    launch(op, pass, whole, a.execution.stream);
}

template <class T>
void launch(const RotaryNormBackward& a) {
    const char* op = "rotary_norm_backward";
    const Backward<T> pass = {
        .shape = shape_of<Backward<T>>(op, a),
        .dq_out = a.dq_out,
        .dk_out = a.dk_out,
        .dq_out_strides = a.dq_out_strides,
        .dk_out_strides = a.dk_out_strides,
        .q_out = static_cast<const T*>(a.q_out),
        .k_out = static_cast<const T*>(a.k_out),
        .q_r = static_cast<const float*>(a.q_r),
        .k_r = static_cast<const float*>(a.k_r),
        .dq = static_cast<T*>(a.dq),
        .dk = static_cast<T*>(a.dk),
        .mean_factor = static_cast<float>(1 / (a.D * a.scale * a.scale)),
        .scale = static_cast<float>(a.scale),
    };
    const bool whole =
        is_whole<T>(pass.shape, a.dq_out_strides, a.dk_out_strides, {a.dq_out, a.dk_out, a.q_out, a.k_out, a.dq, a.dk});
    launch(op, pass, whole, a.execution.stream);
}

}   // namespace
}   // namespace nanochat::cuda::rotary_norm_kernels

namespace nanochat::cuda {

void rotary_norm(const RotaryNorm& a) {
    using namespace rotary_norm_kernels;
    if (a.B * a.T * (a.H + a.Hkv) == 0) return;
    a.dtype == DType::bfloat16 ? launch<bfloat16>(a) : launch<float>(a);
}

void rotary_norm_backward(const RotaryNormBackward& a) {
    using namespace rotary_norm_kernels;
    if (a.B * a.T * (a.H + a.Hkv) == 0) return;
    a.dtype == DType::bfloat16 ? launch<bfloat16>(a) : launch<float>(a);
}

}   // namespace nanochat::cuda
