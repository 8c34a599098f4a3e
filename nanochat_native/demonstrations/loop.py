"""A step of training, its data, and what a killed run leaves (chapter 8)."""

import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from nanochat_native.data import Batch, BatchLoader, Corpus, TokenStream
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import Muon, clip_reduced_, setup_optimizers
from nanochat_native.optim.schedule import lr_at, momentum_at
from nanochat_native.runs import checkpoint as checkpoints
from nanochat_native.runs import metrics_log
from nanochat_native.runs.config import TrainConfig, resolve_device
from nanochat_native.runs.run_folder import load_config
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.training import resolve
from nanochat_native.training import trainer as trainer_module
from nanochat_native.training.pretraining import Pretraining
from nanochat_native.training.trainer import Trainer

VOCABULARY, LENGTH, ROWS = 300, 32, 8
SUCCESSORS = 4  # tokens that may follow a token of the chain
BATCHES = 20  # the first steps of a run, whose data is shown
TIMED_STEPS = 5


def chain(length: int, seed: int = 0) -> TokenStream:
    """Return a random text in which SUCCESSORS tokens may follow each token, so that a small model can learn it."""
    rng = np.random.default_rng(seed)
    successors = rng.integers(VOCABULARY, size=(VOCABULARY, SUCCESSORS))
    choices = rng.integers(SUCCESSORS, size=length)
    tokens = np.empty(length, dtype=np.uint16)
    token = 0
    for place, choice in enumerate(choices):
        tokens[place] = token = successors[token, choice]
    return TokenStream([tokens])


@functools.cache
def chain_corpus(seed: int = 0) -> Corpus:
    """Return the chain as a corpus without a tokenizer."""
    train, val = chain(60_000, seed).split_at(56_000)
    return Corpus(None, VOCABULARY, train, val, "a chain of tokens", (), f"chain {seed}", None)


def small_config(**flags: Any) -> TrainConfig:
    """Return the flags of a small run on the chain."""
    config = TrainConfig(
        recipe="october",
        depth=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_seq_len=LENGTH,
        total_batch_size=ROWS * LENGTH,
        device_batch_size=2,
        num_iterations=12,
        eval_tokens=512,
        sample_every=0,
        device="cpu",
    )
    return resolve_device(dataclasses.replace(config, **flags))


def small_trainer(**flags: Any) -> Trainer:
    """Return a small run on the chain."""
    return Trainer(small_config(**flags), SilentConsole(), task=Pretraining(chain_corpus()))


def plain_loop(config: TrainConfig, corpus: Corpus) -> list[float]:
    """Train as the config says, and return the loss of each step."""
    model = GPT(resolve.model_config(config))
    model.init_weights(config.seed)
    optimizers = setup_optimizers(model)
    rows, length = config.total_batch_size // config.max_seq_len, config.max_seq_len
    loader = BatchLoader(corpus.train, batch_rows=rows, sequence_len=length, seed=config.seed)
    losses = []
    for step in range(config.num_iterations):
        micro_batches = list(zip(*(part.split(config.device_batch_size) for part in loader.batch(step)), strict=True))
        loss = torch.zeros(())
        for inputs, targets in micro_batches:
            micro_loss = model(inputs, targets) / len(micro_batches)
            micro_loss.backward()
            loss += micro_loss.detach()
        clip_reduced_(optimizers, config.grad_clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_at(step, config)
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum_at(step, config)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loop_in_20_lines() -> dict[str, Any]:
    """Compare the losses of the loop in twenty lines with those of the trainer, on the same data."""
    config = small_config(num_iterations=30)
    plain = plain_loop(config, chain_corpus())
    trainer = small_trainer(num_iterations=30)
    trainer.log = metrics_log.SilentLog()
    losses = []
    with trainer.loader.iterate() as batches:
        for _ in range(config.num_iterations):
            trainer.train_step(batches)
            losses.append(trainer.last_loss)
    return {
        "steps": config.num_iterations,
        "first": plain[0],
        "last": plain[-1],
        "ln_vocabulary": math.log(VOCABULARY),
        "differing_losses": sum(a != b for a, b in zip(plain, losses, strict=True)),
        "largest_difference": max(abs(a - b) for a, b in zip(plain, losses, strict=True)),
    }


def trained_for(steps: int) -> Trainer:
    """Return a small run after some steps, with gradients of zero."""
    trainer = small_trainer(num_iterations=100)
    trainer.log = metrics_log.SilentLog()
    with trainer.loader.iterate() as batches:
        for _ in range(steps):
            trainer.train_step(batches)
    return trainer


def accumulation() -> dict[str, Any]:
    """Compute one step's loss and gradient with the batch cut into 1, 2, 4 and 8 micro-batches.

    Then do it wrongly in two ways: without the division, and with an equal weight for micro-batches that have different
    numbers of targets.
    """
    trainer = trained_for(20)
    batch = trainer.loader.batch(trainer.step)
    cuts = []
    for parts in (1, 2, 4, 8):
        trainer.accumulation_steps = parts
        loss, norm = trainer.compute_gradients(batch)
        trainer.zero_grad()
        cuts.append({"micro_batches": parts, "loss": loss, "gradient_norm": norm})
    whole = cuts[0]
    norms = {}
    for parts in (1, 2, 4, 8):
        for x, y in zip(*(half.chunk(parts) for half in batch), strict=True):
            trainer.model(x, y).backward()
        norms[f"parts_{parts}"] = math.sqrt(sum(_square(p.grad) for p in trainer.model.parameters()))
        trainer.zero_grad()
    return {
        "cuts": cuts,
        "largest_relative_difference": {
            name: max(abs(cut[name] / whole[name] - 1) for cut in cuts) for name in ("loss", "gradient_norm")
        },
        "without_division": norms,
        "unequal": _unequal(trainer.model, batch),
    }


def _square(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else gradient.double().square().sum().item()


@torch.no_grad()
def _unequal(model: GPT, batch: Batch) -> dict[str, Any]:
    """Return the mean loss of a batch in which half of the rows have only a quarter of their targets, and the mean of
    the means of its micro-batches of two rows."""
    inputs, targets = batch[0], batch[1].clone()
    targets[: len(targets) // 2, LENGTH // 4 :] = -1
    losses = [model(x, y).item() for x, y in zip(inputs.split(2), targets.split(2), strict=True)]
    counts = [int((y >= 0).sum()) for y in targets.split(2)]
    right = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    return {
        "targets": counts,
        "losses": losses,
        "whole": model(inputs, targets).item(),
        "weighted_by_targets": right,
        "mean_of_means": statistics.mean(losses),
    }


def log_noise() -> dict[str, Any]:
    """Compare, at each step, the mean loss of the batch with the loss of its last row, in 60 steps of a small run."""
    trainer = small_trainer(num_iterations=60, device_batch_size=1)
    trainer.log = metrics_log.SilentLog()
    mean, last = [], []
    with trainer.loader.iterate() as batches:
        for step in range(60):
            inputs, targets = trainer.loader.batch(step)
            with torch.no_grad():
                last.append(trainer.model(inputs[-1:], targets[-1:]).item())
            trainer.train_step(batches)
            mean.append(trainer.last_loss)
    changes = {name: [b - a for a, b in itertools.pairwise(x[30:])] for name, x in (("mean", mean), ("last", last))}
    return {
        "mean_of_the_batch": mean,
        "last_row": last,
        "spread_between_steps": {name: statistics.pstdev(values) for name, values in changes.items()},
        "ratio": statistics.pstdev(changes["last"]) / statistics.pstdev(changes["mean"]),
        "expected_ratio": math.sqrt(ROWS),
    }


def batch_order() -> dict[str, Any]:
    """Count what one epoch of the loader holds, and what a loader loses that takes B T + 1 tokens from a queue."""
    stream = TokenStream([np.arange(10_007, dtype=np.uint16)])
    loader = BatchLoader(stream, batch_rows=4, sequence_len=32, seed=0)
    windows = loader.windows_per_epoch
    starts = np.concatenate([loader.positions(step) for step in range(windows // 4)])
    targets = {int(start) + offset for start in starts for offset in range(1, 33)}
    taken = 4 * 32 + 1
    return {
        "tokens": len(stream),
        "windows": windows,
        "targets_seen": len(targets),
        "targets_seen_twice": len(starts) * 32 - len(targets),
        "targets_left_out": len(stream) - 1 - windows * 32,
        "share_of_neighbours": float(np.mean(np.diff(starts) == 32)),
        "step_100_alone": loader.positions(100).tolist(),
        "step_100_after_the_others": [loader.positions(step).tolist() for step in range(101)][-1],
        "queue_loses_targets": (len(stream) - 1) // taken,
        "queue_loses_one_of": taken,
    }


def first_batches(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Find the places of the training text that the first steps of a run read."""
    trainer = _trainer_of(checkpoint)
    stream, tokenizer = trainer.corpus.train, trainer.corpus.tokenizer
    loader = trainer.loader
    assert isinstance(loader, BatchLoader)
    starts = [loader.positions(step).tolist() for step in range(BATCHES)]
    length = trainer.config.max_seq_len
    tokens = np.concatenate([stream.read(start, start + length + 1) for row in starts for start in row])
    in_bytes = 0 if tokenizer is None else int(tokenizer.token_bytes[torch.from_numpy(tokens)].sum())
    steps = trainer.config.num_iterations
    first = starts[0][0]
    return {
        "tokens_of_the_text": len(stream),
        "bytes_of_the_text": round(len(stream) * (trainer.corpus.bytes_per_token or 0)),
        "sequence_len": length,
        "rows_of_a_step": len(starts[0]),
        "steps": BATCHES,
        "positions": starts,
        "bytes_read": in_bytes,
        "share_read": BATCHES * len(starts[0]) * length / len(stream),
        "epochs_of_the_run": steps * len(starts[0]) / loader.windows_per_epoch,
        "windows_read_twice": BATCHES * len(starts[0]) - len({start for row in starts for start in row}),
        "first_row": "" if tokenizer is None else tokenizer.decode(stream.read(first, first + 24)),
    }


def _trainer_of(folder: Path) -> Trainer:
    """Return the run in a folder with its newest checkpoint, to look at. Nothing is written."""
    trainer = Trainer(load_config(folder), SilentConsole())
    trainer.step = trainer.checkpointer.load(lambda meta: None)[0]["step"]
    return trainer


def step_timeline(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Measure the processor time of each part of a step: data, forward and backward pass, clipping, optimizers.

    It is the time of the thread that leads the step, which other programs disturb less than the time on the clock. The
    steps continue from the newest checkpoint, with a rate of 0.
    """
    trainer = _trainer_of(checkpoint)
    timelines = []
    with trainer.loader.iterate(trainer.step) as batches:
        for _ in range(TIMED_STEPS + 1):
            timelines.append(_timed_step(trainer, batches.__next__))
    timelines = timelines[1:]  # the first step fills the caches
    fastest = min(timelines, key=lambda timeline: timeline[-1][2])  # the one that other programs disturb least
    total = fastest[-1][2]
    parts: dict[str, float] = {}
    for name, start, end in fastest:
        parts[name] = parts.get(name, 0.0) + end - start
    log = [record for record in metrics_log.read(checkpoint / "metrics.jsonl") if record["kind"] == "train"]
    waited, seconds = (sum(record[name] for record in log) for name in ("data_seconds", "seconds"))
    return {
        "tokens": trainer.config.total_batch_size,
        "micro_batches": trainer.accumulation_steps,
        "milliseconds": 1000 * total,
        "parts_ms": {name: 1000 * value for name, value in parts.items()},
        "shares": {name: value / total for name, value in parts.items()},
        "segments": [{"part": name, "start_ms": 1000 * a, "end_ms": 1000 * b} for name, a, b in fastest],
        "backward_over_forward": parts["backward"] / parts["forward"],
        "expected_backward_over_forward": _expected_ratio(trainer),
        "data_share_of_the_whole_run": waited / seconds,
        "steps_of_the_run": len(log),
    }


def _expected_ratio(trainer: Trainer) -> float:
    """Return the FLOPs of the backward pass over those of the forward pass. The head computes its gradient in the
    forward pass: three products there, and none later."""
    forward = trainer.flops_per_token / 3
    head = 2 * trainer.model.config.n_embd * trainer.model.config.vocab_size
    return 2 * (forward - head) / (forward + 2 * head)


def _timed_step(trainer: Trainer, next_batch: Callable[[], Batch]) -> list[tuple[str, float, float]]:
    """Do one step, and return (part, start, end) of each of its parts, in seconds of processor time."""
    found: list[tuple[str, float, float]] = []
    began = time.thread_time()

    @contextlib.contextmanager
    def timed(name: str) -> Any:
        start = time.thread_time() - began
        yield
        found.append((name, start, time.thread_time() - began))

    with timed("data"):
        batch = next_batch()
    micro_batches = list(trainer.micro_batches(batch))
    for x, y in micro_batches:
        with timed("forward"), trainer.autocast():
            loss = trainer.model(x, y) / len(micro_batches)
        with timed("backward"):
            loss.backward()
    with timed("clipping"):
        clip_reduced_(trainer.optimizers, trainer.config.grad_clip or math.inf)
    trainer.set_rates(0.0, momentum_at(trainer.step, trainer.config))
    with timed("optimizers"):
        trainer.update()
        trainer.zero_grad()
    return found


class Killed(BaseException):
    """Stands for the end of a process: no handler of the package catches it."""


# Where a run is ended: a label, the module or class, its function, and the number of the call that never returns.
KILL_POINTS: tuple[tuple[str, Any, str, int], ...] = (
    ("in the first save", checkpoints, "fsync", 1),
    ("in a step", trainer_module, "clip_reduced_", 7),
    ("in a save", checkpoints, "save_file", 3),
    ("before the rename", checkpoints, "_move_into_place", 2),
    ("before the evaluation", Trainer, "evaluate", 3),
    ("in an update", Muon, "step", 11),
    ("in the last save", checkpoints, "_move_into_place", 3),
)
STEPS, SAVE_EVERY = 12, 4


def kill_points() -> dict[str, Any]:
    """End a run of 12 steps at seven places, list what each leaves, resume it, and compare it with the whole run.

    A checkpoint is due every 4 steps. The run is ended by an exception that the package does not catch;
    tests/training/test_resume.py does the same with SIGKILL.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run(folder, "whole")
        expected = _losses(folder / "whole")
        for label, owner, function, number in KILL_POINTS:
            run = label.replace(" ", "-")
            with mock.patch.object(owner, function, _dying(getattr(owner, function), number)):
                try:
                    _run(folder, run)
                except Killed:
                    pass
                else:
                    raise AssertionError(f"{function} was not called {number} times")
            path = folder / run
            logged = max((step for kind, step, _ in _losses(path) if kind == "train"), default=0)
            kept = checkpoints.steps(path / "checkpoints")
            torn = sorted(entry.name for entry in (path / "checkpoints").glob(".tmp-*"))
            begins = checkpoints.latest(path / "checkpoints") or 0
            _run(folder, run, resume="auto")
            rows.append(
                {
                    "killed": label,
                    "last_logged_step": logged,
                    "checkpoints": kept,
                    "unfinished": torn,
                    "resumes_from": begins,
                    "steps_repeated": logged - begins,
                    "differing_losses": sum(a != b for a, b in zip(_losses(path), expected, strict=True)),
                    "unfinished_after": len(list((path / "checkpoints").glob(".tmp-*"))),
                }
            )
    return {
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "places": rows,
        "most_steps_repeated": max(row["steps_repeated"] for row in rows),
        "differing_losses": sum(row["differing_losses"] for row in rows),
    }


def _run(folder: Path, name: str, **flags: Any) -> None:
    trainer = small_trainer(
        num_iterations=STEPS, save_every=SAVE_EVERY, eval_every=SAVE_EVERY, out_dir=folder, run=name, keep=5, **flags
    )
    with mock.patch.object(trainer_module.report, "summarize", return_value={}):  # it draws a picture
        trainer.train()


def _losses(run: Path) -> list[tuple[str, int, Any]]:
    return [(r["kind"], r["step"], r.get("loss")) for r in metrics_log.read(run / "metrics.jsonl")]


def _dying(real: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Return a function that does as `real`, until its call `number` ends the run."""
    calls = itertools.count(1)

    def wrapped(*args: Any, **named: Any) -> Any:
        if next(calls) == number:
            raise Killed
        return real(*args, **named)

    return wrapped


DEMONSTRATIONS = {
    "accumulation": accumulation,
    "batch-order": batch_order,
    "first-batches": first_batches,
    "kill-points": kill_points,
    "log-noise": log_noise,
    "loop-in-20-lines": loop_in_20_lines,
    "step-timeline": step_timeline,
}
