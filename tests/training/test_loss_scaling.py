"""Loss scaling: its rule, against torch's GradScaler, and the division of the gradients by the scale."""

import dataclasses
import math
import random

import pytest
import torch
import torch.nn as nn
from tiny_run import tiny_flags, write_text

from nanochat_native.optim import clip, clip_reduced_
from nanochat_native.train import main
from nanochat_native.training import loss_scaling
from nanochat_native.training.loss_scaling import LossScale


def test_the_scale_follows_torchs_grad_scaler(monkeypatch):
    """On random overflows, after every step."""
    monkeypatch.setattr(loss_scaling, "GROWTH_INTERVAL", 4)
    theirs = torch.amp.GradScaler("cpu", growth_interval=4)
    ours, rng = LossScale(), random.Random(0)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for _ in range(200):
        assert ours.scale == theirs.get_scale()
        norm = rng.choice([*[1.0] * 20, math.inf, math.nan])
        theirs.scale(torch.zeros(()))  # which makes its state
        parameter.grad = torch.tensor([norm])
        theirs.step(optimizer)
        theirs.update()
        assert ours.update(norm) is not math.isfinite(norm)
    assert ours.scale != 65536


def test_the_numbers_are_those_of_grad_scaler():
    theirs = torch.amp.GradScaler("cpu")
    assert LossScale().scale == theirs.get_scale()
    assert theirs.get_growth_interval() == loss_scaling.GROWTH_INTERVAL


def test_gradients_that_are_not_finite_at_the_smallest_scale_are_not_its_fault():
    scale = LossScale(4.0)
    assert [scale.update(math.inf) for _ in range(4)] == [True, True, False, False]
    assert scale == LossScale(1.0, 0)


def test_the_state_goes_through_a_checkpoint():
    scale = LossScale(2.0, 1998)
    again = LossScale(**dataclasses.asdict(scale))
    assert [again.update(1.0), again.update(1.0)] == [False, False]
    assert again == LossScale(4.0, 0)


@pytest.mark.parametrize("max_norm", [1.0, 1e9, math.inf])
def test_clipping_divides_by_the_scale(max_norm):
    """With the bits of clipping the unscaled gradients: the scale is a power of two."""
    gradients = [torch.randn(5, 7), torch.randn(11)]

    def clipped(factor, **options):
        parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * factor
        norm = clip_reduced_([torch.optim.SGD(parameters, lr=1.0)], max_norm, **options)
        return norm, [parameter.grad for parameter in parameters]

    norm, expected = clipped(1.0)
    scaled_norm, found = clipped(65536.0, loss_scale=65536.0)
    assert scaled_norm == norm
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-7, atol=0)


def test_gradients_that_overflow_stay_as_they_are():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([math.inf, 1.0])
    assert clip._clip([parameter.grad], 1.0, None, None, 1024.0) == math.inf
    assert parameter.grad.tolist() == [math.inf, 1.0]


def test_float16_is_refused_on_the_cpu(tmp_path, capsys):
    write_text(tmp_path / "text.jsonl")
    assert main(tiny_flags(tmp_path, dtype="float16")) == 2
    assert capsys.readouterr().err == (
        "error: --dtype must be float32 or bfloat16 on a CPU, whose kernels have no float16, got float16\n"
    )
    assert not (tmp_path / "runs").exists()
