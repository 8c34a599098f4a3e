"""The Muon of the original guide, for comparison: see docs/guide/a-original-guide.md.

Each of its differences from Muon is a switch of its own, so that `compare --suite guide` can measure each by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.optim.base import Params, as_operand, copies_of, mark_copies
from nanochat_native.optim.buckets import ShardPiece
from nanochat_native.optim.muon import Muon

# The switches of each value of --muon-form.
FORMS: dict[str, dict[str, Any]] = {
    "nanochat": {},
    "cropped": {"cropped": True},
    "momentum_after": {"momentum_after": True},
    "original_guide": {"cropped": True, "momentum_after": True, "aspect_factor": False},
}
# Options of Muon that this form of it does not have.
UNSUPPORTED = (
    *("row_equilibration", "frobenius_renormalisation", "normuon", "per_head", "norm_eps", "scale_decay"),
    "ns_bfloat16",
)
NANOCHAT_ONLY = (*UNSUPPORTED, "beta2", "normuon_eps")  # the last two matter with normuon alone


class OriginalGuideMuon(Muon):
    """Muon with parts of the listing of the original guide. Without its switches it computes what Muon computes.

    The listing is buf = mu buf + f(g);  p = p - lr buf, where f crops g to a square, divides it by its Frobenius norm,
    applies five steps of X = 1.5 X - 0.5 X X^T X, and pads the result with zeros. It is cropped=True,
    momentum_after=True, aspect_factor=False, coefficients="cubic". The state is that of Muon.

    Args:
        params: matrices (rows, columns), float32 or bfloat16.
        cropped: orthogonalise the first min(rows, columns) rows and columns; the rest of the update is 0.
        momentum_after: orthogonalise the gradient, and sum the results: buf = mu buf + f(g). There is no Nesterov step.
        aspect_factor: multiply the update by sqrt(max(1, rows / columns)).
        lr, momentum, ns_steps, coefficients, weight_decay, cautious, nesterov: those of Muon.

    Raises:
        ValueError: a setting is out of range, or a parameter is not a matrix.
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
        cropped: bool = False,
        momentum_after: bool = False,
        aspect_factor: bool = True,
    ) -> None:
        super().__init__(params, lr, momentum, nesterov, ns_steps, coefficients, weight_decay, cautious)
        switches = {"cropped": cropped, "momentum_after": momentum_after, "aspect_factor": aspect_factor}
        self.defaults.update(switches)
        for group in self.param_groups:
            for name, value in switches.items():
                group.setdefault(name, value)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        for index, parameter in enumerate(group["params"]):
            if parameter.ndim != 2:
                name, shape = self.name_of(group, index), tuple(parameter.shape)
                raise ValueError(f"{name} must be a matrix (rows, columns) for OriginalGuideMuon, got shape {shape}")

    def _update_together(self, pieces: list[ShardPiece], group: dict[str, Any]) -> None:
        parameters, matrices = [piece.parameter for piece in pieces], [piece.values for piece in pieces]
        self._init_state([p for p in parameters if "momentum_buffer" not in self.state[p]])
        gradients, device = [piece.gradient for piece in pieces], matrices[0].device
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        iteration = {"steps": group["ns_steps"], "coefficients": group["coefficients"]}
        if group["momentum_after"]:
            orthogonal = orthogonalise(torch.stack(gradients).float(), group["cropped"], **iteration)
            for buffer, step in zip(buffers, orthogonal, strict=True):
                buffer.mul_(float(group["momentum"])).add_(step)
            update = torch.stack(buffers)
        else:
            momentum = as_operand(group["momentum"], device)
            update = ops.muon_momentum_(gradients, buffers, momentum=momentum, nesterov=group["nesterov"])
            update = orthogonalise(update, group["cropped"], **iteration)
        rows, columns = update.shape[-2:]
        ops.muon_update_(
            matrices,
            update,
            copies=copies_of(pieces),
            lr=as_operand(group["lr"], device),
            weight_decay=as_operand(group["weight_decay"], device),
            scale=max(1.0, rows / columns) ** 0.5 if group["aspect_factor"] else 1.0,
            cautious=group["cautious"],
        )
        mark_copies(pieces)


def orthogonalise(g: Tensor, cropped: bool, **iteration: Any) -> Tensor:
    """Return newton_schulz(g) for matrices (..., rows, columns), or that of their leading square, padded with zeros."""
    if not cropped:
        return ops.newton_schulz(g, **iteration)
    side = min(g.shape[-2:])
    padded = torch.zeros_like(g, memory_format=torch.contiguous_format)
    padded[..., :side, :side] = ops.newton_schulz(g[..., :side, :side].contiguous(), **iteration)
    return padded
