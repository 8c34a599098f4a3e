import itertools
import math

import pytest

from nanochat_native.optim.schedule import SHAPES, lr_multiplier, muon_momentum


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
    values = curve(10, warmup_steps=4, warmdown_ratio=1.0)
    assert values[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert values[5:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_a_run_of_one_step_trains():
    assert lr_multiplier(0, 1) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step must be from 0 to num_iterations, 10, got -1"),
        ({"step": 11}, "step must be from 0 to num_iterations, 10, got 11"),
        ({"num_iterations": 0, "step": 0}, "num_iterations must be >= 1, got 0"),
        ({"warmup_steps": 11}, "warmup_steps must be at most num_iterations, 10, got 11"),
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
