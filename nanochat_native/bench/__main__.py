"""python -m nanochat_native.bench: check each case, time it beside torch, and print a table or write JSON."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from nanochat_native.bench import generation, measure, operators, quantized_generation, ranks, results_io, step
from nanochat_native.runtime.command import run_command


@dataclass
class Options:
    """Time the operators and a training step against the torch calls that they replace, and generation against
    transformers, on the CPU.

    A case with wrong results is not timed, and the exit status is then 1.

    The guide explains it: docs/guide/12-speed.md.
    """

    only: str = ""
    """Run only the cases whose group and name contain this text, e.g. "attention" or "V 8192"."""
    seconds: float = 3.0
    """Minimum time for which a case is repeated, seconds."""
    repeats: int = 7
    """Minimum number of repetitions of a case; the median is reported."""
    threads: int = 0
    """Number of threads; 0 uses torch's default."""
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File to which the results are written, with the machine, the versions and the commit."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmarks that `args`, or sys.argv, asks for. Returns the exit code."""
    return run_command(Options, "bench", args, run)


def run(options: Options) -> int:
    """Print the table, and write the JSON file if one is given. Returns the exit code."""
    if options.threads:
        torch.set_num_threads(options.threads)
    machine, limits = measure.machine(), measure.measure_limits()
    print(" | ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"limits  torch.mm float32 {limits.sgemm:.0f} GFLOP/s, copy {limits.copy:.1f} GB/s")
    seconds, repeats = options.seconds, options.repeats
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    wrong = 0

    def report(name: str, make_row: Callable[[], dict[str, Any]]) -> None:
        nonlocal wrong
        try:
            rows.append(make_row())
        except AssertionError as error:
            wrong += 1
            print(f"{name}: WRONG, not timed: {error}", flush=True)
        except measure.UnavailableError as error:
            skipped.append({"title": name, "why": str(error)})
            print(f"{name}: left out: {error}", flush=True)
        else:
            print(*results_io.table_parts(rows[-1]), flush=True)

    for make in operators.cases():
        case = make()
        if options.only in f"{case.group} {case.name}":
            report(f"{case.group} {case.name}", partial(measure.run, case, limits, seconds=seconds, repeats=repeats))
    for recipe, vocabulary, baseline, dtype in step.MIN_SPEEDUPS:
        name = f"training step {step.name_of(recipe, vocabulary, dtype)}"
        if options.only in name:
            report(name, partial(step.run, recipe, vocabulary, baseline, dtype, seconds=seconds, repeats=repeats))
    for depth, batch in generation.MIN_SPEEDUPS:
        name = f"generation {generation.name_of(depth, batch)}"
        if options.only in name:
            report(name, partial(generation.run, depth, batch, seconds=seconds, repeats=repeats))
    for small in quantized_generation.MIN_SPEEDUPS:
        name = f"generation {quantized_generation.name_of(*small)}"
        if options.only in name:
            report(name, partial(quantized_generation.run, *small, seconds=seconds, repeats=repeats))
    on_ranks: list[dict[str, Any]] = []
    if options.only in "training step on ranks":
        for size in (1, 2):
            on_ranks.append(ranks.run(size, repeats=repeats))
            print(ranks.describe(on_ranks[-1], on_ranks[0]), flush=True)
    if not rows and not wrong and not skipped and not on_ranks:
        print(f"no case contains {options.only!r}", file=sys.stderr)
        return 2
    if options.json:
        result = {"machine": machine, "limits": vars(limits), "rows": rows, "skipped": skipped, "ranks": on_ranks}
        results_io.save(options.json, result)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
