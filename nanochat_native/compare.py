"""python -m nanochat_native.compare: optimizers, or parts of Muon, on one model and the same data, each at its own best
rate, over several seeds.

Every comparison is a set of runs as `train` makes them. What is finished is kept in result.json: a comparison that was
stopped or killed goes on with the rest when the same command is given again.
"""

import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.lab.comparison import run
from nanochat_native.runtime import command


def main(args: Sequence[str] | None = None) -> int:
    """Compares as `args` say, sys.argv's by default. Returns the exit code."""
    return command.run_reporting(run, args)


if __name__ == "__main__":
    sys.exit(main())
