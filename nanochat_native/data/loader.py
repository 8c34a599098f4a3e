"""Batches as a pure function of (seed, step), and a thread that prepares them ahead of time.

The stream is cut into windows of T + 1 tokens at stride T, so that each target is in one window. An epoch visits every
window once. Its order is a keyed permutation of [0, n) that is computed, not stored: a Feistel network with cycle
walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The batch of any step is therefore computed
without those before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

import numpy as np
import torch

from nanochat_native.data.shards import TokenStream

Batch = tuple[torch.Tensor, torch.Tensor]

_ROUNDS = 6


class Loader(ABC):
    """Training batches as a function of the step.

    A batch has `batch_rows` rows over all ranks, and a rank has a contiguous part of them.
    """

    def __init__(
        self, batch_rows: int, sequence_len: int, device: str | torch.device, rank: int, world_size: int
    ) -> None:
        """Raise ValueError if an argument is out of range or `batch_rows` is not a multiple of `world_size`."""
        if batch_rows < 1 or sequence_len < 1:
            raise ValueError(f"batch_rows and sequence_len must be >= 1, got {batch_rows} and {sequence_len}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if batch_rows % world_size:
            raise ValueError(f"batch_rows must be a multiple of world_size {world_size}, got {batch_rows}")
        self.batch_rows = batch_rows
        self.sequence_len = sequence_len
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._rows = range(rank * batch_rows // world_size, (rank + 1) * batch_rows // world_size)

    def batch(self, step: int) -> Batch:
        """Return (inputs, targets) of a step for this rank, int64 (batch_rows / world_size, sequence_len).

        Raises:
            ValueError: The step is negative.
        """
        return self._to_device(self._host_batch(step))

    def iterate(self, start_step: int = 0, *, depth: int = 4) -> Prefetcher:
        """Return an endless iterator over the batches from `start_step` on; a thread prepares `depth` of them ahead.

        For CUDA the thread pins them, and the copy of a batch runs on a stream of its own, beside the work on the batch
        before it; the host does not wait. `next` raises an error of the thread. Close the iterator when done, or use it
        in a `with`.
        """
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            return Prefetcher(self._host_batch, lambda batch: _Copy(batch, stream), start_step, depth)
        if self.device.type != "cpu":
            return Prefetcher(self._host_batch, lambda batch: _Copied(self._to_device(batch)), start_step, depth)
        return Prefetcher(self._host_batch, None, start_step, depth)

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """Return what a checkpoint of `step` has to hold for `restore`; empty if a batch takes no others to compute."""
        return {}

    def restore(self, step: int, state: Mapping[str, torch.Tensor]) -> None:  # noqa: B027 (nothing to take over)
        """Take over what `state` returned for `step`."""

    @abstractmethod
    def epochs_of(self, tokens: int) -> float | None:
        """Return how many epochs so many training tokens are; None if the size of an epoch is not known."""

    def describe(self) -> str:
        """Return the order of the data in words; empty for the stream."""
        return ""

    @abstractmethod
    def _host_batch(self, step: int) -> Batch:
        """Return the batch of a step in the memory of the host, pinned for a GPU."""

    def _to_device(self, batch: Batch) -> Batch:
        inputs, targets = batch
        return copied(inputs, self.device), copied(targets, self.device)


class BatchLoader(Loader):
    """Training batches from a stream of tokens.

    Row r of step s is sample s * batch_rows + r of an endless sequence of epochs. Each epoch is a new permutation of
    the windows, and one batch may end an epoch and begin the next. Up to T - 1 targets fill no window and are left out;
    windows begin at another offset in each epoch, so these targets differ. A rank has a contiguous part of the rows, so
    the global batch does not depend on `world_size`.

    Attributes:
        windows_per_epoch: number of rows in an epoch.
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
        """Create a loader of `batch_rows` rows of `sequence_len` tokens for each step, over all ranks.

        Raises:
            ValueError: An argument is out of range, `batch_rows` is not a multiple of `world_size`, or the stream has
                fewer windows than a batch has rows.
        """
        super().__init__(batch_rows, sequence_len, device, rank, world_size)
        self.windows_per_epoch = stream.num_windows(sequence_len)
        if self.windows_per_epoch < batch_rows:
            raise ValueError(
                f"{len(stream):,} training tokens make {self.windows_per_epoch:,} rows of {sequence_len} tokens, but a "
                f"batch needs {batch_rows:,}: give more text, a smaller batch or a shorter sequence"
            )
        self.stream = stream
        self.seed = seed

    def positions(self, step: int) -> np.ndarray:
        """Return the first token of each row's window in the stream, int64 (batch_rows / world_size,)."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        samples = step * self.batch_rows + np.arange(self._rows.start, self._rows.stop, dtype=np.int64)
        epochs, indices = np.divmod(samples, self.windows_per_epoch)
        positions = np.empty_like(samples)
        spare = (len(self.stream) - 1) % self.sequence_len
        for epoch in np.unique(epochs):
            here = epochs == epoch
            keys = epoch_keys(self.seed, int(epoch))
            window = permute(indices[here], self.windows_per_epoch, keys[1:])
            positions[here] = window * self.sequence_len + int(keys[0]) % (spare + 1)
        return positions

    def _host_batch(self, step: int) -> Batch:
        pairs = [self.stream.pair(position, self.sequence_len) for position in self.positions(step).tolist()]
        inputs, targets = (torch.from_numpy(np.stack(rows)) for rows in zip(*pairs, strict=True))
        return pinned(inputs, self.device), pinned(targets, self.device)

    def epochs_of(self, tokens: int) -> float:
        return tokens / len(self.stream)


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy in pinned memory, from which a copy to a GPU does not block; for another device the tensor.

    Pinned memory that is freed is not used again before the copies from it have ended (torch's allocator).
    """
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # in a new thread the current device is the first one, not that of the rank
        return tensor.pin_memory()


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return what `pinned` returned as a tensor on the device. A copy to a CUDA GPU does not block.

    A copy to MPS must: it would read the memory of the host after that is freed (pytorch's issue 189690).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


class _Copy:
    """A batch on its way from pinned memory to the GPU, by a stream of its own."""

    def __init__(self, batch: Batch, stream: torch.cuda.Stream) -> None:
        inputs, targets = batch
        with torch.cuda.stream(stream):
            self._batch = (
                inputs.to(stream.device, non_blocking=True),
                targets.to(stream.device, non_blocking=True),
            )
            self._done = stream.record_event()

    def get(self) -> Batch:
        """Return the batch for use on the current stream, which waits for the copy."""
        inputs, targets = self._batch
        current = torch.cuda.current_stream(inputs.device)
        current.wait_event(self._done)
        for part in (inputs, targets):
            part.record_stream(current)  # else the copy of a later batch could overwrite it while it is in use
        return inputs, targets


class _Copied:
    """A batch on a GPU whose copies block."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def get(self) -> Batch:
        return self._batch


class Prefetcher:
    """Iterator over (inputs, targets), of which a background thread prepares a bounded number ahead.

    copy: begins the copy of a batch to a GPU; that of the next batch begins when a batch is taken. None: the batches
        are as they were produced.
    """

    def __init__(
        self,
        produce: Callable[[int], Batch],
        copy: Callable[[Batch], _Copy | _Copied] | None,
        start_step: int,
        depth: int,
    ) -> None:
        self._copy = copy
        self._ahead: _Copy | _Copied | BaseException | None = None
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
        if self._copy is None:
            return self._take()
        if self._stop.is_set():
            raise StopIteration
        ready = self._ahead or self._copy(self._take())
        self._ahead = None
        if isinstance(ready, BaseException):
            self.close()
            raise ready
        batch = ready.get()
        with contextlib.suppress(queue.Empty):  # the thread is late: the copy begins when the batch is asked for
            item = self._queue.get_nowait()
            self._ahead = item if isinstance(item, BaseException) else self._copy(item)
        return batch

    def _take(self) -> Batch:
        """Return the next batch of the thread, or raise its error."""
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self.close()
                raise item
            return item
        raise StopIteration

    def close(self) -> None:
        """End the thread. Afterwards the iterator is exhausted."""
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
    """Yield validation batches in the stream's order: (inputs, targets), int64 (at most batch_rows, sequence_len).

    Every target of the stream, or of its first `max_tokens` rounded up to windows, comes once. The last window is
    padded with targets of -1, which are to be ignored. Each rank has a contiguous part, and the numbers of batches can
    differ: sum over ranks only after the last batch.

    Raises:
        ValueError: The stream has fewer than two tokens, so there is no target.
    """
    if len(stream) < 2:
        raise ValueError(f"there must be >= 2 validation tokens, got {len(stream)}: give more text")
    device = torch.device(device)
    targets = min(len(stream) - 1, max_tokens or len(stream))
    windows = -(-targets // sequence_len)
    start, stop = rank * windows // world_size, (rank + 1) * windows // world_size
    for first in range(start, stop, batch_rows):
        rows = list(stream.windows(sequence_len, first, min(first + batch_rows, stop)))
        inputs, wanted = (pinned(torch.from_numpy(np.stack(part)), device) for part in zip(*rows, strict=True))
        yield copied(inputs, device), copied(wanted, device)


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Return the image of each index under a keyed permutation of [0, n).

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
    # The network permutes [0, a power of four >= n). An image outside [0, n) is permuted again until it is inside.
    while walking.any():
        left, right = out[walking] >> half, out[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out[walking] = left << half | right
        walking = out >= n
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Return x after the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_keys(seed: int, epoch: int) -> np.ndarray:
    """Return one uint64 for the offset of the epoch and one for each round."""
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
