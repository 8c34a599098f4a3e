"""The base class of Muon and AdamW."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanochat_native.ops import weight_copies
from nanochat_native.ops.dtypes import widest_dtype
from nanochat_native.optim.buckets import BUCKET_BYTES, Bucket, Layout, ShardPiece, assign, split, split_rows

# Parameters as in torch.optim: tensors; (name, tensor) pairs; or groups, dicts with either under "params" and with
# their own settings.
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


MASTER = "master"  # key of the state: the exact values of this rank's shard, if the other ranks get rounded values
DTYPES = (torch.float32, torch.bfloat16)


class Sharding(NamedTuple):
    """The ranks of a sharded optimizer, and the types in which data travels; None for the type of the parameters."""

    process_group: dist.ProcessGroup
    reduce_dtype: torch.dtype | None
    gather_dtype: torch.dtype | None
    bucket_bytes: int


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose state is float32 for parameters of any type.

    Parameters and gradients may have any strides, but a parameter must not be expanded. The step copies non-contiguous
    tensors, one parameter after another.

    With a process group the optimizer is sharded. Parameters and gradients move into buckets; each rank owns a shard of
    a bucket and keeps only the state of that shard. step() averages the gradients over the ranks, updates the local
    shard, and gathers the shards on all ranks. zero_grad() keeps the memory of the gradients. The parameters must be
    the same on all ranks, and each must get a gradient. A sharded optimizer cannot be copied or pickled, and its
    state_dict() holds this rank's part.

    Args:
        process_group: the ranks over which the optimizer is sharded.
        reduce_dtype: the type in which gradients travel, None for that of the parameters.
        gather_dtype: the type in which parameters travel, None for that of the parameters. With it the state holds the
            exact values, as "master".
        bucket_bytes: the approximate size of a bucket.
        foreach, fused: accepted for compatibility with torch, without effect: every step is fused.
    """

    whole: ClassVar[bool]  # whether a parameter has one owner; else it is split by rows
    elementwise: ClassVar[tuple[str, ...]]  # keys of the state that has the shape of the parameter
    required_state: ClassVar[tuple[str, ...]]  # keys of the state that the first step creates, all of them
    # Options of torch's optimizers that change the update and are not supported here.
    unsupported: ClassVar[tuple[str, ...]] = ("amsgrad", "capturable", "differentiable", "maximize")

    # Class attributes: an optimizer without shards has the instance attributes of torch alone, so copies and pickles
    # keep their format.
    buckets: tuple[Bucket, ...] = ()
    _sharding: Sharding | None = None

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        process_group: dist.ProcessGroup | None = None,
        reduce_dtype: torch.dtype | None = None,
        gather_dtype: torch.dtype | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, defaults)
        if process_group is not None:
            self._sharding = Sharding(process_group, reduce_dtype, gather_dtype, bucket_bytes)
            self._shard(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
            if self._sharding is not None:
                self._shard(self.param_groups[-1:])
        except Exception:
            del self.param_groups[-1]
            raise
        weight_copies.keep(self.param_groups[-1]["params"])

    def _shard(self, groups: list[dict[str, Any]]) -> None:
        """Move the parameters of the groups into buckets. No rank waits for another."""
        assert self._sharding is not None
        group, reduce_dtype, gather_dtype, bucket_bytes = self._sharding
        added = [
            Bucket(run, group, layout, reduce_dtype=reduce_dtype, gather_dtype=gather_dtype)
            for runs, layouts in self._layouts(groups, dist.get_world_size(group), bucket_bytes)
            for run, layout in zip(runs, layouts, strict=True)
        ]
        self.buckets += tuple(added)
        if gather_dtype is not None:
            for piece in (piece for bucket in added for piece in bucket.pieces):
                self.state[piece.parameter][MASTER] = piece.values

    def _layouts(
        self, groups: list[dict[str, Any]], ranks: int, bucket_bytes: int
    ) -> Iterator[tuple[list[list[tuple[str, Tensor]]], list[Layout]]]:
        """Yield the parameters and the layout of each bucket, for each dtype and device, without empty parameters."""
        kinds: dict[Any, list[tuple[str, Tensor]]] = {}
        for group in groups:
            for index, parameter in enumerate(group["params"]):
                name = self.name_of(group, index)
                if not parameter.requires_grad:
                    raise ValueError(
                        f"{name} is frozen; every parameter of a sharded optimizer must require a gradient"
                    )
                if parameter.numel():
                    kinds.setdefault((parameter.dtype, parameter.device), []).append((name, parameter))
        for named in kinds.values():
            if self.whole:
                runs = split(named, ranks, bucket_bytes)
                yield runs, assign([[parameter for _, parameter in run] for run in runs], ranks)
            else:
                yield [[pair] for pair in named], [split_rows(parameter, ranks) for _, parameter in named]

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError for settings or parameters that the optimizer does not support."""
        self._check_options(group)
        check_number("lr", group["lr"])
        check_number("weight_decay", group["weight_decay"])
        if not isinstance(group["cautious"], bool):
            raise ValueError(f"cautious must be True or False, got {group['cautious']!r}")
        seen: set[Tensor] = set()
        for index, parameter in enumerate(group["params"]):
            name = self.name_of(group, index)
            if isinstance(parameter, DTensor):
                raise TypeError(
                    f"{name} must be a whole tensor, got a DTensor; {type(self).__name__} shards parameters itself"
                )
            self._check_dtype(name, parameter)
            if parameter in seen:
                raise ValueError(f"{name} is in its group twice; list each parameter once")
            seen.add(parameter)
            check_strides(name, parameter)

    def _check_dtype(self, name: str, parameter: Tensor) -> None:
        if parameter.dtype not in DTYPES:
            allowed = " or ".join(map(str, DTYPES))
            raise TypeError(f"{name} must be {allowed} for {type(self).__name__}, got {parameter.dtype}")

    def _check_options(self, group: dict[str, Any]) -> None:
        for option in self.unsupported:
            if group.get(option):
                raise ValueError(f"{type(self).__name__} does not support {option}, got {option}={group[option]!r}")

    def name_of(self, group: dict[str, Any], index: int) -> str:
        """Return the name of a parameter for errors."""
        names = group.get("param_names")
        return cast(str, names[index]) if names else f"parameter {index} of its group"

    def local_pieces(self, group: dict[str, Any], bucket: Bucket | None = None) -> list[ShardPiece]:
        """Return the parts of a group's parameters that this rank updates, in one bucket or in all of them.

        Without buckets these are the parameters with a gradient, as in torch.

        Raises:
            ValueError: a gradient is sparse.
            TypeError: the type of a parameter has changed since it was added.
        """
        if self.buckets:
            chosen = self.buckets if bucket is None else [bucket]
            mine = set(group["params"])
            return [piece for each in chosen for piece in each.pieces if piece.parameter in mine]
        found = []
        for index, parameter in enumerate(group["params"]):
            gradient = parameter.grad
            if gradient is None:
                continue
            name = self.name_of(group, index)
            if gradient.is_sparse:
                raise ValueError(f"the gradient of {name} is sparse; it must be dense")
            self._check_dtype(name, parameter)  # the module may have been converted
            if not parameter.is_contiguous():
                check_strides(name, parameter)
            found.append(ShardPiece(parameter, parameter, gradient))
        return found

    def _stored_pieces(self) -> dict[Tensor, ShardPiece]:
        """Return the parts of parameters whose state this rank keeps, with or without a gradient."""
        if self._sharding is not None:
            return {piece.parameter: piece for bucket in self.buckets for piece in bucket.pieces}
        return {p: ShardPiece(p, p, p) for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def restore(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Load this rank's part of a parameter's whole state, after the weights are loaded.

        Tensors move to the device of the parameter, except "step", which stays on the CPU.
        """
        piece = self._stored_pieces().get(parameter)
        if piece is None:
            return  # another rank keeps it
        self._take(piece, {key: piece.rows_of(v) if isinstance(v, Tensor) else v for key, v in state.items()})

    def _take(self, piece: ShardPiece, state: dict[str, Any]) -> None:
        """Copy this rank's part of a parameter's state into this optimizer."""
        parameter, sharding = piece.parameter, self._sharding
        keeps_master = sharding is not None and sharding.gather_dtype is not None
        if keeps_master:
            piece.values.copy_(state.get(MASTER, piece.rows_of(parameter)))  # without a master the parameter is exact
            self.state[parameter][MASTER] = piece.values
        else:
            self.state.get(parameter, {}).pop(MASTER, None)  # torch has just loaded it
            if sharding is None and MASTER in state:
                parameter.copy_(state[MASTER])
        for key, value in state.items():
            if isinstance(value, Tensor):
                device = "cpu" if key == "step" else parameter.device
                dtype = torch.float32 if key in self.elementwise else value.dtype
                value = value.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
            if key != MASTER:
                self.state[parameter][key] = value

    def update(self, pieces: list[ShardPiece], group: dict[str, Any]) -> None:
        """Update the values of the pieces and their state. Values and gradients are contiguous."""
        raise NotImplementedError

    @torch.compiler.disable  # a step is a few operators, and would be compiled again at every number of steps
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_options(group)
        for bucket in self.buckets:
            bucket.start_reduction()
        rounds: list[Bucket | None] = [*self.buckets] or [None]
        for bucket_or_none in rounds:
            if bucket_or_none is not None:
                bucket_or_none.finish_reduction()
            for group, pieces in [(group, self.local_pieces(group, bucket_or_none)) for group in self.param_groups]:
                self._update_contiguous(pieces, group)
            if bucket_or_none is not None:
                bucket_or_none.start_gather()
        for bucket in self.buckets:
            bucket.finish_gather()
        return loss

    def _update_contiguous(self, pieces: list[ShardPiece], group: dict[str, Any]) -> None:
        pieces = [
            piece if piece.gradient.is_contiguous() else piece._replace(gradient=piece.gradient.contiguous())
            for piece in pieces
        ]
        in_place = [piece for piece in pieces if piece.values.is_contiguous()]
        if in_place:
            self.update(in_place, group)
        for piece in pieces:
            if not piece.values.is_contiguous():
                copy = piece.values.contiguous()
                self.update([piece._replace(values=copy)], group)
                piece.values.copy_(copy)  # before the next is copied, because they may share memory

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        if not self.buckets:
            super().zero_grad(set_to_none)
        for bucket in self.buckets:
            bucket.zero_gradients()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of torch's class, each tensor in its own storage: pickle writes the whole storage of a view.

        Raises TypeError for a sharded optimizer.
        """
        if self._sharding is not None:
            raise TypeError(
                f"a sharded {type(self).__name__} cannot be copied or pickled, because a process group cannot: "
                "create another one and load the state_dict() of this one"
            )
        content = super().__getstate__()
        content["state"] = defaultdict(dict)
        for key, state in self.state.items():
            content["state"][key] = (
                {k: _with_own_storage(v) for k, v in state.items()} if isinstance(state, dict) else state
            )
        return content

    def __copy__(self) -> "Optimizer":
        copied = type(self).__new__(type(self))
        copied.__setstate__({**self.__getstate__(), "state": self.state})
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, and later groups would inherit it
        for group in self.param_groups:
            group.setdefault("cautious", False)  # a state from before the option existed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as in torch, but copied, in its own type or in float32. A sharded optimizer loads this rank's
        part.

        Raises ValueError or TypeError, before anything is loaded, for unsupported settings, for incomplete state, and
        for state without the shape of its parameter.
        """
        loaded: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            self._check_loaded(final)
            loaded.update(final)

        # torch casts the state to the type of the parameters, which loses bits for bfloat16: load it again.
        @torch.no_grad()
        def take(_: torch.optim.Optimizer) -> None:
            saved = self._state_in(loaded)
            for parameter, piece in self._stored_pieces().items():
                self._take(piece, saved[parameter])

        # The check runs after the user's pre-hooks, which may change the state, and the load before the post-hooks.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(take, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _state_in(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """Return the state of each parameter in a state_dict whose groups match."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return {p: state_dict["state"].get(key, {}) for key, p in zip(keys, parameters, strict=True)}

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        groups, saved = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
            return  # torch raises the error
        for group, new in zip(groups, saved, strict=True):
            self.check_group({**self.defaults, **new, "params": group["params"]})
        pieces, state = self._stored_pieces(), self._state_in(state_dict)
        for group in groups:
            for index, parameter in enumerate(group["params"]):
                if parameter not in pieces:
                    continue
                self._check_state(self.name_of(group, index), state[parameter], pieces[parameter].values.shape)

    def _check_state(self, name: str, state: dict[str, Any], shape: torch.Size) -> None:
        missing = [key for key in self.required_state if key not in state]
        if 0 < len(missing) < len(self.required_state):
            raise ValueError(
                f"the state of {name} must have all of {', '.join(self.required_state)} or none, "
                f"missing {', '.join(missing)}"
            )
        for key in self.elementwise:
            if key not in state:
                continue
            if not isinstance(state[key], Tensor):
                raise TypeError(f"{key} of {name} must be a tensor, got {type(state[key]).__name__}")
            if state[key].shape != shape:
                raise ValueError(f"{key} of {name} must have shape {tuple(shape)}, got {tuple(state[key].shape)}")


def _with_own_storage(value: Any) -> Any:
    """Return a copy of a tensor that is a view of a larger storage; other values as they are."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value


def check_number(name: str, value: Any, below: float | None = None) -> None:
    """Raise ValueError or TypeError unless value is a number >= 0, or a tensor of one; with `below`, also < below."""
    allowed = f"a number >= 0{'' if below is None else f' and < {below:g}'}"
    if not isinstance(value, Real | Tensor):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name} must be {allowed} or a tensor of one element, got a tensor of shape {tuple(value.shape)}"
        )
    number = float(value)
    if not number >= 0 or (below is not None and not number < below):
        raise ValueError(f"{name} must be {allowed}, got {number}")


def check_strides(name: str, parameter: Tensor) -> None:
    """Raise ValueError for a parameter whose elements share memory, such as an expanded one."""
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        raise ValueError(
            f"{name}, shape {tuple(parameter.shape)}, is expanded: strides {parameter.stride()}; "
            "the elements of a parameter must not share memory"
        )


def as_operand(value: Any, device: torch.device) -> float | Tensor:
    """Return a setting in the form of the operators: a number, or a 0-d tensor of the widest type on the device.

    A tensor on the device stays a tensor, so that a GPU reads it without synchronizing. Others become numbers.
    """
    if isinstance(value, Tensor) and value.device == device:
        return value.detach().reshape(()).to(widest_dtype(device))
    return float(value)


def copies_of(pieces: list[ShardPiece]) -> list[Tensor]:
    """Return the bfloat16 copies that an update of the pieces must write: of all pieces, or none."""
    return [copy for piece in pieces if (copy := piece.low_precision_copy) is not None]


def mark_copies(pieces: list[ShardPiece]) -> None:
    """State that the copies of copies_of(pieces) have been written."""
    for piece in pieces:
        if piece.low_precision_copy is not None:
            weight_copies.mark_fresh(piece.parameter)


def buckets_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[Bucket]:
    """Return the buckets of all sharded optimizers."""
    return [bucket for each in optimizers if isinstance(each, Optimizer) for bucket in each.buckets]
