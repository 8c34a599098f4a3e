"""Ends a run after the current step on SIGINT or SIGTERM."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any


class StopSignals:
    """Makes the first SIGINT or SIGTERM in the block set `signal`; the second one raises KeyboardInterrupt.

    then: what the program does after the first one, as text for the user.
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
        # print() must not be called here, because the signal may have interrupted another print().
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: finishing the step, {self.then}; a second signal stops at once\n".encode())
