"""The transformer: nanochat's first architecture (October 2025), which transformers also ships as NanoChatForCausalLM.

    x = norm(wte[idx]);  per block: x += attention(norm(x)), x += mlp(norm(x));  logits = 15 tanh(lm_head(norm(x)) / 15)

RMSNorm without weights, rotary positions first and QK-norm second, squared ReLU, untied embeddings, no biases.

Shape letters: B batch, T tokens, C channels, H query heads, Hkv key/value heads, D head size, V vocabulary.
"""

import math
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from nanochat_native import ops
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.flops import flops_per_token
from nanochat_native.model.functional import SquaredReluMLP, norm, plain_mlp, rotary_norm

SOFTCAP = 15.0
ROTARY_BASE = 10000
ROTARY_SPAN = 10  # rotary positions exist for this many times sequence_len, so that samples may outgrow it


class Linear(nn.Linear):
    """nn.Linear through ops.linear."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.window = config.windows[layer]
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        return cast(Tensor, self.c_proj(ops.attention(q, k, v, window=self.window).flatten(-2)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        fc, proj = self.c_fc.weight.to(x.dtype), self.c_proj.weight.to(x.dtype)
        return (
            plain_mlp(x, fc, proj)
            if ops.beyond_backward(x, fc, proj)
            else cast(Tensor, SquaredReluMLP.apply(x, fc, proj))
        )


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), cos, sin)
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
        last_only: bool = False,
    ) -> Tensor:
        """idx (B, T) int64 -> logits (B, T, V) float32, or (B, 1, V) of the last position with last_only.

        With targets (B, T) int64: the cross-entropy in nats instead, float32, of those that are not -1; "mean" or
        "sum" gives a scalar, "none" (B, T), without a gradient. Raises TypeError and ValueError for arguments that do
        not fit.

        torch.func's transforms, forward-mode AD and, on the torch backend, second derivatives work; they run in plain
        torch, which keeps more, and without grad_checkpoint.
        """
        if idx.dtype != torch.int64:
            raise TypeError(f"idx is {idx.dtype}; it takes int64")
        if idx.ndim != 2 or idx.numel() == 0:
            raise ValueError(f"idx has shape {tuple(idx.shape)}; it takes (B, T), both at least 1")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}, idx {tuple(idx.shape)}; they must agree")
        if targets is not None and last_only:
            raise ValueError("targets cannot be combined with last_only: the loss covers whole sequences")
        length = idx.size(1)
        if length > self.max_positions:
            raise ValueError(
                f"a sequence of {length} tokens; this model of sequence_len {self.config.sequence_len} "
                f"has positions for {self.max_positions}"
            )

        cos, sin = self.cos[:, :length], self.sin[:, :length]
        x = self.wte(idx).to(self.compute_dtype)
        x = norm(x)
        for block in self.blocks:
            if self.grad_checkpoint and torch.is_grad_enabled() and not ops.beyond_backward(x):
                weights = dict(block.named_parameters())  # those of now, should a functional_call end before backward
                x = checkpoint(
                    _call_with, block, weights, x, cos, sin, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, cos, sin)
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
        """Return the floating-point operations of a token, forward and backward; see flops.flops_per_token."""
        return flops_per_token(self.config, self.num_params())
