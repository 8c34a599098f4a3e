"""Exercises of chapter 7, the loss and its gradient."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.exercises.base import Experiment, Number, Write

# --- 7.1: the gradient of three logits ---

LOGITS, TARGET = (2.0, 1.0, 0.0), 1


def target_gradient() -> float:
    """Return the derivative of the loss by the logit of the target."""
    return float(torch.tensor(LOGITS, dtype=torch.float64).softmax(0)[TARGET]) - 1


# --- 7.2: the bytes of all logits ---


def logits_bytes(tokens: int = 8 * 512, element: int = 4, vocabulary: int = 32768) -> int:
    """Return the bytes of the logits of a micro-batch of 8 sequences of 512 tokens."""
    return tokens * vocabulary * element


# --- 7.3: find the bug in a loss with ignored targets ---

LOSS_GRADIENT = '''def gradient(z, targets):
    """Return the derivative of the mean cross-entropy by the logits z (N, V), for targets (N,); -1 does not count.

    The mean is over the targets that count, and a row that does not count has the gradient 0.
    """
    p = torch.softmax(z, dim=-1)
    y = torch.zeros_like(z)
    y[torch.arange(len(z)), targets] = 1
    return (p - y) / len(z)
'''


def gradient(z: Tensor, targets: Tensor) -> Tensor:
    """Return the derivative."""
    counted = targets != -1
    y = F.one_hot(targets.clamp_min(0), z.size(-1))
    return (z.softmax(-1) - y) * counted[:, None] / counted.sum()


def gradient_of_all_rows(z: Tensor, targets: Tensor) -> Tensor:
    """Return the result of the stub, in which -1 is the last token."""
    y = F.one_hot(targets % z.size(-1), z.size(-1))
    return (z.softmax(-1) - y) / len(z)


def gradient_over_all(z: Tensor, targets: Tensor) -> Tensor:
    """Return the derivative divided by the number of all rows."""
    return gradient(z, targets) * (targets != -1).sum() / len(z)


def gradient_of_the_sum(z: Tensor, targets: Tensor) -> Tensor:
    """Return the derivative of the sum."""
    return gradient(z, targets) * (targets != -1).sum()


def gradient_with_probabilities(z: Tensor, targets: Tensor) -> Tensor:
    """Return p for a row that does not count."""
    counted = targets != -1
    y = F.one_hot(targets.clamp_min(0), z.size(-1)) * counted[:, None]
    return (z.softmax(-1) - y) / counted.sum()


def gradient_downward(z: Tensor, targets: Tensor) -> Tensor:
    """Return the negative derivative."""
    return -gradient(z, targets)


def loss_inputs() -> list[tuple[Any, ...]]:
    """Return logits and targets, some of which do not count."""
    generator = torch.Generator().manual_seed(7)
    found: list[tuple[Any, ...]] = []
    for targets in ([2, -1, 0, 3, -1], [1, 4, -1]):
        found.append((2 * torch.randn(len(targets), 5, generator=generator), torch.tensor(targets)))
    return found


# --- 7.4: the gradient through the softcap ---

SOFTCAP_GRADIENT = '''def raw_gradient(a, target, cap):
    """Return the derivative of the cross-entropy by the raw logits a (V,).

    The loss is computed from the capped logits z = cap tanh(a / cap), and target is the index of the right token.
    """
    raise NotImplementedError
'''


def _difference(z: Tensor, target: int) -> Tensor:
    return z.softmax(-1) - F.one_hot(torch.tensor(target), len(z))


def raw_gradient(a: Tensor, target: int, cap: float) -> Tensor:
    """Return the derivative by the raw logits."""
    z = cap * torch.tanh(a / cap)
    return _difference(z, target) * (1 - (z / cap) ** 2)


def raw_gradient_without_slope(a: Tensor, target: int, cap: float) -> Tensor:
    """Return the derivative by the capped logits."""
    return _difference(cap * torch.tanh(a / cap), target)


def raw_gradient_without_cap(a: Tensor, target: int, cap: float) -> Tensor:
    """Return the derivative of a loss of the raw logits."""
    return _difference(a, target)


def raw_gradient_of_raw(a: Tensor, target: int, cap: float) -> Tensor:
    """Return the derivative with the slope taken at the raw logits."""
    z = cap * torch.tanh(a / cap)
    return _difference(z, target) * (1 - (a / cap) ** 2)


def raw_gradient_over_cap(a: Tensor, target: int, cap: float) -> Tensor:
    """Return the derivative divided by the cap once more."""
    return raw_gradient(a, target, cap) / cap


def raw_gradient_of_tanh(a: Tensor, target: int, cap: float) -> Tensor:
    """Return the derivative with 1 - z / cap as the slope."""
    z = cap * torch.tanh(a / cap)
    return _difference(z, target) * (1 - z / cap)


def softcap_inputs() -> list[tuple[Any, ...]]:
    """Return raw logits, targets and caps."""
    generator = torch.Generator().manual_seed(8)
    return [(6 * torch.randn(6, generator=generator), target, cap) for target, cap in ((2, 5.0), (0, 15.0))]


# --- 7.5: does bfloat16 cost anything? ---

FOLDER = "lab/exercise-7-5"


def judge(result: dict[str, Any]) -> tuple[bool, str]:
    """Judge a comparison of float32 and bfloat16: whether the difference is above twice the spread of the seeds."""
    rows = {row["case"]: row for row in result["rows"]}
    if not {"float32", "bfloat16"} <= set(rows):
        return False, "the cases must be named float32 and bfloat16"
    exact, rounded = rows["float32"], rows["bfloat16"]
    if exact["value"] is None or rounded["value"] is None or exact["spread"] is None or rounded["spread"] is None:
        return False, "each case must have run with at least two seeds, without diverging"
    difference, spread = rounded["value"] - exact["value"], math.hypot(exact["spread"], rounded["spread"])
    verdict = "more" if abs(difference) > 2 * spread else "no more"
    return True, (
        f"bfloat16 ends {difference:+.4f} {result['unit']} from float32: {verdict} than two standard deviations, "
        f"{2 * spread:.4f}"
    )


EXERCISES = (
    Number(
        "7.1",
        "The derivative of the loss by the logit of the target",
        answer=target_gradient,
        mistakes={
            "that is p; the derivative is p - 1 for the target": lambda: target_gradient() + 1,
            "the sign is wrong: a larger logit of the target lowers the loss": lambda: -target_gradient(),
            "that is the loss, -ln p": lambda: -math.log(target_gradient() + 1),
            "that is the derivative by the likeliest logit": lambda: math.exp(2) / (math.exp(2) + math.e + 1),
        },
    ),
    Number(
        "7.2",
        "Bytes of the logits of 8 sequences of 512 tokens, with a vocabulary of 32,768, in float32",
        answer=logits_bytes,
        unit="bytes",
        mistakes={
            "float32 has four bytes": lambda: logits_bytes(element=1),
            "that is bfloat16": lambda: logits_bytes(element=2),
            "that is one sequence": lambda: logits_bytes(tokens=512),
            "the gradient is as large, but the question is about the logits": lambda: 2 * logits_bytes(),
        },
    ),
    Write(
        "7.3",
        "Find the bug: a gradient with targets that do not count",
        LOSS_GRADIENT,
        gradient,
        {
            "in Python the index -1 is the last token: such a row is trained toward it": gradient_of_all_rows,
            "the mean is over the targets that count, not over all rows": gradient_over_all,
            "this is the gradient of the sum; divide by the number of targets that count": gradient_of_the_sum,
            "a row that does not count must have the gradient 0, not p": gradient_with_probabilities,
            "the sign is wrong: this is y - p": gradient_downward,
        },
        loss_inputs,
    ),
    Write(
        "7.4",
        "The gradient through the softcap",
        SOFTCAP_GRADIENT,
        raw_gradient,
        {
            "the slope of the softcap, 1 - (z / cap)^2, is missing": raw_gradient_without_slope,
            "the loss is computed from the raw logits; it must use the capped ones": raw_gradient_without_cap,
            "the slope is 1 - tanh^2, so it takes the capped logits": raw_gradient_of_raw,
            "there is a factor 1 / cap too many: cap and 1 / cap cancel": raw_gradient_over_cap,
            "the slope of tanh is 1 - tanh^2; the square is missing": raw_gradient_of_tanh,
        },
        softcap_inputs,
    ),
    Experiment(
        "7.5",
        "Does training in bfloat16 cost anything?",
        command='python -m nanochat_native.compare --recipe october --cases "float32:" "bfloat16: --dtype bfloat16" '
        "--rates 1 --seeds 3 "
        f"--out {FOLDER}",
        folder=FOLDER,
        judge=judge,
    ),
)
