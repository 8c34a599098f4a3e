"""A few training steps on the GPU: of the model alone, and of a whole run where its packages are installed."""

import json
import math

import pytest
import torch

from nanochat_native import ops
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import setup_optimizers

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:nanochat_native.*served by plain torch")]

RUN_PACKAGES = ("tyro", "rustbpe", "tiktoken", "safetensors", "tqdm", "numpy")


def losses(device, backend, autocast):
    """Of eight steps of a small model."""
    model = GPT(GPTConfig.from_depth(2, vocab_size=1003, sequence_len=64)).to(device)
    model.init_weights(seed=0)
    optimizers = setup_optimizers(model, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1003, (4, 65), generator=generator).to(device)
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
    assert main(tiny_flags(tmp_path, device=device.type, backend="native")) == 0
    lines = map(json.loads, (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines())
    found = [record["loss"] for record in lines if record["kind"] == "train"]
    assert len(found) == 8
    assert all(map(math.isfinite, found))
    assert found[-1] < found[0]
