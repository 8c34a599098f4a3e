"""`python -m nanochat_native.schedules`: show the learning rate and the momentum over a run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_native.optim.schedule import SHAPES, lr_at, momentum_at


@dataclass
class Options:
    """Show the learning rate over a run, for every shape of --schedule, and Muon's momentum.

    Takes train's flags that say how: --num-iterations (1000 here, where not given), --warmup-ratio, --warmdown-ratio,
    --final-lr-frac, --momentum-start, --momentum-end, --momentum-warmup-steps.
    """

    plot: bool = False
    """Leave result.json and a picture in --out."""
    out: Path | None = None
    """Folder for them; default: lab/schedules, or the next that is free."""


LEAST_END = 0.1  # of the shapes that cannot end at 0, where --final-lr-frac is 0


def run(args: Sequence[str]) -> None:
    """Prints eleven points of every schedule, and with --plot draws them all."""
    import dataclasses

    from nanochat_native.lab import command_flags
    from nanochat_native.runs import results
    from nanochat_native.runs.config import TrainConfig
    from nanochat_native.runtime.console import Console
    from nanochat_native.runtime.errors import ConfigError

    if any(argument.startswith("--target") for argument in args):
        raise ConfigError("schedules knows no model, whose steps a target could give; it takes --num-iterations")
    options, config, _ = command_flags.configure(Options, "schedules", args, base=TrainConfig(num_iterations=1000))
    total = config.num_iterations
    multipliers: dict[str, list[float]] = {}
    for shape in SHAPES:
        end = config.final_lr_frac or (LEAST_END if shape in ("exponential", "step") else 0.0)
        settings: dict[str, Any] = {"schedule": shape, "final_lr_frac": end}
        shaped = dataclasses.replace(config, **settings)
        multipliers[shape] = [lr_at(step, shaped) for step in range(total)]
    momentum = [momentum_at(step, config) for step in range(total)]
    columns = {**multipliers, "momentum": momentum}
    print(f"{'step':>8}" + "".join(f"{name:>13}" for name in columns))
    for step in sorted({round(i * (total - 1) / 10) for i in range(11)}):
        print(f"{step:>8}" + "".join(f"{values[step]:>13.4f}" for values in columns.values()))
    if options.plot:
        record = results.result("schedules", options, config, finished=True, multipliers=multipliers, momentum=momentum)
        results.finish(results.open_folder(options.out, "schedules"), record, Console())


def main(args: Sequence[str] | None = None) -> int:
    """Shows what `args` say, sys.argv's by default. Returns the exit code."""
    from nanochat_native.runtime.command import exit_code

    return exit_code(lambda: run(sys.argv[1:] if args is None else args))


if __name__ == "__main__":
    sys.exit(main())
