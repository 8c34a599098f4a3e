// Memory that outlives a call, so that its pages are touched only once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nanochat::cpu {

// Returns at least `bytes` of 64-byte aligned memory, which belongs to the calling thread and is valid until its next
// call. Throws std::bad_alloc.
void* workspace(size_t bytes);

// Hands out consecutive 64-byte aligned arrays. With a null base it only counts bytes.
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
