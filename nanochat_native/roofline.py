"""python -m nanochat_native.roofline: show what a training step moves, computes and takes on a GPU at best."""

import sys
from collections.abc import Sequence

import tyro

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.lab.roofline.options import Options
from nanochat_native.lab.roofline.report import run
from nanochat_native.runtime.command import run_command


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return run_command(Options, "roofline", args, run, config=(tyro.conf.FlagCreatePairsOff,))


if __name__ == "__main__":
    sys.exit(main())
