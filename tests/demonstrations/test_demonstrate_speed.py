import platform
import re
import subprocess
from pathlib import Path

import pytest
import torch

from nanochat_native.bench.attention import Problem
from nanochat_native.bench.operators import newton_schulz_flops
from nanochat_native.demonstrations import speed
from nanochat_native.demonstrations.speed import (
    attention_share,
    attention_work,
    bank_conflicts,
    by_loops,
    by_outer_products,
    by_rows,
    gram_form,
    mma_a,
    mma_b,
    mma_d,
    mma_fragment,
    newton_schulz_work,
    operators,
    register_tile,
    swizzled,
    update_share,
)
from nanochat_native.runtime.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("window", [None, 256])
def test_attention_has_the_operations_of_the_benchmark(window):
    problem = Problem(B=4, T=1024, H=6, D=64, window=window)
    assert attention_work(4, 1024, 6, 64, window, 4)[0] == problem.flops("fwd+bwd")


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (256, 1024)])
def test_newton_schulz_does_less_than_whole_products(shape):
    work = newton_schulz_work(*shape)
    assert work["whole_products"] == newton_schulz_flops([(1, *shape)])
    assert work["used"] <= work["plain"] < work["whole_products"]


def test_the_forms_of_newton_schulz_are_those_of_the_kernel():
    source = (ROOT / "csrc/cpu/newton_schulz.cpp").read_text()
    assert "constexpr int64_t kGramAspect = 4;" in source
    assert "plain 5 (3 r + 1),  Gram 6 r + 34" in source
    for aspect in (1, 4, 7):
        work = newton_schulz_work(aspect, 1)
        assert (work["plain"], work["gram"]) == (5 * (3 * aspect + 1), 6 * aspect + 34)


def test_the_gram_form_is_less_work_from_the_aspect_at_which_it_is_used():
    found = gram_form()
    assert 3 < found["equal_at"] < 4
    assert found["3"]["gram_over_plain"] > 1 > found["4"]["gram_over_plain"]


def test_each_case_of_the_committed_benchmark_has_its_work():
    found = {(row["group"], row["case"]) for row in operators()["rows"]}
    assert len(found) == len(operators()["rows"])
    assert all(row["intensity"] > 0 for row in operators()["rows"])


def test_updates_and_generation_are_bound_by_memory_and_products_are_not():
    rows = operators()["rows"]
    for row in rows:
        if row["kind"] in ("AdamW", "generation"):
            assert row["intensity"] <= 4
        else:
            assert row["intensity"] > 50


def test_scores_are_half_of_a_block_at_six_times_the_width():
    rows = attention_share()["rows"]
    for row in rows[2::3]:
        assert row["T"] == 6 * 64 * row["depth"]
        assert row["share"] == pytest.approx(0.5)
    for short, long in zip(rows[::3], rows[1::3], strict=True):
        assert short["share"] < long["share"]


def test_muon_is_a_tenth_of_the_work_of_a_small_step():
    assert 0.05 < update_share()["muon_over_step"] < 0.2


@pytest.mark.parametrize("multiply", [by_rows, by_outer_products])
def test_the_ways_to_multiply_agree(multiply):
    a, b = torch.randn(5, 7).numpy(), torch.randn(7, 3).numpy()
    assert multiply(a, b) == pytest.approx(a @ b, rel=1e-4, abs=1e-5)
    assert torch.tensor(by_loops(a.tolist(), b.tolist())).numpy() == pytest.approx(a @ b, rel=1e-4, abs=1e-5)


def test_the_register_tile_is_that_of_the_source_and_fits_into_the_registers():
    found = register_tile()
    simd, gemm = ((ROOT / f"csrc/cpu/{name}.h").read_text() for name in ("simd", "gemm"))
    assert re.findall(r"kVectorBytes = (\d+)", simd) == ["64", "32", "16", "16"]
    assert re.findall(r"kTileVectors = (\d+)", simd) == ["4", "2", "4", "2"]
    assert "kTileRows = 6" in gemm
    for isa in ("baseline", "avx2", "avx512"):
        assert found[isa]["registers_used"] <= found[isa]["registers"]
        assert found[isa]["multiply_adds_per_load"] > 2 * found["dot_product"]["multiply_adds_per_load"]


def test_each_element_of_a_fragment_has_one_lane():
    found = mma_fragment()
    for name, count in (("a", 8), ("b", 4), ("d", 4)):
        lanes = [lane for row in found[name]["lanes"] for lane in row]
        assert sorted(lanes) == sorted(list(range(32)) * count)
    half = [row[:8] for row in found["a"]["lanes"]]
    assert half == found["d"]["lanes"], "the sums lie as the left half of A"


def test_the_swizzle_spreads_rows_and_columns_over_all_banks():
    found = bank_conflicts()
    assert (found["plain"]["reads_of_a_row"], found["plain"]["reads_of_a_column"]) == (1, 8)
    assert (found["swizzled"]["reads_of_a_row"], found["swizzled"]["reads_of_a_column"]) == (1, 1)


def test_the_swizzle_is_a_permutation_and_its_own_inverse():
    for width in (16, 32, 64, 128):
        addresses = range(4096)
        assert sorted(swizzled(address, width) for address in addresses) == list(addresses)
        assert all(swizzled(swizzled(address, width), width) == address for address in addresses)


PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include "emulation/fragments.h"
using namespace nanochat;
int main() {
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 8; i++) {
            const auto print = [](emulation::Place place) { std::printf("%d %d\\n", place.row, place.column); };
            print(emulation::mma_a(lane, i));
            if (i < 4) print(emulation::mma_b(lane, i));
            if (i < 4) print(emulation::mma_d(lane, i));
        }
    for (auto swizzle : {device::Swizzle::none, device::Swizzle::bytes32, device::Swizzle::bytes64,
                         device::Swizzle::bytes128})
        for (uint32_t byte = 0; byte < 4096; byte += 4) std::printf("%u\\n", device::swizzled(byte, swizzle));
}
"""


def test_layouts_are_those_of_the_headers(tmp_path):
    """tests/emulation compares the headers with CuTe's layouts, element by element."""
    source, program = tmp_path / "layouts.cpp", tmp_path / "layouts"
    source.write_text(PROGRAM)
    subprocess.run(["g++", "-std=c++20", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = []
    for lane in range(32):
        for i in range(8):
            places = [mma_a(lane, i), *((mma_b(lane, i), mma_d(lane, i)) if i < 4 else ())]
            expected += [f"{row} {column}" for row, column in places]
    for width in (16, 32, 64, 128):
        expected += [str(swizzled(address, width)) for address in range(0, 4096, 4)]
    assert lines == expected


def test_instruction_sets_of_x86_are_not_compared_elsewhere(monkeypatch):
    monkeypatch.setattr(speed.platform, "machine", lambda: "aarch64")
    with pytest.raises(ConfigError, match="instruction sets of x86-64, and this is aarch64"):
        speed.product()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="it compares instruction sets of x86-64")
def test_registers_and_vectors_beat_loops(monkeypatch):
    """The ratios are so large that no other load on the machine hides them."""
    monkeypatch.setattr(speed, "SIZE", 256)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    rates = speed.product()["gflops"]
    assert rates["numpy_rows"] > 3 * rates["python_loops"]
    assert rates["linear_baseline"] > 10 * rates["numpy_rows"]
