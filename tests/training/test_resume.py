"""A run that is killed at any moment and resumed equals the run that was never killed, bit for bit."""

import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys

import pytest
import torch
from tiny_run import losses, records, tiny_flags, train, write_text

import nanochat_native
from nanochat_native.runs import checkpoint
from nanochat_native.runs.run_folder import load_config
from nanochat_native.train import main
from nanochat_native.training import trainer

STEPS = 12


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return a folder with a text, and "whole": the run that is never killed."""
    folder = tmp_path_factory.mktemp("shared")
    write_text(folder / "text.jsonl")
    assert train(folder, run="whole", steps=STEPS) == 0
    return folder


def killed(folder, number, module, name, **flags):
    """Run training until SIGKILL ends it at call `number` of module.name."""
    assert exit_code(die_at_call, number, module, name, tiny_flags(folder, steps=STEPS, **flags)) == -signal.SIGKILL


def exit_code(target, *args):
    """Return the exit code of a new process that calls target(*args)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanochat_native.train"])
    process = context.Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


def die_at_call(number, module, name, args):
    torch.set_num_threads(1)
    owner = functools.reduce(getattr, module.split("."), nanochat_native)
    real, calls = getattr(owner, name), itertools.count(1)

    def dying(*values, **named):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*values, **named)

    setattr(owner, name, dying)
    main(args)


def stop_after_step(step, number, args):
    torch.set_num_threads(1)
    real = trainer.Trainer.train_step

    def train_step(run, batches):
        real(run, batches)
        if run.step == step:
            os.kill(os.getpid(), number)

    trainer.Trainer.train_step = train_step
    sys.exit(main(args))


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    assert [(s["step"], s["text"]) for s in records(one, "sample")] == [
        (s["step"], s["text"]) for s in records(other, "sample")
    ]
    (tensors, meta), (expected, _) = checkpoint.load(one / "checkpoints"), checkpoint.load(other / "checkpoints")
    assert meta["step"] == STEPS
    for group in ("model", "optimizer"):
        assert tensors[group].keys() == expected[group].keys()
        assert all(torch.equal(tensors[group][name], expected[group][name]) for name in expected[group])


@pytest.mark.parametrize(
    ("run", "where", "resumed_from"),
    [
        ("before-the-first-save", (3, "training.trainer", "clip_reduced_"), 0),
        ("in-a-step", (7, "training.trainer", "clip_reduced_"), 4),
        ("in-an-update", (11, "training.trainer.Muon", "step"), 8),
        ("in-the-first-save", (1, "runs.checkpoint", "fsync"), 0),
        ("in-a-save", (3, "runs.checkpoint", "save_file"), 4),
        ("before-the-rename", (2, "runs.checkpoint", "_move_into_place"), 4),
        ("in-the-last-save", (3, "runs.checkpoint", "_move_into_place"), 8),
    ],
)
def test_a_killed_run_resumes_as_the_same_run(shared, capsys, run, where, resumed_from):
    killed(shared, *where, run=run)
    capsys.readouterr()
    assert train(shared, run=run, steps=STEPS, resume="auto") == 0
    assert f"from step {resumed_from}\n" in capsys.readouterr().out
    assert_same_run(shared / "runs" / run, shared / "runs" / "whole")


def test_a_torn_last_line_of_the_log_is_dropped(shared):
    killed(shared, 7, "training.trainer", "clip_reduced_", run="torn")
    log = shared / "runs" / "torn" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    assert train(shared, run="torn", steps=STEPS, resume="auto") == 0
    assert_same_run(shared / "runs" / "torn", shared / "runs" / "whole")


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_other_optimizers_resume_too(shared, optimizer):
    assert train(shared, run=f"{optimizer}-whole", steps=STEPS, optimizer=optimizer) == 0
    killed(shared, 7, "training.trainer", "clip_reduced_", run=optimizer, optimizer=optimizer)
    assert train(shared, run=optimizer, steps=STEPS, resume="auto", optimizer=optimizer) == 0
    assert_same_run(shared / "runs" / optimizer, shared / "runs" / f"{optimizer}-whole")


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty"])
def test_a_damaged_newest_checkpoint_is_replaced_by_the_one_before(shared, capsys, harm):
    run = shared / "runs" / harm
    killed(shared, 11, "training.trainer", "clip_reduced_", run=harm)
    path = run / "checkpoints" / "step_000008" / "model.safetensors"
    data = bytearray(path.read_bytes())
    if harm == "flipped":
        data[-100] ^= 4
    path.write_bytes({"truncated": data[:-1], "flipped": data, "empty": b""}[harm])
    capsys.readouterr()
    assert train(shared, run=harm, steps=STEPS, resume="auto") == 0
    out = capsys.readouterr().out
    assert f"warning: {path} is damaged" in out
    assert "from step 4\n" in out
    assert_same_run(run, shared / "runs" / "whole")


def test_without_an_intact_checkpoint_nothing_is_touched(shared, capsys):
    run = shared / "runs" / "lost"
    killed(shared, 7, "training.trainer", "clip_reduced_", run="lost")
    (run / "checkpoints" / "step_000004" / "meta.json").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(shared, run="lost", steps=STEPS, resume="auto") == 2
    assert "no intact checkpoint" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_finished_run_has_nothing_left_to_do(shared, capsys):
    run = shared / "runs" / "whole"
    before = losses(run)
    assert train(shared, run="whole", steps=STEPS, resume="auto") == 0
    assert losses(run) == before
    assert f"--num-iterations {2 * STEPS}" in capsys.readouterr().out


def test_a_run_resumes_to_a_longer_horizon_with_its_own_flags(shared):
    assert train(shared, run="longer", steps=4, seed=3) == 0
    assert main(["--resume", str(shared / "runs" / "longer"), "--num-iterations", "6"]) == 0
    assert [r["step"] for r in records(shared / "runs" / "longer", "train")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((shared / "runs" / "longer" / "config.json").read_text())["config"]["seed"] == 3


def test_another_text_is_not_the_same_run(shared, tmp_path, capsys):
    write_text(tmp_path / "text.jsonl")
    assert train(tmp_path, steps=4) == 0
    write_text(tmp_path / "text.jsonl", seed=1)
    assert train(tmp_path, steps=4, resume="auto") == 2
    assert "not what this run began with" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [True, False], ids=["with checkpoints", "before the first"])
def test_data_that_has_moved_is_the_same_data(tmp_path, capsys, saved):
    write_text(tmp_path / "text.jsonl")
    assert train(tmp_path, run="whole", steps=STEPS) == 0
    killed(tmp_path, 7 if saved else 3, "training.trainer", "clip_reduced_", run="moved")
    (tmp_path / "text.jsonl").rename(tmp_path / "other-name.jsonl")
    assert train(tmp_path, run="moved", steps=STEPS, resume="auto") == 2
    assert "if the data has moved, give its new path with --data" in capsys.readouterr().err
    assert train(tmp_path, run="moved", steps=STEPS, resume="auto", data=tmp_path / "other-name.jsonl") == 0
    assert f"from step {4 if saved else 0}\n" in capsys.readouterr().out
    assert_same_run(tmp_path / "runs" / "moved", tmp_path / "runs" / "whole")
    assert load_config(tmp_path / "runs" / "moved").data == str(tmp_path / "other-name.jsonl")


@pytest.mark.parametrize(("tokenize", "saved"), [("ahead", False), ("while-training", True)])
def test_a_resumed_run_leaves_out_files_that_came_later(tmp_path, capsys, saved, tokenize):
    data = tmp_path / "shards"
    data.mkdir()
    flags = {"data": data, "tokenize": tokenize, "validation": "last-shard"}
    for seed in (1, 3):
        write_text(data / f"shard_{seed}.jsonl", seed=seed)
    assert train(tmp_path, run="whole", steps=STEPS, **flags) == 0
    killed(tmp_path, 7 if saved else 3, "training.trainer", "clip_reduced_", run="cut", **flags)
    for seed in (2, 4):
        write_text(data / f"shard_{seed}.jsonl", seed=seed)
    capsys.readouterr()
    assert train(tmp_path, run="cut", steps=STEPS, resume="auto", **flags) == 0
    assert "not read: 2 files that the run did not begin with" in capsys.readouterr().out
    assert_same_run(tmp_path / "runs/cut", tmp_path / "runs/whole")
    (data / "shard_1.jsonl").unlink()
    assert train(tmp_path, run="cut", steps=STEPS, resume="auto", **flags) == 2
    assert "not what this run began with" in capsys.readouterr().err


def test_a_damaged_list_of_the_data_is_one_line(tmp_path, capsys):
    write_text(tmp_path / "text.jsonl")
    assert train(tmp_path, steps=2) == 0
    for content in ("[", '{"text.jsonl": 1}'):
        (tmp_path / "runs/tiny/data_files.json").write_text(content)
        assert train(tmp_path, steps=2, resume="auto") == 2
        assert re.fullmatch(r"error: .*data_files\.json is damaged.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("saved", [True, False], ids=["with checkpoints", "before the first"])
@pytest.mark.parametrize("hashed", [True, False], ids=["of now", "of before hashes were kept"])
def test_other_data_under_another_path_is_refused_and_nothing_changes(tmp_path, capsys, saved, hashed):
    write_text(tmp_path / "text.jsonl")
    write_text(tmp_path / "other.jsonl", seed=1)
    killed(tmp_path, 7 if saved else 3, "training.trainer", "clip_reduced_", run="kept")
    run = tmp_path / "runs" / "kept"
    if not hashed:
        stored = json.loads((run / "config.json").read_text())
        del stored["data_hash"]
        (run / "config.json").write_text(json.dumps(stored))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(tmp_path, run="kept", steps=STEPS, resume="auto", data=tmp_path / "other.jsonl") == 2
    assert "not what this run began with" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert train(tmp_path, run="kept", steps=STEPS, resume="auto") == 0


def test_changed_flags_are_refused_by_name(shared, capsys):
    before = losses(shared / "runs" / "whole")
    assert train(shared, run="whole", steps=STEPS, resume="auto", matrix_lr=0.5) == 2
    assert "--matrix-lr auto -> 0.5" in capsys.readouterr().err
    assert losses(shared / "runs" / "whole") == before


def test_a_stopped_run_resumes_to_the_same_end(shared):
    """Send SIGTERM in a step, and do the rest in another process."""
    flags = tiny_flags(shared, steps=STEPS, run="stopped")
    assert exit_code(stop_after_step, 5, signal.SIGTERM, flags) == 143
    assert checkpoint.steps(shared / "runs" / "stopped" / "checkpoints")[-1] == 5
    assert train(shared, run="stopped", steps=STEPS, resume="auto") == 0
    assert_same_run(shared / "runs" / "stopped", shared / "runs" / "whole")


def test_muons_options_and_their_state_are_resumed(tmp_path):
    """Compare one run with all options with the same run killed and resumed."""
    write_text(tmp_path / "text.jsonl")
    options = dict.fromkeys(
        ("normuon", "row_equilibration", "frobenius_renormalisation", "cautious", "per_head"), True
    ) | {"matrix_weight_decay": 0.1}
    assert train(tmp_path, run="whole", steps=STEPS, **options) == 0
    killed(tmp_path, 7, "training.trainer.Trainer", "train_step", run="cut", **options)
    assert train(tmp_path, run="cut", steps=STEPS, resume="auto", **options) == 0
    whole, cut = (losses(tmp_path / "runs" / run) for run in ("whole", "cut"))
    assert cut == whole
    assert records(tmp_path / "runs/whole", "train")[0]["loss"] > records(tmp_path / "runs/whole", "train")[-1]["loss"]


def test_the_original_guides_muon_and_its_state_are_resumed(tmp_path):
    write_text(tmp_path / "text.jsonl")
    options = {"muon_form": "original_guide", "ns_coefficients": "cubic", "matrix_weight_decay": 0.1}
    assert train(tmp_path, run="whole", steps=STEPS, **options) == 0
    killed(tmp_path, 7, "training.trainer.Trainer", "train_step", run="cut", **options)
    assert train(tmp_path, run="cut", steps=STEPS, resume="auto", **options) == 0
    whole, cut = (losses(tmp_path / "runs" / run) for run in ("whole", "cut"))
    assert cut == whole


def test_an_sgd_run_from_when_it_had_one_rate_keeps_it(tmp_path):
    write_text(tmp_path / "text.jsonl")
    assert train(tmp_path, run="old", steps=2, optimizer="sgd") == 0
    path = tmp_path / "runs" / "old" / "config.json"
    stored = json.loads(path.read_text())
    del stored["config"]["ns_steps"]
    stored["config"] |= {"embedding_lr": 0.2, "unembedding_lr": 0.004}
    path.write_text(json.dumps(stored))
    config = load_config(path.parent)
    assert (config.embedding_lr, config.unembedding_lr, config.matrix_lr) == (0.1, 0.1, 0.1)
