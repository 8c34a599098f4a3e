// The roof of arithmetic: multiply-adds on registers alone, of one thread. Prints GFLOP/s, the best of many repetitions.
// g++ -O3 -march=native peak.cpp -o peak
#include <chrono>
#include <cstdio>

#if defined(__AVX512F__)
constexpr int kBytes = 64, kChains = 24;
#elif defined(__AVX2__)
constexpr int kBytes = 32, kChains = 12;
#else
constexpr int kBytes = 16, kChains = 12;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));

int main() {
    constexpr int repetitions = 400, steps = 20000;
    Vector sums[kChains] = {}, a = {}, b = {};
    a += 1.0001f;
    b += 0.5f;
    double best = 0;
    for (int repetition = 0; repetition < repetitions; repetition++) {
        const auto start = std::chrono::steady_clock::now();
        for (int step = 0; step < steps; step++)
#pragma GCC unroll 32
            for (int i = 0; i < kChains; i++) {
                sums[i] = sums[i] * a + b;   // chains that do not depend on each other
                asm volatile("" : "+v"(sums[i]));
            }
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        const double rate = 2e-9 * kChains * (kBytes / 4) * steps / seconds;
        if (rate > best) best = rate;
    }
    std::printf("%.1f\n", best);
}
