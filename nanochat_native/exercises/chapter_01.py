"""Exercises of chapter 1, one command."""

import math
import random
from typing import Any

import torch
from torch import Tensor

from nanochat_native.exercises.base import Experiment, Number, Write

# --- 1.1: an untrained model ---

VOCABULARY, TOKEN_BYTES = 4096, 3

# --- 1.2: the size of compressed text ---

LOSS, TOKENS, TEXT_BYTES = 3.6, 200_000, 900_000


def compressed_kilobytes() -> float:
    """Return the size of the text after arithmetic coding with the model."""
    return LOSS * TOKENS / math.log(2) / 8 / 1000


# --- 1.3: find the bug in the order of the data ---

ROWS = '''def order_of(key, windows):
    """Return the numbers below `windows` in an order that depends on the text `key` alone."""
    import random

    order = list(range(windows))
    random.Random(key).shuffle(order)
    return order


def rows_of_step(seed, step, rows, windows):
    """Return the windows that step `step` reads: `rows` of them, where `rows` divides `windows`.

    An epoch, which is windows / rows steps, reads each window once. Each epoch has another order. Steps count from 0.
    The key of an order is the seed, a space and another number.
    """
    epoch, place = divmod(step * rows, windows)
    order = order_of(f"{seed} {step}", windows)
    return order[place : place + rows]
'''


def order_of(key: str, windows: int) -> list[int]:
    """Return the numbers below `windows` in an order that depends on the text `key` alone."""
    order = list(range(windows))
    random.Random(key).shuffle(order)
    return order


def rows_of_step(seed: int, step: int, rows: int, windows: int) -> list[int]:
    """Return the windows of a step; the steps of an epoch share an order."""
    epoch, place = divmod(step * rows, windows)
    return order_of(f"{seed} {epoch}", windows)[place : place + rows]


def rows_by_step(seed: int, step: int, rows: int, windows: int) -> list[int]:
    """Return the result of the stub."""
    place = step * rows % windows
    return order_of(f"{seed} {step}", windows)[place : place + rows]


def rows_without_epoch(seed: int, step: int, rows: int, windows: int) -> list[int]:
    """Return the windows of a step, with one order for all epochs."""
    place = step * rows % windows
    return order_of(f"{seed}", windows)[place : place + rows]


def rows_without_seed(seed: int, step: int, rows: int, windows: int) -> list[int]:
    """Return the windows of a step, with the same order for all seeds."""
    epoch, place = divmod(step * rows, windows)
    return order_of(f"{epoch}", windows)[place : place + rows]


def rows_of_the_first_step(seed: int, step: int, rows: int, windows: int) -> list[int]:
    """Return the first windows of the epoch, whatever the step."""
    return order_of(f"{seed} {step * rows // windows}", windows)[:rows]


def rows_in_order(seed: int, step: int, rows: int, windows: int) -> list[int]:
    """Return the windows of a step in the order of the text."""
    place = step * rows % windows
    return list(range(windows))[place : place + rows]


def step_inputs() -> list[tuple[Any, ...]]:
    """Return steps of two epochs, and of another seed."""
    return [(0, step, 4, 20) for step in range(10)] + [(7, step, 4, 20) for step in (0, 3, 6)]


# --- 1.4: bits per byte ---

BITS = '''def bits_per_byte(nats, lengths):
    """Return the bits per byte of a text.

    nats (N,): the loss of each target. lengths (N,): the bytes that it stands for; 0 for special tokens, which are left
    out.
    """
    raise NotImplementedError
'''


def bits_per_byte(nats: Tensor, lengths: Tensor) -> Tensor:
    """Return the bits of all targets that stand for bytes, by those bytes."""
    return nats[lengths > 0].sum() / math.log(2) / lengths.sum()


def with_special_tokens(nats: Tensor, lengths: Tensor) -> Tensor:
    """Return the bits of all targets by the bytes."""
    return nats.sum() / math.log(2) / lengths.sum()


def nats_per_byte(nats: Tensor, lengths: Tensor) -> Tensor:
    """Return the nats by the bytes."""
    return nats[lengths > 0].sum() / lengths.sum()


def mean_of_ratios(nats: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean of the bits per byte of each target."""
    kept = lengths > 0
    return (nats[kept] / lengths[kept]).mean() / math.log(2)


def bits_per_token(nats: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean of the bits of a target."""
    return nats[lengths > 0].mean() / math.log(2)


def entropy_by_eight(nats: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean loss by 8."""
    return nats[lengths > 0].mean() / 8


def losses() -> list[tuple[Any, ...]]:
    """Return losses and lengths, with and without special tokens."""
    generator = torch.Generator().manual_seed(14)
    nats = torch.rand(40, generator=generator) * 8
    lengths = torch.randint(1, 9, (40,), generator=generator)
    special = lengths.clone()
    special[::13] = 0
    return [(nats, lengths), (nats, special)]


# --- 1.5: two depths ---


def judge_depths(result: dict[str, Any]) -> tuple[bool, str]:
    """Return whether the result compares two and three layers on several seeds, and what it shows."""
    rows = {row["case"]: row for row in result["rows"]}
    if not {"two", "three"} <= rows.keys() or min(row["seeds"] for row in rows.values()) < 2:
        return False, "the result must have the cases two and three, each with at least two seeds"
    difference = rows["two"]["value"] - rows["three"]["value"]
    spread = max(rows[name]["spread"] for name in ("two", "three"))
    verdict = "is more than the spread" if abs(difference) > spread else "is within the spread and ranks nothing"
    return (
        True,
        f"three layers are better by {difference:.4f} bits per byte, which {verdict} of the seeds, {spread:.4f}",
    )


EXERCISES = (
    Number(
        "1.1",
        "Bits per byte before training",
        answer=lambda: math.log2(VOCABULARY) / TOKEN_BYTES,
        unit="bits per byte",
        mistakes={
            "these are nats per byte: use the logarithm to base 2": lambda: math.log(VOCABULARY) / TOKEN_BYTES,
            "these are bits per token: divide by the bytes of a token": lambda: math.log2(VOCABULARY),
            "this is an uncompressed byte: the tokenizer already helps": lambda: 8.0,
        },
    ),
    Number(
        "1.2",
        "The size of compressed text",
        answer=compressed_kilobytes,
        unit="kB",
        mistakes={
            "nats are taken for bits: divide by ln 2": lambda: LOSS * TOKENS / 8 / 1000,
            "these are kilobits: a byte has 8 bits": lambda: 8 * compressed_kilobytes(),
            "the loss is per token, not per byte": lambda: LOSS * TEXT_BYTES / math.log(2) / 8 / 1000,
        },
    ),
    Write(
        "1.3",
        "An order of data that can be resumed",
        stub=ROWS,
        right=rows_of_step,
        wrong={
            "each step shuffles anew, so an epoch reads some windows twice and others never": rows_by_step,
            "every epoch has the same order": rows_without_epoch,
            "every seed has the same order": rows_without_seed,
            "every step of an epoch reads the same windows": rows_of_the_first_step,
            "the windows are read in the order of the text": rows_in_order,
        },
        inputs=step_inputs,
    ),
    Write(
        "1.4",
        "Bits per byte",
        stub=BITS,
        right=bits_per_byte,
        wrong={
            "special tokens stand for no bytes, but their losses are counted": with_special_tokens,
            "these are nats per byte: divide by ln 2": nats_per_byte,
            "this is the mean of ratios; the ratio of sums is right": mean_of_ratios,
            "these are bits per token: the lengths are not used": bits_per_token,
            "a loss divided by 8 is no number of bits per byte": entropy_by_eight,
        },
        inputs=losses,
    ),
    Experiment(
        "1.5",
        "Two layers and three",
        command='python -m nanochat_native.compare --recipe october --cases "two: --depth 2" "three: --depth 3" '
        "--rates 1 --seeds 2 "
        "--out lab/exercise-1-5",
        folder="lab/exercise-1-5",
        judge=judge_depths,
    ),
)
