// The current GPU, which kernels it can run, and the versions of CUDA.
#include <cuda_runtime_api.h>

#include <array>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../check.h"
#include "../kernels.h"

namespace nanochat::cuda {
namespace {

#ifdef NANOCHAT_BUILT_FOR_HOPPER
constexpr bool kBuiltForHopper = true;
#else
constexpr bool kBuiltForHopper = false;
#endif

void check(cudaError_t status) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("CUDA device: ") + cudaGetErrorName(status) + ", " +
                                 cudaGetErrorString(status));
    }
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device));
    return value;
}

Device ask(int device) {
    const int capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                           attribute(cudaDevAttrComputeCapabilityMinor, device);
    return {attribute(cudaDevAttrMultiProcessorCount, device), kBuiltForHopper && capability == 90};
}

}   // namespace

Device current_device() {
    constexpr int kMost = 64;
    static std::array<Device, kMost> known;
    static std::array<std::once_flag, kMost> asked;
    int device = 0;
    check(cudaGetDevice(&device));
    require(device < kMost, "the number of the current GPU must be below ", kMost, ", got ", device);
    std::call_once(asked[device], [&] { known[device] = ask(device); });

    Device chosen = known[device];
    const char* wanted = std::getenv("NANOCHAT_CUDA_ISA");
    if (!wanted || !*wanted) return chosen;
    const std::string isa = wanted;
    require(isa == "sm_80" || isa == "sm_90a", "NANOCHAT_CUDA_ISA must be sm_80 or sm_90a, got ", isa);
    require(isa == "sm_80" || chosen.hopper, "NANOCHAT_CUDA_ISA=sm_90a: this GPU, or this build, does not have it");
    chosen.hopper = isa == "sm_90a";
    return chosen;
}

Versions versions() {
    Versions found = {};
    check(cudaDriverGetVersion(&found.driver));
    check(cudaRuntimeGetVersion(&found.runtime));
    return found;
}

}   // namespace nanochat::cuda
