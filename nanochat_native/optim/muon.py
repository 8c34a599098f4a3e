"""Muon: momentum that is orthogonalised by Newton-Schulz, for the matrices of the blocks.

The optimizer is by Keller Jordan, https://kellerjordan.github.io/posts/muon/. Its form and defaults are nanochat's.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.optim.base import Optimizer, Params, as_operand, check_number, copies_of, mark_copies
from nanochat_native.optim.buckets import ShardPiece

OPTIONS = {
    "nesterov": True,
    "row_equilibration": False,
    "frobenius_renormalisation": False,
    "normuon": False,
}


class Muon(Optimizer):
    """buf = mu buf + (1 - mu) g;  u = mu buf + (1 - mu) g (Nesterov) or buf;
    p = (1 - lr weight_decay) p - lr sqrt(max(1, rows / columns)) newton_schulz(u).

    Parameters of one shape are updated together, as one batch, and their momentum lies in one storage. The state of a
    parameter is "momentum_buffer", float32, of its shape. Every setting is read from the group at each step. lr,
    momentum and weight_decay may be tensors of one element, of any floating-point type.

    Args:
        params: matrices (rows, columns) or stacks of them (count, rows, columns), float32 or bfloat16; with
            (name, tensor) pairs errors show the names.
        coefficients: the coefficients of ops.newton_schulz, a name or a list of triples.
        cautious: decay only the elements that the update moves towards 0 (Cautious Weight Decay, arXiv:2510.12402).
        row_equilibration: divide each row of u by its norm before newton_schulz (MuonEq's R, arXiv:2603.28254).
        frobenius_renormalisation: scale the orthogonalised u to the Frobenius norm of a matrix with singular values of
            1, sqrt(min(rows, columns)). Newton-Schulz leaves the singular values between 0.7 and 1.2.
        normuon: reduce the variance (NorMuon, arXiv:2510.05491): v = beta2 v + (1 - beta2) mean(o^2) for each row of o,
            the orthogonalised u, or for each column if there are more columns. o is divided by sqrt(v) and scaled back
            to its Frobenius norm. The state has "second_momentum", float32, (..., rows, 1) or (..., 1, columns).
        heads: the number of blocks of rows, the heads of an attention projection, that are orthogonalised as separate
            matrices; with head_axis "columns", blocks of columns. The scale is then that of a block.
        sharding: process_group, reduce_dtype, gather_dtype and bucket_bytes of base.Optimizer. Each matrix has one
            owner.

    Raises:
        ValueError: a setting is out of range, or a parameter is neither a matrix nor a stack of matrices. The weight of
            a convolution is refused, because it can be read as several matrices.
    """

    whole = True
    elementwise = ("momentum_buffer",)
    required_state = elementwise
    unsupported = (
        *Optimizer.unsupported,
        "adjust_lr_fn",
        "ns_coefficients",
    )  # the last two are options of torch.optim.Muon

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
        row_equilibration: bool = False,
        frobenius_renormalisation: bool = False,
        normuon: bool = False,
        beta2: float = 0.95,
        heads: int = 1,
        head_axis: str = "rows",
        **sharding: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "weight_decay": weight_decay,
            "cautious": cautious,
            "row_equilibration": row_equilibration,
            "frobenius_renormalisation": frobenius_renormalisation,
            "normuon": normuon,
            "beta2": beta2,
            "heads": heads,
            "head_axis": head_axis,
        }
        super().__init__(params, defaults, **sharding)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_number("momentum", group["momentum"], below=1)
        if group["ns_steps"] < 1:
            raise ValueError(f"ns_steps must be a number >= 1, got {group['ns_steps']}")
        for option in OPTIONS:
            if not isinstance(group[option], bool):
                raise ValueError(f"{option} must be True or False, got {group[option]!r}")
        check_number("beta2", group["beta2"], below=1)
        if group["head_axis"] not in ("rows", "columns"):
            raise ValueError(f"head_axis must be 'rows' or 'columns', got {group['head_axis']!r}")
        for index, parameter in enumerate(group["params"]):
            name, shape = self.name_of(group, index), tuple(parameter.shape)
            if parameter.ndim not in (2, 3):
                raise ValueError(
                    f"{name} must be a matrix (rows, columns) or a stack of matrices (count, rows, columns) for Muon, "
                    f"got shape {shape}; use AdamW for other parameters"
                )
            heads, axis = group["heads"], group["head_axis"]
            size = shape[-2 if axis == "rows" else -1]
            if heads < 1 or size % heads:
                raise ValueError(f"heads must divide the {size} {axis} of {name}, shape {shape}, got {heads}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a state from before the options existed
            for name, default in (*OPTIONS.items(), ("beta2", 0.95), ("heads", 1), ("head_axis", "rows")):
                group.setdefault(name, default)

    def update(self, pieces: list[ShardPiece], group: dict[str, Any]) -> None:
        same_kind: dict[Any, list[ShardPiece]] = defaultdict(list)
        for piece in pieces:
            if piece.values.numel() == 0:
                continue
            has_copy = piece.low_precision_copy is not None
            same_kind[piece.values.shape, piece.values.dtype, piece.values.device, has_copy].append(piece)
        for together in same_kind.values():
            self._update_together(together, group)

    def _update_together(self, pieces: list[ShardPiece], group: dict[str, Any]) -> None:
        parameters, matrices = [piece.parameter for piece in pieces], [piece.values for piece in pieces]
        self._init_state([p for p in parameters if "momentum_buffer" not in self.state[p]])
        gradients, device = [piece.gradient for piece in pieces], matrices[0].device
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        update, norms = ops.muon_momentum_(
            gradients,
            buffers,
            momentum=as_operand(group["momentum"], device),
            nesterov=group["nesterov"],
            return_norm=True,
        )
        known: Tensor | None = norms
        if matrices[0].ndim > 2 or group["heads"] > 1 or group["row_equilibration"]:
            known = None  # the norms are those of whole parameters
        update = split_heads(update, group["heads"], group["head_axis"])
        if group["row_equilibration"]:
            update = equilibrate_rows(update)

        rows, columns = update.shape[-2:]
        rates: dict[str, Any] = {
            "lr": as_operand(group["lr"], device),
            "weight_decay": as_operand(group["weight_decay"], device),
            "scale": max(1.0, rows / columns) ** 0.5,
            "cautious": group["cautious"],
        }
        copies = copies_of(pieces)
        iteration: dict[str, Any] = {"steps": group["ns_steps"], "coefficients": group["coefficients"], "norms": known}
        in_rows = group["heads"] == 1 or group["head_axis"] == "rows"
        if in_rows and not group["frobenius_renormalisation"] and not group["normuon"]:
            blocks, block_copies = ([each.view(update.shape[1:]) for each in every] for every in (matrices, copies))
            ops.newton_schulz_update_(blocks, update, copies=block_copies, **rates, **iteration)
            mark_copies(pieces)
            return
        update = ops.newton_schulz(update, **iteration)
        if group["frobenius_renormalisation"]:
            update = renormalise(update)
        update = merge_heads(update, group["heads"], group["head_axis"])
        if group["normuon"]:
            update = self._reduce_variance(update, parameters, group["beta2"])
        ops.muon_update_(matrices, update, copies=copies, **rates)
        mark_copies(pieces)

    def _init_state(self, parameters: list[Tensor]) -> None:
        """Create the momentum of the parameters, zeros in one storage."""
        if parameters:
            momentum = torch.zeros(len(parameters), *parameters[0].shape, device=parameters[0].device)
            for parameter, buffer in zip(parameters, momentum.unbind(), strict=True):
                self.state[parameter]["momentum_buffer"] = buffer

    def _reduce_variance(self, update: Tensor, parameters: list[Tensor], beta2: float) -> Tensor:
        """Apply the variance reduction of NorMuon."""
        axis = -1 if update.size(-2) >= update.size(-1) else -2
        squares = update.square().mean(dim=axis, keepdim=True)
        states = [self.state[parameter] for parameter in parameters]
        for state, square in zip(states, squares, strict=True):
            if "second_momentum" not in state:
                state["second_momentum"] = torch.zeros_like(square)
        averages = [state["second_momentum"] for state in states]
        torch._foreach_lerp_(averages, list(squares.unbind()), 1 - beta2)
        reduced = update * torch.stack(averages).clamp_min(1e-20).rsqrt()
        before, after = (torch.linalg.matrix_norm(x)[..., None, None] for x in (update, reduced))
        return reduced * (before / torch.where(after == 0, 1.0, after))


def split_heads(update: Tensor, heads: int, axis: str) -> Tensor:
    """Split (count, ..., rows, columns) into (count, ..., heads, rows, columns) along the rows or the columns."""
    if heads == 1:
        return update
    if axis == "rows":
        return update.unflatten(-2, (heads, -1))
    return update.unflatten(-1, (heads, -1)).movedim(-2, -3).contiguous()


def merge_heads(update: Tensor, heads: int, axis: str) -> Tensor:
    """Merge the heads again: the inverse of split_heads."""
    if heads == 1:
        return update
    if axis == "rows":
        return update.flatten(-3, -2)
    return update.movedim(-3, -2).flatten(-2).contiguous()


def equilibrate_rows(update: Tensor) -> Tensor:
    """Divide each row by its norm. Rows of zeros are unchanged."""
    norms = torch.linalg.vector_norm(update, dim=-1, keepdim=True)
    return update / torch.where(norms == 0, 1.0, norms)


def renormalise(orthogonal: Tensor) -> Tensor:
    """Scale each matrix to the Frobenius norm sqrt(min(rows, columns)). A zero matrix is unchanged."""
    norms = torch.linalg.matrix_norm(orthogonal)[..., None, None]
    return orthogonal * (min(orthogonal.shape[-2:]) ** 0.5 / torch.where(norms == 0, 1.0, norms))
