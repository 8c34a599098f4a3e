"""Exercises of chapter 9, optimizers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.exercises.base import Experiment, Number, Write
from nanochat_native.lab.memory.prediction import STATE, without_memory
from nanochat_native.model import GPTConfig
from nanochat_native.ops.newton_schulz import COEFFICIENTS

D4 = GPTConfig.from_depth(4, vocab_size=8192, sequence_len=256)

# --- 9.1: a step by hand ---


def after_one_step(values: Sequence[float], coefficients: str = "quintic", *, divided: bool = True) -> float:
    """Return the smallest of singular values after one step of Newton-Schulz."""
    a, b, c = COEFFICIENTS[coefficients][0]
    s = min(values) / (math.hypot(*values) if divided else 1.0)
    return a * s + b * s**3 + c * s**5


# --- 9.2: the state of the optimizers ---


def state_mebibytes(ends: int, matrix: int) -> float:
    """Return the MiB of d4's optimizer state with so many float32 numbers for an entry of each kind."""
    model = without_memory(D4)
    embeddings = sum(p.numel() for name, p in model.named_parameters() if "transformer.h." not in name)
    return 4 * (ends * embeddings + matrix * (model.num_params() - embeddings)) / 2**20


# --- 9.3: find the bug in the momentum ---

UPDATES = '''import torch
from nanochat_native.ops import newton_schulz


def updates(gradients, mu):
    """Return Muon's update for each gradient of one matrix: a list of tensors (m, n), without rate and factor.

    With the momentum and Nesterov's form of it. newton_schulz orthogonalizes a matrix.
    """
    momentum = torch.zeros_like(gradients[0])
    found = []
    for g in gradients:
        momentum = mu * momentum + newton_schulz(g)
        found.append(momentum)
    return found
'''


def updates(gradients: list[Tensor], mu: float) -> list[Tensor]:
    """Return Muon's updates."""
    momentum, found = torch.zeros_like(gradients[0]), []
    for g in gradients:
        momentum = mu * momentum + (1 - mu) * g
        found.append(ops.newton_schulz(mu * momentum + (1 - mu) * g))
    return found


def updates_summed(gradients: list[Tensor], mu: float) -> list[Tensor]:
    """Return the updates of the stub."""
    momentum, found = torch.zeros_like(gradients[0]), []
    for g in gradients:
        momentum = mu * momentum + ops.newton_schulz(g)
        found.append(momentum)
    return found


def updates_averaged(gradients: list[Tensor], mu: float) -> list[Tensor]:
    """Return averages of orthogonalized gradients."""
    return [(1 - mu) * summed for summed in updates_summed(gradients, mu)]


def updates_without_nesterov(gradients: list[Tensor], mu: float) -> list[Tensor]:
    """Return the orthogonalized momentum."""
    momentum, found = torch.zeros_like(gradients[0]), []
    for g in gradients:
        momentum = mu * momentum + (1 - mu) * g
        found.append(ops.newton_schulz(momentum))
    return found


def updates_without_momentum(gradients: list[Tensor], mu: float) -> list[Tensor]:
    """Return the orthogonalized gradients."""
    return [ops.newton_schulz(g) for g in gradients]


def updates_not_orthogonalized(gradients: list[Tensor], mu: float) -> list[Tensor]:
    """Return the momentum itself."""
    momentum, found = torch.zeros_like(gradients[0]), []
    for g in gradients:
        momentum = mu * momentum + (1 - mu) * g
        found.append(mu * momentum + (1 - mu) * g)
    return found


def gradient_lists() -> list[tuple[list[Tensor], float]]:
    """Return lists of gradients with a momentum."""
    generator = torch.Generator().manual_seed(9)
    shapes = ((4, 4), (6, 3), (3, 5))
    return [([torch.randn(shape, generator=generator) for _ in range(4)], 0.9) for shape in shapes]


# --- 9.4: write Newton-Schulz ---

ORTHOGONALIZE = '''import torch


def orthogonalize(g, steps=5):
    """Return g (m, n) after `steps` of the quintic Newton-Schulz iteration, (3.4445, -4.7750, 2.0315).

    Divide by the Frobenius norm first. g may be tall or wide.
    """
    raise NotImplementedError
'''


def iteration(
    g: Tensor, steps: int, step: Callable[[Tensor], Tensor], *, norm: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the result of an iteration on the wide form of g."""
    x = g.mT if g.size(0) > g.size(1) else g
    x = x / (torch.linalg.matrix_norm(x) if norm is None else norm(x))
    for _ in range(steps):
        x = step(x)
    return x.mT if g.size(0) > g.size(1) else x


def quintic(x: Tensor) -> Tensor:
    """Return one step of the quintic."""
    a, b, c = COEFFICIENTS["quintic"][0]
    gram = x @ x.mT
    return a * x + (b * gram + c * gram @ gram) @ x


def cubic(x: Tensor) -> Tensor:
    """Return one step of the cubic."""
    return 1.5 * x - 0.5 * x @ x.mT @ x


def by_entries(x: Tensor) -> Tensor:
    """Return one step with powers of the entries instead of the matrix."""
    a, b, c = COEFFICIENTS["quintic"][0]
    return a * x + b * x**3 + c * x**5


def on_the_wrong_side(x: Tensor) -> Tensor:
    """Return one step that multiplies by X^T X from the left; it has a result for square matrices only."""
    a, b, c = COEFFICIENTS["quintic"][0]
    gram = x.mT @ x
    return a * x + (b * gram + c * gram @ gram) @ x


def without_fifth_power(x: Tensor) -> Tensor:
    """Return one step without its last term."""
    a, b, _ = COEFFICIENTS["quintic"][0]
    return a * x + b * x @ x.mT @ x


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Return g after some steps of the quintic."""
    return iteration(g, steps, quintic)


def orthogonalize_on_the_wrong_side(g: Tensor, steps: int = 5) -> Tensor:
    """Return g after some steps with the product on the wrong side, without a transposition."""
    x = g / torch.linalg.matrix_norm(g)
    for _ in range(steps):
        x = on_the_wrong_side(x)
    return x


def orthogonalize_cropped(g: Tensor, steps: int = 5) -> Tensor:
    """Return the leading square of g after some steps, padded with zeros."""
    side = min(g.shape)
    found = torch.zeros_like(g)
    found[:side, :side] = iteration(g[:side, :side], steps, quintic)
    return found


def matrices() -> list[tuple[Tensor, int]]:
    """Return matrices and numbers of steps."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((5, 5), (8, 3), (3, 8))
    return [
        (3 * torch.randn(shape, generator=generator), steps) for shape, steps in zip(shapes, (5, 5, 2), strict=True)
    ]


# --- 9.5: the best rate ---


def judge(result: dict[str, Any]) -> tuple[bool, str]:
    """Tell whether a rate below Muon's is the best for the momentum that comes after, and by how much."""
    rows = {row["case"]: row for row in result["rows"]}
    values = {float(case): row["value"] for case, row in rows.items() if row["value"] is not None}
    if not result["finished"]:
        return False, "the comparison is not finished: give the same command again"
    best = min(values, key=values.__getitem__)
    gain = values[0.02] - values[best]
    spread = max(row["spread"] or 0.0 for row in rows.values())
    text = f"the best rate is {best:g}, {gain:.3f} bits per byte below 0.02; the largest spread is {spread:.3f}"
    return best < 0.02, text


EXERCISES = (
    Number(
        "9.1",
        "The smaller singular value after one quintic step",
        answer=lambda: after_one_step((0.1, 0.5)),
        mistakes={
            "the matrix was not divided by its Frobenius norm": lambda: after_one_step((0.1, 0.5), divided=False),
            "this is the cubic, 1.5 s - 0.5 s^3": lambda: after_one_step((0.1, 0.5), "cubic"),
            "this is the larger one": lambda: -after_one_step((-0.5, 0.1)),
        },
    ),
    Number(
        "9.2",
        "The optimizer state of d4",
        answer=lambda: state_mebibytes(*STATE["hybrid"]),
        unit="MiB",
        mistakes={
            "Muon keeps one number for each entry, not two": lambda: state_mebibytes(2, 2),
            "AdamW keeps two numbers for each entry of wte and lm_head": lambda: state_mebibytes(1, 1),
            "the embeddings have state too": lambda: state_mebibytes(0, 1),
            "a mebibyte is 2^20 bytes": lambda: state_mebibytes(*STATE["hybrid"]) * 2**20 / 1e6,
            "the state is in float32, four bytes a number": lambda: state_mebibytes(*STATE["hybrid"]) / 2,
        },
    ),
    Write(
        "9.3",
        "Find the bug: momentum",
        stub=UPDATES,
        right=updates,
        wrong={
            "the momentum sums orthogonalized gradients: its step is up to 1 / (1 - mu) times too long": updates_summed,
            "the momentum averages orthogonalized gradients: an average of orthogonal matrices is not "
            "orthogonal": updates_averaged,
            "the current gradient is not mixed in again: there is no Nesterov step": updates_without_nesterov,
            "there is no momentum": updates_without_momentum,
            "the momentum is not orthogonalized": updates_not_orthogonalized,
        },
        inputs=gradient_lists,
    ),
    Write(
        "9.4",
        "Newton-Schulz",
        stub=ORTHOGONALIZE,
        right=orthogonalize,
        wrong={
            "this is the cubic": lambda g, steps=5: iteration(g, steps, cubic),
            "the powers are those of the entries; they must be products of matrices": lambda g, steps=5: iteration(
                g, steps, by_entries
            ),
            "the fifth power is missing": lambda g, steps=5: iteration(g, steps, without_fifth_power),
            "the matrix is divided by its largest singular value": lambda g, steps=5: iteration(
                g, steps, quintic, norm=lambda x: torch.linalg.matrix_norm(x, 2)
            ),
            "X^T X multiplies X from the left; it belongs to the right of X": orthogonalize_on_the_wrong_side,
            "there is one step too few": lambda g, steps=5: iteration(g, steps - 1, quintic),
            "a rectangle is cropped to a square": orthogonalize_cropped,
        },
        inputs=matrices,
        tolerance=1e-3,
    ),
    Experiment(
        "9.5",
        "The rate of a momentum that comes after",
        command='python -m nanochat_native.compare --recipe october --cases "0.02: --muon-form momentum_after" '
        '"0.006: --muon-form momentum_after --matrix-lr 0.006" "0.002: --muon-form momentum_after --matrix-lr 0.002" '
        "--rates 1 --out lab/exercise-9-5",
        folder="lab/exercise-9-5",
        judge=judge,
    ),
)
