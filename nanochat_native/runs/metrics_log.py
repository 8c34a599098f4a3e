"""The log of a run: metrics.jsonl and TensorBoard events.

metrics.jsonl holds one JSON object on each line. `kind` is "train" (one optimizer step), "val" (bits per byte on the
validation split, or the rewards of answers), "sample" (generated text) or "diagnosis" (statistics of layers). `step` is
the number of optimizer steps done.
"""

import contextlib
import errno
import importlib.util
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanochat_native.runtime.console import Console, SilentConsole
from nanochat_native.runtime.files import write_atomically


class MetricsLog:
    """Appends records to metrics.jsonl and, if tensorboard is installed, to TensorBoard events in a folder beside it.

    Each record is one write, so a killed run leaves whole lines and at most one incomplete line at the end. No method
    raises: a log that cannot be opened or written is a failed report of `console`.

    Attributes:
        recorded: the records of `last_step` that were already in the log, by kind.
    """

    def __init__(self, run_dir: Path, last_step: int = -1, console: Console | None = None) -> None:
        """Open the log, and drop the records after `last_step`, the step from which a run is resumed; -1 drops all."""
        self._console = console or SilentConsole()
        self._descriptor = -1
        self._writer: Any = None
        self.recorded: dict[str, dict[str, Any]] = {}
        path = run_dir / "metrics.jsonl"
        with self._console.isolated("metrics.jsonl"):
            kept = drop_records_after(path, last_step, warn=lambda message: self._console.say(f"warning: {message}"))
            self.recorded = {record["kind"]: record for record in kept if record["step"] == last_step}
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        with self._console.isolated("TensorBoard"):
            self._writer = _tensorboard_writer(run_dir / "tensorboard", last_step)

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Append a record and return it. TensorBoard gets its numbers and texts as "<kind>/<name>"."""
        record = {"kind": kind, "step": step, **values}
        if self._descriptor >= 0:
            with self._console.isolated("metrics.jsonl"):
                _append(self._descriptor, (json.dumps(record) + "\n").encode())

        def add(writer: Any) -> None:
            for name, value in values.items():
                if isinstance(value, str):
                    writer.add_text(f"{kind}/{name}", value, step)
                elif isinstance(value, (int, float)):
                    writer.add_scalar(f"{kind}/{name}", value, step)

        self._to_tensorboard(add)
        return record

    def sync(self) -> None:
        """Flush everything that was written to the disk."""
        if self._descriptor >= 0:
            with self._console.isolated("metrics.jsonl"):
                os.fsync(self._descriptor)
        self._to_tensorboard(lambda writer: writer.flush())

    def close(self) -> None:
        """Close the files. Nothing may be written afterwards."""
        if self._descriptor >= 0:
            with self._console.isolated("metrics.jsonl"):
                os.close(self._descriptor)
        self._to_tensorboard(lambda writer: writer.close())

    def _to_tensorboard(self, action: Callable[[Any], None]) -> None:
        """Call action(writer) if there is a writer. After a failure there is none, because its thread has ended."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._console.isolated("TensorBoard"):
                action(writer)
                self._writer = writer


class SilentLog(MetricsLog):
    """A log that writes nothing, for all ranks but rank 0."""

    def __init__(self) -> None:
        self.recorded = {}

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        return {"kind": kind, "step": step, **values}

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read(path: Path, warn: Callable[[str], None] = lambda message: None) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl, oldest first; none if there is no file.

    A record is a JSON object with a text `kind` and a whole number `step` >= 0. `warn` receives a message about other
    lines. An incomplete last line, which a killed run leaves, is ignored.
    """
    damaged = []
    for number, (line, record) in enumerate(_lines(path), 1):
        if record is not None:
            yield record
        elif line.endswith(b"\n"):
            damaged.append(number)
    if damaged:
        warn(f"{path}: {_not_records(damaged)}, ignored")


def value_of(record: dict[str, Any], name: str) -> float | None:
    """Return the finite number `name` of a record, or None if it has none."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def drop_records_after(
    path: Path, step: int, warn: Callable[[str], None] = lambda message: None
) -> list[dict[str, Any]]:
    """Drop the records after `step` and an incomplete last line from a metrics.jsonl, and return the other records.

    If the dropped records are all at the end, the file is truncated in place, which needs no space. Otherwise it is
    replaced atomically. If there are lines that are not records, the old file is kept beside it as
    metrics.damaged.jsonl, and `warn` receives a message.
    """
    kept: list[dict[str, Any]] = []
    lines: list[bytes] = []
    damaged: list[int] = []
    kept_bytes = all_bytes = 0
    in_order = True
    for number, (line, record) in enumerate(_lines(path), 1):
        if record is not None and record["step"] <= step:
            kept.append(record)
            lines.append(line)
            in_order = kept_bytes == all_bytes
            kept_bytes += len(line)
        elif record is None and line.endswith(b"\n"):
            damaged.append(number)
        all_bytes += len(line)
    if not all_bytes:
        return kept
    if in_order and not damaged:
        os.truncate(path, kept_bytes)
        return kept
    path = path.resolve()  # a link stays; the file that it leads to is replaced

    def write(file: BinaryIO) -> None:
        file.write(b"".join(lines))
        if damaged:  # last, so that a disk that is too full for the new file gets no copies of the old one
            names = (path.with_name(f"{path.stem}.damaged{n or ''}{path.suffix}") for n in itertools.count())
            aside = next(name for name in names if not name.exists())
            shutil.copyfile(path, aside)
            warn(f"{path}: {_not_records(damaged)}: the old file is kept as {aside.name}")

    write_atomically(path, write)
    return kept


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line of a metrics.jsonl, including its line break, and its record or None."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            yield line, _record(line) if line.endswith(b"\n") else None


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record on a line, or None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if type(record.get("step")) is int and record["step"] >= 0 else None


def _not_records(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"line {numbers[0]} is not a record"
    return f"{len(numbers)} lines are not records (the first: line {numbers[0]})"


def _append(descriptor: int, line: bytes) -> None:
    """Append the whole line or nothing. Raise OSError in the second case."""
    size = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _tensorboard_writer(folder: Path, last_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=last_step + 1)


def none_if_nonfinite(value: float) -> float | None:
    """Return a number, or None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None
