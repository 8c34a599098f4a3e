"""The tests of `make gpu`: each file in a process of its own with a time limit, so that a hang costs one file.

A file that did not end well runs once more when all files have run: the tests that failed, and those that had not run.
The test within which its process hung or died is left out.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The smallest shapes first: what is broken in every kernel shows at once. The last ones are compiled by nvcc for the
# tests.
FILES = (
    "tests/gpu/test_gpu_norms.py",
    "tests/gpu/test_gpu_optimizers.py",
    "tests/gpu/test_gpu_linear_cross_entropy.py",
    "tests/gpu/test_gpu_newton_schulz.py",
    "tests/gpu/test_gpu_attention.py",
    "tests/gpu/test_gpu_training.py",
    "tests/gpu/test_gpu_waits.py",
    "tests/gpu/test_gpu_behaviour.py",
    "tests/emulation/test_primitives.py",
    "tests/emulation/test_operators.py",
    "tests/emulation/test_newton_schulz.py",
    "tests/emulation/test_attention.py",
)
ALL_SLOW = "tests/emulation/"  # --quick leaves these out
ENDED = (0, 1, 5)  # pytest's exit status if all tests passed, if some failed, and if there are none
LEAST_SECONDS = 5.0  # a process is not started for less

Run = Callable[[list[str], float], int | None]  # command, limit in seconds -> exit status, None if it was stopped


@dataclass
class FileResult:
    """The results of the tests of a file.

    Attributes:
        status: Exit status of its last process; None if it was stopped or did not run.
        seconds: Duration of its processes.
        runs: Number of its processes.
        collected: Number of its tests, of the first process; None if it did not get so far.
        tests: Outcome and reason of each test that ended.
        ended_in: Tests within which a process was stopped or died, with a description of the end.
        repeated: Tests that failed and then passed in the second process.
    """

    name: str
    status: int | None = None
    seconds: float = 0.0
    runs: int = 0
    collected: int | None = None
    tests: dict[str, tuple[str, str]] = field(default_factory=dict)
    ended_in: dict[str, str] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)

    def outcome(self, test: str) -> str:
        return self.tests[test][0]

    @property
    def count(self) -> Counter[str]:
        """The number of tests that passed, failed or were skipped."""
        return Counter(outcome for outcome, _ in self.tests.values())

    @property
    def not_run(self) -> int:
        """The number of collected tests without an outcome."""
        return max(0, (self.collected or 0) - sum("::" in test for test in self.tests))  # else a file, not collected

    @property
    def complete(self) -> bool:
        """Whether every test of the file has an outcome, and its last process ended by itself."""
        return self.status in ENDED and self.collected is not None and not self.not_run

    def take(self, lines: Sequence[str]) -> None:
        """Take the log of a process into the result."""
        running = None
        for text in lines:
            try:
                line = json.loads(text)
            except ValueError:  # cut off with the process
                continue
            if "collected" in line:
                self.collected = line["collected"] if self.collected is None else self.collected
            elif "start" in line:
                running = line["start"]
            else:
                self._take_test(line["test"], line["outcome"], line["why"])
                running = None if line["test"] == running else running
        if running is not None:
            self._end_within(running)

    def _take_test(self, test: str, outcome: str, why: str) -> None:
        before = self.tests.get(test, ("", ""))
        if before[0] == "failed" and outcome == "passed" and self.runs > 1 and test not in self.repeated:
            self.repeated.append(test)
        elif before[0] != "failed" or outcome == "failed":
            self.tests[test] = (outcome, why)

    def _end_within(self, test: str) -> None:
        self.ended_in[test] = f"its process {self._ended} within the test"
        self.tests[test] = ("failed", self.ended_in[test])

    @property
    def _ended(self) -> str:
        return "was stopped" if self.status is None else f"ended with status {self.status}"

    @property
    def left_out(self) -> list[str]:
        """Tests that the second process does not run."""
        return [test for test in self.tests if test in self.ended_in or self.outcome(test) != "failed"]

    @property
    def failures(self) -> list[str]:
        """A line for each failed test, and one for tests that did not run."""
        lines = []
        for test, (outcome, why) in self.tests.items():
            if outcome == "failed":
                note = " (passed when it was repeated)" if test in self.repeated else ""
                lines.append(f"{test}: {why}{note}")
        if self.runs == 0:
            lines.append(f"{self.name}: not run")
        elif self.collected is None:
            lines.append(f"{self.name}: its process {self._ended} before the first test")
        elif self.not_run:
            lines.append(f"{self.name}: {self.not_run} tests did not run")
        elif not self.complete and not lines:
            lines.append(f"{self.name}: its process {self._ended} after the last test")
        return lines


class Tests:
    """The tests of all files, within `seconds`.

    Args:
        run: Runs a command for a number of seconds at most.
        marks: The tests to run, as for `pytest -m`.
        file_seconds: Limit of the process of a file.
        log: File for the log of the running process; it stays if this process is killed.
        save: Called with the result after each file.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        run: Run,
        marks: str,
        seconds: float,
        file_seconds: float,
        log: Path,
        save: Callable[[dict[str, Any]], None],
    ) -> None:
        self.files = [FileResult(name) for name in files]
        self._run, self._marks, self._file_seconds, self._log, self._save = run, marks, file_seconds, log, save
        self._end = time.monotonic() + seconds

    @property
    def succeeded(self) -> bool:
        return all(file.complete and not file.failures for file in self.files)

    def run(self) -> None:
        """Run every file, and once more each file that did not end well, as long as there is time."""
        for file in self.files:
            self._run_file(file)
        for file in self.files:
            if file.runs and (not file.complete or file.failures):
                self._run_file(file)

    def _run_file(self, file: FileResult) -> None:
        limit = min(self._file_seconds, self._end - time.monotonic())
        if limit < LEAST_SECONDS:
            return
        started = time.monotonic()
        print(f"\n--- {file.name}{': once more' if file.runs else ''}, at most {limit:.0f} s", flush=True)
        self._log.unlink(missing_ok=True)
        file.runs, file.status = file.runs + 1, None
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as left_out:
            left_out.write("\n".join(file.left_out))
            left_out.flush()
            try:
                file.status = self._run(self._command(file.name, left_out.name, limit), limit)
            finally:  # also if this process is ended
                file.seconds += time.monotonic() - started
                file.take(self._log.read_text().splitlines() if self._log.exists() else [])
                self._log.unlink(missing_ok=True)
                self._save(self.result())

    def _command(self, name: str, left_out: str, limit: float) -> list[str]:
        """Return pytest's command. A test that nearly takes the whole limit prints where it is."""
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
        command += ["-p", "nanochat_native.bench.gpu_test_log", "-o", f"gpu_test_log={self._log}"]
        command += ["-o", f"gpu_tests_left_out={left_out}", "-o", f"faulthandler_timeout={max(1.0, limit - 5):.0f}"]
        return [*command, "-m", self._marks, name]

    def result(self) -> dict[str, Any]:
        """Return counts, failures, reasons of skips, and the state of each file."""
        total: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for file in self.files:
            total += file.count
            reasons.update(why for outcome, why in file.tests.values() if outcome == "skipped")
        return {
            **{outcome: total[outcome] for outcome in ("passed", "failed", "skipped")},
            "failures": [line for file in self.files for line in file.failures],
            "skip_reasons": dict(reasons),
            "files": [
                {
                    "file": file.name,
                    "status": file.status,
                    "seconds": file.seconds,
                    "runs": file.runs,
                    "not_run": file.not_run,
                    **{outcome: file.count[outcome] for outcome in ("passed", "failed", "skipped")},
                }
                for file in self.files
            ],
        }
