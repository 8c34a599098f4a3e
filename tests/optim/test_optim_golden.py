"""Our optimizers with today's recipe on gradients from plain torch, against a run of nanochat's model and optimizer.

nanochat-2026.npz holds the start and the results of that run in float64.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import today_reference
import torch
import torch.nn as nn
from backends import BACKENDS, use

from nanochat_native.optim import Muon, setup_optimizers
from nanochat_native.optim.schedule import lr_at, momentum_at, weight_decay_at

GOLDEN = Path(__file__).parents[1] / "training/nanochat-2026.npz"
SETTINGS = SimpleNamespace(
    num_iterations=20,
    schedule="linear",
    warmup_steps=5,
    warmup_ratio=0.0,
    warmdown_ratio=0.65,
    final_lr_frac=0.05,
    momentum_start=0.85,
    momentum_end=0.97,
    momentum_warmup_steps=6,
    momentum_final=0.90,
    decay_schedule="cosine",
)


class Parameters(nn.Module):
    """Parameters with nanochat's names."""

    def __init__(self, values):
        super().__init__()
        for name, value in values.items():
            module = self
            *path, last = name.split(".")
            for step in path:
                if not hasattr(module, step):
                    module.add_module(step, nn.Module())
                module = getattr(module, step)
            module.register_parameter(last, nn.Parameter(torch.tensor(value)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_golden_run_in_float32(backend):
    golden = np.load(GOLDEN)
    V, T, B, L, _, H, Hkv = golden["shape"].tolist()
    model = Parameters({name.removeprefix("init/"): golden[name] for name in golden if name.startswith("init/")})
    parameters = dict(model.named_parameters())
    losses = []
    with use(backend):
        optimizers = setup_optimizers(model, recipe="today")
        for step in range(20):
            loss = today_reference.loss(
                parameters, (L, H, Hkv, T, V, "SSSL"), *today_reference.golden_batch(step, V, T, B)
            )
            loss.backward()
            losses.append(loss.item())
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * lr_at(step, SETTINGS)
                    if isinstance(optimizer, Muon):
                        group["momentum"] = momentum_at(step, SETTINGS)
                        group["weight_decay"] = group["initial_weight_decay"] * weight_decay_at(step, SETTINGS)
                optimizer.step()
                optimizer.zero_grad()
    assert losses == pytest.approx(golden["losses"].tolist(), abs=2e-5)
    for name, parameter in parameters.items():
        assert parameter.detach().double().norm().item() == pytest.approx(float(golden[f"final_norm/{name}"]), rel=1e-4)
