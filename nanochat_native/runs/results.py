"""The result of an experiment: a folder with result.json and the picture that is drawn from it.

result.json holds the flags of the command and of train, the seed, versions, and the raw data.
`python -m nanochat_native.plot FOLDER` draws the picture again.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
from pathlib import Path
from typing import Any

import torch

import nanochat_native
from nanochat_native.runs import pictures
from nanochat_native.runs.config import TrainConfig, to_json
from nanochat_native.runtime import hardware
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.files import write_atomically

FORMAT = "nanochat-native result"
OUT = Path("lab")


def open_folder(out: Path | None, command: str) -> Path:
    """Create and return the folder of a result: `out`, or the first of lab/COMMAND, lab/COMMAND-2, ... that is free.

    Raises ConfigError if `out` is not empty.
    """
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out must be a new or an empty folder, got {out}")
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
    """Return the content of result.json: how `data` was made, and `data`. device: used if `config` is None."""
    how: dict[str, Any] = {"format": FORMAT, "command": command, "finished": finished, "options": flags_of(options)}
    if config is not None:
        how |= {"config": to_json(config), "seed": config.seed}
        device = config.device
    how["versions"] = versions(device)
    return how | data


def flags_of(options: Any) -> dict[str, Any]:
    """Return the options of a command as they are in result.json, by name."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(options).items()}


def versions(device: str | None) -> dict[str, str]:
    """Return the versions of the programs, and the name of the device."""
    return {
        "nanochat_native": nanochat_native.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": "none" if device is None else hardware.describe(torch.device(device)),
    }


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write result.json, replacing it atomically."""
    write_atomically(folder / pictures.RESULT, json.dumps(record, indent=1) + "\n")


def finish(folder: Path, record: dict[str, Any], console: Console) -> None:
    """Write the result, draw its picture, and print where they are."""
    write(folder, record)
    console.say(f"result   {folder / pictures.RESULT}")
    with console.isolated("picture"):
        console.say(f"picture  {pictures.draw(folder) or pictures.MISSING}")
    console.say(f"again    python -m nanochat_native.plot {shlex.quote(str(folder))}")
