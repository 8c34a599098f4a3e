import itertools
import json
import math
import os
import random
import signal

import pytest
import torch
from tiny_run import tiny_flags, write_text

from nanochat_native import lr_find
from nanochat_native.lab import command_flags
from nanochat_native.lab import range_test as range_test_module
from nanochat_native.lab.range_test import MARGIN, Options, find_rate, range_test, suggest, suggested_rates
from nanochat_native.optim.schedule import momentum_at
from nanochat_native.runs.config import parse, resolve_defaults
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.runtime.signals import StopSignals
from nanochat_native.training.trainer import Trainer


class Quadratic:
    """f(x) = sum curvature x^2 / 2 under gradient descent: diverges above 2 / max curvature."""

    def __init__(self, *curvatures, noise=0.0, seed=0):
        self.curvatures, self.x = curvatures, [1.0] * len(curvatures)
        self.noise, self.rng = noise, random.Random(seed)

    def __call__(self, rate):
        slopes = [c * x + self.noise * self.rng.gauss(0, 1) for c, x in zip(self.curvatures, self.x, strict=True)]
        self.x = [x - rate * slope for x, slope in zip(self.x, slopes, strict=True)]
        return sum(c * x * x / 2 for c, x in zip(self.curvatures, self.x, strict=True))

    @property
    def best(self):
        return 2 / (min(self.curvatures) + max(self.curvatures))


def outcome(problem, steps=100, floor=1e-5, ceiling=1e4):
    rates, losses, diverged = range_test(problem, floor=floor, ceiling=ceiling, steps=steps)
    return suggest(rates, losses, steps=steps, diverged=diverged), diverged


@pytest.mark.parametrize("curvatures", [(1.0,), (0.01,), (300.0,), (1.0, 2.0)])
@pytest.mark.parametrize("steps", [60, 100, 250])
def test_the_best_rate_of_a_quadratic_is_found(curvatures, steps):
    problem = Quadratic(*curvatures)
    found, diverged = outcome(problem, steps)
    assert diverged
    assert problem.best / 2.5 < found.rate < 2 / max(curvatures)
    assert 1 / max(curvatures) < found.lowest < 4 / max(curvatures)
    if len(curvatures) == 1:  # each step divides the loss by the most where the rate is 1 / curvature
        assert problem.best / 1.5 < found.steepest < 1.5 * problem.best


@pytest.mark.parametrize("curvatures", [(1.0, 0.3), (0.1, 1.0, 5.0), (0.01, 1.0)])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_rate_under_noise(curvatures, seed):
    """Noise, as of batches, keeps the steep directions alive: without it they die out before the rate is too high."""
    problem = Quadratic(*curvatures, noise=0.02, seed=seed)
    found, _ = outcome(problem)
    assert problem.best / 8 < found.rate < 2 / max(curvatures)


def test_range_test_ends_soon_after_divergence():
    tried = []
    problem = Quadratic(1.0)

    def spy(rate):
        tried.append(rate)
        return problem(rate)

    _, losses, diverged = range_test(spy, floor=1e-4, ceiling=1e4, steps=100)
    assert diverged
    assert max(tried) < 20
    assert all(math.isfinite(loss) for loss in losses)


def test_divergence_is_a_loss_of_half_the_decrease():
    """10 down to 5 and slowly up again: the mean of three passes 7.5 at 7.6. A tenth is never divergence."""
    falling, rising = [10 - 0.5 * i for i in range(11)], [5 + 0.1 * i for i in range(1, 60)]
    curve = iter(falling + rising)
    _, losses, diverged = range_test(lambda rate: next(curve), floor=0.01, ceiling=100.0, steps=70)
    assert diverged
    assert losses[-1] == pytest.approx(7.6 + 0.1, abs=0.11)
    noise = random.Random(0)
    _, losses, diverged = range_test(lambda rate: 10 + noise.uniform(-0.4, 0.4), floor=0.01, ceiling=100.0, steps=70)
    assert not diverged
    assert len(losses) == 70


def test_the_suggestion_is_at_most_half_of_the_lowest():
    """Steepest just before the loss turns."""
    logs = [0.1 * i for i in range(100)]
    losses = [9 - 6 / (1 + math.exp(-6 * (x - 6))) + (5 * (x - 6.8) if x > 6.8 else 0) for x in logs]
    found = suggest([math.exp(x) for x in logs], losses, steps=100, diverged=True)
    assert found.steepest > 0.4 * found.lowest
    assert found.rate == found.lowest / 2
    assert "2 times below the lowest" in found.reason


def test_rates_rise_by_equal_factors_from_floor_to_ceiling():
    rates, losses, diverged = range_test(lambda rate: 3.0, floor=0.01, ceiling=10.0, steps=31)
    assert not diverged
    assert (rates[0], rates[-1], len(rates), len(losses)) == (0.01, pytest.approx(10.0), 31, 31)
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([10**0.1] * 30)


def test_nonfinite_loss_ends_the_test_and_is_dropped():
    rates, losses, diverged = range_test(lambda r: math.nan if r > 1 else 2.0, floor=0.01, ceiling=100.0, steps=41)
    assert diverged
    assert max(rates) <= 1
    assert losses == [2.0] * len(rates)


@pytest.mark.parametrize(
    ("loss", "word"),
    [
        (lambda i: 5.0, "never fell"),
        (lambda i: 5.0 + i / 100, "never fell"),
        (lambda i: 5.0 - i / 40, "higher --ceiling"),
    ],
)
def test_flat_or_falling_loss_gives_no_rate(loss, word):
    found = suggest([1.1**i for i in range(60)], [loss(i) for i in range(60)], steps=60, diverged=False)
    assert found.rate is None
    assert word in found.reason
    assert suggest([1.0], [1.0], steps=60, diverged=True).rate is None


def test_stopped_test_reports_it():
    found = suggest([1.1**i for i in range(30)], [5.0 - i / 20 for i in range(30)], steps=60, diverged=False)
    assert found.rate is None
    assert "the test was stopped" in found.reason


def test_the_steepest_and_the_lowest_point():
    """A valley of a known shape over ln(rate): falls as a logistic curve around 1, turns at e^3."""
    logs = [-6 + 0.1 * i for i in range(121)]
    losses = [8 - 4 / (1 + math.exp(-2 * x)) + (0.5 * (x - 3) ** 2 if x > 3 else 0) for x in logs]
    found = suggest([math.exp(x) for x in logs], losses, steps=121, diverged=True)
    # of ln(loss): the slope of 8 - 4 s is steepest a little to the right of 0
    assert 1.0 <= found.steepest < 1.7
    assert found.lowest == pytest.approx(math.exp(3), rel=0.3)
    assert found.rate == pytest.approx(found.lowest / MARGIN)
    assert f"lowest at {found.lowest:.3g}" in found.reason


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    write_text(folder / "text.jsonl")
    return folder


def of_train(folder, **changes):
    """train's flags of a tiny model, those about a run's folder left out."""
    args = tiny_flags(folder, **changes)
    skipped = ("--out-dir", "--run")
    pairs = [(args[i], args[i + 1]) for i in range(0, len(args) - 1, 2)]
    return [word for pair in pairs if pair[0] not in skipped for word in pair]


def trainer_of(folder, **changes):
    torch.set_num_threads(1)
    _, config, _ = command_flags.parse_flags(Options, "lr_find", of_train(folder, **changes))
    return Trainer(config, SilentConsole())


def state(trainer):
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return weights, [optimizer.state_dict() for optimizer in trainer.optimizers]


@pytest.mark.parametrize("optimizer", ["hybrid", "adam"])
def test_model_and_optimizers_are_restored(folder, optimizer):
    trainer = trainer_of(folder, optimizer=optimizer)
    options = Options(steps=20, floor=0.1, ceiling=10.0)
    weights, states = state(trainer)
    with StopSignals() as stopping:
        first = find_rate(trainer, options, "all", stopping)
        again = find_rate(trainer, options, "all", stopping)
    assert first["losses"] == again["losses"]
    assert min(first["losses"]) < first["losses"][0], "nothing was trained, so nothing was restored"
    weights_after, states_after = state(trainer)
    assert all(torch.equal(weights[name], weights_after[name]) for name in weights)
    assert [each["state"] for each in states_after] == [each["state"] for each in states] == [{}] * len(states)
    assert [g["lr"] for each in states_after for g in each["param_groups"]] == [
        g["lr"] for each in states for g in each["param_groups"]
    ]


def test_the_losses_are_those_of_trains_steps_at_these_rates(folder):
    options = Options(steps=20, floor=0.5, ceiling=2.0)
    with StopSignals() as stopping:
        found = find_rate(trainer_of(folder), options, "all", stopping)
    plain = trainer_of(folder)
    losses = []
    for i in range(20):
        plain.compute_gradients(plain.loader.batch(i))
        plain.set_rates(0.5 * 4 ** (i / 19), momentum_at(i, plain.config))
        plain.update()
        plain.zero_grad()
        losses.append(plain.measure(plain.validation_batches(plain.config.total_batch_size)).loss)
    assert found["losses"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("group", ["matrix", "embedding", "unembedding", "scalar"])
def test_only_the_tested_group_changes(folder, group, monkeypatch):
    trainer = trainer_of(folder, recipe="today" if group == "scalar" else "october")
    moved = set()

    def spy(self, batch, real=Trainer.compute_gradients):
        moved.update(n for n, p in self.model.named_parameters() if not torch.equal(p, seen.setdefault(n, p.clone())))
        return real(self, batch)

    seen = {}
    monkeypatch.setattr(Trainer, "compute_gradients", spy)
    with StopSignals() as stopping:
        find_rate(trainer, Options(group=group, steps=20, warmup_steps=3), group, stopping)
    assert moved == set(seen), "the warm-up moves all"
    moved.clear()
    seen.clear()
    trainer.model.lm_head.weight.data.normal_(0, 0.02)
    with StopSignals() as stopping:
        find_rate(trainer, Options(group=group, steps=20, warmup_steps=0), group, stopping)
    beginnings = {"matrix": "transformer.h.", "embedding": "transformer.wte", "unembedding": "lm_head"}
    beginnings["scalar"] = ("resid_lambdas", "x0_lambdas")
    assert moved
    assert all(name.startswith(beginnings[group]) for name in moved)


def test_the_command_leaves_a_result_and_flags_to_paste(folder, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--steps", "30", "--floor", "0.01", "--ceiling", "1000", "--out", str(out), *of_train(folder)]
    assert lr_find.main(args) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "result.json").read_text())
    assert (out / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    assert record["finished"]
    assert record["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__
    (test,) = record["tests"]
    assert len(test["factors"]) == len(test["losses"]) == len(test["smoothed"])
    assert test["suggestion"] is not None
    pasted = printed.split("nanochat_native.train ")[1].split("\n")[0].split()
    config = parse(pasted)
    assert (config.depth, config.vocab_size, str(config.data)) == (2, 300, str(folder / "text.jsonl"))
    assert config.matrix_lr == record["flags"]["matrix_lr"] == pytest.approx(0.02 * test["suggestion"], rel=0.01)
    assert config.embedding_lr == pytest.approx(0.2 * test["suggestion"], rel=0.01)
    assert not (folder / "runs").exists()
    assert lr_find.main(args) == 2
    assert "must be a new or an empty folder" in capsys.readouterr().err


def test_suggested_rates_cover_the_tested_groups(folder):
    config = resolve_defaults(parse(["--recipe", "october", "--matrix-lr", "0.5"]), gpu=False)
    tests = [{"group": "matrix", "suggestion": 2.0}, {"group": "embedding", "suggestion": None}]
    assert suggested_rates(config, tests) == {"matrix_lr": 1.0}
    assert suggested_rates(config, [{"group": "all", "suggestion": 0.5}]) == {
        "matrix_lr": 0.25,
        "embedding_lr": 0.1,
        "unembedding_lr": 0.002,
    }
    config = resolve_defaults(parse(["--recipe", "today"]), gpu=False)
    assert suggested_rates(config, [{"group": "scalar", "suggestion": 0.5}]) == {"scalar_lr": 0.25}


def test_scalars_are_a_group_of_todays_model_alone(folder, tmp_path, capsys, monkeypatch):
    def untested(trainer, options, group, stopping):
        found = {"group": group, "factors": [], "losses": [], "diverged": False, "smoothed": []}
        return found | {"steepest": None, "lowest": None, "suggestion": None, "reason": "not tested"}

    monkeypatch.setattr(range_test_module, "find_rate", untested)
    args = of_train(folder)
    assert lr_find.main([*args, "--group", "scalar", "--out", str(tmp_path / "none")]) == 2
    assert "--group scalar needs a model with --residual-scalars on" in capsys.readouterr().err
    groups = ["matrix", "embedding", "unembedding"]
    for recipe, expected in (("october", groups), ("today", [*groups, "scalar"])):
        out = tmp_path / recipe
        assert lr_find.main([*args, "--group", "each", "--recipe", recipe, "--out", str(out)]) == 1
        assert [test["group"] for test in json.loads((out / "result.json").read_text())["tests"]] == expected


def test_ctrl_c_keeps_the_results(folder, tmp_path, monkeypatch, capsys):
    count = iter(range(1000))

    def measure(self, batches, real=Trainer.measure):
        if next(count) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batches)

    monkeypatch.setattr(Trainer, "measure", measure)
    out = tmp_path / "out"
    assert lr_find.main(["--steps", "40", "--group", "each", "--out", str(out), *of_train(folder)]) == 130
    record = json.loads((out / "result.json").read_text())
    assert not record["finished"]
    assert [len(test["losses"]) for test in record["tests"]] == [13]
    assert (out / "lr_find.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--floor", "2", "--ceiling", "1"], "got --floor 2"),
        (["--steps", "5"], "--steps must be at least 20, got 5"),
        (["--group", "everything"], "--group"),
        (["--dephts", "4"], "--depth"),
        (["--resume", "auto"], "--resume is for train only"),
        (["--data", "/nonexistent"], "/nonexistent"),
        (["--total-batch-size", "100"], "use --total-batch-size"),
    ],
)
def test_wrong_flag_is_one_line(folder, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    assert lr_find.main([*of_train(folder), *args]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_several_ranks_are_refused(folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lr_find.main(of_train(folder)) == 2
    assert "without torchrun" in capsys.readouterr().err
