"""Rows that begin with `<|bos|>`: documents packed by best fit, the order of training data of nanochat.

A row has T + 1 tokens: T inputs and T targets. It is filled from a buffer of at least 1000 documents, with the largest
document that still fits; if none fits, the shortest one is cropped to fill the row, and the rest of it is dropped.
There is no padding. Documents enter the buffer in blocks of 128. Of several documents of one length, the one that
entered first is taken (nanochat, nanochat/dataloader.py).

The rows depend only on the lengths of the documents and on their order. They are therefore a function of the seed and
the number of the row; a state of the packer only saves the time to compute the rows before it.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat_native.data.loader import Batch, Loader, copied, epoch_keys, permute, pinned
from nanochat_native.data.shards import TokenStream
from nanochat_native.runtime.files import write_atomically

BUFFER_DOCUMENTS = 1000
BLOCK_DOCUMENTS = 128
# The starts of documents are kept on the disk if a stream has at least this many tokens; less takes no time to search.
CACHED_STREAM_TOKENS = 1 << 26
# Documents whose packing is computed to announce the share of cropped tokens: about a second.
SAMPLE_DOCUMENTS = 1 << 18

_POSITION_BITS = 40
_RECENT_STATES = 16
_ROWS_BETWEEN_STATES = 1 << 14
_COMPUTED_AHEAD = 64  # blocks of documents whose order is computed at once

P = TypeVar("P")
Cursor = tuple[int, ...]


class DocumentSource(Protocol[P]):
    """Documents in a fixed order. P is what a packer keeps of a document until a row takes it.

    Attributes:
        cursor: the place of the document that `read` returns next. Its first number counts the documents before it.
        order: numbers that differ for another order of the same documents.
    """

    @property
    def cursor(self) -> Cursor: ...

    @property
    def order(self) -> tuple[int, ...]: ...

    def seek(self, cursor: Cursor | None) -> None:
        """Go to a place that `cursor` gave before; None is the beginning."""

    def read(self) -> Sequence[tuple[int, P]]:
        """Return the next BLOCK_DOCUMENTS documents, each with its length in tokens; fewer only at the end of all."""

    def tokens(self, document: P, count: int) -> np.ndarray:
        """Return the first `count` tokens of a document, integers (count,)."""

    def to_tensors(self, documents: Sequence[P]) -> dict[str, Tensor]:
        """Return documents in a form that a checkpoint can hold."""

    def from_tensors(self, tensors: Mapping[str, Tensor], lengths: Sequence[int]) -> list[P]:
        """Return the documents of `to_tensors`."""


@dataclass(frozen=True)
class PackerState(Generic[P]):
    """A packer between two rows.

    Attributes:
        cursor: of its source.
        keys: length and position of each document in the buffer, as one number; sorted.
        documents: the documents in the buffer, by position.
    """

    cursor: Cursor
    keys: list[int]
    documents: dict[int, P]


class Packer(Generic[P]):
    """Fills rows of `row_tokens` tokens with the documents of a source."""

    def __init__(self, source: DocumentSource[P], row_tokens: int) -> None:
        self._source, self._row_tokens = source, row_tokens
        self._keys: list[int] = []
        self._documents: dict[int, P] = {}
        self._ended = False
        self.taken_documents = self.taken_tokens = 0

    def next_row(self) -> list[tuple[P, int]]:
        """Return the documents of a row, each with the number of its tokens that the row takes.

        The row is short, or empty, only if the source has ended.
        """
        row = []
        keys, free = self._keys, self._row_tokens
        while free:
            while len(keys) < BUFFER_DOCUMENTS and not self._ended:
                self._refill()
            if not keys:
                break
            at = bisect_left(keys, free + 1 << _POSITION_BITS)
            if at:
                length = keys[at - 1] >> _POSITION_BITS
                at = bisect_left(keys, length << _POSITION_BITS, 0, at)
            else:
                length = keys[0] >> _POSITION_BITS
            count = min(length, free)
            row.append((self._documents.pop(keys.pop(at) & (1 << _POSITION_BITS) - 1), count))
            free -= count
            self.taken_documents += 1
            self.taken_tokens += length
        return row

    def _refill(self) -> None:
        position = self._source.cursor[0]
        block = self._source.read()
        self._ended = len(block) < BLOCK_DOCUMENTS
        for number, (length, document) in enumerate(block, position):
            insort(self._keys, length << _POSITION_BITS | number)
            self._documents[number] = document

    def state(self) -> PackerState[P]:
        """Return the state before the next row."""
        return PackerState(self._source.cursor, self._keys.copy(), self._documents.copy())

    def restore(self, state: PackerState[P] | None) -> None:
        """Go back to a state; None is that before the first row."""
        self._source.seek(None if state is None else state.cursor)
        self._keys = [] if state is None else state.keys.copy()
        self._documents = {} if state is None else state.documents.copy()
        self._ended = False


class StoredDocuments:
    """The documents of a stream of tokens (a DocumentSource). What is kept of a document is its start in the stream.

    Args:
        starts: int64 (n + 1,): the start of each document, and the end of the last one.
        seed: the order of each epoch is another permutation of the documents, computed from the seed and the epoch;
            None keeps the order of the stream.
        endless: whether another epoch follows each epoch.
    """

    def __init__(self, stream: TokenStream, starts: np.ndarray, *, seed: int | None, endless: bool = True) -> None:
        self.stream, self.starts, self.seed, self.endless = stream, starts, seed, endless
        self.count = len(starts) - 1
        self._position = 0
        self._computed = range(0)
        self._lengths: list[int] = []
        self._begins: list[int] = []

    @property
    def cursor(self) -> Cursor:
        return (self._position,)

    @property
    def order(self) -> tuple[int, ...]:
        return (self.count, -1 if self.seed is None else self.seed)

    def seek(self, cursor: Cursor | None) -> None:
        self._position = 0 if cursor is None else cursor[0]

    def read(self) -> list[tuple[int, int]]:
        first = self._position
        if first not in self._computed:
            self._compute(first)
        at = first - self._computed.start
        stop = at + BLOCK_DOCUMENTS
        block = list(zip(self._lengths[at:stop], self._begins[at:stop], strict=True))
        self._position += len(block)
        return block

    def _compute(self, first: int) -> None:
        stop = first + _COMPUTED_AHEAD * BLOCK_DOCUMENTS
        if not self.endless:
            stop = min(stop, self.count)
        positions = np.arange(first, max(first, stop), dtype=np.int64)
        epochs, indices = np.divmod(positions, self.count)
        if self.seed is not None:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                indices[here] = permute(indices[here], self.count, epoch_keys(self.seed, int(epoch))[1:])
        begins = self.starts[indices]
        self._computed = range(first, first + len(positions))
        self._lengths, self._begins = (self.starts[indices + 1] - begins).tolist(), begins.tolist()

    def tokens(self, document: int, count: int) -> np.ndarray:
        return self.stream.read(document, document + count)

    def to_tensors(self, documents: Sequence[int]) -> dict[str, Tensor]:
        return {"begins": torch.tensor(documents, dtype=torch.int64)}

    def from_tensors(self, tensors: Mapping[str, Tensor], lengths: Sequence[int]) -> list[int]:
        begins: list[int] = tensors["begins"].tolist()
        return begins


def find_documents(stream: TokenStream, bos_id: int, cache: Path | None = None) -> np.ndarray:
    """Return the start of each document in a stream, and the end of the last one, int64 (number of documents + 1,).

    A document begins with the token `bos_id` and ends before the next one. Tokens before the first document belong to
    none.

    Args:
        cache: file in which the result is kept, for large streams; its name must identify the stream.

    Raises:
        ValueError: The stream has no such token.
    """
    if len(stream) < CACHED_STREAM_TOKENS:
        cache = None
    starts = None if cache is None else _cached_starts(stream, cache)
    if starts is None:
        found = starts = np.append(stream.find(bos_id), len(stream))
        if cache is not None:
            with contextlib.suppress(OSError):  # the file only saves time
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(cache, lambda file: np.save(file, found))
    if len(starts) == 1:
        raise ValueError(
            f"packing bestfit needs documents, which begin with token {bos_id}; none of the {len(stream):,} tokens "
            "is one: use train's --packing stream"
        )
    return starts


def _cached_starts(stream: TokenStream, cache: Path) -> np.ndarray | None:
    """Return the starts in a file, or None if it is missing or not of this stream."""
    try:
        starts: np.ndarray = np.load(cache)
    except Exception:  # numpy raises many types for a damaged file
        return None
    fits = isinstance(starts, np.ndarray) and starts.dtype == np.int64 and starts.ndim == 1 and len(starts) > 0
    if not fits or starts[0] < 0 or starts[-1] != len(stream):
        return None
    return starts if bool((np.diff(starts) > 0).all()) else None


class PackedLoader(Loader, Generic[P]):
    """Training batches of rows that a Packer fills.

    Row r of step s is row s * batch_rows + r of the packer, whatever the number of ranks: each rank computes the plan
    of all rows, and reads the tokens of its own. The batch of a step that does not follow the last one is computed from
    the nearest state before it.
    """

    def __init__(
        self,
        source: DocumentSource[P],
        *,
        batch_rows: int,
        sequence_len: int,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_rows, sequence_len, device, rank, world_size)
        self._source = source
        self._packer = Packer(source, sequence_len + 1)
        self._step = 0  # that of the next batch of the packer
        self._kept_every = max(1, _ROWS_BETWEEN_STATES // batch_rows)
        self._states: dict[int, PackerState[P]] = {}
        self._lock = threading.Lock()  # the thread of `iterate` uses the packer, and so may its owner

    def _host_batch(self, step: int) -> Batch:
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        with self._lock:
            self._go_to(step)
            rows = self._next_step()
            own = [rows[row] for row in self._rows]
            tokens = torch.from_numpy(np.stack([row_tokens(self._source, row) for row in own]))
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return pinned(inputs, self.device), pinned(targets, self.device)

    @property
    def _order(self) -> list[int]:
        return [self.batch_rows, self.sequence_len, *self._source.order]

    def _next_step(self) -> list[list[tuple[P, int]]]:
        """Return the rows of a step of all ranks. Keep its state, and drop one that is neither recent nor every so many
        rows."""
        self._states[self._step] = self._packer.state()
        old = self._step - _RECENT_STATES
        if not (self._keeps_old_states and old % self._kept_every == 0):
            self._states.pop(old, None)
        try:
            rows = [self._packer.next_row() for _ in range(self.batch_rows)]
        except BaseException:  # the rows before the error have taken documents
            self._packer.restore(self._states[self._step])
            raise
        self._step += 1
        return rows

    @property
    def _keeps_old_states(self) -> bool:
        return isinstance(self._source, StoredDocuments)  # a state of other documents holds their tokens

    def _go_to(self, step: int) -> None:
        """Make `step` the next one."""
        if step != self._step:
            nearest = max((known for known in self._states if known <= step), default=0)
            if not nearest <= self._step <= step:
                self._packer.restore(self._states.get(nearest))
                self._step = nearest
        while self._step < step:
            self._next_step()

    def state(self, step: int) -> dict[str, Tensor]:
        """Return what `restore` needs to continue at `step` without the steps before it.

        Returns:
            order, cursor: int64. lengths, positions: int64 (n,), of the documents in the buffer. And the documents.
        """
        with self._lock:
            found = self._states.get(step)
            if found is None:
                self._go_to(step)
                found = self._packer.state()
        positions = [key & (1 << _POSITION_BITS) - 1 for key in found.keys]
        return {
            "order": torch.tensor(self._order, dtype=torch.int64),
            "cursor": torch.tensor(found.cursor, dtype=torch.int64),
            "lengths": torch.tensor([key >> _POSITION_BITS for key in found.keys], dtype=torch.int64),
            "positions": torch.tensor(positions, dtype=torch.int64),
            **self._source.to_tensors([found.documents[position] for position in positions]),
        }

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Take over a state of `step`. That of another order is ignored: a fork of a run may have another seed."""
        if state["order"].tolist() != self._order:
            return
        lengths, positions = state["lengths"].tolist(), state["positions"].tolist()
        keys = [length << _POSITION_BITS | position for length, position in zip(lengths, positions, strict=True)]
        documents = dict(zip(positions, self._source.from_tensors(state, lengths), strict=True))
        with self._lock:
            self._states = {step: PackerState(tuple(state["cursor"].tolist()), keys, documents)}
            self._packer.restore(self._states[step])
            self._step = step


class BestFitLoader(PackedLoader[int]):
    """Training batches of the documents of a stream, packed by best fit, in another order in each epoch."""

    def __init__(
        self,
        stream: TokenStream,
        starts: np.ndarray,
        *,
        batch_rows: int,
        sequence_len: int,
        seed: int | None,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Create a loader of `batch_rows` rows of `sequence_len` targets for each step, over all ranks.

        Args:
            starts: of the documents, see find_documents.
            seed: of the order of the documents; None keeps the order of the stream.

        Raises:
            ValueError: An argument is out of range, `batch_rows` is not a multiple of `world_size`, or the documents of
                one epoch cannot fill the rows of a batch.
        """
        source = StoredDocuments(stream, starts, seed=seed)
        super().__init__(
            source,
            batch_rows=batch_rows,
            sequence_len=sequence_len,
            device=device,
            rank=rank,
            world_size=world_size,
        )
        self._stored = source
        most = int(np.minimum(np.diff(starts), sequence_len + 1).sum()) // (sequence_len + 1)
        if most < batch_rows:
            raise ValueError(
                f"{source.count:,} training documents fill at most {most:,} rows of {sequence_len + 1} tokens, but a "
                f"batch needs {batch_rows:,}: give more text, a smaller batch or a shorter sequence"
            )

    @cached_property
    def statistics(self) -> PackingStatistics:
        """The packing of the first epoch, or of its first 2^18 documents."""
        source = StoredDocuments(self._stored.stream, self._stored.starts, seed=self._stored.seed)
        return measure_packing(source, source.count, self.sequence_len)

    def epochs_of(self, tokens: int) -> float:
        return tokens / self.sequence_len / self.statistics.rows_per_epoch

    def describe(self) -> str:
        found = self.statistics
        of = "" if found.documents >= self._stored.count else f" of the first {found.documents:,} documents"
        return f"{self._stored.count:,} documents by best fit, {found.cropped:.0%} of their tokens cropped{of}"


@dataclass(frozen=True)
class PackingStatistics:
    """How documents are packed.

    Attributes:
        documents: number of documents that were packed.
        rows_per_epoch: rows that all documents fill, in proportion to the ones that were packed.
        cropped: share of the tokens of the packed documents that no row has.
    """

    documents: int
    rows_per_epoch: float
    cropped: float


def measure_packing(source: DocumentSource[P], count: int, sequence_len: int) -> PackingStatistics:
    """Pack the first `count` documents of a source, at most SAMPLE_DOCUMENTS, and return the statistics."""
    packer = Packer(source, sequence_len + 1)
    rows = 0
    wanted = min(count, SAMPLE_DOCUMENTS)
    while packer.taken_documents < wanted:
        packer.next_row()
        rows += 1
    used = rows * (sequence_len + 1)
    return PackingStatistics(
        packer.taken_documents, rows * count / packer.taken_documents, 1 - used / packer.taken_tokens
    )


def row_tokens(source: DocumentSource[P], row: Sequence[tuple[P, int]]) -> np.ndarray:
    """Return the tokens of a row, int64."""
    return np.concatenate([source.tokens(document, count) for document, count in row], dtype=np.int64)


def iterate_packed(
    stream: TokenStream,
    bos_id: int,
    *,
    batch_rows: int,
    sequence_len: int,
    max_tokens: int | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield validation batches of packed rows: (inputs, targets), int64 (at most batch_rows, sequence_len).

    The documents come once, in the order of the stream, until there are max_tokens targets, rounded up to rows. If the
    documents end first, the last row is padded with targets of -1, which are to be ignored. Each rank has a contiguous
    part of the rows, and the numbers of batches can differ: sum over ranks only after the last batch.

    Raises:
        ValueError: The stream has no document, or its documents have no target.
    """
    starts = find_documents(stream, bos_id)
    source = StoredDocuments(stream, starts, seed=None, endless=False)
    packer = Packer(source, sequence_len + 1)
    rows: list[list[tuple[int, int]]] = []
    while (max_tokens is None or len(rows) * sequence_len < max_tokens) and (row := packer.next_row()):
        rows.append(row)
    if sum(count for _, count in rows[0]) < 2:
        raise ValueError(f"there must be >= 2 validation tokens, got {len(stream)}: give more text")
    if sum(count for _, count in rows[-1]) < 2:  # one token has no target
        del rows[-1]
    begin, end = rank * len(rows) // world_size, (rank + 1) * len(rows) // world_size
    for first in range(begin, end, batch_rows):
        chosen = rows[first : min(first + batch_rows, end)]
        inputs = torch.zeros((len(chosen), sequence_len), dtype=torch.int64)
        targets = torch.full((len(chosen), sequence_len), -1, dtype=torch.int64)
        for index, row in enumerate(chosen):
            tokens = torch.from_numpy(row_tokens(source, row))
            inputs[index, : len(tokens) - 1] = tokens[:-1]
            targets[index, : len(tokens) - 1] = tokens[1:]
        device = torch.device(device)
        yield copied(pinned(inputs, device), device), copied(pinned(targets, device), device)
