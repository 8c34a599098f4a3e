// DType: integers. All addresses are the device's.
#include "../../../csrc/cuda/relu_squared.cu"

#include "reader.h"

using namespace nanochat;

// x, y (numel), which may be one, numel, DType
ENTRY(relu_squared) {
    Reader read{arguments};
    ReluSquared a = {};
    a.x = static_cast<void*>(read);
    a.y = read;
    a.numel = read;
    a.dtype = read;
    cuda::relu_squared(a);
}

// dy, y, dx (numel), dx may be dy, numel, DType
ENTRY(relu_squared_backward) {
    Reader read{arguments};
    ReluSquaredBackward a = {};
    a.dy = read;
    a.y = read;
    a.dx = read;
    a.numel = read;
    a.dtype = read;
    cuda::relu_squared_backward(a);
}
