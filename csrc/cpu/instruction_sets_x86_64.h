// The instruction sets of x86-64. For dispatch.cpp only.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

// Every set, the best first; the set of the kernels that multiply no bfloat16; the set of generation.
#define NANOCHAT_FOR_EACH_INSTRUCTION_SET(use)                                                      \
    use(amx, avx512, avx512_bf16) use(avx512_bf16, avx512, avx512_bf16) use(avx512, avx512, avx512) \
        use(avx2, avx2, avx2) use(baseline, baseline, baseline)

namespace nanochat::cpu {
namespace {

bool has_baseline() { return true; }

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

// Every processor with AVX512-BF16 has AVX512-VNNI.
bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

// The kernel of Linux saves the tiles only of processes that ask for it (ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA). From
// then on it refuses signal stacks that are too small for them.
bool has_amx() {
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// On Intel's processors the products of avx512_bf16 are slower than those of float32: 88 against 148 GFLOP/s (MKL) on one
// core of a Xeon with AMX.
bool pays(const char* set) { return std::strcmp(set, "avx512_bf16") != 0 || !__builtin_cpu_is("intel"); }

// On the AMD processor with AVX-512 that was measured, MKL, which torch calls, has the rate of AVX2. With AVX2 alone it is the
// faster one there.
bool linear_pays_with(const char* set) { return !__builtin_cpu_is("intel") && std::strncmp(set, "avx512", 6) == 0; }

}   // namespace
}   // namespace nanochat::cpu
