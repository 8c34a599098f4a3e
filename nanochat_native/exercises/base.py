"""The kinds of exercises, and the check of each: a number, a function to write, an experiment."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat_native.exercises.values import describe, difference

SUFFIXES = {"%": 0.01, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
SUFFIXES |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class Verdict(NamedTuple):
    """The result of a check: whether the answer is right, and a line that says more."""

    right: bool
    text: str


@dataclass(frozen=True)
class Number:
    """An exercise whose answer is a number.

    Attributes:
        id: such as "4.2".
        answer: Returns the right number.
        unit: of the answer, in words.
        tolerance: largest relative difference of a right answer; an absolute one if the right number is 0.
        mistakes: a number for each known mistake, by what the mistake is.
    """

    id: str
    title: str
    answer: Callable[[], float]
    unit: str = ""
    tolerance: float = 0.01
    mistakes: dict[str, Callable[[], float]] = field(default_factory=dict)

    def parse(self, text: str) -> float:
        """Return the number that a reader typed: 3.1e6, 3_100_000, 3,100,000, 3.1M, 50%, 1/3, with or without the unit.

        Raises ValueError if it is none.
        """
        bare = text.strip().removesuffix(self.unit).strip() if self.unit else text.strip()
        match = re.fullmatch(r"([^/]+?)\s*(%|[kKMGBT]|[KMG]i)?(?:/([^/]+))?", bare)
        try:
            if match is None:
                raise ValueError
            numerator, suffix, denominator = match.groups()
            value = _plain_number(numerator) * SUFFIXES.get(suffix or "", 1.0)
            value /= _plain_number(denominator or "1")
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"exercise {self.id} takes a number such as 3.1e6, 3.1M or 50%, got {text!r}") from None
        if not math.isfinite(value):
            raise ValueError(f"exercise {self.id} takes a finite number, got {text!r}")
        return value

    def agrees(self, value: float, right: float) -> bool:
        """Return whether two numbers are the same within the tolerance."""
        return abs(value - right) <= self.tolerance * (abs(right) or 1.0)

    def check(self, value: float) -> Verdict:
        """Compare a number with the answer and with the known mistakes."""
        right = self.answer()
        unit = f" {self.unit}" if self.unit else ""
        if self.agrees(value, right):
            return Verdict(True, f"{_shown(right)}{unit}")
        for text, mistake in self.mistakes.items():
            if self.agrees(value, mistake()):
                return Verdict(False, text)
        if right == 0 or value == 0:
            return Verdict(False, f"{_shown(value)} is off by {abs(value - right):.3g}{unit}")
        ratio = value / right
        if ratio < 0:
            return Verdict(False, "the sign is wrong")
        size = "large" if ratio > 1 else "small"
        return Verdict(False, f"too {size} by a factor of {max(ratio, 1 / ratio):.4g}")


def _plain_number(text: str) -> float:
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", text.strip()):
        text = text.replace(",", "")
    return float(text)


def _shown(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"


@dataclass(frozen=True)
class Outcome:
    """The end of a call: the value that it returned, or the exception that it raised."""

    value: Any = None
    error: Exception | None = None

    def difference(self, other: Outcome, tolerance: float, *, dtypes: bool, messages: bool) -> str:
        """Return how this outcome differs from another, as a phrase; "" if it does not.

        Args:
            dtypes: Whether tensors must have the dtype of the other outcome.
            messages: Whether an exception must have the message of the other one.
        """
        if self.error is None and other.error is None:
            return difference(self.value, other.value, tolerance, dtypes=dtypes)
        if self.error is None:
            return f"it returns {describe(self.value)} where {type(other.error).__name__} is raised"
        if type(self.error) is type(other.error) and (not messages or str(self.error) == str(other.error)):
            return ""
        return f"it raises {type(self.error).__name__}"


@dataclass(frozen=True)
class Write:
    """An exercise whose answer is a function.

    The reader's function, the last one of the stub, is called with copies of the inputs. torch and random are seeded
    before each call.

    Attributes:
        stub: Source text of what the reader starts with. "Find the bug" is a stub with the bug in it.
        right: The right function.
        wrong: Functions with one known mistake each, by what the mistake is.
        inputs: Returns a list of the tuples of arguments.
        tolerance: largest difference of a right result, as a fraction of its largest value.
    """

    id: str
    title: str
    stub: str
    right: Callable[..., Any]
    wrong: dict[str, Callable[..., Any]]
    inputs: Callable[[], Sequence[tuple[Any, ...]]]
    tolerance: float = 1e-4

    @property
    def function(self) -> str:
        """The name of the function that the reader writes."""
        return [node.name for node in ast.parse(self.stub).body if isinstance(node, ast.FunctionDef)][-1]

    def check(self, function: Callable[..., Any], where: Callable[[Exception], str] = str) -> Verdict:
        """Call a function with the inputs and compare it with the right function and the known mistakes.

        Args:
            where: Returns a line about an exception of the function.
        """
        inputs = list(self.inputs())
        found = []
        for arguments in inputs:
            outcome = call(function, arguments)
            # torch raises it too, with a message: an operation does not support a dtype
            if isinstance(outcome.error, NotImplementedError) and not str(outcome.error):
                return Verdict(False, f"{self.function} is not written yet: it raises NotImplementedError")
            found.append(outcome)
        right = [call(self.right, arguments) for arguments in inputs]
        if self._first_difference(found, right) is None:
            return Verdict(True, f"{self.function} is right on {len(inputs)} input{'s' * (len(inputs) > 1)}")
        wrong = {text: [call(version, arguments) for arguments in inputs] for text, version in self.wrong.items()}
        for dtypes in (True, False):
            for text, outcomes in wrong.items():
                if self._first_difference(found, outcomes, dtypes=dtypes, messages=True) is None:
                    return Verdict(False, text)
        index, text = self._first_difference(found, right, dtypes=False) or (-1, "")
        if index < 0:
            index, text = self._first_difference(found, right) or (0, "")
            text = f"the values are right, but {text}"
        error = found[index].error
        text = where(error) if error is not None else text
        names = inspect.signature(self.right).parameters
        given = ", ".join(f"{name} {describe(value)}" for name, value in zip(names, inputs[index], strict=False))
        return Verdict(False, f"{text} (input {index + 1} of {len(inputs)}{': ' * bool(given)}{given})")

    def _first_difference(
        self, found: list[Outcome], expected: list[Outcome], *, dtypes: bool = True, messages: bool = False
    ) -> tuple[int, str] | None:
        """Return the first input with a difference, and the difference as a phrase. None if there is none."""
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            if text := one.difference(other, self.tolerance, dtypes=dtypes, messages=messages):
                return index, text
        return None


def call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Outcome:
    """Call a function with copies of the arguments, after seeding torch and random."""
    torch.manual_seed(0)
    random.seed(0)
    try:
        return Outcome(function(*copy.deepcopy(arguments)))
    except Exception as error:
        return Outcome(error=error)


@dataclass(frozen=True)
class Experiment:
    """An exercise whose answer is the result of a command.

    Attributes:
        command: The command to run.
        folder: where the command writes its result.json.
        judge: Returns whether a result answers the exercise, and a line about it.
    """

    id: str
    title: str
    command: str
    folder: str
    judge: Callable[[dict[str, Any]], tuple[bool, str]]

    def check(self) -> Verdict:
        """Judge the result in the folder. Raise FileNotFoundError or ValueError if there is none to judge."""
        path = Path(self.folder) / "result.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; this writes it: {self.command}")
        try:
            return Verdict(*self.judge(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is not the result of this command: {self.command} ({problem})") from None


Exercise = Number | Write | Experiment
