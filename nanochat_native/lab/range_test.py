"""The learning-rate range test (Smith, arXiv:1506.01186).

The test makes one step at each rate. The rates rise geometrically until the loss diverges. The rate at which the loss
falls most steeply and the rate at which it is lowest bound the useful range.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nanochat_native.optim.routing import BLOCKS, LM_HEAD, VALUE_EMBEDS, WTE
from nanochat_native.optim.schedule import momentum_at
from nanochat_native.runs import results
from nanochat_native.runs.config import TrainConfig
from nanochat_native.runs.metrics_log import none_if_nonfinite
from nanochat_native.runtime.console import Console, bar
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.signals import StopSignals
from nanochat_native.training import report, resolve
from nanochat_native.training.trainer import Trainer

HALF_WINDOW = 0.04  # share of the steps on each side of a point that its slope and its mean use
RECENT = 3  # losses whose mean decides whether the test has diverged
MARGIN = 4.0  # the suggestion is at least the rate of the lowest loss divided by this
GROUPS = {
    "matrix": (BLOCKS,),
    "embedding": (WTE, VALUE_EMBEDS),
    "unembedding": (LM_HEAD,),
    "scalar": ("resid_lambdas", "x0_lambdas"),
}


@dataclass
class Options:
    """Find a learning rate: raise it at each step until the loss diverges, and find where the loss falls fastest.

    Rates are factors of the rates that a run would use ("x1"). All flags of train are accepted too, e.g.
    --depth 6 --optimizer adamw --data my_texts/: `python -m nanochat_native.train --help` lists them.

    The guide explains it: docs/guide/10-rates-schedules-batches.md.
    """

    group: Literal["all", "matrix", "embedding", "unembedding", "scalar", "each"] = "all"
    """The parameters whose rate rises: all together; one group, with the others frozen; or each group in turn."""
    steps: int = 100
    """Number of steps from --floor to --ceiling, one for each rate."""
    floor: float = 1e-3
    """First factor."""
    ceiling: float = 1e3
    """Last factor; the test stops earlier if the loss diverges."""
    warmup_steps: int | None = None
    """Steps of all groups at a factor of 1 before the test, not train's flag of this name; default: 0, or 20 for a
    single group. Without them most gradients are 0, because lm_head starts at 0."""
    out: Path | None = None
    """Folder for result.json and the picture; default: lab/lr_find, or the next free name."""

    def __post_init__(self) -> None:
        if not 0 < self.floor < self.ceiling < math.inf:
            raise ConfigError(
                f"--floor and --ceiling must be 0 < floor < ceiling, got --floor {self.floor} --ceiling {self.ceiling}"
            )
        if self.warmup_steps is None:
            self.warmup_steps = 0 if self.group == "all" else 20
        if self.steps < 20:
            raise ConfigError(f"--steps must be at least 20, got {self.steps}")
        if self.warmup_steps < 0:
            raise ConfigError(f"--warmup-steps must be at least 0, got {self.warmup_steps}")


@dataclass(frozen=True)
class Suggestion:
    """The suggestion of a range test.

    Attributes:
        rate: the suggested rate, or None.
        reason: the explanation for the user.
        steepest: the rate at which ln(loss) falls fastest over ln(rate).
        lowest: the rate at which the smoothed loss is lowest.
        smoothed: for each rate the mean loss over a window.
    """

    rate: float | None
    reason: str
    steepest: float
    lowest: float
    smoothed: list[float]


def range_test(
    try_rate: Callable[[float], float],
    *,
    floor: float,
    ceiling: float,
    steps: int,
    keep_going: Callable[[int, float, float], bool] = lambda done, rate, loss: True,
) -> tuple[list[float], list[float], bool]:
    """Run a range test. Returns (rates, losses, whether the loss diverged).

    The rates go from floor to ceiling in `steps` equal factors. The test ends early at a loss that is not finite, which
    is dropped; when the mean of the last 3 losses exceeds the lowest such mean by half of the total decrease and by a
    tenth of that mean; or when keep_going returns False.

    Args:
        try_rate: makes one step at a rate and returns the loss after it.
        keep_going: is called with (steps done, rate, loss) after each step.
    """
    rates: list[float] = []
    losses: list[float] = []
    means: list[float] = []
    for i in range(steps):
        rate = floor * (ceiling / floor) ** (i / (steps - 1))
        loss = try_rate(rate)
        if not math.isfinite(loss):
            return rates, losses, True
        rates.append(rate)
        losses.append(loss)
        means.append(sum(losses[-RECENT:]) / len(losses[-RECENT:]))
        best = min(means)
        if means[-1] > best + max((means[0] - best) / 2, best / 10):
            return rates, losses, True
        if not keep_going(i + 1, rate, loss):
            break
    return rates, losses, False


def suggest(rates: Sequence[float], losses: Sequence[float], *, steps: int, diverged: bool) -> Suggestion:
    """Return the suggestion of a range test that planned `steps` steps.

    The suggested rate is the larger of two: the rate at which the loss falls most steeply, and a quarter of the rate at
    which it is lowest. It is at most half of the latter. On a quadratic the loss starts to rise at twice the best rate,
    and falls fastest near the best rate.
    """
    side = max(1, round(HALF_WINDOW * steps))
    if len(rates) < 2 * side + 3:
        more = "use a lower --floor" if diverged else "the test was stopped"
        return Suggestion(None, f"the test ended after {len(rates)} rates; {more}", math.nan, math.nan, [])
    smoothed, slopes = [], []
    for i in range(len(rates)):
        near = range(max(0, i - side), min(len(rates), i + side + 1))
        smoothed.append(sum(losses[j] for j in near) / len(near))
        slopes.append(_slope([math.log(rates[j]) for j in near], [math.log(max(losses[j], 1e-300)) for j in near]))
    turn = min(range(len(rates)), key=smoothed.__getitem__)
    steep = min(range(turn + 1), key=slopes.__getitem__)
    steepest, lowest = rates[steep], rates[turn]

    def found(rate: float | None, reason: str) -> Suggestion:
        return Suggestion(rate, reason, steepest, lowest, smoothed)

    if smoothed[turn] > 0.99 * smoothed[0]:
        return found(None, "the loss never fell by 1%; use another --floor or --ceiling")
    if not diverged and turn >= len(rates) - 1 - side:
        more = "use a higher --ceiling" if len(rates) == steps else "the test was stopped"
        return found(None, f"the loss was still falling at {rates[-1]:.3g}; {more}")
    rate = min(max(steepest, lowest / MARGIN), lowest / 2)
    where = f"the loss falls most steeply at {steepest:.3g} and is lowest at {lowest:.3g}"
    if rate == steepest:
        return found(rate, f"{where}; the suggestion is the steepest point")
    return found(rate, f"{where}; the suggestion is {lowest / rate:.2g} times below the lowest")


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the least-squares line."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def find_rate(trainer: Trainer, options: Options, group: str, stopping: StopSignals) -> dict[str, Any]:
    """Run a range test with the steps of a trainer. Every loss is measured on the same batch of validation text.

    The model and the optimizers are restored, bit for bit.
    """
    assert options.warmup_steps is not None
    model, optimizers = trainer.model, trainer.optimizers
    before = copy.deepcopy((model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]))
    chosen = [
        settings
        for optimizer in optimizers
        for settings in optimizer.param_groups
        if group == "all" or settings["param_names"][0].startswith(GROUPS[group])
    ]

    def report_step(done: int, rate: float, loss: float) -> bool:
        trainer.console.live(f"{group} {bar(done, options.steps)} | x{rate:.3g} | loss {loss:.3f}")
        return not stopping.signal

    held_out = list(trainer.validation_batches(trainer.config.total_batch_size))
    with trainer.loader.iterate(0) as batches:
        for step in range(options.warmup_steps):
            if stopping.signal:
                break
            trainer.console.live(f"{group} warm-up {bar(step + 1, options.warmup_steps)}")
            trainer.compute_gradients(next(batches))
            trainer.set_rates(1.0, momentum_at(step, trainer.config))
            trainer.update()
            trainer.zero_grad()
        trainer.compute_gradients(next(batches))
        step = options.warmup_steps

        def try_rate(factor: float) -> float:
            nonlocal step
            trainer.set_rates(0.0, momentum_at(step, trainer.config))
            for settings in chosen:
                settings["lr"] = settings["initial_lr"] * factor
            trainer.update()
            trainer.zero_grad()
            step += 1
            _, norm = trainer.compute_gradients(next(batches))
            return trainer.measure(held_out).loss if math.isfinite(norm) else math.nan

        rates, losses, diverged = range_test(
            try_rate, floor=options.floor, ceiling=options.ceiling, steps=options.steps, keep_going=report_step
        )
    trainer.zero_grad()
    model.load_state_dict(before[0])
    for optimizer, state in zip(optimizers, before[1], strict=True):
        optimizer.load_state_dict(state)
    trainer.console.end_line()
    found = suggest(rates, losses, steps=options.steps, diverged=diverged)
    return {
        "group": group,
        "factors": rates,
        "losses": losses,
        "diverged": diverged,
        "smoothed": found.smoothed,
        "steepest": none_if_nonfinite(found.steepest),
        "lowest": none_if_nonfinite(found.lowest),
        "suggestion": found.rate,
        "reason": found.reason,
    }


def suggested_rates(config: TrainConfig, tests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the learning rates to train with, by the names of their flags: a run's rates times the suggestions."""
    found = {}
    for test in tests:
        for name, rate in resolve.learning_rates(config).items():
            if test["group"] in ("all", name.removesuffix("_lr")) and test["suggestion"] is not None:
                found[name] = float(f"{rate * test['suggestion']:.3g}")
    return found


class Outcome(NamedTuple):
    """The learning rates to train with, by the names of their flags, and the signal that stopped the test, or 0."""

    rates: dict[str, float]
    signal: int


def run(options: Options, config: TrainConfig, console: Console) -> Outcome:
    """Test the groups that the options name, print the suggestions, and write the result with its picture."""
    trainer = Trainer(config, console)
    trainer.refuse_loss_scaling()
    config = trainer.config
    groups = list(GROUPS) if options.group == "each" else [options.group]
    if config.residual_scalars == "off":
        if options.group == "scalar":
            raise ConfigError("--group scalar needs a model with --residual-scalars on")
        groups = [group for group in groups if group != "scalar"]
    folder = results.open_folder(options.out, "lr_find")
    console.say(f"test     {report.describe_run(trainer.setup)}, {options.steps} steps for each test")
    tests: list[dict[str, Any]] = []
    with StopSignals("the results so far are kept") as stopping:
        for group in groups:
            if not stopping.signal:
                tests.append(find_rate(trainer, options, group, stopping))
    for test in tests:
        factor = test["suggestion"]
        console.say(f"{test['group']:<12} {'no rate' if factor is None else f'x{factor:.3g}'}: {test['reason']}")
    rates = suggested_rates(config, tests)
    record = results.result(
        "lr_find",
        options,
        config,
        finished=not stopping.signal,
        tests=tests,
        rates=resolve.learning_rates(config),
        flags=rates,
    )
    results.finish(folder, record, console)
    return Outcome(rates, stopping.signal)
