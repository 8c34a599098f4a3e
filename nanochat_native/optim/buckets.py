"""Contiguous buffers for parameters and gradients on many ranks. The collectives use them in place, without copies.

A bucket is a contiguous buffer, split into one shard of equal size for each rank. Parameters and their gradients are
views of the buffer. A rank owns its local shard: it updates the shard and keeps only its optimizer state. A matrix lies
in a single shard; the matrices are balanced by work and by bytes. An embedding is split by rows, padded to a multiple
of the ranks.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_native.ops import weight_copies

BUCKET_BYTES = 256 << 20  # of gradients; small enough that reductions overlap with the backward pass
MATRICES_PER_SHARD = 4  # at least so many of the largest matrix fit into a shard
ALIGNMENT = 64  # elements: shards and matrices start at multiples of 256 bytes

# torch 2.13 introduced the first name of each pair; earlier versions have the second.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ShardPiece(NamedTuple):
    """The part of a parameter that this rank updates: all of it, or its rows from first_row on."""

    parameter: Tensor
    values: Tensor
    gradient: Tensor
    first_row: int = 0

    @property
    def low_precision_copy(self) -> Tensor | None:
        """The bfloat16 copy that an update of the values must write too, or None.

        A copy of a parameter in a bucket is written when the bucket has been gathered.
        """
        return weight_copies.copy_for_update(self.parameter) if self.values is self.parameter else None

    def rows_of(self, whole: Tensor) -> Tensor:
        """Return this piece's rows of a tensor with the parameter's rows. Other tensors are returned unchanged."""
        if not self.values.ndim or not whole.ndim or whole.size(0) != self.parameter.size(0):
            return whole
        return whole[self.first_row : self.first_row + self.values.size(0)]


class Layout(NamedTuple):
    """The layout of a bucket: the owner of each parameter, its offset, and the number of elements in a shard."""

    owners: list[int]
    offsets: list[int]
    shard: int


class Bucket:
    """Parameters of one dtype and device, their gradients, and the collectives on them.

    Args:
        named: the names and the parameters.
        group: the ranks.
        layout: the place of each parameter.
        reduce_dtype: the type in which gradients travel, None for that of the parameters.
        gather_dtype: the type in which parameters travel, None for that of the parameters. With it the owner keeps the
            exact values separately, and all ranks, including the owner, use the rounded values.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Tensor]],
        group: dist.ProcessGroup,
        layout: Layout,
        *,
        reduce_dtype: torch.dtype | None = None,
        gather_dtype: torch.dtype | None = None,
    ) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.reduce_dtype, self.gather_dtype = reduce_dtype, gather_dtype
        self.owners, offsets, self.shard = layout
        self.whole = self.owners[0] >= 0
        first = self.parameters[0]
        self.flat_values = torch.zeros(self.size * self.shard, dtype=first.dtype, device=first.device)
        self.flat_gradients = torch.zeros_like(self.flat_values)
        local = slice(self.rank * self.shard, (self.rank + 1) * self.shard)
        self.shard_gradients = self.flat_gradients[local]
        self._places = [slice(offset, offset + p.numel()) for p, offset in zip(self.parameters, offsets, strict=True)]
        self._views: list[Tensor] = []
        with torch.no_grad():
            for parameter, place in zip(self.parameters, self._places, strict=True):
                self.flat_values[place].copy_(parameter.flatten())
                parameter.data = self.flat_values[place].view(parameter.shape)
                self._views.append(self.flat_gradients[place].view(parameter.shape))
        self.shard_values = self.flat_values[local]
        if gather_dtype is not None:
            self.shard_values = self.shard_values.clone()
        self._pieces = self._make_pieces(offsets)
        self._received: Tensor | None = None
        self._works: list[Any] = []
        self.reduced = False
        self._arrived: set[int] = set()
        for index, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda p, i=index: self._arrive(i))
        self.when_complete: Any = None  # called when all gradients of a backward pass have arrived
        self.zero_gradients()

    def _make_pieces(self, offsets: list[int]) -> list[tuple[int, int, Tensor, Tensor]]:
        """Return (index, first row, values, gradients) of each parameter in the local shard."""
        if not self.whole:
            parameter = self.parameters[0]
            rows, width = _rows(parameter)
            first = self.rank * (self.shard // width)
            count = max(0, min(self.shard // width, rows - first))
            if not count:
                return []
            shape = (count, *parameter.shape[1:]) if parameter.ndim else ()
            values, gradients = (x[: count * width].view(shape) for x in (self.shard_values, self.shard_gradients))
            return [(0, first, values, gradients)]
        pieces = []
        for index, (parameter, owner, offset) in enumerate(zip(self.parameters, self.owners, offsets, strict=True)):
            if owner == self.rank:
                place = slice(offset - self.rank * self.shard, offset - self.rank * self.shard + parameter.numel())
                values, gradients = (x[place].view(parameter.shape) for x in (self.shard_values, self.shard_gradients))
                pieces.append((index, 0, values, gradients))
        return pieces

    @property
    def pieces(self) -> list[ShardPiece]:
        """The parts of parameters in the local shard."""
        return [ShardPiece(self.parameters[i], values, grads, row) for i, row, values, grads in self._pieces]

    def zero_gradients(self) -> None:
        """Set the gradients to zero, in their place in the bucket."""
        if self._works:  # a reduction of a backward pass without a step
            self._works[0].wait()
            self._received, self._works = None, []
        self.flat_gradients.zero_()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view
        self._arrived.clear()
        self.reduced = False

    def _arrive(self, index: int) -> None:
        self._collect(index)
        self._arrived.add(index)
        self.reduced = False
        if self.when_complete is not None and len(self._arrived) == len(self.parameters):
            self.when_complete(self)

    def _collect(self, index: int) -> None:
        """Copy a gradient that was replaced by another tensor back into the bucket."""
        parameter, view = self.parameters[index], self._views[index]
        if parameter.grad is None or parameter.grad.data_ptr() == view.data_ptr():
            return
        view.copy_(parameter.grad)
        parameter.grad = view
        self._arrived.add(index)
        self.reduced = False

    def start_reduction(self) -> None:
        """Start to average the gradients over the ranks, each into the shard of its owner."""
        if self._works:
            return
        for index in range(len(self.parameters)):
            self._collect(index)
        if self.reduced:
            return
        absent = {i for i, p in enumerate(self.parameters) if p.grad is None or not p.requires_grad}
        missing = [
            name for i, name in enumerate(self.names) if i in absent or (self._arrived and i not in self._arrived)
        ]
        if missing:
            raise ValueError(
                f"no gradient came for {', '.join(missing)}: every parameter of a sharded optimizer needs one"
            )
        gradients = self.flat_gradients
        if self.reduce_dtype is not None:
            gradients = gradients.to(self.reduce_dtype)
        if gradients.is_cuda:
            received = (
                self.shard_gradients if gradients is self.flat_gradients else torch.empty_like(gradients[: self.shard])
            )
            work = _reduce_scatter(received, gradients, dist.ReduceOp.AVG, group=self.group, async_op=True)
        else:
            received = torch.empty_like(gradients)
            work = dist.all_to_all_single(received, gradients, group=self.group, async_op=True)
        self._received, self._works = received, [work, gradients]

    def finish_reduction(self) -> None:
        """Wait until the local shard holds the averages."""
        self.start_reduction()
        if self.reduced:
            return
        self._works[0].wait()
        assert self._received is not None
        if self._received.numel() > self.shard:
            # In float64 the mean of equal numbers is that number, and the order of the ranks rarely matters.
            self.shard_gradients.copy_(self._received.view(self.size, self.shard).double().mean(dim=0))
        elif self._received.data_ptr() != self.shard_gradients.data_ptr():
            self.shard_gradients.copy_(self._received)
        self._received, self._works, self.reduced = None, [], True

    def start_gather(self) -> None:
        """Start to send the local shard to all ranks."""
        values, target = self.shard_values, self.flat_values
        if self.gather_dtype is not None:
            values, target = values.to(self.gather_dtype), torch.empty_like(target, dtype=self.gather_dtype)
        elif not values.is_cuda:
            values = values.clone()  # gloo does not document that the two may overlap
        work = _all_gather(target, values, group=self.group, async_op=True)
        self._works = [work, values, target]

    def finish_gather(self) -> None:
        """Wait until all shards have arrived, and write the bfloat16 copies of the parameters that have one."""
        work, _, target = self._works
        work.wait()
        if target is not self.flat_values:
            self.flat_values.copy_(target)
        torch.autograd.graph.increment_version(self.parameters)  # they do not share the counter of flat_values
        values = None
        if target.dtype == torch.bfloat16:
            values = [target[place].view_as(p) for p, place in zip(self.parameters, self._places, strict=True)]
        weight_copies.refresh(self.parameters, values)
        self._works = []
        self._arrived.clear()

    def traffic_bytes(self) -> int:
        """Return the bytes that this rank sends per step: other ranks' gradients, and its shard to every other rank."""
        sizes = [(dtype or self.flat_values.dtype).itemsize for dtype in (self.reduce_dtype, self.gather_dtype)]
        return sum(sizes) * self.shard * (self.size - 1)


def split_rows(parameter: Tensor, ranks: int) -> Layout:
    """Return the layout of one parameter that is split by rows and has no single owner."""
    rows, width = _rows(parameter)
    return Layout([-1], [0], -(-rows // ranks) * width)


def _rows(parameter: Tensor) -> tuple[int, int]:
    """Return the number of rows and the elements in a row. A parameter without dimensions is one row."""
    rows = parameter.size(0) if parameter.ndim else 1
    return rows, parameter.numel() // rows


def assign(runs: Sequence[Sequence[Tensor]], ranks: int) -> list[Layout]:
    """Return the layouts of buckets of matrices.

    Each matrix of a bucket, the largest first, goes to the rank with the least work and bytes of all buckets so far.
    Matrices of one shape lie side by side, so that they form one batch.
    """
    everything = [matrix for run in runs for matrix in run]
    all_work, all_numel = sum(map(_work, everything)), sum(map(_padded, everything))
    loads = [(0.0, 0.0)] * ranks
    layouts = []
    for run in runs:
        share = [(_work(m) / all_work, _padded(m) / all_numel) for m in run]
        owners, here = [0] * len(run), [0] * ranks
        for index in sorted(range(len(run)), key=lambda i: (-sum(share[i]), i)):
            added = [(w + share[index][0], n + share[index][1]) for w, n in loads]
            size, all_here = _padded(run[index]), sum(map(_padded, run))
            # Shares of the work and the bytes of all buckets, and of the bytes of this one, because its shards are
            # padded.
            score = [max(added[r]) + (here[r] + size) / all_here for r in range(ranks)]
            owner = min(range(ranks), key=lambda r: (score[r], r))
            loads[owner], owners[index] = added[owner], owner
            here[owner] += _padded(run[index])
        shard = max(here)
        offsets = [0] * len(run)
        for rank in range(ranks):
            at = rank * shard
            mine = [i for i, owner in enumerate(owners) if owner == rank]
            for index in sorted(mine, key=lambda i: (tuple(run[i].shape), i)):
                offsets[index], at = at, at + _padded(run[index])
        layouts.append(Layout(owners, offsets, shard))
    return layouts


def _work(matrix: Tensor) -> float:
    return float(matrix[..., 0, 0].numel() * min(matrix.shape[-2:]) ** 2 * max(matrix.shape[-2:]))


def _padded(matrix: Tensor) -> int:
    return -(-matrix.numel() // ALIGNMENT) * ALIGNMENT


def split(named: Sequence[tuple[str, Tensor]], ranks: int, limit: int = BUCKET_BYTES) -> list[list[tuple[str, Tensor]]]:
    """Split parameters into runs of about `limit` bytes, in the order in which their gradients arrive, the last first.

    With many ranks the runs are larger, so that the shards of a run have similar sizes.
    """
    if not named:
        return []
    limit = max(limit, MATRICES_PER_SHARD * ranks * max(parameter.nbytes for _, parameter in named))
    runs: list[list[tuple[str, Tensor]]] = []
    left = 0  # bytes that fit into the last run
    for name, parameter in reversed(named):
        if not runs or parameter.nbytes > left:
            runs.append([])
            left = limit
        runs[-1].append((name, parameter))
        left -= parameter.nbytes
    return runs


class overlap_backward:  # noqa: N801 (called as a function)
    """A context for the last backward pass of a step: the reduction of a bucket starts when its gradients are complete.

    Reductions start in the same order on all ranks: that of `parameters`, those of the model, from the last on.
    """

    def __init__(self, buckets: Iterable[Bucket], parameters: Iterable[Tensor]) -> None:
        place = {parameter: index for index, parameter in enumerate(parameters)}
        self.buckets = sorted(buckets, key=lambda bucket: -min(place[p] for p in bucket.parameters))

    def __enter__(self) -> None:
        complete: set[int] = set()
        waiting = list(self.buckets)

        def start(bucket: Bucket) -> None:
            complete.add(id(bucket))
            while waiting and id(waiting[0]) in complete:
                waiting.pop(0).start_reduction()

        for bucket in self.buckets:
            bucket._arrived.clear()
            bucket.when_complete = start

    def __exit__(self, *_: object) -> None:
        for bucket in self.buckets:
            bucket.when_complete = None
