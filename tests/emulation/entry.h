// One form for every function that a test calls in a library of kernels, whether it was built for the host (plain or
// with a sanitizer) or by nvcc: ENTRY(name) { launch(...); } reads its arguments from a list, and what it throws
// becomes a message.
#pragma once

#include <cstdint>
#include <cstdio>
#include <exception>

union Argument {
    int64_t integer;
    double number;
    void* pointer;

    template <class T>
    T* to() const {
        return static_cast<T*>(pointer);
    }
};

// Null, or what was thrown: valid until this thread's next call.
inline const char* call_entry(void (*body)(const Argument*), const Argument* arguments) {
    static thread_local char message[2000];
    try {
        body(arguments);
        return nullptr;
    } catch (const std::exception& error) {
        std::snprintf(message, sizeof message, "%s", error.what());
        return message;
    }
}

#define ENTRY(name)                                                                         \
    static void name##_entry(const Argument* arguments);                                    \
    extern "C" __attribute__((visibility("default"))) const char* name(const Argument* a) { \
        return call_entry(name##_entry, a);                                                 \
    }                                                                                       \
    static void name##_entry(const Argument* arguments)

#ifdef NANOCHAT_EMULATION   // in each library of kernels
// seed, misalignment and limit of dynamic shared memory in bytes
ENTRY(set_schedule) {
    nanochat::emulation::schedule() = {static_cast<uint64_t>(arguments[0].integer),
                                       static_cast<uint32_t>(arguments[1].integer),
                                       static_cast<uint32_t>(arguments[2].integer)};
}
#endif
