"""What a processor decides is tested on both sides, whatever the processor: the tests that such a choice touches run
again with older instruction sets, the other product of `linear` and another number of threads.

The CUDA kernels' choice has both sides in tests/emulation and tests/gpu.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import usable_instruction_sets

TESTS = Path(__file__).parent

# NANOCHAT_* are ours; ATEN_CPU_CAPABILITY is torch's own kernels', MKL_ENABLE_INSTRUCTIONS that of float32 products,
# ONEDNN_MAX_CPU_ISA that of bfloat16 products. A library takes such a name for an upper bound.
SIDES = {
    "baseline": {
        "NANOCHAT_CPU_ISA": "baseline",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "NANOCHAT_LINEAR": "native",
        "OMP_NUM_THREADS": "2",
    },
    "avx2": {
        "NANOCHAT_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "NANOCHAT_LINEAR": "torch",
        "OMP_NUM_THREADS": "1",
    },
    "avx512 without bfloat16": {
        "NANOCHAT_CPU_ISA": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "NANOCHAT_LINEAR": "native",
        "OMP_NUM_THREADS": "3",
    },
    "bfloat16 without amx": {
        "NANOCHAT_CPU_ISA": "avx512_bf16",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "NANOCHAT_LINEAR": "torch",
        "OMP_NUM_THREADS": "2",
    },
}
# Files, and which of their tests: those with few numbers where they come in many sizes.
KERNELS = tuple(
    f"ops/test_ops_{name}.py"
    for name in (
        "attention",
        "rms_norm",
        "mix_rms_norm",
        "newton_schulz",
        "adamw",
        "muon",
        "linear_cross_entropy",
        "cached_forward",
        "linear",
        "rotary_norm",
        "relu_squared",
        "value_embedding",
        "smear",
    )
)
MODEL = ("training/test_golden.py", "model/test_model.py", "inference/test_engine.py")
PRODUCTS_OF_OURS = ("ops/test_ops_attention.py", "ops/test_ops_linear_cross_entropy.py")
TOUCHED = {
    KERNELS: "(match or windows or sizes or spectra or muon or bits or prod) and not 1023",
    MODEL: "(golden or plain or bits or autocast or whole) and not scores",
    ("lab/test_memory.py",): "scratch and hybrid or trainers and flags0",
    ("model/test_model.py", "ops/test_ops_linear_cross_entropy.py"): "autocast or reference",
    PRODUCTS_OF_OURS: "bfloat16",
}
*OURS, MEMORY, PRODUCTS, _ = TOUCHED
# Without AVX-512 oneDNN has no products of bfloat16, whatever its bound; with it, it has nothing else that is touched.
RUNS = [
    *(("baseline", files) for files in OURS),
    *(("avx2", files) for files in (*OURS, MEMORY)),
    *(
        (side, files)
        for side in ("avx512 without bfloat16", "bfloat16 without amx")
        for files in (MEMORY, PRODUCTS, PRODUCTS_OF_OURS)
    ),
]
# What a processor has where a side is another than its own.
ABOVE = {"avx512 without bfloat16": "avx512_bf16", "bfloat16 without amx": "amx_bf16"}


def features():
    """Of this processor, as Linux names them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@pytest.mark.slow
@pytest.mark.parametrize(("side", "files"), RUNS, ids=lambda x: x if isinstance(x, str) else x[0].removesuffix(".py"))
def test_what_a_processor_decides_holds_on_its_other_side(side, files):
    environment = SIDES[side]
    if side in ABOVE and ABOVE[side] not in features():
        pytest.skip(f"this processor has no {ABOVE[side]}: the other tests run on this side")
    if environment.get("NANOCHAT_CPU_ISA", "baseline") not in usable_instruction_sets():
        pytest.skip(f"this processor has no {environment['NANOCHAT_CPU_ISA']}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    result = subprocess.run(
        [*command, "-k", TOUCHED[files], *(str(TESTS / name) for name in files)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"} | environment,
    )
    assert result.returncode == 0, f"{environment}\n{result.stdout[-3000:]}"
