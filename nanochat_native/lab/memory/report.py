"""Print tables of the predicted and the measured memory of a training step."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from nanochat_native.lab.memory import table
from nanochat_native.lab.memory.allocations import PHASES
from nanochat_native.lab.memory.measurement import Step, measure
from nanochat_native.lab.memory.options import Options, sized
from nanochat_native.lab.memory.prediction import (
    activation_bytes,
    kernel_scratch,
    largest_batch,
    library_scratch,
    peak,
    snapshots,
)
from nanochat_native.runs import results
from nanochat_native.runtime import hardware
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.hardware import pick_device
from nanochat_native.runtime.timing import side_by_side
from nanochat_native.training import sizing


def _mib(sizes: Sequence[float]) -> str:
    return "".join(f"{size / 2**20:>16,.1f}" for size in sizes)


def show_parts(options: Options) -> dict[str, Any]:
    """Print the parts at the peak of each phase, and with --measure the measured peaks. Returns the figures."""
    found = snapshots(options)
    highest = [max((m for m in found if m.phase == phase), key=lambda m: m.bytes) for phase in PHASES]
    parts = {name: [snapshot.parts[name] for snapshot in highest] for name in highest[0].parts}
    totals = [snapshot.bytes for snapshot in highest]
    ranks = f", on each of {options.nproc} ranks" if options.nproc > 1 else ""
    print(f"{'MiB':<28}" + "".join(f"{phase:>16}" for phase in PHASES))
    for name, sizes in {**parts, "in all" + ranks: totals}.items():
        if any(sizes):
            print(f"{name:<28}" + _mib(sizes))
    record: dict[str, Any] = {"phases": PHASES, "parts": parts, "predicted": totals}
    summary = f"peak: {_mib([max(totals)]).strip()} MiB predicted, in the {PHASES[totals.index(max(totals))]}"
    if options.measure:
        measured = measure(options)
        record["measured"] = list(measured.phases.values())
        print(f"{'measured':<28}" + _mib(record["measured"]))
        off = [100 * (total / real - 1) for total, real in zip(totals, record["measured"], strict=True)]
        print(f"{'the prediction is off by':<28}" + "".join(f"{percent:>+15.1f}%" for percent in off))
        off_peak = 100 * (max(totals) / measured.peak - 1)
        summary += f"; {_mib([measured.peak]).strip()} MiB measured: the prediction is off by {off_peak:+.1f}%"
    print(summary)
    if options.device == "cpu":
        record["kernel_scratch"] = kernel_scratch(options)
        record["library_scratch"] = library_scratch(options)
        if options.dtype == "bfloat16":
            print(f"additional, in products of torch's library: {_mib([library_scratch(options)]).strip()} MiB at most")
        print(f"additional, outside the allocator: about {_mib([kernel_scratch(options)]).strip()} MiB of the kernels")
    return record


def show_largest(options: Options) -> dict[str, Any]:
    """Print the largest batches by prediction. Returns the figures."""
    assert options.gpu_memory is not None
    available = int(options.gpu_memory * 2**30) - sizing.PROCESS_BYTES
    columns = {"1 micro-batch per step": 1, "several": 2}
    context = f"{sizing.PROCESS_BYTES >> 20} MiB of which are for the CUDA context"
    print(f"largest --device-batch-size that fits {options.gpu_memory:g} GiB, {context}")
    print(f"{'':<22}" + "".join(f"{title:>26}" for title in columns))
    rows: list[dict[str, Any]] = []
    for again, name in ((False, "activations kept"), (True, "with --grad-checkpoint")):
        cells = ""
        for micro_batches in columns.values():
            own = dataclasses.replace(
                options, grad_checkpoint=again, micro_batches=micro_batches, device_batch_size=1, gpu_memory=None
            )
            size, one = largest_batch(own, available), peak(own)
            rows.append({"grad_checkpoint": again, "micro_batches": micro_batches, "device_batch_size": size})
            short = f"none: 1 takes {(one + sizing.PROCESS_BYTES) / 2**30:.1f} GiB"
            cells += f"{size or short:>26}"
        print(f"{name:<22}{cells}")
    if not any(row["device_batch_size"] for row in rows):
        print("not even one sequence fits")
    return {"rows": rows}


def show_checkpointing(options: Options) -> dict[str, Any]:
    """Print the memory and the time of steps with and without gradient checkpointing. Returns the figures."""
    names = ("kept", "recomputed")
    variants = [dataclasses.replace(options, grad_checkpoint=again) for again in (False, True)]
    measured = [measure(variant) for variant in variants]
    times = side_by_side([Step(variant) for variant in variants], seconds=2, repeats=5)
    columns = {
        "peak_predicted": [peak(variant) for variant in variants],
        "peak_measured": [found.peak for found in measured],
        "activations_predicted": [activation_bytes(variant) for variant in variants],
        "activations_measured": [found.activations for found in measured],
    }
    print(f"{'':<16}{'peak, MiB':>32}{'activations, MiB':>32}{'ms per step':>16}")
    print(f"{'':<16}" + f"{'predicted':>16}{'measured':>16}" * 2)
    for row, name in enumerate(names):
        print(f"{name:<16}" + _mib([column[row] for column in columns.values()]) + f"{times[row]:>16,.1f}")
    less = "".join(f"{f'{kept / recomputed:.1f}x less':>16}" for kept, recomputed in columns.values())
    print(f"{'ratio':<16}{less}{f'{times[1] / times[0]:.2f}x slower':>16}")
    print(f"{'original guide':<16}{'':>32}{'10x less':>32}{'2x slower':>16}")
    return {"rows": names, **columns, "ms": times}


def run(given: Options) -> None:
    """Print the tables that the options ask for, and with --out write the result."""
    options = sized(given)
    if given.table is not None:
        content = table.write(given, given.table)
        print(f"{len(content['rows'])} rows of {len(content['columns'])} columns in {given.table}")
        return
    where = {"cpu": "on a CPU", "cuda": "on a GPU"}[options.device]
    if options.runs_steps:
        where = hardware.describe(pick_device(options.device))
    folder = None if options.out is None else results.open_folder(options.out, "memory")
    batch = f"{options.max_seq_len} tokens per sequence"
    if options.gpu_memory is None:
        batch = f"{options.device_batch_size} x {options.max_seq_len} tokens"
    shape = f"depth {options.depth}, {batch}, vocabulary {options.vocab_size}"
    print(f"{shape} | {options.dtype} | {options.optimizer} | {where}")
    show = show_checkpointing if options.checkpointing else show_largest if options.gpu_memory else show_parts
    record = show(options)
    if folder is not None:
        device = options.device if options.runs_steps else None
        results.finish(
            folder, results.result("memory", options, None, finished=True, device=device, **record), Console()
        )
