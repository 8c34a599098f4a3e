"""Runs a stage as a process: its output is shown and kept, and signals are passed on to it."""

import codecs
import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

_PR_SET_PDEATHSIG = 1  # prctl(2)


class Signals:
    """Passes SIGINT and SIGTERM on to the running stage, within the block.

    Attributes:
        received: the first of the signals, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


def _dies_with_parent() -> Callable[[], None]:
    """Return what a child calls so that it gets SIGTERM if the speedrun is killed: else it would run on unseen."""
    prctl = ctypes.CDLL(None).prctl  # loaded before the fork

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return in_child


def run(command: Sequence[str], log: Path, signals: Signals) -> tuple[int, float]:
    """Run a command and return its exit code and its seconds. Its output goes to stdout and to the end of a file.

    The command has a process group of its own, so that Ctrl-C reaches it once. A process that a signal ended has the
    exit code 128 plus its number.
    """
    start = time.monotonic()
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=_dies_with_parent(),
        )
        signals.process = process
        try:
            if signals.received:  # between the last look and the start
                process.send_signal(signals.received)
            assert process.stdout is not None
            _copy(process.stdout, file)
            code = process.wait()
        finally:
            signals.process = None
            if process.poll() is None:
                process.kill()
                process.wait()
    return (128 - code if code < 0 else code), time.monotonic() - start


def _copy(source: BinaryIO | Any, file: BinaryIO) -> None:
    """Copy the bytes of a pipe to a file and, as text, to stdout, as they come. A full disk ends neither."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while data := os.read(source.fileno(), 1 << 16):
        with contextlib.suppress(OSError):
            file.write(data)
            file.flush()
        sys.stdout.write(decoder.decode(data))
        sys.stdout.flush()
