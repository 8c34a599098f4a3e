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
    AVX-512. There torch's product has the rate of AVX2, so the kernel runs, with the register tile of the other
    operators. NANOCHAT_LINEAR=native uses the kernel for such products on every CPU, NANOCHAT_LINEAR=torch on none.
    Second derivatives, forward-mode AD and torch.func transforms are always torch's own.
    """
    if runs_native_product("linear", x, weight):
        return native_linear(x, weight)
    return reference_linear(x, weight)


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    add_to: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
    needed: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of linear, for a backward pass written by hand: dx = dy weight, dweight = dy^T x.

    Args:
        dy: (..., O), the gradient of x weight^T.
        x: (..., I).
        weight: (O, I).
        add_to: A gradient of x, contiguous, to which dx is added by the product. It may be overwritten.
        weight_dtype: The dtype of dweight, by default that of weight. On a GPU the product writes float32 from bfloat16
            factors without rounding to bfloat16 in between.
        needed: Whether dx and dweight are needed.

    Returns:
        dx with the shape of x and dweight with the shape of weight, None if not needed, by the same products as linear.
        Differentiable in plain torch.

    Raises:
        ValueError: The shapes do not match.
    """
    runs_native = runs_native_product("linear_backward", x, weight, dy)
    if add_to is not None and add_to.shape != x.shape:
        raise ValueError(
            f"linear_backward: add_to must have the shape of x, {tuple(x.shape)}, got {tuple(add_to.shape)}"
        )
    if runs_native and not modes.out_of_place(dy, x, weight):
        return native_linear_backward(dy, x, weight, add_to=add_to, needed=needed)
    return reference_linear_backward(dy, x, weight, add_to=add_to, weight_dtype=weight_dtype, needed=needed)


def runs_native_product(op: str, x: Tensor, weight: Tensor, dy: Tensor | None = None) -> bool:
    """Return whether the native product runs for `op`, which takes dy only if it is a backward pass.

    Raises:
        ValueError: The shapes do not match.
    """
    if dy is None:
        if x.dim() < 1 or weight.dim() != 2 or x.size(-1) != weight.size(1):
            raise ValueError(
                f"{op}: x and weight must have shapes (..., I) and (O, I), "
                f"got {tuple(x.shape)} and {tuple(weight.shape)}"
            )
    elif dy.shape[:-1] != x.shape[:-1] or (dy.size(-1), x.size(-1)) != tuple(weight.shape):
        raise ValueError(
            f"{op}: dy, x and weight must have shapes (..., O), (..., I) and (O, I), "
            f"got {tuple(dy.shape)}, {tuple(x.shape)} and {tuple(weight.shape)}"
        )
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


def reference_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    add_to: Tensor | None = None,
    weight_dtype: torch.dtype | None = None,
    needed: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Return what `linear_backward` returns, by torch's product."""
    weight_dtype = weight_dtype or weight.dtype
    dy, rows = dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1))
    out_of_place = modes.out_of_place(dy, x, weight)
    dx = dweight = None
    if needed[0]:
        if add_to is None:
            dx = (dy @ weight).view(x.shape)
        elif out_of_place:
            dx = add_to + (dy @ weight).view(x.shape)
        else:
            sums = add_to.view(rows.shape)
            torch.addmm(sums, dy, weight, out=sums)
            dx = add_to
    if needed[1]:
        if weight_dtype == x.dtype or out_of_place or x.device.type in ("cpu", "mps"):
            dweight = (dy.mT @ rows).to(weight_dtype)
        else:
            dweight = torch.mm(dy.mT, rows, out_dtype=weight_dtype)
    return dx, dweight


# --- native ---


def native_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Run the kernel."""
    return torch.ops.nanochat_native.linear(x.reshape(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.size(0))


def native_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    add_to: Tensor | None = None,
    needed: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Run the kernel for the gradients that are needed."""
    dy, rows = dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1))
    sums = None if add_to is None else add_to.view(rows.shape)
    dx, dweight = torch.ops.nanochat_native.linear_backward(dy, rows, weight, *needed, sums)
    return dx.view(x.shape) if needed[0] else None, dweight if needed[1] else None


def _linear_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.size(0), weight.size(0)))


def _linear_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    needs_grad_x: bool,
    needs_grad_weight: bool,
    add_to: Tensor | None = None,
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
