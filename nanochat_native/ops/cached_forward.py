"""The whole transformer on a key-value cache, for generation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.attention import attention, reference_attention
from nanochat_native.ops.dtypes import compute_dtype

EPS = torch.finfo(torch.float32).eps  # added to the mean square in every RMSNorm


def cached_forward_(
    tokens: Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    *,
    wte: Tensor,
    blocks: Sequence[Tensor],
    lm_head: Tensor,
    windows: Sequence[int | None],
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    softcap: float,
    with_logits: bool = True,
) -> Tensor:
    """Run the transformer of nanochat_native.model on T further tokens of each of B sequences, with a cache.

    Args:
        tokens: (B, T) int64, T from 1. Token (b, t) has position starts[b] + t of slot slots[b]. Its key and value are
            stored there, and it sees the positions of its slot up to its own.
        slots, starts: B numbers each. The slots are distinct, and each is filled before starts[b].
        wte, lm_head: (V, C).
        blocks: Six matrices per layer, as linear layers have them: of q (C, C), k and v (Hkv D, C), attention's output
            (C, C), and the MLP (F, C) and (C, F).
        windows: One per layer, as attention's.
        cos, sin: (positions, D) and (positions, D / 2), of the rotary angles.
        cache: (layers, slots, capacity, 2 Hkv, D), keys and then values. Updated.
        softcap: Logits are softcap * tanh(x / softcap); 0 for no bound.
        with_logits: False if only the cache is needed.

    All tensors but tokens have wte's type and device, and are contiguous; cos and sin may be of a wider type.

    Returns:
        The logits of each sequence's last token: (B, V), float32, or float64 for float64; (0, V) if not with_logits.

    Raises:
        ValueError, TypeError: The arguments do not match.
        RuntimeError: A derivative is asked for.

    For float32 on the CPU this is one call of one kernel: a token's logits have the same bits whatever it is batched
    with, however its prompt was divided, and for every number of threads. Otherwise it is composed of torch's products
    and `attention`.
    """
    modes.refuse("cached_forward_", tokens, wte, blocks, lm_head, cos, sin, cache)
    run: Callable[..., Tensor]
    if tokens.device.type == "cpu" and wte.dtype == torch.float32 and backends.backend() == "native":
        backends.require_native()
        run = native_cached_forward_
    else:
        _check(tokens, slots, starts, wte, cache)
        run = partial(reference_cached_forward_, attention=attention)
    return run(
        tokens,
        slots,
        starts,
        wte=wte,
        blocks=blocks,
        lm_head=lm_head,
        windows=windows,
        cos=cos,
        sin=sin,
        cache=cache,
        softcap=softcap,
        with_logits=with_logits,
    )


def _check(tokens: Tensor, slots: Sequence[int], starts: Sequence[int], wte: Tensor, cache: Tensor) -> None:
    """Check what torch would not find. The native operator checks this and the rest by itself."""
    op = "cached_forward_"
    if tokens.dim() != 2 or tokens.size(1) == 0 or cache.dim() != 5:
        raise ValueError(
            f"{op}: tokens and cache must have shapes (B, T), T >= 1, and (layers, slots, capacity, 2 Hkv, D), "
            f"got {tuple(tokens.shape)} and {tuple(cache.shape)}"
        )
    checks.check_dtype(op, "tokens", tokens, (torch.int64,))
    checks.check_alike(op, "wte", wte, cache=cache)
    count, capacity, (B, T) = cache.size(1), cache.size(2), tokens.shape
    if len(slots) != B or len(starts) != B or len(set(slots)) != len(slots):
        raise ValueError(
            f"{op}: slots and starts must hold {B} numbers each, the slots distinct, "
            f"got slots {list(slots)}, starts {list(starts)}"
        )
    for slot, start in zip(slots, starts, strict=True):
        if not (0 <= slot < count and 0 <= start <= capacity - T):
            raise ValueError(
                f"{op}: tokens must fit into {count} slots of {capacity} positions, "
                f"got {T} tokens from position {start} of slot {slot}"
            )


def to_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Return whole numbers, in lists of any depth, as an int64 tensor, without a wait for a GPU."""
    tensor = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


# --- reference ---


@torch.no_grad()
def reference_cached_forward_(
    tokens: Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    *,
    wte: Tensor,
    blocks: Sequence[Tensor],
    lm_head: Tensor,
    windows: Sequence[int | None],
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    softcap: float,
    with_logits: bool = True,
    attention: Callable[..., Tensor] = reference_attention,
) -> Tensor:
    """Do what `cached_forward_` does, with torch's products and the given `attention`."""
    T, device, (Hkv2, D) = tokens.size(1), tokens.device, cache.shape[3:]
    slot, first = to_device([list(slots), list(starts)], device)
    at = first[:, None] + torch.arange(T, device=device)
    cos, sin, half = cos[at][:, :, None], sin[at][:, :, None], D // 2

    def norm(x: Tensor) -> Tensor:
        wide = x.to(compute_dtype(x.dtype))
        return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(wte.dtype)

    def rotated_norm(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, D))
        swapped = torch.cat((x[..., half:] * sin, x[..., :half] * -sin), dim=-1)
        return norm(x * cos + swapped)

    x = norm(F.embedding(tokens, wte))
    for layer, window in enumerate(windows):
        q, k, v, out, fc, proj = blocks[6 * layer : 6 * layer + 6]
        h = norm(x)
        cache[layer, slot[:, None], at] = torch.cat((rotated_norm(h @ k.T), (h @ v.T).unflatten(-1, (-1, D))), dim=2)
        keys, values = cache[layer].index_select(0, slot).split(Hkv2 // 2, dim=2)
        attended = attention(rotated_norm(h @ q.T), keys, values, window=window, lengths=first + T)
        x = x + attended.flatten(-2) @ out.T
        x = x + (norm(x) @ fc.T).relu().square() @ proj.T
    if not with_logits:
        return wte.new_empty((0, wte.size(0)))
    logits = norm(x[:, -1]) @ lm_head.T
    logits = logits.to(compute_dtype(logits.dtype))
    return torch.tanh(logits / softcap) * softcap if softcap else logits


# --- native ---


@torch.no_grad()
def native_cached_forward_(
    tokens: Tensor, slots: Sequence[int], starts: Sequence[int], windows: Sequence[int | None], **others: Any
) -> Tensor:
    """Run the kernel."""
    limits = [-1 if window is None else window for window in windows]
    return torch.ops.nanochat_native.cached_forward_(tokens, slots, starts, windows=limits, **others)


def _fake(
    tokens: Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    wte: Tensor,
    blocks: Sequence[Tensor],
    lm_head: Tensor,
    windows: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    softcap: float,
    with_logits: bool,
) -> Tensor:
    return wte.new_empty((tokens.size(0) if with_logits else 0, wte.size(0)))


schema.register("cached_forward_", _fake)
