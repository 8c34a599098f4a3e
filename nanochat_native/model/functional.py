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
from nanochat_native.model import float8
from nanochat_native.ops import modes
from nanochat_native.ops.float8 import takes
from nanochat_native.ops.weight_copies import low_precision

EPS = torch.finfo(torch.float32).eps  # of every RMSNorm; 2^-23, the default of torch's rms_norm for float32


class _Linears(torch.autograd.Function):
    """x weight^T for each weight. In the backward pass the products add up the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)  # the weights for the check that nothing has changed them
        ctx.weights = weights  # themselves: checkpoint would return other tensors, which have no copies
        return _products(x, weights)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *_ = ctx.saved_tensors
        dx, dweights = _gradients_of_products(dys, x, ctx.weights, ctx.needs_input_grad)
        return dx, *dweights


class _Projections(torch.autograd.Function):
    """q, k and v as _Linears, and the value embeddings added to v, whose gradient of x is added to the products'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        *weights, gate, table, ids = tensors
        ctx.save_for_backward(x, gate, table, ids, *weights)
        ctx.weights = weights  # as in _Linears
        q, k, v = _products(x, weights)
        heads = v.unflatten(-1, (gate.size(0), -1))
        return q, k, ops.add_value_embedding(heads, *_gate_arguments(x, gate, v.dtype), table, ids).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, table, ids, *_ = ctx.saved_tensors
        dx, dweights = _gradients_of_products(dys, x, ctx.weights, ctx.needs_input_grad[:4])
        dv = dys[2]
        dh, dgate, dtable = ops.add_value_embedding_backward(
            dv.reshape(*dv.shape[:-1], gate.size(0), -1), *_gate_arguments(x, gate, dv.dtype), table, ids
        )
        if dx is not None:
            dx = _add_to_first_channels(dx, dh)
        return dx, *dweights, dgate.to(gate.dtype), dtable, None


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


def _products(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(ops.linear(x, low_precision(weight, x.dtype)) for weight in weights)


def _gradients_of_products(
    dys: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of x and of each weight, where they are `needed`."""
    needs_dx, *needs_dweights = needed
    dx, dweights = None, []
    for dy, weight, needs_dweight in zip(dys, weights, needs_dweights, strict=True):
        needs = (needs_dx, needs_dweight)
        factor = _factor(weight, x.dtype)
        dx, dweight = ops.linear_backward(dy, x, factor, add_to=dx, weight_dtype=weight.dtype, needed=needs)
        dweights.append(dweight)
    return dx, dweights


def _gate_arguments(x: Tensor, gate: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the channels that the gate reads, and the gate, in the types that the operator takes with values of dtype.

    The gate is small, so it is read in float32 and has no copy in another type.
    """
    return x[..., : gate.size(1)].to(dtype), gate.to(torch.promote_types(dtype, torch.float32))


def _add_to_first_channels(x: Tensor, part: Tensor) -> Tensor:
    """Return x + part on the first channels of x, in place unless a derivative is recorded or gradients are batched."""
    count = part.size(-1)
    if modes.out_of_place(x, part):
        return torch.cat((x[..., :count] + part, x[..., count:]), dim=-1)
    x[..., :count] += part
    return x


def _factor(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in dtype, for a backward pass; differentiable if the pass is itself differentiated."""
    return weight.to(dtype) if torch.is_grad_enabled() else low_precision(weight, dtype)


def linears(x: Tensor, weights: Sequence[Tensor], recipe: str | None = None) -> tuple[Tensor, ...]:
    """Return x weight^T (..., O) for each weight (O, I), for x (..., I).

    Args:
        recipe: one of float8.RECIPES, for products in FP8 while gradients are recorded; of the weights that suit it.
    """
    if ops.beyond_backward(x, weights):
        return tuple(ops.linear(x, weight.to(x.dtype)) for weight in weights)
    narrow = [weight for weight in weights if _in_float8(recipe, weight)]
    others = [weight for weight in weights if not _in_float8(recipe, weight)]
    products = iter(float8.linears(x, narrow, recipe) if recipe is not None and narrow else ())
    exact = iter(_Linears.apply(x, *others) if others else ())
    return tuple(next(products if _in_float8(recipe, weight) else exact) for weight in weights)


def _in_float8(recipe: str | None, weight: Tensor) -> bool:
    """Return whether the product with a weight is in FP8: in training alone, which records gradients."""
    return recipe is not None and torch.is_grad_enabled() and takes(weight)


def project(
    x: Tensor, weights: Sequence[Tensor], gate: Tensor, table: Tensor, ids: Tensor, recipe: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as `linears` does, with a gated embedding of each token added to v.

        v += 3 sigmoid(x[..., :12] gate^T) table[ids], one gate for each key/value head

    Args:
        weights: of q, k and v.
        gate: (Hkv, 12).
        table: (V, Hkv D), the value embeddings, in x's dtype or float32.
        ids: (B, T) int64, for x (B, T, C).
        recipe: as for linears.
    """
    if ops.beyond_backward(x, weights, gate, table) or any(_in_float8(recipe, weight) for weight in weights):
        q, k, v = linears(x, weights, recipe)
        heads = v.unflatten(-1, (gate.size(0), -1))
        return q, k, ops.add_value_embedding(heads, *_gate_arguments(x, gate, v.dtype), table, ids).flatten(-2)
    return cast(tuple[Tensor, Tensor, Tensor], _Projections.apply(x, *weights, gate, table, ids))


def squared_relu_mlp(x: Tensor, fc: Tensor, proj: Tensor, recipe: str | None = None) -> Tensor:
    """Return max(x fc^T, 0)^2 proj^T for x (..., C), fc (F, C) and proj (C, F). recipe: as for linears."""
    if ops.beyond_backward(x, fc, proj):
        return ops.linear(ops.linear(x, fc.to(x.dtype)).relu().square(), proj.to(x.dtype))
    if recipe is not None and _in_float8(recipe, fc) and _in_float8(recipe, proj):
        return float8.squared_relu_mlp(x, fc, proj, recipe)
    return cast(Tensor, _SquaredReluMLP.apply(x, fc, proj))


def norm(x: Tensor) -> Tensor:
    """Return the RMSNorm of the last dimension, without weights."""
    return ops.rms_norm(x, eps=EPS)


def add_norm(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x + y and its norm; without y, x and its norm."""
    return ops.add_rms_norm(x, y, eps=EPS)


def mix_norm(
    x: Tensor, y: Tensor | None, x0: Tensor, x_scale: Tensor, x0_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return z = x + y, or x without y; the mixed stream x_scale z + x0_scale x0; its norm; and x0 itself.

    If every call takes the x0 that the call before has returned, the gradient of x0 is added up within their backward
    passes.

    Args:
        x, y, x0: (B, T, C).
        x_scale, x0_scale: one element each.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return ops.mix_rms_norm(x, y, x0, x_scale.to(dtype), x0_scale.to(dtype), eps=EPS)


def smear(e: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    """Add a gated part of the token before to each token but the first.

        out[t] = e[t] + scale sigmoid(e[t, :24] gate^T) e[t - 1]

    Args:
        e: (B, T, C).
        gate: (1, 24).
        scale: one element.
    """
    wide = torch.promote_types(e.dtype, torch.float32)
    return ops.smear(e, gate.to(wide), scale.to(wide))


def embedding_norm(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norms of the rows `ids` (B, T) of `table` (V, C) in `dtype`, (B, T, C)."""
    return ops.embedding_rms_norm(ids, table, dtype, eps=EPS)


def rotary_norm(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rotate q (B, T, H, D) and k (B, T, Hkv, D), normalize each head, and multiply both by `scale`.

    Args:
        cos, sin: GPT's tables for T positions, (1, T, 1, D) and (1, T, 1, D / 2).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    half = sin.size(-1)
    return ops.rotary_norm(q, k, cos[0, :, 0, :half].to(dtype), sin[0, :, 0].to(dtype), scale=scale, eps=EPS)


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
