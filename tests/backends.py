"""The backends that a test runs on (native is skipped where its module is not built), and the list of all operators."""

import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Sequence

import pytest
from torch import Tensor

from nanochat_native import ops

BACKENDS = ("torch", "native")
# Of this architecture, the one that every processor has first.
INSTRUCTION_SETS = (
    ("neon", "neon_bf16")
    if platform.machine() in ("aarch64", "arm64")
    else ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
)


def use(name):
    """Choose the backend, or skip the test."""
    try:
        return ops.use_backend(name)
    except RuntimeError as error:
        pytest.skip(str(error))


def usable_instruction_sets():
    """Return the instruction sets that the module was built for and this processor has."""
    command = [sys.executable, "-c", "from nanochat_native import ops; print(ops.instruction_set())"]

    def served(isa):
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NANOCHAT_CPU_ISA": isa})
        return result.stdout.strip()

    return [isa for isa in ops.build_info()["instruction_sets"].split() if served(isa) == isa]


def listed_instruction_sets():
    """Return the sets as the error about an unknown one lists them, the best first."""
    best, *others, basic = reversed(INSTRUCTION_SETS)
    return f"{', '.join([best, *others])} or {basic}"


def operators():
    """Return the names of all public operators: every function of ops that takes tensors."""
    return {
        name
        for name in ops.__all__
        if inspect.isfunction(function := getattr(ops, name))
        and any(p.annotation in (Tensor, Sequence[Tensor]) for p in inspect.signature(function).parameters.values())
    }


def module_of(operator):
    """Return the module that defines a public operator, its reference and its native call."""
    return sys.modules[getattr(ops, operator).__module__]
