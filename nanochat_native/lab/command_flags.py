"""The flags of an experiment: its own, and those of train behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import tyro

from nanochat_native.runs.config import TrainConfig, parse, resolve_device
from nanochat_native.runtime import distributed
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import check_values, flag, one_line_errors

RUN_FLAGS = ("run", "out_dir", "resume", "overwrite", "dry_run", "print_config", "json")


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
    return own, resolve_device(config), rest


def refuse_run_flags(config: TrainConfig, base: TrainConfig, command: str) -> None:
    """Raises ConfigError for a flag about a run's folder that `base` has not."""
    for name in RUN_FLAGS:
        if getattr(config, name) != getattr(base, name):
            raise ConfigError(f"{flag(name)} is train's alone; {command} takes --out for what it leaves")
