"""Norms, rotary positions and the MLP, with backward passes that save little memory."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native import ops

EPS = torch.finfo(torch.float32).eps  # of every RMSNorm; 2^-23, the default of torch's rms_norm for float32


# The functions below have backward passes of their own, which save less than autograd would and pass over memory less
# often: the norms save their output, which the next operator saves anyway, instead of their input. The norms
# compute in float32 or better. Backward passes consist of torch's own calls on inputs and outputs, so that they can be
# differentiated in turn; this is why the norms also return r. torch.func's transforms and forward-mode AD use the plain
# functions further below.


class _RMSNorm(torch.autograd.Function):
    """y = r x, r = 1 / sqrt(mean(x^2) + EPS) over the last dimension; returns y and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        r = _inverse_rms(x)
        y = (x * r).to(x.dtype)
        ctx.save_for_backward(y, r)
        ctx.set_materialize_grads(False)
        return y, r

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dr: Tensor | None) -> Tensor:
        y, r = ctx.saved_tensors
        return _rms_norm_backward(dy, dr, y, r).to(y.dtype)


class _RotaryNorm(torch.autograd.Function):
    """Rotates x (B, T, heads, D) by cos (1, T, 1, D) and sin (1, T, 1, D / 2), then is _RMSNorm of each head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        y = _rotate(x, cos, sin)
        r = _inverse_rms(y)
        y = y.mul_(r).to(x.dtype)
        ctx.save_for_backward(y, r, cos, sin)
        ctx.set_materialize_grads(False)
        return y, r

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dr: Tensor | None) -> tuple[Tensor, None, None]:
        y, r, cos, sin = ctx.saved_tensors
        return _rotate(_rms_norm_backward(dy, dr, y, r), cos, -sin).to(y.dtype), None, None


class SquaredReluMLP(torch.autograd.Function):
    """y = max(x fc^T, 0)^2 proj^T for x (..., C), fc (4 C, C), proj (C, 4 C).

    Saves max(x fc^T, 0) and squares it again in the backward pass, which halves the memory of the largest activations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
        h = ops.linear(x, fc).relu_()
        ctx.save_for_backward(x, h, fc, proj)
        return ops.linear(h * h, proj)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, h, fc, proj = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph=True: h is neither input nor output, so has no graph back to x
            h = ops.linear(x, fc).relu()
        dh, dproj = ops.linear_backward(dy, h * h, proj)
        dx, dfc = ops.linear_backward(dh.mul_(h), x, fc)
        return dx.mul_(2), dfc.mul_(2), dproj


def _plain_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def _plain_rotary_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return _plain_norm(x * cos + torch.cat((x2 * sin, x1 * -sin), dim=-1)).to(x.dtype)


def plain_mlp(x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    return ops.linear(ops.linear(x, fc).relu().square(), proj)


def _inverse_rms(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(x.size(-1)).add_(EPS).rsqrt_()


def _rms_norm_backward(dy: Tensor | None, dr: Tensor | None, y: Tensor, r: Tensor) -> Tensor:
    """Return dx = r (dy - y mean(dy y)) - dr r^2 y / C in r's dtype. dr is None in a first derivative."""
    y = y.to(r.dtype)
    dy = torch.zeros_like(y) if dy is None else dy.to(r.dtype)
    dx = torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1).mul_(r)
    return dx if dr is None else dx - dr * r.square() * y / y.size(-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return (x1 cos + x2 sin, x2 cos - x1 sin) for the halves x1, x2 of the last dimension, in float32 or better."""
    half = sin.size(-1)
    y = x * cos
    x = x.to(y.dtype)
    y[..., :half].addcmul_(x[..., half:], sin)
    y[..., half:].addcmul_(x[..., :half], sin, value=-1)
    return y


def norm(x: Tensor) -> Tensor:
    """Return the RMSNorm of the last dimension, without weights."""
    return _plain_norm(x) if ops.beyond_backward(x) else cast(Tensor, _RMSNorm.apply(x)[0])


def rotary_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, heads, D) by cos (1, T, 1, D) and sin (1, T, 1, D / 2), and normalize each head."""
    if ops.beyond_backward(x):
        return _plain_rotary_norm(x, cos, sin)
    return cast(Tensor, _RotaryNorm.apply(x, cos, sin)[0])
