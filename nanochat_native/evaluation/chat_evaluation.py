"""The work of `chat_eval`: chooses the tasks, measures them, and prints and keeps the results."""

import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nanochat_native.data import conversations
from nanochat_native.evaluation import sandbox
from nanochat_native.evaluation.chat_score import Drawing, TaskResult, chatcore, evaluate, make_engine
from nanochat_native.evaluation.chat_tasks import CHATCORE, NAMES, WITHOUT_FILES, MissingTaskError, Task, read_task
from nanochat_native.evaluation.finished import Finished, hash_of, open_folder
from nanochat_native.inference.engine import Engine
from nanochat_native.inference.sampling import check_sampling
from nanochat_native.model.quantization import Quantization, check_quantization, round_weights_
from nanochat_native.runs import pictures, results
from nanochat_native.runs.saved_model import load_model
from nanochat_native.runtime import console, distributed
from nanochat_native.runtime.command import MISTAKES
from nanochat_native.runtime.console import Console, SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.files import sha256_json
from nanochat_native.runtime.hardware import autocast, pick_device

WITHOUT_CODE = "it runs programs that the model writes, and needs --allow-code"


@dataclass
class Options:
    """Measure a chat model in nanochat's tasks: multiple choice, mathematics, programs, spelling; and its ChatCORE.

    Under torchrun the ranks share the work, and rank 0 prints.
    """

    checkpoint: Path
    """Run folder of `python -m nanochat_native.finetune`."""
    data: Path | None = None
    """Folder with the files of the tasks, as `python -m nanochat_native.download arc mmlu gsm8k humaneval` fills it."""
    tasks: tuple[
        Literal["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "SimpleSpelling"], ...
    ] = ()
    """Tasks to measure; default: all whose files are there. The two of spelling have no files."""
    allow_code: bool = False
    """Run the programs that the model writes for HumanEval, in a sandbox."""
    step: int | None = None
    """Checkpoint to use; default: the newest."""
    max_problems: int | None = None
    """Number of problems of each task, after nanochat's shuffle; default: all."""
    num_samples: int = 1
    """Number of answers to each problem without choices; it is solved if one of them is right."""
    max_new_tokens: int = 512
    """Largest number of tokens of an answer."""
    temperature: float = 0.0
    """Temperature of the softmax; 0 takes the likeliest token."""
    top_k: int | None = 50
    """Draw from the k likeliest tokens; None for all."""
    seed: int = 0
    """Seed of the draws; the same seed gives the same answers."""
    device_batch_size: int = 8
    """Number of sequences that go through the model at once."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Device to run on; default: a CUDA GPU if there is one, else the CPU."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights and the cache; default: float32, on a CUDA GPU 16 bits."""
    quantize: Quantization | None = None
    """int8: generate with the matrices in int8, on a CPU. `evaluate --quantize int8` measures the cost."""
    out: Path | None = None
    """Folder for result.json with flags, versions and measurements, and finished.json for --resume; updated after each
    task."""
    resume: bool = False
    """Continue in the folder of --out: tasks that finished.json has from the same flags, model, data, versions, machine
    and number of ranks are not measured again."""
    json: bool = False
    """Print one line of JSON."""

    def check(self) -> None:
        """Raise ValueError for flags that are out of range or do not fit together."""
        for flag, value in (
            ("--max-problems", self.max_problems),
            ("--num-samples", self.num_samples),
            ("--max-new-tokens", self.max_new_tokens),
            ("--device-batch-size", self.device_batch_size),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be a whole number >= 1, got {value}")
        check_sampling(self.temperature, self.top_k, None)
        if self.resume and self.out is None:
            raise ValueError("--resume requires --out FOLDER")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"--num-samples {self.num_samples} requires a --temperature above 0, got 0")

    def drawing(self) -> Drawing:
        """Return how answers are drawn."""
        return Drawing(self.num_samples, self.max_new_tokens, self.temperature, self.top_k, self.seed)


def read_tasks(options: Options) -> tuple[list[Task], dict[str, str]]:
    """Return the tasks to measure, and for each that is left out the reason.

    Without --tasks, a task without files is left out, and so is HumanEval without --allow-code.

    Raises ValueError if a task of --tasks cannot be measured, if --data has files of no task, and for malformed files;
    OSError for files that cannot be read.
    """
    found: list[Task] = []
    left_out: dict[str, str] = {}
    for name in NAMES:
        if options.tasks and name not in options.tasks:
            continue
        try:
            if name == "HumanEval" and not options.allow_code:
                raise MissingTaskError(WITHOUT_CODE)
            found.append(read_task(name, options.data, options.max_problems))
        except MissingTaskError as error:
            if options.tasks:
                raise ValueError(f"{name} cannot be measured: {error}") from None
            left_out[name] = str(error)
    if options.data is not None and not options.tasks and all(task.name in WITHOUT_FILES for task in found):
        raise ValueError(f"--data must have the files of a task, got {options.data}: {left_out['ARC-Easy']}, ...")
    return found, left_out


def measure(
    options: Options,
    tasks: Sequence[Task],
    device: torch.device,
    console_: Console,
    world: World,
    record: dict[str, Any],
    finished: Finished,
    keep: Callable[[], None],
    warn: Callable[[str], None],
) -> None:
    """Measure the tasks that are not finished, and add the results to the record; call `keep` after each."""
    model, tokenizer, meta = world.run_collectively(
        lambda: load_model(options.checkpoint, options.step, device, warn=warn), *MISTAKES
    )
    record["step"] = meta["step"]
    for name, reason in record["left_out"].items():
        warn(f"{name}  left out: {reason}")
    if record["programs_see_files"]:
        warn("HumanEval  this system allows no namespaces: programs can read the files of this user, but write none")
    if not conversations.is_chat_trained(meta):
        warn(f"note: {options.checkpoint} was not fine-tuned on conversations, in whose form the problems are")

    def show(what: str, done: int, total: int) -> None:
        console_.live(f"{what} {console.bar(done, total)}")

    def prepare() -> Engine:
        with autocast(device, options.dtype):
            engine = make_engine(
                model, tokenizer, options.device_batch_size, options.max_new_tokens, quantize=options.quantize
            )
        if options.quantize is not None:  # for the choices; the engine has its own copy, which must be rounded once
            round_weights_(model, options.quantize)
        return engine

    engine = world.run_collectively(prepare, *MISTAKES)
    model_hash = hash_of(model) if options.out is not None and world.is_rank0 else ""
    for number, task in enumerate(tasks, 1):

        def facts(task: Task = task) -> dict[str, Any]:
            return {
                "task": task.name,
                "model": model_hash,
                "data": sha256_json([vars(problem) for problem in task.problems]),
                "tokenizer": tokenizer.hash,
                "drawing": dataclasses.asdict(options.drawing()),
                "device_batch_size": options.device_batch_size,
                "dtype": options.dtype,
                "quantize": options.quantize,
                "programs_see_files": task.name == "HumanEval" and record["programs_see_files"],
            }

        progress = functools.partial(show, f"{number}/{len(tasks)} {task.name}")
        measure_task = functools.partial(evaluate, task, engine, options.drawing(), world=world, progress=progress)
        with autocast(device, options.dtype):
            result = finished.result(TaskResult, facts, measure_task)
        record["tasks"].append(result._asdict())
        record["chatcore"] = chatcore({one["task"]: one["accuracy"] for one in record["tasks"]})
        keep()


def describe(record: dict[str, Any]) -> str:
    """Return the record as text: a table of the tasks, ChatCORE, and what the reader should know."""
    measured = [TaskResult(**task) for task in record["tasks"]]
    sampled = any(not math.isclose(task.sample_accuracy, task.accuracy) for task in measured)
    rows = [["task", "problems", "accuracy", *["per sample"] * sampled, "baseline", "centred", "seconds"]]
    for task in measured:
        figures = [task.accuracy, *[task.sample_accuracy] * sampled, task.baseline, task.centred]
        rows.append([task.task, str(task.problems), *(f"{figure:.4f}" for figure in figures), f"{task.seconds:.1f}"])
    lines = console.aligned(rows, left=1)
    if record["chatcore"] is None:
        missing = [name for name in CHATCORE if name not in (task.task for task in measured)]
        lines.append(f"ChatCORE  needs also {', '.join(missing)}")
    else:
        lines.append(f"ChatCORE  {record['chatcore']:.4f}")
    if flags := [f"--{name} {record[name]}" for name in ("dtype", "quantize") if name in record]:
        lines.append(f"measured with {' '.join(flags)}")
    for task in measured:
        if task.cut:
            lines.append(f"{task.task}  {task.cut:,} prompts are too long for the model and lost their end")
    return "\n".join(lines)


def run(options: Options, world: World | None = None) -> int:
    """Measure and print; return the exit code. On Ctrl-C print what has been measured so far.

    Raises the errors of Options.check, read_tasks, sandbox.check and finished.open_folder before any work, and later
    those of load_model.
    """
    with contextlib.ExitStack() as until_the_end:
        return _run(options, world or World(), until_the_end)


def _run(options: Options, world: World, until_the_end: contextlib.ExitStack) -> int:
    """Do the work of `run`. until_the_end: keeps the folder of --out locked."""
    console_ = Console(as_json=options.json) if world.is_rank0 else SilentConsole()

    def warn(text: str) -> None:
        if world.is_rank0:
            print(text, file=sys.stderr)

    def begin() -> tuple[torch.device, list[Task], dict[str, str], bool, Path | None, Finished]:
        options.check()
        device = pick_device(options.device)
        check_quantization(options.quantize, device)
        autocast(device, options.dtype)  # its error is reported before any work
        tasks, left_out = read_tasks(options)
        sees_files = any(task.name == "HumanEval" for task in tasks) and sandbox.check()
        folder = None
        if options.out is not None and world.is_rank0:
            folder = until_the_end.enter_context(open_folder(options.out, "chat_eval", options))
        return device, tasks, left_out, sees_files, folder, Finished(options.out, "chat_eval", device, world)

    device, tasks, left_out, sees_files, folder, finished_tasks = world.run_collectively(begin, *MISTAKES)
    record: dict[str, Any] = {"checkpoint": str(options.checkpoint), "step": options.step, "left_out": left_out}
    record |= {"programs_see_files": sees_files, "chatcore": None, "tasks": []}
    chosen = {"dtype": options.dtype, "quantize": options.quantize}
    record |= {name: value for name, value in chosen.items() if value is not None}

    def keep(finished: bool = False) -> None:
        if folder is not None:
            given = dataclasses.replace(options, resume=False)  # the result is that of a command without interruption
            found = results.result("chat_eval", given, None, finished=finished, device=str(device))
            results.write(folder, found | record)

    interrupted = False
    try:
        measure(options, tasks, device, console_, world, record, finished_tasks, keep, warn)
    except KeyboardInterrupt:
        if not record["tasks"]:
            raise
        interrupted = True
    keep(finished=not interrupted)
    console_.end_line()
    if not interrupted:
        finished_tasks.drop_unused()
    if world.is_rank0:  # without the console: the result must arrive, or the exit code must tell
        print(json.dumps(record) if options.json else describe(record))
        if folder is not None and not options.json:
            print(f"result   {folder / pictures.RESULT}")
        sys.stdout.flush()
    if interrupted:
        print("interrupted", file=sys.stderr)
    return distributed.exit_rank(130) if interrupted else 0
