"""Records the operators of a training step on tensors without memory."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_native import ops
from nanochat_native.lab.roofline.costs import (
    Access,
    Call,
    Launch,
    group_of,
    is_free,
    launches_of,
    model_flops,
    tensors_in,
    total,
)
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.ops.newton_schulz import Triple, newton_schulz_schedule
from nanochat_native.optim import clip_reduced_, setup_optimizers
from nanochat_native.runtime.errors import ConfigError

META = torch.device("meta")


@dataclass(frozen=True)
class Recorded:
    """One call of an operator with its launches."""

    name: str
    group: str
    launches: tuple[Launch, ...]
    model_flops: int
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]

    @property
    def cost(self) -> Launch:
        """The sum of the launches."""
        return total(self.launches)


@dataclass
class Recorder(TorchDispatchMode):
    """A context that records every operator that runs in it and needs a kernel.

    Attributes:
        waits: how often the host read a number from the device, for which it waits.
    """

    calls: list[Recorded] = field(default_factory=list)
    waits: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        # Storages stay alive, so that no address is used twice. On the meta device they take no memory.
        self._storages: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            self.waits += 1
            return 2.0  # of a norm: a gradient that clipping has to scale
        result = func(*args, **kwargs)
        schema = func._schema
        arguments = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        arguments |= dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        call = Call(func, arguments, tuple(tensors_in(result)))
        self._storages += [t.untyped_storage() for t in (*call.results, *tensors_in(list(arguments.values())))]
        if not is_free(call):
            launches = tuple(launches_of(call))
            self.calls.append(
                Recorded(
                    call.name, group_of(call.name), launches, model_flops(call), tuple(call.reads), tuple(call.writes)
                )
            )
        return result


# --- autocast ---


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Let the model run in the precision `dtype`, as in torch.autocast, which torch does not have for meta tensors.

    The model casts the arguments of its products itself.
    """
    enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype

    def is_autocast_enabled(*device_type: str) -> bool:
        return dtype != torch.float32 if device_type == ("meta",) else enabled(*device_type)

    def get_autocast_dtype(device_type: str) -> torch.dtype:
        return dtype if device_type == "meta" else dtype_of(device_type)

    with (
        mock.patch.object(torch, "is_autocast_enabled", is_autocast_enabled),
        mock.patch.object(torch, "get_autocast_dtype", get_autocast_dtype),
    ):
        yield


# --- the step ---


@dataclass(frozen=True)
class Step:
    """The recorded operators of a training step.

    Attributes:
        micro_step: of the forward and the backward pass of one micro-batch.
        optimizers: of clipping, and of the optimizers' step.
        kept: storages that live on after the micro-step: the loss and the gradients.
        waits: how often the host waits for the device, in (the micro-step, the optimizers' phase).
        orthogonalised: the shape of each matrix that Muon updates, and the coefficients of Newton-Schulz's steps.
    """

    model: GPT
    rows: int
    micro_step: tuple[Recorded, ...]
    optimizers: tuple[Recorded, ...]
    kept: frozenset[int]
    waits: tuple[int, int]
    orthogonalised: tuple[tuple[tuple[int, int], tuple[Triple, ...]], ...]

    @property
    def tokens(self) -> int:
        """The number of tokens in the micro-batch."""
        return self.rows * self.model.config.sequence_len


def record(config: GPTConfig, rows: int, dtype: torch.dtype, optimizer: str, accumulate: bool) -> Step:
    """Record a training step of the model, as train makes it, without computing anything.

    It is the second step, because the first one creates the state of the optimizers.

    Args:
        rows: sequences in the micro-batch.
        dtype: of the activations.
        accumulate: whether the gradients are added to those of earlier micro-batches.

    Raises ConfigError if the native operators cannot be used.
    """
    try:
        native = ops.use_backend("native")
    except RuntimeError as error:
        raise ConfigError(str(error)) from None
    with native:
        return _record(config, rows, dtype, optimizer, accumulate)


def _record(config: GPTConfig, rows: int, dtype: torch.dtype, optimizer: str, accumulate: bool) -> Step:
    with META:
        model = GPT(config)
        idx = torch.empty((rows, config.sequence_len), dtype=torch.int64)
        targets = torch.empty_like(idx)
        sum_of_losses = torch.zeros(())
    optimizers = setup_optimizers(model, optimizer=optimizer)

    def micro_step() -> Tensor:
        with autocast(dtype):
            loss: Tensor = model(idx, targets) / 2
        loss.backward()
        sum_of_losses.add_(loss.detach())
        return loss

    def update() -> None:
        clip_reduced_(optimizers, 1.0)
        for each in optimizers:
            each.step()

    first = Recorder()  # lets the norm of the gradients be read
    with first:
        micro_step()
        update()
    if not accumulate:
        for each in optimizers:
            each.zero_grad()
    with Recorder() as forward_backward:
        loss = micro_step()
    with Recorder() as phase:
        update()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    kept = frozenset(t.untyped_storage()._cdata for t in (loss, sum_of_losses, *gradients))
    calls = tuple(forward_backward.calls), tuple(phase.calls)
    return Step(model, rows, *calls, kept, (forward_backward.waits, phase.waits), _orthogonalised(optimizers))


def _orthogonalised(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Any, ...]:
    found = []
    for group in (group for each in optimizers for group in each.param_groups if "ns_steps" in group):
        triples = tuple(newton_schulz_schedule(group["ns_steps"], group["coefficients"])[0])
        found += [(tuple(p.shape), triples) for p in group["params"]]
    return tuple(found)
