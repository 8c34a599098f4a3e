"""What the emulation itself reports: each misuse, from a kernel of a few lines, with the words that name its place."""

from dataclasses import dataclass

import pytest
import torch
from harness import Library, build, message, write_kernels

SHARED = 4096  # bytes of dynamic shared memory, `base` is its first multiple of 1024

SOURCE = """
#include <stdexcept>
#include "../../../csrc/cuda/tensor_map.h"
#include "../entry.h"
using namespace nanochat::device;
"""

KERNEL = """
__global__ void {name}_kernel(float* out) {{
    NANOCHAT_DYNAMIC_SHARED(shared);
    const uint32_t base = (shared_address(shared) + 1023) & ~1023u;
    const int thread = threadIdx.x, block = blockIdx.x;
    auto* counter = reinterpret_cast<uint32_t*>(out);
    const TensorMap map = nanochat::cuda::make_tensor_map(
        nanochat::DType::float32, out, {{64, 4}}, {{256}}, {{8, 4}}, Swizzle::none);
    (void)base, (void)thread, (void)block, (void)counter, (void)map;
#line 1
{body}
}}
ENTRY({name}) {{
    launch("{name}", {name}_kernel, dim3({blocks}), dim3({threads}), {shared}, nullptr,
           LaunchOptions{{.cluster = {cluster}}}, arguments[0].to<float>());
}}
"""

ENTRIES = """
ENTRY(tensor_map) {
    const auto number = [&](int i) { return arguments[i].integer; };
    nanochat::cuda::make_tensor_map(nanochat::DType::bfloat16, arguments[0].pointer, {number(1), number(2)},
                                    {number(3)}, {static_cast<int>(number(4)), static_cast<int>(number(5))},
                                    static_cast<Swizzle>(number(6)));
}
__global__ void nothing_kernel() {}
ENTRY(nothing) {
    const auto number = [&](int i) { return static_cast<unsigned>(arguments[i].integer); };
    launch("nothing", nothing_kernel, dim3(number(0), number(1)), dim3(number(2)), number(3), nullptr);
}
ENTRY(nothing_in_clusters) {
    const LaunchOptions options{.cluster = static_cast<int>(arguments[1].integer)};
    launch("nothing", nothing_kernel, dim3(static_cast<unsigned>(arguments[0].integer)), dim3(32), 0, nullptr, options);
}
ENTRY(nothing_waits) {
    launch("nothing", nothing_kernel, dim3(2), dim3(32), 0, nullptr, LaunchOptions{.overlaps_previous = true});
}
"""


@dataclass(frozen=True)
class Misuse:
    name: str
    body: str
    words: tuple[str, ...]  # all of them stand in the message
    threads: int = 32
    blocks: int = 1
    cluster: int = 1


def misuse(name, body, *words, **sizes):
    return Misuse(name, body, words, **sizes)


WGMMA = "float sums[4] = {}; const uint64_t tile = wgmma_descriptor(base, 128, 256, Swizzle::none);\n"

MISUSES = [
    # --- who waits for whom ---
    misuse(
        "two_barriers",
        "if (thread < 32)\nbar_sync(1, 96);\nelse\nbar_sync(2, 96);",
        *(
            "deadlock",
            "threads 0-31 wait in bar.sync at line 2 (barrier 1)",
            "threads 32-63 wait in bar.sync at line 4",
        ),
        threads=64,
    ),
    misuse(
        "no_phase_ends",
        "if (thread == 0) mbarrier_init(base, 1);\n__syncthreads();\nif (thread == 5) mbarrier_wait(base, 0);",
        *("deadlock: threads 5-5 wait in mbarrier.try_wait at line 3 (barrier 0x", ", parity 0)"),
    ),
    misuse(
        "spins_for_ever",
        "if (thread == 0) mbarrier_init(base, 1);\n__syncthreads();\nwhile (!mbarrier_try_wait(base, 0)) {\n}",
        "deadlock: threads 0-31 wait in mbarrier.try_wait",
    ),
    misuse(
        "warp_waits", "if (thread < 16) __syncthreads();\nelse\n__syncwarp();", "__syncwarp at line 3", "__syncthreads"
    ),
    misuse(
        "not_enough_registers",
        "setmaxnreg_increase<232>();",
        *("deadlock", "wait in setmaxnreg.inc, for free registers"),
        threads=384,
    ),
    misuse("registers_kept", "setmaxnreg_increase<24>();", "setmaxnreg.inc to 24: the threads hold 248"),
    misuse("registers_taken", "setmaxnreg_decrease<256>();", "setmaxnreg.dec to 256: the threads hold 248"),
    misuse(
        "no_change_of_a_count",
        "if (thread == 7)\nwait_for_count(counter, 3);",
        "deadlock: threads 7-7 wait in wait_for_count at line 2 (the counter is 0, not yet 3);",
    ),
    misuse(
        "count_of_others",
        "if (thread == 0 && block > 0) add_release(counter, 1);\nif (block == 0) wait_for_count(counter, 3);",
        "deadlock: block (0, 0, 0): threads 0-31 wait in wait_for_count at line 2 (the counter is 2, not yet 3);",
        blocks=3,
    ),
    misuse(
        "blocks_wait_for_each_other",
        "if (thread == 0) wait_for_count(counter + block, 1);\n__syncthreads();\n"
        "if (thread == 0) add_release(counter + 1 - block, 1);",
        *("deadlock: block (", " block (0, 0, 0): threads 0-0 wait in wait_for_count at line 1 (the counter is 0"),
        *(
            " threads 1-31 wait in __syncthreads at line 2 (barrier 0);",
            " block (1, 0, 0): threads 0-0 wait in wait_for_count",
        ),
        blocks=2,
    ),
    misuse(
        "more_blocks_than_run_together",
        "if (thread == 0) add_release(counter, 1);\nwait_for_count(counter, 1000);",
        *("deadlock: block (", " and 154 more blocks wait; 840 blocks have not started;"),
        blocks=1000,
    ),
    misuse(
        "no_block_of_the_cluster_arrives",
        "if (block == 0) {\ncluster_arrive();\ncluster_wait();\n} else {\nbar_sync(1, 64);\n}",
        *("deadlock: block (0, 0, 0): threads 0-31 wait in barrier.cluster.wait at line 3;", "bar.sync at line 5"),
        blocks=2,
        cluster=2,
    ),
    misuse("arrives_twice", "cluster_arrive();\ncluster_arrive();", "the thread has arrived and not waited"),
    misuse("never_arrives", "cluster_wait();", "barrier.cluster.wait: the thread has not arrived"),
    misuse(
        "half_a_warp_arrives",
        "if (thread < 16) cluster_arrive();\nelse\n__syncwarp();",
        *("barrier.cluster.arrive", "__syncwarp"),
    ),
    # --- other blocks of the cluster ---
    misuse(
        "mbarrier_of_no_block",
        "mbarrier_arrive_cluster(base, 2);",
        "mbarrier.arrive: block 2 of a cluster of 2",
        blocks=2,
        cluster=2,
    ),
    misuse(
        "mbarrier_of_a_block_that_left",  # the barrier is complete once the other block has left
        "if (thread == 0) mbarrier_init(base, 1);\nif (block == 1) return;\ncluster_arrive();\ncluster_wait();\n"
        "if (thread == 0) mbarrier_arrive_cluster(base, 1);",
        "mbarrier.arrive: block 1 of the cluster has left",
        blocks=2,
        cluster=2,
    ),
    misuse(
        "mbarrier_of_a_block_without",
        "if (block == 0) mbarrier_arrive_cluster(base, 1);\ncluster_arrive();\ncluster_wait();",
        "mbarrier.arrive: there is no initialised mbarrier at 0x",
        blocks=2,
        cluster=2,
    ),
    misuse(
        "load_into_no_block",
        "if (thread == 0) mbarrier_init(base + 1024, 1);\n"
        "if (thread == 0) tma_load_multicast(base, map, base + 1024, 0, 0, 0, 0);",
        "tensor load: no block in its mask",
    ),
    misuse(
        "load_into_a_block_that_left",
        "if (thread == 0) mbarrier_init(base + 1024, 1);\nif (block == 1) return;\ncluster_arrive();\ncluster_wait();\n"
        "if (thread == 0) tma_load_multicast(base, map, base + 1024, 2, 0, 0, 0);",
        "tensor load: block 1 of the cluster has left",
        blocks=2,
        cluster=2,
    ),
    misuse(
        "load_left",
        "mbarrier_init(base + 1024, 1);\nmbarrier_arrive_expect_tx(base + 1024, 128);\n"
        "tma_load(base, map, base + 1024, 0, 0);",
        "leaves with tensor loads in flight",
        threads=1,
    ),
    # --- the wrong threads together ---
    misuse(
        "divergent_barrier",
        "if (thread < 32)\n__syncthreads();\nelse\n__syncthreads();",
        *("__syncthreads at line", "meets __syncthreads at line"),
        threads=64,
    ),
    misuse(
        "different_counts", "bar_sync(1, thread < 32 ? 64 : 96);", "barrier 1: arrivals for", "64", "96", threads=64
    ),
    misuse("odd_count", "bar_sync(1, 33);", "barrier 1 for 33 threads"),
    misuse("no_such_barrier", "bar_sync(16, 32);", "barrier 16"),
    misuse("absent_lane", "if (thread < 16) __shfl_sync(0xFFFF, 1, 20);", "__shfl_sync: lane", "reads lane 20"),
    misuse("not_in_mask", "if (thread == 3) __syncwarp(1);", "__syncwarp: lane 3 is not in its own mask 00000001"),
    misuse(
        "other_operation", "thread % 2 ? __syncwarp() : (void)__ballot_sync(~0u, 1);", "__syncwarp", "meets", "vote"
    ),
    misuse(
        "half_a_warp",
        "uint32_t r[4]; if (thread < 16) ldmatrix_x4(r, base);",
        "ldmatrix takes all 32 lanes, not 0000ffff",
    ),
    misuse(
        "half_a_product",
        "float d[4] = {}; const uint32_t a[4] = {}; mma_m16n8k16<bfloat16>(d, a, {a[0], a[1]});",
        "mma.sync takes all 32 lanes, not 0000ffff",
        threads=16,
    ),
    # --- memory ---
    misuse("odd_store", "store_16(out + 1, {1, 2, 3, 4});", "st.global.v4: address", "not a multiple of 16"),
    misuse("odd_short_store", "store_8(out + 1, {1, 2});", "st.global.v2: address", "not a multiple of 8"),
    misuse("odd_pair", "float x, y; load_shared_pair(x, y, base + 4);", "ld.shared.v2: shared address 0x", "of 8"),
    misuse(
        "far_row", f"uint32_t r[4]; ldmatrix_x4(r, base + {SHARED});", "ldmatrix: 16 bytes at offset", f"has {SHARED}"
    ),
    misuse(
        "odd_row", "uint32_t r[4]; ldmatrix_x4(r, base + 8);", "ldmatrix: shared address 0x", "not a multiple of 16"
    ),
    misuse("far_target", f"cp_async_16(base + {SHARED}, out);", "cp.async: 16 bytes at offset"),
    misuse("odd_target", "cp_async_16(base + 4, out);", "cp.async: shared address 0x", "not a multiple of 16"),
    misuse("odd_source", "cp_async_16(base + 16 * thread, out + 1);", "cp.async: source", "not a multiple of 16"),
    misuse("too_many_bytes", "cp_async_16(base + 16 * thread, out, 17);", "cp.async: 17 bytes"),
    misuse(
        "one_target",
        "cp_async_16(base, out);\n__syncthreads();",
        "cp.async: another copy into the same shared memory is in flight",
    ),
    misuse(
        "read_too_early",
        "uint32_t r[4]; cp_async_16(base + 16 * thread, out); ldmatrix_x4(r, base + 16 * thread);",
        "ldmatrix reads shared memory that a copy in flight is writing",
    ),
    misuse("past_the_end", f"shared[{SHARED}] = 1;", "past the end of dynamic shared memory", str(SHARED)),
    misuse("far_past_the_end", f"shared[{SHARED + 8191}] = 1;", f"offset {SHARED + 8191} of dynamic shared memory"),
    misuse("not_shared", "shared_address(out);", "shared_address", "is not in shared memory"),
    misuse(
        "too_much_static", "NANOCHAT_SHARED(float[5000], sums); sums[0] = 1;", "16384 bytes of static shared memory"
    ),
    # --- mbarriers ---
    misuse("far_mbarrier", f"mbarrier_init(base + {SHARED}, 1);", "mbarrier.init: 8 bytes at offset"),
    misuse("odd_mbarrier", "mbarrier_init(base + 4, 1);", "mbarrier.init: shared address 0x", "not a multiple of 8"),
    misuse("no_count", "mbarrier_init(base, 0);", "mbarrier.init: count 0"),
    misuse("no_mbarrier", "mbarrier_arrive(base);", "mbarrier.arrive: there is no initialised mbarrier at 0x"),
    misuse(
        "no_mbarrier_to_wait", "mbarrier_wait(base, 0);", "mbarrier.try_wait: there is no initialised mbarrier at 0x"
    ),
    misuse("wrong_parity", "mbarrier_init(base, 1); mbarrier_wait(base, 2);", "parity 2"),
    misuse(
        "too_many_arrivals",
        "mbarrier_init(base, 1); mbarrier_arrive_expect_tx(base, 16); mbarrier_arrive(base);",
        "gets more arrivals than its 1",
        threads=1,
    ),
    # --- tensor copies ---
    misuse(
        "odd_box",
        "mbarrier_init(base, 1); tma_load(base + 64, map, base, 0, 0);",
        *("tensor load: shared address 0x", "not a multiple of 128"),
    ),
    misuse("wrong_rank", "tma_store(map, base, 0, 0, 0);", "tensor store: no tensor map of rank 3"),
    misuse(
        "source_changes",
        "tma_store(map, base, 0, 0); tma_commit();\nshared[1024] ^= 1;\ntma_wait_read<0>();",
        "tensor store: its source changes before it is read",
        threads=1,
    ),
    misuse("odd_bulk_bytes", "bulk_store(out, base, 8);", "cp.async.bulk: 8 bytes; takes multiples of 16"),
    misuse("odd_bulk_address", "bulk_reduce_add(out + 1, base, 16);", "cp.reduce.async.bulk: address", "of 16"),
    misuse(
        "odd_bulk_source", "bulk_store(out, base + 8, 16);", "cp.async.bulk: shared address 0x", "not a multiple of 16"
    ),
    misuse("far_bulk_source", f"bulk_store(out, base + {SHARED}, 16);", "cp.async.bulk: 16 bytes at offset"),
    misuse(
        "bulk_source_changes",
        "bulk_reduce_add(out, base, 1024); tma_commit();\nshared[1024] ^= 1;\ntma_wait_read<0>();",
        "tensor store: its source changes before it is read",
        threads=1,
    ),
    # --- left in flight ---
    misuse("copy_left", "cp_async_16(base + 16 * thread, out); cp_async_commit();", "leaves with cp.async in flight"),
    misuse(
        "store_left", "tma_store(map, base, 0, 0); tma_commit();", "leaves before a tensor store has read", threads=1
    ),
    misuse("store_not_committed", "tma_store(map, base, 0, 0);", "tensor store that was not committed", threads=1),
    misuse(
        "product_left",
        WGMMA + "wgmma_fence(); wgmma<8, bfloat16>(sums, tile, tile, true); wgmma_commit();",
        "leaves with wgmma in flight",
        threads=128,
    ),
    # --- wgmma ---
    misuse(
        "no_fence", WGMMA + "wgmma<8, bfloat16>(sums, tile, tile, true);", "wgmma without a wgmma.fence", threads=128
    ),
    misuse(
        "other_descriptor",
        WGMMA + "wgmma_fence(); wgmma<8, bfloat16>(sums, tile + (thread == 7), tile, true); __syncthreads();",
        *("wgmma: lanes", "different descriptors"),
        threads=128,
    ),
    misuse(
        "three_warps",
        WGMMA + "wgmma_fence(); if (thread >= 32) wgmma<8, bfloat16>(sums, tile, tile, true);"
        "wgmma_commit(); wgmma_wait<0>();",
        "the warps of warpgroup 0 start different numbers of products",
        threads=128,
    ),
    misuse(
        "far_tile",
        WGMMA + f"wgmma_fence(); wgmma<8, bfloat16>(sums, tile + {(SHARED - 1024) // 16}, tile, true);",
        "wgmma: 16 bytes at offset",
        threads=128,
    ),
    # --- elsewhere ---
    misuse("throws", 'if (thread == 9) throw std::runtime_error("told so");', "thread (9, 0, 0)", "throws: told so"),
    misuse("traps", "if (thread == 1)\n__trap();", "thread (1, 0, 0): __trap, line 2"),
]

# Threads count up in the order in which they run.
ORDER = Misuse(
    "order",
    "for (int i = 0; i < 4; ++i) {\n__syncwarp();\nout[1 + atomicAdd(reinterpret_cast<int*>(out), 1)] = thread;\n}",
    (),
    64,
)
STORE = Misuse("store", "out[thread] = 1;", ())
FRESH = Misuse("fresh", "out[thread] = reinterpret_cast<float*>(shared)[thread];", ())


@pytest.fixture(scope="module")
def kernels(core, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulation")
    all_kernels = [
        KERNEL.format(name=m.name, body=m.body, threads=m.threads, shared=SHARED, blocks=m.blocks, cluster=m.cluster)
        for m in (*MISUSES, ORDER, STORE, FRESH)
    ]
    source = write_kernels(folder, "misuse.cu", SOURCE + "".join(all_kernels) + ENTRIES)
    return Library(build(source, core))


@pytest.fixture
def out():
    return torch.zeros(1024)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", MISUSES, ids=lambda case: case.name)
def test_misuse_is_named(kernels, case, seed, out):
    said = message(kernels, case.name, out, seed=seed)
    assert said.startswith(f"{case.name}: ")
    for word in case.words:
        assert word in said
    kernels.call("store", out)  # the process lives on
    assert out[:32].eq(1).all()


@pytest.mark.parametrize("address", [0, 16, 1 << 60])
def test_access_to_no_memory_is_an_error_of_the_launch(kernels, address, out):
    said = message(kernels, "store", address)
    assert "thread (0, 0, 0): invalid access to global memory at" in said
    kernels.call("store", out)
    assert out[:32].eq(1).all()


def test_shared_memory_is_undefined_at_first(kernels, out):
    kernels.call("fresh", out)
    assert out[:32].isnan().all()


def test_a_seed_is_an_order(kernels):
    def order(seed):
        out = torch.zeros(1024)
        kernels.call("order", out, seed=seed)
        assert out.view(torch.int32)[0] == 4 * 64
        return tuple(out[1:257].tolist())

    orders = [order(seed) for seed in range(8)]
    assert orders == [order(seed) for seed in range(8)]
    assert len(set(orders[:4])) == 4
    assert orders[2] != orders[6]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offset": 2}, "the address must be a multiple of 16"),
        ({"stride": 130}, "strides must be multiples of 16 bytes"),
        ({"stride": 1 << 40}, "below 2^40"),
        ({"rows": 0}, "sizes must be 1 to 2^32"),
        ({"box_columns": 4}, "rows must be multiples of 16 bytes"),
        ({"box_columns": 128}, "rows must fit the swizzle"),
        ({"box_columns": 32, "swizzle": 3}, "rows must fit the swizzle"),
        ({"box_rows": 257}, "a box takes 1 to 256 elements"),
        ({"box_rows": 0}, "a box takes 1 to 256 elements"),
    ],
)
def test_tensor_map_is_refused(kernels, change, words, out):
    whole = {"columns": 128, "rows": 4, "stride": 256, "box_columns": 64, "box_rows": 4, "swizzle": 1}
    tensor = out.bfloat16()
    kernels.call("tensor_map", tensor, *whole.values())
    moved = tensor[change.pop("offset", 0) // 2 :]
    said = message(kernels, "tensor_map", moved, *(whole | change).values())
    assert said.startswith("tensor map: ")
    assert words in said


@pytest.mark.parametrize(
    ("grid", "threads", "shared", "words"),
    [
        ((1, 1), 0, 0, "takes 1 to 1024"),
        ((1, 1), 1025, 0, "a block of (1025, 1, 1) threads"),
        ((0, 1), 32, 0, "a grid of (0, 1, 1) blocks"),
        ((1, 65536), 32, 0, "a grid of (1, 65536, 1) blocks"),
        ((1, 1), 32, 232449, "needs 232449 bytes of shared memory per block; this GPU has 232448"),
    ],
)
def test_launch_is_refused(kernels, grid, threads, shared, words):
    kernels.call("nothing", 2, 2, 1024, 232448)
    said = message(kernels, "nothing", *grid, threads, shared)
    assert said.startswith("nothing: ")
    assert words in said


def test_shared_memory_beyond_the_gpus_is_refused(kernels):
    kernels.call("nothing", 1, 1, 32, 99 * 1024, shared_limit=99 * 1024)
    said = message(kernels, "nothing", 1, 1, 32, 99 * 1024 + 1, shared_limit=99 * 1024)
    assert said == "nothing: needs 101377 bytes of shared memory per block; this GPU has 101376"


def test_clusters_must_divide_the_grid(kernels):
    kernels.call("nothing_in_clusters", 16, 8)
    for width, cluster in ((6, 4), (16, 16), (16, 0)):
        said = message(kernels, "nothing_in_clusters", width, cluster)
        assert f"nothing: clusters of {cluster} blocks in a grid of width {width}" in said


def test_a_grid_that_overlaps_the_previous_one_must_wait_for_it(kernels):
    assert "never waits for the previous grid" in message(kernels, "nothing_waits")
