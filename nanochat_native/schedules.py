"""python -m nanochat_native.schedules: show the learning rate, the momentum and the weight decay over a run."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_native.lab.command_flags import parse_flags
from nanochat_native.optim.schedule import SHAPES, lr_at, momentum_at, weight_decay_at
from nanochat_native.runs import results
from nanochat_native.runs.config import TrainConfig
from nanochat_native.runtime.command import exit_code
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.errors import ConfigError


@dataclass
class Options:
    """Show the learning rate over a run for every --schedule, and Muon's momentum and the factor of its weight decay.

    The schedules follow train's flags: --recipe, --num-iterations (default here: 1000), --warmup-steps, --warmup-ratio,
    --warmdown-ratio, --final-lr-frac, --momentum-start, --momentum-end, --momentum-warmup-steps, --momentum-final,
    --decay-schedule. The momentum is that of --schedule.

    The guide explains it: docs/guide/10-rates-schedules-batches.md.
    """

    plot: bool = False
    """Write result.json and a picture to --out."""
    out: Path | None = None
    """Folder for the result; default: lab/schedules, or the next free name."""


# The final multiplier of shapes that cannot end at 0. It replaces a --final-lr-frac of 0.
SMALLEST_FINAL = 0.1


def run(args: Sequence[str]) -> None:
    """Print eleven points of every schedule. With --plot, also draw the schedules."""
    if any(argument.startswith("--target") for argument in args):
        raise ConfigError(
            "schedules builds no model, so it cannot derive the steps from a target; use --num-iterations"
        )
    options, config, _ = parse_flags(Options, "schedules", args, base=lambda own: TrainConfig(num_iterations=1000))
    total = config.num_iterations
    multipliers: dict[str, list[float]] = {}
    for shape in SHAPES:
        end = config.final_lr_frac or (SMALLEST_FINAL if shape in ("exponential", "step") else 0.0)
        settings: dict[str, Any] = {"schedule": shape, "final_lr_frac": end}
        shaped = dataclasses.replace(config, **settings)
        multipliers[shape] = [lr_at(step, shaped) for step in range(total)]
    momentum = [momentum_at(step, config) for step in range(total)]
    decay = [weight_decay_at(step, config) for step in range(total)]
    columns = {**multipliers, "momentum": momentum, "decay": decay}
    print(f"{'step':>8}" + "".join(f"{name:>13}" for name in columns))
    for step in sorted({round(i * (total - 1) / 10) for i in range(11)}):
        print(f"{step:>8}" + "".join(f"{values[step]:>13.4f}" for values in columns.values()))
    if options.plot:
        curves: dict[str, Any] = {"multipliers": multipliers, "momentum": momentum, "decay": decay}
        record = results.result("schedules", options, config, finished=True, **curves)
        results.finish(results.open_folder(options.out, "schedules"), record, Console())


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return exit_code(lambda: run(sys.argv[1:] if args is None else args))


if __name__ == "__main__":
    sys.exit(main())
