// The tile instructions of AMX (Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 1, chapter
// 18). A thread has 8 tiles; each is used with 16 rows of 64 bytes here. With NANOCHAT_EMULATE_AMX the same functions
// compute in C++, so that the kernels run on processors without AMX.
#pragma once

#include <cstring>

#include "simd.h"

namespace nanochat::NANOCHAT_ISA {

constexpr int kTileBytes = 1024;

#if defined(NANOCHAT_EMULATE_AMX)

struct EmulatedTiles {
    bool configured = false;
    alignas(64) char bytes[8][kTileBytes];
};
inline thread_local EmulatedTiles emulated_tiles;

NANOCHAT_INLINE char* emulated_tile(int tile) {
    if (!emulated_tiles.configured) __builtin_trap();   // the processor raises #UD
    return emulated_tiles.bytes[tile];
}

// Configures the tiles of this thread for its lifetime.
struct TileScope {
    TileScope() {
        memset(&emulated_tiles, 0, sizeof emulated_tiles);
        emulated_tiles.configured = true;
    }
    ~TileScope() { emulated_tiles.configured = false; }
};

template <int tile>
NANOCHAT_INLINE void tile_zero() {
    memset(emulated_tile(tile), 0, kTileBytes);
}
template <int tile>
NANOCHAT_INLINE void tile_load(const void* rows, int64_t stride_bytes) {
    for (int r = 0; r < 16; r++)
        memcpy(emulated_tile(tile) + 64 * r, static_cast<const char*>(rows) + r * stride_bytes, 64);
}
template <int tile>
NANOCHAT_INLINE void tile_store(void* rows, int64_t stride_bytes) {
    for (int r = 0; r < 16; r++) memcpy(static_cast<char*>(rows) + r * stride_bytes, emulated_tile(tile) + 64 * r, 64);
}

// Arithmetic of TDPBF16PS: denormal inputs and results are zero, sums round to nearest even.
NANOCHAT_INLINE float flush(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0, x) : x; }

template <int sums, int a, int b>
NANOCHAT_INLINE void tile_dot() {
    float out[16][16];
    bfloat16 left[16][32], right[16][32];
    memcpy(out, emulated_tile(sums), kTileBytes);
    memcpy(left, emulated_tile(a), kTileBytes);
    memcpy(right, emulated_tile(b), kTileBytes);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float even = 0, odd = 0;
            for (int k = 0; k < 16; k++) {
                const auto product = [&](float sum, int half) {
                    const float x = flush(to_float(left[i][2 * k + half])), y = flush(to_float(right[k][2 * j + half]));
                    return flush(__builtin_fmaf(x, y, sum));
                };
                even = product(even, 0);
                odd = product(odd, 1);
            }
            out[i][j] = flush(flush(out[i][j]) + flush(even + odd));
        }
    memcpy(emulated_tile(sums), out, kTileBytes);
}

#elif defined(__AMX_BF16__)

struct TileScope {
    TileScope() {
        struct {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } config = {};
        config.palette = 1;
        for (int tile = 0; tile < 8; tile++) {
            config.row_bytes[tile] = 64;
            config.rows[tile] = 16;
        }
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~TileScope() { asm volatile("tilerelease"); }
};

template <int tile>
NANOCHAT_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
NANOCHAT_INLINE void tile_load(const void* rows, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride_bytes), "i"(tile) : "memory");
}
template <int tile>
NANOCHAT_INLINE void tile_store(void* rows, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride_bytes), "i"(tile) : "memory");
}
template <int sums, int a, int b>
NANOCHAT_INLINE void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

#else

struct TileScope {
    TileScope() {}
};

#endif

}   // namespace nanochat::NANOCHAT_ISA
