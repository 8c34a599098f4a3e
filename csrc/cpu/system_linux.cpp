// Linux: futexes and transparent huge pages.
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

#include "system.h"

namespace nanochat::cpu {

void sleep_while(const int* address, int value) {
    syscall(SYS_futex, address, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(const int* address) { syscall(SYS_futex, address, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

void advise_large_pages(void* memory, size_t bytes) { madvise(memory, bytes, MADV_HUGEPAGE); }

}   // namespace nanochat::cpu
