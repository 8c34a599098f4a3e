// What kernels need from the process: memory that outlives a call, so that its pages are touched once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nanochat::cpu {

// At least `bytes` of 64-byte aligned memory, owned by the calling thread and valid until its next call. Throws
// std::bad_alloc.
void* workspace(size_t bytes);

// Hands out consecutive 64-byte aligned arrays; with a null base it only measures.
struct Arena {
    char* base = nullptr;
    size_t used = 0;

    template <class T>
    inline __attribute__((always_inline)) T* take(int64_t count) {
        T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

}   // namespace nanochat::cpu
