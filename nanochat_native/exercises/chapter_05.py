"""Exercises of chapter 5, attention."""

import math
from typing import Any

import torch
from torch import Tensor

from nanochat_native.exercises.base import Experiment, Number, Write
from nanochat_native.model import GPTConfig
from nanochat_native.ops.attention import attention_mask

D4 = GPTConfig.from_depth(4, vocab_size=8192, sequence_len=256)

# --- 5.1: the slowest pair of RoPE ---


def slowest_frequency() -> float:
    """Return the angle by which the slowest pair of d4 turns from one position to the next, in radians."""
    return float(D4.rotary_base ** -((D4.head_dim - 2) / D4.head_dim))


def slowest_turn() -> float:
    """Return after how many tokens the slowest pair of d4 has turned once."""
    return 2 * math.pi / slowest_frequency()


# --- 5.2: the scores of an S layer ---


def visible(window: int | None, *, causal: bool = True) -> int:
    """Return how many pairs of a query and a key a layer with 256 positions uses."""
    return int(attention_mask(256, 256, causal, window).sum())


# --- 5.3: find the bug in the rotation ---

ROTATE = '''def rotate(x, cos, sin):
    """Turn each pair (x[..., i], x[..., i + D/2]) clockwise by an angle: x (T, D), cos and sin (T, D/2).

    A rotation keeps lengths, and the product of two rotated vectors depends on the distance of their positions.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos + x1 * sin), dim=-1)
'''


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x turned as the model turns it."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def rotate_without_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the result of the stub."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos + x1 * sin), dim=-1)


def rotate_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x turned the other way."""
    return rotate(x, cos, -sin)


def rotate_neighbors(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with the pairs (0, 1), (2, 3) ... turned."""
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).flatten(-2)


def rotate_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x turned, with the halves of the result exchanged."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x2 * cos - x1 * sin, x1 * cos + x2 * sin), dim=-1)


def rotation_inputs() -> list[tuple[Any, ...]]:
    """Return x, cos and sin for 1 and 6 positions."""
    generator = torch.Generator().manual_seed(5)
    found: list[tuple[Any, ...]] = []
    for positions, size in ((1, 4), (6, 8)):
        angles = torch.outer(torch.arange(1.0, positions + 1), 10.0 ** -torch.arange(size // 2))
        found.append((torch.randn(positions, size, generator=generator), angles.cos(), angles.sin()))
    return found


# --- 5.4: causal attention ---

ATTENTION = '''def attention(q, k, v):
    """Return softmax(q k^T / sqrt(D) + mask) v for q, k, v (T, D).

    Query i sees the keys 0 ... i. Build the mask yourself; torch.softmax is allowed.
    """
    raise NotImplementedError
'''


def _attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float, dim: int = -1) -> Tensor:
    scores = (q @ k.T * scale).masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, dim) @ v


def _later(q: Tensor, diagonal: int = 1) -> Tensor:
    """Return a mask of the keys j >= i + diagonal."""
    return torch.ones(len(q), len(q), dtype=torch.bool).triu(diagonal)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention."""
    return _attention(q, k, v, _later(q), q.shape[-1] ** -0.5)


def attention_without_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention of scores that are not scaled."""
    return _attention(q, k, v, _later(q), 1.0)


def attention_scaled_by_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention of scores divided by D."""
    return _attention(q, k, v, _later(q), 1 / q.shape[-1])


def attention_without_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention to every key."""
    return _attention(q, k, v, torch.zeros_like(_later(q)), q.shape[-1] ** -0.5)


def attention_to_the_future(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention with the mask of the original guide: it hides the keys j <= i."""
    return _attention(q, k, v, ~_later(q), q.shape[-1] ** -0.5)


def attention_from_the_present(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention to the keys j >= i."""
    return _attention(q, k, v, _later(q, 0).T & ~torch.eye(len(q), dtype=torch.bool), q.shape[-1] ** -0.5)


def attention_without_the_present(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention to the keys j < i."""
    return _attention(q, k, v, _later(q, 0), q.shape[-1] ** -0.5)


def attention_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention with weights that add up to 1 over the queries."""
    return _attention(q, k, v, _later(q), q.shape[-1] ** -0.5, dim=0)


def attention_multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention with scores of hidden keys of 0 instead of minus infinity."""
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(_later(q), 0.0)
    return torch.softmax(scores, -1) @ v


def attention_inputs() -> list[tuple[Any, ...]]:
    """Return q, k and v for several sizes."""
    generator = torch.Generator().manual_seed(4)
    sizes = ((5, 8), (3, 16), (7, 4))
    return [tuple(torch.randn(3, *size, generator=generator).unbind()) for size in sizes]


# --- 5.5: what one key head costs ---


def judge_heads(result: dict[str, Any]) -> tuple[bool, str]:
    """Return whether both cases were trained with several seeds, and how far apart they are."""
    rows = {row["case"]: row for row in result["rows"]}
    four, one = rows["4 key heads"], rows["1 key head"]
    if not result["finished"] or min(four["seeds"], one["seeds"]) < 2:
        return False, "the comparison is not finished, or it has one seed, which shows no spread"
    difference = one["value"] - four["value"]
    spread = math.hypot(four["spread"], one["spread"])
    text = (
        f"one key head differs by {difference:+.4f} bits per byte, and the spread of such a difference is {spread:.4f}"
    )
    if abs(difference) < 2 * spread:
        return True, f"{text}: these runs cannot tell the two apart"
    return True, f"{text}: one key head is {'worse' if difference > 0 else 'better'}"


EXERCISES = (
    Number(
        "5.1",
        "Tokens until the slowest pair of RoPE in d4 has turned once",
        answer=slowest_turn,
        unit="tokens",
        mistakes={
            "that is one radian; a turn is 2 pi": lambda: 1 / slowest_frequency(),
            "the last exponent is (D - 2) / D, less than 1": lambda: 2 * math.pi * D4.rotary_base,
            "that is the fastest pair": lambda: 2 * math.pi,
        },
    ),
    Number(
        "5.2",
        "Pairs of a query and a key that an S layer uses at 256 positions",
        answer=lambda: visible(64),
        unit="pairs",
        tolerance=0.001,
        mistakes={
            "that is an L layer: the window is missing": lambda: visible(None),
            "a query sees its own key and 64 earlier ones, 65 in all": lambda: visible(63),
            "the first queries see fewer keys": lambda: 256 * 65,
            "the first queries see fewer keys, and a query sees its own key too": lambda: 256 * 64,
        },
    ),
    Write(
        "5.3",
        "Find the bug: a rotation that changes lengths",
        ROTATE,
        rotate,
        {
            "the sign of x1 sin is wrong: this is no rotation, it changes lengths": rotate_without_sign,
            "it turns the other way than the model does": rotate_backwards,
            "it pairs neighbors, x[2 i] with x[2 i + 1]; the model pairs x[i] with x[i + D/2]": rotate_neighbors,
            "the halves of the result are exchanged": rotate_swapped,
        },
        rotation_inputs,
    ),
    Write(
        "5.4",
        "Causal attention",
        ATTENTION,
        attention,
        {
            "the scale 1/sqrt(D) is missing": attention_without_scale,
            "the scale is 1/D; it must be 1/sqrt(D)": attention_scaled_by_size,
            "there is no mask: a query sees the future": attention_without_mask,
            "the mask is inverted: it hides the keys j <= i and shows the future": attention_to_the_future,
            "the mask shows the future: it hides the keys j < i": attention_from_the_present,
            "the mask hides the present: query i must see key i": attention_without_the_present,
            "the softmax runs over the queries; it must run over the keys": attention_over_queries,
            "hidden scores are 0; they must be minus infinity": attention_multiplied,
        },
        attention_inputs,
    ),
    Experiment(
        "5.5",
        "What one key head costs",
        command='python -m nanochat_native.compare --recipe october --cases "4 key heads:" "1 key head: --n-kv-head 1" '
        "--head-dim 32 "
        "--num-iterations 150 --seeds 3 --rates 1 --out lab/exercise-5-5",
        folder="lab/exercise-5-5",
        judge=judge_heads,
    ),
)
