"""Exercises of chapter 8, data and the loop."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat_native.data import TokenStream
from nanochat_native.exercises.base import Experiment, Number, Write

# --- 8.1: the steps of an epoch ---

TOKENS, LENGTH, ROWS = 2_532_843, 256, 8  # of the training text of d4, of a row, of a step


def windows() -> int:
    """Return the number of rows in an epoch of d4's text."""
    return TokenStream([np.zeros(TOKENS, dtype=np.uint16)]).num_windows(LENGTH)


# --- 8.2: the mean of a batch with unequal micro-batches ---

LOSSES, COUNTS = (2.5, 2.1), (16, 64)


def mean_over_targets() -> float:
    """Return the mean over all targets of two micro-batches."""
    return sum(loss * count for loss, count in zip(LOSSES, COUNTS, strict=True)) / sum(COUNTS)


def mean_with_exchanged_weights() -> float:
    """Return the mean with the weight of each micro-batch given to the other."""
    return sum(loss * count for loss, count in zip(LOSSES, reversed(COUNTS), strict=True)) / sum(COUNTS)


# --- 8.3: find the bug in the loader ---

BATCH = '''def batch(tokens, step, rows, length):
    """Return (inputs, targets), each (rows, length), of a step, from tokens (n,).

    Over all steps every token but the first is a target once. There are enough tokens for this step.
    """
    needed = rows * length + 1
    taken = tokens[step * needed : (step + 1) * needed]
    return taken[:-1].view(rows, length), taken[1:].view(rows, length)
'''


def _cut(tokens: Tensor, start: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    taken = tokens[start : start + rows * length + 1]
    return taken[:-1].view(rows, length), taken[1:].view(rows, length)


def batch(tokens: Tensor, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a step, in the order of the text."""
    return _cut(tokens, step * rows * length, rows, length)


def batch_loses_a_target(tokens: Tensor, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the result of the stub."""
    return _cut(tokens, step * (rows * length + 1), rows, length)


def batch_without_shift(tokens: Tensor, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return inputs as targets."""
    inputs, _ = batch(tokens, step, rows, length)
    return inputs, inputs.clone()


def batch_in_columns(tokens: Tensor, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return rows that jump through the text."""
    inputs, targets = (part.flatten().view(length, rows).T for part in batch(tokens, step, rows, length))
    return inputs, targets


def batch_that_overlaps(tokens: Tensor, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return a step that begins one row after the one before."""
    return _cut(tokens, step * length, rows, length)


def batch_of_the_original_guide(tokens: Tensor, step: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Take one token too few."""
    taken = tokens[step * rows * length : (step + 1) * rows * length]
    return taken[:-1].view(rows, -1), taken[1:].view(rows, -1)


def batch_inputs() -> list[tuple[Any, ...]]:
    """Return a text and several steps."""
    tokens = torch.randint(1000, (200,), generator=torch.Generator().manual_seed(3))
    return [(tokens, 0, 2, 8), (tokens, 1, 2, 8), (tokens, 3, 4, 5)]


# --- 8.4: accumulate a gradient ---

ACCUMULATE = '''def accumulate(gradient, x, y, sizes):
    """Return the gradient of the mean loss over all rows of x and y, from micro-batches.

    gradient(x, y) returns the gradient of the mean loss over the rows that it is given. sizes are the numbers of rows
    of the micro-batches, in order. They differ. Call gradient once for each micro-batch.
    """
    raise NotImplementedError
'''

Gradient = Callable[[Tensor, Tensor], Tensor]


def mean_gradient(x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the mean of (x w - y)^2 at w = 1 for each column of x."""
    return 2 * x.T @ (x.sum(1) - y) / len(x)


def _parts(gradient: Gradient, x: Tensor, y: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [gradient(a, b) for a, b in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)]


def accumulate(gradient: Gradient, x: Tensor, y: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the sum of the gradients, weighted by their shares of the rows."""
    found = torch.zeros(x.shape[1])
    for part, size in zip(_parts(gradient, x, y, sizes), sizes, strict=True):
        found += part * size / sum(sizes)
    return found


def accumulate_equal_weights(gradient: Gradient, x: Tensor, y: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the mean of the gradients."""
    return torch.stack(_parts(gradient, x, y, sizes)).mean(0)


def accumulate_without_division(gradient: Gradient, x: Tensor, y: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the sum of the gradients."""
    return torch.stack(_parts(gradient, x, y, sizes)).sum(0)


def accumulate_only_the_last(gradient: Gradient, x: Tensor, y: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the gradient of the last micro-batch."""
    return _parts(gradient, x, y, sizes)[-1]


def accumulate_a_sum(gradient: Gradient, x: Tensor, y: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the gradient of the sum over the rows."""
    return accumulate(gradient, x, y, sizes) * sum(sizes)


def accumulate_inputs() -> list[tuple[Any, ...]]:
    """Return rows cut in several ways."""
    generator = torch.Generator().manual_seed(8)
    x, y = torch.randn(12, 3, generator=generator), torch.randn(12, generator=generator)
    return [(mean_gradient, x, y, sizes) for sizes in ((12,), (2, 10), (1, 3, 8))]


# --- 8.5: another cut of the batch ---


def judge(record: dict[str, Any]) -> tuple[bool, str]:
    """Judge two runs whose micro-batches differ."""
    finals = {row["case"]: row["value"] for row in record["rows"]}
    whole, parts = finals["8 rows"], finals["1 row"]
    gap = abs(whole - parts)
    if gap > 0.02:
        return False, f"the runs end {gap:.4f} bits per byte apart; two cuts of a batch should differ by rounding only"
    return True, f"the runs end at {whole:.4f} and {parts:.4f}: {gap:.4f} bits per byte apart, from rounding alone"


EXERCISES = (
    Number(
        "8.1",
        "Steps of an epoch of d4's training text",
        answer=lambda: windows() / ROWS,
        unit="steps",
        tolerance=0.001,
        mistakes={
            "those are rows; a step has eight": lambda: float(windows()),
            "2,048 tokens are all eight rows of a step": lambda: windows() / ROWS**2,
            "those are the steps of the run; the text is longer than the run": lambda: 358.0,
        },
    ),
    Number(
        "8.2",
        "Mean loss of a batch of two micro-batches with different numbers of targets",
        answer=mean_over_targets,
        unit="nats",
        tolerance=0.001,
        mistakes={
            "that is the mean of the means: each target of the small micro-batch counts four times": lambda: (
                sum(LOSSES) / len(LOSSES)
            ),
            "the weights are exchanged": mean_with_exchanged_weights,
            "that is the sum of the two means": lambda: sum(LOSSES),
        },
    ),
    Write(
        "8.3",
        "Find the bug: a loader that loses targets",
        BATCH,
        batch,
        {
            "the last token of a step is not the first of the next: one target a step is lost": batch_loses_a_target,
            "the targets are the inputs; they must be shifted by one": batch_without_shift,
            "a row jumps through the text: neighbors in a row must be neighbors in the text": batch_in_columns,
            "a step begins one row after the one before: most targets are read several times": batch_that_overlaps,
            "it takes rows * length tokens; the targets need one more (the original guide's listing, B1)": (
                batch_of_the_original_guide
            ),
        },
        batch_inputs,
    ),
    Write(
        "8.4",
        "The gradient of a batch from unequal micro-batches",
        ACCUMULATE,
        accumulate,
        {
            "equal weights: a row of a small micro-batch counts more than one of a large one": accumulate_equal_weights,
            "the sum of the means is not divided: the gradient grows with the number of parts": (
                accumulate_without_division
            ),
            "only the last micro-batch counts: the gradient is overwritten": accumulate_only_the_last,
            "that is the gradient of the sum over the rows; the loss is their mean": accumulate_a_sum,
        },
        accumulate_inputs,
    ),
    Experiment(
        "8.5",
        "One row or eight rows in a micro-batch",
        command='python -m nanochat_native.compare --recipe october --cases "8 rows: --device-batch-size 8" '
        '"1 row: --device-batch-size 1" --rates 1 --seeds 1 --out lab/exercise-8-5',
        folder="lab/exercise-8-5",
        judge=judge,
    ),
)
