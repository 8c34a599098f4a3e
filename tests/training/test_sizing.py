import dataclasses
import re

import pytest
import torch

from nanochat_native.model.config import ARCHITECTURES, GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.runs.config import TrainConfig
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.training.sizing import accumulation_steps, resolve_batch_size, row_bytes


def batch(total, rows, length=16, **flags):
    return TrainConfig(total_batch_size=total, device_batch_size=rows, max_seq_len=length, **flags)


def test_accumulation_steps():
    assert accumulation_steps(batch(64, 2)) == 2
    assert accumulation_steps(batch(64, 2), world_size=2) == 1


@pytest.mark.parametrize(
    ("total", "rows", "world", "proposals"),
    [
        (96, 4, 1, ["--total-batch-size 64 or 128", "--device-batch-size 3"]),
        (100, 2, 1, ["--total-batch-size 96 or 128"]),
        (8, 2, 1, ["--total-batch-size 32"]),
        (64, 4, 2, ["--total-batch-size 128", "--device-batch-size 2"]),
    ],
)
def test_a_division_with_a_rest_proposes_values_that_work(total, rows, world, proposals):
    with pytest.raises(ConfigError) as error:
        accumulation_steps(batch(total, rows), world)
    for proposal in proposals:
        assert proposal in str(error.value)
    for name, values in re.findall(r"--(total|device)-batch-size (\d+(?: or \d+)?)", str(error.value))[1:]:
        for value in map(int, values.split(" or ")):
            changed = batch(value, rows) if name == "total" else batch(total, value)
            assert accumulation_steps(changed, world) >= 1


def test_the_device_batch_is_the_largest_divisor_that_fits():
    config = TrainConfig(total_batch_size=16 * 24, max_seq_len=16)
    assert resolve_batch_size(config, row_bytes=1, free_bytes=None, world_size=1).device_batch_size == 8
    assert resolve_batch_size(config, row_bytes=100, free_bytes=1000, world_size=1).device_batch_size == 6
    assert resolve_batch_size(config, row_bytes=10**9, free_bytes=1000, world_size=1).device_batch_size == 1
    assert resolve_batch_size(config, row_bytes=1, free_bytes=10**6, world_size=2).device_batch_size == 12
    with pytest.raises(ConfigError, match="--max-seq-len 17"):
        resolve_batch_size(dataclasses.replace(config, max_seq_len=17), row_bytes=1, free_bytes=None, world_size=1)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_activations_are_what_the_backward_pass_keeps(architecture, grad_checkpoint):
    rows, config = 4, TrainConfig(depth=4, max_seq_len=128, grad_checkpoint=grad_checkpoint)
    shape = GPTConfig.from_depth(
        4, vocab_size=300, sequence_len=128, head_dim=64, n_kv_head=2, architecture=architecture
    )
    model = GPT(shape, grad_checkpoint=grad_checkpoint)
    model.init_weights()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    idx = torch.zeros(rows, 128, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(idx, idx)
    assert loss.requires_grad
    estimate = rows * row_bytes(config, shape, element_bytes=4)
    # The estimate includes the working memory of a layer and, with checkpointing, what one layer keeps when recomputed.
    layer = (8 if architecture == "october" else 9) * 256 + 2 * 128
    estimate -= rows * 128 * 4 * (6 * 256 + (layer if grad_checkpoint else 0))
    assert sum(kept.values()) == pytest.approx(estimate, rel=0.1)
