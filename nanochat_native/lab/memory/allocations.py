"""Record what torch's CPU allocator allocates and frees."""

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
    """A context that records the allocations of torch's CPU allocator.

    The allocator manages every tensor, but not the memory of this package's kernels (`kernel_scratch`), MKL and Python.

    Attributes:
        began: allocated bytes at the start of each phase that record_function marks, the last time it runs.
        highest: the peak in each of these phases. The phase "" comes before all marks and starts at 0 bytes.
    """

    def __enter__(self) -> "Allocations":
        gc.collect()  # memory from before the block must not be freed, and subtracted, inside it
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
    """Hide the line that the profiler's library writes to stderr whenever it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
