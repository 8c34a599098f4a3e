"""Starts a program that trains: joins the ranks, turns what a user can mend into one line, and returns the exit code.

Exit codes: 0 done; 1 failed or diverged; 2 a wrong flag, value or file; 3 done and saved, but a report of the run (the
console, a log, a sample, an evaluation, a plot) failed; 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import json
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

import nanochat_native
from nanochat_native import ops
from nanochat_native.runs.checkpoint import CheckpointError
from nanochat_native.runs.config import TrainConfig, to_json
from nanochat_native.runs.run_folder import check_free
from nanochat_native.runtime import distributed
from nanochat_native.runtime.command import is_out_of_memory
from nanochat_native.runtime.console import Console, SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import UNSET, flag
from nanochat_native.runtime.isolation import ReportFailures, describe, guarded
from nanochat_native.training.report import announce
from nanochat_native.training.trainer import Trainer

Configure = Callable[[Sequence[str]], tuple[TrainConfig, list[str]]]
Make = Callable[[TrainConfig, Console, World], Trainer]


def launch(args: Sequence[str], configure: Configure, make: Make) -> int:
    """Trains as `args` say; a user's mistake is one line on stderr. Returns the exit code.

    configure: flags to config, and notes on what it changes in a resumed run. make: the run itself.
    Under torchrun this is one of many ranks: the first alone prints and writes, and what goes wrong on any of them ends
    all of them with one message.
    """
    return guarded(lambda failures: _launch(args, configure, make, failures))


def _launch(args: Sequence[str], configure: Configure, make: Make, failures: ReportFailures) -> int:
    try:
        with distributed.init_process_group() as world:
            return _run(world, args, configure, make, failures)
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
        lines = traceback.format_exc().splitlines()
        print("\n".join(f"rank {distributed.environment_rank()}: {line}" for line in lines), file=sys.stderr)
        return distributed.exit_rank(1)


def _run(world: World, args: Sequence[str], configure: Configure, make: Make, failures: ReportFailures) -> int:
    trainer: Trainer | None = None
    config: TrainConfig | None = None
    try:
        config, notes = world.run_collectively(lambda: configure(args), ConfigError)
        if config.print_config:
            if world.is_rank0:
                print(json.dumps(to_json(config), indent=1))
            return 0
        if world.size > 1:
            versions = {"version": nanochat_native.__version__, "torch": torch.__version__}
            world.require_same(versions | {flag(name): value for name, value in to_json(config).items()})
        # What fails on the other ranks the first one knows too: it alone tells, and its exit code does.
        console = Console(as_json=config.json, failures=failures) if world.is_rank0 else SilentConsole()

        def begin() -> Trainer:
            ops.check_environment()
            check_free(config)
            return make(config, console, world)

        try:  # what is raised on one rank alone, others may wait for: they are told
            trainer = world.run_collectively(begin, ValueError, ImportError, OSError)
        except (ValueError, ImportError, OSError) as error:
            raise ConfigError(str(error)) from error
        with console.isolated("announcement"):
            announce(trainer, notes)
        return 0 if config.dry_run else trainer.train()
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
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
