"""The parts of a block as functions: norms, rotary positions, linear layers and the MLP.

Those with a backward pass written by hand save less than autograd would, and pass over memory less often. Weights take
part in products as low_precision gives them, and their gradients have the weights' own dtype. torch.func's transforms
and forward-mode AD run in plain torch.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.ops.weight_copies import low_precision

EPS = torch.finfo(torch.float32).eps  # of every RMSNorm; 2^-23, the default of torch's rms_norm for float32


class _Linears(torch.autograd.Function):
    """x weight^T for each weight. In the backward pass the products add up the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)  # the weights for the check that nothing has changed them
        ctx.weights = weights  # themselves: checkpoint would return other tensors, which have no copies
        return tuple(ops.linear(x, low_precision(weight, x.dtype)) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *_ = ctx.saved_tensors
        needs_dx, *needed = ctx.needs_input_grad
        dx, dweights = None, []
        for dy, weight, needs_dweight in zip(dys, ctx.weights, needed, strict=True):
            needs = (needs_dx, needs_dweight)
            factor = _factor(weight, x.dtype)
            dx, dweight = ops.linear_backward(dy, x, factor, add_to=dx, weight_dtype=weight.dtype, needed=needs)
            dweights.append(dweight)
        return dx, *dweights


class _SquaredReluMLP(torch.autograd.Function):
    """y = max(x fc^T, 0)^2 proj^T. Saves max(x fc^T, 0)^2, from which the backward pass needs no other number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
        h = ops.linear_relu_squared(x, low_precision(fc, x.dtype))
        ctx.save_for_backward(x, h, fc, proj)
        ctx.weights = fc, proj  # as in _Linears
        return ops.linear(h, low_precision(proj, x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *_ = ctx.saved_tensors
        fc, proj = ctx.weights
        if torch.is_grad_enabled():  # under create_graph=True: h is neither input nor output, so has no graph back to x
            h = ops.linear(x, fc.to(x.dtype)).relu().square()
        dh, dproj = ops.linear_backward_relu_squared(dy, h, _factor(proj, x.dtype), weight_dtype=proj.dtype)
        dx, dfc = ops.linear_backward(
            dh, x, _factor(fc, x.dtype), weight_dtype=fc.dtype, needed=ctx.needs_input_grad[:2]
        )
        return dx, dfc, dproj


def _factor(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in dtype, for a backward pass; differentiable if the pass is itself differentiated."""
    return weight.to(dtype) if torch.is_grad_enabled() else low_precision(weight, dtype)


def linears(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return x weight^T (..., O) for each weight (O, I), for x (..., I)."""
    if ops.beyond_backward(x, weights):
        return tuple(ops.linear(x, weight.to(x.dtype)) for weight in weights)
    return cast(tuple[Tensor, ...], _Linears.apply(x, *weights))


def squared_relu_mlp(x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    """Return max(x fc^T, 0)^2 proj^T for x (..., C), fc (F, C) and proj (C, F)."""
    if ops.beyond_backward(x, fc, proj):
        return ops.linear(ops.linear(x, fc.to(x.dtype)).relu().square(), proj.to(x.dtype))
    return cast(Tensor, _SquaredReluMLP.apply(x, fc, proj))


def norm(x: Tensor) -> Tensor:
    """Return the RMSNorm of the last dimension, without weights."""
    return ops.rms_norm(x, eps=EPS)


def add_norm(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x + y and its norm; without y, x and its norm."""
    return ops.add_rms_norm(x, y, eps=EPS)


def embedding_norm(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norms of the rows `ids` (B, T) of `table` (V, C) in `dtype`, (B, T, C)."""
    return ops.embedding_rms_norm(ids, table, dtype, eps=EPS)


def rotary_norm(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, H, D) and k (B, T, Hkv, D), then normalize each head.

    Args:
        cos, sin: GPT's tables for T positions, (1, T, 1, D) and (1, T, 1, D / 2).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    half = sin.size(-1)
    return ops.rotary_norm(q, k, cos[0, :, 0, :half].to(dtype), sin[0, :, 0].to(dtype), eps=EPS)


class _WeightFor(torch.autograd.Function):
    """A weight in another dtype, by low_precision. The gradient is converted back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        return low_precision(weight, dtype).view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def weight_for(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in dtype, for an operator that takes one dtype. Differentiable."""
    if weight.dtype == dtype or ops.beyond_backward(weight):
        return weight.to(dtype)
    return cast(Tensor, _WeightFor.apply(weight, dtype))
