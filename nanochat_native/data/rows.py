"""Rows of a fixed length, a document each, of which some targets are learnt: what fine-tuning trains on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nanochat_native.data.shards import TokenStream


class Rows(TokenStream):
    """Documents as a stream of windows: window i holds document i, from its first token, filled up behind its end.

    Attributes:
        documents: of each the tokens, int32, and whether each is learnt, bool; at most sequence_len + 1 of them.
        learnt: how many targets are not -1.
    """

    def __init__(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]], sequence_len: int) -> None:
        super().__init__([])
        self.sequence_len = sequence_len
        kept = [(tokens[: sequence_len + 1], learnt[: sequence_len + 1]) for tokens, learnt in documents]
        self.documents = [(np.array(tokens, dtype=np.int32), np.array(learnt, dtype=bool)) for tokens, learnt in kept]
        self.learnt = sum(int(learnt[1:].sum()) for _, learnt in self.documents)

    def __len__(self) -> int:
        return len(self.documents) * self.sequence_len + 1

    def pair(self, start: int, sequence_len: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of the window at `start`, int64 (sequence_len,) each; a target that is not learnt is -1."""
        if sequence_len != self.sequence_len or start % sequence_len:
            raise ValueError(f"a window of {sequence_len} tokens at {start} of rows of {self.sequence_len}")
        tokens, learnt = self.documents[start // sequence_len]
        inputs, targets = np.zeros(sequence_len, dtype=np.int64), np.full(sequence_len, -1, dtype=np.int64)
        inputs[: len(tokens) - 1] = tokens[:-1]
        targets[: len(tokens) - 1] = np.where(learnt[1:], tokens[1:], -1)
        return inputs, targets

    def windows(self, sequence_len: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
        """`pair` of the windows `start` to `stop`, in order."""
        total = len(self.documents)
        for index in range(start, total if stop is None else min(stop, total)):
            yield self.pair(index * sequence_len, sequence_len)
