"""python -m nanochat_native.bench.gpu (`make gpu`): build, test and time the CUDA kernels on a bare GPU machine.

Six stages run in processes of their own with time limits: the build in place, the first figures, doctor, the tests
marked gpu, a process for each file, the benchmarks, and a training step whose operators are measured beside the
roofline's model. The last two run even if tests fail. All results go into one JSON file, rewritten after every stage,
file of tests and case, and into a table. The exit status is 0 only if everything succeeded. Needs torch and pytest.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nanochat_native.bench import gpu_tests, results_io

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("build", "first", "doctor", "tests", "bench", "roofline")
# Seconds guaranteed to each stage; unused time goes to the later stages. The sum is below the promised 10 minutes, with
# --quick below 4.
SHARES = {
    "full": {"build": 150.0, "first": 40.0, "doctor": 20.0, "tests": 205.0, "bench": 155.0, "roofline": 20.0},
    "quick": {"build": 75.0, "first": 30.0, "doctor": 15.0, "tests": 65.0, "bench": 38.0, "roofline": 12.0},
}
FILE_SECONDS = {"full": 75.0, "quick": 30.0}  # limit of a file of tests: a hang leaves time for the other files
FIRST_SECONDS = 12.0  # for which the first figures begin new cases


class Budget:
    """The time of the whole run, and the limit of a stage that leaves each later stage its share."""

    def __init__(self, shares: dict[str, float]) -> None:
        self.shares = shares
        self.start = time.monotonic()

    def limit(self, stage: str) -> float:
        later = STAGES[STAGES.index(stage) + 1 :]
        left = sum(self.shares.values()) - (time.monotonic() - self.start)
        return max(1.0, left - sum(self.shares[name] for name in later))


def run_limited(command: list[str], limit: float, environment: dict[str, str] | None = None) -> int | None:
    """Run a command and return its exit status, or None if it was stopped at `limit` seconds with its children."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | (environment or {}), start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Run:
    """One run of `make gpu`: its options, its time, and its result, which `path` always holds."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.budget = Budget(SHARES["quick" if options.quick else "full"])
        gpu = results_io.gpu_facts() if options.device == "cuda" else {}
        self.path: Path = options.json or default_path(str(gpu.get("name", options.device)), options.quick)
        self.result: dict[str, Any] = {
            "command": sys.argv,
            "device": options.device,
            "quick": options.quick,
            "time": results_io.now(),
            "commit": options.commit or results_io.commit(),
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
        results_io.save(self.path, self.result)

    def stage(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> bool:
        """Run the command of a stage. Returns whether it succeeded in time."""
        limit = self.budget.limit(name)
        print(f"\n=== {name}: at most {limit:.0f} s", flush=True)
        started = time.monotonic()
        status = run_limited(command, limit, environment)
        self.result["stages"].append(
            {"stage": name, "status": status, "seconds": time.monotonic() - started, "limit": limit}
        )
        results_io.save(self.path, self.result)
        return status == 0

    def build(self) -> bool:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return self.stage("build", command, {"NANOCHAT_CUDA": "on"})

    def doctor(self) -> None:
        self.stage("doctor", [sys.executable, "-m", "nanochat_native.doctor"])

    def first(self) -> None:
        """Run the first cases, so that there are figures before anything that takes long."""
        limit = min(self.budget.limit("first"), self.budget.shares["first"])
        self.run_bench("first", ["--seconds", str(limit - 3), "--begin", str(FIRST_SECONDS)])

    def tests(self) -> None:
        """Run the tests, a process for each file."""
        limit = self.budget.limit("tests")
        print(f"\n=== tests: at most {limit:.0f} s", flush=True)
        started = time.monotonic()
        quick = self.options.quick

        def save(tests: dict[str, Any]) -> None:
            self.result["tests"] = tests
            results_io.save(self.path, self.result)

        tests = gpu_tests.Tests(
            [name for name in gpu_tests.FILES if not (quick and name.startswith(gpu_tests.ALL_SLOW))],
            run=run_limited,
            marks="gpu and not slow" if quick else "gpu",
            seconds=limit,
            file_seconds=FILE_SECONDS["quick" if quick else "full"],
            log=self.path.resolve().with_suffix(".tests"),
            save=save,
        )
        tests.run()
        status = 0 if tests.succeeded else 1
        seconds = time.monotonic() - started
        self.result["stages"].append({"stage": "tests", "status": status, "seconds": seconds, "limit": limit})
        save(tests.result())

    def bench(self) -> None:
        """Run the benchmarks. If their process dies, another one runs the remaining cases."""
        while True:
            before = finished(self.result)
            # The process must end by itself before the limit, so that it can report where it was.
            seconds = self.budget.limit("bench") - 3
            self.run_bench("bench", ["--seconds", str(seconds)])
            missing = len(self.result["cases"]) - finished(self.result)
            if not missing or finished(self.result) == before or self.budget.limit("bench") <= 5:
                break
        known = {one["title"] for kind in ("rows", "skipped", "errors") for one in self.result[kind]}
        for title in self.result["cases"]:
            if title not in known:
                self.result["errors"].append({"title": title, "error": "not run: the benchmarks had ended"})
        if not self.result["cases"]:
            self.result["errors"].append({"title": "all", "error": f"no case contains {self.options.only!r}"})
        results_io.save(self.path, self.result)

    def roofline(self) -> None:
        if self.options.device == "cuda":
            command = [sys.executable, "-m", "nanochat_native.lab.roofline.worker", str(self.path.resolve())]
            self.stage("roofline", command)

    def run_bench(self, name: str, limits: list[str]) -> None:
        """Run the process of the benchmarks once, as the stage `name`."""
        options = self.options
        command = [sys.executable, "-m", "nanochat_native.bench.gpu_worker", "--json", str(self.path.resolve())]
        command += ["--device", options.device, "--only", options.only] + ["--quick"] * options.quick + limits
        started, limit = time.monotonic(), self.budget.limit(name)
        print(f"\n=== {name}: at most {limit:.0f} s", flush=True)
        status = run_limited(command, limit)
        self.result = results_io.load(self.path)
        running = self.result.pop("running", None)
        if running:
            ended = "was stopped" if status is None else f"ended with status {status}"
            error = f"its process {ended} within the case: the output above says where"
            self.result["errors"].append({"title": running, "error": error})
        stage = {"stage": name, "status": status, "seconds": time.monotonic() - started, "limit": limit}
        self.result["stages"].append(stage)
        results_io.save(self.path, self.result)

    def run(self) -> int:
        try:
            if self.options.device == "cpu" or self.build():
                self.first()
                self.doctor()
                if not self.options.skip_tests:
                    self.tests()
                self.bench()
                self.roofline()
        finally:
            self.result["seconds"] = time.monotonic() - self.budget.start
            results_io.save(self.path, self.result)
            print(*summary(self.result, self.path), sep="\n", flush=True)
        return 0 if succeeded(self.result) else 1


def finished(result: dict[str, Any]) -> int:
    return sum(len(result[kind]) for kind in ("rows", "skipped", "errors"))


def succeeded(result: dict[str, Any]) -> bool:
    return not result["errors"] and all(stage["status"] == 0 for stage in result["stages"])


def summary(result: dict[str, Any], path: Path) -> list[str]:
    """Return the last lines of the output: the table, the skipped cases, the errors, and the verdict."""
    lines = ["", "=== summary"]
    if result["limits"]:
        copy, product = result["limits"]["copy"], result["limits"]["bfloat16_product"]
        lines.append(f"limits  copy {copy:,.0f} GB/s, bfloat16 torch.mm {product / 1e3:,.0f} TFLOP/s, measured")
    for row in result["rows"]:
        first, *more = results_io.table_parts(row)
        lines += [first.rstrip(), *([f"    {', '.join(more)}"] if more else [])]
    below = [row["title"] for row in result["rows"] if row["ratio"] is not None and row["ratio"] < row["floor"]]
    lines += [f"below its minimum speedup: {title}" for title in below]
    lines += [f"left out: {one['title']}: {one['why']}" for one in result["skipped"]]
    tests = result["tests"]
    if tests:
        for file in tests["files"]:
            ended = "STOPPED" if file["status"] is None else f"status {file['status']}"
            counts = f"{file['passed']} passed, {file['failed']} failed, {file['skipped']} skipped"
            lines.append(f"tests   {file['file']}: {ended}, {counts}, {file['seconds']:.0f} s")
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
    parser = results_io.Parser(
        prog="python -m nanochat_native.bench.gpu",
        description="Build, test and time the CUDA kernels in under 10 minutes. Writes one JSON file and a table.",
    )
    parser.add_argument("--quick", action="store_true", help="under 4 minutes: no slow tests, fewer cases")
    parser.add_argument("--json", type=Path, help="file for the result; default: benchmarks/results/<gpu>-<date>.json")
    parser.add_argument("--only", default="", help="time only the cases whose group and name contain this text")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the tests")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: run the same code on small sizes, without a build",
    )
    parser.add_argument("--commit", default="", help="the commit to record if the source is not in a git repository")
    return parser.parse_args(arguments)


def main(args: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if args is None else args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what is running, and writes the result
    return Run(options).run()


if __name__ == "__main__":
    sys.exit(main())
