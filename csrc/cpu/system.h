// What the kernels need of the operating system. system_<name>.cpp defines it.
#pragma once

#include <cstddef>

namespace nanochat::cpu {

// Sleeps while *address is `value`. It may wake up before, so the caller compares again.
void sleep_while(const int* address, int value);
// Wakes all threads that sleep at `address`, which was changed before.
void wake_all(const int* address);

// Asks for large pages for this memory, where the system takes such advice.
void advise_large_pages(void* memory, size_t bytes);

}   // namespace nanochat::cpu
