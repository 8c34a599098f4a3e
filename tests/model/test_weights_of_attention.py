"""attention_weights: the weights that training and generation never store."""

import pytest
import torch
from models import build

from nanochat_native import ops
from nanochat_native.model import GPTConfig, attention_weights
from nanochat_native.model.functional import add_norm, norm
from nanochat_native.ops.attention import attention_mask

SHAPES = {
    "plain": {"n_kv_head": 4, "window_pattern": "L"},
    "grouped": {"n_kv_head": 2, "window_pattern": "L"},
    "multi-query": {"n_kv_head": 1, "window_pattern": "SL"},
    "windows": {"n_kv_head": 4, "window_pattern": "SSL"},
}
IDS = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))


def model_of(shape):
    return build(GPTConfig(sequence_len=16, vocab_size=50, n_layer=3, n_head=4, n_embd=32, **SHAPES[shape]))


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_give_the_output_of_attention(shape):
    """In every layer, the weights times the values are what ops.attention returns."""
    model = model_of(shape)
    weights = attention_weights(model, IDS)
    assert (weights.shape, weights.dtype) == ((3, 2, 4, 24, 24), torch.float32)
    cos, sin = model.cos[:, :24], model.sin[:, :24]
    with torch.no_grad():
        x, n = add_norm(norm(model.wte(IDS)), None)
        for layer, block in enumerate(model.blocks):
            q, k, v = block.attn.project(n, cos, sin)
            expected = ops.attention(q, k, v, window=block.attn.window)
            values = v.repeat_interleave(4 // v.size(2), dim=2)
            found = torch.einsum("bhij,bjhd->bihd", weights[layer], values)
            assert (found - expected).abs().max() < 2e-6
            x, n = add_norm(*block(x, n, cos, sin))
        logits = model.lm_head(n)
        torch.testing.assert_close(15 * torch.tanh(logits / 15), model(IDS))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_sum_to_one_and_hidden_keys_have_no_weight(shape):
    model = model_of(shape)
    weights = attention_weights(model, IDS)
    assert (weights.sum(dim=-1) - 1).abs().max() < 1e-6
    assert (weights >= 0).all()
    for layer, window in enumerate(model.config.windows):
        visible = attention_mask(24, 24, True, window)
        assert (weights[layer][..., ~visible] == 0).all()
        assert (weights[layer][..., visible] > 0).all()


def test_no_graph_is_built_and_nothing_is_changed():
    model = model_of("plain")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not attention_weights(model, IDS).requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bfloat16_weights_are_computed_in_float32():
    model = model_of("grouped").bfloat16()
    weights = attention_weights(model, IDS)
    assert weights.dtype == torch.float32
    assert (weights.sum(dim=-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(4,), (0, 4), (1, 161), (1, 2, 3)])
def test_ids_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"ids must have shape \(B, T\), B >= 1 and T from 1 to 160, got"):
        attention_weights(model_of("plain"), torch.zeros(shape, dtype=torch.int64))
