"""GPT with the parts that nanochat gained after October 2025, against plain torch, and each part alone."""

import dataclasses
import math
import weakref

import pytest
import today_reference
import torch
from backends import BACKENDS, use

from nanochat_native.model import attention_weights, gpt
from nanochat_native.model.config import ARCHITECTURES, GPTConfig
from nanochat_native.model.gpt import GPT

SIZES = {"sequence_len": 40, "vocab_size": 70, "n_layer": 5, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
TODAY = GPTConfig(**SIZES, window_pattern="SSSL", **ARCHITECTURES["today"])
PARTS = ("value_embeddings", "residual_scalars", "smear", "backout")
# Lengths beyond the windows: 128 for S and sequence_len for L.
SHORT, LONG = 40, 150


def model_of(config, dtype=torch.float32, **options):
    """Return a model in which every part has an effect: no weight is 0."""
    model = GPT(config, **options)
    model.init_weights(seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                parameter.normal_(0, 0.1, generator=generator)
            elif name.endswith("gate.weight"):
                parameter.normal_(0, 0.5, generator=generator)
            elif name == "smear_lambda":
                parameter.fill_(0.3)
    return model.to(dtype)


def tokens(length, rows=2):
    return torch.randint(SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(5))


def reference(model, ids, targets=None):
    """Return the logits or the loss of the plain model, and its parameters."""
    config = model.config
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    shape = (config.n_layer, config.n_head, config.n_kv_head, config.sequence_len, config.vocab_size, "SSSL")
    if targets is None:
        return today_reference.logits(parameters, shape, ids), parameters
    return today_reference.loss(parameters, shape, ids, targets), parameters


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_loss_and_gradients_equal_the_plain_model(backend, layers, kv_heads):
    use(backend)
    model = model_of(dataclasses.replace(TODAY, n_layer=layers, n_kv_head=kv_heads), torch.float64)
    ids = tokens(SHORT + 1)
    expected, parameters = reference(model, ids[:, :-1], ids[:, 1:])
    expected.backward()
    loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_gradients_at_once_equal_those_of_single_calls(backend):
    """By is_grads_batched, whose backward pass runs on tensors with an additional dimension."""
    use(backend)
    model = model_of(TODAY, torch.float64)
    parameters = [parameter for name, parameter in model.named_parameters() if name != "lm_head.weight"]
    out = model.hidden_states(tokens(SHORT))
    directions = torch.randn(3, *out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    batched = torch.autograd.grad(out, parameters, directions, is_grads_batched=True, retain_graph=True)
    for row, direction in enumerate(directions):
        grads = torch.autograd.grad(out, parameters, direction, retain_graph=True)
        for several, one in zip(batched, grads, strict=True):
            torch.testing.assert_close(several[row], one, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_of_long_sequences_equal_the_plain_model(backend):
    """L layers see sequence_len earlier positions, S layers 128."""
    use(backend)
    model = model_of(dataclasses.replace(TODAY, sequence_len=136))
    ids = tokens(LONG)
    with torch.no_grad():
        found, (expected, _) = model(ids), reference(model, ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        unbounded = model_of(dataclasses.replace(model.config, bounded_windows=False))
        assert (unbounded(ids) - found)[:, :136].abs().max() < 1e-4
        assert (unbounded(ids) - found)[:, 140:].abs().max() > 1e-3


def test_windows_are_rounded_up_to_128():
    def windows(length):
        return dataclasses.replace(TODAY, sequence_len=length).windows

    assert [windows(T)[0] for T in (64, 512, 513, 1024, 2048, 4096)] == [128, 128, 256, 256, 512, 1024]
    assert windows(2048) == [512, 512, 512, 2048, 2048]


@pytest.mark.parametrize("backout", [True, False])
def test_only_a_model_with_backout_holds_the_stream_of_its_middle(monkeypatch, backout):
    """Until the end, in a forward pass without gradients: of 8 layers, the stream before layer 5."""
    begin, streams, held = gpt._begin_block, [], set()

    def begin_and_look(*arguments):
        held.update(layer for layer, stream in enumerate(streams[:-1]) if stream() is not None)
        results = begin(*arguments)
        streams.append(weakref.ref(results[0]))
        return results

    monkeypatch.setattr(gpt, "_begin_block", begin_and_look)
    model = model_of(GPTConfig(**SIZES | {"n_layer": 8}, backout=backout))
    with torch.no_grad():
        model.hidden_states(tokens(SHORT))
    assert len(streams) == 8
    assert held == ({5} if backout else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [None, *PARTS])
def test_recomputed_blocks_give_the_same_bits(part, dtype):
    config = TODAY if part is None else dataclasses.replace(TODAY, **{part: False})
    ids = tokens(SHORT + 1)
    results = []
    for grad_checkpoint in (False, True):
        model = model_of(config, grad_checkpoint=grad_checkpoint)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_changes_the_logits_and_has_its_parameters(part):
    without = model_of(dataclasses.replace(TODAY, **{part: False}))
    model = model_of(TODAY)
    names = {name.split(".")[0] if "ve_gate" not in name else "ve_gate" for name, _ in model.named_parameters()}
    left = {name.split(".")[0] if "ve_gate" not in name else "ve_gate" for name, _ in without.named_parameters()}
    assert (
        names - left
        == {
            "value_embeddings": {"value_embeds", "ve_gate"},
            "residual_scalars": {"resid_lambdas", "x0_lambdas"},
            "smear": {"smear_gate", "smear_lambda"},
            "backout": {"backout_lambda"},
        }[part]
    )
    ids = tokens(SHORT)
    without.load_state_dict({name: p for name, p in model.state_dict().items() if name in without.state_dict()})
    assert (model(ids) - without(ids)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "value"), [("qk_scale", 1.0), ("rotary_base", 10_000)])
def test_a_constant_changes_the_logits(name, value):
    model, other = model_of(TODAY), model_of(dataclasses.replace(TODAY, **{name: value}))
    assert (model(tokens(SHORT)) - other(tokens(SHORT))).abs().max() > 1e-4


def test_defaults_are_the_first_architecture():
    assert GPTConfig(**SIZES) == GPTConfig(**SIZES, **ARCHITECTURES["october"])
    assert GPTConfig(**SIZES).parts_beyond("october") == []
    assert set(TODAY.parts_beyond("october")) == set(ARCHITECTURES["today"])


def test_rows_beyond_the_vocabulary_take_no_part():
    model = model_of(TODAY)
    assert model.lm_head.weight.shape == model.wte.weight.shape == (128, 64)
    assert model.value_embeds["4"].weight.shape == (128, 32)
    ids = tokens(SHORT + 1)
    model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
    for weight in (model.lm_head.weight, model.wte.weight, model.value_embeds["0"].weight):
        assert weight.grad[:70].abs().sum() > 0
        assert (weight.grad[70:] == 0).all()
    assert model(ids).shape == (2, SHORT + 1, 70)


def test_initial_weights_have_the_stated_distributions():
    config = GPTConfig.from_depth(4, vocab_size=1000, sequence_len=64, architecture="today")
    model = GPT(config)
    model.init_weights(seed=42)
    bound = math.sqrt(3 / config.n_embd)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert weights["transformer.wte.weight"].std().item() == pytest.approx(0.8, rel=0.01)
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.01)
    for name, parameter in weights.items():
        if name.endswith("c_proj.weight") or name == "smear_lambda":
            assert (parameter == 0).all(), name
        elif name.endswith("gate.weight"):
            assert parameter.min() >= 0, name
            assert parameter.max() <= 0.02, name
            assert parameter.std() > 0.003, name
        elif "c_fc" in name or "attn" in name or "value_embeds" in name:
            limit = 0.4 * bound if "c_fc" in name else bound
            assert parameter.abs().max() <= limit, name
            assert parameter.std().item() == pytest.approx(limit / 3**0.5, rel=0.02), name
    torch.testing.assert_close(model.resid_lambdas.detach(), torch.tensor([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05]))
    torch.testing.assert_close(model.x0_lambdas.detach(), torch.tensor([0.20, 0.15, 0.10, 0.05]))
    assert model.backout_lambda.item() == pytest.approx(0.2)


def test_initial_weights_are_drawn_in_the_order_of_nanochat():
    """wte, lm_head, then q, k, v and c_fc of each block, smear_gate, value_embeds and ve_gates."""
    model = GPT(TODAY)
    model.init_weights(seed=42)
    generator = torch.Generator().manual_seed(42)
    weights = dict(model.named_parameters())
    bound = 3**0.5 * 64**-0.5
    blocks = [f"transformer.h.{i}" for i in range(5)]
    order = [("transformer.wte.weight", None), ("lm_head.weight", None)]
    for block in blocks:
        order += [(f"{block}.attn.c_{name}.weight", (-bound, bound)) for name in "qkv"]
        order += [(f"{block}.mlp.c_fc.weight", (-0.4 * bound, 0.4 * bound))]
    order += [("smear_gate.weight", (0, 0.02))]
    order += [(f"value_embeds.{i}.weight", (-bound, bound)) for i in (0, 2, 4)]
    order += [(f"transformer.h.{i}.attn.ve_gate.weight", (0, 0.02)) for i in (0, 2, 4)]
    for name, limits in order:
        drawn = torch.empty(weights[name].shape)
        if limits is None:
            drawn.normal_(0, 0.8 if "wte" in name else 0.001, generator=generator)
        else:
            drawn.uniform_(*limits, generator=generator)
        assert torch.equal(weights[name].detach(), drawn), name


def test_built_without_memory_first_the_weights_are_the_same():
    with torch.device("meta"):
        later = GPT(TODAY)
    later.to_empty(device="cpu")
    later.init_weights(seed=7)
    at_once = GPT(TODAY)
    at_once.init_weights(seed=7)
    for (name, one), (_, other) in zip(later.state_dict().items(), at_once.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_operations_count_products_and_visible_keys():
    config = GPTConfig.from_depth(4, vocab_size=1000, sequence_len=1024, window_pattern="SSSL", architecture="today")
    model = GPT(config)
    C, rows = 256, 1024
    products = 4 * 12 * C * C + rows * C + 2 * 12 * 2 + 24
    assert (config.n_embd, config.padded_vocab_size, config.n_head) == (C, rows, 2)
    assert model.estimate_flops() == 6 * products + 12 * C * (3 * 256 + 1024)


@pytest.mark.parametrize(
    ("depth", "width", "heads"), [(1, 128, 1), (4, 256, 2), (5, 384, 3), (12, 768, 6), (20, 1280, 10)]
)
def test_the_width_is_rounded_up_to_whole_heads(depth, width, heads):
    config = GPTConfig.from_depth(depth, vocab_size=100, sequence_len=64, architecture="today")
    assert (config.n_embd, config.n_head, config.head_dim, config.n_kv_head) == (width, heads, 128, heads)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"qk_scale": 0.0}, "qk_scale must be a finite number > 0, got 0.0"),
        ({"qk_scale": math.inf}, "qk_scale must be a finite number > 0, got inf"),
        ({"smear": 1}, "smear must be True or False, got 1"),
        ({"rotary_base": 0}, "rotary_base must be a whole number >= 1, got 0"),
        ({"initialization": "zeros"}, "initialization must be one of normal, uniform, got 'zeros'"),
        ({"n_embd": 16, "n_head": 4, "n_kv_head": 4}, "n_embd must be >= 24 with smear, got 16"),
    ],
)
def test_wrong_parts_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TODAY, **values)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture must be one of october, today, got 'tomorrow'"):
        GPTConfig.from_depth(4, vocab_size=100, sequence_len=64, architecture="tomorrow")


def test_weights_of_attention_follow_the_model():
    """The weights, times the values that include value embeddings, give the output of attention of every layer."""
    model = model_of(dataclasses.replace(TODAY, sequence_len=136))
    ids = tokens(LONG)
    weights = attention_weights(model, ids)
    outputs, values = [], []
    for block in model.blocks:
        block.attn.c_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
        block.attn.register_forward_pre_hook(lambda attention, inputs: values.append(attention.project(*inputs[:4])[2]))
    with torch.no_grad():
        model(ids)
    for layer in range(5):
        v = values[layer].repeat_interleave(2, dim=2)
        expected = torch.einsum("bhij,bjhd->bihd", weights[layer], v).flatten(-2)
        torch.testing.assert_close(outputs[layer], expected, rtol=1e-4, atol=1e-5)
