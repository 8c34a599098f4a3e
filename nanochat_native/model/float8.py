"""Linear layers and the MLP with products in FP8, for training. The weights and their gradients stay float32.

The forward pass keeps the scaled matrices for the backward pass, so each matrix is rounded once for each way in which
it is scaled. See ops/float8.py for the arithmetic. There are no second derivatives.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.ops import float8
from nanochat_native.ops.float8 import Matrix


class _Linears(torch.autograd.Function):
    """x weight^T for each weight."""

    @staticmethod
    def forward(ctx: Any, recipe: str, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        factor = Matrix(x.flatten(0, -2), recipe)
        scaled = [Matrix(weight, recipe) for weight in weights]
        _save(ctx, recipe, factor, *scaled)
        return tuple(float8.linear(factor, each, x.dtype).view(*x.shape[:-1], -1) for each in scaled)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        (x, *weights), _ = _saved(ctx)
        dx: Tensor | None = None
        dweights = []
        for dy, weight in zip(dys, weights, strict=True):
            gradient = Matrix(dy.flatten(0, -2), ctx.recipe, float8.GRADIENT)
            own, dweight = float8.linear_backward(gradient, x, weight, dy.dtype)
            dx = own if dx is None else dx.add_(own)
            dweights.append(dweight)
        assert dx is not None
        return None, dx.view(*dys[0].shape[:-1], -1), *dweights


class _SquaredReluMLP(torch.autograd.Function):
    """y = max(x fc^T, 0)^2 proj^T."""

    @staticmethod
    def forward(ctx: Any, recipe: str, x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
        first, scaled_fc, scaled_proj = Matrix(x.flatten(0, -2), recipe), Matrix(fc, recipe), Matrix(proj, recipe)
        h = float8.linear(first, scaled_fc, x.dtype)
        ops.relu_squared_(h)
        _save(ctx, recipe, first, scaled_fc, scaled_proj, h=h)
        return float8.linear(Matrix(h, recipe), scaled_proj, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        recipe = ctx.recipe
        (x, fc, proj), h = _saved(ctx)
        gradient = Matrix(dy.flatten(0, -2), recipe, float8.GRADIENT)
        dh, dproj = float8.linear_backward(gradient, Matrix(h, recipe), proj, dy.dtype)
        ops.relu_squared_backward_(dh, h)
        dx, dfc = float8.linear_backward(Matrix(dh, recipe, float8.GRADIENT), x, fc, dy.dtype)
        return None, dx.view(*dy.shape[:-1], -1), dfc, dproj


def _save(ctx: Any, recipe: str, *matrices: Matrix, h: Tensor | None = None) -> None:
    ctx.recipe, ctx.count = recipe, len(matrices)
    ctx.save_for_backward(*(tensor for matrix in matrices for tensor in matrix.kept), h)


def _saved(ctx: Any) -> tuple[list[Matrix], Any]:
    *tensors, h = ctx.saved_tensors  # which may be read once: with gradient checkpointing each reading recomputes it
    each = len(tensors) // ctx.count
    return [Matrix.restored(tuple(tensors[i : i + each])) for i in range(0, len(tensors), each)], h


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # under create_graph=True
        raise RuntimeError("linear layers in FP8 have no second derivative; use create_graph=False, or no FP8")


def _check_rows(x: Tensor) -> None:
    rows = x.numel() // x.size(-1)
    if rows % float8.MULTIPLE:
        raise ValueError(f"x must have a multiple of {float8.MULTIPLE} rows for products in FP8, got {rows}")


def linears(x: Tensor, weights: Sequence[Tensor], recipe: str) -> tuple[Tensor, ...]:
    """Return x weight^T (..., O) for each weight (O, I), for x (..., I). Raise ValueError unless x has 16 n rows."""
    _check_rows(x)
    return cast(tuple[Tensor, ...], _Linears.apply(recipe, x, *weights))


def squared_relu_mlp(x: Tensor, fc: Tensor, proj: Tensor, recipe: str) -> Tensor:
    """Return max(x fc^T, 0)^2 proj^T for x (..., C), fc (F, C) and proj (C, F). Raise ValueError as linears."""
    _check_rows(x)
    return cast(Tensor, _SquaredReluMLP.apply(recipe, x, fc, proj))
