"""Edits that make the machine code worse, one at a time, and the quantity that each exceeds.

The emulation finds none of them, since the results stay right.
"""

from dataclasses import dataclass

FORWARD, BACKWARD = "csrc/cuda/attention_forward_hopper.cu", "csrc/cuda/attention_backward_hopper.cu"
SCHULZ, PRODUCTS = "csrc/cuda/newton_schulz_hopper.cu", "csrc/cuda/newton_schulz.cuh"
SCHULZ_MMA = "csrc/cuda/newton_schulz.cu"
TILES, HOPPER, MASK = "csrc/cuda/attention_tiles.h", "csrc/cuda/hopper.cuh", "csrc/cuda/attention_mask.cuh"
SOFTMAX, SHARED = "csrc/cuda/attention_softmax.cuh", "csrc/cuda/attention_hopper.cuh"
PACKING = "csrc/cuda/attention_packing.cuh"


@dataclass(frozen=True)
class Edit:
    file: str
    old: str  # occurs in it once
    new: str


@dataclass(frozen=True)
class Mutation:
    name: str
    source: str  # that is compiled
    edit: Edit
    found_by: tuple[str, ...]  # quantities of sass_limits


# To compile one kernel of a source instead of all: D 128 and bfloat16.
FEWER_KERNELS = {
    FORWARD: [
        Edit(FORWARD, "f.dtype == DType::float16 ? launch<float16>(f, arguments) : ", ""),
        Edit(
            TILES,
            "        if (D == 64) return use(ForwardTile<64, 2, 64>());\n        if (D == 96) return use(ForwardTile<96, 2, 64>());\n        return use(ForwardTile<128, 2, 64>());\n",
            "",
        ),
        Edit(
            TILES,
            "    if (D == 64 && seen >= kManyKeys && many_tiles) return use(Large());\n    if (D == 64) return use(ForwardTile<64, 2, 128>());\n    if (D == 96) return use(ForwardTile<96, 2, 128>());\n",
            "",
        ),
    ],
    BACKWARD: [
        Edit(BACKWARD, "f.dtype == DType::float16 ? launch<float16>(f, a) : ", ""),
        Edit(TILES, "    if (backward_columns(D) == 64) return use(BackwardTile<64, 3>());\n", ""),
    ],
    SCHULZ: [
        Edit(
            SCHULZ,
            "dtype == DType::float16 ? launch<float16>(p, dtype, output, execution)\n                            : ",
            "",
        ),
        Edit(
            PRODUCTS,
            "        return p.a_major == Major::k ? use(AlongK(), AlongK(), SymmetricEpilogue())\n                                     : ",
            "        return ",
        ),
        Edit(PRODUCTS, "        return output ? use(AlongK(), AlongK(), *output) : ", "        return "),
    ],
    SCHULZ_MMA: [],
}

# fmt: off
MUTATIONS = [
    Mutation("no branch between the softmax and the wait for the sums", FORWARD, Edit(FORWARD, "                if (block > seen.begin) k_ring.consumer_wait(n + 2);\n                wait_for_products<0>(sums);\n", "                wait_for_products<0>(sums);\n                if (block > seen.begin) k_ring.consumer_wait(n + 2);\n"), ("order",)),
    Mutation("sums waited for before the softmax", FORWARD, Edit(FORWARD, "                wait_for_products<1>(scores);\n", "                wait_for_products<0>(scores);\n"), ("order",)),
    Mutation("sums started after the softmax", FORWARD, Edit(FORWARD, "                v_ring.consumer_wait(n);\n                start_sums<T, D, keys>(sums, weights, tile_v + place(n));\n                ping_pong.arrive_next();\n                wait_for_products<1>(scores);\n                k_ring.consumer_release(n + 1);\n                softmax_step(block, rescale);\n", "                ping_pong.arrive_next();\n                wait_for_products<0>(scores);\n                k_ring.consumer_release(n + 1);\n                softmax_step(block, rescale);\n                v_ring.consumer_wait(n);\n                start_sums<T, D, keys>(sums, weights, tile_v + place(n));\n"), ("order",)),
    Mutation("warpgroup not uniform", FORWARD, Edit(HOPPER, "return __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / kGroupThreads, 0);", "return static_cast<int>(threadIdx.x) / kGroupThreads;"), ("r2ur",)),
    Mutation("rows divided by the heads of a tile", FORWARD, Edit(PACKING, "return a >> b.shift;", "return a / (1 << b.shift);"), ("border", "outside")),
    Mutation("exponential with a slow path", FORWARD, Edit(SOFTMAX, "scores[j] = exp2_approx(fmaf(scores[j], scale, -reference));", "scores[j] = exp2f(fmaf(scores[j], scale, -reference));"), ("instructions",)),
    Mutation("scores kept beside the weights", FORWARD, Edit(FORWARD, "                softmax_step(block, rescale);\n                // This", "                float kept[48];\n#pragma unroll\n                for (int i = 0; i < 48; ++i) kept[i] = scores[i];\n                softmax_step(block, rescale);\n#pragma unroll\n                for (int i = 0; i < 48; ++i) if (kept[i] == 12345) rescale[0] = 0;\n                // This"), ("registers",)),
    Mutation("warpgroup of the backward not uniform", BACKWARD, Edit(HOPPER, "return __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / kGroupThreads, 0);", "return static_cast<int>(threadIdx.x) / kGroupThreads;"), ("r2ur",)),
    Mutation("mask divides each row", BACKWARD, Edit(MASK, "        const int row = i / 4 * 8 + i % 2;\n        const Range& range = visible[i / 2 % 2];\n        if (row < range.begin || row >= range.end) p[i] = 0;\n", "        const int row = i / 4 * 8 + i % 2;\n        const Range range = mask.visible_keys((first_row + row) / heads_per_tile);\n        const int own = key + i / 2 % 2 * 8;\n        if (own < range.begin || own >= range.end) p[i] = 0;\n"), ("border",)),
    Mutation("dP waited for before the exponentials", BACKWARD, Edit(BACKWARD, "                load_column_numbers(numbers, lses + lane_numbers);\n", "                load_column_numbers(numbers, lses + lane_numbers);\n                wait_for_products<0>(ds);\n"), ("order",)),
    Mutation("next scores started after dQ is passed on", BACKWARD, Edit(BACKWARD, "                start_scores<T, D, rows, keys>(p, own_k, q_of(n + 1));\n                wait_for_products<1>(dq);\n                hand_over();\n", "                wait_for_products<0>(dq);\n                hand_over();\n                start_scores<T, D, rows, keys>(p, own_k, q_of(n + 1));\n"), ("order",)),
    Mutation("scores in two halves", BACKWARD, Edit(SHARED, "device::wgmma<N, T>(scores, left(step), right(step), step > 0);\n", "for (int half = 0; half < 2; ++half)\n            device::wgmma<N / 2, T>(reinterpret_cast<float (&)[N / 4]>(scores[half * N / 4]), left(step),\n                                    right(step, half * N / 2 * SmemLayout<D>::width), step > 0);\n"), ("shared",)),
    Mutation("descriptor put together for each product", BACKWARD, Edit(HOPPER, "        return device::advanced(first, further + (major == device::Major::k ? k : mn));\n", "        const uint32_t tile = (static_cast<uint32_t>(first) & 0x3FFF) << 4;\n        return device::wgmma_descriptor(tile + further + (major == device::Major::k ? k : mn), major == device::Major::k ? 16 : rows * P::width, 8 * P::width, P::swizzle);\n"), ("instructions",)),
    Mutation("products of this step waited for", SCHULZ, Edit(SCHULZ, "        device::wgmma_wait<1>();   // of the step before\n", "        device::wgmma_wait<0>();\n"), ("order",)),
    Mutation("the output's code eight times", SCHULZ, Edit(SCHULZ, "                    write_output(\n", "#pragma unroll\n                    for (int copy = 0; copy < 8; ++copy)\n                        if (square.matrix % 8 == copy) write_output(\n"), ("size",)),
    Mutation("sums set to zero before the products", SCHULZ, Edit(SCHULZ, "            float sums[Tile::square / 2];\n", "            float sums[Tile::square / 2] = {};\n            device::pin_registers(sums);\n"), ("outside",)),
    Mutation("sources read by words", SCHULZ, Edit(SCHULZ, "        device::ldmatrix_x4(pairs, rows(2 * k));\n", "        for (int i = 0; i < 4; ++i) device::load_shared_pair(reinterpret_cast<float&>(pairs[i]), reinterpret_cast<float&>(pairs[i ^ 1]), rows(2 * k + i / 2) & ~7u);\n"), ("epilogue",)),
    Mutation("products of half the columns", SCHULZ, Edit(SCHULZ, "device::wgmma<N, T, major_a, major_b>(sums, a(k), b(k), accumulate || k > 0);\n", "for (int half = 0; half < 2; ++half)\n                device::wgmma<N / 2, T, major_a, major_b>(reinterpret_cast<float (&)[N / 4]>(sums[half * N / 4]), a(k), b(k, half * N / 2 * 128), accumulate || k > 0);\n"), ("order", "shared")),
    Mutation("16 bytes stored as words", SCHULZ_MMA, Edit(SCHULZ_MMA, "        device::store_16(d + int64_t{column + c} * p.d.pitch + row + 8 * h, words);\n", "        T* const to = d + int64_t{column + c} * p.d.pitch + row + 8 * h;\n        *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};\n"), ("stores",)),
]
# fmt: on
