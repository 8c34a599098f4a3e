"""Every operator in plain torch: the `torch` backend, and the oracle that the native kernels are tested against.

Same signatures and semantics as `nanochat_native.ops`, without its argument checks. attention, linear_cross_entropy and
newton_schulz are differentiable by autograd in all of its modes. bfloat16 and float16 are computed in float32 and
rounded once at the end; within torch.autocast products have its type.

Shape letters: B batch, Tq queries, Tk keys, H query heads, Hkv key/value heads, D head size,
               N rows (tokens), C channels, V vocabulary, (M, K) one matrix.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.ops import modes

Triple = tuple[float, float, float]

# Keller Jordan's quintic (https://kellerjordan.github.io/posts/muon/); the Polar Express, arXiv:2505.16932, five steps;
# the textbook cubic. The Polar Express needs its input strictly inside the unit ball: it divides by a little more.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    "cubic": ((1.5, -0.5, 0.0),),
}
NORM_FACTOR = {"polar_express": 1.01}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that inputs of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_mask(Tq: int, Tk: int, causal: bool, window: int | None, device: torch.device | None = None) -> Tensor:
    """(Tq, Tk) bool: True where query i sees key j. Causal is aligned bottom-right: the last query sees every key."""
    newest = torch.arange(Tq, device=device)[:, None] + (Tk - Tq)
    keys = torch.arange(Tk, device=device)
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    if causal or window is not None:
        mask = mask & (keys <= newest)
    if window is not None:
        mask = mask & (keys >= newest - window)
    return mask


def logsumexp(x: Tensor) -> Tensor:
    """Over the last dimension, of rows with a finite number."""
    if modes.beyond_backward(x) != modes.FORWARD:
        return x.logsumexp(-1)
    # torch's own rule for forward-mode AD writes over what a backward pass through it needs (pytorch's issue 162350).
    near = x.detach().logsumexp(-1, keepdim=True)
    return (x - near).exp().sum(-1).log() + near[..., 0]


def softmax(x: Tensor) -> Tensor:
    """As logsumexp."""
    return x.softmax(-1) if modes.beyond_backward(x) != modes.FORWARD else (x - logsumexp(x)[..., None]).exp()


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """As attention, and the log-sum-exp of the scaled scores: (B, H, Tq), -inf for a fully masked row."""
    B, Tq, H, D = q.shape
    Tk, Hkv = k.shape[1:3]
    dtype = compute_dtype(q.dtype)
    scale = D**-0.5 if scale is None else scale
    grouped = q.to(dtype).reshape(B, Tq, Hkv, H // Hkv, D)
    scores = torch.einsum("bihgd,bjhd->bhgij", grouped, k.to(dtype)) * scale
    hidden = ~attention_mask(Tq, Tk, causal, window, q.device)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores.detach(), dim=-1).reshape(B, H, Tq)
    # softmax of a row of -inf is NaN, and so is its gradient: give such a row any finite scores, then no weight at all.
    weights = softmax(scores.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)).masked_fill(hidden, 0.0)
    out = torch.einsum("bhgij,bjhd->bihgd", weights, v.to(dtype)).reshape(B, Tq, H, D)
    return out.to(q.dtype), lse


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
    if lengths is None:
        return attention_forward(q, k, v, causal=causal, window=window, scale=scale)[0]
    return attention_by_length(q, k, v, lengths, causal=causal, window=window, scale=scale)


@torch.compiler.disable(reason="attention: lengths makes no whole graph on the torch backend; takes fullgraph=False")
def attention_by_length(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= k.size(1):
            raise ValueError(f"attention: lengths holds {length}; takes 0 to {k.size(1)}")
        out[b] = attention(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], **options)[0]
    return out


EPS = torch.finfo(torch.float32).eps  # of every RMSNorm


@torch.no_grad()
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
    attention: Callable[..., Tensor] = attention,
) -> Tensor:
    T, device, (Hkv2, D) = tokens.size(1), tokens.device, cache.shape[3:]
    slot, first = torch.tensor([list(slots), list(starts)], device=device)
    at = first[:, None] + torch.arange(T, device=device)
    cos, sin, half = cos[at][:, :, None], sin[at][:, :, None], D // 2

    def norm(x: Tensor) -> Tensor:
        wide = x.to(compute_dtype(x.dtype))
        return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(wte.dtype)

    def place(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, D))
        swapped = torch.cat((x[..., half:] * sin, x[..., :half] * -sin), dim=-1)
        return norm(x * cos + swapped)

    x = norm(F.embedding(tokens, wte))
    for layer, window in enumerate(windows):
        q, k, v, out, fc, proj = blocks[6 * layer : 6 * layer + 6]
        h = norm(x)
        cache[layer, slot[:, None], at] = torch.cat((place(h @ k.T), (h @ v.T).unflatten(-1, (-1, D))), dim=2)
        keys, values = cache[layer].index_select(0, slot).split(Hkv2 // 2, dim=2)
        attended = attention(place(h @ q.T), keys, values, window=window, lengths=first + T)
        x = x + attended.flatten(-2) @ out.T
        x = x + (norm(x) @ fc.T).relu().square() @ proj.T
    if not with_logits:
        return wte.new_empty((0, wte.size(0)))
    logits = norm(x[:, -1]) @ lm_head.T
    logits = logits.to(compute_dtype(logits.dtype))
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def newton_schulz_schedule(steps: int, coefficients: str | Sequence[Sequence[float]]) -> tuple[list[Triple], float]:
    """The triple (a, b, c) of each step, and the factor on the Frobenius norm that the input is divided by.

    The first `steps` triples; where there are fewer, the last one is repeated.
    """
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"newton_schulz: coefficients is {coefficients!r}; takes {', '.join(map(repr, COEFFICIENTS))}, "
                "or a list of triples"
            )
        triples, norm_factor = list(COEFFICIENTS[coefficients]), NORM_FACTOR.get(coefficients, 1.0)
    else:
        if not coefficients or any(len(triple) != 3 for triple in coefficients):
            raise ValueError(
                f"newton_schulz: coefficients is {coefficients!r}; takes a name or a list of triples (a, b, c)"
            )
        triples, norm_factor = [(float(a), float(b), float(c)) for a, b, c in coefficients], 1.0
    return triples[:steps] + [triples[-1]] * (steps - len(triples)), norm_factor


def newton_schulz(
    g: Tensor,
    *,
    steps: int = 5,
    coefficients: str | Sequence[Sequence[float]] = "quintic",
    norms: Tensor | None = None,
) -> Tensor:
    triples, norm_factor = newton_schulz_schedule(steps, coefficients)
    in_bfloat16 = g.device.type == "cuda" and not modes.derivative(g)
    dtype = torch.bfloat16 if in_bfloat16 else compute_dtype(g.dtype)
    if norms is None:
        norms = torch.linalg.vector_norm(g, dim=(-2, -1), dtype=torch.float64)
    norm = norms[..., None, None]
    x = (g / torch.where(norm == 0, 1.0, norm_factor * norm)).to(dtype)
    tall = g.size(-2) > g.size(-1)
    if tall:
        x = x.mT
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    if tall:
        x = x.mT
    return x.to(g.dtype).contiguous()


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea & Flood, 2014) of each int64, modulo 2^64."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ (x >> 31 & (1 << 33) - 1)


def stochastic_round(x: Tensor, key: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the probabilities that make the expectation x. NaN and infinity are kept.

    A pure function of x and key, a 0-d int64 tensor: a generator's seed would have to be read from the device.
    """
    element = torch.arange(x.numel(), device=x.device).view(x.shape)
    noise = (mix(key + element) >> 48 & 0xFFFF).to(torch.int32)
    # Truncation of the magnitude after adding noise below the last kept bit; both signs, since float is sign-magnitude.
    rounded = ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)


def decayed(param: Tensor, decay: float | Tensor, update: Tensor, cautious: bool) -> Tensor:
    """param decay in float32; if cautious, only where update param >= 0."""
    p = param.float()
    return torch.where(update * p >= 0, p * decay, p) if cautious else p * decay


@torch.no_grad()
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
    t = step.double() if isinstance(step, Tensor) else step
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
            key = mix(torch.full((), seed, dtype=torch.int64, device=param.device))
            p = stochastic_round(p, mix(mix(key + step) + index))
        param.copy_(p)


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
    return_norm: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
@torch.no_grad()
def muon_momentum_(
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    momentum: float | Tensor,
    nesterov: bool = True,
    return_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    g = torch.stack([grad.float() for grad in grads])
    buffers = momentum * torch.stack(list(momentum_buffers)) + (1 - momentum) * g
    for old, new in zip(momentum_buffers, buffers, strict=True):
        old.copy_(new)
    update = momentum * buffers + (1 - momentum) * g if nesterov else buffers
    if not return_norm:
        return update
    return update, torch.linalg.vector_norm(update.view(len(grads), grads[0].numel()), dim=1, dtype=torch.float64)


@torch.no_grad()
def muon_update_(
    params: Sequence[Tensor],
    update: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    scale: float = 1.0,
    cautious: bool = False,
) -> None:
    decay = 1 - lr * weight_decay
    for param, change in zip(params, update, strict=True):
        param.copy_(decayed(param, decay, change, cautious) - lr * scale * change)


@torch.no_grad()
def newton_schulz_update_(
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
) -> None:
    orthogonal = newton_schulz(update, steps=steps, coefficients=coefficients, norms=norms)
    muon_update_(params, orthogonal, lr=lr, weight_decay=weight_decay, scale=scale, cautious=cautious)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float = 15.0,
    ignore_index: int = -1,
    reduction: str = "mean",
) -> Tensor:
    dtype = compute_dtype(x.dtype)
    logits = x.reshape(-1, x.size(-1)).to(dtype) @ weight.to(dtype).T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    flat = targets.reshape(-1)
    ignored = flat == ignore_index
    # gather checks the range itself on every device, but as an IndexError or a device-side assert.
    if flat.device.type == "cpu" and not torch.compiler.is_compiling():
        every = torch.func.debug_unwrap(targets)  # those of all mapped calls within vmap, where `if` takes none of one
        outside = every[(every != ignore_index) & ((every < 0) | (every >= weight.size(0)))]
        if outside.numel():
            raise ValueError(
                f"linear_cross_entropy: targets holds {int(outside[0])}; "
                f"takes 0 to {weight.size(0) - 1}, or ignore_index {ignore_index}"
            )
    chosen = logits.gather(1, flat.masked_fill(ignored, 0)[:, None])[:, 0]
    losses = (logsumexp(logits) - chosen).masked_fill(ignored, 0.0)
    if reduction == "none":
        return losses.reshape(targets.shape)
    total = losses.sum(dtype=torch.float64)
    return (total / (~ignored).sum() if reduction == "mean" else total).to(dtype)
