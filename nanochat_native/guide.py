"""python -m nanochat_native.guide: the exercises of the guide, and the check of their answers.

python -m nanochat_native.guide list            # every exercise; list 5 shows those of chapter 5
python -m nanochat_native.guide start 5         # writes exercises/05_attention.py with what is to be written
python -m nanochat_native.guide check 5.4       # checks a function in that file, or the result of an experiment
python -m nanochat_native.guide check 4.2 3.1M  # checks a number
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native import exercises
from nanochat_native.exercises import Experiment, Number, Verdict, Write, reader
from nanochat_native.runtime.command import run_command
from nanochat_native.runtime.files import write_atomically

KINDS = {Number: "number", Write: "function", Experiment: "experiment"}


@dataclass
class Options:
    """Show the exercises of the guide, write the file for those of a chapter, or check an answer.

    list [CHAPTER] shows the exercises. start CHAPTER writes a file with the functions to write. check ID [NUMBER]
    checks an answer; it ends with 0 if the answer is right, and with 1 if it is wrong.
    """

    action: Annotated[Literal["list", "start", "check"], tyro.conf.Positional] = "list"
    """What to do."""
    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[CHAPTER | ID [NUMBER]]")] = ()
    """A chapter such as 5, or an exercise such as 5.4 and its answer."""
    folder: Path = Path("exercises")
    """Folder of the functions that you write."""


def list_exercises(words: Sequence[str]) -> None:
    """Print the exercises of a chapter, or of all: id, kind, title."""
    if len(words) > 1:
        raise ValueError(f"list takes one chapter or none, got {' '.join(words)!r}")
    for number in [chapter_of(words[0])] if words else exercises.chapters():
        for exercise in exercises.of_chapter(number):
            print(f"{exercise.id:<6}{KINDS[type(exercise)]:<12}{exercise.title}")


def start(words: Sequence[str], folder: Path) -> None:
    """Write the file for the exercises of a chapter. Raise ValueError or FileExistsError if that cannot be done."""
    if len(words) != 1:
        raise ValueError(f"start takes one chapter, such as 5, got {' '.join(words)!r}")
    chapter = chapter_of(words[0])
    text = reader.stubs(chapter)
    path = reader.file_of(chapter, folder)
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already; move it away to start again")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    print(path)


def check(words: Sequence[str], folder: Path) -> int:
    """Check an answer and print the verdict. Return 0 if it is right, and 1 if it is wrong."""
    if not words:
        raise ValueError("check takes the id of an exercise, such as 5.4")
    exercise = exercises.find(words[0])
    given = "".join(words[1:])
    if given and not isinstance(exercise, Number):
        raise ValueError(f"exercise {exercise.id} takes no number, got {' '.join(words[1:])!r}")
    verdict: Verdict
    if isinstance(exercise, Number):
        if not given:
            raise ValueError(f"exercise {exercise.id} asks for a number: check {exercise.id} NUMBER")
        verdict = exercise.check(exercise.parse(given))
    elif isinstance(exercise, Write):
        verdict = reader.check(exercise, reader.file_of(int(exercise.id.split(".")[0]), folder))
    else:
        verdict = exercise.check()
    print(f"{'right' if verdict.right else 'wrong'}: {verdict.text}")
    return 0 if verdict.right else 1


def chapter_of(word: str) -> int:
    """Return the number of a chapter that a reader typed."""
    if not (word.isascii() and word.isdigit() and len(word) < 4):
        raise ValueError(f"a chapter is a number such as 5, got {word!r}")
    return int(word)


def run(options: Options) -> int:
    """Do what the command line says. Return the exit code."""
    if options.action == "list":
        list_exercises(options.words)
    elif options.action == "start":
        start(options.words, options.folder)
    else:
        return check(options.words, options.folder)
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return run_command(Options, "guide", args, run)


if __name__ == "__main__":
    sys.exit(main())
