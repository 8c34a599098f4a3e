"""Timing side by side, and the machine's limits."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat_native import ops
from nanochat_native.bench import record
from nanochat_native.runtime.timing import milliseconds, side_by_side


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
