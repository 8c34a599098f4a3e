"""Loss spikes: steps whose loss or gradient norm is far above that of the steps before them."""

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 128  # steps with which a new one is compared
LEAST = 32  # steps before which there is no spike


class SpikeGuard:
    """Keeps (loss, gradient norm) of the last steps that were no spikes.

    sigma: a step is a spike if one of the two is more than this many standard deviations above the mean; 0: never.
    """

    def __init__(self, sigma: float, history: Iterable[Iterable[float]] = ()) -> None:
        self.sigma = sigma
        self.history: deque[tuple[float, ...]] = deque((tuple(pair) for pair in history), maxlen=WINDOW)

    def is_spike(self, loss: float, norm: float) -> bool:
        """Return whether a step is a spike, and add it to the history if not. A step with a value that is not finite is
        neither a spike nor part of the history."""
        if not self.sigma or not math.isfinite(loss) or not math.isfinite(norm):
            return False
        if len(self.history) >= LEAST:
            for value, seen in zip((loss, norm), zip(*self.history, strict=True), strict=True):
                mean = sum(seen) / len(seen)
                deviation = math.sqrt(sum((x - mean) ** 2 for x in seen) / len(seen))
                if value > mean + self.sigma * deviation:
                    return True
        self.history.append((loss, norm))
        return False
