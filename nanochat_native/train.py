"""python -m nanochat_native.train: train a GPT. --help lists the flags, launch.py the exit codes."""

import os
import sys
from collections.abc import Sequence

# OpenMP reads this when torch loads it. Threads that spin while they wait take the core from those they wait for when
# another program runs: on two cores, beside such a program, a step took 3.9 s spinning and 0.54 s sleeping; alone 0.32.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from nanochat_native.launch import launch
from nanochat_native.run_folder import configure
from nanochat_native.trainer import Trainer


def main(args: Sequence[str] | None = None) -> int:
    """Train as `args` say, sys.argv's by default. Returns the exit code."""
    return launch(sys.argv[1:] if args is None else args, configure, Trainer)


if __name__ == "__main__":
    sys.exit(main())
