"""The statements of chapter 4 hold for the numbers of its demonstrations."""

import math

import pytest
import torch
from tiny_run import train, write_text

from nanochat_native import ops
from nanochat_native.demonstrations import model as demonstrations
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_text(folder / "text.jsonl")
    assert train(folder, steps=12) == 0
    return folder / "runs/tiny"


def test_parameters_are_twelve_squares_and_two_tables():
    for found in demonstrations.parameters().values():
        blocks, width = found["attention"] + found["mlp"], found["width"]
        assert blocks == 12 * found["depth"] * width**2
        assert found["total"] == blocks + 2 * found["wte"]
        assert found["wte"] == found["lm_head"]
        assert found["mlp_share_of_blocks"] == pytest.approx(2 / 3)
    assert found["total"] == 1_081_999_360


def test_matrices_wake_in_three_steps():
    found = demonstrations.waking(steps=3)
    waking = {"lm_head": 0, "wte": 1, "attn_c_proj": 1, "mlp_c_proj": 1, "c_q": 2, "c_k": 2, "c_v": 2, "c_fc": 2}
    assert found["first_step_with_gradient"] == waking
    assert [group for group, moved in found["moved_in_step_0"].items() if moved] == ["lm_head"]
    assert found["losses"][0] == pytest.approx(math.log(8192), abs=1e-5)
    assert found["losses"][1] < found["losses"][0]


@pytest.mark.parametrize("group", ["attn_c_proj", "mlp_c_proj"])
def test_a_projection_that_is_not_zero_wakes_others_earlier(group, monkeypatch):
    """The table depends on the zeros: with one kind of projection filled, what is before it wakes at step 1."""
    begin = GPT.init_weights

    def filled(self, seed=0):
        begin(self, seed)
        for name, parameter in self.named_parameters():
            if demonstrations.group_of(name) == group:
                torch.nn.init.normal_(parameter, 0, 0.02)

    monkeypatch.setattr(GPT, "init_weights", filled)
    first = demonstrations.waking(steps=3)["first_step_with_gradient"]
    assert first["c_v" if group == "attn_c_proj" else "c_fc"] == 1
    assert first["c_fc" if group == "attn_c_proj" else "c_v"] == 2


def test_the_first_loss_is_ln_v_and_random_heads_lose_more():
    found = demonstrations.first_loss()
    assert found["zero"] == pytest.approx(found["ln_vocabulary"], abs=1e-5)
    # Logits with variance 1 cost half a nat on average: ln E[exp z] = 1/2.
    assert found["random"] - found["ln_vocabulary"] == pytest.approx(0.5, abs=0.1)
    assert found["random_10_times"] > 3 * found["ln_vocabulary"]


def test_the_formula_counts_what_torch_counts():
    for found in demonstrations.flops().values():
        assert found["counted"] == found["estimated"]
        assert found["backward_to_forward"] == 2


def test_scores_cost_as_much_as_matrices_at_six_times_the_width():
    found = demonstrations.blocks_against_scores()
    assert found["equal_at"] == 6 * found["width"]
    assert found["equal_at_causal"] == 12 * found["width"]


def test_the_norm_removes_size_and_keeps_direction():
    found = demonstrations.rms_norm()
    assert found["rms_of_output"] == pytest.approx(1, abs=1e-5)
    assert found["change_at_1000_times"] < 1e-5
    assert found["cosine_with_input"] > 1 - 1e-6
    assert found["zero_stays_zero"]


def test_the_residual_stream_is_the_sum_of_what_was_added(run):
    found = demonstrations.residual_stream(run)
    assert found["new"]["stream"] == pytest.approx([1.0] * len(found["new"]["stream"]), abs=1e-5)
    assert set(found["new"]["attention"] + found["new"]["mlp"]) == {0.0}
    assert found["trained"]["stream"][-1] > found["trained"]["stream"][0]
    assert min(found["trained"]["attention"] + found["trained"]["mlp"]) > 0


def test_the_softcap_bounds_logits_and_the_histogram_has_all_of_them(run):
    found = demonstrations.softcap(run)
    assert found["largest_capped"] < 15
    assert found["largest_capped"] <= found["largest_raw"]
    assert found["largest_capped"] == pytest.approx(15 * math.tanh(found["largest_raw"] / 15))
    assert sum(found["share"]) == pytest.approx(1)


def test_the_loss_with_the_softcap_is_the_models(run):
    model, inputs, targets, _ = demonstrations.validation_batch(run)
    with torch.no_grad(), ops.use_backend("torch"):
        expected = model(inputs, targets).item()
    assert demonstrations.softcap(run)["loss"]["with"] == pytest.approx(expected, rel=1e-5)


def test_dead_units_are_zero_on_every_token(run):
    found = demonstrations.dead_units(run)
    for name in ("new", "trained"):
        for zero, dead in zip(found[name]["zero_on_a_token"], found[name]["zero_on_every_token"], strict=True):
            assert 0 <= dead <= zero < 1
    assert found["new"]["zero_on_a_token"] == pytest.approx([0.5] * 2, abs=0.1)


def test_a_dead_unit_is_found():
    model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    model.init_weights()
    tokens = torch.arange(64).view(4, 16)
    with torch.no_grad():
        model.blocks[0].mlp.c_fc.weight[3] = 0
    (hidden,) = demonstrations.hidden_units(model, tokens)
    assert [int(i) for i in (~(hidden > 0).flatten(0, 1).any(0)).nonzero()[:, 0]] == [3]
