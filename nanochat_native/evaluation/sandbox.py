"""Runs programs that a model wrote, where they can do no harm.

A program runs in a process of its own, started without environment variables. Everywhere it has limits of CPU time,
memory, file size, output and number of processes (sandbox_worker), and a time limit, after which it and its children
are killed. On Linux, where the system allows it, it also has namespaces of its own:

- network: it has no network, not even that of this machine;
- processes: it sees and can kill only its own processes, and none of them outlives it;
- files: it sees Python, read-only, and an empty folder in memory, and no other file.

Started by root, the program runs as the user nobody. What the system does not allow is in `Outcome.missing`. The
sandbox is for mistakes of a model, not for an attacker who knows a defect of the kernel.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SECONDS = 5.0  # nanochat's time limit of a program
CLEANUP_SECONDS = 10.0  # for which the worker may start and kill the program's processes, beyond the limit
WORKER = Path(__file__).with_name("sandbox_worker.py")
# What the programs of HumanEval import; it shows that Python finds its library inside the sandbox.
TRIAL = "import collections, copy, datetime, functools, hashlib, heapq, itertools, math, random, re, string, typing\n"


class Outcome(NamedTuple):
    """Outcome of a program.

    Attributes:
        passed: Whether its last statement was executed, without an error and in time.
        missing: What could not be isolated: of "network", "processes" and "files".
    """

    passed: bool
    missing: tuple[str, ...] = ()


def run(program: str, seconds: float = SECONDS) -> Outcome:
    """Run a Python program for at most `seconds`, and wait until none of its processes is left.

    Raises OSError if the sandbox cannot be started.
    """
    command = [sys.executable, "-I", "-S", "-X", "utf8", str(WORKER)]
    with tempfile.TemporaryDirectory(prefix="nanochat-program-", ignore_cleanup_errors=True) as folder:
        worker = subprocess.Popen(
            [*command, folder, str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        try:
            printed, _ = worker.communicate(program.encode(errors="replace"), timeout=seconds + CLEANUP_SECONDS)
            found = json.loads(printed)
        except (subprocess.TimeoutExpired, json.JSONDecodeError):  # something killed or stopped the worker
            return Outcome(False)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.communicate()
    return Outcome(bool(found["passed"]), tuple(found["missing"]))


def check() -> tuple[str, ...]:
    """Run a program that does nothing; return what cannot be isolated. Raises OSError if it does not run."""
    outcome = run(TRIAL)
    if not outcome.passed:
        raise OSError("the sandbox cannot run Python on this machine")
    return outcome.missing
