import pytest
import torch
import torch.nn as nn
import torch_reference
from backends import BACKENDS, use

from nanochat_native import ops
from nanochat_native.optim import Muon

SHAPES = [(16, 16), (64, 16), (16, 64), (16, 16), (64, 16), (24, 16)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use(request.param):
        yield request.param


def matrices(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_five_steps_against_the_plain_form(backend):
    """Same-shaped matrices lie apart in the list: stacking must give each its own update."""
    ours, theirs = matrices(), matrices()
    optimizer = Muon(ours, lr=0.1)
    buffers = [torch.zeros_like(p) for p in theirs]
    for step, momentum in enumerate([0.85, 0.9, 0.95, 0.95, 0.5]):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.param_groups[0]["momentum"] = momentum
        optimizer.step()
        torch_reference.muon_step(theirs, buffers, 0.1, momentum)
        for a, b, buffer in zip(ours, theirs, buffers, strict=True):
            assert torch.allclose(a, b, atol=2e-5, rtol=0)
            assert torch.allclose(optimizer.state[a]["momentum_buffer"], buffer, atol=1e-6, rtol=0)


def test_the_update_is_nearly_orthogonal_and_scaled_for_tall_matrices(backend):
    for shape, scale in (((32, 32), 1.0), ((64, 16), 2.0), ((16, 64), 1.0)):
        (parameter,) = matrices([shape])
        before = parameter.detach().clone()
        give_gradients([parameter], 1)
        Muon([parameter], lr=0.01).step()
        singular = torch.linalg.svdvals((before - parameter.detach()) / (0.01 * scale))
        assert singular.min() > 0.3
        assert singular.max() < 1.3


def test_the_scale_of_the_gradient_does_not_matter(backend):
    small, large = matrices(), matrices()
    for parameters, factor in ((small, 1e-12), (large, 1e12)):
        give_gradients(parameters, 1)
        for parameter in parameters:
            parameter.grad *= factor
        Muon(parameters, lr=0.1).step()
    assert all(torch.allclose(a, b, atol=1e-5, rtol=0) for a, b in zip(small, large, strict=True))


def test_weight_decay_nesterov_and_coefficients(backend):
    def update(**settings):
        (parameter,) = matrices([(16, 16)])
        optimizer = Muon([parameter], lr=0.1, momentum=0.9, **settings)
        for seed in (1, 2):
            give_gradients([parameter], seed)
            before = parameter.detach().clone()
            optimizer.step()
        return before, parameter.detach(), optimizer.state[parameter]["momentum_buffer"]

    before, after, buffer = update(nesterov=False)
    assert torch.allclose(after, before - 0.1 * torch_reference.newton_schulz(buffer), atol=1e-5, rtol=0)
    _, with_nesterov, _ = update()
    assert not torch.allclose(after, with_nesterov, atol=1e-3)

    before, after, buffer = update(nesterov=False, weight_decay=0.5)
    assert torch.allclose(
        after, before * (1 - 0.1 * 0.5) - 0.1 * torch_reference.newton_schulz(buffer), atol=1e-5, rtol=0
    )

    before, after, buffer = update(nesterov=False, coefficients="cubic", ns_steps=9)
    expected = ops.newton_schulz(buffer, steps=9, coefficients="cubic")
    assert torch.allclose(after, before - 0.1 * expected, atol=1e-5, rtol=0)


def test_batched_matrices_are_stepped_one_by_one(backend):
    (stacked,) = matrices([(3, 16, 8)])
    apart = [nn.Parameter(m.clone()) for m in stacked.detach()]
    give_gradients([stacked], 1)
    for parameter, gradient in zip(apart, stacked.grad, strict=True):
        parameter.grad = gradient.clone()
    Muon([stacked], lr=0.1).step()
    Muon(apart, lr=0.1).step()
    assert torch.allclose(stacked, torch.stack(list(apart)), atol=1e-6, rtol=0)


def test_one_operator_call_for_each_shape(monkeypatch):
    calls = []
    update = ops.newton_schulz_update_

    def spy(params, g, **options):
        calls.append(tuple(g.shape))
        update(params, g, **options)

    monkeypatch.setattr(ops, "newton_schulz_update_", spy)
    parameters = matrices()
    give_gradients(parameters, 1)
    with use("torch"):
        Muon(parameters).step()
    assert sorted(calls) == [(1, 16, 64), (1, 24, 16), (2, 16, 16), (2, 64, 16)]


@pytest.mark.parametrize("options", [{}, {"frobenius_renormalisation": True}, {"normuon": True, "norm_eps": 1e-6}])
@pytest.mark.parametrize("allowed", [False, True])
def test_ns_bfloat16_reaches_newton_schulz(options, allowed, monkeypatch):
    found = []

    def spy_on(call):
        def spy(*args, **options):
            found.append(options["allow_bfloat16"])
            return call(*args, **options)

        return spy

    for name in ("newton_schulz", "newton_schulz_update_"):
        monkeypatch.setattr(ops, name, spy_on(getattr(ops, name)))
    parameters = matrices()
    give_gradients(parameters, 1)
    Muon(parameters, ns_bfloat16=allowed, **options).step()
    assert found == [allowed] * len(found)
    assert found


def test_norms_go_along_with_matrices_only(monkeypatch, backend):
    """Those of a parameter that holds several matrices are not its matrices'."""
    norms = []
    update_ = ops.newton_schulz_update_

    def spy(params, g, **options):
        norms.append((g, options["norms"]))
        update_(params, g, **options)

    monkeypatch.setattr(ops, "newton_schulz_update_", spy)
    parameters = matrices([(16, 8), (16, 8), (3, 16, 8)])
    give_gradients(parameters, 1)
    Muon(parameters).step()
    (update, known), (_, none) = norms
    assert torch.allclose(known, torch.linalg.matrix_norm(update.double()), rtol=1e-12)
    assert none is None


def test_cautious_decays_where_the_update_agrees(backend):
    (parameter,) = matrices([(16, 16)])
    before = parameter.detach().clone()
    give_gradients([parameter], 1)
    Muon([parameter], lr=0.1, momentum=0.0, weight_decay=5.0, cautious=True).step()
    update = torch_reference.newton_schulz(parameter.grad)
    expected = before * torch.where(update * before >= 0, 0.5, 1.0) - 0.1 * update
    assert torch.allclose(parameter, expected, atol=1e-5, rtol=0)


OPTIONS = [
    {"row_equilibration": True},
    {"frobenius_renormalisation": True},
    {"normuon": True},
    {"normuon": True, "beta2": 0.5},
    {"heads": 4},
    {"heads": 2, "head_axis": "columns"},
    {"heads": 2, "frobenius_renormalisation": True, "row_equilibration": True, "normuon": True},
    {"heads": 8, "head_axis": "columns", "frobenius_renormalisation": True, "row_equilibration": True, "normuon": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_against_the_plain_form(options, backend):
    """Five steps: NorMuon has state."""
    ours, theirs = matrices(), matrices()
    optimizer = Muon(ours, lr=0.1, **options)
    buffers = [torch.zeros_like(p) for p in theirs]
    seconds = [[torch.zeros(()) for _ in range(max(p.shape))] for p in theirs]
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        torch_reference.muon_step(theirs, buffers, 0.1, 0.95, seconds, **options)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=2e-5, rtol=0)
    for parameter, second in zip(ours, seconds, strict=True):
        found = optimizer.state[parameter].get("second_momentum")
        assert (found is not None) == bool(options.get("normuon"))
        if found is not None:
            assert found.dtype == torch.float32
            assert torch.allclose(found.flatten(), torch.stack(second), rtol=1e-4)


def test_options_change_something():
    results = []
    for options in ({}, *OPTIONS):
        parameters = matrices()
        give_gradients(parameters, 1)
        Muon(parameters, lr=0.1, **options).step()
        results.append(torch.cat([p.detach().flatten() for p in parameters]))
    for i, a in enumerate(results):
        for j, b in enumerate(results[:i]):
            same = {i, j} == {3, 4}  # the first step of NorMuon does not depend on beta2
            assert torch.allclose(a, b, atol=1e-5) == same


def test_frobenius_renormalisation_gives_the_norm_of_an_orthogonal_matrix(backend):
    for shape, norm in (((32, 16), 4.0 * 2**0.5), ((16, 32), 4.0)):
        (parameter,) = matrices([shape])
        before = parameter.detach().clone()
        give_gradients([parameter], 1)
        Muon([parameter], lr=0.01, frobenius_renormalisation=True).step()
        assert ((before - parameter.detach()).norm() / 0.01).item() == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_leave_zero_gradients_alone(options, backend):
    parameters = matrices()
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    Muon(parameters, lr=0.1, **options).step()
    assert all(map(torch.equal, parameters, before))


def test_row_equilibration_does_not_see_the_scale_of_a_row(backend):
    ours, theirs = matrices([(8, 16)]), matrices([(8, 16)])
    give_gradients(ours, 1)
    theirs[0].grad = ours[0].grad * torch.logspace(-3, 3, 8)[:, None]
    for parameters in (ours, theirs):
        Muon(parameters, lr=0.1, row_equilibration=True).step()
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)


def test_momentum_of_one_shape_lies_in_one_memory():
    parameters = matrices()
    give_gradients(parameters, 1)
    optimizer = Muon(parameters)
    optimizer.step()
    buffers = [optimizer.state[p]["momentum_buffer"] for p in parameters if p.shape == (16, 16)]
    assert len(buffers) == 2
    assert buffers[1].data_ptr() - buffers[0].data_ptr() == buffers[0].nbytes


def test_state_of_options_survives_saving(backend):
    ours, theirs = matrices(), matrices()
    first = Muon(ours, lr=0.1, normuon=True)
    for step in range(2):
        give_gradients(ours, step)
        first.step()
    second = Muon(theirs, lr=0.1, normuon=True)
    second.load_state_dict(first.state_dict())
    for a, b in zip(theirs, ours, strict=True):
        a.data.copy_(b.data)
    for parameters, optimizer in ((ours, first), (theirs, second)):
        give_gradients(parameters, 7)
        optimizer.step()
    assert all(map(torch.equal, ours, theirs))


def test_a_state_from_before_the_options_loads():
    saved = Muon(matrices()).state_dict()
    for group in saved["param_groups"]:
        for name in ("normuon", "heads", "head_axis", "row_equilibration", "beta2", "frobenius_renormalisation"):
            del group[name]
    parameters = matrices()
    optimizer = Muon(parameters)
    optimizer.load_state_dict(saved)
    give_gradients(parameters, 1)
    optimizer.step()


def test_settings_in_tensors(backend):
    ours, theirs = matrices(), matrices()
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
    for parameters, kind in ((ours, torch.tensor), (theirs, lambda value, dtype: value)):
        give_gradients(parameters, 1)
        Muon(parameters, **{name: kind(value, dtype=torch.float64) for name, value in settings.items()}).step()
    assert all(map(torch.equal, ours, theirs))


def test_bfloat16_parameters(backend):
    parameters = matrices(dtype=torch.bfloat16)
    reference = [nn.Parameter(p.detach().float()) for p in parameters]
    give_gradients(parameters, 1)
    for theirs, ours in zip(reference, parameters, strict=True):
        theirs.grad = ours.grad.float()
    optimizer = Muon(parameters, lr=0.1)
    optimizer.step()
    Muon(reference, lr=0.1).step()
    for ours, theirs in zip(parameters, reference, strict=True):
        assert optimizer.state[ours]["momentum_buffer"].dtype == torch.float32
        assert torch.allclose(ours.float(), theirs, rtol=2**-8, atol=1e-5)


def test_zero_gradients_change_nothing(backend):
    (parameter,) = matrices([(8, 8)])
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(8, 8)
    Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter, before)


def test_invalid_settings_of_muon_are_refused():
    with pytest.raises(ValueError, match=r"wte\.gain must be a matrix.*got shape \(5,\); use AdamW"):
        Muon([("wte.gain", nn.Parameter(torch.ones(5)))])
    for bad, message in (
        ({"momentum": 1.0}, "momentum must be a number >= 0 and < 1, got 1.0"),
        ({"ns_steps": 0}, "ns_steps must be a number >= 1, got 0"),
        ({"cautious": None}, "cautious must be True or False, got None"),
        ({"normuon": 1}, "normuon must be True or False, got 1"),
        ({"beta2": 1.0}, "beta2 must be a number >= 0 and < 1, got 1.0"),
        ({"heads": 3}, r"heads must divide the 16 rows of parameter 0 of its group, shape \(16, 16\), got 3"),
        ({"heads": 0}, "heads must divide .* got 0"),
        ({"head_axis": "row"}, "head_axis must be 'rows' or 'columns', got 'row'"),
    ):
        with pytest.raises(ValueError, match=message):
            Muon(matrices(), **bad)
