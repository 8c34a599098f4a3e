"""Ranks: the number of this process among those that torchrun started, and what all of them must agree on."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_native.runtime.isolation import describe

T = TypeVar("T")

TIMEOUT_SECONDS = 600  # for which a rank waits for another, unless NANOCHAT_RANK_TIMEOUT is set


class RankError(RuntimeError):
    """An error on one rank, or a difference between ranks. All ranks raise it, with the same message."""


class LostRankError(RuntimeError):
    """Another rank has ended or stalled."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, as this process sees them.

    Args:
        rank: the number of this process, from 0.
        size: the number of processes.
        local_rank: the number of this process on its machine.
        group: the process group; None for a single process.
        background: a gloo group for work beside the training, such as writing a checkpoint.
        waiting: a second gloo group, for barriers while `background` may be busy.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None
    background: dist.ProcessGroup | None = None
    waiting: dist.ProcessGroup | None = None

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def all_gather_object(self, value: T) -> list[T]:
        """Return the value of every rank, in the order of the ranks. Values are pickled."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the ranks, in place, and return it."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_reduce_max(self, number: int) -> int:
        """Return the largest number of any rank."""
        if self.group is None:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.all_gather_object(None)

    def run_collectively(self, action: Callable[[], T], *expected: type[Exception], long_running: bool = False) -> T:
        """Return action(), which every rank calls, or raise the same error on all ranks.

        Args:
            action: what to do; a single process raises its exceptions unchanged.
            expected: exceptions of a rank that are raised on all ranks, as a RankError with the message of the first.
            long_running: whether the action may take hours on some ranks, longer than a rank waits otherwise.
        """
        if self.group is None:
            return action()
        result, message = None, ""
        try:
            result = action()
        except expected as error:
            message = describe(error).removesuffix(": ")  # MemoryError() has no message
        if long_running and self.waiting is not None:
            dist.monitored_barrier(self.waiting, timeout=timedelta(days=1))
        messages = self.all_gather_object(message)
        failed = [rank for rank, text in enumerate(messages) if text]
        if failed:
            same = len({messages[rank] for rank in failed}) == 1 and len(failed) == self.size
            raise RankError(messages[failed[0]] if same else f"rank {failed[0]}: {messages[failed[0]]}")
        return result  # type: ignore[return-value]

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raise RankError on all ranks if a fact differs between two of them, with the name of the first such fact."""
        everyone = self.all_gather_object(facts)
        for rank, theirs in enumerate(everyone):
            for name, value in everyone[0].items():
                if theirs.get(name) != value:
                    raise RankError(f"the ranks differ in {name}: {value!r} on rank 0, {theirs.get(name)!r} on {rank}")


def launched_by_torchrun() -> bool:
    """Return whether torchrun started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def environment_rank() -> int:
    """Return the rank of this process as torchrun set it, also without a process group."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def init_process_group() -> Iterator[World]:
    """Join the ranks that torchrun's environment describes, by gloo for CPU tensors and by NCCL for GPU tensors.

    Raises:
        RankError: if a machine has more ranks than GPUs.
        LostRankError: in place of torch's error, if another rank ends or does not answer in time.
    """
    if not launched_by_torchrun():
        yield World()
        return
    local_rank, local_size = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    gpus = torch.cuda.device_count()
    if gpus:
        if local_size > gpus:
            raise RankError(f"--nproc_per_node must be <= {gpus}, the GPUs of this machine, got {local_size}")
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    seconds = float(os.environ.get("NANOCHAT_RANK_TIMEOUT", TIMEOUT_SECONDS))
    timeout = timedelta(seconds=seconds)
    try:
        dist.init_process_group(backend, timeout=timeout)
        background, waiting = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, dist.group.WORLD, background, waiting)
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, RankError) or not re.search(r"[Tt]imed? ?out|[Cc]onnection", str(error)):
            raise
        what = "does not answer" if re.search(r"[Tt]imed? ?out", str(error)) else "has ended"
        reason = str(error).splitlines()[0]
        raise LostRankError(f"another rank {what}, after at most {seconds:.0f} s ({reason})") from None
    # After an error the group is not destroyed, because that would wait for the other ranks.
    dist.destroy_process_group()


def exit_rank(code: int) -> int:
    """Return the exit code. Under torchrun, end this process at once instead, without waiting for the other ranks."""
    if launched_by_torchrun():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def checksums(tensors: list[Tensor]) -> Tensor:
    """Return a checksum of the bits of each tensor, int64 (n,), on the CPU: a sum weighted by position."""
    found = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(torch.uint8).flatten()
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 4)).view(torch.int32).to(torch.int64)
        weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 0x9E3779B97F4A7C1 | 1
        found.append((bits * weights).sum())
    return torch.stack(found).cpu()


def require_same_bits(world: World, named: list[tuple[str, Tensor]]) -> None:
    """Raise RankError on all ranks if a tensor differs from that of rank 0, with the name of the first such tensor."""
    everyone = world.all_gather_object(checksums([tensor for _, tensor in named]).tolist())
    for rank, theirs in enumerate(everyone):
        for (name, _), mine, other in zip(named, everyone[0], theirs, strict=True):
            if mine != other:
                raise RankError(f"{name} differs between rank {rank} and rank 0: the replicas have diverged")
