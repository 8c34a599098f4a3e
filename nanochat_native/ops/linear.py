"""The product of a linear layer without a bias, and its gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.ops import backends, modes, schema

MIN_ROWS = 64  # with fewer, transposing the weight costs more than the native product saves


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weight^T, as torch.nn.functional.linear without a bias. Differentiable.

    Args:
        x: (..., I).
        weight: (O, I).

    Returns:
        (..., O).

    Raises:
        ValueError: The shapes do not match.

    This is torch's own product except in one case: float32 with at least 64 rows on a CPU that is not Intel's and has
    AVX2. There torch's MKL takes a slower path, so the kernel runs, with the register tile of the other operators.
    NANOCHAT_LINEAR=native uses the kernel for such products on every CPU, NANOCHAT_LINEAR=torch on none. Second
    derivatives, forward-mode AD and torch.func transforms are always torch's own.
    """
    if x.dim() < 1 or weight.dim() != 2 or x.size(-1) != weight.size(1):
        raise ValueError(
            f"linear: x and weight must have shapes (..., I) and (O, I), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if _runs_native(x, weight):
        return native_linear(x, weight)
    return reference_linear(x, weight)


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of linear, for a backward pass written by hand: dx = dy weight, dweight = dy^T x.

    Args:
        dy: (..., O), the gradient of x weight^T.
        x: (..., I).
        weight: (O, I).

    Returns:
        dx with the shape of x and dweight with the shape of weight, by the same products as linear. Differentiable in
        plain torch.

    Raises:
        ValueError: The shapes do not match.
    """
    if dy.shape[:-1] != x.shape[:-1] or (dy.size(-1), x.size(-1)) != tuple(weight.shape):
        raise ValueError(
            "linear_backward: dy, x and weight must have shapes (..., O), (..., I) and (O, I), "
            f"got {tuple(dy.shape)}, {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if _runs_native(x, weight) and not modes.derivative(dy, x, weight):
        return native_linear_backward(dy, x, weight)
    return reference_linear_backward(dy, x, weight)


def _runs_native(x: Tensor, weight: Tensor) -> bool:
    if backends.backend() == "torch":
        return False
    backends.require_native()
    return (
        backends.uses_native_linear()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= MIN_ROWS * x.size(-1)
        and not torch.is_autocast_enabled("cpu")
        and not modes.beyond_backward(x, weight)
    )


# --- reference ---


def reference_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `linear` returns, by torch's product."""
    return F.linear(x, weight)


def reference_linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `linear_backward` returns, by torch's product."""
    dy, rows = dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1))
    return (dy @ weight).view(x.shape), dy.mT @ rows


# --- native ---


def native_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Run the kernel."""
    return torch.ops.nanochat_native.linear(x.reshape(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.size(0))


def native_linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Run the kernel for both gradients."""
    dy, rows = dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1))
    dx, dweight = torch.ops.nanochat_native.linear_backward(dy, rows, weight, True, True)
    return dx.view(x.shape), dweight


def _linear_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.size(0), weight.size(0)))


def _linear_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, needs_grad_x: bool, needs_grad_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_grad_x else 0), weight.new_empty(weight.shape if needs_grad_weight else 0)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    x, weight = ctx.saved_tensors
    if modes.beyond_first_derivative(dy):
        grads = dy @ weight, dy.mT @ x
    else:
        grads = torch.ops.nanochat_native.linear_backward(dy, x, weight, *needed)
    return tuple(grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True))


schema.register("linear", _linear_fake, _gradient, _setup_context)
schema.register("linear_backward", _linear_backward_fake)
