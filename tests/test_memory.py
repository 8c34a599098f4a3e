import sys

import pytest
import torch
import torch.distributed as dist
from ranks import run

from nanochat_native import memory
from nanochat_native.memory import Options, predict, static_bytes
from nanochat_native.model import GPT, GPTConfig
from nanochat_native.optim import setup_optimizers

CONFIG = {"depth": 3, "max_seq_len": 128, "vocab_size": 515, "device_batch_size": 2}


def build():
    model = GPT(GPTConfig.from_depth(CONFIG["depth"], vocab_size=CONFIG["vocab_size"], sequence_len=128))
    model.init_weights(seed=0)
    return model


def held():
    """(weights, gradients, optimizers' state) of this rank after a step, bytes."""
    model = build()
    optimizers = setup_optimizers(model, process_group=dist.group.WORLD)
    idx = torch.randint(515, (1, 17))
    model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous()).backward()
    for optimizer in optimizers:
        optimizer.step()
    buckets = [bucket for optimizer in optimizers for bucket in optimizer.buckets]
    storages = {}
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return (
        sum(b.flat_values.nbytes for b in buckets),
        sum(b.flat_gradients.nbytes for b in buckets),
        sum(storages.values()),
    )


@pytest.mark.parametrize("size", [2, 3])
def test_static_memory_of_ranks_is_as_predicted(size):
    results = run(size, held)
    with torch.device("meta"):
        weights, state = static_bytes(GPT(build().config), size)
    assert {found[:2] for found in results} == {(weights, weights)}
    assert max(found[2] for found in results) == pytest.approx(state, rel=0.05)


def test_static_memory_of_one_rank():
    model = build()
    weights, state = static_bytes(model, 1)
    assert weights == sum(p.nbytes for p in model.parameters())
    assert state == weights + sum(p.nbytes for p in (model.wte.weight, model.lm_head.weight))


def kept_by_autograd(dtype, grad_checkpoint):
    """Bytes that a forward pass keeps beside the parameters."""
    config = GPTConfig.from_depth(3, vocab_size=515, sequence_len=128)
    model = GPT(config, grad_checkpoint=grad_checkpoint)
    model.init_weights(seed=0)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    idx = torch.randint(515, (2, 129))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in known)


@pytest.mark.parametrize(("dtype", "grad_checkpoint"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_what_autograd_keeps_is_as_predicted(dtype, grad_checkpoint):
    parts = predict(Options(dtype=dtype, grad_checkpoint=grad_checkpoint, **CONFIG))
    predicted = parts["activations"] + parts["weights in bfloat16"] + parts["gradient of lm_head, with the loss"]
    assert kept_by_autograd(dtype, grad_checkpoint) == pytest.approx(predicted, rel=0.05)


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory", "--depth", "20", "--nproc", "8"])
    assert memory.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "on each of 8 ranks" in lines[-1]
    total = sum(float(line.split()[-2]) for line in lines[:-1])
    assert float(lines[-1].split()[-2]) == pytest.approx(total, abs=0.01)
    monkeypatch.setattr(sys, "argv", ["memory", "--nproc", "0"])
    assert memory.main() == 2
