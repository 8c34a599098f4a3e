"""Smear: each token gets a gated part of the token before it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.dtypes import compute_dtype, dtypes_on, no_cuda_kernel

MOST_GATE_INPUTS = 64  # kMostGateInputs of csrc/kernels.h


def smear(x: Tensor, gate: Tensor, smear_lambda: Tensor) -> Tensor:
    """Return x + smear_lambda sigmoid(gate . x) x_before, where x_before is the token before. Differentiable.

    For token t of sequence b, with the first I channels of x for the gate:
        out[b, t] = x[b, t] + smear_lambda sigmoid(gate . x[b, t, :I]) x[b, t - 1]
        out[b, 0] = x[b, 0]
    computed in float32, or in float64 if x is, and rounded once. This is nanochat's.

    Args:
        x: (B, T, C), T and C at least 1. float32, float64 or bfloat16; on a GPU also float16.
        gate: (1, I) float32, or float64 if x is. I is from 1 to 64, and at most C.
        smear_lambda: (1) with gate's dtype.

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        ValueError, TypeError: An argument is wrong.

    The gradients need the arguments, but not the result. The same inputs give the same bits, whatever the number of
    threads. Second derivatives, forward-mode AD and torch.func transforms run in plain torch, with a warning. So do
    float64 and float16 on a GPU.
    """
    _check(x, gate, smear_lambda)
    unsupported = modes.unsupported(modes.beyond_backward(x, gate, smear_lambda)) or no_cuda_kernel(x.device, x.dtype)
    if backends.runs_native("smear", x, unsupported):
        return native_smear(x, gate, smear_lambda)
    return reference_smear(x, gate, smear_lambda)


def _check(x: Tensor, gate: Tensor, smear_lambda: Tensor) -> None:
    if x.dim() != 3 or x.size(1) < 1 or x.size(2) < 1:
        raise ValueError(f"smear: x must have shape (B, T, C) with T, C >= 1, got {tuple(x.shape)}")
    checks.check_dtype("smear", "x", x, dtypes_on(x.device))
    for name, tensor in (("gate", gate), ("smear_lambda", smear_lambda)):
        checks.check_dtype("smear", name, tensor, (compute_dtype(x.dtype),))
        checks.check_device("smear", name, tensor, x.device, "x")
    most = min(x.size(2), MOST_GATE_INPUTS)
    if gate.dim() != 2 or gate.size(0) != 1 or not 1 <= gate.size(1) <= most:
        raise ValueError(f"smear: gate must have shape (1, I) with I from 1 to {most}, got {tuple(gate.shape)}")
    if smear_lambda.shape != (1,):
        raise ValueError(f"smear: smear_lambda must have shape (1,), got {tuple(smear_lambda.shape)}")


# --- reference ---


def reference_smear(x: Tensor, gate: Tensor, smear_lambda: Tensor) -> Tensor:
    """Return what `smear` returns."""
    wide = x.to(gate.dtype)
    smeared = wide[:, 1:] + smear_lambda * _sigmoids(wide, gate) * wide[:, :-1]
    return torch.cat((wide[:, :1], smeared), dim=1).to(x.dtype)


def _sigmoids(x: Tensor, gate: Tensor) -> Tensor:
    """Return those of all tokens but the first, (B, T - 1, 1)."""
    return (x[:, 1:, : gate.size(1)] * gate).sum(-1, keepdim=True).sigmoid()


def _reference_backward(dout: Tensor, x: Tensor, gate: Tensor, smear_lambda: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate and smear_lambda. Differentiable."""
    I, dtype = gate.size(1), x.dtype  # noqa: E741
    x, dout = x.to(gate.dtype), dout.to(gate.dtype)
    sigmoids = _sigmoids(x, gate)
    products = (dout[:, 1:] * x[:, :-1]).sum(-1, keepdim=True)
    dz = smear_lambda * sigmoids * (1 - sigmoids) * products
    through_next = F.pad(smear_lambda * sigmoids * dout[:, 1:], (0, 0, 0, 1))
    through_gate = F.pad(dz * gate, (0, x.size(2) - I, 1, 0))
    dgate = (dz * x[:, 1:, :I]).sum((0, 1))[None]
    return (dout + through_next + through_gate).to(dtype), dgate, (sigmoids * products).sum().reshape(1)


# --- native ---


def native_smear(x: Tensor, gate: Tensor, smear_lambda: Tensor) -> Tensor:
    """Run the kernel."""
    out: Tensor = torch.ops.nanochat_native.smear(x, gate, smear_lambda)
    return out


def _fake(x: Tensor, gate: Tensor, smear_lambda: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(dout: Tensor, x: Tensor, gate: Tensor, smear_lambda: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), smear_lambda.new_empty(smear_lambda.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    if mode := modes.beyond_first_derivative(dout):
        backends.warn_reference_runs("smear", dout.device.type, modes.unsupported(mode))
        return _reference_backward(dout, *ctx.saved_tensors)
    grads: tuple[Tensor, ...] = torch.ops.nanochat_native.smear_backward(dout, *ctx.saved_tensors)
    return grads


schema.register("smear", _fake, _gradient, _setup_context)
schema.register("smear_backward", _backward_fake)
