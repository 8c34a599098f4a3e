"""Demonstrations of chapter 6: the online softmax, tiles, the memory of attention, its backward pass, and its time."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.bench import measure
from nanochat_native.lab.memory.allocations import Allocations
from nanochat_native.ops import reference
from nanochat_native.ops.attention import attention_mask

WALK = 8  # queries and keys of the widget's example
# Of the kernel, csrc/cpu/attention_forward.cpp:
STRIP, KEY_BLOCK = 6, 512  # queries and keys whose scores are held


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def example_scores() -> list[list[float]]:
    """Return the scores of the guide's example of a tile walk: whole tenths from -2 to 2."""
    return [[((7 * i * i + 11 * j + 3 * i * j) % 41) / 10 - 2 for j in range(WALK)] for i in range(WALK)]


def running_softmax(scores: Tensor, values: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the maximum m, the sum l and the output o of a row of scores, after each block of `size` keys.

    Milakov and Gimelshein, 2018, arXiv:1805.02867. o / l is the softmax of the keys so far, times the values.
    """
    m = torch.tensor(-torch.inf, dtype=scores.dtype)
    total = torch.zeros((), dtype=scores.dtype)
    out = torch.zeros_like(values[0])
    for start in range(0, len(scores), size):
        block = scores[start : start + size]
        largest = torch.maximum(m, block.max())
        shrink = torch.exp(m - largest)
        weights = torch.exp(block - largest)
        total = shrink * total + weights.sum()
        out = shrink * out + weights @ values[start : start + size]
        m = largest
        yield m, total, out


def online_softmax() -> dict[str, Any]:
    """Compute rows of a softmax block by block, and compare with the softmax of the whole row.

    walk: row 4 of the example with tiles of 2 keys; value j is j + 1. random: 1,000 scores in blocks of
    64, in float64. huge: one score of 800 among ordinary ones, in float32. drops: how often the maximum of a
    random row grew after the first block, which is when the sum is rescaled.
    """
    row = 4
    scores = torch.tensor(example_scores()[row][: row + 1], dtype=torch.float64)
    values = torch.arange(1.0, row + 2, dtype=torch.float64)[:, None]
    walk = [
        {"m": float(m), "l": float(total), "o": float(out[0]), "o_over_l": float(out[0] / total)}
        for m, total, out in running_softmax(scores, values, 2)
    ]
    worst, drops = 0.0, []
    random = 5 * normal(200, 1000, seed=1, dtype=torch.float64)
    targets = normal(1000, 16, seed=2, dtype=torch.float64)
    for one in random:
        steps = list(running_softmax(one, targets, 64))
        worst = max(worst, float((steps[-1][2] / steps[-1][1] - one.softmax(-1) @ targets).abs().max()))
        maxima = [float(m) for m, _, _ in steps]
        drops.append(sum(after > before for before, after in itertools.pairwise(maxima)))
    steps = list(running_softmax(random[0], targets, 64))
    huge = normal(100, seed=3)
    huge[40] = 800.0
    narrow = targets[:100].float()
    *_, (_, total, out) = running_softmax(huge, narrow, 10)
    naive = torch.exp(huge) @ narrow / torch.exp(huge).sum()
    return {
        "row": row,
        "scores": scores.tolist(),
        "walk": walk,
        "direct": float(scores.softmax(-1) @ values[:, 0]),
        "random": {"rows": 200, "keys": 1000, "largest_difference": worst, "mean_drops": sum(drops) / len(drops)},
        "running": {
            "keys": [*range(64, 1001, 64), 1000],
            "m": [float(m) for m, _, _ in steps],
            "l": [float(total) for _, total, _ in steps],
        },
        "huge": {
            "score": 800.0,
            "nan_without_the_maximum": int(naive.isnan().sum()),
            "of": len(naive),
            "nan_online": int((out / total).isnan().sum()),
            "difference_online": float((out / total - huge.softmax(-1) @ narrow).abs().max()),
            "largest_exponent_of_float32": math.log(torch.finfo(torch.float32).max),
            "largest_exponent_of_float16": math.log(torch.finfo(torch.float16).max),
        },
    }


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, *, skip: bool) -> tuple[Tensor, Tensor]:
    """Return causal attention of q, k, v (H, T, D) and the log-sum-exp of the scores (H, T), tile by tile.

    The method is that of FlashAttention, Dao et al., 2022, arXiv:2205.14135. skip: leave out the tiles above the
    diagonal, which are hidden whole.
    """
    H, T, D = q.shape
    out, lse = torch.empty_like(q), q.new_empty(H, T)
    for i in range(0, T, rows):
        tile = q[:, i : i + rows] * D**-0.5
        positions = torch.arange(i, min(i + rows, T))
        m = q.new_full((H, len(positions), 1), -torch.inf)
        total = q.new_zeros(H, len(positions), 1)
        sums = q.new_zeros(H, len(positions), D)
        for j in range(0, min(i + rows, T) if skip else T, columns):
            keys = torch.arange(j, min(j + columns, T))
            scores = tile @ k[:, j : j + columns].mT
            if not skip or keys[-1] > i:
                scores = scores.masked_fill(keys > positions[:, None], -torch.inf)
            largest = torch.maximum(m, scores.amax(dim=-1, keepdim=True))
            shrink = torch.exp(m - largest)
            weights = torch.exp(scores - largest)
            total = shrink * total + weights.sum(dim=-1, keepdim=True)
            sums = shrink * sums + weights @ v[:, j : j + columns]
            m = largest
        out[:, i : i + rows] = sums / total
        lse[:, i : i + rows] = (m + total.log())[..., 0]
    return out, lse


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention of q, k, v (H, T, D) by way of the matrix of scores."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v


def attention_tiles() -> dict[str, Any]:
    """Compute attention tile by tile for several tiles, and compare with the matrix and with the kernel, in float32.

    share: the scores that are computed if hidden tiles are skipped, divided by all of the matrix.
    """
    H, T, D = 2, 768, 64
    q, k, v = normal(3, H, T, D, seed=4).unbind()
    batched = [x.transpose(0, 1)[None] for x in (q, k, v)]
    whole, expected = (x[0] for x in reference.attention_forward(*batched))
    whole = whole.transpose(0, 1)
    kernel = ops.attention(*batched)[0].transpose(0, 1)
    found = []
    for rows, columns in ((16, 16), (96, 64), (96, 512), (768, 768)):
        out, lse = tiled_attention(q, k, v, rows, columns, skip=True)
        done = sum(
            (min(i + rows, T) - i) * (min(j + columns, T) - j)
            for i in range(0, T, rows)
            for j in range(0, min(i + rows, T), columns)
        )
        found.append(
            {
                "rows": rows,
                "columns": columns,
                "difference": float((out - whole).abs().max()),
                "difference_of_lse": float((lse - expected).abs().max()),
                "share": done / T**2,
            }
        )
    return {
        "T": T,
        "tiles": found,
        "largest_difference": max(row["difference"] for row in found),
        "kernel_difference": float((kernel - whole).abs().max()),
        "bytes_of_all_scores_of_a_head": 4 * T**2,
        "bytes_of_a_tile_of_scores": 4 * 96 * 64,
    }


def attention_backward() -> dict[str, Any]:
    """Compute the gradients of attention from q, k, v, the output and the log-sum-exp, without saved weights.

    The formulas are those of FlashAttention-2, Dao, 2023, arXiv:2307.08691, in float64, compared with autograd through
    the matrix of scores. products: matrix products of T x T x D with saved weights and with weights computed again.
    """
    T, D = 96, 32
    q, k, v, dout = normal(4, T, D, seed=5, dtype=torch.float64).unbind()
    hidden = ~attention_mask(T, T, True, None)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.T * D**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(attend(*inputs), inputs, dout)
    out = attend(q, k, v)
    lse = (q @ k.T * D**-0.5).masked_fill(hidden, -torch.inf).logsumexp(-1)
    # from here on, with q, k, v, out, lse and dout alone
    weights = torch.exp((q @ k.T * D**-0.5).masked_fill(hidden, -torch.inf) - lse[:, None])
    delta = (dout * out).sum(-1, keepdim=True)
    dscores = weights * (dout @ v.T - delta) * D**-0.5
    found = (dscores @ k, dscores.T @ q, weights.T @ dout)
    names = ("dq", "dk", "dv")
    kernel_inputs = [x[None, :, None].clone().requires_grad_() for x in (q, k, v)]
    kernel = torch.autograd.grad(ops.attention(*kernel_inputs), kernel_inputs, dout[None, :, None])
    return {
        "difference": {
            name: float((one - other).abs().max()) for name, one, other in zip(names, found, expected, strict=True)
        },
        "kernel_difference": max(
            float((one[0, :, 0] - other).abs().max()) for one, other in zip(kernel, expected, strict=True)
        ),
        "row_sums_of_delta": float((delta[:, 0] - (weights * (dout @ v.T)).sum(-1)).abs().max()),
        "products": {"forward": 2, "backward_with_saved_weights": 4, "backward_computed_again": 5},
        "more_work": 7 / 6 - 1,
    }


def attention_memory() -> dict[str, Any]:
    """Measure the memory of attention for one text, two heads of size 128, forward and backward, in float32.

    matrix: plain_attention. kept: bytes of the tensors that the backward pass needs, without the inputs. peak: the most
    that torch's allocator held beyond the inputs. The workspace of the kernel is outside that allocator; workspace
    counts it: keys and values of all heads once, and the parts of dQ.
    """
    H, D = 2, 128
    rows = []
    for T in (256, 512, 1024, 2048):
        row: dict[str, Any] = {"T": T, "inputs": 3 * 4 * T * H * D, "workspace": _workspace(T, H, D)}
        for name, attend in (("matrix", _plain_attention_of_batch), ("tiles", ops.attention)):
            inputs = [x.requires_grad_() for x in normal(3, 1, T, H, D, seed=6).unbind()]
            own = {x.data_ptr() for x in inputs}
            kept: dict[int, int] = {}

            def pack(x: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
                if x.data_ptr() not in own:
                    kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                attend(*inputs)
            with Allocations() as allocations:
                attend(*inputs).sum().backward()
            row[name] = {"kept": sum(kept.values()), "peak": max(allocations.highest.values())}
        rows.append(row)
    last = rows[-1]
    return {
        "rows": rows,
        "kept_ratio": last["matrix"]["kept"] / last["tiles"]["kept"],
        "growth_of_a_doubling": {name: rows[-1][name]["kept"] / rows[-2][name]["kept"] for name in ("matrix", "tiles")},
    }


def _plain_attention_of_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return plain_attention of q, k, v (B, T, H, D)."""
    return plain_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _workspace(T: int, H: int, D: int) -> int:
    """Return the bytes of the kernels' workspace, as lab.memory.kernel_scratch counts them, for one text."""
    ranges = min(-(-16 // H), -(-T // 256))
    return max(8 * T * H * D, 4 * ranges * T * H * D if ranges > 1 else 0)


def attention_versions() -> dict[str, Any]:
    """Time six versions of causal attention on one core: two heads of size 128, 1,024 tokens, float32.

    Takes some seconds. ms: processor time of the fastest of several calls. gflops: operations of the visible scores,
    4 D for each, per second. held: scores that a version holds at a time. difference: from the whole matrix.
    """
    H, T, D = 2, 1024, 128
    q, k, v = normal(3, H, T, D, seed=7).unbind()
    arrays = [x.numpy() for x in (q, k, v)]
    batched = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
    versions: list[tuple[str, str, int, int, Callable[[], Any]]] = [
        ("scores", "NumPy, one score at a time", T, 1, lambda: _by_score(*arrays)),
        ("queries", "NumPy, one query at a time", T, 10, lambda: _by_query(*arrays)),
        ("matrix", "torch, the whole matrix", H * T * T, 15, lambda: plain_attention(q, k, v)),
        ("tiles", "torch, tiles", H * 128 * 128, 15, lambda: tiled_attention(q, k, v, 128, 128, skip=False)[0]),
        (
            "skipped",
            "and hidden tiles skipped",
            H * 128 * 128,
            5,
            lambda: tiled_attention(q, k, v, 128, 128, skip=True)[0],
        ),
        ("kernel", "the kernel", STRIP * KEY_BLOCK, 40, lambda: ops.attention(*batched)[0].transpose(0, 1)),
    ]
    expected = reference.attention(*batched)[0].transpose(0, 1)
    work = 4 * D * H * T * (T + 1) / 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        for name, text, held, repeats, run in versions:
            times, result = [], None
            for _ in range(repeats):
                start = time.thread_time()
                result = run()
                times.append(time.thread_time() - start)
            difference = float((torch.as_tensor(result) - expected).abs().max())
            seconds = min(times)
            found[name] = {
                "text": text,
                "ms": 1000 * seconds,
                "gflops": work / seconds / 1e9,
                "held": held,
                "difference": difference,
            }
    finally:
        torch.set_num_threads(threads)
    names = list(found)
    for before, after in itertools.pairwise(names):
        found[after]["times_faster"] = found[before]["ms"] / found[after]["ms"]
    return {
        "machine": measure.machine(),
        "T": T,
        "versions": found,
        "matrix_to_kernel": found["matrix"]["ms"] / found["kernel"]["ms"],
        "first_to_last": found["scores"]["ms"] / found["kernel"]["ms"],
        "largest_difference": max(row["difference"] for row in found.values()),
    }


def _by_score(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return causal attention of (H, T, D), with a loop over heads, queries and keys."""
    H, T, D = q.shape
    out = np.zeros_like(q)
    for h in range(H):
        for i in range(T):
            scores = np.empty(i + 1, dtype=q.dtype)
            for j in range(i + 1):
                scores[j] = q[h, i] @ k[h, j] / D**0.5
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            for j in range(i + 1):
                out[h, i] += weights[j] * v[h, j]
    return out


def _by_query(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return causal attention of (H, T, D), with a loop over heads and queries."""
    H, T, D = q.shape
    out = np.zeros_like(q)
    for h in range(H):
        for i in range(T):
            scores = k[h, : i + 1] @ q[h, i] / D**0.5
            weights = np.exp(scores - scores.max())
            out[h, i] = weights @ v[h, : i + 1] / weights.sum()
    return out


DEMONSTRATIONS = {
    "online-softmax": online_softmax,
    "attention-tiles": attention_tiles,
    "attention-backward": attention_backward,
    "attention-memory": attention_memory,
    "attention-versions": attention_versions,
}
