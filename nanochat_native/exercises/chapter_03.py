"""Exercises of chapter 3, tokens."""

import itertools
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from nanochat_native.exercises.base import Experiment, Number, Write

# --- 3.1: three merges by hand ---

TEXT = "banana bandana"


def tokens_after(text: str, merges: int) -> int:
    """Return the number of tokens of two words after some merges, each of the most frequent pair.

    Merges stay within words. Among equal counts the pair that is first in the alphabet is merged.
    """
    first, second = text.split(" ")
    pieces = [list(first), list(f" {second}")]
    for _ in range(merges):
        counts = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        pieces = [merge(word, best) for word in pieces]
    return sum(map(len, pieces))


def merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Return the word with each occurrence of the pair, from left to right, as one token."""
    result: list[str] = []
    previous_is_merged = False
    for token in word:
        if result and not previous_is_merged and (result[-1], token) == pair:
            result[-1] += token
            previous_is_merged = True
        else:
            result.append(token)
            previous_is_merged = False
    return result


# --- 3.2: from nats per token to bits per byte ---

NATS, BYTES = 2.0, 4.0

# --- 3.3: find the bug in bits per byte ---

BITS_PER_BYTE = '''import math


def bits_per_byte(nats, targets, token_bytes):
    """Return the bits per byte of a text.

    nats (N,) are the losses of the targets (N,), which are ids. token_bytes (V,) is the number of bytes of each id,
    and 0 for special tokens, which are no text.
    """
    lengths = token_bytes[token_bytes > 0].float()
    return (nats.mean() / math.log(2) / lengths.mean()).item()
'''


def bits_per_byte(nats: Tensor, targets: Tensor, token_bytes: Tensor) -> float:
    """Return the bits of the targets that are text, divided by their bytes."""
    lengths = token_bytes[targets]
    return float(nats[lengths > 0].sum() / math.log(2) / lengths.sum())


def bits_over_the_vocabulary(nats: Tensor, targets: Tensor, token_bytes: Tensor) -> float:
    """Return the result of the stub."""
    return float(nats.mean() / math.log(2) / token_bytes[token_bytes > 0].float().mean())


def bits_with_special_tokens(nats: Tensor, targets: Tensor, token_bytes: Tensor) -> float:
    """Return bits per byte with the losses of special tokens."""
    return float(nats.sum() / math.log(2) / token_bytes[targets].sum())


def nats_per_byte(nats: Tensor, targets: Tensor, token_bytes: Tensor) -> float:
    """Return nats per byte."""
    return bits_per_byte(nats, targets, token_bytes) * math.log(2)


def mean_of_ratios(nats: Tensor, targets: Tensor, token_bytes: Tensor) -> float:
    """Return the mean over tokens of their bits per byte."""
    lengths = token_bytes[targets]
    return float((nats[lengths > 0] / lengths[lengths > 0]).mean() / math.log(2))


def bits_per_token(nats: Tensor, targets: Tensor, token_bytes: Tensor) -> float:
    """Return bits per token of text."""
    return float(nats[token_bytes[targets] > 0].mean() / math.log(2))


def nats_divided_by_8(nats: Tensor, targets: Tensor, token_bytes: Tensor) -> float:
    """Return nats per token / log2 256."""
    return float(nats.mean() / 8)


def bits_inputs() -> list[tuple[Any, ...]]:
    """Return losses, targets and lengths of tokens, for three texts."""
    generator = torch.Generator().manual_seed(3)
    token_bytes = torch.tensor([1, 1, 1, 2, 3, 5, 8, 0, 0])
    found: list[tuple[Any, ...]] = []
    for length in (4, 20, 50):
        targets = torch.randint(0, 9, (length,), generator=generator)
        targets[:2] = torch.tensor([6, 7])
        found.append((torch.rand(length, generator=generator) * 5 + 0.1, targets, token_bytes))
    return found


# --- 3.4: encode a word ---

ENCODE = '''def encode(word, ranks):
    """Return the ids of a word, as BPE applies its merges.

    word is bytes. ranks gives the id of each token, bytes to int; every single byte is a token. Begin with single
    bytes. While two neighbors together are a token, replace the pair whose token has the smallest id, and the leftmost
    one of several.
    """
    raise NotImplementedError
'''


def encode(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Return the ids of a word."""
    pieces = [bytes([byte]) for byte in word]
    while places := mergeable(pieces, ranks):
        i = min(places, key=lambda i: ranks[pieces[i] + pieces[i + 1]])
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return [ranks[piece] for piece in pieces]


def mergeable(pieces: list[bytes], ranks: dict[bytes, int]) -> list[int]:
    """Return the places i where the pieces i and i + 1 together are a token."""
    return [i for i in range(len(pieces) - 1) if pieces[i] + pieces[i + 1] in ranks]


def encode_longest_first(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Return the ids of the longest token at each place, from left to right."""
    ids = []
    while word:
        size = max(n for n in range(1, len(word) + 1) if word[:n] in ranks)
        ids.append(ranks[word[:size]])
        word = word[size:]
    return ids


def encode_leftmost_pair(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Return the ids after merging the leftmost pair that is a token, again and again."""
    pieces = [bytes([byte]) for byte in word]
    while places := mergeable(pieces, ranks):
        i = places[0]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return [ranks[piece] for piece in pieces]


def encode_rightmost_of_equals(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Return the ids after merging the rightmost pair with the smallest id, again and again."""
    pieces = [bytes([byte]) for byte in word]
    while places := mergeable(pieces, ranks):
        i = min(places, key=lambda i: (ranks[pieces[i] + pieces[i + 1]], -i))
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return [ranks[piece] for piece in pieces]


def encode_newest_first(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Return the ids after merging the pair with the largest id, again and again."""
    pieces = [bytes([byte]) for byte in word]
    while places := mergeable(pieces, ranks):
        i = max(places, key=lambda i: ranks[pieces[i] + pieces[i + 1]])
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return [ranks[piece] for piece in pieces]


def encode_each_merge_once(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Return the ids after each merge was applied once, in order of ids, at its leftmost place only."""
    pieces = [bytes([byte]) for byte in word]
    for token in sorted(ranks, key=ranks.__getitem__):
        for i in range(len(pieces) - 1):
            if pieces[i] + pieces[i + 1] == token:
                pieces[i : i + 2] = [token]
                break
    return [ranks[piece] for piece in pieces]


def encode_bytes(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Return the ids of the single bytes."""
    return [ranks[bytes([byte])] for byte in word]


def encode_inputs() -> list[tuple[Any, ...]]:
    """Return words, each with the tokens that some merges made."""
    tables = (
        ("banananab", (b"an", b"ban", b"ana", b"anan")),
        ("abcabcd", (b"bc", b"ab", b"abc", b"cd", b"bcd")),
        ("xyxyxy", (b"xy", b"yx", b"xyx", b"xyxy")),
        ("klmnkl", (b"lm", b"lmn", b"klmn", b"kl")),
        ("q", ()),
    )
    found: list[tuple[Any, ...]] = []
    for word, tokens in tables:
        ranks = {bytes([byte]): byte for byte in range(256)}
        ranks |= {token: 256 + i for i, token in enumerate(tokens)}
        found.append((word.encode(), ranks))
    return found


# --- 3.5: two vocabularies ---


def judge_vocabularies(result: dict[str, Any]) -> tuple[bool, str]:
    """Compare the last bits per byte of the two cases."""
    finals: dict[str, list[float]] = {}
    for run in result["runs"]:
        if run["unit"] != "bits per byte":
            return False, "the cases must be measured in bits per byte: use text, not token shards"
        finals.setdefault(run["case"], []).append(run["curve"][-1]["value"])
    if set(finals) != {"1024", "8192"}:
        return False, f"the cases must be 1024 and 8192, got {', '.join(finals)}"
    means = {case: sum(values) / len(values) for case, values in finals.items()}
    spread = max(max(values) - min(values) for values in finals.values())
    better = min(means, key=means.__getitem__)
    gap = abs(means["1024"] - means["8192"])
    return True, (
        f"the vocabulary of {better} has the lower bits per byte, {means[better]:.3f}; the other is {gap:.3f} higher, "
        f"{'more' if gap > spread else 'not more'} than the seeds differ"
    )


EXERCISES = (
    Number(
        "3.1",
        "Tokens of 'banana bandana' after three merges",
        answer=lambda: tokens_after(TEXT, 3),
        unit="tokens",
        tolerance=0.001,
        mistakes={
            "a merge replaces every occurrence of its pair, not one": lambda: len(TEXT) - 3,
            "that is after two merges": lambda: tokens_after(TEXT, 2),
            "that is after one merge": lambda: tokens_after(TEXT, 1),
            "that is after four merges": lambda: tokens_after(TEXT, 4),
        },
    ),
    Number(
        "3.2",
        "Bits per byte of 2.0 nats per token at 4.0 bytes per token",
        answer=lambda: NATS / math.log(2) / BYTES,
        unit="bits per byte",
        mistakes={
            "these are nats per byte: divide by ln 2": lambda: NATS / BYTES,
            "these are bits per token: divide by the bytes of a token": lambda: NATS / math.log(2),
            "a byte has 8 bits, but 8 is not the divisor: divide by the bytes of a token": lambda: NATS / 8,
            "1 nat is 1 / ln 2 bits: divide by ln 2, do not multiply": lambda: NATS * math.log(2) / BYTES,
        },
    ),
    Write(
        "3.3",
        "Find the bug: bits per byte",
        BITS_PER_BYTE,
        bits_per_byte,
        {
            "it divides by the mean length over the vocabulary; this text's tokens count": bits_over_the_vocabulary,
            "it counts the losses of special tokens, which have no bytes": bits_with_special_tokens,
            "these are nats per byte: divide by ln 2": nats_per_byte,
            "it is the mean of ratios: sum all bits, sum all bytes, and then divide": mean_of_ratios,
            "these are bits per token: divide by the bytes": bits_per_token,
            "it divides by 8; the bytes of the tokens count": nats_divided_by_8,
        },
        bits_inputs,
    ),
    Write(
        "3.4",
        "Encode a word",
        ENCODE,
        encode,
        {
            "it takes the longest token at each place; BPE merges in the order of ids": encode_longest_first,
            "it merges the leftmost pair; the pair with the smallest id comes first": encode_leftmost_pair,
            "it merges the rightmost of several equal pairs; merge the leftmost": encode_rightmost_of_equals,
            "it merges the pair with the largest id; the smallest comes first": encode_newest_first,
            "it applies each merge once; a pair that occurs again must be merged again": encode_each_merge_once,
            "it merges nothing": encode_bytes,
        },
        encode_inputs,
    ),
    Experiment(
        "3.5",
        "Two vocabularies",
        command=(
            'python -m nanochat_native.compare --recipe october --cases "1024: --vocab-size 1024 --num-iterations 300" '
            '"8192: --vocab-size 8192 --num-iterations 200" --rates 1 --out lab/exercise-3-5'
        ),
        folder="lab/exercise-3-5",
        judge=judge_vocabularies,
    ),
)
