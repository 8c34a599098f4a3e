"""Benchmark cases, timed side by side with a baseline, and the limits of the machine."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_native import ops
from nanochat_native.bench import results_io
from nanochat_native.runtime import hardware
from nanochat_native.runtime.timing import milliseconds, side_by_side


class UnavailableError(RuntimeError):
    """A case cannot run here because its baseline does not work."""


@dataclass(frozen=True)
class Case:
    """One comparison with a baseline. `check` raises AssertionError if the results differ; such a case is not timed."""

    group: str
    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    baseline: str
    check: Callable[[], None]
    min_speedup: float  # promised ratio theirs / ours: on two CPU cores, or on one H100 or H200
    flops: float = 0.0  # of our call, by the count of the algorithm
    bytes: float = 0.0  # that our call must move
    saves_memory: bool = False  # measure the peak memory of both
    saves_launches: bool = False  # count the launches of both
    note: str = ""  # for the reader of the figure


@dataclass(frozen=True)
class Limits:
    """Measured limits: GFLOP/s of a large float32 torch.mm, GB/s read and written by a copy."""

    sgemm: float
    copy: float


def measure_limits() -> Limits:
    size, count = 2048, 32 * 1024 * 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    product = min(milliseconds(lambda: torch.mm(a, b)) for _ in range(7))
    source, target = torch.ones(count), torch.ones(count)
    copy = min(milliseconds(lambda: target.copy_(source)) for _ in range(7))
    return Limits(sgemm=2 * size**3 / product / 1e6, copy=8 * count / copy / 1e6)


def run(case: Case, limits: Limits, *, seconds: float, repeats: int) -> dict[str, Any]:
    """Check and time a case, and return its row."""
    case.check()
    ours, theirs = side_by_side([case.ours, case.theirs], seconds=seconds, repeats=repeats)
    row = figures(case, ours, theirs)
    if case.flops:
        row["share_of_sgemm"] = row["gflops"] / limits.sgemm
    if case.bytes:
        row["share_of_copy"] = row["gbytes"] / limits.copy
    return row


def figures(case: Case, ours: float, theirs: float | None) -> dict[str, Any]:
    """Return the row of a case with these milliseconds; theirs is None if the baseline cannot run."""
    row: dict[str, Any] = {
        "group": case.group,
        "case": case.name,
        "opponent": case.baseline,
        "ours_ms": ours,
        "theirs_ms": theirs,
        "ratio": None if theirs is None else theirs / ours,
        "floor": case.min_speedup,
    }
    if case.flops:
        row["gflops"] = case.flops / ours / 1e6
    if case.bytes:
        row["gbytes"] = case.bytes / ours / 1e6
    return row


def machine() -> dict[str, Any]:
    """Return the processor, the versions and the commit to which a figure belongs."""
    return {
        "cpu": hardware.cpu_name() or platform.processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": ops.instruction_set(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "commit": results_io.commit(),
        "time": results_io.now(),
    }


def assert_close(name: str, ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Raise AssertionError if the relative Frobenius error exceeds the tolerance, or is NaN."""
    error = ((ours.double() - exact.double()).norm() / exact.double().norm()).item()
    if not error <= tolerance:
        raise AssertionError(f"{name}: relative error must be at most {tolerance:.0e}, got {error:.2e}")
