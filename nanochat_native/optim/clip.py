"""Gradient clipping by the global norm."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_native.optim.base import Optimizer, buckets_of


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients, in place, so that the Euclidean norm of all of them together is at most max_norm.

    Returns the norm before, float64, 0-d. When it is not finite the gradients are left alone, and
    the caller must skip the step. Parameters without a gradient count nothing. max_norm may be infinite: only measures.

    Raises ValueError for a max_norm that is not above 0.
    """
    return _clip([parameter.grad for parameter in parameters if parameter.grad is not None], max_norm, None)


@torch.no_grad()
def clip_reduced_(optimizers: Sequence[torch.optim.Optimizer], max_norm: float) -> Tensor:
    """As clip_grad_norm_, of the gradients that the optimizers will step with: where they are sharded, of the averages
    over the ranks, which are waited for here. All ranks get the same norm, and scale alike.
    """
    gradients: list[Tensor] = []
    buckets = buckets_of(optimizers)
    for bucket in buckets:
        bucket.start_reduction()
    for bucket in buckets:
        bucket.finish_reduction()
    for optimizer in optimizers:
        if isinstance(optimizer, Optimizer):
            gradients += [piece.gradient for g in optimizer.param_groups for piece in optimizer.pieces(g)]
        else:
            gradients += [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    group, device = (buckets[0].group, buckets[0].flat_gradients.device) if buckets else (None, None)
    return _clip(gradients, max_norm, group, device)


def _clip(
    gradients: list[Tensor], max_norm: float, group: dist.ProcessGroup | None, device: torch.device | None = None
) -> Tensor:
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it takes a number above 0")
    total = torch.zeros((), dtype=torch.float64, device=device)  # of a rank that owns nothing
    if gradients:
        total = torch.linalg.vector_norm(_norms(gradients).double())
    if group is not None:
        total = total.square()
        dist.all_reduce(total, group=group)
        total = total.sqrt()
    value = total.item()
    if math.isfinite(value) and value > max_norm and gradients:
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
