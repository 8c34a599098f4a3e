"""python -m nanochat_native.doctor: what it prints, and that it finds what is broken."""

import os
import subprocess
import sys

import pytest
import torch

from nanochat_native import doctor, ops
from nanochat_native.ops import native

OPERATORS = [
    "attention",
    "newton_schulz",
    "adamw_",
    "muon_momentum_",
    "muon_update_",
    "newton_schulz_update_",
    "linear_cross_entropy",
]


def run(before="", **environment):
    script = f"{before}\nimport runpy; runpy.run_module('nanochat_native.doctor', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


def test_a_healthy_machine():
    command = [sys.executable, "-m", "nanochat_native.doctor"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert torch.__version__ in lines["versions"]
    assert ops.build_info()["compiler"] in lines["built"]
    assert ops.instruction_set() in lines["machine"]
    assert "native" in lines["backend"]
    for op in OPERATORS:
        assert "cpu: native, off its twin by" in lines[op]


def test_the_torch_backend_is_reported():
    result = run(NANOCHAT_NATIVE_BACKEND="torch")
    assert result.returncode == 0
    assert result.stdout.count("cpu: torch (chosen by") == len(OPERATORS)


def test_a_missing_module_is_broken():
    result = run("import sys; sys.modules['nanochat_native._C'] = None")
    assert result.returncode == 1
    assert "is not built for this Python: run `pip install --no-build-isolation .`" in result.stderr


def test_a_missing_torch_is_broken():
    result = run("import sys; sys.modules['torch'] = None")
    assert result.returncode == 1
    assert "torch cannot be imported" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_impossible_instruction_set_is_broken():
    result = run(NANOCHAT_CPU_ISA="mmx")
    assert result.returncode == 1
    assert "broken: NANOCHAT_CPU_ISA=mmx" in result.stderr


@pytest.mark.parametrize("wrong", [0.0, torch.nan])
def test_a_wrong_kernel_is_broken(monkeypatch, capsys, wrong):
    monkeypatch.setattr(native, "newton_schulz", lambda g, *_: torch.full_like(g, wrong))
    assert doctor.main() == 1
    assert "newton_schulz on the CPU" in capsys.readouterr().err


def test_a_stale_module_is_broken(monkeypatch, capsys):
    monkeypatch.setattr("nanochat_native.__version__", "9.9.9")
    assert doctor.main() == 1
    assert "install again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("8.0+PTX 9.0a", (8, 0), True),
        ("8.0+PTX 9.0a", (8, 6), True),
        ("8.0+PTX 9.0a", (9, 0), True),
        ("8.0+PTX 9.0a", (12, 0), True),
        ("8.0+PTX 9.0a", (7, 5), False),
        ("8.0 9.0a", (8, 9), True),
        ("8.0 9.0a", (10, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("8.6", (8, 0), False),
        ("", (9, 0), False),
    ],
)
def test_architectures_cover_a_gpu(architectures, capability, expected):
    assert doctor.covers(architectures, capability) is expected
