"""Dynamic loss scaling for float16 (arXiv:1710.03740).

Gradients below 6e-8 are 0 in float16. The loss is therefore multiplied by a power of two before the backward pass, and
the gradients are divided by it afterwards. The factor is as large as the gradients allow: it is halved when they
overflow, and doubled after many steps without an overflow. The rule and its numbers are those of torch.amp.GradScaler.
"""

import math
from dataclasses import dataclass

GROWTH_INTERVAL = 2000  # steps without an overflow after which the scale is doubled
SMALLEST = 1.0


@dataclass
class LossScale:
    """The scale, and the number of steps without an overflow since it last changed.

    The state of all ranks is the same, because all ranks update it with the norm of the same averaged gradients.
    """

    scale: float = 65536.0
    finite_steps: int = 0

    def update(self, norm: float) -> bool:
        """Take the norm of a step's gradients into account, for the scale of the next step.

        Returns:
            Whether the scale was too large, so that the step must be skipped. False if the gradients were not finite at
            the smallest scale: they do not come from the scale then.
        """
        if math.isfinite(norm):
            self.finite_steps += 1
            if self.finite_steps == GROWTH_INTERVAL:
                self.scale, self.finite_steps = 2 * self.scale, 0
            return False
        too_large = self.scale > SMALLEST
        self.scale, self.finite_steps = max(self.scale / 2, SMALLEST), 0
        return too_large
