"""Rules that the flags of all commands share."""

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
LARGEST = 2**63 - 1  # whole number that a flag takes: an int64, as torch and C++ take seeds and sizes


def auto_flag(metavar: str, default: str) -> Any:
    """How --help shows a flag that is UNSET until it is sized: its type, and the rule that gives its value."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def flag(name: str) -> str:
    """num_iterations -> --num-iterations."""
    return "--" + name.replace("_", "-")


def check_values(options: Any, given: Sequence[str]) -> None:
    """Raises ConfigError for values that no flag takes: a whole number beyond 64 bits, a float that is nan, an empty
    path. options: a dataclass; given: what it was made from."""
    for field in dataclasses.fields(options):
        name, value = flag(field.name), getattr(options, field.name)
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{name} takes a whole number of at most {LARGEST}, got {_shortened(str(value))}")
        if isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{name} takes a number, got nan")
        empty = f"{name}=" in given or (name, "") in itertools.pairwise(given)
        if isinstance(value, Path) and empty:
            raise ConfigError(f"{name} takes a path, got ''")


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Within the block tyro's report of a bad flag is a ConfigError of one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_one_line(errors.getvalue())) from None


def _one_line(report: str) -> str:
    """tyro's report of a bad flag, boxed in lines or in blanks, as one line: what is wrong, and what may be meant."""
    _, *lines = (line.strip("│╭╮╰╯ ") for line in report.splitlines())
    sections: list[list[str]] = [[]]
    for line in lines:
        if line.strip("─-"):
            sections[-1].append(line)
        elif sections[-1]:
            sections.append([])
    message = re.sub(r"\s+", " ", " ".join(sections[0])).strip()
    message = re.sub(r"^(Error parsing )?[A-Z]\w*: ", "", message)  # what a dataclass raised itself
    if value := re.fullmatch(r"Error parsing (\S+): (.*)", message):
        name, problem = value.groups()
        problem = re.sub(r"invalid literal for int\(\) with base 10: ", "takes a whole number, got ", problem)
        problem = re.sub(r"could not convert string to float: ", "takes a number, got ", problem)
        problem = re.sub(r"Exceeds the limit \((\d+) digits\).*", r"takes a whole number of at most \1 digits", problem)
        if mismatch := re.fullmatch(r"no type matching (\S+) could be instantiated from \[(.*)\]\.", problem):
            types = re.sub("[{}]", "", mismatch[1]).replace("|", " or ")
            problem = f"takes {types}, got {_shortened(mismatch[2].strip())}"
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
