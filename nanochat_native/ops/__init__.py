"""The operators: one public call each, checked here, then run by the native kernels or by their plain-torch twins.

`use_backend("native" | "torch")` chooses. Environment variables, read when the process starts, choose too:
    NANOCHAT_NATIVE_BACKEND=native|torch         the backend that a process starts with; native by default.
    NANOCHAT_CPU_ISA=avx512|avx2|baseline        the instruction set of the CPU kernels; by default the newest there is.
    NANOCHAT_CUDA_ISA=sm_90a|sm_80               that of the CUDA kernels that have a choice; likewise.
    NANOCHAT_LINEAR=auto|native|torch            the product of `linear` in float32 on a CPU; auto takes the faster one.
A value that is not taken is a ValueError of the first call that needs it, and of `check_environment`.

Nothing falls back in silence: on a device that has no native kernel for an operator, the twin serves and one warning
names the operator; so it is where a kernel has no rule for what is asked for (second derivatives, forward-mode AD,
torch.func's transforms). A module that is missing or was built for another torch is a RuntimeError with the mend.

Every call raises ValueError or TypeError, before any work, for arguments that it does not take.

Shape letters: B batch, Tq queries, Tk keys, H query heads, Hkv key/value heads, D head size,
               N rows (tokens), C channels, V vocabulary, (M, K) one matrix.
"""

import functools
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from nanochat_native.ops import modes, native, reference
from nanochat_native.ops.modes import beyond_backward
from nanochat_native.ops.native import build_info, cuda_instruction_set, instruction_set
from nanochat_native.ops.reference import Triple

__all__ = [
    "OPERATORS",
    "adamw_",
    "attention",
    "backend",
    "beyond_backward",
    "build_info",
    "cached_forward_",
    "check_environment",
    "cuda_instruction_set",
    "instruction_set",
    "linear",
    "linear_backward",
    "linear_cross_entropy",
    "muon_momentum_",
    "muon_update_",
    "newton_schulz",
    "newton_schulz_update_",
    "serves",
    "use_backend",
]

BACKENDS = ("native", "torch")
OPERATORS = native.OPERATORS  # that native kernels or twins serve

_backend = os.environ.get("NANOCHAT_NATIVE_BACKEND") or "native"


def backend() -> str:
    """The backend in use: "native" or "torch".

    Raises ValueError when the environment variable NANOCHAT_NATIVE_BACKEND names another one.
    """
    if _backend not in BACKENDS:
        raise ValueError(f"NANOCHAT_NATIVE_BACKEND is {_backend!r}; takes native or torch")
    return _backend


def check_environment() -> None:
    """Raises ValueError for an environment variable of a CPU's choices that names what is unknown or not there."""
    if backend() == "native" and not native.problem:
        native.instruction_set()
    native.linear_is_native()


class use_backend:  # noqa: N801 (called as a function)
    """Choose the backend of every operator: a call sets it for good, a `with` block until its end.

    Raises ValueError for an unknown name, RuntimeError for "native" when the native module cannot be used.
    """

    def __init__(self, name: str) -> None:
        global _backend
        if name not in BACKENDS:
            raise ValueError(f"use_backend: name is {name!r}; takes 'native' or 'torch'")
        if name == "native":
            native.require()
        self._previous = _backend
        _backend = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _backend
        _backend = self._previous


def serves(op: str, device: torch.device | str) -> tuple[str, str]:
    """Which backend ("native" or "torch") serves operator `op` on `device`, and why, as a phrase.

    Raises ValueError for an unknown operator.
    """
    if op not in native.DEVICES:
        raise ValueError(f"serves: op is {op!r}; takes {', '.join(native.DEVICES)}")
    kind = torch.device(device).type
    if backend() == "torch":
        return "torch", "chosen by use_backend or NANOCHAT_NATIVE_BACKEND"
    if native.problem:
        return "torch", native.problem
    if op in native.LINEAR_OPERATORS and kind == "cpu" and not native.linear_is_native():
        return "torch", "the library's product, by NANOCHAT_LINEAR or because it is as fast on this processor"
    if kind in native.DEVICES[op]:
        return "native", "kernel built"
    if op in native.COMPOSED_OPERATORS:
        return "torch", f"composed of torch's products on {kind}"
    if kind == "cuda" and not build_info()["cuda"]:
        return "torch", "nanochat_native was built without CUDA"
    return "torch", f"no native kernel for {kind} yet"


def _runs_native(op: str, tensor: Tensor, not_taken: str = "") -> bool:
    """not_taken: why the native kernel does not take these arguments, or nothing."""
    if backend() == "torch":
        return False
    native.require()
    kind = tensor.device.type
    if kind in native.DEVICES[op] and not not_taken:
        return True
    modes.warn_twin_serves(op, kind, not_taken if kind in native.DEVICES[op] else serves(op, kind)[1])
    return False


def _no_rule(*arguments: Tensor) -> str:
    """Why no kernel serves in the mode that torch is in, as a phrase."""
    mode = beyond_backward(*arguments)
    return f"its kernel has no rule for {mode}" if mode else ""


def _attention_not_taken(q: Tensor) -> str:
    """What the CUDA kernels do not take of q's type and head size, as a phrase."""
    if q.device.type != "cuda":
        return ""
    if q.dtype not in native.CUDA_ATTENTION_DTYPES:
        return f"its kernels take bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.size(3) % 8 or q.size(3) > native.CUDA_ATTENTION_LARGEST_D:
        return f"its kernels take D a multiple of 8 up to {native.CUDA_ATTENTION_LARGEST_D}, not {q.size(3)}"
    return ""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Exact attention, softmax(scale * q k^T) v, without the matrix of scores. Differentiable.

    Args:
        q: (B, Tq, H, D).
        k, v: (B, Tk, Hkv, D) of q's dtype and device; H is a multiple of Hkv, heads h * H / Hkv ... share key head h.
        causal: aligned bottom-right: query i sees keys up to i + Tk - Tq.
        window: query i sees its own key and the `window` keys before it, as FlashAttention's window_size=(window, 0).
            Implies causal.
        scale: of the scores; 1 / sqrt(D) by default.
        lengths: (B,) int64 on q's device: k and v are caches with room for Tk keys, of which sequence b has the first
            lengths[b], and the alignment is to those. Without derivatives and torch.func transforms. A length above Tk
            is a ValueError on a CPU; a GPU's memory is not read to find out, and its kernel takes it for Tk.

    Returns:
        (B, Tq, H, D) in q's dtype, contiguous. A query that sees no key gets 0, and gives no gradient.

    Native on the CPU: float32, float64, bfloat16 (computed in float32), any strides with unit stride in D (others are
    copied first). Native on CUDA, compute capability 8.0 or newer: bfloat16 and float16 with float32 sums, D a multiple
    of 8 up to 128 (computed as 64, 96 or 128); tensors whose rows do not lie at multiples of 16 bytes are copied first;
    other types and D are served by the twin, with a warning. On compute capability 9.0 kernels with tensor copies and
    wgmma run. Up to 64 rows Tq * H / Hkv, a step of generation, split the keys among the GPU's multiprocessors.
    The same inputs give the same bits on the same machine, forward and backward. Second derivatives, forward-mode AD
    and torch.func transforms are the twin's, with a warning: it keeps the matrix of scores. Method: FlashAttention-2,
    arXiv:2307.08691, and on Hopper FlashAttention-3, arXiv:2407.08608.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"attention: q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
            "takes (B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, D)"
        )
    if k.shape != v.shape or q.size(0) != k.size(0) or q.size(3) != k.size(3):
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: "
            "k and v must have the same shape, and B and D of q"
        )
    if q.size(3) == 0 or q.size(2) == 0 or k.size(2) == 0 or q.size(2) % k.size(2) != 0:
        raise ValueError(
            f"attention: H is {q.size(2)}, Hkv is {k.size(2)}, D is {q.size(3)}; takes H a multiple of Hkv, D from 1"
        )
    _check_same("attention", q, q=q, k=k, v=v)
    _check_dtype("attention", "q", q, _ATTENTION_DTYPES if q.device.type == "cuda" else _CPU_DTYPES)
    if window is not None and window < 0:
        raise ValueError(f"attention: window is {window}; takes None or the number of earlier keys, at least 0")
    if lengths is not None:
        _check_lengths(lengths, q, k, v)
    if _runs_native("attention", q, _no_rule(q, k, v) or _attention_not_taken(q)):
        return native.attention(q, k, v, causal, window, scale, lengths)
    return reference.attention(q, k, v, causal=causal, window=window, scale=scale, lengths=lengths)


def _check_lengths(lengths: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_dtype("attention", "lengths", lengths, (torch.int64,))
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"attention: lengths has shape {tuple(lengths.shape)}; takes ({q.size(0)},), one a sequence")
    if lengths.device != q.device:
        raise ValueError(f"attention: lengths is on {lengths.device}; takes {q.device}, as q")
    modes.refuse_beside("attention", "lengths", q, k, v)


def newton_schulz(
    g: Tensor,
    *,
    steps: int = 5,
    coefficients: str | Sequence[Triple] = "quintic",
    norms: Tensor | None = None,
) -> Tensor:
    """Orthogonalise matrices: replace the singular values of g by values near 1.

    X0 = g / (f |g|_F); each step with its triple (a, b, c): A = X X^T, X = a X + (b A + c A A) X.

    Args:
        g: (..., M, K), floating point; each matrix by itself, of any scale.
        steps: how many; the first `steps` triples are used, and where there are fewer the last is repeated.
        coefficients: "quintic", Keller Jordan's (3.4445, -4.7750, 2.0315), and "cubic", (1.5, -0.5, 0), with f = 1;
            "polar_express", the five triples of arXiv:2505.16932, with f = 1.01; or a list of triples, with f = 1.
        norms: (...) float64, the Frobenius norms |g|_F where they are known (see muon_momentum_), which saves a pass
            over g. They are believed: wrong ones give a wrong result, and too small ones let it grow without bound.
            Without derivatives and torch.func transforms.

    Returns:
        (..., M, K) in g's dtype, contiguous. A zero matrix gives zero; a NaN makes its matrix NaN.

    Native on the CPU: computed in float32, or float64 for float64. Native on CUDA: products of float16 (bfloat16 where
    the triples let numbers grow too large) with float32 sums, whatever g's type, on compute capability 9.0 by tensor
    copies and wgmma. Where it is less work, steps are taken on the smaller Gram matrix, three and then two at a time.
    Errors on CUDA are at most half of those of the same steps in bfloat16. The kernels have no derivative: where g
    requires a gradient and grad mode is on, and under forward-mode AD and torch.func transforms, the twin serves with a
    warning, differentiable and not in bfloat16; optimizers call this under torch.no_grad().
    """
    triples, norm_factor = _check_newton_schulz("newton_schulz", "g", g, steps, coefficients, norms)
    if norms is not None:
        modes.refuse_beside("newton_schulz", "norms", g, norms)
    mode = modes.derivative(g)
    if _runs_native("newton_schulz", g, f"its kernel has no rule for {mode}" if mode else ""):
        return native.newton_schulz(g, triples, norm_factor, norms)
    return reference.newton_schulz(g, steps=steps, coefficients=coefficients, norms=norms)


def _check_newton_schulz(
    op: str, name: str, g: Tensor, steps: int, coefficients: str | Sequence[Triple], norms: Tensor | None
) -> tuple[list[Triple], float]:
    """The schedule, once the arguments are checked."""
    if g.dim() < 2:
        raise ValueError(f"{op}: {name} has shape {tuple(g.shape)}; takes (..., M, K)")
    _check_dtype(op, name, g, _ATTENTION_DTYPES)
    if steps < 1:
        raise ValueError(f"{op}: steps is {steps}; takes at least 1")
    if norms is not None:
        _check_dtype(op, "norms", norms, (torch.float64,))
        if norms.shape != g.shape[:-2]:
            raise ValueError(
                f"{op}: norms has shape {tuple(norms.shape)}; takes {tuple(g.shape[:-2])}, as {name} without M, K"
            )
        if norms.device != g.device:
            raise ValueError(f"{op}: norms is on {norms.device}; takes {g.device}, as {name}")
    return reference.newton_schulz_schedule(steps, coefficients)


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
) -> None:
    """One AdamW step (arXiv:1711.05101) on a list of tensors, in place, as one operator.

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    p = (1 - lr weight_decay) p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps), as torch.optim.AdamW.

    Args:
        params: contiguous tensors on one device, all float32 or all bfloat16, updated.
        grads: of the shapes and dtype of params, contiguous, only read.
        exp_avgs, exp_avg_sqs: m and v, of the shapes of params, contiguous, updated; float32, or with bfloat16 params
            all bfloat16.
        step: t, from 1.
        stochastic_rounding: round bfloat16 params up or down at random, without bias, as a pure function of
            (seed, step, tensor, element) on each backend. float32 params take no notice of it.
        cautious: Cautious Weight Decay, arXiv:2510.12402: the factor (1 - lr weight_decay) only where m p >= 0, of the
            new m and the old p in float32; where that is NaN there is no decay.

    step, lr and weight_decay may each be a 0-d tensor on the params' device, step int64, the others float64: a CUDA
    graph reads what stands there when it is replayed. On the CPU they give the same bits as numbers do. Their values
    are checked on the CPU only, and not while torch.compile traces: on a GPU, reading them would wait for the stream.

    A step has no derivative: a RuntimeError where a tensor requires a gradient and grad mode is on, under forward-mode
    AD and under torch.func transforms. So have the other operators whose names end in an underscore.
    """
    modes.refuse("adamw_", params, grads, exp_avgs, exp_avg_sqs, step, lr, weight_decay)
    _check_lists("adamw_", params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    if not params:
        return
    device = params[0].device
    _check_number("adamw_", "step", step, device, torch.int64, low=1)
    _check_number("adamw_", "lr", lr, device)
    _check_number("adamw_", "weight_decay", weight_decay, device)
    if not eps >= 0:
        raise ValueError(f"adamw_: eps is {eps}; takes at least 0")
    if not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
        raise ValueError(f"adamw_: beta1 {beta1}, beta2 {beta2}; takes 0 <= beta < 1")
    _check_dtype("adamw_", "params[0]", params[0], _PARAM_DTYPES)
    _check_list_dtypes("adamw_", params[0].dtype, params=params, grads=grads)
    if exp_avgs[0].dtype != torch.float32 and exp_avgs[0].dtype != params[0].dtype:
        raise TypeError(
            f"adamw_: exp_avgs[0] is {exp_avgs[0].dtype}; "
            "takes torch.float32, or torch.bfloat16 with torch.bfloat16 params"
        )
    _check_list_dtypes("adamw_", exp_avgs[0].dtype, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    function = native.adamw_ if _runs_native("adamw_", params[0]) else reference.adamw_
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
    )


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
    return_norm: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def muon_momentum_(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool = True,
    return_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The half of Muon before newton_schulz, for same-shaped tensors in one pass.

    buf = momentum buf + (1 - momentum) g;  update = momentum buf + (1 - momentum) g with Nesterov, else buf.

    Args:
        grads: at least one; one shape, contiguous, all float32 or all bfloat16, only read.
        momentum_buffers: as many, of that shape, contiguous float32, updated.
        momentum: in [0, 1); a number, or a 0-d float64 tensor on the grads' device, as adamw_'s lr.
        return_norm: also return the norms, computed in the same pass over memory.

    Returns:
        update: (len(grads), *shape) float32, contiguous: ready for one batched newton_schulz.
        norms: (len(grads),) float64, the Frobenius norm of each update, summed in float64 in a fixed order: the same
            bits for every number of threads. Of matrices, they are newton_schulz's norms.
    """
    modes.refuse("muon_momentum_", grads, momentum_buffers, momentum)
    _check_lists("muon_momentum_", grads=grads, momentum_buffers=momentum_buffers)
    if not grads:
        raise ValueError("muon_momentum_: grads is empty; takes at least one tensor")
    _check_one_shape("muon_momentum_", "grads", grads)
    _check_number("muon_momentum_", "momentum", momentum, grads[0].device, below=1)
    _check_dtype("muon_momentum_", "grads[0]", grads[0], _PARAM_DTYPES)
    _check_list_dtypes("muon_momentum_", grads[0].dtype, grads=grads)
    _check_list_dtypes("muon_momentum_", torch.float32, momentum_buffers=momentum_buffers)
    function = native.muon_momentum_ if _runs_native("muon_momentum_", grads[0]) else reference.muon_momentum_
    return function(grads, momentum_buffers, momentum=momentum, nesterov=nesterov, return_norm=return_norm)


def muon_update_(
    params: Sequence[Tensor],
    update: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    scale: float = 1.0,
    cautious: bool = False,
) -> None:
    """The half of Muon after newton_schulz, in one pass: p = (1 - lr weight_decay) p - lr scale update[i].

    Args:
        params: at least one; one shape, contiguous, all float32 or all bfloat16, updated.
        update: (len(params), *shape) float32, contiguous.
        lr, weight_decay: numbers, or 0-d float64 tensors on the params' device, as adamw_'s.
        scale: of the update, e.g. sqrt(max(1, rows / columns)).
        cautious: decay, as adamw_'s, only where update[i] p >= 0.
    """
    _check_muon_update("muon_update_", params, update, lr, weight_decay)
    function = native.muon_update_ if _runs_native("muon_update_", update) else reference.muon_update_
    function(params, update, lr=lr, weight_decay=weight_decay, scale=scale, cautious=cautious)


def _check_muon_update(
    op: str, params: Sequence[Tensor], update: Tensor, lr: float | Tensor, weight_decay: float | Tensor
) -> None:
    modes.refuse(op, params, update, lr, weight_decay)
    _check_lists(op, params=params)
    if not params:
        raise ValueError(f"{op}: params is empty; takes at least one tensor")
    _check_one_shape(op, "params", params)
    if update.shape != (len(params), *params[0].shape) or not update.is_contiguous():
        raise ValueError(
            f"{op}: update has shape {tuple(update.shape)}, strides {update.stride()}; "
            f"takes a contiguous {(len(params), *params[0].shape)}"
        )
    _check_number(op, "lr", lr, params[0].device)
    _check_number(op, "weight_decay", weight_decay, params[0].device)
    _check_dtype(op, "params[0]", params[0], _PARAM_DTYPES)
    _check_list_dtypes(op, params[0].dtype, params=params)
    _check_dtype(op, "update", update, (torch.float32,))
    if update.device != params[0].device:
        raise ValueError(f"{op}: update is on {update.device}, params on {params[0].device}; takes one device")


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
) -> None:
    """newton_schulz and muon_update_ in one: p = (1 - lr weight_decay) p - lr scale newton_schulz(update[i]).

    Args:
        params: at least one; one shape (..., M, K), contiguous, all float32 or all bfloat16, updated.
        update: (len(params), ..., M, K) float32, contiguous, as muon_momentum_ returns it; only read.
        lr, weight_decay, scale, cautious: as muon_update_'s.
        steps, coefficients, norms: as newton_schulz's; norms (len(params), ...).

    On CUDA the parameters are updated where the last product is written out: what newton_schulz would return takes no
    memory, nor the time to write and read it.
    """
    op = "newton_schulz_update_"
    modes.refuse(op, norms)
    _check_muon_update(op, params, update, lr, weight_decay)
    if params[0].dim() < 2:
        raise ValueError(f"{op}: params has shape {tuple(params[0].shape)}; takes (..., M, K)")
    triples, norm_factor = _check_newton_schulz(op, "update", update, steps, coefficients, norms)
    rates: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "scale": scale, "cautious": cautious}
    if _runs_native(op, update):
        native.newton_schulz_update_(params, update, triples, norm_factor, norms, **rates)
    else:
        iteration: dict[str, Any] = {"steps": steps, "coefficients": coefficients, "norms": norms}
        reference.newton_schulz_update_(params, update, **rates, **iteration)


def _linear_runs_native(x: Tensor, weight: Tensor) -> bool:
    if backend() == "torch":
        return False
    native.require()
    return native.serves_linear(x, weight) and not beyond_backward(x, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, as torch.nn.functional.linear without a bias. Differentiable.

    Args:
        x: (..., I).
        weight: (O, I).

    Returns:
        (..., O).

    The product is the library's (torch's own) except in one case: float32 of at least 64 rows on a CPU that is not
    Intel's and has AVX2, where torch's MKL takes a slower path and the register tile of the other operators serves.
    NANOCHAT_LINEAR=native takes that tile for such products on every CPU, NANOCHAT_LINEAR=torch on none.
    Second derivatives, forward-mode AD and torch.func transforms are always torch's own.
    """
    if x.dim() < 1 or weight.dim() != 2 or x.size(-1) != weight.size(1):
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; takes (..., I), (O, I)")
    if _linear_runs_native(x, weight):
        return native.linear(x, weight)
    return torch.nn.functional.linear(x, weight)


def linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of linear, for those who write a backward pass by hand: dx = dy weight, dweight = dy^T x.

    Args:
        dy: (..., O), the gradient of x weight^T.
        x: (..., I).
        weight: (O, I).

    Returns:
        dx of x's shape and dweight of weight's, by the same products as linear. Differentiable, by torch's own.
    """
    if dy.shape[:-1] != x.shape[:-1] or (dy.size(-1), x.size(-1)) != tuple(weight.shape):
        raise ValueError(
            f"linear_backward: dy has shape {tuple(dy.shape)}, x {tuple(x.shape)}, weight {tuple(weight.shape)}; "
            "takes (..., O), (..., I), (O, I)"
        )
    dy_rows, rows = dy.reshape(-1, dy.size(-1)), x.reshape(-1, x.size(-1))
    if _linear_runs_native(x, weight) and not modes.derivative(dy, x, weight):
        dx, dweight = torch.ops.nanochat_native.linear_backward(dy_rows, rows, weight, True, True)
    else:
        dx, dweight = dy_rows @ weight, dy_rows.mT @ rows
    return dx.view(x.shape), dweight


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 15.0,
    ignore_index: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of z = softcap tanh(x weight^T / softcap), with the logits of one chunk of rows at a time.

    The gradients are computed in the forward pass, so that no logits are kept; the backward pass scales them.

    Args:
        x: (..., C) float32, float64 or bfloat16.
        weight: (V, C) of x's dtype and device.
        targets: the shape of x without C, int64, in [0, V) or ignore_index.
        softcap: bound of |z|; None or 0 for none.
        reduction: "mean" over the targets that are not ignored, "sum", or "none".

    Returns:
        Nats, float32 (float64 for float64), 0 for an ignored target: a scalar, differentiable once, for "mean" and
        "sum"; the shape of targets, without gradient, for "none". The mean of no target is NaN, its gradients zero.

    Forward-mode AD and torch.func transforms, second derivatives among them, are the twin's, with a warning: it keeps
    the logits. A backward pass with create_graph=True is a RuntimeError, except on the torch backend.

    Native on the CPU, and on CUDA for float32 and bfloat16, with the products by torch's library. On CUDA the targets'
    range is not checked, which would wait for the stream: one that is out of range makes its own loss and gradient NaN.
    """
    if x.dim() < 1 or weight.dim() != 2 or x.size(-1) != weight.size(1) or weight.size(0) == 0 or weight.size(1) == 0:
        raise ValueError(
            f"linear_cross_entropy: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; takes (..., C), (V, C)"
        )
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: targets has shape {tuple(targets.shape)}; "
            f"takes {tuple(x.shape[:-1])}, as x without C"
        )
    _check_dtype("linear_cross_entropy", "x", x, _CPU_DTYPES)
    _check_dtype("linear_cross_entropy", "targets", targets, (torch.int64,))
    _check_same("linear_cross_entropy", x, weight=weight)
    if targets.device != x.device:
        raise ValueError(f"linear_cross_entropy: targets is on {targets.device}, x on {x.device}; takes one device")
    softcap = 0.0 if softcap is None else softcap
    if not softcap >= 0:
        raise ValueError(f"linear_cross_entropy: softcap is {softcap}; takes at least 0")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}; takes 'mean', 'sum' or 'none'")
    if reduction == "none" and modes.derivative(x, weight) == modes.GRADIENT:
        raise ValueError("linear_cross_entropy: reduction 'none' gives no gradient; call it under torch.no_grad()")
    if _runs_native("linear_cross_entropy", x, _no_rule(x, weight)):
        return native.linear_cross_entropy(x, weight, targets, softcap, ignore_index, reduction)
    return reference.linear_cross_entropy(
        x, weight, targets, softcap=softcap, ignore_index=ignore_index, reduction=reduction
    )


def cached_forward_(
    tokens: Tensor,
    slots: Sequence[int],
    starts: Sequence[int],
    *,
    wte: Tensor,
    blocks: Sequence[Tensor],
    lm_head: Tensor,
    windows: Sequence[int | None],
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    softcap: float,
    with_logits: bool = True,
) -> Tensor:
    """The transformer of nanochat_native.model on a KV cache, for generation: T tokens of each of B sequences, which go
    on where the sequences stand. Without derivatives and torch.func transforms: a RuntimeError, as adamw_'s.

    Args:
        tokens: (B, T) int64, T from 1. Token (b, t) stands at position starts[b] + t of slot slots[b], where its key
            and value are put, and sees the slot's positions up to its own.
        slots, starts: B numbers; the slots are distinct, and filled before starts[b].
        wte, lm_head: (V, C).
        blocks: six matrices a layer, as linear layers have them: of q (C, C), k and v (Hkv D, C), attention's output
            (C, C), the MLP's (F, C) and (C, F).
        windows: of each layer, as attention's.
        cos, sin: (positions, D) and (positions, D / 2), of the rotary angles.
        cache: (layers, slots, capacity, 2 Hkv, D), keys and then values; updated.
        softcap: logits are softcap * tanh(x / softcap); 0 for none.
        with_logits: False where only the cache is wanted.

    Returns:
        Logits of each sequence's last token: (B, V), float32, or float64 for float64; (0, V) without.

    All of wte's type and device, contiguous; cos and sin may be wider. Raises ValueError or TypeError for what does not
    fit together.

    Native for float32 on the CPU, one call of one kernel: a token's logits have the same bits whatever it is batched
    with, however its prompt was cut, and for every number of threads. Elsewhere it is composed of torch's products and
    of `attention`.
    """
    modes.refuse("cached_forward_", tokens, wte, blocks, lm_head, cos, sin, cache)
    if tokens.device.type == "cpu" and wte.dtype == torch.float32 and backend() == "native":
        native.require()
        run = native.cached_forward_
    else:
        run = functools.partial(reference.cached_forward_, attention=attention)
        _check_cached_forward(tokens, slots, starts, wte, cache)
    return run(
        tokens,
        slots,
        starts,
        wte=wte,
        blocks=blocks,
        lm_head=lm_head,
        windows=windows,
        cos=cos,
        sin=sin,
        cache=cache,
        softcap=softcap,
        with_logits=with_logits,
    )


def _check_cached_forward(
    tokens: Tensor, slots: Sequence[int], starts: Sequence[int], wte: Tensor, cache: Tensor
) -> None:
    """What the native operator checks itself, and what torch would not find."""
    op = "cached_forward_"
    if tokens.dim() != 2 or tokens.size(1) == 0 or cache.dim() != 5:
        given = f"tokens has shape {tuple(tokens.shape)}, cache {tuple(cache.shape)}"
        raise ValueError(f"{op}: {given}; takes (B, T), T from 1, and (layers, slots, capacity, 2 Hkv, D)")
    _check_dtype(op, "tokens", tokens, (torch.int64,))
    _check_same(op, wte, cache=cache)
    count, capacity, T = cache.size(1), cache.size(2), tokens.size(1)
    if len(slots) != tokens.size(0) or len(starts) != tokens.size(0) or len(set(slots)) != len(slots):
        given = f"slots is {list(slots)}, starts {list(starts)}"
        raise ValueError(f"{op}: {given}; takes {tokens.size(0)} each, the slots distinct")
    for slot, start in zip(slots, starts, strict=True):
        if not (0 <= slot < count and 0 <= start <= capacity - T):
            there = f"there are {count} slots of {capacity} positions"
            raise ValueError(f"{op}: {T} tokens from position {start} of slot {slot}; {there}")


_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_ATTENTION_DTYPES = (*_CPU_DTYPES, torch.float16)
_PARAM_DTYPES = (torch.float32, torch.bfloat16)


def _check_dtype(op: str, name: str, tensor: Tensor, taken: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in taken:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; takes {', '.join(map(str, taken))}")


def _check_number(
    op: str,
    name: str,
    value: float | Tensor,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    *,
    low: int = 0,
    below: int | None = None,
) -> None:
    """A number, or a 0-d tensor that stands for one, of `dtype` on `device`."""
    if isinstance(value, Tensor):
        if value.dtype != dtype:
            raise TypeError(f"{op}: {name} is {value.dtype}; takes a number, or a 0-d tensor of {dtype}")
        if value.dim() != 0:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; takes a number, or a 0-d tensor")
        if value.device != device:
            raise ValueError(f"{op}: {name} is on {value.device}; takes a number, or a tensor on {device}")
        # A subclass (a fake tensor, while something traces) need not have a value.
        if device.type != "cpu" or torch.compiler.is_compiling() or type(value) is not Tensor:
            return
        value = value.item()
    if not value >= low or (below is not None and not value < below):
        taken = f"at least {low}" if below is None else f"{low} <= {name} < {below}"
        raise ValueError(f"{op}: {name} is {value}; takes {taken}")


def _check_same(op: str, first: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; takes {first.dtype}, as its other arguments")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; takes {first.device}, as its other arguments")


def _check_lists(op: str, **lists: Sequence[Tensor]) -> None:
    """Same lengths, shapes and device throughout, everything contiguous."""
    (first_name, first), *others = lists.items()
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors; takes {len(first)}, as {first_name}")
    for name, tensors in lists.items():
        for i, (tensor, model) in enumerate(zip(tensors, first, strict=True)):
            if tensor.shape != model.shape:
                raise ValueError(
                    f"{op}: {name}[{i}] has shape {tuple(tensor.shape)}; "
                    f"takes {tuple(model.shape)}, as {first_name}[{i}]"
                )
            if tensor.device != first[0].device:
                raise ValueError(
                    f"{op}: {name}[{i}] is on {tensor.device}; takes {first[0].device}, as {first_name}[0]"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{op}: {name}[{i}] has strides {tensor.stride()}; takes a contiguous tensor")


def _check_list_dtypes(op: str, taken: torch.dtype, **lists: Sequence[Tensor]) -> None:
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if tensor.dtype != taken:
                raise TypeError(f"{op}: {name}[{i}] is {tensor.dtype}; takes {taken}")


def _check_one_shape(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"{op}: {name}[{i}] has shape {tuple(tensor.shape)}; takes {tuple(tensors[0].shape)}, as {name}[0]"
            )
