// ldmatrix, stmatrix, mma.sync and wgmma.
#include <algorithm>

#include "machine.h"

namespace ptx {

namespace {

float widen(uint16_t bits, bool is_half) { return is_half ? half_to_float(bits) : bfloat16_to_float(bits); }

// Four registers of A, (16, 16) by the warp: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
void read_a(Warp& warp, const int* registers, bool is_half, float (&a)[16][16]) {
    for (int n = 0; n < 4; ++n) {
        const Register<uint32_t> r(warp, registers[n]);
        for (int l = 0; l < 32; ++l) {
            float* to = &a[l / 4 + n % 2 * 8][l % 4 * 2 + n / 2 * 8];
            to[0] = widen(static_cast<uint16_t>(r.get(l)), is_half);
            to[1] = widen(static_cast<uint16_t>(r.get(l) >> 16), is_half);
        }
    }
}

using Row = uint16_t[8];   // of a matrix of 8 x 8

uint32_t lanes_of_rows(int matrices) { return matrices == 4 ? kAllLanes : (1u << 8 * matrices) - 1; }

}   // namespace

Status handlers::ldmatrix(Warp& warp, const Instruction& i, uint32_t) {
    uint32_t addresses[32];
    Row rows[32];
    const uint32_t lanes = lanes_of_rows(i.count);
    for_lanes(lanes, [&](int l) {
        addresses[l] = shared_operand(warp, i, l);
        memcpy(rows[l], warp.block->shared_at(addresses[l], 16, "ldmatrix"), 16);
    });
    for (int n = 0; n < i.count; ++n) {
        Register<uint32_t> d(warp, warp.kernel->lists[static_cast<size_t>(i.list + n)]);
        const Row* matrix = rows + 8 * n;
        for (int l = 0; l < 32; ++l) {
            const int row = l / 4, column = l % 4 * 2;
            const uint32_t low = i.width ? matrix[column][row] : matrix[row][column];
            const uint32_t high = i.width ? matrix[column + 1][row] : matrix[row][column + 1];
            d.set(l, low | high << 16);
        }
    }
    count_shared(warp, addresses, 16, lanes);
    return Status::next;
}

Status handlers::stmatrix(Warp& warp, const Instruction& i, uint32_t) {
    uint32_t addresses[32];
    Row rows[32];
    for (int n = 0; n < i.count; ++n) {
        const Register<uint32_t> source(warp, warp.kernel->lists[static_cast<size_t>(i.list + n)]);
        Row* matrix = rows + 8 * n;
        for (int l = 0; l < 32; ++l) {
            const int row = l / 4, column = l % 4 * 2;
            (i.width ? matrix[column][row] : matrix[row][column]) = static_cast<uint16_t>(source.get(l));
            (i.width ? matrix[column + 1][row] : matrix[row][column + 1]) = static_cast<uint16_t>(source.get(l) >> 16);
        }
    }
    const uint32_t lanes = lanes_of_rows(i.count);
    for_lanes(lanes, [&](int l) {
        addresses[l] = shared_operand(warp, i, l);
        memcpy(warp.block->shared_at(addresses[l], 16, "stmatrix"), rows[l], 16);
        warp.block->note_write(warp, addresses[l], 16);
    });
    count_shared(warp, addresses, 16, lanes);
    return Status::next;
}

Status handlers::mma(Warp& warp, const Instruction& i, uint32_t) {
    const int *d = warp.kernel->lists.data() + i.list, *a = d + 4, *b = a + 4, *c = b + 2;
    const bool is_half = i.width;
    float A[16][16], B[16][8], D[16][8] = {};
    read_a(warp, a, is_half, A);
    for (int n = 0; n < 2; ++n) {
        const Register<uint32_t> r(warp, b[n]);
        for (int l = 0; l < 32; ++l) {
            B[l % 4 * 2 + 8 * n][l / 4] = widen(static_cast<uint16_t>(r.get(l)), is_half);
            B[l % 4 * 2 + 8 * n + 1][l / 4] = widen(static_cast<uint16_t>(r.get(l) >> 16), is_half);
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) D[row][n] += A[row][k] * B[k][n];
        }
    }
    for (int n = 0; n < 4; ++n) {
        Register<float> target(warp, d[n]);
        const Register<float> added(warp, c[n]);
        for (int l = 0; l < 32; ++l) target.set(l, added.get(l) + D[l / 4 + n / 2 * 8][l % 4 * 2 + n % 2]);
    }
    return Status::next;
}

// --- wgmma ---

namespace {

constexpr int64_t kTransposedA = 1, kTransposedB = 2, kHalf = 4, kInRegisters = 8;   // of Instruction::immediate

// Of the warp's 16 rows.
struct Operands {
    float a[16][16], b[16][256];
};

// Address of the 8 numbers that hold element (mn, k), the first of them, in a canonical layout of the PTX ISA.
uint32_t chunk_address(uint64_t descriptor, bool is_transposed, uint32_t mn, uint32_t k) {
    const uint32_t start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
    const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4;
    const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
    static const uint32_t kRowChunks[] = {1, 8, 4, 2};   // of 16 bytes: no swizzle, 128 bytes, 64, 32
    const uint32_t chunks = kRowChunks[descriptor >> 62], row_bytes = 16 * chunks;
    uint32_t offset;
    if (!is_transposed) {   // rows of mn, with k in turn
        offset = mn % 8 * row_bytes + mn / 8 * stride + k / 8 * (chunks == 1 ? leading : 16);
    } else if (chunks == 1) {
        offset = mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    } else {
        offset = mn / 8 % chunks * 16 + mn / 8 / chunks * leading + k % 8 * row_bytes + k / 8 * stride;
    }
    const uint32_t address = start + offset;
    return address ^ (address >> 7 & (chunks - 1)) << 4;
}

// Calls put(mn, k, number), and returns a hash of what it read.
template <class Put>
uint64_t read_operand(Block& block, uint64_t descriptor, bool is_transposed, int first, int count, bool is_half,
                      const Put& put) {
    uint64_t hash = 0xCBF29CE484222325;
    for (int mn = 0; mn < count; mn += is_transposed ? 8 : 1) {
        for (int k = 0; k < 16; k += is_transposed ? 1 : 8) {
            const uint32_t address =
                chunk_address(descriptor, is_transposed, static_cast<uint32_t>(first + mn), static_cast<uint32_t>(k));
            uint16_t numbers[8];
            uint64_t words[2];
            memcpy(numbers, block.shared_at(address, 16, "wgmma"), 16);
            memcpy(words, numbers, 16);
            block.check_proxy(address, 16, "wgmma");
            for (const uint64_t word : words) hash = (hash ^ word ^ hash >> 29) * 0x100000001B3;
            for (int n = 0; n < 8; ++n) {
                const float x = widen(numbers[n], is_half);
                is_transposed ? put(mn + n, k, x) : put(mn, k + n, x);
            }
        }
    }
    return hash;
}

uint64_t read_operands(Warp& warp, const Instruction& i, uint64_t a, uint64_t b, Operands& operands) {
    const bool is_half = i.immediate & kHalf;
    uint64_t hash = 0;
    if (!(i.immediate & kInRegisters)) {
        hash = read_operand(*warp.block, a, i.immediate & kTransposedA, warp.id % 4 * 16, 16, is_half,
                            [&](int m, int k, float x) { operands.a[m][k] = x; });
    }
    return hash + 3 * read_operand(*warp.block, b, i.immediate & kTransposedB, 0, i.width, is_half,
                                   [&](int n, int k, float x) { operands.b[k][n] = x; });
}

uint64_t descriptor_of(Warp& warp, int offset) {
    const Register<uint64_t> r(warp, offset);
    const uint64_t descriptor = r.get(0);
    for (int l = 1; l < 32; ++l) {
        if (r.get(l) != descriptor) fail("wgmma: lanes give different descriptors");
    }
    constexpr uint64_t kFields = 0xC0003FFF3FFF3FFF;   // without a base offset
    if (descriptor & ~kFields) fail("wgmma: descriptor 0x%lx", descriptor);
    return descriptor;
}

void check_untouched(const Warp& warp, const Instruction& i) {
    if (!warp.fence_time) fail("wgmma without wgmma.fence before it");
    for (int n = 0; n < i.count; ++n) {
        const int offset = warp.kernel->lists[static_cast<size_t>(i.list + n)];
        if (warp.touched[static_cast<size_t>(offset) / 128] <= warp.fence_time) continue;
        const bool is_sum = n < i.width / 2;
        fail("wgmma: register %d of %s is touched since the last wgmma.fence", is_sum ? n : n - i.width / 2,
             is_sum ? "the accumulator" : "A");
    }
}

}   // namespace

Status handlers::wgmma(Warp& warp, const Instruction& i, uint32_t) {
    const int* registers = warp.kernel->lists.data() + i.list;
    const int N = i.width;
    const bool in_registers = i.immediate & kInRegisters;
    const uint64_t a = in_registers ? 0 : descriptor_of(warp, i.a), b = descriptor_of(warp, i.b);
    const uint32_t accumulate = warp.predicate(i.c);
    if (accumulate != 0 && accumulate != kAllLanes) fail("wgmma: lanes differ in scale-d");
    check_untouched(warp, i);

    static Operands operands;
    static float sums[16][256];
    const uint64_t hash = read_operands(warp, i, a, b, operands);
    if (in_registers) read_a(warp, registers + N / 2, i.immediate & kHalf, operands.a);
    for (int row = 0; row < 16; ++row) {
        std::fill_n(sums[row], N, 0.f);
        for (int k = 0; k < 16; ++k) {
            const float x = operands.a[row][k];
            for (int n = 0; n < N; ++n) sums[row][n] += x * operands.b[k][n];
        }
    }
    for (int n = 0; n < N / 2; ++n) {
        Register<float> d(warp, registers[n]);
        const int row = n / 2 % 2 * 8, column = n / 4 * 8 + n % 2;
        for (int l = 0; l < 32; ++l) {
            d.set(l, sums[l / 4 + row][l % 4 * 2 + column] + (accumulate ? d.get(l) : 0));
        }
        warp.busy[registers[n]] = warp.product_group;
    }
    if (in_registers) {
        for (int n = N / 2; n < N / 2 + 4; ++n) warp.busy.try_emplace(registers[n] + 1, warp.product_group);
    }
    warp.products.push_back({warp.product_group, a, b, &i, hash});
    ++warp.products_started;
    return Status::next;
}

Status handlers::wgmma_fence(Warp& warp, const Instruction&, uint32_t) {
    warp.fence_time = warp.time;
    return Status::next;
}

Status handlers::wgmma_commit(Warp& warp, const Instruction&, uint32_t) {
    ++warp.product_group;
    return Status::next;
}

Status handlers::wgmma_wait(Warp& warp, const Instruction& i, uint32_t) {
    const int64_t first_left = warp.product_group - i.immediate;
    std::erase_if(warp.products, [&](const Product& product) {
        if (product.group >= first_left) return false;
        static Operands operands;
        if (read_operands(warp, *product.instruction, product.a, product.b, operands) != product.hash) {
            fail("wgmma: what it reads changes before it is waited for: %s",
                 warp.kernel->text_of(*product.instruction).c_str());
        }
        return true;
    });
    std::erase_if(warp.busy, [&](const auto& one) { return one.second < first_left; });
    return Status::next;
}

void Warp::note_accesses(const Instruction& i) {
    ++time;
    if (i.run == handlers::wgmma) return;
    const auto note = [&](int offset) {
        if (offset >= 0) touched[static_cast<size_t>(offset) / 128] = time;
    };
    for (const int offset : {i.d, i.a, i.b, i.c, i.e}) note(offset);
    for (int n = 0; n < i.count; ++n) note(kernel->lists[static_cast<size_t>(i.list + n)]);
}

void Warp::check_products(const Instruction& i) {
    const auto is_of_a = [&](int offset) { return busy.count(offset + 1) > 0; };
    const auto check = [&](int offset, bool is_write) {
        if (offset < 0) return;
        if (busy.count(offset) || (is_write && is_of_a(offset))) {
            fail("%s a register of a wgmma in flight", is_write ? "writes" : "reads");
        }
    };
    const int* list = kernel->lists.data() + i.list;
    int first = 0, targets = 0;       // of the list: what is checked begins there, and starts with so many targets
    if (i.run == handlers::wgmma) {   // an accumulator may be one in flight
        first = i.width / 2;
        if (std::any_of(list, list + first, is_of_a)) fail("writes a register of a wgmma in flight");
    } else if (i.run == handlers::mma) {
        targets = 4;
    } else if (i.kind == Kind::shared_load || i.kind == Kind::global_load || i.kind == Kind::parameter ||
               i.run == handlers::ldmatrix) {
        targets = i.count;
    }
    const bool has_two_targets = i.run == handlers::unpack32 || i.run == handlers::unpack64;
    check(i.d, true);
    check(i.b, has_two_targets);
    for (const int offset : {i.a, i.c, i.e}) check(offset, false);
    for (int n = first; n < i.count; ++n) check(list[n], n < targets);
}

void finish_products(Block& block) {
    for (size_t n = 0; n < block.warps.size(); ++n) {
        if (block.warps[n].products_started != block.warps[n / 4 * 4].products_started) {
            fail("the warps of warpgroup %zu start different numbers of wgmma", n / 4);
        }
    }
}

}   // namespace ptx
