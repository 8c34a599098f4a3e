"""python -m nanochat_native.batch_size: measure the gradient noise scale, to choose a batch size.

The method is that of "An Empirical Model of Large-Batch Training" (McCandlish, Kaplan, Amodei, 2018,
arXiv:1812.06162).
"""

import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.lab import noise_scale
from nanochat_native.lab.command_flags import parse_flags
from nanochat_native.runtime import command
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.isolation import ReportFailures


def run(args: Sequence[str], failures: ReportFailures) -> int:
    """Measure the noise scale and print what it means for the batch size. Return the exit code."""
    options, config, _ = parse_flags(noise_scale.Options, "batch_size", args)
    diverged, signal = noise_scale.run(options, config, Console(failures=failures))
    return 128 + signal if signal else int(diverged)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code: 1 if training diverged."""
    return command.run_reporting(run, args)


if __name__ == "__main__":
    sys.exit(main())
