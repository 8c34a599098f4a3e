"""The measurements of one `evaluate` command: bits per byte and CORE of one checkpoint or two."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nanochat_native import data
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.evaluation import core_score
from nanochat_native.evaluation.bits_per_byte import Evaluation, measure_text
from nanochat_native.evaluation.finished import Finished, hash_of, open_folder
from nanochat_native.model.gpt import GPT
from nanochat_native.model.quantization import Quantization, check_finite, round_weights_
from nanochat_native.runs import pictures, results, run_folder
from nanochat_native.runs.config import STDLIB, ChatTrainConfig
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime import console, distributed
from nanochat_native.runtime.command import MISTAKES
from nanochat_native.runtime.console import Console, SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.hardware import autocast, pick_device


@dataclass
class Options:
    """Measure the bits per byte of a trained model, and with --core its CORE score; with --compare of two models.

    Under torchrun the ranks share the work, and rank 0 prints.

    The guide explains it: docs/guide/13-using-it.md.
    """

    checkpoint: Path
    """Run folder of `python -m nanochat_native.train` or finetune."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    data: str | None = None
    """Text to measure on, as for train's --data, or `stdlib`; default: the data of the run."""
    text_column: str | None = None
    """Field of the records that has the text; default: detected, or for the run's own data the run's setting."""
    split: Literal["val", "train"] = "val"
    """Part of the data: val is held out, train was trained on."""
    max_tokens: int | None = None
    """Number of tokens to measure on, from the beginning; default: all."""
    core: Path | None = None
    """Folder with the CORE tasks in the layout of nanochat's eval bundle: core.yaml, eval_data/, eval_meta_data.csv."""
    max_per_task: int | None = None
    """Number of items to use from each CORE task, after a fixed shuffle; default: all."""
    compare: Path | None = None
    """Run folder of a second model to measure on the same text and tasks; may be the same folder."""
    compare_step: int | None = None
    """Checkpoint of the second model; default: the newest."""
    quantize: Quantization | None = None
    """int8: measure the checkpoint twice, as it is and with the weights of generate's --quantize int8."""
    device_batch_size: int = 8
    """Number of sequences that go through the model at once; CORE's batches have as many tokens."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Device to run on; default: a CUDA GPU if there is one, else the CPU."""
    out: Path | None = None
    """Folder for result.json with flags, versions and measurements, and finished.json for --resume; updated after each
    task."""
    resume: bool = False
    """Continue in the folder of --out: the text and the tasks that finished.json has from the same flags, model, data,
    versions, machine and number of ranks are not measured again."""
    json: bool = False
    """Print one line of JSON."""

    def check(self) -> None:
        """Raise ValueError for flags that are out of range or do not fit together."""
        for flag, value in (("--device-batch-size", self.device_batch_size), ("--max-tokens", self.max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be a whole number >= 1, got {value}")
        if self.max_per_task is not None and self.core is None:
            raise ValueError(f"--max-per-task {self.max_per_task} requires --core FOLDER")
        if self.compare_step is not None and self.compare is None:
            raise ValueError(f"--compare-step {self.compare_step} requires --compare RUN")
        if self.resume and self.out is None:
            raise ValueError("--resume requires --out FOLDER")
        if self.compare is not None and self.quantize is not None:
            raise ValueError("--compare must not be given with --quantize, which has a second model of its own")


@dataclass
class Session:
    """The options, ranks, device and tasks of one `evaluate` command.

    Attributes:
        tasks: CORE tasks; empty without --core.
        folder: Folder of --out; None without --out and on ranks other than 0.
        finished: The measurements that are in the folder.
    """

    options: Options
    world: World
    console: Console
    device: torch.device
    tasks: list[core_score.Task]
    folder: Path | None
    finished: Finished

    def load(self, run: Path, step: int | None) -> tuple[GPT, Tokenizer, int]:
        """Return the model, its tokenizer and its step, on every rank."""
        model, tokenizer, meta = self.world.run_collectively(
            lambda: load_model(run, step, self.device, warn=self.warn), *MISTAKES
        )
        return model, tokenizer, meta["step"]

    def warn(self, text: str) -> None:
        """Print a line to stderr on rank 0."""
        if self.world.is_rank0:
            print(text, file=sys.stderr)

    def corpus(self, run: Path, tokenizer: Tokenizer) -> tuple[data.Corpus, data.Packing]:
        """Return the text, tokenized as in `run`, with the part to measure on as `val`; and how rows are made of it."""
        options, world = self.options, self.world
        trained = run_folder.load_config(options.checkpoint)
        packing: data.Packing = "bestfit" if trained.packing == "bestfit" else "stream"
        is_own = options.data is None
        streamed = is_own and trained.tokenize == "while-training"
        if streamed and options.split == "train":
            raise ValueError(
                "--split must be val for a run of train's --tokenize while-training, which keeps no training tokens"
            )

        def prepare() -> data.Corpus:
            source, text_column = options.data, options.text_column
            if source is None:
                if isinstance(trained, ChatTrainConfig):
                    raise ValueError(f"{options.checkpoint} was fine-tuned on conversations; set --data to a text")
                source = trained.data
                text_column = trained.text_column if text_column is None else text_column
            cache_dir = run_folder.load_config(run).cache_dir
            rule: data.Validation = "fraction" if trained.validation == "auto" else trained.validation
            assert cache_dir is not None, "config.json of a run has every value"
            return data.prepare(
                None if source == STDLIB else source,
                vocab_size=tokenizer.vocab_size,
                cache_dir=cache_dir,
                tokenizer=tokenizer,
                text_column=text_column,
                validation=rule if is_own or rule == "fraction" else "shards",
                tokenize="while-training" if streamed else "ahead",
                needs_training=options.split == "train",
                log=None if options.data is None else lambda note: self.warn(f"data     {note}"),
            )

        # One rank of each machine builds the shards; the others read them.
        corpus = world.run_collectively(
            prepare if world.local_rank == 0 else lambda: None, *MISTAKES, long_running=True
        )
        corpus = prepare() if corpus is None else corpus
        if options.split == "train":
            corpus = replace(corpus, val=corpus.train)
        return corpus, packing

    def measure_text(self, model: GPT, tokenizer: Tokenizer, run: Path, model_hash: str) -> Evaluation:
        """Measure a model on the text, unless this is finished."""
        options, world = self.options, self.world
        corpus, packing = self.corpus(run, tokenizer)

        def facts() -> dict[str, Any]:
            return {
                "task": "text",
                "model": model_hash,
                "data": corpus.hash,
                "validation": corpus.val.fingerprint(),  # of token shards the hash may not tell which of them validate
                "packing": packing,
                "split": options.split,
                "max_tokens": options.max_tokens,
                "device_batch_size": options.device_batch_size,
            }

        def measure() -> Evaluation:
            batches = data.iterate_validation(
                corpus,
                packing=packing,
                batch_rows=options.device_batch_size,
                sequence_len=model.config.sequence_len,
                max_tokens=options.max_tokens,
                device=self.device,
                rank=world.rank,
                world_size=world.size,
            )
            return measure_text(model, batches, tokenizer.token_bytes, world)

        return self.finished.result(Evaluation, facts, measure)

    def measure_task(
        self, model: GPT, tokenizer: Tokenizer, task: core_score.Task, number: int, model_hash: str
    ) -> core_score.TaskResult:
        """Measure a model in a CORE task, unless this is finished. number: the task's, from 1."""

        def facts() -> dict[str, Any]:
            return {
                "task": task.label,
                "model": model_hash,
                "data": core_score.hash_of(task),
                "tokenizer": tokenizer.hash,
                "device_batch_size": self.options.device_batch_size,
            }

        def measure() -> core_score.TaskResult:
            return core_score.evaluate_task(
                model,
                tokenizer,
                task,
                batch_tokens=self.options.device_batch_size * model.config.sequence_len,
                world=self.world,
                progress=functools.partial(self.show, f"CORE {number}/{len(self.tasks)} {task.label}"),
            )

        return self.finished.result(core_score.TaskResult, facts, measure)

    def show(self, what: str, done: int, total: int) -> None:
        """Update the live line."""
        self.console.live(f"{what} {console.bar(done, total)}")

    def measure(self, records: Sequence[dict[str, Any]], keep: Callable[[], None]) -> None:
        """Measure one checkpoint and add the results to its records; call `keep` after each task.

        The first record is of the checkpoint as it is, the second, if there is one, of its rounded weights. Both are of
        one load, because a run in progress can save and remove checkpoints between two.
        """
        model, tokenizer, step = self.load(Path(records[0]["checkpoint"]), records[0]["step"])
        if len(records) > 1:  # report its errors before hours of work
            self.world.run_collectively(functools.partial(check_finite, model), *MISTAKES)
        for record in records:
            record["step"] = step
        for record in records:
            if (quantize := record.get("quantize")) is not None:
                self.world.run_collectively(functools.partial(round_weights_, model, quantize), *MISTAKES)
            self.measure_model(model, tokenizer, record, keep)

    def measure_model(self, model: GPT, tokenizer: Tokenizer, record: dict[str, Any], keep: Callable[[], None]) -> None:
        """Measure a model and add the results to the record; call `keep` after each task."""
        model_hash = "" if self.folder is None else hash_of(model)
        with autocast(self.device):
            result = self.measure_text(model, tokenizer, Path(record["checkpoint"]), model_hash)
            record |= result._asdict()
            task_results: list[core_score.TaskResult] = []
            for number, task in enumerate(self.tasks, 1):
                task_results.append(self.measure_task(model, tokenizer, task, number, model_hash))
                finished = number == len(self.tasks)
                record["core"] = {
                    "score": core_score.score(task_results) if finished else None,
                    "tasks": [result._asdict() for result in task_results],
                }
                keep()


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of `other` minus those of `one`, if both have them; for CORE's tasks the centered ones."""
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
    """Return the content of result.json: the first record, the second as `compare`, and the `difference`."""
    if len(records) == 1:
        return records[0]
    return records[0] | {"compare": records[1], "difference": difference(*records)}


def describe(records: Sequence[dict[str, Any]], tasks: int) -> str:
    """Return the records as text: a line for each, a table of CORE's tasks, and for two records the difference."""
    lines = []
    for letter, record in zip("AB", records, strict=False):
        size = f"{record['targets']:,} tokens, {record['bytes']:,} bytes" if "bpb" in record else "not measured"
        figures = (
            f"{record['bpb']:.4f} bits per byte | {record['loss']:.4f} nats per token | " if "bpb" in record else ""
        )
        rounded = f" {record['quantize']}" if "quantize" in record else ""
        where = f"{letter}  {record['checkpoint']} step {record['step']}{rounded} | " if len(records) == 2 else ""
        lines.append(where + figures + size)
    changes = difference(*records) if len(records) == 2 else {}
    if "bpb" in changes:
        lines.append(f"B - A  {changes['bpb']:+.4f} bits per byte | {changes['loss']:+.4f} nats per token")
        if records[0]["bytes"] != records[1]["bytes"]:
            lines.append("A and B were measured on texts of different lengths")
    measured = [record["core"] for record in records if "core" in record]
    if not measured:
        return "\n".join(lines)
    lines += ["", *table([one["tasks"] for one in measured])]
    scores = [one["score"] for one in measured]
    for letter, one in zip("AB", measured, strict=False):
        name = "CORE" if len(records) == 1 else f"CORE of {letter}"
        done = len(one["tasks"])
        score = f"unknown: {done} of {tasks} tasks done" if one["score"] is None else f"{one['score']:.4f}"
        lines.append(f"{name}  {score}")
        for kind, what in (("cropped", "lost their beginning"), ("cut", "lost scored tokens")):
            count = sum(task[kind] for task in one["tasks"])
            if count:
                lines.append(f"{name}  {count:,} prompts are longer than the model's sequence and {what}")
    if len(scores) == 2 and None not in scores:
        lines.append(f"B - A  {scores[1] - scores[0]:+.4f} CORE")
    return "\n".join(lines)


def table(measured: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Return a table with a line for each task, of one model, or of two with the difference of centered accuracies."""
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
    return console.aligned(rows)


def run(options: Options, world: World | None = None) -> int:
    """Measure and print; return the exit code. On Ctrl-C print what has been measured so far.

    Raises the errors of Options.check, core_score.read_bundle and finished.open_folder before any work, later those of
    load_model and data.prepare.
    """
    with contextlib.ExitStack() as until_the_end:
        return _run(options, world or World(), until_the_end)


def _run(options: Options, world: World, until_the_end: contextlib.ExitStack) -> int:
    """Do the work of `run`. until_the_end: keeps the folder of --out locked."""
    console = Console(as_json=options.json) if world.is_rank0 else SilentConsole()

    def begin() -> Session:
        options.check()
        device = pick_device(options.device)
        tasks = [] if options.core is None else core_score.read_bundle(options.core, options.max_per_task)
        folder = None
        if options.out is not None and world.is_rank0:
            folder = until_the_end.enter_context(open_folder(options.out, "evaluate", options))
        return Session(options, world, console, device, tasks, folder, Finished(options.out, "evaluate", device, world))

    session = world.run_collectively(begin, *MISTAKES)
    records: list[dict[str, Any]] = [{"checkpoint": str(options.checkpoint), "step": options.step}]
    if options.compare is not None:
        records.append({"checkpoint": str(options.compare), "step": options.compare_step})
        session.load(options.compare, options.compare_step)  # report its errors before hours of work on the first
    if options.quantize is not None:
        records.append(records[0] | {"quantize": options.quantize})

    def keep(finished: bool = False) -> None:
        if session.folder is not None:
            given = replace(options, resume=False)  # the result is that of a command which was not interrupted
            found = results.result("evaluate", given, None, finished=finished, device=str(session.device))
            results.write(session.folder, found | report(records))

    interrupted = False
    try:
        for of_one_checkpoint in [records] if options.quantize is not None else [[record] for record in records]:
            session.measure(of_one_checkpoint, keep)
    except KeyboardInterrupt:
        if "bpb" not in records[0]:
            raise
        interrupted = True
    keep(finished=not interrupted)
    console.end_line()
    if not interrupted:
        session.finished.drop_unused()
    if world.is_rank0:  # without the console: the result must arrive, or the exit code must tell
        print(json.dumps(report(records)) if options.json else describe(records, len(session.tasks)))
        if session.folder is not None and not options.json:
            print(f"result   {session.folder / pictures.RESULT}")
        sys.stdout.flush()
    if interrupted:
        print("interrupted", file=sys.stderr)
    return distributed.exit_rank(130) if interrupted else 0
