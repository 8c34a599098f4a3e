"""Token shards on disk, in llm.c's format, and streams of tokens over them.

A shard is 256 int32 of header (magic, version, number of tokens, zeros) and then the tokens, little-endian:
uint16 under magic 20240520 version 1, or uint32 under magic 20240801 version 7 (llm.c, dev/data/data_common.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nanochat_native.data.names import shown

HEADER_BYTES = 1024
SHARD_TOKENS = 100_000_000
# (magic, version) to the type of the tokens.
SHARD_FORMATS: dict[tuple[int, int], np.dtype[Any]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}


class TokenStream:
    """A read-only sequence of token ids over one or more arrays, mostly memory-mapped shards."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a new int64 array.

        Raises:
            ValueError: the range does not lie within the stream.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"tokens {start}:{stop} of a stream of {len(self)}")
        out = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        position = start
        while position < stop:
            end = int(self._ends[shard])
            begin = end - len(self._arrays[shard])
            upto = min(stop, end)
            out[position - start : upto - start] = self._arrays[shard][position - begin : upto - begin]
            position, shard = upto, shard + 1
        return out

    def split_at(self, position: int) -> tuple[TokenStream, TokenStream]:
        """The streams of tokens [0, position) and [position, len)."""
        starts = self._ends - [len(array) for array in self._arrays]
        cuts = [int(np.clip(position - start, 0, len(a))) for start, a in zip(starts, self._arrays, strict=True)]
        left = [array[:cut] for cut, array in zip(cuts, self._arrays, strict=True)]
        right = [array[cut:] for cut, array in zip(cuts, self._arrays, strict=True)]
        return TokenStream(left), TokenStream(right)

    def num_windows(self, sequence_len: int) -> int:
        """How many windows of `sequence_len` targets fit, each target in one window."""
        return max(0, len(self) - 1) // sequence_len

    def pair(self, start: int, sequence_len: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of a window that begins at token `start`, int64 (sequence_len,) each."""
        tokens = self.read(start, start + sequence_len + 1)
        return tokens[:-1], tokens[1:]

    def windows(self, sequence_len: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
        """(inputs, targets), int64 (sequence_len,) each, in order; windows `start` to `stop` of them.

        Together they hold every target of the stream once: where the last window is short, its inputs are filled
        with 0 and its targets with -1, which the loss ignores.
        """
        total = max(0, -(-(len(self) - 1) // sequence_len))
        for index in range(start, total if stop is None else min(stop, total)):
            begin = index * sequence_len
            tokens = self.read(begin, min(begin + sequence_len + 1, len(self)))
            inputs = np.zeros(sequence_len, dtype=np.int64)
            targets = np.full(sequence_len, -1, dtype=np.int64)
            inputs[: len(tokens) - 1] = tokens[:-1]
            targets[: len(tokens) - 1] = tokens[1:]
            yield inputs, targets


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest shard type that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def open_shard(path: Path) -> np.ndarray:
    """Memory-map the tokens of a shard, after checking its header and its size.

    Raises:
        ValueError: not a shard, or its size is not what its header says. The message begins with the path.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    magic, version, count = (int(value) for value in header[:3])
    dtype = SHARD_FORMATS.get((magic, version))
    if dtype is None:
        taken = " or ".join(f"{m} version {v}" for m, v in SHARD_FORMATS)
        raise ValueError(
            f"{shown(path)}: not a token shard of llm.c's format: magic {magic} version {version}, taken are {taken}; "
            "nanoGPT's .bin has uint16 tokens without a header: put 256 int32 before them, 20240520, 1, their number "
            "and zeros"
        )
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        raise ValueError(f"{shown(path)}: {size} bytes, but its header tells of {count} tokens, which take {expected}")
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))


class ShardWriter:
    """Writes a stream of tokens as shards `<split>_000000.bin`, ... of at most `shard_tokens` tokens each."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        self.paths: list[Path] = []
        self.tokens = 0
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._file: BinaryIO | None = None
        self._room = 0

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, an integer array (n,) of any length."""
        while len(tokens):
            if self._file is None:
                self.paths.append(self._folder / f"{self._split}_{len(self.paths):06d}.bin")
                self._file = open(self.paths[-1], "wb")  # noqa: SIM115 (closed by close)
                self._file.write(bytes(HEADER_BYTES))
                self._room = self._shard_tokens
            part, tokens = tokens[: self._room], tokens[self._room :]
            self._file.write(part.astype(self._dtype).tobytes())
            self.tokens += len(part)
            self._room -= len(part)
            if self._room == 0:
                self.close()

    def close(self) -> None:
        """Write the header of the shard under way and flush it to disk."""
        if self._file is None:
            return
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        kind = next(kind for kind, dtype in SHARD_FORMATS.items() if dtype == self._dtype)
        header[:3] = (*kind, self._shard_tokens - self._room)
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
