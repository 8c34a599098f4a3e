// Matrix products in registers. The micro-kernel multiplies a strip of 6 rows of A by a strip of up to kTileVectors
// vectors of columns of B and holds the 6 x n product in registers over the whole depth (Goto & van de Geijn, "Anatomy
// of high-performance matrix multiplication", 2008). A is read in place, by broadcasts, and packed only if its stride
// would thrash the cache. B is read as rows of contiguous columns.
#pragma once

#include <cstring>

#include "relu_squared.h"
#include "simd.h"

namespace nanochat::NANOCHAT_ISA {

constexpr int kTileRows = 6;
template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;

// The place of A(i, k): a[i * stride + k] by rows, a[k * stride + i] by columns.
enum class Layout { rows, columns };

// tile[r][v] = sum over k of A(r, k) * B(k, v-th vector). 6 rows of A and NV vectors of B must be readable.
template <class T, int NV, Layout layout>
NANOCHAT_INLINE void multiply_tile(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                                   Vec<T> (&tile)[kTileRows][NV]) {
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) tile[r][v] = Vec<T>{};
    for (int64_t k = 0; k < depth; k++) {
        Vec<T> columns[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) columns[v] = load(b + k * b_stride + v * kLanes<T>);
#pragma GCC unroll 6
        for (int r = 0; r < kTileRows; r++) {
            const Vec<T> x = broadcast(layout == Layout::rows ? a[r * a_stride + k] : a[k * a_stride + r]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) tile[r][v] += x * columns[v];
        }
    }
}

// c (6, columns) = A B, or += with `accumulate`. `columns` is a multiple of the vector width, and all 6 rows of A and c
// exist.
template <class T, Layout layout, bool accumulate, int NV>
NANOCHAT_INLINE void multiply_strip_vectors(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                                            T* c, int64_t c_stride) {
    Vec<T> tile[kTileRows][NV];
    multiply_tile<T, NV, layout>(depth, a, a_stride, b, b_stride, tile);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            T* to = c + r * c_stride + v * kLanes<T>;
            store(to, accumulate ? load(to) + tile[r][v] : tile[r][v]);
        }
}
template <class T, Layout layout, bool accumulate>
void multiply_strip(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c, int64_t c_stride,
                    int64_t columns) {
    int64_t j = 0;
    for (; j + kTileColumns<T> <= columns; j += kTileColumns<T>)
        multiply_strip_vectors<T, layout, accumulate, kTileVectors>(depth, a, a_stride, b + j, b_stride, c + j,
                                                                    c_stride);
    const int64_t vectors = (columns - j) / kLanes<T>;
    if (kTileVectors > 3 && vectors == 3)
        multiply_strip_vectors<T, layout, accumulate, 3>(depth, a, a_stride, b + j, b_stride, c + j, c_stride);
    if (kTileVectors > 2 && vectors == 2)
        multiply_strip_vectors<T, layout, accumulate, 2>(depth, a, a_stride, b + j, b_stride, c + j, c_stride);
    if (vectors == 1)
        multiply_strip_vectors<T, layout, accumulate, 1>(depth, a, a_stride, b + j, b_stride, c + j, c_stride);
}

// dst (columns, rows), row stride dst_stride, = the transpose of src (rows, columns), row stride src_stride, in squares of
// one vector's width.
template <class T>
NANOCHAT_INLINE void transpose(int64_t rows, int64_t columns, const T* src, int64_t src_stride, T* dst,
                               int64_t dst_stride) {
    constexpr int W = kLanes<T>;
    for (int64_t i = 0; i < rows; i += W)
        for (int64_t j = 0; j < columns; j += W) {
            if (i + W > rows || j + W > columns) {
                for (int64_t r = i; r < minimum(i + W, rows); r++)
                    for (int64_t c = j; c < minimum(j + W, columns); c++)
                        dst[c * dst_stride + r] = src[r * src_stride + c];
                continue;
            }
            Vec<T> square[W];
#pragma GCC unroll 16
            for (int r = 0; r < W; r++) square[r] = load(src + (i + r) * src_stride + j);
            transpose_square<1>(square);
#pragma GCC unroll 16
            for (int r = 0; r < W; r++) store(dst + (j + r) * dst_stride + i, square[r]);
        }
}

// What a product does to its elements before it writes them for the last time, while they are in registers.
enum class Epilogue {
    none,
    relu_squared,            // c = max(c, 0)^2
    relu_squared_backward,   // c = 2 sqrt(epilogue_y) c
};

// C = alpha * A B + beta * S, for each matrix of a batch. B and C are row-major. `lower`: the result is known to be
// symmetric; only its lower triangle is computed, and mirrored. C may be S, but neither A nor B. The result does not
// depend on the number of threads. All is computed in T; A, B, and C with S may be stored in other types.
template <class T, class A = T, class B = T, class C = T, Epilogue epilogue = Epilogue::none>
struct Product {
    int64_t M, N, K;
    const A* a;
    int64_t a_stride;
    Layout a_layout;
    const B* b;
    int64_t b_stride;
    C* c;
    int64_t c_stride;
    T alpha = 1;
    T beta = 0;
    const C* source = nullptr;
    int64_t source_stride = 0;
    bool lower = false;
    int64_t batch = 1;
    int64_t a_batch = 0, b_batch = 0, c_batch = 0, source_batch = 0;   // elements from one of the batch to the next
    const C* epilogue_y = nullptr;                                     // laid out as C
};

// A strip of B, 128 x 64 floats, stays in L1 (32 KB). Short chains of sums lose less to rounding.
constexpr int64_t kDepth = 128;
// Rows of A that share one packed strip of B.
constexpr int64_t kBlockRows = 192;
// If the rows of B are at most this many bytes apart, a strip is read in place: two rows a page, and L2 holds it.
constexpr int64_t kDirectStride = 2048;
// Packed rows are short and a stride apart, so the hardware does not prefetch them.
constexpr int64_t kPrefetchRows = 8;

// Elements of one thread's scratch: a strip of B and a block of A.
template <class T>
constexpr int64_t kScratch = kDepth * (kTileColumns<T> + kBlockRows);

// x after the epilogue: a number or a vector, which belongs to `place` of C and of y.
template <Epilogue epilogue, class T, class V, class C>
NANOCHAT_INLINE V after_epilogue(V x, const C* y, int64_t place) {
    if constexpr (epilogue == Epilogue::relu_squared)
        return squared_relu<T>(x);
    else if constexpr (epilogue == Epilogue::none)
        return x;
    else if constexpr (std::is_same_v<V, T>)
        return squared_relu_gradient<T>(x, read(y + place));
    else
        return squared_relu_gradient<T>(x, load(y + place));
}

// c = alpha * tile + beta * source for the part of the tile inside rows x columns; `row` and `column` are the place of
// the tile. With `lower`, only elements on or below the diagonal are written. `last`: they are written for the last
// time, after the epilogue, and with `lower` their transposes too.
template <class T, class A, class B, class C, Epilogue epilogue>
NANOCHAT_INLINE void store_tile(const Vec<T> (&tile)[kTileRows][kTileVectors], const Product<T, A, B, C, epilogue>& p,
                                C* c, const C* source, int64_t source_stride, T beta, int64_t row, int64_t rows,
                                int64_t column, int64_t columns, bool last) {
    constexpr int W = kLanes<T>;
    const bool mirror = p.lower && last;
    const C* y = epilogue == Epilogue::relu_squared_backward ? p.epilogue_y + (c - p.c) : nullptr;
    const bool below = !p.lower || column + kTileColumns<T> <= row + 1;
    if constexpr (std::is_same_v<T, C>)
        if (rows == kTileRows && columns == kTileColumns<T> && below && !mirror) {
#pragma GCC unroll 6
            for (int r = 0; r < kTileRows; r++)
#pragma GCC unroll 4
                for (int v = 0; v < kTileVectors; v++) {
                    Vec<T> x = tile[r][v] * p.alpha;
                    if (source) x += load(source + (row + r) * source_stride + column + v * W) * beta;
                    const int64_t place = (row + r) * p.c_stride + column + v * W;
                    if (last) x = after_epilogue<epilogue, T>(x, y, place);
                    store(c + place, x);
                }
            return;
        }
    T values[kTileRows][kTileColumns<T>];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; v++) store(&values[r][v * W], tile[r][v] * p.alpha);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t end = p.lower ? minimum(columns, row + r + 1 - column) : columns;
        for (int64_t j = 0; j < end; j++) {
            T x = values[r][j];
            if (source) x += read(source + (row + r) * source_stride + column + j) * beta;
            const int64_t place = (row + r) * p.c_stride + column + j;
            if (last) x = after_epilogue<epilogue, T>(x, y, place);
            write(c + place, x);
            values[r][j] = x;
        }
    }
    if (!mirror) return;
    for (int64_t j = 0; j < columns; j++)
        for (int64_t r = maximum<int64_t>(0, column + j - row); r < rows; r++)
            write(c + (column + j) * p.c_stride + row + r, values[r][j]);
}

template <class In>
NANOCHAT_INLINE void prefetch_row(const In* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(In))) __builtin_prefetch(row + i);
}

// Copies `count` elements of a row of A or B as T, and zeros up to `padded`.
template <class T, class In>
NANOCHAT_INLINE void pack_row(const In* from, int64_t count, T* to, int64_t padded) {
    int64_t i = 0;
    if constexpr (std::is_same_v<T, In>)
        for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(from + i));
    for (; i < count; i++) to[i] = static_cast<T>(read(from + i));
    for (; i < padded; i++) to[i] = 0;
}

// Rows [row, row + rows) and columns [column, column + columns) of one product of the batch.
template <class T, class A, class B, class C, Epilogue epilogue>
void multiply_rows(const Product<T, A, B, C, epilogue>& p, int64_t index, int64_t row, int64_t rows, int64_t column,
                   int64_t columns, T* scratch) {
    constexpr int64_t NR = kTileColumns<T>;
    const A* a = p.a + index * p.a_batch;
    const B* b = p.b + index * p.b_batch;
    C* c = p.c + index * p.c_batch;
    T* strip = scratch;
    T* block = scratch + kDepth * NR;
    const int64_t padded = round_up(rows, kTileRows);
    const int64_t end = p.lower ? minimum(column + columns, row + rows) : column + columns;
    const bool by_columns = p.a_layout == Layout::columns;
    // Packed are: A by columns, where every element is on another page; A in another type; and the last tile of any A if
    // it has fewer than 6 rows.
    const int64_t first_packed = std::is_same_v<T, A> ? rows / kTileRows * kTileRows : 0;
    for (int64_t k0 = 0; k0 < p.K || k0 == 0; k0 += kDepth) {
        const int64_t depth = minimum(kDepth, p.K - k0);
        const bool last = k0 + depth >= p.K;
        const C* source = k0 ? c : p.source ? p.source + index * p.source_batch : nullptr;
        const int64_t source_stride = k0 ? p.c_stride : p.source_stride;
        const T beta = k0 ? T(1) : p.beta;
        if (by_columns) {
            for (int64_t k = 0; k < depth; k++) {
                if (k0 + k + kPrefetchRows < p.K) prefetch_row(a + (k0 + k + kPrefetchRows) * p.a_stride + row, rows);
                pack_row(a + (k0 + k) * p.a_stride + row, rows, block + k * padded, padded);
            }
        } else {
            for (int64_t r = first_packed; r < padded; r++)
                pack_row(a + (row + r) * p.a_stride + k0, r < rows ? depth : 0, block + (r - first_packed) * kDepth,
                         depth);
        }
        for (int64_t j = column; j < end; j += NR) {
            const int64_t width = minimum(NR, column + columns - j);
            const T* columns_of_b = strip;
            int64_t b_stride = NR;
            bool direct = false;
            if constexpr (std::is_same_v<T, B>)
                if (width == NR && p.b_stride * static_cast<int64_t>(sizeof(B)) <= kDirectStride) {
                    columns_of_b = b + k0 * p.b_stride + j;
                    b_stride = p.b_stride;
                    direct = true;
                }
            if (!direct)
                for (int64_t k = 0; k < depth; k++) {
                    if (k0 + k + kPrefetchRows < p.K)
                        prefetch_row(b + (k0 + k + kPrefetchRows) * p.b_stride + j, width);
                    pack_row(b + (k0 + k) * p.b_stride + j, width, strip + k * NR, NR);
                }
            for (int64_t r = 0; r < rows; r += kTileRows) {
                const int64_t height = minimum<int64_t>(kTileRows, rows - r);
                if (p.lower && j >= row + r + height) continue;
                Vec<T> tile[kTileRows][kTileVectors];
                if (by_columns) {
                    multiply_tile<T, kTileVectors, Layout::columns>(depth, block + r, padded, columns_of_b, b_stride,
                                                                    tile);
                } else {
                    const T* rows_of_a = block + (r - first_packed) * kDepth;
                    int64_t a_stride = kDepth;
                    if constexpr (std::is_same_v<T, A>)
                        if (r < first_packed) {
                            rows_of_a = a + (row + r) * p.a_stride + k0;
                            a_stride = p.a_stride;
                        }
                    multiply_tile<T, kTileVectors, Layout::rows>(depth, rows_of_a, a_stride, columns_of_b, b_stride,
                                                                 tile);
                }
                store_tile<T>(tile, p, c, source, source_stride, beta, row + r, height, j, width, last);
            }
        }
    }
}

// All threads of the enclosing parallel region call this together; it ends with a barrier.
template <class T, class A, class B, class C, Epilogue epilogue>
void multiply_team(const Product<T, A, B, C, epilogue>& p, int threads, T* scratch) {
    constexpr int64_t columns = 8 * kTileColumns<T>;
    const int64_t strips = ceil_div(p.N, columns);
    int64_t rows = kBlockRows;
    while (rows > 4 * kTileRows && p.batch * strips * ceil_div(p.M, rows) < 4 * threads) rows /= 2;
    const int64_t blocks = ceil_div(p.M, rows);
    // From the last rows up, because the longest rows of a lower triangle come first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < p.batch * blocks * strips; item++) {
        const int64_t index = item / (blocks * strips);
        const int64_t row = (blocks - 1 - item / strips % blocks) * rows;
        const int64_t column = item % strips * columns;
        const int64_t height = minimum(rows, p.M - row);
        if (p.lower && column >= row + height) continue;
        multiply_rows(p, index, row, height, column, minimum(columns, p.N - column), scratch);
    }
}

}   // namespace nanochat::NANOCHAT_ISA
