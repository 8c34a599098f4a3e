"""python -m nanochat_native.bench.gpu (`make gpu`): builds, tests and times the CUDA kernels on a bare GPU machine.

Four stages, each a process of its own with a time limit: build in place, doctor, the tests marked gpu, the benchmarks.
Failing tests do not keep the benchmarks from running. Everything goes into one JSON file, which is written anew after
every stage and every case, and a table. Exit status 0 only if all went well. Needs no package but torch and pytest.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from nanochat_native.bench import record

ROOT = Path(__file__).resolve().parents[2]
TEST_FOLDERS = ("tests/gpu", "tests/emulation")
STAGES = ("build", "doctor", "tests", "bench")
# Seconds that a stage is sure of. What it leaves over goes to those after it; together they are less than the 9 minutes
# (quick: 3) that are promised.
SHARES = {
    "full": {"build": 150.0, "doctor": 20.0, "tests": 140.0, "bench": 215.0},
    "quick": {"build": 75.0, "doctor": 15.0, "tests": 30.0, "bench": 52.0},
}


class Budget:
    """The time of the whole, and how much of it a stage may take so that each later one still gets its share."""

    def __init__(self, shares: dict[str, float]) -> None:
        self.shares = shares
        self.start = time.monotonic()

    def limit(self, stage: str) -> float:
        later = STAGES[STAGES.index(stage) + 1 :]
        left = sum(self.shares.values()) - (time.monotonic() - self.start)
        return max(1.0, left - sum(self.shares[name] for name in later))


def run_limited(command: list[str], limit: float, environment: dict[str, str] | None = None) -> int | None:
    """Exit status of a command, or None where it was stopped at `limit` seconds. What it started ends with it."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | (environment or {}), start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_tests(path: Path) -> dict[str, Any]:
    """What pytest's JUnit file holds: numbers, the failures, and how often each reason for a skip was given."""
    outcomes: Counter[str] = Counter()
    failures, reasons = [], Counter[str]()
    for test in ElementTree.parse(path).iter("testcase"):
        found = {child.tag: child.get("message", "") for child in test}
        if "failure" in found or "error" in found:
            outcomes["failed"] += 1
            words = (found.get("failure") or found.get("error") or "").strip().splitlines()[:1]
            failures.append(f"{test.get('classname')}::{test.get('name')}: {' '.join(words)[:200]}")
        elif "skipped" in found:
            outcomes["skipped"] += 1
            reasons[found["skipped"]] += 1
        else:
            outcomes["passed"] += 1
    numbers = {outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
    return {**numbers, "failures": failures, "skip_reasons": dict(reasons)}


class Run:
    """One `make gpu`: its options, its time, and its result, which lies in `path` at every moment."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.budget = Budget(SHARES["quick" if options.quick else "full"])
        gpu = record.gpu_facts() if options.device == "cuda" else {}
        self.path: Path = options.json or default_path(str(gpu.get("name", options.device)), options.quick)
        self.result: dict[str, Any] = {
            "command": sys.argv,
            "device": options.device,
            "quick": options.quick,
            "time": record.now(),
            "commit": options.commit or record.commit(),
            "gpu_before": gpu,
            "machine": {},
            "limits": {},
            "stages": [],
            "tests": {},
            "cases": [],
            "rows": [],
            "skipped": [],
            "errors": [],
        }
        record.save(self.path, self.result)

    def stage(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> bool:
        """Runs a stage's command; whether it ended well, and in time."""
        limit = self.budget.limit(name)
        print(f"\n=== {name}: at most {limit:.0f} s", flush=True)
        started = time.monotonic()
        status = run_limited(command, limit, environment)
        self.result["stages"].append(
            {"stage": name, "status": status, "seconds": time.monotonic() - started, "limit": limit}
        )
        record.save(self.path, self.result)
        return status == 0

    def build(self) -> bool:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return self.stage("build", command, {"NANOCHAT_CUDA": "on"})

    def doctor(self) -> None:
        self.stage("doctor", [sys.executable, "-m", "nanochat_native.doctor"])

    def tests(self) -> None:
        folders = [folder for folder in TEST_FOLDERS if (ROOT / folder).is_dir()]
        marks = "gpu and not slow" if self.options.quick else "gpu"
        with tempfile.TemporaryDirectory() as folder:
            junit = Path(folder) / "junit.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--durations=5", "-p", "no:cacheprovider"]
            command += ["--continue-on-collection-errors", "-o", "faulthandler_timeout=100", f"--junitxml={junit}"]
            self.stage("tests", [*command, "-m", marks, *folders])
            if junit.exists():
                self.result["tests"] = read_tests(junit)
        record.save(self.path, self.result)

    def bench(self) -> None:
        """As many processes as it takes: one that dies is followed by another for the cases that are left."""
        options = self.options
        command = [sys.executable, "-m", "nanochat_native.bench.gpu_run", "--json", str(self.path.resolve())]
        command += ["--device", options.device, "--only", options.only] + ["--quick"] * options.quick
        while True:
            before = finished(self.result)
            # The process ends by itself before it is ended: it then says where it stood.
            seconds = self.budget.limit("bench") - 3
            self.run_bench([*command, "--seconds", str(seconds)])
            missing = len(self.result["cases"]) - finished(self.result)
            if not missing or finished(self.result) == before or self.budget.limit("bench") <= 5:
                break
        known = {one["title"] for kind in ("rows", "skipped", "errors") for one in self.result[kind]}
        for title in self.result["cases"]:
            if title not in known:
                self.result["errors"].append({"title": title, "error": "not run: the benchmarks had ended"})
        if not self.result["cases"]:
            self.result["errors"].append({"title": "all", "error": f"no case was found that holds {options.only!r}"})
        record.save(self.path, self.result)

    def run_bench(self, command: list[str]) -> None:
        started, limit = time.monotonic(), self.budget.limit("bench")
        print(f"\n=== bench: at most {limit:.0f} s", flush=True)
        status = run_limited(command, limit)
        self.result = record.load(self.path)
        running = self.result.pop("running", None)
        if running:
            ended = "was stopped" if status is None else f"ended with status {status}"
            error = f"its process {ended} within the case: the output above says where"
            self.result["errors"].append({"title": running, "error": error})
        stage = {"stage": "bench", "status": status, "seconds": time.monotonic() - started, "limit": limit}
        self.result["stages"].append(stage)
        record.save(self.path, self.result)

    def run(self) -> int:
        try:
            if self.options.device == "cpu" or self.build():
                self.doctor()
                if not self.options.skip_tests:
                    self.tests()
                self.bench()
        finally:
            self.result["seconds"] = time.monotonic() - self.budget.start
            record.save(self.path, self.result)
            print(*summary(self.result, self.path), sep="\n", flush=True)
        return 0 if succeeded(self.result) else 1


def finished(result: dict[str, Any]) -> int:
    return sum(len(result[kind]) for kind in ("rows", "skipped", "errors"))


def succeeded(result: dict[str, Any]) -> bool:
    return not result["errors"] and all(stage["status"] == 0 for stage in result["stages"])


def summary(result: dict[str, Any], path: Path) -> list[str]:
    """The lines that end the output: the table, then what was left out or went wrong, then the verdict."""
    lines = ["", "=== summary"]
    if result["limits"]:
        copy, product = result["limits"]["copy"], result["limits"]["bfloat16_product"]
        lines.append(f"limits  copy {copy:,.0f} GB/s, bfloat16 torch.mm {product / 1e3:,.0f} TFLOP/s, measured")
    for row in result["rows"]:
        first, *more = record.table_parts(row)
        lines += [first.rstrip(), *([f"    {', '.join(more)}"] if more else [])]
    below = [row["title"] for row in result["rows"] if row["ratio"] is not None and row["ratio"] < row["floor"]]
    lines += [f"below its floor: {title}" for title in below]
    lines += [f"left out: {one['title']}: {one['why']}" for one in result["skipped"]]
    tests = result["tests"]
    if tests:
        lines.append(f"tests   {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped")
        lines += [f"    skipped {count}: {reason}" for reason, count in tests["skip_reasons"].items()]
        lines += [f"FAILED  {failure}" for failure in tests["failures"]]
    lines += [f"FAILED  {one['title']}: {one['error']}" for one in result["errors"]]
    for stage in result["stages"]:
        ended = "STOPPED at its limit" if stage["status"] is None else f"status {stage['status']}"
        lines.append(f"stage   {stage['stage']:<7} {ended}, {stage['seconds']:.0f} of {stage['limit']:.0f} s")
    lines.append(f"json    {path}")
    lines.append(f"{'passed' if succeeded(result) else 'FAILED'} in {result['seconds']:.0f} s")
    return lines


def default_path(name: str, quick: bool) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path("benchmarks/results") / f"{slug}-{time.strftime('%Y-%m-%d')}{'-quick' if quick else ''}.json"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = record.Parser(
        prog="python -m nanochat_native.bench.gpu",
        description="Builds, tests and times the CUDA kernels: under 9 minutes, one JSON and a table.",
    )
    parser.add_argument("--quick", action="store_true", help="under 3 minutes: no slow tests, fewer cases")
    parser.add_argument("--json", type=Path, help="the result; benchmarks/results/<gpu>-<date>.json by default")
    parser.add_argument("--only", default="", help="time the cases whose group and name hold this text")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same code on small sizes, builds nothing"
    )
    parser.add_argument("--commit", default="", help="to record where the source lies outside of git")
    return parser.parse_args(arguments)


def main(args: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if args is None else args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is ended, the result written
    return Run(options).run()


if __name__ == "__main__":
    sys.exit(main())
