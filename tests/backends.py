"""The backends that a test runs on; the native one is skipped, with the reason, where its module is not built. And all
operators that there are."""

import inspect
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


def operators():
    """The names of all public operators: every function of ops that takes tensors."""
    return {
        name
        for name in ops.__all__
        if inspect.isfunction(function := getattr(ops, name))
        and function.__module__ == ops.__name__
        and any(p.annotation in (Tensor, Sequence[Tensor]) for p in inspect.signature(function).parameters.values())
    }
