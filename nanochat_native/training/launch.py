"""Runs a command that trains: joins the ranks, makes the run, prints errors in one line and returns the exit code.

Exit codes: 0 done; 1 failed or diverged; 2 a wrong flag, value or file; 3 done and saved, but a report of the run (the
console, a log, a sample, an evaluation, a plot) failed; 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import json
import sys
from collections.abc import Callable, Sequence

import torch

import nanochat_native
from nanochat_native import ops
from nanochat_native.data import DamagedFileError
from nanochat_native.runs.checkpoint import CheckpointError
from nanochat_native.runs.config import TrainConfig, to_json
from nanochat_native.runs.loggers import leave
from nanochat_native.runs.run_folder import check_free
from nanochat_native.runtime import distributed
from nanochat_native.runtime.command import is_out_of_memory, run_on_ranks
from nanochat_native.runtime.console import Console, SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import UNSET, flag
from nanochat_native.runtime.isolation import ReportFailures, describe, guarded
from nanochat_native.training.report import announce
from nanochat_native.training.trainer import Trainer

Resolve = Callable[[Sequence[str]], tuple[TrainConfig, list[str]]]
Make = Callable[[TrainConfig, Console, World], Trainer]


def launch(args: Sequence[str], resolve: Resolve, make: Make) -> int:
    """Train as `args` say. Return the exit code; an error that the user can fix is one line on stderr.

    Under torchrun this is one of many ranks: rank 0 alone prints and writes, and an error of any rank ends all of them
    with one message.

    Args:
        resolve: returns the config of a command line, and notes on what it changes in a resumed run.
        make: returns the run.
    """
    return leave(guarded(lambda failures: run_on_ranks(lambda world: _run(world, args, resolve, make, failures))))


def _run(world: World, args: Sequence[str], resolve: Resolve, make: Make, failures: ReportFailures) -> int:
    trainer: Trainer | None = None
    config: TrainConfig | None = None
    try:
        config, notes = world.run_collectively(lambda: resolve(args), ConfigError)
        if config.print_config:
            if world.is_rank0:
                print(json.dumps(to_json(config), indent=1))
            return 0
        if world.size > 1:
            versions = {"version": nanochat_native.__version__, "torch": torch.__version__}
            world.require_same(versions | {flag(name): value for name, value in to_json(config).items()})
        # Rank 0 takes part in every report of the other ranks, so its own failures are enough for the exit code.
        console = Console(as_json=config.json, failures=failures) if world.is_rank0 else SilentConsole()

        def begin() -> Trainer:
            ops.check_environment()
            check_free(config)
            return make(config, console, world)

        try:
            trainer = world.run_collectively(begin, ValueError, ImportError, OSError)
        except (ValueError, ImportError, OSError) as error:
            raise ConfigError(str(error)) from error
        with console.isolated("announcement"):
            announce(trainer.setup, notes, console)
        return 0 if config.dry_run else trainer.train()
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DamagedFileError as error:  # of text that is tokenized while training runs, perhaps on one rank alone
        print(f"error: {error}", file=sys.stderr)
        return distributed.exit_rank(2)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        used = trainer.config if trainer else config
        rows = used.device_batch_size if used else UNSET
        advice = f"--device-batch-size {rows // 2}" if rows > 1 else "a shorter --max-seq-len or --grad-checkpoint"
        size = "" if rows == UNSET else f" with --device-batch-size {rows}"
        print(f"error: out of memory{size}; try {advice} ({describe(error)})", file=sys.stderr)
        return distributed.exit_rank(1)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return distributed.exit_rank(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return distributed.exit_rank(130)
