"""python -m nanochat_native.lr_find: the learning-rate range test (Smith, arXiv:1506.01186).

One step at each rate, the rates rising geometrically, until the loss diverges. Where the loss falls most steeply and
where it turns bound the rates that are worth a run.
"""

import copy
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat_native.lab import command_flags
from nanochat_native.optim.routing import BLOCKS, LM_HEAD, WTE
from nanochat_native.optim.schedule import momentum_at
from nanochat_native.runs import results
from nanochat_native.runs.config import TrainConfig
from nanochat_native.runs.metrics_log import none_if_nonfinite
from nanochat_native.runtime.console import Console, bar
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import flag
from nanochat_native.runtime.isolation import ReportFailures
from nanochat_native.runtime.signals import StopSignals
from nanochat_native.training import report, resolve
from nanochat_native.training.trainer import Trainer

WINDOW = 0.04  # of the steps, to each side of a point, for slopes and means
RECENT = 3  # losses, whose mean decides whether the test has diverged
MARGIN = 4.0  # the suggestion is so far below the rate at which the loss turns, if it falls most steeply before
GROUPS = {"matrix": BLOCKS, "embedding": WTE, "unembedding": LM_HEAD}


@dataclass
class Options:
    """Find a learning rate: raise it step by step until the loss diverges, and see where it fell fastest.

    Rates are given as factors of those that a run would use ("x1"). All flags of train are taken too, e.g.
    --depth 6 --optimizer adamw --data my_texts/: `python -m nanochat_native.train --help` lists them.
    """

    group: Literal["all", "matrix", "embedding", "unembedding", "each"] = "all"
    """Whose rate rises: all together, one group of parameters while the others stand still, or each in turn."""
    steps: int = 100
    """Steps from --floor to --ceiling, one for each rate."""
    floor: float = 1e-3
    """The first factor."""
    ceiling: float = 1e3
    """The last factor; the test stops before, when the loss diverges."""
    warmup_steps: int | None = None
    """Steps of all groups at a factor of 1 before the test; default: 0, or 20 for a group alone, which in a new model
    has nothing to go by, because lm_head is 0."""
    out: Path | None = None
    """Folder for result.json and the picture; default: lab/lr_find, or the next that is free."""

    def __post_init__(self) -> None:
        if not 0 < self.floor < self.ceiling < math.inf:
            raise ConfigError(f"--floor {self.floor} and --ceiling {self.ceiling}: takes 0 < floor < ceiling")
        if self.warmup_steps is None:
            self.warmup_steps = 0 if self.group == "all" else 20
        if self.steps < 20 or self.warmup_steps < 0:
            raise ConfigError(f"--steps is {self.steps}, --warmup-steps {self.warmup_steps}; takes at least 20 and 0")


@dataclass(frozen=True)
class Suggestion:
    """rate: None where the test shows none. steepest: rate at which ln(loss) falls fastest over ln(rate). lowest: rate
    at which the smoothed loss is lowest. smoothed: means over a window, of each rate."""

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
    going_on: Callable[[int, float, float], bool] = lambda done, rate, loss: True,
) -> tuple[list[float], list[float], bool]:
    """(rates, losses, whether the loss diverged): try_rate(rate) does one step at a rate and returns the loss after it.

    The rates are floor to ceiling in `steps` equal factors. It ends where the mean of the last 3 losses is above the
    lowest such mean by half of what had been gained, and by a tenth of itself; or at a loss that is not finite, which
    is left out; or when going_on(steps done, rate, loss) is false.
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
        if not going_on(i + 1, rate, loss):
            break
    return rates, losses, False


def suggest(rates: Sequence[float], losses: Sequence[float], *, steps: int, diverged: bool) -> Suggestion:
    """What a range test of so many planned steps says.

    The rate is where the loss falls most steeply, or a quarter of the rate at which it is lowest if that is more; at
    most half of that. On a quadratic the loss turns at twice the best rate, and falls fastest near it.
    """
    side = max(1, round(WINDOW * steps))
    if len(rates) < 2 * side + 3:
        more = "take a lower --floor" if diverged else "the test was stopped"
        return Suggestion(None, f"it ended after {len(rates)} rates; {more}", math.nan, math.nan, [])
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
        return found(None, "the loss never fell by a hundredth; take another --floor or --ceiling")
    if not diverged and turn >= len(rates) - 1 - side:
        more = "take a higher --ceiling" if len(rates) == steps else "the test was stopped"
        return found(None, f"the loss was still falling at {rates[-1]:.3g}; {more}")
    rate = min(max(steepest, lowest / MARGIN), lowest / 2)
    where = f"the loss falls most steeply at {steepest:.3g} and is lowest at {lowest:.3g}"
    if rate == steepest:
        return found(rate, f"{where}: the steepest")
    return found(rate, f"{where}: {lowest / rate:.2g} times below the lowest")


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line of least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def find_rate(trainer: Trainer, options: Options, group: str, stopping: StopSignals) -> dict[str, Any]:
    """A range test of a trainer's own steps, its loss that of one batch of validation text, the same at every rate.

    Model and optimizers are then as they were, bit for bit.
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

    def report(done: int, rate: float, loss: float) -> bool:
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
            try_rate, floor=options.floor, ceiling=options.ceiling, steps=options.steps, going_on=report
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


def flags(config: TrainConfig, tests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The learning rates to train with, by the flags' names: those of a run times what the tests suggest."""
    found = {}
    for test in tests:
        for name, rate in resolve.learning_rates(config).items():
            if test["group"] in ("all", name.removesuffix("_lr")) and test["suggestion"] is not None:
                found[name] = float(f"{rate * test['suggestion']:.3g}")
    return found


def run(args: Sequence[str], failures: ReportFailures) -> int:
    options, config, given = command_flags.configure(Options, "lr_find", args)
    console = Console(failures=failures)
    trainer = Trainer(config, console)
    config = trainer.config
    folder = results.open_folder(options.out, "lr_find")
    console.say(f"test     {report.describe_run(trainer.setup)}, {options.steps} steps for each test")
    groups = list(GROUPS) if options.group == "each" else [options.group]
    tests: list[dict[str, Any]] = []
    with StopSignals("what there is so far is kept") as stopping:
        for group in groups:
            if not stopping.signal:
                tests.append(find_rate(trainer, options, group, stopping))
    for test in tests:
        size = test["suggestion"]
        console.say(f"{test['group']:<12} {'no rate' if size is None else f'x{size:.3g}'}: {test['reason']}")
    found = flags(config, tests)
    done = not stopping.signal
    record = results.result(
        "lr_find", options, config, finished=done, tests=tests, rates=resolve.learning_rates(config), flags=found
    )
    results.finish(folder, record, console)
    if found:
        pasted = [word for name, rate in found.items() for word in (flag(name), f"{rate:g}")]
        console.say(f"train    python -m nanochat_native.train {shlex.join([*given, *pasted])}")
    return 128 + stopping.signal if stopping.signal else 0 if found else 1
