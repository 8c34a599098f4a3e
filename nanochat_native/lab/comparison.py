"""Compare optimizers, or options of Muon, on one model and the same data, each at its own best rate.

A comparison is a set of runs of the trainer. result.json keeps the finished runs, so that a comparison that was stopped
or killed can be resumed. The runs start with new weights, or all from one checkpoint of another run.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import shlex
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from nanochat_native import ops
from nanochat_native.data import Corpus
from nanochat_native.lab import fork
from nanochat_native.lab.command_flags import on_gpu, refuse_run_flags
from nanochat_native.lab.fork import Fork
from nanochat_native.optim.schedule import momentum_at
from nanochat_native.runs import metrics_log, pictures, results
from nanochat_native.runs.config import (
    TrainConfig,
    parse,
    reopened,
    resolve_device,
    resolve_recipe,
    to_json,
    upgraded,
)
from nanochat_native.runs.run_folder import COMPARED_BY_CONTENT, PER_CALL_FLAGS, is_run
from nanochat_native.runtime import hardware
from nanochat_native.runtime.console import Console, SilentConsole, bar
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.files import is_temporary
from nanochat_native.runtime.flags import UNSET, auto_flag, flag, is_unset
from nanochat_native.runtime.timing import side_by_side
from nanochat_native.training import report, resolve
from nanochat_native.training.pretraining import Pretraining
from nanochat_native.training.trainer import Trainer

FACTOR_STEP = 3.0  # between neighbouring factors of the learning rates
MAX_FACTORS = 7  # limit for a case whose best factor stays at the edge
TIMING_SECONDS = 2.0  # time in which the updates of the cases are measured
EVALUATIONS_PER_RUN = 8  # if --eval-every is not given
# Flags of train by the name of the case. The first case is the default baseline.
SUITES: dict[str, dict[str, str]] = {
    "optimizers": {
        "AdamW": "--optimizer adamw --weight-decay 0.01",
        "Adam": "--optimizer adam",
        "SGD": "--optimizer sgd --matrix-lr 3 --embedding-lr 3 --unembedding-lr 3",
        "SGD + momentum": "--optimizer sgd_momentum --matrix-lr 0.3 --embedding-lr 0.3 --unembedding-lr 0.3",
        "Muon + SGD": "--optimizer muon_sgd --embedding-lr 3 --unembedding-lr 3",
        "Muon + AdamW": "--optimizer hybrid",
    },
    "newton_schulz": {
        "quintic, 5 steps": "--ns-coefficients quintic --ns-steps 5",
        "quintic, 3 steps": "--ns-coefficients quintic --ns-steps 3",
        "polar_express, 5 steps": "--ns-coefficients polar_express --ns-steps 5",
        "polar_express, 3 steps": "--ns-coefficients polar_express --ns-steps 3",
        "cubic, 5 steps": "--ns-coefficients cubic --ns-steps 5",
        "cubic, 10 steps": "--ns-coefficients cubic --ns-steps 10",
    },
    "momentum": {
        "0.85 to 0.95 over 300 steps": "",
        "0.95": "--momentum-start 0.95 --momentum-end 0.95",
        "0.85": "--momentum-start 0.85 --momentum-end 0.85",
        "0.85 to 0.95 over 30 steps": "--momentum-warmup-steps 30",
        "0.85 to 0.97 over 400 steps": "--momentum-end 0.97 --momentum-warmup-steps 400",
        "none": "--momentum-start 0 --momentum-end 0",
    },
    "muon": {
        "plain": "",
        "weight decay": "--matrix-weight-decay 0.2",
        "cautious weight decay": "--matrix-weight-decay 0.2 --cautious",
        "NorMuon": "--normuon",
        "row equilibration": "--row-equilibration",
        "Frobenius renormalisation": "--frobenius-renormalisation",
        "per head": "--per-head",
    },
    # All with the same rows, because a run is validated on rows of the kind that it is trained on.
    "recipes": {
        "october": "--recipe october --packing stream",
        "today": "--recipe today --packing stream",
        "today's model, october's recipe": "--recipe october --architecture today --packing stream",
        "october's model, today's recipe": "--recipe today --architecture october --packing stream",
    },
    "parts": {
        "today": "",
        "no value embeddings": "--value-embeddings off",
        "no residual scalars": "--residual-scalars off",
        "no smear": "--smear off",
        "no backout": "--backout off",
        "q and k not scaled": "--qk-scale 1",
        "rotary base 10000": "--rotary-base 10000",
        "no short windows": "--window-pattern L",
        "no NorMuon": "--normuon off",
        "no row equilibration": "--row-equilibration off",
        "no Frobenius renormalisation": "--frobenius-renormalisation off",
        "no cautious decay": "--cautious off",
        "constant decay": "--decay-schedule constant",
        "no weight decay": "--matrix-weight-decay 0",
        "no warm-up": "--warmup-steps 0",
        "no fall of the momentum": "--momentum-final 0.97",
        "quintic": "--ns-coefficients quintic",
    },
    # The factors multiply the learning rates of all groups. The momentum that comes after makes longer steps, so its
    # matrices start at a lower rate.
    "guide": {
        "AdamW": "--optimizer adamw --weight-decay 0.01",
        "Muon + AdamW": "",
        "cubic": "--ns-coefficients cubic",
        "cropped to a square": "--muon-form cropped",
        "momentum after": "--muon-form momentum_after --matrix-lr 0.006",
        "original guide": "--muon-form original_guide --ns-coefficients cubic",
    },
}
# The recipe of the suites; those of October test one change of it at a time.
RECIPE_OF_SUITE = dict.fromkeys(SUITES, "october") | {"recipes": "auto", "parts": "today"}
# The defaults on a CPU: a model so small that the default comparison takes minutes.
CPU_DEFAULTS = TrainConfig(
    depth=2, vocab_size=1024, max_seq_len=128, total_batch_size=1024, num_iterations=64, eval_tokens=8192
)
# For the suite parts: a sequence that is longer than a short window, and schedules that fit into the run.
PARTS_ON_CPU: dict[str, Any] = {
    "max_seq_len": 256,
    "total_batch_size": 2048,
    "momentum_warmup_steps": 16,
    "warmup_steps": 4,
}


@dataclass
class Options:
    """Compare optimizers on one model and the same data, each at its own best rate.

    Every case first runs at several factors of its learning rates: x1/3, x1, x3, and more while the best factor is at
    the edge. It then runs at the best factor with more seeds. All flags of train are accepted too, and apply to every
    case: e.g. --depth 4 --num-iterations 400. Without a GPU the defaults are a model of 0.7M parameters and 64 steps.
    The same command resumes a comparison.

    With --fork all cases continue from one checkpoint of a run, e.g. each with its own schedule.

    The guide explains it: docs/guide/09-optimizers.md and docs/guide/10-rates-schedules-batches.md.
    """

    suite: Literal["optimizers", "newton_schulz", "momentum", "muon", "recipes", "parts", "guide"] = "optimizers"
    """Cases to compare: optimizers, coefficients and steps of Newton-Schulz, Muon's momentum, Muon's options,
    nanochat's recipes and models, today's recipe without each of its parts, or the Muon of the original guide
    (docs/guide/a-original-guide.md) and each of its differences from ours. Unless --recipe is given, all but recipes
    and parts use the recipe of October 2025."""
    cases: tuple[str, ...] = ()
    """Own cases instead of a suite, each "name: flags of train", e.g. "warm: --warmup-ratio 0.1" "cold:"."""
    fork: Path | None = None
    """Folder of a run of train: every case continues from the weights, the optimizer state and the step of one of its
    checkpoints. The flags of train default to those of this run, and its model, data and batch are kept."""
    fork_step: int | None = None
    """Step of the checkpoint to fork; default: the newest."""
    seeds: Annotated[int, auto_flag("INT", "2, or 1 with --fork")] = UNSET
    """Number of runs of each case at its best rate, with the seeds --seed, --seed + 1, ... With --fork the seeds change
    only the order of the data."""
    rates: Annotated[int, auto_flag("INT", "3, or 1 with --fork")] = UNSET
    """Number of factors to start with, odd; 1 disables the search."""
    baseline: str | None = None
    """Case whose final loss the others must reach; default: the first case, for optimizers AdamW."""
    out: Path | None = None
    """Folder for result.json, table.md, the picture, and the unfinished runs; default: lab/compare-<suite>, or
    lab/compare-own for --cases, with -from-<run>-<step> for --fork."""

    def __post_init__(self) -> None:
        if self.fork is None and self.fork_step is not None:
            raise ConfigError("--fork-step needs --fork, the run that it is a step of")
        if is_unset(self, "seeds"):
            self.seeds = 2 if self.fork is None else 1
        if is_unset(self, "rates"):
            self.rates = 3 if self.fork is None else 1
        if self.seeds < 1:
            raise ConfigError(f"--seeds must be at least 1, got {self.seeds}")
        if self.rates < 1 or self.rates % 2 == 0:
            raise ConfigError(f"--rates must be an odd number >= 1, got {self.rates}")

    def selected_cases(self) -> dict[str, str]:
        """Return the flags of each case by its name."""
        if not self.cases:
            return SUITES[self.suite]
        pairs = [[part.strip() for part in case.partition(":")] for case in self.cases]
        if not all(colon and name for name, colon, _ in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
            raise ConfigError(f"--cases must be 'name: flags' with unique names, got {' '.join(map(repr, self.cases))}")
        return {name: flags for name, _, flags in pairs}


@dataclass
class Comparison:
    """A comparison: its cases, and the results so far.

    Attributes:
        cases: the config of each case.
        baseline: the name of the case that the others are measured against.
        seeds: the number of seeds of each case.
        rates: the number of factors of the rates to start with.
        folder: the folder of the result.
        plan: the flags that all cases share.
        corpus: the data of `plan`.
        runs: the finished runs.
        costs: the time of an update and the bytes of the state, by case.
        fork: the state from which all runs continue; None: they begin with new weights.
    """

    cases: dict[str, TrainConfig]
    baseline: str
    seeds: int
    rates: int
    folder: Path
    plan: TrainConfig
    corpus: Corpus | None
    runs: list[dict[str, Any]]
    costs: dict[str, dict[str, float]]
    fork: Fork | None = None

    def folder_of(self, case: str, factor: float, seed: int) -> Path:
        """Return the folder of an unfinished run."""
        digest = hashlib.sha256(json.dumps(to_json(self.cases[case]), sort_keys=True).encode()).hexdigest()
        slug = re.sub(r"\W+", "-", case).strip("-")
        return self.folder / "runs" / f"{slug}-{digest[:8]}-x{factor:.3g}-{seed}"

    def corpus_of(self, case: str) -> Corpus | None:
        """Return the prepared data if the case trains on it, else None."""
        data_flags = ("data", "text_column", "vocab_size", "cache_dir", "validation", "tokenize")
        same = all(getattr(self.cases[case], name) == getattr(self.plan, name) for name in data_flags)
        return self.corpus if same else None

    def runs_of(self, case: str) -> list[dict[str, Any]]:
        """Return the finished runs of a case."""
        return [run for run in self.runs if run["case"] == case]

    def next_factor(self, case: str) -> float | None:
        """Return the next factor to try with the first seed, or None if the best factor is found."""
        first = self.cases[case].seed
        tried = {run["factor"]: final_loss(run) for run in self.runs_of(case) if run["seed"] == first}
        half = self.rates // 2
        for i in sorted(range(-half, half + 1), key=abs):
            if FACTOR_STEP**i not in tried:
                return FACTOR_STEP**i
        best = min(tried, key=tried.__getitem__)
        if self.rates == 1 or len(tried) >= MAX_FACTORS:
            return None
        exponents = sorted(round(math.log(factor, FACTOR_STEP)) for factor in tried)
        exponent = round(math.log(best, FACTOR_STEP))
        if exponent == exponents[0] or tried[best] == math.inf:
            return FACTOR_STEP ** (exponents[0] - 1)
        return FACTOR_STEP ** (exponent + 1) if exponent == exponents[-1] else None

    def best_factor(self, case: str) -> float:
        """Return the factor with the lowest final loss among the runs with the first seed."""
        first = self.cases[case].seed
        tried = {run["factor"]: final_loss(run) for run in self.runs_of(case) if run["seed"] == first}
        return min(tried, key=tried.__getitem__)

    def best_runs(self, case: str) -> list[dict[str, Any]]:
        """Return the finished runs of a case at its best factor."""
        factor = self.best_factor(case)
        return [run for run in self.runs_of(case) if run["factor"] == factor]

    def next_run(self, case: str) -> tuple[float, int] | None:
        """Return the next (factor, seed) of a case, or None if the case is finished."""
        first = self.cases[case].seed
        factor = self.next_factor(case)
        if factor is not None:
            return factor, first
        done = {run["seed"] for run in self.best_runs(case)}
        missing = [seed for seed in range(first, first + self.seeds) if seed not in done]
        return (self.best_factor(case), missing[0]) if missing else None


def final_loss(run: dict[str, Any]) -> float:
    """Return the last validation loss of a run, infinite if it diverged."""
    value = run["curve"][-1]["value"] if run["curve"] else None
    return math.inf if run["diverged"] or value is None else float(value)


def time_to_reach(curve: Sequence[dict[str, Any]], target: float) -> tuple[float, float] | None:
    """Return (step, seconds of training) at which a validation curve first reaches `target`, or None.

    Values between two measurements are interpolated linearly.
    """
    before: dict[str, Any] | None = None
    for point in curve:
        if point["value"] is not None and point["value"] <= target:
            if before is None or before["value"] is None:
                return point["step"], point["seconds"]
            part = (before["value"] - target) / (before["value"] - point["value"])
            step, seconds = (before[name] + part * (point[name] - before[name]) for name in ("step", "seconds"))
            return step, seconds
        before = point
    return None


def mean_curve(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean of the curves of runs that were measured at the same steps."""
    return [
        {
            "step": points[0]["step"],
            "seconds": statistics.mean(point["seconds"] for point in points),
            "value": statistics.mean(point["value"] for point in points),
        }
        for points in zip(*(run["curve"] for run in runs), strict=True)
        if all(point["value"] is not None for point in points)
    ]


def summarize(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each case that has run, the best first.

    A row has the mean and the spread of the final loss, and the point at which the mean curve reaches the mean final
    loss of the baseline.
    """
    rows = []
    finals = {
        case: [final_loss(run) for run in comparison.best_runs(case)]
        for case in comparison.cases
        if comparison.runs_of(case)
    }
    target = statistics.mean(finals.get(comparison.baseline, [math.nan]))
    if target == math.inf:
        target = math.nan  # a diverged baseline gives no target
    for case, values in finals.items():
        runs = comparison.best_runs(case)
        arrival = time_to_reach(mean_curve(runs), target) if math.inf not in values else None
        mean = statistics.mean(values)
        finite = math.isfinite(mean)
        factor = comparison.best_factor(case)
        rates = {name: rate * factor for name, rate in resolve.learning_rates(comparison.cases[case]).items()}
        rows.append(
            {
                "case": case,
                "factor": factor,
                "tried": sorted({run["factor"] for run in comparison.runs_of(case)}),
                "rates": rates,
                "seeds": len(values),
                "value": mean if finite else None,
                "spread": statistics.stdev(values) if finite and len(values) > 1 else None,
                "diverged": values.count(math.inf),
                "steps_to_baseline": arrival[0] if arrival else None,
                "seconds_to_baseline": arrival[1] if arrival else None,
                "seconds": statistics.mean(run["curve"][-1]["seconds"] for run in runs),
                **comparison.costs.get(case, {}),
            }
        )
    return sorted(rows, key=lambda row: (row["value"] is None, row["value"]))


def markdown_table(rows: Sequence[dict[str, Any]], *, baseline: str, unit: str) -> str:
    """Return the rows as a Markdown table."""
    names = ["case", "rates", f"final {unit}", "seeds", f"steps to {baseline}'s", "seconds to it", "run, s"]
    lines = [[*names, "optimizer, ms", "state, bytes per parameter"]]
    for row in rows:
        value = f"{row['diverged']} diverged" if row["value"] is None else f"{row['value']:.4f}"
        if row["spread"] is not None:
            value += f" ± {row['spread']:.4f}"
        never = row["steps_to_baseline"] is None
        lines.append(
            [
                row["case"],
                f"x{row['factor']:.3g} of {len(row['tried'])}",
                value,
                str(row["seeds"]),
                "never" if never else f"{row['steps_to_baseline']:.0f}",
                "never" if never else f"{row['seconds_to_baseline']:.1f}",
                f"{row['seconds']:.1f}",
                f"{row['optimizer_ms']:.2f}" if "optimizer_ms" in row else "?",
                f"{row['state_bytes']:.2f}" if "state_bytes" in row else "?",
            ]
        )
    lines.insert(1, ["---"] * len(lines[0]))
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\nRates:\n"
    for row in rows:
        text += f"- {row['case']}: {' '.join(f'{flag(name)} {rate:.4g}' for name, rate in row['rates'].items())}\n"
    return text


def make_cases(
    options: Options, config: TrainConfig, given: TrainConfig, origin: Fork | None
) -> dict[str, TrainConfig]:
    """Return the config of each case. Raises ConfigError, with the name of the case, for wrong flags.

    Args:
        config: the flags that all cases share, but for those that follow from the recipe.
        given: the flags as they were given, from which those that follow from the recipe are taken.
    """
    base = reopened(config, given)
    cases = {}
    for name, flags in options.selected_cases().items():
        try:
            cases[name] = resolve_device(parse(shlex.split(flags), base=base))
            if origin is not None:
                origin.check(cases[name], config)
        except ValueError as error:
            raise ConfigError(f"case {name!r}: {error}") from None
        refuse_run_flags(cases[name], config, f"case {name!r}")
        rates = resolve.learning_rates(cases[name])
        if not all(rates.values()):
            raise ConfigError(f"case {name!r}: a learning rate of 0 cannot be scaled")
    return cases


def train_case(comparison: Comparison, case: str, factor: float, seed: int, console: Console) -> dict[str, Any] | int:
    """Make a run, or resume it. Returns its figures, or the exit code if a signal stopped it."""
    config = comparison.cases[case]
    folder = comparison.folder_of(case, factor, seed)
    if folder.exists() and not (folder / "config.json").exists():  # the process was killed before the run started
        shutil.rmtree(folder)
    rates: dict[str, Any] = {rate: size * factor for rate, size in resolve.learning_rates(config).items()}
    location: dict[str, Any] = {"out_dir": folder.parent, "run": folder.name}
    config = dataclasses.replace(config, **rates, **location, seed=seed, sample_every=0)
    if comparison.fork is not None and not folder.exists():
        comparison.fork.start(config)
    config = dataclasses.replace(config, resume="auto" if is_run(folder) else None)
    trainer = Trainer(config, console, task=Pretraining(comparison.corpus_of(case)))
    code = trainer.train()
    if trainer.stop_signal:
        return 128 + trainer.stop_signal
    if trainer.step < config.num_iterations and not trainer.diverged:
        return code
    records = list(metrics_log.read(folder / "metrics.jsonl"))
    in_bits = trainer.corpus.tokenizer is not None
    curve, seconds = [], 0.0
    for record in records:
        if record["kind"] == "train":
            seconds += metrics_log.value_of(record, "seconds") or 0.0
        elif record["kind"] == "val":
            value = metrics_log.value_of(record, "bpb" if in_bits else "loss")
            curve.append({"step": record["step"], "seconds": seconds, "value": value})
    if not trainer.diverged and (not curve or curve[-1]["step"] != config.num_iterations):
        raise ValueError(f"case {case!r}: its last evaluation failed, so its final loss is unknown")
    run = {"case": case, "factor": factor, "seed": seed, "curve": curve, "diverged": trainer.diverged}
    return run | {"skipped": trainer.skipped, "unit": "bits per byte" if in_bits else "nats a token"}


class ProgressForwarder(SilentConsole):
    """A console that forwards the warnings of a run and the start of its live line, after a prefix."""

    def __init__(self, console: Console, prefix: str) -> None:
        super().__init__(failures=console.failures)
        self._console, self._prefix = console, prefix

    def say(self, text: str = "") -> None:
        if text.startswith("warning:") or "no checkpoint" in text:
            self._console.say(f"{self._prefix}: {text}")

    def live(self, text: str, *, last: bool = False) -> None:
        self._console.live(" | ".join([self._prefix, *text.split(" | ")[:3]]))


def measure_costs(comparison: Comparison, *, seconds: float, repeats: int) -> dict[str, dict[str, float]]:
    """Return for each case the milliseconds of an update, measured in turns, and the bytes of state per parameter."""
    trainers = {}
    for case, config in comparison.cases.items():
        trainer = trainers[case] = Trainer(config, SilentConsole(), task=Pretraining(comparison.corpus_of(case)))
        trainer.compute_gradients(trainer.loader.batch(0))
        trainer.set_rates(0.0, momentum_at(0, config))  # keeps the weights, at the same cost

    def update(trainer: Trainer) -> None:
        ops.use_backend(trainer.config.backend)
        trainer.update()
        hardware.synchronize(trainer.device)

    calls: list[Callable[[], Any]] = [functools.partial(update, trainer) for trainer in trainers.values()]
    times = side_by_side(calls, seconds=seconds, repeats=repeats)
    costs = {}
    for (case, trainer), milliseconds in zip(trainers.items(), times, strict=True):
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        held = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))
        costs[case] = {"optimizer_ms": milliseconds, "state_bytes": held / trainer.model.num_params()}
    return costs


def open_comparison(options: Options, config: TrainConfig, given: TrainConfig, console: Console) -> Comparison:
    """Create a comparison, or open the one in its folder. Raises ConfigError if the folder holds another one."""
    selected = options.selected_cases()
    baseline = next(iter(selected)) if options.baseline is None else options.baseline
    if baseline not in selected:
        raise ConfigError(f"--baseline must be one of {', '.join(map(repr, selected))}, got {baseline!r}")
    origin = None if options.fork is None else fork.open_fork(options.fork, options.fork_step, console)
    planned = make_cases(options, config, given, origin)
    plan = Trainer(config, console)
    steps, first = plan.config.num_iterations, 0
    name: str = "own" if options.cases else options.suite
    if origin is not None:
        origin.check_data(config, plan.corpus.hash)
        first, name = origin.step, f"{name}-from-{origin.run.run}-{origin.step}"
        steps = max(case.num_iterations for case in planned.values())  # the run itself may have ended at the fork
        console.say(f"fork     {origin.run.run_dir} after {first} of its {origin.run.num_iterations} steps")
    console.say(f"compare  {', '.join(selected)} | {report.describe_run(plan.setup)}, {steps} steps")
    every = math.ceil((steps - first) / EVALUATIONS_PER_RUN) if is_unset(config, "eval_every") else config.eval_every
    folder = options.out or results.OUT / f"compare-{name}"
    cases = make_cases(options, dataclasses.replace(plan.config, eval_every=every), given, origin)
    comparison = Comparison(cases, baseline, options.seeds, options.rates, folder, config, plan.corpus, [], {}, origin)
    if folder.exists() and not all(map(is_temporary, folder.iterdir())):
        stored = read_result(folder)
        wanted = json.loads(json.dumps(fingerprint(comparison)))
        if names := differences(stored["what"], wanted):
            raise ConfigError(f"{folder} contains another comparison ({', '.join(names)}); choose another --out PATH")
        comparison.runs, comparison.costs = stored["runs"], stored["costs"]
        console.say(f"resume   {folder}: {len(comparison.runs)} runs are finished")
    folder.mkdir(parents=True, exist_ok=True)
    return comparison


def read_result(folder: Path) -> dict[str, Any]:
    """Read the result.json of a comparison. Raises ConfigError if it is missing or damaged."""
    path = folder / pictures.RESULT
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["command"] == "compare" and isinstance(found["runs"], list) and isinstance(found["what"], dict):
            return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} is not empty, and {path} is not a comparison ({error!r}); choose another --out"
        ) from None
    raise ConfigError(f"{folder} contains the result of another command; choose another --out PATH")


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return the names of the differences between two fingerprints. A flag that one lacks has its default there, in the
    recipe of October 2025."""
    defaults = to_json(resolve_recipe(TrainConfig(), default="october"))
    names = [name for name in ("baseline", "rates", "data", "fork") if stored.get(name) != wanted.get(name)]
    cases = [plan.get("cases", {}) for plan in (stored, wanted)]
    if set(cases[0]) != set(cases[1]):
        names.append("cases")
    for case in set(cases[0]) & set(cases[1]):
        old = defaults | upgraded(cases[0][case])
        names += [flag(name) for name, value in cases[1][case].items() if old[name] != value]
    return list(dict.fromkeys(names))


def fingerprint(comparison: Comparison) -> dict[str, Any]:
    """Return what identifies a comparison. Its seeds may grow and its data may move."""
    cases = {}
    for case, config in comparison.cases.items():
        ignored = {*PER_CALL_FLAGS, "cache_dir", "device_batch_size"}
        if comparison.corpus_of(case) is not None:
            ignored |= set(COMPARED_BY_CONTENT)
        flags = to_json(config)
        cases[case] = {name: flags[name] for name in flags if name not in ignored}
    data = comparison.corpus.hash if comparison.corpus else None
    found = {"cases": cases, "baseline": comparison.baseline, "rates": comparison.rates, "data": data}
    if comparison.fork is not None:
        found["fork"] = {"step": comparison.fork.step, "weights": comparison.fork.weights}
    return found


def defaults(options: Options, args: Sequence[str]) -> TrainConfig:
    """Return the defaults of train's flags: those of the run that is forked, or those of train, on a CPU with a small
    model; with the recipe of the suite."""
    if options.fork is not None:
        return fork.defaults_of(options.fork)
    recipe: Any = "auto" if options.cases else RECIPE_OF_SUITE[options.suite]
    if on_gpu(args):
        return TrainConfig(recipe=recipe)
    small = dataclasses.replace(CPU_DEFAULTS, recipe=recipe)
    if options.suite == "parts" and not options.cases:
        small = dataclasses.replace(small, **PARTS_ON_CPU)
    if any(argument.startswith("--target") for argument in args):
        return dataclasses.replace(small, num_iterations=UNSET)
    return small


def run(options: Options, config: TrainConfig, given: TrainConfig, console: Console) -> int:
    """Run what the comparison is missing, print its table, and write the result with its picture.

    Args:
        config: the flags that all cases share, with all sizes filled in.
        given: the same flags as they were given.

    Returns 0, or the exit code of a run that a signal stopped.
    """
    comparison = open_comparison(options, config, given, console)

    def save(finished: bool) -> dict[str, Any]:
        record = results.result(
            "compare",
            options,
            config,
            finished=finished,
            what=fingerprint(comparison),
            runs=comparison.runs,
            costs=comparison.costs,
            rows=summarize(comparison),
            unit=comparison.runs[0]["unit"] if comparison.runs else "",
        )
        results.write(comparison.folder, record)
        return record

    save(False)
    code = 0
    for case in comparison.cases:
        while not code and (next_run := comparison.next_run(case)):
            factor, seed = next_run
            planned = max(len(comparison.cases) * (options.rates + options.seeds - 1), len(comparison.runs) + 1)
            prefix = f"{bar(len(comparison.runs), planned)} {case} x{factor:.3g} seed {seed}"
            outcome = train_case(comparison, case, factor, seed, ProgressForwarder(console, prefix))
            if isinstance(outcome, int):
                code = outcome
            else:
                comparison.runs.append(outcome)
                save(False)  # before the folder of the run is deleted
                shutil.rmtree(comparison.folder_of(case, factor, seed), ignore_errors=True)
                console.say(f"{case:<26} x{factor:<6.3g} seed {seed}: {final_loss(outcome):.4f} {outcome['unit']}")
    if not code:
        comparison.costs = measure_costs(comparison, seconds=TIMING_SECONDS, repeats=5)
        shutil.rmtree(comparison.folder / "runs", ignore_errors=True)
    record = save(not code)
    table = markdown_table(record["rows"], baseline=comparison.baseline, unit=record["unit"])
    (comparison.folder / "table.md").write_text(table, encoding="utf-8")
    console.say(table)
    results.finish(comparison.folder, record, console)
    return code
