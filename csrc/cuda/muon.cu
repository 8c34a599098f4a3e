// The memory-bound parts of Muon (https://kellerjordan.github.io/posts/muon/) before and after Newton-Schulz, on a list of
// matrices of one shape, optionally with cautious weight decay (arXiv:2510.12402). One pass each:
//   momentum: 16 bytes per element, 14 with bfloat16 gradients; also computes the norms that Newton-Schulz divides by
//   update:   12 bytes per element, 14 with a bfloat16 copy of the parameters, 8 with bfloat16 parameters
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
constexpr int kBlockElements = kPacks * kStride;

// Capacities of the tables of pointers. blockIdx.y counts the matrices.
constexpr int kFewMatrices = 128, kManyMatrices = 2000;

int64_t blocks_per_matrix(int64_t numel) { return (numel + kBlockElements - 1) / kBlockElements; }

// --- momentum ---

template <int capacity>
struct MomentumTable {
    const void* grads[capacity];
    float* buffers[capacity];
};

struct MomentumOptions {
    float* update;      // of the table's first matrix
    double* partials;   // (matrices, blocks_per_matrix) sums of squares of the update, or null
    int64_t numel;
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
    const G* grad = static_cast<const G*>(table.grads[blockIdx.y]);
    float* buffer = table.buffers[blockIdx.y];
    float* update = o.update + blockIdx.y * o.numel;
    const bool aligned = is_aligned<N>(grad) && is_aligned<N>(buffer) && is_aligned<N>(update);
    const int64_t block_start = int64_t{blockIdx.x} * kBlockElements, start = block_start + threadIdx.x * N;
    const bool squares = o.partials != nullptr;
    double sum = 0;

    if (aligned && block_start + kBlockElements <= o.numel) {
        Pack<G, N> g[kPacks];
        Pack<float, N> b[kPacks];
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            g[i] = load<N>(grad + start + i * kStride);
            b[i] = load<N>(buffer + start + i * kStride);
        }
        const Momentum momentum = momentum_of(o);
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            Pack<float, N> u;
            momentum_step(b[i], g[i], u, momentum, o.nesterov, squares, sum);
            store(buffer + start + i * kStride, b[i]);
            store(update + start + i * kStride, u);
        }
    } else {
        const Momentum momentum = momentum_of(o);
#pragma unroll 1
        for (int64_t first = start; first < o.numel && first < block_start + kBlockElements; first += kStride) {
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
        if (threadIdx.x == 0) o.partials[blockIdx.y * int64_t{gridDim.x} + blockIdx.x] = sum;
    }
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
    const int64_t blocks = blocks_per_matrix(a.numel);
    for (int64_t start = 0; start < a.count; start += capacity) {
        MomentumTable<capacity> table;
        const int64_t matrices = std::min<int64_t>(a.count - start, capacity);
        for (int64_t i = 0; i < matrices; ++i) {
            table.grads[i] = a.grads[start + i];
            table.buffers[i] = a.momentum_buffers[start + i];
        }
        const MomentumOptions options = {
            .update = a.update + start * a.numel,
            .partials = partials ? partials + start * blocks : nullptr,
            .numel = a.numel,
            .momentum = a.momentum,
            .momentum_address = a.momentum_address,
            .nesterov = a.nesterov,
        };
        device::launch("muon_momentum_", momentum_kernel<G, capacity>,
                       dim3(static_cast<uint32_t>(blocks), static_cast<uint32_t>(matrices)), dim3(kThreads), 0, stream,
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
    P* param = static_cast<P*>(table.params[blockIdx.y]);
    bfloat16* copy = static_cast<bfloat16*>(table.copies[blockIdx.y]);
    const float* update = o.update + blockIdx.y * o.numel;
    const bool aligned = is_aligned<N>(param) && is_aligned<N>(update) && is_aligned<N>(copy);
    const int64_t block_start = int64_t{blockIdx.x} * kBlockElements, start = block_start + threadIdx.x * N;

    if (aligned && block_start + kBlockElements <= o.numel) {
        Pack<P, N> p[kPacks];
        Pack<float, N> u[kPacks];
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            u[i] = load<N>(update + start + i * kStride);
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
    for (int64_t first = start; first < o.numel && first < block_start + kBlockElements; first += kStride) {
        const Pack<float, N> u = load<N>(update + first, o.numel - first, aligned);
        Pack<P, N> p = load<N>(param + first, o.numel - first, aligned);
        update_step(p, u, rates);
        store(param + first, p, o.numel - first, aligned);
        store_copy(copy, first, p, o.numel - first, aligned);
    }
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
            .rates = update_rates(a),
        };
        device::launch("muon_update_", update_kernel<P, capacity>,
                       dim3(static_cast<uint32_t>(blocks_per_matrix(a.numel)), static_cast<uint32_t>(matrices)),
                       dim3(kThreads), 0, stream, table, options);
    }
}

template <class P>
void launch_update(const MuonUpdate& a, void* stream) {
    a.count <= kFewMatrices ? launch_update<P, kFewMatrices>(a, stream) : launch_update<P, kManyMatrices>(a, stream);
}

void require_grid(const char* op, int64_t numel) {
    require(blocks_per_matrix(numel) <= INT32_MAX, op, ": a matrix must have at most ",
            int64_t{INT32_MAX} * kBlockElements, " elements, got ", numel);
}

}   // namespace
}   // namespace nanochat::cuda::muon_kernels

namespace nanochat::cuda {

int64_t muon_momentum_workspace_bytes(const MuonMomentum& a) {
    const int64_t partials = a.norms ? a.count * muon_kernels::blocks_per_matrix(a.numel) : 0;
    return partials * static_cast<int64_t>(sizeof(double));
}

void muon_momentum(const MuonMomentum& a) {
    using namespace muon_kernels;
    void* const stream = a.execution.stream;
    if (a.count == 0) return;
    require_grid("muon_momentum_", a.numel);
    double* partials = a.norms ? static_cast<double*>(a.execution.workspace) : nullptr;
    if (a.numel > 0) {
        a.grad_dtype == DType::bfloat16 ? launch_momentum<bfloat16>(a, partials, stream)
                                        : launch_momentum<float>(a, partials, stream);
    }
    if (a.norms) {
        require(a.count <= INT32_MAX, "muon_momentum_: grads must hold at most ", INT32_MAX, " matrices, got ",
                a.count);
        device::launch("muon_momentum_", norms_kernel, dim3(static_cast<uint32_t>(a.count)), dim3(kThreads), 0, stream,
                       static_cast<const double*>(partials), blocks_per_matrix(a.numel), a.norms);
    }
}

void muon_update(const MuonUpdate& a) {
    using namespace muon_kernels;
    void* const stream = a.execution.stream;
    if (a.count == 0 || a.numel == 0) return;
    require_grid("muon_update_", a.numel);
    a.param_dtype == DType::bfloat16 ? launch_update<bfloat16>(a, stream) : launch_update<float>(a, stream);
}

}   // namespace nanochat::cuda
