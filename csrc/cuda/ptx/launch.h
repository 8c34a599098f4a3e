// What a launch may ask for beyond its sizes. Kernels' launchers and the emulation share it.
#pragma once

namespace nanochat::device {

struct LaunchOptions {
    int cluster = 1;   // blocks in a cluster, neighbours along x: 1 to 8, a divisor of the grid's width
    // The grid may start before the one before it in the stream has ended. It calls wait_for_previous_grid.
    bool overlaps_previous = false;
};

}   // namespace nanochat::device
