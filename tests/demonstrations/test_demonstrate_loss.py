"""The demonstrations of chapter 7: the gradient of the loss, by hand, by autograd, by the kernels, and in 16 bits."""

import math

import pytest
import torch
from backends import use
from tiny_run import train, write_text

from nanochat_native.demonstrations import loss


@pytest.fixture(autouse=True)
def _native():
    with use("native"):
        yield


def test_the_gradient_by_hand_is_that_of_autograd(tmp_path):
    write_text(tmp_path / "text.jsonl")
    assert train(tmp_path, steps=8) == 0
    found = loss.loss_gradient(tmp_path / "runs/tiny")
    assert found["difference_from_autograd"] < 1e-12
    assert abs(found["sum"]) < 1e-12
    assert found["target_gradient"] == pytest.approx(found["target_probability"] - 1)
    assert found["loss"] == pytest.approx(-math.log(found["target_probability"]))


def test_right_ways_are_close_and_a_forgotten_factor_is_off():
    found = loss.gradient_cmp()
    for way in ("by_hand_float64", "kernel_float64"):
        assert all(each["error"] < 1e-13 for each in found[way].values())
    for way in ("reference_float32", "kernel_float32"):
        assert all(each["verdict"] == "close" for each in found[way].values())
    assert all(each["verdict"] == "off" for each in found["softcap_slope_forgotten"].values())
    wrong, rounded = (found[way]["dx"]["error"] for way in ("softcap_slope_forgotten", "kernel_bfloat16"))
    assert wrong > 10 * rounded


def test_cmp_tells_the_same_bits_from_close_and_from_off():
    exact = torch.tensor([1.0, 2.0])
    assert loss.cmp(exact, exact.clone())["verdict"] == "exact"
    assert loss.cmp(exact * (1 + 1e-6), exact)["verdict"] == "close"
    assert loss.cmp(exact * 1.001, exact)["verdict"] == "off"


def test_the_kernels_are_as_accurate_as_the_reference_and_bfloat16_is_not():
    found = loss.gradient_dtypes()
    reference, kernels, bfloat16 = (
        found[way]["largest"] for way in ("reference_float32", "kernels_float32", "kernels_bfloat16")
    )
    assert kernels < 2 * reference < 1e-5
    assert 1e-3 < bfloat16 < 0.1


def test_a_finite_difference_has_a_best_step_and_float64_is_far_better():
    found = loss.finite_differences()
    for name in ("float32", "float64"):
        errors = found[name]["errors"]
        assert min(errors) < min(errors[0], errors[-1])
    assert found["float64"]["best"] < 1e-3 * found["float32"]["best"]
    assert found["float64"]["best_step"] < found["float32"]["best_step"]


def test_the_mean_of_means_is_another_gradient_than_the_mean_over_targets():
    found = loss.uneven_accumulation()
    assert found["weighted"]["error"] < 1e-12
    assert found["mean_of_means"]["error"] > 0.1


@pytest.mark.slow
def test_the_memory_of_the_kernel_does_not_grow_with_the_logits(monkeypatch):
    monkeypatch.setattr(loss, "VOCABULARIES", (32768,))
    monkeypatch.setattr(loss, "HEAD", {"N": 2048, "C": 256})
    (row,) = loss.head_memory()["rows"]
    assert row["all_logits"] > row["logits"]
    assert row["kernel"] < row["logits"] / 2
