"""Runs programs that a model wrote, where they can do no harm. It needs Linux on x86-64 or aarch64.

A program runs in a process of its own, started without environment variables, with limits of CPU time, memory, file
size, open files and threads, and a time limit, after which it is killed. A filter of the kernel (seccomp) refuses all
system calls but those of a list (sandbox_worker): a program cannot start processes or other programs, use a network,
or send signals. The standard input, output and error are empty.

Where the system allows it, the process also has namespaces of its own: no network device, and a file system in which
it sees Python, read-only, and an empty folder in memory. Where it does not, as in many containers, the program can
read what the user can read, but cannot write any file. `Outcome.sees_files` tells. Started by root, the program has no
privileges, and runs as the user nobody if that user can read Python.

The sandbox is for the mistakes of a model. It is not for an attacker who knows a defect of the kernel, and a program
that is written to pass, for example with a result that is equal to everything, passes as in any test.
"""

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SECONDS = 5.0  # nanochat's time limit of a program
START_SECONDS = 60.0  # for which the process may start, on a busy machine
MAX_ANSWER = 1 << 12  # bytes that are read from the process
WORKER = Path(__file__).with_name("sandbox_worker.py")
# What the programs of HumanEval import; it shows that Python finds its library inside the sandbox.
TRIAL = "import collections, copy, datetime, functools, hashlib, heapq, itertools, math, random, re, string, typing\n"


class Outcome(NamedTuple):
    """Outcome of a program.

    Attributes:
        passed: Whether its last statement was executed, without an error and in time.
        timed_out: Whether it was killed at the time limit.
        sees_files: Whether it could read the files of the user, because the system does not allow namespaces.
    """

    passed: bool
    timed_out: bool
    sees_files: bool


def run(program: str, seconds: float = SECONDS) -> Outcome:
    """Run a Python program for at most `seconds`, and wait until it has ended.

    Raises OSError if the sandbox cannot be made; the program has then not run.
    """
    challenge = os.urandom(32)
    with tempfile.TemporaryDirectory(prefix="nanochat-program-", ignore_cleanup_errors=True) as folder:
        Path(folder, "program").write_bytes(program.encode(errors="replace"))
        worker = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", str(WORKER), folder, str(seconds), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, which the output shows
                worker.stdin.write(challenge)
                worker.stdin.close()
            source = worker.stdout.fileno()
            line, ended = _read(source, START_SECONDS, until=b"\n")
            if b"\n" not in line:
                raise OSError("the process of the sandbox was killed" if ended else "the sandbox did not start in time")
            first, _, answer = line.partition(b"\n")
            found = json.loads(first)
            if "error" in found:
                raise OSError(f"the sandbox cannot isolate a program on this system: {found['error']}")
            more, ended = _read(source, seconds)
            passed = answer + more == hashlib.sha256(challenge).hexdigest().encode()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            worker.stdout.close()
    return Outcome(ended and passed, not ended, found["sees_files"])


def _read(source: int, seconds: float, until: bytes | None = None) -> tuple[bytes, bool]:
    """Return (what comes from a pipe, whether its end or MAX_ANSWER was reached), for at most `seconds`."""
    end, content = time.monotonic() + seconds, b""
    waiting = select.poll()
    waiting.register(source, select.POLLIN)
    while len(content) < MAX_ANSWER:
        if not waiting.poll(max(0.0, 1000 * (end - time.monotonic()))):
            return content, False
        part = os.read(source, MAX_ANSWER)
        content += part
        if not part:
            break
        if until is not None and until in content:
            break
    return content, True


def check() -> bool:
    """Run a program that does nothing but import; return whether programs see the files of the user.

    Raises OSError if the sandbox cannot be made or Python does not run in it.
    """
    outcome = run(TRIAL)
    if not outcome.passed:
        raise OSError("the sandbox cannot run Python on this machine")
    return outcome.sees_files
