"""The steps of Muon around newton_schulz, for lists of tensors of one shape."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.adamw import decayed
from nanochat_native.ops.dtypes import PARAM_DTYPES, widest_dtype
from nanochat_native.ops.newton_schulz import Triple, check_newton_schulz, flattened, reference_newton_schulz

# --- muon_momentum_ ---


@overload
def muon_momentum_(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool = True,
    return_norm: Literal[False] = False,
) -> Tensor: ...
@overload
def muon_momentum_(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool = True,
    return_norm: Literal[True, "rows"],
) -> tuple[Tensor, Tensor]: ...
def muon_momentum_(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool = True,
    return_norm: bool | Literal["rows"] = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the part of Muon before newton_schulz, for tensors of one shape in one pass.

    buf = momentum buf + (1 - momentum) g;  update = momentum buf + (1 - momentum) g with Nesterov, else buf.

    Args:
        grads: At least one contiguous tensor; one shape, all float32 or all bfloat16.
        momentum_buffers: As many contiguous float32 tensors with that shape. Updated.
        momentum: In [0, 1): a number, or a 0-d float64 (on MPS float32) tensor on the grads' device, like adamw_'s lr.
        return_norm: Also return the norms of the updates, or with "rows" those of their rows. On a CPU they are
            computed in the same pass over memory; on CUDA those of rows take another one.

    Returns:
        update: (len(grads), *shape) float32, contiguous: ready for one batched newton_schulz.
        norms: (len(grads),) float64 (float32 on MPS), the Frobenius norm of each update, summed in this type in a fixed
            order: the same bits for every number of threads. They are the `norms` of newton_schulz. With "rows":
            the shape of update without its last dimension, the `row_norms` that newton_schulz takes; on CUDA their sums
            are in float32.

    Raises:
        ValueError, TypeError: An argument is wrong.
        RuntimeError: A derivative is asked for.
    """
    op = "muon_momentum_"
    modes.refuse(op, grads, momentum_buffers, momentum)
    checks.check_lists(op, grads=grads, momentum_buffers=momentum_buffers)
    checks.check_one_shape(op, "grads", grads)
    checks.check_number(op, "momentum", momentum, grads[0].device, below=1)
    checks.check_dtype(op, "grads[0]", grads[0], PARAM_DTYPES)
    checks.check_list_dtypes(op, grads[0].dtype, grads=grads)
    checks.check_list_dtypes(op, torch.float32, momentum_buffers=momentum_buffers)
    if return_norm not in (False, True, "rows"):
        raise ValueError(f"{op}: return_norm must be False, True or 'rows', got {return_norm!r}")
    if return_norm == "rows" and not grads[0].dim():
        raise ValueError(f"{op}: grads must have rows with return_norm 'rows', got shape ()")
    function = native_muon_momentum_ if backends.runs_native(op, grads[0]) else reference_muon_momentum_
    return function(grads, momentum_buffers, momentum=momentum, nesterov=nesterov, return_norm=return_norm)


@overload
def reference_muon_momentum_(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool = True,
    return_norm: Literal[False] = False,
) -> Tensor: ...
@overload
def reference_muon_momentum_(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool = True,
    return_norm: bool | Literal["rows"],
) -> Tensor | tuple[Tensor, Tensor]: ...
@torch.no_grad()
def reference_muon_momentum_(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool = True,
    return_norm: bool | Literal["rows"] = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Do what `muon_momentum_` does, on stacked tensors."""
    g = torch.stack([grad.float() for grad in grads])
    buffers = momentum * torch.stack(list(momentum_buffers)) + (1 - momentum) * g
    for old, new in zip(momentum_buffers, buffers, strict=True):
        old.copy_(new)
    update = momentum * buffers + (1 - momentum) * g if nesterov else buffers
    if not return_norm:
        return update
    rows = update if return_norm == "rows" else update.view(len(grads), grads[0].numel())
    return update, torch.linalg.vector_norm(rows, dim=-1, dtype=widest_dtype(update.device))


@torch.no_grad()
def native_muon_momentum_(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool,
    return_norm: bool | Literal["rows"],
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the kernel."""
    momentum, momentum_tensor = schema.number_and_tensor(momentum, 0.0)
    update, norms = torch.ops.nanochat_native.muon_momentum_(
        grads, momentum_buffers, momentum, nesterov, return_norm is True, momentum_tensor, return_norm == "rows"
    )
    return (update, norms) if return_norm else update


def _muon_momentum_fake(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    momentum: float,
    nesterov: bool,
    with_norms: bool,
    momentum_tensor: Tensor | None,
    with_row_norms: bool = False,
) -> tuple[Tensor, Tensor]:
    count = len(grads)
    update = grads[0].new_empty((count, *grads[0].shape), dtype=torch.float32)
    norms_shape = update.shape[:-1] if with_row_norms else (count if with_norms else 0,)
    return update, grads[0].new_empty(norms_shape, dtype=torch.float64)


# --- muon_update_ ---


def muon_update_(
    params: Sequence[Tensor],
    update: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    scale: float = 1.0,
    cautious: bool = False,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Run the part of Muon after newton_schulz, in one pass: p = (1 - lr weight_decay) p - lr scale update[i].

    Args:
        params: At least one contiguous tensor; one shape, all float32 or all bfloat16. Updated.
        update: (len(params), *shape) float32, contiguous.
        lr, weight_decay: Numbers, or 0-d float64 (on MPS float32) tensors on the params' device, like adamw_'s.
        scale: The factor of the update, e.g. sqrt(max(1, rows / columns)).
        cautious: Decay, like adamw_, only where update[i] p >= 0.
        copies: bfloat16 copies of float32 params that the same pass writes, as adamw_'s.

    Raises:
        ValueError, TypeError: An argument is wrong.
        RuntimeError: A derivative is asked for.
    """
    _check_muon_update("muon_update_", params, update, lr, weight_decay, copies)
    function = native_muon_update_ if backends.runs_native("muon_update_", update) else reference_muon_update_
    function(params, update, lr=lr, weight_decay=weight_decay, scale=scale, cautious=cautious, copies=copies)


def _check_muon_update(
    op: str,
    params: Sequence[Tensor],
    update: Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    copies: Sequence[Tensor] | None,
) -> None:
    modes.refuse(op, params, update, lr, weight_decay, copies)
    checks.check_lists(op, params=params)
    checks.check_one_shape(op, "params", params)
    shape = (len(params), *params[0].shape)
    if update.shape != shape or not update.is_contiguous():
        raise ValueError(
            f"{op}: update must be contiguous with shape {shape}, "
            f"got shape {tuple(update.shape)}, strides {update.stride()}"
        )
    checks.check_number(op, "lr", lr, params[0].device)
    checks.check_number(op, "weight_decay", weight_decay, params[0].device)
    checks.check_dtype(op, "params[0]", params[0], PARAM_DTYPES)
    checks.check_list_dtypes(op, params[0].dtype, params=params)
    checks.check_dtype(op, "update", update, (torch.float32,))
    checks.check_device(op, "update", update, params[0].device, "params")
    checks.check_copies(op, params, copies)


@torch.no_grad()
def reference_muon_update_(
    params: Sequence[Tensor],
    update: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    scale: float = 1.0,
    cautious: bool = False,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Do what `muon_update_` does, tensor by tensor."""
    decay = 1 - lr * weight_decay
    for param, change in zip(params, update, strict=True):
        param.copy_(decayed(param, decay, change, cautious) - lr * scale * change)
    if copies:
        for param, copy in zip(params, copies, strict=True):
            copy.copy_(param)


@torch.no_grad()
def native_muon_update_(
    params: Sequence[Tensor],
    update: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    scale: float,
    cautious: bool,
    copies: Sequence[Tensor] | None,
) -> None:
    """Run the kernel."""
    lr, lr_tensor = schema.number_and_tensor(lr, 0.0)
    weight_decay, weight_decay_tensor = schema.number_and_tensor(weight_decay, 0.0)
    torch.ops.nanochat_native.muon_update_(
        params, update, copies or [], lr, weight_decay, scale, cautious, lr_tensor, weight_decay_tensor
    )


# --- normuon_update_ ---


def normuon_update_(
    params: Sequence[Tensor],
    update: Tensor,
    second_momentums: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    scale: float = 1.0,
    cautious: bool = False,
    beta2: float = 0.95,
    eps: float = 1e-10,
    renormalise: bool = False,
    norm_eps: float = 0.0,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Run NorMuon's variance reduction (arXiv:2510.05491) of orthogonalised matrices o = update[i], and muon_update_.

    A line of o is a row if M >= K, else a column: s = s + (1 - beta2) (mean(o^2) - s) for each line, starting from 0
    and without a correction of the bias. w is o / sqrt(max(s, eps)), scaled to the Frobenius norm of o.
    p = (1 - lr weight_decay) p - lr scale w.

    The kernels make one pass over o for the sums of squares and one for the update.

    Args:
        params: At least one contiguous tensor; one shape (..., M, K), all float32 or all bfloat16. Updated.
        update: (len(params), ..., M, K) float32, contiguous.
        second_momentums: s of each param: contiguous float32 tensors (..., M, 1) if M >= K, else (..., 1, K). Updated.
        lr, weight_decay, scale, copies: As for muon_update_.
        cautious: Decay only where w p >= 0.
        beta2: In [0, 1).
        eps: At least 0.
        renormalise: First scale each matrix of o to the Frobenius norm of one with singular values of 1:
            o sqrt(min(M, K)) / max(|o|_F, norm_eps).
        norm_eps: At least 0.

    Raises:
        ValueError, TypeError: An argument is wrong.
        RuntimeError: A derivative is asked for.
    """
    op = "normuon_update_"
    modes.refuse(op, second_momentums)
    _check_muon_update(op, params, update, lr, weight_decay, copies)
    if params[0].dim() < 2:
        raise ValueError(f"{op}: params must have shape (..., M, K), got {tuple(params[0].shape)}")
    if len(second_momentums) != len(params):
        raise ValueError(
            f"{op}: second_momentums must have the length of params, {len(params)}, got {len(second_momentums)}"
        )
    *stack, M, K = params[0].shape
    shape = (*stack, M, 1) if M >= K else (*stack, 1, K)
    if second_momentums[0].shape != shape:
        raise ValueError(f"{op}: second_momentums must have shape {shape}, got {tuple(second_momentums[0].shape)}")
    checks.check_lists(op, second_momentums=second_momentums)
    checks.check_list_dtypes(op, torch.float32, second_momentums=second_momentums)
    checks.check_device(op, "second_momentums[0]", second_momentums[0], params[0].device, "params")
    checks.check_number(op, "beta2", beta2, params[0].device, below=1)
    for name, value in (("eps", eps), ("norm_eps", norm_eps)):
        checks.check_number(op, name, value, params[0].device)
    function = native_normuon_update_ if backends.runs_native(op, update) else reference_normuon_update_
    function(
        params,
        update,
        second_momentums,
        lr=lr,
        weight_decay=weight_decay,
        scale=scale,
        cautious=cautious,
        beta2=beta2,
        eps=eps,
        renormalise=renormalise,
        norm_eps=norm_eps,
        copies=copies,
    )


@torch.no_grad()
def reference_normuon_update_(
    params: Sequence[Tensor],
    update: Tensor,
    second_momentums: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    scale: float = 1.0,
    cautious: bool = False,
    beta2: float = 0.95,
    eps: float = 1e-10,
    renormalise: bool = False,
    norm_eps: float = 0.0,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Do what `normuon_update_` does, with `reference_muon_update_`."""
    M, K = params[0].shape[-2:]
    squares = update.square().sum(dim=-1 if M >= K else -2, keepdim=True)
    norms = squares.sum(dim=(-2, -1), keepdim=True).sqrt()
    factors = torch.ones_like(norms)
    if renormalise:
        factors = min(M, K) ** 0.5 / _nonzero(norms.clamp_min(norm_eps))
    squares = squares * factors.square()
    torch._foreach_lerp_(list(second_momentums), list((squares / min(M, K)).unbind()), 1 - beta2)
    inverse = torch.stack(list(second_momentums)).clamp_min(eps).rsqrt()
    after = (squares * inverse.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    reduced = update * (factors * inverse * (norms * factors / _nonzero(after)))
    reference_muon_update_(
        params, reduced, lr=lr, weight_decay=weight_decay, scale=scale, cautious=cautious, copies=copies
    )


def _nonzero(norms: Tensor) -> Tensor:
    return torch.where(norms == 0, 1.0, norms)


@torch.no_grad()
def native_normuon_update_(
    params: Sequence[Tensor],
    update: Tensor,
    second_momentums: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    copies: Sequence[Tensor] | None,
    **others: Any,
) -> None:
    """Run the kernel."""
    lr, lr_tensor = schema.number_and_tensor(lr, 0.0)
    weight_decay, weight_decay_tensor = schema.number_and_tensor(weight_decay, 0.0)
    torch.ops.nanochat_native.normuon_update_(
        params,
        update,
        second_momentums,
        copies or [],
        lr=lr,
        weight_decay=weight_decay,
        lr_tensor=lr_tensor,
        weight_decay_tensor=weight_decay_tensor,
        **others,
    )


# --- newton_schulz_update_ ---


def newton_schulz_update_(
    params: Sequence[Tensor],
    update: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    scale: float = 1.0,
    cautious: bool = False,
    steps: int = 5,
    coefficients: str | Sequence[Triple] = "quintic",
    norms: Tensor | None = None,
    allow_bfloat16: bool = False,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Run newton_schulz and muon_update_ in one: p = (1 - lr weight_decay) p - lr scale newton_schulz(update[i]).

    On CUDA the kernel that writes the last product updates the parameters and their copies. The result of newton_schulz
    then needs neither memory nor the time to write and read it.

    Args:
        params: At least one contiguous tensor; one shape (..., M, K), all float32 or all bfloat16. Updated.
        update: (len(params), ..., M, K) float32, contiguous, as muon_momentum_ returns it.
        lr, weight_decay, scale, cautious, copies: As for muon_update_.
        steps, coefficients, norms, allow_bfloat16: As for newton_schulz; norms is (len(params), ...).

    Raises:
        ValueError, TypeError: An argument is wrong.
        RuntimeError: A derivative is asked for.
    """
    op = "newton_schulz_update_"
    modes.refuse(op, norms)
    _check_muon_update(op, params, update, lr, weight_decay, copies)
    if params[0].dim() < 2:
        raise ValueError(f"{op}: params must have shape (..., M, K), got {tuple(params[0].shape)}")
    triples, norm_factor = check_newton_schulz(op, "update", update, steps, coefficients, norms)
    options: dict[str, Any] = {
        "lr": lr,
        "weight_decay": weight_decay,
        "scale": scale,
        "cautious": cautious,
        "copies": copies,
    }
    if backends.runs_native(op, update):
        native_newton_schulz_update_(
            params, update, triples, norm_factor, norms, allow_bfloat16=allow_bfloat16, **options
        )
    else:
        iteration: dict[str, Any] = {"steps": steps, "coefficients": coefficients, "norms": norms}
        reference_newton_schulz_update_(params, update, **options, **iteration)


@torch.no_grad()
def reference_newton_schulz_update_(
    params: Sequence[Tensor],
    update: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    scale: float = 1.0,
    cautious: bool = False,
    steps: int = 5,
    coefficients: str | Sequence[Sequence[float]] = "quintic",
    norms: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Do what `newton_schulz_update_` does, with the two references."""
    orthogonal = reference_newton_schulz(update, steps=steps, coefficients=coefficients, norms=norms)
    reference_muon_update_(
        params, orthogonal, lr=lr, weight_decay=weight_decay, scale=scale, cautious=cautious, copies=copies
    )


@torch.no_grad()
def native_newton_schulz_update_(
    params: Sequence[Tensor],
    update: Tensor,
    triples: Sequence[Triple],
    norm_factor: float,
    norms: Tensor | None,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    scale: float,
    cautious: bool,
    copies: Sequence[Tensor] | None,
    allow_bfloat16: bool = False,
) -> None:
    """Run the kernel."""
    lr, lr_tensor = schema.number_and_tensor(lr, 0.0)
    weight_decay, weight_decay_tensor = schema.number_and_tensor(weight_decay, 0.0)
    torch.ops.nanochat_native.newton_schulz_update_(
        params,
        update,
        copies or [],
        flattened(triples),
        norm_factor,
        norms,
        lr,
        weight_decay,
        scale,
        cautious,
        lr_tensor,
        weight_decay_tensor,
        allow_bfloat16,
    )


schema.register("muon_momentum_", _muon_momentum_fake)
schema.register("muon_update_", schema.returns_nothing)
schema.register("normuon_update_", schema.returns_nothing)
schema.register("newton_schulz_update_", schema.returns_nothing)
