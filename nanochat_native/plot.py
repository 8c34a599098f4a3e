"""python -m nanochat_native.plot FOLDER: draw the pictures of a run or an experiment again."""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from nanochat_native.runs import metrics_log
from nanochat_native.runs.metrics_log import value_of
from nanochat_native.runs.pictures import RESULT, draw, plot_diagnosis, plot_loss
from nanochat_native.runtime.command import run_command


@dataclass
class Options:
    """Draw the pictures of a run or of an experiment again, from the data in its folder.

    The guide explains it: docs/guide/01-one-command.md.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of a run, for loss.png and diagnosis.png, or of an experiment, for the picture of its result."""


def run(folder: Path) -> None:
    """Draw the pictures of a folder. Raise FileNotFoundError, ValueError or, without matplotlib, ImportError."""
    if (folder / RESULT).exists():
        paths = [draw(folder)]
    elif (folder / "metrics.jsonl").exists():
        records = list(
            metrics_log.read(folder / "metrics.jsonl", warn=lambda text: print(f"warning: {text}", file=sys.stderr))
        )
        if all(value_of(record, "loss") is None for record in records):
            raise ValueError(f"{folder / 'metrics.jsonl'} cannot be drawn: no record has a loss")
        paths = [plot_loss(folder), plot_diagnosis(folder)]
    else:
        raise FileNotFoundError(f"{folder} has neither a {RESULT} nor a metrics.jsonl")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("matplotlib is not installed: pip install matplotlib")
    print("\n".join(str(path) for path in paths if path))


def main(args: Sequence[str] | None = None) -> int:
    """Run the command with `args`, which default to those of sys.argv. Return the exit code."""
    return run_command(Options, "plot", args, lambda options: run(options.folder))


if __name__ == "__main__":
    sys.exit(main())
