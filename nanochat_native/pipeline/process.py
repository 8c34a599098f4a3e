"""Runs a stage as a process: its output is shown and kept, and signals are passed on to it."""

import codecs
import contextlib
import ctypes
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

_PR_SET_PDEATHSIG = 1  # prctl(2)
SHUTDOWN_SECONDS = 600  # that torchrun gives its ranks to write a checkpoint after a signal; its default is 30
PIPE_SECONDS = 10  # for which the speedrun waits for the output of a stage after its end


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


def dies_with_parent() -> Callable[[], None] | None:
    """Return a function for a child process to call. The child then gets SIGTERM if the speedrun is killed.

    Only Linux has this. Elsewhere the result is None, and a child outlives a speedrun that is killed.
    """
    if platform.system() != "Linux":
        return None
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
    with open(log, "ab", buffering=0) as file:
        _write(file, os.fsencode(f"$ {shlex.join(command)}\n"))
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
        preexec_fn=dies_with_parent(),
        env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS), **os.environ},
    )
    signals.process = process
    try:
        if signals.received:  # between the last look and the start
            process.send_signal(signals.received)
        # A thread, because ranks that torchrun has lost may hold the pipe.
        copying = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
        copying.start()
        code = process.wait()
        copying.join(PIPE_SECONDS)
    finally:
        signals.process = None
        if process.poll() is None:
            process.kill()
            process.wait()
    return (128 - code if code < 0 else code), time.monotonic() - start


def _write(file: FileIO, data: bytes) -> None:
    """Write to the log, unless the disk is full."""
    with contextlib.suppress(OSError):
        file.write(data)


def _copy(source: BinaryIO, log: Path) -> None:
    """Copy the bytes of a pipe to the end of a file and, as text, to stdout, as they come. A full disk ends neither."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with source, open(log, "ab", buffering=0) as file:
        while data := os.read(source.fileno(), 1 << 16):
            _write(file, data)
            sys.stdout.write(decoder.decode(data))
            sys.stdout.flush()
