"""Learning rate and momentum as pure functions of the step."""

import math
from typing import Protocol

SHAPES = ("linear", "cosine", "exponential", "step", "constant")
DROPS = 3  # of the "step" shape, evenly over the warmdown


def lr_multiplier(
    step: int,
    num_iterations: int,
    *,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    warmdown_ratio: float = 0.2,
    final_lr_frac: float = 0.0,
    shape: str = "linear",
) -> float:
    """What the initial learning rate is multiplied by at step 0 to num_iterations - 1: warmup, constant, warmdown.

    The warmup rises linearly to 1 over warmup_steps, or over warmup_ratio of num_iterations; not both. The warmdown
    takes the last warmdown_ratio of num_iterations, but nothing of the warmup, down to final_lr_frac, which the step
    after the last would reach (nanochat's rule). Its shapes, for x from 0 to 1 over the warmdown and f =
    final_lr_frac:

        linear       1 - (1 - f) x                     cosine    f + (1 - f) (1 + cos(pi x)) / 2
        exponential  f^x                               step      f^(1/3), f^(2/3), f: three drops, evenly spread
        constant     1: no warmdown

    Raises ValueError for arguments out of range, for a warmup longer than the run, and for the shapes exponential and
    step with f = 0, which they cannot reach.
    """
    if num_iterations < 1 or not 0 <= step <= num_iterations:
        raise ValueError(f"step is {step} of {num_iterations}; it takes 0 to num_iterations, which is at least 1")
    if warmup_steps < 0 or not 0 <= warmup_ratio <= 1 or (warmup_steps and warmup_ratio):
        raise ValueError(
            f"warmup_steps is {warmup_steps}, warmup_ratio {warmup_ratio}; takes one of them, "
            "a number of steps from 0 or a ratio from 0 to 1"
        )
    if not 0 <= warmdown_ratio <= 1 or not 0 <= final_lr_frac <= 1:
        raise ValueError(f"warmdown_ratio is {warmdown_ratio}, final_lr_frac {final_lr_frac}; both take 0 to 1")
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; it takes {', '.join(SHAPES)}")
    if shape in ("exponential", "step") and final_lr_frac == 0:
        raise ValueError(f"shape {shape!r} never reaches a final_lr_frac of 0; give one above 0")
    warmup = warmup_steps or round(warmup_ratio * num_iterations)
    if warmup > num_iterations:
        raise ValueError(f"warmup_steps is {warmup}, more than the {num_iterations} of the run")
    warmdown = 0 if shape == "constant" else min(round(warmdown_ratio * num_iterations), num_iterations - warmup)

    if step < warmup:
        return (step + 1) / warmup
    if step <= num_iterations - warmdown:
        return 1.0
    x = (step - (num_iterations - warmdown)) / warmdown
    if shape == "linear":
        return 1 - (1 - final_lr_frac) * x
    if shape == "cosine":
        return final_lr_frac + (1 - final_lr_frac) * (1 + math.cos(math.pi * x)) / 2
    if shape == "exponential":
        return float(final_lr_frac**x)
    return float(final_lr_frac ** (min(math.floor(x * DROPS) + 1, DROPS) / DROPS))


def muon_momentum(step: int, *, start: float = 0.85, end: float = 0.95, warmup_steps: int = 300) -> float:
    """Muon's momentum: linear from start to end over warmup_steps, then end. nanochat's values.

    Raises ValueError for a momentum outside 0 to below 1 or a negative number of steps.
    """
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"step is {step}, warmup_steps {warmup_steps}; neither may be below 0")
    if not 0 <= start < 1 or not 0 <= end < 1:
        raise ValueError(f"start is {start}, end {end}; both take 0 to below 1")
    x = min(step / warmup_steps, 1.0) if warmup_steps else 1.0
    return (1 - x) * start + x * end


class Settings(Protocol):
    """What the flags of train say of schedules."""

    @property
    def num_iterations(self) -> int: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_ratio(self) -> float: ...
    @property
    def warmdown_ratio(self) -> float: ...
    @property
    def final_lr_frac(self) -> float: ...
    @property
    def momentum_start(self) -> float: ...
    @property
    def momentum_end(self) -> float: ...
    @property
    def momentum_warmup_steps(self) -> int: ...


def lr_at(step: int, settings: Settings) -> float:
    """lr_multiplier as a run with these flags takes it."""
    return lr_multiplier(
        step,
        settings.num_iterations,
        warmup_ratio=settings.warmup_ratio,
        warmdown_ratio=settings.warmdown_ratio,
        final_lr_frac=settings.final_lr_frac,
        shape=settings.schedule,
    )


def momentum_at(step: int, settings: Settings) -> float:
    """muon_momentum as a run with these flags takes it."""
    return muon_momentum(
        step,
        start=settings.momentum_start,
        end=settings.momentum_end,
        warmup_steps=settings.momentum_warmup_steps,
    )
