import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from test_range_test import of_train
from tiny_run import train, wait_until, write_text

from nanochat_native import compare
from nanochat_native.lab import comparison
from nanochat_native.lab.comparison import (
    FACTOR_STEP,
    MAX_FACTORS,
    SUITES,
    Comparison,
    Options,
    final_loss,
    markdown_table,
    summarize,
    time_to_reach,
)
from nanochat_native.optim.schedule import lr_at, momentum_at, weight_decay_at
from nanochat_native.runs import checkpoint
from nanochat_native.runs.config import MUON_SWITCHES, TrainConfig, parse, resolve_defaults, resolve_device, to_json
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.training.resolve import model_config
from nanochat_native.training.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    write_text(folder / "text.jsonl")
    return folder


def curve(*points):
    return [{"step": step, "seconds": 2.0 * step, "value": value} for step, value in points]


def run_of(case, factor, seed, *points, diverged=False):
    return {
        "case": case,
        "factor": factor,
        "seed": seed,
        "curve": curve(*points),
        "diverged": diverged,
        "skipped": 0,
        "unit": "bits per byte",
    }


@pytest.mark.parametrize("suite", SUITES)
def test_the_suites_flags_are_trains(suite):
    configs = {name: parse(flags.split(), base=TrainConfig()) for name, flags in SUITES[suite].items()}
    assert len(set(configs.values())) == len(configs)
    assert all(flag in SUITES["optimizers"] for flag in ("SGD", "Adam", "AdamW", "Muon + SGD", "Muon + AdamW"))


def cases_of(*args, cases=(), suite="optimizers"):
    """The configs of a comparison's cases, as compare makes them from train's flags on a CPU."""
    options = Options(suite=suite, cases=cases)
    given = parse(["--device", "cpu", *args], comparison.defaults(options, ["cpu"]))
    return comparison.make_cases(options, resolve_device(given), given, None)


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_starts_from_its_recipe(suite):
    found = cases_of(suite=suite)
    for name, config in found.items():
        recipe = {"parts": "today", "recipes": config.recipe}.get(suite, "october")
        assert config.recipe == recipe
        if "recipe" not in SUITES[suite][name]:
            assert config.architecture == recipe
    assert len({config.num_iterations for config in found.values()}) == 1
    assert len({config.packing for config in found.values()}) == 1, "validated on the same rows"
    assert {config.recipe for config in cases_of("--recipe", "today", suite="muon").values()} == {"today"}


def test_a_case_takes_what_follows_from_its_own_recipe():
    found = cases_of(suite="recipes")
    today, october = found["today"], found["october"]
    assert (today.normuon, today.warmdown_ratio, today.smear) == ("on", 0.65, "on")
    assert (october.normuon, october.warmdown_ratio, october.smear) == ("off", 0.2, "off")
    mixed = found["today's model, october's recipe"]
    assert (mixed.normuon, mixed.warmdown_ratio, mixed.smear) == ("off", 0.2, "on")
    without = cases_of(suite="parts")["no smear"]
    assert (without.smear, without.backout, without.normuon) == ("off", "on", "on")
    found = cases_of("--recipe", "today", "--grad-clip", "3", cases=("a: --optimizer adamw", "b: --recipe october"))
    assert (found["a"].recipe, found["a"].normuon, found["a"].warmdown_ratio) == ("today", "off", 0.65)
    assert (found["b"].normuon, found["b"].warmdown_ratio) == ("off", 0.2)
    assert found["a"].grad_clip == found["b"].grad_clip == 3.0


def test_a_comparison_from_before_there_were_recipes_is_the_same():
    config = cases_of(cases=("one: --recipe october --normuon",))["one"]
    flags = to_json(config)
    old = {name: value for name, value in flags.items() if name not in ("recipe", "architecture", "smear", "packing")}
    stored = {"cases": {"one": old | {"normuon": True, "cautious": False}}}
    assert comparison.differences(stored, {"cases": {"one": flags}}) == []
    assert comparison.differences(stored, {"cases": {"one": flags | {"smear": "on"}}}) == ["--smear"]


def test_a_suite_of_momenta_from_before_momentum_could_fall_is_the_same():
    cases = {name: to_json(config) for name, config in cases_of(suite="momentum").items()}
    later = ("recipe", "architecture", "packing", "validation", "momentum_final")
    stored = {name: {key: v for key, v in flags.items() if key not in later} for name, flags in cases.items()}
    assert comparison.differences({"cases": stored}, {"cases": cases}) == []
    falling = cases | {"0.95": cases["0.95"] | {"momentum_final": 0.9}}
    assert comparison.differences({"cases": stored}, {"cases": falling}) == ["--momentum-final"]


def test_each_part_of_todays_recipe_changes_a_run_on_a_cpu():
    def described(config):
        shape = dataclasses.asdict(model_config(config)) | {"windows": model_config(config).windows}
        del shape["window_pattern"]
        curves = [[at(step, config) for step in range(config.num_iterations)] for at in (momentum_at, lr_at)]
        decays = [config.matrix_weight_decay * weight_decay_at(step, config) for step in range(config.num_iterations)]
        return shape, curves, decays, {name: getattr(config, name) for name in (*MUON_SWITCHES, "ns_coefficients")}

    found = {name: described(config) for name, config in cases_of(suite="parts").items()}
    base = found.pop("today")
    assert [name for name, case in found.items() if case == base] == []


def test_time_to_reach_lies_between_two_measurements():
    points = curve((0, 8.0), (10, 6.0), (20, 4.0), (30, 4.5))
    assert time_to_reach(points, 5.0) == (15.0, 30.0)
    assert time_to_reach(points, 4.0) == (20.0, 40.0)
    assert time_to_reach(points, 9.0) == (0, 0.0)
    assert time_to_reach(points, 3.9) is None
    assert time_to_reach(curve((0, None), (10, 3.0)), 4.0) == (10, 20.0)


def searched(losses_at, rates=3, seeds=1):
    """Factors in the order in which they are tried, of a case whose final loss is losses_at(factor)."""
    cases = {"one": resolve_defaults(TrainConfig(seed=5), gpu=False)}
    comparison = Comparison(cases, "one", seeds, rates, None, None, None, [], {})
    order = []
    while next_run := comparison.next_run("one"):
        order.append(next_run)
        factor, seed = next_run
        comparison.runs.append(run_of("one", factor, seed, (0, 9.0), (10, losses_at(factor))))
        assert len(order) < 30
    return comparison, order


@pytest.mark.parametrize("optimum", [-3.2, -2, -1, -0.4, 0, 1, 2.3, 3])
def test_search_continues_until_the_best_rate_is_bracketed(optimum):
    comparison, order = searched(lambda factor: (math.log(factor, FACTOR_STEP) - optimum) ** 2)
    assert [factor for factor, _ in order[:3]] == pytest.approx([1, 1 / FACTOR_STEP, FACTOR_STEP])
    assert math.log(comparison.best_factor("one"), FACTOR_STEP) == pytest.approx(round(optimum))
    assert len(order) <= MAX_FACTORS


def test_search_ends_at_the_limit_without_a_best_rate():
    _, order = searched(lambda factor: -factor)
    assert len(order) == MAX_FACTORS


def test_one_rate_disables_the_search_and_seeds_use_the_best():
    _, order = searched(lambda factor: factor, rates=1, seeds=3)
    assert order == [(1, 5), (1, 6), (1, 7)]
    _, order = searched(lambda factor: abs(math.log(factor)), seeds=3)
    assert order[3:] == [(1, 6), (1, 7)]


def test_search_lowers_the_rate_if_all_diverge():
    _, order = searched(lambda factor: 3.0 if factor < 0.1 else None)
    assert [round(math.log(factor, FACTOR_STEP)) for factor, _ in order] == [0, -1, 1, -2, -3, -4]
    comparison, order = searched(lambda factor: None)
    assert len(order) == MAX_FACTORS
    assert summarize(comparison)[0]["value"] is None


def test_diverged_baseline_gives_no_target():
    runs = [run_of("a", 1, 0, (0, 8.0), (5, None), diverged=True), run_of("b", 1, 0, (0, 8.0), (5, 2.0))]
    assert [(row["case"], row["steps_to_baseline"]) for row in summarize(comparison_of(runs))] == [
        ("b", None),
        ("a", None),
    ]


def test_a_diverged_run_is_the_worst():
    assert final_loss(run_of("a", 1, 0, (0, 8.0), (5, 1.0), diverged=True)) == math.inf
    assert final_loss(run_of("a", 1, 0, (0, 8.0), (5, None))) == math.inf
    assert final_loss(run_of("a", 1, 0, (0, 8.0), (5, 2.0))) == 2.0


def comparison_of(runs, costs=None):
    flags = {"a": ["--optimizer", "adamw"], "b": [], "c": ["--optimizer", "sgd"]}
    cases = {name: resolve_defaults(parse(args), gpu=False) for name, args in flags.items()}
    return Comparison(cases, "a", 2, 3, None, None, None, runs, costs or {})


def test_the_table_by_hand():
    runs = [
        run_of("a", 1.0, 0, (0, 8.0), (10, 5.0), (20, 4.0)),
        run_of("a", 1.0, 1, (0, 8.0), (10, 6.0), (20, 4.4)),
        run_of("a", 3.0, 0, (0, 8.0), (10, 7.0), (20, 6.0)),
        run_of("b", 3.0, 0, (0, 8.0), (10, 4.2), (20, 3.0)),
        run_of("b", 3.0, 1, (0, 8.0), (10, 5.2), (20, 3.2)),
        run_of("b", 1.0, 0, (0, 8.0), (10, 5.0), (20, 4.0)),
        run_of("c", 1.0, 0, (0, 8.0), (10, None), diverged=True),
    ]
    rows = summarize(comparison_of(runs, {"b": {"optimizer_ms": 1.5, "state_bytes": 6.0}}))
    assert [row["case"] for row in rows] == ["b", "a", "c"]
    b, a, c = rows
    # a's final loss is 4.2; b's mean is 4.7 at step 10 and 3.1 at 20: there after 10 + (4.7 - 4.2) / 1.6 * 10 = 13.125
    assert (b["value"], b["spread"]) == (pytest.approx(3.1), pytest.approx(math.sqrt(0.02)))
    assert (b["factor"], b["tried"], b["seeds"], b["diverged"]) == (3.0, [1.0, 3.0], 2, 0)
    assert b["steps_to_baseline"] == pytest.approx(13.125)
    assert b["seconds_to_baseline"] == pytest.approx(26.25)
    assert b["rates"]["matrix_lr"] == pytest.approx(0.06)
    assert (a["value"], a["steps_to_baseline"]) == (pytest.approx(4.2), pytest.approx(20.0))
    assert (c["value"], c["diverged"], c["steps_to_baseline"]) == (None, 1, None)

    lines = markdown_table(rows, baseline="a", unit="bits per byte").splitlines()
    assert lines[2] == "| b | x3 of 2 | 3.1000 ± 0.1414 | 2 | 13 | 26.2 | 40.0 | 1.50 | 6.00 |"
    assert "| 4.2000 ± 0.2828 | 2 | 20 | 40.0 |" in lines[3]
    assert "| c | x1 of 1 | 1 diverged | 1 | never | never |" in lines[4]
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "- b: --embedding-lr 0.9 --unembedding-lr 0.024 --matrix-lr 0.06 --scalar-lr 1.5" in lines


CASES = ("plain:", "adamw: --optimizer adamw")


def command(folder, out, *, steps=6, cases=CASES, **flags):
    return ["--cases", *cases, "--rates", "1", "--out", str(out), *of_train(folder, steps=steps, **flags)]


def test_a_comparison_is_runs_of_train(folder, tmp_path, capsys):
    """The curve of a case is that of the very same run by train."""
    torch.set_num_threads(1)
    out = tmp_path / "out"
    assert compare.main(command(folder, out, eval_every=2)) == 0
    record = json.loads((out / "result.json").read_text())
    assert record["finished"]
    assert [(run["case"], run["seed"]) for run in record["runs"]] == [
        (c, s) for c in ("plain", "adamw") for s in (0, 1)
    ]
    assert [point["step"] for point in record["runs"][0]["curve"]] == [0, 2, 4, 6]
    assert train(folder, steps=6, run="same", eval_every=2, seed=1) == 0
    lines = (folder / "runs" / "same" / "metrics.jsonl").read_text().splitlines()
    measured = [r["bpb"] for r in map(json.loads, lines) if r["kind"] == "val"]
    assert [point["value"] for point in record["runs"][1]["curve"]] == measured
    assert not (out / "runs").exists(), "what is kept is the result"

    costs = record["costs"]
    matrices, ends = 2 * 12 * 128**2, 2 * 300 * 128
    assert costs["plain"]["state_bytes"] == pytest.approx((4 * matrices + 8 * ends) / (matrices + ends), rel=1e-3)
    assert costs["adamw"]["state_bytes"] == pytest.approx(8, rel=1e-3)
    assert all(cost["optimizer_ms"] > 0 for cost in costs.values())
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() in printed
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def figures(out):
    record = json.loads((out / "result.json").read_text())
    return [(r["case"], r["seed"], [(p["step"], p["value"]) for p in r["curve"]]) for r in record["runs"]]


@pytest.mark.slow
def test_killed_comparison_resumes(folder, tmp_path):
    torch.set_num_threads(1)
    assert compare.main(command(folder, tmp_path / "whole", steps=40, save_every=5)) == 0
    out = tmp_path / "killed"
    args = command(folder, out, steps=40, save_every=5)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "nanochat_native.compare", *args], env=environment)
    second_case = "runs/adamw-*-x1-*/checkpoints/step_*"
    wait_until(lambda: process.poll() is not None or list(out.glob(second_case)))
    assert process.poll() is None
    process.kill()
    process.wait()
    done = json.loads((out / "result.json").read_text())["runs"]
    assert 0 < len(done) < 4
    assert compare.main(args) == 0
    assert figures(out) == figures(tmp_path / "whole")


def test_ctrl_c_keeps_results_and_the_comparison_resumes(folder, tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    count = iter(range(1000))

    def step(self, batches, real=Trainer.train_step):
        real(self, batches)
        if next(count) == 8:  # in the second run
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        assert compare.main(command(folder, tmp_path / "cut")) == 130
    record = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert (record["finished"], len(record["runs"])) == (False, 1)
    assert (tmp_path / "cut" / "compare.png").exists()
    assert "the same command again" in capsys.readouterr().out
    assert compare.main(command(folder, tmp_path / "cut")) == 0
    assert compare.main(command(folder, tmp_path / "whole")) == 0
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_interrupted_run_without_checkpoint_is_repeated(folder, tmp_path, monkeypatch):
    """Ctrl-C where the checkpoint cannot be written."""
    torch.set_num_threads(1)

    def step(self, batches, real=Trainer.train_step):
        real(self, batches)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        patch.setattr(checkpoint, "save", full)
        assert compare.main(command(folder, tmp_path / "cut")) == 130
    assert figures(tmp_path / "cut") == []
    assert compare.main(command(folder, tmp_path / "cut")) == 0
    assert [[step for step, _ in points][-1] for _, _, points in figures(tmp_path / "cut")] == [6, 6, 6, 6]


def test_leftovers_of_a_kill_are_deleted(folder, tmp_path, monkeypatch):
    """A run's folder without its config, from before it began; and one that is in the result already."""
    torch.set_num_threads(1)
    out = tmp_path / "out"
    assert compare.main([*command(folder, out), "--seeds", "1"]) == 0
    before = figures(out)
    made = []

    def remember(self, case, factor, seed, real=Comparison.folder_of):
        made.append(real(self, case, factor, seed))
        made[-1].mkdir(parents=True, exist_ok=True)
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "folder_of", remember)
        assert compare.main([*command(folder, out), "--seeds", "2"]) == 0
    assert made
    assert len(figures(out)) == 4
    for place in {path.with_name(path.name[:-1] + seed) for path in made for seed in "12"}:
        place.mkdir(parents=True)
        (place / "metrics.jsonl").write_text("torn")
    assert compare.main([*command(folder, out), "--seeds", "3"]) == 0
    assert all(run in figures(out) for run in before)
    assert len(figures(out)) == 6
    assert not (out / "runs").exists()


def test_cases_in_another_order_keep_their_runs(folder, tmp_path, monkeypatch):
    torch.set_num_threads(1)

    def step(self, batches, real=Trainer.train_step):
        real(self, batches)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    args = [*command(folder, tmp_path / "cut"), "--baseline", "plain", "--seeds", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        assert compare.main(args) == 130
    turned = [*command(folder, tmp_path / "cut", cases=CASES[::-1]), "--baseline", "plain", "--seeds", "1"]
    assert compare.main(turned) == 0
    assert compare.main([*command(folder, tmp_path / "whole"), "--seeds", "1"]) == 0
    assert sorted(figures(tmp_path / "cut")) == sorted(figures(tmp_path / "whole"))


def test_ctrl_c_while_costs_are_measured_loses_no_run(folder, tmp_path, monkeypatch):
    torch.set_num_threads(1)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "measure_costs", interrupted)
        assert compare.main(command(folder, tmp_path / "out")) == 130
    assert len(figures(tmp_path / "out")) == 4
    assert compare.main(command(folder, tmp_path / "out")) == 0


def test_case_with_its_own_data_trains_on_it(folder, tmp_path):
    torch.set_num_threads(1)
    cases = ("plain:", "small: --vocab-size 280")
    assert compare.main([*command(folder, tmp_path / "out", cases=cases), "--seeds", "1"]) == 0
    plain, small = (points for _, _, points in figures(tmp_path / "out"))
    assert plain[0][1] != small[0][1], "at step 0 the loss is ln V of the case's own vocabulary"


def test_more_seeds_resume_and_other_changes_are_refused(folder, tmp_path, capsys):
    torch.set_num_threads(1)
    out = tmp_path / "out"
    assert compare.main([*command(folder, out), "--seeds", "1"]) == 0
    before = figures(out)
    assert compare.main([*command(folder, out), "--seeds", "2"]) == 0
    assert len(before) == 2
    assert len(figures(out)) == 4
    assert all(run in figures(out) for run in before)
    assert compare.main(command(folder, out, steps=7)) == 2
    assert "contains another comparison (--num-iterations" in capsys.readouterr().err
    text = (folder / "text.jsonl").read_text()
    other = tmp_path / "other.jsonl"
    other.write_text(text)
    same = [*command(folder, tmp_path / "data", data=other), "--seeds", "1"]
    assert compare.main(same) == 0
    moved = tmp_path / "moved.jsonl"
    moved.write_text(text)
    path = tmp_path / "data" / "result.json"
    old = json.loads(path.read_text())
    for flags in old["what"]["cases"].values():
        del flags["cautious"]  # as a version would have left it that had no such flag
        flags["data"] = str(other)
    path.write_text(json.dumps(old))
    capsys.readouterr()
    assert compare.main([*command(folder, tmp_path / "data", data=moved), "--seeds", "1"]) == 0
    assert "resume   " in capsys.readouterr().out
    other.write_text(text + text.replace("document", "paper"))
    assert compare.main([*same, "--seeds", "2"]) == 2
    assert "contains another comparison (data)" in capsys.readouterr().err
    for damaged in ("", "[]", "{}"):
        (tmp_path / "data" / "result.json").write_text(damaged)
        assert compare.main(same) == 2
        assert "is not a comparison" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert compare.main(command(folder, tmp_path / "mine")) == 2
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cases", "no colon"], "'name: flags'"),
        (["--cases", "a: --depth 2", "a : --depth 3"], "unique names"),
        (["--cases", "a: --run 'x"], "case 'a': No closing quotation"),
        (["--cases", "a: --run x"], "--run is for train only; case 'a' writes its result to --out"),
        (["--cases", "a: --dephts 2"], "case 'a': "),
        (["--cases", "a: --optimizer adamw --normuon"], "case 'a': --normuon needs Muon"),
        (["--cases", "a: --matrix-lr 0"], "a learning rate of 0"),
        (["--cases", "plain:", "a: --fp8 rowwise"], "case 'a': --fp8 must be off on "),
        (["--baseline", "Lion"], "got 'Lion'"),
        (["--rates", "2"], "--rates must be an odd number >= 1, got 2"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--run", "x"], "--run is for train only"),
    ],
)
def test_wrong_flag_is_one_line(folder, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    assert compare.main([*args, *of_train(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_bad_cases_are_named():
    with pytest.raises(ConfigError, match="'name: flags'"):
        Options(cases=("",)).selected_cases()
