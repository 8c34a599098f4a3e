import json
import math
import os
import signal

import pytest
import torch
from test_range_test import of_train
from tiny_run import write_text

from nanochat_native import batch_size
from nanochat_native.lab import command_flags
from nanochat_native.lab import noise_scale as lab_noise_scale
from nanochat_native.lab.noise_scale import Noise, Options, advice, measure_step, noise_scale
from nanochat_native.runtime.console import SilentConsole
from nanochat_native.training.trainer import Trainer


def synthetic(scale, *, small=1, large=16, steps=200, dimension=400, seed=0):
    """Squared norms of gradients whose noise scale is known: |G| = 1, and S = scale spread over the dimensions."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(dimension, generator=generator, dtype=torch.float64)
    true /= true.norm()
    squares = []
    for _ in range(steps):
        noise = torch.randn(large // small, dimension, generator=generator, dtype=torch.float64)
        gradients = true + noise * math.sqrt(scale / small / dimension)
        squares.append((gradients.square().sum(1).mean().item(), gradients.mean(0).square().sum().item()))
    return list(zip(*squares, strict=True))


@pytest.mark.parametrize("scale", [0.5, 3.0, 20.0, 100.0])
@pytest.mark.parametrize(("small", "large"), [(1, 16), (2, 8), (4, 64)])
def test_the_noise_scale_of_a_synthetic_gradient_is_recovered(scale, small, large):
    found = noise_scale(*synthetic(scale, small=small, large=large), small_batch=small, large_batch=large)
    assert found.scale == pytest.approx(scale, rel=0.15)
    assert found.low < found.scale < found.high


def test_bounds_hold_in_95_of_100_measurements():
    """Two standard errors: the truth lies between them in about 95 of 100 measurements."""
    held = 0
    for seed in range(100):
        found = noise_scale(*synthetic(5.0, steps=20, dimension=40, seed=seed), small_batch=1, large_batch=16)
        held += found.low <= 5.0 <= (found.high or math.inf)
    assert 85 <= held <= 99


def test_without_noise_it_is_zero_and_without_signal_unknown():
    assert noise_scale([4.0, 4.0, 4.0], [4.0, 4.0, 4.0], small_batch=1, large_batch=8).scale == 0
    assert noise_scale([8.0, 8.0], [0.5, 0.5], small_batch=1, large_batch=8) == Noise(None, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0], 1, 2), "got 1 and 1"),
        (([1.0, 1.0], [1.0], 1, 2), "got 2 and 1"),
        (([1.0, 1.0], [1.0, 1.0], 2, 2), "got 2 and 2"),
        (([1.0, 1.0], [1.0, 1.0], 0, 2), "got 0 and 2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    small, large, small_batch, large_batch = arguments
    with pytest.raises(ValueError, match=message):
        noise_scale(small, large, small_batch=small_batch, large_batch=large_batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    write_text(folder / "text.jsonl")
    return folder


def trainer_of(folder, **changes):
    torch.set_num_threads(1)
    _, config, _ = command_flags.parse_flags(Options, "batch_size", of_train(folder, **changes))
    return Trainer(config, SilentConsole())


def test_a_steps_norms_are_those_of_its_micro_batches(folder):
    trainer = trainer_of(folder, device_batch_size=1)
    trainer.model.lm_head.weight.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    batch = trainer.loader.batch(0)
    loss, norms = measure_step(trainer, batch)
    left = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.zero_grad()

    trainer.config = trainer.config.__class__(**{**vars(trainer.config), "grad_clip": 0.0})
    whole_loss, norm = trainer.compute_gradients(batch)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(left[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert norms["all"][1] == pytest.approx(norm**2, rel=1e-4)
    trainer.zero_grad()

    rows = []
    for x, y in zip(*batch, strict=True):
        trainer.model(x[None], y[None]).backward()
        rows.append({n: p.grad.double().square().sum().item() for n, p in trainer.model.named_parameters()})
        trainer.zero_grad()
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    assert norms["all"][0] == pytest.approx(sum(means.values()), rel=1e-5)
    assert norms["wte"][0] == pytest.approx(means["transformer.wte.weight"], rel=1e-5)
    assert norms["lm_head"][0] == pytest.approx(means["lm_head.weight"], rel=1e-5)
    parts = norms["matrices"][0] + norms["wte"][0] + norms["lm_head"][0]
    assert norms["all"][0] == pytest.approx(parts, rel=1e-9)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (1.0, "same loss with fewer tokens"),
        (4.0, "near the noise scale"),
        (64.0, "saves almost proportionally many steps"),
    ],
)
def test_advice_follows_the_noise_scale(scale, words):
    told = advice(Noise(scale, scale, scale), sequence_len=128, total_batch_size=512)
    assert words in told
    ratio = scale * 128 / 512
    assert f"needs {1 + ratio:.2g} times the steps" in told
    assert f"{1 + 1 / ratio:.2g} times the tokens" in told
    assert "not distinguishable" in advice(Noise(None, None, None), sequence_len=128, total_batch_size=512)


def test_the_command_leaves_a_result_that_can_be_computed_again(folder, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--steps", "30", "--skip", "6", "--out", str(out), *of_train(folder, device_batch_size=1)]
    assert batch_size.main(args) == 0
    record = json.loads((out / "result.json").read_text())
    assert (out / "batch_size.png").read_bytes().startswith(b"\x89PNG")
    assert (record["small_batch"], record["large_batch"], record["sequence_len"]) == (1, 4, 32)
    assert len(record["steps"]) == 30
    small, large = zip(*(step["squares"]["all"] for step in record["steps"][6:]), strict=True)
    again = noise_scale(small, large, small_batch=1, large_batch=4)
    assert record["noise"]["all"]["scale"] == pytest.approx(again.scale)
    assert record["steps"][-1]["loss"] < record["steps"][0]["loss"]
    assert f"{again.scale * 32:,.0f} tokens" in capsys.readouterr().out


def test_diverged_training_ends_the_measurement(folder, tmp_path, capsys):
    rates = {"matrix_lr": 3e38, "embedding_lr": 1e38, "unembedding_lr": 1e38}
    out = tmp_path / "out"
    args = ["--skip", "1", "--out", str(out), *of_train(folder, device_batch_size=1, **rates)]
    assert batch_size.main(args) == 1
    assert "has no finite loss or gradient; use lower rates" in capsys.readouterr().out
    record = json.loads((out / "result.json").read_text())
    assert not record["finished"]
    assert "NaN" not in (out / "result.json").read_text()


def test_ctrl_c_keeps_the_results(folder, tmp_path, monkeypatch):
    count = iter(range(1000))

    def measure(trainer, batch, real=measure_step):
        if next(count) == 14:
            os.kill(os.getpid(), signal.SIGINT)
        return real(trainer, batch)

    monkeypatch.setattr(lab_noise_scale, "measure_step", measure)
    out = tmp_path / "out"
    args = ["--skip", "3", "--out", str(out), *of_train(folder, device_batch_size=1)]
    assert batch_size.main(args) == 130
    record = json.loads((out / "result.json").read_text())
    assert not record["finished"]
    assert len(record["steps"]) == 15
    assert record["noise"]["all"]["scale"] is not None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "10", "--skip", "5"], "got --steps 10 --skip 5"),
        (["--device-batch-size", "4"], "--device-batch-size of at most 2"),
        (["--overwrite"], "--overwrite is for train only"),
    ],
)
def test_wrong_flag_is_one_line(folder, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    assert batch_size.main([*of_train(folder), *args]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []
