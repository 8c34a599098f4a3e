"""The kernels with code for AMX, on an emulation of its instructions: they run on every processor. On a processor with
AMX the emulation has the same bits as the instructions."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/emulation"))

from compiled import compiled  # noqa: E402

KERNELS = ("attention_forward", "attention_backward", "linear_cross_entropy", "newton_schulz")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512")
AMX = (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")
DRIVER = ROOT / "tests/ops/amx_tiles.cpp"


def processor_has_amx():
    words = Path("/proc/cpuinfo").read_text().split()
    return {"amx_tile", "amx_bf16", "avx512_bf16"} <= set(words)


def build(tree, real):
    """Compile the kernels of a source tree: with the emulation, for `baseline`, and with `real` for the processor."""
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++20", "-O2", "-fopenmp", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-ffp-contract=fast"]
    sets = {
        "baseline": (),
        "portable": ("-DNANOCHAT_EMULATE_AMX",),
        "emulated": ("-DNANOCHAT_EMULATE_AMX", *(AMX if real else ())),
    } | ({"amx": AMX} if real else {})
    define = ["-DWITH_PROCESSOR"] if real else []
    kernels = [tree / "csrc/cpu" / f"{kernel}.cpp" for kernel in KERNELS]

    def make(folder):
        jobs = []
        for isa, options in sets.items():
            for source in kernels:
                command = [compiler, *flags, *options, f"-DNANOCHAT_ISA={isa}", "-c", source]
                jobs.append(subprocess.Popen([*command, "-o", folder / f"{isa}_{source.stem}.o"]))
                if len(jobs) % 2 == 0:
                    jobs[-2].wait()
        assert all(job.wait() == 0 for job in jobs)
        subprocess.run(
            [compiler, *flags, *define, "-I", tree, DRIVER, *sorted(folder.glob("*.o")), "-o", folder / "amx_tiles"],
            check=True,
        )

    return compiled("amx_tiles", [compiler, *flags, *define], [*kernels, DRIVER], make, tree) / "amx_tiles"


def run(program):
    """Return what the program printed of each case: its name, and its numbers by name."""
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    cases = {}
    for line in lines:
        name, index, *numbers = line.split()
        cases[f"{name} {index}"] = dict(zip(numbers[::2], map(float, numbers[1::2]), strict=True))
    return cases


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only the kernels of x86-64 have code for AMX")
def test_emulated_tiles_give_the_results_of_float32_products_and_the_bits_of_the_processor():
    real = processor_has_amx()
    cases = run(build(ROOT, real))
    assert len(cases) == 13
    for name, numbers in cases.items():
        # Both round their results to bfloat16 (2^-9). P, dS and dZ are rounded too.
        # Newton-Schulz rounds its matrices in every step.
        bound = 2**-7 if name.startswith("newton_schulz") else 2**-8
        assert numbers["error"] < bound, name
        assert numbers["portable"] < bound, name
        assert numbers["threads"] == 1, f"{name}: 2 threads give other bits"
        assert numbers.get("processor", 1) == 1, f"{name}: the processor gives other bits"
    if not real:
        pytest.skip("passed on the emulation; this processor has no AMX to compare with")
