// Newton-Schulz orthogonalisation (Bernstein & Newhouse 2024; Jordan et al., "Muon", 2024) of a batch of matrices, all
// of them in each launch. Products that are symmetric are computed by half and mirrored.
//
// G is X X^T for wide X, X^T X for tall ones: the small side, R x R, of matrices R x L. A step multiplies X by its
// factor a I + Z, Z = b G + c G G. The Gram form takes several steps on G alone: factors are polynomials of one G, so
// they commute, G becomes (a I + Z) G (a I + Z), and their product s I + P stays symmetric. What rounding does to G
// grows with the square of what the steps do to the smallest singular values, so that G is computed from X again
// ("restart") after three steps, and then after every two. With float16, whose rounding is an eighth of bfloat16's,
// errors stay below those of the plain form in bfloat16 (tests/emulation/test_newton_schulz.py); with the split 2 + 3
// they do not. Gram form: Dao-AILab's "Gram Newton-Schulz" (2026).
#include <cmath>
#include <vector>

#include "newton_schulz.cuh"

namespace nanochat::cuda::newton_schulz_kernels {
namespace {

// --- X0 = g / (norm_factor |g|_F) ---

constexpr int kThreads = 256;
constexpr int kElements = 8;     // a thread: 16 bytes of X
constexpr int kMostParts = 64;   // blocks of threads for a matrix

struct Normalise {
    const float* g;        // (count, rows, columns)
    const double* norms;   // (count,), or null:
    double* partials;      // (count, parts) sums of squares
    double norm_factor;
    Matrices x;
};

// kElements of matrix blockIdx.y from (row, column) on; zeros behind the end of the row.
NANOCHAT_DEVICE void load_elements(const Normalise& a, int row, int column, Pack<float, 4> (&g)[2]) {
    const float* from = a.g + (int64_t{blockIdx.y} * a.x.rows + row) * a.x.columns + column;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        g[i] = load<4>(from + 4 * i, a.x.columns - column - 4 * i, is_aligned<4>(from));
    }
}

template <class Use>
NANOCHAT_DEVICE void for_each_item(const Normalise& a, const Use& use) {
    const int chunks = a.x.pitch / kElements;
    const int64_t items = int64_t{a.x.rows} * chunks, step = int64_t{gridDim.x} * kThreads;
    for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < items; item += step) {
        const int row = static_cast<int>(item / chunks);
        use(row, static_cast<int>(item - int64_t{row} * chunks) * kElements);
    }
}

__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ Normalise a) {
    NANOCHAT_SHARED(double[kThreads / 32], warps);
    double sum = 0;   // where squares cannot underflow
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
__global__ void __launch_bounds__(kThreads) normalise_kernel(const __grid_constant__ Normalise a) {
    NANOCHAT_SHARED(double[kThreads / 32], warps);
    double norm;
    if (a.norms) {
        norm = a.norms[blockIdx.y];
    } else {
        const bool own = threadIdx.x < gridDim.x;
        norm = sqrt(block_sum(own ? a.partials[blockIdx.y * gridDim.x + threadIdx.x] : 0.0, warps));
    }
    const double inverse = norm == 0 ? 0 : 1 / (a.norm_factor * norm);
    T* x = static_cast<T*>(a.x.data) + blockIdx.y * a.x.size();
    for_each_item(a, [&](int row, int column) {
        Pack<float, 4> g[2];
        load_elements(a, row, column, g);
        uint32_t words[kElements / 2];
#pragma unroll
        for (int i = 0; i < kElements; i += 2) {
            words[i / 2] = device::pack<T>(static_cast<float>(element(g[i / 4], i % 4) * inverse),
                                           static_cast<float>(element(g[i / 4], i % 4 + 1) * inverse));
        }
        *reinterpret_cast<uint4*>(x + int64_t{row} * a.x.pitch + column) = {words[0], words[1], words[2], words[3]};
    });
}

// --- products with mma.sync ---

// Four warps, 64 x 64 each: a fragment of either operand, read from shared memory, serves four products.
struct Tile {
    static constexpr int threads = 128, block_bytes = tile_bytes<kDepth>(kTile), stage_bytes = 2 * block_bytes;
    static constexpr int blocks = 2;   // that share a multiprocessor
    static constexpr int shared_bytes = 1024 + 2 * stage_bytes;
};

// Copies a block of kTile rows or columns of an operand, kDepth along K from k on.
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

// The lane's rows of a block, for fragments of 16 x 16: of A (left) from row `first` on, or of B from column `first`
// on.
template <Major major, bool left>
struct Fragments {
    static constexpr int D = major == Major::k ? kDepth : kTile, rows = major == Major::k ? kTile : kDepth;
    Cursor<D, rows> cursor;
    int first;

    // Transposing exchanges the parts of rows and columns, and so of the two operands.
    NANOCHAT_DEVICE Fragments(uint32_t block, int first, int lane)
        : cursor(left == (major == Major::k) ? left_cursor<D, rows>(block, 0, lane)
                                             : right_cursor<D, rows>(block, lane)),
          first(first) {}
    NANOCHAT_DEVICE void load(uint32_t (&r)[4], int k, int further) const {
        if constexpr (major == Major::k) {
            device::ldmatrix_x4(r, cursor(2 * k, first + further));
        } else {
            device::ldmatrix_x4_trans(r, cursor((first + further) / 8, 16 * k));
        }
    }
};

// Of symmetric results the lower half, row by row.
int tiles_of(const Product& p) {
    const int columns = divide_up(p.n, kTile);
    return p.symmetric ? columns * (columns + 1) / 2 : divide_up(p.m, kTile) * columns;
}

NANOCHAT_DEVICE TilePlace tile_place(const Product& p, int tiles, int item) {
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

template <class T, Major major_a, Major major_b, class Destination>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    product_kernel(const __grid_constant__ Product p, const __grid_constant__ Destination destination, int tiles) {
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t start = device::shared_address(shared), stages = (start + 1023) & ~1023u;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp / 2 * 64, warp_column = warp % 2 * 64;
    const TilePlace place = tile_place(p, tiles, blockIdx.x);
    const int steps = divide_up(p.k, kDepth);
    const auto load_step = [&](int step) {
        const uint32_t stage = stages + step % 2 * Tile::stage_bytes;
        load_block<major_a, T>(stage, p.a, place.matrix, place.row, step * kDepth);
        load_block<major_b, T>(stage + Tile::block_bytes, p.b, place.matrix, place.column, step * kDepth);
        device::cp_async_commit();
    };

    float sums[4][kStripColumns / 2] = {};
    load_step(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        device::cp_async_wait<0>();
        __syncthreads();   // this step has landed, and nobody reads the last one any more
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
    __syncthreads();   // strips lie where the stages were
    unsigned char* const strip = shared + (stages - start) + warp * kStripBytes;
#pragma unroll
    for (int f = 0; f < 4; ++f) {
        finish_strip<T>(p, destination, strip, sums[f], place.matrix, place.row + warp_row + 16 * f,
                        place.column + warp_column);
    }
}

template <class T>
void multiply(const Product& p, const Result* result, void* stream) {
    const int tiles = tiles_of(p);
    choose_product(p, result, [&](auto major_a, auto major_b, const auto& destination) {
        using Destination = std::decay_t<decltype(destination)>;
        device::launch("newton_schulz",
                       product_kernel<T, decltype(major_a)::value, decltype(major_b)::value, Destination>,
                       dim3(static_cast<unsigned>(tiles * p.count)), dim3(Tile::threads), Tile::shared_bytes, stream, p,
                       destination, tiles);
    });
}

// --- what is multiplied by what ---

// With few singular values the Gram form's error can exceed that of the plain form in bfloat16.
constexpr int64_t kLeastGram = 64;

// How many steps are taken on one Gram matrix, in turn.
std::vector<int> phases_of(const NewtonSchulz& a, NewtonSchulzForm form) {
    // More is lost to rounding. The quintic's three steps make 41 of it, Polar Express's first three 128.
    constexpr double kMostGrowth = 150;
    std::vector<int> phases;
    for (int64_t step = 0; step < a.steps;) {
        const int most = form == NewtonSchulzForm::plain ? 1 : step == 0 ? 3 : 2;
        int length = 0;
        for (double growth = 1; length < most && step < a.steps; ++length, ++step) {
            growth *= std::abs(a.coefficients[3 * step]);
            if (length > 0 && growth > kMostGrowth) break;
        }
        phases.push_back(length);
    }
    return phases;
}

// The cost table: tiles of kTile x kTile, in units of their depth. Symmetric products have those of the lower half.
double work_of(const NewtonSchulz& a, NewtonSchulzForm form) {
    const auto [R, L] = std::minmax(a.M, a.K);
    const auto tiles = [](int64_t size) { return static_cast<double>((size + kTile - 1) / kTile); };
    const double half = tiles(R) * (tiles(R) + 1) / 2;
    double work = 0;
    for (const int length : phases_of(a, form)) {
        const int small = length + 3 * (length - 1);   // Z; G twice, and P
        work += half * static_cast<double>(L + small * R) + tiles(R) * tiles(L) * static_cast<double>(R);
    }
    return work;
}

// Whether float16 holds all numbers on the way, with room: the bounds of polynomials of singular values.
bool fits_float16(const NewtonSchulz& a, const std::vector<int>& phases) {
    constexpr double kMost = 8192;
    constexpr int kPoints = 256;
    double top = 1 / a.norm_factor;   // no singular value is larger
    const double* triple = a.coefficients;
    for (const int length : phases) {
        double product = 1;
        for (int i = 0; i < length; ++i, triple += 3) {
            double next = 0, factor = 0;
            for (int j = 0; j <= kPoints; ++j) {
                const double x = top * j / kPoints, squared = x * x;
                const double value = triple[0] + triple[1] * squared + triple[2] * squared * squared;
                factor = std::max({factor, std::abs(value), std::abs(value - triple[0])});
                next = std::max(next, std::abs(value) * x);
            }
            product *= factor;
            // Written so that NaN does not pass.
            if (!(top * top * factor * factor <= kMost && product <= kMost && next <= kMost)) return false;
            top = next;
        }
    }
    return true;
}

int parts_of(const NewtonSchulz& a) {
    const int64_t items = a.M * pitch_of(a.K) / kElements, wanted = (items + 4 * kThreads - 1) / (4 * kThreads);
    return static_cast<int>(std::clamp<int64_t>(wanted, 1, kMostParts));
}

// Scratch memory for `count` matrices.
struct Layout {
    Matrices x[2], small[5];
    double* partials;
    int64_t bytes = 0;

    Layout(const NewtonSchulz& a, const std::vector<int>& phases, int64_t count, void* memory) {
        const auto take = [&](int64_t size) {
            char* const place = static_cast<char*>(memory) + bytes;
            bytes += (size + 255) / 256 * 256;   // tensor copies want multiples of 16
            return static_cast<void*>(place);
        };
        const auto matrices = [&](int64_t rows, int64_t columns, bool needed) {
            const int64_t pitch = pitch_of(columns);
            return Matrices{take(needed ? 2 * count * rows * pitch : 0), static_cast<int>(rows),
                            static_cast<int>(columns), static_cast<int>(pitch)};
        };
        const int64_t R = std::min(a.M, a.K);
        const bool gram = *std::max_element(phases.begin(), phases.end()) > 1;
        for (int i = 0; i < 2; ++i) x[i] = matrices(a.M, a.K, i == 0 || phases.size() > 1);
        for (int i = 0; i < 5; ++i) small[i] = matrices(R, R, i < 2 || gram);
        partials = static_cast<double*>(take(a.norms ? 0 : count * parts_of(a) * static_cast<int64_t>(sizeof(double))));
    }
};

template <class T>
struct Iteration {
    const NewtonSchulz& a;
    const std::vector<int>& phases;
    Layout space;
    int count;

    void run(const Product& p, const Result* result = nullptr) const {
        const DType dtype = std::is_same_v<T, float16> ? DType::float16 : DType::bfloat16;
        a.execution.device.hopper ? hopper::multiply(p, dtype, result, a.execution)
                                  : multiply<T>(p, result, a.execution.stream);
    }

    // d = alpha a b + beta a + gamma b, of symmetric matrices whose product is symmetric.
    void small_product(const Matrices& d, const Matrices& a, const Matrices& b, double alpha, double beta,
                       double gamma) const {
        run({
            .a = a,
            .b = b,
            .d = d,
            .a_major = Major::k,
            .b_major = Major::k,
            .symmetric = true,
            .s = beta != 0 ? a.data : nullptr,
            .t = gamma != 0 ? b.data : nullptr,
            .alpha = static_cast<float>(alpha),
            .beta = static_cast<float>(beta),
            .gamma = static_cast<float>(gamma),
            .count = count,
            .m = d.rows,
            .n = d.rows,
            .k = d.rows,
        });
    }

    void operator()(const float* g, const double* norms, Result& result) const {
        void* const stream = a.execution.stream;
        const Matrices *x = &space.x[0], *other = &space.x[1];
        const Normalise normalise = {
            .g = g,
            .norms = norms,
            .partials = space.partials,
            .norm_factor = a.norm_factor,
            .x = *x,
        };
        const dim3 grid(static_cast<unsigned>(parts_of(a)), static_cast<unsigned>(count));
        if (!norms) device::launch("newton_schulz", squares_kernel, grid, dim3(kThreads), 0, stream, normalise);
        device::launch("newton_schulz", normalise_kernel<T>, grid, dim3(kThreads), 0, stream, normalise);

        const bool wide = x->rows <= x->columns;
        const double* triple = a.coefficients;
        for (size_t phase = 0; phase < phases.size(); ++phase) {
            Matrices G = space.small[0], Z = space.small[1], P = space.small[2], spare = space.small[3],
                     Y = space.small[4];
            const Major along = wide ? Major::k : Major::mn;
            run({
                .a = *x,
                .b = *x,
                .d = G,
                .a_major = along,
                .b_major = along,
                .symmetric = true,
                .s = nullptr,
                .t = nullptr,
                .alpha = 1,
                .beta = 0,
                .gamma = 0,
                .count = count,
                .m = G.rows,
                .n = G.rows,
                .k = wide ? x->columns : x->rows,
            });
            double scale = triple[0];   // the factors so far are scale I + P
            small_product(phases[phase] > 1 ? P : Z, G, G, triple[2], triple[1], 0);
            const Matrices* newest = phases[phase] > 1 ? &P : &Z;
            for (int i = 1; i < phases[phase]; ++i) {
                small_product(Y, G, *newest, 1, triple[0], 0);
                small_product(G, *newest, Y, 1, 0, triple[0]);
                triple += 3;
                small_product(Z, G, G, triple[2], triple[1], 0);
                small_product(spare, P, Z, 1, triple[0], scale);
                scale *= triple[0];
                std::swap(P, spare);
                newest = &Z;
            }
            triple += 3;
            const Matrices& factor = phases[phase] > 1 ? P : Z;
            const bool last = phase + 1 == phases.size();
            const Product apply = {
                .a = wide ? factor : *x,
                .b = wide ? *x : factor,
                .d = *other,
                .a_major = Major::k,
                .b_major = wide ? Major::mn : Major::k,
                .symmetric = false,
                .s = x->data,
                .t = nullptr,
                .alpha = 1,
                .beta = static_cast<float>(scale),
                .gamma = 0,
                .count = count,
                .m = x->rows,
                .n = x->columns,
                .k = G.rows,
            };
            run(apply, last ? &result : nullptr);
            std::swap(x, other);
        }
    }
};

void check(const NewtonSchulz& a) {
    constexpr int64_t kMost = int64_t{1} << 20;
    require(a.M <= kMost && a.K <= kMost, "newton_schulz: a matrix is ", a.M, " x ", a.K, "; takes up to ", kMost,
            " rows and columns on CUDA");
    require(((a.M + kTile - 1) / kTile) * ((a.K + kTile - 1) / kTile) * kMostMatrices <= INT32_MAX,
            "newton_schulz: a matrix is ", a.M, " x ", a.K, "; takes up to 2^22 tiles of 128 x 128 on CUDA");
}

}   // namespace
}   // namespace nanochat::cuda::newton_schulz_kernels

namespace nanochat::cuda {

NewtonSchulzForm newton_schulz_form(const NewtonSchulz& a) {
    using namespace newton_schulz_kernels;
    const bool pays = work_of(a, NewtonSchulzForm::gram) < work_of(a, NewtonSchulzForm::plain);
    return pays && std::min(a.M, a.K) >= kLeastGram ? NewtonSchulzForm::gram : NewtonSchulzForm::plain;
}

int64_t newton_schulz_workspace_bytes(const NewtonSchulz& a) {
    using namespace newton_schulz_kernels;
    return Layout(a, phases_of(a, a.form), std::min(a.batch, kMostMatrices), nullptr).bytes;
}

void newton_schulz(const NewtonSchulz& a) {
    using namespace newton_schulz_kernels;
    check(a);
    const std::vector<int> phases = phases_of(a, a.form);
    const bool small = fits_float16(a, phases);
    for (int64_t first = 0; first < a.batch; first += kMostMatrices) {
        const int64_t count = std::min(a.batch - first, kMostMatrices), offset = first * a.M * a.K;
        const Layout space(a, phases, count, a.execution.workspace);
        Result result = {};
        if (a.update) {
            result.param_dtype = a.update->param_dtype;
            result.rates = update_rates(*a.update);
            std::copy_n(a.update->params + first, count, result.params);
        } else {
            result.out = static_cast<float*>(a.out) + offset;
        }
        const float* g = static_cast<const float*>(a.g) + offset;
        const double* norms = a.norms ? a.norms + first : nullptr;
        const int matrices = static_cast<int>(count);
        small ? Iteration<float16>{a, phases, space, matrices}(g, norms, result)
              : Iteration<bfloat16>{a, phases, space, matrices}(g, norms, result);
    }
}

}   // namespace nanochat::cuda
