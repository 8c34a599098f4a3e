// The state of a block while it runs, and access to it for the handlers.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "ptx.h"

namespace ptx {

constexpr uint32_t kAllLanes = 0xFFFFFFFF;

struct Wait {
    enum Reason : uint8_t { none, lanes, barrier, retry } reason = none;
    int barrier_id = 0;
    uint32_t generation = 0;
};

// Lanes of a warp with one program counter.
struct Split {
    int pc;
    uint32_t mask;
    Wait wait;
};

struct AsyncCopy {   // cp.async
    uint32_t mask;   // lanes that have not landed
    uint32_t target[32], group[32];
    uint64_t source[32];
    int bytes[32];
};

struct TensorLoad {
    TensorMap map;
    uint32_t target, barrier;
    int at[5];
};

struct TensorStore {
    TensorMap map;
    int lane;
    uint32_t group, source;
    int at[5];
    bool is_addition, is_read;
    std::vector<uint8_t> data;
};

struct Product {   // wgmma in flight
    int group;
    uint64_t a, b;   // descriptors
    const Instruction* instruction;
    uint64_t hash;   // of what it reads, when it began
};

struct Block;

struct Warp {
    uint8_t* registers = nullptr;
    Block* block = nullptr;
    Kernel* kernel = nullptr;
    int id = 0;
    uint32_t live = 0;   // lanes that have not left
    int pc = 0;
    std::vector<Split> splits;
    Split next{};   // of the lanes that jump or wait, for the scheduler

    std::vector<AsyncCopy> copies;
    uint32_t copy_group[32] = {};
    std::vector<TensorStore> stores;
    uint32_t store_group[32] = {};

    std::vector<Product> products;
    // Registers of products in flight, and the products' group. A register of A, which may be read, is its offset + 1.
    std::unordered_map<int, int> busy;
    int product_group = 0, products_started = 0;
    int register_limit = 0;   // of setmaxnreg
    uint32_t time = 1, fence_time = 0;
    std::vector<uint32_t> touched;   // when each 128 bytes of registers were accessed; empty: no wgmma in the kernel
    uint32_t proxy_fences = 0, mbarrier_fences = 0;
    bool is_at_cluster_barrier = false;   // it has arrived and not waited
    uint32_t cluster_generation = 0;      // in which it arrived

    bool run(int instructions);   // whether anything ran
    uint32_t complete_group(const Instruction& i, uint32_t mask);
    void note_accesses(const Instruction& i);
    void check_products(const Instruction& i);
    uint32_t fences(bool of_mbarriers) const { return proxy_fences + (of_mbarriers ? mbarrier_fences : 0); }
    void finish();

    uint32_t& predicate(int offset) { return *reinterpret_cast<uint32_t*>(registers + offset); }
    void set_predicate(int offset, uint32_t mask, uint32_t value) {
        uint32_t& p = predicate(offset);
        p = (p & ~mask) | (value & mask);
    }
    Status wait(Wait::Reason reason, int barrier_id = 0, uint32_t generation = 0) {
        next.wait = {reason, barrier_id, generation};
        return Status::block;
    }
    Status jump(int target, uint32_t mask) {
        next = {target, mask, {}};
        return Status::jump;
    }
};

// What the blocks of a launch share.
struct Grid {
    // Who wrote 16 bytes of global memory last, where blocks wait for each other: a copy of this block + 1, or a store (0);
    // and how many fences for them there had been.
    struct Writer {
        uint64_t copier, fences;
    };
    bool is_watched = false;   // writers are noted
    std::unordered_map<uint64_t, Writer> writers;
    uint64_t fences = 0;
    std::vector<TensorStore> late_stores;   // that no thread waited for: they come at the end
};

struct Cluster {
    std::vector<Block*> blocks;
    int arrived = 0;   // threads at its barrier
    uint32_t generation = 0;
};

struct Block {
    struct Barrier {
        int arrived, expected;
        bool is_of_all;   // threads of the block
        uint32_t generation;
    };
    // Who wrote 16 bytes of shared memory last in the ordinary way: its warp + 1, and how many fences for them it had made.
    struct Writer {
        uint32_t warp, fences;
        bool is_mbarrier;   // that was initialised
    };
    Grid* launch;
    Cluster* cluster;
    uint32_t rank;     // in it
    uint64_t number;   // in the grid
    Dim grid, size, index;
    std::vector<Warp> warps;
    uint8_t* shared;   // the byte at address 0
    uint32_t shared_end, dynamic_start;
    uint8_t* parameters;
    Barrier barriers[16];
    std::vector<TensorLoad> loads;
    std::vector<Writer> writers;
    int register_pool;
    uint64_t random;
    // Since the scheduler looked last: by a store, a barrier, a copy, a product, or a warp that leaves.
    bool has_advanced;
    bool waits_for_others;   // it has looked at a counter or at its cluster since then
    bool has_waited_for_previous;

    bool is_alive() const;
    uint64_t next_random();
    uint8_t* shared_at(uint32_t address, uint32_t bytes, const char* what);
    void note_write(const Warp& warp, uint32_t address, uint32_t bytes, bool is_mbarrier = false);
    void check_proxy(uint32_t address, uint32_t bytes, const char* what) const;
};

// Fails unless the launch may touch these bytes.
void check_global(uint64_t address, uint32_t bytes, uint32_t align, const char* what);
void set_parameter_region(Region region);
void land_load(Block& block);         // one of block.loads
void finish_stores(Warp& warp);       // when it leaves
void finish_products(Block& block);   // when all have left
void finish_late_stores(Grid& grid);
void note_global_write(const Block& block, uint64_t address, uint32_t bytes, bool is_copy);

// Counts the wavefronts and sectors of an access for the costs.
bool are_costs_counted();
void count_shared(Warp& warp, const uint32_t* addresses, uint32_t bytes, uint32_t mask);
void count_global(Warp& warp, const uint64_t* addresses, uint32_t bytes, uint32_t mask);

// A register of 32 lanes. Values of up to 32 bits take 32, without a sign.
template <class T>
struct Register {
    using Slot = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    Slot* slots;
    Register(Warp& warp, int offset) : slots(reinterpret_cast<Slot*>(warp.registers + offset)) {}
    T get(int lane) const {
        if constexpr (sizeof(T) == sizeof(Slot)) {
            return __builtin_bit_cast(T, slots[lane]);
        } else {
            return static_cast<T>(slots[lane]);
        }
    }
    void set(int lane, T value) {
        if constexpr (sizeof(T) == sizeof(Slot)) {
            slots[lane] = __builtin_bit_cast(Slot, value);
        } else {
            slots[lane] = static_cast<std::make_unsigned_t<T>>(value);
        }
    }
};

// Calls visit(lane) for each lane of the mask.
template <class Visit>
inline void for_lanes(uint32_t mask, const Visit& visit) {
    for (uint32_t left = mask; left; left &= left - 1) visit(__builtin_ctz(left));
}

// The same in any order, for what a lane does to its own registers alone.
template <class Visit>
inline void for_independent_lanes(uint32_t mask, const Visit& visit) {
    if (mask == kAllLanes) {
#pragma GCC ivdep
        for (int lane = 0; lane < 32; ++lane) visit(lane);
    } else {
        for_lanes(mask, visit);
    }
}

inline int first_lane(uint32_t mask) { return __builtin_ctz(mask); }

inline uint32_t shared_operand(Warp& warp, const Instruction& i, int lane) {
    return Register<uint32_t>(warp, i.a).get(lane) + static_cast<uint32_t>(i.immediate);
}
inline uint64_t global_operand(Warp& warp, const Instruction& i, int lane) {
    return Register<uint64_t>(warp, i.a).get(lane) + static_cast<uint64_t>(i.immediate);
}

// The two 16-bit types, and their rounding to nearest even.
float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
inline float bfloat16_to_float(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }
uint16_t float_to_bfloat16(float x);

}   // namespace ptx
