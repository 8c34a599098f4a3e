"""The loss curve of a small training run, compared with plain torch, with stored numbers, and with itself."""

import pytest
import torch
import torch_reference
from backends import BACKENDS, use

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import Muon, clip_grad_norm_, setup_optimizers
from nanochat_native.optim.schedule import lr_multiplier, muon_momentum

CONFIG = GPTConfig(sequence_len=48, vocab_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")
WINDOWS = [12, None]
STEPS, ROWS, MAX_NORM = 40, 8, 0.5
WARMDOWN, MOMENTUM_WARMUP = 0.5, 20

# Losses of the first eight steps and of every tenth, as train_plainly computes them.
GOLDEN = [
    3.465736,
    2.840977,
    2.003224,
    1.484682,
    0.977411,
    0.686068,
    0.621164,
    0.502568,
    0.567152,
    0.457598,
    0.368158,
    0.547894,
]


def batch(step):
    """Return tokens that follow a rule with some noise, from a generator of this file: no library can change them."""
    state = 12345 + step
    rows = []
    for _ in range(ROWS):
        row = []
        for i in range(CONFIG.sequence_len + 1):
            state = (1103515245 * state + 12345) % 2**31
            noise = state >> 16
            known = i > 0 and noise % 16 > 0
            row.append((5 * row[-1] + 7) % 32 if known else noise // 16 % 32)
        rows.append(row)
    tokens = torch.tensor(rows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def schedule(step):
    return lr_multiplier(step, STEPS, warmdown_ratio=WARMDOWN), muon_momentum(step, warmup_steps=MOMENTUM_WARMUP)


def train():
    """Return (losses, final weights) of the package's model and optimizers on the backend in use."""
    model = GPT(CONFIG)
    model.init_weights(seed=1)
    optimizers = setup_optimizers(model)
    losses = []
    for step in range(STEPS):
        rate, momentum = schedule(step)
        loss = model(*batch(step))
        loss.backward()
        clip_grad_norm_(model.parameters(), MAX_NORM)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [p.detach() for p in model.parameters()]


def train_plainly():
    """Return the losses of the same run with torch's own calls, in float64."""
    model = GPT(CONFIG)
    model.init_weights(seed=1)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    scale = (64 / 768) ** -0.5
    rates = {"lm_head.weight": 0.004 * scale, "transformer.wte.weight": 0.2 * scale}
    adamw = torch.optim.AdamW(
        [{"params": [weights[name]], "lr": lr, "initial": lr} for name, lr in rates.items()],
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=0.0,
    )
    matrices = [p for name, p in weights.items() if name not in rates]
    buffers = [torch.zeros_like(p) for p in matrices]
    losses = []
    for step in range(STEPS):
        rate, momentum = schedule(step)
        loss = torch_reference.loss(weights, CONFIG, WINDOWS, *batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), MAX_NORM)
        for group in adamw.param_groups:
            group["lr"] = group["initial"] * rate
        adamw.step()
        torch_reference.muon_step(matrices, buffers, 0.02 * rate, momentum)
        for p in weights.values():
            p.grad = None
        losses.append(loss.item())
    return losses


def golden_steps(losses):
    return [*losses[:8], *losses[9::10]]


def test_golden_losses_are_plain_torchs():
    assert golden_steps(train_plainly()) == pytest.approx(GOLDEN, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_loss_curve(backend):
    """Require float32 to stay within 1e-5 of the float64 curve on any machine, and to repeat its bits on this one."""
    with use(backend):
        losses, weights = train()
        again, same_weights = train()
    assert golden_steps(losses) == pytest.approx(GOLDEN, abs=1e-5)
    assert GOLDEN[-1] < 0.2 * GOLDEN[0], "the run learns"
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(weights, same_weights, strict=True))
