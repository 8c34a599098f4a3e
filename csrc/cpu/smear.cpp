// Adds to each token a gated part of the token before it, and the gradients. Threads share the rows, or blocks of them, so
// the results do not depend on their number.
#include <cstring>

#include "../kernels.h"
#include "gate.h"

namespace nanochat::NANOCHAT_ISA {
namespace {

// The gate of one row.
template <class T, class S = Compute<T>>
NANOCHAT_INLINE S gate_of(const Gates<S>& gates, const T* row) {
    S inputs[kMostGateInputs] = {};
    read_inputs(row, gates.inputs, inputs);
    return gates.values(0, inputs)[0];
}

template <class T>
void smear_typed(const Smear& a) {
    using S = Compute<T>;
    const int64_t C = a.C;
    const T* x = static_cast<const T*>(a.x);
    T* out = static_cast<T*>(a.out);
    const S lambda = *static_cast<const S*>(a.lambda);
    Gates<S> gates;
    carve_workspace([&](cpu::Arena& arena) { gates = padded_gates<S>(arena, a.gate, 1, a.I); });
    for_each_row(a.B * a.T, C, a.execution.threads, [&](int64_t n) {
        const T* own = x + n * C;
        if (n % a.T == 0) {
            memcpy(out + n * C, own, static_cast<size_t>(C) * sizeof(T));
            return;
        }
        const S factor = lambda * gate_of(gates, own);
        for_each_part<S>(C, [&](int64_t i, auto part) {
            write_part(out + n * C + i, read_part(own + i, part) + read_part(own - C + i, part) * factor, part);
        });
    });
}

template <class T>
void smear_backward_typed(const SmearBackward& a) {
    using S = Compute<T>;
    const int64_t C = a.C, rows = a.B * a.T;
    const T *dout = static_cast<const T*>(a.dout), *x = static_cast<const T*>(a.x);
    T* dx = static_cast<T*>(a.dx);
    const S lambda = *static_cast<const S*>(a.lambda);
    Gates<S> gates;
    S* sums = nullptr;
    const int64_t stride = padded_inputs<S>(a.I), size = stride + 1;   // dgate and dlambda
    carve_workspace([&](cpu::Arena& arena) {
        gates = padded_gates<S>(arena, a.gate, 1, a.I);
        sums = arena.take<S>(ceil_div(rows, kBlockRows) * size);
    });
    // `gate` and `next` are those of this row and of the next row; a row without one before it has no gate.
    const auto backward_row = [&](int64_t n, S gate, S next, S* own_sums) {
        const T* own = dout + n * C;
        S dz = 0;
        if (n % a.T != 0) {
            const S product = sum_over<S>(C, [&](int64_t i, auto part) {
                return read_part(own + i, part) * read_part(x + (n - 1) * C + i, part);
            });
            dz = lambda * gate * (1 - gate) * product;
            for (int64_t i = 0; i < a.I; i++) own_sums[i] += dz * read(x + n * C + i);
            own_sums[stride] += gate * product;
        }
        const bool is_last = n % a.T == a.T - 1;
        const S factor = lambda * next;
        const auto without_gate = [&](int64_t i, auto part) {
            const Vec<S> direct = read_part(own + i, part);
            return is_last ? direct : direct + read_part(own + C + i, part) * factor;
        };
        for_each_part<S>(a.I, [&](int64_t i, auto part) {
            write_part(dx + n * C + i, without_gate(i, part) + load(gates.weights + i) * dz, part);
        });
        for_each_part<S>(C - a.I, [&](int64_t i, auto part) {
            write_part(dx + n * C + a.I + i, without_gate(a.I + i, part), part);
        });
    };
    for_each_block(rows, C, a.execution.threads, size, sums, [&](int64_t first, int64_t end, S* own_sums) {
        S gate = gate_of(gates, x + first * C);
        for (int64_t n = first; n < end; n++) {
            const S next = n + 1 < rows ? gate_of(gates, x + (n + 1) * C) : S(0);
            backward_row(n, gate, next, own_sums);
            gate = next;
        }
    });
    for (int64_t i = 0; i < a.I; i++) static_cast<S*>(a.dgate)[i] = sum_of_blocks(rows, size, sums, i);
    *static_cast<S*>(a.dlambda) = sum_of_blocks(rows, size, sums, stride);
}

}   // namespace

void smear(const Smear& a) {
    if (a.dtype == DType::float64) return smear_typed<double>(a);
    a.dtype == DType::bfloat16 ? smear_typed<bfloat16>(a) : smear_typed<float>(a);
}

void smear_backward(const SmearBackward& a) {
    if (a.dtype == DType::float64) return smear_backward_typed<double>(a);
    a.dtype == DType::bfloat16 ? smear_backward_typed<bfloat16>(a) : smear_backward_typed<float>(a);
}

}   // namespace nanochat::NANOCHAT_ISA
