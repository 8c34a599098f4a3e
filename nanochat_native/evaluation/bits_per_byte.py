"""Bits per byte, nanochat's measure of a language model that no tokenizer changes."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat_native.model.gpt import GPT
from nanochat_native.runtime.distributed import World


class Evaluation(NamedTuple):
    """bpb: bits per byte. loss: mean nats a target. targets, bytes: how many the two are taken over."""

    bpb: float
    loss: float
    targets: int
    bytes: int


@torch.inference_mode()
def evaluate(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: np.ndarray | Tensor,
    world: World | None = None,
) -> Evaluation:
    """Measures the model on (inputs, targets) int64 (B, T) on its device; targets of -1 count nothing.

    token_bytes: (V,) integers, the bytes that each token stands for, 0 for special tokens. Bits per byte, nanochat's
    definition: the nats of all targets that stand for bytes, over ln 2 times their bytes. It does not depend on the
    tokenizer, as the loss does. world: ranks that each measure a part of the batches.

    Raises ValueError when token_bytes does not fit the model or no target stands for bytes; on many ranks RankError on
    all of them, whatever one raises.
    """
    world = world or World()
    sums = world.all_reduce_sum_(world.run_collectively(lambda: _sums(model, batches, token_bytes), Exception))
    all_nats, byte_nats, targets, targets_bytes = sums.tolist()
    if targets_bytes == 0:
        raise ValueError("no target stands for bytes: there is nothing to evaluate")
    return Evaluation(
        bpb=byte_nats / (math.log(2) * targets_bytes),
        loss=all_nats / targets,
        targets=int(targets),
        bytes=int(targets_bytes),
    )


def _sums(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: np.ndarray | Tensor) -> Tensor:
    """(4,) float64: nats of all targets, nats of those that stand for bytes, targets, their bytes."""
    if tuple(token_bytes.shape) != (model.config.vocab_size,):
        raise ValueError(f"token_bytes has shape {tuple(token_bytes.shape)}; it takes ({model.config.vocab_size},)")
    device = model.wte.weight.device
    lengths = torch.as_tensor(token_bytes, dtype=torch.int64, device=device)
    all_nats = torch.zeros((), dtype=torch.float64, device=device)
    byte_nats = torch.zeros_like(all_nats)
    targets_seen = torch.zeros((), dtype=torch.int64, device=device)
    bytes_seen = torch.zeros_like(targets_seen)
    for inputs, targets in batches:
        nats = model(inputs, targets, reduction="none")
        counted = targets >= 0
        length = lengths[targets.clamp(min=0)] * counted
        all_nats += nats.sum(dtype=torch.float64)
        byte_nats += (nats * (length > 0)).sum(dtype=torch.float64)
        targets_seen += counted.sum()
        bytes_seen += length.sum()
    return torch.stack([all_nats, byte_nats, targets_seen.double(), bytes_seen.double()])


def evaluate_bpb(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: np.ndarray | Tensor) -> float:
    """Bits per byte alone, of `evaluate`."""
    return evaluate(model, batches, token_bytes).bpb
