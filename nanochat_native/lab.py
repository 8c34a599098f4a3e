"""What the commands of the laboratory share: train's flags behind their own, and a result that a picture is drawn from.

A command leaves a folder: result.json, with its flags, train's, seed, versions and raw data, and the picture that
`python -m nanochat_native.plot FOLDER` draws from it again.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import tyro

import nanochat_native
from nanochat_native import distributed, hardware, plot
from nanochat_native.config import (
    AUTO,
    RATES,
    ConfigError,
    TrainConfig,
    check_values,
    flag,
    one_line_errors,
    parse,
    to_json,
)
from nanochat_native.isolation import ReportFailures, guarded
from nanochat_native.loading import exit_code
from nanochat_native.metrics import Console
from nanochat_native.optim import describe_routing, routing
from nanochat_native.run_folder import sized

if TYPE_CHECKING:
    from nanochat_native.trainer import Trainer

FORMAT = "nanochat-native result"
OUT = Path("lab")
BAR = 24  # characters
OF_A_RUN = ("run", "out_dir", "resume", "overwrite", "dry_run", "print_config", "json")


class Options(Protocol):
    out: Path | None


T = TypeVar("T", bound=Options)


def configure(
    options: type[T], command: str, args: Sequence[str], base: TrainConfig | None = None
) -> tuple[T, TrainConfig, list[str]]:
    """A command's own flags, the rest as train takes them, sized, and the rest as it was given; `base` holds train's
    defaults.

    Raises ConfigError, under torchrun with several ranks and for train's flags about a run's folder too.
    """
    if distributed.launched_by_torchrun():
        raise ConfigError(f"{command} runs in one process; start it without torchrun")
    with one_line_errors():
        own, rest = tyro.cli(
            options, prog=f"python -m nanochat_native.{command}", args=list(args), return_unknown_args=True
        )
    check_values(own, args)
    config = parse(rest, base)
    refuse_run_flags(config, TrainConfig(), command)
    return own, sized(config), rest


def refuse_run_flags(config: TrainConfig, base: TrainConfig, command: str) -> None:
    """Raises ConfigError for a flag about a run's folder that `base` has not."""
    for name in OF_A_RUN:
        if getattr(config, name) != getattr(base, name):
            raise ConfigError(f"{flag(name)} is train's alone; {command} takes --out for what it leaves")


def describe(trainer: Trainer) -> str:
    """What is trained, and how, in one line."""
    config, model = trainer.config, trainer.model
    size = (
        f"d{model.config.n_layer}, {model.num_params() / 1e6:.1f}M parameters, {describe_routing(trainer.optimizers)}"
    )
    return f"{size}, {config.total_batch_size:,} tokens a step, {config.dtype} on {config.device}, seed {config.seed}"


def rates(config: TrainConfig) -> dict[str, float]:
    """The learning rates by their flags' names, where they are not given those of the optimizer."""
    defaults = dict(zip(RATES, routing.RATES[config.optimizer], strict=True))
    given = {name: getattr(config, name) for name in RATES}
    return {name: defaults[name] if rate == AUTO else rate for name, rate in given.items()}


def open_folder(out: Path | None, command: str) -> Path:
    """An empty folder for a result: `out`, or the first of lab/COMMAND, lab/COMMAND-2, ... that is free.

    Raises ConfigError when `out` holds something.
    """
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} holds something; give another --out PATH")
        folder = out
    else:
        number = 1
        while (folder := OUT / (command if number == 1 else f"{command}-{number}")).exists():
            number += 1
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def result(
    command: str, options: Any, config: TrainConfig | None, *, finished: bool, device: str | None = None, **data: Any
) -> dict[str, Any]:
    """What is written as result.json: how `data` came to be, and `data`. device: where there is no config of train."""
    own = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(options).items()}
    how: dict[str, Any] = {"format": FORMAT, "command": command, "finished": finished, "options": own}
    if config is not None:
        how |= {"config": to_json(config), "seed": config.seed}
        device = config.device
    how["versions"] = {
        "nanochat_native": nanochat_native.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": "none" if device is None else hardware.describe(torch.device(device)),
    }
    return how | data


def main(run: Callable[[Sequence[str], ReportFailures], int], args: Sequence[str] | None) -> int:
    """A command of the laboratory, with `args` or sys.argv's. Returns the exit code, as loading.exit_code; 3 where the
    result is written, but a report failed."""
    given = sys.argv[1:] if args is None else args
    return guarded(lambda failures: exit_code(lambda: run(given, failures)))


def write(folder: Path, record: dict[str, Any]) -> None:
    """result.json, replaced atomically."""
    path = folder / plot.RESULT
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def finish(folder: Path, record: dict[str, Any], console: Console) -> None:
    """Write the result, draw its picture, and say where they are."""
    write(folder, record)
    console.say(f"result   {folder / plot.RESULT}")
    with console.isolated("picture"):
        console.say(f"picture  {plot.draw(folder) or plot.MISSING}")
    console.say(f"again    python -m nanochat_native.plot {shlex.quote(str(folder))}")


def bar(done: int, total: int) -> str:
    """ "[########........] 12/24"."""
    full = BAR * done // max(1, total)
    return f"[{'#' * full}{'.' * (BAR - full)}] {done}/{total}"
