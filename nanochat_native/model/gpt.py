"""The transformer: nanochat's first architecture (October 2025), NanoChatForCausalLM in transformers.

    x = norm(wte[idx])
    x += attention(norm(x)), x += mlp(norm(x))     in each block
    logits = 15 tanh(lm_head(norm(x)) / 15)

RMSNorm without weights, rotary positions followed by QK-norm, squared ReLU, untied embeddings, no biases.

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
from nanochat_native.model.functional import (
    add_norm,
    embedding_norm,
    linears,
    rotary_norm,
    squared_relu_mlp,
    weight_for,
)

SOFTCAP = 15.0
ROTARY_BASE = 10000
ROTARY_SPAN = 10  # rotary positions cover this many times sequence_len, so that samples may exceed it


class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return linears(input, [self.weight])[0]


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
        """Return q (B, T, H, D) and k, v (B, T, Hkv, D), the arguments of attention, for x (B, T, C)."""
        weights = [self.c_q.weight, self.c_k.weight, self.c_v.weight]
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in linears(x, weights))
        q, k = rotary_norm(q, k, cos, sin)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        return cast(Tensor, self.c_proj(ops.attention(q, k, v, window=self.window).flatten(-2)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return squared_relu_mlp(x, self.c_fc.weight, self.c_proj.weight)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, n: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual stream and its norm after the block, for the stream x (B, T, C) and its norm n."""
        x, n = add_norm(x, self.attn(n, cos, sin))
        return add_norm(x, self.mlp(n))


def _recompute(block: Block, weights: dict[str, Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Call the block with `weights`: checkpoint passes only its own arguments to saved-tensor hooks."""
    x, n = add_norm(x, None)
    return cast(Tensor, functional_call(block, weights, (x, n, cos, sin))[0])


class GPT(nn.Module):
    """The model. Parameters are float32; under torch.autocast the blocks run in autocast's dtype.

    Build it directly, or without allocating memory: `with torch.device("meta"): model = GPT(config)`, then
    `model.to_empty(device=...)`. Call init_weights() before training in both cases; it gives the same weights, on every
    device.

    Args:
        grad_checkpoint: Save only the input of each block and recompute the block in the backward pass; same bits.
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
        """Largest number of tokens in a sequence: sequence_len in training, and more for generation."""
        return ROTARY_SPAN * self.config.sequence_len

    def init_rotary(self) -> None:
        """Compute the rotary tables in float32; needed after to_empty() unless init_weights() is called."""
        device = self.wte.weight.device
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / (ROTARY_BASE ** (half / self.config.head_dim))
        positions = torch.arange(self.max_positions, dtype=torch.float32, device=device)
        angles = torch.outer(positions, frequencies)[None, :, None, :]
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initialize as nanochat does; a seed gives the same weights on every device.

        wte is standard normal; matrices are normal with std min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in); lm_head and
        every c_proj are zero, so that the first loss is ln V.
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
        """Return logits (B, T, V) in float32, or with targets the cross-entropy in nats.

        torch.func's transforms, forward-mode AD and, on the torch backend, second derivatives work; they run in plain
        torch, which saves more, and without grad_checkpoint.

        Args:
            idx: (B, T) int64.
            targets: (B, T) int64; -1 is ignored.
            reduction: "mean" or "sum" for a scalar loss, "none" for (B, T) without a gradient.
            last_only: Return logits (B, 1, V) of the last position only.

        Raises TypeError and ValueError for arguments that do not fit.
        """
        if idx.dtype != torch.int64:
            raise TypeError(f"idx must be int64, got {idx.dtype}")
        if idx.ndim != 2 or idx.numel() == 0:
            raise ValueError(f"idx must have shape (B, T), both >= 1, got {tuple(idx.shape)}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets must have the shape of idx, {tuple(idx.shape)}, got {tuple(targets.shape)}")
        if targets is not None and last_only:
            raise ValueError("targets cannot be combined with last_only: the loss covers whole sequences")
        length = idx.size(1)
        if length > self.max_positions:
            raise ValueError(
                f"idx must have at most {self.max_positions} tokens in a sequence, {ROTARY_SPAN} times sequence_len "
                f"{self.config.sequence_len}, got {length}"
            )

        cos, sin = self.cos[:, :length], self.sin[:, :length]
        x = embedding_norm(idx, self.wte.weight, self.compute_dtype)
        if self.grad_checkpoint and torch.is_grad_enabled() and not ops.beyond_backward(x):
            for block in self.blocks:
                weights = dict(block.named_parameters())  # current ones: a functional_call may end before backward
                x = checkpoint(_recompute, block, weights, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            _, n = add_norm(x, None)
        else:
            x, n = add_norm(x, None)
            for block in self.blocks:
                x, n = block(x, n, cos, sin)
        n = n[:, -1:] if last_only else n

        if targets is not None:
            weight = weight_for(self.lm_head.weight, n.dtype)
            return ops.linear_cross_entropy(n, weight, targets, softcap=SOFTCAP, reduction=reduction)
        logits = self.lm_head(n)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (logits / SOFTCAP).tanh_() * SOFTCAP

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the activations: autocast's dtype if it is enabled, otherwise that of the parameters."""
        device_type = self.wte.weight.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.wte.weight.dtype

    def num_params(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def estimate_flops(self) -> int:
        """Return the floating-point operations of a token, forward and backward; see flops.flops_per_token."""
        return flops_per_token(self.config, self.num_params())
