"""The CORE score during training: the same as the command's, without an effect on the run, on all ranks, resumed."""

import dataclasses
import json
import os
import random
import signal

import pytest
import ranks
import torch
import torch.distributed as dist
from test_resume import assert_same_run, killed
from tiny_run import records, tiny_flags, train, write_text

from nanochat_native import evaluate, finetune
from nanochat_native.evaluation import core_score
from nanochat_native.runs import loggers, pictures
from nanochat_native.runs.config import parse, resolve_device
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.isolation import EXIT_CODE
from nanochat_native.training import trainer

STEPS = 12  # of test_resume
CORE = {"core_every": 4, "core_max_per_task": 9}
NOUNS = ("tensor", "kernel", "matrix", "gradient", "token", "layer")


def write_bundle(folder):
    """Write three tasks, one of each kind, of the words of the text."""
    rng = random.Random(0)
    choices = [
        {"query": "the layer feeds the", "choices": rng.sample(NOUNS, 3), "gold": rng.randrange(3)} for _ in range(14)
    ]
    schemas = [
        {"context_options": [f"the {noun}" for noun in rng.sample(NOUNS, 2)], "continuation": "feeds", "gold": 0}
        for _ in range(12)
    ]
    language = [{"context": f"the {rng.choice(NOUNS)} rotates", "continuation": "the"} for _ in range(13)]
    tasks = {
        "choose": ("multiple_choice", 1, 33, choices),
        "winograd": ("schema", 0, 50, schemas),
        "lambada": ("language_modeling", 0, 0, language),
    }
    (folder / "eval_data").mkdir(parents=True)
    for label, (*_, items) in tasks.items():
        (folder / "eval_data" / f"{label}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    entries = [
        {"label": label, "dataset_uri": f"{label}.jsonl", "icl_task_type": kind, "num_fewshot": [shots]}
        for label, (kind, shots, *_) in tasks.items()
    ]
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))
    rows = "".join(f"{label},{baseline}\n" for label, (_, _, baseline, _) in tasks.items())
    (folder / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\n{rows}")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a text, a bundle, "plain": a run without CORE, and "whole": the same run with it."""
    folder = tmp_path_factory.mktemp("core")
    write_text(folder / "text.jsonl")
    write_bundle(folder / "bundle")
    assert train(folder, run="plain", steps=STEPS) == 0
    assert train(folder, run="whole", steps=STEPS, core=folder / "bundle", **CORE) == 0
    return folder


def scores(folder, run):
    """Return the CORE records of a run without their seconds."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records(folder / "runs" / run, "core")]


def measured(folder, run, capsys, step=None):
    """Return what `evaluate` finds for a checkpoint of a run, in the form of a record."""
    args = ["--checkpoint", folder / "runs" / run, "--core", folder / "bundle", "--max-per-task", 9, "--json"]
    args += [] if step is None else ["--step", step]
    capsys.readouterr()
    assert evaluate.main([*map(str, args), "--max-tokens", "64", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    tasks = {f"centred/{task['task']}": task["centred"] for task in found["core"]["tasks"]}
    items = sum(task["items"] for task in found["core"]["tasks"])
    return {"kind": "core", "step": found["step"], "score": found["core"]["score"], "items": items} | tasks


def test_training_has_the_same_bits_with_and_without_core(folder):
    assert_same_run(folder / "runs/whole", folder / "runs/plain")


def test_core_is_measured_at_its_steps_and_equals_the_command(folder, capsys):
    found = scores(folder, "whole")
    assert [record["step"] for record in found] == [4, 8, 12]
    assert found[-2:] == [measured(folder, "whole", capsys, step) for step in (8, 12)]
    assert len({record["score"] for record in found}) > 1


def test_core_is_measured_at_the_end_alone_with_0(folder):
    flags = CORE | {"core_every": 0, "core_max_per_task": 0}
    assert train(folder, run="end", steps=5, core=folder / "bundle", **flags) == 0
    (record,) = scores(folder, "end")
    assert (record["step"], record["items"]) == (5, 14 + 12 + 13)


def test_the_defaults_are_those_of_nanochat(folder):
    config = resolve_device(parse(tiny_flags(folder, core=folder / "bundle")))
    assert (config.core_every, config.core_max_per_task) == (2000, 500)
    plain = resolve_device(parse(tiny_flags(folder)))
    assert (plain.core, plain.core_every, plain.core_max_per_task) == (None, -1, -1)


@pytest.mark.parametrize("call", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 9)), 5])
def test_a_run_that_is_killed_while_core_is_measured_measures_it_once(folder, call):
    run = f"killed-{call}"
    killed(folder, call, "evaluation.core_score", "evaluate_task", run=run, core=folder / "bundle", **CORE)
    assert train(folder, run=run, steps=STEPS, resume="auto") == 0
    assert_same_run(folder / "runs" / run, folder / "runs/whole")
    assert scores(folder, run) == scores(folder, "whole")


def test_a_resumed_run_does_not_measure_again_what_is_in_its_log(folder, monkeypatch):
    killed(folder, 5, "training.trainer", "clip_reduced_", run="again", core=folder / "bundle", **CORE)
    steps, real = [], trainer.Trainer.measure_score
    monkeypatch.setattr(trainer.Trainer, "measure_score", lambda run, score: steps.append(run.step) or real(run, score))
    assert train(folder, run="again", steps=STEPS, resume="auto") == 0
    assert steps == [8, 12]
    assert scores(folder, "again") == scores(folder, "whole")


def test_a_finished_run_gets_a_score_when_it_is_resumed_with_core(folder, capsys):
    assert train(folder, run="late", steps=4) == 0
    assert train(folder, run="late", steps=4, resume="auto", core=folder / "bundle", **CORE) == 0
    assert scores(folder, "late") == [measured(folder, "late", capsys)]


def test_a_signal_ends_core_after_a_task_and_the_resumed_run_makes_up_for_it(folder, monkeypatch):
    real, calls = core_score.evaluate_task, []

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:  # the second task of the second time
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(core_score, "evaluate_task", stopped)
    flags = {"core": folder / "bundle", **CORE}
    assert train(folder, run="signal", steps=STEPS, **flags) == 128 + signal.SIGTERM
    assert len(calls) == 5
    assert [record["step"] for record in scores(folder, "signal")] == [4]
    assert train(folder, run="signal", steps=STEPS, resume="auto") == 0
    assert scores(folder, "signal") == scores(folder, "whole")
    assert_same_run(folder / "runs/signal", folder / "runs/plain")


def on_a_rank(folder):
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.group.WORLD, dist.new_group())
    flags = tiny_flags(folder, run="ranks", steps=4, core=folder / "bundle", **CORE)
    run = trainer.Trainer(resolve_device(parse(flags)), SilentConsole(), world)
    seen, real = [], core_score.score_items
    core_score.score_items = lambda *args: seen.append(len(args[2])) or real(*args)
    return run.train(), run.last_scores["CORE"], sum(seen)


def test_two_ranks_share_the_items_and_have_the_score_of_one(folder, capsys):
    found = ranks.run(2, on_a_rank, folder)
    (record,) = scores(folder, "ranks")
    assert record == measured(folder, "ranks", capsys)
    assert [(code, score) for code, score, _ in found] == [(0, record["score"])] * 2
    assert sum(items for *_, items in found) == record["items"]
    assert all(items < record["items"] for *_, items in found)


def without_a_context(bundle):
    """Make an item whose context is not a prefix of the tokens of context and continuation."""
    path = bundle / "core.yaml"
    tasks = json.loads(path.read_text())
    tasks["icl_tasks"][2]["continuation_delimiter"] = ""
    path.write_text(json.dumps(tasks))
    items = [{"context": "the gradie", "continuation": "nt"}] * 13
    (bundle / "eval_data/lambada.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


MISTAKES = {
    "no bundle": (lambda bundle: (bundle / "core.yaml").unlink(), {}, "is not a CORE bundle: it has no core.yaml"),
    "no items": (lambda bundle: (bundle / "eval_data/choose.jsonl").unlink(), {}, "choose.jsonl: No such file"),
    "too few": (lambda bundle: None, {"core_max_per_task": 1}, "for 1 shots, got 1 with --core-max-per-task 1"),
    "tokens": (without_a_context, {}, "of task 'lambada': with this tokenizer the tokens of the context are not"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bundle_that_cannot_be_used_is_one_line_before_training(folder, tmp_path, capsys, name):
    break_bundle, flags, message = MISTAKES[name]
    bundle = write_bundle(tmp_path / "bundle")
    break_bundle(bundle)
    assert train(folder, run="mistake", core=bundle, **CORE | flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (folder / "runs/mistake").exists()


def test_token_shards_without_a_tokenizer_have_no_core(folder, capsys):
    header = torch.zeros(256, dtype=torch.int32)
    header[:3] = torch.tensor([20240520, 1, 4000])
    (folder / "shards").mkdir()
    for seed, name in enumerate(("train", "val")):
        tokens = torch.randint(0, 300, (4000,), generator=torch.Generator().manual_seed(seed)).to(torch.uint16)
        (folder / f"shards/text_{name}_000.bin").write_bytes(header.numpy().tobytes() + tokens.numpy().tobytes())
    flags = CORE | {"core": folder / "bundle", "data": folder / "shards", "vocab_size": 50257}
    assert train(folder, run="shards", **flags) == 2
    assert "error: --core needs data with a tokenizer" in capsys.readouterr().err
    assert not (folder / "runs/shards").exists()


@pytest.mark.parametrize("args", [["--core-every", "5"], ["--core-max-per-task", "5"]])
def test_the_flags_of_core_need_a_bundle(folder, capsys, args):
    with pytest.raises(ValueError, match=f"{args[0]} needs --core FOLDER"):
        parse(args)
    with pytest.raises(ValueError, match="must be a whole number >= 0"):
        parse(["--core", "x", args[0], "-3"])


def test_core_that_fails_does_not_end_training(folder, monkeypatch, capsys):
    def failing(*args, **kwargs):
        raise RuntimeError("it broke")

    monkeypatch.setattr(core_score, "evaluate_task", failing)
    assert train(folder, run="failing", steps=STEPS, core=folder / "bundle", **CORE) == EXIT_CODE
    captured = capsys.readouterr()
    assert captured.out.count("warning: CORE failed (RuntimeError: it broke); the run continues\n") == 1
    assert "reports of this run failed: CORE 3 times" in captured.err
    assert scores(folder, "failing") == []
    assert_same_run(folder / "runs/failing", folder / "runs/plain")


def test_the_score_is_in_the_summary_the_picture_and_tensorboard(folder, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    figures, real = [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure) or real(figure, path))
    capsys.readouterr()
    assert train(folder, run="shown", steps=4, json=True, core=folder / "bundle", **CORE) == 0
    captured = capsys.readouterr()
    (record,) = records(folder / "runs/shown", "core")
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert record in lines
    assert lines[-1]["core"] == record["score"]
    assert f" | CORE {record['score']:.4f}\n" in captured.err
    left, right = figures[0].axes
    (line,) = right.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([4], [record["score"]])
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["train", "val", "CORE"]
    events = accumulator.EventAccumulator(str(folder / "runs/shown/tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("core/score")] == pytest.approx([record["score"]], rel=1e-6)
    assert "core/centred/winograd" in events.Tags()["scalars"]


def test_a_run_without_core_has_no_second_axis(folder, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure) or path)
    pictures.plot_loss(folder / "runs/plain")
    assert len(figures[0].axes) == 1


def test_fine_tuning_measures_core_too(folder, capsys):
    flags = ["--checkpoint", folder / "runs/whole", "--out-dir", folder / "runs", "--run", "chat", "--device", "cpu"]
    flags += ["--num-iterations", 2, "--batch-rows", 2, "--core", folder / "bundle", "--core-max-per-task", 9]
    assert finetune.main([*map(str, flags), "--backend", tiny_flags(folder)[11]]) == 0
    (record,) = scores(folder, "chat")
    assert record["step"] == 2


def test_a_run_is_resumed_without_core(folder):
    assert train(folder, run="without", steps=4, core=folder / "bundle", **CORE) == 0
    assert train(folder, run="without", steps=8, resume="auto", core="None") == 0
    assert [record["step"] for record in scores(folder, "without")] == [4]
    config = trainer.run_folder.load_config(folder / "runs/without")
    assert (config.core, config.core_every, config.core_max_per_task) == (None, -1, -1)


def test_a_run_with_core_is_opened_again_with_its_bundle(folder):
    config = trainer.run_folder.load_config(folder / "runs/whole")
    assert (config.core, config.core_every, config.core_max_per_task) == (folder / "bundle", 4, 9)
    assert dataclasses.replace(config, core_every=5).core == folder / "bundle"
    assert loggers.openers(config, {}, 0).keys() == {"TensorBoard"}
