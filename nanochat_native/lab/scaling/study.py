"""Make the runs of a scaling experiment, those that are not finished, and write what they show."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat_native.data import Corpus
from nanochat_native.lab.comparison import ProgressForwarder
from nanochat_native.lab.scaling import analysis, report
from nanochat_native.lab.scaling.plan import Options, PlannedRun, estimate_seconds, make_plan, refuse_own
from nanochat_native.runs import metrics_log, pictures, results, run_folder
from nanochat_native.runs.config import TrainConfig
from nanochat_native.runtime.console import Console, bar, duration
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.files import is_temporary
from nanochat_native.runtime.flags import flag, is_unset
from nanochat_native.training.pretraining import Pretraining
from nanochat_native.training.trainer import Trainer

COMMAND = "scaling"
MAY_DIFFER = {*run_folder.MAY_CHANGE_ON_RESUME, *run_folder.COMPARED_BY_CONTENT, *run_folder.CHANGES_ROUNDING}
# A run is compared by its last evaluation, so its text must be the same.
MUST_AGREE = {"eval_tokens"}


def run(options: Options, config: TrainConfig, given: TrainConfig, console: Console) -> int:
    """Make what the experiment is missing, print its tables, and write the result with its picture.

    Args:
        config: train's flags, with all sizes filled in.
        given: the same flags as they were given.

    Returns 0, or the exit code of a run that a signal stopped or whose last step was not saved. With options.dry_run,
    print the plan, and return 0.
    """
    refuse_own(options, given)
    folder = options.out or results.OUT / COMMAND
    stored = read_stored(folder)
    corpus = Pretraining().prepare_data(config, console, World())
    plan = make_plan(options, config, corpus, folder / "runs")
    for planned in plan:
        check_existing(planned, corpus)
    diverged = [run for run in stored if run["value"] is None]
    finished = {planned.name: found for planned in plan if (found := finished_run(planned, corpus, diverged))}
    announce(options, plan, finished, corpus, console)
    if options.dry_run:
        return 0
    folder.mkdir(parents=True, exist_ok=True)

    def save() -> dict[str, Any]:
        runs = [finished[planned.name] for planned in plan if planned.name in finished]
        record = results.result(
            COMMAND,
            options,
            config,
            finished=len(runs) == len(plan),
            plan=[planned.described() for planned in plan],
            runs=runs,
            fits=analysis.analyse(runs) if runs else {},
            unit="bits per byte" if corpus.tokenizer else "nats a token",
        )
        results.write(folder, record)
        return record

    save()
    code = 0
    for planned in plan:
        if planned.name in finished:
            continue
        prefix = f"{bar(len(finished), len(plan))} {planned.name}"
        outcome = train(planned, corpus, ProgressForwarder(console, prefix))
        if isinstance(outcome, int):
            code = outcome
            break
        finished[planned.name] = outcome
        save()
        value = "diverged" if outcome["value"] is None else f"{outcome['value']:.4f}"
        console.say(f"{planned.name:<32} {value} after {planned.steps:,} steps, {duration(outcome['seconds'])}")
    record = save()
    if record["runs"]:
        text = report.result_text(record)
        (folder / "table.md").write_text(text, encoding="utf-8")
        console.say(text)
        results.finish(folder, record, console)
    return code


def read_stored(folder: Path) -> list[dict[str, Any]]:
    """Return the runs in the result.json of an earlier call, none if there is no folder.

    Raises ConfigError for a folder that holds anything else.
    """
    if not folder.exists() or (folder.is_dir() and all(map(is_temporary, folder.iterdir()))):
        return []
    path = folder / pictures.RESULT
    try:
        record = json.loads(path.read_bytes())
        if record["command"] == COMMAND:
            return [run for run in record["runs"] if {"name", "value", "steps"} <= set(run)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} is not empty, and {path} is not a scaling experiment ({error!r}); choose another --out PATH"
        ) from None
    raise ConfigError(f"{folder} contains the result of another command; choose another --out PATH")


def check_existing(planned: PlannedRun, corpus: Corpus) -> None:
    """Raise ConfigError if the folder of a run holds one with other flags or other data."""
    folder = planned.config.run_dir
    if not run_folder.is_run(folder):
        return
    saved = run_folder.load_config(folder)
    different = [
        flag(field.name)
        for field in dataclasses.fields(saved)
        if field.name not in MAY_DIFFER - MUST_AGREE
        and not is_unset(planned.config, field.name)
        and getattr(saved, field.name) != getattr(planned.config, field.name)
    ]
    if different:
        raise ConfigError(f"{folder} holds a run with other flags ({', '.join(different)}); choose another --out PATH")
    try:
        run_folder.require_same_data(planned.config, corpus.hash)
    except ConfigError:
        raise ConfigError(f"{folder} holds a run that began with other data; choose another --out PATH") from None


def finished_run(planned: PlannedRun, corpus: Corpus, diverged: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the figures of a run that is finished, or None.

    Args:
        diverged: the runs that an earlier call saw diverge: their logs do not reach the last step.
    """
    folder = planned.config.run_dir
    if not run_folder.is_run(folder):
        return None
    found = next((run for run in diverged if (run["name"], run["steps"]) == (planned.name, planned.steps)), None)
    return found or figures_of(planned, corpus)


def figures_of(planned: PlannedRun, corpus: Corpus, *, diverged: bool = False) -> dict[str, Any] | None:
    """Return the figures of a run from its log, or None if it has no evaluation of the last step.

    The value is the last loss on the validation text, in bits per byte if there is a tokenizer; None if the run
    diverged, or if this loss is not finite.
    """
    records = list(metrics_log.read(planned.config.run_dir / "metrics.jsonl"))
    last = next((r for r in reversed(records) if r["kind"] == "val" and r["step"] == planned.steps), None)
    if last is None and not diverged:
        return None
    name = "bpb" if corpus.tokenizer else "loss"
    value = None if last is None or diverged else metrics_log.value_of(last, name)
    seconds = sum(metrics_log.value_of(r, "seconds") or 0.0 for r in records if r["kind"] == "train")
    return planned.described() | {"value": value, "seconds": seconds}


def train(planned: PlannedRun, corpus: Corpus, console: Console) -> dict[str, Any] | int:
    """Make a run, or resume it. Return its figures, or the exit code if a signal stopped it."""
    folder = planned.config.run_dir
    if folder.exists() and not (folder / "config.json").exists():  # the process was killed before the run started
        shutil.rmtree(folder)
    config = dataclasses.replace(planned.config, resume="auto" if run_folder.is_run(folder) else None)
    trainer = Trainer(config, console, task=Pretraining(corpus))
    code = trainer.train()
    if trainer.stop_signal:
        return 128 + trainer.stop_signal
    if code and not trainer.diverged:
        return code
    found = figures_of(planned, corpus, diverged=trainer.diverged)
    if found is None:
        raise ValueError(f"{folder}: the last evaluation failed, so the final loss of this run is unknown")
    return found


def announce(
    options: Options, plan: Sequence[PlannedRun], finished: dict[str, Any], corpus: Corpus, console: Console
) -> None:
    """Print the plan; in a dry run with an estimate of the time and the disk of what is left to do."""
    described = [planned.described() for planned in plan]
    estimates: list[tuple[float, int]] = []
    if options.dry_run:
        for planned in plan:
            seconds = 0.0 if planned.name in finished else estimate_seconds(planned, corpus)
            estimates.append((seconds, planned.config.keep * planned.state_bytes))
    console.say(report.plan_table(described, estimates))
    flops = sum(planned.flops for planned in plan)
    console.say(f"scaling  {len(plan)} runs, {flops:.3e} FLOP in all, {len(finished)} of them are finished")
    longest = max(planned.tokens for planned in plan)
    if len(corpus.train) and longest > len(corpus.train):
        console.say(
            f"note     the longest run reads the training text {longest / len(corpus.train):.2g} times; "
            "the laws are of text that is read once"
        )
    if estimates:
        left = sum(seconds for seconds, _ in estimates)
        size = sum(size for _, size in estimates)
        console.say(f"estimate {duration(left)} for the runs that are left, {size / 1e6:.0f} MB of checkpoints")
