// What the files of the pretend CUDA device share; device.cpp says how it works. No header of torch is needed, so that
// the project's kernels can be linked with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define PRETEND_API __attribute__((visibility("default")))

namespace pretend {

struct Place {   // of work: a stream of a device
    int device;
    int64_t stream;
    auto operator<=>(const Place&) const = default;
};

// --- settings, from the environment ---

int device_count();
int64_t total_memory();   // of each device, in bytes
struct Capability {
    int major, minor;
};
PRETEND_API Capability capability();
PRETEND_API int multiprocessors();
PRETEND_API uint32_t shared_limit();   // bytes of shared memory that a block gets

// --- memory ---

PRETEND_API bool owns(const void* pointer);
// The device of the allocation that holds the address or ends there, or -1.
PRETEND_API int device_of(const void* pointer);
// The address at which the host's own code finds the same byte.
PRETEND_API void* host(const void* pointer);
// Throws std::runtime_error if something was written outside of allocations or, with `freed`, to what was freed.
PRETEND_API void check_memory(bool freed);
// While one exists, host code may follow device addresses.
struct PRETEND_API Open {
    Open();
    ~Open();
    Open(const Open&) = delete;
};
struct Statistics {
    int64_t current = 0, peak = 0, allocations = 0;
};
Statistics& statistics(int device);

// --- streams ---

PRETEND_API int current_device();
void set_device(int device);
PRETEND_API Place current_place();
Place current_place(int device);
void set_stream(Place place);
Place new_stream(int device);
PRETEND_API void* native_stream(Place place);   // what the kernels get as a cudaStream_t

// Work that ends only when somebody waits for it. `finish` may throw.
void enqueue(Place place, std::function<void()> finish);
void sleep(Place place);

// What the host would wait for: counted, and refused in a capture and where set_sync_debug_mode says "error".
void wait(Place place, const std::string& what);
// For all streams. Also counted and refused in a capture. As with CUDA, no set_sync_debug_mode refuses it.
void synchronize_device(int device);
PRETEND_API void count(const std::string& name);

// --- graphs ---

void begin_capture();
int64_t end_capture();   // the number of the graph
void replay(int64_t graph);
void free_graph(int64_t graph);
bool capturing(Place place);
// Adds to the graph that is being captured, if there is one. Throws where `place` does not belong to the capture.
PRETEND_API void record(Place place, const std::function<std::function<void()>()>& node);

}   // namespace pretend
