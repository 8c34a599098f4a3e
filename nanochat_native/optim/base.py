"""What Muon and AdamW share."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanochat_native.optim.buckets import BUCKET_BYTES, Bucket, Layout, Piece, assign, split, split_rows

# As torch.optim takes them: tensors, (name, tensor) pairs, or groups: dicts whose "params" holds either, and own
# settings.
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


MASTER = "master"  # state: the exact values of what this rank owns, where others get rounded ones
DTYPES = (torch.float32, torch.bfloat16)


class Sharding(NamedTuple):
    process_group: dist.ProcessGroup
    reduce_dtype: torch.dtype | None
    gather_dtype: torch.dtype | None
    bucket_bytes: int


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose state stays float32 whatever the parameters are.

    Parameters and gradients may have any strides, except a parameter those of expand(). The step works on a contiguous
    copy of what is not contiguous, one parameter after another.

    With a process group it is sharded: parameters and gradients move into buckets, of which each rank owns a shard and
    keeps the state of that alone. step() then averages the gradients over the ranks, updates what is owned, and hands
    it to all; zero_grad() keeps the gradients' memory. Parameters must be the same on all ranks, and get a gradient
    each. reduce_dtype, gather_dtype: of what travels, None for the parameters' own; with gather_dtype the state holds
    the exact values, as "master". bucket_bytes: of a bucket, about. A sharded optimizer cannot be copied or pickled;
    its state_dict() holds this rank's part.
    """

    whole: ClassVar[bool]  # whether a parameter has one owner, or is cut by rows
    elementwise: ClassVar[tuple[str, ...]]  # state of the parameter's shape
    own_state: ClassVar[tuple[str, ...]]  # all that comes together, in the first step
    # Options of torch's optimizers that change the update, and that this one does not have.
    not_taken: ClassVar[tuple[str, ...]] = ("amsgrad", "capturable", "differentiable", "maximize")

    # Only a sharded optimizer has more than torch's own attributes, which are what copies and pickles hold.
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
        """foreach, fused: taken as torch's optimizers take them, and without effect: every step is fused."""
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

    def _shard(self, groups: list[dict[str, Any]]) -> None:
        """Moves the groups' parameters into buckets. No rank waits for another."""
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
        """The parameters of each bucket, and where they lie, for each dtype and device. Empty ones lie nowhere."""
        kinds: dict[Any, list[tuple[str, Tensor]]] = {}
        for group in groups:
            for index, parameter in enumerate(group["params"]):
                name = self.name_of(group, index)
                if not parameter.requires_grad:
                    raise ValueError(f"{name} is frozen; a sharded optimizer takes parameters that get a gradient")
                if parameter.numel():
                    kinds.setdefault((parameter.dtype, parameter.device), []).append((name, parameter))
        for named in kinds.values():
            if self.whole:
                runs = split(named, ranks, bucket_bytes)
                yield runs, assign([[parameter for _, parameter in run] for run in runs], ranks)
            else:
                yield [[pair] for pair in named], [split_rows(parameter, ranks) for _, parameter in named]

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError or TypeError for settings or parameters that the optimizer does not take."""
        self._check_options(group)
        check_number("lr", group["lr"])
        check_number("weight_decay", group["weight_decay"])
        if not isinstance(group["cautious"], bool):
            raise ValueError(f"cautious is {group['cautious']!r}; it takes True or False")
        seen: set[Tensor] = set()
        for index, parameter in enumerate(group["params"]):
            name = self.name_of(group, index)
            if isinstance(parameter, DTensor):
                raise TypeError(
                    f"{name} is a DTensor; {type(self).__name__} takes whole tensors and shards them itself"
                )
            self._check_dtype(name, parameter)
            if parameter in seen:
                raise ValueError(f"{name} is in its group twice; an optimizer takes each parameter once")
            seen.add(parameter)
            check_strides(name, parameter)

    def _check_dtype(self, name: str, parameter: Tensor) -> None:
        if parameter.dtype not in DTYPES:
            taken = " or ".join(map(str, DTYPES))
            raise TypeError(f"{name} is {parameter.dtype}; {type(self).__name__} takes {taken}")

    def _check_options(self, group: dict[str, Any]) -> None:
        for option in self.not_taken:
            if group.get(option):
                raise ValueError(f"{option} is {group[option]!r}; {type(self).__name__} has no such option")

    def name_of(self, group: dict[str, Any], index: int) -> str:
        names = group.get("param_names")
        return cast(str, names[index]) if names else f"parameter {index} of its group"

    def pieces(self, group: dict[str, Any], bucket: Bucket | None = None) -> list[Piece]:
        """What this rank updates of a group's parameters, of one bucket alone or of all.

        Without buckets: those with a gradient, as in torch; one without is left alone. ValueError for a sparse one,
        TypeError for a parameter that has another type by now.
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
                raise ValueError(f"the gradient of {name} is sparse; it takes a dense one")
            self._check_dtype(name, parameter)  # its module may have changed it since
            if not parameter.is_contiguous():
                check_strides(name, parameter)
            found.append(Piece(parameter, parameter, gradient))
        return found

    def _own_pieces(self) -> dict[Tensor, Piece]:
        """What this rank keeps the state of, whether it has a gradient or not."""
        if self._sharding is not None:
            return {piece.parameter: piece for bucket in self.buckets for piece in bucket.pieces}
        return {p: Piece(p, p, p) for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def restore(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Takes what this rank keeps of a parameter's whole state, once the weights are loaded.

        Tensors go to the parameter's device, except "step", which stays on the CPU.
        """
        piece = self._own_pieces().get(parameter)
        if piece is None:
            return  # another rank keeps it
        self._take(piece, {key: piece.rows_of(v) if isinstance(v, Tensor) else v for key, v in state.items()})

    def _take(self, piece: Piece, state: dict[str, Any]) -> None:
        """Copies this rank's part of a parameter's state."""
        parameter, sharding = piece.parameter, self._sharding
        keeps_master = sharding is not None and sharding.gather_dtype is not None
        if keeps_master:
            piece.values.copy_(state.get(MASTER, piece.rows_of(parameter)))  # what never travelled rounded is exact
            self.state[parameter][MASTER] = piece.values
        else:
            self.state.get(parameter, {}).pop(MASTER, None)  # where torch has just loaded it
            if sharding is None and MASTER in state:
                parameter.copy_(state[MASTER])
        for key, value in state.items():
            if isinstance(value, Tensor):
                device = "cpu" if key == "step" else parameter.device
                dtype = torch.float32 if key in self.elementwise else value.dtype
                value = value.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
            if key != MASTER:
                self.state[parameter][key] = value

    def update(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        """Updates the pieces' values, and their state, by their gradients. All of them are contiguous."""
        raise NotImplementedError

    @torch.compiler.disable  # it is a few operators; to trace it would be to compile anew for every number of steps
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
        for own in rounds:
            if own is not None:
                own.finish_reduction()
            for group, pieces in [(group, self.pieces(group, own)) for group in self.param_groups]:
                self._update_contiguous(pieces, group)
            if own is not None:
                own.start_gather()
        for bucket in self.buckets:
            bucket.finish_gather()
        return loss

    def _update_contiguous(self, pieces: list[Piece], group: dict[str, Any]) -> None:
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
                piece.values.copy_(copy)  # before the next is copied, which may share memory with this one

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        if not self.buckets:
            super().zero_grad(set_to_none)
        for bucket in self.buckets:
            bucket.zero_gradients()

    def __getstate__(self) -> dict[str, Any]:
        """torch's, each state tensor in memory of its own: pickle writes the whole memory for every view of it.

        Raises TypeError for a sharded optimizer.
        """
        if self._sharding is not None:
            raise TypeError(
                f"a sharded {type(self).__name__} cannot be copied or pickled, as a process group cannot: "
                "make another one and load the state_dict() of this one"
            )
        content = super().__getstate__()
        content["state"] = defaultdict(dict)
        for key, state in self.state.items():
            content["state"][key] = {k: _alone(v) for k, v in state.items()} if isinstance(state, dict) else state
        return content

    def __copy__(self) -> "Optimizer":
        twin = type(self).__new__(type(self))
        twin.__setstate__({**self.__getstate__(), "state": self.state})
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, and groups added later would have it
        for group in self.param_groups:
            group.setdefault("cautious", False)  # a state saved before there was the option

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; but the state is a copy that keeps its dtype, or is float32. Of a sharded optimizer: this rank's
        part.

        Raises ValueError or TypeError, before anything is loaded, for settings that the optimizer does not take and for
        state that is incomplete or does not have its parameter's shape.
        """
        loaded: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            self._check_loaded(final)
            loaded.update(final)

        # torch casts the state to the parameters' dtype, which for bfloat16 parameters loses bits: take it again.
        @torch.no_grad()
        def take(_: torch.optim.Optimizer) -> None:
            saved = self._state_in(loaded)
            for parameter, piece in self._own_pieces().items():
                self._take(piece, saved[parameter])

        # Behind the user's hooks, which may change what is loaded, and before those that see what was.
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
        """The state of each parameter in a state_dict whose groups fit."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return {p: state_dict["state"].get(key, {}) for key, p in zip(keys, parameters, strict=True)}

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        groups, saved = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved]:
            return  # torch says what does not fit
        for group, new in zip(groups, saved, strict=True):
            self.check_group({**self.defaults, **new, "params": group["params"]})
        pieces, state = self._own_pieces(), self._state_in(state_dict)
        for group in groups:
            for index, parameter in enumerate(group["params"]):
                if parameter not in pieces:
                    continue
                self._check_state(self.name_of(group, index), state[parameter], pieces[parameter].values.shape)

    def _check_state(self, name: str, state: dict[str, Any], shape: torch.Size) -> None:
        missing = [key for key in self.own_state if key not in state]
        if 0 < len(missing) < len(self.own_state):
            raise ValueError(f"the state of {name} has no {' and no '.join(missing)}; it takes all or nothing")
        for key in self.elementwise:
            if key not in state:
                continue
            if not isinstance(state[key], Tensor):
                raise TypeError(f"{key} of {name} is {type(state[key]).__name__}; it takes a tensor")
            if state[key].shape != shape:
                raise ValueError(f"{key} of {name} has shape {tuple(state[key].shape)}; it takes {tuple(shape)}")


def _alone(value: Any) -> Any:
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value


def check_number(name: str, value: Any, below: float | None = None) -> None:
    """Raises ValueError or TypeError unless value is a number, or a tensor of one, from 0 on."""
    taken = f"a number from 0{'' if below is None else f' to below {below:g}'}"
    if not isinstance(value, Real | Tensor):
        raise TypeError(f"{name} is {value!r}; it takes {taken}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it takes {taken}, or a tensor of one element")
    number = float(value)
    if not number >= 0 or (below is not None and not number < below):
        raise ValueError(f"{name} is {number}; it takes {taken}")


def check_strides(name: str, parameter: Tensor) -> None:
    """Raises ValueError for a parameter with elements that share memory, as those of expand() do."""
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        raise ValueError(
            f"{name}, shape {tuple(parameter.shape)}, is expanded: strides {parameter.stride()}; "
            "an optimizer takes parameters whose elements do not share memory"
        )


def as_operand(value: Any, device: torch.device) -> float | Tensor:
    """A setting as the operators take it: a number, or a 0-d float64 tensor on the parameters' device.

    A tensor that lies there already stays a tensor, which on a GPU is read without waiting; another is read here.
    """
    if isinstance(value, Tensor) and value.device == device:
        return value.detach().reshape(()).double()
    return float(value)


def buckets_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[Bucket]:
    """Of all that are sharded."""
    return [bucket for each in optimizers if isinstance(each, Optimizer) for bucket in each.buckets]
