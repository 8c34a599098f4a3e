// In place of csrc/cuda/gpu.cpp, and between the operators and the emulation: what every launch is checked for.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "../../csrc/check.h"
#include "../../csrc/emulation/emulation.h"
#include "device.h"

#define PRETEND_RUN _ZN8nanochat9emulation3runERKNS0_6LaunchE
#define PRETEND_JOIN_(a, b) a##b
#define PRETEND_JOIN(a, b) PRETEND_JOIN_(a, b)

// The operators are linked with --wrap: their launches come to __wrap_, and the emulation's own `run` is __real_.
extern "C" void PRETEND_JOIN(__real_, PRETEND_RUN)(const nanochat::emulation::Launch&);

namespace nanochat::cuda {

// As csrc/cuda/gpu.cpp.
Device current_device() {
    const pretend::Capability capability = pretend::capability();
    Device chosen{pretend::multiprocessors(), capability.major == 9 && capability.minor == 0};
    const char* wanted = std::getenv("NANOCHAT_CUDA_ISA");
    if (!wanted || !*wanted) return chosen;
    const std::string isa = wanted;
    require(isa == "sm_80" || isa == "sm_90a", "NANOCHAT_CUDA_ISA must be sm_80 or sm_90a, got ", isa);
    require(isa == "sm_80" || chosen.hopper, "NANOCHAT_CUDA_ISA=sm_90a: this GPU, or this build, does not have it");
    chosen.hopper = isa == "sm_90a";
    return chosen;
}

}   // namespace nanochat::cuda

namespace {

using nanochat::emulation::Launch;

int64_t launches = 0;

[[noreturn]] void fail(const Launch& launch, const std::string& what) {
    throw std::runtime_error(std::string(launch.name) + ": " + what);
}

// What looks like an address, is mapped, and lies elsewhere than in an allocation of the device. The first word is the
// kernel's own address. A number of four bytes beside padding with half of an old address is neither a multiple of 16, if
// it is a float, nor large, if it is an int.
void check_arguments(const Launch& launch, int device) {
    for (size_t at = sizeof(void*); at + sizeof(void*) <= launch.argument_bytes; at += sizeof(void*)) {
        uintptr_t word;
        std::memcpy(&word, static_cast<const char*>(launch.context) + at, sizeof word);
        const auto* pointer = reinterpret_cast<void*>(word);
        unsigned char resident;
        if (pretend::owns(pointer)) {
            const int owner = pretend::device_of(pointer);
            if (owner < 0) fail(launch, "an argument points to no allocation");
            if (owner != device) fail(launch, "an argument points to memory of another device");
        } else if (word >> 40 && !(word >> 47) && word % 16 == 0 && (word & 0xFFFFFFFF) >> 16 &&
                   mincore(reinterpret_cast<void*>(word & ~uintptr_t{4095}), 1, &resident) == 0) {
            fail(launch, "an argument points to memory of the host");
        }
    }
}

void run_checked(const Launch& launch) {
    {
        const pretend::Open open;
        nanochat::emulation::schedule().shared_limit = pretend::shared_limit();
        PRETEND_JOIN(__real_, PRETEND_RUN)(launch);
    }
    try {
        pretend::check_memory(false);   // the arguments lead to no freed memory
    } catch (const std::runtime_error& error) {
        fail(launch, error.what());
    }
}

// The launch again, for a graph, with a copy of its arguments.
std::function<void()> repeat(const Launch& launch) {
    const size_t bytes = (launch.argument_bytes + 63) / 64 * 64;
    const std::shared_ptr<void> arguments(std::aligned_alloc(64, bytes), std::free);
    std::memcpy(arguments.get(), launch.context, launch.argument_bytes);
    Launch again = launch;
    again.context = arguments.get();
    return [again, arguments] { run_checked(again); };
}

}   // namespace

extern "C" void PRETEND_JOIN(__wrap_, PRETEND_RUN)(const Launch& launch) {
    const pretend::Place place = pretend::current_place();
    if (launch.stream != pretend::native_stream(place)) {
        fail(launch, "launched on a stream that is not the current one of the current device");
    }
    check_arguments(launch, place.device);
    ++launches;
    run_checked(launch);
    pretend::record(place, [&] { return repeat(launch); });
}

extern "C" PRETEND_API int64_t pretend_launches() { return launches; }
extern "C" PRETEND_API bool pretend_is_hopper() { return nanochat::cuda::current_device().hopper; }
