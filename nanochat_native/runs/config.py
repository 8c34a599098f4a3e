"""The flags of `python -m nanochat_native.train`: one flat dataclass, named as nanochat names them.

A flag that is unset (runtime/flags.py) gets its value in steps: from the kind of device and the data by
`resolve_defaults`, from the model by `resolve_horizon`, and from the memory of the device by training/sizing.py.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import LARGEST, UNSET, auto_flag, check_values, flag, is_unset, one_line_errors

STDLIB = "stdlib"  # value of --data for the sources of the standard library
EXAMPLES = "examples"  # value of --data in finetune for the generated conversations


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT like nanochat's. Without flags: a small model of Python code, in minutes.

    The guide explains it: docs/guide/01-one-command.md and docs/guide/08-data-and-the-loop.md.
    """

    depth: Annotated[int, auto_flag("INT", "4 on a CPU, 12 on a GPU, 6 on a GPU without --data")] = UNSET
    """Number of layers. It also sets the size of the model: the width is 64 times the depth, and the number of heads,
    the learning rates and the length of the training follow."""
    head_dim: int = 128
    """Largest number of channels of an attention head."""
    n_kv_head: Annotated[int, auto_flag("INT", "as many as query heads")] = UNSET
    """Number of key/value heads, a divisor of the number of query heads; 1 is multi-query attention."""
    window_pattern: str = "L"
    """Attention window of each layer, a pattern of letters that repeats: L for the whole sequence, S for a quarter of
    it, e.g. SSSL."""
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
    target_param_data_ratio: Annotated[float, auto_flag("FLOAT", "20 on a GPU, 1 without --data, 0.1 on a CPU")] = UNSET
    """Length of the training, in training tokens per parameter."""
    device_batch_size: Annotated[int, auto_flag("INT", "the largest that fits on a GPU; 8 on a CPU")] = UNSET
    """Sequences in one forward and backward pass on one device. Gradients accumulate up to --total-batch-size."""
    total_batch_size: Annotated[int, auto_flag("INT", "524288 on a GPU, 65536 there without --data, 2048 on a CPU")] = (
        UNSET
    )
    """Tokens in one optimizer step, over all devices."""

    optimizer: Literal["hybrid", "muon_sgd", "adamw", "adam", "sgd_momentum", "sgd"] = "hybrid"
    """hybrid: Muon for the weight matrices of the blocks, AdamW for wte and lm_head; muon_sgd: Muon and SGD, in
    the same way. The others train all parameters."""
    matrix_lr: Annotated[float, auto_flag("FLOAT", "0.02 with Muon, 0.002 with adamw and adam, else 0.3 or 0.1")] = (
        UNSET
    )
    """Learning rate of the weight matrices of the blocks. With adamw and adam it is the rate at width 768, and is
    multiplied by (width / 768)^-0.5."""
    embedding_lr: Annotated[float, auto_flag("FLOAT", "0.2; 0.3 with SGD, 0.1 with sgd_momentum")] = UNSET
    """Learning rate of wte, the token embeddings, at width 768. It is multiplied by (width / 768)^-0.5, except with
    SGD."""
    unembedding_lr: Annotated[float, auto_flag("FLOAT", "0.004; 0.3 with SGD, 0.1 with sgd_momentum")] = UNSET
    """Learning rate of lm_head, the output layer, at width 768. It is multiplied like --embedding-lr."""
    weight_decay: float = 0.0
    """Weight decay of the parameters that Muon does not train, as a fraction of their learning rate. With adam and SGD
    it is an L2 penalty."""
    matrix_weight_decay: float = 0.0
    """Weight decay of the parameters that Muon trains, as a fraction of their learning rate."""
    ns_steps: int = 5
    """Newton-Schulz iterations in each update of Muon."""
    ns_coefficients: Literal["quintic", "polar_express", "cubic"] = "quintic"
    """Polynomials of the Newton-Schulz iterations: quintic (Keller Jordan's), polar_express (a different one in each
    iteration) or cubic (1.5, -0.5)."""
    momentum_start: float = 0.85
    """Momentum of Muon at the first step, in [0, 1)."""
    momentum_end: float = 0.95
    """Momentum of Muon after --momentum-warmup-steps, in [0, 1)."""
    momentum_warmup_steps: int = 300
    """Steps over which the momentum of Muon changes from --momentum-start to --momentum-end."""
    cautious: bool = False
    """Muon: apply weight decay only to elements that the update moves towards 0."""
    row_equilibration: bool = False
    """Muon: divide each row of the momentum by its norm before orthogonalisation."""
    frobenius_renormalisation: bool = False
    """Muon: scale each update to the Frobenius norm of an orthogonal matrix."""
    normuon: bool = False
    """Muon: equalise the variance of the rows of each update (NorMuon)."""
    per_head: bool = False
    """Muon: orthogonalise the attention matrices separately for each head."""
    muon_form: Literal["nanochat", "cropped", "momentum_after", "original_guide"] = "nanochat"
    """Muon: nanochat's, or on one rank, for comparison, forms of the original guide. cropped: only the leading square
    of each matrix is updated; momentum_after: the momentum sums orthogonalised gradients; original_guide: both, without
    the factor of the aspect ratio. compare --suite guide uses them."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of all parameters; a larger gradient is scaled down to it. 0: no clipping."""
    schedule: Literal["linear", "cosine", "exponential", "step", "constant"] = "linear"
    """Shape of the learning rate's decay during the warmdown."""
    warmup_ratio: float = 0.0
    """Fraction of the training, at its start, over which the learning rate rises from 0, in [0, 1]."""
    warmdown_ratio: float = 0.2
    """Fraction of the training, at its end, over which the learning rate decays, in [0, 1]."""
    final_lr_frac: float = 0.0
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
    cache_dir: Annotated[Path | None, auto_flag("PATH", "~/.cache/nanochat-native, or below XDG_CACHE_HOME")] = None
    """Folder in which tokenizers and token shards are kept between runs."""
    eval_every: Annotated[int, auto_flag("INT", "a fifth of the training, at most 250")] = UNSET
    """Steps between evaluations of validation bits per byte. 0: only at the end."""
    eval_tokens: Annotated[int, auto_flag("INT", "10485760 on a GPU, 32768 on a CPU")] = UNSET
    """Largest number of validation tokens in one evaluation."""
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: a GPU if there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the activations; parameters are always float32. auto: bfloat16 on a GPU, float32 on a CPU."""
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
            "weight_decay",
            "matrix_weight_decay",
            "grad_clip",
            "skip_spikes",
        ):
            self._require(name, "a finite number >= 0", 0 <= getattr(self, name) < math.inf)
        for name in ("momentum_start", "momentum_end"):
            self._require(name, "a number in [0, 1)", 0 <= getattr(self, name) < 1)
        self._require("data", "a file, a folder or a glob", self.data != "")
        self._require("text_column", "the name of a field", self.text_column != "")
        letters = bool(self.window_pattern) and not set(self.window_pattern) - set("LS")
        self._require("window_pattern", "letters L and S, such as SSSL", letters)
        if self.run is not None:
            plain = self.run not in ("", "..") and Path(self.run).name == self.run and "\0" not in self.run
            self._require("run", "a name without slashes (--out-dir sets the folder)", plain)

        fields = self.__dataclass_fields__
        muon_flags = [name for name in MUON_FLAGS if getattr(self, name) != fields[name].default]
        if muon_flags and self.optimizer not in WITH_MUON:
            raise ConfigError(f"{flag(muon_flags[0])} needs Muon, which --optimizer {self.optimizer} does not use")

        unsupported = [name for name in NANOCHAT_FORM_ONLY if getattr(self, name)]
        if self.muon_form != "nanochat" and unsupported:
            raise ConfigError(f"{flag(unsupported[0])} needs --muon-form nanochat, got {self.muon_form}")

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


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune a trained model on conversations, so that it can chat. Only the assistant's words are trained on.

    The shape of the model and its tokenizer are those of the base model. All other flags are those of train.

    The guide explains it: docs/guide/13-using-it.md.
    """

    checkpoint: Path | None = None
    """Run folder of the base model: pretrained, imported or fine-tuned. A new run needs it."""
    step: int | None = None
    """Step of the checkpoint to use; default: the newest."""
    val_data: str | None = None
    """Conversations to validate on; default: a tenth of --data."""
    epochs: float = 3.0
    """Length of the training, in passes over all conversations. Use --num-iterations to give it in steps."""
    batch_rows: Annotated[int, auto_flag("INT", "32 on a GPU, 8 on a CPU")] = UNSET
    """Conversations in one optimizer step."""
    rate_scale: float = 0.1
    """Factor of the initial learning rates of pretraining. It applies to the rates that are not given."""

    data: Annotated[str, auto_flag("PATH", "examples, some generated conversations")] = EXAMPLES
    """Conversations, one JSON object on each line: {"messages": [{"role": "user", "content": "..."}, ...]}."""
    warmdown_ratio: float = 1.0
    """Fraction of the training, at its end, over which the learning rate decays, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "rate_scale"):
            self._require(name, "a finite number > 0", 0 < getattr(self, name) < math.inf)
        self._require("batch_rows", "a whole number >= 1", self.batch_rows >= 1)


LEARNING_RATE_FLAGS = ("embedding_lr", "unembedding_lr", "matrix_lr")
WITH_MUON = ("hybrid", "muon_sgd")
MUON_OPTIONS = ("cautious", "row_equilibration", "frobenius_renormalisation", "normuon", "per_head")
NANOCHAT_FORM_ONLY = ("row_equilibration", "frobenius_renormalisation", "normuon", "per_head")
MUON_FLAGS = (
    "matrix_weight_decay",
    "ns_steps",
    "ns_coefficients",
    "momentum_start",
    "momentum_end",
    "momentum_warmup_steps",
    "muon_form",
    *MUON_OPTIONS,
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
    "eval_every": 0,
    "eval_tokens": 1,
    "sample_every": 0,
    "save_every": 0,
    "keep": 1,
    "diagnose_every": 1,
    "check_replicas_every": 0,
    "ns_steps": 1,
    "momentum_warmup_steps": 0,
    "seed": 0,
    "max_skipped_steps": 1,
}
_MOST = {"depth": 1000, "head_dim": 4096, "vocab_size": 2**24, "ns_steps": 1000}


def shown(config: TrainConfig, name: str) -> str:
    """Return the value of a flag as text for a message."""
    value = getattr(config, name)
    return "none" if value is None else "auto" if is_unset(config, name) else str(value)


C = TypeVar("C", bound=TrainConfig)


def parse(args: Sequence[str], base: C | None = None, kind: type[C] = TrainConfig) -> C:  # type: ignore[assignment]
    """Return the config of a command line.

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
            args=list(args),
            default=default,
            # A switch that is on in `base` may be given again, or turned off by --no-...
            config=(tyro.conf.FlagCreatePairsOff,) if base is None else (),
        )
    check_values(config, args)
    return config


def command_of(config: TrainConfig) -> str:
    """Return the name of the command that makes such a run."""
    return "finetune" if isinstance(config, FinetuneConfig) else "train"


def resolve_device(config: C) -> C:
    """Return the config with its device, an absolute path of its data, and what follows from them by resolve_defaults.

    Raises ConfigError for a GPU that is not there.
    """
    gpu = torch.cuda.is_available() if is_unset(config, "device") else config.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise ConfigError("--device must be cpu, because torch sees no GPU, got cuda")
    data = config.data if config.data in (STDLIB, EXAMPLES) else os.path.abspath(os.path.expanduser(config.data))
    return resolve_defaults(dataclasses.replace(config, device="cuda" if gpu else "cpu", data=data), gpu=gpu)


def resolve_defaults(config: C, *, gpu: bool) -> C:
    """Return the config with what follows from the kind of device and from whether data is given, but for the steps of
    the horizon."""
    embedded = config.data == STDLIB
    depth = 4 if not gpu else 6 if embedded else 12
    max_seq_len = 256 if not gpu else 1024 if embedded else 2048
    total_batch_size = 2048 if not gpu else 65536 if embedded else 524288
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nanochat-native"
    values: dict[str, Any] = {
        "depth": depth,
        "max_seq_len": max_seq_len,
        "total_batch_size": total_batch_size,
        "vocab_size": 32768 if gpu and not embedded else 8192,
        "dtype": "bfloat16" if gpu else "float32",
        "backend": os.environ.get("NANOCHAT_NATIVE_BACKEND", "native"),
        "cache_dir": cache,
        "run": f"d{depth if is_unset(config, 'depth') else config.depth}",
        "eval_tokens": 20 * 524288 if gpu else 32768,
    }
    if all(is_unset(config, name) for name in _HORIZONS):
        values["target_param_data_ratio"] = 0.1 if not gpu else 1.0 if embedded else 20.0
    return _resolve(config, values)


def resolve_horizon(config: C, *, num_params: int, flops_per_token: int) -> C:
    """Return the config with its number of steps, from the target that is set, and the intervals that follow from it.

    Args:
        config: as `resolve_defaults` returns it.
        num_params: parameters of the model, including wte and lm_head.

    Raises:
        ConfigError: for a target of more than LARGEST steps.
    """
    steps = config.num_iterations
    if not is_unset(config, "target_flops"):
        steps = max(1, round(config.target_flops / (flops_per_token * config.total_batch_size)))
    elif not is_unset(config, "target_param_data_ratio"):
        steps = max(1, round(config.target_param_data_ratio * num_params / config.total_batch_size))
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


def to_json(config: TrainConfig) -> dict[str, Any]:
    """Return all flags by name, with paths as text."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}
