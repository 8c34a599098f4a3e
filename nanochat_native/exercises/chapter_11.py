"""Exercises of chapter 11, memory and many ranks."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from nanochat_native.exercises.base import Experiment, Number, Write
from nanochat_native.lab.memory.options import Options
from nanochat_native.lab.memory.prediction import largest_batch, static_bytes, without_memory
from nanochat_native.model.config import GPTConfig

# --- 11.1: the state of a d6 on four ranks ---

RANKS = 4
D6 = GPTConfig.from_depth(6, vocab_size=8192, sequence_len=256)
EMBEDDINGS = 2 * D6.vocab_size * D6.n_embd
MATRICES = D6.n_layer * 12 * D6.n_embd**2


def state_on_four_ranks() -> float:
    """Return the bytes of optimizer state on each of four ranks of a d6."""
    return static_bytes(without_memory(D6), RANKS)[1]


# --- 11.2: the work of checkpointing ---

D20 = GPTConfig.from_depth(20, vocab_size=65536, sequence_len=2048)
BLOCKS, HEAD = D20.n_layer * 12 * D20.n_embd**2, D20.vocab_size * D20.n_embd


def extra_work() -> float:
    """Return what checkpointing adds to the products with weights of a d20, as a fraction."""
    return BLOCKS / (3 * (BLOCKS + HEAD))


# --- 11.3: find the bug in the split of rows ---

SPLIT = '''def own_rows(rows, ranks, rank):
    """Return (first, last + 1) of the rows that a rank updates.

    Every row belongs to one rank. All shards have the same size, but the last ones may be cut short or empty.
    """
    size = rows // ranks
    return rank * size, (rank + 1) * size
'''


def own_rows(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the rows of a rank."""
    size = -(-rows // ranks)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def own_rows_floored(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the result of the stub."""
    size = rows // ranks
    return rank * size, (rank + 1) * size


def own_rows_rest_to_last(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the rows of a rank, with all that is left over for the last one."""
    size = rows // ranks
    return rank * size, rows if rank == ranks - 1 else (rank + 1) * size


def own_rows_beyond(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return the rows of a rank, padding included."""
    size = -(-rows // ranks)
    return rank * size, (rank + 1) * size


# --- 11.4: one step of the ring ---

RING = '''def ring_step(held, step):
    """Return what the ranks hold after one more step of a reduce-scatter, as a new tensor.

    held (n, n, k): held[r, c] is chunk c on rank r. In step 0, 1, ... n - 2, rank r sends chunk (r - step) % n to
    rank (r + 1) % n, which adds it to its own.
    """
    raise NotImplementedError
'''


def _ring_step(held: Tensor, step: int, *, to: int = 1, add: bool = True, keep: bool = False) -> Tensor:
    n, after = len(held), held.clone()
    for rank in range(n):
        receiver, chunk = (rank + to) % n, rank if keep else (rank - step) % n
        after[receiver, chunk] = held[rank, chunk] + (held[receiver, chunk] if add else 0)
    return after


def ring_step(held: Tensor, step: int) -> Tensor:
    """Return what the ranks hold after a step."""
    return _ring_step(held, step)


def ring_step_backwards(held: Tensor, step: int) -> Tensor:
    """Return the result if every rank sends to the rank before it."""
    return _ring_step(held, step, to=-1)


def ring_step_replacing(held: Tensor, step: int) -> Tensor:
    """Return the result if the receiver stores what arrives."""
    return _ring_step(held, step, add=False)


def ring_step_of_own_chunk(held: Tensor, step: int) -> Tensor:
    """Return the result if rank r sends chunk r in every step."""
    return _ring_step(held, step, keep=True)


def ring_step_of_all(held: Tensor, step: int) -> Tensor:
    """Return the result if every rank sends all its chunks."""
    return held + held.roll(1, 0)


def ring_inputs() -> list[tuple[Any, ...]]:
    """Return chunks of 2, 3 and 4 ranks, and a step each."""
    generator = torch.Generator().manual_seed(11)
    return [(torch.randn(n, n, 2, generator=generator), step) for n, step in ((2, 0), (3, 1), (4, 0), (4, 2))]


# --- 11.5: fit a d6 into 400 MiB ---

LIMIT = 400 << 20
FIT = Options(depth=6, max_seq_len=256, vocab_size=8192, dtype="float32", device="cpu")


def judge(result: dict[str, Any]) -> tuple[bool, str]:
    """Judge a measured step: a d6 of 256 tokens a sequence within the limit, with the largest micro-batch."""
    options, measured = result["options"], max(result["measured"])
    for name in ("depth", "max_seq_len", "vocab_size"):
        if options[name] != getattr(FIT, name):
            return False, f"--{name.replace('_', '-')} must be {getattr(FIT, name)}, got {options[name]}"
    rows, mib = options["device_batch_size"], measured / 2**20
    if measured > LIMIT:
        return False, f"{rows} sequences take {mib:.1f} MiB, more than {LIMIT >> 20}"
    best = largest_batch(dataclasses.replace(FIT, grad_checkpoint=True), LIMIT)
    if rows < best:
        return False, f"{rows} sequences take {mib:.1f} MiB, but more sequences fit"
    return True, f"{rows} sequences take {mib:.1f} MiB, and one more would not fit"


EXERCISES = (
    Number(
        "11.1",
        "Optimizer state of a d6 on each of four ranks",
        answer=state_on_four_ranks,
        unit="bytes",
        mistakes={
            "this is AdamW for all parameters: Muon keeps one number for each element of a matrix": lambda: (
                8 * (EMBEDDINGS + MATRICES) / RANKS
            ),
            "this is the state of all four ranks together": lambda: 4.0 * (2 * EMBEDDINGS + MATRICES),
            "there are two embeddings: lm_head is missing": lambda: 4.0 * (EMBEDDINGS + MATRICES) / RANKS,
            "a moment takes 4 bytes, not 2": lambda: 2.0 * (2 * EMBEDDINGS + MATRICES) / RANKS,
        },
    ),
    Number(
        "11.2",
        "Work that checkpointing adds to a d20, as a fraction of the products with weights",
        answer=extra_work,
        mistakes={
            "the head is not computed again": lambda: 1 / 3,
            "a step has three products for each matrix, not two": lambda: BLOCKS / (2 * (BLOCKS + HEAD)),
            "that is another whole step; only the forward pass of the blocks is repeated": lambda: 1.0,
        },
    ),
    Write(
        "11.3",
        "The rows of a rank",
        stub=SPLIT,
        right=own_rows,
        wrong={
            "the last rows have no owner: rows // ranks forgets the remainder": own_rows_floored,
            "the last shard is larger than the others: a collective needs shards of one size": own_rows_rest_to_last,
            "the last shard ends behind the last row": own_rows_beyond,
        },
        inputs=lambda: [(rows, ranks, rank) for rows, ranks in ((8, 4), (13, 4), (3, 4)) for rank in range(ranks)],
    ),
    Write(
        "11.4",
        "One step of the ring",
        stub=RING,
        right=ring_step,
        wrong={
            "the chunks travel the wrong way: rank r sends to rank r + 1": ring_step_backwards,
            "the receiver replaces its chunk; a reduce-scatter adds": ring_step_replacing,
            "rank r sends chunk r in every step; it must pass on the chunk that it has just received": (
                ring_step_of_own_chunk
            ),
            "every rank sends all its chunks: that is n times the traffic": ring_step_of_all,
        },
        inputs=ring_inputs,
    ),
    Experiment(
        "11.5",
        "The largest micro-batch of a d6 in 400 MiB",
        command="python -m nanochat_native.memory --measure --depth 6 --device-batch-size 8 --out lab/exercise-11-5",
        folder="lab/exercise-11-5",
        judge=judge,
    ),
)
