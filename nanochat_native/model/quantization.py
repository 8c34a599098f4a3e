"""Which weights of the model are quantized for generation, and how.

The linear layers of the blocks and lm_head are quantized, because a step of generation reads all of them. The
embeddings and the gates are not, because a step reads few of their rows.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from nanochat_native.model.gpt import GPT
from nanochat_native.ops.quantization import dequantize_rows, quantize_rows

Quantization = Literal["int8"]


def check_quantization(quantize: str | None, device: torch.device) -> None:
    """Raise ValueError unless quantize is None, or a quantization on a CPU."""
    _check_name(quantize)
    if quantize is not None and device.type != "cpu":
        raise ValueError(f"quantize {quantize} is for the kernel of the CPU and needs device cpu, got {device.type}")


def _check_name(quantize: str | None) -> None:
    names = get_args(Quantization)
    if quantize not in (None, *names):
        raise ValueError(f"quantize must be None or {' or '.join(names)}, got {quantize!r}")


def matrices(model: GPT) -> list[Tensor]:
    """Return the weights of the six linear layers of each block, in the order of ops.cached_forward_, and lm_head's."""
    found = []
    for block in model.blocks:
        a, mlp = block.attn, block.mlp
        found += [layer.weight for layer in (a.c_q, a.c_k, a.c_v, a.c_proj, mlp.c_fc, mlp.c_proj)]
    return [*found, model.lm_head.weight]


def check_finite(model: GPT) -> None:
    """Raise ValueError with the name of a weight of `matrices` that is not finite."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for weight in matrices(model):
        if not weight.isfinite().all():
            raise ValueError(f"{names[id(weight)]}: weights must be finite to be quantized, got infinities or NaN")


@torch.no_grad()
def round_weights_(model: GPT, quantize: Quantization) -> None:
    """Round the model's weights as quantization does, in place, in their own type.

    The model then computes what the quantized decoder computes, but for rounding, so its loss is that of the quantized
    model. The model may be on any device.

    Raises ValueError for another quantization, and as check_finite does.
    """
    _check_name(quantize)
    check_finite(model)
    for weight in matrices(model):
        weight.copy_(dequantize_rows(*quantize_rows(weight)))
