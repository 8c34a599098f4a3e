"""What torch's CPU allocator gives and takes back."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PHASES = ("forward", "backward", "optimizer step")


class Allocations:
    """Within the block, what torch's CPU allocator gives and takes back; after it, levels in bytes by the phases that
    record_function marked, each the last time: `began`, and `highest`. "" is before all marks, where the level is 0.

    The allocator sees every tensor, but not the memory of this package's kernels (`kernel_scratch`), MKL and Python.
    """

    def __enter__(self) -> "Allocations":
        gc.collect()  # what is freed inside and was not made there would be taken off
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with _no_stderr():
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        with _no_stderr():
            self._profile.__exit__(*error)
        results: Any = self._profile.profiler
        level, phase = 0, ""
        self.began, self.highest = {phase: level}, {phase: level}
        for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() in PHASES:
                phase = event.name()
                self.began[phase] = self.highest[phase] = level
            elif event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
                level += event.nbytes()
                self.highest[phase] = max(self.highest[phase], level)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler's library writes a line to the process's stderr whenever it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
