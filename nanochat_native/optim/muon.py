"""Muon: momentum, orthogonalised by Newton-Schulz, for the matrices of the blocks.

Keller Jordan, https://kellerjordan.github.io/posts/muon/; the form and defaults are nanochat's.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.optim.base import Optimizer, Params


class Muon(Optimizer):
    """buf = mu buf + (1 - mu) g;  u = mu buf + (1 - mu) g (Nesterov) or buf;
    p = (1 - lr weight_decay) p - lr sqrt(max(1, rows / columns)) newton_schulz(u).

    params: matrices (..., rows, columns), float32 or bfloat16, contiguous; (name, tensor) pairs make errors speak of
    names. Those of one shape are stepped together, as one batch. State of each: "momentum_buffer", float32, of its
    shape. coefficients: of ops.newton_schulz, a name or a list of triples. lr, momentum and weight_decay may be
    tensors, as ops.muon_update_ and ops.muon_momentum_ take them. cautious: decay only the elements that the update
    moves towards 0 (Cautious Weight Decay, arXiv:2510.12402). Every setting is read from the group at each step.

    Raises ValueError for a setting out of range and for a parameter that is not a matrix.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.02,
        momentum: float | Tensor = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        coefficients: str | Sequence[tuple[float, float, float]] = "quintic",
        weight_decay: float | Tensor = 0.0,
        cautious: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "weight_decay": weight_decay,
            "cautious": cautious,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum is {group['momentum']}; it takes 0 to below 1")
        if group["ns_steps"] < 1:
            raise ValueError(f"ns_steps is {group['ns_steps']}; it takes a number from 1")
        for index, parameter in enumerate(group["params"]):
            if parameter.ndim < 2:
                name, shape = self.name_of(group, index), tuple(parameter.shape)
                raise ValueError(f"{name} has shape {shape}; Muon takes matrices, AdamW the rest")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            same_kind: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in self.with_gradients(group):
                same_kind[parameter.shape, parameter.dtype, parameter.device].append(parameter)
            for matrices in same_kind.values():
                self._step_together(matrices, group)
        return loss

    def _step_together(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix, dtype=torch.float32)
        gradients = [cast(Tensor, matrix.grad) for matrix in matrices]
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        *batch, rows, columns = matrices[0].shape

        update, norms = ops.muon_momentum_(
            gradients, buffers, momentum=group["momentum"], nesterov=group["nesterov"], return_norm=True
        )
        update = ops.newton_schulz(
            update,
            steps=group["ns_steps"],
            coefficients=group["coefficients"],
            norms=None if batch else norms,  # norms are of parameters, which must be of one matrix each
        )
        scale = max(1.0, rows / columns) ** 0.5
        ops.muon_update_(
            matrices,
            update,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            scale=scale,
            cautious=group["cautious"],
        )
