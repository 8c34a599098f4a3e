"""Exercises of chapter 10, rates, schedules, batches."""

import math
from typing import Any

import torch
from torch import Tensor

from nanochat_native.exercises.base import Experiment, Number, Write
from nanochat_native.lab.noise_scale import noise_scale
from nanochat_native.optim.schedule import lr_multiplier

# --- 10.1: a range test that is too slow ---

FLOOR, FACTOR, GOAL = 1e-8, 1.01, 0.2


def sweep_steps(goal: float = GOAL) -> int:
    """Return the number of steps until a rate that starts at FLOOR and grows by FACTOR has reached the goal."""
    return math.ceil(math.log(goal / FLOOR) / math.log(FACTOR))


# --- 10.2: the noise scale from two norms ---

SMALL, LARGE, LENGTH = (1, 9.0), (8, 2.0), 128  # sequences in a batch, with the mean squared norm of its gradient


def noise_tokens() -> float:
    """Return the noise scale in tokens."""
    found = noise_scale([SMALL[1]] * 2, [LARGE[1]] * 2, small_batch=SMALL[0], large_batch=LARGE[0])
    assert found.scale is not None
    return found.scale * LENGTH


def noise_sum() -> float:
    """Return S, the sum of the variances of one sequence's gradient."""
    return (SMALL[1] - LARGE[1]) / (1 / SMALL[0] - 1 / LARGE[0])


# --- 10.3: find the bug in the clipping ---

CLIP = '''def clip(gradients, max_norm):
    """Return the gradients, a list of tensors, scaled so that the norm of all of them together is at most max_norm.

    Gradients that are small enough stay as they are.
    """
    return [gradient * min(1.0, max_norm / gradient.norm().item()) for gradient in gradients]
'''


def total_norm(gradients: list[Tensor]) -> float:
    """Return the norm of all gradients together."""
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))


def clip(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Return gradients scaled by one factor."""
    factor = min(1.0, max_norm / total_norm(gradients))
    return [gradient * factor for gradient in gradients]


def clip_each(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Return the result of the stub."""
    return [gradient * min(1.0, max_norm / gradient.norm().item()) for gradient in gradients]


def clip_always(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Return gradients of norm max_norm."""
    return [gradient * (max_norm / total_norm(gradients)) for gradient in gradients]


def clip_values(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Return gradients with bounded elements."""
    return [gradient.clamp(-max_norm, max_norm) for gradient in gradients]


def clip_by_sum(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Return gradients scaled by the sum of their norms."""
    factor = min(1.0, max_norm / sum(gradient.norm().item() for gradient in gradients))
    return [gradient * factor for gradient in gradients]


def clip_by_square(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Return gradients scaled by the square of their norm."""
    factor = min(1.0, max_norm / total_norm(gradients) ** 2)
    return [gradient * factor for gradient in gradients]


def clip_inputs() -> list[tuple[Any, ...]]:
    """Return small and large gradients."""
    generator = torch.Generator().manual_seed(10)
    first, second = torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)
    return [([first, second], 1.0), ([0.01 * first, 0.01 * second], 1.0), ([10 * first, 0.1 * second], 2.0)]


# --- 10.4: the schedule ---

SCHEDULE = '''def multiplier(step, steps, warmup, warmdown, final):
    """Return the multiplier of the learning rates at a step, 0 to steps - 1.

    It rises linearly over the first `warmup` steps: step 0 has 1 / warmup, and step warmup - 1 has 1. It falls linearly
    over the last `warmdown` steps, from 1 at step (steps - warmdown) to `final` at step `steps`, which is the step
    after the last one. In between it is 1.
    """
    raise NotImplementedError
'''


def multiplier(step: int, steps: int, warmup: int, warmdown: int, final: float) -> float:
    """Return the multiplier of the package."""
    return lr_multiplier(step, steps, warmup_steps=warmup, warmdown_ratio=warmdown / steps, final_lr_frac=final)


def multiplier_from_zero(step: int, steps: int, warmup: int, warmdown: int, final: float) -> float:
    """Return a warmup that starts at 0."""
    return step / warmup if step < warmup else multiplier(step, steps, warmup, warmdown, final)


def multiplier_to_zero(step: int, steps: int, warmup: int, warmdown: int, final: float) -> float:
    """Return a warmdown that ends at 0."""
    return multiplier(step, steps, warmup, warmdown, 0.0)


def multiplier_ends_early(step: int, steps: int, warmup: int, warmdown: int, final: float) -> float:
    """Return a warmdown that reaches its end at the last step."""
    if step <= steps - warmdown:
        return multiplier(step, steps, warmup, warmdown, final)
    return 1 - (1 - final) * (step - (steps - warmdown)) / (warmdown - 1)


def multiplier_turned(step: int, steps: int, warmup: int, warmdown: int, final: float) -> float:
    """Return a warmdown in which the final value and 1 are exchanged."""
    if step <= steps - warmdown:
        return multiplier(step, steps, warmup, warmdown, final)
    return 1 - final * (step - (steps - warmdown)) / warmdown


def multiplier_without_plateau(step: int, steps: int, warmup: int, warmdown: int, final: float) -> float:
    """Return a decay that begins after the warmup."""
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - final) * (step - warmup) / (steps - warmup)


def schedule_inputs() -> list[tuple[Any, ...]]:
    """Return several steps of two runs."""
    return [(step, 20, 4, 8, 0.1) for step in range(20)] + [(step, 10, 2, 5, 0.0) for step in range(10)]


# --- 10.5: a better schedule ---


def judge(record: dict[str, Any]) -> tuple[bool, str]:
    """Judge whether the reader's schedule beats the default by more than the spread of its seeds."""
    rows = {row["case"]: row for row in record["rows"]}
    default, mine = rows["default"], rows["mine"]
    gain = default["value"] - mine["value"]
    spread = max(default["spread"] or 0.0, mine["spread"] or 0.0)
    text = f"yours ends at {mine['value']:.4f}, the default at {default['value']:.4f} bits per byte"
    if gain <= 0:
        return False, f"{text}: yours is not better"
    if gain <= spread:
        return False, f"{text}: better by {gain:.4f}, but the seeds of one case differ by {spread:.4f}"
    return True, f"{text}: better by {gain:.4f}, more than the spread of the seeds, {spread:.4f}"


EXERCISES = (
    Number(
        "10.1",
        "Steps of a range test from 1e-8, x 1.01 a step, until it reaches 0.2",
        answer=lambda: float(sweep_steps()),
        unit="steps",
        tolerance=0.002,
        mistakes={
            "that is the original guide's number; it ends at 2.1e-4": lambda: 1000.0,
            "that reaches 0.02, the rate of the matrices": lambda: float(sweep_steps(0.02)),
            "divide by the natural logarithm of 1.01 if the other is natural": lambda: (
                math.log10(GOAL / FLOOR) / math.log(FACTOR)
            ),
        },
    ),
    Number(
        "10.2",
        "Noise scale from the norms of two batch sizes",
        answer=noise_tokens,
        unit="tokens",
        mistakes={
            "those are sequences; a sequence has 128 tokens": lambda: noise_tokens() / LENGTH,
            "the norm of the large batch still contains noise: subtract S / 8": lambda: noise_sum() / LARGE[1] * LENGTH,
            "the difference of the norms is S (1 - 1/8), not S": lambda: (SMALL[1] - LARGE[1]) * LENGTH,
            "that is S divided by the norm of one sequence's gradient": lambda: noise_sum() / SMALL[1] * LENGTH,
        },
    ),
    Write(
        "10.3",
        "Find the bug: a clipping that turns the gradient",
        CLIP,
        clip,
        {
            "each tensor is clipped by its own norm: the direction of the whole gradient changes": clip_each,
            "small gradients are scaled up: the factor must be at most 1": clip_always,
            "elements are bounded one by one; the norm of all together must be": clip_values,
            "norms do not add up: the squares do": clip_by_sum,
            "that divides by the square of the norm: the root is missing": clip_by_square,
        },
        clip_inputs,
    ),
    Write(
        "10.4",
        "The multiplier of the learning rates",
        SCHEDULE,
        multiplier,
        {
            "the warmup starts at 0: the first step does nothing": multiplier_from_zero,
            "the warmdown ends at 0; it must end at `final`": multiplier_to_zero,
            "the warmdown reaches `final` at the last step; it must do so one step later": multiplier_ends_early,
            "the warmdown falls by `final`; it must fall to it": multiplier_turned,
            "the decay begins after the warmup; it must begin `warmdown` steps before the end": (
                multiplier_without_plateau
            ),
        },
        schedule_inputs,
    ),
    Experiment(
        "10.5",
        "A schedule that beats the default",
        command='python -m nanochat_native.compare --recipe october --cases "default:" "mine: --warmdown-ratio 0.65" '
        "--num-iterations 240 --rates 1 --seeds 3 --out lab/exercise-10-5",
        folder="lab/exercise-10-5",
        judge=judge,
    ),
)
