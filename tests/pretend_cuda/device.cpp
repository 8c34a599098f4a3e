// A CUDA device for a CPU-only torch, in tests: memory, streams, the hooks and guard through which ATen asks for them.
//
// Its memory is host memory with addresses of its own. A memory file is mapped twice: as the device range, in which
// tensors' data_ptr() lie and which nobody may touch (host code that follows a device address dies, as with a GPU), and
// as the host range, in which torch's CPU kernels work when they stand in for CUDA's (fallback.cpp). While one of the
// project's kernels runs (launches.cpp), the device range is open.
//
// Kernels run at once. What a program could see of their delay is kept back: a copy to pinned memory lands, and one from
// it is compared with what has become of its source, only when somebody waits for the stream.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "torch_device.h"

namespace pretend {
namespace {

constexpr int kMostDevices = 8;

// Read at every use: a child of a process that has loaded this may have other variables.
int64_t setting(const char* name, int64_t otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? std::atoll(text) : otherwise;
}

[[noreturn]] void die(const std::string& what) {
    std::fprintf(stderr, "pretend CUDA: %s\n", what.c_str());
    std::abort();
}

// --- memory ---

constexpr size_t kReserved = size_t{32} << 30, kGranule = 512, kRedZone = 512, kQuarantine = size_t{8} << 20;
constexpr unsigned char kPoison = 0xFF, kRed = 0xA5;   // NaN in every floating type; -1

bool all_are(const char* bytes, size_t count, unsigned char value) {
    return count == 0 || (static_cast<unsigned char>(bytes[0]) == value && !std::memcmp(bytes, bytes + 1, count - 1));
}

class Arena {
  public:
    static Arena& get() {
        static Arena* arena = new Arena;
        return *arena;
    }

    void* allocate(size_t bytes, int device) {
        if (bytes == 0) return nullptr;
        const std::lock_guard lock(mutex_);
        if (std::exchange(unused_, false) && !setting("PRETEND_CUDA_STRICT", 1)) {
            ++opened_;
            mprotect(device_, kReserved, PROT_READ | PROT_WRITE);
        }
        const size_t used = (bytes + kGranule - 1) / kGranule * kGranule, size = used + 2 * kRedZone;
        Statistics& s = statistics_[device];
        auto chosen = s.current + static_cast<int64_t>(used) > total_memory() ? free_.end() : best_fit(size);
        TORCH_CHECK_WITH(OutOfMemoryError, chosen != free_.end(), "CUDA out of memory. Tried to allocate ", bytes,
                         " bytes. GPU ", device, " has a total capacity of ", total_memory(), " bytes of which ",
                         total_memory() - s.current, " bytes is free.");
        const auto [offset, room] = *chosen;
        free_.erase(chosen);
        if (room > size) free_[offset + size] = room - size;
        live_[offset] = {bytes, size, device, graph_};
        std::memset(host_ + offset, kRed, size);
        std::memset(host_ + offset + kRedZone, kPoison, bytes);
        s.current += static_cast<int64_t>(used);
        s.peak = std::max(s.peak, s.current);
        ++s.allocations;
        return device_ + offset + kRedZone;
    }

    void free(void* pointer) {
        if (!pointer) return;
        const std::lock_guard lock(mutex_);
        const size_t offset = static_cast<char*>(pointer) - device_ - kRedZone;
        const auto it = live_.find(offset);
        if (it == live_.end() && forked_) return;   // its parent's
        if (it == live_.end()) die("free of what is not allocated");
        if (const auto graph = graphs_.find(it->second.graph); graph != graphs_.end()) {
            graph->second.insert(offset);   // a replay still uses it
        } else {
            release(it);
        }
    }

    char* device(size_t offset) const { return device_ + offset; }
    bool owns(const void* p) const { return p >= device_ && p < device_ + kReserved; }
    void* host(const void* p) const { return p ? host_ + (static_cast<const char*>(p) - device_) : nullptr; }

    int device_of(const void* p) {
        const std::lock_guard lock(mutex_);
        const size_t offset = static_cast<const char*>(p) - device_;
        auto it = live_.upper_bound(offset);
        if (it == live_.begin()) return -1;
        const auto& [start, block] = *--it;
        const bool inside = offset >= start + kRedZone && offset <= start + kRedZone + block.bytes;
        return inside && !is_freed(start, block) ? block.device : -1;
    }

    void check_all(bool freed) {
        const std::lock_guard lock(mutex_);
        for (const auto& [offset, block] : live_) {
            if (const std::string found = check(offset, block); !found.empty()) throw std::runtime_error(found);
        }
        if (!freed) return;
        for (const auto& [offset, size] : quarantine_) {
            if (!all_are(host_ + offset, size, kPoison)) {
                std::memset(host_ + offset, kPoison, size);
                throw std::runtime_error("a write to memory that was freed");
            }
        }
    }

    void open() {
        const std::lock_guard lock(mutex_);
        if (opened_++ == 0) mprotect(device_, kReserved, PROT_READ | PROT_WRITE);
    }
    void close() {
        const std::lock_guard lock(mutex_);
        if (--opened_ == 0) mprotect(device_, kReserved, PROT_NONE);
    }

    Statistics& statistics(int device) { return statistics_[device]; }

    // --- what a capture does to memory: in the end all is as before, but for what was allocated meanwhile ---

    void begin(int64_t graph) {
        const std::lock_guard lock(mutex_);
        graph_ = graph;
        graphs_[graph];
        for (const auto& [offset, block] : live_) {
            saved_[offset].assign(host_ + offset, host_ + offset + block.size);
        }
    }
    void end() {
        const std::lock_guard lock(mutex_);
        for (const auto& [offset, block] : live_) {
            if (block.graph == graph_) {
                std::memset(host_ + offset + kRedZone, kPoison, block.bytes);
            } else if (const auto it = saved_.find(offset); it != saved_.end()) {
                std::memcpy(host_ + offset, it->second.data(), it->second.size());
            }
        }
        saved_.clear();
        graph_ = 0;
    }
    void forget(int64_t graph) {
        const std::lock_guard lock(mutex_);
        for (const size_t offset : graphs_[graph]) release(live_.find(offset));
        graphs_.erase(graph);
    }

  private:
    struct Block {
        size_t bytes, size;
        int device;
        int64_t graph;   // in whose capture it was allocated, or 0
    };

    Arena() {
        host_ = device_ = nullptr;
        map();
        // A forked child must not share the memory. As with CUDA, it finds nothing of its parent's in there.
        pthread_atfork(nullptr, nullptr, [] {
            get().map();
            get().forked_ = true;
        });
    }

    void map() {
        const int file = memfd_create("pretend_cuda", 0);
        if (file < 0 || ftruncate(file, kReserved)) die("no memory file");
        const auto range = [&](char* at, int protection) {
            void* p = mmap(at, kReserved, protection, MAP_SHARED | MAP_NORESERVE | (at ? MAP_FIXED : 0), file, 0);
            if (p == MAP_FAILED) die("no room to map");
            return static_cast<char*>(p);
        };
        host_ = range(host_, PROT_READ | PROT_WRITE);
        device_ = range(device_, PROT_NONE);
        ::close(file);
        free_ = {{0, kReserved}};
        live_.clear();
        quarantine_.clear();
        quarantined_ = 0;
        statistics_ = {};
        unused_ = true;
        opened_ = 0;
    }

    std::map<size_t, size_t>::iterator best_fit(size_t size) {
        auto chosen = free_.end();
        for (auto it = free_.begin(); it != free_.end(); ++it) {
            if (it->second >= size && (chosen == free_.end() || it->second < chosen->second)) chosen = it;
        }
        return chosen;
    }

    bool is_freed(size_t offset, const Block& block) const {
        const auto graph = graphs_.find(block.graph);
        return graph != graphs_.end() && block.graph != graph_ && graph->second.count(offset);
    }

    void release(std::map<size_t, Block>::iterator it) {
        const auto [offset, block] = *it;
        if (const std::string found = check(offset, block); !found.empty()) die(found);
        std::memset(host_ + offset, kPoison, block.size);
        statistics_[block.device].current -= static_cast<int64_t>(block.size - 2 * kRedZone);
        live_.erase(it);
        quarantine_.emplace_back(offset, block.size);   // what still points there finds NaN for a while
        quarantined_ += block.size;
        while (quarantined_ > kQuarantine) {
            const auto [start, size] = quarantine_.front();
            quarantine_.pop_front();
            quarantined_ -= size;
            if (!all_are(host_ + start, size, kPoison)) die("a write to memory that was freed");
            give_back(start, size);
        }
    }

    void give_back(size_t offset, size_t size) {
        auto place = free_.emplace(offset, size).first;
        const auto next = std::next(place);
        if (next != free_.end() && place->first + place->second == next->first) {
            place->second += next->second;
            free_.erase(next);
        }
        if (place == free_.begin()) return;
        const auto before = std::prev(place);
        if (before->first + before->second == place->first) {
            before->second += place->second;
            free_.erase(place);
        }
    }

    // What is wrong with the red zones of a block, or "". They are repaired.
    std::string check(size_t offset, const Block& block) {
        char *start = host_ + offset, *end = start + kRedZone + block.bytes;
        const size_t behind = block.size - kRedZone - block.bytes;
        const char* side = !all_are(start, kRedZone, kRed) ? "before the start" : "behind the end";
        if (all_are(start, kRedZone, kRed) && all_are(end, behind, kRed)) return "";
        std::memset(start, kRed, kRedZone);
        std::memset(end, kRed, behind);
        return std::string("a write ") + side + " of an allocation of " + std::to_string(block.bytes) + " bytes";
    }

    std::mutex mutex_;
    char *host_, *device_;
    bool unused_ = true, forked_ = false;
    int opened_ = 0;
    std::map<size_t, size_t> free_;
    std::map<size_t, Block> live_;
    std::deque<std::pair<size_t, size_t>> quarantine_;
    size_t quarantined_ = 0;
    std::array<Statistics, kMostDevices> statistics_;
    int64_t graph_ = 0;                            // that is being captured, or 0
    std::map<int64_t, std::set<size_t>> graphs_;   // what was freed of each one's memory
    std::map<size_t, std::vector<char>> saved_;
};

struct DeviceAllocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        const int device = current_device();
        void* p = Arena::get().allocate(bytes, device);
        return {p, p, &release, c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device))};
    }
    static void release(void* p) { Arena::get().free(p); }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* target, const void* source, size_t bytes) const override {
        std::memcpy(host(target), host(source), bytes);
    }
};
DeviceAllocator the_allocator;
REGISTER_ALLOCATOR(c10::kCUDA, &the_allocator)

// Pinned memory is host memory that is remembered.
struct PinnedAllocator final : c10::Allocator {
    std::map<const char*, size_t> known;
    std::mutex mutex;

    static PinnedAllocator& get() {
        static auto* allocator = new PinnedAllocator;
        return *allocator;
    }
    c10::DataPtr allocate(size_t bytes) override {
        void* p = nullptr;
        if (posix_memalign(&p, 64, std::max<size_t>(bytes, 1))) throw std::bad_alloc();
        const std::lock_guard lock(mutex);
        known[static_cast<char*>(p)] = bytes;
        return {p, p, &release, c10::Device(c10::kCPU)};
    }
    static void release(void* p) {
        const std::lock_guard lock(get().mutex);
        get().known.erase(static_cast<char*>(p));
        std::free(p);
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* target, const void* source, size_t bytes) const override {
        std::memcpy(target, source, bytes);
    }
};

}   // namespace

int device_count() { return static_cast<int>(std::min<int64_t>(setting("PRETEND_CUDA_DEVICES", 1), kMostDevices)); }
int64_t total_memory() { return setting("PRETEND_CUDA_MEMORY", int64_t{8} << 30); }
Capability capability() {
    const int64_t both = setting("PRETEND_CUDA_CAPABILITY", 90);
    return {static_cast<int>(both / 10), static_cast<int>(both % 10)};
}
// "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming Guide.
uint32_t shared_limit() {
    const auto [major, minor] = capability();
    const bool small = major == 12 || (major == 8 && (minor == 6 || minor == 9));
    return (major == 7 ? (minor == 5 ? 64 : 96) : small ? 99 : major == 8 ? 163 : 227) * 1024;
}
int multiprocessors() { return static_cast<int>(setting("PRETEND_CUDA_MULTIPROCESSORS", 4)); }

bool owns(const void* pointer) { return Arena::get().owns(pointer); }
int device_of(const void* pointer) { return Arena::get().device_of(pointer); }
void* host(const void* pointer) { return Arena::get().host(pointer); }
void check_memory(bool freed) { Arena::get().check_all(freed); }
Open::Open() { Arena::get().open(); }
Open::~Open() { Arena::get().close(); }
Statistics& statistics(int device) { return Arena::get().statistics(device); }
c10::Allocator* device_allocator() { return &the_allocator; }
bool is_pinned(const void* p) {
    auto& pinned = PinnedAllocator::get();
    const std::lock_guard lock(pinned.mutex);
    const auto it = pinned.known.upper_bound(static_cast<const char*>(p));
    return it != pinned.known.begin() && static_cast<const char*>(p) < std::prev(it)->first + std::prev(it)->second;
}

// --- streams ---

namespace {

thread_local int the_device = 0;
thread_local std::array<int64_t, kMostDevices> the_streams = {};
std::atomic<int64_t> next_stream{1};

struct Event {
    Place place;
    int64_t after;   // the number of the newest work when it was recorded
    int64_t nanoseconds;
    int64_t graph;   // in whose capture it was recorded, or 0
};

struct Work {
    Place place;
    int64_t number;
    std::function<void()> finish;   // null: it sleeps, or waits for `event`
    std::shared_ptr<const Event> event;
};

std::mutex work_mutex;
std::deque<Work> work;
int64_t newest_work = 0;

void add_work(Place place, std::function<void()> finish, std::shared_ptr<const Event> event = nullptr) {
    const std::lock_guard lock(work_mutex);
    work.push_back({place, ++newest_work, std::move(finish), std::move(event)});
}

void finish_work(Place place, int64_t upto) {
    for (;;) {
        Work next;
        {
            const std::lock_guard lock(work_mutex);
            const auto it = std::find_if(work.begin(), work.end(), [&](const Work& w) { return w.place == place; });
            if (it == work.end() || it->number > upto) return;
            next = std::move(*it);
            work.erase(it);
        }
        if (next.finish) next.finish();
        if (next.event) finish_work(next.event->place, next.event->after);
    }
}

bool asleep(Place place, int64_t upto) {
    std::vector<Work> before;
    {
        const std::lock_guard lock(work_mutex);
        for (const Work& w : work) {
            if (w.place == place && w.number <= upto) before.push_back(w);
        }
    }
    return std::any_of(before.begin(), before.end(),
                       [](const Work& w) { return w.event ? asleep(w.event->place, w.event->after) : !w.finish; });
}

int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

std::mutex calls_mutex;
std::map<std::string, int64_t> calls;
bool counting = false;
int sync_debug_mode = 0;   // 2: an error

// --- graphs ---

struct Graph {
    std::vector<std::function<void()>> nodes;
    std::set<Place> places;
    bool failed = false;
};
std::map<int64_t, Graph> graphs;
int64_t captured = 0, newest_graph = 0;   // captured: the number of the graph that is being captured, or 0

void refuse_in_capture() {
    if (!captured) return;
    graphs[captured].failed = true;
    throw std::runtime_error("CUDA error: operation not permitted when stream is capturing");
}

}   // namespace

int current_device() { return the_device; }
void set_device(int device) {
    TORCH_CHECK(device >= 0 && device < device_count(), "CUDA error: invalid device ordinal ", device);
    the_device = device;
}
Place current_place(int device) { return {device, the_streams[device]}; }
Place current_place() { return current_place(the_device); }
void set_stream(Place place) { the_streams[place.device] = place.stream; }
Place new_stream(int device) { return {device, next_stream++}; }
void* native_stream(Place place) {   // looks like no address
    return reinterpret_cast<void*>(uintptr_t{0xC0DA0000} + 0x1000 * place.device +
                                   static_cast<uintptr_t>(place.stream));
}

void enqueue(Place place, std::function<void()> finish) { add_work(place, std::move(finish)); }
void sleep(Place place) { add_work(place, nullptr); }
void synchronize_device(int device) {
    refuse_in_capture();
    count("sync device.synchronize");
    for (;;) {
        Place place{-1, 0};
        {
            const std::lock_guard lock(work_mutex);
            for (const Work& w : work) {
                if (w.place.device == device) place = w.place;
            }
        }
        if (place.device < 0) return;
        finish_work(place, newest_work);
    }
}

void set_sync_debug_mode(int mode) { sync_debug_mode = mode; }
int get_sync_debug_mode() { return sync_debug_mode; }
void count(const std::string& name) {
    if (!counting) return;
    const std::lock_guard lock(calls_mutex);
    ++calls[name];
}
std::map<std::string, int64_t> counted() {
    const std::lock_guard lock(calls_mutex);
    return calls;
}
void set_counting(bool on) {
    const std::lock_guard lock(calls_mutex);
    calls.clear();
    counting = on;
}
void wait(Place place, const std::string& what) {
    refuse_in_capture();
    TORCH_CHECK(sync_debug_mode != 2, "called a synchronizing CUDA operation (", what, ")");
    count("sync " + what);
    finish_work(place, newest_work);
}

void begin_capture() {
    TORCH_CHECK(!captured, "a CUDA graph is being captured already");
    captured = ++newest_graph;
    graphs[captured].places = {current_place()};
    Arena::get().begin(captured);
}
int64_t end_capture() {
    const int64_t graph = std::exchange(captured, 0);
    TORCH_CHECK(graph, "no CUDA graph is being captured");
    Arena::get().end();
    if (graphs[graph].failed) {
        free_graph(graph);
        throw std::runtime_error("CUDA error: operation failed due to a previous error during capture");
    }
    return graph;
}
void replay(int64_t graph) {
    for (const auto& node : graphs.at(graph).nodes) node();
}
void free_graph(int64_t graph) {
    graphs.erase(graph);
    Arena::get().forget(graph);
}
bool capturing(Place place) { return captured && graphs[captured].places.count(place); }
void record(Place place, const std::function<std::function<void()>()>& node) {
    if (!captured) return;
    if (!capturing(place)) {
        graphs[captured].failed = true;
        throw std::runtime_error("CUDA error: work on a stream that does not belong to the capture");
    }
    if (auto recorded = node()) graphs[captured].nodes.push_back(std::move(recorded));
}

// --- what ATen asks for ---

namespace {

Place place_of(const c10::Stream& s) { return {s.device_index(), s.id()}; }
c10::Stream stream_of(Place place) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(place.device)),
                       place.stream);
}
c10::Device cuda(int index) { return {c10::kCUDA, static_cast<c10::DeviceIndex>(index)}; }
int index_of(c10::Device device) { return device.has_index() ? device.index() : the_device; }

struct Guard final : c10::impl::DeviceGuardImplInterface {
    static constexpr c10::DeviceType static_type = c10::kCUDA;
    Guard() = default;
    explicit Guard(c10::DeviceType) {}
    c10::DeviceType type() const override { return c10::kCUDA; }
    c10::Device exchangeDevice(c10::Device d) const override {
        const c10::Device old = getDevice();
        set_device(d.index());
        return old;
    }
    c10::Device getDevice() const override { return cuda(the_device); }
    void setDevice(c10::Device d) const override { set_device(d.index()); }
    void uncheckedSetDevice(c10::Device d) const noexcept override {
        if (d.has_index()) the_device = d.index();
    }
    c10::DeviceIndex deviceCount() const noexcept override {
        return static_cast<c10::DeviceIndex>(pretend::device_count());
    }

    c10::Stream getStream(c10::Device d) const override { return stream_of(current_place(index_of(d))); }
    c10::Stream getDefaultStream(c10::Device d) const override { return stream_of({index_of(d), 0}); }
    c10::Stream getStreamFromGlobalPool(c10::Device d, bool = false) const override { return getNewStream(d); }
    c10::Stream getNewStream(c10::Device d, int = 0) const override { return stream_of(new_stream(index_of(d))); }
    c10::Stream exchangeStream(c10::Stream s) const override {
        const c10::Stream old = getStream(s.device());
        set_stream(place_of(s));
        return old;
    }
    void* getStreamNativeHandle(const c10::Stream s) const override { return native_stream(place_of(s)); }
    bool queryStream(const c10::Stream& s) const override { return !asleep(place_of(s), newest_work); }
    void synchronizeStream(const c10::Stream& s) const override { wait(place_of(s), "stream.synchronize"); }
    void synchronizeDevice(const c10::DeviceIndex device) const override { synchronize_device(device); }

    using Shared = std::shared_ptr<Event>;
    static Event& event_of(void* event) { return **static_cast<Shared*>(event); }
    void record(void** event, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
        if (!*event) *event = new Shared;
        const Place place = place_of(s);
        *static_cast<Shared*>(*event) =
            std::make_shared<Event>(place, newest_work, now(), capturing(place) ? captured : 0);
    }
    void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
        delete static_cast<Shared*>(event);
    }
    void block(void* event, const c10::Stream& s) const override {
        if (!event) return;
        const Place place = place_of(s);
        const Event& e = event_of(event);
        if (captured && e.graph == captured) {
            graphs[captured].places.insert(place);
        } else if (capturing(place)) {
            graphs[captured].failed = true;
            throw std::runtime_error("CUDA error: dependency created on uncaptured work in another stream");
        } else {
            add_work(place, nullptr, *static_cast<Shared*>(event));
        }
    }
    bool queryEvent(void* event) const override {
        if (!event) return true;
        const Event& e = event_of(event);
        if (e.graph && e.graph == captured) refuse_in_capture();
        if (asleep(e.place, e.after)) return false;
        finish_work(e.place, e.after);
        return true;
    }
    void synchronizeEvent(void* event) const override {
        if (!event) return;
        refuse_in_capture();
        count("sync event.synchronize");
        finish_work(event_of(event).place, event_of(event).after);
    }
    double elapsedTime(void* a, void* b, const c10::DeviceIndex) const override {
        return static_cast<double>(event_of(b).nanoseconds - event_of(a).nanoseconds) * 1e-6;
    }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// The CPU's generator under another device.
struct Generator final : c10::GeneratorImpl {
    at::Generator cpu;
    Generator(int index, at::Generator cpu)
        : GeneratorImpl(cuda(index), c10::DispatchKeySet(c10::DispatchKey::CUDA)), cpu(std::move(cpu)) {}
    static c10::DeviceType device_type() { return c10::kCUDA; }
    void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
    void set_offset(uint64_t) override {}
    uint64_t get_offset() const override { return 0; }
    uint64_t current_seed() const override { return cpu.current_seed(); }
    uint64_t seed() override { return cpu.seed(); }
    void set_state(const c10::TensorImpl& state) override {
        auto* same = const_cast<c10::TensorImpl*>(&state);
        cpu.set_state(at::Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(same)));
    }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.get_state().getIntrusivePtr(); }
    GeneratorImpl* clone_impl() const override { return new Generator(device_.index(), cpu.clone()); }
};

at::Generator new_generator(int index) {
    return at::make_generator<Generator>(index < 0 ? the_device : index,
                                         at::detail::createCPUGenerator(c10::default_rng_seed_val));
}

const at::Generator& known_generator(int index) {
    static auto* generators = [] {
        auto* all = new std::vector<at::Generator>;
        for (int i = 0; i < kMostDevices; ++i) all->push_back(new_generator(i));
        return all;
    }();
    return (*generators)[index < 0 ? the_device : index];
}

struct CUDAHooks final : at::CUDAHooksInterface {
    explicit CUDAHooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    const at::Generator& getDefaultGenerator(c10::DeviceIndex i = -1) const override { return known_generator(i); }
    at::Generator getNewGenerator(c10::DeviceIndex i = -1) const override { return new_generator(i); }
    at::Device getDeviceFromPtr(void* p) const override {
        TORCH_CHECK(owns(p), "getDeviceFromPtr: not an address of a pretend device");
        return cuda(device_of(p));
    }
    bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
    at::Allocator* getPinnedMemoryAllocator() const override { return &PinnedAllocator::get(); }
    at::Allocator* getCUDADeviceAllocator() const override { return &the_allocator; }
    int getNumGPUs() const override { return pretend::device_count(); }
    c10::DeviceIndex deviceCount() const override { return Guard().deviceCount(); }
    c10::DeviceIndex current_device() const override { return static_cast<c10::DeviceIndex>(the_device); }
    c10::DeviceIndex getCurrentDevice() const override { return current_device(); }
    void setCurrentDevice(c10::DeviceIndex i) const override { set_device(i); }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex i) const override {
        return Guard().exchangeDevice(cuda(i)).index();
    }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex i) const override {
        return i < 0 ? current_device() : exchangeDevice(i);
    }
    void deviceSynchronize(c10::DeviceIndex i) const override { synchronize_device(i); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

}   // namespace

std::optional<at::Generator> cpu_generator(const at::Generator& generator) {
    const auto* own = dynamic_cast<Generator*>(generator.unsafeGetGeneratorImpl());
    return own ? std::optional(own->cpu) : std::nullopt;
}
at::Generator default_generator(int64_t device) { return known_generator(static_cast<int>(device)); }
at::Generator default_cpu_generator(int device) { return *cpu_generator(known_generator(device)); }

}   // namespace pretend
