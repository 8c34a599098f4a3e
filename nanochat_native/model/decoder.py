"""The model with a KV cache, for generation."""

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from nanochat_native import ops
from nanochat_native.model import quantization
from nanochat_native.model.gpt import GPT, SOFTCAP
from nanochat_native.model.quantization import Quantization, check_finite, check_quantization
from nanochat_native.ops.cached_forward import to_device
from nanochat_native.ops.quantization import quantize_rows
from nanochat_native.ops.weight_copies import low_precision


class Decoder:
    """The model for generation, without gradients: each sequence has a slot of a preallocated cache.

    Args:
        slots: Number of sequences.
        capacity: Number of positions of a sequence.
        quantize: "int8" keeps the matrices in int8, on a CPU; see model/quantization.py. None keeps them in the
            model's compute_dtype.

    The weights are the model's own if they have its compute_dtype, otherwise copies: of a linear layer in training,
    those that the optimizer keeps (ops/weight_copies.py). The lambdas and the gate of smear are its own if
    they are float32. See ops.cached_forward_.

    On the native CPU backend, in float32 and bfloat16, quantized or not, the logits of a token have the same bits
    whatever else is computed with it and however its prompt was split. Elsewhere they may differ by rounding.

    Attributes:
        cache: (n_layer, slots, capacity, 2 Hkv, D): keys, followed by values, of each position; zeros at first. It has
            the model's compute_dtype.

    Raises ValueError as check_quantization does, and as check_finite does if quantize is not None.
    """

    def __init__(self, model: GPT, slots: int, capacity: int, quantize: Quantization | None = None) -> None:
        config, device, dtype = model.config, model.wte.weight.device, model.compute_dtype
        self.device = device
        wide = torch.promote_types(dtype, torch.float32)
        self._smear = config.smear
        self._tokens: dict[int, dict[int, int]] = defaultdict(dict)  # of each slot by position, for smear

        check_quantization(quantize, device)
        *blocks, lm_head = quantization.matrices(model)
        scales = list[Tensor]()
        if quantize is None:
            kept = [low_precision(weight, dtype).detach() for weight in (*blocks, lm_head)]
            kept[-1] = kept[-1][: config.vocab_size]
        else:
            check_finite(model)
            pairs = [quantize_rows(weight) for weight in (*blocks, lm_head[: config.vocab_size])]
            kept, scales = [codes for codes, _ in pairs], [own for _, own in pairs]
        shape = (config.n_layer, slots, capacity, 2 * config.n_kv_head, config.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)
        self._forward: Callable[..., Tensor] = functools.partial(
            ops.cached_forward_,
            wte=_weight(model.wte, dtype),
            blocks=kept[:-1],
            lm_head=kept[-1],
            scales=scales,
            windows=config.windows,
            cos=model.cos[0, :, 0].to(wide),  # float32 even if the weights are bfloat16, as in training
            sin=model.sin[0, :, 0].to(wide),
            cache=self.cache,
            softcap=SOFTCAP,
            qk_scale=config.qk_scale,
            **_parts(model, dtype),
        )

    def prefill(self, slot: int, tokens: list[int], start: int) -> None:
        """Fill the positions from `start` of a slot with `tokens`; the earlier positions must be filled."""
        self.extend([slot], [tokens], [start], with_logits=False)

    def decode(self, slots: list[int], tokens: list[int], positions: list[int]) -> Tensor:
        """Decode one token per slot, each at its position; return logits (len(slots), V), float32 or better."""
        return self.extend(slots, [[token] for token in tokens], positions)

    def extend(
        self, slots: list[int], tokens: list[list[int]], starts: list[int], *, with_logits: bool = True
    ) -> Tensor:
        """Fill positions of several slots in one pass: tokens[i], one or more, from starts[i] on in slots[i].

        Returns the logits of the last token of each: (len(slots), V), float32 or better; (0, V) if not with_logits.
        """
        lengths = [len(row) for row in tokens]
        if len(set(lengths)) == 1:
            places: dict[str, Any] = {"tokens": to_device(tokens, self.device)}
        else:
            flat = [token for row in tokens for token in row]
            places = {"tokens": to_device(flat, self.device), "lengths": lengths}
        places |= {"slots": slots, "starts": starts, "with_logits": with_logits}
        if not self._smear:
            return self._forward(**places)
        previous = [self._tokens[slot].get(start - 1, -1) for slot, start in zip(slots, starts, strict=True)]
        logits = self._forward(**places, previous=previous)
        for slot, row, start in zip(slots, tokens, starts, strict=True):
            self._tokens[slot].update(enumerate(row, start))
        return logits


def _weight(module: nn.Linear | nn.Embedding, dtype: torch.dtype) -> Tensor:
    if isinstance(module, nn.Linear):
        return low_precision(module.weight, dtype).detach()
    return module.weight.detach().to(dtype)


def _parts(model: GPT, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of cached_forward_ for the parts that nanochat's first architecture lacks."""
    config, parts = model.config, dict[str, Any]()
    wide = torch.promote_types(dtype, torch.float32)
    if config.value_embeddings:
        parts |= {"value_gates": [None] * config.n_layer, "value_tables": [None] * config.n_layer}
        for layer in filter(config.has_value_embedding, range(config.n_layer)):
            parts["value_gates"][layer] = _weight(model.blocks[layer].attn.ve_gate, dtype)
            parts["value_tables"][layer] = _weight(cast(nn.Embedding, model.value_embeds[str(layer)]), dtype)
    if config.residual_scalars:
        parts |= {"resid_lambdas": model.resid_lambdas, "x0_lambdas": model.x0_lambdas}
    if config.smear:
        parts |= {"smear_gate": model.smear_gate.weight, "smear_lambda": model.smear_lambda}
    if config.backout:
        parts["backout_lambda"] = model.backout_lambda
    return {name: part.detach().to(wide) if isinstance(part, Tensor) else part for name, part in parts.items()}
