// macOS. It has no public call like a futex before version 14.4, so the threads that sleep share one condition.
#include <pthread.h>

#include "system.h"

namespace nanochat::cpu {
namespace {
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
}   // namespace

void sleep_while(const int* address, int value) {
    pthread_mutex_lock(&mutex);
    while (__atomic_load_n(address, __ATOMIC_SEQ_CST) == value) pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
}
void wake_all(const int*) {
    pthread_mutex_lock(&mutex);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

void advise_large_pages(void*, size_t) {}

}   // namespace nanochat::cpu
