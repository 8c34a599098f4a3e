"""The reader's file: its stubs, and the check of a function in it, in a process of its own with a time limit."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat_native.exercises import CHAPTERS, of_chapter
from nanochat_native.exercises.base import Verdict, Write

TIME_LIMIT = 20.0  # seconds that the reader's functions may take in all
HEADER = '''"""Exercises of chapter {chapter} of the guide: {title}.

Write each function, then run the command above it.
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
'''


def file_of(chapter: int, folder: Path) -> Path:
    """Return the reader's file for a chapter, such as exercises/05_attention.py."""
    return folder / f"{chapter:02}_{CHAPTERS[chapter].replace('-', '_')}.py"


def stubs(chapter: int) -> str:
    """Return the content of a new file for the exercises of a chapter. Raise ValueError if it has none to write."""
    written = [exercise for exercise in of_chapter(chapter) if isinstance(exercise, Write)]
    if not written:
        raise ValueError(f"chapter {chapter} has no function to write; list {chapter} shows its exercises")
    parts = [HEADER.format(chapter=chapter, title=CHAPTERS[chapter].replace("-", " "))]
    for exercise in written:
        parts.append(
            f"# Exercise {exercise.id}: {exercise.title}\n"
            f"# python -m nanochat_native.guide check {exercise.id}\n\n{exercise.stub.strip()}\n"
        )
    return "\n\n".join(parts)


def check(exercise: Write, path: Path) -> Verdict:
    """Check the function of an exercise in the reader's file. Raise FileNotFoundError without that file.

    The file runs in a process of its own: it may fail, end the process, or never end.
    """
    chapter = exercise.id.split(".")[0]
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; this writes it: python -m nanochat_native.guide start {chapter}"
        )
    source = path.read_bytes()
    return in_a_process(lambda: _check(exercise, path, source), f"{exercise.function} in {path}")


def _check(exercise: Write, path: Path, source: bytes) -> Verdict:
    def where(error: Exception) -> str:
        return _one_line(error, path)

    try:
        function = load(source, path, exercise.function)
    except Exception as error:
        return Verdict(False, where(error))
    if not callable(function):
        return Verdict(False, f"{path} has no function {exercise.function}")
    return exercise.check(function, where)


def load(source: bytes, path: Path, name: str) -> Any:
    """Run a file, and return what it calls `name`; None if it has no such name."""
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    sys.modules[path.stem] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return getattr(module, name, None)


def _one_line(error: Exception, path: Path) -> str:
    """Return an exception as one line, with the last line of the file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, text = [error.lineno], error.msg
    else:
        text = " ".join(str(error).split())
    place = f"{path}, line {lines[-1]}: " if lines else f"{path}: "
    return f"{place}{type(error).__name__}{': ' * bool(text)}{text[:300]}"


def in_a_process(work: Callable[[], Verdict], name: str) -> Verdict:
    """Return the verdict of `work`, done in a copy of this process that ends after TIME_LIMIT.

    name: of what it runs, for a message.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the copy runs with one
        child = os.fork()
    if child == 0:
        _work_and_exit(work, writing)
    os.close(writing)
    try:
        received = _receive(reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if received is None:
        return Verdict(False, f"{name} took longer than {TIME_LIMIT:g} seconds")
    if not received:
        return Verdict(False, f"{name} ended the process ({_ending(status)})")
    return Verdict(*json.loads(received))


def _work_and_exit(work: Callable[[], Verdict], writing: int) -> None:
    code = 1
    try:
        torch.set_num_threads(1)  # threads do not survive a fork
        verdict = json.dumps(work()).encode()
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(writing, verdict)
        code = 0
    except SystemExit as error:
        code = error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        text = " ".join("".join(traceback.format_exception_only(error)).split())
        os.write(writing, json.dumps((False, text)).encode())
    finally:
        os._exit(code)


def _receive(reading: int) -> bytes | None:
    """Return all that comes through a pipe until it is closed; None if that takes longer than TIME_LIMIT."""
    end = time.monotonic() + TIME_LIMIT
    received = b""
    while select.select([reading], [], [], max(0.0, end - time.monotonic()))[0]:
        piece = os.read(reading, 1 << 16)
        if not piece:
            return received
        received += piece
    return None


def _ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.WEXITSTATUS(status)}"
