// Gated rows of an embedding, added to the values of attention, and the gradients.
//
// An element is read once and written once. With 2 or 4 bytes per element, a value takes
//   add_value_embedding:           the value, the element of the table and the result
//   add_value_embedding_backward:  the gradient that comes in, the element of the table and its gradient
// and a head 4 bytes of dz in the backward pass, which two small launches read.
//
// A head takes `lanes` neighbouring threads, a power of two up to a warp, and a group of so many threads has several heads
// of one token.
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "gate.cuh"
#include "rows.cuh"

namespace nanochat::cuda::value_embedding_kernels {
namespace {

constexpr float kGateScale = 3;   // a gate is this times its sigmoid
constexpr int kThreads = 128;
constexpr int kHeads = 4;   // of a group: 96 to 128 bytes of loads in flight per thread
// Blocks that share a multiprocessor, which leaves 96 registers per thread.
constexpr int kBlocksResident = 5;

// Of both passes. In the forward pass `in` is v and `out` the result, in the backward pass dout and the gradient of the
// rows of the table.
struct PassArguments {
    const void *in, *h, *table;
    int64_t h_stride, V;
    const float* gate;
    const int64_t* ids;
    void* out;
    float* dz;   // (N, Hkv), written by the backward pass
    int Hkv, D, I;
    int groups;       // of a token; head g belongs to group g % groups
    uint32_t items;   // groups of all tokens
    int lane_bits;    // log2 of the lanes of a head
};

// The result of a pack: v + factor row, or factor dout.
template <bool backward, class Out, class In, class Row, int N>
NANOCHAT_DEVICE Pack<Out, N> result_of(const Pack<In, N>& in, const Pack<Row, N>& row, float factor) {
    Pack<Out, N> out;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
        float pair[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            pair[j] = backward ? factor * element(in, i + j) : element(in, i + j) + factor * element(row, i + j);
        }
        set_pair(out, i, pair[0], pair[1]);
    }
    return out;
}

template <class In, class Row, int N>
NANOCHAT_DEVICE float product_of(const Pack<In, N>& in, const Pack<Row, N>& row) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += element(in, i) * element(row, i);
    return sum;
}

// `whole` heads have at most one pack per lane.
template <class T, class Row, bool backward, bool whole>
__global__ void __launch_bounds__(kThreads, kBlocksResident) value_embedding_kernel(const PassArguments a) {
    using Out = std::conditional_t<backward, Row, T>;
    constexpr int N = kPack<T, Row>;
    const uint32_t item = blockIdx.x * (kThreads >> a.lane_bits) + (threadIdx.x >> a.lane_bits);
    const int64_t token = item / a.groups;
    const int lanes = 1 << a.lane_bits, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    const int first = item < a.items ? static_cast<int>(item % a.groups) : a.Hkv;   // else no head
    const int packs = (a.D + N - 1) / N;

    const int64_t id = first < a.Hkv ? a.ids[token] : -1;
    const bool known = id >= 0 && id < a.V;
    const T* h = static_cast<const T*>(a.h) + (first < a.Hkv ? token * a.h_stride : 0);
    const T* in = static_cast<const T*>(a.in) + token * a.Hkv * a.D;
    const Row* rows = static_cast<const Row*>(a.table) + (known ? id : 0) * a.Hkv * a.D;
    Out* out = static_cast<Out*>(a.out) + token * a.Hkv * a.D;

    // All loads are issued before the first is used.
    Pack<T, N> held[kHeads] = {};
    Pack<Row, N> held_rows[kHeads] = {};
    if constexpr (whole) {
#pragma unroll
        for (int i = 0; i < kHeads; ++i) {
            const int g = first + i * a.groups;
            if (g < a.Hkv && lane < packs) {
                held[i] = load_pack<N, true>(in + g * a.D, lane, a.D);
                held_rows[i] = load_pack<N, true>(rows + g * a.D, lane, a.D);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        const int g = first + i * a.groups;
        const bool exists = g < a.Hkv;
        const float part = exists ? gate_kernels::part_of_dot(a.gate + g * a.I, h, a.I, lane, lanes) : 0;
        const float sigmoid = gate_kernels::sigmoid(gate_kernels::sum_of_lanes(part, lanes));
        const float factor = known ? kGateScale * sigmoid : NAN;   // makes the row of an unknown id NaN
        float product = 0;
        if constexpr (whole) {
            if (backward) product = product_of(held[i], held_rows[i]);
            if (exists && lane < packs) {
                hold_packed(held[i]);
                store_pack<true>(out + g * a.D, lane, a.D, result_of<backward, Out>(held[i], held_rows[i], factor));
            }
        } else {
            const int end = exists ? packs : 0;
#pragma unroll 1
            for (int p = lane; p < end; p += lanes) {
                const Pack<T, N> pack = load_pack<N, false>(in + g * a.D, p, a.D);
                const Pack<Row, N> row = load_pack<N, false>(rows + g * a.D, p, a.D);
                if (backward) product += product_of(pack, row);
                store_pack<false>(out + g * a.D, p, a.D, result_of<backward, Out>(pack, row, factor));
            }
        }
        if (!backward) continue;
        product = gate_kernels::sum_of_lanes(product, lanes);
        if (exists && lane == 0) {
            a.dz[token * a.Hkv + g] = known ? factor * (1 - sigmoid) * product : 0;
        }
    }
}

// --- launches ---

// Of AddValueEmbedding or AddValueEmbeddingBackward, without `in`, `out` and `dz`.
template <class Arguments>
PassArguments pass_arguments(const char* op, const Arguments& a, int pack) {
    gate_kernels::require_sizes(op, a.Hkv, a.I);
    require(a.D >= 1 && a.Hkv * a.D <= INT32_MAX, op, ": Hkv D must be from 1 to ", INT32_MAX, ", got ", a.Hkv * a.D);
    const int64_t groups = (a.Hkv + kHeads - 1) / kHeads, packs = (a.D + pack - 1) / pack;
    require(a.N * groups <= INT32_MAX, op, ": takes at most ", INT32_MAX, " groups of ", kHeads, " heads, got ", a.N,
            " x ", groups);
    const auto lanes = std::min<uint64_t>(32, std::bit_ceil(static_cast<uint64_t>(packs)));
    return {
        .h = a.h,
        .table = a.table,
        .h_stride = a.h_stride,
        .V = a.V,
        .gate = static_cast<const float*>(a.gate),
        .ids = a.ids,
        .Hkv = static_cast<int>(a.Hkv),
        .D = static_cast<int>(a.D),
        .I = static_cast<int>(a.I),
        .groups = static_cast<int>(groups),
        .items = static_cast<uint32_t>(a.N * groups),
        .lane_bits = std::countr_zero(lanes),
    };
}

template <class T, class Row, bool backward>
void launch_pass(const char* op, const PassArguments& a, void* stream) {
    constexpr int N = kPack<T, Row>;
    bool whole = a.D % N == 0 && a.D <= 32 * N;
    for (const void* pointer : {a.in, a.table, static_cast<const void*>(a.out)}) {
        whole = whole && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    }
    const uint32_t items_per_block = kThreads >> a.lane_bits;
    device::launch(
        op, whole ? value_embedding_kernel<T, Row, backward, true> : value_embedding_kernel<T, Row, backward, false>,
        dim3((a.items + items_per_block - 1) / items_per_block), dim3(kThreads), 0, stream, a);
}

template <class T, class Row>
void launch(const AddValueEmbedding& a) {
    const char* op = "add_value_embedding";
    PassArguments arguments = pass_arguments(op, a, kPack<T, Row>);
    arguments.in = a.v;
    arguments.out = a.out;
    launch_pass<T, Row, false>(op, arguments, a.execution.stream);
}

template <class T, class Row>
void launch(const AddValueEmbeddingBackward& a) {
    const char* op = "add_value_embedding_backward";
    float* dz = static_cast<float*>(a.execution.workspace);
    PassArguments arguments = pass_arguments(op, a, kPack<T, Row>);
    arguments.in = a.dout;
    arguments.out = a.drows;
    arguments.dz = dz;
    if (a.N > 0) launch_pass<T, Row, true>(op, arguments, a.execution.stream);
    const gate_kernels::SumArguments sums = {
        .x = a.h,
        .x_stride = a.h_stride,
        .weights = static_cast<const float*>(a.gate),
        .dz = dz,
        .dx = a.dh,
        .partials = dz + a.N * a.Hkv,
        .N = a.N,
        .G = static_cast<int>(a.Hkv),
        .I = static_cast<int>(a.I),
    };
    gate_kernels::launch_sums<T>(op, sums, a.dgate, nullptr, a.execution.stream);
}

// Calls launch for the types of the values and of the table.
template <class Arguments>
void launch_typed(const Arguments& a) {
    if (a.dtype == DType::float32) return launch<float, float>(a);
    a.table_dtype == DType::bfloat16 ? launch<bfloat16, bfloat16>(a) : launch<bfloat16, float>(a);
}

}   // namespace
}   // namespace nanochat::cuda::value_embedding_kernels

namespace nanochat::cuda {

void add_value_embedding(const AddValueEmbedding& a) {
    if (a.N > 0) value_embedding_kernels::launch_typed(a);
}

int64_t add_value_embedding_backward_workspace_bytes(const AddValueEmbeddingBackward& a) {
    return gate_kernels::workspace_bytes(a.N, a.Hkv, a.Hkv, a.I);
}

void add_value_embedding_backward(const AddValueEmbeddingBackward& a) { value_embedding_kernels::launch_typed(a); }

}   // namespace nanochat::cuda
