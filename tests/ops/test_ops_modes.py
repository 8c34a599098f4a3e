"""Every public operator, and the model, in every autograd mode of torch on both backends: the right result, or an error
that says what to do instead.

A cell of the table is an operator's case, a mode and a backend. The mode runs the operator and, in the same way, its
formula in plain torch and float64. The results must agree.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
import torch_reference
from backends import BACKENDS, operators, use
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from nanochat_native import ops
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.ops import backends as ops_backends
from nanochat_native.ops import reference

# --- cases ---

RIGHT = "right"
VALUES, GRADIENT, SECOND, TRANSFORM, FORWARD = "values", "gradient", "second derivative", "transform", "forward-mode AD"
ALWAYS_RIGHT = dict.fromkeys((VALUES, GRADIENT, SECOND, TRANSFORM, FORWARD), RIGHT)


def beside(op, name):
    """Return the cells of an operator whose argument `name` excludes derivatives."""
    gradient = f"{op}: {name} must be None when a tensor requires a gradient, got a tensor"
    return {
        VALUES: RIGHT,
        GRADIENT: gradient,
        SECOND: gradient,
        TRANSFORM: f"{op}: {name} must be None under torch.func transforms, got a tensor",
        FORWARD: f"{op}: {name} must be None under forward-mode AD, got a tensor",
    }


def without(op):
    """Return the cells of an operator without a derivative."""
    gradient = f"{op}: has no derivative, but a tensor requires a gradient; call it under torch.no_grad()"
    return {
        VALUES: RIGHT,
        GRADIENT: gradient,
        SECOND: gradient,
        TRANSFORM: f"{op}: does not support torch.func transforms; call it outside grad, vmap, jvp and the other",
        FORWARD: f"{op}: has no derivative, but a tensor has a forward-mode tangent; pass the primal",
    }


@dataclass
class Case:
    """A call of an operator and its formula: both take float64 tensors of `shapes` and return a tensor or a tuple.

    cells: The expected outcome by kind of mode, by the name of one mode, or by a pair of either and a backend.
    """

    op: str
    shapes: list[tuple[int, ...]]
    call: Callable[..., Any]
    formula: Callable[..., Any]
    cells: dict[Any, str]
    tolerance: float = 1e-9
    in_autocast: dict[str, float] = field(default_factory=lambda: {"native": 1e-4, "torch": 0.1})


def attention_formula(q, k, v, window=None, causal=True):
    Tq, Tk = q.size(1), k.size(1)
    group = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.size(3) ** 0.5
    i, j = torch.arange(Tq)[:, None] + Tk - Tq, torch.arange(Tk)
    hidden = torch.zeros(Tq, Tk, dtype=torch.bool) if not causal else j > i
    if window is not None:
        hidden = hidden | (j < i - window)
    return torch.einsum("bhij,bjhd->bihd", (scores - logsumexp(scores, ~hidden)[..., None]).exp() * ~hidden, v)


def logsumexp(x, seen):
    """Return it over the last dimension where `seen`; torch's own has no backward pass through its tangents."""
    top = x.detach().amax(-1, keepdim=True)
    return ((x - top).exp() * seen).sum(-1).log() + top[..., 0]


LENGTHS = torch.tensor([6, 7])


def lengths_formula(q, k, v):
    rows = [attention_formula(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]) for b, n in enumerate(LENGTHS.tolist())]
    return torch.cat(rows)


def norm_formula(x):
    return x / (x.square().mean(-1, keepdim=True) + 2**-23) ** 0.5


MIX = [*[(2, 3, 5)] * 3, (1,), (1,)]


def mix_formula(x, residual, x0, x_scale, x0_scale):
    mixed = x_scale * (x + residual) + x0_scale * x0
    return x + residual, mixed, norm_formula(mixed), 1 * x0


TOKENS = torch.tensor([[1, 5, 1], [0, 6, 6]])


def value_embedding_formula(v, h, gate, table):
    sigmoids = 1 / (1 + (-(h @ gate.mT)).exp())
    return v + 3 * sigmoids[..., None] * table[TOKENS].unflatten(-1, (2, 3))


def value_embedding_backward_formula(dout, h, gate, table):
    sigmoids = 1 / (1 + (-(h @ gate.mT)).exp())
    dz = 3 * sigmoids * (1 - sigmoids) * (dout * table[TOKENS].unflatten(-1, (2, 3))).sum(-1)
    places = F.one_hot(TOKENS.flatten(), 7).to(dout.dtype)
    drows = (3 * sigmoids[..., None] * dout).flatten(-2).reshape(6, 6)
    return dz @ gate, dz.reshape(6, 2).mT @ h.reshape(6, 4), places.mT @ drows


def smear_formula(x, gate, smear_lambda):
    sigmoids = 1 / (1 + (-(x[:, 1:, :2] @ gate.mT)).exp())
    return torch.cat((x[:, :1], x[:, 1:] + smear_lambda * sigmoids * x[:, :-1]), 1)


TARGETS = torch.tensor([0, 6, -1, 3, 3])


def loss_formula(x, weight, reduction="mean"):
    logits = 15 * torch.tanh(x @ weight.mT / 15)
    taken = TARGETS != -1
    losses = (logsumexp(logits, torch.tensor(True)) - logits[..., torch.arange(5), TARGETS]) * taken
    return losses if reduction == "none" else losses.sum(-1) / taken.sum()


def in_float32(op):
    """Return the operator in float32 on float64 tensors: the kernel of linear takes float32 alone."""

    def call(*tensors):
        out = op(*(x.float() for x in tensors))
        return tuple(x.double() for x in out) if isinstance(out, tuple) else out.double()

    return call


def adamw(p, g, m, v):
    p, g, m, v = (x.float() for x in (p, g, m, v.square()))
    ops.adamw_([p], [g], [m], [v], step=3, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3, weight_decay=0.2)
    return p.double(), m.double(), v.double()


def adamw_formula(p, g, m, v):
    m, v = 0.9 * m + 0.1 * g, 0.99 * v.square() + 0.01 * g * g
    p = p * (1 - 0.1 * 0.2) - 0.1 * m / (1 - 0.9**3) / ((v / (1 - 0.99**3)).sqrt() + 1e-3)
    return p, m, v


def muon_momentum(g, buffer):
    buffer = buffer.float()
    update, norms = ops.muon_momentum_([g.float()], [buffer], momentum=0.8, return_norm=True)
    return update.double(), norms, buffer.double()


def muon_momentum_formula(g, buffer):
    buffer = 0.8 * buffer + 0.2 * g
    update = 0.8 * buffer + 0.2 * g
    return update[None], update.norm()[None], buffer


def muon_update(p, update):
    p = p.float()
    ops.muon_update_([p], update.float()[None], lr=0.1, weight_decay=0.5, scale=3.0)
    return p.double()


def normuon_update(p, second, update):
    p, second = p.float(), second.float()
    ops.normuon_update_([p], update.float()[None], [second], lr=0.1, weight_decay=0.5, scale=3.0, beta2=0.75, eps=9.0)
    return p.double(), second.double()


def newton_schulz_update(p, update):
    p = p.float()
    ops.newton_schulz_update_([p], update.float()[None], lr=0.1, weight_decay=0.5, scale=3.0)
    return p.double()


def cached_forward(run):
    """Return a model of one block as a function of its weights. Its tokens start at position 2 of slot 1."""

    def call(*tensors):
        dtype = torch.float32 if run is ops.cached_forward_ else torch.float64
        wte, q, k, v, out, fc, proj, lm_head, angles, cache = (x.to(dtype, copy=True) for x in tensors)
        logits = run(
            torch.tensor([[1, 4, 2]]),
            [1],
            [2],
            wte=wte,
            blocks=[q, k, v, out, fc, proj],
            lm_head=lm_head,
            windows=[None],
            cos=torch.cat((angles, angles), -1).cos(),
            sin=angles.sin(),
            cache=cache,
            softcap=15.0,
        )
        return logits.double(), cache.double()

    return call


ANGLES = torch.linspace(-3, 3, 10, dtype=torch.float64).view(5, 2)


def rotary_norm_formula(q, k):
    def of_one(x):
        (x1, x2), cos, sin = x.chunk(2, -1), ANGLES.cos()[:, None], ANGLES.sin()[:, None]
        z = torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1)
        return 1.2 * z / ((z * z).sum(-1, keepdim=True) / 4 + 2.0**-23).sqrt()

    return of_one(q), of_one(k)


def updated(op):
    """Return the operator, which updates its first tensor, as a function of its tensors that returns the result."""

    def call(*tensors):
        first, *others = (x.clone() for x in tensors)
        op(first, *others)
        return first

    return call


CACHED = [(9, 8), (8, 8), (4, 8), (4, 8), (8, 8), (16, 8), (8, 16), (9, 8), (6, 2), (1, 2, 6, 2, 4)]

NO_WHOLE_GRAPH = "attention: lengths needs fullgraph=False on the torch backend"
ON_TORCH = {("compiled", "torch"): NO_WHOLE_GRAPH, ("compiled_tangents", "torch"): NO_WHOLE_GRAPH}

QKV = [(2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 3)]
LOSS = [(5, 4), (7, 4)]
NO_SECOND = "linear_cross_entropy: the native kernel has no second derivative; use create_graph=False, or ops.use"
NO_GRADIENT = "linear_cross_entropy: reduction must be 'mean' or 'sum' when a tensor requires a gradient, got 'none'"

TINY = GPTConfig(sequence_len=8, vocab_size=5, n_layer=1, n_head=2, n_kv_head=1, n_embd=4)
IDX, NEXT = torch.tensor([[1, 0, 4, 3, 3, 2]]), torch.tensor([[0, 4, -1, 3, 2, 1]])
with torch.device("meta"):
    WEIGHTS = {name: tuple(weight.shape) for name, weight in GPT(TINY).named_parameters()}


def model(*targets, **settings):
    """Return the model as a function from its weights to the loss, or to the logits if no targets are given."""
    module = GPT(TINY, **settings).double()
    return lambda *weights: functional_call(module, dict(zip(WEIGHTS, weights, strict=True)), (IDX, *targets))


def logits_formula(*weights):
    with patch.object(torch_reference, "attention", attention_formula):
        return torch_reference.logits(dict(zip(WEIGHTS, weights, strict=True)), TINY, [None], IDX)


def model_formula(*weights):
    logits, taken = logits_formula(*weights), NEXT != -1
    losses = logsumexp(logits, torch.tensor(True)) - logits.gather(-1, NEXT.clamp(min=0)[..., None])[..., 0]
    return (losses * taken).sum() / taken.sum()


RECOMPUTED_OTHERWISE = "torch.utils.checkpoint: "
NOT_IN_AUTOCAST = dict.fromkeys(("autocast", "autocast_gradient"), "skipped: float64 is no type of autocast")

CASES = {
    "attention": Case("attention", QKV, ops.attention, attention_formula, ALWAYS_RIGHT),
    "attention with a window": Case(
        "attention",
        QKV,
        lambda q, k, v: ops.attention(q, k, v, window=2),
        lambda q, k, v: attention_formula(q, k, v, window=2),
        ALWAYS_RIGHT,
    ),
    "attention, not causal": Case(
        "attention",
        QKV,
        lambda q, k, v: ops.attention(q, k, v, causal=False),
        lambda q, k, v: attention_formula(q, k, v, causal=False),
        ALWAYS_RIGHT,
    ),
    "attention with rows that see nothing": Case(
        "attention",
        [(2, 5, 4, 3), (2, 3, 2, 3), (2, 3, 2, 3)],
        ops.attention,
        lambda q, k, v: torch.cat((torch.zeros_like(q[:, :2]), attention_formula(q[:, 2:], k, v)), 1),
        ALWAYS_RIGHT,
    ),
    "attention of x, x, x": Case(
        "attention",
        [(2, 5, 2, 3)],
        lambda x: ops.attention(x, 2 * x, x),
        lambda x: attention_formula(x, 2 * x, x),
        ALWAYS_RIGHT,
    ),
    "attention with lengths": Case(
        "attention",
        QKV,
        lambda q, k, v: ops.attention(q, k, v, lengths=LENGTHS),
        lengths_formula,
        beside("attention", "lengths") | ON_TORCH,
    ),
    "rms_norm": Case("rms_norm", [(2, 3, 5)], ops.rms_norm, norm_formula, ALWAYS_RIGHT),
    "add_rms_norm": Case(
        "add_rms_norm",
        [(2, 3, 5)] * 2,
        ops.add_rms_norm,
        lambda x, residual: (x + residual, norm_formula(x + residual)),
        ALWAYS_RIGHT,
    ),
    "add_rms_norm, the sum unused": Case(
        "add_rms_norm",
        [(2, 3, 5)] * 2,
        lambda x, residual: ops.add_rms_norm(x, residual)[1],
        lambda x, residual: norm_formula(x + residual),
        ALWAYS_RIGHT,
    ),
    "embedding_rms_norm": Case(
        "embedding_rms_norm",
        [(7, 5)],
        lambda table: ops.embedding_rms_norm(TOKENS, table, torch.float64),
        lambda table: norm_formula(table[TOKENS]),
        ALWAYS_RIGHT,
    ),
    "mix_rms_norm": Case("mix_rms_norm", MIX, ops.mix_rms_norm, mix_formula, ALWAYS_RIGHT),
    "mix_rms_norm without a residual": Case(
        "mix_rms_norm",
        MIX[1:],
        lambda x, *others: ops.mix_rms_norm(x, None, *others),
        lambda x, *others: mix_formula(x, 0, *others),
        ALWAYS_RIGHT,
    ),
    "mix_rms_norm, the norm alone": Case(
        "mix_rms_norm",
        MIX,
        lambda *inputs: ops.mix_rms_norm(*inputs)[2],
        lambda *inputs: mix_formula(*inputs)[2],
        ALWAYS_RIGHT,
    ),
    "add_value_embedding": Case(
        "add_value_embedding",
        [(2, 3, 2, 3), (2, 3, 4), (2, 4), (7, 6)],
        # The square gives the tangents of v a gradient.
        lambda v, *xs: ops.add_value_embedding(v.square(), *xs, TOKENS),
        lambda v, *xs: value_embedding_formula(v.square(), *xs),
        ALWAYS_RIGHT,
    ),
    "add_value_embedding_backward": Case(
        "add_value_embedding_backward",
        [(2, 3, 2, 3), (2, 3, 4), (2, 4), (7, 6)],
        lambda *xs: ops.add_value_embedding_backward(*xs, TOKENS),
        value_embedding_backward_formula,
        ALWAYS_RIGHT,
    ),
    "smear": Case("smear", [(2, 5, 3), (1, 2), (1,)], ops.smear, smear_formula, ALWAYS_RIGHT),
    "linear": Case(
        "linear",
        [(70, 3), (2, 3)],
        in_float32(ops.linear),
        F.linear,
        ALWAYS_RIGHT,
        1e-4,
        {"native": 0.1, "torch": 0.1},
    ),
    "linear_backward": Case(
        "linear_backward",
        [(70, 2), (70, 3), (2, 3)],
        in_float32(ops.linear_backward),
        lambda dy, x, weight: (dy @ weight, dy.mT @ x),
        ALWAYS_RIGHT,
        1e-3,
        {"native": 0.5, "torch": 0.5},
    ),
    "linear_cross_entropy": Case(
        "linear_cross_entropy",
        LOSS,
        lambda x, weight: ops.linear_cross_entropy(x, weight, TARGETS),
        loss_formula,
        ALWAYS_RIGHT | {(SECOND, "native"): NO_SECOND},
    ),
    "linear_cross_entropy, none": Case(
        "linear_cross_entropy",
        LOSS,
        lambda x, weight: ops.linear_cross_entropy(x, weight, TARGETS, reduction="none"),
        lambda x, weight: loss_formula(x, weight, "none"),
        ALWAYS_RIGHT | dict.fromkeys((GRADIENT, SECOND), NO_GRADIENT),
    ),
    "newton_schulz": Case(
        "newton_schulz", [(3, 4)], ops.newton_schulz, torch_reference.newton_schulz, ALWAYS_RIGHT, 1e-8
    ),
    "newton_schulz, tall": Case(
        "newton_schulz", [(5, 2)], ops.newton_schulz, torch_reference.newton_schulz, ALWAYS_RIGHT, 1e-8
    ),
    "newton_schulz with norms": Case(
        "newton_schulz",
        [(3, 4)],
        lambda g: ops.newton_schulz(g, norms=g.detach().norm()),
        torch_reference.newton_schulz,
        beside("newton_schulz", "norms"),
    ),
    "adamw_": Case("adamw_", [(3, 4)] * 4, adamw, adamw_formula, without("adamw_"), 1e-5),
    "muon_momentum_": Case(
        "muon_momentum_", [(3, 4)] * 2, muon_momentum, muon_momentum_formula, without("muon_momentum_"), 1e-5
    ),
    "muon_update_": Case(
        "muon_update_",
        [(3, 4)] * 2,
        muon_update,
        lambda p, update: 0.95 * p - 0.3 * update,
        without("muon_update_"),
        1e-5,
    ),
    "normuon_update_": Case(
        "normuon_update_",
        [(3, 4), (1, 4), (3, 4)],
        normuon_update,
        lambda p, second, update: (
            0.95 * p - 0.3 * update,
            0.75 * second + 0.25 * update.square().mean(0, keepdim=True),
        ),
        without("normuon_update_"),
        1e-5,
    ),
    "newton_schulz_update_": Case(
        "newton_schulz_update_",
        [(3, 4)] * 2,
        newton_schulz_update,
        lambda p, update: 0.95 * p - 0.3 * torch_reference.newton_schulz(update),
        without("newton_schulz_update_"),
        1e-4,
    ),
    "cached_forward_": Case(
        "cached_forward_",
        CACHED,
        cached_forward(ops.cached_forward_),
        cached_forward(reference.cached_forward_),
        without("cached_forward_") | ON_TORCH,
        1e-4,
    ),
    "rotary_norm": Case(
        "rotary_norm",
        [(2, 5, 2, 4), (2, 5, 1, 4)],
        lambda q, k: ops.rotary_norm(q, k, ANGLES.cos(), ANGLES.sin(), scale=1.2),
        rotary_norm_formula,
        ALWAYS_RIGHT,
    ),
    "relu_squared": Case("relu_squared", [(3, 4)], ops.relu_squared, lambda x: x.clamp(min=0) ** 2, ALWAYS_RIGHT),
    "relu_squared_": Case(
        "relu_squared_", [(3, 4)], updated(ops.relu_squared_), lambda x: x.clamp(min=0) ** 2, without("relu_squared_")
    ),
    "relu_squared_backward_": Case(
        "relu_squared_backward_",
        [(3, 4)] * 2,
        lambda dy, x: updated(ops.relu_squared_backward_)(dy, x.square()),
        lambda dy, x: 2 * x.abs() * dy,
        without("relu_squared_backward_"),
    ),
    "linear_relu_squared": Case(
        "linear_relu_squared",
        [(70, 3), (2, 3)],
        in_float32(ops.linear_relu_squared),
        lambda x, weight: (x @ weight.mT).clamp(min=0) ** 2,
        ALWAYS_RIGHT,
        1e-3,
        {"native": 0.1, "torch": 0.1},
    ),
    "linear_backward_relu_squared": Case(
        "linear_backward_relu_squared",
        [(70, 2), (70, 3), (2, 3)],
        in_float32(lambda dy, h, weight: ops.linear_backward_relu_squared(dy, h.square(), weight)),
        lambda dy, h, weight: (2 * h.abs() * (dy @ weight), dy.mT @ h.square()),
        ALWAYS_RIGHT,
        1e-3,
        {"native": 0.5, "torch": 0.5},
    ),
    # The rotary angles of the model are in float32.
    "the model's loss": Case(
        "model",
        [*WEIGHTS.values()],
        model(NEXT),
        model_formula,
        ALWAYS_RIGHT | NOT_IN_AUTOCAST | {(SECOND, "native"): NO_SECOND},
        1e-5,
    ),
    "the model's logits with grad_checkpoint": Case(
        "model",
        [*WEIGHTS.values()],
        model(grad_checkpoint=True),
        logits_formula,
        # vmap of torch.autograd.grad recomputes the blocks within vmap, where plain torch runs and saves other tensors.
        ALWAYS_RIGHT | NOT_IN_AUTOCAST | {"vmapped_backward": RECOMPUTED_OTHERWISE},
        1e-5,
    ),
}

# --- modes: each runs f on the tensors xs and returns the results ---

MODES: dict[str, tuple[str, Callable[..., Any]]] = {}


def mode(kind):
    def add(function):
        MODES[function.__name__] = kind, function
        return function

    return add


def listed(out):
    return list(out) if isinstance(out, Sequence) else [out]


def loss_of(f):
    """Return a function from xs to a scalar that is not linear in f's outputs."""
    return lambda *xs: sum(out.sin().sum() for out in listed(f(*xs)))


def leaves(xs):
    return [x.clone().requires_grad_() for x in xs]


def directions(xs):
    """Return other numbers of the same shapes."""
    return [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).cos().view(x.shape) for x in xs]


def stacked(x):
    return torch.stack((x, -x, 0.5 * x.flip(0)))


def gradients(scalar, xs, **options):
    return torch.autograd.grad(scalar, xs, **options)


def numbers(xs):
    return tuple(range(len(xs)))


@mode(VALUES)
def values(f, xs):
    return f(*xs)


@mode(VALUES)
def no_grad(f, xs):
    with torch.no_grad():
        out = listed(f(*leaves(xs)))
    assert not any(x.requires_grad for x in out)
    return out


@mode(VALUES)
def inference_mode(f, xs):
    with torch.inference_mode():
        return f(*(x.clone() for x in xs))


@mode(VALUES)
def inference_tensors_used_outside(f, xs):
    with torch.inference_mode():
        made = [x.clone() for x in xs]
    with torch.no_grad():
        return f(*made)


@mode(VALUES)
def autocast(f, xs):
    with torch.autocast("cpu", torch.bfloat16):
        return f(*xs)


@mode(VALUES)
def compiled(f, xs):
    return torch.compile(f, fullgraph=True, backend="aot_eager")(*xs)


@mode(GRADIENT)
def backward(f, xs):
    xs = leaves(xs)
    loss_of(f)(*xs).backward()
    return [x.grad for x in xs]


@mode(GRADIENT)
def one_gradient(f, xs):
    first, *others = xs
    first = first.clone().requires_grad_()
    return gradients(loss_of(f)(first, *others), [first])


@mode(GRADIENT)
def parameters(f, xs):
    xs = [torch.nn.Parameter(x) for x in xs]
    return gradients(loss_of(f)(*xs), xs)


class Subclass(Tensor):
    pass


@mode(GRADIENT)
def subclass(f, xs):
    xs = [x.clone().as_subclass(Subclass).requires_grad_() for x in xs]
    return [x.as_subclass(Tensor) for x in gradients(loss_of(f)(*xs), xs)]


@mode(GRADIENT)
def autocast_gradient(f, xs):
    xs = leaves(xs)
    with torch.autocast("cpu", torch.bfloat16):
        scalar = loss_of(f)(*xs)
    return gradients(scalar, xs)


@mode(GRADIENT)
def compiled_gradient(f, xs):
    xs = leaves(xs)
    return gradients(loss_of(torch.compile(f, fullgraph=True, backend="aot_eager"))(*xs), xs)


@mode(GRADIENT)
def checkpointed(f, xs):
    xs = leaves(xs)
    return gradients(checkpoint(loss_of(f), *xs, use_reentrant=False), xs)


@mode(GRADIENT)
def checkpointed_reentrant(f, xs):
    xs = leaves(xs)
    checkpoint(loss_of(f), *xs, use_reentrant=True).backward()
    return [x.grad for x in xs]


@mode(GRADIENT)
def saved_tensor_hooks(f, xs):
    xs = leaves(xs)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (x.dtype, x.double() + 1), lambda x: (x[1] - 1).to(x[0])):
        scalar = loss_of(f)(*xs)
    return gradients(scalar, xs)


@mode(GRADIENT)
def batched_gradients(f, xs):
    """Several gradients of the outputs at once, by is_grads_batched."""
    xs = leaves(xs)
    out = listed(f(*xs))
    return gradients(out, xs, grad_outputs=[stacked(d) for d in directions(out)], is_grads_batched=True)


@mode(GRADIENT)
def vmapped_backward(f, xs):
    xs = leaves(xs)
    out = listed(f(*xs))
    douts = [stacked(d) for d in directions(out)]
    return vmap(lambda *ds: gradients(out, xs, grad_outputs=ds, retain_graph=True))(*douts)


@mode(GRADIENT)
def tangent_of_the_gradient_that_comes_in(f, xs):
    xs = leaves(xs)
    out = listed(f(*xs))
    with forward_ad.dual_level():
        douts = [forward_ad.make_dual(torch.ones_like(x), d) for x, d in zip(out, directions(out), strict=True)]
        return [forward_ad.unpack_dual(x).tangent for x in gradients(out, xs, grad_outputs=douts)]


@mode(GRADIENT)
def vectorised_jacobian(f, xs):
    first, *others = xs
    return torch.autograd.functional.jacobian(lambda x: listed(f(x, *others))[0], first, vectorize=True)


@mode(SECOND)
def create_graph(f, xs):
    xs = leaves(xs)
    return gradients(loss_of(f)(*xs), xs, create_graph=True)


@mode(SECOND)
def double_backward(f, xs):
    xs = leaves(xs)
    first = gradients(loss_of(f)(*xs), xs, create_graph=True)
    return gradients(sum((g * d).sum() for g, d in zip(first, directions(xs), strict=True)), xs)


@mode(SECOND)
def triple_backward(f, xs):
    xs = leaves(xs)
    scalar = loss_of(f)(*xs)
    for _ in range(2):
        found = gradients(scalar, xs, create_graph=True)
        scalar = sum((g * d).sum() for g, d in zip(found, directions(xs), strict=True))
    return gradients(scalar, xs)


@mode(SECOND)
def checkpointed_double_backward(f, xs):
    xs = leaves(xs)
    first = gradients(checkpoint(loss_of(f), *xs, use_reentrant=False), xs, create_graph=True)
    return gradients(sum((g * d).sum() for g, d in zip(first, directions(xs), strict=True)), xs)


@mode(SECOND)
def double_backward_within_hooks(f, xs):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        return double_backward(f, xs)


@mode(SECOND)
def functional_hessian(f, xs):
    return torch.autograd.functional.hessian(loss_of(f), tuple(xs))


@mode(SECOND)
def functional_vhp(f, xs):
    return torch.autograd.functional.vhp(loss_of(f), tuple(xs), tuple(directions(xs)))[1]


@mode(TRANSFORM)
def func_grad(f, xs):
    return grad(loss_of(f), numbers(xs))(*xs)


@mode(TRANSFORM)
def func_vjp(f, xs):
    out, pull = vjp(f, *xs)
    return pull(tuple(directions(listed(out))) if isinstance(out, tuple) else directions([out])[0])


@mode(TRANSFORM)
def func_jacrev(f, xs):
    return jacrev(lambda *xs: listed(f(*xs))[0], numbers(xs))(*xs)


@mode(TRANSFORM)
def func_jacfwd(f, xs):
    return jacfwd(lambda *xs: listed(f(*xs))[0], numbers(xs))(*xs)


@mode(TRANSFORM)
def func_hessian(f, xs):
    return hessian(loss_of(f), numbers(xs))(*xs)


@mode(TRANSFORM)
def func_jvp(f, xs):
    return jvp(f, tuple(xs), tuple(directions(xs)))[1]


@mode(TRANSFORM)
def func_jvp_of_captured(f, xs):
    """The tangent is in a variable of a closure, not in the operator's first argument."""
    *others, last = xs
    return jvp(lambda x: f(*others, x), (last,), tuple(directions([last])))[1]


@mode(FORWARD)  # which torch.func.linearize is made of
def linearised(f, xs):
    return torch.func.linearize(f, *xs)[1](*directions(xs))


@mode(TRANSFORM)
def hessian_vector(f, xs):
    return jvp(grad(loss_of(f), numbers(xs)), tuple(xs), tuple(directions(xs)))[1]


@mode(TRANSFORM)
def vmapped(f, xs):
    return vmap(f)(*map(stacked, xs))


@mode(TRANSFORM)
def vmapped_over_one(f, xs):
    first, *others = xs
    return vmap(f, (-1, *[None] * len(others)))(stacked(first).movedim(0, -1), *others)


@mode(TRANSFORM)
def vmapped_twice(f, xs):
    return vmap(vmap(f))(*(stacked(stacked(x)) for x in xs))


@mode(TRANSFORM)
def per_sample_gradients(f, xs):
    return vmap(grad(loss_of(f), numbers(xs)))(*map(stacked, xs))


@mode(TRANSFORM)
def captured(f, xs):
    """func.grad of the first tensor, and a backward pass through it to the others."""
    first, *others = xs
    others = leaves(others) or leaves([torch.ones_like(first)])
    inner = grad(lambda x: loss_of(f)(x, *others[: len(xs) - 1]) + others[0].sum() * x.sum())(first)
    return gradients((inner * directions([inner])[0]).sum(), others)


class Module(torch.nn.Module):
    def __init__(self, f, first):
        super().__init__()
        self.f, self.first = f, torch.nn.Parameter(torch.zeros_like(first))

    def forward(self, *others):
        return loss_of(self.f)(self.first, *others)


@mode(TRANSFORM)
def functional_call_gradient(f, xs):
    first, *others = xs
    module = Module(f, first)
    return grad(lambda weights: functional_call(module, weights, tuple(others)))({"first": first})["first"]


@mode(TRANSFORM)
def functionalised(f, xs):
    return torch.func.functionalize(f)(*xs)


@mode(TRANSFORM)
def compiled_func_grad(f, xs):
    return torch.compile(grad(loss_of(f), numbers(xs)), fullgraph=True, backend="aot_eager")(*xs)


@mode(TRANSFORM)
def compiled_within_jvp(f, xs):
    return jvp(torch.compile(f, backend="aot_eager"), tuple(xs), tuple(directions(xs)))[1]


def dual(f, primals, tangents):
    """Return the output tangents; each primal has a tangent or None."""
    with forward_ad.dual_level():
        xs = [x if t is None else forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True)]
        pairs = [forward_ad.unpack_dual(out) for out in listed(f(*xs))]
    return [torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in pairs]


@mode(FORWARD)
def tangents(f, xs):
    return dual(f, xs, directions(xs))


@mode(FORWARD)
def tangents_under_no_grad(f, xs):
    with torch.no_grad():
        return dual(f, xs, directions(xs))


@mode(FORWARD)
def tangent_of_the_last(f, xs):
    return dual(f, xs, [*[None] * (len(xs) - 1), *directions(xs[-1:])])


@mode(FORWARD)
def gradient_of_tangents(f, xs):
    ones = leaves(xs)
    out = dual(f, ones, directions(xs))
    return gradients(sum(x.sum() for x in out), ones)


@mode(FORWARD)
def tangents_of_gradients(f, xs):
    def all_gradients(*duals):
        return gradients(loss_of(f)(*duals), duals)

    return dual(all_gradients, leaves(xs), directions(xs))


@mode(FORWARD)
def vectorised_forward_jacobian(f, xs):
    first, *others = xs
    return torch.autograd.functional.jacobian(
        lambda x: listed(f(x, *others))[0], first, vectorize=True, strategy="forward-mode"
    )


@functools.cache
def tangents_compile():
    """Return whether a compiled function takes tangents; torch 2.15 refuses them, because it would drop them."""
    x = torch.ones(3)
    torch._dynamo.reset()
    try:
        dual(torch.compile(torch.sin, fullgraph=True, backend="aot_eager"), (x,), (x,))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@mode(FORWARD)
def compiled_tangents(f, xs):
    if not tangents_compile():
        pytest.skip(f"torch {torch.__version__} compiles no function of tensors with tangents")
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(*xs)
    return dual(compiled, xs, directions(xs))


# --- the table ---


def expected(case, name, backend):
    kind = MODES[name][0]
    for key in ((name, backend), name, (kind, backend), kind):
        if key in case.cells:
            return case.cells[key]
    raise KeyError(f"{case.op}: {name}")


def test_every_operator_is_in_the_table_and_every_cell_says_what_is_expected():
    assert operators() == {case.op for case in CASES.values()} - {"model"}
    assert {"attention", "linear_backward", "adamw_", "cached_forward_"} <= operators()
    for case in CASES.values():
        known = {*MODES, *(kind for kind, _ in MODES.values())}
        assert {key if isinstance(key, str) else key[0] for key in case.cells} <= known
        for name in MODES:
            for backend in BACKENDS:
                cell = expected(case, name, backend)
                assert cell in (RIGHT, NO_WHOLE_GRAPH, NO_SECOND, RECOMPUTED_OTHERWISE) or cell.startswith(
                    (f"{case.op}: ", "skipped: ")
                )


def flat(result):
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


# These differ from an earlier case only in a mask or in which side is longer, which tracing does not depend on.
TRACED_ALREADY = {
    "attention with a window",
    "attention, not causal",
    "attention with rows that see nothing",
    "attention of x, x, x",
    "newton_schulz, tall",
    "add_rms_norm, the sum unused",
    "mix_rms_norm, the norm alone",
}
TRACING = {"linearised", *(name for name in MODES if "compiled" in name)}


def repeats(case, name):
    """Return whether a slow cell repeats another cell: under transforms and tangents nothing is checkpointed."""
    if case == "the model's logits with grad_checkpoint":
        return name in TRACING and MODES[name][0] in (TRANSFORM, FORWARD)
    return case in TRACED_ALREADY and name in TRACING


CELLS = [(case, name) for case in CASES for name in MODES if not repeats(case, name)]


def inputs(case):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in case.shapes]


@functools.cache
def of_formula(case, name):
    """Return the results of a mode for a case's formula, without compiling and autocast."""
    case = CASES[case]

    def formula(*xs):
        with torch.autocast("cpu", enabled=False):
            return case.formula(*xs)

    run = func_jvp if name == "linearised" else MODES[name][1]
    with patch.object(torch, "compile", lambda f, **_: f):
        return flat(run(formula if "autocast" in name else case.formula, inputs(case)))


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize(
    ("case", "name", "backend"),
    [
        pytest.param(*cell, backend, marks=pytest.mark.slow if backend == "torch" and cell[1] in TRACING else ())
        for backend in BACKENDS
        for cell in CELLS
    ],
)
def test_right_or_an_error_that_tells_what_to_do(case, name, backend, monkeypatch):
    key, case, run = case, CASES[case], MODES[name][1]
    monkeypatch.setattr(ops_backends, "_linear_product", "native")  # use the kernel on every processor
    if "compiled" in name:
        torch._dynamo.reset()
    cell = expected(case, name, backend)
    if cell.startswith("skipped: "):
        pytest.skip(cell)
    with use(backend):
        if cell != RIGHT:
            with pytest.raises((RuntimeError, ValueError)) as caught:
                run(case.call, inputs(case))
            assert cell in str(caught.value)
            return
        ours = flat(run(case.call, inputs(case)))
    theirs = of_formula(key, name)
    tolerance = case.in_autocast[backend] if "autocast" in name else case.tolerance
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        bound = tolerance * (1 + other.abs().max().item())
        torch.testing.assert_close(mine.double(), other, atol=bound, rtol=0)


# --- beside the table ---


def test_a_reference_that_runs_in_a_mode_warns_once(monkeypatch):
    monkeypatch.setattr(ops_backends, "warned", set())
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in QKV)

    def calls():
        jvp(lambda q: ops.attention(q, k, v), (q,), (q,))
        dual(ops.attention, (q, k, v), (q.detach(), None, None))
        gradients(ops.attention(q, k, v).sum(), [q], create_graph=True)
        ops.newton_schulz(q)
        vmap(lambda x: ops.linear_cross_entropy(x, v.detach()[0, :, 0], TARGETS % 7))(q.detach()[:, :, 0])

    with use("native"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calls()
        calls()
    messages = [str(warning.message) for warning in caught if "nanochat_native" in str(warning.message)]
    where = "on cpu is served by plain torch: its kernel does not support"
    assert messages == [
        f"nanochat_native: attention {where} torch.func transforms",
        f"nanochat_native: attention {where} forward-mode AD",
        f"nanochat_native: attention {where} second derivatives",
        f"nanochat_native: newton_schulz {where} gradients",
        f"nanochat_native: linear_cross_entropy {where} torch.func transforms",
    ]


def test_kernels_run_where_no_derivative_is_needed(monkeypatch):
    """No reference runs within a dual level without tangents, nor where tensors need no gradient."""
    monkeypatch.setattr(ops_backends, "warned", set())
    q, k, v = (torch.randn(shape) for shape in QKV)
    with use("native"), warnings.catch_warnings():
        warnings.simplefilter("error")
        with forward_ad.dual_level():
            ops.attention(q, k, v)
            ops.newton_schulz(q)
        with torch.no_grad():
            ops.newton_schulz(q.requires_grad_())
        ops.attention(q, k, v).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [-2, 7])
def test_targets_out_of_range_under_vmap(backend, target):
    x, weight = torch.randn(5, 4), torch.randn(7, 4)
    targets = torch.stack((TARGETS, TARGETS.masked_fill(TARGETS == 6, target)))
    with use(backend), pytest.raises(ValueError, match=f"targets must be from 0 to 6 .*, got {target}"):
        vmap(lambda y: ops.linear_cross_entropy(x, weight, y))(targets)


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_and_lengths_may_be_mapped_or_not(backend):
    x, weight = torch.randn(5, 4), torch.randn(7, 4)
    targets = torch.stack((TARGETS, TARGETS.flip(0), TARGETS.clamp(min=2)))
    q, k, v = (torch.randn(shape) for shape in QKV)
    with use(backend):
        mapped = vmap(lambda y: ops.linear_cross_entropy(x, weight, y, reduction="sum"))(targets)
        each = [ops.linear_cross_entropy(x, weight, y, reduction="sum") for y in targets]
        torch.testing.assert_close(mapped, torch.stack(each))
        words = "attention: lengths must be None under torch.func transforms"
        with pytest.raises(ValueError, match=words):
            vmap(lambda n: ops.attention(q, k, v, lengths=n))(torch.stack((LENGTHS, LENGTHS)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_a_step_that_have_tangents_or_gradients_are_refused(backend):
    """A rate in a tensor is an input like the other tensors."""
    p, g = torch.randn(3, 4), torch.randn(3, 4)
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with use(backend):
        for call in (
            lambda lr: ops.muon_update_([p.clone()], g[None], lr=lr),
            lambda lr: ops.normuon_update_([p.clone()], g[None], [torch.zeros(1, 4)], lr=lr),
            lambda lr: ops.newton_schulz_update_([p.clone()], g[None], lr=lr),
            lambda lr: ops.muon_momentum_([g], [p.clone()], momentum=lr),
            lambda lr: adamw_with(p, g, lr),
        ):
            with pytest.raises(RuntimeError, match="_: has no derivative, but a tensor requires a gradient"):
                call(rate)
            with pytest.raises(RuntimeError, match=r"_: does not support torch\.func transforms"):
                vmap(call)(rate.detach()[None])
            with torch.no_grad():
                call(rate)


def adamw_with(p, g, lr):
    settings = {"step": 1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    ops.adamw_([p.clone()], [g], [p.clone()], [p.square()], lr=lr, **settings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_step_changes_nothing(backend):
    tensors = [torch.rand(3, 4) for _ in range(4)]
    before = [x.clone() for x in tensors]
    tensors[1].requires_grad_()
    settings = {"step": 1, "lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    with use(backend), pytest.raises(RuntimeError, match="adamw_: has no derivative"):
        ops.adamw_(*([x] for x in tensors), **settings)
    assert all(map(torch.equal, tensors, before))


def test_norms_with_a_gradient_are_refused():
    g = torch.randn(3, 4)
    with pytest.raises(ValueError, match="newton_schulz: norms must be None when a tensor requires a gradient"):
        ops.newton_schulz(g, norms=g.double().norm().requires_grad_())


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_keeps_its_type(backend, dtype):
    """Tangents, second gradients and mapped results have the type of the inputs, and are near those of float64."""
    exact = [torch.randn(shape, dtype=torch.float64) for shape in QKV]
    xs = [x.to(dtype) for x in exact]
    exact = [x.double() for x in xs]
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    with use(backend):
        for run in (func_jvp, func_grad, vmapped, tangents, create_graph, double_backward):
            for mine, other in zip(flat(run(ops.attention, xs)), flat(run(attention_formula, exact)), strict=True):
                assert mine.dtype == dtype
                bound = tolerance * (1 + other.abs().max().item())
                torch.testing.assert_close(mine.double(), other, atol=bound, rtol=0)
