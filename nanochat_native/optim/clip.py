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
    total = torch.linalg.vector_norm(_norms(gradients).double())
    value = total.item()
    if math.isfinite(value) and value > max_norm:
        torch._foreach_mul_(gradients, max_norm / value)
    return total


def _norms(gradients: list[Tensor]) -> Tensor:
    """Norms whose norm is that of all gradients, exact to 1e-7 and at the speed of memory."""
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    if gradients[0].is_cuda:  # sums by trees, and a number of launches that does not grow with that of the tensors
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=wide))
    # One float32 norm for each row: on a CPU torch's float64 norm of float32 is 40 times slower, and its float32 norm
    # of a whole tensor errs by 1e-4.
    return torch.cat([torch.linalg.vector_norm(g, dim=-1, dtype=wide).flatten() for g in gradients])
