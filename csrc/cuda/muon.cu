// The memory-bound parts of Muon (https://kellerjordan.github.io/posts/muon/) before and after Newton-Schulz, on a list of
// matrices of one shape, optionally with cautious weight decay (arXiv:2510.12402). One pass each:
//   momentum: 16 bytes per element, 14 with bfloat16 gradients; also computes the norms that Newton-Schulz divides by
//   update:   12 bytes per element, 14 with a bfloat16 copy of the parameters, 8 with bfloat16 parameters
// The blocks stay on the GPU and take chunks of the matrices in turn.
#include <cmath>
#include <cstdint>

#include "../check.h"
#include "../kernels.h"
#include "muon.cuh"
#include "packs.cuh"

namespace nanochat::cuda::muon_kernels {
namespace {

constexpr int kThreads = 256;
// Per thread: 96 to 128 bytes of loads in flight, 96 to 128 KB per multiprocessor.
constexpr int kPacks = 4;
// Blocks that share a multiprocessor, which leaves 64 registers per thread.
constexpr int kBlocksResident = 4;
constexpr int kPackElements = kPack<float>;
constexpr int kStride = kThreads * kPackElements;   // between the packs of a thread
constexpr int kChunk = kPacks * kStride;            // elements that a block takes at a time

// Capacities of the tables of pointers.
constexpr int kFewMatrices = 128, kManyMatrices = 2000;

int64_t chunks_per_matrix(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Calls use(matrix, first element) for each chunk of this block.
template <class Use>
NANOCHAT_DEVICE void for_each_chunk(uint32_t chunks, uint32_t per_matrix, const Use& use) {
#pragma unroll 1
    for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const uint32_t matrix = chunk / per_matrix;
        use(matrix, int64_t{chunk - matrix * per_matrix} * kChunk);
    }
}

// --- momentum ---

template <int capacity>
struct MomentumTable {
    const void* grads[capacity];
    float* buffers[capacity];
};

struct MomentumOptions {
    float* update;      // of the table's first matrix
    double* partials;   // (matrices, per_matrix) sums of squares of the update, or null
    int64_t numel;
    uint32_t chunks, per_matrix;   // of all matrices of the table, of one
    double momentum;
    const double* momentum_address;
    bool nesterov;
};
static_assert(sizeof(MomentumTable<kManyMatrices>) + sizeof(MomentumOptions) <= kArgumentBytes);

struct Momentum {
    float keep, rest;
};

// Read after the loads of the packs are issued, so that their latencies overlap.
NANOCHAT_DEVICE Momentum momentum_of(const MomentumOptions& o) {
    const double momentum = o.momentum_address ? *o.momentum_address : o.momentum;
    return {static_cast<float>(momentum), static_cast<float>(1 - momentum)};
}

// Sets `buffer` to the new momentum and `update` to the update, and adds the squares of the update to `sum` in double
// precision, where they cannot underflow. A multiprocessor of an H200 receives 1.4 elements per cycle from memory and has
// 64 lanes to add them; a GeForce receives 0.2 and has 2.
template <class G>
NANOCHAT_DEVICE void momentum_step(Pack<float, kPackElements>& buffer, const Pack<G, kPackElements>& grad,
                                   Pack<float, kPackElements>& update, const Momentum& momentum, bool nesterov,
                                   bool squares, double& sum) {
    const float keep = momentum.keep, rest = momentum.rest;
#pragma unroll
    for (int i = 0; i < kPackElements; i += 2) {
        float b[2], u[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float g = element(grad, i + j);
            b[j] = keep * element(buffer, i + j) + rest * g;
            u[j] = nesterov ? keep * b[j] + rest * g : b[j];
            if (squares) sum += static_cast<double>(u[j]) * u[j];
        }
        set_pair(buffer, i, b[0], b[1]);
        set_pair(update, i, u[0], u[1]);
    }
}

template <class G, int capacity>
__global__ void __launch_bounds__(kThreads, kBlocksResident)
    momentum_kernel(const __grid_constant__ MomentumTable<capacity> table, const MomentumOptions o) {
    constexpr int N = kPackElements;
    const bool squares = o.partials != nullptr;
    for_each_chunk(o.chunks, o.per_matrix, [&](uint32_t matrix, int64_t chunk_start) {
        const G* grad = static_cast<const G*>(table.grads[matrix]);
        float* buffer = table.buffers[matrix];
        float* update = o.update + matrix * o.numel;
        const bool aligned = is_aligned<N>(grad) && is_aligned<N>(buffer) && is_aligned<N>(update);
        const int64_t start = chunk_start + threadIdx.x * N;
        double sum = 0;

        if (aligned && chunk_start + kChunk <= o.numel) {
            Pack<G, N> g[kPacks];
            Pack<float, N> b[kPacks];
#pragma unroll
            for (int i = 0; i < kPacks; ++i) {
                g[i] = load_streamed<N>(grad + start + i * kStride);
                b[i] = load_streamed<N>(buffer + start + i * kStride);
            }
            const Momentum momentum = momentum_of(o);
#pragma unroll
            for (int i = 0; i < kPacks; ++i) {
                Pack<float, N> u;
                momentum_step(b[i], g[i], u, momentum, o.nesterov, squares, sum);
                store_streamed(buffer + start + i * kStride, b[i]);
                store(update + start + i * kStride, u);
            }
        } else {
            const Momentum momentum = momentum_of(o);
#pragma unroll 1
            for (int64_t first = start; first < o.numel && first < chunk_start + kChunk; first += kStride) {
                const Pack<G, N> g = load<N>(grad + first, o.numel - first, aligned);
                Pack<float, N> b = load<N>(buffer + first, o.numel - first, aligned), u;
                momentum_step(b, g, u, momentum, o.nesterov, squares, sum);   // beyond the end: zeros
                store(buffer + first, b, o.numel - first, aligned);
                store(update + first, u, o.numel - first, aligned);
            }
        }
        if (squares) {
            NANOCHAT_SHARED(double[kThreads / 32], warps);
            sum = block_sum(sum, warps);
            if (threadIdx.x == 0) o.partials[int64_t{matrix} * o.per_matrix + chunk_start / kChunk] = sum;
            __syncthreads();   // all threads have read the sums of the warps
        }
    });
}

// One block per matrix.
__global__ void __launch_bounds__(kThreads) norms_kernel(const double* partials, int64_t count, double* norms) {
    NANOCHAT_SHARED(double[kThreads / 32], warps);
    const double* own = partials + blockIdx.x * count;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += own[i];
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) norms[blockIdx.x] = sqrt(sum);
}

template <class G, int capacity>
void launch_momentum(const MuonMomentum& a, double* partials, void* stream) {
    const int64_t per_matrix = chunks_per_matrix(a.numel);
    for (int64_t start = 0; start < a.count; start += capacity) {
        MomentumTable<capacity> table;
        const int64_t matrices = std::min<int64_t>(a.count - start, capacity);
        for (int64_t i = 0; i < matrices; ++i) {
            table.grads[i] = a.grads[start + i];
            table.buffers[i] = a.momentum_buffers[start + i];
        }
        const MomentumOptions options = {
            .update = a.update + start * a.numel,
            .partials = partials ? partials + start * per_matrix : nullptr,
            .numel = a.numel,
            .chunks = static_cast<uint32_t>(matrices * per_matrix),
            .per_matrix = static_cast<uint32_t>(per_matrix),
            .momentum = a.momentum,
            .momentum_address = a.momentum_address,
            .nesterov = a.nesterov,
        };
        device::launch("muon_momentum_", momentum_kernel<G, capacity>,
                       resident_blocks(a.execution.device, kBlocksResident, options.chunks), dim3(kThreads), 0, stream,
                       table, options);
    }
}

template <class G>
void launch_momentum(const MuonMomentum& a, double* partials, void* stream) {
    a.count <= kFewMatrices ? launch_momentum<G, kFewMatrices>(a, partials, stream)
                            : launch_momentum<G, kManyMatrices>(a, partials, stream);
}

// --- update ---

template <int capacity>
struct UpdateTable {
    void* params[capacity];
    void* copies[capacity];   // null: none
};

struct UpdateOptions {
    const float* update;   // of the table's first matrix
    int64_t numel;
    uint32_t chunks, per_matrix;   // of all matrices of the table, of one
    UpdateRates rates;
};
static_assert(sizeof(UpdateTable<kManyMatrices>) + sizeof(UpdateOptions) <= kArgumentBytes);

template <class P>
NANOCHAT_DEVICE void update_step(Pack<P, kPackElements>& param, const Pack<float, kPackElements>& update,
                                 const Rates& rates) {
#pragma unroll
    for (int i = 0; i < kPackElements; i += 2) {
        float p[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            p[j] = updated(element(param, i + j), element(update, i + j), rates);
        }
        set_pair(param, i, p[0], p[1]);
    }
}

template <class P, int capacity>
__global__ void __launch_bounds__(kThreads, kBlocksResident)
    update_kernel(const __grid_constant__ UpdateTable<capacity> table, const UpdateOptions o) {
    constexpr int N = kPackElements;
    for_each_chunk(o.chunks, o.per_matrix, [&](uint32_t matrix, int64_t chunk_start) {
        P* param = static_cast<P*>(table.params[matrix]);
        bfloat16* copy = static_cast<bfloat16*>(table.copies[matrix]);
        const float* update = o.update + matrix * o.numel;
        const bool aligned = is_aligned<N>(param) && is_aligned<N>(update) && is_aligned<N>(copy);
        const int64_t start = chunk_start + threadIdx.x * N;

        if (aligned && chunk_start + kChunk <= o.numel) {
            Pack<P, N> p[kPacks];
            Pack<float, N> u[kPacks];
#pragma unroll
            for (int i = 0; i < kPacks; ++i) {
                u[i] = load_streamed<N>(update + start + i * kStride);
                p[i] = load<N>(param + start + i * kStride);
            }
            const Rates rates = rates_of(o.rates);   // after the loads are issued: latencies overlap
#pragma unroll
            for (int i = 0; i < kPacks; ++i) {
                update_step(p[i], u[i], rates);
                store(param + start + i * kStride, p[i]);
                store_copy(copy, start + i * kStride, p[i], N, true);
            }
            return;
        }
        const Rates rates = rates_of(o.rates);
#pragma unroll 1
        for (int64_t first = start; first < o.numel && first < chunk_start + kChunk; first += kStride) {
            const Pack<float, N> u = load<N>(update + first, o.numel - first, aligned);
            Pack<P, N> p = load<N>(param + first, o.numel - first, aligned);
            update_step(p, u, rates);
            store(param + first, p, o.numel - first, aligned);
            store_copy(copy, first, p, o.numel - first, aligned);
        }
    });
}

template <class P, int capacity>
void launch_update(const MuonUpdate& a, void* stream) {
    for (int64_t start = 0; start < a.count; start += capacity) {
        UpdateTable<capacity> table;
        const int64_t matrices = std::min<int64_t>(a.count - start, capacity);
        for (int64_t i = 0; i < matrices; ++i) {
            table.params[i] = a.params[start + i];
            table.copies[i] = a.copies ? a.copies[start + i] : nullptr;
        }
        const UpdateOptions options = {
            .update = a.update + start * a.numel,
            .numel = a.numel,
            .chunks = static_cast<uint32_t>(matrices * chunks_per_matrix(a.numel)),
            .per_matrix = static_cast<uint32_t>(chunks_per_matrix(a.numel)),
            .rates = update_rates(a),
        };
        device::launch("muon_update_", update_kernel<P, capacity>,
                       resident_blocks(a.execution.device, kBlocksResident, options.chunks), dim3(kThreads), 0, stream,
                       table, options);
    }
}

template <class P>
void launch_update(const MuonUpdate& a, void* stream) {
    a.count <= kFewMatrices ? launch_update<P, kFewMatrices>(a, stream) : launch_update<P, kManyMatrices>(a, stream);
}

void require_numel(const char* op, int64_t numel) {
    constexpr int64_t kMost = INT32_MAX / kManyMatrices;   // chunks
    require(chunks_per_matrix(numel) <= kMost, op, ": a matrix must have at most ", kMost * kChunk, " elements, got ",
            numel);
}

}   // namespace
}   // namespace nanochat::cuda::muon_kernels

namespace nanochat::cuda {

int64_t muon_momentum_workspace_bytes(const MuonMomentum& a) {
    const int64_t partials = a.norms ? a.count * muon_kernels::chunks_per_matrix(a.numel) : 0;
    return partials * static_cast<int64_t>(sizeof(double));
}

void muon_momentum(const MuonMomentum& a) {
    using namespace muon_kernels;
    void* const stream = a.execution.stream;
    if (a.count == 0) return;
    require_numel("muon_momentum_", a.numel);
    double* partials = a.norms ? static_cast<double*>(a.execution.workspace) : nullptr;
    if (a.numel > 0) {
        a.grad_dtype == DType::bfloat16 ? launch_momentum<bfloat16>(a, partials, stream)
                                        : launch_momentum<float>(a, partials, stream);
    }
    if (a.norms) {
        require(a.count <= INT32_MAX, "muon_momentum_: grads must hold at most ", INT32_MAX, " matrices, got ",
                a.count);
        device::launch("muon_momentum_", norms_kernel, dim3(static_cast<uint32_t>(a.count)), dim3(kThreads), 0, stream,
                       static_cast<const double*>(partials), chunks_per_matrix(a.numel), a.norms);
    }
}

void muon_update(const MuonUpdate& a) {
    using namespace muon_kernels;
    void* const stream = a.execution.stream;
    if (a.count == 0 || a.numel == 0) return;
    require_numel("muon_update_", a.numel);
    a.param_dtype == DType::bfloat16 ? launch_update<bfloat16>(a, stream) : launch_update<float>(a, stream);
}

}   // namespace nanochat::cuda
