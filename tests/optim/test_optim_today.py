"""The recipe of July 2026: its groups, and Muon's step with its options."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from backends import BACKENDS, use
from ranks import run

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.ops import weight_copies
from nanochat_native.ops.reference import COEFFICIENTS
from nanochat_native.optim import AdamW, Muon, describe_routing, setup_optimizers
from nanochat_native.optim.routing import DEFAULT_LEARNING_RATES, RECIPES

SHAPE = {"sequence_len": 16, "vocab_size": 50, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
PARTS = {"value_embeddings": True, "residual_scalars": True, "smear": True, "backout": True, "vocab_multiple": 64}
CONFIGS = {"october": GPTConfig(**SHAPE), "today": GPTConfig(**SHAPE, **PARTS, initialization="uniform")}
OPTIONS = RECIPES["today"].muon
SHAPES = [(24, 16), (16, 64), (16, 16), (2, 12), (1, 24), (24, 1), (16, 16), (2, 12)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use(request.param):
        yield request.param


def build(architecture="today"):
    model = GPT(CONFIGS[architecture])
    model.init_weights(0)
    return model


def batch(seed=0):
    tokens = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def train(model, optimizers, seeds):
    losses = []
    for seed in seeds:
        loss = model(*batch(seed))
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses


# --- the groups ---


def groups_of(optimizers):
    """name -> the optimizer, the rate, the betas and the decay."""
    return {
        name: (type(each).__name__, group["initial_lr"], group.get("betas"), group["weight_decay"])
        for each in optimizers
        for group in each.param_groups
        for name in group["param_names"]
    }


def expected_groups(b=1.0, width=32):
    """The table of nanochat."""
    r = math.sqrt(768 / width)
    table = {
        "lm_head.weight": (0.008 * r * b, (0.8, 0.96), 0.01),
        "transformer.wte.weight": (0.3 * r * b, (0.8, 0.995), 0.001),
        "value_embeds.0.weight": (0.15 * r * b, (0.8, 0.995), 0.01),
        "value_embeds.2.weight": (0.15 * r * b, (0.8, 0.995), 0.01),
        "resid_lambdas": (0.005 * b, (0.8, 0.95), 0.05),
        "x0_lambdas": (0.5 * b, (0.96, 0.95), 0.0),
        "smear_gate.weight": (0.2, (0.8, 0.95), 0.0),
        "smear_lambda": (0.2, (0.8, 0.95), 0.0),
        "backout_lambda": (0.2, (0.8, 0.95), 0.0),
    }
    return {name: ("AdamW", pytest.approx(rate), betas, decay) for name, (rate, betas, decay) in table.items()}


@pytest.mark.parametrize("b", [1.0, math.sqrt(2)])
def test_the_groups_of_today(b):
    model = build()
    adamw, muon = setup_optimizers(model, recipe="today", batch_lr_scale=b)
    found = groups_of([adamw, muon])
    matrices = {name for name, _ in model.named_parameters() if name.startswith("transformer.h.")}
    assert "transformer.h.2.attn.ve_gate.weight" in matrices
    expected = dict.fromkeys(matrices, ("Muon", pytest.approx(0.02 * b), None, 0.28))
    assert found == expected | expected_groups(b)
    assert all(group["eps"] == 1e-10 and not group["cautious"] for group in adamw.param_groups)
    (group,) = muon.param_groups
    assert {name: group[name] for name in OPTIONS} == {
        "coefficients": "polar_express",
        "cautious": True,
        "row_equilibration": True,
        "frobenius_renormalisation": True,
        "normuon": True,
        "beta2": 0.9,
        "norm_eps": 1e-6,
        "normuon_eps": 1e-10,
        "scale_decay": True,
    }
    assert (group["nesterov"], group["ns_steps"], group["initial_weight_decay"]) == (True, 5, 0.28)


def test_given_rates_and_decays_replace_those_of_the_recipe():
    given = {"unembedding_lr": 1.0, "embedding_lr": 2.0, "matrix_lr": 3.0, "scalar_lr": 4.0}
    model = build()
    optimizers = setup_optimizers(
        model, recipe="today", **given, weight_decay=0.3, matrix_weight_decay=0.7, beta2=0.5, normuon=False
    )
    found, r = groups_of(optimizers), math.sqrt(768 / 32)
    rates = {
        "lm_head.weight": r,
        "transformer.wte.weight": 2 * r,
        "value_embeds.0.weight": r,
        "resid_lambdas": 0.04,
        "x0_lambdas": 4.0,
        "smear_lambda": 0.2,
        "transformer.h.0.mlp.c_fc.weight": 3.0,
    }
    assert {name: found[name][1] for name in rates} == pytest.approx(rates)
    assert {found[name][3] for name in found if not name.startswith("transformer.h.")} == {0.3}
    (group,) = optimizers[1].param_groups
    assert (group["weight_decay"], group["initial_weight_decay"], group["beta2"]) == (0.7, 0.7, 0.5)
    assert (group["normuon"], group["row_equilibration"]) == (False, True)


def test_october_gives_its_betas_and_no_decay_to_the_parts_of_today():
    found = groups_of(setup_optimizers(build()))
    adamw = {name: entry for name, entry in found.items() if entry[0] == "AdamW"}
    assert adamw.keys() == expected_groups().keys()
    assert {entry[2:] for entry in adamw.values()} == {((0.8, 0.95), 0.0)}
    assert found["transformer.wte.weight"][1] == 2 * found["value_embeds.0.weight"][1]
    assert found["transformer.h.0.mlp.c_fc.weight"] == ("Muon", 0.02, None, 0.0)


def test_today_on_the_model_of_october_has_no_empty_group():
    adamw, _ = setup_optimizers(build("october"), recipe="today")
    assert [group["param_names"] for group in adamw.param_groups] == [["lm_head.weight"], ["transformer.wte.weight"]]


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", DEFAULT_LEARNING_RATES)
def test_every_optimizer_and_recipe_learns_on_both_architectures(name, recipe, architecture):
    model = build(architecture)
    optimizers = setup_optimizers(model, optimizer=name, recipe=recipe)
    assert set(groups_of(optimizers)) == {name for name, _ in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, optimizers, [0] * 30)
    assert losses[-1] < 0.8 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_decay_of_the_recipe_is_none_where_it_would_be_a_penalty(name):
    (optimizer,) = setup_optimizers(build(), optimizer=name, recipe="today")
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    (optimizer,) = setup_optimizers(build(), optimizer=name, recipe="today", weight_decay=0.1)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


def test_per_head_takes_the_gates_as_they_are():
    _, muon = setup_optimizers(build(), recipe="today", per_head=True)
    heads = {name: group["heads"] for group in muon.param_groups for name in group["param_names"]}
    assert heads["transformer.h.2.attn.ve_gate.weight"] == 1
    assert heads["transformer.h.2.attn.c_q.weight"] == 2
    assert all(group["initial_weight_decay"] == 0.28 for group in muon.param_groups)


def test_other_forms_of_muon_leave_the_options_of_the_recipe_out():
    _, muon = setup_optimizers(build(), recipe="today", muon_form="cropped", matrix_weight_decay=0.0)
    assert muon.param_groups[0]["cropped"]
    for option in ("norm_eps", "scale_decay", "normuon"):
        with pytest.raises(ValueError, match=f"'cropped' does not support {option}"):
            setup_optimizers(build(), muon_form="cropped", **{option: OPTIONS[option]})


def test_the_routing_line_names_the_groups():
    line = describe_routing(setup_optimizers(build(), recipe="today"))
    assert line == (
        "20 matrices 0.0M -> Muon | wte, lm_head, 2 value embeddings, resid_lambdas, x0_lambdas, smear_gate, "
        "smear_lambda, backout_lambda 0.0M -> AdamW"
    )


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="recipe must be one of october, today, got 'july'"):
        setup_optimizers(build(), recipe="july")
    with pytest.raises(ValueError, match="batch_lr_scale must be a number >= 0, got -1"):
        setup_optimizers(build(), batch_lr_scale=-1.0)
    model = build()
    model.value_embeds["0"].gain = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"value_embeds\.0\.gain, shape \(3,\), belongs to no optimizer"):
        setup_optimizers(model)
    model = build()
    model.smear_lambdas = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"smear_lambdas, shape \(3,\), belongs to no optimizer"):
        setup_optimizers(model)
    for bad, message in (
        ({"norm_eps": -1.0}, "norm_eps must be a number >= 0, got -1"),
        ({"normuon_eps": math.nan}, "normuon_eps must be a number >= 0, got nan"),
        ({"scale_decay": 1}, "scale_decay must be True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Muon([nn.Parameter(torch.zeros(2, 2))], **bad)


def test_rows_without_a_gradient_only_decay():
    """Tokens that no batch has, and the rows behind the vocabulary."""
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = setup_optimizers(model, recipe="today")
    idx = torch.arange(16).repeat(2, 1)  # tokens 0 to 15 of 50
    for _ in range(3):
        model(idx, idx).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, decay in (("transformer.wte.weight", 0.001), ("value_embeds.2.weight", 0.01)):
        factor = (1 - groups_of(optimizers)[name][1] * decay) ** 3
        after = model.get_parameter(name).detach()
        torch.testing.assert_close(after[16:], factor * before[name][16:], rtol=1e-5, atol=1e-9)
        assert not torch.allclose(after[:16], factor * before[name][:16], rtol=1e-2)
    head = model.lm_head.weight.detach()
    factor = (1 - groups_of(optimizers)["lm_head.weight"][1] * 0.01) ** 3
    torch.testing.assert_close(head[50:], factor * before["lm_head.weight"][50:], rtol=1e-5, atol=1e-9)


# --- the step of Muon ---


def matrices(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]


def gradient(shape, seed, scale=1.0):
    """Rows of very different norms, one of them 0."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(shape, generator=generator) * scale
    if shape[0] > 2:
        g[0], g[1], g[2] = 0, g[1] * 1e-4, g[2] * 1e4
    return g


def step_by_the_facts(p, g, state, lr, momentum, decay, heads=1, columns=False):
    """One step in float64, one scalar operation after another as the facts of nanochat state them."""
    state["buf"] = state.get("buf", torch.zeros_like(p)) + (1 - momentum) * (g - state.get("buf", torch.zeros_like(p)))
    whole = g + momentum * (state["buf"] - g)
    blocks = []
    for u in whole.chunk(heads, dim=int(columns)):
        r, c = u.shape
        target = u.norm() / math.sqrt(r)
        u = torch.stack([row * (target / max(row.norm().item(), 1e-6)) for row in u])
        x = u / (1.01 * u.norm() + 1e-6)
        for a, b, k in COEFFICIENTS["polar_express"]:
            if r > c:
                gram = x.T @ x
                x = a * x + x @ (b * gram + k * gram @ gram)
            else:
                gram = x @ x.T
                x = a * x + (b * gram + k * gram @ gram) @ x
        blocks.append(x * math.sqrt(min(r, c)) / max(x.norm().item(), 1e-6))
    r, c = blocks[0].shape
    x = torch.cat(blocks, dim=int(columns))
    axis = 1 if x.size(0) >= x.size(1) else 0
    mean = (x**2).mean(axis, keepdim=True)
    state["s"] = state.get("s", torch.zeros_like(mean)) + 0.1 * (mean - state.get("s", torch.zeros_like(mean)))
    w = x / state["s"].clamp(min=1e-10).sqrt()
    w = w * (x.norm() / w.norm()) if w.norm() > 0 else w
    rate = lr * math.sqrt(max(1, r / c))
    return p - rate * w - rate * decay * p * (w * p >= 0)


@pytest.mark.parametrize(
    "heads", [{}, {"heads": 2}, {"heads": 4, "head_axis": "columns"}], ids=["whole", "heads of rows", "of columns"]
)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-9], ids=["usual", "near the clamps", "below the clamps"])
def test_five_steps_by_the_facts(backend, scale, heads):
    shapes = SHAPES if not heads else [(24, 16), (16, 64), (16, 16), (16, 16)]
    parameters = matrices(shapes)
    expected, states = [p.detach().double() for p in parameters], [{} for _ in shapes]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.4, **heads, **OPTIONS)
    (group,) = optimizer.param_groups
    plain = {"heads": heads.get("heads", 1), "columns": "head_axis" in heads}
    for step, momentum in enumerate([0.85, 0.9, 0.95, 0.97, 0.9]):
        group["momentum"], group["weight_decay"] = momentum, 0.4 - 0.05 * step
        for i, p in enumerate(parameters):
            p.grad = gradient(p.shape, 100 * step + i, scale)
            expected[i] = step_by_the_facts(
                expected[i], p.grad.double(), states[i], 0.1, momentum, group["weight_decay"], **plain
            )
        optimizer.step()
    for p, wanted, state in zip(parameters, expected, states, strict=True):
        torch.testing.assert_close(p.detach().double(), wanted, rtol=2e-4, atol=2e-5)
        second = optimizer.state[p]["second_momentum"]
        assert second.dtype == torch.float32
        torch.testing.assert_close(second.double(), state["s"], rtol=1e-3, atol=1e-7)


def test_a_stack_of_matrices_is_stepped_one_by_one(backend):
    (stack,) = matrices([(3, 16, 8)])
    apart = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    for parameters in ([stack], apart):
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.4, **OPTIONS)
        for seed in range(2):
            for i, p in enumerate(parameters):
                whole = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(seed))
                p.grad = whole if p is stack else whole[i].clone()
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in apart]), rtol=0, atol=1e-6)


def one_step(gradients=None, **options):
    parameters = matrices()
    for i, p in enumerate(parameters):
        p.grad = gradient(p.shape, i) if gradients is None else gradients(p)
    Muon(parameters, **{"lr": 0.1, "weight_decay": 0.4, **OPTIONS, **options}).step()
    return torch.cat([p.detach().flatten() for p in parameters])


def test_every_option_of_today_changes_the_step(backend):
    off = {"coefficients": "quintic", "beta2": 0.9, "norm_eps": 1e-2, "normuon_eps": 1e-1}
    today = one_step()
    for option in OPTIONS:
        changed = one_step(**{option: off.get(option, False)})
        assert torch.allclose(changed, today, atol=1e-4) == (option == "beta2"), option  # beta2 cancels in a first step


def test_a_zero_gradient_decays_everything(backend):
    """w p is 0 there."""
    parameters = matrices()
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    Muon(parameters, lr=0.1, weight_decay=0.4, **OPTIONS).step()
    for p, old in zip(parameters, before, strict=True):
        rate = 0.1 * math.sqrt(max(1, p.size(0) / p.size(1)))
        torch.testing.assert_close(p.detach(), old * (1 - 0.4 * rate), rtol=1e-6, atol=0)


def test_the_scale_of_the_decay_is_that_of_a_block():
    (scaled, plain), shape = matrices([(64, 16), (64, 16)]), (64, 16)
    for p, options in ((scaled, {"scale_decay": True}), (plain, {})):
        p.data.fill_(1.0)
        p.grad = torch.zeros(shape)
        Muon([p], lr=0.1, weight_decay=0.4, heads=2, **options).step()
    assert torch.allclose(scaled, torch.tensor(1 - 0.04 * math.sqrt(2)))
    assert torch.allclose(plain, torch.tensor(0.96))


def test_settings_in_tensors_give_the_same_bits(backend):
    as_tensors = {
        name: torch.tensor(value, dtype=torch.float64) for name, value in (("lr", 0.1), ("weight_decay", 0.4))
    }
    assert torch.equal(one_step(), one_step(**as_tensors))


def test_the_copies_of_weights_are_those_of_the_new_weights(backend):
    parameters = matrices()
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.4, **OPTIONS)
    alone = one_step()
    for parameter in parameters:
        weight_copies.low_precision(parameter, torch.bfloat16)
    for i, p in enumerate(parameters):
        p.grad = gradient(p.shape, i)
    optimizer.step()
    assert torch.equal(torch.cat([p.detach().flatten() for p in parameters]), alone)
    for parameter in parameters:
        assert not weight_copies.is_stale(parameter), "the step did not write it"
        assert torch.equal(weight_copies.low_precision(parameter, torch.bfloat16), parameter.detach().bfloat16())


def test_parameters_without_a_gradient_are_left_alone(backend):
    parameters = matrices([(16, 16), (16, 16), (24, 16)])
    before = [p.detach().clone() for p in parameters]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.4, **OPTIONS)
    parameters[1].requires_grad_(False)
    parameters[2].grad = gradient((24, 16), 1)
    optimizer.step()
    assert [torch.equal(p, old) for p, old in zip(parameters, before, strict=True)] == [True, True, False]
    assert set(optimizer.state) == {parameters[2]}


# --- state ---


def test_resumed_training_has_the_same_bits(backend):
    def fresh():
        model = build()
        return model, setup_optimizers(model, recipe="today")

    model, optimizers = fresh()
    train(model, optimizers, range(3))
    saved = copy.deepcopy([model.state_dict(), *(o.state_dict() for o in optimizers)])
    expected = train(model, optimizers, range(3, 6))

    for lost in (None, "second_momentum"):
        model, optimizers = fresh()
        model.load_state_dict(saved[0])
        for optimizer, state in zip(optimizers, copy.deepcopy(saved[1:]), strict=True):
            for entry in state["state"].values():
                entry.pop(lost, None)
            optimizer.load_state_dict(state)
        assert (train(model, optimizers, range(3, 6)) == expected) == (lost is None)


def test_a_state_from_before_the_options_loads_as_october():
    parameters = matrices()
    saved = Muon(parameters, normuon=True).state_dict()
    for group in saved["param_groups"]:
        for name in ("norm_eps", "normuon_eps", "scale_decay"):
            del group[name]
    optimizer = Muon(parameters, normuon=True)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert (group["norm_eps"], group["normuon_eps"], group["scale_decay"]) == (0.0, 1e-20, False)


# --- ranks ---


def trained(group=None):
    """The weights after three steps on the same batches."""
    model = build()
    optimizers = setup_optimizers(model, recipe="today", process_group=group)
    train(model, optimizers, range(3))
    state = {name: sorted(optimizers[1].state[p]) for name, p in model.named_parameters() if p in optimizers[1].state}
    return [p.detach().clone() for p in model.parameters()], state


def trained_on_ranks():
    return trained(torch.distributed.group.WORLD)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_with_the_same_gradients_give_the_bits_of_one_process(size):
    expected, all_state = trained()
    results = run(size, trained_on_ranks)
    for found, _ in results:
        assert all(map(torch.equal, found, expected))
    owned = [name for _, state in results for name in state]
    assert sorted(owned) == sorted(all_state)
    assert all(keys == ["momentum_buffer", "second_momentum"] for _, state in results for keys in state.values())


def test_adamw_of_today_is_torchs(backend):
    """The betas and the decays of the groups reach the operator."""
    ours, theirs = build(), build()
    adamw, _ = setup_optimizers(ours, recipe="today")
    assert isinstance(adamw, AdamW)
    by_name, settings = dict(theirs.named_parameters()), ("lr", "betas", "eps", "weight_decay")
    groups = [
        {"params": [by_name[name] for name in group["param_names"]], **{key: group[key] for key in settings}}
        for group in adamw.param_groups
    ]
    reference = torch.optim.AdamW(groups)
    for seed in range(3):
        ours.zero_grad()
        ours(*batch(seed)).backward()
        for name, p in ours.named_parameters():
            by_name[name].grad = p.grad.clone()
        adamw.step()
        reference.step()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, by_name[name], rtol=1e-5, atol=1e-6)
