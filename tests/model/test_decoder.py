"""The decoder: what it gives from its cache equals the plain forward pass over the whole sequence."""

import dataclasses

import pytest
import torch
from models import build as build_with_all_parts
from test_model import CONFIG, backend, build, tokens  # noqa: F401

from nanochat_native.model.config import ARCHITECTURES
from nanochat_native.model.decoder import Decoder

PARTS = ARCHITECTURES["today"] | {"window_multiple": 4, "qk_scale": 1.4}
TODAY = dataclasses.replace(CONFIG, sequence_len=16, n_layer=4, window_pattern="SSL", **PARTS)  # windows 4, 4, 16, 16


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


def today_model(**changes):
    return build_with_all_parts(dataclasses.replace(TODAY, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_head": 1, "n_layer": 5},
        {"n_layer": 1},
        {"n_layer": 2, "smear": False},
        {"value_embeddings": False},
        {"residual_scalars": False},
        {"backout": False, "bounded_windows": False},
        {"n_embd": 24, "n_head": 2, "n_kv_head": 1},
    ],
    ids=str,
)
def test_every_position_of_a_text_beyond_the_windows_has_the_logits_of_the_whole_forward(backend, changes):  # noqa: F811
    model = today_model(**changes)
    idx = tokens(length=70, seed=7)
    decoder = Decoder(model, 4, 70)
    with torch.no_grad():
        whole = model(idx)
    assert whole.size(-1) == CONFIG.vocab_size < model.lm_head.weight.size(0)
    position = 0
    for chunk in (1, 2, 17, 1, 1, 30, 5, 13):
        last = position + chunk - 1
        for row, slot in enumerate((3, 1)):
            if chunk > 1:
                decoder.prefill(slot, idx[row, position:last].tolist(), position)
        logits = decoder.decode([3, 1], idx[:, last].tolist(), [last, last])
        assert torch.allclose(logits, whole[:, last], atol=5e-5, rtol=0), last
        position = last + 1
    assert position == 70
    assert whole.std() > 0.3, "the weights do not show in the logits"


def test_bounded_windows_are_those_of_the_training():
    """A token beyond the windows of all layers has no influence; the last one within them has some."""
    model = today_model(n_layer=1, smear=False, window_pattern="L")
    text = tokens(batch=1, length=40)[0].tolist()

    def last_logits(changed):
        decoder = Decoder(model, 1, 40)
        ids = [(token + (at == changed)) % CONFIG.vocab_size for at, token in enumerate(text)]
        decoder.prefill(0, ids[:-1], 0)
        return decoder.decode([0], ids[-1:], [39])

    expected = last_logits(changed=None)
    assert torch.equal(last_logits(changed=22), expected)  # 39 - 22 = 17 > sequence_len
    assert not torch.equal(last_logits(changed=23), expected)


def test_a_slot_that_goes_back_continues_from_the_tokens_before(backend):  # noqa: F811
    """With smear, the token before the first new one belongs to its embedding."""
    model = today_model()
    first, second = tokens(length=30, seed=8).tolist()
    reused = Decoder(model, 2, 40)
    reused.prefill(1, second, 0)
    reused.prefill(0, first, 0)
    reused.decode([0], [5], [30])
    for start in (12, 3, 0):
        text = [*first[:start], *second[start:]]
        reused.prefill(0, text[start:-1], start)
        fresh = Decoder(model, 1, 40)
        fresh.prefill(0, text[:-1], 0)
        found, expected = reused.decode([0], text[-1:], [29]), fresh.decode([0], text[-1:], [29])
        assert torch.allclose(found, expected, atol=5e-5, rtol=0)
        with torch.no_grad():
            assert torch.allclose(found, model(torch.tensor([text]))[:, -1], atol=5e-5, rtol=0)
        first = text
    # A position that was filled before can be decoded again, while the later ones stay.
    with torch.no_grad():
        again = model(torch.tensor([first[:20]]))[:, -1]
    assert torch.allclose(reused.decode([0], [first[19]], [19]), again, atol=5e-5, rtol=0)


def test_a_position_after_an_empty_one_is_refused_with_smear(backend):  # noqa: F811
    decoder = Decoder(today_model(), 2, 40)
    decoder.prefill(0, [1, 2, 3], 0)
    with pytest.raises(ValueError, match=r"previous must be -1 at position 0 and a token .* got -1 at position 4"):
        decoder.decode([0], [1], [4])
    with pytest.raises(ValueError, match="got -1 at position 3"):
        decoder.decode([1], [1], [3])
    with pytest.raises(ValueError, match="slot"):
        decoder.prefill(2, [1], 0)
    assert not decoder.cache[:, 1].any()
    decoder.decode([0], [1], [3])
