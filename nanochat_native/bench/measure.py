"""Timing side by side, and the machine's limits."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_native import ops
from nanochat_native.bench import record


class UnavailableError(RuntimeError):
    """A case cannot be made here, for a reason that is no fault of ours: an opponent that does not work."""


@dataclass(frozen=True)
class Case:
    """One comparison. `check` raises AssertionError where the results differ; a case that fails it is never timed."""

    group: str
    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    opponent: str
    check: Callable[[], None]
    floor: float  # the least ratio theirs / ours that the project promises: on two CPU cores, or on one H100 or H200
    flops: float = 0.0  # of ours, by the algorithm's own count
    bytes: float = 0.0  # that ours must move
    saves_memory: bool = False  # the peak of both is worth a column
    saves_launches: bool = False  # the kernels that both launch are
    note: str = ""  # what a reader of the figure has to know


@dataclass(frozen=True)
class Limits:
    """What the machine gives: GFLOP/s of a large float32 product by torch.mm, GB/s read and written by a copy."""

    sgemm: float
    copy: float


def milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def turns(
    functions: list[Callable[[], Any]],
    *,
    seconds: float,
    repeats: int,
    clock: Callable[[Callable[[], Any]], float] = milliseconds,
) -> list[list[float]]:
    """Milliseconds of each function by `clock`. They take turns, so that a slow spell of the machine meets all of them.

    At least `repeats` turns, and more until `seconds` have passed.
    """
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    gc.collect()
    start = time.perf_counter()
    while len(times[0]) < repeats or time.perf_counter() - start < seconds:
        for function, taken in zip(functions, times, strict=True):
            taken.append(clock(function))
    return times


def side_by_side(functions: list[Callable[[], Any]], *, seconds: float, repeats: int) -> list[float]:
    """Median milliseconds of each function, by turns."""
    return [statistics.median(taken) for taken in turns(functions, seconds=seconds, repeats=repeats)]


def measure_limits() -> Limits:
    size, count = 2048, 32 * 1024 * 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    product = min(milliseconds(lambda: torch.mm(a, b)) for _ in range(7))
    source, target = torch.ones(count), torch.ones(count)
    copy = min(milliseconds(lambda: target.copy_(source)) for _ in range(7))
    return Limits(sgemm=2 * size**3 / product / 1e6, copy=8 * count / copy / 1e6)


def run(case: Case, limits: Limits, *, seconds: float, repeats: int) -> dict[str, Any]:
    """Checks, times, and returns the case's row."""
    case.check()
    ours, theirs = side_by_side([case.ours, case.theirs], seconds=seconds, repeats=repeats)
    row = figures(case, ours, theirs)
    if case.flops:
        row["share_of_sgemm"] = row["gflops"] / limits.sgemm
    if case.bytes:
        row["share_of_copy"] = row["gbytes"] / limits.copy
    return row


def figures(case: Case, ours: float, theirs: float | None) -> dict[str, Any]:
    """The row of a case that took these milliseconds; theirs is None where the opponent cannot run at all."""
    row: dict[str, Any] = {
        "group": case.group,
        "case": case.name,
        "opponent": case.opponent,
        "ours_ms": ours,
        "theirs_ms": theirs,
        "ratio": None if theirs is None else theirs / ours,
        "floor": case.floor,
    }
    if case.flops:
        row["gflops"] = case.flops / ours / 1e6
    if case.bytes:
        row["gbytes"] = case.bytes / ours / 1e6
    return row


def machine() -> dict[str, Any]:
    """Processor, versions and commit that a figure belongs to."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": ops.instruction_set(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "commit": record.commit(),
        "time": record.now(),
    }


def assert_close(name: str, ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Relative Frobenius error against the exact result; a NaN fails."""
    error = ((ours.double() - exact.double()).norm() / exact.double().norm()).item()
    if not error <= tolerance:
        raise AssertionError(f"{name}: relative error {error:.2e}, at most {tolerance:.0e} is taken")
