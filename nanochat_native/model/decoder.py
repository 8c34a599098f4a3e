"""The model on a KV cache, for generation."""

import functools

import torch
import torch.nn as nn
from torch import Tensor

from nanochat_native import ops
from nanochat_native.model.gpt import GPT, SOFTCAP


class Decoder:
    """The model for generation: sequences in the slots of a preallocated cache, without gradients; see
    ops.cached_forward_.

    cache: (n_layer, slots, capacity, 2 Hkv, D), keys and then values of each position, zeros at first; a sequence lives
    in one slot. The weights are the model's own where they have its compute_dtype, else copies.

    float32 on the CPU, native: the logits of a token have the same bits whatever is decoded beside it, and however its
    prompt was cut. Elsewhere they may differ by rounding.
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
            cos=model.cos[0, :, 0],  # not in bfloat16: training has them in float32 too
            sin=model.sin[0, :, 0],
            cache=self.cache,
            softcap=SOFTCAP,
        )

    def prefill(self, slot: int, tokens: list[int], start: int) -> None:
        """Puts `tokens` at the positions from `start` of a slot, whose earlier positions are filled."""
        self._forward(torch.tensor([tokens], device=self.device), [slot], [start], with_logits=False)

    def decode(self, slots: list[int], tokens: list[int], positions: list[int]) -> Tensor:
        """One token a slot, each at its position -> logits (len(slots), V), float32 or better."""
        return self._forward(torch.tensor(tokens, device=self.device)[:, None], slots, positions)
