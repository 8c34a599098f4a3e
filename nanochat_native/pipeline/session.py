"""The work of `speedrun`: reads the recipe, runs the stages that are not done, and writes the report card."""

import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat_native.pipeline import estimate, figures, process, report, samples
from nanochat_native.pipeline.recipe import Places, Recipe, Stage, builtin, check, command_line, read
from nanochat_native.pipeline.state import State, lock
from nanochat_native.runtime import console
from nanochat_native.runtime.command import check_text
from nanochat_native.runtime.console import Console, duration
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.isolation import EXIT_CODE, ReportFailures


@dataclass
class Options:
    """Make a chat model in one command, stage by stage, with a report card.

    The stages are those of a recipe, a file to read and to edit. Without flags: a small model on the CPU, without
    network, in minutes. The same command continues after Ctrl-C, a kill or a crash.
    """

    gpus: int = 0
    """GPUs of this machine to use, and the recipe: 0 for cpu, 1 for one-gpu, 8 for eight-gpus. With --recipe any
    number."""
    recipe: Path | None = None
    """File of the recipe; default: the one of --gpus."""
    out: Path | None = None
    """Folder for the stages, the logs, the state and the report; default: speedrun/ and the name of the recipe."""
    downloads: Path = Path("data")
    """Folder for the datasets of stages that download."""
    price: float | None = None
    """Price of an hour of the machine, in any currency. The report then has costs."""
    redo: tuple[str, ...] = ()
    """Stages to do again, with those whose flags name them. Their folders are deleted. To continue after that, leave
    out this flag."""
    dry_run: bool = False
    """Print the plan, with estimates of time and disk, and stop."""


def run(options: Options, failures: ReportFailures) -> int:
    """Do what the flags say, and return the exit code: that of a stage that failed, or 128 plus a signal's number.

    Raises ConfigError for flags, a recipe or a folder that are wrong.
    """
    if options.gpus < 0:
        raise ConfigError(f"--gpus must be a whole number >= 0, got {options.gpus}")
    if options.price is not None and not 0 <= options.price < math.inf:
        raise ConfigError(f"--price must be a finite number >= 0, got {options.price}")
    recipe = read(builtin(options.gpus) if options.recipe is None else options.recipe)
    if (recipe.device == "cuda") != (options.gpus > 0):
        needed = "a number >= 1" if recipe.device == "cuda" else "0"
        raise ConfigError(
            f"--gpus must be {needed} for the recipe {recipe.name}, whose device is {recipe.device}, got {options.gpus}"
        )
    out = Path("speedrun") / recipe.name if options.out is None else options.out
    places = Places(Path(os.path.abspath(out)), Path(os.path.abspath(options.downloads)), options.gpus)
    check_text(str(places.out), "--out")
    check(recipe, places)
    for stage in recipe.stages:
        folder = places.folder(stage.name)
        if stage.command != "download" and (folder == places.downloads or folder in places.downloads.parents):
            raise ConfigError(f"--downloads must not be in the folder of stage {stage.name}, got {places.downloads}")
    known = [stage.name for stage in recipe.stages]
    for name in options.redo:
        if name not in known:
            raise ConfigError(f"--redo must be a stage of the recipe ({', '.join(known)}), got {name!r}")
    again = recipe.dependents(options.redo)
    if options.dry_run:
        state = State(places)
        again += state.half_deleted()
        state.check(recipe, again)
        for name in again:
            state.stages.pop(name, None)
        print(plan(recipe, places, state))
        return 0
    if recipe.device == "cuda" and torch.cuda.device_count() < options.gpus:
        raise ConfigError(f"--gpus must be at most {torch.cuda.device_count()}, which torch sees, got {options.gpus}")
    descriptor = lock(places.out)
    try:
        state = State(places)
        again += state.half_deleted()
        state.check(recipe, again)
        state.forget(again)
        return Speedrun(recipe, places, state, options, failures).run()
    finally:
        os.close(descriptor)


def plan(recipe: Recipe, places: Places, state: State) -> str:
    """Return the plan as text: the stages with estimates, their command lines, and the sums."""
    estimates = estimate.of_stages(recipe, places)
    rows = [["stage", "command", "state", "time", "memory", "disk"]]
    missing = []
    for stage in recipe.stages:
        found = estimates[stage.name]
        what = "done" if state.is_done(stage.name) else "begun" if stage.name in state.stages else "to do"
        time_ = "not estimated" if found.seconds is None else f"about {duration(found.seconds)}"
        memory = "not estimated" if found.memory_bytes is None else f"about {found.memory_bytes / 1e9:.1f} GB"
        disk = "not estimated" if found.disk_bytes is None else f"up to {found.disk_bytes / 1e9:.2f} GB"
        rows.append([stage.name, stage.command, what, time_, memory, disk])
        if what != "done" and (found.seconds is None or found.disk_bytes is None):
            missing.append(stage.name)
    left = [estimates[stage.name] for stage in recipe.stages if not state.is_done(stage.name)]
    seconds = sum(found.seconds or 0 for found in left)
    disk_bytes = sum(found.disk_bytes or 0 for found in left)
    existing = next(folder for folder in (places.out, *places.out.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    lines = [
        f"recipe   {recipe.name}: {recipe.about}",
        f"folder   {places.out}",
        "",
        *console.aligned(rows),
        "",
        f"left     about {duration(seconds)} and up to {disk_bytes / 1e9:.2f} GB, as far as they are estimated; "
        f"{free / 1e9:.1f} GB are free",
    ]
    if missing:
        lines.append(f"note     not estimated, and not in these sums: time or disk of {', '.join(missing)}")
    if free < disk_bytes:
        lines.append("warning  the disk has less space than the stages may need")
    given = [f"{name} {duration(e.seconds)}" for name, e in estimates.items() if e.source == "recipe" and e.seconds]
    if given:
        lines.append(f"times    that the recipe gives: {', '.join(given)}; the others are estimates")
    lines += ["", *(shlex.join(["python", *command_line(s, recipe, places)[1:]]) for s in recipe.stages)]
    return "\n".join(lines)


class Speedrun:
    """The stages of a recipe in a folder."""

    def __init__(
        self, recipe: Recipe, places: Places, state: State, options: Options, failures: ReportFailures
    ) -> None:
        self._recipe, self._places, self._state, self._price = recipe, places, state, options.price
        self._continuing = "the same command without --redo continues" if options.redo else "the same command continues"
        self._failures, self._console = failures, Console(failures=failures)

    def run(self) -> int:
        """Run the stages that are not done, and return the exit code."""
        with process.Signals() as signals:
            for number, stage in enumerate(self._recipe.stages, 1):
                if not self._state.is_done(stage.name):
                    code = self._run_stage(stage, f"{number} of {len(self._recipe.stages)}", signals)
                    if code:
                        self._report()
                        return code
                if not signals.received:
                    self._sample(stage, signals)
                self._report()
                if signals.received:
                    return self._stopped(stage, signals)
        names = [stage.name for stage in self._recipe.stages if stage.is_run]
        total = sum(self._state.stages[stage.name]["seconds"] for stage in self._recipe.stages)
        self._console.say(f"done     {len(self._recipe.stages)} stages in {duration(total)}")
        self._console.say(f"report   {self._places.out / 'report.html'}")
        if names:
            folder = shlex.quote(str(self._places.folder(names[-1])))
            self._console.say(f"talk     python -m nanochat_native.chat --checkpoint {folder}")
        return 0

    def _stopped(self, stage: Stage, signals: process.Signals) -> int:
        print(f"stopped in stage {stage.name}; {self._continuing}", file=sys.stderr)
        return 128 + signals.received

    def _run_stage(self, stage: Stage, number: str, signals: process.Signals) -> int:
        """Run a stage that is not done. Return 0 if it is done then, else the exit code of the speedrun."""
        command = command_line(stage, self._recipe, self._places)
        log = self._places.log(stage.name)
        self._console.say(f"stage    {stage.name} ({number}): {shlex.join(['python', *command[1:]])}")
        self._state.begin(stage, command)
        start, since = time.monotonic(), time.time()
        try:
            code, seconds = process.run(command, log, signals)
        except OSError:
            self._state.end(stage.name, time.monotonic() - start, 1, done=False, figures={})
            raise
        if code and self._places.gpus > 1 and not signals.received and figures.is_trained(stage, self._places, since):
            code = EXIT_CODE  # torchrun ends with 1 for any code of a rank
        done = code in (0, EXIT_CODE)
        if code == EXIT_CODE:
            self._failures.add(f"reports of stage {stage.name}")
        found: dict[str, dict[str, float]] = {"scores": {}, "facts": {}}
        if done:
            with self._console.isolated(f"figures of {stage.name}"):
                found = figures.of_stage(stage, self._places.folder(stage.name))
        self._state.end(stage.name, seconds, code, done=done, figures=found)
        if done:
            return 0
        if signals.received:
            return self._stopped(stage, signals)
        print(
            f"error: stage {stage.name} ended with exit code {code}; its output is in {log}; {self._continuing}",
            file=sys.stderr,
        )
        return code

    def _sample(self, stage: Stage, signals: process.Signals) -> None:
        """Let the model of a stage that trains answer the prompts that it has not answered."""
        entry = self._state.stages[stage.name]
        known = entry.get("samples", {}) if entry.get("max_tokens") == self._recipe.max_tokens else {}
        prompts = tuple(prompt for prompt in self._recipe.prompts if prompt not in known)
        if not stage.is_run or not prompts:
            return
        with self._console.isolated(f"samples of {stage.name}"):
            try:
                found = samples.ask(
                    self._places.folder(stage.name), self._recipe.device, prompts, self._recipe.max_tokens, signals
                )
            except OSError:
                if signals.received:  # it ended the process
                    return
                raise
            answers = known | dict(zip(prompts, found["answers"], strict=True))
            self._state.add(stage.name, samples=answers, max_tokens=self._recipe.max_tokens, machine=found["machine"])
            for prompt in prompts:
                self._console.say(f"sample   {prompt!r} -> {answers[prompt]!r}")

    def _report(self) -> None:
        with self._console.isolated("report card"):
            report.write(self._recipe, self._places, self._state, self._price)
