"""Exercises of chapter 6, attention without the matrix."""

import math
from typing import Any

import torch
from torch import Tensor

from nanochat_native.exercises.base import Experiment, Number, Write
from nanochat_native.lab import memory

# --- 6.1: one step of the online softmax ---

BLOCKS = ((1.0, 2.0), (4.0, 3.0))


def online_sum(rescale: float) -> float:
    """Return the sum l after both blocks, with a factor for the sum of the first one."""
    sums = [sum(math.exp(score - max(block)) for score in block) for block in BLOCKS]
    return rescale * sums[0] + sums[1]


# --- 6.2: the bytes of all weights ---


def bytes_of_weights(layers: int = 20, heads: int = 10, length: int = 2048, size: int = 4) -> float:
    """Return the gigabytes of the weights of attention of one text."""
    return layers * heads * length**2 * size / 1e9


# --- 6.3: find the bug in the running softmax ---

RUNNING = '''def running_softmax(scores, values, size):
    """Return softmax(scores) @ values, computed block by block of `size` keys: scores (T,), values (T, D)."""
    m = torch.tensor(-torch.inf)
    total = torch.tensor(0.0)
    out = torch.zeros(values.shape[1])
    for start in range(0, len(scores), size):
        block = scores[start : start + size]
        largest = torch.maximum(m, block.max())
        weights = torch.exp(block - largest)
        total = torch.exp(m - largest) * total + weights.sum()
        out = out + weights @ values[start : start + size]
        m = largest
    return out / total
'''


def _running(scores: Tensor, values: Tensor, size: int, *, sums: bool = True, outs: bool = True) -> Tensor:
    m = torch.tensor(-torch.inf)
    total = torch.tensor(0.0)
    out = torch.zeros(values.shape[1])
    for start in range(0, len(scores), size):
        block = scores[start : start + size]
        largest = torch.maximum(m, block.max())
        shrink = torch.exp(m - largest)
        weights = torch.exp(block - largest)
        total = (shrink if sums else 1.0) * total + weights.sum()
        out = (shrink if outs else 1.0) * out + weights @ values[start : start + size]
        m = largest
    return out / total


def running_softmax(scores: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the softmax of the scores, times the values."""
    return _running(scores, values, size)


def running_without_rescaled_output(scores: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the result of the stub."""
    return _running(scores, values, size, outs=False)


def running_without_rescaled_sum(scores: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the result if only the output is rescaled."""
    return _running(scores, values, size, sums=False)


def running_without_rescaling(scores: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the result if nothing is rescaled."""
    return _running(scores, values, size, sums=False, outs=False)


def running_mean_of_blocks(scores: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the mean of the softmax of each block."""
    starts = range(0, len(scores), size)
    parts = [scores[i : i + size].softmax(-1) @ values[i : i + size] for i in starts]
    return torch.stack(parts).mean(dim=0)


def running_without_maximum(scores: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the softmax without subtracting a maximum."""
    weights = torch.exp(scores)
    return weights @ values / weights.sum()


def running_inputs() -> list[tuple[Any, ...]]:
    """Return rows of scores whose maximum comes late, and one with a huge score."""
    generator = torch.Generator().manual_seed(3)
    rising = torch.linspace(-2.0, 3.0, 12) + 0.3 * torch.randn(12, generator=generator)
    huge = torch.randn(10, generator=generator)
    huge[7] = 200.0
    return [
        (rising, torch.randn(12, 3, generator=generator), 4),
        (huge, torch.randn(10, 2, generator=generator), 3),
    ]


# --- 6.4: attention by tiles ---

TILED = '''def tiled_attention(q, k, v, size):
    """Return causal attention of q, k, v (T, D), from tiles of size x size scores.

    Skip the tiles in which every key is hidden. Never make a (T, T) matrix.
    """
    raise NotImplementedError
'''


def _tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: int,
    *,
    scale: float | None = None,
    diagonal: int = 0,
    masked: bool = True,
    totals: bool = True,
    outs: bool = True,
    past: int | None = None,
) -> Tensor:
    """Return attention by tiles, with one thing wrong.

    Args:
        scale: of the scores, by default 1 / sqrt(D).
        diagonal: how many later keys a query sees.
        masked: Whether the tiles on the diagonal are masked.
        totals: Whether the sum is rescaled.
        outs: Whether the output is rescaled.
        past: how many tiles of a row of tiles are read, the last ones; None for all.
    """
    T, D = q.shape
    out = torch.zeros_like(q)
    for i in range(0, T, size):
        rows = torch.arange(i, min(i + size, T))
        m = torch.full((len(rows), 1), -torch.inf)
        total = torch.zeros(len(rows), 1)
        sums = torch.zeros(len(rows), D)
        first = 0 if past is None else max(0, i - past * size)
        for j in range(first, min(i + size, T), size):
            keys = torch.arange(j, min(j + size, T))
            scores = q[rows] @ k[keys].T * (D**-0.5 if scale is None else scale)
            if masked:
                scores = scores.masked_fill(keys > rows[:, None] + diagonal, -torch.inf)
            largest = torch.maximum(m, scores.amax(-1, keepdim=True))
            shrink = torch.exp(m - largest).nan_to_num(1.0)
            weights = torch.exp(scores - largest).nan_to_num(0.0)
            total = (shrink if totals else 1.0) * total + weights.sum(-1, keepdim=True)
            sums = (shrink if outs else 1.0) * sums + weights @ v[keys]
            m = largest
        out[rows] = sums / total
    return out


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Return causal attention."""
    return _tiled(q, k, v, size)


def tiled_without_scale(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Return causal attention without the scale."""
    return _tiled(q, k, v, size, scale=1.0)


def tiled_with_whole_diagonal(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Return attention that masks whole tiles only."""
    return _tiled(q, k, v, size, masked=False)


def tiled_without_the_present(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Return attention to the keys j < i."""
    return _tiled(q, k, v, size, diagonal=-1)


def tiled_without_rescaling(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Return attention whose output is not rescaled."""
    return _tiled(q, k, v, size, outs=False)


def tiled_without_rescaled_sum(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Return attention whose sum is not rescaled."""
    return _tiled(q, k, v, size, totals=False)


def tiled_on_the_diagonal(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Return attention inside the tiles on the diagonal."""
    return _tiled(q, k, v, size, past=0)


def tiled_without_mask(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Return attention to every key."""
    return (q @ k.T * q.shape[-1] ** -0.5).softmax(-1) @ v


def tiled_inputs() -> list[tuple[Any, ...]]:
    """Return q, k, v and tile sizes that divide T and that do not."""
    generator = torch.Generator().manual_seed(6)
    found: list[tuple[Any, ...]] = []
    for length, width, size in ((8, 4, 2), (10, 8, 4), (5, 4, 8)):
        q, k, v = 2 * torch.randn(3, length, width, generator=generator)
        found.append((q, k, v, size))
    return found


# --- 6.5: one long row instead of eight short ones ---


def judge_length(result: dict[str, Any]) -> tuple[bool, str]:
    """Return whether the result measures one row of 2,048 tokens, and how its activations compare with eight of 256."""
    options = result["options"]
    if (options["depth"], options["device_batch_size"], options["max_seq_len"]) != (4, 1, 2048):
        return False, "the step must be that of the command: depth 4, one row of 2,048 tokens"
    if "measured" not in result:
        return False, "the step was predicted; --measure makes it"
    short = memory.Options(depth=4, device_batch_size=8, max_seq_len=256, device="cpu", measure=True)
    backward = next(found for found in memory.snapshots(short) if found.phase == "backward")
    ours, theirs = result["parts"]["activations"][1] / 2**20, backward.parts["activations"] / 2**20
    stored = 4 * 2 * 2048**2 * 4 / 2**20
    return True, (
        f"one row of 2,048 tokens keeps {ours:.1f} MiB of activations, eight of 256 keep {theirs:.1f} MiB; "
        f"stored weights of attention would add {stored:.0f} MiB"
    )


EXERCISES = (
    Number(
        "6.1",
        "The sum l after two blocks of scores",
        answer=lambda: online_sum(math.exp(2 - 4)),
        mistakes={
            "the sum of the first block must be rescaled by exp(m_old - m_new)": lambda: online_sum(1.0),
            "the factor is exp(m_old - m_new), not exp(m_new - m_old)": lambda: online_sum(math.exp(4 - 2)),
            "that is the sum of the exponentials without subtracting a maximum": lambda: (
                math.exp(4) * online_sum(math.exp(-2))
            ),
            "that is the sum of the second block alone": lambda: online_sum(0.0),
        },
    ),
    Number(
        "6.2",
        "Gigabytes of the weights of attention of a d20",
        answer=bytes_of_weights,
        unit="GB",
        mistakes={
            "that is one layer; a d20 has 20": lambda: bytes_of_weights(layers=1),
            "that is one head; a layer has 10": lambda: bytes_of_weights(heads=1),
            "a float32 has 4 bytes": lambda: bytes_of_weights(size=1),
            "the matrix is stored whole, with its hidden half": lambda: bytes_of_weights() / 2,
            "that is T scores for each query head; there are T x T": lambda: bytes_of_weights() / 2048,
        },
    ),
    Write(
        "6.3",
        "Find the bug: a softmax that forgets to rescale",
        RUNNING,
        running_softmax,
        {
            "the output is not rescaled when the maximum grows": running_without_rescaled_output,
            "the sum is not rescaled when the maximum grows": running_without_rescaled_sum,
            "neither the sum nor the output is rescaled when the maximum grows": running_without_rescaling,
            "each block has a softmax of its own; one sum must divide all": running_mean_of_blocks,
            "no maximum is subtracted: the exponential of a score of 200 overflows": running_without_maximum,
        },
        running_inputs,
    ),
    Write(
        "6.4",
        "Attention by tiles",
        TILED,
        tiled_attention,
        {
            "the scale 1/sqrt(D) is missing": tiled_without_scale,
            "the tiles on the diagonal need a mask of their own": tiled_with_whole_diagonal,
            "the mask hides the present: query i must see key i": tiled_without_the_present,
            "the output is not rescaled when the maximum grows": tiled_without_rescaling,
            "the sum is not rescaled when the maximum grows": tiled_without_rescaled_sum,
            "only the tiles on the diagonal are read": tiled_on_the_diagonal,
            "there is no mask: a query sees the future": tiled_without_mask,
        },
        tiled_inputs,
    ),
    Experiment(
        "6.5",
        "One long row instead of eight short ones",
        command="python -m nanochat_native.memory --depth 4 --device-batch-size 1 --max-seq-len 2048 --measure "
        "--out lab/exercise-6-5",
        folder="lab/exercise-6-5",
        judge=judge_length,
    ),
)
