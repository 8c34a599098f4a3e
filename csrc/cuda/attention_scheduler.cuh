// The order in which blocks of threads compute the tiles of attention.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tiles.cuh"

namespace nanochat::cuda::attention {

struct TileCoord {
    int tile, head_group;
};

// Maps a work item to a tile. The tiles with most work come first, in one order for all head groups. Head groups are
// divided into sections, whose keys and values stay in the L2 cache while the tiles of the section pass over them.
struct TileScheduler {
    int tiles, head_groups, section;
    bool last_first;

    NANOCHAT_ANYWHERE int items() const { return tiles * head_groups; }
    NANOCHAT_ANYWHERE TileCoord coord(int item) const {
        const int first = item / (section * tiles) * section, rest = item - first * tiles;
        const int width = head_groups - first < section ? head_groups - first : section, tile = rest / width;
        return {last_first ? tiles - 1 - tile : tile, first + rest - tile * width};
    }
};

constexpr int64_t kSectionBytes = int64_t{24} << 20;   // half of an H100's L2

inline TileScheduler make_scheduler(int tiles, int head_groups, int64_t kv_bytes, bool last_first) {
    const int64_t section = std::max<int64_t>(1, kSectionBytes / std::max<int64_t>(1, kv_bytes));
    return {tiles, head_groups, static_cast<int>(std::min<int64_t>(section, std::max(1, head_groups))), last_first};
}

}   // namespace nanochat::cuda::attention
