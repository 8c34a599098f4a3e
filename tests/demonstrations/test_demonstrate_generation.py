"""The demonstrations of chapter 13: sampling, the cache, the mask of a conversation, the CORE score."""

import pytest
from backends import use
from tiny_run import train, write_text

from nanochat_native.demonstrations import generation


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    write_text(folder / "text.jsonl")
    assert train(folder, steps=8) == 0
    return folder / "runs/tiny"


def test_a_higher_temperature_spreads_the_choice_and_top_k_bounds_it(run):
    found = generation.temperature(run)
    effective = [found[key]["effective"] for key in ("t5", "t10", "t20")]
    assert effective == sorted(effective)
    assert effective[-1] <= found["vocabulary"]
    assert found["drawn"]["outside"] == 0
    assert sum(found["top_k"]["probabilities"]) == pytest.approx(1)
    assert found["drawn"]["largest_difference"] < 5 * (0.25 / found["drawn"]["draws"]) ** 0.5  # five standard errors


def test_the_cache_gives_the_logits_of_running_all_tokens_again(monkeypatch):
    monkeypatch.setattr(generation, "LENGTHS", (16, 128))
    with use("native"):
        rows = generation.kv_cache()["rows"]
    assert all(row["difference"] < 1e-4 for row in rows)
    assert rows[1]["cache_bytes"] == 8 * rows[0]["cache_bytes"]


def test_the_loss_counts_exactly_the_words_of_the_assistant_and_their_end(run):
    found = generation.loss_mask(run)
    counted = [token for token, target in zip(found["tokens"], found["is_target"], strict=True) if target]
    answers = [text + "<|assistant_end|>" for role, text in generation.CONVERSATION if role == "assistant"]
    assert "".join(counted) == "".join(answers)
    assert found["special_tokens_forged"] == 0


def test_core_is_the_mean_of_accuracies_measured_from_chance(run):
    pytest.importorskip("yaml")
    found = generation.core(run)
    centered = [(task["accuracy"] - task["chance"]) / (1 - task["chance"]) for task in found["tasks"].values()]
    assert found["core"] == pytest.approx(sum(centered) / len(centered))
    assert len({task["items"] for task in found["tasks"].values()}) > 1  # so an average over items would differ
    assert found["guessing"]["core"] == 0 < found["guessing"]["mean_accuracy"]


def test_a_base_model_does_not_answer_in_the_form_of_the_examples(run):
    found = generation.chat_answers(run)
    assert not found["chat_trained"]
    assert found["sums"]["in_form"] == 0
