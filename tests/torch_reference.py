"""nanochat's first model and optimizers, written with torch's own calls: what the tests compare the package with."""

import math

import torch
import torch.nn.functional as F

EPS = 2.0**-23


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def rotate(x):
    """x (B, T, H, D)."""
    T, D = x.size(1), x.size(3)
    frequencies = 1.0 / (10000 ** (torch.arange(0, D, 2, dtype=torch.float32) / D))
    angles = torch.outer(torch.arange(T, dtype=torch.float32), frequencies)[None, :, None].to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * angles.cos() + x2 * angles.sin(), -x1 * angles.sin() + x2 * angles.cos()], dim=-1)


def attention(q, k, v, window):
    """softmax by the definition; window: how many earlier keys a query sees, None for all."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    i, j = torch.arange(q.size(2))[:, None], torch.arange(k.size(2))
    seen = (j <= i) if window is None else (j <= i) & (j >= i - window)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(1, 2)


def logits(weights, config, windows, idx):
    """weights: name -> tensor. windows: per layer. Returns (B, T, V)."""
    B, T = idx.shape
    D = config.n_embd // config.n_head
    x = norm(F.embedding(idx, weights["transformer.wte.weight"]))
    for layer, window in enumerate(windows):

        def linear(x, name, layer=layer):
            return x @ weights[f"transformer.h.{layer}.{name}.weight"].T

        y = norm(x)
        q = norm(rotate(linear(y, "attn.c_q").view(B, T, config.n_head, D)))
        k = norm(rotate(linear(y, "attn.c_k").view(B, T, config.n_kv_head, D)))
        v = linear(y, "attn.c_v").view(B, T, config.n_kv_head, D)
        x = x + linear(attention(q, k, v, window).reshape(B, T, -1), "attn.c_proj")
        x = x + linear(linear(norm(x), "mlp.c_fc").relu() ** 2, "mlp.c_proj")
    return 15 * torch.tanh(norm(x) @ weights["lm_head.weight"].T / 15)


def loss(weights, config, windows, idx, targets):
    return F.cross_entropy(logits(weights, config, windows, idx).flatten(0, 1), targets.flatten(), ignore_index=-1)


def newton_schulz(g):
    x = g / g.norm().clamp(min=1e-30)
    if g.size(0) > g.size(1):
        x = x.T
    for _ in range(5):
        A = x @ x.T
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x.T if g.size(0) > g.size(1) else x


def newton_schulz_in(dtype, g, triples, norm_factor=1.0):
    """The plain steps on matrices (..., M, K), each product rounded to `dtype`, as tensor cores do it, and summed in
    float32 or, if it is that, float64; the last is not rounded."""
    wide = torch.promote_types(dtype, torch.float32)
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).double()
    x = (x / (norm_factor * torch.linalg.matrix_norm(x)[..., None, None])).to(dtype).to(wide)
    for index, (a, b, c) in enumerate(triples):
        gram = (x @ x.mT).to(dtype).to(wide)
        x = a * x + (b * gram + c * gram @ gram).to(dtype).to(wide) @ x
        if index + 1 < len(triples):
            x = x.to(dtype).to(wide)
    return x.mT if tall else x


def muon_step(matrices, buffers, lr, momentum, seconds=None, **options):
    """options and seconds, the state of normuon, as Muon has them: one matrix after another, by the formulas."""
    with torch.no_grad():
        for index, (p, buf) in enumerate(zip(matrices, buffers, strict=True)):
            buf.lerp_(p.grad, 1 - momentum)
            update = p.grad.lerp(buf, momentum)
            heads, dim = options.get("heads", 1), ("rows", "columns").index(options.get("head_axis", "rows"))
            blocks = [orthogonal_block(block, options) for block in update.chunk(heads, dim=dim)]
            scale = max(1, blocks[0].size(0) / blocks[0].size(1)) ** 0.5
            update = torch.cat(blocks, dim=dim)
            if options.get("normuon"):
                update = less_variance(update, seconds[index], options.get("beta2", 0.95))
            p -= lr * scale * update


def orthogonal_block(u, options):
    if options.get("row_equilibration"):
        u = torch.stack([row / row.norm() for row in u])
    o = newton_schulz(u)
    if options.get("frobenius_renormalisation"):
        o = o * (min(o.shape) ** 0.5 / o.norm())
    return o


def less_variance(o, second, beta2):
    """NorMuon: `second`, a list of one number a row (or column, where there are more), is updated."""
    lines = list(o if o.size(0) >= o.size(1) else o.T)
    for i, line in enumerate(lines):
        second[i] = beta2 * second[i] + (1 - beta2) * (line**2).mean()
    lines = torch.stack([line / second[i].sqrt() for i, line in enumerate(lines)])
    reduced = lines if o.size(0) >= o.size(1) else lines.T
    return reduced * (o.norm() / reduced.norm())
