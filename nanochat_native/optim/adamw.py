"""AdamW on the fused operator: one launch for all tensors of a group."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from nanochat_native import ops
from nanochat_native.optim.base import Optimizer, Params


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101), in the form of torch.optim.AdamW; ops.adamw_ states the
    formula.

    params: tensors of any shape, float32 or bfloat16, contiguous; (name, tensor) pairs make errors speak of names.
    State of each: "step", int64, 0-d, on the CPU; "exp_avg" and "exp_avg_sq", float32, of its shape. Every setting is
    read from the group at each step. lr and weight_decay may be tensors, as ops.adamw_ takes them. cautious: decay only
    the elements that the new exp_avg moves towards 0 (Cautious Weight Decay, arXiv:2510.12402).

    Raises ValueError for a setting out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
        cautious: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "cautious": cautious}
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas is {group['betas']}; it takes two numbers from 0 to below 1")
        if not group["eps"] >= 0:
            raise ValueError(f"eps is {group['eps']}; it takes a number from 0")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            same_kind: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in self.with_gradients(group):
                if not self.state[parameter]:
                    self._init_state(parameter)
                step = int(self.state[parameter]["step"]) + 1
                same_kind[step, parameter.dtype, parameter.device].append(parameter)
            for (step, _, _), parameters in same_kind.items():
                self._step_together(parameters, step, group)
        return loss

    def _init_state(self, parameter: Tensor) -> None:
        self.state[parameter] = {
            "step": torch.zeros((), dtype=torch.int64),
            "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
        }

    def _step_together(self, parameters: list[Tensor], step: int, group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        ops.adamw_(
            parameters,
            [cast(Tensor, parameter.grad) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            step=step,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            cautious=group["cautious"],
        )
        for state in states:
            state["step"] += 1
