// Runs the kernels with code for AMX on an emulation of its instructions, and prints how far the results are from those
// of the set `baseline`, which multiplies in float32: `emulated` has the vectors that AMX comes with where there are some,
// `portable` has none. With WITH_PROCESSOR also on the processor's own instructions; the
// results must then have the same bits.
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "csrc/cpu/runtime.h"
#include "csrc/kernels.h"

using namespace nanochat;

struct Set {
    void (*attention_forward)(const AttentionForward&);
    void (*attention_backward)(const AttentionBackward&);
    void (*linear_cross_entropy)(const cpu::LinearCrossEntropy&);
    void (*newton_schulz)(const NewtonSchulz&);
};

#define DECLARE(isa)                                                                                   \
    namespace nanochat::isa {                                                                          \
    void attention_forward(const AttentionForward&);                                                   \
    void attention_backward(const AttentionBackward&);                                                 \
    void linear_cross_entropy(const cpu::LinearCrossEntropy&);                                         \
    void newton_schulz(const NewtonSchulz&);                                                           \
    constexpr Set kSet = {attention_forward, attention_backward, linear_cross_entropy, newton_schulz}; \
    }
DECLARE(baseline)
DECLARE(emulated)
DECLARE(portable)
#ifdef WITH_PROCESSOR
DECLARE(amx)
#endif

namespace nanochat::cpu {
void* workspace(size_t bytes) {
    thread_local std::vector<char> memory;
    memory.assign(bytes + 64, char(0x7f));   // a large number in float and bfloat16: what is not written is seen
    return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}
}   // namespace nanochat::cpu

namespace {

typedef std::vector<uint16_t> Halves;

float widen(uint16_t bits) {
    const uint32_t u = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

Halves random_halves(int64_t count, double deviation, int seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal(0.0f, static_cast<float>(deviation));
    Halves out(count);
    for (uint16_t& x : out) {
        const float value = normal(engine);
        uint32_t u;
        std::memcpy(&u, &value, 4);
        x = static_cast<uint16_t>(u >> 16);
    }
    return out;
}

typedef std::vector<Halves> Results;

Results attention(const Set& set, const AttentionShape& s, int threads) {
    const auto strides = [&](int64_t T, int64_t H) { return Strides{T * H * s.D, H * s.D, s.D}; };
    const int64_t queries = s.B * s.Tq * s.H * s.D, keys = s.B * s.Tk * s.Hkv * s.D;
    const Halves q = random_halves(queries, 1, 1), k = random_halves(keys, 1, 2), v = random_halves(keys, 1, 3),
                 dout = random_halves(queries, 1, 4);
    Results r = {Halves(queries), Halves(queries), Halves(keys), Halves(keys)};
    std::vector<float> lse(s.B * s.H * s.Tq);
    const Strides of_q = strides(s.Tq, s.H), of_k = strides(s.Tk, s.Hkv);
    Execution execution;
    execution.threads = threads;
    set.attention_forward({s, DType::bfloat16, q.data(), k.data(), v.data(), r[0].data(), of_q, of_k, of_k, of_q,
                           lse.data(), nullptr, execution});
    set.attention_backward(
        {s,           DType::bfloat16, q.data(), k.data(), v.data(), r[0].data(), dout.data(), lse.data(), r[1].data(),
         r[2].data(), r[3].data(),     of_q,     of_k,     of_k,     of_q,        of_q,        of_q,       of_k,
         of_k,        execution});
    return r;
}

Results loss(const Set& set, int64_t N, int64_t C, int64_t V, int threads) {
    const Halves x = random_halves(N * C, 1, 5), weight = random_halves(V * C, 0.1, 6);
    std::vector<int64_t> targets(N);
    for (int64_t n = 0; n < N; n++) targets[n] = n % 5 ? n * 7919 % V : -1;
    Results r = {Halves(N * C), Halves(V * C)};
    std::vector<float> losses(N);
    cpu::LinearCrossEntropy arguments = {};
    arguments.N = N, arguments.C = C, arguments.V = V;
    arguments.dtype = DType::bfloat16;
    arguments.x = x.data(), arguments.weight = weight.data(), arguments.targets = targets.data();
    arguments.softcap = 15, arguments.ignore_index = -1, arguments.grad_scale = 1;
    arguments.loss = losses.data(), arguments.grad_x = r[0].data(), arguments.grad_weight = r[1].data();
    arguments.execution.threads = threads;
    set.linear_cross_entropy(arguments);
    return r;
}

// The upper halves of the float32 results.
Results newton_schulz(const Set& set, int64_t batch, int64_t M, int64_t K, int threads) {
    const Halves halves = random_halves(batch * M * K, 1, 7);
    std::vector<float> g(halves.size()), out(halves.size());
    for (size_t i = 0; i < g.size(); i++) g[i] = widen(halves[i]);
    const double coefficients[] = {1.5, -0.5, 0, 1.5, -0.5, 0, 1.5, -0.5, 0};
    NewtonSchulz arguments = {};
    arguments.batch = batch, arguments.M = M, arguments.K = K;
    arguments.dtype = DType::float32;
    arguments.g = g.data(), arguments.out = out.data();
    arguments.coefficients = coefficients, arguments.steps = 3, arguments.norm_factor = 1;
    arguments.allow_bfloat16 = true;
    arguments.execution.threads = threads;
    set.newton_schulz(arguments);
    Results r = {Halves(out.size())};
    for (size_t i = 0; i < out.size(); i++) {
        uint32_t u;
        std::memcpy(&u, &out[i], 4);
        r[0][i] = static_cast<uint16_t>(u >> 16);
    }
    return r;
}

double distance(const Results& a, const Results& b) {
    double largest = 0;
    for (size_t i = 0; i < a.size(); i++) {
        double error = 0, size = 0;
        for (size_t j = 0; j < a[i].size(); j++) {
            const double x = widen(a[i][j]), y = widen(b[i][j]);
            error += (x - y) * (x - y);
            size += y * y;
        }
        const double relative = size > 0 ? std::sqrt(error / size) : error;
        if (!(relative <= largest)) largest = relative;   // a NaN stays
    }
    return largest;
}

}   // namespace

int main() {
#ifdef WITH_PROCESSOR
    constexpr long kRequestPermission = 0x1023, kTileData = 18;   // as dispatch.cpp asks for the tiles
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 2;
#endif
    std::vector<std::pair<std::string, std::function<Results(const Set&, int)>>> cases;
    const AttentionShape shapes[] = {
        {2, 70, 70, 4, 2, 64, true, -1, 0.125},  {1, 33, 300, 2, 1, 40, true, -1, 0.2},
        {1, 150, 150, 1, 1, 128, true, 50, 0.1}, {2, 17, 5, 2, 2, 32, false, -1, 0.2},
        {1, 100, 40, 1, 1, 8, true, -1, 0.3},    {1, 130, 530, 2, 2, 48, true, 200, 0.1},
    };
    for (const AttentionShape& s : shapes)
        cases.emplace_back("attention", [s](const Set& set, int threads) { return attention(set, s, threads); });
    const int64_t sizes[][3] = {{70, 40, 100}, {33, 96, 257}, {513, 20, 333}};
    for (const auto& [N, C, V] : sizes)
        cases.emplace_back("loss", [=](const Set& set, int threads) { return loss(set, N, C, V, threads); });
    const int64_t matrices[][3] = {{2, 70, 40}, {1, 33, 150}, {3, 96, 96}, {1, 20, 530}};
    for (const auto& [batch, M, K] : matrices)
        cases.emplace_back("newton_schulz",
                           [=](const Set& set, int threads) { return newton_schulz(set, batch, M, K, threads); });
    for (size_t i = 0; i < cases.size(); i++) {
        const auto& run = cases[i].second;
        const Results expected = run(baseline::kSet, 1), found = run(emulated::kSet, 1);
        std::printf("%s %zu error %.6f portable %.6f threads %d", cases[i].first.c_str(), i, distance(found, expected),
                    distance(run(portable::kSet, 1), expected), found == run(emulated::kSet, 2));
#ifdef WITH_PROCESSOR
        std::printf(" processor %d", found == run(amx::kSet, 2));
#endif
        std::printf("\n");
    }
}
