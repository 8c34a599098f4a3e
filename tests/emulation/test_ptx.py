"""What the executor of PTX reports: each error, from a kernel of a few lines, with the words that name its place."""

import re
from dataclasses import dataclass

import pytest
import torch
from harness import PtxLibrary, build_for_ptx, message, write_kernels

SHARED = 4096  # bytes of dynamic shared memory; `base` is its first multiple of 1024

SOURCE = """
#include "../../../csrc/cuda/tensor_map.h"
#include "../entry.h"
using namespace nanochat::device;
"""

KERNEL = """
__global__ void __launch_bounds__({threads}, 1) {name}_kernel(float* out) {{
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t base = (shared_address(shared) + 1023) & ~1023u;
    const int thread = threadIdx.x, block = blockIdx.x;
    auto* counter = reinterpret_cast<uint32_t*>(out);
    (void)base, (void)thread, (void)block, (void)counter;
#line 1 "{name}.cu"
{body}
}}
ENTRY({name}) {{
    launch("{name}", {name}_kernel, dim3({blocks}), dim3({threads}), {shared}, nullptr,
           LaunchOptions{{.cluster = {cluster}}}, arguments[0].to<float>());
}}
"""

ENTRIES = """
__global__ void empty_kernel() {}
ENTRY(empty) {
    const auto number = [&](int i) { return static_cast<unsigned>(arguments[i].integer); };
    launch("empty", empty_kernel, dim3(number(0), number(1)), dim3(number(2)), number(3), nullptr);
}
ENTRY(tensor_map) {
    const auto number = [&](int i) { return arguments[i].integer; };
    nanochat::cuda::make_tensor_map(nanochat::DType::bfloat16, arguments[0].pointer, {number(1), number(2)},
                                    {number(3)}, {static_cast<int>(number(4)), static_cast<int>(number(5))},
                                    static_cast<Swizzle>(number(6)));
}
"""


@dataclass(frozen=True)
class Case:
    name: str
    body: str
    words: tuple[str, ...]  # all of them stand in the message
    threads: int = 32
    blocks: int = 1
    cluster: int = 1


def case(name, body, *words, **sizes):
    return Case(name, body, words, **sizes)


# Zeros in the tile, which the asynchronous proxy may read.
TILE = """
for (int i = thread; i < 512; i += 128) reinterpret_cast<uint32_t*>(shared + base - shared_address(shared))[i] = 0;
fence_proxy_async();
__syncthreads();
float sums[4] = {out[0], out[1], out[2], out[3]};
pin_registers(sums);
const uint64_t tile = wgmma_descriptor(base, 128, 256, Swizzle::none);
"""
STORE = "out[thread] = sums[0] + sums[1] + sums[2] + sums[3];"
PRODUCT = "wgmma<8, bfloat16>(sums, tile, tile, true);\nwgmma_commit();\n"


def products(*lines):
    """Return a kernel's products in one piece of PTX: %0 to %3 are sums, %4 to %7 are of A, and %8 is the tile."""
    start = ("{", ".reg .pred p;", ".reg .b32 free;", "setp.eq.b32 p, 0, 0;", "wgmma.fence.sync.aligned;")
    end = ("wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}")
    text = r"\n".join((*start, *lines, *end))
    registers = ", ".join(f'"+r"(r[{n}])' for n in range(8))
    return (
        TILE
        + f'uint32_t r[8] = {{0, 0, 0, 0, 1, 2, 3, 4}};\nasm volatile("{text}" : {registers} : "l"(tile) : "memory");\n'
        + "out[thread] = r[0] + r[1] + r[2] + r[3];\nout[128 + thread] = r[4] + r[5] + r[6] + r[7];"
    )


WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "

CASES = [
    # --- the text ---
    case("instruction", "out[thread] = __brev(thread);", "unknown instruction 'brev.b32 "),
    case(
        "form",
        'asm volatile("fence.proxy.tensormap::generic.release.gpu;" :: : "memory");',
        "unknown form of instruction 'fence.proxy.tensormap::generic.release.gpu'",
    ),
    case(
        "no_target",
        'asm volatile("atom.global.add.u32 _, [%0], 1;" :: "l"(out) : "memory");',
        "unknown form of instruction 'atom.global.add.u32 _, ",
    ),
    # --- who waits for whom ---
    case(
        "two_barriers",
        "if (thread < 32)\nbar_sync(1, 96);\nelse\nbar_sync(2, 96);",
        *("deadlock:", "warp 0, lanes 0xffffffff: waits at a barrier at PTX line ", "two_barriers.cu:2: bar.sync"),
        *("warp 1, lanes 0xffffffff: waits at a barrier", "two_barriers.cu:4: bar.sync"),
        threads=64,
    ),
    case(
        "counted_barrier",  # a warp that leaves has not arrived
        "if (thread < 32)\nbar_sync(1, 64);",
        *("deadlock:", "warp 0, lanes 0xffffffff: waits at a barrier", "counted_barrier.cu:2: bar.sync"),
        threads=64,
    ),
    case("barrier_number", "bar_sync(thread / 32 + 15, 32);", "bar: number 16", threads=64),
    case("barrier_threads", "bar_arrive(1, 64 + thread / 32 * 32);", "bar 1: ", " threads here, ", threads=64),
    case(
        "no_arrival",
        "if (thread == 0) mbarrier_init(base, 2);\n__syncthreads();\nif (thread == 0) mbarrier_arrive(base);\n"
        "mbarrier_wait(base, 0);",
        *("deadlock:", "no_arrival.cu:4", "mbarrier.try_wait"),
    ),
    case("no_mbarrier", "mbarrier_arrive(base);", "mbarrier.arrive: no mbarrier at 0x"),
    case(
        "one_arrival_too_many",
        "if (thread == 0) { mbarrier_init(base, 2); mbarrier_arrive_expect_tx(base, 16); mbarrier_arrive(base);"
        "mbarrier_arrive(base); }",
        "more arrivals than the phase takes",
    ),
    case(
        "lanes",
        "if (thread < 16) { out[thread] = __shfl_sync(0xFFFFFFFF, out[thread], 3); __syncthreads(); }"
        "else { out[thread] = 1; __syncthreads(); out[thread] = __shfl_sync(0xFFFFFFFF, out[thread], 3); }",
        *("deadlock:", "lanes 0x0000ffff: waits for other lanes", "lanes 0xffff0000: waits for other lanes"),
    ),
    case("no_member", "out[thread] = __shfl_sync(0xFFFF, thread, 0);", "lane 16 is not in its membermask 0x0000ffff"),
    case(
        "masks_differ",
        "out[thread] = __shfl_sync(thread == 7 ? 0xFF : 0xFFFFFFFF, thread, 0);",
        *("deadlock:", "lanes 0xffffffff: waits for other lanes", "masks_differ.cu:1: shfl"),
    ),
    case(
        "fragments_of_half",
        "if (thread >= 16) return;\nuint32_t fragments[4];\nldmatrix_x4(fragments, base);\nout[thread] = fragments[0];",
        *("ldmatrix.sync.aligned", "an aligned instruction without all lanes: 0x0000ffff"),
    ),
    case("spins", "while (*static_cast<volatile float*>(out) == 0) {}", "deadlock:", "lanes 0xffffffff: runs at"),
    case(
        "spins_by_atomics",
        "while (atomicCAS(reinterpret_cast<int*>(out), 1, 2) == 0) {}",
        *("deadlock:", "lanes 0xffffffff: runs at"),
    ),
    case(
        "spins_by_vote",
        "while (!__any_sync(0xFFFFFFFF, *static_cast<volatile float*>(out + thread) > 0)) __threadfence();",
        *("deadlock:", "lanes 0xffffffff: runs at"),
    ),
    case(
        "absent", "if (thread < 8) out[thread] = __shfl_sync(0xFF, out[thread], 20);", "reads lane 20, which takes no"
    ),
    case(
        "count",
        "if (thread == 7)\nwait_for_count(counter, 3);\n__syncthreads();",
        *("deadlock:", "warp 0, lanes 0x00000080: runs at PTX line ", "count.cu:2: ", "lanes 0xffffff7f: "),
    ),
    case(
        "count_of_others",
        "if (thread == 0 && block > 0) add_release(counter, 1);\nif (thread == 0) wait_for_count(counter, 3);",
        *("deadlock:", "\n  block 0 0 0, warp 0, lanes 0x00000001: runs at", "count_of_others.cu:2: "),
        blocks=3,
    ),
    case(
        "cluster_barrier",
        "if (block == 0) {\ncluster_arrive();\ncluster_wait();\n} else {\nbar_sync(1, 64);\n}",
        *("deadlock:", "block 0 0 0, warp 0, lanes 0xffffffff: waits at PTX line ", "cluster_barrier.cu:3: barrier.cl"),
        "block 1 0 0, warp 0, lanes 0xffffffff: waits at a barrier",
        blocks=2,
        cluster=2,
    ),
    case("arrives_twice", "cluster_arrive();\ncluster_arrive();", "the warp has arrived and not waited"),
    case("never_arrives", "cluster_wait();", "the warp has not arrived"),
    case(
        "lanes_of_a_cluster_barrier",
        "if (thread < 16) out[thread] = __shfl_sync(0xFFFF, thread, 3); else cluster_arrive();\ncluster_wait();",
        "deadlock:",
    ),
    # --- other blocks of the cluster ---
    case("no_such_block", "mbarrier_arrive_cluster(base, 2);", "mapa: block 2 of the cluster", blocks=2, cluster=2),
    case(
        "block_that_left",
        "if (thread == 0) mbarrier_init(base, 1);\nif (block == 1) return;\ncluster_arrive();\ncluster_wait();\n"
        "if (thread == 0) mbarrier_arrive_cluster(base, 1);",
        *("block_that_left.cu:5", "block 1 of the cluster has left"),
        blocks=2,
        cluster=2,
    ),
    case(
        "block_without_mbarrier",
        "if (block == 0) mbarrier_arrive_cluster(base, 1);\ncluster_arrive();\ncluster_wait();",
        "mbarrier.arrive: no mbarrier at 0x",
        blocks=2,
        cluster=2,
    ),
    # --- memory ---
    case("bulk_bytes", "bulk_store(out, base, 8);", "cp.async.bulk: 8 bytes"),
    case("bulk_address", "bulk_store(out + 1, base, 16);", "cp.async.bulk: address 0x", "is not a multiple of 16"),
    case("bulk_source", "bulk_reduce_add(out, base + 8, 16);", "cp.async.bulk: shared address 0x", "multiple of 16"),
    case("bulk_past_the_end", "bulk_store(out + 1020, base, 32);", "cp.async.bulk: 32 bytes at 0x", "in no buffer"),
    case("bulk_far", f"bulk_store(out, base + {SHARED}, 16);", "16 bytes at shared address 0x", "are outside"),
    case(
        "global_proxy",
        "if (thread == 0) {\nout[0] = 1;\nbulk_reduce_add(out, base, 16);\ntma_commit();\ntma_wait<0>();\n"
        "wait_for_count(counter, 0);\n}",
        *("global_proxy.cu:3: cp.reduce", "was written by a store, and no fence.proxy.async.global since"),
    ),
    case("after", "out[1024 + thread] = 1;", "after.cu:1: st.global", "4 bytes at 0x", "in no buffer: 4096 bytes from"),
    case("before", "out[thread] = out[thread - 1];", "ld: 4 bytes at 0x", "in no buffer: -4 bytes from"),
    case(
        "wraps",
        'asm volatile("st.global.u32 [%0], 1;" :: "l"(-4ll) : "memory");',
        "4 bytes at 0xfffffffffffffffc are in no",
    ),
    case(
        "wraps_shared",
        'asm volatile("st.shared.u32 [%0], 1;" :: "r"(-4) : "memory");',
        "4 bytes at shared address 0xfffffffc are outside",
    ),
    case("misaligned", "*reinterpret_cast<float2*>(out + 1) = {1, 2};", "is not a multiple of 8"),
    case("shared_end", f"shared[{SHARED} + thread] = 1;", "st: 1 bytes at shared address 0x", "are outside"),
    case("misaligned_shared", "*reinterpret_cast<float*>(shared + 2) = 1;", "is not a multiple of 4"),
    case("no_map", "tma_prefetch(*reinterpret_cast<TensorMap*>(out));", "no tensor map at 0x"),
    case("traps", "if (thread == 1) __trap();", "traps.cu:1: ", ": trap"),
    case("left_early", "cp_async_16(base, out);\ncp_async_commit();", "leaves with cp.async in flight"),
    case("copied_bytes", "cp_async_16(base, out, 20);", "cp.async: 20 bytes"),
    # --- products ---
    case(
        "read_early",
        TILE + "wgmma_fence();\n" + PRODUCT + STORE + "\nwgmma_wait<0>();",
        "reads a register of a wgmma in flight",
        threads=128,
    ),
    case("no_fence", TILE + PRODUCT + "wgmma_wait<0>();\n" + STORE, "wgmma without wgmma.fence", threads=128),
    case(
        "touched",
        TILE + "wgmma_fence();\nsums[2] += out[1];\n" + PRODUCT + "wgmma_wait<0>();\n" + STORE,
        "wgmma: register 2 of the accumulator is touched since the last wgmma.fence",
        threads=128,
    ),
    case(
        "source_changes",
        TILE + "wgmma_fence();\n" + PRODUCT + "shared[base - shared_address(shared) + thread] = 1;\n"
        "fence_proxy_async();\nwgmma_wait<0>();\n" + STORE,
        "wgmma: what it reads changes before it is waited for",
        threads=128,
    ),
    case(
        "no_proxy_fence",
        TILE + "shared[base - shared_address(shared)] = 0;\nwgmma_fence();\n" + PRODUCT + "wgmma_wait<0>();\n" + STORE,
        *("wgmma: warp ", "and no fence.proxy.async since"),
        threads=128,
    ),
    case(
        "fence_of_mbarriers",
        TILE
        + "shared[base - shared_address(shared)] = 0;\nfence_mbarrier_init();\nwgmma_fence();\n"
        + PRODUCT
        + "wgmma_wait<0>();\n"
        + STORE,
        *("wgmma: warp ", "and no fence.proxy.async since"),
        threads=128,
    ),
    case(
        "sums_as_a",
        products(
            WGMMA + "{%0, %1, %2, %3}, %8, %8, p, 1, 1, 0, 0;",
            WGMMA + "{%4, %5, %6, %7}, {%0, %1, %2, %3}, %8, p, 1, 1, 0;",
        ),
        "reads a register of a wgmma in flight",
        threads=128,
    ),
    case(
        "a_as_sums",
        products(
            WGMMA + "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p, 1, 1, 0;",
            WGMMA + "{%4, %5, %6, %7}, %8, %8, p, 1, 1, 0, 0;",
        ),
        "writes a register of a wgmma in flight",
        threads=128,
    ),
    case(
        "unpacked",
        products(WGMMA + "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p, 1, 1, 0;", "mov.b64 {free, %4}, %8;"),
        "writes a register of a wgmma in flight",
        threads=128,
    ),
    case(
        "far_tile",
        TILE + f"wgmma_fence();\nwgmma<8, bfloat16>(sums, tile + {SHARED // 16}, tile, true);\nwgmma_commit();\n"
        "wgmma_wait<0>();\n" + STORE,
        *("wgmma: 16 bytes at shared address", "are outside"),
        threads=128,
    ),
    case(
        "descriptors",
        TILE + "wgmma_fence();\nwgmma<8, bfloat16>(sums, tile + thread % 2, tile, true);\nwgmma_commit();\n"
        "wgmma_wait<0>();\n" + STORE,
        "wgmma: lanes give different descriptors",
        threads=128,
    ),
    case("left_with_products", TILE + "wgmma_fence();\n" + PRODUCT, "leaves with wgmma in flight", threads=128),
    case(
        "three_warps",
        TILE + "if (thread >= 32) {\nwgmma_fence();\n" + PRODUCT + "wgmma_wait<0>();\n}\n" + STORE,
        "block 0 0 0: the warps of warpgroup 0 start different numbers of wgmma",
        threads=128,
    ),
    case(
        "registers",
        "if (thread < 128) setmaxnreg_increase<240>();\nout[thread] = 1;",
        *("deadlock:", "registers.cu:1", "setmaxnreg.inc.sync.aligned.u32 240"),
        threads=384,
    ),
    case("more_registers", "setmaxnreg_decrease<240>();", "setmaxnreg.dec to 240 from 168", threads=384),
]

# Kernels without an error, and what they write.
RIGHT = [
    (
        Case(
            "masks", "out[thread] = __shfl_sync(thread < 16 ? 0xFFFF : 0xFFFF0000, thread, thread / 16 * 16 + 3);", ()
        ),
        [3] * 16 + [19] * 16,
    ),
    (Case("half_leaves", "if (thread >= 16) return;\n__syncwarp();\nout[thread] = 1;", ()), [1] * 16 + [0] * 16),
    (
        Case(
            "other_half_leaves",
            "if (thread < 16)\nout[31 - thread] = __shfl_sync(0xFFFFFFFF, thread, 5);\nelse\nout[thread - 16] = 2;",
            (),
        ),
        [2] * 16 + [5] * 16,
    ),
    (
        Case("half_syncs", "if (thread >= 16) return;\n__syncthreads();\nout[thread] = 1;", (), 64),
        [1] * 16 + [0] * 48,
    ),
    (
        Case(  # the first warp waits long before the other leaves
            "warp_leaves",
            "if (thread >= 32) {\nfor (int i = 0; i < 1000; ++i) static_cast<volatile float*>(out)[thread] = i;\n"
            "return;\n}\n__syncthreads();\nout[thread] = 1;",
            (),
            64,
        ),
        [1] * 32 + [999] * 32,
    ),
    (
        Case(
            "guarded",
            "out[thread] = 1;\n"
            'asm volatile("{.reg .pred p;\\n.reg .b32 x;\\nsetp.lt.s32 p, %1, 8;\\n"\n'
            '"@p shfl.sync.idx.b32 x, %1, 2, 31, 255;\\n@p st.global.b32 [%0], x;}"\n'
            ':: "l"(out + thread), "r"(thread) : "memory");\n'
            "if (thread < 8) out[thread] = reinterpret_cast<int*>(out)[thread];",
            (),
        ),
        [2] * 8 + [1] * 24,
    ),
    (
        Case(
            "count_is_there",  # the block that comes last lets the others go
            "if (thread == 0 && block == 6) add_release(counter + 1023, 1);\nwait_for_count(counter + 1023, 1);\n"
            "if (thread == 0) out[block] = 1;",
            (),
            blocks=7,
        ),
        [1] * 7 + [0] * 25,
    ),
    (
        Case(
            "cluster_ranks",
            "cluster_arrive();\nif (thread == 0) out[block] = cluster_rank();\ncluster_wait();",
            (),
            blocks=6,
            cluster=3,
        ),
        [0, 1, 2, 0, 1, 2, 0, 0],
    ),
    (
        Case(
            "products",
            products(
                WGMMA + "{%0, %1, %2, %3}, %8, %8, p, 1, 1, 0, 0;",
                WGMMA + "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p, 1, 1, 0;",
            ),
            (),
            128,
        ),
        [0] * 128 + [10] * 128,
    ),
]

ORDER = Case("order", "out[1 + atomicAdd(reinterpret_cast<int*>(out), 1)] = thread / 32;", (), 256)
FINE = Case("fine", "out[thread] = 1;", ())
FRESH = Case("fresh", "out[thread] = reinterpret_cast<float*>(shared)[thread];", ())


@pytest.fixture(scope="module")
def kernels(executor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptx")
    all_kernels = [
        KERNEL.format(
            name=one.name, body=one.body, threads=one.threads, shared=SHARED, blocks=one.blocks, cluster=one.cluster
        )
        for one in (*CASES, *(one for one, _ in RIGHT), ORDER, FINE, FRESH)
    ]
    source = write_kernels(folder, "errors.cu", SOURCE + "".join(all_kernels) + ENTRIES)
    return PtxLibrary(build_for_ptx(source, executor, "90a"), executor)


@pytest.fixture
def out():
    return torch.zeros(1024)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_error_is_named(kernels, case, seed, out):
    said = message(kernels, case.name, out, seed=seed)
    assert said.startswith(f"{case.name}: cudaErrorLaunchFailure, ")
    for word in case.words:
        assert word in said
    kernels.call("fine", out)  # the next launch runs
    assert out[:32].eq(1).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case[0].name)
def test_what_is_right_is_run(kernels, case, seed, out):
    kernel, written = case
    kernels.call(kernel.name, out, seed=seed)
    assert out[: len(written)].tolist() == written


def test_shared_memory_is_undefined_at_first(kernels, out):
    kernels.call("fresh", out)
    assert out[:32].isnan().all()


def test_a_seed_is_an_order(kernels):
    def order(seed):
        out = torch.zeros(1024)
        kernels.call("order", out, seed=seed)
        assert out.view(torch.int32)[0] == 256
        return tuple(out[1:257].tolist())

    orders = [order(seed) for seed in range(8)]
    assert orders == [order(seed) for seed in range(8)]
    assert len(set(orders)) > 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offset": 2}, "address"),
        ({"stride": 130}, "stride"),
        ({"stride": 1 << 40}, "stride"),
        ({"rows": 0}, "size"),
        ({"box_columns": 4}, "rows of the box are no multiple of 16 bytes"),
        ({"box_columns": 128}, "rows of the box are wider than the swizzle"),
        ({"box_rows": 257}, "box"),
    ],
)
def test_tensor_map_is_refused(kernels, change, words, out, capfd):
    whole = {"offset": 0, "columns": 128, "rows": 4, "stride": 256, "box_columns": 64, "box_rows": 4, "swizzle": 1}
    tensor = out.bfloat16()
    kernels.call("tensor_map", tensor, *list(whole.values())[1:])
    offset, *numbers = (whole | change).values()
    message(kernels, "tensor_map", tensor[offset // 2 :], *numbers)
    assert re.search(rf"^cuTensorMapEncodeTiled: {words}$", capfd.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize(
    ("grid", "threads", "shared", "words"),
    [
        ((1, 1), 0, 0, "0 threads in a block"),
        ((1, 1), 1025, 0, "1025 threads in a block"),
        ((0, 1), 32, 0, "a grid of 0 x 1 x 1"),
        ((1, 65536), 32, 0, "a grid of 1 x 65536 x 1"),
        ((1, 1), 32, 232449, "needs 232449 bytes of shared memory per block; this GPU has 232448"),
    ],
)
def test_launch_is_refused(kernels, grid, threads, shared, words):
    kernels.call("empty", 2, 2, 1024, 232448)
    assert words in message(kernels, "empty", *grid, threads, shared)


def test_the_limit_of_shared_memory_is_set_once_for_each_kernel_and_gpu(kernels):
    def launch(gpu, shared):
        kernels.gpu, before = gpu, kernels.limits_set
        try:
            kernels.call("empty", 1, 1, 32, shared)
        finally:
            kernels.gpu = 0
        return kernels.limits_set - before

    first, second = 5, 6
    assert launch(first, 48 * 1024) == 0
    assert [launch(first, 60_000) for _ in range(3)] == [1, 0, 0]
    assert launch(second, 60_000) == 1
    assert launch(first, 50_000) == 0
    assert [launch(first, 70_000) for _ in range(2)] == [1, 0]


def test_a_refused_limit_of_shared_memory_is_refused_again(kernels):
    try:
        kernels.gpu = 7
        for _ in range(2):
            said = message(kernels, "empty", 1, 1, 32, 150_000, shared_limit=99 * 1024)
            assert said == "empty: needs 150000 bytes of shared memory per block; this GPU has 101376"
        kernels.call("empty", 1, 1, 32, 100_000, shared_limit=99 * 1024)
    finally:
        kernels.gpu = 0
