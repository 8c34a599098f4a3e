import json

import pytest
import torch
from tiny_run import train, write_text

from nanochat_native.demonstrations import loop
from nanochat_native.optim import clip


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_loop_in_twenty_lines_has_the_losses_of_the_trainer():
    found = loop.loop_in_20_lines()
    assert found["differing_losses"] == 0
    assert found["first"] == pytest.approx(found["ln_vocabulary"], rel=1e-6)
    assert found["last"] < 0.5 * found["first"]


def test_another_schedule_or_clipping_gives_other_losses(monkeypatch):
    config = loop.small_config(num_iterations=12)
    right = loop.plain_loop(config, loop.chain_corpus())
    monkeypatch.setattr(loop, "lr_at", lambda step, config: 0.5)
    assert loop.plain_loop(config, loop.chain_corpus()) != right
    monkeypatch.undo()
    monkeypatch.setattr(loop, "clip_reduced_", lambda optimizers, norm: clip.clip_reduced_(optimizers, 0.1))
    assert loop.plain_loop(config, loop.chain_corpus()) != right


def test_any_cut_of_the_batch_gives_one_loss_and_gradient():
    found = loop.accumulation()
    assert found["largest_relative_difference"]["loss"] < 1e-6
    assert found["largest_relative_difference"]["gradient_norm"] < 1e-5
    norms = found["without_division"]
    assert norms["parts_8"] == pytest.approx(8 * norms["parts_1"], rel=1e-5)
    unequal = found["unequal"]
    assert unequal["weighted_by_targets"] == pytest.approx(unequal["whole"], rel=1e-6)
    assert abs(unequal["mean_of_means"] - unequal["whole"]) > 0.01


def test_the_loss_of_one_row_is_noisier_than_that_of_the_batch():
    found = loop.log_noise()
    assert found["expected_ratio"] == pytest.approx(8**0.5)
    assert 1.5 < found["ratio"] < 6


def test_an_epoch_has_each_target_once_and_a_queue_loses_some():
    found = loop.batch_order()
    assert found["targets_seen"] == found["windows"] * 32
    assert found["targets_seen_twice"] == 0
    assert found["targets_seen"] + found["targets_left_out"] == found["tokens"] - 1
    assert found["share_of_neighbours"] < 0.05
    assert found["step_100_alone"] == found["step_100_after_the_others"]
    assert found["queue_loses_targets"] == 10_006 // 129


@pytest.mark.slow
def test_run_killed_anywhere_resumes_with_the_same_losses():
    found = loop.kill_points()
    assert found["differing_losses"] == 0
    places = {place["killed"]: place for place in found["places"]}
    assert len(places) == 7
    assert all(place["steps_repeated"] <= found["save_every"] for place in found["places"])
    assert all(place["unfinished_after"] == 0 for place in found["places"])
    assert places["in the first save"]["checkpoints"] == []
    assert places["before the rename"]["unfinished"] == [".tmp-step_000008"]
    assert places["before the evaluation"]["steps_repeated"] == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_text(folder / "text.jsonl", documents=400)
    assert train(folder, run="d4", steps=4) == 0
    return folder / "runs" / "d4"


def test_first_batches_are_those_of_the_run(run):
    found = loop.first_batches(run)
    assert (found["rows_of_a_step"], found["sequence_len"]) == (4, 32)
    assert found["windows_read_twice"] == 0
    assert found["share_read"] * found["tokens_of_the_text"] == pytest.approx(20 * 128)
    assert found["share_read"] * found["bytes_of_the_text"] == pytest.approx(found["bytes_read"], rel=0.2)
    assert found["first_row"]


def test_timeline_has_every_part_of_a_step_in_order_and_leaves_the_run_alone(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = loop.step_timeline(run)
    assert json.dumps(found)
    parts = [segment["part"] for segment in found["segments"]]
    assert parts == ["data", "forward", "backward", "forward", "backward", "clipping", "optimizers"]
    edges = [edge for segment in found["segments"] for edge in (segment["start_ms"], segment["end_ms"])]
    assert edges == sorted(edges)
    assert 0.8 < sum(found["shares"].values()) <= 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_expected_ratio_of_the_passes_is_two_without_a_head():
    trainer = loop.small_trainer()
    forward, width = trainer.flops_per_token / 3, trainer.model.config.n_embd
    head = 2 * width * loop.VOCABULARY
    assert loop._expected_ratio(trainer) == pytest.approx(2 * (forward - head) / (forward - head + 3 * head))
    assert loop._expected_ratio(trainer) < 2
