"""RMSNorm without weights, with the residual sum before it, or of the rows of an embedding."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.dtypes import compute_dtype, converted, dtypes_on, no_cuda_kernel

EPS = torch.finfo(torch.float32).eps  # 2^-23, the default of torch's rms_norm for float32


def rms_norm(x: Tensor, *, eps: float = EPS) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps), RMSNorm without weights, arXiv:1910.07467. Differentiable.

    Args:
        x: (..., C) float32, float64 or bfloat16; on a GPU also float16. C >= 1; the mean is over C.
        eps: At least 0.

    Returns:
        The shape and dtype of x, contiguous. It is computed in float32, in float64 for float64, and rounded once.

    Raises:
        ValueError, TypeError: An argument is wrong.

    The gradient needs the result, which the next operator keeps too, and one number for each row, but not x. The same
    inputs give the same bits, whatever the number of threads.

    Second derivatives, forward-mode AD and torch.func transforms run in plain torch, with a warning. So do float64 and
    float16 on a GPU.
    """
    check_rows("rms_norm", "x", x, eps)
    if backends.runs_native("rms_norm", x, _unsupported(x, x.dtype)):
        return native_rms_norm(x, eps)
    return reference_rms_norm(x, eps=eps)


def add_rms_norm(x: Tensor, residual: Tensor | None, *, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Return x + residual and its rms_norm, in one pass over memory. Differentiable.

    Args:
        x: (..., C), as rms_norm's.
        residual: The shape, dtype and device of x; None for no addition: x itself and its norm.
        eps: At least 0.

    Returns:
        sum = x + residual and y = rms_norm(sum), with the bits of these two calls one after the other: y is the norm of
        the rounded sum. The backward pass adds the gradient of sum in the same pass, before it rounds.

    Raises:
        ValueError, TypeError: An argument is wrong.

    What `rms_norm` keeps, computes in plain torch and guarantees, holds here too.
    """
    check_rows("add_rms_norm", "x", x, eps)
    if residual is None:
        if backends.runs_native("add_rms_norm", x, _unsupported(x, x.dtype)):
            return native_add_rms_norm(x, None, eps)
        return reference_add_rms_norm(x, None, eps=eps)
    checks.check_alike("add_rms_norm", "x", x, residual=residual)
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: residual must have shape {tuple(x.shape)} like x, got {tuple(residual.shape)}")
    if backends.runs_native("add_rms_norm", x, _unsupported(x, x.dtype, residual)):
        return native_add_rms_norm(x, residual, eps)
    return reference_add_rms_norm(x, residual, eps=eps)


def embedding_rms_norm(tokens: Tensor, table: Tensor, dtype: torch.dtype, *, eps: float = EPS) -> Tensor:
    """Return rms_norm(table[tokens].to(dtype)). Differentiable with respect to the table.

    Args:
        tokens: (...) int64, in [0, V).
        table: (V, C) with V, C >= 1, and a dtype that rms_norm takes.
        dtype: That of the result, likewise.
        eps: At least 0.

    Returns:
        (..., C) in dtype, contiguous. The gradient of the table has the table's dtype and is summed in it.

    Raises:
        ValueError, TypeError: An argument is wrong. On CUDA the range of the tokens is not checked, because that would
            wait for the stream: a token out of range makes its row NaN, and adds nothing to the gradient.

    What `rms_norm` keeps, computes in plain torch and guarantees, holds here too.
    """
    op = "embedding_rms_norm"
    if table.dim() != 2 or table.numel() == 0:
        raise ValueError(f"{op}: table must have shape (V, C) with V, C >= 1, got {tuple(table.shape)}")
    allowed = dtypes_on(table.device)
    checks.check_dtype(op, "table", table, allowed)
    checks.check_dtype(op, "tokens", tokens, (torch.int64,))
    checks.check_device(op, "tokens", tokens, table.device, "table")
    if dtype not in allowed:
        raise TypeError(f"{op}: dtype must be {' or '.join(map(str, allowed))}, got {dtype}")
    _check_eps(op, eps)
    if backends.runs_native(op, table, _unsupported(table, dtype)):
        return native_embedding_rms_norm(tokens, table, dtype, eps)
    return reference_embedding_rms_norm(tokens, table, dtype, eps=eps)


def check_rows(op: str, name: str, x: Tensor, eps: float) -> None:
    """Raise ValueError or TypeError unless a norm takes rows x (..., C) and eps."""
    if x.dim() < 1 or x.size(-1) < 1:
        raise ValueError(f"{op}: {name} must have shape (..., C) with C >= 1, got {tuple(x.shape)}")
    checks.check_dtype(op, name, x, dtypes_on(x.device))
    _check_eps(op, eps)


def _check_eps(op: str, eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be >= 0, got {eps}")


def _unsupported(x: Tensor, dtype: torch.dtype, *others: Tensor) -> str:
    """Return, as a phrase, why the kernel does not read x or write results of `dtype` here; "" if it does."""
    if mode := modes.beyond_backward(x, *others):
        return modes.unsupported(mode)
    return no_cuda_kernel(x.device, x.dtype, dtype)


# --- reference ---


def reference_rms_norm(x: Tensor, *, eps: float = EPS) -> Tensor:
    """Return what `rms_norm` returns."""
    if modes.beyond_backward(x):
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return cast(Tensor, _RMSNorm.apply(x, None, eps)[1])


def reference_add_rms_norm(x: Tensor, residual: Tensor | None, *, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Return what `add_rms_norm` returns."""
    if modes.beyond_backward(x, residual):
        x = x if residual is None else x + residual
        return x, F.rms_norm(x, x.shape[-1:], eps=eps)
    if residual is None:
        x, y, _ = _NormBesideStream.apply(x, eps, False)
    else:
        x, y, _ = _RMSNorm.apply(x, residual, eps)
    return x, y


def reference_embedding_rms_norm(tokens: Tensor, table: Tensor, dtype: torch.dtype, *, eps: float = EPS) -> Tensor:
    """Return what `embedding_rms_norm` returns."""
    checks.check_rows("embedding_rms_norm", "tokens", tokens, table.size(0))
    return reference_rms_norm(F.embedding(tokens, table).to(dtype), eps=eps)


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x (..., C), and r (...) in the type that it is computed in. Not differentiable."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=compute_dtype(x.dtype))
    r = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
    return converted(x * r, x.dtype), r.squeeze(-1)


class _RMSNorm(torch.autograd.Function):
    """The operator rms_norm of the schema in torch's own calls. It saves its results, as the native operator does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        summed = x.new_empty(0) if residual is None else x + residual
        y, r = normalise(x if residual is None else summed, eps)
        _setup_context(ctx, (x, residual, eps), (summed, y, r))
        return summed, y, r

    @staticmethod
    def backward(ctx: Any, dsum: Tensor | None, dy: Tensor | None, dr: Tensor | None) -> tuple[Tensor | None, ...]:
        # torch.compile passes zeros in place of None, for an empty sum too.
        dx = _differentiable_backward(dy, dsum if ctx.has_residual else None, dr, *ctx.saved_tensors)
        return dx, dx if ctx.has_residual else None, None


def _differentiable_backward(
    dy: Tensor | None, dsum: Tensor | None, dr: Tensor | None, y: Tensor, r: Tensor
) -> Tensor | None:
    """Return dsum + r (dy - y mean(dy y)) - dr r^2 y / C in y's dtype."""
    dx = gradient_of_rows(dy, dr, y, r)
    if dx is None:
        return dsum
    return (dx if dsum is None else dx + dsum).to(y.dtype)


def gradient_of_rows(dy: Tensor | None, dr: Tensor | None, y: Tensor, r: Tensor) -> Tensor | None:
    """Return r (dy - y mean(dy y)) - dr r^2 y / C in r's dtype: the gradient of rows with the norm y.

    y and r are results of the operator, so this can be differentiated again; only then is there a dr.
    """
    r = r.unsqueeze(-1)
    y = y.to(r.dtype)
    dx = None
    if dy is not None:
        dy = dy.to(r.dtype)
        dx = torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1).mul_(r)
    if dr is not None:
        through_r = dr.unsqueeze(-1) * r.square() * y / y.size(-1)
        dx = -through_r if dx is None else dx - through_r
    return dx


# --- native ---


def native_rms_norm(x: Tensor, eps: float) -> Tensor:
    """Run the kernel."""
    return cast(Tensor, torch.ops.nanochat_native.rms_norm(x, None, eps)[1])


def native_add_rms_norm(x: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Run the kernel."""
    if residual is None:
        x, y, _ = _NormBesideStream.apply(x, eps, True)
        return x, y
    summed, y, _ = torch.ops.nanochat_native.rms_norm(x, residual, eps)
    return summed, y


class _NormBesideStream(torch.autograd.Function):
    """x, its norm and r. In the backward pass the gradient of x is added in the pass of the norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, native: bool) -> tuple[Tensor, Tensor, Tensor]:
        y, r = torch.ops.nanochat_native.rms_norm(x, None, eps)[1:] if native else normalise(x, eps)
        ctx.native = native
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, r)
        return x.view_as(x), y, r

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dy: Tensor | None, dr: Tensor | None) -> tuple[Tensor | None, None, None]:
        y, r = ctx.saved_tensors
        if ctx.native:
            return _backward("add_rms_norm", dy, dx, dr, y, r), None, None
        return _differentiable_backward(dy, dx, dr, y, r), None, None


def native_embedding_rms_norm(tokens: Tensor, table: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """Run the kernel."""
    return cast(Tensor, torch.ops.nanochat_native.embedding_rms_norm(tokens, table, dtype, eps)[0])


def _fake(x: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    r = x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))
    return x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape), r


def _backward_fake(dy: Tensor, dsum: Tensor | None, y: Tensor, r: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def _embedding_fake(tokens: Tensor, table: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    y = table.new_empty((*tokens.shape, table.size(1)), dtype=dtype)
    return y, table.new_empty(tokens.shape, dtype=compute_dtype(dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    summed, y, r = output
    ctx.has_residual = inputs[1] is not None
    if not ctx.has_residual:
        ctx.mark_non_differentiable(summed)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, r)


def _backward(
    op: str, dy: Tensor | None, dsum: Tensor | None, dr: Tensor | None, y: Tensor, r: Tensor
) -> Tensor | None:
    """Return the gradient of the normalised rows, by the kernel if it can compute it."""
    if mode := modes.beyond_first_derivative(*(grad for grad in (dy, dsum, dr) if grad is not None)):
        backends.warn_reference_runs(op, y.device.type, modes.unsupported(mode))
    elif dy is not None and dr is None:
        return cast(Tensor, torch.ops.nanochat_native.rms_norm_backward(dy, dsum, y, r))
    return _differentiable_backward(dy, dsum, dr, y, r)


def _gradient(ctx: Any, dsum: Tensor | None, dy: Tensor | None, dr: Tensor | None) -> tuple[Tensor | None, ...]:
    op = "add_rms_norm" if ctx.has_residual else "rms_norm"
    dx = _backward(op, dy, dsum, dr, *ctx.saved_tensors)
    return dx, dx if ctx.has_residual else None, None


def _embedding_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, table, *_ = inputs
    ctx.rows, ctx.table_dtype = table.size(0), table.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, *output)


def _embedding_gradient(ctx: Any, dy: Tensor | None, dr: Tensor | None) -> tuple[Tensor | None, ...]:
    tokens, y, r = ctx.saved_tensors
    dx = _backward("embedding_rms_norm", dy, None, dr, y, r)
    if dx is None:
        return None, None, None, None
    if tokens.device.type != "cpu":  # where the range is not checked; torch skips the token -1
        tokens = tokens.masked_fill((tokens < 0) | (tokens >= ctx.rows), -1)
    dtable = torch.ops.aten.embedding_dense_backward(dx.to(ctx.table_dtype), tokens, ctx.rows, -1, False)
    return None, dtable, None, None


schema.register("rms_norm", _fake, _gradient, _setup_context)
schema.register("rms_norm_backward", _backward_fake)
schema.register("embedding_rms_norm", _embedding_fake, _embedding_gradient, _embedding_setup_context)
