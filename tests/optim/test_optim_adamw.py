import pytest
import torch
import torch.nn as nn
from backends import BACKENDS, use

from nanochat_native import ops
from nanochat_native.optim import AdamW

SHAPES = [(7, 5), (3,), (), (2, 3, 4)]
SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use(request.param):
        yield request.param


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_steps_against_torch(backend):
    ours, theirs = tensors(), tensors()
    optimizer, reference = AdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(10):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = 0.05 / (step + 1)
            each.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(optimizer.state[a][key], reference.state[b][key], atol=1e-7, rtol=1e-5)
        assert optimizer.state[a]["step"].item() == 10


def test_parameters_that_joined_later_have_their_own_step(backend):
    """Bias correction counts a parameter's own steps, as in torch."""
    ours, theirs = tensors(), tensors()
    optimizer, reference = AdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        if step < 2:
            ours[0].grad = theirs[0].grad = None
        optimizer.step()
        reference.step()
    assert [optimizer.state[p]["step"].item() for p in ours] == [2, 4, 4, 4]
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_groups_have_their_own_settings(backend):
    ours, theirs = tensors(), tensors()

    def groups(parameters):
        return [{"params": parameters[:2], "lr": 0.3}, {"params": parameters[2:], "betas": (0.5, 0.6)}]

    optimizer, reference = AdamW(groups(ours), **SETTINGS), torch.optim.AdamW(groups(theirs), **SETTINGS)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_cautious_is_an_option_of_a_group(backend):
    """From zero moments the first step moves against the gradient: decay where it has the parameter's sign."""
    cautious, plain = tensors()[0], tensors()[0]
    signs = torch.where(torch.arange(35).view(7, 5) % 2 == 0, 1.0, -1.0)
    for parameter in (cautious, plain):
        parameter.grad = parameter.detach() * signs
    groups = [{"params": [cautious], "cautious": True}, {"params": [plain]}]
    before = cautious.detach().clone()
    AdamW(groups, lr=0.5, weight_decay=0.5).step()
    kept = (cautious - plain).detach()
    assert torch.allclose(kept, torch.where(signs > 0, 0.0, 0.25 * before), atol=1e-6)


def test_a_rate_in_a_tensor(backend):
    """It counts as its number does, and may be changed in place."""
    ours, theirs = tensors(), tensors()
    lr = torch.tensor(0.05, dtype=torch.float64)
    optimizer, reference = AdamW(ours, lr=lr), AdamW(theirs, lr=0.05)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        lr.fill_(0.05 / (step + 1))
        reference.param_groups[0]["lr"] = 0.05 / (step + 1)
        optimizer.step()
        reference.step()
    assert all(map(torch.equal, ours, theirs))


def test_a_state_saved_without_the_cautious_option_loads():
    parameters = tensors()
    saved = AdamW(parameters).state_dict()
    del saved["param_groups"][0]["cautious"]
    optimizer = AdamW(parameters)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["cautious"] is False


def test_one_operator_call_for_a_group(monkeypatch):
    calls = []
    adamw_ = ops.adamw_
    monkeypatch.setattr(
        ops, "adamw_", lambda params, *a, **kw: (calls.append(len(params)), adamw_(params, *a, **kw))[1]
    )
    parameters = tensors()
    give_gradients(parameters, 1)
    with use("torch"):
        AdamW(parameters).step()
    assert calls == [4]


def test_a_refused_step_counts_no_step():
    parameters = tensors()
    give_gradients(parameters, 1)
    optimizer = AdamW(parameters)
    with use("torch"):
        optimizer.step()
        optimizer.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match="lr"):
            optimizer.step()
    assert all(optimizer.state[p]["step"].item() == 1 for p in parameters)


def test_invalid_settings_of_adamw_are_refused():
    for bad, message in (
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"cautious": 1}, "cautious must be True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW(tensors(), **bad)
