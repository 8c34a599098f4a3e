"""python -m nanochat_native.train: train a GPT.

--help lists the flags. training/launch.py lists the exit codes.
"""

import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.runs.run_folder import resolve_config
from nanochat_native.training.launch import launch
from nanochat_native.training.trainer import Trainer


def main(args: Sequence[str] | None = None) -> int:
    """Train with the flags `args`, which default to those of sys.argv. Return the exit code."""
    return launch(sys.argv[1:] if args is None else args, resolve_config, Trainer)


if __name__ == "__main__":
    sys.exit(main())
