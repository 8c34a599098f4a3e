"""Timing on a GPU, and for tests on a CPU: clocks, ceilings, peak memory, launches, and the row of a case."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_native.bench import measure, results_io
from nanochat_native.bench.measure import Case
from nanochat_native.runtime import timing

Function = Callable[[], Any]


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of the device: GB/s read and written by a copy, GFLOP/s of torch.mm on random bfloat16."""

    copy: float
    bfloat16_product: float


class CudaClock:
    """A clock for one call: the milliseconds that the device works, measured by events.

    Before each call the L2 cache is filled with other data. The device then sleeps until the host has enqueued the
    call, so that gaps between launches are not counted; host_milliseconds measures those.
    """

    CYCLES_A_MS = 2_000_000  # enough for clocks up to 2 GHz
    LONGEST_SLEEP_MS = 50.0

    def __init__(self, device: torch.device, host_ms: float) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.other_data = torch.zeros(l2_bytes, dtype=torch.float32, device=device)  # four times the L2
        self.cycles = int(self.CYCLES_A_MS * min(1.5 * host_ms + 0.2, self.LONGEST_SLEEP_MS))
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, function: Function) -> float:
        self.other_data.sum()  # reads only: nothing must be written back while the call is timed
        torch.cuda._sleep(self.cycles)
        self.start.record()
        function()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


def host_milliseconds(function: Function, repeats: int = 5) -> float:
    """Return the median time in which the host enqueues one call on an idle device."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        times.append(timing.milliseconds(function))
    torch.cuda.synchronize()
    return statistics.median(times)


def peak_bytes(function: Function) -> int:
    """Return the peak CUDA memory that one call adds, in bytes, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def count_launches(function: Function) -> int | None:
    """Return how many kernels, copies and fills one call launches; None if the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    launched = [
        event
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return len(launched) or None


def measure_ceilings(device: torch.device) -> Ceilings:
    """Return the medians of 15 measurements on large random data, on a CPU on small data."""
    on_cuda = device.type == "cuda"
    count, size = (1 << 29, 8192) if on_cuda else (1 << 20, 256)
    source, target = torch.randn(count, device=device), torch.zeros(count, device=device)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    clock = CudaClock(device, host_ms=0.1) if on_cuda else timing.milliseconds
    copy, product = timing.turns(
        [lambda: target.copy_(source), lambda: torch.mm(a, b)], seconds=0, repeats=15, clock=clock
    )
    return Ceilings(
        copy=2 * source.nbytes / statistics.median(copy) / 1e6,
        bfloat16_product=2 * size**3 / statistics.median(product) / 1e6,
    )


def machine(device: torch.device) -> dict[str, Any]:
    """Return measure.machine(), on CUDA with the GPU, its driver, CUDA's version and the current clocks."""
    found = measure.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            **results_io.gpu_facts(),
        }
    return found


def run(case: Case, ceilings: Ceilings, device: torch.device, *, seconds: float, repeats: int) -> dict[str, Any]:
    """Check and time a case, and return its row. A baseline that runs out of memory has no time."""
    case.check()
    functions: list[Function] = [case.ours, case.theirs]
    note = [case.note] if case.note else []
    try:
        case.theirs()
    except torch.OutOfMemoryError:
        note.append("the baseline ran out of memory")
        functions = [case.ours]
    started = time.perf_counter()
    clock: Callable[[Function], float] = timing.milliseconds
    host: list[float] = []
    if device.type == "cuda":
        host = [host_milliseconds(function) for function in functions]
        clock = CudaClock(device, max(host))
    times = timing.turns(functions, seconds=seconds, repeats=repeats, clock=clock)
    medians = [statistics.median(taken) for taken in times]

    row = measure.figures(case, medians[0], medians[1] if len(medians) == 2 else None)
    if case.flops:
        row["share_of_product"] = row["gflops"] / ceilings.bfloat16_product
    if case.bytes:
        row["share_of_copy"] = row["gbytes"] / ceilings.copy
    for index, (who, function) in enumerate(zip(("ours", "theirs"), functions, strict=False)):
        quartiles = statistics.quantiles(times[index])
        row[f"{who}_spread"] = (quartiles[2] - quartiles[0]) / medians[index]
        if device.type == "cuda":
            row[f"{who}_host_ms"] = host[index]
            if case.saves_memory:
                row[f"{who}_peak_bytes"] = peak_bytes(function)
            if case.saves_launches:
                row[f"{who}_launches"] = count_launches(function)
    row |= {"turns": len(times[0]), "seconds": time.perf_counter() - started, "note": "; ".join(note)}
    if device.type == "cuda":
        row["sm_mhz"] = results_io.gpu_facts().get("sm_mhz")
    return row
