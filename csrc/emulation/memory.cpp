// Shared memory, copies in the background, mbarriers.
#include <algorithm>

#include "block.h"

namespace nanochat::emulation {

// --- the shared window ---

void* static_shared(const void* key, size_t bytes) {
    for (const StaticVariable& variable : grid->statics) {
        if (variable.key == key) return block->window + variable.offset;
    }
    const uint32_t offset = (grid->static_used + 127) & ~127u;
    if (offset + bytes > kStaticBytes) fail("more than %u bytes of static shared memory", kStaticBytes);
    grid->statics.add() = {key, offset};
    grid->static_used = offset + static_cast<uint32_t>(bytes);
    return block->window + offset;
}

unsigned char* dynamic_shared() { return block->window + block->dynamic_offset; }

uint32_t shared_address(const void* pointer) {
    const auto offset = static_cast<const unsigned char*>(pointer) - block->window;
    if (offset < 0 || offset > block->window_size) fail("shared_address: %p is not in shared memory", pointer);
    return kWindow + static_cast<uint32_t>(offset);
}

unsigned char* shared_pointer(uint32_t address, int bytes, int alignment, const char* operation) {
    if (address % alignment) fail("%s: shared address 0x%x is not a multiple of %d", operation, address, alignment);
    const int64_t offset = int64_t{address} - kWindow, end = offset + bytes;
    const bool is_static = offset >= 0 && end <= grid->static_used;
    const bool is_dynamic = offset >= block->dynamic_offset && end <= block->window_size;
    if (!is_static && !is_dynamic) {
        fail("%s: %d bytes at offset %d of dynamic shared memory, which has %u", operation, bytes,
             static_cast<int>(offset - block->dynamic_offset), block->window_size - block->dynamic_offset);
    }
    return block->window + offset;
}

unsigned char* access_shared(uint32_t address, int bytes, const char* operation, bool write) {
    unsigned char* place = shared_pointer(address, bytes, bytes, operation);
    if (block->in_flight[(place - block->window) / kChunk]) {
        fail(write ? "%s: another copy into the same shared memory is in flight"
                   : "%s reads shared memory that a copy in flight is writing",
             operation);
    }
    note_access(place, bytes, write);
    return place;
}

void note_access(const void* pointer, size_t bytes, bool write) {
    void* place = const_cast<void*>(pointer);
    if (under_asan()) {
        if (void* bad = __asan_region_is_poisoned(place, bytes)) {
            fail("%s of %zu bytes at %p: out of bounds at %p", write ? "write" : "read", bytes, pointer, bad);
        }
    }
    if (under_tsan()) write ? __tsan_write_range(place, bytes) : __tsan_read_range(place, bytes);
}

// A copy's target is undefined until it has landed.
static unsigned char* start_write(uint32_t target, int bytes, const char* operation) {
    for (int i = 0; i < bytes; i += kChunk) {
        block->in_flight[(access_shared(target + i, 16, operation, true) - block->window) / kChunk] = true;
    }
    fill_bytes(block->window + (target - kWindow), 0xFF, bytes);
    return block->window + (target - kWindow);
}

static void end_write(unsigned char* target, int bytes) {
    note_access(target, bytes, true);
    fill_bytes(block->in_flight + (target - block->window) / kChunk, false, bytes / kChunk);
}

// --- global memory ---

void load_global(uint32_t* words, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(from) % static_cast<unsigned>(bytes)) {
        fail("ld.global: address %p is not a multiple of %d", from, bytes);
    }
    note_access(from, static_cast<size_t>(bytes), false);
    copy_bytes(words, from, static_cast<size_t>(bytes));
}

static void store_words(void* to, const uint32_t* words, int count) {
    const auto bytes = static_cast<size_t>(4 * count);
    if (reinterpret_cast<uintptr_t>(to) % bytes) {
        fail("st.global.v%d: address %p is not a multiple of %d", count, to, 4 * count);
    }
    note_access(to, bytes, true);
    copy_bytes(to, words, bytes);
}
void store_8(void* to, const uint32_t* words) { store_words(to, words, 2); }
void store_16(void* to, const uint32_t* words) { store_words(to, words, 4); }

// --- shared memory ---

void load_shared_pair(float& first, float& second, uint32_t from) {
    const unsigned char* place = access_shared(from, 8, "ld.shared.v2", false);
    copy_bytes(&first, place, 4);
    copy_bytes(&second, place + 4, 4);
}

// --- cp.async ---

void cp_async(uint32_t target, const void* source, int source_bytes) {
    if (source_bytes < 0 || source_bytes > 16) fail("cp.async: %d bytes of the source; takes 0 to 16", source_bytes);
    if (reinterpret_cast<uintptr_t>(source) % 16) fail("cp.async: source %p is not a multiple of 16", source);
    unsigned char* to = start_write(target, 16, "cp.async");
    current->copies.add() = {to, static_cast<const unsigned char*>(source), source_bytes, current->copy_group};
}

void cp_async_commit() { ++current->copy_group; }

void cp_async_wait(int newest) {
    current->copies.remove_if([&](const AsyncCopy& copy) {
        if (copy.group >= current->copy_group - newest) return false;
        if (copy.source_bytes) note_access(copy.source, copy.source_bytes, false);
        copy_bytes(copy.target, copy.source, copy.source_bytes);
        fill_bytes(copy.target + copy.source_bytes, 0, 16 - copy.source_bytes);
        end_write(copy.target, 16);
        return true;
    });
}

// --- mbarriers ---

constexpr uint64_t kMbarrierMark = 0xB5;

struct Mbarrier {   // its 8 bytes
    int64_t bytes : 31;
    uint64_t pending : 12, count : 12, phase : 1, mark : 8;
};
static_assert(sizeof(Mbarrier) == 8);

static Mbarrier& find_mbarrier(uint32_t address, const char* operation) {
    auto& barrier = *reinterpret_cast<Mbarrier*>(shared_pointer(address, 8, 8, operation));
    if (barrier.mark != kMbarrierMark) fail("%s: there is no initialised mbarrier at 0x%x", operation, address);
    return barrier;
}

static void end_phase_if_complete(Mbarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
    wake(&barrier);
}

void mbarrier_init(uint32_t address, int count) {
    unsigned char* place = shared_pointer(address, 8, 8, "mbarrier.init");
    if (count < 1 || count > 4095) fail("mbarrier.init: count %d; takes 1 to 4095", count);
    note_access(place, 8, true);
    const auto arrivals = static_cast<uint64_t>(count);
    *reinterpret_cast<Mbarrier*>(place) = {0, arrivals, arrivals, 0, kMbarrierMark};
}

void mbarrier_arrive(uint32_t address, int expected_bytes) {
    Mbarrier& barrier = find_mbarrier(address, "mbarrier.arrive");
    note_access(&barrier, 8, false);
    release(&barrier);
    if (!barrier.pending) {
        fail("mbarrier.arrive: 0x%x gets more arrivals than its %d", address, static_cast<int>(barrier.count));
    }
    barrier.bytes += expected_bytes;
    --barrier.pending;
    end_phase_if_complete(barrier);
}

void mbarrier_wait(uint32_t address, int parity, int line) {
    Mbarrier& barrier = find_mbarrier(address, "mbarrier.try_wait");
    note_access(&barrier, 8, false);
    if (parity & ~1) fail("mbarrier.try_wait: parity %d; takes 0 and 1", parity);
    while (static_cast<int>(barrier.phase) == parity) {
        wait_at(&barrier, "mbarrier.try_wait", line, static_cast<int>(address), parity);
    }
    acquire(&barrier);
}

void mbarrier_arrive_cluster(uint32_t address, uint32_t rank) {
    const InBlock there(block_of_cluster(rank, "mbarrier.arrive"));
    mbarrier_arrive(address, 0);
}

bool mbarrier_try_wait(uint32_t address, int parity) {
    const Mbarrier& barrier = find_mbarrier(address, "mbarrier.try_wait");
    current->spun = static_cast<int>(barrier.phase) == parity && !current->spun;
    if (current->spun) {
        yield();
        return false;
    }
    mbarrier_wait(address, parity, 0);
    return true;
}

// --- tensor copies ---

constexpr uint32_t kMapMark = 0x7A6D;
static int bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

static unsigned char* shared_part(const Box& box) { return block->window + (box.shared - kWindow); }

static void set_box(Box& box, const TensorMap& map, uint32_t shared, std::initializer_list<int> coordinates,
                    const char* operation) {
    if (map.mark != kMapMark || map.rank != static_cast<int>(coordinates.size())) {
        fail("%s: no tensor map of rank %zu", operation, coordinates.size());
    }
    const uint32_t alignment = map.swizzle == device::Swizzle::none ? 128 : 8 * device::swizzle_bytes(map.swizzle);
    shared_pointer(shared, map.box_bytes, static_cast<int>(alignment), operation);
    copy_bytes(&box.map, &map, sizeof map);
    box.shared = shared;
    copy_bytes(box.coordinates, coordinates.begin(), sizeof(int) * coordinates.size());
}

// For each 16 bytes of a box, in shared memory at `shared`: calls visit(shared, global, bytes) for those that are
// elements of the tensor; none may be.
template <class Visit>
static void over_box(const Box& box, const Visit& visit) {
    const TensorMap& map = box.map;
    const int element = bytes_of(map.dtype), elements = 16 / element, row_elements = map.box[0];
    for (int i = 0; i < map.box_bytes / element; i += elements) {
        const int64_t first = box.coordinates[0] + i % row_elements;
        int64_t begin = std::clamp<int64_t>(-first, 0, elements),
                end = std::clamp<int64_t>(map.sizes[0] - first, 0, elements);
        unsigned char* global = map.address + (first + begin) * element;
        for (int d = 1, row = i / row_elements; d < map.rank; row /= map.box[d++]) {
            const int64_t place = int64_t{box.coordinates[d]} + row % map.box[d];
            if (place < 0 || place >= map.sizes[d]) end = begin;
            global += place * map.strides[d];
        }
        const uint32_t shared = device::swizzled(box.shared + i * element, map.swizzle);
        if (begin < end) visit(block->window + (shared - kWindow) + begin * element, global, (end - begin) * element);
    }
}

static void add_elements(unsigned char* to, const unsigned char* from, int64_t bytes, DType dtype) {
    for (int64_t i = 0; i < bytes; i += bytes_of(dtype)) {
        if (dtype == DType::float32) {
            *reinterpret_cast<float*>(to + i) += *reinterpret_cast<const float*>(from + i);
        } else {
            auto& sum = *reinterpret_cast<uint16_t*>(to + i);
            sum = narrow(widen(sum, dtype) + widen(*reinterpret_cast<const uint16_t*>(from + i), dtype), dtype);
        }
    }
}

static void note_source(const TensorStore& store) {
    const auto read = [&] { note_access(shared_part(store), store.map.box_bytes, false); };
    read();
    as_proxy(read);
}

static void write_result(TensorStore& store) {
    over_box(store, [&](const unsigned char* shared, unsigned char* global, int64_t bytes) {
        const unsigned char* value = store.bytes + (shared - shared_part(store));
        note_access(global, bytes, true);
        store.add ? add_elements(global, value, bytes, store.map.dtype) : copy_bytes(global, value, bytes);
    });
    delete[] store.bytes;
}

TensorMap make_tensor_map(DType dtype, const void* address, int rank, const int64_t* sizes, const int64_t* strides,
                          const int32_t* box, device::Swizzle swizzle) {
    const auto require = [](bool holds, const char* rule) {
        if (!holds) fail("tensor map: %s", rule);
    };
    require(rank >= 2 && rank <= 4, "takes 2 to 4 dimensions");
    require(reinterpret_cast<uintptr_t>(address) % 16 == 0, "the address must be a multiple of 16");
    auto* first = static_cast<unsigned char*>(const_cast<void*>(address));
    TensorMap map = {
        .address = first,
        .sizes = {},
        .strides = {},
        .box = {},
        .box_bytes = bytes_of(dtype),
        .rank = rank,
        .dtype = dtype,
        .swizzle = swizzle,
        .mark = kMapMark,
        .zeros = {},
    };
    for (int i = 0; i < rank; ++i) {
        map.sizes[i] = sizes[i];
        map.strides[i] = i ? strides[i - 1] : bytes_of(dtype);
        map.box[i] = box[i];
        map.box_bytes *= box[i];
        require(sizes[i] >= 1 && sizes[i] <= int64_t{1} << 32, "sizes must be 1 to 2^32");
        require(box[i] >= 1 && box[i] <= 256, "a box takes 1 to 256 elements along a dimension");
        require(i == 0 || (map.strides[i] % 16 == 0 && map.strides[i] < int64_t{1} << 40),
                "strides must be multiples of 16 bytes below 2^40");
    }
    const uint32_t row = static_cast<uint32_t>(box[0]) * bytes_of(dtype);
    require(row % 16 == 0, "a box's rows must be multiples of 16 bytes");
    require(swizzle == device::Swizzle::none || row <= swizzle_bytes(swizzle), "a box's rows must fit the swizzle");
    return map;
}

void fence_proxy_async() { release(&block->tokens->proxy_fences); }
void fence_proxy_async_global() { release(&grid->global_fences); }

void tma_load(uint32_t target, const TensorMap& map, uint32_t barrier, std::initializer_list<int> coordinates) {
    find_mbarrier(barrier, "tensor load");
    TensorLoad& load = block->loads.add();
    set_box(load, map, target, coordinates, "tensor load");
    load.barrier = barrier;
    start_write(target, map.box_bytes, "tensor load");
    load.engine = create_identity();
}

void tma_load_multicast(uint32_t target, const TensorMap& map, uint32_t barrier, uint32_t mask,
                        std::initializer_list<int> coordinates) {
    if (!mask) fail("tensor load: no block in its mask");
    for (uint32_t left = mask; left; left &= left - 1) {   // each part lands by itself
        const auto rank = static_cast<uint32_t>(__builtin_ctz(left));
        const InBlock there(block_of_cluster(rank, "tensor load"));
        tma_load(target, map, barrier, coordinates);
    }
}

void land_tensor_load() {
    TensorLoad& load = block->loads[static_cast<int>(random_number() % block->loads.size)];
    const int bytes = load.map.box_bytes;
    unsigned char* target = shared_part(load);
    Mbarrier& barrier = find_mbarrier(load.barrier, "tensor load");
    void* engine = load.engine;
    become(engine);
    fill_bytes(target, 0, bytes);
    over_box(load, [&](unsigned char* shared, const unsigned char* global, int64_t bytes) {
        note_access(global, bytes, false);
        copy_bytes(shared, global, bytes);
    });
    as_global_proxy([&] {
        over_box(load,
                 [](unsigned char*, const unsigned char* global, int64_t bytes) { note_access(global, bytes, false); });
    });
    acquire(&block->tokens->global_copies);
    end_write(target, bytes);
    release(&barrier);
    release(&block->tokens->loads_landed);
    release(&block->tokens->blocks);
    become(grid->scheduler_identity);
    destroy_identity(engine);
    barrier.bytes -= bytes;
    end_phase_if_complete(barrier);
    block->loads.remove_if([&](const TensorLoad& other) { return &other == &load; });
}

// Of a copy whose box is set.
static void start_store(TensorStore& store, bool add, const char* operation) {
    const int bytes = store.map.box_bytes;
    store.group = current->store_group;
    store.add = add;
    store.read = false;
    for (int i = 0; i < bytes; i += 16) access_shared(store.shared + i, 16, operation, false);
    note_source(store);
    store.bytes = new unsigned char[bytes];
    copy_bytes(store.bytes, shared_part(store), bytes);
    const auto write = [&] {   // it may happen from now on
        over_box(store,
                 [](const unsigned char*, unsigned char* global, int64_t bytes) { note_access(global, bytes, true); });
    };
    as_global_proxy(write);
    acquire(&block->tokens->global_copies);
    write();
    over_box(store, [=](const unsigned char*, unsigned char* global, int64_t bytes) {
        if (add) {
            (void)*static_cast<volatile unsigned char*>(global);   // a wrong address shows now
        } else {
            fill_bytes(global, 0xFF, bytes);
        }
    });
}

// Returns a new store of the thread. Where there is no room, the results of those whose source has been read appear, as
// they may at any time.
static TensorStore& add_store() {
    if (current->stores.full()) {
        current->stores.remove_if([](TensorStore& store) {
            if (store.read) write_result(store);
            return store.read;
        });
    }
    return current->stores.add();
}

void tma_store(const TensorMap& map, uint32_t source, std::initializer_list<int> coordinates, bool add) {
    TensorStore& store = add_store();
    set_box(store, map, source, coordinates, "tensor store");
    start_store(store, add, "tensor store");
}

void bulk_store(void* to, uint32_t source, int bytes, bool add) {
    const char* operation = add ? "cp.reduce.async.bulk" : "cp.async.bulk";
    if (reinterpret_cast<uintptr_t>(to) % 16) fail("%s: address %p is not a multiple of 16", operation, to);
    if (bytes <= 0 || bytes % 16) fail("%s: %d bytes; takes multiples of 16", operation, bytes);
    shared_pointer(source, bytes, 16, operation);
    TensorStore& store = add_store();
    store.map = {
        .address = static_cast<unsigned char*>(to),
        .sizes = {bytes / 4},
        .strides = {4},
        .box = {bytes / 4},
        .box_bytes = bytes,
        .rank = 1,
        .dtype = DType::float32,
        .swizzle = device::Swizzle::none,
        .mark = kMapMark,
        .zeros = {},
    };
    store.shared = source;
    store.coordinates[0] = 0;
    start_store(store, add, operation);
}

void tma_commit() { ++current->store_group; }

void tma_wait(int newest, bool read_only) {
    current->stores.remove_if([&](TensorStore& store) {
        if (store.group >= current->store_group - newest) return false;
        if (!store.read) {   // until now the hardware might have read
            note_source(store);
            if (!std::equal(store.bytes, store.bytes + store.map.box_bytes, shared_part(store))) {
                fail("tensor store: its source changes before it is read");
            }
            store.read = true;
        }
        if (!read_only) write_result(store);
        return !read_only;
    });
    acquire(&block->tokens->proxy_reads);
}

void finish_copies() {
    if (current->copies.size) fail("the thread leaves with cp.async in flight");
    for (const TensorStore& store : current->stores) {
        if (store.group == current->store_group) fail("the thread leaves with a tensor store that was not committed");
        if (!store.read) fail("the thread leaves before a tensor store has read its source");
    }
    if (under_tsan()) return tma_wait(0, false);   // as this thread
    grid->late_stores.insert(grid->late_stores.end(), current->stores.begin(), current->stores.end());
    current->stores.size = 0;
}

void land_late_stores(bool forget) {
    for (TensorStore& store : grid->late_stores) forget ? delete[] store.bytes : write_result(store);
    grid->late_stores.clear();
}

}   // namespace nanochat::emulation
