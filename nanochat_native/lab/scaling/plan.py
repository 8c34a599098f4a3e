"""The flags of the scaling command, and the runs that follow from them."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from nanochat_native.data import Corpus
from nanochat_native.lab.command_flags import on_gpu
from nanochat_native.lab.memory.prediction import STATE
from nanochat_native.model.gpt import GPT
from nanochat_native.runs.config import TrainConfig, resolve_horizon
from nanochat_native.runtime import hardware
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import UNSET, auto_flag, flag, is_unset
from nanochat_native.training import resolve, scaling_laws, sizing
from nanochat_native.training.pretraining import Pretraining
from nanochat_native.training.trainer import Trainer

LEAST_STEPS = 8  # of a run; rounding to the nearest step then changes its FLOPs by 6.25% at most
LEAST_DEPTHS = {"miniseries": 2, "isoflop": 3}  # the parameters of a power law, and of a parabola
DEPTHS, DEPTHS_ON_GPU = (1, 2, 3, 4), (2, 4, 6, 8)
BUDGETS, BUDGETS_ON_GPU = (4.5e12, 9e12), (1e15, 3e15, 1e16)
SHARED = TrainConfig(eval_every=0, sample_every=0, keep=1)
# The defaults on a CPU: widths that rise with each layer, and schedules that fit into runs of tens of steps.
ON_CPU = dataclasses.replace(
    SHARED,
    head_dim=64,
    vocab_size=1024,
    total_batch_size=1024,
    eval_tokens=65536,
    warmup_ratio=0.05,
    momentum_warmup_steps=40,
)
Study = Literal["miniseries", "isoflop"]


@dataclass
class Options:
    """Measure how the loss follows from the size of the model and the length of its training.

    miniseries: one recipe at several depths, each trained with --target-param-data-ratio tokens per parameter. isoflop:
    for each budget of floating-point operations, several depths trained until the budget is used; a parabola gives the
    best size at this budget, and a power law the best size at any budget (Hoffmann et al., arXiv:2203.15556). All flags
    of train are accepted too, but for the depth and the number of steps. Each training is a run of train in OUT/runs.
    The same command resumes an experiment.

    The guide explains it: docs/guide/10-rates-schedules-batches.md.
    """

    study: Literal["both", "miniseries", "isoflop"] = "both"
    """The experiments to make."""
    depths: Annotated[
        tuple[int, ...],
        auto_flag("INT [INT ...]", f"{' '.join(map(str, DEPTHS))}; {' '.join(map(str, DEPTHS_ON_GPU))} on a GPU"),
    ] = ()
    """Depths of the models. A parabola needs three or more; more than three show how well it fits."""
    budgets: Annotated[
        tuple[float, ...],
        auto_flag(
            "FLOAT [FLOAT ...]",
            f"{' '.join(f'{b:g}' for b in BUDGETS)}; {' '.join(f'{b:g}' for b in BUDGETS_ON_GPU)} on a GPU",
        ),
    ] = ()
    """Budgets of isoflop, in floating-point operations of a training."""
    seeds: int = 1
    """Number of runs of each model, with the seeds --seed, --seed + 1, ..."""
    dry_run: bool = False
    """Prepare the data, print the runs with their size and an estimate of time and disk, and stop."""
    out: Path | None = None
    """Folder for the runs, result.json, table.md and the picture; default: lab/scaling."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"--seeds must be a whole number >= 1, got {self.seeds}")
        for name, least, needed in (("depths", 1, "whole numbers >= 1"), ("budgets", 0.0, "finite numbers > 0")):
            values: Sequence[float] = getattr(self, name)
            valid = all(least <= value < math.inf and value > 0 for value in values)
            if not valid or len(set(values)) < len(values):
                given = " ".join(f"{value:g}" for value in values)
                raise ConfigError(f"--{name} must be {needed}, each given once, got {given}")
        if self.budgets and self.study == "miniseries":
            raise ConfigError("--budgets is for isoflop, got --study miniseries")
        for study in self.studies:
            if self.depths and len(self.depths) < LEAST_DEPTHS[study]:
                raise ConfigError(
                    f"--depths must be {LEAST_DEPTHS[study]} or more with --study {self.study}, the parameters of the "
                    f"fit of {study}, got {len(self.depths)}"
                )

    @property
    def studies(self) -> tuple[Study, ...]:
        """The experiments to make, in order."""
        return ("miniseries", "isoflop") if self.study == "both" else (self.study,)


def defaults(args: Sequence[str]) -> TrainConfig:
    """Return the defaults of train's flags."""
    return SHARED if on_gpu(args) else ON_CPU


def refuse_own(options: Options, given: TrainConfig) -> None:
    """Raise ConfigError for flags of train whose values the experiment chooses. given: the flags as they were given."""
    length = "--budgets" if "isoflop" in options.studies else "--target-param-data-ratio"
    for name, instead in (("depth", "--depths"), ("num_iterations", length), ("target_flops", length)):
        if not is_unset(given, name):
            raise ConfigError(f"{flag(name)} is for train only; scaling takes {instead}")
    if "miniseries" not in options.studies and not is_unset(given, "target_param_data_ratio"):
        raise ConfigError("--target-param-data-ratio is for miniseries, got --study isoflop")


@dataclass(frozen=True)
class PlannedRun:
    """A run of the experiment.

    Attributes:
        study: the experiment that it belongs to.
        budget: the floating-point operations that it is to take; None in a miniseries.
        config: its flags, with batch and steps.
        params: the parameters of the model.
        size: those that the laws count, see training/scaling_laws.py: the matrices of the blocks and lm_head.
        state_bytes: the bytes of a checkpoint: weights and state of the optimizers.
    """

    study: Study
    budget: float | None
    config: TrainConfig
    params: int
    size: int
    flops_per_token: int
    state_bytes: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return str(self.config.run)

    @property
    def steps(self) -> int:
        return self.config.num_iterations

    @property
    def tokens(self) -> int:
        return self.steps * self.config.total_batch_size

    @property
    def flops(self) -> int:
        return self.tokens * self.flops_per_token

    def described(self) -> dict[str, Any]:
        """Return the plan of the run for result.json."""
        return {
            "name": self.name,
            "study": self.study,
            "budget": self.budget,
            "depth": self.config.depth,
            "seed": self.config.seed,
            "params": self.params,
            "size": self.size,
            "flops_per_token": self.flops_per_token,
            "batch": self.config.total_batch_size,
            "steps": self.steps,
            "tokens": self.tokens,
            "flops": self.flops,
        }


def make_plan(options: Options, config: TrainConfig, corpus: Corpus, folder: Path) -> list[PlannedRun]:
    """Return the runs in their order. config: the flags that all share. folder: that of the runs.

    Raises ConfigError for a budget, or a number of tokens per parameter, that gives a depth fewer than LEAST_STEPS
    steps.
    """
    gpu = config.device == "cuda"
    depths = sorted(options.depths or (DEPTHS_ON_GPU if gpu else DEPTHS))
    targets: list[tuple[Study, float | None]] = []
    for study in options.studies:
        budgets: list[float | None] = [None]
        if study == "isoflop":
            budgets = [*sorted(options.budgets or (BUDGETS_ON_GPU if gpu else BUDGETS))]
        targets += [(study, budget) for budget in budgets]
    return [
        _planned(study, budget, depth, config.seed + i, config, corpus, folder)
        for study, budget in targets
        for depth in depths
        for i in range(options.seeds)
    ]


def _planned(
    study: Study, budget: float | None, depth: int, seed: int, config: TrainConfig, corpus: Corpus, folder: Path
) -> PlannedRun:
    """Return one run, with the size, batch and steps that the trainer gives it."""
    name = f"{study}-{'' if budget is None else f'{budget:g}-'}d{depth}-seed{seed}"
    own: dict[str, Any] = {"depth": depth, "seed": seed, "run": name, "out_dir": folder}
    if budget is not None:
        own |= {"target_flops": budget, "target_param_data_ratio": UNSET}
    config = dataclasses.replace(config, **own)
    try:
        shape = dataclasses.replace(resolve.model_config(config), vocab_size=corpus.vocab_size)
    except ValueError as error:
        raise ConfigError(f"depth {depth}: {error}") from None
    config = resolve.with_batch(config, shape)
    sizing.accumulation_steps(config)
    with torch.device("meta"):
        model = GPT(shape)
    params, size, per_token = model.num_params(), scaling_laws.scaling_params(shape), model.estimate_flops()
    counted = size if config.recipe == "today" else params
    tokens = config.target_param_data_ratio * counted if budget is None else budget / per_token
    if tokens < LEAST_STEPS * config.total_batch_size:
        needed = LEAST_STEPS * config.total_batch_size
        what = f"--budgets {budget:g}" if budget is not None else f"--target-param-data-ratio {tokens / counted:g}"
        least = needed * per_token if budget is not None else needed / counted
        raise ConfigError(
            f"{what} is too small for depth {depth}: it gives {tokens / config.total_batch_size:.3g} steps of "
            f"{config.total_batch_size} tokens, and {LEAST_STEPS} are needed, which takes {rounded_up(least):g} or more"
        )
    config = resolve_horizon(config, num_params=counted, flops_per_token=per_token)
    matrices = size - shape.padded_vocab_size * shape.n_embd
    others, of_matrices = STATE[config.optimizer]
    state = 4 * ((1 + others) * params - (others - of_matrices) * matrices)
    return PlannedRun(study, budget, config, params, size, per_token, state)


def rounded_up(value: float) -> float:
    """Return the least number with three digits that is not below a number > 0."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.3g}")


def estimate_seconds(planned: PlannedRun, corpus: Corpus) -> float:
    """Return an estimate of the time of a run: from the measured times of a micro-batch and of an update, and the
    tokens of the evaluations at its start and its end, each a third of a training token."""
    trainer = Trainer(planned.config, SilentConsole(), task=Pretraining(corpus))
    inputs, targets = next(trainer.micro_batches(trainer.loader.batch(0)))

    def timed() -> tuple[float, float]:
        start = time.perf_counter()
        with trainer.autocast():
            loss = trainer.model(inputs, targets)
        loss.backward()
        loss.item()  # on a GPU, wait
        between = time.perf_counter()
        trainer.update()
        trainer.zero_grad()
        hardware.synchronize(trainer.device)
        return between - start, time.perf_counter() - between

    timed()  # the first call is slower: it allocates memory
    micro, update = (min(values) for values in zip(timed(), timed(), strict=True))
    steps = planned.steps * (trainer.accumulation_steps * micro + update)
    evaluated = min(trainer.config.eval_tokens, len(corpus.val))
    return steps + 2 / 3 * evaluated * micro / inputs.numel()
