import math
import random

from nanochat_native.training.spikes import LEAST, WINDOW, SpikeGuard


def fed(sigma=4.0, steps=LEAST):
    guard, rng = SpikeGuard(sigma), random.Random(0)
    for _ in range(steps):
        assert not guard.is_spike(3 + rng.gauss(0, 0.1), 1 + rng.gauss(0, 0.1))
    return guard


def test_a_loss_or_a_norm_far_above_is_a_spike_and_leaves_no_trace():
    guard = fed()
    before = list(guard.history)
    assert guard.is_spike(4.0, 1.0)
    assert guard.is_spike(3.0, 2.0)
    assert list(guard.history) == before
    assert not guard.is_spike(3.1, 1.1)
    assert not guard.is_spike(1.0, 0.1)  # far below is no spike


def test_nothing_is_a_spike_early_or_when_off():
    assert not fed(steps=LEAST - 1).is_spike(100.0, 1.0)
    assert not fed(sigma=0.0).is_spike(100.0, 100.0)


def test_what_is_not_finite_is_left_to_others():
    guard = fed()
    for value in (math.nan, math.inf):
        assert not guard.is_spike(value, 1.0)
        assert not guard.is_spike(3.0, value)
    assert len(guard.history) == LEAST


def test_the_window_moves_and_survives_saving():
    guard = fed(steps=3 * WINDOW)
    assert len(guard.history) == WINDOW
    again = SpikeGuard(4.0, [list(pair) for pair in guard.history])
    assert again.history == guard.history
