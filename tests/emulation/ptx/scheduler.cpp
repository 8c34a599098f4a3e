// Launches: splits of warps, barriers, and the order in which all of it runs.
#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <utility>

#include "machine.h"
#include "text.h"

namespace ptx {

constexpr uint64_t kPatience = 2000;   // rounds of a block without advance, until it counts as a deadlock
constexpr int kRegistersOfAMultiprocessor = 65536;
constexpr size_t kMostBlocks = 512;   // that run side by side
constexpr unsigned kMaxCluster = 8;

Schedule& schedule() {
    static Schedule now;
    return now;
}

uint64_t Block::next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
}

// --- control ---

// The mask has the lanes that jump.
Status handlers::bra(Warp& warp, const Instruction& i, uint32_t mask) { return warp.jump(i.target, mask); }

Status handlers::call(Warp& warp, const Instruction& i, uint32_t mask) {
    Register<int32_t> link(warp, i.d);
    for_lanes(mask, [&](int l) { link.set(l, warp.pc + 1); });
    return warp.jump(i.target, mask);
}

Status handlers::ret(Warp& warp, const Instruction& i, uint32_t mask) {
    const Register<int32_t> link(warp, i.a);
    const int to = link.get(first_lane(mask));
    for_lanes(mask, [&](int l) {
        if (link.get(l) != to) fail("ret: lanes return to different places");
    });
    return warp.jump(to, mask);
}

Status handlers::exit(Warp&, const Instruction&, uint32_t) { return Status::exit; }
Status handlers::trap(Warp&, const Instruction&, uint32_t) { fail("trap"); }
Status handlers::nothing(Warp&, const Instruction&, uint32_t) { return Status::next; }

// --- barriers ---

namespace {

int live_threads(const Block& block) {   // a warp counts as 32
    const auto& warps = block.warps;
    return 32 * static_cast<int>(std::count_if(warps.begin(), warps.end(), [](const Warp& one) { return one.live; }));
}

int threads_of_barrier(Warp& warp, const Instruction& i, uint32_t mask) {
    if (i.b < 0) return live_threads(*warp.block);
    const int threads = Register<int32_t>(warp, i.b).get(first_lane(mask));
    if (threads <= 0 || threads % 32) fail("bar: %d threads", threads);
    return threads;
}

bool finish_if_complete(Block::Barrier& barrier) {
    if (barrier.arrived < barrier.expected) return false;
    barrier.arrived = 0;
    ++barrier.generation;
    return true;
}

// A warp has left: barriers of all threads no longer wait for it.
void release_barriers(Block& block) {
    for (Block::Barrier& barrier : block.barriers) {
        if (!barrier.arrived || !barrier.is_of_all) continue;
        barrier.expected = live_threads(block);
        finish_if_complete(barrier);
    }
}

// Counts this warp, and returns whether it is the last.
bool arrive(Warp& warp, const Instruction& i, uint32_t mask, int id) {
    if (id < 0 || id > 15) fail("bar: number %d", id);
    Block::Barrier& barrier = warp.block->barriers[id];
    const int expected = threads_of_barrier(warp, i, mask);
    if (barrier.arrived && barrier.expected != expected) {
        fail("bar %d: %d threads here, %d elsewhere", id, expected, barrier.expected);
    }
    barrier.expected = expected;
    barrier.is_of_all = i.b < 0;
    barrier.arrived += 32;
    if (barrier.arrived > expected) fail("bar %d: %d of %d threads arrive", id, barrier.arrived, expected);
    return finish_if_complete(barrier);
}

}   // namespace

Status handlers::bar_sync(Warp& warp, const Instruction& i, uint32_t mask) {
    const int id = Register<int32_t>(warp, i.a).get(first_lane(mask));
    if (arrive(warp, i, mask, id)) return Status::next;
    return warp.wait(Wait::barrier, id, warp.block->barriers[id].generation);
}

Status handlers::bar_arrive(Warp& warp, const Instruction& i, uint32_t mask) {
    arrive(warp, i, mask, Register<int32_t>(warp, i.a).get(first_lane(mask)));
    return Status::next;
}

Status handlers::setmaxnreg(Warp& warp, const Instruction& i, uint32_t) {
    const int limit = static_cast<int>(i.immediate), change = (limit - warp.register_limit) * 32;
    if (i.width ? change < 0 : change > 0) {
        fail("setmaxnreg.%s to %d from %d", i.width ? "inc" : "dec", limit, warp.register_limit);
    }
    if (change > warp.block->register_pool) return warp.wait(Wait::retry);
    warp.block->register_pool -= change;
    warp.register_limit = limit;
    return Status::next;
}

// --- clusters ---

bool Block::is_alive() const {
    return std::any_of(warps.begin(), warps.end(), [](const Warp& warp) { return warp.live; });
}

static void end_generation_if_complete(Cluster& cluster) {
    int live = 0;
    for (const Block* block : cluster.blocks) live += live_threads(*block);
    if (!cluster.arrived || cluster.arrived < live) return;
    cluster.arrived = 0;
    ++cluster.generation;
}

Status handlers::cluster_arrive(Warp& warp, const Instruction&, uint32_t) {
    Cluster& cluster = *warp.block->cluster;
    if (warp.is_at_cluster_barrier) fail("the warp has arrived and not waited");
    warp.is_at_cluster_barrier = true;
    warp.cluster_generation = cluster.generation;
    cluster.arrived += 32;
    end_generation_if_complete(cluster);
    return Status::next;
}

Status handlers::cluster_wait(Warp& warp, const Instruction&, uint32_t) {
    if (!warp.is_at_cluster_barrier) fail("the warp has not arrived");
    if (warp.cluster_generation == warp.block->cluster->generation) return warp.wait(Wait::retry);
    warp.is_at_cluster_barrier = false;
    return Status::next;
}

static void leave_cluster(Warp& warp) {
    Cluster& cluster = *warp.block->cluster;
    if (warp.is_at_cluster_barrier && warp.cluster_generation == cluster.generation) cluster.arrived -= 32;
    end_generation_if_complete(cluster);
}

Status handlers::wait_for_previous(Warp& warp, const Instruction&, uint32_t) {
    warp.block->has_waited_for_previous = true;
    return Status::next;
}

// --- warps ---

static const Warp* failing_warp = nullptr;   // what runs, for the message of an error
static const Instruction* failing_instruction = nullptr;

// Whether the block has advanced by an instruction. A loop that waits for memory or for an mbarrier has none of these; for
// atomics and try_wait, their handlers say it.
static bool is_advance(const Instruction& i) {
    switch (i.kind) {
        case Kind::tensor:
        case Kind::shared_store:
        case Kind::global_store:
        case Kind::copy:
            return true;
        case Kind::sync:
            return i.run != handlers::mbarrier_try_wait && i.run != handlers::nothing;
        default:
            return false;
    }
}

// The split that runs next: the lowest, and one that waits for an mbarrier after the others; -1: none can run.
static int choose_split(Warp& warp) {
    int lowest = -1, lowest_ready = -1;
    for (int n = 0; n < static_cast<int>(warp.splits.size()); ++n) {
        Split& split = warp.splits[static_cast<size_t>(n)];
        if (split.wait.reason == Wait::lanes) continue;
        if (split.wait.reason == Wait::barrier) {
            if (warp.block->barriers[split.wait.barrier_id].generation == split.wait.generation) continue;
            split.wait = {};
            ++split.pc;
        }
        const auto is_lower = [&](int than) {
            return than < 0 || split.pc < warp.splits[static_cast<size_t>(than)].pc;
        };
        if (is_lower(lowest)) lowest = n;
        if (split.wait.reason == Wait::none && is_lower(lowest_ready)) lowest_ready = n;
    }
    const bool is_retry = lowest >= 0 && warp.splits[static_cast<size_t>(lowest)].wait.reason == Wait::retry;
    return is_retry && lowest_ready >= 0 ? lowest_ready : lowest;
}

// Takes a split out of the list, with the others at the same place.
static Split take_split(Warp& warp, int which) {
    Split taken = warp.splits[static_cast<size_t>(which)];
    warp.splits.erase(warp.splits.begin() + which);
    std::erase_if(warp.splits, [&](const Split& other) {
        if (other.pc != taken.pc || other.wait.reason == Wait::barrier) return false;
        taken.mask |= other.mask;
        return true;
    });
    return taken;
}

// The lanes of a mask that run an instruction with a membermask now: those with one value of it, if all that it names are
// there or have left. 0: they all wait.
uint32_t Warp::complete_group(const Instruction& i, uint32_t mask) {
    const Register<uint32_t> members(*this, i.members);
    for (uint32_t left = mask; left;) {
        const uint32_t named = members.get(first_lane(left));
        uint32_t group = 0;
        for_lanes(left, [&](int l) { group |= uint32_t{members.get(l) == named} << l; });
        if (group & ~named) fail("lane %d is not in its membermask 0x%08x", first_lane(group & ~named), named);
        if (!(named & live & ~group)) return group;
        left &= ~group;
    }
    return 0;
}

bool Warp::run(int instructions) {
    bool has_run = false;
    while (instructions > 0 && !splits.empty()) {
        const int chosen = choose_split(*this);
        if (chosen < 0) break;
        Split now = take_split(*this, chosen);
        bool is_retry = now.wait.reason == Wait::retry;
        now.wait = {};
        int join = std::numeric_limits<int>::max();   // where others wait
        for (const Split& other : splits) {
            if (other.pc > now.pc) join = std::min(join, other.pc);
        }
        for (pc = now.pc;;) {
            const Instruction& i = kernel->code[static_cast<size_t>(pc)];
            uint32_t mask = now.mask;
            if (i.guard >= 0) mask &= i.is_guard_inverted ? ~predicate(i.guard) : predicate(i.guard);
            failing_warp = this;
            failing_instruction = &i;
            if (i.is_aligned && now.mask != live) {
                splits.push_back({pc, now.mask, {Wait::lanes}});
                break;
            }
            // Undefined if a lane has left.
            const bool needs_warp = i.kind == Kind::tensor || i.kind == Kind::ldmatrix;
            if (i.is_aligned && (mask != now.mask || (needs_warp && live != kAllLanes))) {
                fail("an aligned instruction without all lanes: 0x%08x", mask);
            }
            if (i.members >= 0 && mask) {
                const uint32_t group = complete_group(i, mask);
                if (group != mask) {
                    splits.push_back({pc, mask & ~group, {group ? Wait::none : Wait::lanes}});
                    now.mask &= ~mask | group;
                    mask = group;
                    join = pc;
                }
                if (!now.mask) break;
            }
            if (!busy.empty()) check_products(i);
            if (!touched.empty()) note_accesses(i);
            const Status status = mask ? i.run(*this, i, mask) : Status::next;
            Counter& counter = kernel->counters[static_cast<size_t>(pc)];
            if (!is_retry) ++counter.runs;
            if (status == Status::block) {
                has_run |= next.wait.reason == Wait::barrier;
                splits.push_back({pc, now.mask, next.wait});
                if (splits.size() == 1) return has_run;
                instructions -= 40;   // the others of the warp come sooner
                break;
            }
            if (!is_retry) counter.lanes += static_cast<uint64_t>(__builtin_popcount(mask));
            is_retry = false;
            has_run = true;
            block->has_advanced |= is_advance(i);
            --instructions;
            const Split rest{pc + 1, now.mask & ~mask, {}};
            if (status == Status::next) {
                ++pc;
                if (pc < join && instructions > 0) continue;
                splits.push_back({pc, now.mask, {}});
            } else if (status == Status::exit) {
                live &= ~mask;
                for (Split& other : splits) {
                    if (other.wait.reason == Wait::lanes) other.wait = {};
                }
                if (rest.mask) splits.push_back(rest);
                if (!live) finish();
            } else {
                if (!rest.mask && splits.empty() && instructions > 0) {
                    pc = next.pc;
                    continue;
                }
                if (rest.mask) splits.push_back(rest);
                if (mask) splits.push_back({next.pc, mask, {}});
            }
            break;
        }
    }
    return has_run;
}

void Warp::finish() {
    if (!copies.empty()) fail("leaves with cp.async in flight");
    if (!products.empty()) fail("leaves with wgmma in flight");
    finish_stores(*this);
    release_barriers(*block);
    leave_cluster(*this);
    block->has_advanced = true;
}

// --- blocks ---

static std::string name_of(const Block& block) {
    const Dim& at = block.index;
    return "block " + std::to_string(at.x) + " " + std::to_string(at.y) + " " + std::to_string(at.z);
}

static std::string places_of(const Block& block) {
    static const char* const kReasons[] = {"runs", "waits for other lanes", "waits at a barrier", "waits"};
    const Dim& grid = block.grid;
    const std::string prefix = grid.x * grid.y * grid.z == 1 ? "" : name_of(block) + ", ";
    std::string text;
    for (const Warp& warp : block.warps) {
        for (const Split& split : warp.splits) {
            const Instruction& i = warp.kernel->code[static_cast<size_t>(split.pc)];
            char start[80];
            snprintf(start, sizeof start, "warp %d, lanes 0x%08x: %s at ", warp.id, split.mask,
                     kReasons[split.wait.reason]);
            text += "\n  " + prefix + start + warp.kernel->place_of(i) + ": " + warp.kernel->text_of(i);
        }
    }
    return text;
}

[[noreturn]] static void fail_with_places(const std::vector<Block*>& blocks, uint64_t not_started) {
    constexpr size_t kNamed = 4;
    std::string text = "deadlock:";
    for (size_t n = 0; n < std::min(blocks.size(), kNamed); ++n) text += places_of(*blocks[n]);
    if (blocks.size() > kNamed) text += "\n  " + std::to_string(blocks.size() - kNamed) + " more blocks wait";
    if (not_started) text += "\n  " + std::to_string(not_started) + " blocks have not started";
    fail("%s", text.c_str());
}

// Runs the block until all of its warps have left, or another one shall run. Returns whether it has advanced.
static bool run_block(Block& block, bool is_side_by_side) {
    const size_t count = block.warps.size();
    bool has_advanced = false;
    for (uint64_t rounds = 0;; ++rounds) {
        bool has_run = false, is_alive = false;
        const size_t first = block.next_random() % count;
        for (size_t n = 0; n < count; ++n) {
            Warp& warp = block.warps[(first + n) % count];
            if (warp.splits.empty()) continue;
            is_alive = true;
            has_run |= warp.run(1 + static_cast<int>(block.next_random() % 400));
            failing_warp = nullptr;   // what fails from here on is no instruction of this warp
            if (!block.loads.empty() && block.next_random() % 16 == 0) land_load(block);
        }
        if (!is_alive) break;
        const bool waits = block.waits_for_others || block.cluster->blocks.size() > 1;
        if (!has_run && !block.has_advanced) {
            if (!block.loads.empty()) {
                land_load(block);
            } else if (!waits) {
                fail_with_places({&block}, 0);
            }
        }
        const bool is_stuck = !std::exchange(block.has_advanced, false);
        block.waits_for_others = false;
        has_advanced |= !is_stuck;
        if (waits && (is_stuck || (is_side_by_side && block.next_random() % 8 == 0))) return has_advanced;
        if (!is_stuck) rounds = 0;
        if (rounds > kPatience) fail_with_places({&block}, 0);
    }
    if (!block.loads.empty()) fail("leaves with tensor loads in flight");
    finish_products(block);
    return true;
}

// The value of a special register in one thread of the block.
static uint32_t special_value(const Block& block, const std::string& name, unsigned thread) {
    const Dim& size = block.size;
    const auto coordinate = [&](const Dim& dim) {
        return name.back() == 'x' ? dim.x : name.back() == 'y' ? dim.y : dim.z;
    };
    const std::string base = name.substr(0, name.find('.'));
    if (base == "%tid") return coordinate({thread % size.x, thread / size.x % size.y, thread / size.x / size.y});
    if (base == "%ntid") return coordinate(size);
    if (base == "%ctaid") return coordinate(block.index);
    if (base == "%nctaid") return coordinate(block.grid);
    if (base == "%laneid") return thread % 32;
    if (base == "%warpid") return thread / 32;
    if (base == "%cluster_ctarank") return block.rank;
    if (base == "dynamic shared memory") return block.dynamic_start;
    fail("special register %s", name.c_str());
}

static void set_specials(Warp& warp) {
    for (const Kernel::Special& special : warp.kernel->specials) {
        for (unsigned l = 0; l < 32; ++l) {
            const unsigned thread = static_cast<unsigned>(warp.id) * 32 + l;
            if (special.name == "parameters") {
                const auto base = reinterpret_cast<uint64_t>(warp.block->parameters);
                Register<uint64_t>(warp, special.offset).set(static_cast<int>(l), base);
            } else {
                Register<uint32_t>(warp, special.offset)
                    .set(static_cast<int>(l), special_value(*warp.block, special.name, thread));
            }
        }
    }
}

static void set_constants(Warp& warp) {
    for (const Kernel::Constant& constant : warp.kernel->constants) {
        if (constant.bits == 1) warp.predicate(constant.offset) = static_cast<uint32_t>(constant.value);
        for (int l = 0; l < 32 && constant.bits > 1; ++l) {
            if (constant.bits == 64) {
                Register<uint64_t>(warp, constant.offset).set(l, constant.value);
            } else {
                Register<uint32_t>(warp, constant.offset).set(l, static_cast<uint32_t>(constant.value));
            }
        }
    }
}

static void check_launch(const Kernel& kernel, Dim grid, uint64_t threads, unsigned cluster) {
    if (threads == 0 || threads > 1024) fail("%lu threads in a block", threads);
    if (kernel.max_threads && threads > static_cast<uint64_t>(kernel.max_threads)) {
        fail("%lu threads; the kernel takes %d", threads, kernel.max_threads);
    }
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) {
        fail("a grid of %u x %u x %u", grid.x, grid.y, grid.z);
    }
    if (cluster == 0 || cluster > kMaxCluster || grid.x % cluster) {
        fail("clusters of %u blocks in a grid of width %u", cluster, grid.x);
    }
    if (kernel.parameter_bytes > kParameterLimit) fail("%d bytes of parameters", kernel.parameter_bytes);
}

// Bytes with an alignment.
class Memory {
  public:
    Memory(size_t bytes, size_t align, uint8_t fill) : bytes_(bytes + align, fill) {
        data_ = bytes_.data() + (align - reinterpret_cast<uintptr_t>(bytes_.data()) % align) % align;
    }
    uint8_t* data() { return data_; }

  private:
    std::vector<uint8_t> bytes_;
    uint8_t* data_;
};

static void start_block(Block& block, Kernel& kernel, uint8_t* registers, unsigned threads) {
    const int blocks = std::max(1, kernel.min_blocks);
    const int limit = std::min(255, kRegistersOfAMultiprocessor / static_cast<int>(threads) / blocks) / 8 * 8;
    memset(block.shared, 0xFF, block.shared_end);
    block.writers.assign(block.shared_end / 16 + 1, {});
    std::fill_n(block.barriers, 16, Block::Barrier{});
    block.loads.clear();
    block.has_advanced = block.waits_for_others = block.has_waited_for_previous = false;
    block.register_pool = kRegistersOfAMultiprocessor - static_cast<int>(threads) * limit;
    block.warps.assign((threads + 31) / 32, {});
    for (size_t n = 0; n < block.warps.size(); ++n) {
        Warp& warp = block.warps[n];
        const bool is_partial = n + 1 == block.warps.size() && threads % 32;
        warp.registers = registers + n * static_cast<size_t>(kernel.register_bytes);
        warp.block = &block;
        warp.kernel = &kernel;
        warp.id = static_cast<int>(n);
        warp.live = is_partial ? (1u << threads % 32) - 1 : kAllLanes;
        warp.register_limit = limit;
        warp.splits = {{0, warp.live, {}}};
        if (kernel.has_wgmma) warp.touched.assign(static_cast<size_t>(kernel.register_bytes) / 128 + 1, 0);
        set_specials(warp);
        set_constants(warp);
    }
}

// What a block runs in.
struct Room {
    Memory shared, registers;
    Block block;
    Cluster cluster;   // of the block, where that is the first of one
};

// The blocks of a launch: one after another, or side by side once one has waited for others.
class Blocks {
  public:
    Blocks(Kernel& kernel, const Block& model, unsigned threads, const Options& options)
        : kernel_(kernel), model_(model), threads_(threads), options_(options) {
        const uint64_t seed = schedule().seed;
        random_ = seed * 0x9E3779B97F4A7C15 + 88172645463325252;
        is_backwards_ = seed % 4 == 2;
        total_ = uint64_t{model.grid.x} * model.grid.y * model.grid.z;
    }

    void run() {
        uint64_t turns = 0;   // without advance
        while (count_ < total_ || !started_.empty()) {
            const bool can_start = count_ < total_ && started_.size() + options_.cluster <= kMostBlocks;
            running_ = nullptr;
            if (!can_start && turns > kPatience + 100 * started_.size()) fail_with_places(started_, total_ - count_);
            const size_t chosen = started_.empty() ? 0 : next_random() % (started_.size() + can_start);
            if (chosen == started_.size()) start();
            running_ = started_[chosen];
            const bool has_advanced = run_block(*running_, is_side_by_side_);
            turns = has_advanced ? 0 : turns + 1;
            if (!running_->is_alive()) finish(running_);
            is_side_by_side_ |= !started_.empty();
        }
        running_ = nullptr;
    }

    const Block* running() const { return running_; }   // for the message of an error

  private:
    Kernel& kernel_;
    const Block& model_;
    unsigned threads_;
    Options options_;
    uint64_t random_, total_, count_ = 0;   // count: of blocks that have started
    bool is_backwards_, is_side_by_side_ = false;
    Block* running_ = nullptr;
    std::vector<Block*> started_;   // and have not left
    std::vector<std::unique_ptr<Room>> rooms_, free_;

    uint64_t next_random() {
        random_ ^= random_ << 13;
        random_ ^= random_ >> 7;
        random_ ^= random_ << 17;
        return random_ >> 11;
    }

    void start() {   // a cluster
        const uint64_t size = options_.cluster, first = is_backwards_ ? total_ - size - count_ : count_;
        Cluster* cluster = nullptr;
        for (uint64_t n = 0; n < size; ++n) {
            Room& room = take_room();
            if (!cluster) {
                cluster = &room.cluster;
                *cluster = {};
            }
            room.block.cluster = cluster;
            room.block.rank = static_cast<uint32_t>(n);
            start_block(room, first + n);
            cluster->blocks.push_back(&room.block);
            started_.push_back(&room.block);
        }
        count_ += size;
    }

    Room& take_room() {
        if (free_.empty()) {
            const size_t bytes = (threads_ + 31) / 32 * static_cast<size_t>(kernel_.register_bytes);
            free_.emplace_back(new Room{{model_.shared_end, 1024, 0xFF}, {bytes, 64, 0xFF}, model_, {}});
        }
        rooms_.push_back(std::move(free_.back()));
        free_.pop_back();
        return *rooms_.back();
    }

    void start_block(Room& room, uint64_t number) {
        Block& block = room.block;
        const Dim& grid = block.grid;
        block.number = number;
        block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                       static_cast<unsigned>(number / grid.x / grid.y)};
        block.random = random_;
        next_random();
        block.shared = room.shared.data();
        ptx::start_block(block, kernel_, room.registers.data(), threads_);
    }

    void finish(const Block* block) {
        if (options_.overlaps_previous && !block->has_waited_for_previous) {
            fail("never waits for the previous grid, which the launch overlaps");
        }
        std::erase(started_, block);
        const Cluster* cluster = block->cluster;   // its shared memory remains until all of it has left
        const auto is_alive = [](const Block* other) { return other->is_alive(); };
        if (std::any_of(cluster->blocks.begin(), cluster->blocks.end(), is_alive)) return;
        for (size_t n = rooms_.size(); n-- > 0;) {
            if (rooms_[n]->block.cluster != cluster) continue;
            free_.push_back(std::move(rooms_[n]));
            rooms_.erase(rooms_.begin() + static_cast<ptrdiff_t>(n));
        }
    }
};

void write_costs(const Kernel& kernel, Dim grid, unsigned threads, size_t shared_bytes);   // costs.cpp

void launch(Kernel& kernel, Dim grid, Dim size, void** arguments, size_t shared_bytes, const Options& options) {
    const unsigned threads = size.x * size.y * size.z;
    check_launch(kernel, grid, uint64_t{size.x} * size.y * size.z, options.cluster);
    std::fill(kernel.counters.begin(), kernel.counters.end(), Counter{});
    Grid shared_state;
    shared_state.is_watched = kernel.waits_for_blocks;
    Block model{};
    model.launch = &shared_state;
    model.grid = grid;
    model.size = size;
    model.dynamic_start = kSharedStart + static_cast<uint32_t>(round_up(kernel.static_shared, 16)) +
                          schedule().misalignment % 1024;
    model.shared_end = model.dynamic_start + static_cast<uint32_t>(shared_bytes);
    Memory parameters(static_cast<size_t>(kernel.parameter_bytes) + 64, 64, 0);   // a tensor map is read to its end
    model.parameters = parameters.data();
    for (size_t n = 0; n < kernel.parameters.size(); ++n) {
        const Kernel::Parameter& one = kernel.parameters[n];
        memcpy(model.parameters + one.offset, arguments[n], static_cast<size_t>(one.bytes));
    }
    const auto start = reinterpret_cast<uint64_t>(model.parameters);
    set_parameter_region({start, start + static_cast<uint64_t>(kernel.parameter_bytes) + 64});
    Blocks blocks(kernel, model, threads, options);
    failing_warp = nullptr;
    try {
        blocks.run();
        finish_late_stores(shared_state);
    } catch (const std::exception& error) {
        if (!blocks.running()) fail("%s", error.what());
        const std::string name = name_of(*blocks.running());
        if (!failing_warp) fail("%s: %s", name.c_str(), error.what());
        fail("%s, warp %d, %s: %s: %s", name.c_str(), failing_warp->id, kernel.place_of(*failing_instruction).c_str(),
             kernel.text_of(*failing_instruction).c_str(), error.what());
    }
    if (are_costs_counted()) write_costs(kernel, grid, threads, shared_bytes);
}

}   // namespace ptx
