// PTX on the CPU, for tests: a CUDA runtime without a GPU (runtime.cpp) for a library that nvcc built with its PTX inside.
// A launch decodes the kernel's text and runs it. This tests the text of primitives.cuh, which csrc/emulation replaces, and
// all else that nvcc makes of a kernel. No shipped binary contains it.
//
// A warp runs an instruction for its 32 lanes; a register is an array of 32 values. Lanes that diverge become splits with
// a program counter each. The lowest runs first, and equal ones join. An instruction that needs certain lanes (.aligned, a
// membermask) waits for those of them that have not left. Warps take turns of 1 to 400 instructions, which the seed
// chooses. Blocks run one after another, until one waits for another: by ld.acquire, or in a cluster. From then on up to
// 512 of them run side by side, in random turns. Whatever the hardware leaves undefined is decided against the kernel:
//   - shared memory and registers start as NaN, or 0xFF;
//   - copies in the background fill their target with NaN at once and land late: cp.async at its wait, tensor loads in any
//     order; tensor stores read their source at their wait, and those that nobody waits for write at the grid's end;
//     try_wait of an mbarrier says false at random;
//   - what wgmma reads may not change before its wait, nor may its registers be touched; none of them may have been touched
//     since wgmma.fence;
//   - ordinary writes to shared memory need a fence.proxy.async of their warp before tensor copies or wgmma touch the place,
//     or a fence.mbarrier_init where they initialise an mbarrier; in a kernel that waits for other blocks, a tensor copy
//     needs a fence.proxy.async.global after what a store or another block wrote to the place in global memory;
//   - each access to global memory must be inside a tensor of the call; setmaxnreg takes registers from a pool.
// An instruction or a form of one that is unknown is an error. Errors name the text's line and, with -lineinfo, the C++
// line; a deadlock names the place of every lane. The layouts of wgmma, the fragments of mma and the swizzles are written
// from the PTX ISA, and not shared with csrc/emulation.
//
// Not seen: what ptxas does; speed; races beyond the chosen order; the rounding of tensor cores and of approximate
// instructions. Proxy fences are checked by warps, not threads. Registers are filled with NaN for a launch, not a block.
// Grids that overlap run one after the other. There is what the kernels use: no local memory, no constants, no generic
// addresses of shared memory, of other blocks' shared memory only mbarriers and loads for several blocks, no function that
// lanes call from different places at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

// Throws std::runtime_error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- kernels, as decode.cpp makes them ---

struct Warp;
struct Instruction;
enum class Status { next, jump, block, exit };
// Runs an instruction for the lanes of the mask.
using Handler = Status(Warp& warp, const Instruction& i, uint32_t mask);

// For costs.py, and for the checks of the scheduler.
enum class Kind : uint8_t {
    tensor,
    fp32,
    fp64,
    special,
    convert,
    integer,
    predicate,
    move,
    shared_load,
    shared_store,
    ldmatrix,
    global_load,
    global_store,
    atomic,
    parameter,
    copy,
    shuffle,
    branch,
    sync,
    added   // added: a conversion that the decoder adds
};
const char* name_of(Kind kind);

// A line of the C++ source; file 0: unknown.
struct Place {
    int file = 0, line = 0;
};

struct Instruction {
    Handler* run = nullptr;
    int d = -1, a = -1, b = -1, c = -1, e = -1;   // target and sources: offsets in the registers of a warp, in bytes
    int64_t immediate = 0;                        // an offset of the address, or what the handler says
    int guard = -1;                               // a predicate
    bool is_guard_inverted = false, is_aligned = false;
    int members = -1;          // the register with the lanes that must come together
    int target = -1;           // of a branch: an index in the code
    int list = 0, count = 0;   // further operands: a part of Kernel::lists
    int width = 0;             // what the handler says
    Kind kind = Kind::integer;
    int line = 0;          // of the module's text
    size_t text = 0;       // where it begins in that
    Place place, caller;   // of the C++ source: its own, and of the kernel that it is inlined into
};

// What the executor counted for an instruction, of all warps of a launch.
struct Counter {
    uint64_t runs = 0, lanes = 0;
    uint64_t passes = 0, least = 0;   // of shared memory: wavefronts; of global memory: sectors of 32 bytes
};

struct Kernel {
    struct Constant {
        int offset, bits;
        uint64_t value;
    };
    struct Special {   // %tid.x; "parameters" and "dynamic shared memory" are addresses
        int offset;
        std::string name;
    };
    struct Parameter {
        int offset, bytes;
    };
    std::string name;
    std::vector<Instruction> code;
    std::vector<int> lists;
    std::vector<Constant> constants;
    std::vector<Special> specials;
    std::vector<Parameter> parameters;
    int parameter_bytes = 0, register_bytes = 0, static_shared = 0;
    int max_threads = 0, min_blocks = 0;   // of __launch_bounds__; 0: not given
    bool has_wgmma = false;
    bool waits_for_blocks = false;   // by a load that acquires
    std::vector<Counter> counters;
    const struct Module* module = nullptr;

    std::string text_of(const Instruction& i) const;
    std::string place_of(const Instruction& i) const;   // "PTX line 12, adamw.cu:34"
};

// The PTX of one library.
struct Module {
    struct Section {   // of the text: header and body
        size_t start, body, end;
        int line;
    };
    struct Shared {
        int bytes, align;
        bool is_dynamic;
    };
    std::string text;
    int architecture = 0;
    std::unordered_map<std::string, Section> entries, functions;
    std::unordered_map<std::string, Shared> shared;
    std::unordered_map<int, std::string> files;
    std::unordered_map<std::string, std::unique_ptr<Kernel>> kernels;

    explicit Module(std::string text);
    Kernel& kernel(const std::string& name);   // decodes it when it is asked for first
};

// The PTX of a fat binary.
std::string find_ptx(const void* fat_binary);

// --- launches ---

constexpr uint32_t kSharedStart = 1024;   // the first address of shared memory; the system reserves what is below
constexpr int kParameterLimit = 32764;

struct Dim {
    unsigned x, y, z;
};

// In the 128 bytes of a CUtensorMap.
struct TensorMap {
    static constexpr uint64_t kMark = 0x70616d726f736e74;
    uint64_t mark;
    uint64_t address;
    uint64_t sizes[5], strides[5];   // strides[0]: an element
    uint16_t box[5];
    uint8_t rank, type, swizzle, element;
};
static_assert(sizeof(TensorMap) <= 128);

// Of the next launches.
struct Schedule {
    uint64_t seed = 1;
    uint32_t misalignment = 0;   // of dynamic shared memory, in bytes: a multiple of 16 below 1024
};
Schedule& schedule();

// Global memory that the next launches may touch; none: all.
struct Region {
    uint64_t begin, end;
};
std::vector<Region>& regions();

// Appends what the launches cost to this file, a line of JSON each; empty: nowhere.
std::string& costs_file();

// Of a launch.
struct Options {
    unsigned cluster = 1;   // blocks, along x
    bool overlaps_previous = false;
};

void launch(Kernel& kernel, Dim grid, Dim block, void** arguments, size_t shared_bytes, const Options& options);

// --- handlers that decode.cpp names ---

// Places of the operands, target first: p, h, w, d are a predicate and 16, 32 and 64 bits.
struct Form {
    Handler* run;
    const char* places;
    Kind kind;
};
const Form* find_form(const std::string& opcode);   // null: unknown
Handler* find_access(bool is_shared, bool is_store, int element_bytes, bool is_signed, int count);
Handler* find_atomic(const std::string& opcode);

namespace handlers {
// lanes.cpp. pack and unpack are of two halves.
Handler move32, move64, move_predicate, low32, low16, zero_extend, sign_extend, add64, pack32, pack64, unpack32,
    unpack64;
Handler shfl, vote, elect;
// scheduler.cpp
Handler bra, call, ret, exit, trap, nothing, bar_sync, bar_arrive, setmaxnreg;
Handler cluster_arrive, cluster_wait, wait_for_previous;
// memory.cpp
Handler load_acquire, add_release, map_address;
Handler cp_async, cp_async_commit, cp_async_wait;
Handler mbarrier_init, mbarrier_arrive, mbarrier_arrive_remote, mbarrier_try_wait;
Handler tensor_prefetch, tensor_load, tensor_store, bulk_store, tensor_commit, tensor_wait;
Handler fence_proxy, fence_proxy_global, fence_mbarrier;
// tensor_cores.cpp
Handler ldmatrix, stmatrix, mma, wgmma, wgmma_fence, wgmma_commit, wgmma_wait;
}   // namespace handlers

}   // namespace ptx
