"""The rows that fine-tuning trains on: one conversation each, of which some tokens are targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nanochat_native.data.shards import TokenStream


class ConversationRows(TokenStream):
    """Conversations as a stream of windows: window i is conversation i, cut or padded at its end.

    Attributes:
        documents: (tokens, int32; whether each token is a target, bool) of each conversation, at most
            sequence_len + 1 tokens.
        num_targets: number of targets that are not -1.
    """

    def __init__(self, documents: Sequence[tuple[Sequence[int], Sequence[bool]]], sequence_len: int) -> None:
        super().__init__([])
        self.sequence_len = sequence_len
        kept = [(tokens[: sequence_len + 1], mask[: sequence_len + 1]) for tokens, mask in documents]
        self.documents = [(np.array(tokens, dtype=np.int32), np.array(mask, dtype=bool)) for tokens, mask in kept]
        self.num_targets = sum(int(mask[1:].sum()) for _, mask in self.documents)

    def __len__(self) -> int:
        return len(self.documents) * self.sequence_len + 1

    def pair(self, start: int, sequence_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, targets) of the window at `start`, int64 (sequence_len,) each; -1 is no target."""
        if sequence_len != self.sequence_len or start % sequence_len:
            raise ValueError(f"a window must be a row of {self.sequence_len} tokens, got {sequence_len} at {start}")
        tokens, is_target = self.documents[start // sequence_len]
        inputs, targets = np.zeros(sequence_len, dtype=np.int64), np.full(sequence_len, -1, dtype=np.int64)
        inputs[: len(tokens) - 1] = tokens[:-1]
        targets[: len(tokens) - 1] = np.where(is_target[1:], tokens[1:], -1)
        return inputs, targets

    def windows(self, sequence_len: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield `pair` of the windows `start` to `stop`, in order."""
        total = len(self.documents)
        for index in range(start, total if stop is None else min(stop, total)):
            yield self.pair(index * sequence_len, sequence_len)
