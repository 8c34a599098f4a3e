"""Exercises of chapter 2, the mathematics."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat_native.exercises.base import Number, Write

# --- 2.1: a cross-entropy ---

EQUAL = (0.25, 0.25, 0.25, 0.25)
BELIEVED = (0.5, 0.25, 0.125, 0.125)


def cross_entropy(p: tuple[float, ...], q: tuple[float, ...], log: Callable[[float], float] = math.log2) -> float:
    """Return -sum p log q."""
    return -sum(a * log(b) for a, b in zip(p, q, strict=True))


# --- 2.2: the output layer ---

TOKENS, WIDTH, VOCABULARY = 2048, 256, 8192


def output_layer(products: int, operations: int = 2) -> float:
    """Return the GFLOP of this many products of d4's output layer."""
    return products * operations * TOKENS * WIDTH * VOCABULARY / 1e9


# --- 2.3: find the bug in the softmax ---

SOFTMAX = '''def softmax(z):
    """Return the softmax of each row of z (N, V)."""
    powers = (z - z.max()).exp()
    return powers / powers.sum(dim=-1, keepdim=True)
'''


def softmax(z: Tensor) -> Tensor:
    """Return the softmax of each row, with the maximum of the row subtracted."""
    powers = (z - z.max(dim=-1, keepdim=True).values).exp()
    return powers / powers.sum(dim=-1, keepdim=True)


def softmax_by_the_largest_of_all(z: Tensor) -> Tensor:
    """Return the result of the stub."""
    powers = (z - z.max()).exp()
    return powers / powers.sum(dim=-1, keepdim=True)


def softmax_without_maximum(z: Tensor) -> Tensor:
    """Return the softmax of each row by the formula."""
    powers = z.exp()
    return powers / powers.sum(dim=-1, keepdim=True)


def softmax_of_columns(z: Tensor) -> Tensor:
    """Return the softmax of each column."""
    return torch.softmax(z, dim=0)


def softmax_of_all(z: Tensor) -> Tensor:
    """Return probabilities whose sum over all rows is 1."""
    powers = (z - z.max()).exp()
    return powers / powers.sum()


def softmax_by_the_minimum(z: Tensor) -> Tensor:
    """Return the softmax of each row, with the minimum of the row subtracted."""
    powers = (z - z.min(dim=-1, keepdim=True).values).exp()
    return powers / powers.sum(dim=-1, keepdim=True)


def logits() -> list[tuple[Any, ...]]:
    """Return moderate logits, rows that are far apart, and a row with a wide range."""
    moderate = torch.randn(3, 5, generator=torch.Generator().manual_seed(23))
    return [(moderate,), (torch.tensor([[1000.0, 999.0], [0.0, -1.0]]),), (torch.tensor([[200.0, 0.0], [3.0, 4.0]]),)]


# --- 2.4: the orthogonal factor ---

ORTHOGONALIZE = '''def orthogonalize(a):
    """Return U V^T for the singular value decomposition a = U S V^T. a has any shape (m, n)."""
    raise NotImplementedError
'''


def orthogonalize(a: Tensor) -> Tensor:
    """Return the orthogonal factor."""
    u, _, vt = torch.linalg.svd(a, full_matrices=False)
    return u @ vt


def with_v(a: Tensor) -> Tensor:
    """Return U times V^T transposed."""
    u, _, vt = torch.linalg.svd(a, full_matrices=False)
    return u @ vt.T


def divided_by_frobenius(a: Tensor) -> Tensor:
    """Return the matrix by its Frobenius norm."""
    return a / torch.linalg.matrix_norm(a)


def divided_by_spectral(a: Tensor) -> Tensor:
    """Return the matrix by its largest singular value."""
    return a / torch.linalg.matrix_norm(a, 2)


def with_stretch(a: Tensor) -> Tensor:
    """Return U S V^T."""
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    return u @ torch.diag(s) @ vt


def orthogonal_columns(a: Tensor) -> Tensor:
    """Return the orthogonal factor of the QR decomposition."""
    return torch.linalg.qr(a).Q


def matrices() -> list[tuple[Any, ...]]:
    """Return a square, a tall and a wide matrix."""
    generator = torch.Generator().manual_seed(24)
    return [(torch.randn(shape, generator=generator),) for shape in ((4, 4), (6, 3), (3, 5))]


# --- 2.5: a derivative by differences ---

DERIVATIVE = '''def derivative(f, x):
    """Return the derivative of f at x to eight digits, by two calls of f. f takes and returns a float."""
    raise NotImplementedError
'''

Function = Callable[[float], float]


def derivative(f: Function, x: float) -> float:
    """Return the central difference with a step of 1e-5, relative to x."""
    h = 1e-5 * max(1.0, abs(x))
    return (f(x + h) - f(x - h)) / (2 * h)


def one_sided(f: Function, x: float) -> float:
    """Return the difference to one side."""
    h = 1e-5
    return (f(x + h) - f(x)) / h


def with_a_tiny_step(f: Function, x: float) -> float:
    """Return the central difference with a step of 1e-12."""
    h = 1e-12
    return (f(x + h) - f(x - h)) / (2 * h)


def with_a_large_step(f: Function, x: float) -> float:
    """Return the central difference with a step of 0.01."""
    h = 1e-2
    return (f(x + h) - f(x - h)) / (2 * h)


def without_two(f: Function, x: float) -> float:
    """Return the central difference by h."""
    h = 1e-5
    return (f(x + h) - f(x - h)) / h


def cube(x: float) -> float:
    """Return x^3."""
    return x**3


def functions() -> list[tuple[Any, ...]]:
    """Return functions and places."""
    return [(math.sin, 1.0), (math.exp, 0.5), (cube, 100.0)]


EXERCISES = (
    Number(
        "2.1",
        "A cross-entropy",
        answer=lambda: cross_entropy(EQUAL, BELIEVED),
        unit="bits",
        mistakes={
            "this is H(q, p): the logarithm is of the model's probabilities": lambda: cross_entropy(BELIEVED, EQUAL),
            "this is the entropy of q: weigh by the true probabilities": lambda: cross_entropy(BELIEVED, BELIEVED),
            "these are nats: use the logarithm to base 2": lambda: cross_entropy(EQUAL, BELIEVED, math.log),
        },
    ),
    Number(
        "2.2",
        "The cost of the output layer",
        answer=lambda: output_layer(3),
        unit="GFLOP",
        mistakes={
            "this is the forward pass alone": lambda: output_layer(1),
            "a multiplication and an addition are two operations": lambda: output_layer(3, operations=1),
            "the backward pass has a product for each of the two factors": lambda: output_layer(2),
        },
    ),
    Write(
        "2.3",
        "Softmax",
        stub=SOFTMAX,
        right=softmax,
        wrong={
            "the maximum is that of all rows: a row far below it becomes 0 / 0": softmax_by_the_largest_of_all,
            "no maximum is subtracted: exp overflows": softmax_without_maximum,
            "this is the softmax of each column": softmax_of_columns,
            "all rows together have the sum 1, not each row": softmax_of_all,
            "less than the maximum is subtracted: exponents are positive and overflow": softmax_by_the_minimum,
        },
        inputs=logits,
    ),
    Write(
        "2.4",
        "The orthogonal factor",
        stub=ORTHOGONALIZE,
        right=orthogonalize,
        wrong={
            "torch.linalg.svd returns V^T already: do not transpose it": with_v,
            "this divides by the Frobenius norm: the singular values still differ": divided_by_frobenius,
            "this divides by the largest singular value: the others are still below 1": divided_by_spectral,
            "this is the matrix itself: leave out the singular values": with_stretch,
            "this is Q of a QR decomposition: orthogonal, but not the nearest such matrix": orthogonal_columns,
        },
        inputs=matrices,
        tolerance=1e-3,
    ),
    Write(
        "2.5",
        "A derivative by differences",
        stub=DERIVATIVE,
        right=derivative,
        wrong={
            "this difference has one side: its error falls only like h": one_sided,
            "the step of 1e-12 is so small that rounding decides": with_a_tiny_step,
            "the step of 0.01 is too large": with_a_large_step,
            "the distance of the two places is 2 h": without_two,
        },
        inputs=functions,
        tolerance=1e-8,
    ),
)
