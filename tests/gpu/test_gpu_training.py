"""A few training steps on the GPU: of the model alone, and of a whole run where its packages are installed."""

import itertools
import json
import math
import os
import signal

import pytest
import torch
from sizes import pick

from nanochat_native import ops
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import setup_optimizers

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:nanochat_native.*served by plain torch")]

RUN_PACKAGES = ("tyro", "rustbpe", "tiktoken", "safetensors", "tqdm", "numpy")


def losses(device, backend, autocast):
    """Of eight steps of a small model."""
    depth, V, T = pick((2, 1003, 64), (1, 1003, 16))
    model = GPT(GPTConfig.from_depth(depth, vocab_size=V, sequence_len=T)).to(device)
    model.init_weights(seed=0)
    optimizers = setup_optimizers(model, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, V, (4, T + 1), generator=generator).to(device)
    found = []
    with ops.use_backend(backend):
        for _ in range(8):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
    return found


@pytest.mark.parametrize("autocast", [False, True])
def test_the_model_learns_alike_on_both_backends(device, require_native, autocast):
    require_native("attention", "adamw_", "linear_cross_entropy")
    native, expected = (losses(device, backend, autocast) for backend in ("native", "torch"))
    assert native[0] == pytest.approx(math.log(1003), abs=0.01)
    assert native[-1] < 0.8 * native[0]
    assert native == pytest.approx(expected, rel=0.03)


def test_a_run(device, tmp_path):
    for package in RUN_PACKAGES:
        pytest.importorskip(package)
    from tiny_run import tiny_flags, write_text

    from nanochat_native.train import main

    write_text(tmp_path / "text.jsonl")
    flags = pick({}, {"depth": 1, "total_batch_size": 64})
    assert main(tiny_flags(tmp_path, device=device.type, backend="native", **flags)) == 0
    lines = map(json.loads, (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines())
    found = [record["loss"] for record in lines if record["kind"] == "train"]
    assert len(found) == 8
    assert all(map(math.isfinite, found))
    assert found[-1] < found[0]


def outcome(folder, run):
    """What a run has logged of its steps and layers, and its last weights."""
    from nanochat_native.runs import checkpoint

    records = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    names = ("kind", "step", "loss", "bpb", "grad_norm", "skipped", "lr_multiplier", "momentum")
    logged = [{name: record[name] for name in names if name in record} for record in records]
    layers = [
        {name: value for name, value in record.items() if "/" in name}
        for record in records
        if record["kind"] == "diagnosis"
    ]
    where = folder / "runs" / run / "checkpoints"
    tensors, _ = checkpoint.load(where, checkpoint.steps(where)[-1])
    return logged, layers, tensors


def assert_same_outcome(folder, first, second):
    (logged, layers, tensors), (other_logged, other_layers, others) = (outcome(folder, run) for run in (first, second))
    assert logged == other_logged
    assert layers == other_layers
    assert tensors.keys() == others.keys()
    for group, found in tensors.items():
        assert found.keys() == others[group].keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, others[group][name]), f"{group} {name}"


def poison(patch, trainer, step):
    """Make a gradient NaN in one step, counted over all runs from now on."""
    count = itertools.count(1)

    def clip(optimizers, max_norm, real=trainer.clip_reduced_, **options):
        if next(count) == step:
            optimizers[1].param_groups[0]["params"][2].grad[0, 0] = math.nan
        return real(optimizers, max_norm, **options)

    patch.setattr(trainer, "clip_reduced_", clip)


@pytest.mark.parametrize("recipe", ["october", "today"])
def test_graphs_change_no_bit_of_a_run_that_skips_a_step_and_is_resumed(
    cuda, require_native, tmp_path, monkeypatch, capsys, recipe
):
    for package in RUN_PACKAGES:
        pytest.importorskip(package)
    require_native("attention", "linear_cross_entropy", "adamw_", "muon_momentum_", "newton_schulz_update_")
    from tiny_run import tiny_flags, write_text

    from nanochat_native.train import main
    from nanochat_native.training import trainer

    write_text(tmp_path / "text.jsonl")
    flags = {"device": "cuda", "backend": "native", "depth": 1, "weight_decay": 0.1, "recipe": recipe}
    flags |= {"warmup_ratio": 0.5, "warmdown_ratio": 0.2}
    with monkeypatch.context() as patch:
        poison(patch, trainer, 3)
        assert main(tiny_flags(tmp_path, run="without", cuda_graphs="off", **flags)) == 0
    assert "graphs   " not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        poison(patch, trainer, 3)
        flags |= {"run": "with", "cuda_graphs": "on"}

        def step(run, batches, real=trainer.Trainer.train_step):
            real(run, batches)
            if run.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(trainer.Trainer, "train_step", step)
        assert main(tiny_flags(tmp_path, **flags)) == 143
    assert main([*tiny_flags(tmp_path, **flags), "--resume", "auto"]) == 0
    assert capsys.readouterr().out.count("are replayed as CUDA graphs") == 2
    assert_same_outcome(tmp_path, "without", "with")


def test_graphs_change_no_bit_with_every_option(cuda, require_native, tmp_path, capsys):
    for package in RUN_PACKAGES:
        pytest.importorskip(package)
    require_native("attention", "linear_cross_entropy", "adamw_", "muon_momentum_", "newton_schulz_update_")
    from tiny_run import tiny_flags, write_text

    from nanochat_native.train import main

    write_text(tmp_path / "text.jsonl")
    switches = ("grad_checkpoint", "diagnose", "normuon", "row_equilibration", "per_head", "cautious")
    flags = {"device": "cuda", "backend": "native", "depth": 1, "steps": 4, "total_batch_size": 192}
    flags |= dict.fromkeys(switches, True) | {"diagnose_every": 2, "matrix_weight_decay": 0.1, "schedule": "cosine"}
    flags |= {"recipe": "october"}
    for run in ("off", "on"):
        assert main(tiny_flags(tmp_path, run=run, cuda_graphs=run, **flags)) == 0
    assert capsys.readouterr().out.count("are replayed as CUDA graphs") == 1
    assert_same_outcome(tmp_path, "off", "on")


def test_a_capture_that_fails_is_reported_and_changes_no_bit(cuda, require_native, tmp_path, monkeypatch, capsys):
    for package in RUN_PACKAGES:
        pytest.importorskip(package)
    require_native("attention", "linear_cross_entropy", "adamw_", "muon_momentum_", "newton_schulz_update_")
    from tiny_run import tiny_flags, write_text

    from nanochat_native.model.gpt import GPT
    from nanochat_native.train import main

    write_text(tmp_path / "text.jsonl")
    flags = {"device": "cuda", "backend": "native", "depth": 1, "steps": 4}

    def waits(model, *args, real=GPT.forward, **kwargs):
        loss = real(model, *args, **kwargs)
        if loss.requires_grad and loss.dim() == 0:
            loss.item()
        return loss

    monkeypatch.setattr(GPT, "forward", waits)
    assert main(tiny_flags(tmp_path, run="off", cuda_graphs="off", **flags)) == 0
    assert main(tiny_flags(tmp_path, run="auto", cuda_graphs="auto", **flags)) == 0
    assert capsys.readouterr().out.count("graphs   off: forward and backward cannot be captured: ") == 1
    assert_same_outcome(tmp_path, "off", "auto")
    assert main(tiny_flags(tmp_path, run="on", cuda_graphs="on", **flags)) == 2
    assert "--cuda-graphs must be auto or off here: forward and backward cannot be" in capsys.readouterr().err
