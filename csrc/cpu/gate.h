// Gates, sigmoid(w . x) of a few channels x of a row, and the gradients of their weights: sums over the rows in an order
// that does not depend on the number of threads.
#pragma once

#include <omp.h>

#include "rows.h"
#include "runtime.h"

namespace nanochat::NANOCHAT_ISA {

// The gradients are summed over blocks of so many rows, and then over the blocks.
constexpr int64_t kBlockRows = 64;

template <class S>
NANOCHAT_INLINE Vec<S> sigmoid(Vec<S> z) {
    return S(1) / (S(1) + exp_lanes(-z));
}

// `count` gates of `inputs` channels. A row of weights is padded with zeros to `stride` numbers, whole vectors.
template <class S>
struct Gates {
    int64_t count, inputs, stride;
    S* weights;

    // z of gate g. `x` is padded as the weights.
    NANOCHAT_INLINE S dot(int64_t g, const S* x) const {
        Vec<S> sum = {};
        for (int64_t i = 0; i < stride; i += kLanes<S>) sum += load(weights + g * stride + i) * load(x + i);
        return sum_lanes<S>(sum);
    }
    // The gates first .. first + kLanes - 1, in lanes; those that do not exist are 0.5.
    NANOCHAT_INLINE Vec<S> values(int64_t first, const S* x) const {
        S z[kLanes<S>] = {};
        for (int64_t g = first; g < minimum(count, first + kLanes<S>); g++) z[g - first] = dot(g, x);
        return sigmoid<S>(load(z));
    }
};

// Reads the channels of a row. `padded` has kMostGateInputs numbers, which are 0 behind the channels.
template <class T>
NANOCHAT_INLINE void read_inputs(const T* x, int64_t inputs, Compute<T>* padded) {
    for (int64_t i = 0; i < inputs; i++) padded[i] = read(x + i);
}

template <class S>
constexpr int64_t padded_inputs(int64_t inputs) {
    return (inputs + kLanes<S> - 1) / kLanes<S> * kLanes<S>;
}

// Copies the weights (count, inputs) into the arena.
template <class S>
NANOCHAT_INLINE Gates<S> padded_gates(cpu::Arena& arena, const void* weights, int64_t count, int64_t inputs) {
    const int64_t stride = padded_inputs<S>(inputs);
    const Gates<S> gates = {count, inputs, stride, arena.take<S>(count * stride)};
    if (!gates.weights) return gates;
    for (int64_t g = 0; g < count; g++)
        for (int64_t i = 0; i < stride; i++)
            gates.weights[g * stride + i] = i < inputs ? static_cast<const S*>(weights)[g * inputs + i] : S(0);
    return gates;
}

// Calls carve(arena) to count the bytes of a workspace, and again to hand them out.
template <class Carve>
NANOCHAT_INLINE void carve_workspace(const Carve& carve) {
    cpu::Arena arena;
    carve(arena);
    arena = {static_cast<char*>(cpu::workspace(arena.used)), 0};
    carve(arena);
}

// Calls visit(first, end, sums) for each block of rows of `elements` numbers. It adds to `sums`, `size` zeros at first.
// `sums` of all blocks are one array.
template <class S, class Visit>
NANOCHAT_INLINE void for_each_block(int64_t rows, int64_t elements, int threads, int64_t size, S* sums,
                                    const Visit& visit) {
    const int64_t blocks = ceil_div(rows, kBlockRows);
    const int64_t useful = maximum<int64_t>(1, minimum(blocks, rows * elements / kLeastPerThread));
    const int team = static_cast<int>(minimum<int64_t>(threads, useful));
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        S* own = sums + block * size;
        for (int64_t i = 0; i < size; i++) own[i] = 0;
        visit(block * kBlockRows, minimum(rows, (block + 1) * kBlockRows), own);
    }
}

// The sum of number i of all blocks.
template <class S>
NANOCHAT_INLINE S sum_of_blocks(int64_t rows, int64_t size, const S* sums, int64_t i) {
    double total = 0;
    for (int64_t block = 0; block < ceil_div(rows, kBlockRows); block++) total += sums[block * size + i];
    return static_cast<S>(total);
}

}   // namespace nanochat::NANOCHAT_ISA
