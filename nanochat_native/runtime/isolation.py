"""Prevents a report (console, log, sample, evaluation, plot, ...) that fails from ending the run that it reports on.

The first failure of each report is printed, all are counted, and the exit code tells that there was one.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

EXIT_CODE = 3  # training is done and saved, but a report failed


class ReportFailures:
    """Counts failures by the name of the report, such as {"sample": 2, "standard output": 40}."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, report: str) -> bool:
        """Count a failure, and return whether it is the first of this report."""
        self.counts[report] = self.counts.get(report, 0) + 1
        return self.counts[report] == 1

    def describe(self) -> str:
        """Return the counts as text: "sample 2 times, standard output once"."""
        return ", ".join(f"{report} {'once' if n == 1 else f'{n} times'}" for report, n in self.counts.items())


def describe(error: BaseException) -> str:
    """Return the error on one line, with its type if the message alone is not clear."""
    message = " ".join(str(error).split())
    return message if isinstance(error, (OSError, ValueError)) and message else f"{type(error).__name__}: {message}"


def take_any_text(stream: TextIO | None) -> None:
    """Make the stream write characters that its encoding lacks as escapes, instead of raising."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


class GuardedStream:
    """A text stream that takes any text, and whose write and flush never raise.

    A full disk, a closed pipe or a closed file counts in `failures`, and the first one is reported on `fallback`.
    """

    def __init__(self, stream: TextIO | None, name: str, failures: ReportFailures) -> None:
        """Guard a stream. It is None if the process was started without one, as sys.stdout is then."""
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
        except (AttributeError, OSError, ValueError):  # an object with only write and flush, or a closed file
            return False

    def release(self) -> None:
        """Flush for the last time. Drop what cannot be written, because Python's own flush at exit would fail."""
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
                self.fallback.write(f"warning: {self._name} failed ({describe(error)}); the run continues\n")
                self.fallback.flush()


def guarded(program: Callable[[ReportFailures], int]) -> int:
    """Run a program with guarded streams, and return its exit code: EXIT_CODE instead of 0 if a report failed.

    The program trains, and counts the reports that fail.
    """
    failures = ReportFailures()
    with guarded_streams(failures):
        code = program(failures)
        if failures and code == 0:
            print(f"warning: reports of this run failed: {failures.describe()}", file=sys.stderr)
            code = EXIT_CODE
    return code


@contextlib.contextmanager
def guarded_streams(failures: ReportFailures) -> Iterator[None]:
    """Make sys.stdout and sys.stderr never raise in the block. Each reports the first failure of the other."""
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
