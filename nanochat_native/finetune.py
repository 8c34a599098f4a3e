"""python -m nanochat_native.finetune: fine-tune a model to chat.

--help lists the flags. training/launch.py lists the exit codes.

Supervised fine-tuning continues training with the same loop, on conversations (data/conversations.py). The loss counts
only the messages of the assistant. A row of a batch is one conversation, or with --packing best-fit several. No
conversation attends to another.
"""

import sys
from collections.abc import Sequence

import nanochat_native.runtime.openmp  # noqa: F401  before torch
from nanochat_native.runs.config import FinetuneConfig
from nanochat_native.runs.run_folder import resolve_config
from nanochat_native.training.finetuning import make_trainer, resolve_finetuning
from nanochat_native.training.launch import launch


def main(args: Sequence[str] | None = None) -> int:
    """Fine-tune with the flags `args`, which default to those of sys.argv. Return the exit code."""
    given = sys.argv[1:] if args is None else args
    return launch(given, lambda args: resolve_config(args, FinetuneConfig, resolve_finetuning), make_trainer)


if __name__ == "__main__":
    sys.exit(main())
