"""The device of the GPU tests. NANOCHAT_TEST_DEVICE=cpu runs those that need no CUDA on the CPU's kernels, which tests
the tests on a machine without a GPU. Nothing here may need a package that a bare GPU machine lacks."""

import os

import pytest
import torch

from nanochat_native import ops


@pytest.fixture
def device():
    kind = os.environ.get("NANOCHAT_TEST_DEVICE", "cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device(kind)


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("needs CUDA")
    return device


@pytest.fixture
def require_native(device):
    """Skips, with the reason, where an operator has no native kernel: its reference would be compared with itself."""

    def require(*operators):
        for operator in operators:
            backend, why = ops.serves(operator, device)
            if backend != "native":
                pytest.skip(f"{operator} on {device.type} is not native: {why}")

    return require
