"""python -m nanochat_native.compare: compare optimizers, or options of Muon, on one model and the same data.

Each case trains at its own best learning rate, with several seeds. Its runs use the training loop of `train`.
With --fork all runs continue from one checkpoint of another run. result.json keeps the finished runs: the same command
resumes a comparison that was stopped or killed.
"""

import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.lab import comparison
from nanochat_native.lab.command_flags import parse_flags
from nanochat_native.runs.config import parse
from nanochat_native.runtime import command
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.isolation import ReportFailures


def run(args: Sequence[str], failures: ReportFailures) -> int:
    """Run the comparison, or what remains of it. Return 0, or 128 plus the number of the signal that stopped it."""
    options, config, rest = parse_flags(
        comparison.Options, "compare", args, base=lambda own: comparison.defaults(own, args)
    )
    given = parse(rest, comparison.defaults(options, args))
    console = Console(failures=failures)
    code = comparison.run(options, config, given, console)
    if code:
        console.say("resume   give the same command again")
    return code


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return command.run_reporting(run, args)


if __name__ == "__main__":
    sys.exit(main())
