"""python -m nanochat_native.evaluate: measure bits per byte and CORE of one checkpoint, or of two side by side."""

import sys
import traceback
from collections.abc import Sequence

from nanochat_native.evaluation.session import Options, run
from nanochat_native.runtime import distributed
from nanochat_native.runtime.command import MISTAKES, exit_code, parse_options
from nanochat_native.runtime.distributed import World


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, by default those of sys.argv; return the exit code."""

    def command(world: World) -> int:
        return run(world.run_collectively(lambda: parse_options(Options, "evaluate", args), *MISTAKES), world)

    try:
        with distributed.init_process_group() as world:
            return exit_code(lambda: command(world))
    except distributed.RankError as error:
        if distributed.environment_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except distributed.LostRankError as error:
        print(f"rank {distributed.environment_rank()}: {error}", file=sys.stderr)
        return distributed.exit_rank(1)
    except Exception:
        if not distributed.launched_by_torchrun():
            raise
        traceback.print_exc()
        return distributed.exit_rank(1)


if __name__ == "__main__":
    sys.exit(main())
