"""The transformer: nanochat's first architecture (October 2025), which transformers also ships as NanoChatForCausalLM.

    x = norm(wte[idx]);  per block: x += attention(norm(x)), x += mlp(norm(x));  logits = 15 tanh(lm_head(norm(x)) / 15)

RMSNorm without weights, rotary positions first and QK-norm second, squared ReLU, untied embeddings, no biases.

Shape letters: B batch, T tokens, C channels, H query heads, Hkv key/value heads, D head size, V vocabulary.
"""

import functools
import math
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from nanochat_native import ops

EPS = torch.finfo(torch.float32).eps  # of every RMSNorm; 2^-23, what torch's rms_norm takes for float32 when given none
SOFTCAP = 15.0
ROTARY_BASE = 10000
ROTARY_SPAN = 10  # rotary positions exist for this many times sequence_len, so that samples may outgrow it


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model.

    n_kv_head < n_head shares each key/value head among n_head / n_kv_head query heads (GQA; 1 is MQA).
    window_pattern holds one letter a layer, repeated over the depth: L sees the whole past, S the last sequence_len //
    4 positions and itself. The last layer is L whatever the pattern says.

    Raises ValueError for sizes that do not fit together.
    """

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str = "L"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "window_pattern" and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} is {value!r}; it takes a whole number from 1")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd {self.n_embd} over n_head {self.n_head} must give a whole, even head size")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if not self.window_pattern or set(self.window_pattern) - set("LS"):
            raise ValueError(f"window_pattern is {self.window_pattern!r}; it takes a word of L and S, such as SSSL")

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        vocab_size: int,
        sequence_len: int,
        head_dim: int = 128,
        n_kv_head: int | None = None,
        window_pattern: str = "L",
    ) -> "GPTConfig":
        """nanochat's one dial: 64 channels a layer, in the fewest equal heads of at most head_dim channels."""
        if depth < 1 or head_dim < 2:
            raise ValueError(f"depth is {depth} and head_dim {head_dim}; they take numbers from 1 and from 2")
        n_embd = 64 * depth
        n_head = next(n for n in range(math.ceil(n_embd / head_dim), n_embd) if n_embd % (2 * n) == 0)
        return cls(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=depth,
            n_head=n_head,
            n_kv_head=n_head if n_kv_head is None else n_kv_head,
            n_embd=n_embd,
            window_pattern=window_pattern,
        )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def windows(self) -> list[int | None]:
        """Per layer, how many earlier positions a query sees; None for all."""
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [self.sequence_len // 4 if letter == "S" else None for letter in letters]


# The functions below are written out because they keep less for the backward pass than autograd would, the norms their
# output, which the next operator keeps anyway, instead of their input, and because they pass over memory less often.
# The norms compute in float32 or better. Backward passes are made of torch's own calls on inputs and outputs, so that
# they can be differentiated in turn; for this the norms return r too. torch.func's transforms and forward-mode AD take
# the plain functions below instead.


class _RMSNorm(torch.autograd.Function):
    """y = r x, r = 1 / sqrt(mean(x^2) + EPS) over the last dimension; returns y and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        r = _inverse_rms(x)
        y = (x * r).to(x.dtype)
        ctx.save_for_backward(y, r)
        ctx.set_materialize_grads(False)
        return y, r

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dr: Tensor | None) -> Tensor:
        y, r = ctx.saved_tensors
        return _rms_norm_backward(dy, dr, y, r).to(y.dtype)


class _RotaryNorm(torch.autograd.Function):
    """Rotates x (B, T, heads, D) by cos (1, T, 1, D) and sin (1, T, 1, D / 2), then is _RMSNorm of each head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        y = _rotate(x, cos, sin)
        r = _inverse_rms(y)
        y = y.mul_(r).to(x.dtype)
        ctx.save_for_backward(y, r, cos, sin)
        ctx.set_materialize_grads(False)
        return y, r

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dr: Tensor | None) -> tuple[Tensor, None, None]:
        y, r, cos, sin = ctx.saved_tensors
        return _rotate(_rms_norm_backward(dy, dr, y, r), cos, -sin).to(y.dtype), None, None


class _MLP(torch.autograd.Function):
    """y = max(x fc^T, 0)^2 proj^T of x (..., C), fc (4 C, C), proj (C, 4 C).

    Keeps max(x fc^T, 0) and squares it again for the backward pass: half the memory of the largest activations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
        h = ops.linear(x, fc).relu_()
        ctx.save_for_backward(x, h, fc, proj)
        return ops.linear(h * h, proj)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, h, fc, proj = ctx.saved_tensors
        if torch.is_grad_enabled():  # under create_graph=True: h, neither input nor output, does not lead back to x
            h = ops.linear(x, fc).relu()
        dh, dproj = ops.linear_backward(dy, h * h, proj)
        dx, dfc = ops.linear_backward(dh.mul_(h), x, fc)
        return dx.mul_(2), dfc.mul_(2), dproj


def _plain_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def _plain_rotary_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return _plain_norm(x * cos + torch.cat((x2 * sin, x1 * -sin), dim=-1)).to(x.dtype)


def _plain_mlp(x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    return ops.linear(ops.linear(x, fc).relu().square(), proj)


def _inverse_rms(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(x.size(-1)).add_(EPS).rsqrt_()


def _rms_norm_backward(dy: Tensor | None, dr: Tensor | None, y: Tensor, r: Tensor) -> Tensor:
    """dx = r (dy - y mean(dy y)) - dr r^2 y / C, in r's dtype. Only a derivative of a derivative has a dr."""
    y = y.to(r.dtype)
    dy = torch.zeros_like(y) if dy is None else dy.to(r.dtype)
    dx = torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1).mul_(r)
    return dx if dr is None else dx - dr * r.square() * y / y.size(-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x1 cos + x2 sin, x2 cos - x1 sin) of the halves x1, x2 of the last dimension, in float32 or better."""
    half = sin.size(-1)
    y = x * cos
    x = x.to(y.dtype)
    y[..., :half].addcmul_(x[..., half:], sin)
    y[..., half:].addcmul_(x[..., :half], sin, value=-1)
    return y


def norm(x: Tensor) -> Tensor:
    """RMSNorm of the last dimension, without weights."""
    return _plain_norm(x) if ops.beyond_backward(x) else cast(Tensor, _RMSNorm.apply(x)[0])


def rotary_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, D), rotated by cos (1, T, 1, D) and sin (1, T, 1, D / 2), each head normalised."""
    if ops.beyond_backward(x):
        return _plain_rotary_norm(x, cos, sin)
    return cast(Tensor, _RotaryNorm.apply(x, cos, sin)[0])


class KVCache:
    """Keys and values of the positions already seen, allocated once.

    keys, values: (n_layer, B, capacity, Hkv, D); the first `length` positions are filled, by model(idx,
    kv_cache=cache).
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.n_layer, batch_size, capacity, config.n_kv_head, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def batch_size(self) -> int:
        return self.keys.size(1)

    @property
    def capacity(self) -> int:
        return self.keys.size(2)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts k, v (B, T, Hkv, D) of a layer behind the filled positions; all of its keys and values, as views."""
        end = self.length + k.size(1)
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def repeat(self, batch_size: int) -> "KVCache":
        """A copy of this cache of one row in which each of `batch_size` rows holds it, to go on in different ways."""
        if self.batch_size != 1:
            raise ValueError(f"the cache has {self.batch_size} rows; only one of 1 row can be repeated")
        copy = object.__new__(KVCache)
        copy.keys = self.keys.repeat(1, batch_size, 1, 1, 1)
        copy.values = self.values.repeat(1, batch_size, 1, 1, 1)
        copy.length = self.length
        return copy


class Linear(nn.Linear):
    """nn.Linear through ops.linear."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.windows[layer]
        self.head_dim = config.head_dim
        kv_channels = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = Linear(config.n_embd, kv_channels, bias=False)
        self.c_v = Linear(config.n_embd, kv_channels, bias=False)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q (B, T, H, D), k, v (B, T, Hkv, D), as attention takes them."""
        heads = (-1, self.head_dim)
        q = rotary_norm(self.c_q(x).unflatten(-1, heads), cos, sin)
        k = rotary_norm(self.c_k(x).unflatten(-1, heads), cos, sin)
        return q, k, self.c_v(x).unflatten(-1, heads)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache | None) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        if kv_cache is not None:
            k, v = kv_cache.append(self.layer, k, v)
        return cast(Tensor, self.c_proj(ops.attention(q, k, v, window=self.window).flatten(-2)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        fc, proj = self.c_fc.weight.to(x.dtype), self.c_proj.weight.to(x.dtype)
        return _plain_mlp(x, fc, proj) if ops.beyond_backward(x, fc, proj) else cast(Tensor, _MLP.apply(x, fc, proj))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache | None) -> Tensor:
        x = x + self.attn(norm(x), cos, sin, kv_cache)
        return x + self.mlp(norm(x))


def _call_with(block: Block, weights: dict[str, Tensor], *inputs: Any) -> Tensor:
    """functional_call for checkpoint, which gives saved-tensor hooks only what it finds among its own arguments."""
    return cast(Tensor, functional_call(block, weights, inputs))


class GPT(nn.Module):
    """The model. Parameters are float32; under torch.autocast the blocks run in autocast's dtype.

    Build it directly, or without memory: `with torch.device("meta"): model = GPT(config)`, then
    `model.to_empty(device=...)`. Call init_weights() before training either way; it gives the same weights for both
    and on every device.

    grad_checkpoint: keep only each block's input for the backward pass and compute the block again there; same bits.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, *, grad_checkpoint: bool = False) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint = grad_checkpoint
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_rotary()

    @property
    def wte(self) -> nn.Embedding:
        return cast(nn.Embedding, self.transformer["wte"])

    @property
    def blocks(self) -> list[Block]:
        return list(cast(Any, self.transformer["h"]))

    @property
    def max_positions(self) -> int:
        """Tokens that a sequence may hold: sequence_len for training, and what a sample may add to it."""
        return ROTARY_SPAN * self.config.sequence_len

    def init_rotary(self) -> None:
        """Computes the rotary tables in float32; needed after to_empty() where init_weights() is not called."""
        device = self.wte.weight.device
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / (ROTARY_BASE ** (half / self.config.head_dim))
        positions = torch.arange(self.max_positions, dtype=torch.float32, device=device)
        angles = torch.outer(positions, frequencies)[None, :, None, :]
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """nanochat's initialisation: wte normal; matrices normal of std min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in);
        lm_head and every c_proj zero, so that the first loss is ln V. The same seed gives the same weights on every
        device.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name == "lm_head.weight" or name.endswith("c_proj.weight"):
                parameter.zero_()
                continue
            fan_out, fan_in = parameter.shape
            std = 1.0 if parameter is self.wte.weight else min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        self.init_rotary()

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        kv_cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V) float32, or (B, 1, V) of the last position with last_only.

        With targets (B, T) int64: the cross-entropy in nats instead, float32, of those that are not -1; "mean" or
        "sum" gives a scalar, "none" (B, T), without a gradient. With kv_cache, idx continues the sequences that it
        holds. Raises TypeError and ValueError for arguments that do not fit.

        torch.func's transforms, forward-mode AD and, on the torch backend, second derivatives work, without kv_cache;
        they run in plain torch, which keeps more, and without grad_checkpoint.
        """
        if idx.dtype != torch.int64:
            raise TypeError(f"idx is {idx.dtype}; it takes int64")
        if idx.ndim != 2 or idx.numel() == 0:
            raise ValueError(f"idx has shape {tuple(idx.shape)}; it takes (B, T), both at least 1")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}, idx {tuple(idx.shape)}; they must agree")
        if targets is not None and (kv_cache is not None or last_only):
            raise ValueError("targets go with neither kv_cache nor last_only: a loss is taken over whole sequences")
        if kv_cache is not None and (mode := ops.beyond_backward()):
            raise RuntimeError(f"kv_cache is written in place, which {mode} do not follow; call without it")
        start = 0 if kv_cache is None else kv_cache.length
        end = start + idx.size(1)
        if end > self.max_positions:
            raise ValueError(
                f"a sequence of {end} tokens; this model of sequence_len {self.config.sequence_len} "
                f"has positions for {self.max_positions}"
            )
        if kv_cache is not None and (end > kv_cache.capacity or idx.size(0) != kv_cache.batch_size):
            raise ValueError(
                f"{idx.size(0)} rows up to position {end}; kv_cache has {kv_cache.batch_size} rows "
                f"of {kv_cache.capacity} positions"
            )

        cos, sin = self.cos[:, start:end], self.sin[:, start:end]
        x = self.wte(idx).to(self.compute_dtype)
        x = norm(x)
        for block in self.blocks:
            if self.grad_checkpoint and torch.is_grad_enabled() and not ops.beyond_backward(x):
                weights = dict(block.named_parameters())  # those of now, should a functional_call end before backward
                x = checkpoint(
                    _call_with, block, weights, x, cos, sin, kv_cache, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, cos, sin, kv_cache)
        if kv_cache is not None:
            kv_cache.length = end
        x = norm(x[:, -1:] if last_only else x)

        if targets is not None:
            weight = self.lm_head.weight.to(x.dtype)
            return ops.linear_cross_entropy(x, weight, targets, softcap=SOFTCAP, reduction=reduction)
        logits = self.lm_head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (logits / SOFTCAP).tanh_() * SOFTCAP

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the activations: autocast's dtype where it is on, else the parameters'."""
        device_type = self.wte.weight.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.wte.weight.dtype

    def num_params(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def estimate_flops(self) -> int:
        """Floating-point operations a token, forward and backward: 6 a parameter outside wte, and 12 H D min(T,
        window) a layer for attention, which counts its scores in full, not halved by causality.

        nanochat's formula, after appendix B of PaLM, arXiv:2204.02311.
        """
        config = self.config
        spans = [config.sequence_len if window is None else window for window in config.windows]
        return 6 * (self.num_params() - self.wte.weight.numel()) + 12 * config.n_embd * sum(spans)


class Decoder:
    """The model for generation: sequences in the slots of a preallocated cache, without gradients; see
    ops.cached_forward_.

    cache: (n_layer, slots, capacity, 2 Hkv, D), keys and then values of each position, zeros at first; a sequence lives
    in one slot. The weights are the model's own where they have its compute_dtype, else copies.

    float32 on the CPU, native: the logits of a token have the same bits whatever is decoded beside it, and however its
    prompt was cut. Elsewhere they may differ by rounding.
    """

    def __init__(self, model: GPT, slots: int, capacity: int) -> None:
        config, device, dtype = model.config, model.wte.weight.device, model.compute_dtype
        self.device = device

        def weights(*linears: nn.Linear) -> list[Tensor]:
            return [linear.weight.detach().to(dtype) for linear in linears]

        blocks = []
        for block in model.blocks:
            a, mlp = block.attn, block.mlp
            blocks += weights(a.c_q, a.c_k, a.c_v, a.c_proj, mlp.c_fc, mlp.c_proj)
        (lm_head,) = weights(model.lm_head)
        shape = (config.n_layer, slots, capacity, 2 * config.n_kv_head, config.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)
        self._forward = functools.partial(
            ops.cached_forward_,
            wte=model.wte.weight.detach().to(dtype),
            blocks=blocks,
            lm_head=lm_head,
            windows=config.windows,
            cos=model.cos[0, :, 0],  # not in bfloat16: training has them in float32 too
            sin=model.sin[0, :, 0],
            cache=self.cache,
            softcap=SOFTCAP,
        )

    def prefill(self, slot: int, tokens: list[int], start: int) -> None:
        """Puts `tokens` at the positions from `start` of a slot, whose earlier positions are filled."""
        self._forward(torch.tensor([tokens], device=self.device), [slot], [start], with_logits=False)

    def decode(self, slots: list[int], tokens: list[int], positions: list[int]) -> Tensor:
        """One token a slot, each at its position -> logits (len(slots), V), float32 or better."""
        return self._forward(torch.tensor(tokens, device=self.device)[:, None], slots, positions)
