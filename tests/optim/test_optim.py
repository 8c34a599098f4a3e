"""Routing, state and clipping; test_optim_muon.py and test_optim_adamw.py hold the updates."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from backends import BACKENDS, use

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import AdamW, Muon, clip, clip_grad_norm_, describe_routing, setup_optimizers

CONFIG = GPTConfig(sequence_len=16, vocab_size=50, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
MATRICES = {
    f"transformer.h.{layer}.{name}.weight"
    for layer in range(2)
    for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use(request.param):
        yield request.param


def build():
    model = GPT(CONFIG)
    model.init_weights(0)
    return model


def routes(optimizers):
    """name -> (class, initial_lr), of every parameter of the optimizers."""
    return {
        name: (type(optimizer).__name__, group["initial_lr"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def train(model, optimizers, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        idx = torch.randint(0, 50, (4, 17), generator=generator)
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def test_muon_by_heads_and_its_options():
    model = build()
    config = model.config
    _, muon = setup_optimizers(model, matrix_weight_decay=0.1, per_head=True, normuon=True, cautious=True)
    kinds = {
        name.split(".", 3)[-1]: (group["heads"], group["head_axis"])
        for group in muon.param_groups
        for name in group["param_names"]
    }
    assert kinds == {
        "attn.c_q.weight": (config.n_head, "rows"),
        "attn.c_k.weight": (config.n_kv_head, "rows"),
        "attn.c_v.weight": (config.n_kv_head, "rows"),
        "attn.c_proj.weight": (config.n_head, "columns"),
        "mlp.c_fc.weight": (1, "rows"),
        "mlp.c_proj.weight": (1, "rows"),
    }
    assert sum(len(group["params"]) for group in muon.param_groups) == 12
    for group in muon.param_groups:
        assert (group["weight_decay"], group["normuon"], group["cautious"]) == (0.1, True, True)
        assert not group["row_equilibration"]
        assert group["lr"] == group["initial_lr"] == 0.02
    with pytest.raises(TypeError, match="septic"):
        setup_optimizers(model, septic=True)


def test_hybrid_routing_and_rates():
    model = build()
    optimizers = setup_optimizers(model)
    assert [type(optimizer) for optimizer in optimizers] == [AdamW, Muon]
    scale = (32 / 768) ** -0.5
    expected = dict.fromkeys(MATRICES, ("Muon", 0.02))
    expected |= {"transformer.wte.weight": ("AdamW", 0.2 * scale), "lm_head.weight": ("AdamW", 0.004 * scale)}
    assert routes(optimizers) == expected
    owned = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
    assert all(g["betas"] == (0.8, 0.95) and g["eps"] == 1e-10 for g in optimizers[0].param_groups)
    assert optimizers[1].param_groups[0]["nesterov"] is True
    assert all(group["lr"] == group["initial_lr"] for optimizer in optimizers for group in optimizer.param_groups)


def test_given_rates_are_taken():
    optimizers = setup_optimizers(build(), unembedding_lr=0.1, embedding_lr=0.3, matrix_lr=0.5, weight_decay=0.7)
    scale = (32 / 768) ** -0.5
    found = routes(optimizers)
    assert found["lm_head.weight"][1] == pytest.approx(0.1 * scale)
    assert found["transformer.wte.weight"][1] == pytest.approx(0.3 * scale)
    assert found["transformer.h.0.attn.c_q.weight"][1] == 0.5
    assert {group["weight_decay"] for group in optimizers[0].param_groups} == {0.7}
    assert {group["weight_decay"] for group in optimizers[1].param_groups} == {0.0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw", AdamW),
        ("adam", torch.optim.Adam),
        ("sgd", torch.optim.SGD),
        ("sgd_momentum", torch.optim.SGD),
    ],
)
def test_comparison_optimizers_take_everything_and_learn(backend, name, kind):
    model = build()
    (optimizer,) = setup_optimizers(model, optimizer=name)
    assert type(optimizer) is kind
    assert set(routes([optimizer])) == MATRICES | {"transformer.wte.weight", "lm_head.weight"}
    if kind is torch.optim.SGD:
        assert {group["momentum"] for group in optimizer.param_groups} == {0.9 if name == "sgd_momentum" else 0.0}
    idx = torch.arange(17).repeat(4, 1)
    losses = []
    for _ in range(20):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert losses == sorted(losses, reverse=True)


def test_muon_with_sgd():
    sgd, muon = setup_optimizers(build(), optimizer="muon_sgd", embedding_lr=0.5, weight_decay=0.1, ns_steps=3)
    assert (type(sgd), type(muon)) == (torch.optim.SGD, Muon)
    found = routes([sgd, muon])
    assert found == dict.fromkeys(MATRICES, ("Muon", 0.02)) | {
        "transformer.wte.weight": ("SGD", 0.5),  # not scaled by the width, as Adam's are
        "lm_head.weight": ("SGD", 0.3),
    }
    assert {(g["momentum"], g["weight_decay"]) for g in sgd.param_groups} == {(0.0, 0.1)}
    assert muon.param_groups[0]["ns_steps"] == 3


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd_momentum", "sgd"])
def test_every_optimizer_has_three_rates(name):
    (optimizer,) = setup_optimizers(build(), optimizer=name, embedding_lr=1.0, unembedding_lr=2.0, matrix_lr=3.0)
    scale = (32 / 768) ** -0.5 if name.startswith("adam") else 1.0
    rates = {route: rate / scale for route, (_, rate) in routes([optimizer]).items()}
    expected = dict.fromkeys(MATRICES, 3.0) | {"transformer.wte.weight": 1.0, "lm_head.weight": 2.0}
    assert rates == pytest.approx(expected)


def test_routing_line():
    assert describe_routing(setup_optimizers(build())) == "12 matrices 0.0M -> Muon | wte, lm_head 0.0M -> AdamW"
    assert describe_routing(setup_optimizers(build(), optimizer="sgd")) == "12 matrices, wte, lm_head 0.0M -> SGD"
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(4, vocab_size=8192, sequence_len=512))
    assert describe_routing(setup_optimizers(model)) == "24 matrices 3.1M -> Muon | wte, lm_head 4.2M -> AdamW"


def test_a_parameter_of_no_group_is_an_error_that_names_it():
    model = build()
    model.extra = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"extra\.weight, shape \(4, 3\)"):
        setup_optimizers(model)
    model = build()
    model.transformer["h"][1].mlp.gain = nn.Parameter(torch.ones(5))
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.gain, shape \(5,\)"):
        setup_optimizers(model)


def test_shared_and_missing_parameters_are_errors():
    model = build()
    model.lm_head.weight = model.wte.weight
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight and lm_head\.weight are one tensor"):
        setup_optimizers(model)
    model = build()
    del model.lm_head
    with pytest.raises(ValueError, match=r"no lm_head\.weight"):
        setup_optimizers(model)
    with pytest.raises(ValueError, match="adagrad"):
        setup_optimizers(build(), optimizer="adagrad")


def test_resumed_training_has_the_same_bits(backend):
    def fresh():
        model = build()
        return model, setup_optimizers(model)

    model, optimizers = fresh()
    train(model, optimizers, 3)
    saved = copy.deepcopy([model.state_dict(), *(o.state_dict() for o in optimizers)])
    expected = train(model, optimizers, 3, seed=1)

    model, optimizers = fresh()
    model.load_state_dict(saved[0])
    for optimizer, state in zip(optimizers, saved[1:], strict=True):
        optimizer.load_state_dict(state)
    assert train(model, optimizers, 3, seed=1) == expected

    without_state = fresh()
    without_state[0].load_state_dict(saved[0])
    assert train(*without_state, 3, seed=1) != expected


def test_bfloat16_parameters_keep_float32_state_when_loaded(backend):
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(8, 4, generator=generator).bfloat16())
    for optimizer, keys in ((AdamW([parameter]), ["exp_avg", "exp_avg_sq"]), (Muon([parameter]), ["momentum_buffer"])):
        parameter.grad = torch.randn(8, 4, generator=generator).bfloat16()
        optimizer.step()
        optimizer.step()
        saved = {key: optimizer.state[parameter][key].clone() for key in keys}
        other = type(optimizer)([parameter])
        other.load_state_dict(optimizer.state_dict())
        for key in keys:
            assert other.state[parameter][key].dtype == torch.float32
            assert torch.equal(other.state[parameter][key], saved[key])
            assert not torch.equal(saved[key], saved[key].bfloat16().float()), "the test would not see a cast"
        other.step()
        for key in keys:
            assert torch.equal(optimizer.state[parameter][key], saved[key]), (
                "the loaded state is the saved one's memory"
            )


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_settings_out_of_range(kind):
    parameters = [("blocks.0.weight", nn.Parameter(torch.zeros(2, 2)))]
    for bad, message in (
        ({"lr": -1.0}, "lr must be a number >= 0, got -1.0"),
        ({"lr": math.nan}, "lr must be a number >= 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0, got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(parameters, **bad)


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_sparse_gradients_are_refused_by_name(kind):
    parameter = nn.Parameter(torch.zeros(3, 3))
    optimizer = kind([("wte.weight", parameter)])
    parameter.grad = torch.eye(3).to_sparse()
    with pytest.raises(ValueError, match=r"wte\.weight is sparse"):
        optimizer.step()


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_parameters_without_a_gradient_are_left_alone(backend, kind):
    first, second = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = kind([first, second], lr=0.1, weight_decay=0.5)
    second.grad = torch.eye(3)
    optimizer.step()
    assert torch.equal(first, torch.ones(3, 3))
    assert first not in optimizer.state
    assert not torch.equal(second, torch.ones(3, 3))


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_closure_and_schedulers(kind):
    """The rest of torch.optim's protocol: a closure that gives the loss, and a rate that a scheduler sets."""
    parameter = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = kind([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    with use("torch"):
        before = parameter.detach().clone()
        assert optimizer.step(closure).item() == pytest.approx(before.square().sum().item())
        moved = parameter.detach().clone()
        assert not torch.equal(moved, before)
        scheduler.step()
        optimizer.step(closure)
        assert torch.equal(parameter, moved)


def gradients(scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in [(7, 300), (5,), (), (2, 3, 4)]]
    for parameter in parameters:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(dtype)
    return [*parameters, nn.Parameter(torch.zeros(3))]  # the last has no gradient


def copy_of_gradients(parameters):
    return [p.grad.clone() for p in parameters if p.grad is not None]


def norm_of(parameters):
    return math.sqrt(sum(g.double().square().sum().item() for g in copy_of_gradients(parameters)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_clipping_scales_all_gradients_by_one_factor(dtype):
    parameters = gradients(dtype=dtype)
    before, norm = copy_of_gradients(parameters), norm_of(parameters)
    total = clip_grad_norm_(parameters, 2.0)
    assert total.shape == ()
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(norm, rel=1e-6)
    assert norm > 40
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for old, new in zip(before, parameters[:-1], strict=True):
        assert torch.allclose(new.grad, old * (2.0 / norm), rtol=tolerance, atol=0)
    assert norm_of(parameters) == pytest.approx(2.0, rel=tolerance)
    assert parameters[-1].grad is None


@pytest.mark.parametrize("max_norm", [1000.0, math.inf])
def test_clipping_leaves_small_gradients_alone(max_norm):
    parameters = gradients()
    before, norm = copy_of_gradients(parameters), norm_of(parameters)
    assert clip_grad_norm_(parameters, max_norm).item() == pytest.approx(norm, rel=1e-6)
    assert all(torch.equal(old, new.grad) for old, new in zip(before, parameters[:-1], strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_left_alone(bad):
    parameters = gradients()
    parameters[0].grad[3, 17] = bad
    before = copy_of_gradients(parameters)
    assert not math.isfinite(clip_grad_norm_(parameters, 1.0).item())
    for old, new in zip(before, parameters[:-1], strict=True):
        assert torch.equal(old.nan_to_num(), new.grad.nan_to_num())


@pytest.mark.parametrize("factor", [2.0 / 3, 1.0, 1e-7])
def test_a_factor_on_the_device_scales_as_a_plain_number(factor):
    """What a GPU does, where the host does not wait for the norm; mixed types in one list."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    tensors = [gradient for dtype in dtypes for gradient in copy_of_gradients(gradients(dtype=dtype))]
    expected = [gradient.mul(factor) for gradient in tensors]
    clip._scale_(tensors, torch.tensor(factor, dtype=torch.float64))
    assert all(map(torch.equal, tensors, expected))


def test_norm_of_many_elements_is_exact():
    """A float32 sum over a whole tensor would be off by 1e-4 here."""
    parameter = nn.Parameter(torch.zeros(4096, 1024))
    parameter.grad = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    exact = parameter.grad.double().square().sum().sqrt().item()
    assert clip_grad_norm_([parameter], math.inf).item() == pytest.approx(exact, rel=1e-8)


def test_clipping_edges():
    assert clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0).item() == 0.0
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm"):
            clip_grad_norm_(gradients(), bad)
