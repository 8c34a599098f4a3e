// Reads the GPU's properties, for kernels that depend on them.
#pragma once

#include "reader.h"

inline nanochat::cuda::Device read_device(Reader& read) {
    const int64_t multiprocessors = read;
    return {static_cast<int>(multiprocessors), read};
}
