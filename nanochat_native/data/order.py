"""The order of the data of a run: which loader makes its batches, and how its validation text is cut into rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from nanochat_native.data.corpus import Corpus
from nanochat_native.data.loader import Batch, BatchLoader, Loader, iterate_val
from nanochat_native.data.packing import (
    BestFitLoader,
    PackedLoader,
    StoredDocuments,
    find_documents,
    iterate_packed,
    measure_packing,
)
from nanochat_native.data.streaming import TextSource

Packing = Literal["stream", "bestfit"]


class StreamedLoader(PackedLoader[np.ndarray]):
    """Training batches of documents that are tokenized while training runs, packed by best fit, in their order."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch_rows: int,
        sequence_len: int,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Create a loader of `batch_rows` rows of `sequence_len` targets for each step, over all ranks.

        Args:
            corpus: one with `documents`.

        Raises:
            ValueError: An argument is out of range, or `batch_rows` is not a multiple of `world_size`.
        """
        assert corpus.documents is not None
        super().__init__(
            TextSource(corpus.documents, sequence_len + 1),
            batch_rows=batch_rows,
            sequence_len=sequence_len,
            device=device,
            rank=rank,
            world_size=world_size,
        )
        self._corpus = corpus

    def epochs_of(self, tokens: int) -> None:
        return None

    def describe(self) -> str:
        val = self._corpus.val
        assert self._corpus.bos_id is not None
        source = StoredDocuments(val, find_documents(val, self._corpus.bos_id), seed=None)
        found = measure_packing(source, source.count, self.sequence_len)
        return f"documents by best fit, in the order of the files, {found.cropped:.0%} of the validation tokens cropped"


def make_loader(
    corpus: Corpus,
    *,
    packing: Packing,
    batch_rows: int,
    sequence_len: int,
    seed: int,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    cache_dir: Path | None = None,
) -> Loader:
    """Return the loader of a run.

    Args:
        packing: "stream": windows of the stream of tokens; "bestfit": rows that begin with `<|bos|>`, see packing.py.
        cache_dir: folder in which the starts of the documents of large corpora are kept.

    Raises:
        ValueError: The corpus is too small for a batch, its documents cannot be found, or its documents are tokenized
            while training runs, which needs "bestfit". Or an argument is out of range.
    """
    if corpus.documents is not None:
        if packing != "bestfit":
            raise ValueError(f"train's --tokenize while-training needs packing bestfit, got {packing}")
        return StreamedLoader(
            corpus,
            batch_rows=batch_rows,
            sequence_len=sequence_len,
            device=device,
            rank=rank,
            world_size=world_size,
        )
    if packing == "stream":
        return BatchLoader(
            corpus.train,
            batch_rows=batch_rows,
            sequence_len=sequence_len,
            seed=seed,
            device=device,
            rank=rank,
            world_size=world_size,
        )
    cache = None if cache_dir is None else cache_dir / f"documents-{corpus.hash[:16]}.npy"
    return BestFitLoader(
        corpus.train,
        find_documents(corpus.train, _bos_id(corpus), cache),
        batch_rows=batch_rows,
        sequence_len=sequence_len,
        seed=seed,
        device=device,
        rank=rank,
        world_size=world_size,
    )


def iterate_validation(
    corpus: Corpus,
    *,
    packing: Packing,
    batch_rows: int,
    sequence_len: int,
    max_tokens: int | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield the validation batches of a run: windows of the stream (iterate_val), or packed rows (iterate_packed)."""
    if packing == "stream":
        return iterate_val(
            corpus.val,
            batch_rows=batch_rows,
            sequence_len=sequence_len,
            max_tokens=max_tokens,
            device=device,
            rank=rank,
            world_size=world_size,
        )
    return iterate_packed(
        corpus.val,
        _bos_id(corpus),
        batch_rows=batch_rows,
        sequence_len=sequence_len,
        max_tokens=max_tokens,
        device=device,
        rank=rank,
        world_size=world_size,
    )


def _bos_id(corpus: Corpus) -> int:
    if corpus.bos_id is None:
        raise ValueError(
            "packing bestfit needs documents, and it is not known which token begins one in this data: put the "
            "tokenizer beside the shards, or use train's --packing stream"
        )
    return corpus.bos_id
