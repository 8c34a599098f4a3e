"""Loss spikes: whether a step's loss or gradient norm is far above those before it."""

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 128  # steps that a new one is compared with
LEAST = 32  # before so many, nothing is a spike


class SpikeGuard:
    """Keeps (loss, gradient norm) of the last steps that were no spikes.

    sigma: a step is a spike when one of the two is more than so many standard deviations above the mean; 0: never.
    """

    def __init__(self, sigma: float, history: Iterable[Iterable[float]] = ()) -> None:
        self.sigma = sigma
        self.history: deque[tuple[float, ...]] = deque((tuple(pair) for pair in history), maxlen=WINDOW)

    def is_spike(self, loss: float, norm: float) -> bool:
        """Also takes a step that is none into the history. What is not finite is not for this to judge."""
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
