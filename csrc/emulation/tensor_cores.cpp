// Matrix instructions of warps and warpgroups, and the 16-bit numbers that they take.
#include <immintrin.h>

#include <algorithm>

#include "block.h"

namespace nanochat::emulation {

// --- numbers ---

__attribute__((target("f16c"))) float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
__attribute__((target("f16c"))) uint16_t float_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

uint16_t float_to_bfloat16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

float widen(uint16_t bits, Half type) {
    return type == Half::bfloat16 ? __uint_as_float(uint32_t{bits} << 16) : half_to_float(bits);
}
uint16_t narrow(float x, Half type) { return type == Half::bfloat16 ? float_to_bfloat16(x) : float_to_half(x); }

template <int rows, int columns>
static float& at(float (&matrix)[rows][columns], Place place) {
    return matrix[place.row][place.column];
}

// --- ldmatrix, stmatrix ---

struct MatrixRow {
    uint16_t* registers;    // two elements each
    uint16_t elements[8];   // of the row that the lane names
    int count;              // of matrices
};

static void move_matrices(const char* operation, uint32_t* registers, uint32_t row, int count, bool transposed,
                          bool store) {
    MatrixRow own{reinterpret_cast<uint16_t*>(registers), {}, count};
    const bool names_row = lane() < 8 * count;
    if (!store && names_row) copy_bytes(own.elements, access_shared(row, 16, operation, false), 16);
    if (const Lanes<MatrixRow> rows{operation, own}) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 2 * rows[lane].count; ++i) {
                const Place place = ldmatrix_place(lane, i % 2, transposed);
                uint16_t &half = rows[lane].registers[i], &element = rows[i / 2 * 8 + place.row].elements[place.column];
                store ? element = half : half = element;
            }
        }
    }
    if (store && names_row) copy_bytes(access_shared(row, 16, operation, true), own.elements, 16);
}

void ldmatrix(uint32_t* registers, uint32_t row, int count, bool transposed) {
    move_matrices(transposed ? "ldmatrix.trans" : "ldmatrix", registers, row, count, transposed, false);
}
void stmatrix(uint32_t row, const uint32_t* registers, int count, bool transposed) {
    const char* operation = transposed ? "stmatrix.trans" : "stmatrix";
    move_matrices(operation, const_cast<uint32_t*>(registers), row, count, transposed, true);
}

// --- mma.sync ---

struct Fragments {
    float* d;
    const uint16_t *a, *b;
};

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Half type) {
    Fragments own{d, reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint16_t*>(b)};
    if (const Lanes<Fragments> lanes{"mma.sync", own}) {
        float A[16][16], B[16][8], D[16][8] = {};
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 8; ++i) at(A, mma_a(lane, i)) = widen(lanes[lane].a[i], type);
            for (int i = 0; i < 4; ++i) at(B, mma_b(lane, i)) = widen(lanes[lane].b[i], type);
        }
        for (int row = 0; row < 16; ++row) {
            for (int k = 0; k < 16; ++k) {
                for (int column = 0; column < 8; ++column) D[row][column] += A[row][k] * B[k][column];
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) lanes[lane].d[i] += at(D, mma_d(lane, i));
        }
    }
}

// --- wgmma: each warp computes its 16 rows ---

// The operands of a warp's product, and its sums.
static float A[16][16], B[16][256], C[16][256];

// The elements (0 .. count - 1 along MN, from `first` on; 0 .. 15 along K) of an operand in shared memory, where 16
// bytes hold 8 that lie side by side.
template <class Element>
static void read_tile(uint64_t tile, device::Major major, Half type, int first, int count, const Element& element) {
    const bool along_k = major == device::Major::k;
    for (int mn = 0; mn < count; mn += along_k ? 1 : 8) {
        for (int k = 0; k < 16; k += along_k ? 8 : 1) {
            const unsigned char* place = access_shared(wgmma_address(tile, major, first + mn, k), 16, "wgmma", false);
            const auto* elements = reinterpret_cast<const uint16_t*>(place);
            for (int i = 0; i < 8; ++i) {
                (along_k ? element(mn, k + i) : element(mn + i, k)) = widen(elements[i], type);
            }
        }
    }
}

// Reads the operands twice: as this thread, and as the asynchronous proxy.
static void read_operands(const Operands& o) {
    const auto read = [&] {
        const int row = static_cast<int>(current->warp - block->warps) % 4 * 16;
        if (!o.a_in_registers) {
            read_tile(o.a_tile, o.major_a, o.type, row, 16, [](int m, int k) -> float& { return A[m][k]; });
        }
        read_tile(o.b_tile, o.major_b, o.type, 0, o.N, [](int n, int k) -> float& { return B[k][n]; });
    };
    read();
    as_proxy(read);
}

// Product `index` of each lane. The sums are the next product's in flight that adds to them, or the lane's registers.
static void multiply(Thread* threads, int index) {
    const Operands& o = threads[0].products[index].operands;
    read_operands(o);
    for (int lane = 0; lane < 32 && o.a_in_registers; ++lane) {
        for (int i = 0; i < 8; ++i) at(A, mma_a(lane, i)) = widen(threads[lane].products[index].a[i], o.type);
    }
    for (int row = 0; row < 16; ++row) {
        std::fill(C[row], C[row] + o.N, 0.f);
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < o.N; n += 8) {
                for (int i = n; i < n + 8; ++i) C[row][i] += A[row][k] * B[k][i];   // a vector of the processor's
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        Product &own = threads[lane].products[index], *const end = threads[lane].products.end();
        Product* next = std::find_if(&own + 1, end, [&](const Product& other) { return other.d == own.d; });
        float* sums = next == end ? own.d : next->sums;
        for (int i = 0; i < o.N / 2; ++i) sums[i] = at(C, wgmma_d(lane, i)) + (o.accumulate ? own.sums[i] : 0);
    }
}

void wgmma(float* d, int N, const uint32_t* a, uint64_t a_tile, uint64_t b_tile, bool accumulate, device::Major major_a,
           device::Major major_b, Half type) {
    bool is_first = true;   // that is in flight for these registers
    for (const Product& other : current->products) {
        if (other.d != d) continue;
        if (other.operands.N != N) fail("wgmma: one accumulator with N %d and %d", other.operands.N, N);
        is_first = false;
    }
    Product& own = current->products.add();
    own.operands = {
        .a_tile = a_tile,
        .b_tile = b_tile,
        .major_a = major_a,
        .major_b = major_b,
        .type = type,
        .N = N,
        .a_in_registers = a != nullptr,
        .accumulate = accumulate,
    };
    own.d = d;
    own.group = current->product_group;
    if (a) copy_bytes(own.a, a, sizeof own.a);
    if (is_first) {   // until it is waited for, the registers are not the thread's
        copy_bytes(own.sums, d, sizeof(float) * N / 2);
        fill_bytes(d, 0xFF, sizeof(float) * N / 2);
    }
    if (const Lanes<Product> lanes{"wgmma", own}) {
        for (int lane = 0; lane < 32; ++lane) {
            const Operands& other = lanes[lane].operands;
            if (other.a_tile != a_tile || other.b_tile != b_tile || other.accumulate != accumulate) {
                fail("wgmma: lanes %d and %d give different descriptors", current->lane, lane);
            }
        }
        if (!current->warp->fenced) fail("wgmma without a wgmma.fence before it");
        ++current->warp->products;
        read_operands(own.operands);   // the hardware may read from now on
    }
}

void wgmma_fence() {
    if (const Lanes<Thread> lanes{"wgmma.fence", *current}) current->warp->fenced = true;
}

void wgmma_commit() {
    const Lanes<Thread> lanes{"wgmma.commit_group", *current};
    ++current->product_group;
}

void wgmma_wait(int newest) {
    const int before = current->product_group - newest;
    const auto due = [=](const Product& product) { return product.group < before; };
    if (const Lanes<Thread> threads{"wgmma.wait_group", *current}) {
        auto& products = current->products;
        for (int i = 0; i < products.size && due(products[i]); ++i) multiply(current->warp->threads, i);
        for (int lane = 0; lane < 32; ++lane) threads[lane].products.remove_if(due);
        current->warp->fenced = false;
    }
    acquire(&block->tokens->proxy_reads);
}

void check_warpgroups() {
    for (int i = 0; i < block->warp_count; ++i) {
        // The missing warps of an incomplete warpgroup have started no product.
        const int first = i / 4 * 4, products = first + 4 <= block->warp_count ? block->warps[i].products : 0;
        if (block->warps[first].products != products) {
            fail("wgmma: the warps of warpgroup %d start different numbers of products", i / 4);
        }
    }
}

}   // namespace nanochat::emulation
