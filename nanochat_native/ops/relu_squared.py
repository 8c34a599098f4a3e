"""Squared ReLU, alone and as the end of a linear layer's products."""

from typing import Any

import torch
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.dtypes import compute_dtype, dtypes_on, no_cuda_kernel
from nanochat_native.ops.linear import (
    linear,
    linear_backward,
    reference_linear,
    reference_linear_backward,
    runs_native_product,
)


def relu_squared(x: Tensor) -> Tensor:
    """Return max(x, 0)^2, the activation of arXiv:2109.08668. Differentiable.

    The backward pass reads the result y only: dx = 2 sqrt(y) dy. Where y overflowed to infinity, the gradient is not
    finite either.

    Args:
        x: Any shape, float32, float64 or bfloat16 (computed in float32); on a GPU also float16.

    Returns:
        The same shape and dtype, contiguous.

    Raises:
        TypeError: The dtype is none of these.

    The CUDA kernels take float32 and bfloat16; other types run in plain torch, with a warning. Second derivatives,
    forward-mode AD and torch.func transforms run in plain torch, with a warning.
    """
    _check("relu_squared", x=x)
    if backends.runs_native(
        "relu_squared", x, modes.unsupported(modes.beyond_backward(x)) or no_cuda_kernel(x.device, x.dtype)
    ):
        return native_relu_squared(x)
    return reference_relu_squared(x)


def relu_squared_(x: Tensor) -> None:
    """Replace x by relu_squared(x), in place and without a derivative: for passes written by hand.

    Args:
        x: Contiguous, with the dtypes of relu_squared.

    Raises:
        ValueError, TypeError: x is not contiguous, or of another dtype.
        RuntimeError: x requires a gradient while grad mode is on, or the call is within a torch.func transform.
    """
    _check("relu_squared_", x=x)
    _check_contiguous("relu_squared_", x=x)
    modes.refuse("relu_squared_", x)
    if backends.runs_native("relu_squared_", x, no_cuda_kernel(x.device, x.dtype)):
        native_relu_squared_(x)
    else:
        reference_relu_squared_(x)


def relu_squared_backward_(dy: Tensor, y: Tensor) -> None:
    """Replace dy by the gradient of relu_squared, 2 sqrt(y) dy, in place and without a derivative.

    Args:
        dy: The gradient of y. Contiguous, with the dtypes of relu_squared.
        y: The result of relu_squared, with dy's shape and dtype. Contiguous. May not share memory with dy.

    Raises:
        ValueError, TypeError: An argument is wrong.
        RuntimeError: A tensor requires a gradient while grad mode is on, or the call is within a torch.func transform.
    """
    op = "relu_squared_backward_"
    _check(op, dy=dy, y=y)
    _check_contiguous(op, dy=dy, y=y)
    modes.refuse(op, dy, y)
    if backends.runs_native(op, dy, no_cuda_kernel(dy.device, dy.dtype)):
        native_relu_squared_backward_(dy, y)
    else:
        reference_relu_squared_backward_(dy, y)


def linear_relu_squared(x: Tensor, weight: Tensor) -> Tensor:
    """Return relu_squared(linear(x, weight)), with the same bits and without another pass over memory.

    Where `linear` uses the native product, the product squares its elements before it writes them. Elsewhere torch's
    product is squared in place. When a gradient is recorded, the two operators run one after the other.

    Args:
        x: (..., I).
        weight: (O, I).

    Returns:
        (..., O).

    Raises:
        ValueError, TypeError: The arguments do not suit linear, or the type of the product does not suit relu_squared.
    """
    if modes.derivative(x, weight):
        return relu_squared(linear(x, weight))
    if runs_native_product("linear_relu_squared", x, weight):
        return native_linear_relu_squared(x, weight)
    y = linear(x, weight)
    relu_squared_(y)
    return y


def linear_backward_relu_squared(
    dy: Tensor, x: Tensor, weight: Tensor, *, weight_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of linear(relu_squared(h), weight) for h and weight, given x = relu_squared(h).

    These are linear_backward(dy, x, weight), whose dx then passes through relu_squared: dh = 2 sqrt(x) (dy weight). The
    native product multiplies before it writes dh. When a gradient is recorded, plain torch runs.

    Args:
        dy: (..., O), the gradient of x weight^T.
        x: (..., I), the result of relu_squared.
        weight: (O, I).
        weight_dtype: The dtype of dweight, as linear_backward's.

    Returns:
        dh with the shape of x and dweight with the shape of weight.

    Raises:
        ValueError, TypeError: The arguments do not suit linear_backward and relu_squared.
    """
    out_of_place = modes.out_of_place(dy, x, weight)
    if not out_of_place and runs_native_product("linear_backward_relu_squared", x, weight, dy):
        return native_linear_backward_relu_squared(dy, x, weight)
    dh, dweight = linear_backward(dy, x, weight, weight_dtype=weight_dtype)
    assert dh is not None
    assert dweight is not None
    if out_of_place:
        return reference_relu_squared_backward(dh, x), dweight
    relu_squared_backward_(dh, x.to(dh.dtype).contiguous())
    return dh, dweight


def _check(op: str, **tensors: Tensor) -> None:
    (first_name, first), *others = tensors.items()
    checks.check_dtype(op, first_name, first, dtypes_on(first.device))
    for name, tensor in others:
        checks.check_alike(op, first_name, first, **{name: tensor})
        if tensor.shape != first.shape:
            raise ValueError(
                f"{op}: {name} must have shape {tuple(first.shape)} like {first_name}, got {tuple(tensor.shape)}"
            )


def _check_contiguous(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


# --- reference ---


def reference_relu_squared(x: Tensor) -> Tensor:
    """Return what `relu_squared` returns."""
    return x.relu().square()


def reference_relu_squared_(x: Tensor) -> None:
    """Do what `relu_squared_` does."""
    x.relu_().square_()


def reference_relu_squared_backward(dy: Tensor, y: Tensor) -> Tensor:
    """Return 2 sqrt(y) dy. Differentiable, also where y is 0: sqrt(y) = max(x, 0) has the derivative 0 there."""
    zero = y == 0
    root = y.to(compute_dtype(y.dtype)).masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return (dy * (root * 2)).to(dy.dtype)


def reference_relu_squared_backward_(dy: Tensor, y: Tensor) -> None:
    """Do what `relu_squared_backward_` does."""
    dy.mul_(y.to(compute_dtype(y.dtype)).sqrt() * 2)


def reference_linear_relu_squared(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `linear_relu_squared` returns."""
    return reference_relu_squared(reference_linear(x, weight))


def reference_linear_backward_relu_squared(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `linear_backward_relu_squared` returns."""
    both = (True, True)
    dx, dweight = reference_linear_backward(dy, x, weight, add_to=None, weight_dtype=weight.dtype, needed=both)
    assert dx is not None
    assert dweight is not None
    return reference_relu_squared_backward(dx, x), dweight


# --- native ---


def native_relu_squared(x: Tensor) -> Tensor:
    """Run the kernel."""
    y: Tensor = torch.ops.nanochat_native.relu_squared(x)
    return y


def native_relu_squared_(x: Tensor) -> None:
    """Run the kernel."""
    torch.ops.nanochat_native.relu_squared_(x)


def native_relu_squared_backward_(dy: Tensor, y: Tensor) -> None:
    """Run the kernel."""
    torch.ops.nanochat_native.relu_squared_backward_(dy, y)


def native_linear_relu_squared(x: Tensor, weight: Tensor) -> Tensor:
    """Run the kernel."""
    y: Tensor = torch.ops.nanochat_native.linear_relu_squared(x.reshape(-1, x.size(-1)), weight)
    return y.view(*x.shape[:-1], weight.size(0))


def native_linear_backward_relu_squared(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Run the kernel for both gradients."""
    dh, dweight = torch.ops.nanochat_native.linear_backward_relu_squared(
        dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1)), weight
    )
    return dh.view(x.shape), dweight


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(dy: Tensor, y: Tensor) -> Tensor:
    return dy.new_empty(dy.shape)


def _linear_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.size(0), weight.size(0)))


def _linear_backward_fake(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _gradient(ctx: Any, dy: Tensor) -> Tensor:
    (y,) = ctx.saved_tensors
    if mode := modes.beyond_first_derivative(dy):
        backends.warn_reference_runs("relu_squared", y.device.type, modes.unsupported(mode))
        return reference_relu_squared_backward(dy, y)
    dx: Tensor = torch.ops.nanochat_native.relu_squared_backward(dy, y)
    return dx


schema.register("relu_squared", _fake, _gradient, _setup_context)
schema.register("relu_squared_", schema.returns_nothing)
schema.register("relu_squared_backward", _backward_fake)
schema.register("relu_squared_backward_", schema.returns_nothing)
schema.register("linear_relu_squared", _linear_fake)
schema.register("linear_backward_relu_squared", _linear_backward_fake)
