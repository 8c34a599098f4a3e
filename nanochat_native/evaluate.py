"""Bits per byte, and `python -m nanochat_native.evaluate`."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from nanochat_native import data, run_folder
from nanochat_native.config import STDLIB
from nanochat_native.loading import autocast, exit_code, load_model, pick_device
from nanochat_native.model import GPT


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
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Measures the model on (inputs, targets) int64 (B, T) on its device; targets of -1 count nothing.

    token_bytes: (V,) integers, the bytes that each token stands for, 0 for special tokens. Bits per byte, nanochat's
    definition: the nats of all targets that stand for bytes, over ln 2 times their bytes. It does not depend on the
    tokenizer, as the loss does. add_up: sums a float64 tensor over ranks that each measure a part of the batches.

    Raises ValueError when token_bytes does not fit the model or no target stands for bytes.
    """
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
    if add_up is not None:
        sums = add_up(torch.stack([all_nats, byte_nats, targets_seen.double(), bytes_seen.double()]))
        all_nats, byte_nats, targets_seen, bytes_seen = sums.unbind()
    if bytes_seen == 0:
        raise ValueError("no target stands for bytes: there is nothing to evaluate")
    return Evaluation(
        bpb=byte_nats.item() / (math.log(2) * bytes_seen.item()),
        loss=all_nats.item() / targets_seen.item(),
        targets=int(targets_seen),
        bytes=int(bytes_seen),
    )


def evaluate_bpb(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: np.ndarray | Tensor) -> float:
    """Bits per byte alone, of `evaluate`."""
    return evaluate(model, batches, token_bytes).bpb


@dataclass
class Options:
    """Measure a trained model in bits per byte."""

    checkpoint: Path
    """Run folder, as `python -m nanochat_native.train` leaves it."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    data: str | None = None
    """Text to measure on, as train's --data takes it, or `stdlib`; default: what the run was trained on."""
    split: Literal["val", "train"] = "val"
    """Which part of the data: held out, or trained on."""
    max_tokens: int | None = None
    """Tokens to measure on, from the beginning; default: all."""
    device_batch_size: int = 8
    """Sequences that go through the model at once."""
    device: Literal["cpu", "cuda"] | None = None
    """Default: the GPU where there is one."""
    json: bool = False
    """Print one line of JSON."""


def measure(options: Options) -> Evaluation:
    """Loads the run, prepares the data with its tokenizer, evaluates. Raises what load_model and data.prepare do."""
    if options.device_batch_size < 1 or (options.max_tokens is not None and options.max_tokens < 1):
        given = f"--device-batch-size is {options.device_batch_size}, --max-tokens {options.max_tokens}"
        raise ValueError(f"{given}; both take a number from 1")
    device = pick_device(options.device)
    model, tokenizer, _ = load_model(
        options.checkpoint, options.step, device, warn=lambda message: print(message, file=sys.stderr)
    )
    trained = run_folder.load_config(options.checkpoint)
    assert trained.cache_dir is not None, "a run's config.json holds every value"
    source = trained.data if options.data is None else options.data
    corpus = data.prepare(
        None if source == STDLIB else source,
        vocab_size=tokenizer.vocab_size,
        cache_dir=trained.cache_dir,
        tokenizer=tokenizer,
    )
    batches = data.iterate_val(
        corpus.val if options.split == "val" else corpus.train,
        batch_rows=options.device_batch_size,
        sequence_len=model.config.sequence_len,
        max_tokens=options.max_tokens,
        device=device,
    )
    with autocast(device):
        return evaluate(model, batches, tokenizer.token_bytes)


def run(options: Options) -> None:
    """Prints what `measure` finds."""
    result = measure(options)
    if options.json:
        print(json.dumps(result._asdict()))
    else:
        size = f"{result.targets:,} tokens, {result.bytes:,} bytes"
        print(f"{result.bpb:.4f} bits per byte | {result.loss:.4f} nats a token | {size}")


def main(args: Sequence[str] | None = None) -> int:
    """Evaluates as `args` say, sys.argv's by default. Returns the exit code."""
    options = tyro.cli(Options, prog="python -m nanochat_native.evaluate", args=args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
