"""The model with a KV cache, for generation."""

import functools

import torch
import torch.nn as nn
from torch import Tensor

from nanochat_native import ops
from nanochat_native.model.gpt import GPT, SOFTCAP
from nanochat_native.ops.cached_forward import to_device


class Decoder:
    """The model for generation, without gradients: each sequence has a slot of a preallocated cache.

    The weights are the model's own if they have its compute_dtype, otherwise copies. See ops.cached_forward_.

    On the native CPU backend, in float32, the logits of a token have the same bits whatever else is decoded with it and
    however its prompt was split. Elsewhere they may differ by rounding.

    Attributes:
        cache: (n_layer, slots, capacity, 2 Hkv, D): keys, followed by values, of each position; zeros at first.
    """

    def __init__(self, model: GPT, slots: int, capacity: int) -> None:
        config, device, dtype = model.config, model.wte.weight.device, model.compute_dtype
        self.device = device

        def weights(*linears: nn.Linear) -> list[Tensor]:
            return [linear.weight.detach().to(dtype) for linear in linears]

        blocks = []
        for block in model.blocks:
            a, mlp = block.attn, block.mlp
            blocks += weights(a.c_q, a.c_k, a.c_v, a.c_proj, mlp.c_fc, mlp.c_proj)
        (lm_head,) = weights(model.lm_head)
        shape = (config.n_layer, slots, capacity, 2 * config.n_kv_head, config.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)
        self._forward = functools.partial(
            ops.cached_forward_,
            wte=model.wte.weight.detach().to(dtype),
            blocks=blocks,
            lm_head=lm_head,
            windows=config.windows,
            cos=model.cos[0, :, 0],  # float32 even if the weights are bfloat16, as in training
            sin=model.sin[0, :, 0],
            cache=self.cache,
            softcap=SOFTCAP,
        )

    def prefill(self, slot: int, tokens: list[int], start: int) -> None:
        """Fill the positions from `start` of a slot with `tokens`; the earlier positions must be filled."""
        self._forward(to_device([tokens], self.device), [slot], [start], with_logits=False)

    def decode(self, slots: list[int], tokens: list[int], positions: list[int]) -> Tensor:
        """Decode one token per slot, each at its position; return logits (len(slots), V), float32 or better."""
        return self._forward(to_device(tokens, self.device)[:, None], slots, positions)
