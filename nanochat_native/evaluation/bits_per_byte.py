"""Bits per byte: nanochat's measure of a language model, comparable between tokenizers."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat_native.model.documents import Documents
from nanochat_native.model.gpt import GPT
from nanochat_native.ops.dtypes import widest_dtype
from nanochat_native.runtime.distributed import World


class Evaluation(NamedTuple):
    """Bits per byte and loss of a model on a text.

    Attributes:
        bpb: Bits per byte.
        loss: Mean nats per target.
        targets: Number of targets.
        bytes: Number of bytes that the targets stand for.
    """

    bpb: float
    loss: float
    targets: int
    bytes: int


@torch.inference_mode()
def measure_text(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: np.ndarray | Tensor,
    world: World | None = None,
    documents_of: Callable[[Tensor], Documents | None] | None = None,
) -> Evaluation:
    """Measure bits per byte and loss of the model on a text.

    Bits per byte, as nanochat defines it, is the nats of all targets that stand for bytes, divided by ln 2 times the
    number of those bytes. Unlike the loss, it can be compared between tokenizers.

    Args:
        batches: (inputs, targets), int64 (B, T) on the model's device; targets of -1 are ignored.
        token_bytes: (V,) integers: the number of bytes that each token stands for, 0 for special tokens.
        world: Ranks that each measure a part of the batches.
        documents_of: Returns the documents of inputs that the model is to read apart; default: a row is one text.

    Raises ValueError if token_bytes does not fit the model or no target stands for bytes. On many ranks any error of a
    rank is a RankError on all of them.
    """
    world = world or World()
    own = world.run_collectively(lambda: _sums(model, batches, token_bytes, documents_of), Exception)
    sums = world.all_reduce_sum_(own)
    all_nats, byte_nats, targets, targets_bytes = sums.tolist()
    if targets_bytes == 0:
        raise ValueError("no target stands for bytes: there is nothing to measure")
    return Evaluation(
        bpb=byte_nats / (math.log(2) * targets_bytes),
        loss=all_nats / targets,
        targets=int(targets),
        bytes=int(targets_bytes),
    )


def _sums(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: np.ndarray | Tensor,
    documents_of: Callable[[Tensor], Documents | None] | None,
) -> Tensor:
    """Return (4,) float64: nats of all targets, nats of those that stand for bytes, number of targets, their bytes."""
    if tuple(token_bytes.shape) != (model.config.vocab_size,):
        raise ValueError(f"token_bytes must have shape ({model.config.vocab_size},), got {tuple(token_bytes.shape)}")
    device = model.wte.weight.device
    lengths = torch.as_tensor(token_bytes, dtype=torch.int64, device=device)
    wide = widest_dtype(device)
    all_nats = torch.zeros((), dtype=wide, device=device)
    byte_nats = torch.zeros_like(all_nats)
    targets_seen = torch.zeros((), dtype=torch.int64, device=device)
    bytes_seen = torch.zeros_like(targets_seen)
    for inputs, targets in batches:
        documents = None if documents_of is None else documents_of(inputs)
        nats = model(inputs, targets, reduction="none", documents=documents)
        counted = targets >= 0
        length = lengths[targets.clamp(min=0)] * counted
        all_nats += nats.sum(dtype=wide)
        byte_nats += (nats * (length > 0)).sum(dtype=wide)
        targets_seen += counted.sum()
        bytes_seen += length.sum()
    sums = [all_nats, byte_nats, targets_seen, bytes_seen]
    if device.type == "mps":  # which has no float64
        sums = [part.cpu() for part in sums]
    return torch.stack([part.double() for part in sums])
