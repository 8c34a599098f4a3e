"""Demonstrations of chapter 5: what the text says must follow from their numbers."""

import math

import pytest

from nanochat_native.demonstrations import attention


@pytest.fixture(scope="module")
def rotary():
    return attention.rotary_positions()


def test_no_logit_depends_on_a_later_token():
    found = attention.causal_mask()
    assert found["positions_before_with_the_same_bits"] == found["positions_before"] == found["changed_position"] > 0
    assert found["positions_after_that_changed"] == found["positions"] - found["changed_position"]
    assert found["inverted"]["rows_that_are_nan"] == 1, "the last query sees no key"
    assert found["inverted"]["weight_of_row_0_on_itself"] == 0
    assert found["inverted"]["weight_of_row_0_on_the_future"] == pytest.approx(1, abs=1e-6)


def test_the_scale_makes_the_softmax_independent_of_the_head_size():
    rows = attention.attention_scale()["sizes"]
    for row in rows:
        assert row["spread"] == pytest.approx(row["sqrt_D"], rel=0.05)
        assert row["unscaled"]["largest_weight"] > 2 * row["scaled"]["largest_weight"]
        assert row["unscaled"]["slope"] < row["scaled"]["slope"]
    scaled = [row["scaled"]["largest_weight"] for row in rows]
    unscaled = [row["unscaled"]["largest_weight"] for row in rows]
    assert max(scaled) < 1.1 * min(scaled)
    assert unscaled == sorted(unscaled)
    assert [rows[2]["scaled"]["largest_weight"], rows[4]["scaled"]["largest_weight"]] == [min(scaled), max(scaled)]


def test_scores_depend_on_the_distance_alone(rotary):
    for shift, change in rotary["shift"].items():
        assert change < 1e-4, shift
        assert rotary["wrong_sign"][shift] > 1, shift
    assert rotary["shift"]["100"] < 2e-5
    assert rotary["shift"]["2000"] > rotary["shift"]["1"], "the angles are rounded"


def test_a_rotation_keeps_lengths_and_commutes_with_the_norm(rotary):
    assert rotary["lengths"] < 1e-6
    assert rotary["commute"] < 3e-6


def test_pairs_turn_at_many_speeds(rotary):
    turns = rotary["tokens_of_a_turn"]
    assert turns["fastest"] == pytest.approx(2 * math.pi)
    assert turns["fastest"] < 256 < turns["middle"] < turns["slowest"]
    assert rotary["similarity_by_distance"][0] == pytest.approx(1)
    assert max(rotary["similarity_by_distance"][64:]) < 0.5


def test_one_layer_without_positions_sees_a_set():
    found = attention.order_without_positions()
    assert found["1_layer"]["without_positions"] < 1e-5
    assert found["1_layer"]["with_rotary_positions"] > 1e-2
    assert found["2_layers"]["without_positions"] > 1e-2, (
        "the causal mask tells positions apart from the second layer on"
    )


def test_shared_keys_give_the_bits_of_copied_keys():
    found = attention.grouped_heads()
    assert found["difference"] == 0
    assert found["bytes_of_keys_and_values"]["copied"] == 4 * found["bytes_of_keys_and_values"]["shared"]
    assert found["bytes_of_a_token_in_float32"]["d20"]["10"] == 2 * 20 * 1280 * 4


def test_windows_hide_and_stacked_windows_reach_further():
    found = attention.attention_window()
    assert found["largest_weight_outside_the_window"] == 0
    assert found["reach"] == {"one_S_layer": 16, "two_S_layers": 32}
    assert found["pairs_of_an_L_layer"] == 256 * 257 // 2
    assert found["pairs_of_an_S_layer"] == 64 * 65 // 2 + 192 * 65


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A tiny run."""
    from tiny_run import tiny_flags, write_text

    from nanochat_native import train

    folder = tmp_path_factory.mktemp("demonstrate")
    write_text(folder / "text.jsonl")
    assert train.main([str(flag) for flag in tiny_flags(folder, steps=2)]) == 0
    return next(path.parent for path in folder.rglob("checkpoints"))


def test_scores_of_a_run_respect_the_bound(run_folder):
    found = attention.qk_norm(run_folder)
    assert found["largest_score"] <= found["bound"] * (1 + 1e-5)
    for row in found["layers"]:
        assert row["longest_query"] == pytest.approx(found["bound"], rel=1e-3)


def test_maps_of_a_run_are_weights(run_folder):
    found = attention.attention_maps(run_folder)
    count = len(found["tokens"])
    assert found["largest_deviation_of_a_row_sum_from_1"] < 1e-5
    for values in found["maps"].values():
        assert len(values) == count * (count + 1) // 2
        assert all(0 <= value <= 1 for value in values)
    assert all(0 <= row["first"] <= 1 for row in (*found["layers"], *found["untrained"]))


def test_context_lengths_of_a_run_measure_the_same_targets(run_folder):
    found = attention.context_length(run_folder)
    assert found["trained"] in [row["T"] for row in found["lengths"]]
    assert len({row["targets"] for row in found["lengths"]}) == 1
    assert found["by_position"][0] == pytest.approx(found["same_tokens"][0], rel=1e-4)
