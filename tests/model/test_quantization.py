"""The quantized decoder: it computes what the model with rounded weights computes."""

import copy
import dataclasses

import pytest
import torch
from test_decoder import TODAY
from test_model import CONFIG, backend, build, tokens  # noqa: F401

from nanochat_native.model.decoder import Decoder
from nanochat_native.model.quantization import check_finite, check_quantization, matrices, round_weights_


def filled(config):
    model = build(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    return model


def decoded(decoder, idx):
    """Return the logits of the last of idx (B, T), whose rows have slots of their own."""
    rows, last = idx.size(0), idx.size(1) - 1
    for row in range(rows):
        decoder.prefill(row, idx[row, :-1].tolist(), 0)
    return decoder.decode(list(range(rows)), idx[:, -1].tolist(), [last] * rows)


@pytest.mark.parametrize("config", [CONFIG, TODAY, dataclasses.replace(CONFIG, n_kv_head=1)])
def test_int8_logits_are_those_of_the_model_with_rounded_weights(backend, config):  # noqa: F811
    model, idx = filled(config), tokens(length=12, seed=4)
    found = decoded(Decoder(model, 2, 12, "int8"), idx)
    plain = decoded(Decoder(model, 2, 12), idx)
    before = copy.deepcopy(model)
    round_weights_(model, "int8")
    with torch.no_grad():
        assert torch.allclose(found, model(idx)[:, -1], atol=5e-5, rtol=0)
    assert (found - plain).abs().max() > 1e-3, "rounding shows"
    changed = {id(weight) for weight in matrices(model)}
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) == (id(new) not in changed)


def test_bfloat16_logits_are_close_to_those_of_float32_and_the_cache_has_half_the_bytes():
    model, idx = filled(TODAY), tokens(length=12, seed=4)
    wide = Decoder(model, 2, 12)
    for quantize in (None, "int8"):
        with torch.autocast("cpu", torch.bfloat16):
            small = Decoder(model, 2, 12, quantize)
        assert small.cache.dtype == torch.bfloat16
        assert 0 < (decoded(small, idx) - decoded(wide, idx)).abs().max() < 0.3


def test_weights_in_bfloat16_alone_are_taken():
    model, idx = filled(TODAY), tokens(length=12, seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        expected = decoded(Decoder(model, 2, 12), idx)
    found = decoded(Decoder(model.to(torch.bfloat16), 2, 12), idx)
    assert (found - expected).abs().max() < 0.3  # the angles are rounded too


def test_what_is_not_taken_is_named():
    model = filled(CONFIG)
    with pytest.raises(ValueError, match="quantize must be None or int8, got 'int4'"):
        Decoder(model, 1, 4, "int4")
    with pytest.raises(ValueError, match="quantize must be None or int8, got 'int4'"):
        round_weights_(model, "int4")
    with pytest.raises(ValueError, match="quantize int8 is for the kernel of the CPU and needs device cpu, got cuda"):
        check_quantization("int8", torch.device("cuda"))
    check_quantization("int8", torch.device("cpu"))
    check_quantization(None, torch.device("cuda"))


@pytest.mark.parametrize(
    "name", ["transformer.h.1.attn.c_q.weight", "transformer.h.0.mlp.c_proj.weight", "lm_head.weight"]
)
def test_a_weight_that_is_not_finite_is_named(name):
    model = filled(CONFIG)
    check_finite(model)
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.inf
    before = copy.deepcopy(model)
    refused = (check_finite, lambda model: Decoder(model, 1, 4, "int8"), lambda model: round_weights_(model, "int8"))
    for refuse in refused:
        with pytest.raises(
            ValueError, match=rf"^{name}: weights must be finite to be quantized, got infinities or NaN$"
        ):
            refuse(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)), (
        "none is rounded"
    )
    Decoder(model, 1, 4)
