"""A table of predicted memory over a grid of sizes: `memory --table FILE.json` or FILE.csv.

The JSON is one object on one line, under 150 kB:

    {"format": "nanochat-native memory table", "unit": "MiB",
     "fixed": {"vocab_size": 65536, "head_dim": 128, "n_kv_head": null (as many as query heads), "dtype": "bfloat16",
               "micro_batches": 1, "device": "cpu"},
     "grid": {"depth": [4, ...], "device_batch_size": [1, ...], "max_seq_len": [256, ...], "nproc": [1, ...],
              "grad_checkpoint": [0, 1], "optimizer": ["hybrid", "adamw"]},
     "phases": ["forward", "backward", "optimizer step"],
     "columns": ["depth", "device_batch_size", "max_seq_len", "nproc", "grad_checkpoint", "optimizer", "phase",
                 "weights", "rotary tables", "tokens", "optimizer state", "library's workspace", "gradients",
                 "weights in bfloat16", "activations", "temporary tensors"],
     "rows": [[4, 1, 256, 1, 0, 0, 1, 141, 0, ...], ...]}

A row has a number for each column. The first six are the flags of the row: the sizes themselves, and for
grad_checkpoint and optimizer the index into their list of the grid. `phase` is the index of the phase of the peak. The
other columns are the bytes of each part at the peak, on the rank that holds most, in whole MiB (2^20 bytes, rounded).
Their sum is the peak, up to the rounding of each part. The rows are the product of the lists of the grid, the last list
varies fastest, so that the row of a point of the grid can be computed from its indices. A CSV has the same columns and
rows, with the names of the optimizer and of the phase.
"""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat_native.lab.memory.allocations import PHASES
from nanochat_native.lab.memory.options import GRID, Options, sized
from nanochat_native.lab.memory.prediction import snapshots
from nanochat_native.runtime.files import write_atomically
from nanochat_native.runtime.flags import is_unset

FORMAT = "nanochat-native memory table"
INDEXED = ("grad_checkpoint", "optimizer")  # columns that hold an index into their list of the grid
FIXED = ("vocab_size", "head_dim", "n_kv_head", "dtype", "micro_batches", "device")  # flags that hold for every row


def points(options: Options) -> Iterator[Options]:
    """Yield the options of each row."""
    for values in itertools.product(*GRID.values()):
        yield dataclasses.replace(options, **dict(zip(GRID, values, strict=True)))


def table(options: Options) -> dict[str, Any]:
    """Return the table as a JSON value, as the module describes it. Flags of the grid in `options` are ignored."""
    options = sized(dataclasses.replace(options, table=None))
    names, rows = [], []
    for point in points(options):
        highest = max(snapshots(point), key=lambda snapshot: snapshot.bytes)
        names = list(highest.parts)
        flags = [GRID[name].index(getattr(point, name)) if name in INDEXED else getattr(point, name) for name in GRID]
        rows.append([*flags, PHASES.index(highest.phase), *(round(size / 2**20) for size in highest.parts.values())])
    return {
        "format": FORMAT,
        "unit": "MiB",
        "fixed": {name: None if is_unset(options, name) else getattr(options, name) for name in FIXED},
        "grid": GRID | {"grad_checkpoint": [0, 1]},
        "phases": list(PHASES),
        "columns": [*GRID, "phase", *names],
        "rows": rows,
    }


def as_csv(content: dict[str, Any]) -> str:
    """Return the rows of a table as CSV, below a line with the columns."""
    columns, text = content["columns"], io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in content["rows"]:
        cells = dict(zip(columns, row, strict=True))
        cells["optimizer"] = content["grid"]["optimizer"][cells["optimizer"]]
        cells["phase"] = content["phases"][cells["phase"]]
        writer.writerow(cells.values())
    return text.getvalue()


def write(options: Options, path: Path) -> dict[str, Any]:
    """Write the table to `path`, as its suffix says, and return it. The file appears whole or not at all."""
    content = table(options)
    as_json = json.dumps(content, separators=(",", ":")) + "\n"
    write_atomically(path, as_csv(content) if path.suffix == ".csv" else as_json)
    return content
