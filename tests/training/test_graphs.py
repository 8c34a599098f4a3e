"""CUDA graphs of a step, as far as a machine without a GPU shows: when they are used, and what a failed capture does.

That they change no bit of a run is tested by tests/gpu/test_gpu_training.py.
"""

import pytest
import torch
from tiny_run import losses, tiny_flags, train, write_text

from nanochat_native import ops
from nanochat_native.optim import AdamW, Muon
from nanochat_native.optim.routing import RECIPES
from nanochat_native.train import main
from nanochat_native.training import graphs, trainer

CUDA = torch.device("cuda")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    write_text(folder / "text.jsonl")
    return folder


@pytest.fixture
def served(monkeypatch):
    """Every operator seems to have a CUDA kernel, but those in the list."""
    missing = []

    def serves(operator, device):
        return ("torch", "not built") if operator in missing else ("native", "kernel built")

    monkeypatch.setattr(ops, "serves", serves)
    return missing


def matrices(kind, **settings):
    return kind([torch.nn.Parameter(torch.zeros(2, 3))], **settings)


def test_what_keeps_a_run_from_graphs(served):
    optimizers = [matrices(AdamW), matrices(Muon)]
    assert graphs.why_not(CUDA, BF16, optimizers, 1) is None
    assert graphs.why_not(torch.device("cpu"), BF16, optimizers, 1) == "--device is cpu"
    assert graphs.why_not(CUDA, torch.float32, optimizers, 1).startswith("--dtype is float32")
    assert graphs.why_not(CUDA, BF16, optimizers, 2) == "2 ranks exchange gradients during the backward pass"
    sgd = matrices(torch.optim.SGD)
    assert graphs.why_not(CUDA, BF16, [*optimizers, sgd], 1) == "SGD takes its step from the host"
    served.append("attention")
    assert graphs.why_not(CUDA, BF16, optimizers, 1) == "attention is not native: not built"


def test_graphs_that_are_required_are_refused_on_a_cpu(folder, capsys):
    assert train(folder, run="refused", cuda_graphs="on") == 2
    assert "--cuda-graphs must be auto or off here: --device is cpu" in capsys.readouterr().err


def test_a_resumed_run_may_change_the_flag(folder, capsys):
    assert train(folder, run="resumed", steps=4, cuda_graphs="off") == 0
    assert main([*tiny_flags(folder, run="resumed", steps=8, cuda_graphs="auto"), "--resume", "auto"]) == 0
    printed = capsys.readouterr().out
    assert "may differ in the last bits" not in printed
    assert "graphs   " not in printed


def test_a_failed_capture_is_reported_once_and_changes_no_bit(folder, monkeypatch, capsys):
    """torch without CUDA raises an error at the first capture."""
    assert train(folder, run="without") == 0
    capsys.readouterr()
    monkeypatch.setattr(trainer, "why_not", lambda *_: None)
    assert train(folder, run="auto") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("graphs   ")]
    assert line.startswith("graphs   off: forward and backward cannot be captured: ")
    assert losses(folder / "runs" / "auto") == losses(folder / "runs" / "without")
    assert train(folder, run="on", cuda_graphs="on") == 2
    assert "must be auto or off here: forward and backward cannot be captured" in capsys.readouterr().err


class Replayed:
    """Stands in for the graph of an update: it runs the steps with the numbers that the graph would read, those on the
    device and for the others those of its capture."""

    def __init__(self, update, optimizers):
        self.update, self.optimizers = update, optimizers
        self.captured = [dict(group) for optimizer in optimizers for group in optimizer.param_groups]

    def replay(self):
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        now = [dict(group) for group in groups]
        for group, captured in zip(groups, self.captured, strict=True):
            group |= captured
        with self.update.settings_on_device():
            for optimizer in self.optimizers:
                optimizer.step()
        for group, values in zip(groups, now, strict=True):
            group |= values


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_numbers_on_the_device_are_those_of_the_groups(monkeypatch, recipe):
    """Steps with numbers in tensors, and the state that the host keeps, against plain steps."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(5, 3, generator=generator) for _ in range(4)]
    runs = []
    for _ in range(2):
        copies = [torch.nn.Parameter(weight.clone()) for weight in weights]
        groups = [{"params": copies[:1], "lr": 0.3}, {"params": copies[1:2], "lr": 0.1}]
        runs.append([AdamW(groups, weight_decay=0.1), Muon(copies[2:], lr=0.02, **RECIPES[recipe].muon)])
    update = None
    for step in range(4):
        for optimizers in runs:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 0.1 / (1 + step)
                    if "momentum" in group:
                        group["momentum"] = 0.5 + step / 10
                        group["weight_decay"] = 0.3 / (1 + step)
                    for parameter in group["params"]:
                        parameter.grad = torch.full_like(parameter, 1.0) * (parameter.detach() + step)
        for optimizer in runs[0]:
            optimizer.step()
        if step == 0:
            for optimizer in runs[1]:
                optimizer.step()
            update = graphs._Update(runs[1])
            update.graph = Replayed(update, runs[1])
            continue
        update.replay()
        for mine, other in zip(runs[1], runs[0], strict=True):
            assert all(isinstance(group["lr"], float) for group in mine.param_groups)
            mine_state, other_state = mine.state_dict()["state"], other.state_dict()["state"]
            for key, values in other_state.items():
                assert all(torch.equal(mine_state[key][name], value) for name, value in values.items())
            for one, two in zip(mine.param_groups, other.param_groups, strict=True):
                assert all(map(torch.equal, one["params"], two["params"]))


def test_adamw_with_different_numbers_of_steps_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(2)) for _ in range(2)])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones(2)
        optimizer.step()
    with pytest.raises(RuntimeError, match="2 different numbers of steps"):
        graphs._Update([optimizer])
