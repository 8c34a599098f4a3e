"""The weights of attention, for looking into a model: training and generation never store them."""

from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from nanochat_native.model.gpt import GPT, Attention
from nanochat_native.ops.attention import attention_mask


@torch.no_grad()
def attention_weights(model: GPT, ids: Tensor) -> Tensor:
    """Return the softmax weights of every layer, (n_layer, B, H, T, T) in float32.

    Entry [l, b, h, i, j] is how much head h of layer l takes of the value of token j for token i. Each row sums to 1.
    A key that the layer's window or the causal mask hides has weight 0.

    Args:
        ids: (B, T) int64.

    Raises ValueError for ids of another shape, or more tokens than the model has positions for.
    """
    if ids.ndim != 2 or ids.numel() == 0 or ids.size(1) > model.max_positions:
        raise ValueError(
            f"ids must have shape (B, T), B >= 1 and T from 1 to {model.max_positions}, got {tuple(ids.shape)}"
        )
    layers = []

    def record(attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        *projected, _ = inputs  # the last one is the documents
        q, k, _ = cast(Attention, attention).project(*projected)
        layers.append(_weights(q, k, cast(Attention, attention).window))

    hooks = [block.attn.register_forward_pre_hook(record) for block in model.blocks]
    try:
        model.hidden_states(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(layers)


def _weights(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """Return softmax(q k^T / sqrt(D)), (B, H, T, T), for q (B, T, H, D) and k (B, T, Hkv, D)."""
    B, T, H, D = q.shape
    grouped = q.float().reshape(B, T, k.size(2), -1, D)  # consecutive query heads share a key head
    scores = torch.einsum("bihgd,bjhd->bhgij", grouped, k.float()).reshape(B, H, T, T) * D**-0.5
    hidden = ~attention_mask(T, T, True, window, q.device)
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
