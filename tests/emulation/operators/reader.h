// For entries with many arguments.
#pragma once

#include "../../../csrc/check.h"
#include "../../../csrc/kernels.h"
#include "../entry.h"

// Hands out the arguments in order.
struct Reader {
    const Argument* next;
    operator int64_t() { return next++->integer; }
    operator uint64_t() { return static_cast<uint64_t>(next++->integer); }
    operator bool() { return next++->integer != 0; }
    operator double() { return next++->number; }
    operator nanochat::DType() { return static_cast<nanochat::DType>(next++->integer); }
    template <class T>
    operator T*() {
        return static_cast<T*>(next++->pointer);
    }
};

inline void require_workspace(int64_t given, int64_t needed) {
    nanochat::require(given >= needed, "the workspace has ", given, " bytes; takes ", needed);
}
