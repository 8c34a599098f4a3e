"""Limits of what costs.py counts: bank conflicts, split stores, sectors of global memory."""

import re

import budget
import costs
import pytest
import torch

ATTENTION = [name for name in costs.CALLS if name.startswith("attention")]
SCHULZ = [name for name in costs.CALLS if name.startswith("newton_schulz")]
# Of the least, by instruction. Newton-Schulz reads float32 by halves of sectors, and with mma.sync its sources by
# fragments.
SECTORS = {"elementwise": 1.02} | dict.fromkeys(ATTENTION, 1) | dict.fromkeys(SCHULZ, 2)
# With mma.sync the mirrored half of a symmetric product is read by columns.
WAVEFRONTS = {"newton_schulz, mma.sync": 1.5}

WASTE = """
#include "../../../csrc/cuda/ptx/primitives.cuh"
#include "../entry.h"
using namespace nanochat::device;
__global__ void waste_kernel(float* out) {
    NANOCHAT_SHARED(float[1024], shared);
    for (int i = 0; i < 32; ++i) shared[32 * i + threadIdx.x] = out[threadIdx.x];
    __syncwarp();
    const float x = shared[32 * threadIdx.x];
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = x + i;
}
__global__ void thrift_kernel(float* out) {
    NANOCHAT_SHARED(float[1024], shared);
    for (int i = 0; i < 32; ++i) shared[32 * i + threadIdx.x] = out[threadIdx.x];
    __syncwarp();
    const float x = shared[33 * threadIdx.x];
    for (int i = 0; i < 4; ++i) out[32 * i + threadIdx.x] = x + i;
}
__global__ void guarded_kernel(float* out) {
    asm volatile("{.reg .pred p;\\n.reg .pred q;\\nsetp.lt.u32 p, %1, 32;\\nsetp.lt.u32 q, %1, 31;\\n"
                 "@p st.global.b32 [%0], 0;\\n@q st.global.b32 [%0+4], 0;\\n"
                 "@p st.global.b32 [%0+8], 0;\\n@p st.global.b32 [%0+12], 0;}"
                 :: "l"(out + 4 * threadIdx.x), "r"(threadIdx.x) : "memory");
}
ENTRY(waste) { launch("waste", waste_kernel, dim3(1), dim3(32), 0, nullptr, arguments[0].to<float>()); }
ENTRY(guarded) { launch("guarded", guarded_kernel, dim3(1), dim3(32), 0, nullptr, arguments[0].to<float>()); }
ENTRY(thrift) { launch("thrift", thrift_kernel, dim3(1), dim3(32), 0, nullptr, arguments[0].to<float>()); }
"""


@pytest.fixture(scope="module")
def measured(executor):
    """Return the launches of a call of costs.py."""
    found = {}

    def measure(name):
        if name not in found:
            torch.manual_seed(0)
            found[name] = costs.record(*costs.CALLS[name])
        return found[name]

    return measure


@pytest.mark.slow
@pytest.mark.parametrize("call", ATTENTION)
def test_attention_has_no_bank_conflicts(measured, call):
    assert len(measured(call)) == 4
    assert [(launch.kernel, launch.conflicts()) for launch in measured(call) if launch.conflicts()] == []


@pytest.mark.slow
@pytest.mark.parametrize("call", costs.CALLS)
def test_no_stores_that_one_store_could_do(measured, call):
    groups = [group for launch in measured(call) for group in launch.split_stores()]
    assert [[one.place for one in group] for group in groups] == []


@pytest.mark.slow
@pytest.mark.parametrize("call", costs.CALLS)
def test_few_more_sectors_and_wavefronts_than_needed(measured, call):
    for launch in measured(call):
        assert (launch.ratio(costs.GLOBAL) or 1) <= SECTORS[call], launch.kernel
        assert (launch.ratio(costs.SHARED) or 1) <= WAVEFRONTS.get(call, 1), launch.kernel


@pytest.mark.slow
@pytest.mark.parametrize("window", [30, 200])
def test_a_consumer_multiplies_the_blocks_that_it_sees_alone(executor, window):
    def forward(kernels):
        q, k, v = (torch.randn(1, 500, 2, 64).bfloat16() for _ in range(3))
        costs.operators.attention_forward(kernels, q, k, v, hopper=True, window=window)

    (launch,) = costs.record("90a", forward)
    D, consumers, keys = map(int, re.search(r"ForwardTile<(\d+), (\d+), (\d+)>", launch.kernel).groups())
    turns = budget.forward_turns(budget.Attention(1, 2, 2, 500, 64, window=window), consumers, keys)
    taken = 2 * sum(active * count for tile in turns for (active, _), count in tile.items())
    products = sum(one.runs for one in launch.code if one.text.startswith("wgmma.mma_async"))
    assert products == 4 * taken * (D + keys) // 16


# --- the counts can be wrong ---


@pytest.fixture(scope="module")
def examples(executor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("costs")
    source = folder / "tests/emulation/kernels/waste.cu"
    source.parent.mkdir(parents=True)
    (folder / "csrc").symlink_to(costs.ROOT / "csrc")
    (folder / "tests/emulation/entry.h").symlink_to(costs.ROOT / "tests/emulation/entry.h")
    source.write_text(WASTE)
    return source


def example(source, entry):
    (launch,) = costs.record("90a", lambda kernels: kernels.kernels(source).call(entry, torch.zeros(128)))
    return launch


def test_waste_is_counted(examples):
    launch = example(examples, "waste")
    (conflict,) = launch.conflicts()
    assert (conflict.kind, conflict.runs, conflict.passes, conflict.least) == ("shared_load", 1, 32, 1)
    (group,) = launch.split_stores()
    assert [(one.address[1], one.passes, one.least) for one in group] == [(at, 16, 4) for at in (0, 4, 8, 12)]
    assert "x32.0: PTX line" in costs.report(launch)
    assert "4 stores for one, 1 times: waste.cu:10" in costs.report(launch)


def test_stores_with_different_predicates_stay_apart(examples):
    (group,) = example(examples, "guarded").split_stores()
    assert [one.address[1] for one in group] == [8, 12]


def test_nothing_is_counted_where_nothing_is_wasted(examples):
    launch = example(examples, "thrift")
    assert launch.conflicts() == launch.split_stores() == []
    assert launch.ratio(costs.SHARED) == launch.ratio(costs.GLOBAL) == 1
    stores = [one for one in launch.code if one.kind == "global_store"]
    assert [(one.runs, one.lanes, one.passes) for one in stores] == [(1, 32, 4)] * 4
