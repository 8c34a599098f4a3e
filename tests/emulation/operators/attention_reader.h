// Readers of the arguments that both passes of attention share.
#pragma once

#include "device_reader.h"

inline void read_strides(Reader& read, nanochat::Strides& strides) {
    strides.b = read;
    strides.t = read;
    strides.h = read;
}

inline void read_shape(Reader& read, nanochat::AttentionShape& shape) {
    shape.B = read;
    shape.Tq = read;
    shape.Tk = read;
    shape.H = read;
    shape.Hkv = read;
    shape.D = read;
    shape.causal = read;
    shape.window = read;
    shape.scale = read;
}
