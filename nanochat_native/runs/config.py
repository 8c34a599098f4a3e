"""The flags of `python -m nanochat_native.train`: one flat dataclass, named as nanochat names them.

A flag that is unset (runtime/flags.py) gets its value in steps: from the recipe, the kind of device and the data by
`resolve_defaults`, from the model by training/resolve.py and `resolve_horizon`, and from the memory of the device by
training/sizing.py.
"""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_type_hints

import torch
import tyro

from nanochat_native.model.config import ARCHITECTURES, GPTConfig
from nanochat_native.runtime import hardware
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import LARGEST, UNSET, auto_flag, check_values, flag, is_unset, one_line_errors

STDLIB = "stdlib"  # value of --data for the sources of the standard library
EXAMPLES = "examples"  # value of --data in finetune for the generated conversations

CORE_EVERY, CORE_ITEMS = 2000, 500  # nanochat's
CHAT_EVERY, CHAT_PROBLEMS = 200, 24  # nanochat's; the problems of a task whose answers the model writes
PROJECT = "nanochat-native"  # of --wandb and --trackio without a value
NOT_IN_A_PROJECT = "/\\#?%:"  # characters that wandb refuses

RECIPE = "today"  # of a run, unless --recipe names one
REFERENCE_BATCH = 2**19  # tokens of a step for which nanochat's present rates and weight decay are

# The values of flags that nanochat's recipes set: the first one, of October 2025, and that of July 2026. The rates and
# the other constants of the optimizers are in optim/routing.py.
RECIPES: dict[str, dict[str, Any]] = {
    "today": {
        "architecture": "today",
        "matrix_weight_decay": 0.28,
        "decay_schedule": "cosine",
        "scale_decay": "on",
        "cautious": "on",
        "ns_coefficients": "polar_express",
        "momentum_end": 0.97,
        "momentum_warmup_steps": 400,
        "momentum_final": 0.9,
        "row_equilibration": "on",
        "frobenius_renormalisation": "on",
        "normuon": "on",
        "normuon_beta2": 0.9,
        "grad_clip": 0.0,
        "warmup_ratio": 0.0,
        "warmup_steps": 40,
        "warmdown_ratio": 0.65,
        "final_lr_frac": 0.05,
        "packing": "bestfit",
    },
    "october": {
        "architecture": "october",
        "weight_decay": 0.0,
        "matrix_weight_decay": 0.0,
        "decay_schedule": "constant",
        "scale_decay": "off",
        "cautious": "off",
        "ns_coefficients": "quintic",
        "momentum_end": 0.95,
        "momentum_warmup_steps": 300,
        "row_equilibration": "off",
        "frobenius_renormalisation": "off",
        "normuon": "off",
        "normuon_beta2": 0.95,
        "grad_clip": 1.0,
        "warmup_ratio": 0.0,
        "warmup_steps": 0,
        "warmdown_ratio": 0.2,
        "final_lr_frac": 0.0,
        "packing": "stream",
        "reference_batch_size": 0,
    },
}
WINDOW_PATTERNS = {"today": "SSSL", "october": "L"}  # by architecture
PARTS = ("value_embeddings", "residual_scalars", "smear", "backout", "qk_scale", "rotary_base")  # with a flag


def _by_recipe(metavar: str, name: str) -> Any:
    """Return the setting that makes --help show a flag whose value depends on the recipe."""
    return auto_flag(metavar, ", ".join(f"{recipe} {_text(values[name])}" for recipe, values in RECIPES.items()))


def _by_architecture(metavar: str, name: str) -> Any:
    """Return the setting that makes --help show a flag whose value depends on the architecture."""
    values = {each: ARCHITECTURES[each] | {"window_pattern": WINDOW_PATTERNS[each]} for each in WINDOW_PATTERNS}
    return auto_flag(metavar, ", ".join(f"{each} {_text(values[each][name])}" for each in values))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT like nanochat's. Without flags: a small model of Python code, in minutes.

    The guide explains it: docs/guide/01-one-command.md and docs/guide/08-data-and-the-loop.md.
    """

    recipe: Annotated[
        Literal["auto", "today", "october"],
        auto_flag("{auto,today,october}", RECIPE),
    ] = "auto"
    """The way to train: that of nanochat today (July 2026), or its first one (October 2025). It chooses the value of
    every flag below whose default names the two and that is not given, and the rates of the optimizers."""
    architecture: Annotated[Literal["auto", "today", "october"], auto_flag("{auto,today,october}", "as --recipe")] = (
        "auto"
    )
    """The model: that of nanochat today, or its first one. It sets the rule for the width, the initial weights, and
    the parts that are not given."""
    depth: Annotated[int, auto_flag("INT", "4 on a CPU, 12 on a GPU, 6 on a GPU without --data")] = UNSET
    """Number of layers. It also sets the size of the model: the width is 64 times the depth, and the number of heads,
    the learning rates and the length of the training follow."""
    head_dim: int = 128
    """Number of channels of an attention head. With the architecture today the width is rounded up to a multiple of it;
    with october it is the largest number, and the heads divide the width."""
    n_kv_head: Annotated[int, auto_flag("INT", "as many as query heads")] = UNSET
    """Number of key/value heads, a divisor of the number of query heads; 1 is multi-query attention."""
    window_pattern: Annotated[str, _by_architecture("STR", "window_pattern")] = "auto"
    """Attention window of each layer, a pattern of letters that repeats: L for the whole sequence, S for a quarter of
    it, e.g. SSSL."""
    value_embeddings: Annotated[Literal["auto", "on", "off"], _by_architecture("{auto,on,off}", "value_embeddings")] = (
        "auto"
    )
    """Every second layer adds a gated embedding of the token to its values."""
    residual_scalars: Annotated[Literal["auto", "on", "off"], _by_architecture("{auto,on,off}", "residual_scalars")] = (
        "auto"
    )
    """Each layer begins with a learned mixture of the residual stream and the first layer's input."""
    smear: Annotated[Literal["auto", "on", "off"], _by_architecture("{auto,on,off}", "smear")] = "auto"
    """A gated part of the previous token's embedding is added to each embedding."""
    backout: Annotated[Literal["auto", "on", "off"], _by_architecture("{auto,on,off}", "backout")] = "auto"
    """A learned part of the residual stream in the middle of the model is subtracted before the last norm."""
    qk_scale: Annotated[float, _by_architecture("FLOAT", "qk_scale")] = UNSET
    """Factor of the normalised queries and of the normalised keys."""
    rotary_base: Annotated[int, _by_architecture("INT", "rotary_base")] = UNSET
    """Base of the frequencies of the rotary positions."""
    max_seq_len: Annotated[int, auto_flag("INT", "2048 on a GPU, 1024 there without --data, 256 on a CPU")] = UNSET
    """Length of a sequence, in tokens."""
    vocab_size: Annotated[int, auto_flag("INT", "32768 on a GPU with --data, else 8192")] = UNSET
    """Number of tokens in the vocabulary."""
    grad_checkpoint: bool = False
    """Recompute the activations of each block in the backward pass instead of storing them. This saves memory and costs
    about a third more compute."""

    num_iterations: Annotated[int, auto_flag("INT", "from --target-param-data-ratio")] = UNSET
    """Length of the training, in optimizer steps. With --resume it may be raised to train longer."""
    target_flops: Annotated[float, auto_flag("FLOAT", "not used")] = UNSET
    """Length of the training, in floating-point operations."""
    target_param_data_ratio: Annotated[
        float,
        auto_flag("FLOAT", "today 12 on a GPU, october 20; 1 there without --data; today 0.14 on a CPU, october 0.1"),
    ] = UNSET
    """Length of the training, in training tokens per parameter. With the recipe today only the matrices of the blocks
    and lm_head count."""
    device_batch_size: Annotated[int, auto_flag("INT", "the largest that fits on a GPU; 8 on a CPU")] = UNSET
    """Sequences in one forward and backward pass on one device. Gradients accumulate up to --total-batch-size."""
    total_batch_size: Annotated[
        int,
        auto_flag(
            "INT", "on a GPU today by the scaling law, october 524288; 65536 there without --data; 2048 on a CPU"
        ),
    ] = UNSET
    """Tokens in one optimizer step, over all devices."""
    reference_batch_size: Annotated[
        int, auto_flag("INT", f"today {REFERENCE_BATCH} on a GPU, 0 on a CPU; october 0")
    ] = UNSET
    """Tokens in one optimizer step for which the learning rates and --matrix-weight-decay are given. The rates are
    multiplied by (total batch / reference)^0.5, and the decay follows its scaling law. 0: neither depends on the
    batch."""

    optimizer: Literal["hybrid", "muon_sgd", "adamw", "adam", "sgd_momentum", "sgd"] = "hybrid"
    """hybrid: Muon for the weight matrices of the blocks, AdamW for the rest; muon_sgd: Muon and SGD, in
    the same way. The others train all parameters."""
    matrix_lr: Annotated[float, auto_flag("FLOAT", "0.02 with Muon, 0.002 with adamw and adam, else 0.3 or 0.1")] = (
        UNSET
    )
    """Learning rate of the weight matrices of the blocks. With adamw and adam it is the rate at width 768, and is
    multiplied by (width / 768)^-0.5."""
    embedding_lr: Annotated[
        float, auto_flag("FLOAT", "today 0.3, october 0.2; 0.3 with SGD, 0.1 with sgd_momentum")
    ] = UNSET
    """Learning rate of wte, the token embeddings, at width 768. It is multiplied by (width / 768)^-0.5, except with
    SGD. Value embeddings have half of it."""
    unembedding_lr: Annotated[
        float, auto_flag("FLOAT", "today 0.008, october 0.004; 0.3 with SGD, 0.1 with sgd_momentum")
    ] = UNSET
    """Learning rate of lm_head, the output layer, at width 768. It is multiplied like --embedding-lr."""
    scalar_lr: Annotated[float, auto_flag("FLOAT", "0.5; 0.03 with SGD, 0.01 with sgd_momentum")] = UNSET
    """Learning rate of the factors of the first layer's input in --residual-scalars. Those of the residual stream have
    a hundredth of it."""
    weight_decay: Annotated[float, auto_flag("FLOAT", "today 0 to 0.05, each kind of parameter its own, october 0")] = (
        UNSET
    )
    """Weight decay of the parameters that Muon does not train, as a fraction of their learning rate. With adam and SGD
    it is an L2 penalty."""
    matrix_weight_decay: Annotated[float, _by_recipe("FLOAT", "matrix_weight_decay")] = UNSET
    """Weight decay of the parameters that Muon trains, as a fraction of their learning rate."""
    decay_schedule: Annotated[
        Literal["auto", "constant", "cosine"], _by_recipe("{auto,constant,cosine}", "decay_schedule")
    ] = "auto"
    """Weight decay of Muon over the run: constant, or falling to 0 as half a period of a cosine."""
    scale_decay: Annotated[Literal["auto", "on", "off"], _by_recipe("{auto,on,off}", "scale_decay")] = "auto"
    """Muon: multiply the weight decay, as the update, by the factor of matrices with more rows than columns."""
    cautious: Annotated[Literal["auto", "on", "off"], _by_recipe("{auto,on,off}", "cautious")] = "auto"
    """Muon: apply weight decay only to elements that the update moves towards 0."""
    ns_steps: int = 5
    """Newton-Schulz iterations in each update of Muon."""
    ns_coefficients: Annotated[
        Literal["auto", "quintic", "polar_express", "cubic"],
        _by_recipe("{auto,quintic,polar_express,cubic}", "ns_coefficients"),
    ] = "auto"
    """Polynomials of the Newton-Schulz iterations: quintic (Keller Jordan's), polar_express (a different one in each
    iteration) or cubic (1.5, -0.5)."""
    ns_bfloat16: Annotated[
        Literal["auto", "on", "off"], auto_flag("{auto,on,off}", "on with --dtype bfloat16, else off")
    ] = "auto"
    """Muon: allow Newton-Schulz on a CPU to multiply in bfloat16, if the processor does. On a GPU it is always in 16
    bits."""
    momentum_start: float = 0.85
    """Momentum of Muon at the first step, in [0, 1)."""
    momentum_end: Annotated[float, _by_recipe("FLOAT", "momentum_end")] = UNSET
    """Momentum of Muon after --momentum-warmup-steps, in [0, 1)."""
    momentum_warmup_steps: Annotated[int, _by_recipe("INT", "momentum_warmup_steps")] = UNSET
    """Steps over which the momentum of Muon changes from --momentum-start to --momentum-end."""
    momentum_final: Annotated[float, auto_flag("FLOAT", "today 0.9, october as --momentum-end")] = UNSET
    """Momentum of Muon at the end of the warmdown, over which it changes from --momentum-end, in [0, 1)."""
    row_equilibration: Annotated[Literal["auto", "on", "off"], _by_recipe("{auto,on,off}", "row_equilibration")] = (
        "auto"
    )
    """Muon: give all rows of the momentum the same norm before orthogonalisation."""
    frobenius_renormalisation: Annotated[
        Literal["auto", "on", "off"], _by_recipe("{auto,on,off}", "frobenius_renormalisation")
    ] = "auto"
    """Muon: scale each update to the Frobenius norm of an orthogonal matrix."""
    normuon: Annotated[Literal["auto", "on", "off"], _by_recipe("{auto,on,off}", "normuon")] = "auto"
    """Muon: equalise the variance of the rows of each update (NorMuon)."""
    normuon_beta2: Annotated[float, _by_recipe("FLOAT", "normuon_beta2")] = UNSET
    """Decay of the average of --normuon's variances, in [0, 1)."""
    per_head: bool = False
    """Muon: orthogonalise the attention matrices separately for each head."""
    muon_form: Literal["nanochat", "cropped", "momentum_after", "original_guide"] = "nanochat"
    """Muon: nanochat's, or on one rank, for comparison, forms of the original guide. cropped: only the leading square
    of each matrix is updated; momentum_after: the momentum sums orthogonalised gradients; original_guide: both, without
    the factor of the aspect ratio. compare --suite guide uses them."""
    grad_clip: Annotated[float, _by_recipe("FLOAT", "grad_clip")] = UNSET
    """Largest norm of the gradient of all parameters; a larger gradient is scaled down to it. 0: no clipping."""
    schedule: Literal["linear", "cosine", "exponential", "step", "constant"] = "linear"
    """Shape of the learning rate's decay during the warmdown."""
    warmup_steps: Annotated[int, _by_recipe("INT", "warmup_steps")] = UNSET
    """Steps at the start over which the learning rate rises from 0. A shorter run never reaches the full rate."""
    warmup_ratio: Annotated[float, auto_flag("FLOAT", "0")] = UNSET
    """Fraction of the training, at its start, over which the learning rate rises from 0, in [0, 1]. It replaces
    --warmup-steps."""
    warmdown_ratio: Annotated[float, _by_recipe("FLOAT", "warmdown_ratio")] = UNSET
    """Fraction of the training, at its end, over which the learning rate decays, in [0, 1]."""
    final_lr_frac: Annotated[float, _by_recipe("FLOAT", "final_lr_frac")] = UNSET
    """Learning rate at the end of the warmdown, as a fraction of the full rate, in [0, 1]."""
    skip_spikes: float = 0.0
    """Skip the update of a step whose loss or gradient norm is more than this many standard deviations above the mean
    of the last 128 steps. 0: never."""
    max_skipped_steps: int = 10
    """Stop after this many skipped steps in a row. Steps are skipped for gradients that are not finite, and for
    spikes."""

    data: Annotated[str, auto_flag("PATH", "stdlib, the sources of Python's standard library")] = STDLIB
    """File, folder or glob of text, .jsonl, .ndjson or .json (.gz, .zst), .parquet or llm.c token shards (.bin)."""
    text_column: Annotated[str | None, auto_flag("STR", "detected: the field with text in most records")] = None
    """Field of the records of .jsonl, .ndjson, .json and .parquet that holds the text."""
    packing: Annotated[
        Literal["auto", "stream", "bestfit"],
        auto_flag("{auto,stream,bestfit}", "today bestfit on a GPU, else stream"),
    ] = "auto"
    """Rows of training and validation. stream: windows of the stream of all documents; bestfit: rows that begin with
    <|bos|>, packed with the documents that fit best, nanochat's order: documents are cropped. auto is stream for the
    built-in data, whose documents are much longer than a row, and bestfit with --tokenize while-training."""
    validation: Literal["auto", "fraction", "shards", "last-shard"] = "auto"
    """Validation text. fraction: a twentieth of the documents; last-shard: the last file; shards: the last of several
    numbered files of parquet or JSON, if --data is that, else a fraction; auto: shards with --packing bestfit, else
    fraction. Token shards are split by their names."""
    tokenize: Literal["ahead", "while-training"] = "ahead"
    """When documents are tokenized: ahead of the training, once, or while it runs, for text that is too large to
    wait for. The documents then come in the order of the files."""
    cache_dir: Annotated[Path | None, auto_flag("PATH", "~/.cache/nanochat-native, or below XDG_CACHE_HOME")] = None
    """Folder in which tokenizers and token shards are kept between runs."""
    eval_every: Annotated[int, auto_flag("INT", "a fifth of the training, at most 250")] = UNSET
    """Steps between evaluations of validation bits per byte. 0: only at the end."""
    eval_tokens: Annotated[int, auto_flag("INT", "10485760 on a GPU, 32768 on a CPU")] = UNSET
    """Largest number of validation tokens in one evaluation."""
    core: Annotated[Path | None, auto_flag("PATH", "no CORE score")] = None
    """Folder with the tasks of the CORE score, nanochat's eval bundle, to measure the model while it is trained, at the
    end too."""
    core_every: Annotated[int, auto_flag("INT", f"{CORE_EVERY} with --core")] = UNSET
    """Steps between measurements of the CORE score. 0: only at the end."""
    core_max_per_task: Annotated[int, auto_flag("INT", f"{CORE_ITEMS} with --core")] = UNSET
    """Largest number of items of each CORE task, after a fixed shuffle. 0: all."""
    sample_every: Annotated[int, auto_flag("INT", "a quarter of the training, at most 1000")] = UNSET
    """Steps between samples of generated text. 0: only at the end."""
    save_every: Annotated[int, auto_flag("INT", "a quarter of the training, at most 1000")] = UNSET
    """Steps between checkpoints. 0: only at the end."""
    keep: int = 2
    """Number of checkpoints to keep; older ones are deleted."""
    diagnose: bool = False
    """Record statistics of each layer: norms of gradients and updates, orthogonality, attention logits, dead units.
    diagnosis.png shows them."""
    diagnose_every: Annotated[int, auto_flag("INT", "a fortieth of the training, at most 100")] = UNSET
    """Steps between records of --diagnose."""
    wandb: Annotated[str | None, auto_flag("[PROJECT]", f"off; {PROJECT} without a value")] = None
    """Log to this project of Weights & Biases too. WANDB_MODE and the other variables of wandb apply."""
    trackio: Annotated[str | None, auto_flag("[PROJECT]", f"off; {PROJECT} without a value")] = None
    """Log to this project of Trackio too. TRACKIO_DIR and the other variables of trackio apply."""

    run: Annotated[str | None, auto_flag("STR", "d<depth>")] = None
    """Name of the run. Its folder is OUT_DIR/RUN."""
    out_dir: Path = Path("runs")
    """Folder that contains all runs."""
    resume: Annotated[str | None, auto_flag("auto|PATH", "start a new run")] = None
    """Resume from the newest intact checkpoint. auto: of the run OUT_DIR/RUN, or start it if it does not exist; PATH:
    of the run in this folder."""
    overwrite: bool = False
    """Delete the run in OUT_DIR/RUN before starting a new one."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on. mps: the GPU of a Mac, without kernels of this package; auto: a CUDA GPU if there is one,
    else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the activations; parameters are always float32. float16 needs a CUDA GPU, and the loss is scaled. auto:
    bfloat16 on such a GPU, float16 on one without bfloat16 (compute capability below 8.0), float32 elsewhere."""
    fp8: Literal["off", "tensorwise", "rowwise"] = "off"
    """Products of the blocks' linear layers in FP8, in training with --dtype bfloat16, on a GPU of compute capability
    8.9 or newer. tensorwise: one scale for each matrix; rowwise: one for each row, more exact and slower."""
    backend: Literal["auto", "native", "torch"] = "auto"
    """native: the C++ and CUDA kernels of this package; torch: their reference implementations in PyTorch; auto: the
    value of NANOCHAT_NATIVE_BACKEND, or native."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Whether the kernels of a step are captured once and started together. auto: on one GPU with --dtype bfloat16,
    where a capture succeeds; on: fail where they cannot be captured."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are sent between ranks."""
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which weights are sent between ranks. With bfloat16 each weight is kept in float32 on one rank, and all
    ranks compute with the rounded values."""
    check_replicas_every: int = 100
    """Steps between checks that the weights of all ranks are identical, bit by bit. 0: never."""
    dry_run: bool = False
    """Prepare the data, print what would be done, and stop."""
    print_config: bool = False
    """Print all flags and their values as JSON, and stop."""
    json: bool = False
    """Print records as JSON lines to stdout, and messages to stderr."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            most = _MOST.get(name, math.inf)
            needed = f"from {least} to {most}" if name in _MOST else f">= {least}"
            self._require(name, f"a whole number {needed}", least <= getattr(self, name) <= most)
        for name in ("target_flops", "target_param_data_ratio"):
            self._require(name, "a finite number > 0", 0 < getattr(self, name) < math.inf)
        for name in ("warmup_ratio", "warmdown_ratio", "final_lr_frac"):
            self._require(name, "a number in [0, 1]", 0 <= getattr(self, name) <= 1)
        for name in (
            "matrix_lr",
            "embedding_lr",
            "unembedding_lr",
            "scalar_lr",
            "weight_decay",
            "matrix_weight_decay",
            "grad_clip",
            "skip_spikes",
        ):
            self._require(name, "a finite number >= 0", 0 <= getattr(self, name) < math.inf)
        for name in ("momentum_start", "momentum_end", "momentum_final", "normuon_beta2"):
            self._require(name, "a number in [0, 1)", 0 <= getattr(self, name) < 1)
        self._require("data", "a file, a folder or a glob", self.data != "")
        self._require("text_column", "the name of a field", self.text_column != "")
        self._require("qk_scale", "a finite number > 0", 0 < self.qk_scale < math.inf)
        letters = bool(self.window_pattern) and not set(self.window_pattern) - set("LS")
        self._require("window_pattern", "letters L and S, such as SSSL", letters)
        if self.run is not None:
            plain = self.run not in ("", "..") and Path(self.run).name == self.run and "\0" not in self.run
            self._require("run", "a name without slashes (--out-dir sets the folder)", plain)

        neutral = {name: field.default for name, field in self.__dataclass_fields__.items()}
        neutral |= RECIPES["october"] | {"momentum_final": self.momentum_end, "ns_bfloat16": "off"}
        muon_flags = [name for name in MUON_FLAGS if not is_unset(self, name) and getattr(self, name) != neutral[name]]
        if muon_flags and self.optimizer not in WITH_MUON:
            raise ConfigError(f"{flag(muon_flags[0])} needs Muon, which --optimizer {self.optimizer} does not use")

        unsupported = [name for name in NANOCHAT_FORM_ONLY if getattr(self, name) in (True, "on")]
        if self.muon_form != "nanochat" and unsupported:
            raise ConfigError(f"{flag(unsupported[0])} needs --muon-form nanochat, got {self.muon_form}")

        if self.warmup_ratio > 0 and self.warmup_steps > 0:
            raise ConfigError(
                "--warmup-steps and --warmup-ratio each set the length of the warmup, "
                f"got {self.warmup_steps} and {self.warmup_ratio}; set one of them to 0"
            )
        if self.warmup_ratio + self.warmdown_ratio > 1:
            raise ConfigError(
                "the sum of --warmup-ratio and --warmdown-ratio must be <= 1, "
                f"got {self.warmup_ratio} and {self.warmdown_ratio}"
            )
        if self.schedule in ("exponential", "step") and self.final_lr_frac == 0:
            raise ConfigError(f"--final-lr-frac must be > 0 with --schedule {self.schedule}, for example 0.1")
        horizons = [name for name in _HORIZONS if not is_unset(self, name)]
        if len(horizons) > 1:
            raise ConfigError(
                f"{' and '.join(map(flag, horizons))} each set the length of the training; give only one of them"
            )
        if self.tokenize == "while-training" and self.packing == "stream":
            raise ConfigError("--tokenize while-training needs --packing bestfit, got stream")
        given = [name for name in ("core_every", "core_max_per_task") if not is_unset(self, name)]
        if given and self.core is None:
            raise ConfigError(f"{flag(given[0])} needs --core FOLDER")
        for name in LOGGER_FLAGS:
            project = getattr(self, name)
            valid = project is None or (0 < len(project) <= 128 and not set(project) & set(NOT_IN_A_PROJECT))
            self._require(name, f"a name of at most 128 characters without any of {NOT_IN_A_PROJECT}", valid)
        if self.resume is not None and self.overwrite:
            raise ConfigError("--resume continues a run and --overwrite deletes it; give only one of them")

    def _require(self, name: str, needed: str, is_valid: bool) -> None:
        """Raise ConfigError for a flag that is not valid, unless it is unset. needed: what its value must be."""
        if not is_valid and not is_unset(self, name):
            raise ConfigError(f"{flag(name)} must be {needed}, got {getattr(self, name)!r}")

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return self.out_dir / str(self.run)

    @property
    def order(self) -> Literal["stream", "bestfit"]:
        """The order of the data, as data/order.py names it; after resolve_defaults."""
        assert self.packing != "auto", "resolve_defaults chooses the packing"
        return self.packing


@dataclass(frozen=True)
class ChatTrainConfig(TrainConfig):
    """Train a saved model further, on conversations: what the configs of finetune and reinforce share."""

    recipe: Annotated[
        Literal["auto", "today", "october"], auto_flag("{auto,today,october}", "that of the base model")
    ] = "auto"
    """The way to train. It sets the rates of the optimizers and the options of Muon that are not given."""
    checkpoint: Path | None = None
    """Run folder of the base model: pretrained, imported or fine-tuned. A new run needs it."""
    step: int | None = None
    """Step of the checkpoint to use; default: the newest."""
    chat_tasks: tuple[str, ...] = ()
    """Tasks of chat_eval, such as GSM8K SpellingBee, to measure while the model is trained, at the end too. The
    programs of HumanEval are run by chat_eval alone."""
    chat_data: Path | None = None
    """Folder with the files of --chat-tasks, as download fills it. SpellingBee and SimpleSpelling have none."""
    chat_every: Annotated[int, auto_flag("INT", f"{CHAT_EVERY} with --chat-tasks")] = UNSET
    """Steps between measurements of --chat-tasks. 0: only at the end."""
    chat_max_problems: Annotated[int, auto_flag("INT", f"{CHAT_PROBLEMS} for written answers, all for choices")] = UNSET
    """Largest number of problems of each of --chat-tasks, after a fixed shuffle. 0: all."""

    reference_batch_size: int = 0
    """Tokens in one optimizer step for which the learning rates are given. 0: they do not depend on the batch."""
    matrix_weight_decay: float = 0.0
    """Weight decay of the parameters that Muon trains, as a fraction of their learning rate."""
    momentum_end: float = 0.95
    """Momentum of Muon after --momentum-warmup-steps, in [0, 1)."""
    warmup_steps: int = 0
    """Steps at the start over which the learning rate rises from 0. A shorter run never reaches the full rate."""
    warmdown_ratio: float = 1.0
    """Fraction of the training, at its end, over which the learning rate decays, in [0, 1]."""
    final_lr_frac: float = 0.0
    """Learning rate at the end of the warmdown, as a fraction of the full rate, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chat_every", "chat_max_problems"):
            self._require(name, "a whole number >= 0", getattr(self, name) >= 0)
            if not is_unset(self, name) and not self.chat_tasks:
                raise ConfigError(f"{flag(name)} needs --chat-tasks NAMES")


@dataclass(frozen=True)
class FinetuneConfig(ChatTrainConfig):
    """Fine-tune a trained model on conversations, so that it can chat. Only the assistant's words are trained on.

    The shape of the model and its tokenizer are those of the base model. All other flags are those of train.

    The guide explains it: docs/guide/13-using-it.md.
    """

    mix: tuple[str, ...] = ()
    """More conversations: files, folders or globs, each with an optional :epochs=N, the number of times that one pass
    over all conversations has those of this file, e.g. --mix gsm8k.jsonl:epochs=4 names.jsonl:epochs=0.5; or with
    :weight=W, the number of its conversations in a pass for each one of --data. The name examples stands for the
    generated ones."""
    val_data: str | None = None
    """Conversations to validate on; default: a tenth of --data and --mix."""
    skip_bad_lines: bool = False
    """Leave out records that are no conversation, count them, and name the first ones, instead of stopping at one."""
    epochs: float = 3.0
    """Length of the training, in passes over all conversations. Use --num-iterations to give it in steps."""
    batch_rows: Annotated[int, auto_flag("INT", "32 on a GPU, 8 on a CPU")] = UNSET
    """Rows in one optimizer step: conversations, or with --packing best-fit rows of several."""
    packing: Literal["one-per-row", "best-fit"] = "one-per-row"  # type: ignore[assignment]  # other values than train's
    """Conversations of a row. one-per-row: one, padded to the length of the longest; best-fit: as many as fit into
    --max-seq-len, the longest first. The loss of a conversation is the same in both: it attends only to itself, and its
    positions begin at 0. With best-fit, attention runs on the conversations apart, in batches of similar length."""
    cut: Annotated[
        Literal["auto", "tokens", "turns"],
        auto_flag("{auto,tokens,turns}", "turns with --packing best-fit, else tokens"),
    ] = "auto"
    """Where a conversation that is longer than --max-seq-len ends. turns: after the last answer that fits; tokens:
    anywhere. A conversation without an answer after that is left out."""
    load_optimizer: bool = False
    """Begin with the state of the base run's optimizers, which is part of its checkpoint, instead of an empty one."""
    rate_scale: float = 0.1
    """Factor of the initial learning rates of pretraining. It applies to the rates that are not given."""

    data: Annotated[str, auto_flag("PATH", "examples, some generated conversations")] = EXAMPLES
    """Conversations, one JSON object on each line: {"messages": [{"role": "user", "content": "..."}, ...]}."""
    momentum_warmup_steps: int = 300
    """Steps over which the momentum of Muon changes from --momentum-start to --momentum-end."""
    momentum_final: Annotated[float, auto_flag("FLOAT", "as --momentum-end")] = UNSET
    """Momentum of Muon at the end of the warmdown, over which it changes from --momentum-end, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "rate_scale"):
            self._require(name, "a finite number > 0", 0 < getattr(self, name) < math.inf)
        self._require("batch_rows", "a whole number >= 1", self.batch_rows >= 1)
        for entry in self.mix:
            mixture_entry(entry)

    @property
    def order(self) -> Literal["stream", "bestfit"]:
        return "stream"  # of rows that hold conversations

    @property
    def cuts_turns(self) -> bool:
        """Whether a long conversation ends after an answer."""
        return self.cut == "turns" or (self.cut == "auto" and self.packing == "best-fit")


MOST_CONVERSATIONS = 10**9  # that one pass has of one file


class MixtureEntry(NamedTuple):
    """A value of --mix. amount: of times that a pass has its conversations, or, with by_weight, of its conversations
    for each one of --data."""

    path: str
    amount: float = 1.0
    by_weight: bool = False

    def epochs(self, own: int, of_data: int) -> float:
        """Return how often a pass has its `own` conversations, if it has those of --data, `of_data`, once."""
        times = self.amount * of_data / max(own, 1) if self.by_weight else self.amount
        if times * own > MOST_CONVERSATIONS:
            raise ConfigError(
                f"--mix {self.path}: a pass would have {times * own:.3g} conversations of it, "
                f"and {MOST_CONVERSATIONS:,} is the most"
            )
        return times


def mixture_entry(entry: str) -> MixtureEntry:
    """Return the parts of PATH, PATH:epochs=N or PATH:weight=W. Raise ConfigError for a bad value of --mix."""
    match = re.fullmatch(r"(.*?)(?::(epochs|weight)=([^:]*))?", entry, re.DOTALL)
    assert match is not None  # the first group takes any text
    path, name, number = match.groups("1")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not path or not 0 < amount < math.inf or re.search(":(epochs|weight)=", path):
        raise ConfigError(
            f"--mix must be PATH, PATH:epochs=N or PATH:weight=W with a finite number N or W > 0, got {entry!r}"
        )
    return MixtureEntry(path, amount, name == "weight")


@dataclass(frozen=True)
class ReinforceConfig(ChatTrainConfig):
    """Train a fine-tuned model by rewards for its answers (REINFORCE), as nanochat does.

    In each step the model writes several answers to each of some examples. An answer that is better than the mean of
    its example becomes more likely, a worse one less likely. docs/reinforcement.md describes the tasks.
    """

    recipe: Annotated[
        Literal["auto", "today", "october"], auto_flag("{auto,today,october}", "that of the base model")
    ] = "auto"
    """The way to train. It sets the options of Muon that are not given."""
    checkpoint: Path | None = None
    """Run folder of the model to train, which was fine-tuned on conversations. A new run needs it."""
    task: str = "arithmetic"
    """Examples and the reward of an answer: arithmetic, spelling, gsm8k, or a Python file with examples(split) and
    reward(example, answer). The file is run."""
    task_data: Path | None = None
    """Folder with the files of --task gsm8k, as download fills it."""
    write_chats: Path | None = None
    """Write the training examples that have an answer to this new file, as conversations for finetune --data, and
    stop."""
    epochs: float = 1.0
    """Length of the training, in passes over the examples. Use --num-iterations to give it in steps."""
    examples_per_step: int = 16
    """Examples in one optimizer step, over all ranks."""
    num_samples: int = 16
    """Answers to each example."""
    mean_rows: Annotated[int, auto_flag("INT", "the largest divisor of --num-samples up to 8")] = UNSET
    """Answers to one example over whose tokens the loss is a mean, a divisor of --num-samples."""
    max_new_tokens: Annotated[int, auto_flag("INT", "256, at most half of the model's sequence")] = UNSET
    """Largest number of tokens in an answer. Examples that leave less room in the model's sequence are left out."""
    temperature: float = 1.0
    """Divisor of the logits from which answers are drawn."""
    top_k: int = 50
    """Answers are drawn from this many of the likeliest tokens. 0: from all."""
    rate_scale: float = 0.05
    """Factor of the learning rates that are not given. They fall to 0 over the training."""
    eval_examples: int = 400
    """Largest number of examples in one evaluation."""
    eval_samples: int = 8
    """Answers to each example of an evaluation. It reports pass@k for the powers of 2 up to this number."""

    data: Annotated[str, auto_flag("PATH", "not used; see --task")] = STDLIB
    """Not a flag of this command."""
    momentum_start: float = 0.95
    """Momentum of Muon at the first step, in [0, 1)."""
    momentum_warmup_steps: int = 0
    """Steps over which the momentum of Muon changes from --momentum-start to --momentum-end."""
    momentum_final: float = 0.95
    """Momentum of Muon at the end of the warmdown, over which it changes from --momentum-end, in [0, 1)."""
    grad_clip: float = 0.0
    """Largest norm of the gradient of all parameters; a larger gradient is scaled down to it. 0: no clipping."""
    eval_every: int = 60
    """Steps between evaluations of pass@k. 0: only at the end."""
    save_every: int = 60
    """Steps between checkpoints. 0: only at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "rate_scale", "temperature"):
            self._require(name, "a finite number > 0", 0 < getattr(self, name) < math.inf)
        for name in ("examples_per_step", "mean_rows", "max_new_tokens", "eval_examples", "eval_samples"):
            self._require(name, "a whole number >= 1", getattr(self, name) >= 1)
        self._require(
            "num_samples",
            "a whole number >= 2, because an answer is compared with the mean of its example",
            self.num_samples >= 2,
        )
        self._require("top_k", "a whole number >= 0", self.top_k >= 0)
        self._require("task", "arithmetic, spelling, gsm8k or a Python file", self.task != "")
        if not is_unset(self, "mean_rows") and self.num_samples % self.mean_rows:
            raise ConfigError(
                f"--mean-rows must be a divisor of --num-samples {self.num_samples}, got {self.mean_rows}"
            )


CHAT_FLAGS = ("chat_tasks", "chat_data", "chat_every", "chat_max_problems")
LOGGER_FLAGS = ("wandb", "trackio")
LOGGER_VALUES = dict.fromkeys(LOGGER_FLAGS, (PROJECT, "None"))  # tyro takes None for a flag that may be unset
LEARNING_RATE_FLAGS = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")
WITH_MUON = ("hybrid", "muon_sgd")
MUON_SWITCHES = ("scale_decay", "cautious", "row_equilibration", "frobenius_renormalisation", "normuon")
NANOCHAT_FORM_ONLY = (
    *("scale_decay", "row_equilibration", "frobenius_renormalisation", "normuon", "per_head"),
    "ns_bfloat16",
)
MUON_FLAGS = (
    "matrix_weight_decay",
    "decay_schedule",
    "ns_steps",
    "ns_coefficients",
    "ns_bfloat16",
    "momentum_start",
    "momentum_end",
    "momentum_warmup_steps",
    "momentum_final",
    "normuon_beta2",
    "per_head",
    "muon_form",
    *MUON_SWITCHES,
)
_HORIZONS = ("num_iterations", "target_flops", "target_param_data_ratio")
_LEAST = {
    "depth": 1,
    "head_dim": 2,
    "n_kv_head": 1,
    "max_seq_len": 2,
    "vocab_size": 265,  # the 256 bytes and the special tokens
    "num_iterations": 1,
    "device_batch_size": 1,
    "total_batch_size": 1,
    "reference_batch_size": 0,
    "rotary_base": 1,
    "eval_every": 0,
    "eval_tokens": 1,
    "core_every": 0,
    "core_max_per_task": 0,
    "sample_every": 0,
    "save_every": 0,
    "keep": 1,
    "diagnose_every": 1,
    "check_replicas_every": 0,
    "ns_steps": 1,
    "momentum_warmup_steps": 0,
    "warmup_steps": 0,
    "seed": 0,
    "max_skipped_steps": 1,
}
_MOST = {"depth": 1000, "head_dim": 4096, "vocab_size": 2**24, "ns_steps": 1000}


def shown(config: TrainConfig, name: str) -> str:
    """Return the value of a flag as text for a message."""
    value = getattr(config, name)
    return "none" if value is None else "auto" if is_unset(config, name) else str(value)


C = TypeVar("C", bound=TrainConfig)


def switches(kind: type[TrainConfig] = TrainConfig) -> tuple[str, ...]:
    """Return the names of the flags whose values are auto, on and off."""
    types = get_type_hints(kind)
    return tuple(f.name for f in dataclasses.fields(kind) if set(get_args(types[f.name])) == {"auto", "on", "off"})


def parse(args: Sequence[str], base: C | None = None, kind: type[C] = TrainConfig) -> C:  # type: ignore[assignment]
    """Return the config of a command line. A flag with the values auto, on and off is on without a value, and off with
    the prefix no-. A flag of LOGGER_FLAGS without a value names PROJECT, and the prefix no- removes it.

    Args:
        base: a config whose values are the defaults; None means the defaults of `kind`.

    Raises:
        ConfigError: for an unknown flag or a wrong value; the message is one line.
        SystemExit: for --help, after printing it.
    """
    with one_line_errors():
        default = kind() if base is None else base
        config: C = tyro.cli(
            type(default),
            prog=f"python -m nanochat_native.{command_of(default)}",
            args=_with_values(args, dict.fromkeys(switches(type(default)), ("on", "off")) | LOGGER_VALUES),
            default=default,
            # A switch that is on in `base` may be given again, or turned off by --no-...
            config=(tyro.conf.FlagCreatePairsOff,) if base is None else (),
        )
    check_values(config, args)
    return config


def _with_values(args: Sequence[str], names: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return a command line with a value for each of the flags `names`: the first one for a flag without a value, and
    the second one for a flag with the prefix no-."""
    on, off = ({flag(prefix + name): name for name in names} for prefix in ("", "no_"))
    found: list[str] = []
    for argument, following in itertools.zip_longest(args, args[1:], fillvalue="--"):
        given = argument.replace("_", "-")
        if given in off:
            found += [flag(off[given]), names[off[given]][1]]
        elif given in on and following.startswith("--"):
            found += [argument, names[on[given]][0]]
        else:
            found.append(argument)
    return found


def command_of(config: TrainConfig) -> str:
    """Return the name of the command that makes such a run."""
    if isinstance(config, ReinforceConfig):
        return "reinforce"
    return "finetune" if isinstance(config, FinetuneConfig) else "train"


def resolve_device(config: C) -> C:
    """Return the config with its device, an absolute path of its data, and what follows from them by resolve_defaults.

    Raises ConfigError for a GPU that is not there, and for a type that the device does not have.
    """
    try:
        device = hardware.pick_device(None if is_unset(config, "device") else config.device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    gpu = device.type == "cuda"
    if gpu and is_unset(config, "dtype"):
        has_bfloat16 = hardware.gpu_dtype(device) == torch.bfloat16
        config = dataclasses.replace(config, dtype="bfloat16" if has_bfloat16 else "float16")
    data = config.data if config.data in (STDLIB, EXAMPLES) else os.path.abspath(os.path.expanduser(config.data))
    folders = {name: getattr(config, name, None) for name in ("core", "chat_data", "task_data")}
    paths: dict[str, Any] = {k: Path(os.path.abspath(v.expanduser())) for k, v in folders.items() if v is not None}
    config = dataclasses.replace(config, **paths | {"device": device.type, "data": data})
    config = resolve_defaults(config, gpu=gpu)
    _require_types(config)
    return config


def _require_types(config: TrainConfig) -> None:
    """Raise ConfigError for a type of the activations or of the products that the device does not have."""
    if config.dtype == "float16" and config.device == "cpu":
        raise ConfigError("--dtype must be float32 or bfloat16 on a CPU, whose kernels have no float16, got float16")
    if config.dtype == "float16" and config.device == "mps":
        raise ConfigError("--dtype must be float32 or bfloat16 on MPS, got float16")
    if config.fp8 == "off":
        return
    device = torch.device(config.device)
    if not hardware.has_float8(device):
        raise ConfigError(
            f"--fp8 must be off on {hardware.describe(device)}, got {config.fp8}: products in FP8 need a GPU of "
            "compute capability 8.9 or newer"
        )
    if config.dtype != "bfloat16":
        raise ConfigError(f"--fp8 {config.fp8} needs --dtype bfloat16, got {config.dtype}")


def resolve_defaults(config: C, *, gpu: bool) -> C:
    """Return the config with what follows from the recipe, the kind of device and whether data is given, but for the
    steps of the horizon, and for the batch where it follows from the model."""
    if not gpu and config.tokenize != "while-training":
        config = _resolve(config, {"packing": "stream"})  # rows are short there: best fit would crop most tokens
    config = resolve_recipe(config, default=RECIPE)
    today = config.recipe == "today"
    embedded = config.data == STDLIB
    depth = 4 if not gpu else 6 if embedded else 12
    max_seq_len = 256 if not gpu else 1024 if embedded else 2048
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nanochat-native"
    # The scaling law of the decay is for a training of hours; in one of minutes it would make the weights vanish.
    config = _resolve(config, {"reference_batch_size": REFERENCE_BATCH if gpu else 0})
    values: dict[str, Any] = {
        "depth": depth,
        "max_seq_len": max_seq_len,
        "vocab_size": 32768 if gpu and not embedded else 8192,
        "validation": "shards" if config.packing == "bestfit" else "fraction",
        "dtype": "bfloat16" if gpu else "float32",
        "backend": os.environ.get("NANOCHAT_NATIVE_BACKEND", "native"),
        "cache_dir": cache,
        "run": f"d{depth if is_unset(config, 'depth') else config.depth}",
        "eval_tokens": 20 * 524288 if gpu else 32768,
    }
    if not gpu or embedded:
        values["total_batch_size"] = 65536 if gpu else 2048
    elif config.reference_batch_size == 0:
        values["total_batch_size"] = 524288
    if config.core is not None:
        values |= {"core_every": CORE_EVERY, "core_max_per_task": CORE_ITEMS}
    if isinstance(config, ChatTrainConfig) and config.chat_tasks:
        values["chat_every"] = CHAT_EVERY
    if all(is_unset(config, name) for name in _HORIZONS):
        ratio = (0.14 if today else 0.1) if not gpu else 1.0 if embedded else 12.0 if today else 20.0
        values["target_param_data_ratio"] = ratio
    config = _resolve(config, values)
    has_own_form = config.optimizer in WITH_MUON and config.muon_form == "nanochat"
    return _resolve(config, {"ns_bfloat16": "on" if has_own_form and config.dtype == "bfloat16" else "off"})


def resolve_recipe(config: C, *, default: str) -> C:
    """Return the config with its recipe and its architecture, and the values that they give to flags.

    An optimizer without Muon, and a form of Muon other than nanochat's, take the values of the first recipe for the
    flags of Muon: they have no other.

    Args:
        default: the recipe if the config names none.
    """
    config = _resolve(config, {"recipe": default})
    values = dict(RECIPES[config.recipe])
    plain = config.optimizer not in WITH_MUON or config.muon_form != "nanochat"
    if plain:
        values |= {name: value for name, value in RECIPES["october"].items() if name in MUON_FLAGS}
    if plain or isinstance(config, FinetuneConfig):
        values.pop("momentum_final", None)
    if config.data == STDLIB:
        values["packing"] = "stream"
    if config.tokenize == "while-training":
        values["packing"] = "bestfit"
    if not is_unset(config, "warmup_ratio"):
        values["warmup_steps"] = 0
    elif not is_unset(config, "warmup_steps"):
        values["warmup_ratio"] = 0.0
    config = _resolve(config, values)
    parts = ARCHITECTURES[config.architecture]
    values = {name: ("off", "on")[parts[name]] if isinstance(parts[name], bool) else parts[name] for name in PARTS}
    values |= {"window_pattern": WINDOW_PATTERNS[config.architecture], "momentum_final": config.momentum_end}
    return _resolve(config, values)


def resolve_horizon(config: C, *, num_params: int, flops_per_token: int) -> C:
    """Return the config with its number of steps, from the target that is set, and the intervals that follow from it.

    The recipe today leaves out the last part of the target's tokens, if it is shorter than a batch.

    Args:
        config: as `resolve_defaults` returns it, with its batch.
        num_params: parameters of the model that --target-param-data-ratio counts.

    Raises:
        ConfigError: for a target of more than LARGEST steps.
    """
    steps = config.num_iterations
    if not is_unset(config, "target_flops"):
        steps = max(1, round(config.target_flops / (flops_per_token * config.total_batch_size)))
    elif not is_unset(config, "target_param_data_ratio"):
        tokens = min(config.target_param_data_ratio * num_params, float(LARGEST) ** 2)
        whole = config.recipe == "today" and tokens < LARGEST
        steps = max(1, int(tokens) // config.total_batch_size if whole else round(tokens / config.total_batch_size))
    if steps > LARGEST:
        name = "target_param_data_ratio" if is_unset(config, "target_flops") else "target_flops"
        raise ConfigError(f"{flag(name)} is {getattr(config, name)}; that is more than {LARGEST} steps")
    values = {
        "eval_every": min(250, math.ceil(steps / 5)),
        "sample_every": min(1000, math.ceil(steps / 4)),
        "save_every": min(1000, math.ceil(steps / 4)),
        "diagnose_every": min(100, math.ceil(steps / 40)),
    }
    fixed = dataclasses.replace(config, num_iterations=steps, target_flops=UNSET, target_param_data_ratio=UNSET)
    return _resolve(fixed, values)


def _resolve(config: C, values: dict[str, Any]) -> C:
    """Return the config with `values` for those of their flags that are unset."""
    return dataclasses.replace(config, **{name: value for name, value in values.items() if is_unset(config, name)})


def flags_of_model(shape: GPTConfig) -> dict[str, Any]:
    """Return the flags that name the architecture of a model, which is the nearer one, its windows and its parts."""
    parts = {name: getattr(shape, name) for name in PARTS}
    flags = {name: ("off", "on")[value] if isinstance(value, bool) else value for name, value in parts.items()}
    architecture = min(ARCHITECTURES, key=lambda name: len(shape.parts_beyond(name)))
    return {"architecture": architecture, "window_pattern": shape.window_pattern, **flags}


def reopened(config: C, given: TrainConfig) -> C:
    """Return the config with the values of `given` for the flags whose values follow from the recipe."""
    follow = {name for values in RECIPES.values() for name in values} | set(PARTS)
    names = ("recipe", "window_pattern", "momentum_final", *sorted(follow))
    return dataclasses.replace(config, **{name: getattr(given, name) for name in names})


def upgraded(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the stored flags of a run, of this or an earlier version, in the form of this version.

    Switches of earlier versions were true or false. Their runs have no recipe and no order of the data; theirs are the
    first ones.
    """
    switched = {name: "on" if flags[name] else "off" for name in switches() if isinstance(flags.get(name), bool)}
    own = {"recipe": "october", "packing": "stream", "validation": "fraction", "ns_bfloat16": "off"}
    if "momentum_end" in flags:
        own["momentum_final"] = flags["momentum_end"]
    found = own | flags | switched
    if "batch_rows" in found:  # of fine-tuning
        found["packing"] = "one-per-row" if found["packing"] == "stream" else found["packing"]
        found["mix"] = tuple(found.get("mix", ()))
    if "chat_tasks" in found:
        found["chat_tasks"] = tuple(found["chat_tasks"])
    return found


def to_json(config: TrainConfig) -> dict[str, Any]:
    """Return all flags by name, with paths as text."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}
