"""python -m nanochat_native.evaluate: bits per byte and the CORE score of one checkpoint, or of two side by side."""

import sys
from collections.abc import Sequence

from nanochat_native.evaluation.session import Options, run
from nanochat_native.runtime.command import MISTAKES, exit_code, parse_options, run_on_ranks
from nanochat_native.runtime.distributed import World


def main(args: Sequence[str] | None = None) -> int:
    """Evaluate as `args`, by default sys.argv's, say. Return the exit code."""

    def command(world: World) -> int:
        return run(world.run_collectively(lambda: parse_options(Options, "evaluate", args), *MISTAKES), world)

    return run_on_ranks(lambda world: exit_code(lambda: command(world)))


if __name__ == "__main__":
    sys.exit(main())
