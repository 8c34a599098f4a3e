"""The loggers of a run, against fakes of wandb and trackio with the calls of their versions 0.19 to 0.31 and 0.5 to
0.43: what they are given, and that a run never ends because of them."""

import importlib
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import ranks
import torch.distributed as dist
from fork_server import python
from tiny_run import losses, records, tiny_flags, train, write_text

from nanochat_native import compare
from nanochat_native.runs import loggers, metrics_log
from nanochat_native.runs.config import parse, resolve_device
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.runtime.distributed import World
from nanochat_native.runtime.isolation import EXIT_CODE
from nanochat_native.training import trainer

# Calls are appended to `calls`. `fail` and `hang` name the call that raises or waits for `released`; after a number N
# they mean call N of it.
COMMON = """
import threading

calls, counts = [], {}
fail = hang = None
released = threading.Event()


def called(name, *values):
    calls.append((name, *values))
    counts[name] = counts.get(name, 0) + 1
    if fail in (name, (name, counts[name])):
        raise RuntimeError("it broke\\nin two lines")
    if fail == ("exit", name):
        raise SystemExit(3)
    if hang in (name, (name, counts[name])):
        released.wait(60)


def check(metrics):
    for name, value in metrics.items():
        assert type(value) in (int, float, str), (name, value)
"""
WANDB = """
class Run:
    def __init__(self):
        self.summary = {}

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None):
        called("define_metric", name, step_metric)

    def log(self, data, step=None, commit=None):
        assert step is None, "wandb's own step may not decrease, as it does when a run is resumed"
        check(data)
        called("log", data)

    def finish(self, exit_code=None):
        called("finish", dict(self.summary), exit_code)


def init(*, project=None, dir=None, id=None, name=None, config=None, allow_val_change=None, mode=None, resume=None,
         settings=None):
    assert not set(id) & set("/\\\\#?%:")
    assert mode is None, "WANDB_MODE decides"
    print("wandb: a message")
    called("init", dict(project=project, dir=dir, id=id, name=name, config=config, resume=resume, settings=settings))
    return Run()
"""
TRACKIO = """
class Run:
    def log(self, metrics, step=None):
        check(metrics)
        assert not set(metrics) & {"project", "run", "timestamp", "step", "time", "metrics"}
        assert not any(name.startswith("__") for name in metrics)
        called("log", metrics, step)

    def finish(self):
        called("finish")


def init(project, name=None, group=None, space_id=None, config=None, resume="never", settings=None, private=None,
         embed=True):
    assert not any(key.startswith("_") for key in config)
    print("* Trackio project initialized: " + project)
    called("init", dict(project=project, name=name, config=config, resume=resume))
    return Run()
"""
FAKES = {"wandb": COMMON + WANDB, "trackio": COMMON + TRACKIO}
STEPS = 4
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a text, and "plain": a run without wandb and trackio."""
    folder = tmp_path_factory.mktemp("loggers")
    write_text(folder / "text.jsonl")
    assert train(folder, run="plain", steps=STEPS, sample_every=2, eval_every=2) == 0
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Return a folder with both fakes."""
    packages = tmp_path_factory.mktemp("packages")
    for name, source in FAKES.items():
        (packages / f"{name}.py").write_text(source)
    return packages


@pytest.fixture
def fakes(packages, monkeypatch):
    """Return a function that imports a fake anew. Threads that hang are released at the end."""
    monkeypatch.syspath_prepend(packages)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setattr(loggers.InThread, "threads", [])
    found = []

    def fresh(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        found.append(importlib.import_module(name))
        return found[-1]

    yield fresh
    for module in found:
        module.released.set()
    for thread in loggers.InThread.threads:
        thread.join(60)
        assert not thread.is_alive()


def logged(folder, run, **flags):
    return train(folder, run=run, **{"steps": STEPS, "sample_every": 2, "eval_every": 2} | flags)


def shown(record):
    """Return a record of metrics.jsonl as a logger shows it."""
    kind = record["kind"]
    return {f"{kind}/{k}": v for k, v in record.items() if k not in ("kind", "step") and v is not None}


def all_records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_wandb_gets_the_config_all_records_and_the_summary(folder, fakes):
    fake = fakes("wandb")
    assert logged(folder, "w", wandb="mine") == 0
    run = folder / "runs/w"
    (_, given), *rest = fake.calls
    config = given.pop("config")
    kept = json.loads((run / "config.json").read_text())["config"]
    assert {name: config[name] for name in kept} == kept
    assert config["parameters"] > 0
    assert config["ranks"] == 1
    assert re.fullmatch("[0-9a-f]{8}", given["id"])
    assert given == {
        "project": "mine",
        "dir": str(run),
        "id": json.loads((run / "loggers.json").read_text())["wandb"]["id"],
        "name": "w",
        "resume": "allow",
        "settings": {"console": "off"},
    }
    axes = [call[1:] for call in rest if call[0] == "define_metric"]
    assert axes == [("step", None), ("tokens", None), ("*", "step")]
    found = [call[1] for call in rest if call[0] == "log"]
    assert found == [shown(r) | {"step": r["step"], "tokens": 128 * r["step"]} for r in all_records(run)]
    assert {name.partition("/")[0] for each in found for name in each} == {"train", "val", "sample", "step", "tokens"}
    name, summary, exit_code = rest[-1]
    assert (name, exit_code) == ("finish", 0)
    assert (summary["step"], summary["validation_bpb"]) == (STEPS, records(run, "val")[-1]["bpb"])


def test_trackio_gets_the_config_all_records_and_the_summary(folder, fakes):
    fake = fakes("trackio")
    assert logged(folder, "t", trackio=True) == 0
    run = folder / "runs/t"
    (_, given), *rest = fake.calls
    assert given["config"]["depth"] == 2
    ident = json.loads((run / "loggers.json").read_text())["trackio"]["id"]
    assert (given["project"], given["name"], given["resume"]) == ("nanochat-native", f"t-{ident}", "allow")
    *found, summary = [call[1:] for call in rest if call[0] == "log"]
    assert found == [(shown(r) | {"tokens": 128 * r["step"]}, r["step"]) for r in all_records(run)]
    assert summary[0]["summary/validation_bpb"] == records(run, "val")[-1]["bpb"]
    assert rest[-1] == ("finish",)


def test_a_logger_changes_no_bit_of_the_run(folder, fakes):
    fakes("wandb"), fakes("trackio")
    assert logged(folder, "both", wandb=True, trackio=True) == 0
    assert losses(folder / "runs/both") == losses(folder / "runs/plain")


@pytest.mark.parametrize("name", ["wandb", pytest.param("trackio", marks=SLOW)])
def test_a_resumed_run_keeps_its_id_and_its_project(folder, fakes, name):
    run = f"resumed-{name}"
    assert logged(folder, run, **{name: "mine"}) == 0
    first = fakes(name)
    assert logged(folder, run, resume="auto", steps=6) == 0  # the flag is kept
    second = fakes(name)
    assert logged(folder, run, resume="auto", steps=7, **{name: "other"}) == 0
    third = fakes(name)
    assert logged(folder, run, resume="auto", steps=8, **{f"no_{name}": True}) == 0
    assert third.calls == []
    kept = "id" if name == "wandb" else "name"
    ids = [dict(fake.calls[0][1])[kept] for fake in (first, second)]
    assert first.calls[0][1]["project"] == "mine"
    assert second.calls[0][1]["project"] == "other"
    assert len(set(ids)) == 2
    assert {call[1]["tokens"] // 128 for call in first.calls if call[0] == "log" and "tokens" in call[1]} >= {5, 6}


def test_the_id_of_a_folder_changes_with_the_project_alone(tmp_path, folder):
    config = parse(tiny_flags(folder, wandb="one", trackio="two", out_dir=tmp_path, run="r"))
    (tmp_path / "r").mkdir()
    first = loggers.identity(config, "wandb", {})
    assert loggers.identity(config, "wandb", {}).id == first.id
    assert loggers.identity(config, "trackio", {}).id != first.id
    other = parse(tiny_flags(folder, wandb="three", out_dir=tmp_path, run="r"))
    assert loggers.identity(other, "wandb", {}).id != first.id
    for damaged in ("", "[]", '{"wandb": 3}', '{"wandb": {"project": "one"}}'):
        (tmp_path / "r" / loggers.IDENTITIES).write_text(damaged)
        assert re.fullmatch("[0-9a-f]{8}", loggers.identity(config, "wandb", {}).id)


def test_a_run_that_is_overwritten_has_another_id(folder, fakes):
    ids = []
    for _ in range(2):
        fake = fakes("wandb")
        assert logged(folder, "over", wandb=True, overwrite=True) == 0
        ids.append(fake.calls[0][1]["id"])
    assert ids[0] != ids[1]


def test_wandb_dir_names_another_folder(folder, fakes, monkeypatch, tmp_path):
    fake = fakes("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert logged(folder, "dir", wandb=True) == 0
    assert fake.calls[0][1]["dir"] == str(tmp_path)


FAILURES = [("wandb", call) for call in ("init", ("log", 3), "finish", ("exit", "init"))] + [("trackio", "log")]
MORE_FAILURES = [("trackio", call) for call in ("init", ("log", 3), "finish", ("exit", "log"))] + [("wandb", "log")]


@pytest.mark.parametrize(
    ("name", "call"), [*FAILURES, *(pytest.param(*each, marks=SLOW) for each in MORE_FAILURES)], ids=str
)
def test_a_logger_that_raises_is_off_after_one_warning(folder, fakes, capsys, name, call):
    fake = fakes(name)
    fake.fail = call
    run = f"fails-{name}-{call}".replace(" ", "")
    assert logged(folder, run, **{name: True}) == EXIT_CODE
    captured = capsys.readouterr()
    why = "RuntimeError: SystemExit(3)" if call[0] == "exit" else "RuntimeError: it broke in two lines"
    assert captured.out.count(f"warning: {name} failed ({why}); the run continues\n") == 1
    assert f"reports of this run failed: {name} once\n" in captured.err
    assert losses(folder / "runs" / run) == losses(folder / "runs/plain")
    last = call[1] if call[0] == "exit" else call[0] if isinstance(call, tuple) else call
    assert fake.calls[-1][0] == last
    assert fake.counts[last] == (call[1] if call == ("log", 3) else 1)


HANGS = [("init", "it did not start within 0.2 s"), (("log", 2), "it did not take a record within 0 s")]
HANGS += [("finish", "it did not send everything within 0.2 s")]


@pytest.mark.parametrize(("call", "message"), HANGS, ids=str)
def test_a_logger_that_hangs_is_off_after_one_warning(folder, fakes, monkeypatch, capsys, call, message):
    fake = fakes("wandb")
    fake.hang = call
    left, wanted = [], {"START_SECONDS": 0.2, "END_SECONDS": 0.2}
    if call == ("log", 2):
        wanted = {"CALL_SECONDS": 0}
        real = loggers.InThread.log

        def slow_enough(self, kind, step, values):  # the thread has begun the call before
            while self._busy_since is None and step >= 2:
                pass
            real(self, kind, step, values)

        monkeypatch.setattr(loggers.InThread, "log", slow_enough)
    for name, seconds in wanted.items():
        monkeypatch.setattr(loggers, name, seconds)
    monkeypatch.setattr(os, "_exit", left.append)
    run = f"hangs-{call}".replace(" ", "")
    assert logged(folder, run, wandb=True) == EXIT_CODE
    captured = capsys.readouterr()
    assert captured.out.count(f"warning: wandb failed (TimeoutError: {message}); the run continues\n") == 1 or (
        captured.out.count(f"warning: wandb failed ({message}); the run continues\n") == 1
    )
    assert left == [EXIT_CODE]
    fake.released.set()
    loggers.InThread.threads[0].join(60)
    assert fake.calls[-1][0] == "finish"  # a late answer does not leave the run open
    assert losses(folder / "runs" / run) == losses(folder / "runs/plain")
    assert (folder / "runs" / run / "loss.png").exists() or "plot     none" in captured.out


@SLOW
def test_the_process_ends_though_the_exit_functions_of_a_package_wait(folder, packages):
    """Run a process whose logger hangs at its end and at the exit of the process, as one without a network does."""
    code = (
        "import atexit, sys, wandb\n"
        "from nanochat_native import train\n"
        "from nanochat_native.runs import loggers\n"
        "loggers.END_SECONDS = 0.5\n"
        "wandb.hang = 'finish'\n"
        "atexit.register(wandb.released.wait, 300)\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(packages), *sys.path]), "OMP_NUM_THREADS": "1"}
    args = tiny_flags(folder, run="exit", steps=2, wandb="mine")
    done = subprocess.run([python(), "-c", code, *args], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == EXIT_CODE, done.stderr
    assert "did not send everything within 0.5 s" in done.stdout
    assert "done     step 2 of 2" in done.stdout


def test_a_run_that_fails_ends_as_failed(folder, fakes, monkeypatch):
    fake = fakes("wandb")

    def failing(*args):
        raise OSError("the disk is gone")

    monkeypatch.setattr(trainer.Trainer, "compute_gradients", failing)
    assert logged(folder, "failed", wandb=True) == 1
    assert fake.calls[-1] == ("finish", {}, 1)


def test_standard_output_holds_the_json_lines_alone(folder, fakes, capsys):
    fakes("wandb"), fakes("trackio")
    capsys.readouterr()
    assert logged(folder, "json", wandb=True, trackio=True, json=True) == 0
    captured = capsys.readouterr()
    assert all(json.loads(line)["kind"] for line in captured.out.splitlines())
    assert "wandb: a message\n" in captured.err
    assert "* Trackio project initialized" in captured.err


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_one_line_before_training(folder, monkeypatch, capsys, name):
    real = loggers.importlib.util.find_spec
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda module: None if module == name else real(module))
    assert logged(folder, "missing", **{name: True}) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: --{name} requires {name}: pip install 'nanochat-native[{name}]'\n"
    assert captured.out == ""
    assert not (folder / "runs/missing").exists()


def test_experiments_take_no_logger(capsys):
    assert compare.main(["--wandb"]) == 2
    assert "--wandb is for train only" in capsys.readouterr().err


def on_a_rank(folder, packages):
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.group.WORLD, dist.new_group())
    if world.is_rank0:
        sys.path.insert(0, str(packages))  # the other ranks need no package
    flags = tiny_flags(folder, run="ranks", steps=2, wandb="mine")
    run = trainer.Trainer(resolve_device(parse(flags)), SilentConsole(), world)
    code = run.train()
    return code, len(sys.modules["wandb"].calls) if "wandb" in sys.modules else 0


def test_rank_0_alone_logs(folder, packages):
    (code, calls), others = ranks.run(2, on_a_rank, folder, packages)
    assert (code, others) == (0, (0, 0))
    assert calls > 5


def test_tensorboard_is_a_logger_that_a_log_has_only_if_it_is_given(tmp_path):
    pytest.importorskip("tensorboard")
    log = metrics_log.MetricsLog(tmp_path)
    log.write("train", 1, loss=1.0)
    log.close()
    assert not (tmp_path / "tensorboard").exists()
    board = loggers.TensorBoard(tmp_path / "tensorboard", 0)
    log = metrics_log.MetricsLog(tmp_path, 1, openers={"TensorBoard": lambda: board, "none": lambda: None})
    log.write("train", 2, loss=1.0, text="words", nothing=None)
    log.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_queued_record_is_logged_before_the_end():
    events, gate = [], threading.Event()

    class Slow:
        def log(self, kind, step, values):
            gate.wait(60)
            events.append(step)

        def end(self, summary, exit_code):
            events.append("end")

    logger = loggers.InThread(Slow)
    for step in range(5):
        logger.log("train", step, {})
    gate.set()
    logger.end({}, 0)
    assert events == [0, 1, 2, 3, 4, "end"]
