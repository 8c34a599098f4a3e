"""The faults that appendix A names are faults."""

import pytest

from nanochat_native.demonstrations import original_guide


def test_the_faults_of_the_original_code_show():
    found = original_guide.original_code()
    assert "invalid for input of size 31" in found["loader"]["error"]
    assert found["gradcheck"]["error_of_ids"].startswith("ValueError")
    assert found["gradcheck"]["weights_pass"]
    assert found["positions"]["change_without"] < 1e-6 < 1e-2 < found["positions"]["change_with_rope"]
    assert found["leak"] == {
        "created_in_a_loop": 0,
        "graphs_kept_by_losses": 50,
        "graphs_kept_by_items": 0,
        "of": 50,
    }
    assert found["sampler"] == {"same_without_set_epoch": True, "same_with_set_epoch": False}


def test_a_falling_loss_on_random_targets_is_memory():
    found = original_guide.losses_on_random_targets(0)
    assert found["last"] < 0.5 * found["first"]
    assert found["on_another_batch"] > found["ln_vocabulary"]


def test_the_statements_are_wrong_as_the_appendix_says():
    found = original_guide.original_statements()
    assert found["mask"]["inverted_last_row_is_nan"]
    assert found["mask"]["inverted_first_row_weight_on_itself"] == 0
    assert found["mask"]["right_rows_sum_to"] == pytest.approx(1)
    perplexity = found["perplexity"]
    assert perplexity["exp_of_nats"] == pytest.approx(perplexity["two_to_the_bits"])
    assert perplexity["two_to_the_nats"] < 0.5 * perplexity["exp_of_nats"]
    assert found["autocast"]["gradient_dtype"] == "bfloat16"
