import json
import os
import shutil
import signal

import pytest
import torch
from test_range_test import of_train
from tiny_run import losses, records, train, write_text

from nanochat_native import compare
from nanochat_native.lab import comparison
from nanochat_native.lab.fork import open_fork
from nanochat_native.optim.schedule import momentum_at
from nanochat_native.runs import checkpoint
from nanochat_native.runs.config import parse, resolve_device
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.training.trainer import Trainer

STEPS = 12
AT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text and the run "source" of STEPS steps, with checkpoints at AT and at the end."""
    folder = tmp_path_factory.mktemp("fork")
    write_text(folder / "text.jsonl")
    assert train(folder, run="source", steps=STEPS, save_every=AT, eval_every=AT, keep=4, warmdown_ratio=0.25) == 0
    return folder


def command(folder, out, *args, step=AT, cases=("same:", "none: --warmdown-ratio 0")):
    at = [] if step is None else ["--fork-step", str(step)]
    return ["--fork", str(folder / "runs" / "source"), *at, "--cases", *cases, "--out", str(out), *args]


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def curves(out):
    record = json.loads((out / "result.json").read_text())
    return {(r["case"], r["seed"]): [(p["step"], p["value"]) for p in r["curve"]] for r in record["runs"]}


@pytest.fixture
def kept(monkeypatch):
    """The losses of each run of a comparison, in order, taken before the folder of the run is deleted."""
    found = []

    def remember(path, real=shutil.rmtree, **options):
        if (path / "metrics.jsonl").exists():
            found.append((losses(path), [r["lr_multiplier"] for r in records(path, "train")]))
        real(path, **options)

    monkeypatch.setattr(comparison.shutil, "rmtree", remember)
    return found


def test_fork_with_unchanged_flags_has_the_losses_of_the_run_that_was_never_forked(folder, tmp_path, kept, capsys):
    torch.set_num_threads(1)
    source = folder / "runs" / "source"
    before = content(source)
    assert compare.main(command(folder, tmp_path / "out")) == 0
    assert content(source) == before
    assert f"fork     {source} after {AT} of its {STEPS} steps" in capsys.readouterr().out

    same, none = kept
    never_forked = [loss for loss in losses(source) if loss[1] > AT]
    assert [loss for loss in same[0] if loss[1] > AT and loss in never_forked] == never_forked
    assert [step for kind, step, _ in same[0] if kind == "train"] == list(range(AT + 1, STEPS + 1))
    assert same[1] == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3])
    assert none[1] == [1] * (STEPS - AT)
    # The rate of a step is applied after its loss: the first loss that differs is that after the first lower rate.
    differing = [a[1] for a, b in zip(same[0], none[0], strict=True) if a != b and a[0] == "train"]
    assert differing == [12]

    found = curves(tmp_path / "out")
    at_fork = next(r["bpb"] for r in records(source, "val") if r["step"] == AT)
    assert [step for step, _ in found["same", 0]] == list(range(AT, STEPS + 1))
    assert found["same", 0][0] == found["none", 0][0] == (AT, at_fork)
    assert found["same", 0][-1][1] == records(source, "val")[-1]["bpb"] != found["none", 0][-1][1]


def test_fork_defaults_to_the_newest_checkpoint_one_seed_and_no_search(folder, tmp_path):
    torch.set_num_threads(1)
    out = tmp_path / "out"
    args = ["--num-iterations", "14"]
    assert compare.main(command(folder, out, *args, step=None)) == 0
    record = json.loads((out / "result.json").read_text())
    assert [(run["case"], run["factor"], run["seed"]) for run in record["runs"]] == [("same", 1, 0), ("none", 1, 0)]
    assert record["what"]["fork"]["step"] == STEPS
    assert {points[0][0] for points in curves(out).values()} == {STEPS}


def test_a_case_longer_than_its_run_is_evaluated_on_the_way(folder, tmp_path):
    torch.set_num_threads(1)
    cases = ("8 more: --num-iterations 20", "4 more: --num-iterations 16")
    assert compare.main(command(folder, tmp_path / "out", step=None, cases=cases)) == 0
    steps = {case: [step for step, _ in points] for (case, _), points in curves(tmp_path / "out").items()}
    assert steps == {"8 more": list(range(STEPS, 21)), "4 more": list(range(STEPS, 17))}


def test_more_seeds_of_a_fork_change_only_the_order_of_the_data(folder, tmp_path):
    torch.set_num_threads(1)
    assert compare.main(command(folder, tmp_path / "out", "--seeds", "2", cases=("same:",))) == 0
    first, second = curves(tmp_path / "out").values()
    assert first[0] == second[0]
    assert first[1:] != second[1:]


def test_stopped_fork_resumes_with_the_same_results(folder, tmp_path, monkeypatch):
    torch.set_num_threads(1)

    def step(self, batches, real=Trainer.train_step):
        real(self, batches)
        if self.step == AT + 3:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        assert compare.main(command(folder, out)) == 130
    assert curves(out) == {}
    assert len(list(out.glob(f"runs/*/checkpoints/step_{AT + 3:06d}"))) == 1
    assert compare.main(command(folder, out)) == 0
    assert compare.main(command(folder, tmp_path / "whole")) == 0
    assert curves(out) == curves(tmp_path / "whole")
    assert not (out / "runs").exists()


def test_killed_copy_of_the_checkpoint_is_made_again(folder, tmp_path, monkeypatch):
    """A kill while the checkpoint is copied leaves a folder that is not a run yet."""
    torch.set_num_threads(1)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("nanochat_native.lab.fork.save_config", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert compare.main(command(folder, out)) == 130
    (copied,) = out.glob(f"runs/*/checkpoints/step_{AT:06d}")
    (copied / "model.safetensors").write_bytes(b"half of it")
    assert compare.main(command(folder, out)) == 0
    assert len(curves(out)) == 2


def test_the_momentum_of_a_case_does_not_return_to_that_of_its_run(folder):
    source = folder / "runs" / "source"
    options = comparison.Options(fork=source, cases=("low: --momentum-end 0.8 --momentum-warmup-steps 2",))
    given = parse([], comparison.defaults(options, []))
    config = comparison.make_cases(options, resolve_device(given), given, open_fork(source, AT, SilentConsole()))["low"]
    assert config.warmdown_ratio == 0.25
    assert [momentum_at(step, config) for step in range(AT, STEPS)] == [0.8] * (STEPS - AT)


def test_other_fork_is_another_comparison(folder, tmp_path, capsys):
    torch.set_num_threads(1)
    out = tmp_path / "out"
    long = ("--num-iterations", "14")
    assert compare.main(command(folder, out, *long)) == 0
    assert compare.main(command(folder, out, *long, step=STEPS)) == 2
    assert "contains another comparison (fork)" in capsys.readouterr().err
    assert compare.main(["--cases", "same:", "none: --warmdown-ratio 0", "--out", str(out), *of_train(folder)]) == 2
    assert "fork" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--depth", "3"],
            "case 'same': a fork must keep the model, the optimizer, the data and the batch of its run, got ",
        ),
        (["--depth", "3"], "--depth 2 -> 3"),
        (["--vocab-size", "280"], "--vocab-size 300 -> 280"),
        (["--optimizer", "adamw"], "--optimizer hybrid -> adamw"),
        (["--total-batch-size", "256"], "--total-batch-size 128 -> 256"),
        (["--num-iterations", "6"], "--num-iterations must be > 6, the step of the fork, got 6"),
        (["--cases", "wide: --head-dim 64"], "case 'wide': a fork must keep"),
        (["--cases", "same:", "other: --data stdlib"], "case 'other': a fork must keep"),
        (["--cases", "same:", "other: --data stdlib"], "text.jsonl -> stdlib"),
        (["--suite", "optimizers", "--cases"], "case 'AdamW': a fork must keep"),
        (["--fork-step", "5"], "holds no checkpoint of step 5, but of 6, 12"),
        (["--run", "x"], "--run is for train only"),
    ],
)
def test_flags_with_which_a_run_cannot_continue_are_one_line(folder, tmp_path, capsys, args, message):
    assert compare.main([*command(folder, tmp_path / "out"), *args]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def copy_of_source(folder, tmp_path):
    (tmp_path / "runs").mkdir()
    return shutil.copytree(folder / "runs" / "source", tmp_path / "runs" / "source")


def one_line(capsys):
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


def test_damaged_or_missing_checkpoint_is_one_line(folder, tmp_path, capsys):
    torch.set_num_threads(1)
    source = copy_of_source(folder, tmp_path)
    weights = checkpoint.path_of(source / "checkpoints", STEPS) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    out = tmp_path / "out"
    assert compare.main(command(tmp_path, out, step=STEPS)) == 2
    assert "model.safetensors is damaged" in one_line(capsys)
    assert compare.main(command(tmp_path, out, step=None)) == 0
    assert f"using the checkpoint of step {AT} instead" in capsys.readouterr().out
    shutil.rmtree(source / "checkpoints")
    assert compare.main(command(tmp_path, tmp_path / "none")) == 2
    assert "holds no checkpoint" in one_line(capsys)
    (source / "config.json").unlink()
    assert compare.main(command(tmp_path, tmp_path / "none")) == 2
    assert "is not a run of this program" in one_line(capsys)
    assert not (tmp_path / "none").exists()


def test_fork_on_other_data_and_step_without_fork_are_one_line(folder, tmp_path, capsys):
    other = write_text(tmp_path / "other.jsonl", seed=1)
    assert compare.main(command(folder, tmp_path / "out", "--data", str(other))) == 2
    assert "the data or the tokenizer is not what this run began with" in one_line(capsys)
    assert compare.main(["--fork-step", "6", *of_train(folder)]) == 2
    assert "--fork-step needs --fork" in one_line(capsys)


def test_fork_of_a_finetuned_or_an_imported_run_is_one_line(folder, tmp_path, capsys):
    source = copy_of_source(folder, tmp_path)
    config = json.loads((source / "config.json").read_text())
    tuned = config | {"command": "finetune", "config": config["config"] | {"checkpoint": "runs/base"}}
    (source / "config.json").write_text(json.dumps(tuned))
    assert compare.main(command(tmp_path, tmp_path / "out")) == 2
    assert "a run of finetune" in one_line(capsys)
    (source / "config.json").write_text(json.dumps(config))
    tensors, meta = checkpoint.load(source / "checkpoints")
    checkpoint.save(source / "checkpoints", 13, {"model": tensors["model"]}, meta | {"imported": True})
    assert compare.main(command(tmp_path, tmp_path / "out", "--num-iterations", "14", step=13)) == 2
    assert "no optimizer state to continue from" in one_line(capsys)
