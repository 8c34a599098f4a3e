"""AdamW on the fused operator, with one launch for all tensors of a group."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.optim.base import Optimizer, Params, as_operand, check_number, copies_of, mark_copies
from nanochat_native.optim.buckets import ShardPiece


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101), in the form of torch.optim.AdamW.

    ops.adamw_ states the formula. The state of a parameter is "step", int64, 0-d, on the CPU, and "exp_avg" and
    "exp_avg_sq", float32, of its shape. Every setting is read from the group at each step. lr, betas and weight_decay
    may be tensors of one element, of any floating-point type.

    Args:
        params: tensors of any shape, float32 or bfloat16; with (name, tensor) pairs errors show the names.
        cautious: decay only the elements that the new exp_avg moves towards 0 (Cautious Weight Decay,
            arXiv:2510.12402).
        sharding: process_group, reduce_dtype, gather_dtype and bucket_bytes of base.Optimizer. Each rank owns a part of
            the rows of every parameter.

    Raises:
        ValueError: a setting is out of range.
    """

    whole = False
    elementwise = ("exp_avg", "exp_avg_sq")
    required_state = ("step", *elementwise)
    # int64, 0-d: the step's number, read from there while a CUDA graph is captured.
    step_on_device: Tensor | None = None

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        cautious: bool = False,
        **sharding: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "cautious": cautious}
        super().__init__(params, defaults, **sharding)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if not isinstance(group["betas"], Sequence) or len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers >= 0 and < 1, got {group['betas']!r}")
        for index, beta in enumerate(group["betas"]):
            check_number(f"betas[{index}]", beta, below=1)
        check_number("eps", group["eps"])

    def update(self, pieces: list[ShardPiece], group: dict[str, Any]) -> None:
        same_kind: dict[Any, list[ShardPiece]] = defaultdict(list)
        for piece in pieces:
            state = self.state[piece.parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.int64)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(piece.values, dtype=torch.float32)
            has_copy = piece.low_precision_copy is not None
            same_kind[int(state["step"]) + 1, piece.values.dtype, piece.values.device, has_copy].append(piece)
        for (step, *_), together in same_kind.items():
            self._update_together(together, step, group)

    def _update_together(self, pieces: list[ShardPiece], step: int, group: dict[str, Any]) -> None:
        states = [self.state[piece.parameter] for piece in pieces]
        beta1, beta2 = map(float, group["betas"])
        device = pieces[0].values.device
        ops.adamw_(
            [piece.values for piece in pieces],
            [piece.gradient for piece in pieces],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            step=step if self.step_on_device is None else self.step_on_device,
            lr=as_operand(group["lr"], device),
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
            weight_decay=as_operand(group["weight_decay"], device),
            cautious=group["cautious"],
            copies=copies_of(pieces),
        )
        mark_copies(pieces)
        for state in states:
            state["step"] += 1
