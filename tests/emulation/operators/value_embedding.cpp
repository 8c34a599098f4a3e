// DType: integers. All addresses are the device's.
#include "../../../csrc/cuda/value_embedding.cu"

#include "reader.h"

using namespace nanochat;

// h, its stride, gate, table, ids, N, Hkv, D, I, V, DType of the values, DType of the table
template <class Arguments>
void read_problem(Reader& read, Arguments& a) {
    a.h = read;
    a.h_stride = read;
    a.gate = read;
    a.table = read;
    a.ids = read;
    a.N = read;
    a.Hkv = read;
    a.D = read;
    a.I = read;
    a.V = read;
    a.dtype = read;
    a.table_dtype = read;
}

// v (N, Hkv, D), the problem, out (N, Hkv, D)
ENTRY(add_value_embedding) {
    Reader read{arguments};
    AddValueEmbedding a = {};
    a.v = read;
    read_problem(read, a);
    a.out = read;
    cuda::add_value_embedding(a);
}

// dout (N, Hkv, D), the problem, dh (N, I), dgate (Hkv, I), drows (N, Hkv D), workspace, its bytes
ENTRY(add_value_embedding_backward) {
    Reader read{arguments};
    AddValueEmbeddingBackward a = {};
    a.dout = read;
    read_problem(read, a);
    a.dh = read;
    a.dgate = read;
    a.drows = read;
    a.execution.workspace = read;
    require_workspace(read, cuda::add_value_embedding_backward_workspace_bytes(a));
    cuda::add_value_embedding_backward(a);
}
