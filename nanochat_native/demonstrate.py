"""python -m nanochat_native.demonstrate: show with numbers what the guide in docs/guide says."""

import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native import demonstrations
from nanochat_native.runtime.command import run_command
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.files import write_atomically

LONGEST_LIST = 8  # a longer list of numbers is printed by its first entries


@dataclass
class Options:
    """Run one of the guide's demonstrations and print its numbers. Without a name, list all of them.

    A demonstration has fixed seeds, so the same machine prints the same numbers again. Most take a few seconds.
    """

    name: Annotated[str, tyro.conf.Positional] = ""
    """Demonstration to run."""
    checkpoint: Path | None = None
    """Run or checkpoint to look into, for demonstrations that need a trained model; default: runs/d4, which `make
    train` leaves."""
    json: Path | None = None
    """File to which the numbers are written as JSON."""


def lines_of(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, text) for each value of nested dictionaries and lists."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from lines_of(value, f"{path}.{name}" if path else str(name))
    elif isinstance(values, list) and any(isinstance(value, dict | list) for value in values):
        for number, value in enumerate(values):
            yield from lines_of(value, f"{path}.{number}" if path else str(number))
    elif isinstance(values, list):
        shown = " ".join(text_of(value) for value in values[:LONGEST_LIST])
        yield path, shown + (f" ... ({len(values)} in all)" if len(values) > LONGEST_LIST else "")
    else:
        yield path, text_of(values)


def text_of(value: Any) -> str:
    """Return a value as text: floats with six significant digits, integers with separators."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Print pairs of texts in two columns."""
    width = max((len(name) for name, _ in rows), default=0) + 2
    for name, text in rows:
        print(f"{name:<{width}}{text}".rstrip())


def run(options: Options) -> None:
    """Run the demonstration, or list all. Raises ConfigError for an unknown name or a flag that is not used."""
    if not options.name:
        for flag in ("checkpoint", "json"):
            if getattr(options, flag) is not None:
                raise ConfigError(f"--{flag} needs the name of a demonstration")
        for topic, functions in demonstrations.topics().items():
            print(f"{topic}:")
            print_table([(f"  {name}", summary(function)) for name, function in functions.items()])
        return
    try:
        demonstration = demonstrations.find(options.name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    arguments: dict[str, Any] = {}
    if options.checkpoint is not None:
        if "checkpoint" not in inspect.signature(demonstration).parameters:
            raise ConfigError(f"--checkpoint must not be given for {options.name}, which looks into no trained model")
        arguments["checkpoint"] = options.checkpoint
    values = demonstration(**arguments)
    print_table(list(lines_of(values)))
    if options.json is not None:
        write_atomically(options.json, json.dumps(values, indent=1) + "\n")


def summary(function: Any) -> str:
    """Return the first paragraph of a function's docstring, as one line."""
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return run_command(Options, "demonstrate", args, run)


if __name__ == "__main__":
    sys.exit(main())
