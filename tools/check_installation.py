"""Checks an installed nanochat-native, in a temporary folder: its files, operators, doctor, and a few training steps.

    python check_installation.py

Run it by the Python of the environment that is checked, and not in the checkout.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

import nanochat_native
from nanochat_native import ops
from nanochat_native.ops import self_test

FLAGS = "--depth 1 --device cpu --num-iterations 3 --total-batch-size 256 --device-batch-size 1 --max-seq-len 256"


def check(is_true: object, sentence: str) -> None:
    """Print a sentence that says what holds, or end the program with it."""
    if not is_true:
        raise SystemExit(f"broken: it is not true that {sentence}")
    print(f"  {sentence}")


def minor_release(version: str) -> str:
    """Return the first two numbers of a version."""
    return ".".join(version.split(".")[:2])


def check_files() -> None:
    """Check where the package lies, and what its wheel requires."""
    place = Path(nanochat_native.__file__).resolve()
    check(place.is_relative_to(Path(sysconfig.get_path("platlib")).resolve()), "the package is an installed one")
    info = ops.build_info()
    wanted = f"torch=={minor_release(info['torch'])}.*"
    required = importlib.metadata.requires("nanochat-native") or []
    version = importlib.metadata.version("nanochat-native")
    if "+" in version:
        check(wanted in [line.replace(" ", "") for line in required], f"version {version} requires {wanted}")
    check(minor_release(info["torch"]) == minor_release(torch.__version__), f"it is built for torch {info['torch']}")
    check(info["version"] == nanochat_native.__version__, f"the native module has version {info['version']}")
    check(info["cuda"] or info["cuda_off"], f"CUDA: {info['cuda'] or info['cuda_off']}")


def check_operators() -> None:
    """Compare two operators with their references, and look for a second OpenMP library."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 64, heads, 32) for heads in (4, 2, 2))
    matrix = torch.randn(48, 64)
    found = ops.attention(q, k, v), ops.newton_schulz(matrix)
    with ops.use_backend("torch"):
        expected = ops.attention(q, k, v), ops.newton_schulz(matrix)
    difference = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    check(difference < 0.02, f"attention and newton_schulz differ from their references by at most {difference:.1e}")
    if sys.platform == "linux":
        libraries = self_test.openmp_libraries()
        folder = Path(torch.__file__).resolve().parent
        is_torchs = [Path(library).resolve().is_relative_to(folder) for library in libraries]
        check(is_torchs == [True], f"{len(libraries)} OpenMP library is loaded, and it is torch's")


def check_commands() -> None:
    """Run the doctor and a few training steps."""
    command = Path(sysconfig.get_path("scripts"), "nanochat-native")
    with tempfile.TemporaryDirectory() as folder:
        for arguments in ("doctor", f"train {FLAGS} --out-dir runs --run smoke"):
            result = subprocess.run([command, *arguments.split()], cwd=folder, capture_output=True, text=True)
            output = "" if result.returncode == 0 else f": {result.stdout}\n{result.stderr}"
            check(not output, f"`nanochat-native {arguments.split()[0]}` ends with code {result.returncode}{output}")
        check(list(Path(folder).glob("runs/smoke/**/*.safetensors")), "the training wrote a checkpoint")


if __name__ == "__main__":
    check_files()
    check_operators()
    check_commands()
