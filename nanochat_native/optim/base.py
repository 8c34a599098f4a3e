"""What Muon and AdamW share."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

# As torch.optim takes them: tensors, (name, tensor) pairs, or groups: dicts whose "params" holds either, and own
# settings.
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose groups remember their first rate as "initial_lr", for schedules to multiply, and
    whose state stays float32 whatever the parameters are."""

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        for group in self.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))
            self.check_group(group)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for settings or parameters that the optimizer does not take."""
        if not group["lr"] >= 0 or not group["weight_decay"] >= 0:
            raise ValueError(f"lr is {group['lr']}, weight_decay {group['weight_decay']}; neither may be below 0")
        if not isinstance(group["cautious"], bool):
            raise ValueError(f"cautious is {group['cautious']!r}; it takes True or False")

    def name_of(self, group: dict[str, Any], index: int) -> str:
        names = group.get("param_names")
        return cast(str, names[index]) if names else f"parameter {index} of its group"

    def with_gradients(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters to step: as in torch, one without a gradient is left alone. ValueError for a sparse one."""
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise ValueError(f"the gradient of {self.name_of(group, index)} is sparse; it takes a dense one")
        return [parameter for parameter in group["params"] if parameter.grad is not None]

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
