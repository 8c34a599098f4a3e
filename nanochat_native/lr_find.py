"""python -m nanochat_native.lr_find: the learning-rate range test (Smith, arXiv:1506.01186).

One step at each rate, the rates rising geometrically, until the loss diverges. Where the loss falls most steeply and
where it turns bound the rates that are worth a run.
"""

import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.lab.range_test import run
from nanochat_native.runtime import command


def main(args: Sequence[str] | None = None) -> int:
    """Tests as `args` say, sys.argv's by default. Returns the exit code: 1 where no rate was found."""
    return command.run_reporting(run, args)


if __name__ == "__main__":
    sys.exit(main())
