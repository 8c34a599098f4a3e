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

STDLIB = "stdlib"  # --data: the embedded default
EXAMPLES = "examples"  # --data of finetune: the embedded conversations


@dataclass(frozen=True)
class TrainConfig:
    """Train a nanochat-style GPT. Without any flag: a small model of Python code, in minutes."""

    depth: Annotated[int, auto_flag("INT", "4 on a CPU, 12 on a GPU, 6 on a GPU without --data")] = UNSET
    """Layers. The one dial: width is 64 times this, and heads, learning rates and horizon follow."""
    head_dim: int = 128
    """Channels of one attention head, at most."""
    n_kv_head: Annotated[int, auto_flag("INT", "as many as query heads")] = UNSET
    """Key/value heads; a divisor of the query heads (1 is MQA)."""
    window_pattern: str = "L"
    """Attention windows, one letter a layer, repeated: L all of the past, S a quarter of the sequence, e.g. SSSL."""
    max_seq_len: Annotated[int, auto_flag("INT", "2048 on a GPU, 1024 there without --data, 256 on a CPU")] = UNSET
    """Tokens in one sequence."""
    vocab_size: Annotated[int, auto_flag("INT", "32768 on a GPU with --data, else 8192")] = UNSET
    """Tokens in the vocabulary."""
    grad_checkpoint: bool = False
    """Compute each block again in the backward pass instead of keeping its activations: less memory, a third more
    work."""

    num_iterations: Annotated[int, auto_flag("INT", "from --target-param-data-ratio")] = UNSET
    """Horizon, optimizer steps. With --resume it may be raised, to train on."""
    target_flops: Annotated[float, auto_flag("FLOAT", "not used")] = UNSET
    """Horizon, floating-point operations in all."""
    target_param_data_ratio: Annotated[float, auto_flag("FLOAT", "20 on a GPU, 1 without --data, 0.1 on a CPU")] = UNSET
    """Horizon, training tokens per parameter."""
    device_batch_size: Annotated[int, auto_flag("INT", "what fits the GPU; 8 on a CPU")] = UNSET
    """Sequences that go through the model at once; gradients accumulate up to --total-batch-size."""
    total_batch_size: Annotated[int, auto_flag("INT", "524288 on a GPU, 65536 there without --data, 2048 on a CPU")] = (
        UNSET
    )
    """Tokens of one optimizer step."""

    optimizer: Literal["hybrid", "muon_sgd", "adamw", "adam", "sgd_momentum", "sgd"] = "hybrid"
    """hybrid: Muon for the matrices of the blocks, AdamW for wte and lm_head; muon_sgd: SGD for the two. The others
    take every parameter."""
    matrix_lr: Annotated[float, auto_flag("FLOAT", "0.02 with Muon, 0.002 with adamw and adam, else 0.3 or 0.1")] = (
        UNSET
    )
    """Learning rate of the matrices of the blocks; of adamw and adam at width 768, scaled by (width / 768)^-0.5."""
    embedding_lr: Annotated[float, auto_flag("FLOAT", "0.2; 0.3 with SGD, 0.1 with sgd_momentum")] = UNSET
    """Learning rate of wte at width 768, scaled by (width / 768)^-0.5; of SGD as it is."""
    unembedding_lr: Annotated[float, auto_flag("FLOAT", "0.004; 0.3 with SGD, 0.1 with sgd_momentum")] = UNSET
    """Learning rate of lm_head at width 768, scaled likewise."""
    weight_decay: float = 0.0
    """Decay of wte and lm_head, a fraction of their learning rate (adam and sgd: an L2 penalty on everything)."""
    matrix_weight_decay: float = 0.0
    """Decay of the matrices of the blocks under Muon, a fraction of their learning rate."""
    ns_steps: int = 5
    """Steps of Newton-Schulz in an update of Muon."""
    ns_coefficients: Literal["quintic", "polar_express", "cubic"] = "quintic"
    """Polynomials of Newton-Schulz: quintic (Jordan's), polar_express (another for each step), cubic (1.5, -0.5)."""
    momentum_start: float = 0.85
    """Muon's momentum at the first step, 0 to below 1."""
    momentum_end: float = 0.95
    """Muon's momentum after --momentum-warmup-steps, 0 to below 1."""
    momentum_warmup_steps: int = 300
    """Steps over which Muon's momentum goes from the one to the other."""
    cautious: bool = False
    """Muon decays only the elements that its update moves towards 0."""
    row_equilibration: bool = False
    """Muon divides the rows of its momentum by their norms before it orthogonalises."""
    frobenius_renormalisation: bool = False
    """Muon scales its updates to the Frobenius norm of an orthogonal matrix."""
    normuon: bool = False
    """NorMuon: Muon evens out the variance of its updates' rows."""
    per_head: bool = False
    """Muon orthogonalises the attention's matrices head by head."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    schedule: Literal["linear", "cosine", "exponential", "step", "constant"] = "linear"
    """Shape of the decay over the warmdown."""
    warmup_ratio: float = 0.0
    """Part of the horizon over which the learning rate rises from 0, 0 to 1."""
    warmdown_ratio: float = 0.2
    """Part of the horizon over which the learning rate falls, 0 to 1."""
    final_lr_frac: float = 0.0
    """Learning rate at the end, a fraction of its full value, 0 to 1."""
    skip_spikes: float = 0.0
    """Skip a step whose loss or gradient norm is so many standard deviations above the last 128; 0 skips none."""
    max_skipped_steps: int = 10
    """Stop after this many skipped steps in a row: those whose gradient was not finite, and spikes."""

    data: Annotated[str, auto_flag("PATH", "stdlib, the sources of Python's standard library")] = STDLIB
    """File, folder or glob of text, .jsonl, .ndjson or .json (.gz, .zst), .parquet or llm.c token shards (.bin)."""
    text_column: Annotated[str | None, auto_flag("STR", "found: text in most records")] = None
    """Field of the records of .jsonl, .ndjson, .json and .parquet that holds the text."""
    cache_dir: Annotated[Path | None, auto_flag("PATH", "~/.cache/nanochat-native, or below XDG_CACHE_HOME")] = None
    """Where tokenizers and token shards are kept between runs."""
    eval_every: Annotated[int, auto_flag("INT", "a fifth of the horizon, at most 250")] = UNSET
    """Steps between measurements of validation bits per byte; 0: only at the end."""
    eval_tokens: Annotated[int, auto_flag("INT", "10485760 on a GPU, 32768 on a CPU")] = UNSET
    """Validation tokens of one measurement, at most."""
    sample_every: Annotated[int, auto_flag("INT", "a quarter of the horizon, at most 1000")] = UNSET
    """Steps between samples of text; 0: only at the end."""
    save_every: Annotated[int, auto_flag("INT", "a quarter of the horizon, at most 1000")] = UNSET
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints kept, the newest."""
    diagnose: bool = False
    """Look into the layers: norms of gradients and updates, orthogonality, attention's logits, dead units; a report as
    diagnosis.png."""
    diagnose_every: Annotated[int, auto_flag("INT", "a fortieth of the horizon, at most 100")] = UNSET
    """Steps between such looks."""

    run: Annotated[str | None, auto_flag("STR", "d<depth>")] = None
    """Name of the run: its folder is OUT_DIR/RUN."""
    out_dir: Path = Path("runs")
    """Folder of all runs."""
    resume: Annotated[str | None, auto_flag("auto|PATH", "a new run")] = None
    """Go on from the newest intact checkpoint: of OUT_DIR/RUN (auto; a new run if there is none) or of a run's
    folder."""
    overwrite: bool = False
    """Delete the run that is in OUT_DIR/RUN, and start anew."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the activations; parameters are float32. auto: bfloat16 on a GPU, else float32."""
    backend: Literal["auto", "native", "torch"] = "auto"
    """Hand-written kernels, or their plain-torch twins. auto: what NANOCHAT_NATIVE_BACKEND says, else native."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradients travel in between ranks."""
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    """What weights travel in between ranks; with bfloat16 their owners keep them exact, and all compute with the
    rounded ones."""
    check_replicas_every: int = 100
    """Steps between comparisons of all ranks' weights, bit by bit; 0: never."""
    dry_run: bool = False
    """Prepare the data, print what would be done, and stop."""
    print_config: bool = False
    """Print every flag with its value as JSON, and stop."""
    json: bool = False
    """Print records as JSON lines to stdout, and messages to stderr."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            most = _MOST.get(name, math.inf)
            takes = f"a whole number from {least}" + (f" to {most}" if name in _MOST else "")
            self._require(name, takes, least <= getattr(self, name) <= most)
        for name in ("target_flops", "target_param_data_ratio"):
            self._require(name, "a finite number above 0", 0 < getattr(self, name) < math.inf)
        for name in ("warmup_ratio", "warmdown_ratio", "final_lr_frac"):
            self._require(name, "a number from 0 to 1", 0 <= getattr(self, name) <= 1)
        for name in (
            "matrix_lr",
            "embedding_lr",
            "unembedding_lr",
            "weight_decay",
            "matrix_weight_decay",
            "grad_clip",
            "skip_spikes",
        ):
            self._require(name, "a finite number from 0", 0 <= getattr(self, name) < math.inf)
        for name in ("momentum_start", "momentum_end"):
            self._require(name, "a number from 0 to below 1", 0 <= getattr(self, name) < 1)
        self._require("data", "the path of a file or a folder, or a glob", self.data != "")
        self._require("text_column", "the name of a field", self.text_column != "")
        letters = bool(self.window_pattern) and not set(self.window_pattern) - set("LS")
        self._require("window_pattern", "letters L and S, e.g. SSSL", letters)
        if self.run is not None:
            plain = self.run not in ("", "..") and Path(self.run).name == self.run and "\0" not in self.run
            self._require("run", "a name without slashes (--out-dir takes a folder)", plain)

        fields = self.__dataclass_fields__
        of_muon = [name for name in MUON_FLAGS if getattr(self, name) != fields[name].default]
        if of_muon and self.optimizer not in WITH_MUON:
            raise ConfigError(f"{flag(of_muon[0])} is Muon's; --optimizer {self.optimizer} has none")

        if self.warmup_ratio + self.warmdown_ratio > 1:
            raise ConfigError(
                f"--warmup-ratio {self.warmup_ratio} and --warmdown-ratio {self.warmdown_ratio} add up to more than 1"
            )
        if self.schedule in ("exponential", "step") and self.final_lr_frac == 0:
            raise ConfigError(f"--schedule {self.schedule} never reaches 0; give a --final-lr-frac above 0, e.g. 0.1")
        horizons = [name for name in _HORIZONS if not is_unset(self, name)]
        if len(horizons) > 1:
            raise ConfigError(f"{' and '.join(map(flag, horizons))} each set the horizon; give one of them")
        if self.resume is not None and self.overwrite:
            raise ConfigError("--resume goes on with a run and --overwrite deletes it; give one of them")

    def _require(self, name: str, takes: str, right: bool) -> None:
        if not right and not is_unset(self, name):
            raise ConfigError(f"{flag(name)} is {getattr(self, name)!r}; it takes {takes}")

    @property
    def run_dir(self) -> Path:
        return self.out_dir / str(self.run)


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Teach a trained model to chat: training goes on, on conversations, of which it learns what the assistant says.

    Shape and tokenizer are the base model's. The other flags are train's.
    """

    checkpoint: Path | None = None
    """Run folder of the model to begin with, pretrained, imported or fine-tuned; needed for a new run."""
    step: int | None = None
    """Its checkpoint; default: the newest."""
    val_data: str | None = None
    """Conversations to measure on; default: a tenth of --data."""
    epochs: float = 3.0
    """Horizon, times that every conversation is seen; --num-iterations instead gives it in steps."""
    batch_rows: Annotated[int, auto_flag("INT", "32 on a GPU, 8 on a CPU")] = UNSET
    """Conversations of one optimizer step."""
    rate_scale: float = 0.1
    """Learning rates, as a share of those that pretraining begins with, where they are not given themselves."""

    data: Annotated[str, auto_flag("PATH", "examples, some conversations that are made up")] = EXAMPLES
    """Conversations, a JSON object a line: {"messages": [{"role": "user", "content": "..."}, ...]}."""
    warmdown_ratio: float = 1.0
    """Part of the horizon over which the learning rate falls, 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "rate_scale"):
            self._require(name, "a finite number above 0", 0 < getattr(self, name) < math.inf)
        self._require("batch_rows", "a whole number from 1", self.batch_rows >= 1)


LEARNING_RATE_FLAGS = ("embedding_lr", "unembedding_lr", "matrix_lr")
WITH_MUON = ("hybrid", "muon_sgd")
MUON_OPTIONS = ("cautious", "row_equilibration", "frobenius_renormalisation", "normuon", "per_head")
MUON_FLAGS = (
    "matrix_weight_decay",
    "ns_steps",
    "ns_coefficients",
    "momentum_start",
    "momentum_end",
    "momentum_warmup_steps",
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
    """A flag's value for a message."""
    value = getattr(config, name)
    return "none" if value is None else "auto" if is_unset(config, name) else str(value)


C = TypeVar("C", bound=TrainConfig)


def parse(args: Sequence[str], base: C | None = None, kind: type[C] = TrainConfig) -> C:  # type: ignore[assignment]
    """Flags to config; a flag that is not given keeps its value in `base`. kind: of the config, where base is None.

    Raises ConfigError, one line, for an unknown flag or a value that the flag does not take. --help prints and exits.
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
    """The module that makes such a run."""
    return "finetune" if isinstance(config, FinetuneConfig) else "train"


def resolve_device(config: C) -> C:
    """Return the config with its device, an absolute path of its data, and what follows from them by resolve_defaults.

    Raises ConfigError for a GPU that is not there.
    """
    gpu = torch.cuda.is_available() if is_unset(config, "device") else config.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch sees no GPU; take --device cpu")
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
    """Every flag by its name, paths as text."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(config).items()}
