"""Rotary positions and the norm of each head of queries and keys (QK-norm)."""

import math
from typing import Any

import torch
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.dtypes import compute_dtype, dtypes_on, no_cuda_kernel
from nanochat_native.ops.rms_norm import EPS

LARGEST_D = 256
LEAST_SCALE = 1e-18


def rotary_norm(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, scale: float = 1.0, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """Return q and k after rotary positions (arXiv:2104.09864) and RMSNorm of each head. Differentiable for q and k.

    For the halves (x1, x2) of a head at position t:
        z = (x1 cos[t] + x2 sin[t], x2 cos[t] - x1 sin[t])
        out = scale * z / sqrt(mean(z^2) + eps)
    computed in float32, or in float64 if q is, and rounded once. The same inputs give the same bits.

    Args:
        q: (B, T, H, D), D even, from 2 to 256. float32, float64 or bfloat16; on a GPU also float16.
        k: (B, T, Hkv, D) with q's dtype and device.
        cos, sin: (T, D / 2), float32, or float64 if q is. Tensors of constants.
        scale: A factor of both results, at least 1e-18, so that its square is a normal float32.
        eps: At least 0, by default 2^-23.

    Returns:
        The new q and k, with the shapes and dtypes of the old, contiguous.

    Raises:
        ValueError, TypeError: An argument is wrong.

    q, k and the gradients that come in may have any strides whose stride in D is 1, and cos and sin any row stride;
    other tensors are copied first. The backward pass reads the results, and a number per head, but neither q nor k. The
    CUDA kernels take float32 and bfloat16; other types run in plain torch, with a warning. Second derivatives,
    forward-mode AD, torch.func transforms and gradients of cos and sin run in plain torch, with a warning.
    """
    _check(q, k, cos, sin, scale, eps)
    if backends.runs_native("rotary_norm", q, _unsupported(q, k, cos, sin)):
        return native_rotary_norm(q, k, cos, sin, scale, eps)
    return reference_rotary_norm(q, k, cos, sin, scale=scale, eps=eps)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float, eps: float) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.size(3) != k.size(3):
        raise ValueError(
            "rotary_norm: q and k must have shapes (B, T, H, D) and (B, T, Hkv, D), "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    T, D = q.size(1), q.size(3)
    if D % 2 or not 2 <= D <= LARGEST_D:
        raise ValueError(f"rotary_norm: D must be even, from 2 to {LARGEST_D}, got {D}")
    checks.check_alike("rotary_norm", "q", q, k=k)
    checks.check_dtype("rotary_norm", "q", q, dtypes_on(q.device))
    for name, table in (("cos", cos), ("sin", sin)):
        checks.check_dtype("rotary_norm", name, table, (compute_dtype(q.dtype),))
        checks.check_device("rotary_norm", name, table, q.device, "q")
        if table.shape != (T, D // 2):
            raise ValueError(
                f"rotary_norm: {name} must have shape (T, D / 2) = {(T, D // 2)}, got {tuple(table.shape)}"
            )
    if not LEAST_SCALE <= scale < math.inf:
        raise ValueError(f"rotary_norm: scale must be a finite number >= {LEAST_SCALE}, got {scale}")
    if not eps >= 0:
        raise ValueError(f"rotary_norm: eps must be at least 0, got {eps}")


def _unsupported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str:
    """Return, as a phrase, why the kernels do not take these arguments; "" if they do."""
    if mode := modes.beyond_backward(q, k, cos, sin):
        return modes.unsupported(mode)
    if modes.derivative(cos, sin):
        return modes.unsupported("gradients of cos and sin")
    return no_cuda_kernel(q.device, q.dtype)


# --- reference ---


def reference_rotary_norm(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, scale: float = 1.0, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """Return what `rotary_norm` returns."""
    return _reference_of_one(q, cos, sin, scale, eps), _reference_of_one(k, cos, sin, scale, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (B, T, H, D), rotated by the rows of cos and sin (T, D / 2); with -sin, rotated back."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def _reference_of_one(x: Tensor, cos: Tensor, sin: Tensor, scale: float, eps: float) -> Tensor:
    z = _rotate(x.to(compute_dtype(x.dtype)), cos, sin)
    return (scale * z * (z.square().mean(dim=-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _reference_backward(
    dout: Tensor | None, dr: Tensor | None, out: Tensor, r: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> Tensor:
    """Return the gradient of q or k. Differentiable, through out and r, which are results of q or k."""
    r = r[..., None]
    n = out.to(r.dtype) / scale
    dout = torch.zeros_like(n) if dout is None else dout.to(r.dtype)
    dz = scale * r * (dout - n * (dout * n).mean(dim=-1, keepdim=True))
    if dr is not None:
        dz = dz - dr[..., None] * r.square() * n / n.size(-1)
    return _rotate(dz, cos, -sin).to(out.dtype)


# --- native ---


def native_rotary_norm(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Run the kernel."""
    q_out, k_out, _, _ = torch.ops.nanochat_native.rotary_norm(q, k, cos, sin, eps, scale)
    return q_out, k_out


def _fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(q.dtype)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        q.new_empty(q.shape[:3], dtype=dtype),
        k.new_empty(k.shape[:3], dtype=dtype),
    )


def _backward_fake(
    dq_out: Tensor,
    dk_out: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    q_r: Tensor,
    k_r: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return dq_out.new_empty(dq_out.shape), dk_out.new_empty(dk_out.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, cos, sin, _, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, cos, sin)


def _gradient(
    ctx: Any, dq_out: Tensor | None, dk_out: Tensor | None, dq_r: Tensor | None, dk_r: Tensor | None
) -> tuple[Tensor | None, ...]:
    given = [grad for grad in (dq_out, dk_out, dq_r, dk_r) if grad is not None]
    if not given:
        return (None,) * 6
    q_out, k_out, q_r, k_r, cos, sin = ctx.saved_tensors
    mode = modes.beyond_first_derivative(*given)
    if mode:
        backends.warn_reference_runs("rotary_norm", q_out.device.type, modes.unsupported(mode))
    # Only a second derivative has a gradient of q_r or k_r.
    if mode or dq_r is not None or dk_r is not None:
        dq = _reference_backward(dq_out, dq_r, q_out, q_r, cos, sin, ctx.scale)
        dk = _reference_backward(dk_out, dk_r, k_out, k_r, cos, sin, ctx.scale)
    else:
        dq_out = torch.zeros_like(q_out) if dq_out is None else dq_out
        dk_out = torch.zeros_like(k_out) if dk_out is None else dk_out
        dq, dk = torch.ops.nanochat_native.rotary_norm_backward(
            dq_out, dk_out, q_out, k_out, q_r, k_r, cos, sin, ctx.scale
        )
    return dq, dk, None, None, None, None


schema.register("rotary_norm", _fake, _gradient, _setup_context)
schema.register("rotary_norm_backward", _backward_fake)
