// How native code refuses: it throws, with what it got and what it takes; it never prints and never exits.
// Not for the files that are compiled once per instruction set: inline functions are shared between their copies.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace nanochat {

// For arguments: the caller sees a ValueError.
template <class... Parts>
void require(bool holds, const Parts&... message) {
    if (holds) return;
    std::ostringstream text;
    (text << ... << message);
    throw std::invalid_argument(text.str());
}

#ifdef __CUDACC__
// For every call of the CUDA runtime, and after every launch.
inline void cuda_check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ", " +
                                 cudaGetErrorString(status));
    }
}
#endif

}   // namespace nanochat
