import itertools
import math
from types import SimpleNamespace

import pytest

from nanochat_native.optim.schedule import (
    SHAPES,
    decay_multiplier,
    lr_at,
    lr_multiplier,
    momentum_at,
    muon_momentum,
    weight_decay_at,
)


def curve(n=100, **kwargs):
    return [lr_multiplier(step, n, **kwargs) for step in range(n)]


def test_nanochats_schedule_is_the_default():
    """No warmup, constant, then linear over the last fifth, to 0 one step after the end."""
    expected = [1.0] * 81 + [(100 - step) / 20 for step in range(81, 100)]
    assert curve() == pytest.approx(expected)
    assert lr_multiplier(100, 100) == 0.0


def test_warmup_rises_linearly_to_one():
    assert curve(10, warmup_steps=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert curve(10, warmup_ratio=0.4) == curve(10, warmup_steps=4)


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("linear", 1 - 0.9 * 0.25, 0.55),
        ("cosine", 0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 0.55),
        ("exponential", 0.1**0.25, 0.1**0.5),
        ("step", 0.1 ** (1 / 3), 0.1 ** (2 / 3)),
        ("constant", 1.0, 1.0),
    ],
)
def test_shapes_of_the_warmdown(shape, quarter, half):
    values = [lr_multiplier(s, 100, warmdown_ratio=0.4, final_lr_frac=0.1, shape=shape) for s in (0, 60, 70, 80, 100)]
    assert values == pytest.approx([1.0, 1.0, quarter, half, 1.0 if shape == "constant" else 0.1])


@pytest.mark.parametrize("shape", SHAPES)
def test_never_rises_after_the_warmup_and_stays_above_the_final_fraction(shape):
    values = curve(57, warmup_steps=5, warmdown_ratio=0.6, final_lr_frac=0.05, shape=shape)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[4:]))
    assert all(0.05 <= value <= 1 for value in values[4:])


def test_step_decay_drops_three_times():
    values = curve(100, warmdown_ratio=0.3, final_lr_frac=0.001, shape="step")
    assert sorted(set(values), reverse=True) == pytest.approx([1.0, 0.1, 0.01, 0.001])


def test_warmdown_never_shortens_the_warmup():
    values = curve(10, warmup_ratio=0.4, warmdown_ratio=1.0)
    assert values[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert values[5:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_a_warmup_in_steps_hides_a_part_of_the_warmdown():
    values = curve(10, warmup_steps=4, warmdown_ratio=1.0)
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert curve(10, warmup_steps=40, warmdown_ratio=0.65) == pytest.approx([(step + 1) / 40 for step in range(10)])


def test_a_run_of_one_step_trains():
    assert lr_multiplier(0, 1) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step must be from 0 to num_iterations, 10, got -1"),
        ({"step": 11}, "step must be from 0 to num_iterations, 10, got 11"),
        ({"num_iterations": 0, "step": 0}, "num_iterations must be >= 1, got 0"),
        ({"warmup_steps": -1}, "got warmup_steps -1"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "must be either .* got warmup_steps 1 and warmup_ratio 0.1"),
        ({"warmup_ratio": 1.5}, "got warmup_steps 0 and warmup_ratio 1.5"),
        ({"warmdown_ratio": -0.1}, "got -0.1 and"),
        ({"final_lr_frac": 2.0}, "got 0.2 and 2.0"),
        ({"final_lr_frac": math.nan}, "got 0.2 and nan"),
        ({"shape": "triangle"}, "triangle"),
        ({"shape": "exponential"}, "final_lr_frac must be above 0 with the shape 'exponential'"),
        ({"shape": "step"}, "final_lr_frac must be above 0 with the shape 'step'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        lr_multiplier(**{"step": 3, "num_iterations": 10, **arguments})


def test_muon_momentum():
    assert muon_momentum(0) == 0.85
    assert muon_momentum(150) == pytest.approx(0.90)
    assert muon_momentum(300) == muon_momentum(10**6) == 0.95
    assert muon_momentum(0, warmup_steps=0) == 0.95
    for bad in ({"step": -1}, {"step": 0, "end": 1.0}, {"step": 0, "start": -0.1}, {"step": 0, "warmup_steps": -1}):
        with pytest.raises(ValueError, match=">= 0"):
            muon_momentum(**bad)


def test_muon_momentum_falls_over_the_warmdown():
    cooled = {"end": 0.97, "warmup_steps": 4, "final": 0.9, "num_iterations": 20, "warmdown_ratio": 0.5}
    values = [muon_momentum(step, **cooled) for step in range(22)]
    assert values[:5] == pytest.approx([0.85, 0.88, 0.91, 0.94, 0.97])
    assert values[4:11] == pytest.approx([0.97] * 7)
    assert values[10:21] == pytest.approx([0.97 - 0.007 * i for i in range(11)])
    assert values[21] == pytest.approx(0.9)
    short = [muon_momentum(step, **{**cooled, "warmup_steps": 20}) for step in range(20)]
    assert short == pytest.approx([0.85 + 0.006 * step for step in range(20)])
    late = [muon_momentum(step, **{**cooled, "warmup_steps": 15}) for step in range(20)]
    assert late[14:] == pytest.approx([0.962, 0.935, 0.928, 0.921, 0.914, 0.907])
    assert muon_momentum(20, **{**cooled, "warmdown_ratio": 0.0}) == 0.97
    for bad in ({"final": 1.0}, {"final": -0.1}, {"num_iterations": -1}, {"warmdown_ratio": 1.5}):
        with pytest.raises(ValueError, match="final must be >= 0 and < 1, num_iterations >= 0 and warmdown_ratio"):
            muon_momentum(0, **{**cooled, **bad})


def test_decay_falls_as_a_cosine_to_zero():
    assert [decay_multiplier(step, 8) for step in (0, 5, 8)] == [1.0] * 3
    values = [decay_multiplier(step, 8, schedule="cosine") for step in (0, 2, 4, 6, 8)]
    assert values == pytest.approx([1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0])
    with pytest.raises(ValueError, match="schedule must be one of constant, cosine, got 'linear'"):
        decay_multiplier(0, 8, schedule="linear")
    with pytest.raises(ValueError, match="step must be from 0 to num_iterations, 8, got 9"):
        decay_multiplier(9, 8)


def nanochat_in_july_2026(step, n):
    """The schedules as its facts state them, and their settings."""
    down = round(0.65 * n)
    left = (n - step) / down
    rate = (step + 1) / 40 if step < 40 else 1.0 if step <= n - down else left + (1 - left) * 0.05
    momentum = 0.97 if step < n - down else 0.97 * left + 0.9 * (1 - left)
    if step < 400:
        momentum = 0.85 + 0.12 * step / 400
    return rate, momentum, 0.5 * (1 + math.cos(math.pi * step / n))


TODAY = {
    "schedule": "linear",
    "warmup_steps": 40,
    "warmup_ratio": 0.0,
    "warmdown_ratio": 0.65,
    "final_lr_frac": 0.05,
    "momentum_start": 0.85,
    "momentum_end": 0.97,
    "momentum_warmup_steps": 400,
    "momentum_final": 0.9,
    "decay_schedule": "cosine",
}


@pytest.mark.parametrize("n", [3, 39, 40, 41, 57, 100, 399, 400, 401, 615, 1141, 1142, 1143, 2000])
def test_the_schedules_of_july_2026(n):
    settings = SimpleNamespace(num_iterations=n, **TODAY)
    for step in range(n):
        found = lr_at(step, settings), momentum_at(step, settings), weight_decay_at(step, settings)
        assert found == pytest.approx(nanochat_in_july_2026(step, n), abs=1e-12)


def test_the_momentum_stays_without_a_warmdown_and_without_another_end():
    for other in ({"schedule": "constant"}, {"momentum_final": 0.97}):
        settings = SimpleNamespace(num_iterations=1000, **{**TODAY, **other})
        assert momentum_at(999, settings) == 0.97
