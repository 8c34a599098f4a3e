"""The budget of the attention kernels with mma.sync: what it counts, and which pipe bounds each kernel."""

import mma_budget
import pytest
import toolchain

PRODUCTS = {"forward": 2, "backward_keys": 4, "backward_rows": 3}  # of a row and a key


@pytest.fixture(scope="module")
def turns():
    try:
        toolchain.nvdisasm()
        return mma_budget.turns()
    except toolchain.MissingError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_turns_hold_the_products_of_their_tiles(turns):
    assert len(turns) == 9
    for turn in turns:
        (products,) = (count for kind, count in PRODUCTS.items() if f"attention_{kind}_kernel" in turn.name)
        D = int(turn.name.split("Tile<")[1].split(",")[0])
        assert turn.products * mma_budget.WARPS * 16 * 8 * 16 == products * turn.pairs * D, turn.name
        assert turn.shared <= 99 * 1024, turn.name


@pytest.mark.slow
def test_shared_memory_bounds_few_kernels_on_an_a100_and_none_on_a_geforce(turns):
    a100, *geforces = mma_budget.GPUS
    bound = {turn.name for turn in turns if turn.pipes(a100)["shared"] > turn.pipes(a100)["tensor"]}
    # A warp has 16 keys, so it reads a fragment for every two products.
    assert bound == {
        "attention_backward_keys_kernel<bfloat16, KeyTile<96, 1, 64> >",
        "attention_backward_keys_kernel<bfloat16, KeyTile<128, 1, 64> >",
    }
    for gpu in geforces:
        for turn in turns:
            pipes = turn.pipes(gpu)
            assert max(pipes, key=pipes.get) == "tensor", (gpu.name, turn.name)


@pytest.mark.parametrize(("gpu", "peak"), list(zip(mma_budget.GPUS, (312, 165, 210), strict=True)))
def test_the_figures_of_a_gpu_give_its_published_peak(gpu, peak):
    """TFLOP/s of bfloat16 with float32 sums, without sparsity."""
    flop = 4 * 4096 / gpu.product_cycles
    assert gpu.multiprocessors * gpu.clock * flop / 1e12 == pytest.approx(peak, rel=5e-3)
