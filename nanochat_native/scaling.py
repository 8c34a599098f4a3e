"""python -m nanochat_native.scaling: a miniseries of models by one recipe, and the best size for a budget of FLOPs.

Each training is a run of `train` in OUT/runs. A finished run is not made again: the same command resumes an experiment
that was stopped or killed.
"""

import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.lab.command_flags import parse_flags
from nanochat_native.lab.scaling import plan, study
from nanochat_native.runs.config import parse
from nanochat_native.runtime import command
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.isolation import ReportFailures


def run(args: Sequence[str], failures: ReportFailures) -> int:
    """Make the experiment, or what remains of it. Return 0, 128 plus the number of the signal that stopped it,
    or 1 if the last step of a run was not saved."""
    options, config, rest = parse_flags(plan.Options, "scaling", args, base=lambda own: plan.defaults(args))
    console = Console(failures=failures)
    code = study.run(options, config, parse(rest, plan.defaults(args)), console)
    if code:
        console.say("resume   give the same command again")
    return code


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return command.run_reporting(run, args)


if __name__ == "__main__":
    sys.exit(main())
