"""Every picture, drawn from files alone: `python -m nanochat_native.plot FOLDER` draws one again.

A run's folder gives its loss, and its diagnosis; a folder of the laboratory the picture of its result.
"""

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
    """Draw the pictures of a folder again, from the raw data in it."""

    folder: tyro.conf.Positional[Path]
    """Of a run (loss.png, and diagnosis.png where there is one), or of a laboratory's result."""


def run(folder: Path) -> None:
    """Draws what the folder holds. Raises FileNotFoundError, ValueError and, without matplotlib, ImportError."""
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
    """Draws as `args` say, sys.argv's by default. Returns the exit code."""
    return run_command(Options, "plot", args, lambda options: run(options.folder))


if __name__ == "__main__":
    sys.exit(main())
