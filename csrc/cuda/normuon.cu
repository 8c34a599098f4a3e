// The update of NorMuon (arXiv:2510.05491), on a list of matrices of one shape, optionally with cautious weight decay
// (arXiv:2510.12402). The renormalisation and the division by the second momentum are one factor for each line, a row or a
// column. A first launch adds the squares of each line, 4 bytes per element; a second makes factors of them; a third updates
// the parameters, 12 bytes per element, 14 with a bfloat16 copy of the parameters, 8 with bfloat16 parameters.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../check.h"
#include "../kernels.h"
#include "muon.cuh"
#include "packs.cuh"

namespace nanochat::cuda::normuon_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPackElements = kPack<float>;
constexpr int kWarpStride = 32 * kPackElements;   // the columns that a warp reads at a time
constexpr int kPartRows = 64;                     // whose squares a block adds for each column

// Capacities of the tables of pointers.
constexpr int kFewMatrices = 128, kManyMatrices = 1300;

template <int capacity>
struct Table {
    void* params[capacity];
    void* copies[capacity];   // null: none
    float* second_momentums[capacity];
};

struct Options {
    const float* update;   // of the table's first matrix
    double* sums;          // (matrices, parts, lines) the sums of squares of the parts of each line
    float* factors;        // (matrices, lines)
    int64_t M, K;
    int parts;
    double beta2, eps, norm_eps;
    bool renormalise;
    UpdateRates rates;

    NANOCHAT_DEVICE int64_t lines() const { return M < K ? K : M; }
};
static_assert(sizeof(Table<kManyMatrices>) + sizeof(Options) <= kArgumentBytes);

// Adds the squares in double precision, where they cannot underflow.
NANOCHAT_DEVICE void add_squares(double (&sums)[kPackElements], const Pack<float, kPackElements>& x) {
#pragma unroll
    for (int i = 0; i < kPackElements; ++i) sums[i] += static_cast<double>(element(x, i)) * element(x, i);
}

// One warp for each row.
__global__ void __launch_bounds__(kThreads) row_squares_kernel(const __grid_constant__ Options o) {
    constexpr int N = kPackElements;
    const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    if (row >= o.M) return;
    const float* from = o.update + (blockIdx.y * o.M + row) * o.K;
    const bool aligned = is_aligned<N>(from);
    double sums[N] = {};
    for (int64_t column = threadIdx.x % 32 * N; column < o.K; column += kWarpStride) {
        add_squares(sums, load<N>(from + column, o.K - column, aligned));
    }
    double sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += sums[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) o.sums[blockIdx.y * o.M + row] = sum;
}

// Each block adds kPartRows rows of kWarpStride columns. blockIdx.y counts the parts, blockIdx.z the matrices.
__global__ void __launch_bounds__(kThreads) column_squares_kernel(const __grid_constant__ Options o) {
    constexpr int N = kPackElements;
    NANOCHAT_SHARED(double[kWarps * kWarpStride], shared_sums);
    const int warp = threadIdx.x / 32, own = threadIdx.x % 32 * N;
    const int64_t first = int64_t{blockIdx.x} * kWarpStride, begin = int64_t{blockIdx.y} * kPartRows;
    const int64_t end = begin + kPartRows < o.M ? begin + kPartRows : o.M;
    double sums[N] = {};
    for (int64_t row = begin + warp; row < end; row += kWarps) {
        const float* from = o.update + (blockIdx.z * o.M + row) * o.K + first + own;
        if (first + own < o.K) add_squares(sums, load<N>(from, o.K - first - own, is_aligned<N>(from)));
    }
#pragma unroll
    for (int i = 0; i < N; ++i) shared_sums[warp * kWarpStride + own + i] = sums[i];
    __syncthreads();
    const int column = threadIdx.x;
    if (column >= kWarpStride || first + column >= o.K) return;
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += shared_sums[i * kWarpStride + column];
    o.sums[(blockIdx.z * int64_t{o.parts} + blockIdx.y) * o.K + first + column] = sum;
}

// One block per matrix. Updates the second momentum, and writes the factor of each line.
template <int capacity>
__global__ void __launch_bounds__(kThreads)
    factors_kernel(const __grid_constant__ Table<capacity> table, const Options o) {
    NANOCHAT_SHARED(double[kThreads / 32], warps);
    NANOCHAT_SHARED(double[kThreads / 32], other_warps);
    const int64_t lines = o.lines(), length = o.M < o.K ? o.M : o.K;
    double* sums = o.sums + blockIdx.x * o.parts * lines;
    float *second = table.second_momentums[blockIdx.x], *factors = o.factors + blockIdx.x * lines;
    double total = 0;
    for (int64_t line = threadIdx.x; line < lines; line += kThreads) {
        double sum = sums[line];
        for (int part = 1; part < o.parts; ++part) sum += sums[part * lines + line];
        sums[line] = sum;
        total += sum;
    }
    double norm = sqrt(block_sum(total, warps)), alpha = 1;
    if (o.renormalise) {
        alpha = norm == 0 ? 0 : sqrt(static_cast<double>(length)) / (norm < o.norm_eps ? o.norm_eps : norm);
        norm *= alpha;
    }
    double after = 0;
    for (int64_t line = threadIdx.x; line < lines; line += kThreads) {
        const double square = alpha * alpha * sums[line];
        const float s =
            static_cast<float>(second[line] + (1 - o.beta2) * (square / static_cast<double>(length) - second[line]));
        second[line] = s;
        after += square / (s < o.eps ? o.eps : s);
    }
    after = block_sum(after, other_warps);
    const double rescale = norm == 0 ? 0 : alpha * norm / sqrt(after);
    for (int64_t line = threadIdx.x; line < lines; line += kThreads) {
        const double s = second[line];
        factors[line] = static_cast<float>(rescale / sqrt(s < o.eps ? o.eps : s));
    }
}

// One warp for each row.
template <class P, int capacity>
__global__ void __launch_bounds__(kThreads)
    normuon_kernel(const __grid_constant__ Table<capacity> table, const Options o) {
    constexpr int N = kPackElements;
    const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    if (row >= o.M) return;
    P* param = static_cast<P*>(table.params[blockIdx.y]) + row * o.K;
    bfloat16* copy = static_cast<bfloat16*>(table.copies[blockIdx.y]);
    if (copy) copy += row * o.K;
    const float *update = o.update + (blockIdx.y * o.M + row) * o.K, *factors = o.factors + blockIdx.y * o.lines();
    const bool aligned = is_aligned<N>(param) && is_aligned<N>(update) && is_aligned<N>(copy);
    const bool tall = o.M >= o.K, factors_aligned = is_aligned<N>(factors);
    const float row_factor = tall ? factors[row] : 0;
    const Rates rates = rates_of(o.rates);
    for (int64_t column = threadIdx.x % 32 * N; column < o.K; column += kWarpStride) {
        const int64_t left = o.K - column;
        const Pack<float, N> u = load<N>(update + column, left, aligned);
        Pack<P, N> p = load<N>(param + column, left, aligned);
        Pack<float, N> factor = {};
        if (!tall) factor = load<N>(factors + column, left, factors_aligned);
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            float updated_pair[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float change = element(u, i + j) * (tall ? row_factor : element(factor, i + j));
                updated_pair[j] = updated(element(p, i + j), change, rates);
            }
            set_pair(p, i, updated_pair[0], updated_pair[1]);
        }
        store(param + column, p, left, aligned);
        store_copy(copy, column, p, left, aligned);
    }
}

// The workspace.
struct Workspace {
    int64_t lines, parts, sums, bytes;

    explicit Workspace(const NorMuonUpdate& a)
        : lines(std::max(a.M, a.K)), parts(a.M >= a.K ? 1 : (a.M + kPartRows - 1) / kPartRows) {
        sums = a.count * parts * lines;
        bytes = sums * static_cast<int64_t>(sizeof(double)) + a.count * lines * static_cast<int64_t>(sizeof(float));
    }
};

template <class P, int capacity>
void launch_normuon(const NorMuonUpdate& a, void* stream) {
    const Workspace workspace(a);
    double* const sums = static_cast<double*>(a.execution.workspace);
    float* const factors = reinterpret_cast<float*>(sums + workspace.sums);
    const auto row_blocks = static_cast<uint32_t>((a.M + kWarps - 1) / kWarps);
    for (int64_t start = 0; start < a.count; start += capacity) {
        Table<capacity> table;
        const int64_t count = std::min<int64_t>(a.count - start, capacity);
        const auto matrices = static_cast<uint32_t>(count);
        for (int64_t i = 0; i < count; ++i) {
            table.params[i] = a.params[start + i];
            table.copies[i] = a.copies ? a.copies[start + i] : nullptr;
            table.second_momentums[i] = a.second_momentums[start + i];
        }
        const Options options = {
            .update = a.update + start * a.numel,
            .sums = sums + start * workspace.parts * workspace.lines,
            .factors = factors + start * workspace.lines,
            .M = a.M,
            .K = a.K,
            .parts = static_cast<int>(workspace.parts),
            .beta2 = a.beta2,
            .eps = a.eps,
            .norm_eps = a.norm_eps,
            .renormalise = a.renormalise,
            .rates = update_rates(a),
        };
        if (a.M >= a.K) {
            device::launch("normuon_update_", row_squares_kernel, dim3(row_blocks, matrices), dim3(kThreads), 0, stream,
                           options);
        } else {
            const auto strips = static_cast<uint32_t>((a.K + kWarpStride - 1) / kWarpStride);
            device::launch("normuon_update_", column_squares_kernel,
                           dim3(strips, static_cast<uint32_t>(workspace.parts), matrices), dim3(kThreads), 0, stream,
                           options);
        }
        device::launch("normuon_update_", factors_kernel<capacity>, dim3(matrices), dim3(kThreads), 0, stream, table,
                       options);
        device::launch("normuon_update_", normuon_kernel<P, capacity>, dim3(row_blocks, matrices), dim3(kThreads), 0,
                       stream, table, options);
    }
}

template <class P>
void launch_normuon(const NorMuonUpdate& a, void* stream) {
    a.count <= kFewMatrices ? launch_normuon<P, kFewMatrices>(a, stream) : launch_normuon<P, kManyMatrices>(a, stream);
}

}   // namespace
}   // namespace nanochat::cuda::normuon_kernels

namespace nanochat::cuda {

int64_t normuon_update_workspace_bytes(const NorMuonUpdate& a) { return normuon_kernels::Workspace(a).bytes; }

void normuon_update(const NorMuonUpdate& a) {
    using namespace normuon_kernels;
    void* const stream = a.execution.stream;
    if (a.count == 0 || a.numel == 0) return;
    constexpr int64_t kMost = int64_t{1} << 20;   // blockIdx.y counts the parts of rows
    require(a.M <= kMost && a.K <= kMost, "normuon_update_: on CUDA a matrix must have at most ", kMost,
            " rows and columns, got ", a.M, " x ", a.K);
    a.param_dtype == DType::bfloat16 ? launch_normuon<bfloat16>(a, stream) : launch_normuon<float>(a, stream);
}

}   // namespace nanochat::cuda
