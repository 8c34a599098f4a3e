"""The Muon of the original guide: its formulas, its switches, and what it refuses."""

import copy

import pytest
import torch
import torch.nn as nn
from backends import BACKENDS, use
from torch import Tensor

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import Muon, setup_optimizers
from nanochat_native.optim.original_guide import FORMS, UNSUPPORTED, OriginalGuideMuon
from nanochat_native.runs.config import NANOCHAT_FORM_ONLY, TrainConfig

SHAPES = [(6, 6), (12, 4), (12, 4), (4, 12)]
LISTING = {**FORMS["original_guide"], "coefficients": "cubic"}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use(request.param):
        yield request.param


def build() -> GPT:
    model = GPT(GPTConfig(sequence_len=16, vocab_size=50, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    model.init_weights(0)
    return model


def orthogonalised(g: Tensor) -> Tensor:
    """Return what the listing computes of one gradient, written as its text describes it."""
    rows, columns = g.shape
    side = min(rows, columns)
    x = g[:side, :side].double()
    x = x / x.norm()
    for _ in range(5):
        x = x @ (1.5 * torch.eye(side, dtype=x.dtype) - 0.5 * x.T @ x)
    return nn.functional.pad(x, (0, columns - side, 0, rows - side))


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_the_listing_computes_its_formula(backend):
    params = parameters()
    expected = [parameter.detach().double() for parameter in params]
    buffers = [torch.zeros_like(p) for p in expected]
    optimizer = OriginalGuideMuon(params, lr=0.1, momentum=0.9, **LISTING)
    for step in range(4):
        set_gradients(params, seed=step)
        for index, parameter in enumerate(params):
            buffers[index] = 0.9 * buffers[index] + orthogonalised(parameter.grad)
            expected[index] = expected[index] - 0.1 * buffers[index]
        optimizer.step()
    for parameter, right in zip(params, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), right, rtol=0, atol=2e-5)


def test_without_its_switches_it_is_muon(backend):
    ours, theirs = parameters(), parameters()
    first, second = Muon(ours, lr=0.1, weight_decay=0.1), OriginalGuideMuon(theirs, lr=0.1, weight_decay=0.1)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        first.step()
        second.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_cropping_leaves_the_rest_of_a_rectangle_as_it_was(backend):
    params = parameters()
    before = [parameter.detach().clone() for parameter in params]
    optimizer = OriginalGuideMuon(params, lr=0.1, cropped=True)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    for parameter, start in zip(params, before, strict=True):
        side = min(parameter.shape)
        moved = parameter.detach() != start
        assert moved[:side, :side].all()
        assert moved.sum() == side * side


def test_momentum_after_sums_steps_until_they_are_a_horizon_long(backend):
    (parameter,) = [nn.Parameter(torch.eye(4))]
    optimizer = OriginalGuideMuon(
        [parameter], lr=1e-3, momentum=0.9, momentum_after=True, coefficients="cubic", ns_steps=20
    )
    for _ in range(100):
        parameter.grad = torch.eye(4)
        before = parameter.detach().clone()
        optimizer.step()
    step = torch.linalg.svdvals((before - parameter.detach()).double() / 1e-3)
    assert step.min() == pytest.approx(10, rel=1e-3)
    assert step.max() == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_and_a_loaded_state_continue_alike(form):
    params = parameters()
    optimizer = OriginalGuideMuon(params, lr=0.1, **FORMS[form])
    set_gradients(params, 0)
    optimizer.step()
    others = [nn.Parameter(parameter.detach().clone()) for parameter in params]
    loaded = OriginalGuideMuon(others, lr=0.3)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, these in ((optimizer, params), (loaded, others)):
        set_gradients(these, 1)
        each.step()
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "nanochat"])
def test_a_model_learns_with_each_form(backend, form):
    model = build()
    rate = 0.02 if form == "cropped" else 0.002
    optimizers = setup_optimizers(model, muon_form=form, matrix_lr=rate)
    assert type(optimizers[1]) is OriginalGuideMuon
    assert all(name.startswith("transformer.h.") for name in optimizers[1].param_groups[0]["param_names"])
    idx = torch.arange(17).repeat(4, 1)
    losses = []
    for _ in range(20):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_what_it_does_not_support_is_refused():
    with pytest.raises(ValueError, match="muon_form must be one of nanochat, cropped, momentum_after, original_guide"):
        setup_optimizers(build(), muon_form="seed")
    for option in UNSUPPORTED:
        with pytest.raises(ValueError, match=f"muon_form 'cropped' does not support {option}"):
            setup_optimizers(build(), muon_form="cropped", **{option: True})
    with pytest.raises(ValueError, match=r"parameter 0 of its group must be a matrix .* got shape \(2, 3, 3\)"):
        OriginalGuideMuon([nn.Parameter(torch.zeros(2, 3, 3))])


def test_several_ranks_are_refused():
    with pytest.raises(ValueError, match="muon_form must be nanochat on several ranks, got 'cropped'"):
        setup_optimizers(build(), muon_form="cropped", process_group=object())


def test_the_flags_know_the_same_forms_and_options():
    assert set(TrainConfig.__annotations__["muon_form"].__args__) == set(FORMS)
    assert set(NANOCHAT_FORM_ONLY) == set(UNSUPPORTED) - {"norm_eps"}, "norm_eps has no flag"
