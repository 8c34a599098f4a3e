"""python -m nanochat_native.finetune: teach a trained model to chat. --help lists the flags, launch.py the exit codes.

Supervised fine-tuning: training goes on, by the same loop, on conversations (conversations.py), of which only what the
assistant says is learnt. A conversation is a row of a batch, cut at --max-seq-len; rows are not packed, so that none
sees another.
"""

import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.runs.config import FinetuneConfig
from nanochat_native.runs.run_folder import configure
from nanochat_native.training.finetuning import FinetuneTrainer, complete
from nanochat_native.training.launch import launch


def main(args: Sequence[str] | None = None) -> int:
    """Fine-tune as `args` say, sys.argv's by default. Returns the exit code."""
    given = sys.argv[1:] if args is None else args
    return launch(given, lambda args: configure(args, FinetuneConfig, complete), FinetuneTrainer)


if __name__ == "__main__":
    sys.exit(main())
