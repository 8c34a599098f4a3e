"""The flags of `python -m nanochat_native.memory`, and the sizes that follow from them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from nanochat_native.model.config import GPTConfig
from nanochat_native.optim.routing import DEFAULT_LEARNING_RATES
from nanochat_native.runtime.flags import UNSET, flag

SIZES = ("depth", "device_batch_size", "max_seq_len", "vocab_size", "dtype")
PLANNED = (20, 16, 2048, 65536, "bfloat16")
RUN_ON_GPU = (12, 16, 2048, 32768, "bfloat16")
RUN_ON_CPU = (4, 8, 256, 8192, "float32")


def _auto(metavar: str, default: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True)
class Options:
    """Predict what a training step holds in memory, part by part, and measure whether it is so.

    Without --measure, --checkpointing or --gpu-memory it only predicts, at once, whatever the size. With --measure or
    --checkpointing it runs real steps, and sizes that are not given are small ones: on a CPU train's own, which take
    less than a minute (depth 4, 8 x 256 tokens, vocabulary 8192, float32), on a GPU depth 12 and vocabulary 32768.
    """

    depth: Annotated[int, _auto("INT", "20; where steps are run 4 on a CPU, 12 on a GPU")] = UNSET
    """Layers; the width is 64 times as much."""
    nproc: int = 1
    """Ranks. Several are only predicted, for hybrid and adamw, without the collectives' own buffers."""
    device_batch_size: Annotated[int, _auto("INT", "16; 8 where steps are run on a CPU")] = UNSET
    """Sequences of a micro-batch."""
    max_seq_len: Annotated[int, _auto("INT", "2048; 256 where steps are run on a CPU")] = UNSET
    """Tokens of a sequence."""
    vocab_size: Annotated[int, _auto("INT", "65536; where steps are run 8192 on a CPU, 32768 on a GPU")] = UNSET
    """Tokens in the vocabulary."""
    head_dim: int = 128
    """Channels of one attention head, at most."""
    n_kv_head: Annotated[int, _auto("INT", "as many as query heads")] = UNSET
    """Key/value heads; a divisor of the query heads."""
    optimizer: Literal["hybrid", "muon_sgd", "adamw", "adam", "sgd_momentum", "sgd"] = "hybrid"
    """As train takes it; hybrid is Muon and AdamW."""
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        tyro.conf.arg(help_behavior_hint="(default: bfloat16; float32 where steps are run on a CPU)"),
    ] = "auto"
    """Of the activations; parameters are float32."""
    grad_checkpoint: bool = False
    """Blocks are computed again in the backward pass, and keep only their input until then."""
    micro_batches: int = 1
    """Of a step: train's --total-batch-size over what goes through the model at once. From the second one on, the
    gradients of those before are there during the whole pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the step runs. auto: a GPU if there is one; with --gpu-memory always a GPU."""

    measure: bool = False
    """Run steps of random tokens, and print what they hold beside what is predicted."""
    checkpointing: bool = False
    """Run steps with and without --grad-checkpoint, and print memory and time of both."""
    gpu_memory: Annotated[float | None, _auto("GIB", "not asked")] = None
    """Print the largest --device-batch-size that fits a GPU of so many GiB (2^30 bytes), as they are sold: 24, 80."""
    out: Annotated[Path | None, _auto("FOLDER", "nothing is written")] = None
    """Write FOLDER/result.json too."""

    @property
    def runs_steps(self) -> bool:
        return self.measure or self.checkpointing

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.device_batch_size * self.max_seq_len


def sized(options: Options) -> Options:
    """The options, checked, with device and sizes filled in.

    Raises ValueError for a flag out of range, for flags that exclude each other, for a shape that no model has, and for
    one that plain torch would serve on a GPU.
    """
    for name in (*SIZES[:4], "nproc", "head_dim", "n_kv_head", "micro_batches"):
        value = getattr(options, name)
        if value < 1 and not value == UNSET == options.__dataclass_fields__[name].default:
            raise ValueError(f"{flag(name)} is {value}; it takes a whole number from 1")
    if options.gpu_memory is not None and not 0 < options.gpu_memory < math.inf:
        raise ValueError(f"--gpu-memory is {options.gpu_memory}; it takes GiB, a finite number above 0")
    if options.optimizer not in DEFAULT_LEARNING_RATES:
        raise ValueError(f"--optimizer is {options.optimizer}; it takes {', '.join(DEFAULT_LEARNING_RATES)}")
    if options.nproc > 1 and options.optimizer not in ("hybrid", "adamw"):
        raise ValueError(f"--optimizer is {options.optimizer}, which runs on one rank; on many take hybrid or adamw")
    modes = {name: getattr(options, name) for name in ("measure", "checkpointing", "gpu_memory")}
    given = [flag(name) for name, value in modes.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given; take one of them")
    if options.nproc > 1 and options.runs_steps:
        raise ValueError(f"--nproc is {options.nproc}; {given[0]} runs on one rank")

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
            f"--dtype is {options.dtype}, heads have {head_dim} channels; on a GPU it takes bfloat16 and a multiple of "
            "8 up to 128, as the rest is served by plain torch, whose attention keeps all scores"
        )
    return options


def model_config(options: Options) -> GPTConfig:
    return GPTConfig.from_depth(
        options.depth,
        vocab_size=options.vocab_size,
        sequence_len=options.max_seq_len,
        head_dim=options.head_dim,
        n_kv_head=None if options.n_kv_head == UNSET else options.n_kv_head,
    )
