"""Gradient clipping by the global norm."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients, in place, so that the Euclidean norm of all of them together is at most max_norm.

    Returns the norm before, float64, 0-d. When it is not finite the gradients are left alone, and
    the caller must skip the step. Parameters without a gradient count nothing. max_norm may be infinite: only measures.

    Raises ValueError for a max_norm that is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it takes a number above 0")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    # One float32 norm for each row and float64 across the rows: exact to 1e-7, and at the speed of memory, which
    # torch's float64 norm of float32 (40 times slower on a CPU) and its float32 norm of a whole tensor (1e-4) are not.
    rows = [torch.linalg.vector_norm(g, dim=-1, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    total = torch.linalg.vector_norm(torch.cat([row.flatten().double() for row in rows]))
    value = total.item()
    if math.isfinite(value) and value > max_norm:
        torch._foreach_mul_(gradients, max_norm / value)
    return total
