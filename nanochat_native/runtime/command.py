"""The frame of every command: parse the flags, run, and map errors to exit codes."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import tyro

from nanochat_native import ops
from nanochat_native.runtime.errors import ConfigError, UserError
from nanochat_native.runtime.flags import check_values, one_line_errors
from nanochat_native.runtime.isolation import ReportFailures, describe, guarded, take_any_text


def check_text(text: str, name: str) -> None:
    """Raises ValueError, with the name of what it is, for text that UTF-8 cannot hold: from bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has a lone surrogate, or bytes that are not UTF-8; it takes text") from None


T = TypeVar("T")
MISTAKES = (ValueError, ImportError, OSError, UserError)


def parse_options(kind: type[T], command: str, args: Sequence[str] | None = None, **settings: Any) -> T:
    """The flags of a command, sys.argv's by default, as the dataclass `kind` has them. settings: tyro.cli's.

    Raises ConfigError, one line, for an unknown flag or a value that the flag does not take. --help prints and exits.
    """
    given = sys.argv[1:] if args is None else list(args)
    with one_line_errors():
        options: T = tyro.cli(kind, prog=f"python -m nanochat_native.{command}", args=given, **settings)
    check_values(options, given)
    return options


def run_command(
    kind: type[T], command: str, args: Sequence[str] | None, work: Callable[[T], int | None], **settings: Any
) -> int:
    """A command line: parse_options, then the work. Returns the exit code, as exit_code does."""
    try:
        options = parse_options(kind, command, args, **settings)
    except ConfigError as error:
        return mistake(error)
    return exit_code(lambda: work(options))


def mistake(error: Exception) -> int:
    """Says on stderr, in one line, what the user can mend. Returns the exit code for it, 2."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    message = re.sub(r"\s*\n\s*", " ", message.strip())
    print(f"error: {message}", file=sys.stderr)
    return 2


def is_out_of_memory(error: Exception) -> bool:
    """On a CPU torch raises a RuntimeError of no type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs a command line's work: what it returns, or 0; 2 after one line on stderr for a mistake of the user's; 1
    where memory is out; 130 after Ctrl-C; 141 where the output is read no more."""
    for stream in (sys.stdout, sys.stderr):
        take_any_text(stream)
    try:
        ops.check_environment()
        ops.use_backend(ops.backend())
    except (ValueError, RuntimeError) as error:
        return mistake(error)
    try:
        return command() or 0
    except BrokenPipeError:  # what reads the output has ended, as head does: there is nobody to tell
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or Python would complain when it flushes at its end
        return 128 + signal.SIGPIPE
    except MISTAKES as error:
        return mistake(error)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory; try a smaller --device-batch-size ({describe(error)})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def run_reporting(run: Callable[[Sequence[str], ReportFailures], int], args: Sequence[str] | None) -> int:
    """A command of the laboratory, with `args` or sys.argv's. Returns the exit code, as loading.exit_code; 3 where the
    result is written, but a report failed."""
    given = sys.argv[1:] if args is None else args
    return guarded(lambda failures: exit_code(lambda: run(given, failures)))
