"""python -m nanochat_native.speedrun: make a chat model in one command, with a report card.

--help lists the flags. Exit codes: 0 done; 2 a wrong flag, recipe or folder; 3 done, but a report failed; 130 stopped
by Ctrl-C, 143 by SIGTERM; otherwise that of the stage that failed.
"""

import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.pipeline.session import Options, run
from nanochat_native.runtime.command import parse_options, run_reporting


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return run_reporting(lambda given, failures: run(parse_options(Options, "speedrun", given), failures), args)


if __name__ == "__main__":
    sys.exit(main())
