"""FP8 in the model: which products it takes, its gradients and losses beside bfloat16's, and where it is off."""

import pytest
import torch

from nanochat_native.model import float8 as layers
from nanochat_native.model import functional
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.ops import float8
from nanochat_native.ops.float8 import RECIPES
from nanochat_native.optim import setup_optimizers

# The heads for keys have 64 channels: too few, so c_k and c_v stay in bfloat16.
CONFIG = {"sequence_len": 32, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 128}
TODAY = dict.fromkeys(("value_embeddings", "residual_scalars", "smear", "backout"), True)


def model_in(recipe=None, *, seed=0, grad_checkpoint=False, **config):
    model = GPT(GPTConfig(**CONFIG | config), grad_checkpoint=grad_checkpoint)
    model.init_weights(seed)
    with torch.no_grad():  # they begin as zeros
        for block in model.blocks:
            for weight in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
                weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
        model.lm_head.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
    model.use_float8(recipe)
    return model


def batch(step=0, rows=2):
    """A language that a small model learns at once: each token follows from the one before."""
    generator = torch.Generator().manual_seed(step)
    tokens = [torch.randint(0, 64, (rows, 1), generator=generator)]
    for _ in range(32):
        tokens.append((5 * tokens[-1] + 3) % 64)
    tokens = torch.cat(tokens, dim=1)
    return tokens[:, :-1], tokens[:, 1:]


def loss_and_gradients(model, step=0):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch(step))
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """The shapes (M, K, N) of the products in FP8. The reference computes them: torch's own are slow on a CPU."""
    found = []

    def product(a, b, *args, **options):
        found.append((*a.values.shape, b.values.size(0)))
        return float8.reference_product(a, b, *args, **options)

    monkeypatch.setattr(float8, "product", product)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", [{}, TODAY], ids=["october", "today"])
def test_the_gradients_are_near_those_in_bfloat16(recipe, architecture):
    """Rounding to 3 bits has a relative error of about 2.6 % for each factor, and to 2 bits of 5 %."""
    exact_loss, exact = loss_and_gradients(model_in(**architecture))
    loss, found = loss_and_gradients(model_in(recipe, **architecture))
    assert loss == pytest.approx(exact_loss, rel=1e-2)
    assert loss != exact_loss
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        if gradient.ndim == 2:  # the others are sums of many terms, which nearly cancel
            error = (gradient - exact[name]).norm() / exact[name].norm().clamp_min(1e-3)
            assert error < 0.2, (name, error)
    different = [name for name in found if not torch.equal(found[name], exact[name])]
    assert "transformer.h.0.mlp.c_fc.weight" in different


def test_the_products_are_those_of_the_layers_that_suit_it(products):
    model = model_in("tensorwise")
    assert model.use_float8("tensorwise") == 2 * 4  # c_q, c_proj, mlp.c_fc and mlp.c_proj
    assert model.num_linears == 2 * 6 + 1
    loss_and_gradients(model)
    rows, C, F = 64, 128, 512
    square = [(rows, C, C), (rows, C, C), (C, rows, C)]
    up = [(rows, C, F), (rows, F, C), (F, rows, C)]
    down = [(rows, F, C), (rows, C, F), (C, rows, F)]
    assert sorted(products) == sorted(2 * (2 * square + up + down))


def test_evaluation_is_in_bfloat16(products):
    model, plain = model_in("rowwise"), model_in()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(*batch()), plain(*batch()))
    assert not products
    loss_and_gradients(model)
    assert products
    model.use_float8(None)
    assert loss_and_gradients(model_in())[0] == loss_and_gradients(plain)[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputed_blocks_give_the_same_bits(recipe, products):
    loss, gradients = loss_and_gradients(model_in(recipe))
    once = len(products)
    again_loss, again = loss_and_gradients(model_in(recipe, grad_checkpoint=True))
    assert len(products) == once + once + once // 3  # each forward product a second time
    assert loss == again_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[name]), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_follows_bfloat16(recipe):
    """60 steps on a language of one rule: from ln 64 = 4.2 down, with losses that differ by less than a tenth."""
    losses = {}
    for each in (None, recipe):
        model = model_in(each)
        optimizers = setup_optimizers(model)
        losses[each] = []
        for step in range(60):
            losses[each].append(loss_and_gradients(model, step)[0])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        model.use_float8(None)
    assert losses[None][0] > 4 > 1 > losses[None][-1]
    for ours, theirs in zip(losses[recipe], losses[None], strict=True):
        assert abs(ours - theirs) < 0.1


def test_the_weight_that_was_multiplied_gets_the_gradient_even_if_it_changes_afterwards():
    """tensorwise keeps the rounded weight; rowwise keeps the weight itself, and torch finds the change."""
    x, weight = torch.randn(32, 128).bfloat16().requires_grad_(), torch.randn(128, 128).requires_grad_()
    dy = torch.randn(32, 128).bfloat16()

    def gradient(recipe, change):
        (y,) = layers.linears(x, [weight], recipe)
        if change:
            with torch.no_grad():
                weight.mul_(2)
        return torch.autograd.grad(y, x, dy)[0]

    expected = gradient("tensorwise", False)
    assert torch.equal(gradient("tensorwise", True), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient("rowwise", True)


def test_three_projections_of_one_input_scale_it_once(monkeypatch):
    calls = []
    original = float8.quantize
    monkeypatch.setattr(
        float8, "quantize", lambda x, *args, **options: calls.append(x) or original(x, *args, **options)
    )
    x = torch.randn(2, 16, 128).bfloat16().requires_grad_()
    weights = [torch.randn(128, 128).requires_grad_() for _ in range(3)]
    for recipe in RECIPES:
        calls.clear()
        outs = functional.linears(x, weights, recipe)
        assert len(calls) == 4
        assert [out.shape for out in outs] == [(2, 16, 128)] * 3
        sum(out.float().sum() for out in outs).backward()
        assert x.grad.shape == x.shape


def test_what_is_refused():
    x, weight = torch.randn(24, 128).bfloat16().requires_grad_(), torch.randn(128, 128).requires_grad_()
    with pytest.raises(ValueError, match="x must have a multiple of 16 rows for products in FP8, got 24"):
        functional.linears(x, [weight], "rowwise")
    with pytest.raises(ValueError, match="multiple of 16 rows"):
        functional.squared_relu_mlp(x, weight, weight, "rowwise")
    with pytest.raises(ValueError, match="recipe must be None, tensorwise or rowwise, got 'blockwise'"):
        model_in("blockwise")
    for y in (
        functional.linears(x[:16], [weight], "rowwise")[0],
        functional.squared_relu_mlp(x[:16], weight, weight, "tensorwise"),
    ):
        with pytest.raises(RuntimeError, match="have no second derivative"):
            torch.autograd.grad(y.float().sum(), x, create_graph=True)
