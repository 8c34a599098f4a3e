import math

import pytest
import torch

from nanochat_native.demonstrations import rates


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_sweep_of_the_original_guide_ends_far_below_the_rates_in_use():
    found = rates.range_test_rates()["original"]
    assert found["end"] == pytest.approx(2.1e-4, rel=0.01)
    assert found["below_muon"] > 90
    assert found["below_embedding"] > 900
    steps = found["steps_to_embedding"]
    assert 1e-8 * 1.01 ** (steps - 1) < 0.2 <= 1e-8 * 1.01**steps


def test_steepest_point_moves_with_the_speed_of_the_sweep():
    found = rates.range_test_rates()["quadratic"]
    steepest = [sweep["steepest"] for sweep in found["sweeps"]]
    assert steepest == sorted(steepest, reverse=True)
    assert found["steepest_moves_by"] > 10
    suggested = [sweep["suggested"] for sweep in found["sweeps"]]
    assert max(suggested) / min(suggested) < 3
    assert max(suggested) < found["largest_stable_rate"]


def test_lr_find_covers_six_decades():
    found = rates.range_test_rates()["lr_find"]
    assert found["last"] / found["first"] == pytest.approx(1e6)
    assert found["factor"] ** (found["steps"] - 1) == pytest.approx(1e6)


def test_first_step_of_adamw_and_muon_has_one_size():
    found = rates.first_step()
    assert found["spread_of"]["sgd"] == pytest.approx(1e9, rel=1e-3)
    assert found["spread_of"]["adamw"] == pytest.approx(1, abs=0.05)
    assert found["spread_of"]["muon"] == pytest.approx(1, abs=1e-3)
    norms = found["gradient_norms_of_a_new_model"]
    assert norms["blocks"] == norms["wte"] == 0 < norms["lm_head"]


def test_muon_and_adamw_ignore_the_size_of_the_gradient_and_sgd_does_not():
    found = rates.gradient_scale()
    hybrid, sgd = found["hybrid"], found["sgd"]
    assert hybrid["scaled_1024"]["largest_difference"] < 1e-3
    for name in ("clip_1", "clip_0_1", "clip_0_01"):
        assert hybrid[name]["share_of_progress"] == pytest.approx(1, abs=0.02)
    assert sgd["clip_0_01"]["share_of_progress"] < 0.05
    assert sgd["scaled_1024"]["largest_difference"] > 1


def test_clipping_on_each_rank_changes_norm_and_direction():
    found = rates.clip_ranks()
    assert found["clipped_after"] == pytest.approx(1, rel=1e-4)
    assert found["clipped_on_each_rank"] < 0.8
    assert found["cosine"] < 0.8
    small, large = found["norms_of_the_ranks"]
    assert small > 1, "both ranks are clipped"
    assert found["share_of_first"]["after"] == pytest.approx(small / (small + large))


def test_floor_of_a_noisy_quadratic_is_its_formula_and_a_warmdown_ends_below_it():
    found = rates.noise_floor()
    assert found["floors"] == pytest.approx(found["formula"], rel=1e-3)
    floors = list(found["floors"].values())
    assert floors[0] > 1.8 * floors[1] > 1.8**2 * floors[2]
    last = found["last"]
    assert max(last["20"], last["65"]) < min(last["constant_0_4"], last["constant_0_1"])


def test_the_expected_loss_is_that_of_simulated_runs():
    steps = [0.4] * 30 + [0.1] * 20
    generator = torch.Generator().manual_seed(0)
    x = torch.full((20000, 2), 8.0, dtype=torch.float64)
    slopes = torch.tensor(rates.SLOPES, dtype=torch.float64)
    for rate in steps:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x -= rate * (slopes * x + noise)
    simulated = (slopes * x.square() / 2).sum(1).mean().item()
    assert rates._expected(steps)[-1] == pytest.approx(simulated, rel=0.02)


def test_shapes_of_the_schedule_share_warmup_and_plateau():
    found = rates.schedule_shapes()
    values = {name: shape["values"] for name, shape in found["shapes"].items()}
    assert {tuple(shape[:61]) for shape in values.values()} == {tuple(values["constant"][:61])}
    assert found["horizon"]["step_300"] == pytest.approx(20)
    assert all(math.isfinite(value) for shape in values.values() for value in shape)
