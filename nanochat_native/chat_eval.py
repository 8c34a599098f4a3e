"""python -m nanochat_native.chat_eval: measure a chat model in the tasks of nanochat, and its ChatCORE."""

import sys
from collections.abc import Sequence

from nanochat_native.evaluation.chat_evaluation import Options, run
from nanochat_native.runtime.command import MISTAKES, exit_code, parse_options, run_on_ranks
from nanochat_native.runtime.distributed import World


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""

    def command(world: World) -> int:
        return run(world.run_collectively(lambda: parse_options(Options, "chat_eval", args), *MISTAKES), world)

    return run_on_ranks(lambda world: exit_code(lambda: command(world)))


if __name__ == "__main__":
    sys.exit(main())
