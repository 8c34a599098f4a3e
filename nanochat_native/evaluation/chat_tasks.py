"""The tasks of nanochat's chat evaluation: their problems, from local files, with nanochat's prompts and rules.

The files are those of `python -m nanochat_native.download arc mmlu gsm8k humaneval`, or JSON lines with the same
fields, anywhere below one folder:

    ARC-Easy, ARC-Challenge   allenai/ai2_arc           ARC-Easy/test-*.parquet       question, choices, answerKey
    MMLU                      cais/mmlu                 all/test-*.parquet            question, choices, answer
    GSM8K                     openai/gsm8k              main/test-*.parquet           question, answer
    HumanEval                 openai/openai_humaneval   openai_humaneval/test-*...    prompt, test, entry_point

The split may also be a folder, such as main/test/00000.parquet, where nanochat keeps them. SpellingBee and
SimpleSpelling have no files.

Facts from nanochat (https://github.com/karpathy/nanochat, tasks/): the prompt of a multiple-choice problem, the order
of the problems, how the answer of GSM8K is found, and how a program of HumanEval is put together.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_native.data.conversation_files import choice_prompt, read_records
from nanochat_native.data.documents import parquet_file
from nanochat_native.evaluation import sandbox, spelling

ORDER_SEED = 42  # nanochat's, for the order of the problems
NAMES = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "SimpleSpelling")
CHATCORE = NAMES[:5]
BASELINES = {"ARC-Easy": 25.0, "ARC-Challenge": 25.0, "MMLU": 25.0}  # accuracy of guessing in percent; others have 0
FOLDERS = {"MMLU": "all", "GSM8K": "main", "HumanEval": "openai_humaneval"}  # others are named as their task
FIELDS = {
    "ARC-Easy": ("question", "choices", "answerKey"),
    "ARC-Challenge": ("question", "choices", "answerKey"),
    "MMLU": ("question", "choices", "answer"),
    "GSM8K": ("question", "answer"),
    "HumanEval": ("prompt", "test", "entry_point"),
}
KINDS = (".parquet", ".jsonl")

_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
_CALCULATION = re.compile(r"<<[^>]+>>")
_CODE_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """A problem and its answer.

    Attributes:
        prompt: The message of the user.
        answer: The right letter, number or spelling; "" for HumanEval.
        letters: The letters of the choices; empty if the model writes its answer.
        test: HumanEval's code that checks the function `entry_point`.
    """

    prompt: str
    answer: str = ""
    letters: tuple[str, ...] = ()
    test: str = ""
    entry_point: str = ""


@dataclass(frozen=True)
class Task:
    """A task of the evaluation.

    Attributes:
        problems: The problems in nanochat's order.
        is_right: Judges the text that the model wrote; None for multiple choice.
        baseline: Accuracy of guessing, in percent.
    """

    name: str
    problems: list[Problem] = field(repr=False)
    is_right: Callable[[Problem, str], bool] | None

    @property
    def baseline(self) -> float:
        return BASELINES.get(self.name, 0.0)


class MissingTaskError(ValueError):
    """A task has no files in the folder."""


def read_task(name: str, folder: Path | None, max_problems: int | None = None, flag: str = "--data") -> Task:
    """Read a task: its first max_problems problems in nanochat's order.

    flag: the name of the flag in errors.

    Raises MissingTaskError if the folder has no files of the task, ValueError, naming file and row, for anything
    malformed, OSError for a file that cannot be read, and ImportError without pyarrow.
    """
    if name in WITHOUT_FILES:
        made, judge = WITHOUT_FILES[name]
        return Task(name, [Problem(*problem) for problem in made()][:max_problems], judge)
    problems = [read_problem(name, row, where) for where, row in read_rows(name, folder, flag)]
    return Task(name, problems[:max_problems], JUDGES.get(name))


def read_rows(name: str, folder: Path | None, flag: str, split: str = "test") -> list[tuple[str, Mapping[str, Any]]]:
    """Return (where it is, the row) of each row of a split of a task, in nanochat's order. Raises as read_task does."""
    if folder is None:
        raise MissingTaskError(f"{flag} FOLDER must name the folder of its files")
    rows = [row for path in find_files(name, folder, flag, split) for row in rows_of(path)]
    if not rows:
        raise ValueError(f"{folder}: the files of {name} must have at least one problem, got none")
    return [rows[i] for i in np.random.default_rng(ORDER_SEED).permutation(len(rows))]


def find_files(name: str, folder: Path, flag: str = "--data", split: str = "test") -> list[Path]:
    """Return the files of a split of a task below a folder, in their order.

    Raises MissingTaskError if there are none, and ValueError if they are in several folders or of both kinds.
    """
    if not folder.is_dir():
        raise ValueError(f"{flag} must be a folder, got {folder}")
    config = FOLDERS.get(name, name)
    groups: dict[tuple[Path, str], list[Path]] = {}
    unfit, seen = "", set[str]()
    for above, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(above)
        folders[:] = [] if real in seen else sorted(inner for inner in folders if not inner.startswith("."))
        files = [] if real in seen else files
        seen.add(real)
        for path in (Path(above, file) for file in sorted(files)):
            if path.suffix not in KINDS or not _is_split(path, config, split):
                continue
            present = fields_of(path)
            missing = [key for key in FIELDS[name] if key not in present]
            if missing:
                unfit = unfit or f"; {path} has no {', '.join(missing)}"
            else:
                groups.setdefault((path.parent, path.suffix), []).append(path)
    if not groups:
        layout = f"{config}/{split}*.parquet or .jsonl with {', '.join(FIELDS[name])}"
        raise MissingTaskError(f"{folder} has no {layout}{unfit}")
    if len(groups) > 1:
        (first, *_), (second, *_) = list(groups.values())[:2]
        raise ValueError(f"{flag} must have the files of {name} once, got {first} and {second}")
    return next(iter(groups.values()))


def _is_split(path: Path, config: str, split: str) -> bool:
    """Return whether a path ends as config/split.parquet, config/split-0.parquet or config/split/0.parquet do."""
    if path.parent.name == split:
        return path.parent.parent.name == config
    return path.parent.name == config and re.match(rf"{split}([-_.]|$)", path.stem) is not None


def fields_of(path: Path) -> Sequence[str]:
    """Return the names of the fields of a file: its columns, or the keys of its first line."""
    if path.suffix == ".parquet":
        with parquet_file(path) as (_, file):
            return list(file.schema_arrow.names)
    first = next(rows_of(path), None)
    return [] if first is None else list(first[1])


def rows_of(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (where it is, the row) of each row of a file. Raises as documents.parquet_file and read_records do."""
    if path.suffix == ".parquet":
        with parquet_file(path) as (_, file):
            rows = file.read().to_pylist()
        for number, row in enumerate(rows, 1):
            yield f"{path}: row {number}", row
        return
    for line, row in read_records(path):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {line} must be an object, got {row!r:.60}")
        yield f"{path}: line {line}", row


def read_problem(name: str, row: Mapping[str, Any], where: str) -> Problem:
    """Return the problem of a row. Raises ValueError, naming the place, for a row that is malformed."""

    def text(key: str) -> str:
        return _text(row.get(key), f"{where}: {key}")

    if name == "HumanEval":
        return Problem(text("prompt"), test=text("test"), entry_point=text("entry_point"))
    question = text("question")
    if name == "GSM8K":
        answer = number_of(_CALCULATION.split(text("answer"))[-1])
        if answer is None:
            raise ValueError(f"{where}: answer must end with #### and a number, got {row['answer'][-60:]!r}")
        return Problem(question, answer)
    if name == "MMLU":
        letters, choices = ["A", "B", "C", "D"], _texts(row.get("choices"), f"{where}: choices")
        index = row.get("answer")
        if len(choices) != 4 or type(index) is not int or not 0 <= index < 4:
            given = f"{len(choices)} choices and answer {index!r:.60}"
            raise ValueError(f"{where}: there must be 4 choices, and answer the index of one, got {given}")
        answer = letters[index]
    else:
        found = row.get("choices")
        if not isinstance(found, dict):
            raise ValueError(f"{where}: choices must have label and text, got {found!r:.60}")
        letters, choices = (_texts(found.get(key), f"{where}: choices.{key}") for key in ("label", "text"))
        answer = text("answerKey")
        if len(letters) != len(choices) or answer not in letters:
            given = f"{len(choices)} choices with the letters {', '.join(letters)} and {answer!r:.60}"
            raise ValueError(f"{where}: answerKey must be the letter of a choice, got {given}")
    return Problem(choice_prompt(question, letters, choices), answer, tuple(letters))


def _text(value: Any, where: str) -> str:
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise ValueError(f"{where} must be a text, got {value!r:.60}") from None
    return str(value)


def _texts(values: Any, where: str) -> list[str]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where} must be a list of texts, got {values!r:.60}")
    return [_text(value, where) for value in values]


def number_of(text: str) -> str | None:
    """Return the number behind the first "#### " of a text, without commas; None if there is none."""
    found = _NUMBER.search(text)
    return None if found is None else found[1].replace(",", "")


def number_is_right(problem: Problem, text: str) -> bool:
    """Judge an answer of GSM8K or SpellingBee: the digits of its number must be the right ones, so 5.0 is not 5."""
    return number_of(text) == problem.answer


def spelling_is_right(problem: Problem, text: str) -> bool:
    """Judge an answer of SimpleSpelling: it must be the right one, but for white space around it."""
    return text.strip() == problem.answer


def program_of(problem: Problem, text: str) -> str:
    """Return HumanEval's program for an answer: the imports of the prompt, the answer's code, and the test."""
    imports = []
    for line in map(str.strip, problem.prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    block = _CODE_BLOCK.search(text)
    code = (text if block is None else block[1]).strip()
    return "\n\n".join(["\n".join(imports), code, f"{problem.test}\ncheck({problem.entry_point})"])


def program_is_right(problem: Problem, text: str) -> bool:
    """Judge an answer of HumanEval by running its program in the sandbox."""
    return sandbox.run(program_of(problem, text)).passed


JUDGES = {"GSM8K": number_is_right, "HumanEval": program_is_right}
WITHOUT_FILES = {
    "SpellingBee": (spelling.counting_problems, number_is_right),
    "SimpleSpelling": (spelling.spelling_problems, spelling_is_right),
}
