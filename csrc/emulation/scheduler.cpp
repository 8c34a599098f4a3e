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
#include <vector>

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

Grid* grid;
Block* block;
Thread* current;

enum Policy { kInOrder, kReverse, kRandom, kOneAhead };

Schedule& schedule() {
    static Schedule schedule;
    return schedule;
}

const Position& position() { return current->position; }
int lane() { return current->lane; }

static uint64_t random_number(uint64_t& x) {   // xorshift64*
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x * 0x2545F4914F6CDD1Dull >> 16;
}
uint64_t random_number() { return random_number(block->random); }

void fail(const char* format, ...) {
    char text[1000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (!current) throw std::runtime_error(text);
    const uint3 b = current->position.block, t = current->position.thread;
    snprintf(grid->error, sizeof grid->error, "block (%u, %u, %u), thread (%u, %u, %u): %s", b.x, b.y, b.z, t.x, t.y,
             t.z, text);
    grid->failed = true;
    yield();
    abort();
}

// --- waiting ---

void yield() {
    Thread* self = current;
    become(grid->scheduler_identity);
    nanochat_switch_stack(&self->stack_pointer, grid->scheduler_stack_pointer);
}

static void stop() {   // until the scheduler runs this thread again
    current->warp->runnable &= ~(1u << current->lane);
    yield();
    current->wait = {};
}

void wait_at(const void* place, const char* operation, int line, int barrier, int parity) {
    current->wait = {place, operation, line, barrier, parity, nullptr, 0};
    stop();
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

// --- blocks that wait for others ---

void wait_for_change(const uint32_t* counter, uint32_t count, int line) {
    current->wait = {counter, "wait_for_count", line, -1, -1, counter, count};
    grid->is_side_by_side = true;
    ++block->counting;
    stop();
    --block->counting;
}

void offer_change() {
    if (block->policy == kInOrder || random_number() % 4) return;
    grid->hands_over = true;
    yield();
}

static uint32_t value_of(const uint32_t* counter) { return __atomic_load_n(counter, __ATOMIC_RELAXED); }

// Wakes the threads whose counters have come to what they wait for.
static void look_at_counters(Block& b) {
    for (int i = 0, left = b.counting; left > 0 && i < b.thread_count; ++i) {
        const auto& wait = b.threads[i].wait;
        if (!wait.counter) continue;
        --left;
        if (value_of(wait.counter) >= wait.count) b.threads[i].warp->runnable |= 1u << b.threads[i].lane;
    }
}

void wait_for_previous_grid() { block->waited_for_previous = true; }

uint32_t cluster_rank() { return static_cast<uint32_t>(block->rank); }

Block& block_of_cluster(uint32_t rank, const char* operation) {
    const Cluster& cluster = *block->cluster;
    if (rank >= static_cast<uint32_t>(cluster.size)) {
        fail("%s: block %u of a cluster of %d", operation, rank, cluster.size);
    }
    Block& other = *cluster.blocks[rank];
    if (!other.live) fail("%s: block %u of the cluster has left", operation, rank);
    return other;
}

static void end_phase_if_all_arrived(Cluster& cluster) {
    if (!cluster.arrived || cluster.arrived < cluster.live) return;
    cluster.arrived = 0;
    ++cluster.phase;
    for (int i = 0; i < cluster.size; ++i) {
        const InBlock there(*cluster.blocks[i]);
        wake(&cluster);
    }
}

static void come_as_warp(const char* operation, int line) {
    if (Meeting* meeting = meet(operation, line, ~0u, nullptr)) end_meeting(*meeting);
}

void cluster_arrive(int line) {
    Cluster& cluster = *block->cluster;
    come_as_warp("barrier.cluster.arrive", line);
    if (current->at_cluster_barrier) fail("barrier.cluster.arrive: the thread has arrived and not waited");
    current->at_cluster_barrier = true;
    current->cluster_phase = cluster.phase;
    release(&cluster.barriers[cluster.phase % 2]);
    ++cluster.arrived;
    end_phase_if_all_arrived(cluster);
}

void cluster_wait(int line) {
    Cluster& cluster = *block->cluster;
    come_as_warp("barrier.cluster.wait", line);
    if (!current->at_cluster_barrier) fail("barrier.cluster.wait: the thread has not arrived");
    while (cluster.phase == current->cluster_phase) wait_at(&cluster, "barrier.cluster.wait", line);
    current->at_cluster_barrier = false;
    acquire(&cluster.barriers[current->cluster_phase % 2]);
}

static void leave_cluster() {
    Cluster& cluster = *block->cluster;
    if (current->at_cluster_barrier && current->cluster_phase == cluster.phase) --cluster.arrived;
    --cluster.live;
    end_phase_if_all_arrived(cluster);
}

// --- threads ---

constexpr size_t kPage = 4096, kStackBytes = 256 * 1024, kFreshStack = 16 * 1024;
constexpr int kRegisterFile = 64 * 1024;
constexpr unsigned char kBehindWindow = 0xCD;

static void leave() {
    finish_copies();
    if (current->products.size) fail("the thread leaves with wgmma in flight");
    if (*reinterpret_cast<uint64_t*>(current->stack)) fail("more than %zu bytes of local variables", kStackBytes);
    Warp& warp = *current->warp;
    warp.live &= ~(1u << current->lane);
    warp.runnable &= ~(1u << current->lane);
    --block->live;
    leave_cluster();
    if (!block->live && block->loads.size) fail("the block leaves with tensor loads in flight");
    for (const Meeting& meeting : warp.meetings) {   // one of those that have waited for this lane alone leads theirs
        if (meeting.arrived == (meeting.mask & warp.live)) warp.runnable |= meeting.arrived & -meeting.arrived;
    }
    Barrier& barrier = block->barriers[0];
    if (barrier.arrived && barrier.expected < 0 && barrier.arrived == block->live) open_barrier(barrier);
}

static void fiber() {
    try {
        grid->launch->call(grid->launch->context);
    } catch (const std::exception& error) {
        fail("the kernel throws: %s", error.what());
    }
    leave();
    yield();
    abort();
}

static void set_up_threads() {
    Block& b = *block;
    const Launch& launch = *grid->launch;
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
        thread.position = {{rank % x, rank / x % y, rank / (x * y)}, b.index, launch.block, launch.grid};
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

// Runs until all threads have left, one has failed, none can continue, or another block shall run.
static void run_threads() {
    Block& b = *block;
    for (uint64_t step = 0; !grid->failed; ++step) {
        if (std::exchange(grid->hands_over, false)) return;
        if (grid->is_side_by_side) {
            if (step % 16 == 0) look_at_counters(b);
            if (step && (b.policy == kRandom || b.policy == kOneAhead) && random_number() % 256 == 0) return;
        }
        // Tensor loads land when nothing else can run, or now and then, or often.
        const bool early = b.loads.size && b.landing && random_number() % (b.landing == 1 ? 16 : 2) == 0;
        if (Thread* thread = early ? nullptr : choose_thread()) {
            current = thread;
            become(thread->identity);
            nanochat_switch_stack(&grid->scheduler_stack_pointer, thread->stack_pointer);
            current = nullptr;
        } else if (b.loads.size) {
            land_tensor_load();
        } else {
            return;
        }
    }
}

static bool can_run(Block& b) {
    look_at_counters(b);
    return b.loads.size || std::any_of(b.warps, b.warps + b.warp_count, [](const Warp& warp) { return warp.runnable; });
}

static std::string place_of(const Thread& thread) {
    if (!(thread.warp->live >> thread.lane & 1)) return "";
    const auto& wait = thread.wait;
    std::string text = wait.operation;
    if (wait.line) text += " at line " + std::to_string(wait.line);
    char what[80] = "";
    if (wait.counter) {
        snprintf(what, sizeof what, " (the counter is %u, not yet %u)", value_of(wait.counter), wait.count);
    } else if (wait.barrier >= 0) {
        snprintf(what, sizeof what, wait.parity < 0 ? " (barrier %d)" : " (barrier 0x%x, parity %d)", wait.barrier,
                 wait.parity);
    }
    return text + what;
}

static std::string places_of(const Block& b) {
    std::string text;
    for (int first = 0, next; first < b.thread_count; first = next) {
        const std::string place = place_of(b.threads[first]);
        for (next = first + 1; next < b.thread_count && place_of(b.threads[next]) == place;) ++next;
        if (place.empty()) continue;
        text += " threads " + std::to_string(first) + "-" + std::to_string(next - 1) + " wait in " + place + ";";
    }
    return text;
}

// --- blocks ---

// Where a block runs.
struct Room {
    unsigned char* memory;   // a window for shared memory that ends at a protected page, threads, stacks
    Tokens tokens;
    Block block;
    Cluster cluster;   // of the block, where that is the first of one
    bool is_used;
};
// So many blocks can run side by side. The memory of the first few is kept from grid to grid.
constexpr int kRooms = 160, kKeptRooms = 8;
static Room rooms[kRooms];

// ThreadSanitizer's identities are costly, each 0.4 ms and 0.9 MB, and there are at most 8,128: a grid has two to eight
// sets of them, and blocks that share a set count as ordered. Grids, which are ordered, share all of them.
constexpr int kMostSets = 8, kEnoughIdentities = 1024, kProxies = 2;
static void* identity_sets[kMostSets][kMaxThreads + kProxies];

static size_t count_sets(int threads) {
    return static_cast<size_t>(std::clamp(kEnoughIdentities / threads, 2, kMostSets));
}

constexpr size_t kRoomWindow = (kWindowBytes + 3 * kPage - 1) / kPage * kPage;
constexpr size_t kRoomBytes = kRoomWindow + kPage + kMaxThreads * (sizeof(Thread) + kStackBytes);

// Edges between a block's identities and what came before, or comes after it: blocks in the same room, and the host.
static void exchange(void (*edge)(void* token)) {
    for (int i = 0; under_tsan() && i < block->thread_count + kProxies; ++i) {
        become(block->identities[i]);
        edge(&block->tokens->blocks);
    }
    become(grid->scheduler_identity);
}

static void set_up_memory(Room& room) {
    Block& b = *block;
    if (!room.memory) {
        void* map =
            mmap(nullptr, kRoomBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (map == MAP_FAILED) fail("no memory for the block's stacks");
        room.memory = static_cast<unsigned char*>(map);
        mprotect(room.memory + kRoomWindow, kPage, PROT_NONE);
    }
    void** identities = identity_sets[static_cast<size_t>(&room - rooms) % count_sets(b.thread_count)];
    for (int i = 0; i < b.thread_count + kProxies; ++i) {
        if (!identities[i]) identities[i] = create_identity();
    }
    b.room = static_cast<int>(&room - rooms);
    b.identities = identities;
    b.tokens = &room.tokens;
    b.guard = room.memory + kRoomWindow;
    b.threads = reinterpret_cast<Thread*>(b.guard + kPage);
    b.stacks = b.guard + kPage + kMaxThreads * sizeof(Thread);
    b.dynamic_offset = kStaticBytes + schedule().misalignment;
    b.window_size = b.dynamic_offset + static_cast<uint32_t>(grid->launch->shared_bytes);
    b.window = b.guard - (b.window_size + 2 * kPage - 1) / kPage * kPage;
    fill_bytes(b.window, 0xFF, b.window_size);
    fill_bytes(b.window + b.window_size, kBehindWindow, b.guard - b.window - b.window_size);
    if (under_asan()) {
        __asan_poison_memory_region(room.memory, kRoomWindow);
        __asan_unpoison_memory_region(b.window, b.window_size);
    }
}

// The first, or under ThreadSanitizer one whose identities no block has had, as long as there are such.
static Room& choose_room(uint64_t number, int threads, uint64_t& random) {
    const size_t count = count_sets(threads);
    const size_t wanted = !under_tsan() ? 0 : number < count ? number : random_number(random) % count;
    if (!rooms[wanted].is_used) return rooms[wanted];
    return *std::find_if(rooms, rooms + kRooms, [](const Room& room) { return !room.is_used; });
}

// In the cluster, or in one of its own.
static Block& start_block(uint64_t number, Cluster* cluster) {
    const Launch& launch = *grid->launch;
    const uint64_t seed = schedule().seed;
    const auto threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    uint64_t random = (seed + number) * 0x9E3779B97F4A7C15ull + 0x1234567;
    const uint64_t priority = random_number(random);
    Room& room = choose_room(number, threads, random);
    room.is_used = true;
    if (!cluster) cluster = new (&room.cluster) Cluster();
    Block& b = *new (&room.block) Block();
    block = &b;
    const uint64_t columns = launch.grid.x, rows = launch.grid.y;
    b.index = {static_cast<unsigned>(number % columns), static_cast<unsigned>(number / columns % rows),
               static_cast<unsigned>(number / columns / rows)};
    b.live = b.thread_count = threads;
    b.warp_count = (threads + 31) / 32;
    b.random = random;
    b.priority = priority;
    b.policy = static_cast<int>(seed % 4);
    b.landing = static_cast<int>(seed / 4 % 3);
    b.cluster = cluster;
    b.rank = cluster->size++;
    cluster->blocks[b.rank] = &b;
    cluster->live += threads;
    set_up_memory(room);
    set_up_threads();
    exchange(acquire);
    return b;
}

static void finish_block(Block& b) {
    const Launch& launch = *grid->launch;
    const uint3 index = b.index;
    block = &b;
    exchange(release);
    rooms[b.room].is_used = false;
    if (std::any_of(b.window + b.window_size, b.guard, [](unsigned char byte) { return byte != kBehindWindow; })) {
        fail("block (%u, %u, %u): writes past the end of dynamic shared memory, %zu bytes", index.x, index.y, index.z,
             launch.shared_bytes);
    }
    check_warpgroups();
    if (launch.options.overlaps_previous && !b.waited_for_previous) {
        fail("block (%u, %u, %u) never waits for the previous grid, which the launch overlaps", index.x, index.y,
             index.z);
    }
}

// --- grids ---

// The block that runs next, of those that have started; null: another one starts, or no block can run.
static Block* choose_block(const std::vector<Block*>& started, bool can_start, uint64_t& random) {
    std::vector<Block*> ready;
    std::copy_if(started.begin(), started.end(), std::back_inserter(ready), [](Block* b) { return can_run(*b); });
    if (ready.empty()) return nullptr;
    const uint64_t policy = schedule().seed % 4;
    if (policy == kInOrder) return ready.front();
    if (policy == kReverse) return ready.back();
    const uint64_t chosen = random_number(random) % (ready.size() + can_start);
    if (chosen == ready.size()) return nullptr;
    if (policy == kRandom) return ready[chosen];
    ready[chosen]->priority ^= random_number(random) % 16 ? 0 : random_number(random);
    return *std::max_element(ready.begin(), ready.end(), [](Block* a, Block* b) { return a->priority < b->priority; });
}

[[noreturn]] static void fail_with_places(const std::vector<Block*>& blocks, uint64_t not_started) {
    constexpr size_t kNamed = 6;
    const dim3 size = grid->launch->grid;
    std::string text = "deadlock:";
    for (size_t i = 0; i < std::min(blocks.size(), kNamed); ++i) {
        const uint3 at = blocks[i]->index;
        char name[60];
        snprintf(name, sizeof name, " block (%u, %u, %u):", at.x, at.y, at.z);
        text += (size.x * size.y * size.z == 1 ? "" : name) + places_of(*blocks[i]);
    }
    if (blocks.size() > kNamed) text += " and " + std::to_string(blocks.size() - kNamed) + " more blocks wait;";
    if (not_started) text += " " + std::to_string(not_started) + " blocks have not started;";
    throw std::runtime_error(text);
}

static void run_blocks(uint64_t blocks) {
    const uint64_t seed = schedule().seed, size = static_cast<uint64_t>(grid->launch->options.cluster);
    uint64_t random = (seed + blocks) * 0x9E3779B97F4A7C15ull + 0x7654321, count = 0;   // count: that have started
    std::vector<Block*> started;
    grid->is_side_by_side = size > 1;
    while (count < blocks || !started.empty()) {
        const bool can_start = count < blocks && started.size() + size <= kRooms;
        Block* chosen = choose_block(started, can_start, random);
        if (!chosen && !can_start) fail_with_places(started, blocks - count);
        if (!chosen) {
            const uint64_t first = seed % 4 == kReverse ? blocks - size - count : count;
            Cluster* cluster = nullptr;
            for (uint64_t i = 0; i < size; ++i) {
                started.push_back(&start_block(first + i, cluster));
                cluster = started.back()->cluster;
            }
            count += size;
            chosen = started.back();
        }
        block = chosen;
        run_threads();
        if (grid->failed) throw std::runtime_error(grid->error);
        const Cluster& cluster = *chosen->cluster;
        if (!cluster.live) {
            std::erase_if(started, [&](Block* b) { return b->cluster == &cluster; });
            std::for_each(cluster.blocks, cluster.blocks + size, [](Block* b) { finish_block(*b); });
        } else if (size == 1 && !chosen->counting && !can_run(*chosen)) {   // it waits for no other block
            fail_with_places({chosen}, 0);
        }
    }
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
    Grid the_grid{};
    grid = &the_grid;
    grid->launch = &launch;
    grid->scheduler_identity = under_tsan() ? __tsan_get_current_fiber() : nullptr;
    for (Room& room : rooms) release(&room.tokens.blocks);   // what the host has done comes before
    std::string error;
    try {
        run_blocks(blocks);
    } catch (const std::runtime_error& caught) {
        error = caught.what();
    }
    land_late_stores(!error.empty());
    for (Room& room : rooms) {
        if (std::exchange(room.is_used, false)) {   // after an error
            block = &room.block;
            exchange(release);
        }
        acquire(&room.tokens.blocks);
        if (&room - rooms >= kKeptRooms && room.memory && !watched)
            munmap(std::exchange(room.memory, nullptr), kRoomBytes);
    }
    block = nullptr;
    grid = nullptr;
    for (auto& identities : identity_sets) {   // of threads that have not left, if there was an error
        for (void*& identity : identities) {
            if (!error.empty()) destroy_identity(std::exchange(identity, nullptr));
        }
    }
    if (!watched) sigaction(SIGSEGV, &before, nullptr);
    return error;
}

void run(const Launch& launch) {
    const char* name = launch.name;
    const dim3 grid_size = launch.grid, size = launch.block;
    const uint64_t threads = uint64_t{size.x} * size.y * size.z,
                   blocks = uint64_t{grid_size.x} * grid_size.y * grid_size.z;
    const int cluster = launch.options.cluster;
    if (grid) fail("%s: a kernel is running", name);
    if (threads == 0 || threads > kMaxThreads || size.z > 64) {
        fail("%s: a block of (%u, %u, %u) threads; takes 1 to %d, z to 64", name, size.x, size.y, size.z, kMaxThreads);
    }
    if (blocks == 0 || grid_size.x > INT32_MAX || grid_size.y > 65535 || grid_size.z > 65535) {
        fail("%s: a grid of (%u, %u, %u) blocks; takes 1 to (2^31 - 1, 65535, 65535)", name, grid_size.x, grid_size.y,
             grid_size.z);
    }
    if (const uint32_t most = std::min(schedule().shared_limit, kMaxDynamicBytes); launch.shared_bytes > most) {
        fail("%s: needs %zu bytes of shared memory per block; this GPU has %u", name, launch.shared_bytes, most);
    }
    if (cluster < 1 || cluster > kMaxCluster || grid_size.x % static_cast<unsigned>(cluster)) {
        fail("%s: clusters of %d blocks in a grid of width %u; takes divisors of it up to %d", name, cluster,
             grid_size.x, kMaxCluster);
    }
    const std::string error = run_grid(launch, blocks);
    if (!error.empty()) throw std::runtime_error(std::string(name) + ": " + error);
}

}   // namespace nanochat::emulation
