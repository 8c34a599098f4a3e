"""The speed of a run, in steps and as a share of the peak rate of its device."""

import time

import torch

from nanochat_native.runtime import hardware

PEAK_SECONDS = 10.0  # between measurements of a CPU's peak rate, which take a tenth of a second each


class Throughput:
    """The time that a step takes, and the peak rate of the device.

    peak: the highest rate that was measured or is in the table.
    seconds_per_step: a moving average; 0 before the first step.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self.peak = hardware.peak(device, dtype)
        self._peak_measured = time.monotonic()
        self.seconds_per_step = 0.0

    def add_step(self, seconds: float) -> None:
        """Take the time of a step into the moving average."""
        self.seconds_per_step += (0.1 if self.seconds_per_step else 1.0) * (seconds - self.seconds_per_step)

    def share_of_peak(self, flops: float, ranks: int) -> float | None:
        """Return a rate in FLOP/s on all ranks as a share of their peak rate; None if that is not known."""
        return None if self.peak.flops is None else flops / (self.peak.flops * ranks)

    def measure_peak_again(self) -> None:
        """Measure the peak rate again after a while, and keep the highest: other programs may keep a CPU busy."""
        if time.monotonic() - self._peak_measured < PEAK_SECONDS:
            return
        self._peak_measured = time.monotonic()
        again = hardware.peak(self._device, self._dtype)
        if self.peak.flops is not None and again.flops is not None and again.flops > self.peak.flops:
            self.peak = again
