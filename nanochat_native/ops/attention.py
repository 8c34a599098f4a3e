"""Exact attention: causal, with a sliding window, or over the caches of many sequences."""

from typing import Any

import torch
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.block_attention import block_attention
from nanochat_native.ops.dtypes import ALL_DTYPES, CPU_DTYPES, compute_dtype
from nanochat_native.ops.softmax import softmax

CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_LARGEST_D = 128


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale * q k^T) v, computed exactly and without the matrix of scores. Differentiable.

    The method is FlashAttention-2, arXiv:2307.08691, and on Hopper FlashAttention-3, arXiv:2407.08608. The same inputs
    give the same bits on the same machine, forward and backward.

    Args:
        q: (B, Tq, H, D).
        k, v: (B, Tk, Hkv, D) with q's dtype and device. H is a multiple of Hkv: each group of H / Hkv consecutive query
            heads shares one key head.
        causal: Query i sees keys up to i + Tk - Tq: the last query sees the last key.
        window: Query i sees its own key and the `window` keys before it, like FlashAttention's window_size=(window, 0).
            Implies causal.
        scale: The factor of the scores, by default 1 / sqrt(D).
        lengths: (B,) int64 on q's device. k and v are then caches with room for Tk keys. Sequence b has the first
            lengths[b] keys, and its last query sees the last of these. Excludes derivatives and torch.func transforms.
            A length above Tk raises ValueError on a CPU; on a GPU, where reading it would wait, it counts as Tk.

    Returns:
        (B, Tq, H, D) in q's dtype, contiguous. A query that sees no key gives 0 and no gradient.

    Raises:
        ValueError, TypeError: An argument is wrong, or lengths is combined with a derivative.

    The CPU kernels take float32, float64 and bfloat16, with any strides whose stride in D is 1; other tensors are
    copied first. bfloat16 is computed in float32. With the instruction sets avx512_bf16, amx and neon_bf16 and more
    than 4 queries, the products take bfloat16 numbers and add in float32: the probabilities and their gradients are
    rounded before they are multiplied, and a number that is not finite may then reach tokens up to 255 away that do not
    see it. The CUDA kernels (compute capability 8.0 or newer) take bfloat16 and float16 with float32 sums, and D a
    multiple of 8 up to 128, computed as 64, 96 or 128; tensors whose rows are not aligned to 16 bytes are copied first.
    On compute capability 9.0 the kernels use tensor copies and wgmma. With up to 64 rows Tq * H / Hkv, a step of
    generation, the GPU's multiprocessors share the keys. Other types, D and GPUs run torch's
    scaled_dot_product_attention on blocks of queries (MPS: products and a softmax), with a warning, and without the
    matrix of scores.

    Second derivatives, forward-mode AD and torch.func transforms run in plain torch, with a warning: that keeps the
    matrix of scores. Where blocks of queries run, second derivatives need the torch backend.
    """
    _check(q, k, v, window, lengths)
    mode = modes.unsupported(modes.beyond_backward(q, k, v))
    if backends.runs_native("attention", q, mode or _unsupported(q)):
        return native_attention(q, k, v, causal, window, scale, lengths)
    if q.device.type in ("cuda", "mps") and backends.backend() == "native" and not mode:
        return block_attention(q, k, v, causal=causal, window=window, scale=scale, lengths=lengths)
    return reference_attention(q, k, v, causal=causal, window=window, scale=scale, lengths=lengths)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, lengths: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            "attention: q, k, v must have shapes (B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, D), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape != v.shape or q.size(0) != k.size(0) or q.size(3) != k.size(3):
        raise ValueError(
            "attention: k and v must have the same shape, with the B and D of q, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.size(3) == 0 or q.size(2) == 0 or k.size(2) == 0 or q.size(2) % k.size(2) != 0:
        raise ValueError(
            "attention: H must be a multiple of Hkv, and D must be >= 1, "
            f"got H = {q.size(2)}, Hkv = {k.size(2)}, D = {q.size(3)}"
        )
    checks.check_alike("attention", "q", q, k=k, v=v)
    checks.check_dtype("attention", "q", q, ALL_DTYPES if q.device.type == "cuda" else CPU_DTYPES)
    if window is not None and window < 0:
        raise ValueError(f"attention: window must be None or a number of earlier keys >= 0, got {window}")
    if lengths is not None:
        checks.check_dtype("attention", "lengths", lengths, (torch.int64,))
        if lengths.shape != q.shape[:1]:
            raise ValueError(
                f"attention: lengths must have shape ({q.size(0)},), one per sequence, got {tuple(lengths.shape)}"
            )
        checks.check_device("attention", "lengths", lengths, q.device, "q")
        modes.refuse_with("attention", "lengths", q, k, v)


def _unsupported(q: Tensor) -> str:
    """Return, as a phrase, why the CUDA kernels do not take q's type or head size; "" if they do."""
    if q.device.type != "cuda":
        return ""
    if q.dtype not in CUDA_DTYPES:
        return f"its kernels take bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.size(3) % 8 or q.size(3) > CUDA_LARGEST_D:
        return f"its kernels take D a multiple of 8 up to {CUDA_LARGEST_D}, not {q.size(3)}"
    return ""


# --- reference ---


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return what `attention` returns, by way of the matrix of scores."""
    if lengths is None:
        return reference_attention_forward(q, k, v, causal=causal, window=window, scale=scale)[0]
    return _reference_by_length(q, k, v, lengths, causal=causal, window=window, scale=scale)


def reference_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the output, and the log-sum-exp of the scaled scores: (B, H, Tq), -inf for a fully masked row."""
    B, Tq, H, D = q.shape
    Tk, Hkv = k.shape[1:3]
    dtype = compute_dtype(q.dtype)
    scale = D**-0.5 if scale is None else scale
    grouped = q.to(dtype).reshape(B, Tq, Hkv, H // Hkv, D)
    scores = torch.einsum("bihgd,bjhd->bhgij", grouped, k.to(dtype)) * scale
    hidden = ~attention_mask(Tq, Tk, causal, window, q.device)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores.detach(), dim=-1).reshape(B, H, Tq)
    # softmax of a row of -inf is NaN, and so is its gradient: give such a row finite scores, then no weight at all.
    weights = softmax(scores.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)).masked_fill(hidden, 0.0)
    out = torch.einsum("bhgij,bjhd->bihgd", weights, v.to(dtype)).reshape(B, Tq, H, D)
    return out.to(q.dtype), lse


def attention_mask(Tq: int, Tk: int, causal: bool, window: int | None, device: torch.device | None = None) -> Tensor:
    """Return a (Tq, Tk) mask, True where query i sees key j. With `causal`, the last query sees every key."""
    newest = torch.arange(Tq, device=device)[:, None] + (Tk - Tq)
    keys = torch.arange(Tk, device=device)
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    if causal or window is not None:
        mask = mask & (keys <= newest)
    if window is not None:
        mask = mask & (keys >= newest - window)
    return mask


@torch.compiler.disable(reason="attention: lengths needs fullgraph=False on the torch backend")
def _reference_by_length(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= k.size(1):
            raise ValueError(f"attention: lengths must be from 0 to {k.size(1)}, got {length}")
        keys, values = k[b : b + 1, :length], v[b : b + 1, :length]
        out[b] = reference_attention_forward(q[b : b + 1], keys, values, **options)[0][0]
    return out


# --- native ---


def native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    lengths: Tensor | None,
) -> Tensor:
    """Run the kernel."""
    scale = q.size(-1) ** -0.5 if scale is None else scale
    window = -1 if window is None else window
    return torch.ops.nanochat_native.attention_forward(q, k, v, causal or window >= 0, window, scale, lengths)[0]


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=compute_dtype(q.dtype))
    return q.new_empty(q.shape), lse


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *mask = inputs
    ctx.mask = mask[:3]  # lengths has no gradient
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _gradient(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    if mode := modes.beyond_first_derivative(dout):
        q, k, v, _, _ = ctx.saved_tensors
        causal, window, scale = ctx.mask
        backends.warn_reference_runs("attention", q.device.type, modes.unsupported(mode))
        with torch.enable_grad():
            inputs = [x.view_as(x) for x in (q, k, v)]  # one may have been computed from another
            out = reference_attention(*inputs, causal=causal, window=None if window < 0 else window, scale=scale)
        needed = [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad(out, needed, dout, create_graph=torch.is_grad_enabled()))
        dq, dk, dv = (next(found) if x.requires_grad else None for x in inputs)
    else:
        dq, dk, dv = torch.ops.nanochat_native.attention_backward(dout, *ctx.saved_tensors, *ctx.mask)
    return dq, dk, dv, None, None, None, None


schema.register("attention_forward", _forward_fake, _gradient, _setup_context)
schema.register("attention_backward", _backward_fake)
