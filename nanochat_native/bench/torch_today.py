"""The baseline of the training step of --recipe today: the model and the optimizers in torch's own calls."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.bench.torch_baseline import norm, rotate
from nanochat_native.model.config import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, GPTConfig
from nanochat_native.ops.newton_schulz import COEFFICIENTS


class TodayBlock(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.qk_scale = config.n_head, config.qk_scale
        self.attn = nn.ModuleDict({name: nn.Linear(C, C, bias=False) for name in ("c_q", "c_k", "c_v", "c_proj")})
        if config.has_value_embedding(layer):
            self.attn["ve_gate"] = nn.Linear(VALUE_GATE_CHANNELS, config.n_kv_head, bias=False)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias=False), "c_proj": nn.Linear(4 * C, C, bias=False)})

    def forward(self, x: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape
        h = norm(x)
        q, k, v = (self.attn[name](h).view(B, T, self.n_head, -1) for name in ("c_q", "c_k", "c_v"))
        if values is not None:
            gate = 3 * torch.sigmoid(self.attn["ve_gate"](h[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * values.view(v.shape)
        q, k = (norm(rotate(y, cos, sin)) * self.qk_scale for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp["c_proj"](F.relu(self.mlp["c_fc"](norm(x))).square())


class TorchToday(nn.Module):
    """The model of --architecture today in torch's calls, with the parameter names of GPT. n_kv_head = n_head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        rows, layers = config.padded_vocab_size, range(config.n_layer)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, config.n_embd),
                "h": nn.ModuleList([TodayBlock(config, layer) for layer in layers]),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
        self.smear_lambda, self.backout_lambda = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.value_embeds = nn.ModuleDict(
            {str(layer): nn.Embedding(rows, config.n_embd) for layer in layers if config.has_value_embedding(layer)}
        )
        D, T = config.head_dim, config.sequence_len
        frequencies = config.rotary_base ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
        angles = torch.outer(torch.arange(T, dtype=torch.float32), frequencies)[None, :, None, :]
        self.cos, self.sin = angles.cos(), angles.sin()
        distance = torch.arange(T)[:, None] - torch.arange(T)
        short = {window: (distance >= 0) & (distance <= window) for window in config.windows if window and window < T}
        self.masks = [short.get(window or T) for window in config.windows]

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        e = norm(self.transformer["wte"](idx))
        gate = self.smear_lambda * torch.sigmoid(self.smear_gate(e[:, 1:, :SMEAR_CHANNELS]))
        x = x0 = torch.cat((e[:, :1], e[:, 1:] + gate * e[:, :-1]), dim=1)
        middle = x
        for layer, block in enumerate(self.transformer["h"].children()):
            x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            values = self.value_embeds[str(layer)](idx) if str(layer) in self.value_embeds else None
            x = block(x, values, self.cos, self.sin, self.masks[layer])
            middle = x if layer == self.config.n_layer // 2 else middle
        logits = self.lm_head(norm(x - self.backout_lambda * middle))[..., : self.config.vocab_size]
        logits = 15 * torch.tanh(logits / 15)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class TodayMuon(torch.optim.Optimizer):
    """Muon of --recipe today, on a stack of the matrices of one shape."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        groups = [{"params": [p for p in params if p.shape == shape]} for shape in sorted({p.shape for p in params})]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            p, g = (torch.stack([*tensors]) for tensors in (group["params"], [p.grad for p in group["params"]]))
            rows, columns = p.shape[1:]
            axis = -1 if rows >= columns else -2
            state = self.state[group["params"][0]]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(g)
                state["second"] = torch.zeros_like(g.mean(axis, keepdim=True))
            state["momentum_buffer"].lerp_(g, 1 - group["momentum"])
            x = g.lerp_(state["momentum_buffer"], group["momentum"])
            size = x.norm(dim=(-2, -1), keepdim=True)
            x = x * (size / math.sqrt(rows) / x.norm(dim=-1, keepdim=True).clamp_min(1e-6))
            x = _polar_express(x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6))
            x = x * (math.sqrt(min(rows, columns)) / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6))
            state["second"].lerp_(x.square().mean(axis, keepdim=True), 0.1)
            w = x * state["second"].clamp_min(1e-10).rsqrt()
            w *= x.norm(dim=(-2, -1), keepdim=True) / w.norm(dim=(-2, -1), keepdim=True)
            lr = group["lr"] * max(1.0, rows / columns) ** 0.5
            p.sub_(lr * w + lr * group["weight_decay"] * p * (w * p >= 0))
            torch._foreach_copy_(group["params"], list(p.unbind()))


def _polar_express(x: Tensor) -> Tensor:
    """Run the five steps on a stack (N, M, K) in float32, by whichever product is smaller."""
    tall = x.size(-2) > x.size(-1)
    for a, b, c in COEFFICIENTS["polar_express"]:
        gram = x.mT @ x if tall else x @ x.mT
        gram = b * gram + c * (gram @ gram)
        x = a * x + (x @ gram if tall else gram @ x)
    return x


def today_optimizers(model: TorchToday) -> list[torch.optim.Optimizer]:
    """Return the optimizers of --recipe today, with the rates and the decay of setup_optimizers."""
    scale = (model.lm_head.weight.size(1) / 768) ** -0.5
    smear = [model.smear_gate.weight, model.smear_lambda, model.backout_lambda]
    settings = (
        ([model.lm_head.weight], 0.008 * scale, (0.8, 0.96), 0.01),
        ([model.transformer["wte"].weight], 0.3 * scale, (0.8, 0.995), 0.001),
        (list(model.value_embeds.parameters()), 0.15 * scale, (0.8, 0.995), 0.01),
        ([model.resid_lambdas], 0.005, (0.8, 0.95), 0.05),
        ([model.x0_lambdas], 0.5, (0.96, 0.95), 0.0),
        (smear, 0.2, (0.8, 0.95), 0.0),
    )
    names = ("params", "lr", "betas", "weight_decay")
    adamw = torch.optim.AdamW([dict(zip(names, group, strict=True)) for group in settings], eps=1e-10, fused=True)
    return [adamw, TodayMuon(list(model.transformer["h"].parameters()), lr=0.02, weight_decay=0.28)]
