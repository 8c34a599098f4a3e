// Fibers, schedules, barriers, warp collectives, and the launch itself.
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "block.h"

// Saves the callee's registers of one stack and takes up those of another (System V ABI).
extern "C" void nanochat_switch_stack(void** save, void* to);
asm(R"(.text
.globl nanochat_switch_stack
.hidden nanochat_switch_stack
nanochat_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace nanochat::emulation {

Block* block;
Thread* current;

Schedule& schedule() {
    static Schedule schedule;
    return schedule;
}

const Position& position() { return current->position; }
int lane() { return current->lane; }

uint64_t random_number() {   // xorshift64*
    uint64_t& x = block->random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x * 0x2545F4914F6CDD1Dull >> 16;
}

void fail(const char* format, ...) {
    char text[1000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (!current) throw std::runtime_error(text);
    const uint3 b = current->position.block, t = current->position.thread;
    snprintf(block->error, sizeof block->error, "block (%u, %u, %u), thread (%u, %u, %u): %s", b.x, b.y, b.z, t.x, t.y,
             t.z, text);
    block->failed = true;
    yield();
    abort();
}

// --- waiting ---

void yield() {
    Thread* self = current;
    become(block->scheduler_identity);
    nanochat_switch_stack(&self->stack_pointer, block->scheduler_stack_pointer);
}

void wait_at(const void* place, const char* operation, int line, int barrier, int parity) {
    current->wait = {place, operation, line, barrier, parity};
    current->warp->runnable &= ~(1u << current->lane);
    yield();
    current->wait = {};
}

void wake(const void* place) {
    for (int i = 0; i < block->thread_count; ++i) {
        Thread& thread = block->threads[i];
        if (thread.wait.place == place) thread.warp->runnable |= 1u << thread.lane;
    }
}

// --- warps ---

static Meeting& find_meeting(const char* operation, uint32_t mask) {
    Meeting* unused = nullptr;
    for (Meeting& meeting : current->warp->meetings) {
        if (!meeting.arrived) {
            unused = &meeting;
        } else if (meeting.mask == mask && strcmp(meeting.operation, operation) == 0) {
            return meeting;
        } else if (meeting.mask >> current->lane & 1 && meeting.arrived & mask) {   // each would wait for the other
            fail("%s of lanes %08x meets %s of lanes %08x in one warp", operation, mask, meeting.operation,
                 meeting.mask);
        }
    }
    if (!unused) fail("%s: more than 8 groups of one warp meet at a time", operation);
    unused->mask = mask;
    unused->operation = operation;
    return *unused;
}

Meeting* meet(const char* operation, int line, uint32_t mask, void* argument) {
    if (!(mask >> current->lane & 1)) fail("%s: lane %d is not in its own mask %08x", operation, current->lane, mask);
    Meeting& meeting = find_meeting(operation, mask);
    const int round = meeting.round;
    meeting.arguments[current->lane] = argument;
    meeting.arrived |= 1u << current->lane;
    if (meeting.arrived != (mask & current->warp->live)) wait_at(&meeting, operation, line);
    return meeting.round == round ? &meeting : nullptr;
}

void end_meeting(Meeting& meeting) {
    current->warp->runnable |= meeting.arrived;
    meeting.arrived = 0;
    ++meeting.round;
}

void sync_warp(uint32_t mask, int line) {
    const Thread* first = current->warp->threads + __builtin_ctz(mask | 1u << current->lane);
    char* token = &block->tokens->groups[first - block->threads];
    release(token);
    if (Meeting* meeting = meet("__syncwarp", line, mask, nullptr)) end_meeting(*meeting);
    acquire(token);
}

uint64_t shuffle(const char* operation, int line, uint32_t mask, uint64_t bits, int source) {
    struct Exchange {
        uint64_t bits, result;
        int source;
    } own{bits, 0, source};
    if (const Lanes<Exchange> lanes{operation, line, mask, own}) {
        for (int lane = 0; lane < 32; ++lane) {
            if (!lanes.has(lane)) continue;
            const int from = lanes[lane].source;
            if (!lanes.has(from)) fail("%s: lane %d reads lane %d, which takes no part", operation, lane, from);
            lanes[lane].result = lanes[from].bits;
        }
    }
    return own.result;
}

uint32_t ballot(int line, uint32_t mask, bool predicate) {
    uint32_t vote = predicate;
    if (const Lanes<uint32_t> lanes{"vote", line, mask, vote}) {
        uint32_t result = 0;
        for (int lane = 0; lane < 32; ++lane) result |= lanes.has(lane) ? lanes[lane] << lane : 0;
        for (int lane = 0; lane < 32; ++lane) {
            if (lanes.has(lane)) lanes[lane] = result;
        }
    }
    return vote;
}

bool elect_one() {
    bool elected = false;
    if (const Lanes<bool> lanes{"elect.sync", 0, ~0u, elected}) lanes[__builtin_ctz(current->warp->live)] = true;
    return elected;
}

void setmaxnreg(int registers, bool increase) {
    const char* operation = increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
    if (const Lanes<int> lanes{operation, registers}) {
        int& held = current->warp->registers;
        const int more = (registers - held) * 32;
        if (increase ? more < 0 : more > 0) fail("%s to %d: the threads hold %d", operation, registers, held);
        while (block->free_registers < more) wait_at(&block->free_registers, "setmaxnreg.inc, for free registers", 0);
        block->free_registers -= more;
        held = registers;
        wake(&block->free_registers);
    }
}

// --- barriers ---

static void open_barrier(Barrier& barrier) {
    barrier.arrived = 0;
    wake(&barrier);
}

// Whether this arrival completes it. threads -1: all that have not left, from one place in the code.
static bool arrive(int id, int threads, int line) {
    if (id < 0 || id > 15 || threads == 0 || (threads > 0 && threads % 32)) {
        fail("barrier %d for %d threads; takes 0 to 15, and multiples of 32", id, threads);
    }
    Barrier& barrier = block->barriers[id];
    if (barrier.arrived && barrier.expected != threads) {
        fail("barrier %d: arrivals for %d threads and for %d (-1 is __syncthreads)", id, barrier.expected, threads);
    }
    if (threads < 0 && barrier.arrived && barrier.line != line) {
        fail("__syncthreads at line %d meets __syncthreads at line %d", line, barrier.line);
    }
    barrier.expected = threads;
    barrier.line = line;
    release(&block->tokens->barriers[id]);
    if (++barrier.arrived < (threads < 0 ? block->live : threads)) return false;
    open_barrier(barrier);
    return true;
}

static void wait_at_barrier(int id, int threads, const char* operation, int line) {
    if (!arrive(id, threads, line)) wait_at(&block->barriers[id], operation, line, id);
    acquire(&block->tokens->barriers[id]);
}

void sync_threads(int line) { wait_at_barrier(0, -1, "__syncthreads", line); }
void bar_sync(int id, int threads, int line) { wait_at_barrier(id, threads, "bar.sync", line); }
void bar_arrive(int id, int threads) { arrive(id, threads, 0); }

// --- threads ---

constexpr size_t kPage = 4096, kStackBytes = 256 * 1024, kFreshStack = 16 * 1024;
constexpr int kRegisterFile = 64 * 1024;
constexpr unsigned char kBehindWindow = 0xCD;

enum Policy { kInOrder, kReverse, kRandom, kOneAhead };

static void leave() {
    finish_copies();
    if (current->products.size) fail("the thread leaves with wgmma in flight");
    if (*reinterpret_cast<uint64_t*>(current->stack)) fail("more than %zu bytes of local variables", kStackBytes);
    Warp& warp = *current->warp;
    warp.live &= ~(1u << current->lane);
    warp.runnable &= ~(1u << current->lane);
    --block->live;
    for (const Meeting& meeting : warp.meetings) {   // one of those that have waited for this lane alone leads theirs
        if (meeting.arrived == (meeting.mask & warp.live)) warp.runnable |= meeting.arrived & -meeting.arrived;
    }
    Barrier& barrier = block->barriers[0];
    if (barrier.arrived && barrier.expected < 0 && barrier.arrived == block->live) open_barrier(barrier);
}

static void fiber() {
    try {
        block->launch->call(block->launch->context);
    } catch (const std::exception& error) {
        fail("the kernel throws: %s", error.what());
    }
    leave();
    yield();
    abort();
}

static void set_up_threads(uint3 index) {
    Block& b = *block;
    const Launch& launch = *b.launch;
    const int registers = std::min(kRegisterFile / (b.warp_count * 32) / 8 * 8, 248);
    b.free_registers = kRegisterFile - registers * b.warp_count * 32;
    for (int i = 0; i < b.warp_count; ++i) {
        Warp& warp = b.warps[i];
        warp.threads = b.threads + 32 * i;
        warp.live = warp.runnable = ~0u >> std::max(0, 32 * (i + 1) - b.thread_count);
        warp.priority = b.policy == kInOrder ? b.warp_count - i : b.policy == kReverse ? i : random_number();
        warp.registers = registers;
    }
    for (int i = 0; i < b.thread_count; ++i) {
        const auto rank = static_cast<unsigned>(i), x = launch.block.x, y = launch.block.y;
        Thread& thread = *new (&b.threads[i]) Thread;
        thread.position = {{rank % x, rank / x % y, rank / (x * y)}, index, launch.block, launch.grid};
        thread.lane = i % 32;
        thread.warp = &b.warps[i / 32];
        thread.identity = b.identities[i];
        thread.stack = b.stacks + i * kStackBytes;
        unsigned char* top = thread.stack + kStackBytes - 64;
        if (!under_asan() && !under_tsan()) memset(top - launch.argument_bytes - kFreshStack, 0xFF, kFreshStack);
        // The stack as nanochat_switch_stack leaves it: six registers, the return address, and its caller's.
        void** frame = reinterpret_cast<void**>(top) - 8;
        std::fill(frame, frame + 8, nullptr);
        frame[6] = reinterpret_cast<void*>(fiber);
        thread.stack_pointer = frame;
    }
}

// A lane of the runnable warp that has the highest priority; null where there is none.
static Thread* choose_thread() {
    Warp* chosen = nullptr;
    for (int i = 0; i < block->warp_count; ++i) {
        Warp& warp = block->warps[i];
        if (warp.runnable && (!chosen || warp.priority > chosen->priority)) chosen = &warp;
    }
    if (!chosen) return nullptr;
    const uint32_t mask = chosen->runnable;
    if (block->policy == kInOrder) return chosen->threads + __builtin_ctz(mask);
    if (block->policy == kReverse) return chosen->threads + 31 - __builtin_clz(mask);
    if (block->policy == kRandom || random_number() % 64 == 0) chosen->priority = random_number();
    const auto turn = static_cast<int>(random_number() % 32);
    const auto turned = static_cast<uint32_t>(mask >> turn | uint64_t{mask} << (32 - turn));
    return chosen->threads + (__builtin_ctz(turned) + turn) % 32;
}

// Runs until all threads have left, one has failed, or none can continue.
static void run_threads() {
    Block& b = *block;
    while (!b.failed) {
        // Tensor loads land when nothing else can run, or now and then, or often.
        const bool early = b.loads.size && b.landing && random_number() % (b.landing == 1 ? 16 : 2) == 0;
        if (Thread* thread = early ? nullptr : choose_thread()) {
            current = thread;
            become(thread->identity);
            nanochat_switch_stack(&b.scheduler_stack_pointer, thread->stack_pointer);
            current = nullptr;
        } else if (b.loads.size) {
            land_tensor_load();
        } else {
            return;
        }
    }
}

static std::string place_of(const Thread& thread) {
    if (!(thread.warp->live >> thread.lane & 1)) return "";
    const auto [place, operation, line, barrier, parity] = thread.wait;
    const std::string where = line ? " at line " + std::to_string(line) : "";
    char what[50] = "";
    if (barrier >= 0)
        snprintf(what, sizeof what, parity < 0 ? " (barrier %d)" : " (barrier 0x%x, parity %d)", barrier, parity);
    return operation + where + what;
}

static std::string deadlock() {
    std::string text = "deadlock:";
    for (int first = 0, next; first < block->thread_count; first = next) {
        const std::string place = place_of(block->threads[first]);
        for (next = first + 1; next < block->thread_count && place_of(block->threads[next]) == place;) ++next;
        if (place.empty()) continue;
        text += " threads " + std::to_string(first) + "-" + std::to_string(next - 1) + " wait in " + place + ";";
    }
    return text;
}

// --- blocks ---

// Where a block runs. ThreadSanitizer's identities are costly, each 0.4 ms and 0.9 MB, and there are at most 8,128: a
// grid has those of two to eight rooms, and blocks that share a room count as ordered.
constexpr int kRooms = 8, kEnoughIdentities = 1024;
static struct Room {
    unsigned char* memory;               // a window for shared memory that ends at a protected page, threads, stacks
    void* identities[kMaxThreads + 1];   // of the threads, then the asynchronous proxy
    Tokens tokens;
} rooms[kRooms];

// Edges between a block's identities and what came before, or comes after it: blocks in the same room, and the host.
static void exchange(void (*edge)(void* token)) {
    for (int i = 0; under_tsan() && i <= block->thread_count; ++i) {
        become(block->identities[i]);
        edge(&block->tokens->blocks);
    }
    become(block->scheduler_identity);
}

static void set_up_memory(Room& room) {
    constexpr size_t window_bytes = (kWindowBytes + 3 * kPage - 1) / kPage * kPage;
    Block& b = *block;
    if (!room.memory) {
        constexpr size_t bytes = window_bytes + kPage + kMaxThreads * (sizeof(Thread) + kStackBytes);
        void* map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (map == MAP_FAILED) fail("no memory for the block's stacks");
        room.memory = static_cast<unsigned char*>(map);
        mprotect(room.memory + window_bytes, kPage, PROT_NONE);
    }
    if (!room.identities[0]) std::generate_n(room.identities, b.thread_count + 1, create_identity);
    b.identities = room.identities;
    b.tokens = &room.tokens;
    b.guard = room.memory + window_bytes;
    b.threads = reinterpret_cast<Thread*>(b.guard + kPage);
    b.stacks = b.guard + kPage + kMaxThreads * sizeof(Thread);
    b.dynamic_offset = kStaticBytes + schedule().misalignment;
    b.window_size = b.dynamic_offset + static_cast<uint32_t>(b.launch->shared_bytes);
    b.window = b.guard - (b.window_size + 2 * kPage - 1) / kPage * kPage;
    fill_bytes(b.window, 0xFF, b.window_size);
    fill_bytes(b.window + b.window_size, kBehindWindow, b.guard - b.window - b.window_size);
    if (under_asan()) {
        __asan_poison_memory_region(room.memory, window_bytes);
        __asan_unpoison_memory_region(b.window, b.window_size);
    }
}

static void run_block(const Launch& launch, uint64_t number) {
    static Block the_block;
    Block& b = *new (&the_block) Block();
    block = &b;
    b.launch = &launch;
    b.live = b.thread_count = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    b.warp_count = (b.thread_count + 31) / 32;
    const uint64_t seed = schedule().seed;
    b.random = (seed + number) * 0x9E3779B97F4A7C15ull + 0x1234567;
    random_number();
    b.policy = static_cast<int>(seed % 4);
    b.landing = static_cast<int>(seed / 4 % 3);
    b.scheduler_identity = under_tsan() ? __tsan_get_current_fiber() : nullptr;
    const uint64_t count = std::clamp(kEnoughIdentities / b.thread_count, 2, kRooms);
    const uint64_t room = number < count ? number : random_number() % count;
    set_up_memory(rooms[under_tsan() ? room : 0]);

    const uint64_t columns = launch.grid.x, rows = launch.grid.y;
    const uint3 index{static_cast<unsigned>(number % columns), static_cast<unsigned>(number / columns % rows),
                      static_cast<unsigned>(number / columns / rows)};
    set_up_threads(index);
    exchange(acquire);
    run_threads();
    exchange(release);
    if (b.failed) throw std::runtime_error(b.error);
    if (b.live) throw std::runtime_error(deadlock());
    if (std::any_of(b.window + b.window_size, b.guard, [](unsigned char byte) { return byte != kBehindWindow; })) {
        fail("block (%u, %u, %u): writes past the end of dynamic shared memory, %zu bytes", index.x, index.y, index.z,
             launch.shared_bytes);
    }
    check_warpgroups();
}

// --- launch ---

static void on_fault(int, siginfo_t* info, void*) {
    if (!current) abort();
    const auto* address = static_cast<unsigned char*>(info->si_addr);
    if (address >= block->window && address < block->guard + kPage) {
        fail("invalid access at offset %td of dynamic shared memory", address - dynamic_shared());
    }
    fail("invalid access to global memory at %p", info->si_addr);
}

// The error, or nothing.
static std::string run_grid(const Launch& launch, uint64_t blocks) {
    const bool watched = under_asan() || under_tsan();   // sanitizers report faults themselves
    struct sigaction action{}, before{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;   // the handler does not return
    if (!watched) sigaction(SIGSEGV, &action, &before);
    std::string error;
    try {
        for (uint64_t i = 0; i < blocks; ++i) run_block(launch, schedule().seed % 4 == kReverse ? blocks - 1 - i : i);
    } catch (const std::runtime_error& caught) {
        error = caught.what();
    }
    block = nullptr;
    for (Room& room : rooms) {
        acquire(&room.tokens.blocks);
        // ThreadSanitizer would wait for them at the process's end.
        for (void*& identity : room.identities) destroy_identity(std::exchange(identity, nullptr));
    }
    if (!watched) sigaction(SIGSEGV, &before, nullptr);
    return error;
}

void run(const Launch& launch) {
    const char* name = launch.name;
    const dim3 grid = launch.grid, size = launch.block;
    const uint64_t threads = uint64_t{size.x} * size.y * size.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (block) fail("%s: a kernel is running", name);
    if (threads == 0 || threads > kMaxThreads || size.z > 64) {
        fail("%s: a block of (%u, %u, %u) threads; takes 1 to %d, z to 64", name, size.x, size.y, size.z, kMaxThreads);
    }
    if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
        fail("%s: a grid of (%u, %u, %u) blocks; takes 1 to (2^31 - 1, 65535, 65535)", name, grid.x, grid.y, grid.z);
    }
    if (launch.shared_bytes > kMaxDynamicBytes) {
        fail("%s: %zu bytes of dynamic shared memory; takes up to %u", name, launch.shared_bytes, kMaxDynamicBytes);
    }
    const std::string error = run_grid(launch, blocks);
    if (!error.empty()) throw std::runtime_error(std::string(name) + ": " + error);
}

}   // namespace nanochat::emulation
