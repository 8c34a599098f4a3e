"""The learning rate, the momentum and the weight decay of Muon, as pure functions of the step."""

import math
from typing import Protocol

SHAPES = ("linear", "cosine", "exponential", "step", "constant")
DECAY_SCHEDULES = ("constant", "cosine")
DROPS = 3  # of the shape "step", evenly spaced over the warmdown


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
    """Return the multiplier of the initial learning rate at a step, 0 to num_iterations - 1.

    A run has a warmup, a constant part and a warmdown. The warmup rises linearly to 1 over warmup_steps, or over
    warmup_ratio of num_iterations; only one of the two may be given. The warmdown takes the last warmdown_ratio of
    num_iterations and ends at final_lr_frac at the step after the last one (nanochat's rule). A warmup of warmup_ratio
    makes the warmdown shorter where they meet. A warmup of warmup_steps hides the first steps of the warmdown, and a
    run of fewer steps never reaches 1. The shapes of the warmdown, for x from 0 to 1 and f = final_lr_frac, are:

        linear       1 - (1 - f) x                     cosine    f + (1 - f) (1 + cos(pi x)) / 2
        exponential  f^x                               step      f^(1/3), f^(2/3), f: three drops, evenly spread
        constant     1: no warmdown

    Raises:
        ValueError: an argument is out of range, or f is 0 for the shape exponential or step, which cannot reach 0.
    """
    _check_step(step, num_iterations)
    if warmup_steps < 0 or not 0 <= warmup_ratio <= 1 or (warmup_steps and warmup_ratio):
        raise ValueError(
            "the warmup must be either warmup_steps >= 0 or warmup_ratio from 0 to 1, got warmup_steps "
            f"{warmup_steps} and warmup_ratio {warmup_ratio}"
        )
    if not 0 <= warmdown_ratio <= 1 or not 0 <= final_lr_frac <= 1:
        raise ValueError(
            f"warmdown_ratio and final_lr_frac must be from 0 to 1, got {warmdown_ratio} and {final_lr_frac}"
        )
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if shape in ("exponential", "step") and final_lr_frac == 0:
        raise ValueError(f"final_lr_frac must be above 0 with the shape {shape!r}, got 0")
    warmup = warmup_steps or round(warmup_ratio * num_iterations)
    warmdown = 0 if shape == "constant" else round(warmdown_ratio * num_iterations)
    if not warmup_steps:
        warmdown = min(warmdown, num_iterations - warmup)

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


def muon_momentum(
    step: int,
    *,
    start: float = 0.85,
    end: float = 0.95,
    warmup_steps: int = 300,
    final: float | None = None,
    num_iterations: int = 0,
    warmdown_ratio: float = 0.0,
) -> float:
    """Return Muon's momentum: linear from start to end over warmup_steps, then constant. The defaults are nanochat's of
    October 2025.

    With `final` it then falls linearly from end, over the last warmdown_ratio of num_iterations, and reaches `final` at
    the step after the last one. The warmup has priority: in a run of at most warmup_steps it never falls.

    Raises:
        ValueError: a momentum is not >= 0 and < 1, a number of steps is negative, or warmdown_ratio is not from 0 to 1.
    """
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"step and warmup_steps must be >= 0, got {step} and {warmup_steps}")
    if not 0 <= start < 1 or not 0 <= end < 1:
        raise ValueError(f"start and end must be >= 0 and < 1, got {start} and {end}")
    if final is not None:
        if not 0 <= final < 1 or num_iterations < 0 or not 0 <= warmdown_ratio <= 1:
            raise ValueError(
                "final must be >= 0 and < 1, num_iterations >= 0 and warmdown_ratio from 0 to 1, "
                f"got {final}, {num_iterations} and {warmdown_ratio}"
            )
        warmdown = round(warmdown_ratio * num_iterations)
        if warmdown and step >= max(warmup_steps, num_iterations - warmdown):
            x = min((step - (num_iterations - warmdown)) / warmdown, 1.0)
            return (1 - x) * end + x * final
    x = min(step / warmup_steps, 1.0) if warmup_steps else 1.0
    return (1 - x) * start + x * end


def decay_multiplier(step: int, num_iterations: int, *, schedule: str = "constant") -> float:
    """Return the multiplier of Muon's initial weight decay at a step: 1, or (1 + cos(pi step / num_iterations)) / 2.

    Raises:
        ValueError: the schedule is neither "constant" nor "cosine", or the step is not from 0 to num_iterations.
    """
    if schedule not in DECAY_SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(DECAY_SCHEDULES)}, got {schedule!r}")
    _check_step(step, num_iterations)
    return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * step / num_iterations)) / 2


def _check_step(step: int, num_iterations: int) -> None:
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be >= 1, got {num_iterations}")
    if not 0 <= step <= num_iterations:
        raise ValueError(f"step must be from 0 to num_iterations, {num_iterations}, got {step}")


class Settings(Protocol):
    """The flags of train that concern schedules."""

    @property
    def num_iterations(self) -> int: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
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
    @property
    def momentum_final(self) -> float: ...
    @property
    def decay_schedule(self) -> str: ...


def lr_at(step: int, settings: Settings) -> float:
    """Return the lr_multiplier of a run with these flags."""
    return lr_multiplier(
        step,
        settings.num_iterations,
        warmup_steps=settings.warmup_steps,
        warmup_ratio=settings.warmup_ratio,
        warmdown_ratio=settings.warmdown_ratio,
        final_lr_frac=settings.final_lr_frac,
        shape=settings.schedule,
    )


def momentum_at(step: int, settings: Settings) -> float:
    """Return the muon_momentum of a run with these flags. It falls where momentum_final differs from momentum_end and
    the schedule has a warmdown."""
    falls = settings.momentum_final != settings.momentum_end and settings.schedule != "constant"
    return muon_momentum(
        step,
        start=settings.momentum_start,
        end=settings.momentum_end,
        warmup_steps=settings.momentum_warmup_steps,
        final=settings.momentum_final if falls else None,
        num_iterations=settings.num_iterations,
        warmdown_ratio=settings.warmdown_ratio,
    )


def weight_decay_at(step: int, settings: Settings) -> float:
    """Return the decay_multiplier of a run with these flags."""
    return decay_multiplier(step, settings.num_iterations, schedule=settings.decay_schedule)
