"""nanochat's architecture and recipe of July 2026 in torch's own calls, as one function each.

It shares no code with the package. Parameters are a dict with nanochat's names.
"""

import math

import torch
import torch.nn.functional as F

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def golden_batch(step, vocab, length, rows):
    """Return the inputs and the targets (rows, length) of a step of the golden run."""
    i = torch.arange(rows * (length + 1)) + step * rows * (length + 1)
    tokens = ((31 * i**2 + 17 * i + 5 * (i // 7)) % vocab).view(rows, length + 1)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss(params, shape, idx, targets):
    """Return the mean cross-entropy. shape: n_layer, n_head, n_kv_head, sequence_len, vocab_size, pattern."""
    return F.cross_entropy(logits(params, shape, idx).flatten(0, 1), targets.flatten(), ignore_index=-1)


def logits(params, shape, idx):
    """Return (B, T, V)."""
    layers, heads, kv_heads, length, vocab, pattern = shape
    (B, T), dtype = idx.shape, params["lm_head.weight"].dtype
    C = params["lm_head.weight"].size(1)
    D = C // heads
    angles = torch.outer(torch.arange(T).float(), 1.0 / 100_000 ** (torch.arange(0, D, 2).float() / D))
    cos, sin = (table.to(dtype)[None, :, None] for table in (angles.cos(), angles.sin()))
    short = math.ceil(length / 4 / 128) * 128

    def norm(x):
        return x * (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()

    def rotate(x):
        x1, x2 = x.chunk(2, -1)
        return 1.2 * norm(torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1))

    e = norm(params["transformer.wte.weight"][idx])
    gate = params["smear_lambda"] * (e[:, 1:, :24] @ params["smear_gate.weight"].T).sigmoid()
    x = x0 = torch.cat((e[:, :1], e[:, 1:] + gate * e[:, :-1]), 1)
    for i in range(layers):
        block = f"transformer.h.{i}."
        x = params["resid_lambdas"][i] * x + params["x0_lambdas"][i] * x0
        h = norm(x)
        q, k, v = (
            (h @ params[f"{block}attn.c_{name}.weight"].T).view(B, T, count, D)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if i % 2 == (layers - 1) % 2:
            gates = 3 * (h[..., :12] @ params[f"{block}attn.ve_gate.weight"].T).sigmoid()
            v = v + gates[..., None] * params[f"value_embeds.{i}.weight"][idx].view(B, T, kv_heads, D)
        q, k = rotate(q), rotate(k)
        k, v = (y.repeat_interleave(heads // kv_heads, 2) for y in (k, v))
        distance = torch.arange(T)[:, None] - torch.arange(T)
        window = short if pattern[i % len(pattern)] == "S" and i < layers - 1 else length
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D)
        scores = scores.masked_fill((distance < 0) | (distance > window), -torch.inf)
        a = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(B, T, C)
        x = x + a @ params[f"{block}attn.c_proj.weight"].T
        x = x + (norm(x) @ params[f"{block}mlp.c_fc.weight"].T).relu().square() @ params[f"{block}mlp.c_proj.weight"].T
        if i == layers // 2:
            middle = x
    x = norm(x - params["backout_lambda"] * middle)
    return 15 * torch.tanh((x @ params["lm_head.weight"].T)[..., :vocab] / 15)


class Recipe:
    """The optimizer of July 2026, with the schedules of the golden run.

    params: updated in place by step(), whose gradients must be there.
    """

    def __init__(self, params, steps, warmup, momentum_warmup):
        self.params, self.steps, self.warmup, self.momentum_warmup = params, steps, warmup, momentum_warmup
        self.state = {name: {} for name in params}

    def schedules(self, it):
        """Return the multiplier of the rates, Muon's momentum and Muon's decay."""
        down = round(0.65 * self.steps)
        left = (self.steps - it) / down
        rate = (it + 1) / self.warmup if it < self.warmup else 1.0 if left >= 1 else left + (1 - left) * 0.05
        momentum = 0.97 if left > 1 else 0.90 + 0.07 * left
        if it < self.momentum_warmup:
            momentum = 0.85 + 0.12 * it / self.momentum_warmup
        return rate, momentum, 0.28 * (1 + math.cos(math.pi * it / self.steps)) / 2

    @torch.no_grad()
    def step(self, it):
        rate, momentum, decay = self.schedules(it)
        for name, p in self.params.items():
            if name.startswith("transformer.h."):
                self.muon(p, self.state[name], 0.02 * rate, momentum, decay)
            else:
                self.adamw(p, self.state[name], it + 1, rate, *self.group(name))

    def group(self, name):
        """Return the rate, the betas and the decay of a parameter."""
        scale = (self.params["lm_head.weight"].size(1) / 768) ** -0.5
        if name == "lm_head.weight":
            return 0.008 * scale, (0.8, 0.96), 0.01
        if name == "transformer.wte.weight":
            return 0.3 * scale, (0.8, 0.995), 0.001
        if name.startswith("value_embeds."):
            return 0.15 * scale, (0.8, 0.995), 0.01
        if name == "resid_lambdas":
            return 0.005, (0.8, 0.95), 0.05
        return (0.5, (0.96, 0.95), 0.0) if name == "x0_lambdas" else (0.2, (0.8, 0.95), 0.0)

    @staticmethod
    def adamw(p, state, t, rate, lr, betas, decay):
        m, v = state.setdefault("m", torch.zeros_like(p)), state.setdefault("v", torch.zeros_like(p))
        m.lerp_(p.grad, 1 - betas[0])
        v.lerp_(p.grad.square(), 1 - betas[1])
        p.mul_(1 - rate * lr * decay)
        p.sub_(rate * lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-10))

    @staticmethod
    def muon(p, state, lr, momentum, decay):
        rows, columns = p.shape
        axis = 1 if rows >= columns else 0
        buffer = state.setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - momentum)
        u = p.grad.lerp(buffer, momentum)
        u = u * (u.norm() / math.sqrt(rows) / u.norm(dim=1, keepdim=True).clamp_min(1e-6))
        x = u / (1.01 * u.norm() + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            gram = x.T @ x if rows > columns else x @ x.T
            gram = b * gram + c * gram @ gram
            x = a * x + (x @ gram if rows > columns else gram @ x)
        x = x * (math.sqrt(min(rows, columns)) / x.norm().clamp_min(1e-6))
        mean = x.square().mean(axis, keepdim=True)
        second = state.setdefault("v", torch.zeros_like(mean)).lerp_(mean, 0.1)
        w = x / second.clamp_min(1e-10).sqrt()
        w = w * (x.norm() / w.norm())
        lr = lr * math.sqrt(max(1, rows / columns))
        p.sub_(lr * w + lr * decay * p * (w * p >= 0))
