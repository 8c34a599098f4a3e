"""python -m nanochat_native.reinforce: train a fine-tuned model by rewards for its answers.

--help lists the flags. training/launch.py lists the exit codes.

The model draws several answers to each example, and answers that are better than the mean of their example become more
likely (training/reinforcement.py). The examples and the reward are those of an embedded task or of one Python file
(training/reward_tasks.py), which is run.
"""

import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.runs.config import ReinforceConfig, parse
from nanochat_native.runs.run_folder import resolve_config
from nanochat_native.runtime.command import exit_code
from nanochat_native.training.launch import launch
from nanochat_native.training.reinforcement import make_trainer, resolve_reinforcement, write_task_chats


def main(args: Sequence[str] | None = None) -> int:
    """Train with the flags `args`, which default to those of sys.argv. Return the exit code."""
    given = sys.argv[1:] if args is None else args
    if any(argument.split("=")[0].replace("_", "-") == "--write-chats" for argument in given):
        return exit_code(lambda: print(write_task_chats(parse(given, kind=ReinforceConfig))))
    return launch(given, lambda args: resolve_config(args, ReinforceConfig, resolve_reinforcement), make_trainer)


if __name__ == "__main__":
    sys.exit(main())
