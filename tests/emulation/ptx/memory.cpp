// Global and shared memory: loads, stores, atomics, copies in the background, and mbarriers.
#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace ptx {

std::vector<Region>& regions() {
    static std::vector<Region> all;
    return all;
}

static Region parameter_region;
void set_parameter_region(Region region) { parameter_region = region; }

// Whether `bytes` from `address` lie in [begin, end). Addresses near the last one do not wrap.
static bool is_inside(uint64_t address, uint64_t bytes, uint64_t begin, uint64_t end) {
    return address >= begin && address <= end && bytes <= end - address;
}

void check_global(uint64_t address, uint32_t bytes, uint32_t align, const char* what) {
    static size_t last = 0;   // mostly the same region as before
    const auto holds = [&](const Region& region) { return is_inside(address, bytes, region.begin, region.end); };
    if (address % align) fail("%s: address 0x%lx is not a multiple of %u", what, address, align);
    if (holds(parameter_region)) return;
    const std::vector<Region>& all = regions();
    if (last < all.size() && holds(all[last])) return;
    last = static_cast<size_t>(std::find_if(all.begin(), all.end(), holds) - all.begin());
    if (last < all.size()) return;
    if (all.empty()) {
        if (address >= 4096) return;
        fail("%s: address 0x%lx", what, address);
    }
    std::string near;
    for (const Region& region : all) {
        if (address + 65536 < region.begin || address >= region.end + 65536) continue;
        near = ": " + std::to_string(static_cast<int64_t>(address - region.begin)) +
               " bytes from the start of one of " + std::to_string(region.end - region.begin);
    }
    fail("%s: %u bytes at 0x%lx are in no buffer%s", what, bytes, address, near.c_str());
}

uint8_t* Block::shared_at(uint32_t address, uint32_t bytes, const char* what) {
    if (address % bytes) fail("%s: shared address 0x%x is not a multiple of %u", what, address, bytes);
    if (!is_inside(address, bytes, kSharedStart, shared_end)) {
        fail("%s: %u bytes at shared address 0x%x are outside [0x%x, 0x%x)", what, bytes, address, kSharedStart,
             shared_end);
    }
    return shared + address;
}

void Block::note_write(const Warp& warp, uint32_t address, uint32_t bytes, bool is_mbarrier) {
    for (uint32_t chunk = address / 16; chunk <= (address + bytes - 1) / 16; ++chunk) {
        writers[chunk] = {static_cast<uint32_t>(warp.id) + 1, warp.fences(is_mbarrier), is_mbarrier};
    }
}

void Block::check_proxy(uint32_t address, uint32_t bytes, const char* what) const {
    for (uint32_t chunk = address / 16; chunk <= (address + bytes - 1) / 16; ++chunk) {
        const Writer& last = writers[chunk];
        if (last.warp && warps[last.warp - 1].fences(last.is_mbarrier) == last.fences) {
            fail("%s: warp %u wrote shared address 0x%x, and no fence.proxy.async since", what, last.warp - 1,
                 chunk * 16);
        }
    }
}

void note_global_write(const Block& block, uint64_t address, uint32_t bytes, bool is_copy) {
    Grid& grid = *block.launch;
    for (uint64_t chunk = address / 16; chunk <= (address + bytes - 1) / 16; ++chunk) {
        grid.writers[chunk] = {is_copy ? block.number + 1 : 0, grid.fences};
    }
}

// A copy touches global memory.
static void check_global_proxy(const Block& block, uint64_t address, const char* what) {
    const Grid& grid = *block.launch;
    const auto found = grid.writers.find(address / 16);
    if (found == grid.writers.end() || found->second.copier == block.number + 1) return;
    if (found->second.fences < grid.fences) return;
    fail("%s: 0x%lx was written by %s, and no fence.proxy.async.global since", what, address,
         found->second.copier ? "another block" : "a store");
}

// --- loads and stores ---

namespace {

template <class T, int count, bool is_shared, bool is_store>
Status access(Warp& warp, const Instruction& i, uint32_t mask) {
    constexpr uint32_t bytes = sizeof(T) * count;
    using Value = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    const int* registers = warp.kernel->lists.data() + i.list;
    uint32_t shared[32];
    uint64_t global[32];
    for_lanes(mask, [&](int l) {
        uint8_t* memory;
        if constexpr (is_shared) {
            shared[l] = shared_operand(warp, i, l);
            memory = warp.block->shared_at(shared[l], bytes, is_store ? "st" : "ld");
            if (is_store) warp.block->note_write(warp, shared[l], bytes);
        } else {
            global[l] = global_operand(warp, i, l);
            check_global(global[l], bytes, bytes, is_store ? "st" : "ld");
            memory = reinterpret_cast<uint8_t*>(global[l]);
            if (is_store && warp.block->launch->is_watched) note_global_write(*warp.block, global[l], bytes, false);
        }
        for (int n = 0; n < count; ++n) {
            T value;
            if constexpr (is_store) {
                value = static_cast<T>(Register<Value>(warp, registers[n]).get(l));
                memcpy(memory + n * sizeof(T), &value, sizeof(T));
            } else if (registers[n] >= 0) {
                memcpy(&value, memory + n * sizeof(T), sizeof(T));
                Register<Value>(warp, registers[n]).set(l, static_cast<Value>(value));
            }
        }
    });
    if constexpr (is_shared) {
        count_shared(warp, shared, bytes, mask);
    } else if (i.kind != Kind::parameter) {
        count_global(warp, global, bytes, mask);
    }
    return Status::next;
}

template <class T, bool is_shared, bool is_store>
Handler* access_of(int count) {
    return count == 1   ? access<T, 1, is_shared, is_store>
           : count == 2 ? access<T, 2, is_shared, is_store>
           : count == 4 ? access<T, 4, is_shared, is_store>
                        : nullptr;
}

template <bool is_shared, bool is_store>
Handler* access_of(int bytes, bool is_signed, int count) {
    switch (bytes) {
        case 1:
            return is_signed ? access_of<int8_t, is_shared, is_store>(count)
                             : access_of<uint8_t, is_shared, is_store>(count);
        case 2:
            return is_signed ? access_of<int16_t, is_shared, is_store>(count)
                             : access_of<uint16_t, is_shared, is_store>(count);
        case 4:
            return access_of<uint32_t, is_shared, is_store>(count);
        case 8:
            return access_of<uint64_t, is_shared, is_store>(count);
        default:
            return nullptr;
    }
}

template <class T, auto function>
Status atomic(Warp& warp, const Instruction& i, uint32_t mask) {
    for_lanes(mask, [&](int l) {
        const uint64_t address = global_operand(warp, i, l);
        check_global(address, sizeof(T), sizeof(T), "atom");
        auto* place = reinterpret_cast<T*>(address);
        const T old = *place;
        *place = function(old, Register<T>(warp, i.b).get(l), i.c >= 0 ? Register<T>(warp, i.c).get(l) : T{});
        warp.block->has_advanced |= *place != old;
        Register<T>(warp, i.d).set(l, old);
    });
    return Status::next;
}

}   // namespace

Handler* find_access(bool is_shared, bool is_store, int element_bytes, bool is_signed, int count) {
    if (is_shared) {
        return is_store ? access_of<true, true>(element_bytes, is_signed, count)
                        : access_of<true, false>(element_bytes, is_signed, count);
    }
    return is_store ? access_of<false, true>(element_bytes, is_signed, count)
                    : access_of<false, false>(element_bytes, is_signed, count);
}

Handler* find_atomic(const std::string& opcode) {
    static const std::unordered_map<std::string, Handler*> all = {
        {"atom.acq_rel.gpu.global.add.u32", atomic<uint32_t, [](uint32_t a, uint32_t b, uint32_t) { return a + b; }>},
        {"atom.global.add.u32", atomic<uint32_t, [](uint32_t a, uint32_t b, uint32_t) { return a + b; }>},
        {"atom.global.max.s32", atomic<int32_t, [](int32_t a, int32_t b, int32_t) { return std::max(a, b); }>},
        {"atom.global.min.s32", atomic<int32_t, [](int32_t a, int32_t b, int32_t) { return std::min(a, b); }>},
        {"atom.global.exch.b32", atomic<uint32_t, [](uint32_t, uint32_t b, uint32_t) { return b; }>},
        {"atom.global.cas.b32", atomic<uint32_t, [](uint32_t a, uint32_t b, uint32_t c) { return a == b ? c : a; }>},
    };
    const auto found = all.find(opcode);
    return found == all.end() ? nullptr : found->second;
}

// --- counters ---

Status handlers::load_acquire(Warp& warp, const Instruction& i, uint32_t mask) {
    for_lanes(mask, [&](int l) {
        const uint64_t address = global_operand(warp, i, l);
        check_global(address, 4, 4, "ld.acquire");
        Register<uint32_t>(warp, i.d).set(l, *reinterpret_cast<const uint32_t*>(address));
    });
    warp.block->waits_for_others = true;
    return Status::next;
}

Status handlers::add_release(Warp& warp, const Instruction& i, uint32_t mask) {
    for_lanes(mask, [&](int l) {
        const uint64_t address = global_operand(warp, i, l);
        check_global(address, 4, 4, "red");
        *reinterpret_cast<uint32_t*>(address) += Register<uint32_t>(warp, i.b).get(l);
    });
    warp.block->has_advanced = true;
    return Status::next;
}

// --- shared memory of other blocks ---

namespace {

// An address of shared::cluster has the block's rank + 1 in its highest byte, or 0 for the block itself.
constexpr int kRankShift = 24;

Block& block_of_cluster(Block& block, uint32_t rank) {
    if (rank >= block.cluster->blocks.size()) fail("block %u of a cluster of %zu", rank, block.cluster->blocks.size());
    Block& other = *block.cluster->blocks[rank];
    if (!other.is_alive()) fail("block %u of the cluster has left", rank);
    return other;
}

}   // namespace

Status handlers::map_address(Warp& warp, const Instruction& i, uint32_t mask) {
    for_lanes(mask, [&](int l) {
        const uint32_t address = Register<uint32_t>(warp, i.a).get(l), rank = Register<uint32_t>(warp, i.b).get(l);
        if (rank >= warp.block->cluster->blocks.size()) fail("mapa: block %u of the cluster", rank);
        Register<uint32_t>(warp, i.d).set(l, address | (rank + 1) << kRankShift);
    });
    return Status::next;
}

// --- cp.async ---

Status handlers::cp_async(Warp& warp, const Instruction& i, uint32_t mask) {
    warp.copies.emplace_back();
    AsyncCopy& copy = warp.copies.back();
    copy.mask = mask;
    for_lanes(mask, [&](int l) {
        copy.target[l] = Register<uint32_t>(warp, i.d).get(l);
        copy.source[l] = global_operand(warp, i, l);
        copy.bytes[l] = Register<int32_t>(warp, i.b).get(l);
        copy.group[l] = warp.copy_group[l];
        if (copy.bytes[l] < 0 || copy.bytes[l] > 16) fail("cp.async: %d bytes", copy.bytes[l]);
        memset(warp.block->shared_at(copy.target[l], 16, "cp.async"), 0xFF, 16);
        if (copy.source[l] % 16) fail("cp.async: address 0x%lx is not a multiple of 16", copy.source[l]);
        if (copy.bytes[l]) check_global(copy.source[l], static_cast<uint32_t>(copy.bytes[l]), 16, "cp.async");
    });
    count_shared(warp, copy.target, 16, mask);
    return Status::next;
}

Status handlers::cp_async_commit(Warp& warp, const Instruction&, uint32_t mask) {
    for_lanes(mask, [&](int l) { ++warp.copy_group[l]; });
    return Status::next;
}

Status handlers::cp_async_wait(Warp& warp, const Instruction& i, uint32_t mask) {
    for (AsyncCopy& copy : warp.copies) {
        for_lanes(copy.mask & mask, [&](int l) {
            if (int64_t{copy.group[l]} >= int64_t{warp.copy_group[l]} - i.immediate) return;
            warp.block->note_write(warp, copy.target[l], 16);
            uint8_t* target = warp.block->shared + copy.target[l];
            memset(target, 0, 16);
            memcpy(target, reinterpret_cast<void*>(copy.source[l]), static_cast<size_t>(copy.bytes[l]));
            copy.mask &= ~(1u << l);
        });
    }
    std::erase_if(warp.copies, [](const AsyncCopy& copy) { return copy.mask == 0; });
    return Status::next;
}

// --- mbarriers ---

namespace {

struct Mbarrier {   // in 8 bytes of shared memory
    uint64_t phase : 1, pending : 20, expected : 20, unused : 1;
    int64_t bytes : 22;

    void finish_phase() {
        if (pending || bytes) return;
        phase ^= 1;
        pending = expected;
    }
};
static_assert(sizeof(Mbarrier) == 8);
constexpr uint32_t kMostArrivals = (1 << 20) - 2;

Mbarrier& mbarrier_at(Block& block, uint32_t address, const char* what) {
    Mbarrier& barrier = *reinterpret_cast<Mbarrier*>(block.shared_at(address, 8, what));
    if (barrier.expected == 0 || barrier.expected > kMostArrivals) fail("%s: no mbarrier at 0x%x", what, address);
    return barrier;
}

}   // namespace

Status handlers::mbarrier_init(Warp& warp, const Instruction& i, uint32_t mask) {
    for_lanes(mask, [&](int l) {
        const uint32_t address = shared_operand(warp, i, l), count = Register<uint32_t>(warp, i.b).get(l);
        if (count == 0 || count > kMostArrivals) fail("mbarrier.init: count %u", count);
        Mbarrier& barrier = *reinterpret_cast<Mbarrier*>(warp.block->shared_at(address, 8, "mbarrier.init"));
        barrier = {0, count, count, 0, 0};
        warp.block->note_write(warp, address, 8, true);
    });
    return Status::next;
}

Status handlers::mbarrier_arrive(Warp& warp, const Instruction& i, uint32_t mask) {
    for_lanes(mask, [&](int l) {
        Mbarrier& barrier = mbarrier_at(*warp.block, shared_operand(warp, i, l), "mbarrier.arrive");
        if (i.b >= 0) barrier.bytes += Register<int32_t>(warp, i.b).get(l);
        if (barrier.pending == 0) fail("mbarrier.arrive: more arrivals than the phase takes");
        --barrier.pending;
        barrier.finish_phase();
    });
    return Status::next;
}

Status handlers::mbarrier_arrive_remote(Warp& warp, const Instruction& i, uint32_t mask) {
    for_lanes(mask, [&](int l) {
        const uint32_t address = shared_operand(warp, i, l), rank = address >> kRankShift;
        Block& block = rank ? block_of_cluster(*warp.block, rank - 1) : *warp.block;
        Mbarrier& barrier = mbarrier_at(block, address & ((1u << kRankShift) - 1), "mbarrier.arrive");
        if (barrier.pending == 0) fail("mbarrier.arrive: more arrivals than the phase takes");
        --barrier.pending;
        barrier.finish_phase();
    });
    return Status::next;
}

Status handlers::mbarrier_try_wait(Warp& warp, const Instruction& i, uint32_t mask) {
    uint32_t done = 0;
    for_lanes(mask, [&](int l) {
        const Mbarrier& barrier = mbarrier_at(*warp.block, shared_operand(warp, i, l), "mbarrier.try_wait");
        const uint32_t parity = Register<uint32_t>(warp, i.b).get(l);
        if (parity > 1) fail("mbarrier.try_wait: parity %u", parity);
        if (barrier.phase != parity) done |= 1u << l;
    });
    if (done != mask && warp.block->next_random() % 8) return warp.wait(Wait::retry);
    if (done) warp.block->has_advanced = true;
    warp.set_predicate(i.d, mask, done);
    return Status::next;
}

// --- tensor copies ---

namespace {

const TensorMap& map_at(uint64_t address) {
    check_global(address, 64, 64, "tensor map");
    const TensorMap& map = *reinterpret_cast<const TensorMap*>(address);
    if (map.mark != TensorMap::kMark) fail("no tensor map at 0x%lx", address);
    return map;
}

uint32_t box_bytes(const TensorMap& map) {
    uint32_t bytes = map.element;
    for (int n = 0; n < map.rank; ++n) bytes *= map.box[n];
    return bytes;
}

// CUtensorMapSwizzle n: the chunk of 16 bytes within 32, 64 or 128 bytes changes with the bits 7 and up of the address.
uint32_t swizzled(uint32_t address, int swizzle) {
    return swizzle == 0 ? address : address ^ (address >> 7 & ((1u << swizzle) - 1)) << 4;
}

// Calls visit(shared address, global address; 0: outside the tensor) for each element of a box.
template <class Visit>
void for_box(const TensorMap& map, uint32_t shared, const int* at, const Visit& visit) {
    int place[5] = {};
    for (uint32_t offset = 0; offset < box_bytes(map); offset += map.element) {
        uint64_t global = map.address;
        bool is_inside = true;
        for (int n = 0; n < map.rank; ++n) {
            const int64_t coordinate = int64_t{at[n]} + place[n];
            is_inside &= coordinate >= 0 && coordinate < static_cast<int64_t>(map.sizes[n]);
            global += static_cast<uint64_t>(coordinate) * map.strides[n];
        }
        visit(swizzled(shared + offset, map.swizzle), is_inside ? global : 0);
        for (int n = 0; n < map.rank; ++n) {
            if (++place[n] < map.box[n]) break;
            place[n] = 0;
        }
    }
}

// What a load and a store have in common.
template <class Copy>
Copy tensor_copy(Warp& warp, const Instruction& i, int lane) {
    Copy copy{};
    copy.map = map_at(Register<uint64_t>(warp, i.a).get(lane));
    if (copy.map.rank != i.count) fail("%d coordinates of a tensor of rank %d", i.count, copy.map.rank);
    for (int n = 0; n < i.count; ++n) {
        copy.at[n] = Register<int32_t>(warp, warp.kernel->lists[static_cast<size_t>(i.list + n)]).get(lane);
    }
    const uint32_t shared = Register<uint32_t>(warp, i.d).get(lane), bytes = box_bytes(copy.map);
    if (shared % 128) fail("shared address 0x%x is not a multiple of 128", shared);
    if (!is_inside(shared, bytes, kSharedStart, warp.block->shared_end)) {
        fail("a box of %u bytes at shared address 0x%x is outside", bytes, shared);
    }
    return copy;
}

void read_source(Block& block, TensorStore& store) {
    if (store.is_read) return;
    store.is_read = true;
    block.check_proxy(store.source, box_bytes(store.map), "tensor store");
    for_box(store.map, store.source, store.at, [&](uint32_t shared, uint64_t) {
        store.data.insert(store.data.end(), block.shared + shared, block.shared + shared + store.map.element);
    });
}

template <class T, class Sum>
void add_to(uint8_t* target, const uint8_t* source, const Sum& sum) {
    T a, b;
    memcpy(&a, target, sizeof(T));
    memcpy(&b, source, sizeof(T));
    a = sum(a, b);
    memcpy(target, &a, sizeof(T));
}

void write_target(const TensorStore& store, const Block* block) {   // block: null at the grid's end
    constexpr int kFloat16 = 6;                                     // CUtensorMapDataType
    const uint8_t* from = store.data.data();
    for_box(store.map, store.source, store.at, [&](uint32_t, uint64_t global) {
        const uint8_t* const source = from;
        from += store.map.element;
        if (!global) return;
        check_global(global, store.map.element, store.map.element, "tensor store");
        if (block && block->launch->is_watched) note_global_write(*block, global, store.map.element, true);
        auto* target = reinterpret_cast<uint8_t*>(global);
        if (!store.is_addition) {
            memcpy(target, source, store.map.element);
        } else if (store.map.element == 4) {
            add_to<float>(target, source, [](float a, float b) { return a + b; });
        } else if (store.map.type == kFloat16) {
            add_to<uint16_t>(target, source,
                             [](uint16_t a, uint16_t b) { return float_to_half(half_to_float(a) + half_to_float(b)); });
        } else {
            add_to<uint16_t>(target, source, [](uint16_t a, uint16_t b) {
                return float_to_bfloat16(bfloat16_to_float(a) + bfloat16_to_float(b));
            });
        }
    });
}

}   // namespace

Status handlers::tensor_prefetch(Warp& warp, const Instruction& i, uint32_t mask) {
    for_lanes(mask, [&](int l) { map_at(global_operand(warp, i, l)); });
    return Status::next;
}

Status handlers::tensor_load(Warp& warp, const Instruction& i, uint32_t mask) {
    for_lanes(mask, [&](int l) {
        TensorLoad load = tensor_copy<TensorLoad>(warp, i, l);
        load.target = Register<uint32_t>(warp, i.d).get(l);
        load.barrier = Register<uint32_t>(warp, i.b).get(l);
        if (warp.block->launch->is_watched) {
            for_box(load.map, load.target, load.at, [&](uint32_t, uint64_t global) {
                if (global) check_global_proxy(*warp.block, global, "tensor load");
            });
        }
        const uint32_t blocks = i.c < 0 ? 1u << warp.block->rank : Register<uint16_t>(warp, i.c).get(l);
        if (!blocks) fail("tensor load: no block in its mask");
        for_lanes(blocks, [&](int rank) {   // each part lands by itself
            Block& block = block_of_cluster(*warp.block, static_cast<uint32_t>(rank));
            mbarrier_at(block, load.barrier, "tensor load");
            block.check_proxy(load.barrier, 8, "tensor load: its mbarrier");
            block.check_proxy(load.target, box_bytes(load.map), "tensor load: its target");
            memset(block.shared + load.target, 0xFF, box_bytes(load.map));
            block.loads.push_back(load);
        });
    });
    return Status::next;
}

void land_load(Block& block) {
    const size_t which = block.next_random() % block.loads.size();
    const TensorLoad load = block.loads[which];
    block.loads.erase(block.loads.begin() + static_cast<ptrdiff_t>(which));
    const uint32_t bytes = box_bytes(load.map), element = load.map.element;
    std::fill(&block.writers[load.target / 16], &block.writers[(load.target + bytes) / 16], Block::Writer{});
    for_box(load.map, load.target, load.at, [&](uint32_t shared, uint64_t global) {
        memset(block.shared + shared, 0, element);
        if (!global) return;
        check_global(global, element, element, "tensor load");
        memcpy(block.shared + shared, reinterpret_cast<void*>(global), element);
    });
    Mbarrier& barrier = mbarrier_at(block, load.barrier, "tensor load");
    barrier.bytes -= bytes;
    barrier.finish_phase();
    block.has_advanced = true;
}

static void start_store(Warp& warp, TensorStore store) {
    if (warp.block->launch->is_watched) {
        for_box(store.map, store.source, store.at, [&](uint32_t, uint64_t global) {
            if (global) check_global_proxy(*warp.block, global, "tensor store");
        });
    }
    warp.stores.push_back(std::move(store));
}

Status handlers::tensor_store(Warp& warp, const Instruction& i, uint32_t mask) {
    for_lanes(mask, [&](int l) {
        TensorStore store = tensor_copy<TensorStore>(warp, i, l);
        store.lane = l;
        store.group = warp.store_group[l];
        store.source = Register<uint32_t>(warp, i.d).get(l);
        store.is_addition = i.width;
        start_store(warp, std::move(store));
    });
    return Status::next;
}

// Its box is a row of float32.
Status handlers::bulk_store(Warp& warp, const Instruction& i, uint32_t mask) {
    constexpr uint8_t kFloat32 = 7;   // CUtensorMapDataType
    for_lanes(mask, [&](int l) {
        const uint32_t bytes = Register<uint32_t>(warp, i.b).get(l);
        TensorStore store{};
        store.map.address = Register<uint64_t>(warp, i.a).get(l);
        store.source = Register<uint32_t>(warp, i.d).get(l);
        if (bytes == 0 || bytes % 16) fail("cp.async.bulk: %u bytes", bytes);
        if (store.source % 16) fail("cp.async.bulk: shared address 0x%x is not a multiple of 16", store.source);
        if (!is_inside(store.source, bytes, kSharedStart, warp.block->shared_end)) {
            fail("cp.async.bulk: %u bytes at shared address 0x%x are outside", bytes, store.source);
        }
        check_global(store.map.address, bytes, 16, "cp.async.bulk");
        store.map.sizes[0] = bytes / 4;
        store.map.strides[0] = store.map.element = 4;
        store.map.box[0] = static_cast<uint16_t>(bytes / 4);
        store.map.rank = 1;
        store.map.type = kFloat32;
        store.lane = l;
        store.group = warp.store_group[l];
        store.is_addition = i.width;
        start_store(warp, std::move(store));
    });
    return Status::next;
}

Status handlers::tensor_commit(Warp& warp, const Instruction&, uint32_t mask) {
    for_lanes(mask, [&](int l) { ++warp.store_group[l]; });
    return Status::next;
}

Status handlers::tensor_wait(Warp& warp, const Instruction& i, uint32_t mask) {
    const bool only_read = i.width;
    const auto is_waited_for = [&](const TensorStore& store) {
        const int64_t newest = int64_t{warp.store_group[store.lane]} - i.immediate;
        return (mask >> store.lane & 1) && int64_t{store.group} < newest;
    };
    for (TensorStore& store : warp.stores) {
        if (!is_waited_for(store)) continue;
        read_source(*warp.block, store);
        if (!only_read) write_target(store, warp.block);
    }
    if (!only_read) std::erase_if(warp.stores, is_waited_for);
    return Status::next;
}

void finish_stores(Warp& warp) {
    for (const TensorStore& store : warp.stores) {
        if (!store.is_read) fail("leaves before a tensor store has read its source");
        warp.block->launch->late_stores.push_back(store);
    }
    warp.stores.clear();
}

void finish_late_stores(Grid& grid) {
    for (const TensorStore& store : grid.late_stores) write_target(store, nullptr);
}

Status handlers::fence_proxy(Warp& warp, const Instruction&, uint32_t) {
    ++warp.proxy_fences;
    return Status::next;
}

Status handlers::fence_proxy_global(Warp& warp, const Instruction&, uint32_t) {
    ++warp.block->launch->fences;
    return Status::next;
}

Status handlers::fence_mbarrier(Warp& warp, const Instruction&, uint32_t) {
    ++warp.mbarrier_fences;
    return Status::next;
}

}   // namespace ptx
