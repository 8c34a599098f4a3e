"""The flags of the roofline command, and the model and the machine that follow from them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from nanochat_native.lab.roofline.analysis import LAUNCH, Machine, machine_named
from nanochat_native.model.config import GPTConfig
from nanochat_native.runs.config import WINDOW_PATTERNS
from nanochat_native.runtime.flags import UNSET, auto_flag, flag, is_unset

SIZES = ("depth", "device_batch_size", "max_seq_len", "vocab_size", "head_dim", "n_kv_head")


@dataclass(frozen=True)
class Options:
    """Show what each operator of a training step moves, computes and takes on a GPU at best. No GPU is needed.

    The real model and optimizers run on tensors without memory. A kernel takes the largest of operations / --flops,
    bytes / --bandwidth and --launch. It reads each tensor once and writes each result once. A kernel that gathers rows
    reads these rows. Operators of torch are one kernel; those of this package have the kernels of their CUDA
    implementation. Nothing is reported if the operations of the products do not add up to the model's formula.

    The floor is the time for the bytes that everything else must move at least, between the same products. The
    operators between two products are one pass, which reads each tensor from before the pass once, and writes each
    tensor that is used after it once.
    """

    architecture: Literal["today", "october"] = "october"
    """Model of train: that of nanochat today, or its first one. On a GPU train's default is today."""
    depth: int = 12
    """Layers; the width is 64 times this, with --architecture today rounded up to a multiple of --head-dim."""
    device_batch_size: int = 16
    """Sequences in a micro-batch."""
    max_seq_len: int = 2048
    """Tokens in a sequence."""
    vocab_size: int = 32768
    """Tokens in the vocabulary."""
    head_dim: int = 128
    """Number of channels of an attention head, as in train; with october the largest one."""
    n_kv_head: Annotated[int, auto_flag("INT", "as many as query heads")] = UNSET
    """Key/value heads; must divide the number of query heads."""
    window_pattern: Annotated[str, auto_flag("STR", "october L, today SSSL")] = "auto"
    """Attention window of each layer, a pattern of letters that repeats: L for the whole sequence, S for a quarter of
    it, e.g. SSSL."""
    optimizer: Literal["hybrid", "adamw"] = "hybrid"
    """Optimizer of train; hybrid is Muon and AdamW."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the activations; parameters are float32. With float32 the figures are those of kernels for it, which
    attention has only on a CPU; --flops is then needed."""
    accumulate: bool = False
    """Model a micro-batch that is not the first of its step: it adds its gradients to those of earlier ones."""

    gpu: str = "H200"
    """GPU by its name, for its peak rate and bandwidth: a name that torch gives, or a part such as "H100 PCIe"."""
    flops: Annotated[float, auto_flag("FLOAT", "0.8 of the GPU's peak in bfloat16")] = UNSET
    """Operations per second of matrix products."""
    bandwidth: Annotated[float, auto_flag("FLOAT", "0.9 of the bandwidth of the GPU's memory")] = UNSET
    """Bytes per second from and to memory."""
    launch: float = LAUNCH
    """Seconds that a kernel takes at least."""

    measure: bool = False
    """Run the step on this machine's GPU, and print the measured time beside the modelled time."""
    json: Annotated[str | None, auto_flag("FILE", "no file is written")] = None
    """File for the figures as JSON; -: print them instead of the table."""
    plot: Annotated[Path | None, auto_flag("FILE", "no picture is drawn")] = None
    """File for a picture of the table, a PNG."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


def check(options: Options) -> None:
    """Raise ValueError for a flag out of range."""
    for name in SIZES:
        value = getattr(options, name)
        if value < 1 and not is_unset(options, name):
            raise ValueError(f"{flag(name)} must be a whole number >= 1, got {value}")
    for name in ("flops", "bandwidth", "launch"):
        value = getattr(options, name)
        if not 0 < value < math.inf and not is_unset(options, name):
            raise ValueError(f"{flag(name)} must be a finite number > 0, got {value}")
    if options.json == "":
        raise ValueError("--json must be a path or -, got ''")


def model_config(options: Options) -> GPTConfig:
    """Return the shape of the model that the options describe."""
    auto = is_unset(options, "window_pattern")
    return GPTConfig.from_depth(
        options.depth,
        vocab_size=options.vocab_size,
        sequence_len=options.max_seq_len,
        head_dim=options.head_dim,
        n_kv_head=None if is_unset(options, "n_kv_head") else options.n_kv_head,
        window_pattern=WINDOW_PATTERNS[options.architecture] if auto else options.window_pattern,
        architecture=options.architecture,
    )


def machine_of(options: Options) -> Machine:
    """Return the rates of the GPU. Raise ValueError if neither the table nor a flag has one."""
    flops = None if is_unset(options, "flops") else options.flops
    bandwidth = None if is_unset(options, "bandwidth") else options.bandwidth
    return machine_named(options.gpu, options.torch_dtype, flops, bandwidth, options.launch)
