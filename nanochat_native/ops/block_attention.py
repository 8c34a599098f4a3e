"""Attention on a GPU without a kernel of ours: on CUDA by torch's scaled_dot_product_attention, on MPS by products.

torch has kernels that keep no matrix of scores for most types and GPUs, but none with a window, and none for some types
and head sizes. The queries are therefore divided into blocks of rows. A block attends to the keys that one of its rows
sees, with a mask of that size. Where torch itself would keep the scores of a block, the backward pass computes them
again.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanochat_native.ops.softmax import softmax

BLOCK_ROWS = 256  # queries of a block: with a window, a block computes at most this many keys too many in a row
BLOCK_SCORES = 1 << 26  # scores of a block, 256 MiB in float32


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return what `attention` returns for the same arguments. Differentiable once; with torch's slow path, repeatedly.

    No tensor has more elements than BLOCK_SCORES, or than the scores of one query row if these are more, except for
    tensors of the size of q, k and v with H heads.
    """
    (B, Tq, H, D), Tk = q.shape, k.size(1)
    if q.numel() == 0 or Tk == 0:
        return (q.masked_fill(torch.ones_like(q, dtype=torch.bool), 0) + k.sum() + v.sum()).contiguous()  # of nothing
    scale = D**-0.5 if scale is None else scale
    causal = causal or window is not None
    if window is not None and window >= Tk - 1:  # it hides no key that causality leaves
        window = None
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.transpose(1, 2), _for_query_heads(k, H), _for_query_heads(v, H)
        if lengths is None and window is None and (Tq == Tk or not causal) and saves_no_scores(q, k, v, causal):
            return _attend(q, k, v, is_causal=causal, scale=scale).transpose(1, 2).contiguous()
        keys = Tk if window is None or lengths is not None else min(Tk, window + BLOCK_ROWS)
        rows = max(1, min(BLOCK_ROWS, Tq, BLOCK_SCORES // (B * H * keys)))
        ends = None if lengths is None else lengths.clamp(0, Tk)
        blocks = [
            _block(q, k, v, first, min(first + rows, Tq), causal, window, scale, ends) for first in range(0, Tq, rows)
        ]
        return torch.cat(blocks, dim=2).transpose(1, 2).contiguous()


def saves_no_scores(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mask: Tensor | None = None) -> bool:
    """Return whether torch has a kernel for q, k and v (B, H, T, D) that keeps no scores for the backward pass."""
    if q.device.type != "cuda":
        return False
    arguments = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, is_causal, False)
    return bool(torch.backends.cuda.can_use_efficient_attention(arguments))


def _for_query_heads(x: Tensor, heads: int) -> Tensor:
    """Return keys or values (B, T, Hkv, D) as (B, H, T, D), each head repeated for the query heads of its group."""
    x = x.transpose(1, 2)
    if x.size(1) == heads:
        return x
    return x[:, :, None].expand(-1, -1, heads // x.size(1), -1, -1).flatten(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool, scale: float) -> Tensor:
    if q.device.type == "mps" and mask is not None:
        # torch's own kernel for MPS has misread masks that are broadcast (pytorch's pull request 184180).
        scores = (q.float() @ k.float().mT * scale).masked_fill(~mask, -torch.inf)
        return (softmax(scores) @ v.float()).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    last: int,
    causal: bool,
    window: int | None,
    scale: float,
    ends: Tensor | None,
) -> Tensor:
    """Return the attention of the query rows from `first` to below `last`, for q, k and v (B, H, T, D).

    Args:
        ends: (B,), the number of keys of each sequence; None for all keys.
    """
    Tq, Tk = q.size(2), k.size(2)
    lowest, highest = 0, Tk
    if ends is None and causal:
        highest = min(max(last + Tk - Tq, 1), Tk)
        if window is not None:
            lowest = min(max(0, first + Tk - Tq - window), highest - 1)
    q, k, v = q[:, :, first:last], k[:, :, lowest:highest], v[:, :, lowest:highest]

    keys = torch.arange(lowest, highest, device=q.device)
    count = torch.full((1,), Tk, device=q.device) if ends is None else ends
    own = torch.arange(first, last, device=q.device) - Tq + count[:, None]  # the last key that each query sees
    newest = own[..., None]
    mask = (keys < count[:, None, None]).expand(-1, last - first, -1)
    if causal:
        mask = mask & (keys <= newest)
    if window is not None:
        mask = mask & (keys >= newest - window)
    mask = mask[:, None]  # (1 or B, 1, rows, keys), not expanded: torch keeps it for the backward pass
    sees_none = ~mask.any(-1, keepdim=True)
    mask = mask | sees_none  # softmax of nothing is NaN: such a row sees every key here

    attend = partial(_attend, is_causal=False, scale=scale)
    if torch.is_grad_enabled() and not saves_no_scores(q, k, v, False, mask):
        out = checkpoint(attend, q, k, v, mask, use_reentrant=False, preserve_rng_state=False)
    else:
        out = attend(q, k, v, mask)
    return out.masked_fill(sees_none, 0)
