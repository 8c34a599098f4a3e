// The products of Newton-Schulz on Hopper. D is computed in squares of 256 x 256, each by a cluster of two blocks of
// threads, which share the columns. In a block one warpgroup loads by tensor copies and stores what is complete; two
// multiply 64 x 256 each. Blocks are persistent, so that the loads of the next square begin while one is written.
#include "hopper.cuh"
#include "newton_schulz.cuh"
#include "tensor_map.h"

namespace nanochat::cuda::newton_schulz_kernels::hopper {
namespace {

using device::TensorMap;

// All tensor copies move boxes of 64 x 64: of an operand, 64 rows or columns and a step along K; of S, T and D, a warpgroup's
// rows and the columns that it finishes at a time.
constexpr int kCluster = 2, kBox = 64, kBoxBytes = tile_bytes<kBox>(kBox);
static_assert(kBox == kDepth && kBox == kStripColumns && kBox == kGroupRows);

// For a multiprocessor's work of one cycle, 4,096 FLOP, a block reads 32 bytes from the L2 cache: its rows, and half of
// the columns. Without the other block it would read 48. A stage has a step's boxes of A, one for each consumer, and of B;
// in the epilogue it has three for each consumer.
struct Tile : WarpgroupConfig<2> {
    // The thread that loads and the one that stores need more than others do.
    static constexpr int registers = 232, producer_registers = 40;
    static constexpr int square = 256, boxes = square / kBox, stages = 4;
    static constexpr int b_offset = consumers * kBoxBytes, stage_bytes = b_offset + boxes * kBoxBytes;
    static constexpr int tiles_bytes = stages * stage_bytes;
    static constexpr int shared_bytes = 1024 + tiles_bytes + ring_bytes(stages) + 8 * stages;
};

// A consumer's boxes in the epilogue: of S, which becomes D; of the mirror image of D; and of T. The output has its sums in
// the second and third.
struct Boxes {
    uint32_t s, mirror, t;

    NANOCHAT_DEVICE Boxes(uint32_t stage, int consumer)
        : s(stage + 3 * consumer * kBoxBytes), mirror(s + kBoxBytes), t(mirror + kBoxBytes) {}
};
static_assert(3 * Tile::consumers * kBoxBytes <= Tile::stage_bytes);
static_assert(4 * kFloatStripBytes <= 2 * kBoxBytes && Tile::boxes <= Tile::stages);   // for the output

// A square on the diagonal of a symmetric D: only its lower half is computed.
struct Square : TileCoord {
    bool diagonal;
};

// The place of this block in its cluster.
NANOCHAT_DEVICE int own_block() { return static_cast<int>(blockIdx.x) % kCluster; }

// Which 64 of a square's rows a consumer multiplies. The first and the last belong to one block, so that both blocks have
// as much of a lower half.
NANOCHAT_DEVICE int band_of(int consumer) {
    const int block = own_block();
    return consumer == 0 ? block : Tile::boxes - 1 - block;
}
NANOCHAT_DEVICE int row_of(const Square& square, int consumer) { return square.row + band_of(consumer) * kBox; }

// Returns whether a consumer writes the square's columns from 64 `box` on: the rows exist, and are not the mirror image
// of others.
template <bool symmetric>
NANOCHAT_DEVICE bool is_written(const Product& p, const Square& square, int consumer, int box) {
    const int row = row_of(square, consumer);
    return row < p.m && !(symmetric && row < square.column + box * kBox);
}

NANOCHAT_DEVICE int boxes_of(const Product& p, const Square& square) {
    return min(Tile::boxes, divide_up(p.n - square.column, kBox));
}

// In a square on the diagonal of A A^T, the rows of A are also those of B.
NANOCHAT_DEVICE bool shares_operand(const Product& p, const Square& square) {
    return square.diagonal && p.a.data == p.b.data;
}

// The numbers of squares of one matrix: below the diagonal of a symmetric result, or of any other; and on it.
struct Squares {
    int whole, diagonal;
};

NANOCHAT_ANYWHERE Squares squares_of(const Product& p) {
    const int rows = divide_up(p.m, Tile::square), columns = divide_up(p.n, Tile::square);
    if (p.symmetric) return {rows * (rows - 1) / 2, rows};
    return {rows * columns, 0};
}

// The whole squares of all matrices come first, so that the others balance the work at the end.
NANOCHAT_DEVICE Square square_at(const Product& p, const Squares& squares, int item) {
    const int columns = divide_up(p.n, Tile::square), whole = squares.whole * p.count;
    if (item >= whole) {
        const int matrix = (item - whole) / squares.diagonal, place = item - whole - matrix * squares.diagonal;
        return {matrix, place * Tile::square, place * Tile::square, true};
    }
    const int matrix = item / squares.whole;
    int row, column = item - matrix * squares.whole;
    if (p.symmetric) {
        for (row = 1; column >= row; ++row) column -= row;
    } else {
        row = column / columns;
        column -= row * columns;
    }
    return {matrix, row * Tile::square, column * Tile::square, false};
}

// Calls use(square) for the squares of this cluster. They are dealt out in rounds. Rounds of squares on the diagonal begin
// with the last cluster, since the first ones may have one whole square more.
template <class Use>
NANOCHAT_DEVICE void for_each_square(const Product& p, const Use& use) {
    const Squares squares = squares_of(p);
    const int whole = squares.whole * p.count, items = whole + squares.diagonal * p.count;
    const int clusters = gridDim.x / kCluster, cluster = blockIdx.x / kCluster;
    for (int first = 0; first < items; first += clusters) {
        const int item = first + (first > whole ? clusters - 1 - cluster : cluster);
        if (item < items) use(square_at(p, squares, item));
    }
}

// --- loads ---

// Loads a box of an operand: rows or columns from `first` on, and a step along K from k on.
template <Major major>
NANOCHAT_DEVICE void load_box(uint32_t box, const TensorMap& map, uint32_t barrier, int first, int k, int matrix) {
    if constexpr (major == Major::k) {
        device::tma_load(box, map, barrier, k, first, matrix);
    } else {
        device::tma_load(box, map, barrier, first, k, matrix);
    }
}

// The same into all blocks of the cluster.
template <Major major>
NANOCHAT_DEVICE void load_box_for_all(uint32_t box, const TensorMap& map, uint32_t barrier, int first, int k,
                                      int matrix) {
    constexpr uint16_t all = (1 << kCluster) - 1;
    if constexpr (major == Major::k) {
        device::tma_load_multicast(box, map, barrier, all, k, first, matrix);
    } else {
        device::tma_load_multicast(box, map, barrier, all, first, k, matrix);
    }
}

// Gives a stage back to both blocks' producers, since each loads columns for both blocks.
NANOCHAT_DEVICE void release(const Ring<Tile::stages>& ring, int n) {
    __syncwarp();   // all lanes have read
    const int lane = threadIdx.x % 32;
    if (lane < kCluster) device::mbarrier_arrive_cluster(ring.empty(n), lane);
}

// Boxes side by side as an operand of `size` rows or columns.
template <Major major, int size>
using Operand =
    std::conditional_t<major == Major::k, TileOperand<Major::k, kDepth, size>, TileOperand<Major::mn, size, kDepth>>;

// --- products ---

// sums = the product of a consumer's rows with the first N columns of the square. `a_offset`: where the rows lie in a stage.
template <int N, class T, Major major_a, Major major_b>
NANOCHAT_DEVICE void multiply(float (&all_sums)[Tile::square / 2], const Ring<Tile::stages>& ring, uint32_t stages,
                              int a_offset, int steps, int& n) {
    auto& sums = reinterpret_cast<float (&)[N / 2]>(all_sums);
    const auto start_step = [&](bool accumulate) {
        const uint32_t stage = stages + ring.stage(n) * Tile::stage_bytes;
        const Operand<major_a, kBox> a(stage + a_offset);
        const Operand<major_b, Tile::square> b(stage + Tile::b_offset);
        ring.consumer_wait(n);
        device::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
            device::wgmma<N, T, major_a, major_b>(sums, a(k), b(k), accumulate || k > 0);
        }
        device::wgmma_commit();
    };
    // The first product replaces the sums. In the loop this would take a condition, and ptxas would wait for each product,
    // as it would if some of the sums that the epilogue knows were not pinned.
    device::pin_registers(all_sums);
    start_step(false);
    ++n;
#pragma unroll 1
    for (int step = 1; step < steps; ++step, ++n) {
        start_step(true);
        device::wgmma_wait<1>();   // of the step before
        release(ring, n - 1);
    }
    wait_for_products<0>(sums);
    release(ring, n - 1);
}

// --- epilogue ---

using BoxRows = SwizzledRow<kBox, kBox>;

// sums += factor * the source in a box, for a warp's rows.
template <class T>
NANOCHAT_DEVICE void add_source(float (&sums)[kBox / 2], float factor, const BoxRows& rows) {
#pragma unroll
    for (int k = 0; k < kBox / 16; ++k) {
        uint32_t pairs[4];
        device::ldmatrix_x4(pairs, rows(2 * k));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float* const two = sums + 8 * k + i / 2 * 4 + i % 2 * 2;
            two[0] += factor * low<T>(pairs[i]);
            two[1] += factor * high<T>(pairs[i]);
        }
    }
}

// Calls use(k, words) for the sums of a warp's rows in columns 16 k to 16 k + 15, as stmatrix_x4 takes them.
template <class T, class Use>
NANOCHAT_DEVICE void for_each_16_columns(const float (&sums)[kBox / 2], const Use& use) {
#pragma unroll
    for (int k = 0; k < kBox / 16; ++k) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* const two = sums + 8 * k + i / 2 * 4 + i % 2 * 2;
            words[i] = device::pack<T>(two[0], two[1]);
        }
        use(k, words);
    }
}

// Writes a warp's sums into the box of D, and as columns into that of its mirror image. `mirrored`: where the lane's chunk
// of the first 16 columns goes.
template <class T, bool symmetric>
NANOCHAT_DEVICE void stage_box(const float (&sums)[kBox / 2], const BoxRows& rows, uint32_t mirrored) {
    for_each_16_columns<T>(sums, [&](int k, const uint32_t (&words)[4]) {
        device::stmatrix_x4(rows(2 * k), words);
        if constexpr (symmetric) device::stmatrix_x4_trans(mirrored + 16 * k * BoxRows::P::width, words);
    });
}

// The same on the diagonal: the lower half and its columns make a D that is symmetric to the last bit. Otherwise elements
// that were summed in two orders would differ, and later steps, which use D as its own transpose, would amplify the
// error. D goes to the box of the mirror image, since other warps may still read S. Blocks of 8 x 8 that are not wanted
// go where this warp has read S.
template <class T>
NANOCHAT_DEVICE void stage_diagonal_box(const float (&sums)[kBox / 2], const BoxRows& rows, const Boxes& boxes,
                                        int warp, unsigned char* shared, uint32_t start) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = 2 * (lane % 4);
    const BoxRows columns = b_fragment_rows<kBox, kBox>(boxes.mirror, lane);
    for_each_16_columns<T>(sums, [&](int k, const uint32_t (&words)[4]) {
        const uint32_t own = rows(2 * k);
        // How many blocks of 8 x 8 the lane's one lies below the diagonal.
        const int below = 2 * warp + lane / 8 % 2 - 2 * k - lane / 16;
        device::stmatrix_x4(below >= 0 ? own + (boxes.mirror - boxes.s) : own, words);
        device::stmatrix_x4_trans(below > 0 ? columns(2 * warp, 16 * k) : own, words);
    });
    // The blocks of 8 x 8 on the diagonal: element (g, t) of the upper half is that of row t, column g.
    const uint32_t row = BoxRows(boxes.mirror, 16 * warp + lane % 16)(2 * warp + lane / 8 % 2);
    uint32_t own[2], across[2];
    __syncwarp();   // all lanes have written
    device::ldmatrix_x2(own, row);
    device::ldmatrix_x2_trans(across, row);
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const uint32_t first = t > g ? across[h] : own[h], second = t + 1 > g ? across[h] : own[h];
        const uint32_t to = BoxRows(boxes.mirror, 16 * warp + 8 * h + g)(2 * warp + h) + 2 * t;
        *reinterpret_cast<uint32_t*>(shared + (to - start)) = (first & 0xFFFF) | (second & 0xFFFF0000);
    }
}

// --- kernel ---

template <class T, Major major_a, Major major_b, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, 1)
    product_hopper_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                          const __grid_constant__ TensorMap s_map, const __grid_constant__ TensorMap t_map,
                          const __grid_constant__ TensorMap d_map, const __grid_constant__ Product p,
                          const __grid_constant__ Epilogue epilogue) {
#ifdef NANOCHAT_HOPPER
    constexpr bool to_scratch = !std::is_same_v<Epilogue, OutputEpilogue>;
    constexpr bool symmetric = std::is_same_v<Epilogue, SymmetricEpilogue>;
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t start = device::shared_address(shared), stages = (start + 1023) & ~1023u;
    const Ring<Tile::stages> ring = {stages + Tile::tiles_bytes};
    // Barriers for boxes of D that are complete, as many as there are stages.
    const uint32_t complete = ring.barriers + ring_bytes(Tile::stages);
    const int group = warpgroup_index(), warp = warp_of_group(), steps = divide_up(p.k, kDepth);
    if (threadIdx.x == 0) {
        ring.initialise(Tile::consumers * kCluster);
        for (int i = 0; i < Tile::stages; ++i) device::mbarrier_init(complete + 8 * i, 4 * Tile::consumers);
        device::fence_mbarrier_init();
    }
    device::cluster_arrive();
    device::cluster_wait();   // the other block's barriers are initialised
    device::wait_for_previous_grid();

    if (group == 0) {
        device::setmaxnreg_decrease<Tile::producer_registers>();
        constexpr int own_boxes = Tile::boxes / kCluster;
        int n = 0;
        if (threadIdx.x == 0) {
            for_each_square(p, [&](const Square& square) {
                const bool separate = !shares_operand(p, square);
                const bool works[2] = {row_of(square, 0) < p.m, row_of(square, 1) < p.m};
                const int bytes = (Tile::boxes + (separate ? works[0] + works[1] : 0)) * kBoxBytes;
                for (int step = 0; step < steps; ++step, ++n) {
                    const uint32_t stage = stages + ring.stage(n) * Tile::stage_bytes;
                    ring.producer_acquire(n, bytes);
#pragma unroll
                    for (int c = 0; c < Tile::consumers; ++c) {
                        if (!works[c] || !separate) continue;
                        load_box<major_a>(stage + c * kBoxBytes, a_map, ring.full(n), row_of(square, c), step * kDepth,
                                          square.matrix);
                    }
#pragma unroll
                    for (int i = 0; i < own_boxes; ++i) {
                        const int box = own_block() * own_boxes + i;
                        load_box_for_all<major_b>(stage + Tile::b_offset + box * kBoxBytes, b_map, ring.full(n),
                                                  square.column + box * kBox, step * kDepth, square.matrix);
                    }
                }
                for (int box = 0; box < boxes_of(p, square); ++box, ++n) {
                    const uint32_t stage = stages + ring.stage(n) * Tile::stage_bytes;
                    const bool written[2] = {is_written<symmetric>(p, square, 0, box),
                                             is_written<symmetric>(p, square, 1, box)};
                    const int sources = (p.s ? 1 : 0) + (p.t ? 1 : 0);
                    ring.producer_acquire(n, sources * (written[0] + written[1]) * kBoxBytes);
#pragma unroll
                    for (int c = 0; c < Tile::consumers; ++c) {
                        if (!written[c]) continue;
                        const Boxes boxes(stage, c);
                        const int row = row_of(square, c), column = square.column + box * kBox;
                        if (p.s) device::tma_load(boxes.s, s_map, ring.full(n), column, row, square.matrix);
                        if (p.t) device::tma_load(boxes.t, t_map, ring.full(n), column, row, square.matrix);
                    }
                }
            });
            device::start_next_grid();
        } else if (to_scratch && warp == 1) {
            int stored = 0;
            for_each_square(p, [&](const Square& square) {
                n += steps;
                for (int box = 0; box < boxes_of(p, square); ++box, ++n, ++stored) {
                    const uint32_t stage = stages + ring.stage(n) * Tile::stage_bytes;
                    device::mbarrier_wait(complete + 8 * ring.stage(stored), ring.parity(stored));
                    if (threadIdx.x % 32 == 0) {
#pragma unroll
                        for (int c = 0; c < Tile::consumers; ++c) {
                            if (!is_written<symmetric>(p, square, c, box)) continue;
                            const Boxes boxes(stage, c);
                            const int row = row_of(square, c), column = square.column + box * kBox;
                            if (symmetric) device::tma_store(d_map, boxes.mirror, row, column, square.matrix);
                            if (!symmetric || row != column) {
                                device::tma_store(d_map, boxes.s, column, row, square.matrix);
                            }
                        }
                        device::tma_commit();
                        device::tma_wait_read<0>();
                    }
                    __syncwarp();
                    // For each warp of the consumers, to both blocks.
                    const int lane = threadIdx.x % 32;
                    if (lane < 4 * Tile::consumers * kCluster) {
                        device::mbarrier_arrive_cluster(ring.empty(n), lane % kCluster);
                    }
                }
            });
        }
    } else {
        device::setmaxnreg_increase<Tile::registers>();
        const int consumer = group - 1, band = band_of(consumer), lane = threadIdx.x % 32;
        // The output's strip of this warp: behind S.
        const auto strip_at = [&](const Boxes& own) { return shared + (own.mirror - start) + warp * kFloatStripBytes; };
        const uint32_t mirror_place = b_fragment_rows<kBox, kBox>(0, lane)(2 * warp);
        int n = 0, written = 0;
        for_each_square(p, [&](const Square& square) {
            const int row = square.row + band * kBox;
            const int a_offset = shares_operand(p, square) ? Tile::b_offset + band * kBoxBytes : consumer * kBoxBytes;
            float sums[Tile::square / 2];
            if (row >= p.m) {
                if constexpr (!to_scratch) {
                    // Nothing reads them, but ptxas spills where they are undefined.
#pragma unroll
                    for (float& sum : sums) sum = 0;
                }
                for (int step = 0; step < steps; ++step, ++n) {
                    ring.consumer_wait(n);
                    release(ring, n);
                }
            } else if (symmetric && square.diagonal && band < Tile::boxes / 2) {
                multiply<Tile::square / 2, T, major_a, major_b>(sums, ring, stages, a_offset, steps, n);
            } else {
                multiply<Tile::square, T, major_a, major_b>(sums, ring, stages, a_offset, steps, n);
            }
            auto& parts = reinterpret_cast<float (&)[Tile::boxes][kBox / 2]>(sums);
            const int boxes = boxes_of(p, square);
#pragma unroll
            for (int box = 0; box < Tile::boxes; ++box) {
                if (box >= boxes) continue;
                const int column = square.column + box * kBox;
                const Boxes own(stages + ring.stage(n + box) * Tile::stage_bytes, consumer);
                const BoxRows rows = a_fragment_rows<kBox, kBox>(own.s, 16 * warp, lane);
                ring.consumer_wait(n + box);
                if (is_written<symmetric>(p, square, consumer, box)) {
                    float (&part)[kBox / 2] = parts[box];
                    if (p.alpha != 1) {
#pragma unroll
                        for (int i = 0; i < kBox / 2; ++i) part[i] *= p.alpha;
                    }
                    if (p.beta != 0) add_source<T>(part, p.beta, rows);
                    if constexpr (symmetric) {
                        if (p.gamma != 0) {
                            add_source<T>(part, p.gamma, a_fragment_rows<kBox, kBox>(own.t, 16 * warp, lane));
                        }
                    }
                    if constexpr (!to_scratch) {
                        stage_floats(strip_at(own), part);
                    } else if (symmetric && row == column) {
                        stage_diagonal_box<T>(part, rows, own, warp, shared, start);
                    } else {
                        stage_box<T, symmetric>(part, rows, own.mirror + mirror_place);
                    }
                    device::fence_proxy_async();
                }
                __syncwarp();   // all lanes have written
                if constexpr (to_scratch) {
                    if (lane == 0) device::mbarrier_arrive(complete + 8 * ring.stage(written));
                    ++written;
                }
            }
            if constexpr (!to_scratch) {
                const auto give_back = [&](int box) { release(ring, n + box); };
                if (row < p.m) {
                    write_output(
                        p, epilogue, square.matrix, boxes,
                        [&](int box) {
                            const Boxes own(stages + ring.stage(n + box) * Tile::stage_bytes, consumer);
                            return StagedStrip{strip_at(own), row + 16 * warp, square.column + box * kBox};
                        },
                        give_back);
                } else {
                    for (int box = 0; box < boxes; ++box) give_back(box);
                }
            }
            n += boxes;
        });
    }
    __syncwarp();
    device::cluster_arrive();
    device::cluster_wait();   // the other block arrives at barriers of this one, and writes into its stages
#endif
}

// `columns`: those that the copies see, of `pitch`.
TensorMap map_of(DType dtype, const void* data, const Matrices& x, int columns, int count) {
    const int64_t row = 2 * int64_t{x.pitch};
    return make_tensor_map(dtype, data, {columns, x.rows, count}, {row, row * x.rows}, {kBox, kBox, 1},
                           Swizzle::bytes128);
}

template <class T>
void launch(const Product& p, DType dtype, const OutputEpilogue* output, const Execution& execution) {
    const Squares squares = squares_of(p);
    const int clusters =
        std::clamp(execution.device.multiprocessors / kCluster, 1, (squares.whole + squares.diagonal) * p.count);
    const TensorMap a = map_of(dtype, p.a.data, p.a, p.a.columns, p.count);
    const TensorMap b = map_of(dtype, p.b.data, p.b, p.b.columns, p.count);
    // Zeros behind the columns of D are stored too. Maps that the kernel does not use are those of A.
    const TensorMap s = p.s ? map_of(dtype, p.s, p.d, p.d.columns, p.count) : a;
    const TensorMap t = p.t ? map_of(dtype, p.t, p.d, p.d.columns, p.count) : a;
    const TensorMap d = output ? a : map_of(dtype, p.d.data, p.d, p.d.pitch, p.count);
    choose_product(p, output, [&](auto major_a, auto major_b, const auto& epilogue) {
        using Epilogue = std::decay_t<decltype(epilogue)>;
        device::launch(
            "newton_schulz", product_hopper_kernel<T, decltype(major_a)::value, decltype(major_b)::value, Epilogue>,
            dim3(static_cast<unsigned>(clusters * kCluster)), dim3(Tile::threads), Tile::shared_bytes, execution.stream,
            device::LaunchOptions{.cluster = kCluster, .overlaps_previous = true}, a, b, s, t, d, p, epilogue);
    });
}

}   // namespace

void multiply(const Product& p, DType dtype, const OutputEpilogue* output, const Execution& execution) {
    dtype == DType::float16 ? launch<float16>(p, dtype, output, execution)
                            : launch<bfloat16>(p, dtype, output, execution);
}

}   // namespace nanochat::cuda::newton_schulz_kernels::hopper
