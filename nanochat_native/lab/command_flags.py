"""Parse the flags of an experiment: its own, followed by those of train."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import tyro

from nanochat_native.runs.config import TrainConfig, parse, resolve_device
from nanochat_native.runs.run_folder import PER_CALL_FLAGS, REPORT_FLAGS
from nanochat_native.runtime import distributed
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import check_values, flag, one_line_errors


def on_gpu(args: Sequence[str]) -> bool:
    """Return whether a command line trains on a GPU of CUDA: one is there, and --device does not choose another."""
    device = "auto"
    for argument, following in itertools.pairwise([*args, ""]):
        name, equals, value = argument.partition("=")
        if name == "--device":
            device = value if equals else following
    return torch.cuda.is_available() and device in ("auto", "cuda")


class Options(Protocol):
    """The flags that every experiment has."""

    out: Path | None


T = TypeVar("T", bound=Options)


def parse_flags(
    options: type[T],
    command: str,
    args: Sequence[str],
    base: Callable[[T], TrainConfig | None] = lambda own: None,
) -> tuple[T, TrainConfig, list[str]]:
    """Split the flags of an experiment from those of train, and parse both.

    Args:
        options: the dataclass of the experiment's own flags.
        command: its name, for usage and errors.
        args: the command line.
        base: returns the defaults of train's flags, given the experiment's own; None: those of train.

    Returns:
        The experiment's own flags; train's flags with all sizes filled in; the arguments of train as they were given.

    Raises:
        ConfigError: a flag is wrong or is for runs alone, or torchrun started several ranks.
    """
    if distributed.launched_by_torchrun():
        raise ConfigError(f"{command} runs in one process; start it without torchrun")
    with one_line_errors():
        own, rest = tyro.cli(
            options, prog=f"python -m nanochat_native.{command}", args=list(args), return_unknown_args=True
        )
    check_values(own, args)
    config = parse(rest, base(own))
    refuse_run_flags(config, TrainConfig(), command)
    return own, resolve_device(config), rest


def refuse_run_flags(config: TrainConfig, base: TrainConfig, command: str) -> None:
    """Raise ConfigError if a flag for runs alone, such as that of their folder, differs from `base`."""
    for name in (*PER_CALL_FLAGS, *REPORT_FLAGS):
        if getattr(config, name) != getattr(base, name):
            raise ConfigError(f"{flag(name)} is for train only; {command} writes its result to --out")
