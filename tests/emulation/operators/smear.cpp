// DType: integers. All addresses are the device's.
#include "../../../csrc/cuda/smear.cu"

#include "reader.h"

using namespace nanochat;

// x (B, T, C), gate (I), lambda, B, T, C, I, DType
template <class Arguments>
void read_problem(Reader& read, Arguments& a) {
    a.x = read;
    a.gate = read;
    a.lambda = read;
    a.B = read;
    a.T = read;
    a.C = read;
    a.I = read;
    a.dtype = read;
}

// The problem, out (B, T, C)
ENTRY(smear) {
    Reader read{arguments};
    Smear a = {};
    read_problem(read, a);
    a.out = read;
    cuda::smear(a);
}

// dout (B, T, C), the problem, dx (B, T, C), dgate (I), dlambda, workspace, its bytes
ENTRY(smear_backward) {
    Reader read{arguments};
    SmearBackward a = {};
    a.dout = read;
    read_problem(read, a);
    a.dx = read;
    a.dgate = read;
    a.dlambda = read;
    a.execution.workspace = read;
    require_workspace(read, cuda::smear_backward_workspace_bytes(a));
    cuda::smear_backward(a);
}
