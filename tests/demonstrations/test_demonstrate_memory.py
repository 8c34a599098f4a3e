import dataclasses

import pytest
import torch

from nanochat_native.demonstrations import memory
from nanochat_native.demonstrations.memory import (
    activations,
    checkpointing,
    checkpointing_time,
    equal_gradients,
    gradients_between_steps,
    memory_claim,
    memory_moments,
    memory_ranks,
    order_of_ranks,
    owners,
    ring,
    ring_all_reduce,
    rows_of_ranks,
)
from nanochat_native.lab.memory import activation_bytes, predict


def test_activations_fall_in_the_backward_pass_and_gradients_rise():
    for name, found in memory_moments().items():
        blocks = [moment for moment in found["moments"] if moment["phase"] == "backward"][2:-1]
        kept, gradients = ([block[part] for block in blocks] for part in ("activations", "gradients"))
        assert kept == sorted(kept, reverse=True)
        assert gradients == sorted(gradients)
        assert found["phase"] == "backward", name
        assert found["peak"] == pytest.approx(sum(found["at_peak"].values()))


def test_activations_are_the_largest_part_of_a_large_model():
    found = memory_moments()
    assert found["d20"]["share_of_activations"] > 0.5
    for model in ("d4", "d20"):
        assert max(found[model]["at_peak"], key=found[model]["at_peak"].get) == "activations"


def test_the_peak_is_several_times_weights_and_moments_in_two_bytes():
    found = memory_claim()
    assert found["factor"] > 5
    assert found["weights"] == 4 * found["parameters"]
    assert found["state_hybrid"] < found["state_adamw"] == 8 * found["parameters"]


def test_checkpointing_shrinks_activations_far_more_than_the_peak():
    for found in checkpointing().values():
        assert found["activations_ratio"] > 5
        assert found["peak_ratio"] < found["activations_ratio"] / 3
        assert 0 < found["extra_products"] < 1 / 3


@pytest.mark.slow
def test_checkpointing_costs_time_but_not_twice_the_time():
    """Of processor time, so that other work on the machine counts little."""
    assert 1 < checkpointing_time(steps=2)["ratio"] < 1.6


def test_activations_grow_with_the_length_and_scores_with_its_square():
    found = activations()
    assert found["growth"] == pytest.approx(8)
    assert found["growth_of_scores"] == 64
    assert found["rows"][0]["dense_scores"] < found["rows"][0]["kept"]
    assert found["rows"][-1]["dense_scores"] > found["rows"][-1]["kept"]
    assert found["numbers_of_a_block_per_token"] == 10 * found["width"]


def test_gradients_exist_between_micro_batches():
    found = gradients_between_steps()
    head = 2 * 65536 * 1280 / 2**20  # the gradient of lm_head in bfloat16, which the loss computes
    assert found["one"]["forward"] == 0  # the peak is before the loss
    assert found["one"]["backward"] == 2 * head < found["one"]["optimizer"]
    assert found["two"]["forward"] == found["one"]["optimizer"]
    assert found["two"]["backward"] == 3 * head + found["one"]["optimizer"]  # and converted to float32


def test_state_is_divided_by_the_ranks_and_nothing_else_is():
    for rows in (memory_ranks()[optimizer] for optimizer in ("hybrid", "adamw")):
        for row in rows:
            assert row["state"] == pytest.approx(rows[0]["state"] / row["ranks"], rel=0.01)
            assert row["weights"] == row["gradients"] == pytest.approx(rows[0]["weights"], rel=0.01)
            assert row["sent"] == pytest.approx(row["sent_at_least"], rel=0.01)


def test_eight_ranks_hardly_lower_the_peak_of_a_rank():
    found = memory_ranks()["peaks"]
    assert 1 < found["d20"]["ratio"] < 1.05
    assert found["d20"]["ratio"] < found["d20_recomputed"]["ratio"] < found["d32_recomputed"]["ratio"] < 1.5
    assert predict(memory.PLAN)["activations"] <= activation_bytes(memory.PLAN)


@pytest.mark.parametrize("depth", [4, 12, 24, 32])
def test_activations_are_the_largest_part_unless_they_are_recomputed(depth):
    kept, recomputed = (
        predict(dataclasses.replace(memory.PLAN, depth=depth, grad_checkpoint=again)) for again in (False, True)
    )
    assert max(kept, key=kept.get) == "activations"
    assert max(recomputed, key=recomputed.get) != "activations"
    assert depth < 24 or not recomputed["activations"], "the peak is in the step of the optimizer"


def test_each_matrix_has_one_owner_and_the_work_is_even():
    found = owners()
    assert len(found["matrices"]) == 24
    assert {row["owner"] for row in found["matrices"]} == {0, 1, 2, 3}
    assert found["most_over_mean"] == pytest.approx(1)


def test_padding_leaves_no_row_without_an_owner():
    for row in rows_of_ranks()["rows"]:
        assert row["rows_of_a_shard"] * row["ranks"] == row["vocabulary"] + row["padding"]
        assert row["padding"] < row["ranks"]
    assert [row["forgotten_if_floored"] for row in rows_of_ranks()["rows"]] == [1, 2, 0]


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_a_ring_gives_every_rank_the_sum(ranks):
    values = torch.randn(ranks, 6 * ranks, dtype=torch.float64)
    held, steps = ring(values)
    torch.testing.assert_close(held, values.sum(0).expand(ranks, -1))
    assert len(steps) == 2 * (ranks - 1)
    assert steps[-1]["done"] == [[ranks] * ranks] * ranks
    half = steps[ranks - 2]["done"]  # the end of the reduce-scatter: each rank holds one whole chunk
    assert [row.count(ranks) for row in half] == [1] * ranks


def test_a_rank_of_a_ring_sends_less_than_twice_the_numbers():
    found = ring_all_reduce()
    assert found["sent_over_all"] == 2 * (4 - 1) / 4
    assert found["error"] < 1e-12
    assert found["collecting_over_ring"] == 2


def test_the_mean_of_equal_gradients_keeps_their_bits_in_float64_alone():
    found = equal_gradients()
    assert found["float64"] == 0
    by_ranks = {row["ranks"]: row for row in found["rows"]}
    for ranks in (3, 5, 6, 7, 8):
        assert by_ranks[ranks]["sum_then_divide"] > 0.05
        assert by_ranks[ranks]["divide_then_sum"] > 0.05
    assert by_ranks[2]["sum_then_divide"] == by_ranks[4]["sum_then_divide"] == 0


def test_the_order_of_ranks_changes_float32_sums_and_not_those_in_float64():
    found = order_of_ranks()
    assert found["float32"] > 0.5
    assert found["float64"] < 1e-4
