"""CUDA graphs of a training step: forward and backward of a micro-batch, and the update by the optimizers.

A graph is a list of kernels on fixed addresses that the host starts with one call. The batch and its divisor are copied
into fixed tensors before a replay. The gradients stay where the first graph put them. The settings that a schedule
changes, and AdamW's step, are numbers in the memory of the device.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.data import Batch
from nanochat_native.model.gpt import GPT
from nanochat_native.ops import weight_copies
from nanochat_native.optim import AdamW, Muon
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.errors import ConfigError

SETTINGS = ("lr", "weight_decay", "momentum")  # those that the optimizers read from the memory of the device
OPERATORS = (
    "attention",
    "linear_cross_entropy",
    "adamw_",
    "muon_momentum_",
    "newton_schulz_update_",
    "normuon_update_",
)

Divisor = float | Tensor


def why_not(
    device: torch.device, dtype: torch.dtype, optimizers: list[torch.optim.Optimizer], ranks: int
) -> str | None:
    """Return why the steps of a run cannot be captured; None if they can."""
    if device.type != "cuda":
        return f"--device is {device.type}"
    if ranks > 1:
        return f"{ranks} ranks exchange gradients during the backward pass"
    if dtype == torch.float16:
        return "--dtype is float16, whose loss scale changes between steps"
    if dtype != torch.bfloat16:
        return "--dtype is float32, for which attention has no CUDA kernel"
    for optimizer in optimizers:
        if type(optimizer) not in (AdamW, Muon):
            return f"{type(optimizer).__name__} takes its step from the host"
    for operator in OPERATORS:
        backend, why = ops.serves(operator, device)
        if backend != "native":
            return f"{operator} is not native: {why}"
    return None


class StepGraphs:
    """Runs the parts of a step: in the first step as they are, then as replays of graphs, with the same bits.

    The first step loads kernels and creates the state of the optimizers. If a capture fails, the parts run as they are
    from then on, and the console says why.

    Args:
        autocast: Returns the context in which the model runs.
        required: Whether a capture that fails is an error.

    Attributes:
        keeps_gradients: Whether the gradients are in memory of a graph, which must not be given back: its first
            micro-batch overwrites them.
    """

    def __init__(
        self,
        model: GPT,
        optimizers: list[torch.optim.Optimizer],
        autocast: Callable[[], AbstractContextManager[Any]],
        console: Console,
        *,
        required: bool,
    ) -> None:
        self._model, self._optimizers, self._autocast = model, optimizers, autocast
        self._console, self._required = console, required
        self._captures = self._given_up = False
        self._pool: Any = None
        self._inputs: tuple[Tensor, ...] = ()  # tokens, targets and perhaps the divisor of the graphs
        self._backward: dict[tuple[bool, float | None], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._update: _Update | None = None

    @property
    def keeps_gradients(self) -> bool:
        return bool(self._backward)

    def forward_backward(self, micro_batch: Batch, divisor: Divisor, *, first: bool) -> Tensor:
        """Compute the loss of a micro-batch over `divisor`, and add its gradients; the first one sets them.

        Returns:
            The loss, 0-d, without a gradient. The next call may overwrite it.
        """
        inputs = (*micro_batch, divisor) if isinstance(divisor, Tensor) else micro_batch
        if self._captures:
            if not self._inputs:
                self._inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given)
            key = first, None if isinstance(divisor, Tensor) else divisor
            if key in self._backward or self._capture_backward(key):
                graph, loss = self._backward[key]
                weight_copies.refresh(self._model.parameters())  # of weights that something else has changed
                graph.replay()
                return loss
        return self._run_backward(inputs, divisor)

    def update(self) -> None:
        """Update the weights by their gradients."""
        if self._captures and (self._update is not None or self._capture_update()):
            assert self._update is not None
            self._update.replay()
            return
        for optimizer in self._optimizers:
            optimizer.step()
        self._captures = not self._given_up

    def _run_backward(self, inputs: tuple[Tensor, ...], divisor: Divisor) -> Tensor:
        with self._autocast():
            loss: Tensor = self._model(inputs[0], inputs[1]) / (inputs[2] if len(inputs) > 2 else divisor)
        loss.backward()
        return loss.detach()

    def _capture_backward(self, key: tuple[bool, float | None]) -> bool:
        """Capture a graph, and return whether that succeeded."""
        first, divisor = key
        if first:  # their memory then belongs to the graph
            self._model.zero_grad(set_to_none=True)
        with self._giving_up("forward and backward"):
            graph = torch.cuda.CUDAGraph()
            with self._capture(graph):
                loss = self._run_backward(self._inputs, 1.0 if divisor is None else divisor)
            self._backward[key] = graph, loss
            return True
        if first:
            self._model.zero_grad(set_to_none=True)  # what the capture has put there
        return False

    def _capture_update(self) -> bool:
        """Capture the update, and return whether that succeeded."""
        with self._giving_up("the update"):
            weights = [w for w in self._model.parameters() if weight_copies.copy_for_update(w) is None]
            update = _Update(self._optimizers, weights)
            with update.settings_on_device(), self._capture(update.graph):
                for optimizer in self._optimizers:
                    optimizer.step()
            stale = [name for name, weight in self._model.named_parameters() if weight_copies.is_stale(weight)]
            if stale:  # a replay would not write it either
                raise RuntimeError(f"the bfloat16 copy of {stale[0]} is not written")
            self._update = update
            self._console.say("graphs   forward and backward, and the update, are replayed as CUDA graphs")
        return self._update is not None

    @contextmanager
    def _capture(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # The thread of the loader may allocate memory meanwhile. The graphs are replayed in the order of their
        # captures, so the next one may use the temporary memory of one again.
        device = self._model.wte.weight.device
        stream = torch.cuda.current_stream(device)
        try:
            with torch.cuda.device(device), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                yield
        finally:
            torch.cuda.set_stream(stream)  # which torch does not do if the capture fails
        self._pool = graph.pool()

    @contextmanager
    def _giving_up(self, part: str) -> Iterator[None]:
        """Turn a failed capture into the end of all captures, or into an error if they are required."""
        try:
            yield
        except RuntimeError as error:
            reason = f"{part} cannot be captured: {str(error).splitlines()[0]}"
            if self._required:
                raise ConfigError(f"--cuda-graphs must be auto or off here: {reason}") from error
            self._console.say(f"graphs   off: {reason}")
            self._captures, self._given_up = False, True
            self._backward.clear()


class _Update:
    """The graph of the optimizers' steps, and the numbers that it reads from the memory of the device.

    Args:
        without_copy: weights whose copies the graph does not write, because there were none. A replay makes copies that
            were written later stale.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], without_copy: Iterable[Tensor] = ()) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self._without_copy = list(without_copy)
        self._groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._adamw = [optimizer for optimizer in optimizers if isinstance(optimizer, AdamW)]
        self._device = self._groups[0]["params"][0].device
        self._numbers = [
            (group, name, self._number(float(group[name]), torch.float64))
            for group in self._groups
            for name in SETTINGS
            if name in group
        ]
        self._steps = [self._number(self._next_step(optimizer), torch.int64) for optimizer in self._adamw]
        self._written = [float(group[name]) for group, name, _ in self._numbers]

    def _number(self, value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((), value, dtype=dtype, device=self._device)

    @staticmethod
    def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [state["step"] for state in optimizer.state.values()]

    def _next_step(self, optimizer: torch.optim.Optimizer) -> int:
        steps = {int(step) for step in self._states(optimizer)}
        if len(steps) != 1:
            raise RuntimeError(f"the parameters of AdamW have done {len(steps)} different numbers of steps")
        return steps.pop() + 1

    @contextmanager
    def settings_on_device(self) -> Iterator[None]:
        """Let the optimizers take their numbers from the device, for a capture, which must leave their state alone."""
        before = [group[name] for group, name, _ in self._numbers]
        steps = [[step.clone() for step in self._states(optimizer)] for optimizer in self._adamw]
        try:
            for group, name, tensor in self._numbers:
                group[name] = tensor
            for optimizer, step in zip(self._adamw, self._steps, strict=True):
                optimizer.step_on_device = step
            yield
        finally:
            for (group, name, _), value in zip(self._numbers, before, strict=True):
                group[name] = value
            for optimizer, values in zip(self._adamw, steps, strict=True):
                optimizer.step_on_device = None
                for step, value in zip(self._states(optimizer), values, strict=True):
                    step.copy_(value)

    def replay(self) -> None:
        """Do the step of every optimizer with the settings that its groups have now."""
        for index, (group, name, tensor) in enumerate(self._numbers):
            if (value := float(group[name])) != self._written[index]:
                tensor.fill_(value)
                self._written[index] = value
        for optimizer, step in zip(self._adamw, self._steps, strict=True):
            step.fill_(self._next_step(optimizer))
            for done in self._states(optimizer):
                done += 1
        self.graph.replay()
        torch.autograd.graph.increment_version(self._without_copy)
