"""Keeps a report (console, log, sample, evaluation, plot, ...) that fails from ending the run that it reports on.

A failure is named once, on the console, and counted; the exit code of the program tells that there was one.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

EXIT_CODE = 3  # training is done and saved, but a report failed


class ReportFailures:
    """counts: failures by the name of the report, e.g. {"sample": 2, "standard output": 40}."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, report: str) -> bool:
        """Count a failure. Returns whether it is the first of this report."""
        self.counts[report] = self.counts.get(report, 0) + 1
        return self.counts[report] == 1

    def describe(self) -> str:
        """ "sample 2 times, standard output once"."""
        return ", ".join(f"{report} {'once' if n == 1 else f'{n} times'}" for report, n in self.counts.items())


def describe(error: BaseException) -> str:
    """The error on one line, with its type where the message alone would not tell."""
    message = " ".join(str(error).split())
    return message if isinstance(error, (OSError, ValueError)) and message else f"{type(error).__name__}: {message}"


def take_any_text(stream: TextIO | None) -> None:
    """From now on the stream writes characters that its encoding lacks as escapes, instead of raising."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


class GuardedStream:
    """A text stream that takes any text, and whose write and flush never raise: a full disk, a closed pipe or a closed
    file is counted in `failures`, and told once on `fallback`."""

    def __init__(self, stream: TextIO | None, name: str, failures: ReportFailures) -> None:
        """stream: None where the process was started without one, as Python's sys.stdout is then."""
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 (it lives as long as the process)
        take_any_text(self._stream)
        self._name, self._failures = name, failures
        self.fallback: GuardedStream | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (AttributeError, OSError, ValueError):  # an object with write and flush alone; a closed file
            return False

    def release(self) -> None:
        """Flush for the last time. What cannot be written is dropped, since Python's own flush at exit would fail."""
        try:
            self._stream.flush()
        except Exception:
            with contextlib.suppress(Exception):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            if self._failures.add(self._name) and self.fallback is not None:
                self.fallback.write(f"warning: {self._name} failed ({describe(error)}); the run goes on\n")
                self.fallback.flush()


def guarded(program: Callable[[ReportFailures], int]) -> int:
    """Runs a program that trains, which counts its failed reports, with guarded streams. Returns its exit code:
    EXIT_CODE instead of 0 where a report failed."""
    failures = ReportFailures()
    with guarded_streams(failures):
        code = program(failures)
        if failures and code == 0:
            print(f"warning: reports of this run failed: {failures.describe()}", file=sys.stderr)
            code = EXIT_CODE
    return code


@contextlib.contextmanager
def guarded_streams(failures: ReportFailures) -> Iterator[None]:
    """Within the block sys.stdout and sys.stderr never raise; each tells of the other's first failure."""
    before = sys.stdout, sys.stderr
    out = GuardedStream(sys.stdout, "standard output", failures)
    err = GuardedStream(sys.stderr, "standard error", failures)
    out.fallback, err.fallback = err, out
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        out.release()
        err.release()
