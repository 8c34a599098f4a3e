"""One AdamW step on a list of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.dtypes import PARAM_DTYPES, widest_dtype


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Tensor,
    stochastic_rounding: bool = False,
    seed: int = 0,
    cautious: bool = False,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Run one AdamW step (arXiv:1711.05101) on a list of tensors, in place, as one operator.

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    p = (1 - lr weight_decay) p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps), as torch.optim.AdamW.

    Args:
        params: Contiguous tensors on one device, all float32 or all bfloat16. Updated.
        grads: Contiguous tensors with the shapes and dtype of params.
        exp_avgs, exp_avg_sqs: m and v, contiguous tensors with the shapes of params, float32; with bfloat16 params they
            may all be bfloat16. Updated.
        step: t, from 1.
        stochastic_rounding: Round bfloat16 params up or down at random, without bias. On each backend the choice is a
            pure function of (seed, step, tensor, element). float32 params are not affected.
        cautious: Use Cautious Weight Decay, arXiv:2510.12402: the factor (1 - lr weight_decay) applies only where
            m p >= 0, for the new m and the old p in float32. Where that product is NaN there is no decay.
        copies: Contiguous bfloat16 tensors with the shapes of params, which must be float32. The same pass writes the
            updated params to them, rounded to nearest even (see low_precision).

    step, lr and weight_decay may each be a 0-d tensor on the params' device, step int64, the others float64
    (float32 on MPS). A CUDA graph reads their current values when it is replayed. On the CPU they give the same bits as
    numbers. Their values are checked on the CPU only, and not while torch.compile traces: on a GPU, reading them would
    wait for the stream.

    Raises:
        ValueError, TypeError: An argument is wrong.
        RuntimeError: A derivative is asked for: a tensor requires a gradient while grad mode is on, or forward-mode AD
            or a torch.func transform is active. The same holds for every operator whose name ends in an underscore.
    """
    modes.refuse("adamw_", params, grads, exp_avgs, exp_avg_sqs, copies, step, lr, weight_decay)
    checks.check_lists("adamw_", params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    if not params:
        return
    _check(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay)
    checks.check_copies("adamw_", params, copies)
    function = native_adamw_ if backends.runs_native("adamw_", params[0]) else reference_adamw_
    function(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        cautious=cautious,
        copies=copies,
    )


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Tensor,
) -> None:
    device, dtype, moments_dtype = params[0].device, params[0].dtype, exp_avgs[0].dtype
    checks.check_number("adamw_", "step", step, device, torch.int64, low=1)
    checks.check_number("adamw_", "lr", lr, device)
    checks.check_number("adamw_", "weight_decay", weight_decay, device)
    if not eps >= 0:
        raise ValueError(f"adamw_: eps must be >= 0, got {eps}")
    if not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
        raise ValueError(f"adamw_: beta1 and beta2 must be >= 0 and < 1, got {beta1} and {beta2}")
    checks.check_dtype("adamw_", "params[0]", params[0], PARAM_DTYPES)
    checks.check_list_dtypes("adamw_", dtype, params=params, grads=grads)
    if moments_dtype not in (torch.float32, dtype):
        raise TypeError(
            f"adamw_: exp_avgs[0] must be torch.float32, or torch.bfloat16 with torch.bfloat16 params, "
            f"got {moments_dtype}"
        )
    checks.check_list_dtypes("adamw_", moments_dtype, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)


# --- reference ---


@torch.no_grad()
def reference_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Tensor,
    stochastic_rounding: bool = False,
    seed: int = 0,
    cautious: bool = False,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Do what `adamw_` does, tensor by tensor."""
    t = step.to(widest_dtype(step.device)) if isinstance(step, Tensor) else step
    step_size = lr / (1 - beta1**t)
    bias_correction2_sqrt = (1 - beta2**t) ** 0.5
    decay = 1 - lr * weight_decay
    for index, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = grad.float()
        m = exp_avg.float() * beta1 + g * (1 - beta1)
        v = exp_avg_sq.float() * beta2 + g * g * (1 - beta2)
        p = decayed(param, decay, m, cautious) - step_size * m / (v.sqrt() / bias_correction2_sqrt + eps)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        if stochastic_rounding and param.dtype == torch.bfloat16:
            key = _mix(torch.full((), seed, dtype=torch.int64, device=param.device))
            p = _stochastic_round(p, _mix(_mix(key + step) + index))
        param.copy_(p)
        if copies:
            copies[index].copy_(param)


def decayed(param: Tensor, decay: float | Tensor, update: Tensor, cautious: bool) -> Tensor:
    """Return param * decay in float32; if `cautious`, only where update * param >= 0."""
    p = param.float()
    return torch.where(update * p >= 0, p * decay, p) if cautious else p * decay


def _mix(x: Tensor) -> Tensor:
    """Return splitmix64's finaliser (Steele, Lea & Flood, 2014) of each int64, modulo 2^64."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ (x >> 31 & (1 << 33) - 1)


def _stochastic_round(x: Tensor, key: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down with the probabilities that make the expectation x. Keep NaN and infinity.

    A pure function of x and key, a 0-d int64 tensor. A generator's seed would have to be read from the device.
    """
    element = torch.arange(x.numel(), device=x.device).view(x.shape)
    noise = (_mix(key + element) >> 48 & 0xFFFF).to(torch.int32)
    # Add noise below the last kept bit, then truncate the magnitude. float is sign-magnitude, so both signs are right.
    rounded = ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)


# --- native ---


@torch.no_grad()
def native_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    copies: Sequence[Tensor] | None = None,
    **others: float,
) -> None:
    """Run the kernel."""
    step, step_tensor = schema.number_and_tensor(step, 1)
    lr, lr_tensor = schema.number_and_tensor(lr, 0.0)
    weight_decay, weight_decay_tensor = schema.number_and_tensor(weight_decay, 0.0)
    torch.ops.nanochat_native.adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        copies or [],
        step=step,
        lr=lr,
        weight_decay=weight_decay,
        step_tensor=step_tensor,
        lr_tensor=lr_tensor,
        weight_decay_tensor=weight_decay_tensor,
        **others,
    )


schema.register("adamw_", schema.returns_nothing)
