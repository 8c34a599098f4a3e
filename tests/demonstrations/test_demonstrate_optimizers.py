"""The statements of chapter 9 hold for the numbers of its demonstrations."""

import math

import pytest
import torch

from nanochat_native.demonstrations import optimizers as demonstrations
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import setup_optimizers
from nanochat_native.runs import checkpoint


def test_five_cubic_steps_leave_singular_values_far_from_one():
    found = demonstrations.newton_schulz()
    cubic, quintic, polar_express = (found[name] for name in ("cubic", "quintic", "polar_express"))
    assert cubic["five_steps"]["largest"] < 0.6
    assert cubic["five_steps"]["error"] > 3 * quintic["five_steps"]["error"]
    assert quintic["five_steps"]["error"] > 1.4 * polar_express["five_steps"]["error"]
    assert cubic["gain"] == pytest.approx(1.5**5)
    assert quintic["gain"] == pytest.approx(3.4445**5)
    assert polar_express["gain"] > quintic["gain"]
    assert found["start"]["median"] < 1 / math.sqrt(found["size"])


def test_the_polynomials_predict_what_the_operator_computes():
    found = demonstrations.newton_schulz()
    for name in demonstrations.NAMES:
        assert found[name]["five_steps"]["error"] == pytest.approx(found[name]["error_by_step"][5], rel=1e-3)


def test_the_cubic_converges_and_the_quintic_does_not():
    start = torch.linspace(0.01, 0.3, 50, dtype=torch.float64)
    cubic, quintic = (
        [demonstrations.error_of(demonstrations.singular_values_after(start, steps, name)) for steps in (30, 60)]
        for name in ("cubic", "quintic")
    )
    assert cubic[1] < 1e-12
    assert min(quintic) > 0.05
    again = demonstrations.newton_schulz()["cubic_again"]
    assert again["steps_until_all_above_three_quarters"] > 20
    assert again["smallest_then"] >= 0.75


def test_no_step_of_spectral_norm_one_goes_down_further_than_the_orthogonalized_gradient():
    found = demonstrations.steepest_direction()
    assert found["orthogonalized"] == pytest.approx(found["nuclear_norm"], rel=1e-9)
    for name in ("gradient", "newton_schulz", "best_of_200_random", "best_of_200_near"):
        assert found[name] < 0.9 * found["orthogonalized"]


def test_a_cropped_update_has_rows_of_zeros():
    found = demonstrations.cropped_update()
    assert found["whole"]["zero_rows"] == 0
    assert found["cropped"]["zero_rows"] == found["original"]["zero_rows"] == 0.75
    assert found["whole"]["cosine_to_polar"] > 0.95
    assert found["original"]["cosine_to_polar"] < 0.6


def test_the_original_guides_muon_leaves_three_quarters_of_the_rows_of_c_fc_as_they_were():
    found = demonstrations.frozen_rows()
    assert found["original_guide"]["rows_of_c_fc"] == found["original_guide"]["columns_of_c_proj"] == 0.75
    assert found["muon"]["entries_of_the_blocks"] == 0
    assert found["original_guide"]["last_loss"] < 0.7 * found["original_guide"]["first_loss"]  # and yet it learns


def test_momentum_after_makes_steps_of_the_horizons_length():
    found = demonstrations.momentum_order()
    for name in ("same_gradient", "noise", "signal_in_noise"):
        assert found[name]["before"]["smallest"] == pytest.approx(1, abs=1e-4)
        assert found[name]["before"]["largest"] == pytest.approx(1, abs=1e-4)
    assert found["same_gradient"]["after"]["largest"] == pytest.approx(found["horizon"], rel=1e-3)
    assert found["noise"]["after"]["largest"] > 50 * found["noise"]["after"]["smallest"]


def test_muon_and_adamw_do_not_see_the_scale_of_the_loss():
    found = demonstrations.loss_scale()
    assert found["hybrid"]["times_1024"]["largest_difference"] < 1e-3
    assert found["sgd"]["times_1024"]["largest_difference"] > 1


def test_the_size_of_a_step_does_not_follow_the_gradient():
    found = demonstrations.update_size()
    assert found["gradient_ratio"] > 3
    assert found["step_ratio"] < 1.1
    assert 0.7 * found["root_of_the_rank"] < found["step_smallest"] < 1.2 * found["root_of_the_rank"]


def test_an_orthogonal_step_changes_outputs_alike_at_every_width():
    found = demonstrations.update_by_width()
    for width, entry, output, signs, worst in zip(
        found["widths"],
        found["orthogonal_entry"],
        found["orthogonal_output"],
        found["signs_output"],
        found["fitting_signs_output"],
        strict=True,
    ):
        assert entry == pytest.approx(width**-0.5, rel=1e-3)
        assert output == pytest.approx(1, rel=1e-3)
        assert signs == pytest.approx(width**0.5, rel=0.05)
        assert worst == pytest.approx(width)


def test_the_factor_of_nanochat_doubles_the_step_of_c_proj():
    found = demonstrations.aspect_factor()
    for name in ("square", "c_fc", "c_proj"):
        assert found[name]["bernstein"]["largest_change"] == pytest.approx(1, rel=1e-4)
        assert found[name]["moonshot"]["entry"] == pytest.approx(0.2, rel=1e-4)
    assert found["c_fc"]["nanochat"]["largest_change"] == pytest.approx(1, rel=1e-4)
    assert found["c_proj"]["nanochat"]["largest_change"] == pytest.approx(2, rel=1e-4)


def test_an_average_has_its_horizon():
    found = demonstrations.momentum_horizon()
    assert found["muon_end"]["horizon"] == pytest.approx(20)
    assert found["muon_start"]["horizon"] == pytest.approx(20 / 3)
    assert found["ratio_of_beta2"] == pytest.approx(50)


def test_the_forms_of_adamw_differ_as_the_text_says():
    found = demonstrations.adamw_forms()
    assert found["decay"]["lambda_times_rate"] == pytest.approx((1 - 0.004 * 0.1) ** 100, rel=1e-4)
    assert found["decay"]["lambda_alone"] == pytest.approx(0.9**100, rel=1e-3)
    after = found["decay_after_the_update"]
    assert after["largest_difference"] == pytest.approx(after["rate_squared_times_decay"])
    eps = found["eps_at_the_first_step"]
    assert eps["mean_step_eps_before"] < eps["mean_step_eps_after"] < eps["mean_step_without_eps"]
    assert all(step == pytest.approx(1, rel=1e-4) for step in found["first_step_is_a_sign"].values())


def test_adamw_moves_every_row_seen_so_far():
    found = demonstrations.embedding_rows()
    assert found["wte_rows_moved"] == found["rows_seen_so_far"]
    assert found["last_wte_rows_moved"] > 2 * found["last_wte_rows_with_gradient"]
    assert set(found["lm_head_rows_with_gradient"]) == {found["vocabulary"]}
    assert found["wte_rows_with_gradient"][0] == 0  # lm_head starts at zero: nothing reaches wte in the first step


def test_the_gradient_of_an_entry_does_not_grow_with_the_width():
    found = demonstrations.gradient_by_width()
    assert found["largest_ratio"] < 1.01
    assert found["norm"][-1] > 2 * found["norm"][0]


def test_the_spectrum_of_a_momentum_is_flattened(tmp_path):
    model = demonstrations.small_model(0)
    optimizers = setup_optimizers(model)
    demonstrations.train(model, optimizers, demonstrations.chain_batches(0, 6))
    write_checkpoint(tmp_path / "run", model, optimizers)
    found = demonstrations.momentum_spectrum(tmp_path / "run")
    assert found["step"] == 6
    for part in ("attn_c_q", "mlp_c_fc"):
        assert found[part]["condition"] > 10
        assert found[part]["quintic"]["error"] < found[part]["cubic"]["error"]


def write_checkpoint(folder, model: GPT, optimizers) -> None:
    """Write weights and momentum as a run has them."""
    state, _ = checkpoint.flatten_optimizers(model.named_parameters(), optimizers)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    checkpoint.save(folder / "checkpoints", 6, {"model": weights, "optimizer": state}, {})
