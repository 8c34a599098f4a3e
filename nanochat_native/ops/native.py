"""The native operators: loads `_C`, which registers them with torch, and gives them fakes and gradients."""

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat_native.ops import modes, reference
from nanochat_native.ops.reference import Triple, compute_dtype

MEND = "run `pip install --no-build-isolation .` in nanochat-native's folder, or choose NANOCHAT_NATIVE_BACKEND=torch"

OPERATORS = (
    "attention",
    "newton_schulz",
    "adamw_",
    "muon_momentum_",
    "muon_update_",
    "newton_schulz_update_",
    "linear_cross_entropy",
)
LINEAR_OPERATORS = ("linear", "linear_backward")
COMPOSED_OPERATORS = (
    *LINEAR_OPERATORS,
    "cached_forward_",
)  # with kernels for float32 on the CPU, else of torch's calls
# Those with a CUDA kernel, when the module was built with CUDA: all. Every operator has CPU kernels.
CUDA_OPERATORS = frozenset(OPERATORS)
CUDA_ATTENTION_DTYPES = (torch.bfloat16, torch.float16)
CUDA_ATTENTION_LARGEST_D = 128


def _load() -> tuple[Any, str]:
    """The module `_C` and what keeps it from being used: an empty string if nothing does."""
    try:
        module = importlib.import_module("nanochat_native._C")
    except ModuleNotFoundError:
        return None, f"the native module nanochat_native._C is not built for this Python: {MEND}"
    except ImportError as error:
        return None, (
            f"the native module nanochat_native._C does not load with torch {torch.__version__} ({error}): {MEND}"
        )
    built_for = module.build_info()["torch"]
    if _release(built_for) != _release(torch.__version__):
        return module, (
            f"the native module nanochat_native._C was built for torch {built_for}, this is {torch.__version__}: {MEND}"
        )
    return module, ""


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


_C, problem = _load()


def require() -> None:
    """Raises RuntimeError, with the mend, when the native kernels cannot be used."""
    if problem:
        raise RuntimeError(problem)


def build_info() -> dict[str, Any]:
    """What `_C` was built as: version, torch, compiler, instruction_sets, cuda (nvcc's version, or ""),
    cuda_architectures (entries as in TORCH_CUDA_ARCH_LIST) and cuda_off (why CUDA is not in it, or "").

    Raises RuntimeError, with the mend, when there is no usable module.
    """
    require()
    info: dict[str, Any] = _C.build_info()
    return info


def instruction_set() -> str:
    """The instruction set that the CPU kernels run on here: "avx512", "avx2" or "baseline".

    Raises RuntimeError, with the mend, when there is no usable module; ValueError when the environment variable
    NANOCHAT_CPU_ISA names one that this processor does not have.
    """
    require()
    name: str = _C.instruction_set()
    return name


def cuda_instruction_set() -> str:
    """The instruction set of the CUDA kernels that have a choice, on the current GPU: "sm_80" or "sm_90a".

    Raises RuntimeError when there is no GPU, or no module built with CUDA; ValueError when the environment variable
    NANOCHAT_CUDA_ISA names one that is unknown or that this GPU does not have.
    """
    require()
    if not build_info()["cuda"]:
        raise RuntimeError(f"nanochat_native was built without CUDA: {build_info()['cuda_off']}")
    name: str = _C.cuda_instruction_set()
    return name


# Types of device that have a native kernel, for each operator. "meta" stands for shapes without data.
DEVICES: dict[str, tuple[str, ...]] = {
    op: ("cpu", "meta", "cuda") if op in CUDA_OPERATORS and not problem and build_info()["cuda"] else ("cpu", "meta")
    for op in (*OPERATORS, *COMPOSED_OPERATORS)
}


def _beyond_first_derivative(*grads: Tensor) -> str:
    """What is asked for of a backward pass beyond its result, given the gradients that come into it."""
    # Grad mode is on during a backward pass only under create_graph=True.
    return modes.beyond_backward(*grads) or ("second derivatives" if torch.is_grad_enabled() else "")


# --- attention ---


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    lengths: Tensor | None,
) -> Tensor:
    scale = q.size(-1) ** -0.5 if scale is None else scale
    window = -1 if window is None else window
    return torch.ops.nanochat_native.attention_forward(q, k, v, causal or window >= 0, window, scale, lengths)[0]


def _attention_forward_fake(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=compute_dtype(q.dtype))
    return q.new_empty(q.shape), lse


def _attention_backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *shape = inputs
    ctx.shape = shape[:3]  # lengths has no gradient
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _attention_grad(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    if mode := _beyond_first_derivative(dout):
        q, k, v, _, _ = ctx.saved_tensors
        causal, window, scale = ctx.shape
        modes.warn_twin_serves("attention", q.device.type, f"its kernel has no rule for {mode}")
        with torch.enable_grad():
            inputs = [x.view_as(x) for x in (q, k, v)]  # one may have been computed from another
            out = reference.attention(*inputs, causal=causal, window=None if window < 0 else window, scale=scale)
        needed = [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad(out, needed, dout, create_graph=torch.is_grad_enabled()))
        dq, dk, dv = (next(found) if x.requires_grad else None for x in inputs)
    else:
        dq, dk, dv = torch.ops.nanochat_native.attention_backward(dout, *ctx.saved_tensors, *ctx.shape)
    return dq, dk, dv, None, None, None, None


# --- newton_schulz ---


def newton_schulz(g: Tensor, triples: Sequence[Triple], norm_factor: float, norms: Tensor | None) -> Tensor:
    dtype = torch.float32 if g.device.type == "cuda" else compute_dtype(g.dtype)  # that the kernels read and write
    with torch.no_grad():
        x = torch.ops.nanochat_native.newton_schulz(g.to(dtype), _numbers(triples), norm_factor, norms)
        return x.to(g.dtype)


def _numbers(triples: Sequence[Triple]) -> list[float]:
    return [number for triple in triples for number in triple]


def _newton_schulz_fake(g: Tensor, coefficients: Sequence[float], norm_factor: float, norms: Tensor | None) -> Tensor:
    return g.new_empty(g.shape)


# --- optimizers ---


def _apart(value: Any, instead: float) -> tuple[Any, Tensor | None]:
    """The number and the tensor that a schema takes for one argument; a tensor counts, and `instead` fills in."""
    return (instead, value) if isinstance(value, Tensor) else (value, None)


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    **others: float,
) -> None:
    step, step_tensor = _apart(step, 1)
    lr, lr_tensor = _apart(lr, 0.0)
    weight_decay, weight_decay_tensor = _apart(weight_decay, 0.0)
    torch.ops.nanochat_native.adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step=step,
        lr=lr,
        weight_decay=weight_decay,
        step_tensor=step_tensor,
        lr_tensor=lr_tensor,
        weight_decay_tensor=weight_decay_tensor,
        **others,
    )


def _adamw_fake(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    **hyperparameters: float | Tensor | None,
) -> None:
    pass


@torch.no_grad()
def muon_momentum_(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool,
    return_norm: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    momentum, momentum_tensor = _apart(momentum, 0.0)
    update, norms = torch.ops.nanochat_native.muon_momentum_(
        grads, momentum_buffers, momentum, nesterov, return_norm, momentum_tensor
    )
    return (update, norms) if return_norm else update


def _muon_momentum_fake(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    momentum: float,
    nesterov: bool,
    with_norms: bool,
    momentum_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    count = len(grads)
    update = grads[0].new_empty((count, *grads[0].shape), dtype=torch.float32)
    return update, grads[0].new_empty(count if with_norms else 0, dtype=torch.float64)


@torch.no_grad()
def muon_update_(
    params: Sequence[Tensor],
    update: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    scale: float,
    cautious: bool,
) -> None:
    lr, lr_tensor = _apart(lr, 0.0)
    weight_decay, weight_decay_tensor = _apart(weight_decay, 0.0)
    torch.ops.nanochat_native.muon_update_(
        params, update, lr, weight_decay, scale, cautious, lr_tensor, weight_decay_tensor
    )


def _muon_update_fake(
    params: Sequence[Tensor],
    update: Tensor,
    lr: float,
    weight_decay: float,
    scale: float,
    cautious: bool,
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
) -> None:
    pass


@torch.no_grad()
def newton_schulz_update_(
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
) -> None:
    lr, lr_tensor = _apart(lr, 0.0)
    weight_decay, weight_decay_tensor = _apart(weight_decay, 0.0)
    torch.ops.nanochat_native.newton_schulz_update_(
        params,
        update,
        _numbers(triples),
        norm_factor,
        norms,
        lr,
        weight_decay,
        scale,
        cautious,
        lr_tensor,
        weight_decay_tensor,
    )


def _newton_schulz_update_fake(
    params: Sequence[Tensor],
    update: Tensor,
    coefficients: Sequence[float],
    norm_factor: float,
    norms: Tensor | None,
    lr: float,
    weight_decay: float,
    scale: float,
    cautious: bool,
    lr_tensor: Tensor | None,
    weight_decay_tensor: Tensor | None,
) -> None:
    pass


# --- linear ---

LINEAR_ROWS = 64  # fewer do not pay for transposing the weight
LINEAR_CHOICES = ("auto", "native", "torch")


def _linear_pays_here() -> bool:
    try:
        return not problem and _C.linear_pays()
    except ValueError:  # of NANOCHAT_CPU_ISA: raised by the first operator that runs, not by the import
        return False


_linear = os.environ.get("NANOCHAT_LINEAR") or "auto"
_linear_pays = _linear_pays_here()


def linear_is_native() -> bool:
    """Whether the native product serves float32 of enough rows on this CPU: where it outruns torch's own, unless the
    environment variable NANOCHAT_LINEAR says otherwise.

    Raises ValueError when NANOCHAT_LINEAR is none of LINEAR_CHOICES.
    """
    if _linear not in LINEAR_CHOICES:
        raise ValueError(f"NANOCHAT_LINEAR is {_linear!r}; takes auto, native or torch")
    return _linear_pays if _linear == "auto" else _linear == "native"


def serves_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether the native product serves x (..., I) and weight (O, I)."""
    return (
        linear_is_native()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= LINEAR_ROWS * x.size(-1)
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.nanochat_native.linear(x.reshape(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.size(0))


def _linear_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.size(0), weight.size(0)))


def _linear_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, needs_grad_x: bool, needs_grad_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_grad_x else 0), weight.new_empty(weight.shape if needs_grad_weight else 0)


def _linear_setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    x, weight = ctx.saved_tensors
    if _beyond_first_derivative(dy):
        grads = dy @ weight, dy.mT @ x
    else:
        grads = torch.ops.nanochat_native.linear_backward(dy, x, weight, *needed)
    return tuple(grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True))


# --- cached_forward_ ---


@torch.no_grad()
def cached_forward_(
    tokens: Tensor, slots: Sequence[int], starts: Sequence[int], windows: Sequence[int | None], **others: Any
) -> Tensor:
    limits = [-1 if window is None else window for window in windows]
    return torch.ops.nanochat_native.cached_forward_(tokens, slots, starts, windows=limits, **others)


def _cached_forward_fake(
    tokens: Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    wte: Tensor,
    blocks: Sequence[Tensor],
    lm_head: Tensor,
    windows: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    softcap: float,
    with_logits: bool,
) -> Tensor:
    return wte.new_empty((tokens.size(0) if with_logits else 0, wte.size(0)))


# --- linear_cross_entropy ---


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignore_index: int, reduction: str
) -> Tensor:
    grad = torch.is_grad_enabled()
    loss, _, _ = torch.ops.nanochat_native.linear_cross_entropy(
        x.reshape(-1, x.size(-1)),
        weight,
        targets.reshape(-1),
        softcap,
        ignore_index,
        reduction,
        grad and x.requires_grad,
        grad and weight.requires_grad,
    )
    return loss.reshape(targets.shape) if reduction == "none" else loss


def _linear_cross_entropy_fake(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    ignore_index: int,
    reduction: str,
    needs_grad_x: bool,
    needs_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty(targets.shape if reduction == "none" else (), dtype=compute_dtype(x.dtype))
    return loss, x.new_empty(x.shape if needs_grad_x else 0), weight.new_empty(weight.shape if needs_grad_weight else 0)


def _linear_cross_entropy_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, grad_x, grad_weight = output
    ctx.needs = inputs[-2:]
    ctx.set_materialize_grads(False)  # no zeros for the gradients of these two, which are as large as they are
    ctx.mark_non_differentiable(grad_x, grad_weight)
    ctx.save_for_backward(grad_x, grad_weight)


def _linear_cross_entropy_grad(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 8
    if torch.is_grad_enabled():  # under create_graph=True; what would be differentiated is not kept
        raise RuntimeError(
            "linear_cross_entropy: its kernel has no second derivative; takes create_graph=False, "
            "or its call under ops.use_backend('torch')"
        )
    grads = [grad * dloss if needed else None for grad, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)]
    return (*grads, None, None, None, None, None, None)


_FAKES: dict[str, Callable[..., Any]] = {
    "attention_forward": _attention_forward_fake,
    "attention_backward": _attention_backward_fake,
    "newton_schulz": _newton_schulz_fake,
    "adamw_": _adamw_fake,
    "muon_momentum_": _muon_momentum_fake,
    "muon_update_": _muon_update_fake,
    "newton_schulz_update_": _newton_schulz_update_fake,
    "linear": _linear_fake,
    "linear_backward": _linear_backward_fake,
    "cached_forward_": _cached_forward_fake,
    "linear_cross_entropy": _linear_cross_entropy_fake,
}

if not problem:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"nanochat_native::{_name}", _fake)
    torch.library.register_autograd(
        "nanochat_native::attention_forward", _attention_grad, setup_context=_attention_setup_context
    )
    torch.library.register_autograd("nanochat_native::linear", _linear_grad, setup_context=_linear_setup_context)
    torch.library.register_autograd(
        "nanochat_native::linear_cross_entropy",
        _linear_cross_entropy_grad,
        setup_context=_linear_cross_entropy_setup_context,
    )
