"""The rows that fine-tuning trains on: conversations, of which some tokens are targets."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from nanochat_native.data.shards import TokenStream

Rendered = tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]  # tokens, and which of them are targets


class ConversationRows(TokenStream):
    """Conversations as a stream of windows: window i is row i, padded at its end.

    A conversation of n tokens takes n - 1 places of a row: the inputs are all tokens but its last, and the targets all
    but its first. A row holds one conversation, or, packed, those that `best_fit` puts there, one behind the other.

    Attributes:
        documents: (tokens, int32; whether each token is a target, bool) of each conversation, at most
            sequence_len + 1 tokens.
        rows: the conversations of each row, as indices of documents.
        num_targets: number of targets that are not -1.
    """

    def __init__(self, documents: Iterable[Rendered], sequence_len: int, *, packed: bool = False) -> None:
        super().__init__([])
        self.sequence_len = sequence_len
        kept = [(tokens[: sequence_len + 1], mask[: sequence_len + 1]) for tokens, mask in documents]
        self.documents = [(np.asarray(tokens, dtype=np.int32), np.asarray(mask, dtype=bool)) for tokens, mask in kept]
        self.num_targets = sum(int(mask[1:].sum()) for _, mask in self.documents)
        self.rows = [[index] for index in range(len(self.documents))]
        if packed:
            found = best_fit([len(tokens) - 1 for tokens, _ in self.documents], sequence_len)
            # The first rows, which a short validation takes, then hold conversations of all lengths.
            self.rows = [found[i] for i in np.random.default_rng(0).permutation(len(found))]

    def __len__(self) -> int:
        return len(self.rows) * self.sequence_len + 1

    @property
    def padding(self) -> float:
        """The share of the places of all rows that hold no conversation."""
        used = sum(len(tokens) - 1 for tokens, _ in self.documents)
        return 1 - used / (len(self.rows) * self.sequence_len)

    def pair(self, start: int, sequence_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, targets) of the window at `start`, int64 (sequence_len,) each; -1 is no target."""
        if sequence_len != self.sequence_len or start % sequence_len:
            raise ValueError(f"a window must be a row of {self.sequence_len} tokens, got {sequence_len} at {start}")
        inputs, targets = np.zeros(sequence_len, dtype=np.int64), np.full(sequence_len, -1, dtype=np.int64)
        begin = 0
        for index in self.rows[start // sequence_len]:
            tokens, is_target = self.documents[index]
            end = begin + len(tokens) - 1
            inputs[begin:end] = tokens[:-1]
            targets[begin:end] = np.where(is_target[1:], tokens[1:], -1)
            begin = end
        return inputs, targets

    def windows(self, sequence_len: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield `pair` of the windows `start` to `stop`, in order."""
        total = len(self.rows)
        for index in range(start, total if stop is None else min(stop, total)):
            yield self.pair(index * sequence_len, sequence_len)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices, with lengths that sum to at most `capacity` in each: best fit, the longest first.

    Each index is in one row: in the fullest one that has room for it, or else in a new one. Of equal lengths the first
    index comes first. The number of rows is at most 11/9 of the fewest possible, plus 4 (Johnson,
    "Near-optimal bin packing algorithms", 1973).

    Raises:
        ValueError: A length is above the capacity, or below 1.
    """
    if lengths and not 1 <= min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"lengths must be from 1 to {capacity}, got {min(lengths)} to {max(lengths)}")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # the rows that have a number of free places
    free_places: list[int] = []  # those numbers, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(free_places, lengths[index])
        if at == len(free_places):
            row, free = len(rows), capacity
            rows.append([])
        else:
            free = free_places[at]
            row = with_room[free].pop()
            if not with_room[free]:
                del free_places[at]
        rows[row].append(index)
        free -= lengths[index]
        if free:
            if not with_room.get(free):
                insort(free_places, free)
            with_room.setdefault(free, []).append(row)
    return rows
