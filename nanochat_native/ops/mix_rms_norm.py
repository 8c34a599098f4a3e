"""The residual sum, mixed with another stream by two learned factors, and the norm of the mix."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.dtypes import compute_dtype, converted, no_cuda_kernel
from nanochat_native.ops.rms_norm import EPS, check_rows, gradient_of_rows, normalise

Mix = tuple[Tensor, Tensor, Tensor, Tensor]


def mix_rms_norm(
    x: Tensor, residual: Tensor | None, x0: Tensor, x_scale: Tensor, x0_scale: Tensor, *, eps: float = EPS
) -> Mix:
    """Return x + residual, its mix with x0, the norm of the mix, and x0, in one pass over memory. Differentiable.

    Args:
        x: (..., C) float32, float64 or bfloat16; on a GPU also float16. C >= 1; the mean is over C.
        residual: The shape, dtype and device of x; None for no addition: z is x.
        x0: The shape, dtype and device of x.
        x_scale, x0_scale: One number each, in any shape, on the device of x, which does not wait for them. float32, or
            float64 if x is.
        eps: At least 0.

    Returns:
        z = x + residual, mixed = x_scale z + x0_scale x0, rms_norm(mixed) and x0, each with the shape and dtype of x. z
        is rounded before it is mixed. The mix is computed in float32, in float64 for float64, and rounded once before
        its norm is computed.

        x0 is returned for the next call. If each call takes the x0 of the call before, the backward pass of each adds
        its part of the gradient of x0 to that of the later calls in the pass that computes it.

    Raises:
        ValueError, TypeError: An argument is wrong.

    The backward pass keeps z, the norm, one number for each row, x0 and the factors. The kernel sums the gradient of a
    factor over each row, and then over the rows in float64. The same inputs give the same bits, whatever the number of
    threads.

    Second derivatives, forward-mode AD and torch.func transforms run in plain torch, with a warning. So do float64 and
    float16 on a GPU.
    """
    op = "mix_rms_norm"
    check_rows(op, "x", x, eps)
    for name, tensor in (("residual", residual), ("x0", x0)):
        if tensor is None:
            continue
        checks.check_alike(op, "x", x, **{name: tensor})
        if tensor.shape != x.shape:
            raise ValueError(f"{op}: {name} must have shape {tuple(x.shape)} like x, got {tuple(tensor.shape)}")
    for name, factor in (("x_scale", x_scale), ("x0_scale", x0_scale)):
        checks.check_dtype(op, name, factor, (compute_dtype(x.dtype),))
        checks.check_device(op, name, factor, x.device, "x")
        if factor.numel() != 1:
            raise ValueError(f"{op}: {name} must hold one number, got shape {tuple(factor.shape)}")
    if backends.runs_native(op, x, _unsupported(x, residual, x0, x_scale, x0_scale)):
        return native_mix_rms_norm(x, residual, x0, x_scale, x0_scale, eps)
    return reference_mix_rms_norm(x, residual, x0, x_scale, x0_scale, eps=eps)


def _unsupported(x: Tensor, residual: Tensor | None, *others: Tensor) -> str:
    """Return, as a phrase, why the kernel does not take these arguments; "" if it does."""
    if mode := modes.beyond_backward(x, residual, *others):
        return modes.unsupported(mode)
    return no_cuda_kernel(x.device, x.dtype)


# --- reference ---


def reference_mix_rms_norm(
    x: Tensor, residual: Tensor | None, x0: Tensor, x_scale: Tensor, x0_scale: Tensor, *, eps: float = EPS
) -> Mix:
    """Return what `mix_rms_norm` returns."""
    if modes.beyond_backward(x, residual, x0, x_scale, x0_scale):
        z, mixed = _mix(x, residual, x0, x_scale, x0_scale)
        return z, mixed, F.rms_norm(mixed, mixed.shape[-1:], eps=eps), x0
    return _with_gradient(x, residual, x0, x_scale, x0_scale, eps, False)


def _mix(x: Tensor, residual: Tensor | None, x0: Tensor, x_scale: Tensor, x0_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return z and mixed."""
    z, wide = x if residual is None else x + residual, compute_dtype(x.dtype)
    mixed = x_scale.reshape(()) * z.to(wide) + x0_scale.reshape(()) * x0.to(wide)
    return z, converted(mixed, x.dtype)


def _gradients(
    dz: Tensor | None,
    dmixed: Tensor | None,
    dy: Tensor | None,
    dr: Tensor | None,
    add_to: Tensor | None,
    y: Tensor,
    r: Tensor,
    z: Tensor,
    x0: Tensor,
    x_scale: Tensor,
    x0_scale: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, x0 and the factors, from what the operator saves. They can be differentiated again."""
    ds = gradient_of_rows(dy, dr, y, r)
    if dmixed is not None:
        ds = dmixed.to(r.dtype) if ds is None else ds + dmixed
    if ds is None:
        return dz, add_to, None, None

    def of_stream(factor: Tensor, others: Tensor | None) -> Tensor:
        part = ds * factor.reshape(())
        return (part if others is None else part + others).to(y.dtype)

    def of_factor(factor: Tensor, stream: Tensor) -> Tensor:
        return (ds * stream).sum().reshape(factor.shape)

    return of_stream(x_scale, dz), of_stream(x0_scale, add_to), of_factor(x_scale, z), of_factor(x0_scale, x0)


# --- native ---


def native_mix_rms_norm(
    x: Tensor, residual: Tensor | None, x0: Tensor, x_scale: Tensor, x0_scale: Tensor, eps: float
) -> Mix:
    """Run the kernel."""
    return _with_gradient(x, residual, x0, x_scale, x0_scale, eps, True)


class _MixRMSNorm(torch.autograd.Function):
    """z, mixed, its norm, x0 and r, by the kernel or by torch's own calls."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        x0: Tensor,
        x_scale: Tensor,
        x0_scale: Tensor,
        eps: float,
        native: bool,
    ) -> tuple[Tensor, ...]:
        z, mixed, y, r = _run(x, residual, x0, x_scale, x0_scale, eps, native)
        ctx.native, ctx.has_residual = native, residual is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, r, x if residual is None else z, x0, x_scale, x0_scale)
        return x.view_as(x) if residual is None else z, mixed, y, x0.view_as(x0), r

    @staticmethod
    def backward(
        ctx: Any,
        dz: Tensor | None,
        dmixed: Tensor | None,
        dy: Tensor | None,
        add_to: Tensor | None,
        dr: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        y, *others = ctx.saved_tensors
        mode = modes.beyond_first_derivative(*(grad for grad in (dz, dmixed, dy, add_to, dr) if grad is not None))
        if ctx.native and mode:
            backends.warn_reference_runs("mix_rms_norm", y.device.type, modes.unsupported(mode))
        if ctx.native and not mode and dy is not None and dr is None:
            # add_to is not overwritten, because torch may hand it to others too.
            dx, *grads = torch.ops.nanochat_native.mix_rms_norm_backward(dy, dz, dmixed, add_to, y, *others)
        else:
            dx, *grads = _gradients(dz, dmixed, dy, dr, add_to, y, *others)
        return dx, dx if ctx.has_residual else None, *grads, None, None


def _with_gradient(
    x: Tensor, residual: Tensor | None, x0: Tensor, x_scale: Tensor, x0_scale: Tensor, eps: float, native: bool
) -> Mix:
    if torch.is_grad_enabled():
        return cast(Mix, _MixRMSNorm.apply(x, residual, x0, x_scale, x0_scale, eps, native)[:4])
    z, mixed, y, _ = _run(x, residual, x0, x_scale, x0_scale, eps, native)
    # A view of a tensor that requires a gradient would require one too.
    return x.detach() if residual is None else z, mixed, y, x0.detach()


def _run(
    x: Tensor, residual: Tensor | None, x0: Tensor, x_scale: Tensor, x0_scale: Tensor, eps: float, native: bool
) -> Mix:
    """Return z, mixed, its norm and r. Without a residual z has no meaning."""
    if native:
        return cast(Mix, torch.ops.nanochat_native.mix_rms_norm(x, residual, x0, x_scale, x0_scale, eps))
    z, mixed = _mix(x, residual, x0, x_scale, x0_scale)
    return z, mixed, *normalise(mixed, eps)


def _fake(x: Tensor, residual: Tensor | None, x0: Tensor, x_scale: Tensor, x0_scale: Tensor, eps: float) -> Mix:
    z = x.new_empty(0 if residual is None else x.shape)
    return z, x.new_empty(x.shape), x.new_empty(x.shape), x_scale.new_empty(x.shape[:-1])


def _backward_fake(
    dy: Tensor,
    dz: Tensor | None,
    dmixed: Tensor | None,
    add_to: Tensor | None,
    y: Tensor,
    r: Tensor,
    z: Tensor,
    x0: Tensor,
    x_scale: Tensor,
    x0_scale: Tensor,
) -> Mix:
    return (
        y.new_empty(y.shape),
        y.new_empty(y.shape),
        x_scale.new_empty(x_scale.shape),
        x0_scale.new_empty(x0_scale.shape),
    )


schema.register("mix_rms_norm", _fake)
schema.register("mix_rms_norm_backward", _backward_fake)
