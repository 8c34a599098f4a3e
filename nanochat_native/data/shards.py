"""Token shards on disk, in llm.c's format, and streams of tokens over them.

A shard is 256 int32 of header (magic, version, number of tokens, zeros) and then the tokens, little-endian:
uint16 under magic 20240520 version 1, or uint32 under magic 20240801 version 7 (llm.c, dev/data/data_common.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nanochat_native.data.file_names import printable

HEADER_BYTES = 1024
SHARD_TOKENS = 100_000_000
SEARCH_TOKENS = 1 << 24  # tokens that are compared at once
PARTS, PART_TOKENS = 256, 4096  # of a stream, for its fingerprint
# The type of the tokens by (magic, version).
SHARD_FORMATS: dict[tuple[int, int], np.dtype[Any]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}


class TokenStream:
    """A read-only sequence of token ids over one or more arrays, mostly memory-mapped shards."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) as a new int64 array.

        Raises:
            ValueError: The range is not within the stream.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"the range must be within 0:{len(self)}, got {start}:{stop}")
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

    def find(self, token: int) -> np.ndarray:
        """Return the positions of a token, int64 (k,), ascending."""
        found = [np.empty(0, dtype=np.int64)]
        for array, end in zip(self._arrays, self._ends.tolist(), strict=True):
            begin = end - len(array)
            for start in range(0, len(array), SEARCH_TOKENS):
                found.append(begin + start + np.flatnonzero(array[start : start + SEARCH_TOKENS] == token))
        return np.concatenate(found)

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the number of tokens and of the tokens; in a long stream of parts of them.

        The parts are evenly spaced, so each shard of usual size has one, and another shard in its place is noticed.
        """
        digest = hashlib.sha256(str(len(self)).encode())
        starts = np.linspace(0, max(0, len(self) - PART_TOKENS), PARTS).astype(np.int64)
        for start in starts.tolist() if len(self) > PARTS * PART_TOKENS else range(0, len(self), PART_TOKENS):
            digest.update(self.read(start, min(start + PART_TOKENS, len(self))).astype("<i8").tobytes())
        return digest.hexdigest()

    def split_at(self, position: int) -> tuple[TokenStream, TokenStream]:
        """Return the streams of tokens [0, position) and [position, len)."""
        starts = self._ends - [len(array) for array in self._arrays]
        cuts = [int(np.clip(position - start, 0, len(a))) for start, a in zip(starts, self._arrays, strict=True)]
        left = [array[:cut] for cut, array in zip(cuts, self._arrays, strict=True)]
        right = [array[cut:] for cut, array in zip(cuts, self._arrays, strict=True)]
        return TokenStream(left), TokenStream(right)

    def num_windows(self, sequence_len: int) -> int:
        """Return how many windows of `sequence_len` targets fit, with each target in one window."""
        return max(0, len(self) - 1) // sequence_len

    def pair(self, start: int, sequence_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, targets) of the window that begins at token `start`, int64 (sequence_len,) each."""
        tokens = self.read(start, start + sequence_len + 1)
        return tokens[:-1], tokens[1:]

    def windows(self, sequence_len: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield (inputs, targets), int64 (sequence_len,) each, of the windows `start` to `stop`, in order.

        All windows together have every target of the stream once. If the last window is short, its inputs are padded
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
    """Return the smallest type of a shard that can hold every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def open_shard(path: Path) -> np.ndarray:
    """Check the header and the size of a shard, and return its tokens as a memory map.

    Raises:
        ValueError: It is not a shard, or its size is not what its header says. The message begins with the path.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    magic, version, count = (int(value) for value in header[:3])
    dtype = SHARD_FORMATS.get((magic, version))
    if dtype is None:
        taken = " or ".join(f"{m} version {v}" for m, v in SHARD_FORMATS)
        raise ValueError(
            f"{printable(path)}: not a token shard of llm.c: magic must be {taken}, got {magic} version {version}; "
            "nanoGPT's .bin has uint16 tokens without a header: put 256 int32 before them: 20240520, 1, the number of "
            "tokens, and zeros"
        )
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        raise ValueError(f"{printable(path)}: must have {expected} bytes for {count} tokens, got {size}")
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))


class ShardWriter:
    """Writes a stream of tokens into shards `<split>_000000.bin`, ... of at most `shard_tokens` tokens each."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int = SHARD_TOKENS) -> None:
        self.paths: list[Path] = []
        self.tokens = 0
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._file: BinaryIO | None = None
        self._free = 0

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, an integer array (n,) of any length."""
        while len(tokens):
            if self._file is None:
                self.paths.append(self._folder / f"{self._split}_{len(self.paths):06d}.bin")
                self._file = open(self.paths[-1], "wb")  # noqa: SIM115 (closed by close)
                self._file.write(bytes(HEADER_BYTES))
                self._free = self._shard_tokens
            part, tokens = tokens[: self._free], tokens[self._free :]
            self._file.write(part.astype(self._dtype).tobytes())
            self.tokens += len(part)
            self._free -= len(part)
            if self._free == 0:
                self.close()

    def close(self) -> None:
        """Write the header of the current shard and flush it to the disk."""
        if self._file is None:
            return
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        kind = next(kind for kind, dtype in SHARD_FORMATS.items() if dtype == self._dtype)
        header[:3] = (*kind, self._shard_tokens - self._free)
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
