"""Documents that are tokenized while training runs, for text that is too large to tokenize before.

The documents come in the order of the files, again in each epoch. Threads tokenize a bounded number of characters
ahead. Of a document, only its length and the tokens that a row can hold are kept. The place of a document is (epoch,
file, number of the document in the file), so that reading can begin anywhere.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat_native.data.documents import DamagedFileError, Reading, is_held_out, read_document_parts
from nanochat_native.data.file_names import printable
from nanochat_native.data.packing import BLOCK_DOCUMENTS, Cursor
from nanochat_native.data.sources import Skipped
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.runtime import hardware

JOB_CHARS = 1 << 18  # characters that a thread tokenizes at once

Place = tuple[int, int, int]


@dataclass(frozen=True)
class TextDocuments:
    """Text to train on, and how its documents are read.

    Attributes:
        files, sizes, readings: the files in their order, the bytes of each, and how each is read.
        text_column: the field with the text, if the user named it.
        skip_damaged: whether damaged files are read up to the damage.
        val_fraction: share of the documents that are left out, because they validate; 0 if none are.
    """

    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    readings: tuple[Reading, ...]
    tokenizer: Tokenizer
    text_column: str | None
    skip_damaged: bool
    val_fraction: float


class _Part(NamedTuple):
    """A part of a document, as text and then as tokens."""

    place: Place
    text: str
    starts_document: bool


class _EncodedPart(NamedTuple):
    place: Place
    starts_document: bool
    length: int
    head: np.ndarray  # the first tokens


class TextSource:
    """The documents of a text, tokenized ahead by threads (a packing.DocumentSource). They are kept as their first
    tokens.

    Attributes:
        skipped: what was left out since the source was created.
    """

    def __init__(self, text: TextDocuments, head_tokens: int, threads: int | None = None) -> None:
        """Create a source that keeps the first `head_tokens` tokens of each document.

        Args:
            threads: number of threads; None shares the cores among the ranks of this machine.
        """
        self.text, self.head_tokens = text, head_tokens
        if threads is None:
            threads = max(1, hardware.usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.skipped = Skipped()
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "tokenize")
        self._cursor: Cursor = (0, 0, 0, 0)
        self._documents: Iterator[tuple[int, np.ndarray, Place]] | None = None

    @property
    def cursor(self) -> Cursor:
        return self._cursor

    @property
    def order(self) -> tuple[int, ...]:
        return self.text.sizes

    def seek(self, cursor: Cursor | None) -> None:
        self._documents = None
        self._cursor = (0, 0, 0, 0) if cursor is None else cursor

    def read(self) -> list[tuple[int, np.ndarray]]:
        """Return the next documents, each with its length and its first tokens, uint32.

        Raises:
            DamagedFileError: A file is damaged, has another size than before, or has no text.
            OSError: A file cannot be read.
        """
        if self._documents is None:
            self._documents = self._iterate(self._cursor[1:])
        block: list[tuple[int, np.ndarray]] = []
        try:
            while len(block) < BLOCK_DOCUMENTS:
                length, head, place = next(self._documents)
                block.append((length, head))
        except Exception as error:
            self._documents = None
            if isinstance(error, ValueError) and not isinstance(error, DamagedFileError):
                raise DamagedFileError(str(error)) from error
            raise
        self._cursor = (self._cursor[0] + len(block), *place)
        return block

    def tokens(self, document: np.ndarray, count: int) -> np.ndarray:
        return document[:count]

    def to_tensors(self, documents: Sequence[np.ndarray]) -> dict[str, Tensor]:
        tokens = np.concatenate([np.empty(0, np.uint32), *documents])
        return {"tokens": torch.from_numpy(tokens.astype(np.int32))}

    def from_tensors(self, tensors: Mapping[str, Tensor], lengths: Sequence[int]) -> list[np.ndarray]:
        tokens = tensors["tokens"].numpy().astype(np.uint32)
        ends = np.cumsum([min(length, self.head_tokens) for length in lengths], dtype=np.int64)
        return [part.copy() for part in np.split(tokens, ends[:-1])] if lengths else []

    def _iterate(self, start: Sequence[int]) -> Iterator[tuple[int, np.ndarray, Place]]:
        """Yield (length, first tokens, place of the next document) without end."""
        length = 0
        heads: list[np.ndarray] = []
        for part in self._encoded(start):
            if part.starts_document and length:
                yield length, np.concatenate(heads)[: self.head_tokens], part.place
                length, heads = 0, []
            if length < self.head_tokens:
                heads.append(part.head)
            length += part.length

    def _encoded(self, start: Sequence[int]) -> Iterator[_EncodedPart]:
        """Yield the parts from a place on, tokenized some jobs ahead. An error comes after the parts before it."""
        jobs = self._jobs(*start)
        ahead: deque[Future[list[_EncodedPart]]] = deque()
        failed = False
        while True:
            while len(ahead) <= 2 * self._threads and not failed:
                try:
                    ahead.append(self._pool.submit(self._encode, next(jobs)))
                except Exception as error:
                    failed = True
                    ahead.append(Future())
                    ahead[-1].set_exception(error)
            yield from ahead.popleft().result()

    def _encode(self, job: list[_Part]) -> list[_EncodedPart]:
        tokenizer, wanted = self.text.tokenizer, self.head_tokens
        bos = np.array([tokenizer.bos_id], dtype=np.uint32)
        encoded = []
        for place, text, starts in job:
            tokens = tokenizer.encode_to_numpy(text)
            head = np.concatenate((bos[: int(starts)], tokens[:wanted]))[:wanted]
            encoded.append(_EncodedPart(place, starts, len(tokens) + starts, head))
        return encoded

    def _jobs(self, epoch: int, first_file: int, first_document: int) -> Iterator[list[_Part]]:
        """Yield lists of parts, of about equal length, from a place on, without end."""
        job: list[_Part] = []
        chars = 0
        while True:
            is_empty = (first_file, first_document) == (0, 0)
            for file in range(first_file, len(self.text.files)):
                try:
                    for part in self._parts_of(epoch, file, first_document):
                        is_empty = False
                        job.append(part)
                        chars += len(part.text)
                        if chars >= JOB_CHARS:
                            yield job
                            job, chars = [], 0
                except Exception:
                    yield job  # the documents before the damage
                    raise
                first_document = 0
            if is_empty:
                raise ValueError(f"no text to train on in {len(self.text.files):,} files")
            epoch, first_file = epoch + 1, 0

    def _parts_of(self, epoch: int, file: int, first_document: int) -> Iterator[_Part]:
        """Yield the parts of the training documents of a file, from one of them on."""
        text = self.text
        path, expected = text.files[file], text.sizes[file]
        size = path.stat().st_size
        if size != expected:
            raise ValueError(f"{printable(path)}: changed since its data was prepared: {expected} bytes, now {size}")
        number, held_out = -1, False
        for part in read_document_parts(
            path,
            text.readings[file],
            text_column=text.text_column,
            skip_damaged=text.skip_damaged,
            skipped=self.skipped,
        ):
            if part.starts_document:
                held_out = is_held_out(part.text.encode(), text.val_fraction)
                number += not held_out
            if not held_out and number >= first_document:
                yield _Part((epoch, file, number), part.text, part.starts_document)
