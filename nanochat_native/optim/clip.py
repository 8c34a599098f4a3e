"""Gradient clipping by the global norm."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_native.ops.dtypes import widest_dtype
from nanochat_native.optim.base import Optimizer, buckets_of


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients in place so that their Euclidean norm, over all of them, is at most max_norm.

    An infinite max_norm only measures. Parameters without a gradient do not count. If the norm is not finite, the
    gradients are unchanged and the caller must skip the step. On a GPU the host does not wait for the norm.

    Returns:
        The norm before the scaling, 0-d, float64; on MPS float32.

    Raises:
        ValueError: max_norm is not above 0.
    """
    return _clip([parameter.grad for parameter in parameters if parameter.grad is not None], max_norm, None)


@torch.no_grad()
def clip_reduced_(optimizers: Sequence[torch.optim.Optimizer], max_norm: float, *, loss_scale: float = 1.0) -> Tensor:
    """Clip the gradients that the optimizers will use, as clip_grad_norm_ does.

    With sharded optimizers these are the averages over the ranks, for which this function waits. All ranks get the same
    norm and scale by the same factor.

    Args:
        loss_scale: The factor of the gradients, those of a loss that was multiplied by it. They are divided by it, and
            the norm and max_norm are those of the quotients.
    """
    gradients: list[Tensor] = []
    buckets = buckets_of(optimizers)
    for bucket in buckets:
        bucket.start_reduction()
    for bucket in buckets:
        bucket.finish_reduction()
    for optimizer in optimizers:
        if isinstance(optimizer, Optimizer):
            gradients += [piece.gradient for g in optimizer.param_groups for piece in optimizer.local_pieces(g)]
        else:
            gradients += [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    group, device = (buckets[0].group, buckets[0].flat_gradients.device) if buckets else (None, None)
    return _clip(gradients, max_norm, group, device, loss_scale)


def _clip(
    gradients: list[Tensor],
    max_norm: float,
    group: dist.ProcessGroup | None,
    device: torch.device | None = None,
    loss_scale: float = 1.0,
) -> Tensor:
    if not max_norm > 0:
        raise ValueError(f"max_norm must be a number > 0, got {max_norm}")
    if gradients:
        norms = _norms(gradients)
        total = torch.linalg.vector_norm(norms.to(widest_dtype(norms.device)))
    else:  # a rank may own no gradient
        total = torch.zeros((), dtype=torch.float64, device=device)
    if group is not None:
        total = total.square()
        dist.all_reduce(total, group=group)
        total = total.sqrt()
    total = total / loss_scale
    if (math.isinf(max_norm) and loss_scale == 1) or not gradients:
        return total
    if total.device.type != "cpu":
        clipped = torch.where(total > max_norm, max_norm / total, 1.0) / loss_scale
        _scale_(gradients, torch.where(total.isfinite(), clipped, 1.0))
        return total
    value = total.item()
    factor = (max_norm / value if value > max_norm else 1.0) / loss_scale
    if math.isfinite(value) and factor != 1:
        torch._foreach_mul_(gradients, factor)
    return total


def _scale_(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiply all gradients by a factor, 0-d, on their device, with the rounding of a plain number."""
    by_type: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_type[gradient.dtype].append(gradient)
    for dtype, same in by_type.items():
        wide = factor.to(torch.promote_types(dtype, torch.float32))
        if wide.dtype == dtype:
            torch._foreach_mul_(same, wide)
            continue
        for gradient in same:  # torch would round the factor to the narrow type
            torch.mul(gradient.to(wide.dtype), wide, out=gradient)


def _norms(gradients: list[Tensor]) -> Tensor:
    """Return norms whose norm is that of all gradients, exact to 1e-7, at memory speed."""
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    if gradients[0].device.type != "cpu":  # tree sums, and a constant number of launches
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=wide))
    # One float32 norm for each row: on a CPU torch's float64 norm of float32 is 40 times slower, and its float32 norm
    # of a whole tensor errs by 1e-4.
    return torch.cat([torch.linalg.vector_norm(g, dim=-1, dtype=wide).flatten() for g in gradients])
