"""Batches as a pure function of (seed, step), and a thread that makes them ahead of time.

The stream is cut into windows of T + 1 tokens at stride T, so that each target lies in one window. An epoch visits
every window once, in an order that a keyed permutation of [0, n) gives by computation: a Feistel network with cycle
walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). No order is stored, and the batch of any
step is found without those before it.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np
import torch

from nanochat_native.data.shards import TokenStream

Batch = tuple[torch.Tensor, torch.Tensor]

_ROUNDS = 6


class BatchLoader:
    """Training batches from a stream of tokens.

    Row r of step s is sample s * batch_rows + r of an endless sequence of epochs: each epoch is a new permutation of
    the windows, and a batch may end one epoch and begin the next. The up to T - 1 targets that fill no window are
    left out; windows begin at another offset each epoch, so that these are others each time. A rank holds a
    contiguous share of the rows, hence the global batch does not depend on `world_size`.

    Attributes:
        windows_per_epoch: how many rows make an epoch.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        batch_rows: int,
        sequence_len: int,
        seed: int,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Set up a loader of `batch_rows` global rows of `sequence_len` tokens a step.

        Raises:
            ValueError: an argument out of range, rows that `world_size` does not divide, or a stream with fewer
                windows than a batch has rows.
        """
        if batch_rows < 1 or sequence_len < 1:
            raise ValueError(f"batch_rows and sequence_len must be at least 1, got {batch_rows} and {sequence_len}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of a world of {world_size}")
        if batch_rows % world_size:
            raise ValueError(f"batch_rows {batch_rows} must be a multiple of world_size {world_size}")
        self.windows_per_epoch = stream.num_windows(sequence_len)
        if self.windows_per_epoch < batch_rows:
            raise ValueError(
                f"{len(stream):,} training tokens make {self.windows_per_epoch:,} rows of {sequence_len} tokens, a "
                f"batch takes {batch_rows:,}: give more text, a smaller batch or a shorter sequence"
            )
        self.stream = stream
        self.batch_rows = batch_rows
        self.sequence_len = sequence_len
        self.seed = seed
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._rows = range(rank * batch_rows // world_size, (rank + 1) * batch_rows // world_size)

    def batch(self, step: int) -> Batch:
        """(inputs, targets) of a step for this rank, int64 (batch_rows / world_size, sequence_len) on the device.

        Raises:
            ValueError: a negative step.
        """
        return self._to_device(self._host_batch(step))

    def iterate(self, start_step: int = 0, *, depth: int = 4) -> Prefetcher:
        """Batches from `start_step` on without end, `depth` of them prepared ahead by a thread.

        For CUDA the thread pins them and the copy to the device does not block. An error of the thread is raised by
        `next`. Close it when done, or use it in a `with`.
        """
        return Prefetcher(self._host_batch, self._to_device, start_step, depth)

    def positions(self, step: int) -> np.ndarray:
        """First token of each row's window in the stream, int64 (batch_rows / world_size,)."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        samples = step * self.batch_rows + np.arange(self._rows.start, self._rows.stop, dtype=np.int64)
        epochs, indices = np.divmod(samples, self.windows_per_epoch)
        positions = np.empty_like(samples)
        spare = (len(self.stream) - 1) % self.sequence_len
        for epoch in np.unique(epochs):
            here = epochs == epoch
            keys = _keys(self.seed, int(epoch))
            window = permute(indices[here], self.windows_per_epoch, keys[1:])
            positions[here] = window * self.sequence_len + int(keys[0]) % (spare + 1)
        return positions

    def _host_batch(self, step: int) -> Batch:
        pairs = [self.stream.pair(position, self.sequence_len) for position in self.positions(step).tolist()]
        inputs, targets = (torch.from_numpy(np.stack(rows)) for rows in zip(*pairs, strict=True))
        if self.device.type == "cuda":
            # A new thread's current device is the first one, whichever the rank's is.
            with torch.cuda.device(self.device):
                return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets

    def _to_device(self, batch: Batch) -> Batch:
        inputs, targets = batch
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)


class Prefetcher:
    """Iterator over (inputs, targets) that a background thread makes, a bounded number ahead."""

    def __init__(
        self, produce: Callable[[int], Batch], finish: Callable[[Batch], Batch], start_step: int, depth: int
    ) -> None:
        self._finish = finish
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(produce, start_step, self._queue, self._stop), name="batches", daemon=True
        )
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self.close()
                raise item
            return self._finish(item)
        raise StopIteration

    def close(self) -> None:
        """End the thread; afterwards the iterator is exhausted."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def iterate_val(
    stream: TokenStream,
    *,
    batch_rows: int,
    sequence_len: int,
    max_tokens: int | None = None,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Validation batches in the stream's order: (inputs, targets), int64 (at most batch_rows, sequence_len).

    Every target of the stream (or the first `max_tokens`, rounded up to windows) comes once; the last window is
    filled up with targets of -1, to be ignored. Ranks take contiguous shares, whose numbers of batches can differ:
    add up over ranks after the last batch only.

    Raises:
        ValueError: a stream with fewer than two tokens has no target.
    """
    if len(stream) < 2:
        raise ValueError(f"{len(stream)} validation tokens hold no target: give more text")
    targets = min(len(stream) - 1, max_tokens or len(stream))
    windows = -(-targets // sequence_len)
    start, stop = rank * windows // world_size, (rank + 1) * windows // world_size
    for first in range(start, stop, batch_rows):
        rows = list(stream.windows(sequence_len, first, min(first + batch_rows, stop)))
        inputs, wanted = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        yield inputs.to(device), wanted.to(device)


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of [0, n) sends each index.

    Args:
        index: int64 (k,), in [0, n).
        keys: uint64, one for each round of the Feistel network.

    Returns:
        int64 (k,), in [0, n).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out = index.astype(np.uint64)
    walking = np.ones(len(out), dtype=bool)
    # The network permutes a power of four above n: an image outside [0, n) is sent on until it falls inside.
    while walking.any():
        left, right = out[walking] >> half, out[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out[walking] = left << half | right
        walking = out >= n
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, epoch: int) -> np.ndarray:
    """One uint64 for the epoch's offset and one for each round."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * (1 + _ROUNDS)).digest()
    return np.frombuffer(digest, dtype="<u8")


def _produce(
    produce: Callable[[int], Batch],
    step: int,
    into: queue.Queue[Batch | BaseException],
    stop: threading.Event,
) -> None:
    item: Batch | BaseException
    while not stop.is_set():
        try:
            item = produce(step)
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                into.put(item, timeout=0.05)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        step += 1
