"""Which weights of the model are quantized for generation, and how.

The linear layers of the blocks and lm_head are: a step of generation reads all of them. The embeddings and the gates
are not, because a step reads few of their rows.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from nanochat_native.model.gpt import GPT
from nanochat_native.ops.quantization import dequantize_rows, quantize_rows

Quantization = Literal["int8"]


def check_quantization(quantize: str | None, device: torch.device) -> None:
    """Raise ValueError unless quantize is None, or a quantization on a CPU."""
    names = get_args(Quantization)
    if quantize not in (None, *names):
        raise ValueError(f"quantize must be None or {' or '.join(names)}, got {quantize!r}")
    if quantize is not None and device.type != "cpu":
        raise ValueError(f"quantize {quantize} is for the kernel of the CPU; on {device.type} it must be None")


def matrices(model: GPT) -> list[Tensor]:
    """Return the weights of the six linear layers of each block, in the order of ops.cached_forward_, and lm_head's."""
    found = []
    for block in model.blocks:
        a, mlp = block.attn, block.mlp
        found += [layer.weight for layer in (a.c_q, a.c_k, a.c_v, a.c_proj, mlp.c_fc, mlp.c_proj)]
    return [*found, model.lm_head.weight]


@torch.no_grad()
def round_weights_(model: GPT, quantize: Quantization) -> None:
    """Round the model's weights as quantization does, in place, in their own type.

    The model then computes what the quantized decoder computes, but for rounding, so its loss is that of the quantized
    model.

    Raises ValueError for weights that are not finite, and as check_quantization.
    """
    check_quantization(quantize, model.wte.weight.device)
    for weight in matrices(model):
        weight.copy_(dequantize_rows(*quantize_rows(weight)))
