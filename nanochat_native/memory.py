"""python -m nanochat_native.memory: what a run holds on each rank, bytes by part.

Weights, gradients and the optimizers' state follow from the buckets; activations are what autograd keeps of a
micro-batch (a test counts it), and what a layer needs beside while it is computed.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from nanochat_native import sizing
from nanochat_native.model import GPT, GPTConfig
from nanochat_native.optim.buckets import assign, split, split_rows


@dataclass
class Options:
    """Predict the memory of a run on each of its ranks."""

    depth: int = 20
    """Layers; the width is 64 times as much."""
    nproc: int = 1
    """Ranks."""
    device_batch_size: int = 16
    """Sequences of a micro-batch."""
    max_seq_len: int = 2048
    """Tokens of a sequence."""
    vocab_size: int = 65536
    """Tokens in the vocabulary."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the activations."""
    grad_checkpoint: bool = False
    """Blocks are computed again in the backward pass."""


def predict(options: Options) -> dict[str, int]:
    """Bytes on the rank that holds most, by part."""
    config = GPTConfig.from_depth(options.depth, vocab_size=options.vocab_size, sequence_len=options.max_seq_len)
    with torch.device("meta"):
        model = GPT(config)
    weights, state = static_bytes(model, options.nproc)
    size = 2 if options.dtype == "bfloat16" else 4
    matrices = sum(parameter.numel() for parameter in model.parameters()) - model.wte.weight.numel()
    tokens = options.device_batch_size * options.max_seq_len
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer state": state,
        "weights in bfloat16": 2 * matrices if options.dtype == "bfloat16" else 0,
        "gradient of lm_head, with the loss": size * model.lm_head.weight.numel(),
        "activations": size * tokens * kept_channels(config, options.grad_checkpoint),
        "a layer's work": size * tokens * working_channels(config, options.grad_checkpoint),
        "logits": sizing.LOSS_CHUNK_BYTES,
    }


def static_bytes(model: GPT, ranks: int) -> tuple[int, int]:
    """(weights, optimizers' state) of the rank that has most of both."""
    rows = sum(split_rows(parameter, ranks).shard for parameter in (model.wte.weight, model.lm_head.weight))
    weights, state = 4 * ranks * rows, 4 * 2 * rows
    matrices = [(name, p) for name, p in model.named_parameters() if name.startswith("transformer.h.")]
    runs = [[parameter for _, parameter in run] for run in split(matrices, ranks)]
    held = [0] * ranks
    for run, layout in zip(runs, assign(runs, ranks), strict=True):
        weights += 4 * ranks * layout.shard
        for parameter, owner in zip(run, layout.owners, strict=True):
            held[owner] += 4 * parameter.numel()
    return weights, state + max(held)


def kept_channels(config: GPTConfig, grad_checkpoint: bool) -> int:
    """Numbers a token that autograd keeps until the backward pass."""
    width, kv = config.n_embd, config.n_kv_head * config.head_dim
    if grad_checkpoint:
        return (config.n_layer + 2) * width
    return config.n_layer * (8 * width + 2 * kv) + 3 * width


def working_channels(config: GPTConfig, grad_checkpoint: bool) -> int:
    """Numbers a token that one layer holds beside, in its backward pass: hidden tensors and gradients."""
    again = 8 * config.n_embd + 2 * config.n_kv_head * config.head_dim if grad_checkpoint else 0
    return again + 12 * config.n_embd


def main() -> int:
    options = tyro.cli(Options, prog="python -m nanochat_native.memory")
    if min(options.depth, options.nproc, options.device_batch_size, options.max_seq_len, options.vocab_size) < 1:
        print("error: every number is at least 1", file=sys.stderr)
        return 2
    parts = predict(options)
    for name, size in parts.items():
        print(f"{name:<36}{size / 1e9:9.3f} GB")
    ranks = f", on each of {options.nproc} ranks" if options.nproc > 1 else ""
    print(f"{'in all' + ranks:<36}{sum(parts.values()) / 1e9:9.3f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
