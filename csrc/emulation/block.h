// The state of the running grid and of its blocks, shared by the parts of the emulation. Kernels see emulation.h only.
//
// These files are compiled without sanitizers, but ThreadSanitizer still intercepts memcpy, memset, malloc and free:
// what fibers touch lies in arrays of fixed size and is copied by copy_bytes and fill_bytes.
#pragma once

#include <vector>

#include "emulation.h"
#include "fragments.h"

// The sanitizers' own calls, there only in builds with them.
extern "C" {
[[gnu::weak]] void __tsan_acquire(void*);
[[gnu::weak]] void __tsan_release(void*);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned);
[[gnu::weak]] void __tsan_destroy_fiber(void*);
[[gnu::weak]] void __tsan_switch_to_fiber(void*, unsigned);
[[gnu::weak]] void __tsan_read_range(void*, unsigned long);
[[gnu::weak]] void __tsan_write_range(void*, unsigned long);
[[gnu::weak]] void __asan_poison_memory_region(const volatile void*, size_t);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void*, size_t);
[[gnu::weak]] void* __asan_region_is_poisoned(void*, size_t);
}

namespace nanochat::emulation {

// --- sanitizers ---

inline bool under_tsan() { return __tsan_create_fiber != nullptr; }
inline bool under_asan() { return __asan_poison_memory_region != nullptr; }

// Happens-before edges, from every release to each later acquire of the same token: an address, nothing else.
inline void acquire(void* token) {
    if (under_tsan()) __tsan_acquire(token);
}
inline void release(void* token) {
    if (under_tsan()) __tsan_release(token);
}

// To ThreadSanitizer an identity is a thread, ordered after what its creator has done so far. Running code belongs to the
// identity that it has become; the switch adds no edge.
inline void* create_identity() { return under_tsan() ? __tsan_create_fiber(0) : nullptr; }
inline void destroy_identity(void* identity) {
    if (identity) __tsan_destroy_fiber(identity);
}
inline void become(void* identity) {
    if (identity) __tsan_switch_to_fiber(identity, 1);
}

// --- what is in flight ---

inline void copy_bytes(void* target, const void* source, size_t bytes) {
    auto* to = static_cast<volatile unsigned char*>(target);
    auto* from = static_cast<const unsigned char*>(source);
    while (bytes--) *to++ = *from++;
}
inline void fill_bytes(void* target, unsigned char value, size_t bytes) {
    auto* to = static_cast<volatile unsigned char*>(target);
    while (bytes--) *to++ = value;
}

template <class T, int capacity>
struct List {
    T items[capacity];
    int size = 0;

    T* begin() { return items; }
    T* end() { return items + size; }
    T& operator[](int i) { return items[i]; }
    bool full() const { return size == capacity; }
    T& add() {
        if (full()) fail("the emulation holds at most %d operations in flight", capacity);
        return items[size++];
    }
    // Calls done for each item in order, and keeps the items for which it returns false.
    template <class Done>
    void remove_if(const Done& done) {
        int kept = 0;
        for (int i = 0; i < size; ++i) {
            if (done(items[i])) continue;
            if (kept < i) copy_bytes(&items[kept], &items[i], sizeof(T));
            ++kept;
        }
        size = kept;
    }
};

struct AsyncCopy {   // cp.async
    unsigned char* target;
    const unsigned char* source;
    int source_bytes, group;
};

struct Box {   // of a tensor, and its place in shared memory
    TensorMap map;
    uint32_t shared;
    int coordinates[4];
};

struct TensorLoad : Box {
    uint32_t barrier;
    void* engine;   // the identity that copies it
};

struct TensorStore : Box {
    int group;
    bool add;
    bool read;              // its source may change again
    unsigned char* bytes;   // of the source
};

struct Operands {   // of wgmma
    uint64_t a_tile, b_tile;
    device::Major major_a, major_b;
    Half type;
    int N;
    bool a_in_registers, accumulate;
};

struct Product {   // wgmma
    Operands operands;
    float* d;
    int group;
    uint16_t a[8];     // where it is in registers
    float sums[128];   // that the product is added to, once earlier products in flight have computed them
};

// --- the block ---

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr uint32_t kWindow = 1024;             // shared address of the window's first byte
constexpr uint32_t kStaticBytes = 16 * 1024;   // before the dynamic part
constexpr uint32_t kMaxDynamicBytes = 227 * 1024;
constexpr uint32_t kWindowBytes = kStaticBytes + 1024 + kMaxDynamicBytes;
constexpr uint32_t kChunk = 16;   // granularity of what copies have in flight
constexpr int kMaxCluster = 8;

struct Warp;

struct Thread {
    Position position;
    int lane;
    Warp* warp;
    void* identity;
    unsigned char* stack;
    void* stack_pointer;
    bool spun = false;   // its last try_wait returned false
    struct {
        const void* place;   // whose change it waits for
        const char* operation;
        int line;                  // 0: not known
        int barrier, parity;       // of an mbarrier its address; -1: none
        const uint32_t* counter;   // in global memory that has to be `count` or more, or null
        uint32_t count;
    } wait = {};
    bool at_cluster_barrier = false;   // it has arrived there and not waited
    int cluster_phase = 0;             // in which it arrived
    int copy_group = 0, store_group = 0, product_group = 0;
    List<AsyncCopy, 256> copies;
    List<TensorStore, 16> stores;
    List<Product, 64> products;
};

struct Meeting {   // of some lanes of a warp
    uint32_t mask, arrived;
    const char* operation;
    int round;   // meetings that have ended here
    void* arguments[32];
};

struct Warp {
    Thread* threads;
    uint32_t live, runnable;   // masks of lanes
    uint64_t priority;
    Meeting meetings[8];
    bool fenced;     // wgmma.fence since the last wait
    int products;    // that it has started
    int registers;   // of each thread
};

struct Barrier {
    int arrived, expected, line;
};

struct StaticVariable {
    const void* key;
    uint32_t offset;
};

// The tokens of the edges within a block.
struct Tokens {
    char barriers[16], groups[kMaxThreads];   // a group of lanes has its first lane's
    char proxy_fences, proxy_reads, loads_landed, global_copies, blocks;
};

struct Block;

struct Cluster {
    Block* blocks[kMaxCluster];
    int size, live, arrived, phase;   // live, arrived: threads; phase: barriers that are complete
    char barriers[2];                 // tokens, of phases in turn
};

struct Block {
    uint3 index;
    int room;   // where it runs
    int rank;   // in its cluster
    Cluster* cluster;
    Thread* threads;
    Warp warps[kMaxWarps];
    int thread_count, warp_count, live;
    int counting;               // threads that wait for a counter
    bool waited_for_previous;   // a thread has waited for the previous grid
    Barrier barriers[16];
    unsigned char *window, *guard;   // shared memory, and the page behind it, which is protected
    unsigned char* stacks;
    uint32_t window_size, dynamic_offset;
    List<TensorLoad, 64> loads;              // into its shared memory
    bool in_flight[kWindowBytes / kChunk];   // a copy's target
    int free_registers;
    int policy, landing;
    uint64_t random, priority;
    void** identities;   // of the threads, then the asynchronous proxy: for shared memory, and for global memory
    Tokens* tokens;
};

struct Grid {
    const Launch* launch;
    List<StaticVariable, 64> statics;
    uint32_t static_used;
    void *scheduler_stack_pointer, *scheduler_identity;
    bool is_side_by_side;                   // a block has waited for another one, or there are clusters
    bool hands_over;                        // another block shall run
    std::vector<TensorStore> late_stores;   // of threads that left and did not wait for them: for the grid's end
    char global_fences;                     // token
    bool failed;
    char error[1500];
};

extern Grid* grid;        // that runs, or null
extern Block* block;      // of it, whose threads or copies run
extern Thread* current;   // or null while the scheduler runs

// While one exists, shared memory and waiting threads are those of another block of the cluster.
class InBlock {
  public:
    explicit InBlock(Block& other) : before_(block) { block = &other; }
    ~InBlock() { block = before_; }
    InBlock(const InBlock&) = delete;

  private:
    Block* before_;
};

uint64_t random_number();

// Lets the scheduler choose who runs next.
void yield();
// Stops this thread until wake(place).
void wait_at(const void* place, const char* operation, int line, int barrier = -1, int parity = -1);
void wake(const void* place);

// --- lanes together ---

// Waits until all lanes of `mask` have called it. One of them gets a result that is not null; it acts for all lanes and
// then ends the meeting. Orders no memory.
Meeting* meet(const char* operation, int line, uint32_t mask, void* argument);
void end_meeting(Meeting& meeting);

// The same with everyone's argument: if (const Lanes<Argument> lanes{...}) { what one lane does for all }
template <class Argument>
struct Lanes {
    Meeting* meeting;

    Lanes(const char* operation, int line, uint32_t mask, Argument& own) : meeting(meet(operation, line, mask, &own)) {}
    Lanes(const char* operation, Argument& own) : Lanes(operation, 0, ~0u, own) {   // of a whole warp
        if (meeting && meeting->arrived != ~0u) fail("%s takes all 32 lanes, not %08x", operation, meeting->arrived);
    }
    ~Lanes() {
        if (meeting) end_meeting(*meeting);
    }
    explicit operator bool() const { return meeting; }
    bool has(int lane) const { return meeting->arrived >> lane & 1; }
    Argument& operator[](int lane) const { return *static_cast<Argument*>(meeting->arguments[lane]); }
};

// --- shared memory ---

// The bytes at a shared address, after checks of bounds and alignment.
unsigned char* shared_pointer(uint32_t address, int bytes, int alignment, const char* operation);
// The same for 8 or 16 bytes, which are read or written now, and which no copy in flight may be writing.
unsigned char* access_shared(uint32_t address, int bytes, const char* operation, bool write);
// An access by the emulation on the kernel's behalf, for the sanitizers to judge.
void note_access(const void* pointer, size_t bytes, bool write);
// Repeats this thread's read as the asynchronous proxy, which sees ordinary writes only through fences.
template <class Read>
void as_proxy(const Read& read) {
    if (!under_tsan()) return;
    become(block->identities[block->thread_count]);
    acquire(&block->tokens->proxy_fences);
    acquire(&block->tokens->loads_landed);
    read();
    release(&block->tokens->proxy_reads);
    become(current->identity);
}
// The same for what a copy does to global memory.
template <class Access>
void as_global_proxy(const Access& access) {
    if (!under_tsan()) return;
    void* before = __tsan_get_current_fiber();
    become(block->identities[block->thread_count + 1]);
    acquire(&grid->global_fences);
    access();
    release(&block->tokens->global_copies);
    become(before);
}
// A block of the cluster, which may not have left.
Block& block_of_cluster(uint32_t rank, const char* operation);
// One of the tensor loads in flight, chosen at random, arrives. On the scheduler's stack.
void land_tensor_load();

// Checks that a thread leaves no copy behind, and that the four warps of a warpgroup have started equally many products.
void finish_copies();
void land_late_stores(bool forget);
void check_warpgroups();

float widen(uint16_t bits, Half type);
uint16_t narrow(float x, Half type);

}   // namespace nanochat::emulation
