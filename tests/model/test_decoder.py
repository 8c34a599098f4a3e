"""The decoder: what it gives from its cache equals the plain forward pass over the whole sequence."""

import dataclasses

import pytest
import torch
from test_model import CONFIG, backend, build, tokens  # noqa: F401

from nanochat_native.model.decoder import Decoder


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, n_kv_head=1, window_pattern="SSSL", n_layer=5)])
@pytest.mark.parametrize(
    "chunks", [[1] * 40, [40], [7, 1, 20, 12], [39, 1]], ids=["single", "whole", "mixed", "prefill"]
)
def test_cached_logits_equal_the_whole_forward(backend, config, chunks):  # noqa: F811
    """Two sequences in slots of their own, each put into the cache chunk by chunk, the last token of each decoded."""
    model, idx = build(config), tokens(length=40, seed=4)
    decoder = Decoder(model, 3, 41)
    with torch.no_grad():
        whole = model(idx)
    position = 0
    for chunk in chunks:
        last = position + chunk - 1
        for row, slot in enumerate((2, 0)):
            if chunk > 1:
                decoder.prefill(slot, idx[row, position:last].tolist(), position)
        logits = decoder.decode([2, 0], idx[:, last].tolist(), [last, last])
        assert torch.allclose(logits, whole[:, last], atol=2e-5, rtol=0)
        position = last + 1
    assert position == 40


def test_the_last_position_is_decoded_like_any_other(backend):  # noqa: F811
    model = build(dataclasses.replace(CONFIG, sequence_len=4))
    idx = tokens(batch=1, length=model.max_positions)
    decoder = Decoder(model, 1, model.max_positions)
    decoder.prefill(0, idx[0, :-1].tolist(), 0)
    logits = decoder.decode([0], [int(idx[0, -1])], [model.max_positions - 1])
    with torch.no_grad():
        assert torch.allclose(logits, model(idx, last_only=True)[:, 0], atol=2e-5, rtol=0)


def test_a_prompt_can_be_continued_in_several_ways(backend):  # noqa: F811
    """Slots that hold the same prompt do not disturb each other."""
    model, idx = build(), tokens(batch=1, length=10)
    decoder = Decoder(model, 3, 12)
    for slot in range(3):
        decoder.prefill(slot, idx[0].tolist(), 0)
    logits = decoder.decode([0, 1, 2], [5, 6, 7], [10, 10, 10])
    with torch.no_grad():
        for row, head in enumerate((5, 6, 7)):
            whole = model(torch.cat([idx, torch.tensor([[head]])], dim=1))[0, -1]
            assert torch.allclose(logits[row], whole, atol=2e-5, rtol=0)
