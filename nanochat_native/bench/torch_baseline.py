"""The baseline of the training step: the same model and optimizers in torch's own calls, as nanochat writes them."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.functional import EPS


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class TorchBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.attn = nn.ModuleDict({name: nn.Linear(C, C, bias=False) for name in ("c_q", "c_k", "c_v", "c_proj")})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias=False), "c_proj": nn.Linear(4 * C, C, bias=False)})

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        h = norm(x)
        q, k, v = (self.attn[name](h).view(B, T, self.n_head, -1) for name in ("c_q", "c_k", "c_v"))
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp["c_proj"](F.relu(self.mlp["c_fc"](norm(x))).square())


class TorchGPT(nn.Module):
    """The model in torch's calls, with the parameter names of GPT. Full attention only, n_kv_head = n_head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList([TorchBlock(config) for _ in range(config.n_layer)]),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        D = config.n_embd // config.n_head
        frequencies = 10000 ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
        angles = torch.outer(torch.arange(config.sequence_len, dtype=torch.float32), frequencies)[None, :, None, :]
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        cos, sin = self.cos[:, : idx.size(1)], self.sin[:, : idx.size(1)]
        x = norm(self.transformer["wte"](idx))
        for block in self.transformer["h"].children():
            x = block(x, cos, sin)
        logits = 15 * torch.tanh(self.lm_head(norm(x)) / 15)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def newton_schulz_by_mm(g: Tensor) -> Tensor:
    """Run five quintic steps in float32. torch.optim.Muon uses bfloat16, which is many times slower on a CPU."""
    x = g.mT if g.size(-2) > g.size(-1) else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = torch.mm(x, x.mT)
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if g.size(-2) > g.size(-1) else x


def newton_schulz_by_matmul(g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Run five quintic steps on a batch (B, M, K), as nanochat writes them."""
    x = g.to(dtype)
    if g.size(-2) > g.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if g.size(-2) > g.size(-1) else x


class Float32Muon(torch.optim.Optimizer):
    """Muon with newton_schulz_by_mm."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = newton_schulz_by_mm(p.grad.lerp_(state["momentum_buffer"], group["momentum"]))
                p.add_(update, alpha=-group["lr"] * max(1.0, p.size(0) / p.size(1)) ** 0.5)


def torch_optimizers(model: TorchGPT) -> list[torch.optim.Optimizer]:
    """Return nanochat's optimizers, with the learning rates of setup_optimizers."""
    wte, lm_head = model.transformer["wte"].weight, model.lm_head.weight
    scale = (lm_head.size(1) / 768) ** -0.5
    groups = [{"params": [lm_head], "lr": 0.004 * scale}, {"params": [wte], "lr": 0.2 * scale}]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    matrices = list(model.transformer["h"].parameters())
    return [adamw, Float32Muon(matrices, lr=0.02)]
