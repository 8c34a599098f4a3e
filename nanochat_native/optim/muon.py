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
    "scale_decay": False,
    "ns_bfloat16": False,
}
# The other options that a state from before they existed does not have.
SETTINGS = {"beta2": 0.95, "norm_eps": 0.0, "normuon_eps": 1e-20, "heads": 1, "head_axis": "rows"}


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
        norm_eps: the smallest norm that a row or an orthogonalised matrix is divided by; newton_schulz adds it to its
            divisor. nanochat has 1e-6 since July 2026. Where the norms are far above it, it does not change the result
            beyond rounding. If it is not 0, the operators compute the norms and apply the options in the passes that
            they make anyway, with other rounding than without it.
        ns_bfloat16: allow newton_schulz on a CPU to multiply in bfloat16, with its allow_bfloat16.
        scale_decay: the decay is lr sqrt(max(1, rows / columns)) weight_decay, as nanochat's of July 2026.
        frobenius_renormalisation: scale the orthogonalised u to the Frobenius norm of a matrix with singular values of
            1, sqrt(min(rows, columns)). Newton-Schulz leaves the singular values between 0.7 and 1.2.
        normuon: reduce the variance (NorMuon, arXiv:2510.05491): v = beta2 v + (1 - beta2) mean(o^2) for each row of o,
            the orthogonalised u, or for each column if there are more columns. o is divided by sqrt(v) and scaled back
            to its Frobenius norm. The state has "second_momentum", float32, (..., rows, 1) or (..., 1, columns).
        beta2, normuon_eps: the settings of normuon. normuon_eps is the smallest v.
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
        norm_eps: float = 0.0,
        normuon_eps: float = 1e-20,
        scale_decay: bool = False,
        ns_bfloat16: bool = False,
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
            "norm_eps": norm_eps,
            "normuon_eps": normuon_eps,
            "scale_decay": scale_decay,
            "ns_bfloat16": ns_bfloat16,
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
        check_number("norm_eps", group["norm_eps"])
        check_number("normuon_eps", group["normuon_eps"])
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
            for name, default in (*OPTIONS.items(), *SETTINGS.items()):
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
        heads, head_axis, norm_eps = group["heads"], group["head_axis"], float(group["norm_eps"])
        update, norms = ops.muon_momentum_(
            gradients,
            buffers,
            momentum=as_operand(group["momentum"], device),
            nesterov=group["nesterov"],
            return_norm="rows" if norm_eps else True,
        )
        update = split_heads(update, heads, head_axis)
        iteration: dict[str, Any] = {
            "steps": group["ns_steps"],
            "coefficients": group["coefficients"],
            "allow_bfloat16": group["ns_bfloat16"],
        }
        if norm_eps:
            if heads > 1 and head_axis == "rows":
                norms = norms.unflatten(-1, (heads, -1))
            iteration["row_norms"] = norms if heads == 1 or head_axis == "rows" else None
            iteration |= {"equilibrate_rows": group["row_equilibration"], "norm_eps": norm_eps}
        else:
            if group["row_equilibration"]:
                update = equilibrate_rows(update)
            known = matrices[0].ndim == 2 and heads == 1 and not group["row_equilibration"]
            iteration["norms"] = norms if known else None  # otherwise the norms are those of whole parameters

        rows, columns = update.shape[-2:]
        scale, weight_decay = max(1.0, rows / columns) ** 0.5, as_operand(group["weight_decay"], device)
        rates: dict[str, Any] = {
            "lr": as_operand(group["lr"], device),
            "weight_decay": weight_decay * scale if group["scale_decay"] else weight_decay,
            "scale": scale,
            "cautious": group["cautious"],
        }
        copies = copies_of(pieces)
        renormalises, in_rows = group["frobenius_renormalisation"], heads == 1 or head_axis == "rows"
        if in_rows and not renormalises and not group["normuon"] and not norm_eps:
            blocks, block_copies = ([each.view(update.shape[1:]) for each in every] for every in (matrices, copies))
            ops.newton_schulz_update_(blocks, update, copies=block_copies, **rates, **iteration)
            mark_copies(pieces)
            return
        update = ops.newton_schulz(update, **iteration)
        fused = group["normuon"] and norm_eps > 0
        if renormalises and not (fused and heads == 1):
            update = renormalise(update, norm_eps)
        update = merge_heads(update, heads, head_axis)
        if fused:
            ops.normuon_update_(
                matrices,
                update,
                self._second_momentums(parameters, update),
                beta2=float(group["beta2"]),
                eps=float(group["normuon_eps"]),
                renormalise=renormalises and heads == 1,
                norm_eps=norm_eps,
                copies=copies,
                **rates,
            )
        else:
            if group["normuon"]:
                update = self._reduce_variance(update, parameters, group["beta2"], group["normuon_eps"])
            ops.muon_update_(matrices, update, copies=copies, **rates)
        mark_copies(pieces)

    def _init_state(self, parameters: list[Tensor]) -> None:
        """Create the momentum of the parameters, zeros in one storage."""
        if parameters:
            momentum = torch.zeros(len(parameters), *parameters[0].shape, device=parameters[0].device)
            for parameter, buffer in zip(parameters, momentum.unbind(), strict=True):
                self.state[parameter]["momentum_buffer"] = buffer

    def _second_momentums(self, parameters: list[Tensor], update: Tensor) -> list[Tensor]:
        """Return the state of NorMuon, zeros at first, for matrices with the shape of update[0]."""
        *stack, rows, columns = update.shape[1:]
        shape = (*stack, rows, 1) if rows >= columns else (*stack, 1, columns)
        for parameter in parameters:
            if "second_momentum" not in self.state[parameter]:
                self.state[parameter]["second_momentum"] = torch.zeros(shape, device=update.device)
        return [self.state[parameter]["second_momentum"] for parameter in parameters]

    def _reduce_variance(self, update: Tensor, parameters: list[Tensor], beta2: float, eps: float) -> Tensor:
        """Apply the variance reduction of NorMuon, with the rounding of runs that have no norm_eps."""
        averages = self._second_momentums(parameters, update)
        squares = update.square().mean(dim=-1 if averages[0].size(-1) == 1 else -2, keepdim=True)
        torch._foreach_lerp_(averages, list(squares.unbind()), 1 - beta2)
        reduced = update * torch.stack(averages).clamp_min(eps).rsqrt()
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


def renormalise(orthogonal: Tensor, norm_eps: float = 0.0) -> Tensor:
    """Scale each matrix by sqrt(min(rows, columns)) / max(its Frobenius norm, norm_eps). A zero matrix is unchanged."""
    norms = torch.linalg.matrix_norm(orthogonal)[..., None, None].clamp_min(norm_eps)
    return orthogonal * (min(orthogonal.shape[-2:]) ** 0.5 / torch.where(norms == 0, 1.0, norms))
