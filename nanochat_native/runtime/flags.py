"""Rules that the flags of all commands share.

A flag whose value follows from the machine, the data or another flag is unset until the program chooses that value. Its
default marks it as unset, and depends on the type of the flag:

    UNSET (-1)   a number; as in nanochat's scripts, `--depth -1` on the command line leaves the choice to the program
    "auto"       a choice among names, or a word; `--device auto` leaves the choice to the program
    None         text or a path; on the command line, the flag is left out

A flag with any other default is never unset: its value is what it says. Use is_unset() instead of comparing with one
of the three.
"""

import contextlib
import dataclasses
import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from nanochat_native.runtime.errors import ConfigError

UNSET = -1
LARGEST = 2**63 - 1  # the largest whole number of a flag: torch and C++ take seeds and sizes as int64


def auto_flag(metavar: str, default: str) -> Any:
    """Return the setting that makes --help show a flag that may be unset: its type, and the rule for its value."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def flag(name: str) -> str:
    """Return the flag of a field: num_iterations -> --num-iterations."""
    return "--" + name.replace("_", "-")


def is_unset(options: Any, name: str) -> bool:
    """Return whether the flag `name` of a dataclass has no value yet: it may be unset, and has its default."""
    default = options.__dataclass_fields__[name].default
    return default in (UNSET, "auto", None) and getattr(options, name) == default


def check_values(options: Any, given: Sequence[str]) -> None:
    """Raise ConfigError for a value that no flag may have: a whole number beyond 64 bits, nan, an empty path.

    Args:
        options: the dataclass of a command's flags.
        given: the command line that it was parsed from.
    """
    for field in dataclasses.fields(options):
        name, value = flag(field.name), getattr(options, field.name)
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{name} must be a whole number <= {LARGEST}, got {_shortened(str(value))}")
        if isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{name} must be a number, got nan")
        empty = f"{name}=" in given or (name, "") in itertools.pairwise(given)
        if isinstance(value, Path) and empty:
            raise ConfigError(f"{name} must be a path, got ''")


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Raise tyro's report of a bad flag, in the block, as a ConfigError of one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_one_line(errors.getvalue())) from None


def _one_line(report: str) -> str:
    """Return tyro's report of a bad flag, a box of several lines, as one line: the error, and what may be meant."""
    _, *lines = (line.strip("│╭╮╰╯ ") for line in report.splitlines())
    sections: list[list[str]] = [[]]
    for line in lines:
        if line.strip("─-"):
            sections[-1].append(line)
        elif sections[-1]:
            sections.append([])
    message = re.sub(r"\s+", " ", " ".join(sections[0])).strip()
    message = re.sub(r"^(Error parsing )?[A-Z]\w*: ", "", message)  # the type of an error that a dataclass raised
    if value := re.fullmatch(r"Error parsing (\S+): (.*)", message):
        name, problem = value.groups()
        problem = re.sub(r"invalid literal for int\(\) with base 10: ", "must be a whole number, got ", problem)
        problem = re.sub(r"could not convert string to float: ", "must be a number, got ", problem)
        problem = re.sub(
            r"Exceeds the limit \((\d+) digits\).*", r"must be a whole number of at most \1 digits", problem
        )
        if mismatch := re.fullmatch(r"no type matching (\S+) could be instantiated from \[(.*)\]\.", problem):
            types = re.sub("[{}]", "", mismatch[1]).replace("|", " or ")
            problem = f"must be {types}, got {_shortened(mismatch[2].strip())}"
        message = f"{name} {problem}"
    if sections[0] and sections[0][0].startswith("Missing from"):
        missing = [line for line in sections[0] if re.fullmatch(r"(--[\w-]+|[A-Z]+)( \S+)?", line)]
        message = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed"
    for section in sections[1:]:
        if section and section[0].startswith("Unrecognized options"):
            message += f"; unrecognized options: {', '.join(section[1:])}"
        if section and section[0].startswith("Perhaps you meant"):
            flags = [line.split()[0] for line in section if line.startswith("--")]
            message += f"; perhaps you meant {', '.join(flags)}"
    return message
