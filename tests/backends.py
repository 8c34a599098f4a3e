"""The backends that a test runs on; the native one is skipped, with the reason, where its module is not built. And all
operators that there are."""

import inspect
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
from torch import Tensor

from nanochat_native import ops

BACKENDS = ("torch", "native")


def use(name):
    """ops.use_backend, or a skip."""
    try:
        return ops.use_backend(name)
    except RuntimeError as error:
        pytest.skip(str(error))


def usable_instruction_sets():
    """The instruction sets that the module was built for and this processor has."""
    command = [sys.executable, "-c", "from nanochat_native import ops; print(ops.instruction_set())"]

    def served(isa):
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NANOCHAT_CPU_ISA": isa})
        return result.stdout.strip()

    return [isa for isa in ops.build_info()["instruction_sets"].split() if served(isa) == isa]


def operators():
    """The names of all public operators: every function of ops that takes tensors."""
    return {
        name
        for name in ops.__all__
        if inspect.isfunction(function := getattr(ops, name))
        and function.__module__ == ops.__name__
        and any(p.annotation in (Tensor, Sequence[Tensor]) for p in inspect.signature(function).parameters.values())
    }
