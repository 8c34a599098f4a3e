"""Demonstrations of chapter 6: what the text says must follow from their numbers."""

import math

import pytest
import torch

from nanochat_native.demonstrations import tiles
from nanochat_native.ops import reference


@pytest.fixture(scope="module")
def online():
    return tiles.online_softmax()


def test_walk_ends_at_the_softmax_and_rescales(online):
    walk = online["walk"]
    assert walk[-1]["o_over_l"] == pytest.approx(online["direct"], abs=1e-12)
    assert [step["m"] for step in walk] == sorted({step["m"] for step in walk}), "the maximum grows in every tile"
    scores = online["scores"]
    for count, step in zip((2, 4, 5), walk, strict=True):
        assert step["l"] == pytest.approx(sum(math.exp(score - step["m"]) for score in scores[:count]))


def test_running_softmax_is_exact(online):
    assert online["random"]["largest_difference"] < 1e-13
    assert 0 < online["random"]["mean_drops"] < 6
    assert online["running"]["m"] == sorted(online["running"]["m"])
    assert len(online["running"]["keys"]) == len(online["running"]["l"])


def test_a_huge_score_is_harmless_online_only(online):
    huge = online["huge"]
    assert huge["nan_without_the_maximum"] == huge["of"]
    assert huge["nan_online"] == 0
    assert huge["difference_online"] == 0
    assert huge["largest_exponent_of_float16"] < 12 < 88 < huge["largest_exponent_of_float32"] < 89 < huge["score"]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (7, 3), (3, 7), (32, 32), (1, 1)])
def test_tiles_give_attention(rows, columns, skip):
    q, k, v = torch.randn(3, 2, 19, 8, generator=torch.Generator().manual_seed(0)).unbind()
    out, lse = tiles.tiled_attention(q, k, v, rows, columns, skip=skip)
    expected, expected_lse = reference.attention_forward(*(x.transpose(0, 1)[None] for x in (q, k, v)))
    torch.testing.assert_close(out, expected[0].transpose(0, 1))
    torch.testing.assert_close(lse, expected_lse[0])


def test_the_size_of_the_tiles_changes_rounding_alone():
    found = tiles.attention_tiles()
    assert found["largest_difference"] < 2e-6
    assert found["kernel_difference"] < 2e-6
    shares = [row["share"] for row in found["tiles"]]
    assert shares == sorted(shares)
    assert 0.5 < shares[0] < shares[-1] == 1


def test_output_and_logsumexp_are_enough_for_the_gradient():
    found = tiles.attention_backward()
    assert max(found["difference"].values()) < 1e-13
    assert found["kernel_difference"] < 1e-13
    assert found["row_sums_of_delta"] < 1e-13


def test_kept_memory_grows_with_the_square_or_with_the_length():
    found = tiles.attention_memory()
    for before, after in zip(found["rows"], found["rows"][1:], strict=False):
        assert after["matrix"]["kept"] / before["matrix"]["kept"] == pytest.approx(4, rel=0.01)
        assert after["tiles"]["kept"] / before["tiles"]["kept"] == pytest.approx(2, rel=0.01)
    for row in found["rows"]:
        T = row["T"]
        assert row["tiles"]["kept"] == 4 * (T * 2 * 128 + 2 * T), "the output and the log-sum-exp"
        assert row["matrix"]["kept"] >= 2 * T * T * 4


def test_workspace_is_that_of_the_memory_prediction():
    from nanochat_native.lab import memory

    options = memory.Options(depth=4, device_batch_size=1, max_seq_len=2048, vocab_size=64, optimizer="sgd")
    assert tiles._workspace(2048, 2, 128) == memory.kernel_scratch(options)


@pytest.mark.slow
def test_versions_agree():
    found = tiles.attention_versions()
    assert found["largest_difference"] < 1e-5
    assert list(found["versions"])[-1] == "kernel"
    assert (
        found["versions"]["kernel"]["held"] < found["versions"]["tiles"]["held"] < found["versions"]["matrix"]["held"]
    )
