"""The flags of the memory command, and the sizes that follow from them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from nanochat_native.model.config import GPTConfig
from nanochat_native.optim.routing import DEFAULT_LEARNING_RATES
from nanochat_native.runtime.flags import UNSET, auto_flag, flag, is_unset

SIZES = ("depth", "device_batch_size", "max_seq_len", "vocab_size", "dtype")
PLANNED = (20, 16, 2048, 65536, "bfloat16")
RUN_ON_GPU = (12, 16, 2048, 32768, "bfloat16")
RUN_ON_CPU = (4, 8, 256, 8192, "float32")
GRID: dict[str, list[Any]] = {  # the values of each flag in the rows of --table
    "depth": [4, 6, 8, 12, 16, 20, 24, 26, 32],
    "device_batch_size": [1, 4, 8, 16, 32],
    "max_seq_len": [256, 1024, 2048],
    "nproc": [1, 2, 4, 8],
    "grad_checkpoint": [False, True],
    "optimizer": ["hybrid", "adamw"],
}


@dataclass(frozen=True)
class Options:
    """Predict the memory of a training step, part by part, and measure it.

    Without --measure, --checkpointing, --gpu-memory or --table the command only predicts, which is immediate for any
    size. With --measure or --checkpointing it runs real steps, and the default sizes are small: on a CPU those of
    train, which take less than a minute (depth 4, 8 x 256 tokens, vocabulary 8192, float32), on a GPU depth 12 and
    vocabulary 32768.

    The guide explains it: docs/guide/11-memory-and-ranks.md.
    """

    architecture: Literal["october", "today"] = "october"
    """Model of train: that of nanochat today, or its first one. On a GPU train's default is today."""
    depth: Annotated[int, auto_flag("INT", "20; if steps are run, 4 on a CPU and 12 on a GPU")] = UNSET
    """Layers; the width is 64 times this, with --architecture today rounded up to a multiple of --head-dim."""
    nproc: int = 1
    """Ranks. Several ranks are only predicted, for hybrid and adamw, without the buffers of the collectives."""
    device_batch_size: Annotated[int, auto_flag("INT", "16; 8 if steps are run on a CPU")] = UNSET
    """Sequences in a micro-batch."""
    max_seq_len: Annotated[int, auto_flag("INT", "2048; 256 if steps are run on a CPU")] = UNSET
    """Tokens in a sequence."""
    vocab_size: Annotated[int, auto_flag("INT", "65536; if steps are run, 8192 on a CPU and 32768 on a GPU")] = UNSET
    """Tokens in the vocabulary."""
    head_dim: int = 128
    """Maximum number of channels of an attention head."""
    n_kv_head: Annotated[int, auto_flag("INT", "as many as query heads")] = UNSET
    """Key/value heads; must divide the number of query heads."""
    optimizer: Literal["hybrid", "muon_sgd", "adamw", "adam", "sgd_momentum", "sgd"] = "hybrid"
    """Optimizer of train; hybrid is Muon and AdamW."""
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        tyro.conf.arg(help_behavior_hint="(default: bfloat16; float32 if steps are run on a CPU)"),
    ] = "auto"
    """Type of the activations; parameters are float32."""
    grad_checkpoint: bool = False
    """Recompute each block in the backward pass, and keep only its input until then."""
    micro_batches: int = 1
    """Micro-batches in a step: train's --total-batch-size divided by the tokens of a micro-batch. With more than one,
    the gradients are allocated during the whole forward and backward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the step. auto: a GPU if there is one; with --gpu-memory always a GPU."""

    measure: bool = False
    """Run steps on random tokens, and print the measured memory beside the predicted memory."""
    checkpointing: bool = False
    """Run steps with and without --grad-checkpoint, and print the memory and the time of both."""
    gpu_memory: Annotated[float | None, auto_flag("GIB", "not used")] = None
    """Print the largest --device-batch-size that fits a GPU with this memory in GiB (2^30 bytes), e.g. 24 or 80."""
    table: Annotated[Path | None, auto_flag("FILE", "not used")] = None
    """Write the predictions for a grid of depths, batches, lengths, ranks, checkpointing and optimizers to this file,
    .json or .csv. The other flags hold for every row."""
    out: Annotated[Path | None, auto_flag("FOLDER", "no file is written")] = None
    """Folder for result.json and the picture."""

    @property
    def runs_steps(self) -> bool:
        """Whether steps are run, not only predicted."""
        return self.measure or self.checkpointing

    @property
    def tokens(self) -> int:
        """The number of tokens in a micro-batch."""
        return self.device_batch_size * self.max_seq_len


def sized(options: Options) -> Options:
    """Check the options, and fill in the device and the sizes.

    Raises ValueError for a flag out of range, for flags that exclude each other, for a shape that no model has, and for
    a shape that has no CUDA kernel.
    """
    for name in (*SIZES[:4], "nproc", "head_dim", "n_kv_head", "micro_batches"):
        value = getattr(options, name)
        if value < 1 and not is_unset(options, name):
            raise ValueError(f"{flag(name)} must be a whole number >= 1, got {value}")
    if options.gpu_memory is not None and not 0 < options.gpu_memory < math.inf:
        raise ValueError(f"--gpu-memory must be a finite number of GiB above 0, got {options.gpu_memory}")
    if options.optimizer not in DEFAULT_LEARNING_RATES:
        raise ValueError(f"--optimizer must be one of {', '.join(DEFAULT_LEARNING_RATES)}, got {options.optimizer}")
    if options.nproc > 1 and options.optimizer not in ("hybrid", "adamw"):
        raise ValueError(f"--optimizer must be hybrid or adamw on several ranks, got {options.optimizer}")
    modes = {name: getattr(options, name) for name in ("measure", "checkpointing", "gpu_memory", "table")}
    given = [flag(name) for name, value in modes.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; use one of them")
    if options.table is not None:
        _check_table(options)
    if options.nproc > 1 and options.runs_steps:
        raise ValueError(f"--nproc must be 1 with {given[0]}, got {options.nproc}")

    gpu = options.device == "cuda"
    if options.device == "auto":
        gpu = torch.cuda.is_available() or options.gpu_memory is not None
    defaults = PLANNED if not options.runs_steps else RUN_ON_GPU if gpu else RUN_ON_CPU
    sizes: dict[str, Any] = {name: getattr(options, name) for name in SIZES}
    sizes = {name: own if v in (UNSET, "auto") else v for (name, v), own in zip(sizes.items(), defaults, strict=True)}
    options = dataclasses.replace(options, device="cuda" if gpu else "cpu", **sizes)
    head_dim = model_config(options).head_dim
    if gpu and (options.dtype != "bfloat16" or head_dim % 8 or head_dim > 128):
        raise ValueError(
            "on a GPU --dtype must be bfloat16 and heads must have a multiple of 8 channels up to 128, got "
            f"{options.dtype} and {head_dim}; other shapes have no CUDA kernel for attention"
        )
    return options


def _check_table(options: Options) -> None:
    """Raise ValueError for a file of --table with another suffix, and for a flag whose values the table lists."""
    assert options.table is not None
    if options.table.suffix not in (".json", ".csv"):
        raise ValueError(f"--table must be a file that ends in .json or .csv, got {options.table}")
    for name in (*GRID, "out"):
        if getattr(options, name) != Options.__dataclass_fields__[name].default:
            why = "it writes one file" if name == "out" else "the table has rows for its values"
            raise ValueError(f"--table excludes {flag(name)}: {why}")


def model_config(options: Options) -> GPTConfig:
    """Return the shape of the model that the options describe."""
    return GPTConfig.from_depth(
        options.depth,
        vocab_size=options.vocab_size,
        sequence_len=options.max_seq_len,
        head_dim=options.head_dim,
        n_kv_head=None if is_unset(options, "n_kv_head") else options.n_kv_head,
        architecture=options.architecture,
    )
