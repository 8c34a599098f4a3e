"""What Muon and AdamW share."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_native.optim import buckets
from nanochat_native.optim.buckets import Bucket, Piece

# As torch.optim takes them: tensors, (name, tensor) pairs, or groups: dicts whose "params" holds either, and own
# settings.
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


MASTER = "master"  # state: the exact values of what this rank owns, where others get rounded ones


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose groups remember their first rate as "initial_lr", for schedules to multiply, and
    whose state stays float32 whatever the parameters are.

    With a process group it is sharded: parameters and gradients move into buckets, of which each rank owns a shard and
    keeps the state of that alone. step() then averages the gradients over the ranks, updates what is owned, and hands
    it to all; zero_grad() keeps the gradients' memory. Parameters must be the same on all ranks, and get a gradient
    each. reduce_dtype, gather_dtype: of what travels, None for the parameters' own; with gather_dtype the state holds
    the exact values, as "master". bucket_bytes: of a bucket, about.
    """

    whole: ClassVar[bool]  # whether a parameter has one owner, or is cut by rows

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        process_group: dist.ProcessGroup | None = None,
        reduce_dtype: torch.dtype | None = None,
        gather_dtype: torch.dtype | None = None,
        bucket_bytes: int = buckets.BUCKET_BYTES,
    ) -> None:
        super().__init__(params, defaults)
        for group in self.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
            self.check_group(group)
        self.buckets: list[Bucket] = []
        if process_group is not None:
            ranks = dist.get_world_size(process_group)
            dtypes = {"reduce_dtype": reduce_dtype, "gather_dtype": gather_dtype}
            for runs, layouts in self._layouts(ranks, bucket_bytes):
                self.buckets += [
                    Bucket(run, process_group, layout, **dtypes) for run, layout in zip(runs, layouts, strict=True)
                ]
        if gather_dtype is not None:
            for piece in (piece for bucket in self.buckets for piece in bucket.pieces):
                self.state[piece.parameter][MASTER] = piece.values

    def _layouts(
        self, ranks: int, bucket_bytes: int
    ) -> Iterator[tuple[list[list[tuple[str, Tensor]]], list[buckets.Layout]]]:
        """The parameters of each bucket, and where they lie, for each dtype and device."""
        kinds: dict[Any, list[tuple[str, Tensor]]] = {}
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                name = self.name_of(group, index)
                if not parameter.requires_grad:
                    raise ValueError(f"{name} is frozen; a sharded optimizer takes parameters that get a gradient")
                kinds.setdefault((parameter.dtype, parameter.device), []).append((name, parameter))
        for named in kinds.values():
            if self.whole:
                runs = buckets.split(named, ranks, bucket_bytes)
                yield runs, buckets.assign([[parameter for _, parameter in run] for run in runs], ranks)
            else:
                yield [[pair] for pair in named], [buckets.split_rows(parameter, ranks) for _, parameter in named]

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for settings or parameters that the optimizer does not take."""
        if not group["lr"] >= 0 or not group["weight_decay"] >= 0:
            raise ValueError(f"lr is {group['lr']}, weight_decay {group['weight_decay']}; neither may be below 0")
        if not isinstance(group["cautious"], bool):
            raise ValueError(f"cautious is {group['cautious']!r}; it takes True or False")

    def name_of(self, group: dict[str, Any], index: int) -> str:
        names = group.get("param_names")
        return cast(str, names[index]) if names else f"parameter {index} of its group"

    def pieces(self, group: dict[str, Any], bucket: Bucket | None = None) -> list[Piece]:
        """What this rank updates of a group's parameters, of one bucket alone or of all.

        Without buckets: those with a gradient, as in torch; one without is left alone. ValueError for a sparse one.
        """
        if self.buckets:
            chosen = self.buckets if bucket is None else [bucket]
            mine = set(group["params"])
            return [piece for each in chosen for piece in each.pieces if piece.parameter in mine]
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise ValueError(f"the gradient of {self.name_of(group, index)} is sparse; it takes a dense one")
        return [Piece(p, p, p.grad) for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def restore(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Takes what this rank keeps of a parameter's whole state, once the weights are loaded.

        Tensors go to the parameter's device, except 0-d ones, which stay on the CPU.
        """
        piece = Piece(parameter, parameter, parameter)
        if self.buckets:
            own = (piece for bucket in self.buckets for piece in bucket.pieces if piece.parameter is parameter)
            found = next(own, None)
            if found is None:
                return  # another rank keeps it
            piece = found
        rows = slice(piece.first_row, piece.first_row + piece.values.size(0))

        def part(value: Tensor) -> Tensor:
            return value[rows] if value.ndim and value.size(0) == parameter.size(0) else value

        if not self.buckets or MASTER in self.state.get(parameter, {}):
            piece.values.copy_(part(state.get(MASTER, parameter)))  # weights that never travelled rounded are exact
        for key, value in state.items():
            if isinstance(value, Tensor):
                value = part(value).to(parameter.device if value.ndim else "cpu", copy=True)
            if key != MASTER:
                self.state[parameter][key] = value

    def update(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for bucket in self.buckets:
            bucket.start_reduction()
        rounds: list[Bucket | None] = [*self.buckets] or [None]
        for own in rounds:
            if own is not None:
                own.finish_reduction()
            for group in self.param_groups:
                pieces = self.pieces(group, own)
                if pieces:
                    self.update(pieces, group)
            if own is not None:
                own.start_gather()
        for bucket in self.buckets:
            bucket.finish_gather()
        return loss

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        if not self.buckets:
            super().zero_grad(set_to_none)
        for bucket in self.buckets:
            bucket.zero_gradients()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("cautious", False)  # a state saved before there was the option

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch has just cast the state to the parameters' dtype, which for bfloat16 parameters loses bits: take it
        # again.
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if value.ndim > 0:
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def buckets_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[Bucket]:
    """Of all that are sharded."""
    return [bucket for each in optimizers if isinstance(each, Optimizer) for bucket in each.buckets]
