"""The results and the figures of each chapter of the guide.

A module chapter_NN holds

    RESULTS      the files docs/results/NAME.json, each with what computes it
    FIGURES      the files docs/guide/figures/NAME.svg, each with the function that draws it and the results it draws
    REFERENCES   the papers that the chapter cites, by arXiv id

`make guide-results` computes results, and `make guide-figures` draws the figures from them.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
RESULTS_FOLDER = ROOT / "docs/results"
FIGURES_FOLDER = ROOT / "docs/guide/figures"
MODULES = (*(f"chapter_{number:02d}" for number in range(1, 14)), "chapter_a", "chapter_b", "chapter_c")

Values = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What computes a results file.

    Attributes:
        command: the command that a reader runs to see the numbers.
        compute: returns the content of the file.
        exact: whether a test computes it again and compares within 1%: it needs no trained model and is no time.
    """

    command: str
    compute: Callable[[], Values]
    exact: bool = False

    @property
    def is_exact_demonstration(self) -> bool:
        """Whether its command prints the same numbers everywhere."""
        return self.exact and self.command.startswith("python -m nanochat_native.demonstrate ")


@dataclass(frozen=True)
class Figure:
    """A figure: the function that draws it, and the names of the results that it takes."""

    draw: Callable[..., Any]
    results: tuple[str, ...] = ()

    def __init__(self, draw: Callable[..., Any], *results: str) -> None:
        object.__setattr__(self, "draw", draw)
        object.__setattr__(self, "results", results)


@dataclass
class Chapter:
    """The declarations of a module."""

    results: dict[str, Result] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)


def machine() -> Values:
    """Return the machine and the versions that a result is from."""
    from nanochat_native.bench import measure

    return measure.machine()


def demonstration(name: str, *, trained: bool = False, timed: bool = False) -> Result:
    """A demonstration of the package.

    trained: it reads the run of chapter 1, runs/d4, or the standard library, whose text depends on Python's version.
    timed: its numbers are times or errors of rounding, which depend on the machine. No test compares either.
    """

    def compute() -> Values:
        from nanochat_native.demonstrations import find

        return {"machine": machine()} | find(name)()

    return Result(f"python -m nanochat_native.demonstrate {name}", compute, exact=not trained and not timed)


def lab(line: str, *, keep: Callable[[Values], Values] | None = None) -> Result:
    """An experiment, without its --out. keep: returns what the file keeps of result.json, to reduce it."""

    def compute() -> Values:
        with tempfile.TemporaryDirectory() as folder:
            output = run_module(f"{line} --out {shlex.quote(folder + '/out')}")
            record = json.loads(Path(folder, "out/result.json").read_text().replace(folder, "lab"))
        if not record.get("finished", True):
            raise RuntimeError(f"{line} was interrupted before its last run")
        return {"machine": machine()} | (keep(record) if keep else record) | {"output": output.replace(folder, "lab")}

    return Result(f"python -m nanochat_native.{line}", compute)


def command(line: str, *, keep: Callable[[str], Values] | None = None) -> Result:
    """The printed output of a command of the package. keep: returns further values from that output."""

    def compute() -> Values:
        output = run_module(line)
        return {"machine": machine()} | (keep(output) if keep else {}) | {"output": output}

    return Result(f"python -m nanochat_native.{line}", compute)


def own(line: str, compute: Callable[[], Values], *, exact: bool = False) -> Result:
    """A result that a function of the chapter's module computes. line: the command that shows the numbers."""
    return Result(line, lambda: {"machine": machine()} | compute(), exact)


def reference(authors: str, title: str, year: int) -> str:
    """Return the text of a reference."""
    return f"{authors}, {title}, {year}"


def run_module(line: str) -> str:
    """Run `python -m nanochat_native.LINE` in the checkout and return its output without live lines."""
    words = [sys.executable, "-m", *shlex.split(f"nanochat_native.{line}")]
    finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{line} ended with code {finished.returncode}: {finished.stderr.strip()}")
    lines = [text.rpartition("\r")[2].rstrip() for text in finished.stdout.splitlines()]
    return "\n".join(line for line in lines if not re.match(r"\[[#.]+\] ", line)) + "\n"  # without progress bars


@cache
def chapters() -> dict[str, Chapter]:
    """Return the declarations of the modules that exist, by module."""
    found = {}
    for name in MODULES:
        if Path(__file__).with_name(f"{name}.py").exists():
            module = importlib.import_module(f"chapters.{name}")
            found[name] = Chapter(
                getattr(module, "RESULTS", {}), getattr(module, "FIGURES", {}), getattr(module, "REFERENCES", {})
            )
    return found


def merged(kind: str) -> dict[str, Any]:
    """Return the "results", "figures" or "references" of all chapters. Raises ValueError if two have one name.

    A reference may occur in several chapters, with the same text.
    """
    found: dict[str, Any] = {}
    for name, chapter in chapters().items():
        for key, value in getattr(chapter, kind).items():
            if key in found and not (kind == "references" and found[key] == value):
                raise ValueError(f"{name}: {key!r} is declared twice among the {kind}")
            found[key] = value
    return found


@cache
def load(name: str) -> Values:
    """Return the content of docs/results/NAME.json. Raises ValueError if there is none."""
    path = RESULTS_FOLDER / f"{name}.json"
    if not path.exists():
        raise ValueError(f"docs/results/{name}.json does not exist")
    values: Values = json.loads(path.read_text(encoding="utf-8"))
    return values


def compact(values: Any) -> Any:
    """Return JSON values with floats rounded to seven significant digits."""
    if isinstance(values, dict):
        return {str(key): compact(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [compact(value) for value in values]
    return float(f"{values:.7g}") if isinstance(values, float) else values


def to_text(values: Values) -> str:
    """Return the text of a results file, with each list of plain values on one line."""
    indented = json.dumps(compact(values), indent=1, ensure_ascii=False)
    return re.sub(r"\[\n[^\[\]{}\"]*\]", lambda match: re.sub(r"\s+", " ", match[0]), indented) + "\n"


def draw(figure: Figure) -> bytes:
    """Return the SVG of a figure."""
    import style

    with style.settings():
        return style.svg_of(figure.draw(*(load(name) for name in figure.results)))
