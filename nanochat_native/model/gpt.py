"""The transformer: nanochat's architectures.

The first one (October 2025, NanoChatForCausalLM in transformers):

    x = norm(wte[idx])
    x += attention(norm(x)), x += mlp(norm(x))     in each block
    logits = 15 tanh(lm_head(norm(x)) / 15)

RMSNorm without weights, rotary positions followed by QK-norm, squared ReLU, untied embeddings, no biases.

The parts that GPTConfig names were added later. With all of them (July 2026):

    x = smear(norm(wte[idx])), x0 = x              each token gets a gated part of the one before
    x = resid_lambda x + x0_lambda x0              at the start of each block
    v += gate value_embed[idx]                     in every second block
    x -= backout_lambda m                          at the end, for the stream m after the middle block

Shape letters: B batch, T tokens, C channels, H query heads, Hkv key/value heads, D head size, V vocabulary, Vp rows of
the embeddings.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from nanochat_native import ops
from nanochat_native.model.config import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, GPTConfig
from nanochat_native.model.documents import Documents
from nanochat_native.model.flops import flops_per_token
from nanochat_native.model.functional import (
    add_norm,
    embedding_norm,
    linears,
    mix_norm,
    project,
    rotary_norm,
    smear,
    squared_relu_mlp,
    weight_for,
)
from nanochat_native.ops.float8 import RECIPES, takes

SOFTCAP = 15.0
ROTARY_SPAN = 10  # rotary positions cover this many times sequence_len, so that samples may exceed it


class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input."""

    float8: str | None = None  # see GPT.use_float8

    def forward(self, input: Tensor) -> Tensor:
        return linears(input, [self.weight], self.float8)[0]


class Attention(nn.Module):
    float8: str | None = None

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.window = config.windows[layer]
        self.head_dim = config.head_dim
        self.qk_scale = config.qk_scale
        kv_channels = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = Linear(config.n_embd, kv_channels, bias=False)
        self.c_v = Linear(config.n_embd, kv_channels, bias=False)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=False)
        if config.has_value_embedding(layer):
            self.ve_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head, bias=False)

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, values: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, T, H, D) and k, v (B, T, Hkv, D), the arguments of attention, for x (B, T, C)."""
        weights = [self.c_q.weight, self.c_k.weight, self.c_v.weight]
        if values is None:
            qkv = linears(x, weights, self.float8)
        else:
            qkv = project(x, weights, self.ve_gate.weight, *values, self.float8)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in qkv)
        q, k = rotary_norm(q, k, cos, sin, self.qk_scale)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        values: tuple[Tensor, Tensor] | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        q, k, v = self.project(x, cos, sin, values)
        if documents is None:
            found = ops.attention(q, k, v, window=self.window)
        else:
            found = documents.attention(q, k, v, self.window)
        return cast(Tensor, self.c_proj(found.flatten(-2)))


class MLP(nn.Module):
    float8: str | None = None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return squared_relu_mlp(x, self.c_fc.weight, self.c_proj.weight, self.float8)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        n: Tensor,
        cos: Tensor,
        sin: Tensor,
        values: tuple[Tensor, Tensor] | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return two terms whose sum is the residual stream after the block: the stream before the MLP, and its output.

        Args:
            x: (B, T, C), the stream.
            n: its norm.
            values: the table of the value embeddings and the tokens, in a layer that has them.
            documents: Those of x. Attention does not cross them.
        """
        x, n = add_norm(x, self.attn(n, cos, sin, values, documents))
        return x, self.mlp(n)


def _begin_block(
    x: Tensor, y: Tensor | None, x0: Tensor, scales: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the stream x + y before the block, the stream that the block takes, its norm, and x0."""
    if scales is None:
        x, n = add_norm(x, y)
        return x, x, n, x0
    return mix_norm(x, y, x0, *scales)


def _recompute(
    block: Block,
    weights: dict[str, Tensor],
    scales: tuple[Tensor, Tensor] | None,
    x: Tensor,
    x0: Tensor,
    cos: Tensor,
    sin: Tensor,
    values: tuple[Tensor, Tensor] | None,
    documents: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the stream before the block and after it, and x0. checkpoint passes only its own arguments to saved-tensor
    hooks, so the block is called with `weights`."""
    z, x, n, x0 = _begin_block(x, None, x0, scales)
    x, y = functional_call(block, weights, (x, n, cos, sin, values, documents))
    return z, x + y, x0


def _weighted_loss(n: Tensor, weight: Tensor, targets: Tensor, row_weights: Sequence[float]) -> Tensor:
    """Return the sum of the cross-entropies, each times the weight of its row.

    The operator has one factor for all its rows, so the rows of equal weight share a call. Positions without a target
    are left out.
    """
    parts = []
    for factor in dict.fromkeys(row_weights):
        rows = [row for row, other in enumerate(row_weights) if other == factor]
        chosen = targets[rows]
        counts = chosen != -1
        loss = ops.linear_cross_entropy(n[rows][counts], weight, chosen[counts], softcap=SOFTCAP, reduction="sum")
        parts.append(factor * loss)
    return torch.stack(parts).sum()


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
        rows, layers = config.padded_vocab_size, range(config.n_layer)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, config.n_embd),
                "h": nn.ModuleList([Block(config, layer) for layer in layers]),
            }
        )
        self.lm_head = Linear(config.n_embd, rows, bias=False)
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        if config.value_embeddings:
            channels = config.n_kv_head * config.head_dim
            self.value_embeds = nn.ModuleDict(
                {str(layer): nn.Embedding(rows, channels) for layer in layers if config.has_value_embedding(layer)}
            )
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
        frequencies = 1.0 / (self.config.rotary_base ** (half / self.config.head_dim))
        positions = torch.arange(self.max_positions, dtype=torch.float32, device=device)
        angles = torch.outer(positions, frequencies)[None, :, None, :]
        self.register_buffer("cos", torch.cat((angles, angles), dim=-1).cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initialize as nanochat does; a seed gives the same weights on every device.

        With the initialization "normal" (October 2025), wte is standard normal, the matrices of the blocks are normal
        with std min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in), and lm_head is zero, so that the first loss is ln V.
        Value embeddings and the gate of smear, which that model had not, are standard normal too. With "uniform", wte
        has std 0.8 and lm_head 0.001; matrices and value embeddings are uniform in +-sqrt(3 / C), c_fc in 0.4 of that,
        and gates in [0, 0.02]. Every c_proj is zero in both cases.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.config.initialization == "normal":
            self._init_normal(generator)
        else:
            self._init_uniform(generator)
        self._init_scalars()
        self.init_rotary()

    def _init_normal(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if name == "lm_head.weight" or name.endswith("c_proj.weight"):
                parameter.zero_()
            elif parameter.ndim == 2:
                fan_out, fan_in = parameter.shape
                std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
                std = std if name.startswith("transformer.h.") else 1.0
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    def _init_uniform(self, generator: torch.Generator) -> None:
        def normal(parameter: Tensor, std: float) -> None:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

        def uniform(parameter: Tensor, low: float, high: float) -> None:
            parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=generator))

        bound = 3**0.5 * self.config.n_embd**-0.5
        normal(self.wte.weight, 0.8)
        normal(self.lm_head.weight, 0.001)
        for block in self.blocks:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                uniform(linear.weight, -bound, bound)
            block.attn.c_proj.weight.zero_()
            uniform(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            block.mlp.c_proj.weight.zero_()
        if self.config.smear:
            uniform(self.smear_gate.weight, 0.0, 0.02)
        if self.config.value_embeddings:
            for embedding in self.value_embeds.values():
                uniform(cast(nn.Embedding, embedding).weight, -bound, bound)
            for block in self.blocks:
                if hasattr(block.attn, "ve_gate"):
                    uniform(block.attn.ve_gate.weight, 0.0, 0.02)

    def _init_scalars(self) -> None:
        last = max(self.config.n_layer - 1, 1)
        if self.config.residual_scalars:
            for layer in range(self.config.n_layer):
                self.resid_lambdas[layer] = 1.15 - 0.10 * layer / last
                self.x0_lambdas[layer] = 0.20 - 0.15 * layer / last
        if self.config.smear:
            self.smear_lambda.fill_(0.0)
        if self.config.backout:
            self.backout_lambda.fill_(0.2)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        last_only: bool = False,
        row_weights: Sequence[float] | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Return logits (B, T, V) in float32, or with targets the cross-entropy in nats.

        torch.func's transforms, forward-mode AD and, on the torch backend, second derivatives work; they run in plain
        torch, which saves more, and without grad_checkpoint.

        Args:
            idx: (B, T) int64.
            targets: (B, T) int64; -1 is ignored.
            reduction: "mean" or "sum" for a scalar loss, "none" for (B, T) without a gradient.
            last_only: Return logits (B, 1, V) of the last position only.
            row_weights: B factors, and the loss is a scalar: the sum over the sequences of the factor times the sum of
                the cross-entropies of the sequence. `reduction` must be "sum".
            documents: Those of idx. Each is read as if it were alone in its row. torch.func's transforms and
                forward-mode AD do not work with them.

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
        if row_weights is not None and (targets is None or reduction != "sum" or len(row_weights) != idx.size(0)):
            raise ValueError(
                f"row_weights must have {idx.size(0)} numbers, with targets and the reduction 'sum', "
                f"got {len(row_weights)} and {reduction!r}"
            )
        length = idx.size(1)
        if length > self.max_positions:
            raise ValueError(
                f"idx must have at most {self.max_positions} tokens in a sequence, {ROTARY_SPAN} times sequence_len "
                f"{self.config.sequence_len}, got {length}"
            )

        if documents is not None and documents.positions.numel() != idx.numel():
            raise ValueError(f"documents must be those of idx, got {documents.positions.numel()} tokens in them")

        n = self.hidden_states(idx, documents)
        n = n if documents is None else n.view(*idx.shape, -1)
        n = n[:, -1:] if last_only else n

        if targets is None:
            return self.logits(n)
        weight = self._head_weight(n.dtype)
        if row_weights is not None:
            return _weighted_loss(n, weight, targets, row_weights)
        return ops.linear_cross_entropy(n, weight, targets, softcap=SOFTCAP, reduction=reduction)

    def logits(self, n: Tensor) -> Tensor:
        """Return the logits (..., V), float32 or wider, for rows (..., C) of hidden_states."""
        logits = linears(n, [self._head_weight(n.dtype)])[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (logits / SOFTCAP).tanh_() * SOFTCAP

    def _head_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the rows (V, C) of lm_head, without its padding, in dtype."""
        weight = weight_for(self.lm_head.weight, dtype)
        if self.config.padded_vocab_size > self.config.vocab_size:
            weight = weight[: self.config.vocab_size]
        return weight

    def hidden_states(self, idx: Tensor, documents: Documents | None = None) -> Tensor:
        """Return the norm of the stream after the last block, (B, T, C): the input of lm_head. With documents
        it is (1, B T, C). See forward for the arguments."""
        config = self.config
        if documents is None:
            cos, sin = self.cos[:, : idx.size(1)], self.sin[:, : idx.size(1)]
        else:  # the rows as one sequence, because each token has a position of its own
            idx = idx.reshape(1, -1)
            cos, sin = self.cos[:, documents.positions], self.sin[:, documents.positions]
        x = embedding_norm(idx, self.wte.weight, self.compute_dtype)
        if config.smear:
            smeared = smear(x, self.smear_gate.weight, self.smear_lambda)
            x = smeared if documents is None else torch.where(documents.is_first, x, smeared)
        recompute = self.grad_checkpoint and torch.is_grad_enabled() and not ops.beyond_backward(x)
        # The stream is x + y: the operator that begins the next block adds the MLP's output y.
        x0, y, middle = x, None, None
        for layer, (block, scales) in enumerate(zip(self.blocks, self._residual_scales(), strict=True)):
            values = (self.value_embeds[str(layer)].weight, idx) if config.has_value_embedding(layer) else None
            if recompute:
                weights = dict(block.named_parameters())  # current ones: a functional_call may end before backward
                arguments = (block, weights, scales, x, x0, cos, sin, values, documents)
                z, x, x0 = checkpoint(_recompute, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                z, x, n, x0 = _begin_block(x, y, x0, scales)
                x, y = block(x, n, cos, sin, values, documents)
            if config.backout and layer == config.n_layer // 2 + 1:
                middle = z
        if not config.backout:
            return add_norm(x, y)[1]
        if middle is None:  # the middle block is the last one
            x, y = x if y is None else x + y, None
            middle = x
        return mix_norm(x, y, middle, torch.ones_like(self.backout_lambda), -self.backout_lambda)[2]

    def _residual_scales(self) -> list[tuple[Tensor, Tensor] | None]:
        """Return the factors of the stream and of x0 for each block; None where there are none."""
        if not self.config.residual_scalars:
            return [None] * self.config.n_layer
        return list(zip(self.resid_lambdas.unbind(), self.x0_lambdas.unbind(), strict=True))

    def use_float8(self, recipe: str | None) -> int:
        """Let the linear layers of the blocks multiply in FP8 in training: calls that record gradients, in bfloat16.

        Layers whose sizes do not suit FP8 and lm_head stay in bfloat16, and so do evaluation and generation. Weights
        and their gradients stay float32.

        Args:
            recipe: one of float8.RECIPES; None for no FP8.

        Returns:
            The number of layers that multiply in FP8.

        Raises:
            ValueError: There is no such recipe.
        """
        if recipe not in (None, *RECIPES):
            raise ValueError(f"recipe must be None, {' or '.join(RECIPES)}, got {recipe!r}")
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, (Linear, Attention, MLP)):
                    module.float8 = recipe
        layers = [module for block in self.blocks for module in block.modules() if isinstance(module, Linear)]
        return sum(takes(layer.weight) for layer in layers) if recipe else 0

    @property
    def num_linears(self) -> int:
        """The number of linear layers."""
        return sum(isinstance(module, Linear) for module in self.modules())

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
