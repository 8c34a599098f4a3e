"""Human-readable output of a command: messages, a live line, tables, and the format of numbers."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from nanochat_native.runtime.isolation import GuardedStream, ReportFailures, describe

PLAIN_LINE_SECONDS = 10.0  # between live lines when the output is not a terminal


class Console:
    """Human-readable output: messages, and a live line that is redrawn in place on a terminal.

    If the output is not a terminal, the live line is printed as plain lines at intervals. With `as_json`, records go to
    `stream` as JSON lines instead, and all messages to stderr. No method raises for a stream that cannot be written;
    this counts in `failures`.
    """

    def __init__(
        self, stream: TextIO | None = None, *, as_json: bool = False, failures: ReportFailures | None = None
    ) -> None:
        self.failures = ReportFailures() if failures is None else failures
        self._stream = GuardedStream(stream or sys.stdout, "standard output", self.failures)
        self._as_json = as_json
        self._messages = GuardedStream(sys.stderr, "standard error", self.failures) if as_json else self._stream
        self._terminal = not as_json and self._stream.isatty()
        self._drawn = False
        self._last_line = -math.inf

    def failed(self, report: str, error: BaseException) -> None:
        """Count a failed report of the run, and print a warning the first time."""
        if self.failures.add(report):
            self.say(f"warning: {report} failed ({describe(error)}); the run continues")

    @contextlib.contextmanager
    def isolated(self, report: str) -> Iterator[None]:
        """Turn an error in the block into a failure of `report`; the error ends only the block."""
        try:
            yield
        except Exception as error:
            self.failed(report, error)

    def say(self, text: str = "") -> None:
        """Print a message on its own lines."""
        self.end_line()
        print(text, file=self._messages, flush=True)

    def record(self, record: dict[str, Any]) -> None:
        """Print a metrics record as a JSON line; only with `as_json`."""
        if self._as_json:
            print(json.dumps(record), file=self._stream, flush=True)

    def live(self, text: str, *, last: bool = False) -> None:
        """Show the state of the run. If the output is not a terminal, do so at intervals, and at the last call."""
        if self._as_json:
            return
        if self._terminal:
            width = shutil.get_terminal_size().columns
            self._stream.write("\r" + text[: width - 1] + "\x1b[K")
            self._stream.flush()
            self._drawn = True
        elif last or time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            print(text, file=self._stream, flush=True)

    def end_line(self) -> None:
        """Keep the live line on the screen and begin a new line."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False


class SilentConsole(Console):
    """A console that prints nothing, for all ranks but rank 0."""

    def say(self, text: str = "") -> None:
        pass

    def record(self, record: dict[str, Any]) -> None:
        pass

    def live(self, text: str, *, last: bool = False) -> None:
        pass


def duration(seconds: float) -> str:
    """Return a duration as text: "41 s", "4 min 10 s", "2 h 5 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def compact(number: float) -> str:
    """Return a number with three digits and an SI prefix: 512, 4.2k, 11.5M, 1.3G."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


BAR = 24  # characters of a progress bar


def bar(done: int, total: int) -> str:
    """Return a progress bar as text: "[########........] 12/24"."""
    full = BAR * done // max(1, total)
    return f"[{'#' * full}{'.' * (BAR - full)}] {done}/{total}"


def aligned(rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Return the rows of a table as lines, the first `left` columns aligned on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
