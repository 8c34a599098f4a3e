"""python -m nanochat_native.bench: correctness first, then time side by side with torch, a table, and JSON."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from nanochat_native.bench import generation, measure, operators, ranks, record, step
from nanochat_native.runtime.command import run_command


@dataclass
class Options:
    """Times the operators and a training step against the torch calls that they replace, and generation against
    transformers, on the CPU.

    A case whose results are wrong is not timed, and the exit status is 1.
    """

    only: str = ""
    """Run the cases whose group and name hold this text, e.g. "attention" or "V 8192". All by default."""
    seconds: float = 3.0
    """Least time that a case is repeated for, seconds."""
    repeats: int = 7
    """Least number of turns of a case; the median is reported."""
    threads: int = 0
    """Threads; 0 takes torch's own choice."""
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """File for the results with machine, versions and commit."""


def main(args: Sequence[str] | None = None) -> int:
    """Races as `args` say, sys.argv's by default. Returns the exit code."""
    return run_command(Options, "bench", args, run)


def run(options: Options) -> int:
    """Prints the table, and writes it. Returns the exit code."""
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
            print(*record.table_parts(rows[-1]), flush=True)

    for make in operators.cases():
        case = make()
        if options.only in f"{case.group} {case.name}":
            report(f"{case.group} {case.name}", partial(measure.run, case, limits, seconds=seconds, repeats=repeats))
    for vocabulary, opponent in step.FLOORS:
        name = f"training step d{step.DEPTH} T {step.T} B {step.B} V {vocabulary}"
        if options.only in name:
            report(name, partial(step.run, vocabulary, opponent, seconds=seconds, repeats=repeats))
    for depth, batch in generation.FLOORS:
        name = f"generation {generation.name_of(depth, batch)}"
        if options.only in name:
            report(name, partial(generation.run, depth, batch, seconds=seconds, repeats=repeats))
    on_ranks: list[dict[str, Any]] = []
    if options.only in "training step on ranks":
        for size in (1, 2):
            on_ranks.append(ranks.run(size, repeats=repeats))
            print(ranks.describe(on_ranks[-1], on_ranks[0]), flush=True)
    if not rows and not wrong and not skipped and not on_ranks:
        print(f"no case holds {options.only!r}", file=sys.stderr)
        return 2
    if options.json:
        result = {"machine": machine, "limits": vars(limits), "rows": rows, "skipped": skipped, "ranks": on_ranks}
        record.save(options.json, result)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
