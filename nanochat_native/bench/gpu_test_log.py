"""A pytest plugin for `make gpu`: it writes the course of the tests to a file, line by line, so that a process that
hangs or dies leaves its results.

    pytest -p nanochat_native.bench.gpu_test_log -o gpu_test_log=FILE -o gpu_tests_left_out=FILE

The lines of the log are JSON: {"collected": number}, {"start": test}, {"test": test, "outcome": "passed", "failed" or
"skipped", "why": text}. The second file names tests, one per line, that do not run. Tests marked slow run last.
"""

import json
from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    """Declare the two settings."""
    parser.addini("gpu_test_log", "file to which each test is written", default="")
    parser.addini("gpu_tests_left_out", "file with the tests that do not run", default="")


def pytest_configure(config: Any) -> None:
    """Begin the log."""
    config.pluginmanager.register(Log(Path(config.getini("gpu_test_log")), config.getini("gpu_tests_left_out")))


class Log:
    """The hooks that write the log."""

    def __init__(self, path: Path, left_out: str) -> None:
        self._path = path
        self._left_out = set(Path(left_out).read_text().splitlines()) if left_out else set()

    def _write(self, **line: Any) -> None:
        with self._path.open("a") as file:  # closed after each line: nothing is lost with the process
            file.write(json.dumps(line) + "\n")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid not in self._left_out]
        items.sort(key=lambda item: item.get_closest_marker("slow") is not None)

    def pytest_collection_finish(self, session: Any) -> None:
        self._write(collected=len(session.items))

    def pytest_collectreport(self, report: Any) -> None:
        if not report.passed:
            self._write(test=report.nodeid, outcome=report.outcome, why=why(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(start=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self._write(test=report.nodeid, outcome=report.outcome, why=why(report))


def why(report: Any) -> str:
    """Return the reason of a skip or a failure, in one line."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longrepr).strip().splitlines() or [""]
    return (lines[0] if crash else lines[-1])[:200]
