"""Runs a command: parses its flags, does its work, and maps errors to exit codes."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import tyro

from nanochat_native import ops
from nanochat_native.runtime import distributed
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError, UserError
from nanochat_native.runtime.flags import check_values, one_line_errors
from nanochat_native.runtime.isolation import ReportFailures, describe, guarded, take_any_text


def check_text(text: str, name: str) -> None:
    """Raise ValueError for text that UTF-8 cannot encode, because it was decoded from bytes that are not UTF-8.

    name: of the text, for the message.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be text, got a lone surrogate or bytes that are not UTF-8") from None


T = TypeVar("T")
MISTAKES = (ValueError, ImportError, OSError, UserError)


def parse_options(kind: type[T], command: str, args: Sequence[str] | None = None, **settings: Any) -> T:
    """Parse the flags of a command into the dataclass `kind`. --help prints the flags and exits.

    Args:
        args: the command line; default: sys.argv's.
        settings: arguments of tyro.cli.

    Raises:
        ConfigError: for an unknown flag, or a value that a flag may not have. The message is one line.
    """
    given = sys.argv[1:] if args is None else list(args)
    with one_line_errors():
        options: T = tyro.cli(kind, prog=f"python -m nanochat_native.{command}", args=given, **settings)
    check_values(options, given)
    return options


def run_command(
    kind: type[T], command: str, args: Sequence[str] | None, work: Callable[[T], int | None], **settings: Any
) -> int:
    """Parse a command line by parse_options, do the work, and return the exit code as exit_code does."""
    try:
        options = parse_options(kind, command, args, **settings)
    except ConfigError as error:
        return mistake(error)
    return exit_code(lambda: work(options))


def mistake(error: Exception) -> int:
    """Print an error that the user can fix on stderr, in one line. Return its exit code, 2."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    message = re.sub(r"\s*\n\s*", " ", message.strip())
    print(f"error: {message}", file=sys.stderr)
    return 2


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory has run out. On a CPU, torch raises a plain RuntimeError for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def exit_code(command: Callable[[], int | None]) -> int:
    """Do the work of a command and return the exit code.

    Returns:
        What `command` returns, 0 for None; 2 for an error that the user can fix, after one line on stderr; 1 if memory
        runs out; 130 after Ctrl-C; 141 if the reader of the output has closed it.
    """
    for stream in (sys.stdout, sys.stderr):
        take_any_text(stream)
    try:
        ops.check_environment()
        ops.use_backend(ops.backend())
    except (ValueError, RuntimeError) as error:
        return mistake(error)
    try:
        return command() or 0
    except BrokenPipeError:  # the reader of the output has ended, as head does
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # so that the flush at exit does not fail
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
    """Run an experiment on `args`, by default sys.argv's. Return the exit code as exit_code does, or 3 if the result
    was written but a report failed."""
    given = sys.argv[1:] if args is None else args
    return guarded(lambda failures: exit_code(lambda: run(given, failures)))


def run_on_ranks(work: Callable[[World], int]) -> int:
    """Join the ranks that torchrun started, do the work on each, and return the exit code of this rank.

    Without torchrun there is one rank, and its exceptions pass through. With torchrun, rank 0 prints an error that all
    ranks share (exit code 2), and each rank prints other errors of its own, with its number (exit code 1).
    """
    try:
        with distributed.init_process_group() as world:
            return work(world)
    except distributed.RankError as error:
        if distributed.environment_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except distributed.LostRankError as error:
        print(f"rank {distributed.environment_rank()}: {error}", file=sys.stderr)
        return distributed.exit_rank(1)
    except Exception:
        if not distributed.launched_by_torchrun():
            raise
        lines = traceback.format_exc().splitlines()
        print("\n".join(f"rank {distributed.environment_rank()}: {line}" for line in lines), file=sys.stderr)
        return distributed.exit_rank(1)
