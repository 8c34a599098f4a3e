// The instruction sets of aarch64. For dispatch.cpp only.
#pragma once

#if defined(__APPLE__)
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif

#include <cstddef>

// Every set, the best first; the set of the kernels that multiply no bfloat16; the set of generation.
#define NANOCHAT_FOR_EACH_INSTRUCTION_SET(use) use(neon_bf16, neon, neon) use(neon, neon, neon)

namespace nanochat::cpu {
namespace {

bool has_neon() { return true; }

bool has_neon_bf16() {
#if defined(__APPLE__)
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &value, &size, nullptr, 0) == 0 && value != 0;
#else
    constexpr unsigned long kBf16 = 1ul << 14;   // HWCAP2_BF16 of asm/hwcap.h
    return (getauxval(AT_HWCAP2) & kBf16) != 0;
#endif
}

bool pays(const char*) { return true; }

// No measurement shows that the kernel is faster than torch's own product.
bool linear_pays_with(const char*) { return false; }

}   // namespace
}   // namespace nanochat::cpu
