"""SIGINT and SIGTERM end a run after the step at hand."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any


class StopSignals:
    """Within the block SIGINT and SIGTERM set `signal`, once; the second one interrupts where it finds the program.

    then: what will be done after the first, for the user.
    """

    def __init__(self, then: str = "then a checkpoint") -> None:
        self.signal = 0
        self.then = then
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        # print() is not to be called here: the signal may have interrupted one.
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: finishing the step, {self.then}; again: stop at once\n".encode())
