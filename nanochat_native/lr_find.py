"""python -m nanochat_native.lr_find: find a learning rate with a range test (Smith, arXiv:1506.01186).

The test takes one step at each of a series of increasing rates until the loss diverges. The rate at which the loss
falls most steeply and the rate at which it starts to rise bound the useful range.
"""

import shlex
import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.lab import range_test
from nanochat_native.lab.command_flags import parse_flags
from nanochat_native.runtime import command
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.flags import flag
from nanochat_native.runtime.isolation import ReportFailures


def run(args: Sequence[str], failures: ReportFailures) -> int:
    """Run the test and print the command that trains at the suggested rates. Return the exit code."""
    options, config, train_args = parse_flags(range_test.Options, "lr_find", args)
    console = Console(failures=failures)
    rates, signal = range_test.run(options, config, console)
    if rates:
        suggested = [word for name, rate in rates.items() for word in (flag(name), f"{rate:g}")]
        console.say(f"train    python -m nanochat_native.train {shlex.join([*train_args, *suggested])}")
    return 128 + signal if signal else 0 if rates else 1


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code: 1 if no rate was found."""
    return command.run_reporting(run, args)


if __name__ == "__main__":
    sys.exit(main())
