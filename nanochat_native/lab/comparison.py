"""python -m nanochat_native.compare: optimizers, or parts of Muon, on one model and the same data, each at its own best
rate, over several seeds.

Every comparison is a set of runs as `train` makes them. What is finished is kept in result.json: a comparison that was
stopped or killed goes on with the rest when the same command is given again.
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
from typing import Any, Literal

import torch

from nanochat_native import ops
from nanochat_native.data import Corpus
from nanochat_native.lab import command_flags
from nanochat_native.optim.schedule import momentum_at
from nanochat_native.runs import metrics_log, pictures, results
from nanochat_native.runs.config import TrainConfig, parse, to_json
from nanochat_native.runs.run_folder import COMPARED_BY_CONTENT, PER_CALL_FLAGS, is_run
from nanochat_native.runtime.console import Console, SilentConsole, bar
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.files import is_temporary
from nanochat_native.runtime.flags import UNSET, flag
from nanochat_native.runtime.isolation import ReportFailures
from nanochat_native.runtime.timing import side_by_side
from nanochat_native.training import report, resolve
from nanochat_native.training.pretraining import Pretraining
from nanochat_native.training.trainer import Trainer

RATIO = 3.0  # between neighbouring factors of the rates
MOST_RATES = 7  # factors of one case, when the best lies at the edge of those tried
COST_SECONDS = 2.0  # to time the cases' updates in turns
EVALUATIONS = 8  # of a run, where --eval-every does not say otherwise
# name: flags of train. The first case, or --baseline, is what the others are measured against.
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
}
# On a CPU, where not given otherwise: a model so small that the default comparison ends in minutes.
SMALL = TrainConfig(
    depth=2, vocab_size=1024, max_seq_len=128, total_batch_size=1024, num_iterations=64, eval_tokens=8192
)


@dataclass
class Options:
    """Compare optimizers on one model and the same data, each at its own best rate.

    First every case runs at several factors of its rates, x1/3, x1, x3 and on while the best is at the edge; then at
    the best of them with more seeds. All flags of train are taken too, and hold for every case: e.g. --depth 4
    --num-iterations 400. Without a GPU the defaults are a model of 0.7M parameters and 64 steps. The same command
    given again goes on with what is missing.
    """

    suite: Literal["optimizers", "newton_schulz", "momentum", "muon"] = "optimizers"
    """What to compare: optimizers; Newton-Schulz's coefficients and steps; Muon's momentum; or Muon's options."""
    cases: tuple[str, ...] = ()
    """Your own instead: "name: flags of train" each, e.g. "warm: --warmup-ratio 0.1" "cold:"."""
    seeds: int = 2
    """Runs of each case at its best rate: seeds --seed, --seed + 1, ..."""
    rates: int = 3
    """Factors of the rates to begin with, an odd number; 1: no search."""
    baseline: str | None = None
    """The case whose final loss the others are timed to; default: the first, AdamW of the optimizers."""
    out: Path | None = None
    """Folder for result.json, table.md and the picture, and the runs meanwhile; default: lab/compare-<suite>."""

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.rates < 1 or self.rates % 2 == 0:
            raise ConfigError(f"--seeds is {self.seeds}, --rates {self.rates}; takes at least 1, and an odd number")

    def chosen(self) -> dict[str, str]:
        """Flags by the case's name."""
        if not self.cases:
            return SUITES[self.suite]
        pairs = [[part.strip() for part in case.partition(":")] for case in self.cases]
        if not all(colon and name for name, colon, _ in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
            raise ConfigError(f"--cases is {' '.join(map(repr, self.cases))}; takes 'name: flags' each, names once")
        return {name: flags for name, _, flags in pairs}


@dataclass
class Comparison:
    """What is to be compared, and what has run so far."""

    cases: dict[str, TrainConfig]
    baseline: str
    seeds: int
    rates: int
    folder: Path
    plan: TrainConfig
    corpus: Corpus | None
    runs: list[dict[str, Any]]
    costs: dict[str, dict[str, float]]

    def folder_of(self, case: str, factor: float, seed: int) -> Path:
        """Of a run while it goes on."""
        digest = hashlib.sha256(json.dumps(to_json(self.cases[case]), sort_keys=True).encode()).hexdigest()
        slug = re.sub(r"\W+", "-", case).strip("-")
        return self.folder / "runs" / f"{slug}-{digest[:8]}-x{factor:.3g}-{seed}"

    def corpus_of(self, case: str) -> Corpus | None:
        """The data that is prepared, where the case trains on that."""
        of_data = ("data", "text_column", "vocab_size", "cache_dir")
        same = all(getattr(self.cases[case], name) == getattr(self.plan, name) for name in of_data)
        return self.corpus if same else None

    def of(self, case: str) -> list[dict[str, Any]]:
        return [run for run in self.runs if run["case"] == case]

    def next_factor(self, case: str) -> float | None:
        """The next of the rates' factors to try with the first seed; None when the best of them is found."""
        first = self.cases[case].seed
        tried = {run["factor"]: final(run) for run in self.of(case) if run["seed"] == first}
        half = self.rates // 2
        for i in sorted(range(-half, half + 1), key=abs):
            if RATIO**i not in tried:
                return RATIO**i
        best = min(tried, key=tried.__getitem__)
        if self.rates == 1 or len(tried) >= MOST_RATES:
            return None
        places = sorted(round(math.log(factor, RATIO)) for factor in tried)
        place = round(math.log(best, RATIO))
        if place == places[0] or tried[best] == math.inf:
            place = places[0]
            return RATIO ** (place - 1)
        return RATIO ** (place + 1) if place == places[-1] else None

    def best_factor(self, case: str) -> float:
        """Of those that ran with the first seed, the one of the lowest final loss."""
        first = self.cases[case].seed
        tried = {run["factor"]: final(run) for run in self.of(case) if run["seed"] == first}
        return min(tried, key=tried.__getitem__)

    def best_runs(self, case: str) -> list[dict[str, Any]]:
        factor = self.best_factor(case)
        return [run for run in self.of(case) if run["factor"] == factor]

    def todo(self, case: str) -> tuple[float, int] | None:
        """The next (factor, seed) of a case; None when it is done."""
        first = self.cases[case].seed
        factor = self.next_factor(case)
        if factor is not None:
            return factor, first
        done = {run["seed"] for run in self.best_runs(case)}
        missing = [seed for seed in range(first, first + self.seeds) if seed not in done]
        return (self.best_factor(case), missing[0]) if missing else None


def final(run: dict[str, Any]) -> float:
    """The last validation loss of a run, infinite where it diverged."""
    value = run["curve"][-1]["value"] if run["curve"] else None
    return math.inf if run["diverged"] or value is None else float(value)


def reached(curve: Sequence[dict[str, Any]], target: float) -> tuple[float, float] | None:
    """(step, seconds of training) at which a validation curve first is at `target`, between two measurements by a
    straight line; None if it never is."""
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
    """Of runs that were measured at the same steps."""
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
    """A row a case that has run, the best first: mean and spread of the final loss, and where the mean of its curves
    comes to the baseline's final mean."""
    rows = []
    finals = {
        case: [final(run) for run in comparison.best_runs(case)] for case in comparison.cases if comparison.of(case)
    }
    target = statistics.mean(finals.get(comparison.baseline, [math.nan]))
    if target == math.inf:
        target = math.nan  # a baseline that diverged is no mark to reach
    for case, values in finals.items():
        runs = comparison.best_runs(case)
        arrival = reached(mean_curve(runs), target) if math.inf not in values else None
        mean = statistics.mean(values)
        finite = math.isfinite(mean)
        factor = comparison.best_factor(case)
        rates = {name: rate * factor for name, rate in resolve.learning_rates(comparison.cases[case]).items()}
        rows.append(
            {
                "case": case,
                "factor": factor,
                "tried": sorted({run["factor"] for run in comparison.of(case)}),
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


def table(rows: Sequence[dict[str, Any]], *, baseline: str, unit: str) -> str:
    """The rows as Markdown."""
    names = ["case", "rates", f"final {unit}", "seeds", f"steps to {baseline}'s", "seconds to it", "run, s"]
    lines = [[*names, "optimizer, ms", "state, bytes a parameter"]]
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


def make_cases(options: Options, config: TrainConfig) -> dict[str, TrainConfig]:
    """Each case's config. Raises ConfigError, naming the case, for flags that do not fit."""
    cases = {}
    for name, flags in options.chosen().items():
        try:
            cases[name] = parse(shlex.split(flags), base=config)
        except ValueError as error:
            raise ConfigError(f"case {name!r}: {error}") from None
        command_flags.refuse_run_flags(cases[name], config, f"case {name!r}")
        rates = resolve.learning_rates(cases[name])
        if not all(rates.values()):
            raise ConfigError(f"case {name!r}: a learning rate of 0 has no factors")
    return cases


def train_case(comparison: Comparison, case: str, factor: float, seed: int, console: Console) -> dict[str, Any] | int:
    """One run, or the rest of it: its figures; or the exit code of a signal that stopped it."""
    config = comparison.cases[case]
    folder = comparison.folder_of(case, factor, seed)
    if folder.exists() and not is_run(folder):  # it was killed before it had begun
        shutil.rmtree(folder)
    rates: dict[str, Any] = {rate: size * factor for rate, size in resolve.learning_rates(config).items()}
    place: dict[str, Any] = {"out_dir": folder.parent, "run": folder.name}
    place["resume"] = "auto" if is_run(folder) else None
    config = dataclasses.replace(config, **rates, **place, seed=seed, sample_every=0)
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
        raise ValueError(f"case {case!r}: its last evaluation failed, so there is nothing to compare")
    run = {"case": case, "factor": factor, "seed": seed, "curve": curve, "diverged": trainer.diverged}
    return run | {"skipped": trainer.skipped, "unit": "bits per byte" if in_bits else "nats a token"}


class Forwarding(SilentConsole):
    """Of a run's words it passes on warnings and the beginning of the live line, behind `where`."""

    def __init__(self, console: Console, where: str) -> None:
        super().__init__(failures=console.failures)
        self._console, self._where = console, where

    def say(self, text: str = "") -> None:
        if text.startswith("warning:") or "no checkpoint" in text:
            self._console.say(f"{self._where}: {text}")

    def live(self, text: str, *, last: bool = False) -> None:
        self._console.live(" | ".join([self._where, *text.split(" | ")[:3]]))


def measure_costs(comparison: Comparison, *, seconds: float, repeats: int) -> dict[str, dict[str, float]]:
    """Of each case: milliseconds of one update, the cases taking turns, and the state's bytes a parameter."""
    trainers = {}
    for case, config in comparison.cases.items():
        trainer = trainers[case] = Trainer(config, SilentConsole(), task=Pretraining(comparison.corpus_of(case)))
        trainer.compute_gradients(trainer.loader.batch(0))
        trainer.set_rates(0.0, momentum_at(0, config))  # an update costs the same, and weights stay as they are

    def update(trainer: Trainer) -> None:
        ops.use_backend(trainer.config.backend)
        trainer.update()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)

    calls: list[Callable[[], Any]] = [functools.partial(update, trainer) for trainer in trainers.values()]
    times = side_by_side(calls, seconds=seconds, repeats=repeats)
    costs = {}
    for (case, trainer), milliseconds in zip(trainers.items(), times, strict=True):
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        held = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor))
        costs[case] = {"optimizer_ms": milliseconds, "state_bytes": held / trainer.model.num_params()}
    return costs


def open_comparison(options: Options, config: TrainConfig, console: Console) -> Comparison:
    """A new comparison in its folder, or the one that is there. Raises ConfigError when that is another one."""
    chosen = options.chosen()
    baseline = next(iter(chosen)) if options.baseline is None else options.baseline
    if baseline not in chosen:
        raise ConfigError(f"--baseline is {baseline!r}; takes {', '.join(map(repr, chosen))}")
    make_cases(options, config)
    plan = Trainer(config, console)
    console.say(f"compare  {', '.join(chosen)} | {report.describe_run(plan.setup)}, {plan.config.num_iterations} steps")
    every = config.eval_every if config.eval_every != UNSET else math.ceil(plan.config.num_iterations / EVALUATIONS)
    folder = options.out or results.OUT / f"compare-{'own' if options.cases else options.suite}"
    cases = make_cases(options, dataclasses.replace(plan.config, eval_every=every))
    comparison = Comparison(cases, baseline, options.seeds, options.rates, folder, config, plan.corpus, [], {})
    if folder.exists() and not all(map(is_temporary, folder.iterdir())):
        here = read_result(folder)
        wanted = json.loads(json.dumps(what(comparison)))
        if names := differing(here["what"], wanted):
            raise ConfigError(f"{folder} holds another comparison ({', '.join(names)}); give another --out PATH")
        comparison.runs, comparison.costs = here["runs"], here["costs"]
        console.say(f"resume   {folder}: {len(comparison.runs)} runs are there")
    folder.mkdir(parents=True, exist_ok=True)
    return comparison


def read_result(folder: Path) -> dict[str, Any]:
    """A comparison's result.json. Raises ConfigError where there is none, or a damaged one."""
    path = folder / pictures.RESULT
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["command"] == "compare" and isinstance(found["runs"], list) and isinstance(found["what"], dict):
            return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} holds something, and {path} is no comparison ({error!r}); give another --out"
        ) from None
    raise ConfigError(f"{folder} holds another result; give another --out PATH")


def differing(here: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of what is different in two plans. A flag that an older version did not have counts as its default."""
    defaults = to_json(TrainConfig())
    names = [name for name in ("baseline", "rates", "data") if here.get(name) != wanted.get(name)]
    cases = [plan.get("cases", {}) for plan in (here, wanted)]
    if set(cases[0]) != set(cases[1]):
        names.append("cases")
    for case in set(cases[0]) & set(cases[1]):
        old = defaults | cases[0][case]
        names += [flag(name) for name, value in cases[1][case].items() if old[name] != value]
    return list(dict.fromkeys(names))


def what(comparison: Comparison) -> dict[str, Any]:
    """What makes a comparison the same one; more seeds may be added to it, and its data may move."""
    cases = {}
    for case, config in comparison.cases.items():
        unimportant = {*PER_CALL_FLAGS, "cache_dir", "device_batch_size"}
        if comparison.corpus_of(case) is not None:
            unimportant |= set(COMPARED_BY_CONTENT)
        flags = to_json(config)
        cases[case] = {name: flags[name] for name in flags if name not in unimportant}
    data = comparison.corpus.hash if comparison.corpus else None
    return {"cases": cases, "baseline": comparison.baseline, "rates": comparison.rates, "data": data}


def run(args: Sequence[str], failures: ReportFailures) -> int:
    base = None if torch.cuda.is_available() and "cpu" not in args else SMALL
    if base and any(argument.startswith("--target") for argument in args):
        base = dataclasses.replace(base, num_iterations=UNSET)
    options, config, _ = command_flags.configure(Options, "compare", args, base=base)
    console = Console(failures=failures)
    comparison = open_comparison(options, config, console)

    def keep(finished: bool) -> dict[str, Any]:
        record = results.result(
            "compare",
            options,
            config,
            finished=finished,
            what=what(comparison),
            runs=comparison.runs,
            costs=comparison.costs,
            rows=summarize(comparison),
            unit=comparison.runs[0]["unit"] if comparison.runs else "",
        )
        results.write(comparison.folder, record)
        return record

    keep(False)
    code = 0
    for case in comparison.cases:
        while not code and (todo := comparison.todo(case)):
            factor, seed = todo
            planned = max(len(comparison.cases) * (options.rates + options.seeds - 1), len(comparison.runs) + 1)
            where = f"{bar(len(comparison.runs), planned)} {case} x{factor:.3g} seed {seed}"
            found = train_case(comparison, case, factor, seed, Forwarding(console, where))
            if isinstance(found, int):
                code = found
            else:
                comparison.runs.append(found)
                keep(False)  # before the run's folder goes
                shutil.rmtree(comparison.folder_of(case, factor, seed), ignore_errors=True)
                console.say(f"{case:<26} x{factor:<6.3g} seed {seed}: {final(found):.4f} {found['unit']}")
    if not code:
        comparison.costs = measure_costs(comparison, seconds=COST_SECONDS, repeats=5)
        shutil.rmtree(comparison.folder / "runs", ignore_errors=True)
    record = keep(not code)
    text = table(record["rows"], baseline=comparison.baseline, unit=record["unit"])
    (comparison.folder / "table.md").write_text(text, encoding="utf-8")
    console.say(text)
    results.finish(comparison.folder, record, console)
    if code:
        console.say("go on    the same command again")
    return code
