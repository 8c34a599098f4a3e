"""The exercises of the guide, with their answers and the mistakes that the checker knows.

It may depend on `ops`, `runtime`, `model`, `optim`, `data`, `runs`, `inference`, `evaluation`, `training`, `interop`,
`lab`, `bench` and `demonstrations`. A chapter's exercises are the tuple EXERCISES of a module such as chapter_05, which
is imported when it is asked for. `python -m nanochat_native.guide` checks the answers of a reader.
"""

import importlib
import re
from pathlib import Path
from typing import Any

from nanochat_native.exercises.base import Exercise, Experiment, Number, Verdict, Write

__all__ = [
    "CHAPTERS",
    "Exercise",
    "Experiment",
    "Number",
    "Verdict",
    "Write",
    "as_results",
    "chapters",
    "find",
    "of_chapter",
]

# The chapters of the guide, by number, as their files are named: docs/guide/05-attention.md.
CHAPTERS = {
    1: "one-command",
    2: "mathematics",
    3: "tokens",
    4: "model",
    5: "attention",
    6: "attention-without-the-matrix",
    7: "loss-and-gradient",
    8: "data-and-the-loop",
    9: "optimizers",
    10: "rates-schedules-batches",
    11: "memory-and-ranks",
    12: "speed",
    13: "using-it",
}


def chapters() -> list[int]:
    """Return the numbers of the chapters that have exercises."""
    return [number for number in CHAPTERS if (Path(__file__).parent / f"chapter_{number:02}.py").exists()]


def of_chapter(chapter: int) -> tuple[Exercise, ...]:
    """Return the exercises of a chapter. Raise ValueError for a chapter that has none."""
    if chapter not in chapters():
        known = ", ".join(map(str, chapters()))
        raise ValueError(f"the chapter must be one with exercises ({known}), got {chapter}")
    module = importlib.import_module(f"nanochat_native.exercises.chapter_{chapter:02}")
    exercises: tuple[Exercise, ...] = module.EXERCISES
    return exercises


def find(id: str) -> Exercise:
    """Return the exercise of an id such as "5.4". Raise ValueError if there is none."""
    if not re.fullmatch(r"\d{1,3}\.\d{1,3}", id):
        raise ValueError(f"an exercise has an id such as 5.4, got {id!r}")
    exercises = of_chapter(int(id.split(".")[0]))
    for exercise in exercises:
        if exercise.id == id:
            return exercise
    raise ValueError(f"there is no exercise {id}; the chapter has {', '.join(found.id for found in exercises)}")


def as_results() -> dict[str, Any]:
    """Return the answers of all exercises with a number, for docs/results/exercises.json: keys are ids such as 5_2."""
    found = {}
    for chapter in chapters():
        for exercise in of_chapter(chapter):
            if isinstance(exercise, Number):
                found[exercise.id.replace(".", "_")] = {
                    "answer": exercise.answer(),
                    "tolerance": exercise.tolerance,
                    "unit": exercise.unit,
                    "mistakes": {text: value() for text, value in exercise.mistakes.items()},
                }
    return found
