"""The measurements of one call: bits per byte and CORE, of one checkpoint or two."""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nanochat_native import data
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.evaluation import core_score
from nanochat_native.evaluation.bits_per_byte import evaluate
from nanochat_native.model.gpt import GPT
from nanochat_native.runs import pictures, results, run_folder
from nanochat_native.runs.config import STDLIB, FinetuneConfig
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime import console, distributed
from nanochat_native.runtime.command import MISTAKES
from nanochat_native.runtime.console import Console, SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.hardware import autocast, pick_device


@dataclass
class Options:
    """Measure a trained model in bits per byte, and with --core by the CORE score; two of them with --compare.

    Under torchrun the ranks share the work; the first prints.
    """

    checkpoint: Path
    """Run folder, as `python -m nanochat_native.train` leaves it."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    data: str | None = None
    """Text to measure on, as train's --data takes it, or `stdlib`; default: what the run was trained on."""
    text_column: str | None = None
    """Field of the records that holds the text; default: found, or for the run's own data what the run was given."""
    split: Literal["val", "train"] = "val"
    """Which part of the data: held out, or trained on."""
    max_tokens: int | None = None
    """Tokens to measure on, from the beginning; default: all."""
    core: Path | None = None
    """Folder with the CORE tasks, as nanochat's eval bundle: core.yaml, eval_data/, eval_meta_data.csv."""
    max_per_task: int | None = None
    """Items of each CORE task to use, after a shuffle that is always the same; default: all."""
    compare: Path | None = None
    """Run folder of a second model, to be measured on the same text and tasks; may be the same run's."""
    compare_step: int | None = None
    """Checkpoint of the second model; default: the newest."""
    device_batch_size: int = 8
    """Sequences that go through the model at once; of CORE's prompts as many as have so many sequences' tokens."""
    device: Literal["cpu", "cuda"] | None = None
    """Default: the GPU where there is one."""
    out: Path | None = None
    """Folder for result.json: flags, versions, and what was measured, kept up after each task."""
    json: bool = False
    """Print one line of JSON."""

    def check(self) -> None:
        """Raises ValueError for flags that do not fit."""
        if self.device_batch_size < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            given = f"--device-batch-size is {self.device_batch_size}, --max-tokens {self.max_tokens}"
            raise ValueError(f"{given}; both take a number from 1")
        if self.max_per_task is not None and self.core is None:
            raise ValueError(f"--max-per-task is {self.max_per_task}; it goes with --core FOLDER alone")
        if self.compare_step is not None and self.compare is None:
            raise ValueError(f"--compare-step is {self.compare_step}; it goes with --compare RUN alone")


@dataclass
class Session:
    """What a call measures with: the tasks of CORE, none without --core; the folder of --out, on the first rank."""

    options: Options
    world: World
    console: Console
    device: torch.device
    tasks: list[core_score.Task]
    folder: Path | None

    def load(self, run: Path, step: int | None) -> tuple[GPT, Tokenizer, int]:
        """The model, its tokenizer and its step, on every rank."""
        model, tokenizer, meta = self.world.run_collectively(
            lambda: load_model(run, step, self.device, warn=self.warn), *MISTAKES
        )
        return model, tokenizer, meta["step"]

    def warn(self, text: str) -> None:
        """A line on stderr, of the first rank."""
        if self.world.is_rank0:
            print(text, file=sys.stderr)

    def batches(self, run: Path, tokenizer: Tokenizer, sequence_len: int) -> Iterator[data.Batch]:
        """This rank's part of the text, in the tokens of that run."""
        options, world = self.options, self.world

        def prepare() -> data.Corpus:
            source, text_column = options.data, options.text_column
            if source is None:
                config = run_folder.load_config(options.checkpoint)
                if isinstance(config, FinetuneConfig):
                    raise ValueError(f"{options.checkpoint} was fine-tuned on conversations; give text by --data")
                source = config.data
                text_column = config.text_column if text_column is None else text_column
            cache_dir = run_folder.load_config(run).cache_dir
            assert cache_dir is not None, "a run's config.json holds every value"
            return data.prepare(
                None if source == STDLIB else source,
                vocab_size=tokenizer.vocab_size,
                cache_dir=cache_dir,
                tokenizer=tokenizer,
                text_column=text_column,
                needs_training=options.split == "train",
                log=None if options.data is None else lambda note: self.warn(f"data     {note}"),
            )

        # One rank of a machine builds the shards, the others find them.
        corpus = world.run_collectively(
            prepare if world.local_rank == 0 else lambda: None, *MISTAKES, long_running=True
        )
        corpus = prepare() if corpus is None else corpus
        return data.iterate_val(
            corpus.val if options.split == "val" else corpus.train,
            batch_rows=options.device_batch_size,
            sequence_len=sequence_len,
            max_tokens=options.max_tokens,
            device=self.device,
            rank=world.rank,
            world_size=world.size,
        )

    def show(self, what: str, done: int, total: int) -> None:
        """The live line."""
        self.console.live(f"{what} {console.bar(done, total)}")

    def measure(self, record: dict[str, Any], keep: Callable[[], None]) -> None:
        """Adds to a record that has checkpoint and step what is measured of it; `keep` is called after each task."""
        run, world = Path(record["checkpoint"]), self.world
        model, tokenizer, record["step"] = self.load(run, record["step"])
        batches = self.batches(run, tokenizer, model.config.sequence_len)
        with autocast(self.device):
            result = evaluate(model, batches, tokenizer.token_bytes, world)
            record |= result._asdict()
            results: list[core_score.TaskResult] = []
            for number, task in enumerate(self.tasks, 1):
                results.append(
                    core_score.evaluate_task(
                        model,
                        tokenizer,
                        task,
                        batch_tokens=self.options.device_batch_size * model.config.sequence_len,
                        world=world,
                        progress=functools.partial(self.show, f"CORE {number}/{len(self.tasks)} {task.label}"),
                    )
                )
                finished = number == len(self.tasks)
                record["core"] = {
                    "score": core_score.score(results) if finished else None,
                    "tasks": [result._asdict() for result in results],
                }
                keep()


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of two records, the other's figures less the one's, as far as both have them; of CORE's tasks the centred."""
    found: dict[str, Any] = {name: other[name] - one[name] for name in ("bpb", "loss") if name in other}
    if "core" in other:
        scores = [record["core"]["score"] for record in (one, other)]
        mine, theirs = ({task["task"]: task["centred"] for task in record["core"]["tasks"]} for record in (one, other))
        found["core"] = {
            "score": None if None in scores else scores[1] - scores[0],
            "tasks": {name: theirs[name] - mine[name] for name in mine if name in theirs},
        }
    return found


def report(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is printed as JSON and kept in result.json: the first record, the second as `compare`, the `difference`."""
    if len(records) == 1:
        return records[0]
    return records[0] | {"compare": records[1], "difference": difference(*records)}


def describe(records: Sequence[dict[str, Any]], tasks: int) -> str:
    """The records for the eye: a line, and a table of CORE's tasks; or both side by side, and the difference."""
    lines = []
    for letter, record in zip("AB", records, strict=False):
        size = f"{record['targets']:,} tokens, {record['bytes']:,} bytes" if "bpb" in record else "not measured"
        figures = f"{record['bpb']:.4f} bits per byte | {record['loss']:.4f} nats a token | " if "bpb" in record else ""
        where = f"{letter}  {record['checkpoint']} step {record['step']} | " if len(records) == 2 else ""
        lines.append(where + figures + size)
    changes = difference(*records) if len(records) == 2 else {}
    if "bpb" in changes:
        lines.append(f"B - A  {changes['bpb']:+.4f} bits per byte | {changes['loss']:+.4f} nats a token")
        if records[0]["bytes"] != records[1]["bytes"]:
            lines.append("A and B were measured on texts of different length")
    measured = [record["core"] for record in records if "core" in record]
    if not measured:
        return "\n".join(lines)
    lines += ["", *table([one["tasks"] for one in measured])]
    scores = [one["score"] for one in measured]
    for letter, one in zip("AB", measured, strict=False):
        name = "CORE" if len(records) == 1 else f"CORE of {letter}"
        done = len(one["tasks"])
        score = f"not known: {done} of {tasks} tasks done" if one["score"] is None else f"{one['score']:.4f}"
        lines.append(f"{name}  {score}")
        for kind, what in (("cropped", "lost their beginning"), ("cut", "lost a part of what is scored")):
            count = sum(task[kind] for task in one["tasks"])
            if count:
                lines.append(f"{name}  {count:,} prompts are longer than the model's sequence and {what}")
    if len(scores) == 2 and None not in scores:
        lines.append(f"B - A  {scores[1] - scores[0]:+.4f} CORE")
    return "\n".join(lines)


def table(measured: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Lines with a task each, of one model, or of two with the difference of the centred accuracies."""
    marks = [""] if len(measured) == 1 else [" A", " B"]
    rows = [["task", "type", "shots", "items"]]
    rows[0] += [f"{name}{mark}" for name in ("accuracy", "centred") for mark in marks] + ["B - A"] * (len(marks) - 1)
    for i, first in enumerate(measured[0]):
        found = [tasks[i] for tasks in measured if i < len(tasks)]
        missing = ["-"] * (len(measured) - len(found))
        row = [first["task"], first["type"], str(first["shots"]), str(first["items"])]
        for name in ("accuracy", "centred"):
            row += [f"{task[name]:.4f}" for task in found] + missing
        if len(measured) == 2:
            row += missing or [f"{found[1]['centred'] - found[0]['centred']:+.4f}"]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def run(options: Options, world: World | None = None) -> int:
    """Measures and prints. Ctrl-C ends it with what is measured until then. Returns the exit code.

    Raises, before any work, what Options.check, core.read_bundle and lab.open_folder do; then what load_model and
    data.prepare do.
    """
    world = world or World()
    console = Console(as_json=options.json) if world.is_rank0 else SilentConsole()

    def begin() -> Session:
        options.check()
        device = pick_device(options.device)
        tasks = [] if options.core is None else core_score.read_bundle(options.core, options.max_per_task)
        folder = results.open_folder(options.out, "evaluate") if options.out is not None and world.is_rank0 else None
        return Session(options, world, console, device, tasks, folder)

    session = world.run_collectively(begin, *MISTAKES)
    records: list[dict[str, Any]] = [{"checkpoint": str(options.checkpoint), "step": options.step}]
    if options.compare is not None:
        records.append({"checkpoint": str(options.compare), "step": options.compare_step})
        session.load(options.compare, options.compare_step)  # what is wrong with it is said before hours of the first

    def keep(finished: bool = False) -> None:
        if session.folder is not None:
            found = results.result("evaluate", options, None, finished=finished, device=str(session.device))
            results.write(session.folder, found | report(records))

    interrupted = False
    try:
        for record in records:
            session.measure(record, keep)
    except KeyboardInterrupt:
        if "bpb" not in records[0]:
            raise
        interrupted = True
    keep(finished=not interrupted)
    console.end_line()
    if world.is_rank0:  # not by the console: what was measured is to arrive, or the exit code tells
        print(json.dumps(report(records)) if options.json else describe(records, len(session.tasks)))
        if session.folder is not None and not options.json:
            print(f"result   {session.folder / pictures.RESULT}")
        sys.stdout.flush()
    if interrupted:
        print("interrupted", file=sys.stderr)
    return distributed.exit_rank(130) if interrupted else 0
