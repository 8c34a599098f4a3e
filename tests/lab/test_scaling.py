"""The scaling command: its plan, its runs, and how it resumes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from test_range_test import of_train
from tiny_run import train, wait_until, write_text

from nanochat_native import plot, scaling
from nanochat_native.lab.scaling import plan, report, study
from nanochat_native.lab.scaling.plan import rounded_up
from nanochat_native.runs.run_folder import load_config
from nanochat_native.training.trainer import Trainer

BUDGETS = (1e10, 1.5e10)
OWN = ("--depth", "--num-iterations")  # flags of the tiny runs that the experiment chooses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    write_text(folder / "text.jsonl")
    return folder


def command(folder, out, *own, budgets=BUDGETS, **flags):
    args = of_train(folder, **{"eval_every": 0, "save_every": 0} | flags)
    pairs = [pair for pair in zip(args[::2], args[1::2], strict=True) if pair[0] not in OWN]
    chosen = [] if not budgets else ["--budgets", *map(str, budgets)]
    return [*chosen, "--depths", "1", "2", "3", *own, "--out", str(out), *(word for pair in pairs for word in pair)]


def isoflop(folder, out, **flags):
    return command(folder, out, "--study", "isoflop", **flags)


def stored(out):
    return json.loads((out / "result.json").read_text())


def figures(out):
    return [(run["name"], run["value"]) for run in stored(out)["runs"]]


@pytest.fixture(scope="module")
def whole(folder):
    """An experiment of both studies, made at once, and what it printed."""
    torch.set_num_threads(1)
    out = folder / "whole"
    args = command(folder, out, "--target-param-data-ratio", "0.012")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(study.Console, "say", lambda self, text="": lines.append(text))
        assert scaling.main([*args, "--dry-run"]) == 0
        assert not out.exists()
        dry, lines = lines, []
        patch.setattr(study.Console, "say", lambda self, text="": lines.append(text))
        assert scaling.main(args) == 0
    return out, dry, lines


def table_of(lines):
    """The plan among the lines that a call printed."""
    return next(line for line in lines if line.startswith("| run |"))


def rows_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_dry_run_shows_the_runs_that_are_made(whole):
    out, dry, real = whole
    planned, made = (rows_of(table_of(lines)) for lines in (dry, real))
    assert [row[: len(made[0])] for row in planned] == made
    assert planned[0][-2:] == ["time", "disk"]
    record = stored(out)
    assert [row[0] for row in made[2:]] == [run["name"] for run in record["runs"]]
    for run in record["runs"]:
        place = out / "runs" / run["name"]
        config = load_config(place)
        assert (config.depth, config.num_iterations, config.seed) == (run["depth"], run["steps"], run["seed"])
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        assert sum(line["kind"] == "train" for line in lines) == run["steps"]
        assert run["steps"] * config.total_batch_size == run["tokens"]
        meta = json.loads(next((place / "checkpoints").glob("step_*/meta.json")).read_text())
        assert meta["step"] == run["steps"]


def test_equal_flops_within_a_step(whole):
    runs = [run for run in stored(whole[0])["runs"] if run["study"] == "isoflop"]
    assert [(run["budget"], run["depth"]) for run in runs] == [(b, d) for b in BUDGETS for d in (1, 2, 3)]
    for run in runs:
        step = run["flops_per_token"] * run["batch"]
        assert run["flops"] == run["steps"] * step
        assert abs(run["flops"] - run["budget"]) <= step / 2
        assert run["steps"] >= plan.LEAST_STEPS


def test_a_miniseries_has_one_ratio_of_tokens(whole):
    runs = [run for run in stored(whole[0])["runs"] if run["study"] == "miniseries"]
    assert [run["depth"] for run in runs] == [1, 2, 3]
    for run in runs:  # october counts all parameters, and rounds to whole steps
        assert abs(run["tokens"] - 0.012 * run["params"]) <= run["batch"] / 2


def test_the_estimate_of_the_disk_is_what_the_checkpoints_take(whole):
    out, dry, _ = whole
    sizes = {row[0]: float(row[-1].removesuffix(" MB")) for row in rows_of(table_of(dry))[2:]}
    for run in stored(out)["runs"]:
        checkpoints = out / "runs" / run["name"] / "checkpoints"
        taken = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())
        assert taken / 1e6 == pytest.approx(sizes[run["name"]], rel=0.1, abs=0.1)


def test_a_run_is_the_one_that_train_makes(folder, whole):
    run = next(r for r in stored(whole[0])["runs"] if r["name"] == "isoflop-1e+10-d2-seed0")
    length = {"target_flops": 1e10, "num_iterations": -1}
    schedules = {"warmup_ratio": plan.ON_CPU.warmup_ratio, "momentum_warmup_steps": plan.ON_CPU.momentum_warmup_steps}
    assert train(folder, run="same", depth=2, eval_every=0, **length, **schedules) == 0
    lines = [json.loads(line) for line in (folder / "runs" / "same" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "val"][-1]
    assert (last["step"], last["bpb"]) == (run["steps"], run["value"])


def test_tables_and_picture(whole, tmp_path, capsys):
    out, _, real = whole
    text = (out / "table.md").read_text()
    record = stored(out)
    assert record["finished"]
    assert text in real
    for run in record["runs"]:
        assert f"| {run['name']} | {run['size']:,} |" in text
        assert f"{run['value']:.4f}" in text
    assert "- loss of the miniseries = " in text
    assert "- best parameters" in text
    assert all(len({row.count("|") for row in table.splitlines()}) == 1 for table in text.split("\n\n")[:2])
    first = (out / "scaling.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    shutil.copy(out / "result.json", tmp_path / "result.json")
    assert plot.main([str(tmp_path)]) == 0
    assert (tmp_path / "scaling.png").read_bytes() == first


def test_a_finished_experiment_is_not_made_again_and_may_grow(folder, whole, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    out = tmp_path / "grown"
    shutil.copytree(whole[0], out)
    (out / "result.json").write_text(json.dumps(stored(out) | {"runs": []}))  # the runs' own folders are enough
    made = []

    def spy(self, real=Trainer.train):
        made.append(self.config.run)
        return real(self)

    monkeypatch.setattr(Trainer, "train", spy)
    args = command(folder, out, "--target-param-data-ratio", "0.012")
    assert scaling.main(args) == 0
    assert made == []
    assert figures(out) == figures(whole[0])
    args[args.index("--budgets") + 1] = "1.2e10"
    assert scaling.main(args) == 0
    assert made == [f"isoflop-1.2e+10-d{depth}-seed0" for depth in (1, 2, 3)]


def test_ctrl_c_keeps_the_runs_and_the_experiment_resumes(folder, whole, tmp_path, monkeypatch, capsys):
    """In the middle of the second run, which goes on from there."""
    torch.set_num_threads(1)
    out = tmp_path / "cut"
    first, count, resumed = {}, iter(range(10**6)), []
    steps = [run["steps"] for run in stored(whole[0])["runs"] if run["study"] == "isoflop"]

    def step(self, batches, real=Trainer.train_step):
        first.setdefault(self.config.run, self.step)
        real(self, batches)
        if next(count) == steps[0] + 10:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        assert scaling.main(isoflop(folder, out)) == 130
        record = stored(out)
        assert (record["finished"], len(record["runs"]), len(record["plan"])) == (False, 1, 6)
        assert "the same command again" in capsys.readouterr().out
        first.clear()
        assert scaling.main(isoflop(folder, out)) == 0
        resumed = list(first.items())
    assert resumed[0] == ("isoflop-1e+10-d2-seed0", 11)
    assert [begun for _, begun in resumed[1:]] == [0] * 4
    assert figures(out) == figures(whole[0])[3:]


@pytest.mark.slow
def test_killed_experiment_resumes_inside_the_run(folder, whole, tmp_path):
    torch.set_num_threads(1)
    out = tmp_path / "killed"
    args = isoflop(folder, out, save_every=20)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "nanochat_native.scaling", *args], env=environment)
    second = "runs/isoflop-1e+10-d2-seed0/checkpoints/step_*"
    wait_until(lambda: process.poll() is not None or list(out.glob(second)))
    assert process.poll() is None
    process.kill()
    process.wait()
    assert 0 < len(stored(out)["runs"]) < 6
    assert scaling.main(args) == 0
    assert figures(out) == figures(whole[0])[3:]


def test_leftover_of_a_kill_before_a_run_began_is_deleted(folder, whole, tmp_path):
    torch.set_num_threads(1)
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    torn = out / "runs" / "miniseries-d1-seed0"
    shutil.rmtree(torn)
    torn.mkdir()
    (torn / "metrics.jsonl").write_text("torn")
    assert scaling.main(command(folder, out, "--target-param-data-ratio", "0.012")) == 0
    assert figures(out) == figures(whole[0])


def test_a_diverged_run_is_said_and_not_made_again(folder, tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    made = []

    def broken(self, batch, real=Trainer.compute_gradients):
        if self.step == 0:
            made.append(self.config.run)
        return (math.nan, math.nan) if self.config.depth == 2 else real(self, batch)

    monkeypatch.setattr(Trainer, "compute_gradients", broken)
    out = tmp_path / "out"
    assert scaling.main(isoflop(folder, out, budgets=[1e10])) == 0
    assert [value is None for _, value in figures(out)] == [False, True, False]
    text = (out / "table.md").read_text()
    assert "| diverged |" in text
    assert "not fitted: a parabola needs at least 3 different sizes, got 2" in text
    assert len(made) == 3
    made.clear()
    assert scaling.main(isoflop(folder, out, budgets=[1e10])) == 0
    assert made == []
    assert plot.main([str(out)]) == 0


def test_other_flags_and_other_data_are_refused(folder, whole, tmp_path, capsys):
    torch.set_num_threads(1)
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    before = figures(out)
    ratio = ("--target-param-data-ratio", "0.012")
    for flags, named in (({"matrix_lr": 0.5}, "--matrix-lr"), ({"eval_tokens": 128}, "--eval-tokens")):
        assert scaling.main(command(folder, out, *ratio, **flags)) == 2
        assert f"holds a run with other flags ({named}); choose another --out PATH" in capsys.readouterr().err
    assert scaling.main(command(folder, out, "--target-param-data-ratio", "0.03")) == 2
    assert "with other flags (--num-iterations" in capsys.readouterr().err
    other = write_text(tmp_path / "other.jsonl", seed=1)
    assert scaling.main(command(folder, out, *ratio, data=other)) == 2
    assert "a run that began with other data" in capsys.readouterr().err
    assert figures(out) == before
    for content in ("", "[]", '{"command": "compare"}'):
        (out / "result.json").write_text(content)
        assert scaling.main(command(folder, out, *ratio)) == 2
        assert "choose another --out PATH" in capsys.readouterr().err
        assert (out / "result.json").read_text() == content


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--depths", "1", "2"], "--depths must be 3 or more with --study both"),
        (["--study", "isoflop", "--target-param-data-ratio", "5"], "--target-param-data-ratio is for miniseries, got"),
        (["--study", "miniseries", "--num-iterations", "9"], "scaling takes --target-param-data-ratio"),
        (["--study", "miniseries", "--depths", "2"], "--depths must be 2 or more with --study miniseries"),
        (["--depths", "1", "2", "2"], "--depths must be whole numbers >= 1, each given once, got 1 2 2"),
        (["--depths", "0", "1", "2"], "--depths must be whole numbers >= 1"),
        (["--budgets", "1e10", "-1"], "--budgets must be finite numbers > 0, each given once, got 1e+10 -1"),
        (["--budgets", "nan"], "--budgets must be finite numbers > 0"),
        (["--budgets", "1e10", "--study", "miniseries"], "--budgets is for isoflop, got --study miniseries"),
        (["--seeds", "0"], "--seeds must be a whole number >= 1, got 0"),
        (["--depth", "2"], "--depth is for train only; scaling takes --depths"),
        (["--num-iterations", "9"], "--num-iterations is for train only; scaling takes --budgets"),
        (["--target-flops", "1e9"], "--target-flops is for train only; scaling takes --budgets"),
        (["--run", "x"], "--run is for train only"),
        (["--study", "isoflop", "--budgets", "1e7"], "--budgets 1e+07 is too small for depth 1: it gives 0."),
        (["--target-param-data-ratio", "1e-4"], "--target-param-data-ratio 0.0001 is too small for depth 1"),
        (["--n-kv-head", "3", "--depths", "1", "2", "3"], "depth 1: n_head must be a multiple of n_kv_head 3"),
    ],
)
def test_wrong_flag_is_one_line_and_nothing_is_made(folder, tmp_path, monkeypatch, capsys, own, message):
    monkeypatch.chdir(tmp_path)
    args = of_train(folder)
    pairs = [pair for pair in zip(args[::2], args[1::2], strict=True) if pair[0] not in OWN]
    assert scaling.main([*own, *(word for pair in pairs for word in pair)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_budget_too_small_names_the_one_that_is_enough(folder, tmp_path, capsys):
    args = isoflop(folder, tmp_path / "out", budgets=[1e9, 1e10])
    assert scaling.main(args) == 2
    enough = float(capsys.readouterr().err.split("which takes ")[1].split()[0])
    args[args.index("1000000000.0")] = str(enough)
    assert scaling.main([*args, "--dry-run"]) in (0, 2)
    error = capsys.readouterr().err
    assert "for depth 1" not in error
    assert not (tmp_path / "out").exists()


def test_a_number_is_rounded_up_to_three_digits():
    assert [rounded_up(x) for x in (3.742e10, 3.74e10, 9.999, 1.0, 0.01234)] == [3.75e10, 3.74e10, 10.0, 1.0, 0.0124]


def test_a_run_whose_config_cannot_be_read_is_kept(folder, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    damaged = out / "runs" / "miniseries-d1-seed0"
    (damaged / "config.json").write_text("{")
    assert scaling.main(command(folder, out, "--target-param-data-ratio", "0.012")) == 2
    assert f"{damaged}/config.json is damaged" in capsys.readouterr().err
    assert (damaged / "checkpoints").is_dir()


def test_an_edge_is_said_in_the_table():
    row = {"budget": 1e12, "points": 4, "where": "below", "sizes": [1.2e5, 3.4e6]}
    text = report.budgets_table([row, row | {"where": "above"}, row | {"where": "flat"}], "bits per byte")
    assert "best at the smallest size, 120k: not extrapolated" in text
    assert "best at the largest size, 3.4M: not extrapolated" in text
    assert "no minimum among the sizes" in text


@pytest.mark.parametrize(
    ("args", "gpu"),
    [
        ([], True),
        (["--device", "cuda"], True),
        (["--device", "cpu"], False),
        (["--device=cpu"], False),
        (["--run", "cpu"], True),
        (["--device=cpu", "--device=auto"], True),
    ],
)
def test_the_device_that_is_given_chooses_the_defaults(monkeypatch, args, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert plan.defaults(args) == (plan.SHARED if gpu else plan.ON_CPU)
