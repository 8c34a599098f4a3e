"""The statements of chapters 1 and 2: each test has the property that the text claims."""

import math

import pytest
import torch
from tiny_run import train, write_text

from nanochat_native.demonstrations import mathematics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a trained run."""
    folder = tmp_path_factory.mktemp("run")
    write_text(folder / "text.jsonl")
    assert train(folder, steps=24) == 0
    return folder / "runs" / "tiny"


def test_no_model_is_less_surprised_than_the_right_one():
    found = mathematics.bits_and_nats()
    entropy = found["cross_entropy_bits"]["p_itself"]
    assert entropy == 1.75
    assert all(extra >= 0 for extra in found["extra_bits"].values())
    assert found["cross_entropy_bits"]["uniform"] > entropy
    assert found["cross_entropy_bits"]["reversed"] > entropy


def test_perplexity_is_the_same_in_both_units_and_not_when_they_are_mixed():
    perplexity = mathematics.bits_and_nats()["perplexity"]
    assert perplexity["two_to_the_bits"] == pytest.approx(perplexity["e_to_the_nats"])
    assert perplexity["e_to_the_bits"] > 1.5 * perplexity["two_to_the_bits"]


def test_softmax_needs_the_maximum():
    found = mathematics.softmax_overflow()

    def right(values):
        return [value is not None and abs(value - found["right"]) < 1e-3 for value in values]

    assert all(right(found["safe"]["float32"]))
    assert all(right(found["safe"]["float16"]))
    single, half = right(found["plain"]["float32"]), right(found["plain"]["float16"])
    assert not all(single)
    assert sum(half) < len(half) / 2
    for shift, good in zip(found["shifts"], single, strict=True):
        assert good or shift + 2 > found["largest_exponent"]["float32"] - 2 or shift < -100
    assert not found["loss_of_the_unlikely_token"]["log_of_softmax_is_finite"]
    assert found["loss_of_the_unlikely_token"]["log_softmax"] == 200


def test_the_chain_rule_agrees_with_autograd_and_with_differences():
    found = mathematics.chain_rule()
    assert math.prod(found["factors"].values()) == found["by_hand"] == found["by_autograd"]
    for errors in found["relative_error"].values():
        best = errors.index(min(errors))
        assert 0 < best < len(errors) - 1, "a step can be too large and too small"
    assert found["best"]["float64"]["error"] < 1e-8 < 1e-6 < found["best"]["float32"]["error"]
    assert found["attention_relative_error"] < 1e-7


def test_a_product_costs_two_operations_for_each_triple():
    products = mathematics.product_cost()["products"]
    assert all(product["flops"] == product["formula"] for product in products.values())
    assert products["m1"]["flops_per_byte"] < 1 < 50 < products["m2048"]["flops_per_byte"]


def test_an_orthogonal_matrix_has_gain_one_at_every_width():
    for name, found in mathematics.norms().items():
        width = int(name[1:])
        assert found["orthogonal_gain"] == pytest.approx(1, abs=1e-9)
        assert found["orthogonal_spectral"] == pytest.approx(1, abs=1e-9)
        assert found["orthogonal_entry_rms"] == pytest.approx(width**-0.5, rel=1e-9)
        assert found["gain_of_a_random_vector"] == pytest.approx(width**0.5, rel=0.1)
        assert found["gain_of_the_best_vector"] == pytest.approx(found["spectral"])
        assert found["spectral_by_root_n"] == pytest.approx(2, rel=0.05)


def test_the_decomposition_gives_the_matrix_again():
    found = mathematics.singular_values()
    u, vt, a = (torch.tensor(found[name]) for name in ("u", "vt", "a"))
    assert torch.allclose(torch.tensor(found["rebuilt"]), a, atol=1e-6)
    assert torch.allclose(u @ u.T, torch.eye(2), atol=1e-6)
    assert torch.allclose(vt @ vt.T, torch.eye(2), atol=1e-6)
    assert found["s"] == pytest.approx([2, 0.5])
    assert torch.allclose(torch.tensor(found["orthogonal"]), torch.tensor([[0.96, 0.28], [-0.28, 0.96]]), atol=1e-6)


def test_no_rotation_or_reflection_is_nearer_than_the_orthogonal_factor():
    found = mathematics.singular_values()
    distance = found["distance"]
    assert distance["orthogonal"] == pytest.approx(distance["formula"])
    assert distance["orthogonal"] <= min(distance["best_rotation"], distance["best_reflection"])
    assert distance["best_rotation_degrees"] == pytest.approx(found["angle_degrees"], abs=0.1)


def test_the_quintic_makes_singular_values_equal_and_not_one():
    iterated = mathematics.singular_values()["newton_schulz"]
    high, low = iterated["quintic"]["singular_values"]
    assert high == pytest.approx(low, rel=0.02)
    assert high < 0.9
    assert iterated["polar_express"]["error"] < 0.05 < iterated["quintic"]["error"]


def test_bfloat16_has_the_range_of_float32_and_loses_small_steps():
    found = mathematics.floats()
    assert found["bfloat16"]["exponent_bits"] == found["float32"]["exponent_bits"] == 8
    assert found["float16"]["exponent_bits"] == 5
    assert found["bfloat16"]["one_plus_a_thousandth"] == 1 < found["float16"]["one_plus_a_thousandth"]
    assert found["bfloat16"]["seventy_thousand"] == pytest.approx(70000, rel=0.01)
    assert found["float16"]["seventy_thousand"] is None
    assert found["float16"]["ten_to_minus_eight"] == 0 < found["bfloat16"]["ten_to_minus_eight"]
    assert found["sum_of_4096_ones"] == {"float32": 4096, "bfloat16": found["bfloat16"]["counts_to"]}


def test_surprise_is_the_loss_of_the_text_in_bits(run):
    found = mathematics.surprise(run)
    assert "".join(found["tokens"]) == mathematics.TEXT
    assert found["total_bits"] == pytest.approx(sum(found["bits"]))
    assert found["bits_per_byte"] == pytest.approx(found["total_bits"] / len(mathematics.TEXT.encode()))
    assert min(found["bits"]) > 0


def test_each_table_of_frequencies_is_better_than_the_one_before(run):
    found = mathematics.frequency_baselines(run)
    levels = [found[name]["bits_per_byte"] for name in ("uniform", "frequencies", "pairs")]
    assert levels == sorted(levels, reverse=True)
    assert found["uniform"]["loss"] == pytest.approx(math.log(300), rel=1e-6)
    assert found["validation_tokens"] > 0
