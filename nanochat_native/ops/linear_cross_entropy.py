"""The loss: cross-entropy of a linear layer's outputs, without keeping them."""

from typing import Any

import torch
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.dtypes import compute_dtype, dtypes_on, no_cuda_kernel, widest_dtype
from nanochat_native.ops.softmax import logsumexp


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 15.0,
    ignore_index: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross-entropy of softcap tanh(x weight^T / softcap), with the logits of one chunk of rows at a time.

    The forward pass computes the gradients, so no logits are kept; the backward pass scales these gradients.

    Args:
        x: (..., C) float32, float64 or bfloat16; on a GPU also float16.
        weight: (V, C) with x's dtype and device.
        targets: The shape of x without C, int64, in [0, V) or ignore_index.
        softcap: The bound of the logits' magnitude; None or 0 for none.
        ignore_index: The target that does not count.
        reduction: "mean" over the targets that are not ignored, "sum", or "none".

    Returns:
        The loss in nats, float32 (float64 for float64), 0 for an ignored target. For "mean" and "sum" it is a scalar,
        differentiable once; for "none" it has the shape of targets and no gradient. The mean of no target is NaN, and
        its gradients are zero.

    Raises:
        ValueError, TypeError: An argument is wrong. On CUDA the targets' range is not checked, because that would wait
            for the stream: a target out of range makes its own loss and gradient NaN.
        RuntimeError: A backward pass has create_graph=True, and the backend is not torch.

    There are kernels for the CPU, and for CUDA with float32 and bfloat16; on CUDA torch's library computes the
    products. The CPU kernel computes bfloat16 in float32; with the instruction sets avx512_bf16, amx and neon_bf16 its
    products are of bfloat16 numbers with float32 sums, and the gradient of the logits is rounded before it is
    multiplied. Other types and GPUs run in plain torch, with a warning and in chunks too. Forward-mode AD and
    torch.func transforms, second derivatives among them, run in plain torch, with a warning: that keeps the logits.
    """
    softcap = 0.0 if softcap is None else softcap
    _check(x, weight, targets, softcap, reduction)
    mode = modes.unsupported(modes.beyond_backward(x, weight))
    if backends.runs_native("linear_cross_entropy", x, mode or no_cuda_kernel(x.device, x.dtype)):
        return native_linear_cross_entropy(x, weight, targets, softcap, ignore_index, reduction)
    if x.device.type in ("cuda", "mps") and backends.backend() == "native" and not mode:
        return chunked_linear_cross_entropy(x, weight, targets, softcap, ignore_index, reduction)
    return reference_linear_cross_entropy(
        x, weight, targets, softcap=softcap, ignore_index=ignore_index, reduction=reduction
    )


def _check(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, reduction: str) -> None:
    op = "linear_cross_entropy"
    if x.dim() < 1 or weight.dim() != 2 or x.size(-1) != weight.size(1) or weight.size(0) == 0 or weight.size(1) == 0:
        raise ValueError(
            f"{op}: x and weight must have shapes (..., C) and (V, C) with C, V >= 1, "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: targets must have shape {tuple(x.shape[:-1])}, that of x without C, got {tuple(targets.shape)}"
        )
    checks.check_dtype(op, "x", x, dtypes_on(x.device))
    checks.check_dtype(op, "targets", targets, (torch.int64,))
    checks.check_alike(op, "x", x, weight=weight)
    checks.check_device(op, "targets", targets, x.device, "x")
    if not softcap >= 0:
        raise ValueError(f"{op}: softcap must be None or >= 0, got {softcap}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if reduction == "none" and modes.derivative(x, weight) == modes.GRADIENT:
        raise ValueError(
            f"{op}: reduction must be 'mean' or 'sum' when a tensor requires a gradient, got 'none'; "
            "call it under torch.no_grad()"
        )


# --- reference ---


def reference_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float = 15.0,
    ignore_index: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """Return what `linear_cross_entropy` returns, by way of all logits."""
    dtype = compute_dtype(x.dtype)
    logits = x.reshape(-1, x.size(-1)).to(dtype) @ weight.to(dtype).T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    flat = targets.reshape(-1)
    ignored = flat == ignore_index
    # gather checks the range itself on every device, but by an IndexError or a device-side assert.
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        # Under vmap, `if` cannot use the values of one mapped call, so those of all calls are checked.
        every = torch.func.debug_unwrap(targets)
        outside = every[(every != ignore_index) & ((every < 0) | (every >= weight.size(0)))]
        if outside.numel():
            raise ValueError(
                f"linear_cross_entropy: targets must be from 0 to {weight.size(0) - 1} or ignore_index {ignore_index}, "
                f"got {int(outside[0])}"
            )
    chosen = logits.gather(1, flat.masked_fill(ignored, 0)[:, None])[:, 0]
    losses = (logsumexp(logits) - chosen).masked_fill(ignored, 0.0)
    if reduction == "none":
        return losses.reshape(targets.shape)
    total = losses.sum(dtype=widest_dtype(losses.device))
    return (total / (~ignored).sum() if reduction == "mean" else total).to(dtype)


# --- chunks in plain torch ---

# The products of the backward pass read softmax(z) - onehot in x's type. Most probabilities are below the smallest
# numbers of float16, so they are multiplied by this.
FLOAT16_SCALE = 2.0**13


class _Chunked(torch.autograd.Function):
    """The loss of x (N, C), whose gradients are computed by the forward pass and kept in float32 or float64."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int, reduction: str
    ) -> Tensor:
        N, V, wide = x.size(0), weight.size(0), compute_dtype(x.dtype)
        needs_dx, needs_dweight, *_ = ctx.needs_input_grad
        scale = FLOAT16_SCALE if x.dtype == torch.float16 else 1.0
        losses = x.new_empty(N, dtype=wide)
        dx = x.new_empty(x.shape if needs_dx else 0, dtype=wide)
        dweight = weight.new_zeros(weight.shape if needs_dweight else 0, dtype=wide)
        ignored = targets == ignore_index
        outside = ((targets < 0) | (targets >= V)) & ~ignored
        factors = torch.full_like(losses, scale).masked_fill(ignored, 0).masked_fill(outside, torch.nan)
        rows = max(1, backends.logit_bytes() // (V * wide.itemsize))
        for first in range(0, N, rows):
            chunk = slice(first, first + rows)
            chosen = targets[chunk].clamp(0, V - 1)[:, None]
            z = _wide_product(x[chunk], weight.T)
            if softcap:
                z.div_(softcap).tanh_().mul_(softcap)
            lse = torch.logsumexp(z, dim=-1, keepdim=True)
            losses[chunk] = (lse - z.gather(1, chosen))[:, 0]
            if not (needs_dx or needs_dweight):
                continue
            gradient = torch.sub(z, lse).exp_()
            gradient.scatter_add_(1, chosen, gradient.new_full((1, 1), -1).expand_as(chosen))
            if softcap:  # the derivative of the softcap, 1 - (z / softcap)^2
                gradient.mul_(z.div_(softcap).square_().neg_().add_(1))
            narrow = gradient.mul_(factors[chunk, None]).to(x.dtype)
            del z, gradient
            if needs_dx:
                dx[chunk] = _wide_product(narrow, weight)
            if needs_dweight:
                dweight += _wide_product(narrow.T, x[chunk])
        losses = losses.masked_fill_(ignored, 0).masked_fill_(outside, torch.nan)
        count = (~ignored).sum(dtype=wide) if reduction == "mean" else losses.new_ones(())
        ctx.save_for_backward(dx, dweight, (1 / (count * scale)).masked_fill(count == 0, 0))
        ctx.dtypes = x.dtype, weight.dtype
        return losses if reduction == "none" else (losses.sum(dtype=widest_dtype(x.device)) / count).to(wide)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        *grads, scale = ctx.saved_tensors
        dx, dweight = (
            (grad * (dloss * scale)).to(dtype) if needed else None
            for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
        )
        return dx, dweight, None, None, None, None


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b with the type in which numbers of their type are computed, without rounding to their type."""
    wide = compute_dtype(a.dtype)
    if a.device.type == "cuda" and a.dtype != wide:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


def chunked_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int, reduction: str
) -> Tensor:
    """Return what `linear_cross_entropy` returns, with NANOCHAT_LOGIT_BYTES of logits at a time."""
    if not torch.is_grad_enabled():  # ctx.needs_input_grad does not depend on it
        x, weight = x.detach(), weight.detach()
    with torch.autocast(x.device.type, enabled=False):
        loss = _Chunked.apply(x.reshape(-1, x.size(-1)), weight, targets.reshape(-1), softcap, ignore_index, reduction)
    return loss.reshape(targets.shape) if reduction == "none" else loss


# --- native ---


def native_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int, reduction: str
) -> Tensor:
    """Run the kernel."""
    grad = torch.is_grad_enabled()
    loss, _, _ = torch.ops.nanochat_native.linear_cross_entropy(
        x.reshape(-1, x.size(-1)),
        weight,
        targets.reshape(-1),
        softcap,
        ignore_index,
        reduction,
        grad and x.requires_grad,
        grad and weight.requires_grad,
    )
    return loss.reshape(targets.shape) if reduction == "none" else loss


def _fake(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    ignore_index: int,
    reduction: str,
    needs_grad_x: bool,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty(targets.shape if reduction == "none" else (), dtype=compute_dtype(x.dtype))
    return loss, x.new_empty(x.shape if needs_grad_x else 0), weight.new_empty(weight.shape if needs_grad_weight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad_x, grad_weight = output
    ctx.needs = inputs[-2:]
    # Otherwise torch would pass zeros as the gradients of the two gradients, which are as large as these.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(grad_x, grad_weight)
    ctx.save_for_backward(grad_x, grad_weight)


def _gradient(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 8
    _refuse_second_derivative()
    grads = [grad * dloss if needed else None for grad, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)]
    return (*grads, None, None, None, None, None, None)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # under create_graph=True; the logits that it would need are not kept
        raise RuntimeError(
            "linear_cross_entropy: the native kernel has no second derivative; "
            "use create_graph=False, or ops.use_backend('torch')"
        )


schema.register("linear_cross_entropy", _fake, _gradient, _setup_context)
