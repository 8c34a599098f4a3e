"""Exercises of chapter 12, speed."""

from typing import Any

import torch
from torch import Tensor

from nanochat_native.demonstrations.speed import swizzled as swizzled_by_width
from nanochat_native.exercises.base import Number, Write

# --- 12.1: the least time of a token ---

WIDTH, DEPTH, VOCABULARY = 384, 6, 8192
GBYTES = 75.0  # in a second
MATRICES, HEAD = DEPTH * 12 * WIDTH**2, VOCABULARY * WIDTH


def token_time(parameters: int, element: int = 4) -> float:
    """Return the milliseconds in which these parameters are read once."""
    return parameters * element / (GBYTES * 1e9) * 1e3


# --- 12.2: the length at which attention costs as much as the products with weights ---

D12 = 12 * 64


def equal_length(scores_per_token: float) -> float:
    """Return T with 24 d^2 = scores_per_token d T for a d12."""
    return 24 * D12 / scores_per_token


# --- 12.3: find the bug in the swizzle ---

SWIZZLE = '''def swizzled(address):
    """Return where the byte at this address lies in shared memory with the 128-byte swizzle.

    A row has 128 bytes, 8 chunks of 16 bytes. The number of the chunk (bits 4 to 6) is combined with the number of the
    row (bits 7 to 9) by an exclusive or. The row and the place within the chunk stay.
    """
    return address ^ ((address >> 8 & 7) << 4)
'''


def swizzled(address: int) -> int:
    """Return the swizzled address."""
    return swizzled_by_width(address, 128)


def swizzled_by_pairs(address: int) -> int:
    """Return the result of the stub."""
    return address ^ ((address >> 8 & 7) << 4)


def swizzled_within_chunks(address: int) -> int:
    """Return the result if the row changes bits 3 to 5."""
    return address ^ ((address >> 7 & 7) << 3)


def swizzled_by_sum(address: int) -> int:
    """Return the result of a sum in place of the exclusive or."""
    return address + ((address >> 7 & 7) << 4)


def swizzled_four_chunks(address: int) -> int:
    """Return the result of the 64-byte swizzle."""
    return swizzled_by_width(address, 64)


# --- 12.4: the Gram form ---

GRAM = '''def newton_schulz(x, triples):
    """Return x after one step for each (a, b, c) of triples: G = x^T x, x becomes x (a I + b G + c G^2).

    x is (L, R) with R much smaller than L. Multiply x only twice: once for the first G, and once at the end, by the
    product of all factors. The G of the next step follows from G and the factor F of this step: it is F G F.
    """
    raise NotImplementedError
'''


def _gram(x: Tensor, triples: list[tuple[float, float, float]], *, new: str = "F G F", identity: bool = True) -> Tensor:
    eye = torch.eye(x.size(1), dtype=x.dtype)
    gram, product = x.T @ x, torch.eye(x.size(1), dtype=x.dtype)
    for a, b, c in triples:
        factor = (a * eye if identity else a) + b * gram + c * gram @ gram
        product = product @ factor
        gram = {"F G F": factor @ gram @ factor, "F G": factor @ gram, "G": gram}[new]
    return x @ product


def newton_schulz(x: Tensor, triples: list[tuple[float, float, float]]) -> Tensor:
    """Return x after the steps, by the Gram form."""
    return _gram(x, triples)


def newton_schulz_same_gram(x: Tensor, triples: list[tuple[float, float, float]]) -> Tensor:
    """Return the result if G is never renewed."""
    return _gram(x, triples, new="G")


def newton_schulz_one_side(x: Tensor, triples: list[tuple[float, float, float]]) -> Tensor:
    """Return the result if G becomes F G."""
    return _gram(x, triples, new="F G")


def newton_schulz_without_identity(x: Tensor, triples: list[tuple[float, float, float]]) -> Tensor:
    """Return the result if a is added to every element."""
    return _gram(x, triples, identity=False)


def newton_schulz_last_factor(x: Tensor, triples: list[tuple[float, float, float]]) -> Tensor:
    """Return the result of the last step's factor alone."""
    eye, gram = torch.eye(x.size(1), dtype=x.dtype), x.T @ x
    factor = eye
    for a, b, c in triples:
        factor = a * eye + b * gram + c * gram @ gram
        gram = factor @ gram @ factor
    return x @ factor


def gram_inputs() -> list[tuple[Any, ...]]:
    """Return two matrices in float64, with one step and with three."""
    generator = torch.Generator().manual_seed(12)
    triple = (3.4445, -4.7750, 2.0315)
    found: list[tuple[Any, ...]] = []
    for shape, count in (((6, 3), 1), ((12, 3), 3)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        found.append((x / x.norm(), [triple] * count))
    return found


# --- 12.5: bank conflicts ---

CONFLICTS = '''def reads(addresses):
    """Return how many reads of shared memory 8 lanes need, each for 16 bytes at its address, a multiple of 16.

    There are 32 banks of 4 bytes: byte a lies in bank a // 4 % 32. A read serves any number of lanes with the same
    address, and lanes with different addresses if their banks differ.
    """
    raise NotImplementedError
'''


def reads(addresses: list[int]) -> int:
    """Return the number of reads."""
    groups: dict[int, set[int]] = {}
    for address in addresses:
        groups.setdefault(address % 128, set()).add(address)
    return max(map(len, groups.values()))


def reads_without_sharing(addresses: list[int]) -> int:
    """Return the result if lanes with the same address are served one after another."""
    groups = [address % 128 for address in addresses]
    return max(groups.count(group) for group in groups)


def reads_of_groups(addresses: list[int]) -> int:
    """Return the number of different groups of banks."""
    return len({address % 128 for address in addresses})


def reads_of_addresses(addresses: list[int]) -> int:
    """Return the number of different addresses."""
    return len(set(addresses))


def conflict_inputs() -> list[tuple[Any, ...]]:
    """Return a row, a column, a swizzled column, one address, and mixtures."""
    row, column = [16 * i for i in range(8)], [128 * i + 32 for i in range(8)]
    mixed, pairs = [0, 0, 128, 16, 32, 32, 160, 48], [0, 128, 16, 144, 32, 160, 48, 176]
    return [(row,), (column,), ([swizzled(address) for address in column],), ([64] * 8,), (mixed,), (pairs,)]


EXERCISES = (
    Number(
        "12.1",
        "The least time of a token of a d6",
        answer=lambda: token_time(MATRICES + HEAD),
        unit="ms",
        mistakes={
            "lm_head is read too": lambda: token_time(MATRICES),
            "of wte only one row is read": lambda: token_time(MATRICES + 2 * HEAD),
            "the weights are float32, 4 bytes": lambda: token_time(MATRICES + HEAD, 2),
        },
    ),
    Number(
        "12.2",
        "The length at which attention and products are equal in a causal d12",
        answer=lambda: equal_length(2),
        unit="tokens",
        mistakes={
            "that is the length if all scores are computed; half of them are hidden": lambda: equal_length(4),
            "that is T = d; compare 24 d^2 with 2 d T": lambda: float(D12),
            "hidden scores make attention cheaper, so the length grows": lambda: equal_length(8),
        },
    ),
    Write(
        "12.3",
        "The swizzle",
        stub=SWIZZLE,
        right=swizzled,
        wrong={
            "rows 0 and 1 are not told apart: the row begins at bit 7": swizzled_by_pairs,
            "the place within a chunk changes: the chunk begins at bit 4": swizzled_within_chunks,
            "a sum leaves the row: it must be an exclusive or": swizzled_by_sum,
            "only four of the eight chunks of a row are exchanged: that is the 64-byte swizzle": swizzled_four_chunks,
        },
        inputs=lambda: [(address,) for address in (0, 5, 128, 144, 1023, 896, 1024 + 640)],
    ),
    Write(
        "12.4",
        "Newton-Schulz on the small side",
        stub=GRAM,
        right=newton_schulz,
        wrong={
            "the G of the first step is used in all steps": newton_schulz_same_gram,
            "the new G is F G F: the factor stands on both sides, because G = x^T x": newton_schulz_one_side,
            "a belongs on the diagonal only: a I": newton_schulz_without_identity,
            "x is multiplied by the last factor only, not by the product of all": newton_schulz_last_factor,
        },
        inputs=gram_inputs,
    ),
    Write(
        "12.5",
        "Reads of shared memory",
        stub=CONFLICTS,
        right=reads,
        wrong={
            "lanes with the same address are served by one read": reads_without_sharing,
            "that is how many groups of banks are used; count the addresses in one group": reads_of_groups,
            "different addresses in different banks are served by one read": reads_of_addresses,
        },
        inputs=conflict_inputs,
    ),
)
