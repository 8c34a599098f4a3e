"""What the laboratory's commands share, the schedules' command, and pictures drawn again."""

import io
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_range_test import of_train
from tiny_run import train, write_text

from nanochat_native import batch_size, compare, lr_find, plot, schedules
from nanochat_native.lab import command_flags
from nanochat_native.memory import main as memory
from nanochat_native.optim.schedule import SHAPES, lr_at, lr_multiplier, momentum_at, muon_momentum
from nanochat_native.runs import pictures, results
from nanochat_native.runs.config import TrainConfig, parse, resolve_defaults
from nanochat_native.runtime import console
from nanochat_native.runtime.command import run_reporting
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.training import resolve
from nanochat_native.training.trainer import Trainer


@dataclass
class Options:
    """An experiment."""

    size: int = 3
    """Of it."""
    out: Path | None = None
    """Where."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    write_text(folder / "text.jsonl")
    return folder


def test_own_flags_and_those_of_train_are_parsed(tmp_path):
    options, config, _ = command_flags.parse_flags(
        Options, "lr_find", ["--depth", "3", "--size", "5", "--device", "cpu", "--cautious"]
    )
    assert options == Options(size=5)
    assert (config.depth, config.cautious, config.max_seq_len, config.dtype) == (3, "on", 256, "float32")
    _, config, _ = command_flags.parse_flags(
        Options, "lr_find", ["--device", "cpu"], base=lambda own: TrainConfig(depth=7)
    )
    assert config.depth == 7


@pytest.mark.parametrize("flag", ["--run x", "--out-dir x", "--resume auto", "--overwrite", "--dry-run", "--json"])
def test_flags_of_a_run_are_refused(flag):
    with pytest.raises(ConfigError, match=f"{flag.split()[0]} is for train only; lr_find writes its result to --out"):
        command_flags.parse_flags(Options, "lr_find", flag.split())


def rates(args):
    return resolve.learning_rates(resolve_defaults(parse(args), gpu=False))


def test_rates_are_those_that_train_takes():
    october = ["--recipe", "october"]
    assert rates(october) == {"embedding_lr": 0.2, "unembedding_lr": 0.004, "matrix_lr": 0.02}
    assert rates([]) == {
        "embedding_lr": 0.3,
        "unembedding_lr": 0.008,
        "matrix_lr": 0.02,
        "scalar_lr": 0.5,
    }
    assert rates(["--optimizer", "adamw"])["matrix_lr"] == 0.002
    assert rates(["--scalar-lr", "0.7"])["scalar_lr"] == 0.7
    assert rates([*october, "--embedding-lr", "0.7", "--matrix-lr", "0"]) == {
        "embedding_lr": 0.7,
        "unembedding_lr": 0.004,
        "matrix_lr": 0.0,
    }


def test_results_are_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, third = (results.open_folder(None, "lr_find") for _ in range(3))
    assert [str(f) for f in (first, second, third)] == ["lab/lr_find", "lab/lr_find-2", "lab/lr_find-3"]
    (tmp_path / "empty").mkdir()
    assert results.open_folder(tmp_path / "empty", "lr_find") == tmp_path / "empty"
    (tmp_path / "empty" / "thesis.txt").write_text("all of it")
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        results.open_folder(tmp_path / "empty", "lr_find")
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        results.open_folder(tmp_path / "empty" / "thesis.txt", "lr_find")


def test_the_bar():
    assert console.bar(0, 10) == f"[{'.' * console.BAR}] 0/10"
    assert console.bar(10, 10) == f"[{'#' * console.BAR}] 10/10"
    assert console.bar(5, 10).count("#") == console.BAR // 2


# --- schedules ---

FLAGS = [
    "--recipe",
    "october",
    "--num-iterations",
    "40",
    "--warmup-ratio",
    "0.1",
    "--warmdown-ratio",
    "0.5",
    "--momentum-warmup-steps",
    "20",
]


def test_schedules_are_the_functions_that_train_uses(folder, tmp_path, capsys, monkeypatch):
    """Every point of the result is what the trainer's optimizers are given."""
    out = tmp_path / "out"
    changing = ["--final-lr-frac", "0.2", "--momentum-final", "0.6", "--decay-schedule", "cosine"]
    assert schedules.main([*FLAGS, *changing, "--plot", "--out", str(out)]) == 0
    record = json.loads((out / "result.json").read_text())
    assert set(record["multipliers"]) == set(SHAPES)
    printed = capsys.readouterr().out
    assert all(shape in printed for shape in SHAPES)
    assert (out / "schedules.png").read_bytes().startswith(b"\x89PNG")

    torch.set_num_threads(1)
    given = []

    def spy(self, batches, real=Trainer.train_step):
        real(self, batches)
        group = self.optimizers[1].param_groups[0]
        decay = group["weight_decay"] / group["initial_weight_decay"]
        given.append((group["lr"] / group["initial_lr"], group["momentum"], decay))

    monkeypatch.setattr(Trainer, "train_step", spy)
    flags = {"warmup_ratio": 0.1, "warmdown_ratio": 0.5, "momentum_warmup_steps": 20, "final_lr_frac": 0.2}
    flags |= {"momentum_final": 0.6, "decay_schedule": "cosine", "matrix_weight_decay": 0.1}
    assert train(folder, steps=40, schedule="cosine", **flags) == 0
    curves = (record["multipliers"]["cosine"], record["momentum"], record["decay"])
    for values, curve in zip(zip(*given, strict=True), curves, strict=True):
        assert values == pytest.approx(curve)


def test_schedules_of_the_flags():
    config = resolve_defaults(parse([*FLAGS, "--momentum-start", "0.5", "--momentum-end", "0.9"]), gpu=False)
    for step in (0, 3, 19, 20, 33, 39):
        assert lr_at(step, config) == lr_multiplier(step, 40, warmup_ratio=0.1, warmdown_ratio=0.5)
        assert momentum_at(step, config) == muon_momentum(step, start=0.5, end=0.9, warmup_steps=20)


def test_schedules_without_a_picture_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert schedules.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "0", *(str(round(i * 99.9)) for i in range(1, 11))]
    assert list(tmp_path.iterdir()) == []
    assert schedules.main(["--warmup-ratio", "2"]) == 2
    assert "--warmup-ratio must be a number in [0, 1], got 2.0" in capsys.readouterr().err
    assert schedules.main(["--target-flops", "1e12"]) == 2
    assert "schedules builds no model" in capsys.readouterr().err


# --- pictures ---


@pytest.fixture(scope="module")
def finished(folder):
    """A result of every command, and a diagnosed run."""
    torch.set_num_threads(1)
    small = of_train(folder, steps=4, device_batch_size=1)
    for command, own in (
        (lr_find, ["--steps", "20"]),
        (batch_size, ["--steps", "14", "--skip", "2"]),
        (compare, ["--cases", "a:", "b: --matrix-lr 0.1", "--rates", "1"]),
        (schedules, ["--plot"]),
    ):
        name = command.__name__.rpartition(".")[2]
        assert command.main([*own, "--out", str(folder / "results" / name), *small]) in (0, 1)
    sizes = ["--depth", "1", "--max-seq-len", "32", "--vocab-size", "300", "--device-batch-size", "2"]
    for name, own in (("measure", ["--measure"]), ("checkpointing", ["--checkpointing"])):
        assert memory([*own, *sizes, "--out", str(folder / "results" / name)]) == 0
    assert memory(["--gpu-memory", "24", "--out", str(folder / "results" / "batches")]) == 0
    assert train(folder, run="looked", diagnose=True, diagnose_every=1, steps=4) == 0
    return folder


@pytest.mark.parametrize(
    ("place", "name"),
    [(name, name) for name in ("lr_find", "batch_size", "compare", "schedules")]
    + [(name, "memory") for name in ("measure", "checkpointing", "batches")],
)
def test_a_picture_is_drawn_again_from_the_result_alone(finished, tmp_path, place, name, capsys):
    first = (finished / "results" / place / f"{name}.png").read_bytes()
    shutil.copy(finished / "results" / place / "result.json", tmp_path / "result.json")
    assert plot.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / f"{name}.png")
    assert (tmp_path / f"{name}.png").read_bytes() == first


@pytest.mark.parametrize("name", ["lr_find", "batch_size", "compare", "schedules"])
def test_result_records_its_flags_and_versions(finished, name):
    record = json.loads((finished / "results" / name / "result.json").read_text())
    assert record["format"] == results.FORMAT
    assert record["command"] == name
    assert record["finished"] is True
    assert record["seed"] == record["config"]["seed"] == 0
    assert record["config"]["depth"] == 2
    assert set(record["versions"]) == {"nanochat_native", "torch", "python", "machine"}
    assert "out" in record["options"]
    assert TrainConfig(**{k: Path(v) if k in ("cache_dir", "out_dir") else v for k, v in record["config"].items()})


def test_pictures_of_a_run_are_drawn_again(finished, tmp_path, capsys):
    run = finished / "runs" / "looked"
    shutil.copy(run / "metrics.jsonl", tmp_path / "metrics.jsonl")
    assert plot.main([str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.split()) == 2
    assert (tmp_path / "diagnosis.png").exists()
    assert plot.main([str(run)]) == 0
    assert (run / "loss.png").exists()


def test_folder_without_a_picture_is_refused(tmp_path, capsys, monkeypatch):
    assert plot.main([str(tmp_path)]) == 2
    assert "neither a result.json nor a metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "result.json").write_text('{"command": "bake"}')
    assert plot.main([str(tmp_path)]) == 2
    assert re.search("must be one of lr_find.*'bake'", capsys.readouterr().err)
    for damaged in ("{", "[]", "", '{"command": "compare"}', '{"command": "lr_find", "tests": 3}'):
        (tmp_path / "result.json").write_text(damaged)
        assert plot.main([str(tmp_path)]) == 2
        assert "result.json cannot be drawn" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text('{"kind": "val", "step": 1}\n')
    assert plot.main([str(tmp_path / "other")]) == 2
    assert "metrics.jsonl cannot be drawn" in capsys.readouterr().err
    (tmp_path / "result.json").write_text('{"command": "schedules", "multipliers": {}, "momentum": []}')
    monkeypatch.setattr(pictures, "new_figure", lambda *size: None)
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    assert plot.main([str(tmp_path)]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("module", [lr_find, batch_size, compare, schedules, plot])
def test_help_explains_every_flag(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert len(text.split("options")[0]) > 150


def test_failed_picture_keeps_the_result(tmp_path, monkeypatch, capsys):
    """lr_find | true, and a matplotlib that fails: the result is written, and the exit code tells of the report."""

    class Dead(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    def broken(folder):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(pictures, "draw", broken)
    assert schedules_like(tmp_path / "one") == 3
    captured = capsys.readouterr()
    assert "warning: picture failed (RuntimeError: no fonts)" in captured.out
    monkeypatch.setattr(sys, "stdout", Dead())
    assert schedules_like(tmp_path / "two") == 3
    assert (tmp_path / "two" / "result.json").exists()


def schedules_like(folder):
    """A command of the laboratory that leaves an empty result."""

    def run(args, failures):
        folder.mkdir()
        results.finish(folder, {"command": "schedules"}, Console(failures=failures))
        return 0

    return run_reporting(run, [])
