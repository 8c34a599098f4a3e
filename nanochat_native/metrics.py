"""What a run says of itself: metrics.jsonl, TensorBoard events, and the live line on the terminal.

metrics.jsonl holds one JSON object a line. `kind` is "train" (one optimizer step), "val" (bits per byte on the
validation split) or "sample" (a piece of text); `step` counts the optimizer steps done.
"""

import importlib.util
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

PLAIN_LINE_SECONDS = 10.0  # a log gets a line this often; a terminal redraws its one line at every step


class MetricsLog:
    """Appends to metrics.jsonl and, where tensorboard is installed, to TensorBoard events in the folder beside it.

    A record is one write, so a killed run leaves whole lines, and at most one torn one at the end.
    """

    def __init__(self, run_dir: Path, last_step: int = -1) -> None:
        """last_step: of the records to keep, where a run goes on; -1 keeps none."""
        path = run_dir / "metrics.jsonl"
        keep_until(path, last_step)
        self._file = path.open("a", encoding="utf-8")
        self._writer = _tensorboard_writer(run_dir / "tensorboard", last_step)

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Append one record and return it. Numbers also go to TensorBoard as "<kind>/<name>"."""
        record = {"kind": kind, "step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, str):
                    self._writer.add_text(f"{kind}/{name}", value, step)
                elif isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
        return record

    def sync(self) -> None:
        """Put everything written so far on the disk."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


class SilentLog(MetricsLog):
    """Of the ranks that do not write."""

    def __init__(self) -> None:
        pass

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        return {"kind": kind, "step": step, **values}

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a metrics.jsonl, oldest first; nothing when there is no file. A torn last line is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            yield json.loads(line)


def keep_until(path: Path, step: int) -> None:
    """Drop the records of a metrics.jsonl that are later than `step`, and a torn last line, by an atomic
    replacement."""
    kept = [json.dumps(record) + "\n" for record in read(path) if record["step"] <= step]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _tensorboard_writer(folder: Path, last_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=last_step + 1)


class Console:
    """Human-readable output: one line redrawn in place on a terminal, plain lines now and then anywhere else.

    With `as_json` records go to `stream` as JSON lines instead, and every message to stderr.
    """

    def __init__(self, stream: TextIO | None = None, *, as_json: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._as_json = as_json
        self._messages = sys.stderr if as_json else self._stream
        self._terminal = not as_json and self._stream.isatty()
        self._drawn = False
        self._last_line = -math.inf

    def say(self, text: str = "") -> None:
        """Print a message on lines of its own."""
        self.end_line()
        print(text, file=self._messages, flush=True)

    def record(self, record: dict[str, Any]) -> None:
        """Print a metrics record as a JSON line; only with `as_json`."""
        if self._as_json:
            print(json.dumps(record), file=self._stream, flush=True)

    def live(self, text: str, *, last: bool = False) -> None:
        """Show the state of the run. Off a terminal only every PLAIN_LINE_SECONDS, and the last."""
        if self._as_json:
            return
        if self._terminal:
            width = shutil.get_terminal_size().columns
            self._stream.write("\r" + text[: width - 1] + "\x1b[K")
            self._stream.flush()
            self._drawn = True
        elif last or time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            print(text, file=self._stream, flush=True)

    def end_line(self) -> None:
        """Leave the live line standing and go to the next one."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False


class SilentConsole(Console):
    """Of the ranks that do not print."""

    def say(self, text: str = "") -> None:
        pass

    def record(self, record: dict[str, Any]) -> None:
        pass

    def live(self, text: str, *, last: bool = False) -> None:
        pass


def duration(seconds: float) -> str:
    """ "41 s", "4 min 10 s", "2 h 5 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def compact(number: float) -> str:
    """Three digits and an SI prefix: 512, 4.2k, 11.5M, 1.3G."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"
