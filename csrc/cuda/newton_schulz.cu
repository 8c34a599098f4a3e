// Newton-Schulz orthogonalisation (Bernstein & Newhouse 2024; Jordan et al., "Muon", 2024) of a batch of matrices, all
// of them in each launch. For symmetric products, one half is computed and mirrored.
//
// G is X X^T for wide X, X^T X for tall ones: the small side, R x R, of matrices R x L. A step multiplies X by its
// factor a I + Z, Z = b G + c G G. The Gram form takes several steps on G alone: factors are polynomials of one G, so
// they commute, G becomes (a I + Z) G (a I + Z), and their product s I + P stays symmetric. The rounding error of G grows
// with the square of the factor by which the steps amplify the smallest singular values, so G is computed from X again
// ("restart") after three steps, and then after every two. With float16, whose rounding is an eighth of bfloat16's,
// errors stay below those of the plain form in bfloat16 (tests/emulation/test_newton_schulz.py); with the split 2 + 3
// they do not. Gram form: Dao-AILab's "Gram Newton-Schulz" (2026).
#include <vector>

#include "newton_schulz.cuh"
#include "newton_schulz_plan.cuh"

namespace nanochat::cuda::newton_schulz_kernels {
namespace {

// --- X0 = g / (norm_factor |g|_F), or scales g ---

// Loads kElements of matrix blockIdx.y from (row, column) on, with zeros beyond the end of the row.
NANOCHAT_DEVICE void load_elements(const NormaliseArguments& a, int row, int column, Pack<float, 4> (&g)[2]) {
    const float* from = a.g + (int64_t{blockIdx.y} * a.x.rows + row) * a.x.columns + column;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        g[i] = load<4>(from + 4 * i, a.x.columns - column - 4 * i, is_aligned<4>(from));
    }
}

template <class Use>
NANOCHAT_DEVICE void for_each_item(const NormaliseArguments& a, const Use& use) {
    const int chunks = a.x.pitch / kElements;
    const int64_t items = int64_t{a.x.rows} * chunks, step = int64_t{gridDim.x} * kThreads;
    for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items; item += step) {
        const int row = static_cast<int>(item / chunks);
        use(row, static_cast<int>(item - int64_t{row} * chunks) * kElements);
    }
}

__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ NormaliseArguments a) {
    NANOCHAT_SHARED(double[kThreads / 32], warps);
    double sum = 0;   // in double precision, squares cannot underflow
    for_each_item(a, [&](int row, int column) {
        Pack<float, 4> g[2];
        load_elements(a, row, column, g);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            const double x = element(g[i / 4], i % 4);
            sum += x * x;
        }
    });
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) a.partials[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) normalise_kernel(const __grid_constant__ NormaliseArguments a) {
    NANOCHAT_SHARED(double[kThreads / 32], warps);
    double norm = 0;
    if (a.norms) {
        norm = a.norms[blockIdx.y];
    } else if (!a.scales) {
        const bool own = threadIdx.x < gridDim.x;
        norm = sqrt(block_sum(own ? a.partials[blockIdx.y * gridDim.x + threadIdx.x] : 0.0, warps));
    }
    const double inverse = norm == 0 ? 0 : 1 / (a.norm_factor * norm);
    const double* scales = a.scales ? a.scales + int64_t{blockIdx.y} * a.x.rows : nullptr;
    T* x = static_cast<T*>(a.x.data) + blockIdx.y * a.x.size();
    for_each_item(a, [&](int row, int column) {
        Pack<float, 4> g[2];
        load_elements(a, row, column, g);
        const double scale = scales ? scales[row] : inverse;
        uint32_t words[kElements / 2];
#pragma unroll
        for (int i = 0; i < kElements; i += 2) {
            words[i / 2] = device::pack<T>(static_cast<float>(element(g[i / 4], i % 4) * scale),
                                           static_cast<float>(element(g[i / 4], i % 4 + 1) * scale));
        }
        *reinterpret_cast<uint4*>(x + int64_t{row} * a.x.pitch + column) = {words[0], words[1], words[2], words[3]};
    });
}

}   // namespace

template <class T>
void normalise(const NormaliseArguments& a, dim3 grid, void* stream) {
    if (!a.norms && !a.scales) device::launch("newton_schulz", squares_kernel, grid, dim3(kThreads), 0, stream, a);
    device::launch("newton_schulz", normalise_kernel<T>, grid, dim3(kThreads), 0, stream, a);
}

namespace {

// --- epilogues of mma.sync ---

constexpr int kStripBytes = tile_bytes<kStripColumns>(16);

// Loads a strip's part of a source, in pairs, with zeros where there is none. All loads are issued before one is used.
template <class T>
NANOCHAT_DEVICE void load_source(uint32_t (&pairs)[kStripColumns / 4], const Product& p, const void* source, int matrix,
                                 int row, int column) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int r = row + lane / 4 + 8 * h;
        const T* from = static_cast<const T*>(source) + matrix * p.d.size() + int64_t{r} * p.d.pitch;
#pragma unroll
        for (int n = 0; n < kStripColumns / 8; ++n) {
            const int c = column + 8 * n + 2 * (lane % 4);
            const bool exists = source && r < p.m && c < p.d.pitch;
            pairs[2 * n + h] = exists ? *reinterpret_cast<const uint32_t*>(from + c) : 0;
        }
    }
}

// sums = alpha sums + beta S + gamma T
template <class T>
NANOCHAT_DEVICE void add_sources(float (&sums)[kStripColumns / 2], const Product& p, int matrix, int row, int column) {
    uint32_t s[kStripColumns / 4], t[kStripColumns / 4];
    load_source<T>(s, p, p.s, matrix, row, column);
    load_source<T>(t, p, p.t, matrix, row, column);
#pragma unroll
    for (int i = 0; i < kStripColumns / 4; ++i) {
        sums[2 * i] = p.alpha * sums[2 * i] + p.beta * low<T>(s[i]) + p.gamma * low<T>(t[i]);
        sums[2 * i + 1] = p.alpha * sums[2 * i + 1] + p.beta * high<T>(s[i]) + p.gamma * high<T>(t[i]);
    }
}

// Makes the 8 x 8 blocks on the diagonal of a symmetric D symmetric to the last bit. Otherwise elements that were summed
// in two orders would differ, and later steps, which use D as its own transpose, would amplify the error.
NANOCHAT_DEVICE void mirror_diagonal(float (&sums)[kStripColumns / 2], int row, int column) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = 2 * (lane % 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int n = 0; n < kStripColumns / 8; ++n) {
            if (column + 8 * n != row + 8 * h) continue;
            const float own[2] = {sums[4 * n + 2 * h], sums[4 * n + 2 * h + 1]};
#pragma unroll
            for (int j = 0; j < 2; ++j) {   // element (g, t + j) is that of row t + j, column g
                const int source = (t + j) * 4 + g / 2;
                const float even = __shfl_sync(0xFFFFFFFF, own[0], source);
                const float odd = __shfl_sync(0xFFFFFFFF, own[1], source);
                if (t + j > g) sums[4 * n + 2 * h + j] = g % 2 ? odd : even;
            }
        }
    }
}

// Stores the strip's chunks whose 8 x 8 blocks are on or below the diagonal, and those below it again as columns: 32
// bytes per lane.
template <class T>
NANOCHAT_DEVICE void store_mirrored(const Product& p, const unsigned char* strip, int matrix, int row, int column) {
    T* const d = static_cast<T*>(p.d.data) + matrix * p.d.size();
    store_chunks<T, kStripColumns, 16>(strip, 0, [&](int r, int chunk) {
        const bool stored = row + r < p.m && column + 8 * chunk <= row + r;
        return stored ? d + int64_t{row + r} * p.d.pitch + column + 8 * chunk : nullptr;
    });
#pragma unroll
    for (int i = threadIdx.x % 32; i < 2 * kStripColumns; i += 32) {
        const int c = i / 2, h = i % 2;
        if (column + c >= p.n || row + 8 * h >= p.d.pitch || column + c >= row + 8 * h) continue;
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const SwizzledRow<kStripColumns, 16> smem_row(0, 8 * h + j);
            const uint32_t bits = *reinterpret_cast<const uint16_t*>(strip + smem_row(c / 8) + 2 * (c % 8));
            words[j / 2] = j % 2 ? words[j / 2] | bits << 16 : bits;
        }
        device::store_16(d + int64_t{column + c} * p.d.pitch + row + 8 * h, words);
    }
}

// Finishes a strip of a warp, or stages it for the output. `strip` is shared memory that belongs to it.
template <class T, class Epilogue>
NANOCHAT_DEVICE void finish_strip(const Product& p, unsigned char* strip, float (&sums)[kStripColumns / 2], int matrix,
                                  int row, int column) {
    constexpr bool symmetric = std::is_same_v<Epilogue, SymmetricEpilogue>;
    if (symmetric && column > row + 15) return;
    add_sources<T>(sums, p, matrix, row, column);
    if constexpr (std::is_same_v<Epilogue, OutputEpilogue>) {
        stage_floats(strip, sums);
    } else if constexpr (symmetric) {
        mirror_diagonal(sums, row, column);
        stage_rows<T, kStripColumns, 16>(strip, sums, 0);
        store_mirrored<T>(p, strip, matrix, row, column);
    } else {
        T* const d = static_cast<T*>(p.d.data) + matrix * p.d.size() + int64_t{row} * p.d.pitch + column;
        store_rows<T, kStripColumns, 16>(strip, sums, 0, p.d.pitch - column,
                                         [&](int r) { return row + r < p.m ? d + int64_t{r} * p.d.pitch : nullptr; });
    }
}

// --- products with mma.sync ---

// Four warps, 64 x 64 each: every fragment that is read from shared memory is used in four products.
struct Tile {
    static constexpr int threads = 128, block_bytes = tile_bytes<kDepth>(kTile), stage_bytes = 2 * block_bytes;
    static constexpr int blocks = 2;   // that share a multiprocessor
    static constexpr int shared_bytes = 1024 + 2 * stage_bytes;
    static_assert(shared_bytes <= kLeastSharedBytes);
};

// Copies a block of an operand: kTile rows or columns, and kDepth along K from k on.
template <Major major, class T>
NANOCHAT_DEVICE void load_block(uint32_t block, const Matrices& x, int matrix, int first, int k) {
    const T* from = static_cast<const T*>(x.data) + matrix * x.size();
    if constexpr (major == Major::k) {
        from += int64_t{first} * x.pitch + k;
        load_rows<kDepth, kTile, Tile::threads>(block, strided_rows<kDepth, Tile::threads>(from, x.pitch),
                                                x.rows - first, x.pitch - k);
    } else {
        from += int64_t{k} * x.pitch + first;
        load_rows<kTile, kDepth, Tile::threads>(block, strided_rows<kTile, Tile::threads>(from, x.pitch), x.rows - k,
                                                x.pitch - first);
    }
}

// The rows of a block that a lane reads for fragments of 16 x 16: of A (left) from row `first` on, or of B from column
// `first` on.
template <Major major, bool left>
struct Fragments {
    static constexpr int D = major == Major::k ? kDepth : kTile, rows = major == Major::k ? kTile : kDepth;
    SwizzledRow<D, rows> smem_row;
    int first;

    // Transposing exchanges rows and columns, and so the two operands.
    NANOCHAT_DEVICE Fragments(uint32_t block, int first, int lane)
        : smem_row(left == (major == Major::k) ? a_fragment_rows<D, rows>(block, 0, lane)
                                               : b_fragment_rows<D, rows>(block, lane)),
          first(first) {}
    NANOCHAT_DEVICE void load(uint32_t (&r)[4], int k, int further) const {
        if constexpr (major == Major::k) {
            device::ldmatrix_x4(r, smem_row(2 * k, first + further));
        } else {
            device::ldmatrix_x4_trans(r, smem_row((first + further) / 8, 16 * k));
        }
    }
};

// The number of tiles of a result; for a symmetric one, those of the lower half, row by row.
int tiles_of(const Product& p) {
    const int columns = divide_up(p.n, kTile);
    return p.symmetric ? columns * (columns + 1) / 2 : divide_up(p.m, kTile) * columns;
}

NANOCHAT_DEVICE TileCoord tile_coord(const Product& p, int tiles, int item) {
    const int matrix = item / tiles;
    int tile = item - matrix * tiles, row = 0;
    if (p.symmetric) {
        for (; tile > row; ++row) tile -= row + 1;
    } else {
        const int columns = divide_up(p.n, kTile);
        row = tile / columns;
        tile -= row * columns;
    }
    return {matrix, row * kTile, tile * kTile};
}

template <class T, Major major_a, Major major_b, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    product_kernel(const __grid_constant__ Product p, const __grid_constant__ Epilogue epilogue, int tiles) {
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t start = device::shared_address(shared), stages = (start + 1023) & ~1023u;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp / 2 * 64, warp_column = warp % 2 * 64;
    const TileCoord coord = tile_coord(p, tiles, blockIdx.x);
    const int steps = divide_up(p.k, kDepth);
    const auto load_step = [&](int step) {
        const uint32_t stage = stages + step % 2 * Tile::stage_bytes;
        load_block<major_a, T>(stage, p.a, coord.matrix, coord.row, step * kDepth);
        load_block<major_b, T>(stage + Tile::block_bytes, p.b, coord.matrix, coord.column, step * kDepth);
        device::cp_async_commit();
    };

    float sums[4][kStripColumns / 2] = {};
    load_step(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        device::cp_async_wait<0>();
        __syncthreads();   // this step has landed, and no thread reads the previous one
        if (step + 1 < steps) load_step(step + 1);
        const uint32_t stage = stages + step % 2 * Tile::stage_bytes;
        const Fragments<major_a, true> a_fragments(stage, warp_row, lane);
        const Fragments<major_b, false> b_fragments(stage + Tile::block_bytes, warp_column, lane);
#pragma unroll 2
        for (int k = 0; k < kDepth / 16; ++k) {
            uint32_t left[4][4];
#pragma unroll
            for (int f = 0; f < 4; ++f) a_fragments.load(left[f], k, 16 * f);
#pragma unroll
            for (int n = 0; n < kStripColumns / 8; n += 2) {
                uint32_t right[4];
                b_fragments.load(right, k, 8 * n);
#pragma unroll
                for (int f = 0; f < 4; ++f) {
                    device::mma_m16n8k16<T>(fragment(sums[f], n), left[f], {right[0], right[1]});
                    device::mma_m16n8k16<T>(fragment(sums[f], n + 1), left[f], {right[2], right[3]});
                }
            }
        }
    }
    __syncthreads();   // the strips overwrite the stages
    constexpr bool to_output = std::is_same_v<Epilogue, OutputEpilogue>;
    constexpr int strips = 4, strip_bytes = to_output ? kFloatStripBytes : 0;
    static_assert(Tile::threads / 32 * strips * kFloatStripBytes <= 2 * Tile::stage_bytes);
    unsigned char* const own = shared + (stages - start) + warp * (to_output ? strips * strip_bytes : kStripBytes);
    const int row = coord.row + warp_row, column = coord.column + warp_column;
#pragma unroll
    for (int i = 0; i < strips; ++i) {
        finish_strip<T, Epilogue>(p, own + i * strip_bytes, sums[i], coord.matrix, row + 16 * i, column);
    }
    if constexpr (to_output) {
        __syncwarp();   // all lanes have written
        write_output(
            p, epilogue, coord.matrix, strips,
            [&](int i) { return StagedStrip{own + i * strip_bytes, row + 16 * i, column}; }, [](int) {});
    }
}

}   // namespace

template <class T>
void multiply(const Product& p, const OutputEpilogue* output, void* stream) {
    const int tiles = tiles_of(p);
    choose_product(p, output, [&](auto major_a, auto major_b, const auto& epilogue) {
        using Epilogue = std::decay_t<decltype(epilogue)>;
        device::launch("newton_schulz", product_kernel<T, decltype(major_a)::value, decltype(major_b)::value, Epilogue>,
                       dim3(static_cast<unsigned>(tiles * p.count)), dim3(Tile::threads), Tile::shared_bytes, stream, p,
                       epilogue, tiles);
    });
}

namespace {

void check(const NewtonSchulz& a) {
    constexpr int64_t kMost = int64_t{1} << 20;
    require(a.M <= kMost && a.K <= kMost, "newton_schulz: on CUDA a matrix must have at most ", kMost,
            " rows and columns, got ", a.M, " x ", a.K);
    require(((a.M + kTile - 1) / kTile) * ((a.K + kTile - 1) / kTile) * kMostMatrices <= INT32_MAX,
            "newton_schulz: on CUDA a matrix must have at most 2^22 tiles of 128 x 128, got ", a.M, " x ", a.K);
}

}   // namespace
}   // namespace nanochat::cuda::newton_schulz_kernels

namespace nanochat::cuda {

NewtonSchulzForm newton_schulz_form(const NewtonSchulz& a) {
    using namespace newton_schulz_kernels;
    const bool pays = cost_in_tiles(a, NewtonSchulzForm::gram) < cost_in_tiles(a, NewtonSchulzForm::plain);
    return pays && std::min(a.M, a.K) >= kLeastGram ? NewtonSchulzForm::gram : NewtonSchulzForm::plain;
}

int64_t newton_schulz_workspace_bytes(const NewtonSchulz& a) {
    using namespace newton_schulz_kernels;
    return Workspace(a, restart_schedule(a, a.form), std::min(a.batch, kMostMatrices), nullptr).bytes;
}

void newton_schulz(const NewtonSchulz& a) {
    using namespace newton_schulz_kernels;
    check(a);
    const std::vector<int> phases = restart_schedule(a, a.form);
    const bool use_float16 = fits_float16(a, phases);
    for (int64_t first = 0; first < a.batch; first += kMostMatrices) {
        const int64_t count = std::min(a.batch - first, kMostMatrices), offset = first * a.M * a.K;
        const Workspace workspace(a, phases, count, a.execution.workspace);
        OutputEpilogue output = {};
        if (a.update) {
            output.param_dtype = a.update->param_dtype;
            output.rates = update_rates(*a.update);
            std::copy_n(a.update->params + first, count, output.params);
            if (a.update->copies) std::copy_n(a.update->copies + first, count, output.copies);
        } else {
            output.out = static_cast<float*>(a.out) + offset;
        }
        const float* g = static_cast<const float*>(a.g) + offset;
        const double* norms = a.norms ? a.norms + first : nullptr;
        const double* scales = a.scales ? a.scales + first * a.M : nullptr;
        const int matrices = static_cast<int>(count);
        use_float16 ? Iteration<float16>{a, phases, workspace, matrices}(g, scales, norms, output)
                    : Iteration<bfloat16>{a, phases, workspace, matrices}(g, scales, norms, output);
    }
}

}   // namespace nanochat::cuda
