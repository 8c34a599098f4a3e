"""Muon and AdamW as torch optimizers: all that users do with one. What is right is either what torch's own optimizer
gives, or what ours gives when it is left alone."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch_reference
from backends import BACKENDS, use
from ranks import run
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from nanochat_native.optim import AdamW, Muon, clip_reduced_

KINDS = [AdamW, Muon]
SHAPES = [(4, 6), (6, 4), (4, 6), (3, 5)]
SETTINGS = {"lr": 0.1, "weight_decay": 0.1}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use(request.param):
        yield request.param


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(shapes=SHAPES):
    return [nn.Parameter(random(shape, seed)) for seed, shape in enumerate(shapes)]


def all_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer, steps=3, seed=0):
    """Steps on gradients that are functions of the step and the parameter's place."""
    for step in range(steps):
        for index, parameter in enumerate(all_of(optimizer)):
            parameter.grad = random(parameter.shape, 1000 + 100 * seed + 10 * step + index).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def assert_same(one, other):
    """Parameters, settings and state, to the bit."""
    assert len(one.param_groups) == len(other.param_groups)
    for a, b in zip(one.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
    for p, q in zip(all_of(one), all_of(other), strict=True):
        assert torch.equal(p, q)
        assert one.state.get(p, {}).keys() == other.state.get(q, {}).keys()
        for key, value in one.state.get(p, {}).items():
            assert value.dtype == other.state[q][key].dtype
            assert torch.equal(value, other.state[q][key])


def assert_apart(one, other):
    """No tensor of one is a tensor of the other."""
    places = [
        {t.data_ptr() for p in all_of(o) for t in (p, *o.state.get(p, {}).values()) if t.numel()} for o in (one, other)
    ]
    assert places[0].isdisjoint(places[1])


# --- copies ---


def by_torch_save(optimizer):
    memory = io.BytesIO()
    torch.save(optimizer, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


def another(optimizer):
    """Of copies of the parameters, with the same defaults and no state."""
    groups = [{"params": copy.deepcopy(group["params"])} for group in optimizer.param_groups]
    return type(optimizer)(groups, **optimizer.defaults)


def by_state_dict(optimizer):
    copied = another(optimizer)
    copied.load_state_dict(optimizer.state_dict())
    return copied


def by_saved_state_dict(optimizer):
    memory, copied = io.BytesIO(), another(optimizer)
    torch.save(optimizer.state_dict(), memory)
    memory.seek(0)
    copied.load_state_dict(torch.load(memory, weights_only=True))
    return copied


def by_setstate(optimizer):
    copied = type(optimizer).__new__(type(optimizer))
    copied.__setstate__(copy.deepcopy(optimizer.__getstate__()))
    return copied


COPIES = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a deepcopy": lambda optimizer: copy.deepcopy(copy.deepcopy(optimizer)),
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "pickle, oldest protocol": lambda optimizer: pickle.loads(pickle.dumps(optimizer, protocol=2)),
    "torch.save": by_torch_save,
    "state_dict": by_state_dict,
    "saved state_dict": by_saved_state_dict,
    "__setstate__": by_setstate,
}
OPTIONS = [
    (AdamW, {}),
    (AdamW, {"cautious": True, "betas": (0.8, 0.95)}),
    (Muon, {}),
    (Muon, {"normuon": True, "nesterov": False, "coefficients": "cubic"}),
]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("way", COPIES)
def test_copies_continue_like_the_original(way, kind, options, steps):
    groups = [{"params": parameters(SHAPES[:2]), "lr": 0.3}, {"params": parameters(SHAPES[2:])}]
    optimizer = train(kind(groups, **SETTINGS, **options), steps)
    copied = COPIES[way](optimizer)
    assert type(copied) is kind
    assert_same(optimizer, copied)
    assert_apart(optimizer, copied)
    before = copy.deepcopy(copied)
    train(optimizer)
    assert_same(before, copied)  # the original's steps are not the copy's
    assert_same(optimizer, train(copied))
    assert all(p.grad is None for p in all_of(copied))
    for each in (optimizer, copied):
        each.add_param_group({"params": parameters([(5, 5)]), "lr": 0.05})
    assert_same(train(optimizer, seed=1), train(copied, seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_its_optimizer_are_copied_together(kind):
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))
    optimizer = train(kind(model.named_parameters(), **SETTINGS))
    for copied, copies in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        assert [id(p) for p in copied.parameters()] == [id(p) for p in all_of(copies)]
        assert copies.param_groups[0]["param_names"] == ["0.weight", "1.weight"]
        train(copies, seed=1)
        assert not torch.equal(copied[0].weight, model[0].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shallow_copy_shares_parameters_and_state(kind):
    optimizer = train(kind(parameters(), **SETTINGS))
    copied = copy.copy(optimizer)
    assert copied.state is optimizer.state
    assert copied.param_groups is optimizer.param_groups


def test_a_pickle_holds_each_momentum_once():
    """Those of one shape lie in one memory, which pickle would write for every one of them."""
    matrices = parameters([(32, 32)] * 20)
    optimizer = train(Muon(matrices, **SETTINGS))
    size = sum(p.nbytes for p in matrices) + sum(optimizer.state[p]["momentum_buffer"].nbytes for p in matrices)
    assert len(pickle.dumps(optimizer)) < 1.5 * size


def copies_of_a_sharded_one(kind):
    optimizer = kind([("a.weight", nn.Parameter(torch.ones(4, 4)))], process_group=dist.group.WORLD)
    messages = []
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        try:
            way(optimizer)
        except TypeError as error:
            messages.append(str(error))
    train(optimizer)
    return messages


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_optimizer_is_not_copied(kind):
    (messages,) = run(1, copies_of_a_sharded_one, kind)
    assert len(messages) == 3
    assert all(message.startswith(f"a sharded {kind.__name__} cannot be copied or pickled") for message in messages)


def sharded_and_loaded(kind, gather_dtype):
    """Parameters and master values of a sharded optimizer that goes on, and of another that loaded its state."""
    sharding = {"process_group": dist.group.WORLD, "gather_dtype": gather_dtype}
    first = train(kind(parameters(), **SETTINGS, **sharding))
    second = kind(parameters(), **SETTINGS, **sharding)
    with torch.no_grad():
        for p, q in zip(all_of(first), all_of(second), strict=True):
            q.copy_(p)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found = []
    for optimizer in (first, second):
        train(optimizer, seed=1)
        masters = [state["master"].clone() for state in optimizer.state.values() if "master" in state]
        found.append([p.detach().clone() for p in all_of(optimizer)] + masters)
    return found


@pytest.mark.parametrize("gather_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_a_sharded_optimizer_is_loaded(kind, gather_dtype):
    for first, second in run(2, sharded_and_loaded, kind, gather_dtype):
        assert len(first) == len(second) >= len(SHAPES) + (gather_dtype is not None)
        assert all(map(torch.equal, first, second))


# --- parameters and gradients of any strides ---


def transposed(x):
    return x.mT.contiguous().mT


def every_second_column(x):
    wide = torch.full((*x.shape[:-1], 2 * x.size(-1)), 7.0)
    wide[..., ::2] = x
    return wide[..., ::2]


def a_part_of_larger_rows(x):
    wide = torch.full((*x.shape[:-1], x.size(-1) + 3), 7.0)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def first_dimension_last(x):
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = [
    (transposed, (4, 6)),
    (every_second_column, (4, 6)),
    (a_part_of_larger_rows, (6, 4)),
    (first_dimension_last, (3, 4, 6)),
    (transposed, (2, 4, 4)),
]
ONLY_ADAMW = [
    (channels_last, (8, 3, 3, 3)),
    (lambda x: x.contiguous(memory_format=torch.channels_last_3d), (4, 3, 2, 2, 2)),
    (every_second_column, (7,)),
]
CASES = [(kind, *layout) for kind in KINDS for layout in LAYOUTS] + [(AdamW, *layout) for layout in ONLY_ADAMW]


@pytest.mark.parametrize(("kind", "layout", "shape"), CASES)
@pytest.mark.parametrize("which", ["parameter", "gradient", "both"])
def test_any_strides_give_the_bits_of_contiguous_tensors(which, kind, layout, shape, backend):
    ours, theirs = (parameters([shape, shape, (4, 4)]) for _ in range(2))
    if which != "gradient":
        ours[0] = nn.Parameter(layout(ours[0].detach()))
    assert ours[0].is_contiguous() == (which == "gradient")
    optimizer, reference = kind(ours, **SETTINGS), kind(theirs, **SETTINGS)
    before = ours[0].untyped_storage().data_ptr()
    for step in range(3):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = random(a.shape, 100 * step + index)
            a.grad = layout(gradient) if which != "parameter" and index == 0 else gradient
            assert index or a.grad.is_contiguous() == (which == "parameter")
            kept = a.grad.clone()
            b.grad = gradient.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(a.grad, kept)
    assert_same(optimizer, reference)
    assert ours[0].untyped_storage().data_ptr() == before
    if layout in (every_second_column, a_part_of_larger_rows) and which != "gradient":
        memory = torch.empty(0).set_(ours[0].untyped_storage())
        assert (memory == 7.0).sum() == memory.numel() - ours[0].numel()  # what lies between stays


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS + ONLY_ADAMW)
def test_any_strides_against_torch(layout, shape, backend):
    ours, theirs = (nn.Parameter(layout(random(shape, 0))) for _ in range(2))
    optimizer, reference = AdamW([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)
    train(optimizer)
    train(reference)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # Its state goes on in ours, although it has the parameter's strides.
    assert (
        layout in (every_second_column, a_part_of_larger_rows) or not reference.state[theirs]["exp_avg"].is_contiguous()
    )
    again = AdamW([ours], **SETTINGS)
    again.load_state_dict(reference.state_dict())
    with torch.no_grad():
        ours.copy_(theirs)
    torch.testing.assert_close(*(all_of(train(o, seed=1))[0] for o in (again, reference)), rtol=1e-5, atol=1e-6)


def test_a_model_may_become_channels_last_between_steps(backend):
    ours, theirs = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer, reference = AdamW(ours.parameters(), **SETTINGS), torch.optim.AdamW(theirs.parameters(), **SETTINGS)
    for step in range(4):
        if step == 2:
            ours.to(memory_format=torch.channels_last)
            theirs.to(memory_format=torch.channels_last)
            assert not ours[0].weight.is_contiguous()
        x = random((2, 3, 5, 5), step)
        for model, each in ((ours, optimizer), (theirs, reference)):
            model(x).square().mean().backward()
            each.step()
            each.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_matrix_and_its_transpose_in_one_memory_both_count():
    """torch updates one after the other."""
    ours, theirs = random((4, 4), 0), random((4, 4), 0)
    for base, kind, options in ((ours, AdamW, {}), (theirs, torch.optim.AdamW, {"foreach": False})):
        train(kind([nn.Parameter(base), nn.Parameter(base.mT), nn.Parameter(base.mT)], **SETTINGS, **options))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expanded_parameter_is_refused(kind):
    """torch refuses it in the step, when its state has changed."""
    expanded = random((1, 4), 0).expand(3, 4)
    with pytest.raises(ValueError, match=r"a\.weight, shape \(3, 4\), is expanded: strides \(0, 1\)"):
        kind([("a.weight", nn.Parameter(expanded))])
    first, later = parameters([(3, 4), (3, 4)])
    optimizer = kind([first, later])
    first.grad = later.grad = torch.ones(3, 4)
    later.data = expanded
    before = first.detach().clone()
    with pytest.raises(ValueError, match="parameter 1 of its group"):
        optimizer.step()
    assert torch.equal(first, before)
    assert not optimizer.state
    train(kind([nn.Parameter(random((1, 4), 0).expand(1, 4)), nn.Parameter(torch.ones(1, 1).expand(1, 1))]))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1)])
def test_small_parameters_against_torch(shape, backend):
    ours, theirs = (nn.Parameter(random(shape, 0)) for _ in range(2))
    reference = train(torch.optim.AdamW([theirs], **SETTINGS))
    optimizer = train(AdamW([ours], **SETTINGS))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[ours][key], reference.state[theirs][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 3, 4), (3, 4, 0)])
def test_empty_matrices_are_stepped_over(shape, backend):
    empty, other = parameters([shape, (4, 4)])
    (alone,) = parameters([shape, (4, 4)])[1:]
    train(Muon([other, empty], **SETTINGS))
    train(Muon([alone], **SETTINGS))
    assert torch.equal(other, alone)


SMALL = [(), (3,), (0, 4), (4, 0), (1, 1), (5, 2)]


def sharded_small():
    optimizer = AdamW(parameters(SMALL), **SETTINGS, process_group=dist.group.WORLD)
    return [p.detach().clone() for p in all_of(train(optimizer))]


@pytest.mark.parametrize("size", [1, 3])
def test_small_parameters_are_sharded(size):
    expected = all_of(train(AdamW(parameters(SMALL), **SETTINGS)))
    for found in run(size, sharded_small):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_a_scalar_parameter_survives_saving(dtype):
    """Only the number of steps is a scalar that keeps its own type and place."""
    parameter = nn.Parameter(torch.tensor(0.3, dtype=dtype))
    optimizer = train(AdamW([parameter], **SETTINGS))
    copied = by_state_dict(optimizer)
    (other,) = all_of(copied)
    assert copied.state[other]["exp_avg"].dtype == torch.float32
    assert not torch.equal(copied.state[other]["exp_avg"], copied.state[other]["exp_avg"].bfloat16().float())
    assert_same(train(optimizer), train(copied))


@pytest.mark.parametrize("shape", [(5,), (), (8, 4, 3, 3), (2, 2, 2, 2, 2)])
def test_parameter_that_is_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match=r"conv\.weight must be a matrix.*got shape \(.*\); use AdamW"):
        Muon([("conv.weight", nn.Parameter(torch.zeros(shape)))])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_types_are_refused_by_name(kind, dtype):
    with pytest.raises(
        TypeError, match=rf"a\.weight must be torch.float32 or torch.bfloat16 for {kind.__name__}, got {dtype}"
    ):
        kind([("a.weight", nn.Parameter(torch.zeros(4, 4, dtype=dtype)))])


def with_a_dtensor(kind):
    mesh = init_device_mesh("cpu", (1,))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=rf"a\.weight must be a whole tensor, got a DTensor; {kind.__name__} shards"):
        kind([("a.weight", parameter)])


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_torch_has_sharded_are_refused(kind):
    run(1, with_a_dtensor, kind)


# --- gradients ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_gradient_changes_nothing(kind):
    """Although the sparse one is of the last group."""
    first, last = parameters([(4, 4), (4, 4)])
    optimizer = kind([{"params": [("a", first)]}, {"params": [("b", last)]}], **SETTINGS)
    train(optimizer)
    before = copy.deepcopy(optimizer)
    first.grad, last.grad = torch.ones(4, 4), torch.eye(4).to_sparse()
    with pytest.raises(ValueError, match="the gradient of b is sparse"):
        optimizer.step()
    assert_same(before, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_for_a_while(kind):
    """As a model that is thawed layer by layer: what has no gradient keeps its values, its state and its steps."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))
    copied = copy.deepcopy(model)
    optimizer = kind(model.parameters(), **SETTINGS)
    reference = [kind([p], **SETTINGS) for p in copied.parameters()]
    for step in range(6):
        frozen = step in (0, 3, 4)
        for each in (model, copied):
            each[0].weight.requires_grad_(not frozen)
            each(random((2, 4), step)).square().mean().backward()
        optimizer.step()
        for own in reference[frozen:]:
            own.step()
        optimizer.zero_grad()
        copied.zero_grad()
    assert all(map(torch.equal, model.parameters(), copied.parameters()))


def frozen_later():
    net = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)])
    messages = []
    for kind in KINDS:
        optimizer = kind(net.named_parameters(), process_group=dist.group.WORLD)
        net[0].weight.requires_grad_(False)
        net[1](torch.ones(2, 4)).sum().backward()
        try:
            optimizer.step()
        except ValueError as error:
            messages.append(str(error))
        net[0].weight.requires_grad_(True)
    return messages


def test_a_sharded_parameter_that_is_frozen_later_is_named():
    (messages,) = run(1, frozen_later)
    assert len(messages) == 2
    assert all(message.startswith("no gradient came for 0.weight:") for message in messages)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_grad(kind, set_to_none):
    first, second = parameters([(4, 4), (4, 4)])
    optimizer = kind([first, second], **SETTINGS)
    first.grad = gradient = torch.ones(4, 4)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert second.grad is None
    if set_to_none:
        assert first.grad is None
    else:
        assert first.grad is gradient
        assert not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_reaches_gradients_of_any_strides(kind):
    """The optimizer's contiguous copies are made after it."""
    parameter = nn.Parameter(random((4, 6), 0))
    optimizer = kind([parameter], **SETTINGS)
    parameter.grad = transposed(random((4, 6), 1))
    norm = clip_reduced_([optimizer], 0.5)
    assert norm > 1
    assert parameter.grad.norm().item() == pytest.approx(0.5, rel=1e-5)


# --- settings in tensors ---


TENSOR_SETTINGS = {
    AdamW: {"lr": 0.125, "weight_decay": 0.25},
    Muon: {"lr": 0.125, "weight_decay": 0.25, "momentum": 0.75},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_settings_in_tensors(kind, shape, dtype, backend):
    """Numbers that all types hold exactly: the bits are those of plain numbers."""
    numbers = TENSOR_SETTINGS[kind]
    tensors = {name: torch.full(shape, value, dtype=dtype) for name, value in numbers.items()}
    ours, theirs = kind(parameters(), **tensors), kind(parameters(), **numbers)
    train(ours)
    train(theirs)
    tensors["lr"].fill_(0.5)  # as a scheduler does
    theirs.param_groups[0]["lr"] = 0.5
    train(ours, seed=1)
    train(theirs, seed=1)
    assert all(map(torch.equal, all_of(ours), all_of(theirs)))
    assert ours.param_groups[0]["lr"] is tensors["lr"]


def test_betas_in_tensors():
    betas = (torch.tensor(0.75), torch.tensor([[0.875]], dtype=torch.float64))
    ours, theirs = AdamW(parameters(), betas=betas), AdamW(parameters(), betas=(0.75, 0.875))
    assert all(map(torch.equal, all_of(train(ours)), all_of(train(theirs))))


@pytest.mark.parametrize(
    ("kind", "bad", "error", "message"),
    [
        *((kind, {"lr": torch.ones(2)}, ValueError, r"lr must be .* got a tensor of shape \(2,\)") for kind in KINDS),
        *((kind, {"lr": torch.tensor(-1.0)}, ValueError, "lr must be a number >= 0, got -1.0") for kind in KINDS),
        *((kind, {"lr": "0.1"}, TypeError, "lr must be a number >= 0, got '0.1'") for kind in KINDS),
        *((kind, {"lr": None}, TypeError, "lr must be a number >= 0, got None") for kind in KINDS),
        *((kind, {"weight_decay": -1}, ValueError, "weight_decay must be a number >= 0, got -1.0") for kind in KINDS),
        (AdamW, {"betas": (1.0, 0.5)}, ValueError, r"betas\[0\] must be a number >= 0 and < 1, got 1.0"),
        (AdamW, {"betas": (0.5, -0.1)}, ValueError, r"betas\[1\] must be a number >= 0 and < 1, got -0.1"),
        (AdamW, {"betas": 0.9}, ValueError, "betas must be two numbers >= 0 and < 1, got 0.9"),
        (AdamW, {"betas": (0.9, 0.9, 0.9)}, ValueError, r"betas must be two numbers .* got \(0.9, 0.9, 0.9\)"),
        (AdamW, {"eps": float("nan")}, ValueError, "eps must be a number >= 0, got nan"),
        (Muon, {"momentum": torch.tensor(1.0)}, ValueError, "momentum must be a number >= 0 and < 1, got 1.0"),
    ],
)
@pytest.mark.parametrize("place", ["defaults", "group", "later group"])
def test_invalid_settings_are_refused(kind, bad, error, message, place):
    first, second = parameters([(4, 4), (4, 4)])
    optimizer = kind([first])
    ways = {
        "defaults": lambda: kind([first], **bad),
        "group": lambda: kind([{"params": [first]}, {"params": [second], **bad}]),
        "later group": lambda: optimizer.add_param_group({"params": [second], **bad}),
    }
    with pytest.raises(error, match=message):
        ways[place]()


# --- groups ---


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_added_later_is_stepped_as_by_an_optimizer_of_its_own(kind, steps):
    old, new = parameters([(4, 6), (4, 6)])
    apart = [kind([nn.Parameter(p.detach().clone())], **SETTINGS) for p in (old, new)]
    apart[1].param_groups[0]["lr"] = 0.3
    optimizer = kind([old], **SETTINGS)
    for _ in range(steps):
        for each in (optimizer, apart[0]):
            all_of(each)[0].grad = random((4, 6), 5)
            each.step()
    optimizer.add_param_group({"params": new, "lr": 0.3})
    assert optimizer.param_groups[1] == {**optimizer.param_groups[0], "params": [new], "lr": 0.3}
    for step in range(3):
        for index in range(2):
            all_of(optimizer)[index].grad = random((4, 6), 10 * step + index)
            all_of(apart[index])[0].grad = random((4, 6), 10 * step + index)
            apart[index].step()
        optimizer.step()
    for p, own in zip(all_of(optimizer), apart, strict=True):
        assert torch.equal(p, all_of(own)[0])


@pytest.mark.parametrize(
    ("kind", "group", "error"),
    [
        *((kind, {"params": [nn.Parameter(torch.ones(2, 2))], "lr": -1.0}, ValueError) for kind in KINDS),
        *((kind, {"params": [nn.Parameter(torch.ones(2, 2).double())]}, TypeError) for kind in KINDS),
        *((kind, {"params": [nn.Parameter(torch.ones(2, 2))], "maximize": True}, ValueError) for kind in KINDS),
        *((kind, {"params": {nn.Parameter(torch.ones(2, 2))}}, TypeError) for kind in KINDS),
        *((kind, {"params": [torch.ones(2, 2, requires_grad=True) * 2]}, ValueError) for kind in KINDS),
        *((kind, {"params": [3]}, TypeError) for kind in KINDS),
        (Muon, {"params": [nn.Parameter(torch.ones(3))]}, ValueError),
        (Muon, {"params": [nn.Parameter(torch.ones(3, 3))], "heads": 2}, ValueError),
    ],
)
def test_a_refused_group_leaves_the_optimizer_as_it_was(kind, group, error):
    optimizer = train(kind(parameters(), **SETTINGS))
    before = copy.deepcopy(optimizer)
    with pytest.raises(error):
        optimizer.add_param_group(group)
    assert_same(before, optimizer)
    assert_same(train(before), train(optimizer))


def group_added(kind, sharded):
    """Parameters after steps with one group, and with a second; and what a frozen third is told."""
    first, second, frozen = (parameters(SHAPES[:2]), parameters(SHAPES[2:]), nn.Parameter(torch.ones(2, 2), False))
    sharding = {"process_group": dist.group.WORLD, "gather_dtype": torch.float32} if sharded else {}
    optimizer = train(kind(first, **SETTINGS, **sharding))
    optimizer.add_param_group({"params": second, "lr": 0.3})
    if sharded:
        with pytest.raises(ValueError, match="parameter 0 of its group is frozen"):
            optimizer.add_param_group({"params": [frozen]})
        assert {key for p in optimizer.state for key in optimizer.state[p]} >= {"master"} or dist.get_rank() > 0
    assert len(optimizer.param_groups) == 2
    train(optimizer, seed=1)
    return [p.detach().clone() for p in all_of(optimizer)]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_is_added_to_a_sharded_optimizer(kind, size):
    expected = group_added(kind, False)
    for found in run(size, group_added, kind, True):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_parameters(kind):
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))
    forms = {
        "list": lambda m: list(m.parameters()),
        "tuple": lambda m: tuple(m.parameters()),
        "generator": lambda m: (p for p in m.parameters()),
        "named": lambda m: m.named_parameters(),
        "groups": lambda m: [{"params": layer.parameters()} for layer in m],
        "groups, one tensor each": lambda m: [{"params": layer.weight} for layer in m],
        "named groups": lambda m: [{"params": [pair]} for pair in m.named_parameters()],
    }
    results = []
    for name, form in forms.items():
        own = copy.deepcopy(model)
        optimizer = train(kind(form(own), **SETTINGS))
        names = [n for group in optimizer.param_groups for n in group.get("param_names", [])]
        assert names == (["0.weight", "1.weight"] if "named" in name else [])
        results.append([p.detach() for p in own.parameters()])
    assert all(torch.equal(a, b) for found in results for a, b in zip(found, results[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_invalid_parameter_lists_are_refused(kind):
    parameter = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        kind(parameter)
    with pytest.warns(UserWarning, match="duplicate parameters"), pytest.raises(ValueError, match="b is in its group"):
        kind([("a", parameter), ("b", parameter)])
    with pytest.raises(ValueError, match="more than one parameter group"):
        kind([{"params": [parameter]}, {"params": [parameter]}])
    optimizer = kind([{"params": []}, {"params": [parameter]}], **SETTINGS)
    assert_same(optimizer, copy.deepcopy(optimizer))
    train(optimizer)


# --- state ---


def test_state_of_torchs_adamw_loads(backend):
    theirs, ours = parameters(), parameters()
    reference = train(torch.optim.AdamW(theirs, **SETTINGS))
    optimizer = AdamW(ours)
    optimizer.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    assert optimizer.param_groups[0]["lr"] == 0.1
    train(optimizer, seed=1)
    train(reference, seed=1)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"].item() == reference.state[q]["step"].item() == 6


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        *((kind, option) for kind in KINDS for option in ("amsgrad", "capturable", "differentiable", "maximize")),
        (Muon, "ns_coefficients"),
        (Muon, "adjust_lr_fn"),
    ],
)
def test_options_that_only_torch_has(kind, option):
    """Named, wherever they come from, and never left out in silence: they change the update."""
    with pytest.raises(TypeError, match=option):
        kind(parameters(), **{option: True})
    message = f"{kind.__name__} does not support {option}, got {option}=True"
    with pytest.raises(ValueError, match=message):
        kind([{"params": parameters(), option: True}])
    optimizer = train(kind(parameters(), **SETTINGS))
    before, saved = copy.deepcopy(optimizer), copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= {option: True, "lr": 7.0}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(before, optimizer)
    for p in all_of(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0][option] = True
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(map(torch.equal, all_of(before), all_of(optimizer)))


@pytest.mark.parametrize("option", ["foreach", "fused", "differentiable", "amsgrad"])
@pytest.mark.parametrize("kind", KINDS)
def test_options_of_torch_that_change_nothing(kind, option):
    """In a group all of them; as an argument, those that say how torch steps."""
    value = option in ("foreach", "fused")
    ours, theirs = kind([{"params": parameters(), option: value}], **SETTINGS), kind(parameters(), **SETTINGS)
    assert all(map(torch.equal, all_of(train(ours)), all_of(train(theirs))))
    if value:
        ours = kind(parameters(), **SETTINGS, **{option: value})
        assert all(map(torch.equal, all_of(train(ours)), all_of(theirs)))
        assert option not in ours.param_groups[0]
    else:
        with pytest.raises(TypeError, match=option):
            kind(parameters(), **{option: value})


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_other_shapes_is_refused_before_anything_is_loaded(kind):
    """Groups in another order: torch would notice in the next step."""

    def build(order):
        shapes = {"wide": (4, 6), "tall": (6, 4)}
        groups = [{"params": [(name, nn.Parameter(random(shapes[name], 0)))]} for name in order]
        return train(kind(groups, **SETTINGS))

    optimizer, other = build(["wide", "tall"]), build(["tall", "wide"])
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=r"of tall must have shape \(6, 4\), got \(4, 6\)"):
        other.load_state_dict(optimizer.state_dict())
    assert_same(before, other)
    for bad in ([], [{"params": []}], [{"params": [0]}, {"params": [1, 2]}]):
        with pytest.raises(ValueError, match="parameter group"):
            other.load_state_dict({"state": {}, "param_groups": bad})
    assert_same(before, other)

    def by_name(_, saved):
        """The mend that torch's documentation describes."""
        order = [group["param_names"] for group in other.param_groups]
        groups = sorted(saved["param_groups"], key=lambda group: order.index(group["param_names"]))
        return {"state": saved["state"], "param_groups": groups}

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    assert [group["param_names"] for group in other.param_groups] == [["tall"], ["wide"]]
    for p, q in zip(all_of(optimizer), reversed(all_of(other)), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][key])


@pytest.mark.parametrize(
    ("kind", "key", "value", "error", "message"),
    [
        (
            AdamW,
            "step",
            ...,
            ValueError,
            "the state of parameter 1 of its group must have all of step, .* or none, missing step",
        ),
        (AdamW, "exp_avg", ..., ValueError, "missing exp_avg$"),
        (AdamW, "exp_avg_sq", [1.0], TypeError, "exp_avg_sq of parameter 1 of its group must be a tensor, got list"),
        (Muon, "momentum_buffer", None, TypeError, "momentum_buffer of .* must be a tensor, got NoneType"),
    ],
)
def test_broken_state_is_refused_before_anything_is_loaded(kind, key, value, error, message):
    """A state without its number of steps would begin anew, in silence. Muon's None is what torch's SGD keeps without
    momentum."""
    optimizer, other = (train(kind(parameters(), **SETTINGS), seed=seed) for seed in range(2))
    before, saved = copy.deepcopy(other), copy.deepcopy(optimizer.state_dict())
    if value is ...:
        del saved["state"][1][key]
    else:
        saved["state"][1][key] = value
    with pytest.raises(error, match=message):
        other.load_state_dict(saved)
    assert_same(before, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_that_was_saved_in_another_type_is_float32(kind, dtype):
    optimizer, other = train(kind(parameters(), **SETTINGS)), kind(parameters(), **SETTINGS)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state |= {key: state[key].to(dtype) for key in kind.elementwise}
    other.load_state_dict(saved)
    for index, p in enumerate(all_of(other)):
        for key in kind.elementwise:
            assert other.state[p][key].dtype == torch.float32
            assert torch.equal(other.state[p][key], saved["state"][index][key].float())
    train(other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_of_another_type_is_refused_when_nothing_has_changed(kind, dtype):
    """Although it is of the last group; and bfloat16 goes on, with state in float32."""
    first, last = parameters([(4, 4), (4, 4)])
    optimizer = train(kind([{"params": [("a", first)]}, {"params": [("b", last)]}], **SETTINGS))
    last.data = last.data.to(dtype)
    for p in (first, last):
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match=f"b must be torch.float32 or torch.bfloat16 for {kind.__name__}, got {dtype}"):
        optimizer.step()
    assert_same(before, optimizer)
    last.grad = None
    last.data = last.data.bfloat16()
    train(optimizer)
    assert optimizer.state[last][kind.elementwise[0]].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_state_dict_and_load_state_dict(kind):
    """What they return is what is saved and loaded; and those that come after loading see what was loaded."""
    seen = []
    key = {AdamW: "exp_avg", Muon: "momentum_buffer"}[kind]
    optimizer = train(kind(parameters(), **SETTINGS))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("pre", o)))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": 7})
    saved = optimizer.state_dict()
    assert seen == [("pre", optimizer)]
    assert saved["extra"] == 7

    other = kind(parameters(), **SETTINGS)

    def double(o, loaded):
        seen.append(loaded["extra"])
        return {**loaded, "state": {i: {**s, key: 2 * s[key]} for i, s in loaded["state"].items()}}

    def halve_first(o):
        first = all_of(o)[0]
        assert torch.equal(o.state[first][key], 2 * optimizer.state[all_of(optimizer)[0]][key])
        o.state[first][key] = o.state[first][key] / 2

    handles = [other.register_load_state_dict_pre_hook(double), other.register_load_state_dict_post_hook(halve_first)]
    other.load_state_dict(saved)
    assert seen[1:] == [7]
    for index, (p, q) in enumerate(zip(all_of(optimizer), all_of(other), strict=True)):
        assert torch.equal(other.state[q][key], optimizer.state[p][key] * (2 if index else 1))
    for handle in handles:
        handle.remove()
    other.load_state_dict(saved)
    assert torch.equal(other.state[all_of(other)[0]][key], optimizer.state[all_of(optimizer)[0]][key])
    assert not other._optimizer_load_state_dict_pre_hooks
    assert not other._optimizer_load_state_dict_post_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_users_entries_in_the_state_are_kept(kind):
    optimizer = train(kind(parameters(), **SETTINGS))
    first = all_of(optimizer)[0]
    optimizer.state[first] |= {
        "note": "mine",
        "count": torch.tensor(2**40),
        "many": [1, 2],
        "wide": torch.ones(7).double(),
    }
    optimizer.state["run"] = 3
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), by_state_dict(optimizer)):
        own = copied.state[all_of(copied)[0]]
        assert (own["note"], own["many"], own["count"].item(), copied.state["run"]) == ("mine", [1, 2], 2**40, 3)
        assert own["wide"].dtype == torch.float64
        train(copied)


@pytest.mark.parametrize("kind", KINDS)
def test_distributed_checkpoints_state_dict(kind):
    """torch's own way to state by parameter names: it steps once with gradients of 0 and a rate of 0, which may change
    nothing but the state."""

    def build(lr):
        model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))
        return model, kind(model.parameters(), lr=lr, weight_decay=0.1)

    for lr in (0.1, torch.tensor(0.1)):
        model, optimizer = build(lr)
        before = copy.deepcopy(model.state_dict())
        get_optimizer_state_dict(model, optimizer)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        train(optimizer)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        assert list(saved["state"]) == ["0.weight", "1.weight"]
        copied, other = build(lr)
        copied.load_state_dict(model.state_dict())
        set_optimizer_state_dict(copied, other, saved)
        assert_same(train(optimizer), train(other))


def test_where_restored_state_lies():
    """On the parameter's device, which meta stands for; the number of steps stays on the CPU."""
    parameter = nn.Parameter(torch.empty((), device="meta"))
    optimizer = AdamW([parameter])
    optimizer.restore(parameter, {"step": torch.tensor(3), "exp_avg": torch.tensor(0.5), "mine": torch.ones(7)})
    kept = optimizer.state[parameter]
    assert {key: (value.device.type, value.shape) for key, value in kept.items()} == {
        "step": ("cpu", ()),
        "exp_avg": ("meta", ()),
        "mine": ("meta", (7,)),
    }


@pytest.mark.parametrize("way", ["restore", "load_state_dict"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_values_of_a_sharded_run_load_on_one_rank(kind, way):
    (parameter,) = parameters([(4, 4)])
    optimizer = kind([parameter])
    exact = random((4, 4), 7)
    if way == "restore":
        optimizer.restore(parameter, {"master": exact})
    else:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"master": exact}}})
    assert torch.equal(parameter, exact)
    assert "master" not in optimizer.state[parameter]  # it would be saved, and be old by then


# --- schedulers, averages, scalers, compilers ---


def chained(o):
    return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)])


def sequential(o):
    warmup, rest = lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)
    return lr_scheduler.SequentialLR(o, [warmup, rest], milestones=[3])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.3, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_tried():
    missing = set(lr_scheduler.__all__) - set(SCHEDULERS) - {"LRScheduler"}  # the base of them all
    assert not missing, f"torch has schedulers that no test tries: {', '.join(sorted(missing))}"


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
def test_schedulers_set_what_they_set_in_torchs_optimizers(kind, name, lr):
    """Two groups; the rate of one was set by hand before the scheduler came."""
    theirs = {
        AdamW: lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0),
        Muon: lambda p, lr: torch.optim.SGD(p, lr, momentum=0.95),
    }[kind]
    built = []
    for build in (kind, theirs):
        groups = [{"params": parameters(SHAPES[:2])}, {"params": parameters(SHAPES[2:]), "lr": copy.deepcopy(lr) / 2}]
        optimizer = build(groups, lr=copy.deepcopy(lr))
        optimizer.param_groups[0]["lr"] = copy.deepcopy(lr) * 2
        built.append((optimizer, SCHEDULERS[name](optimizer)))
    rates = []
    for step in range(7):
        for optimizer, scheduler in built:
            train(optimizer, 1, seed=step)
            scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
        ours, reference = (
            [float(g["lr"]) for g in o.param_groups]
            + [float(g["momentum"] if "momentum" in g else g["betas"][0]) for g in o.param_groups]
            for o, _ in built
        )
        assert ours == pytest.approx(reference)
        rates += ours[:1]
    assert len(set(rates)) > 1, "the test would not see a scheduler that does nothing"
    if kind is AdamW:
        for p, q in zip(*(all_of(o) for o, _ in built), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_schedulers_resume(kind):
    def build(last_epoch=-1):
        optimizer = kind(parameters(), **SETTINGS)
        return optimizer, lr_scheduler.StepLR(optimizer, 2, last_epoch=last_epoch)

    optimizer, scheduler = build()
    for step in range(3):
        train(optimizer, 1, seed=step)
        scheduler.step()
    other, again = build()
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(scheduler.state_dict())
    with torch.no_grad():
        for p, q in zip(all_of(optimizer), all_of(other), strict=True):
            q.copy_(p)
    for step in range(3):
        for o, s in ((optimizer, scheduler), (other, again)):
            train(o, 1, seed=10 + step)
            s.step()
    assert_same(optimizer, other)
    with pytest.raises(KeyError, match="initial_lr"):  # torch's own rule: there is nothing to resume
        build(last_epoch=3)


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}], ids=["swa", "ema"])
@pytest.mark.parametrize("kind", KINDS)
def test_averages_of_weights(kind, average):
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))
    optimizer, averaged = kind(model.parameters(), **SETTINGS), swa_utils.AveragedModel(model, **average)
    history = []
    for step in range(3):
        train(optimizer, 1, seed=step)
        averaged.update_parameters(model)
        history.append(model[0].weight.detach().clone())
    expected = (
        torch.stack(history).mean(0) if not average else 0.9 * (0.9 * history[0] + 0.1 * history[1]) + 0.1 * history[2]
    )
    torch.testing.assert_close(averaged.module[0].weight.detach(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_grad_scaler(kind):
    """Of float16 on the CPU: gradients are scaled back before the step, and a step of infinite ones is left out."""
    ours, theirs = kind(parameters(), **SETTINGS), kind(parameters(), **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    for step in range(3):
        for index, (p, q) in enumerate(zip(all_of(ours), all_of(theirs), strict=True)):
            p.grad = q.grad = random(p.shape, 10 * step + index)
            p.grad = p.grad * (torch.inf if step == 1 else scaler.get_scale())
        scaler.step(ours)
        scaler.update()
        if step != 1:
            theirs.step()
    assert scaler.get_scale() == 2.0**9
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_is_not_compiled_again(kind):
    ours, theirs = kind(parameters(), **SETTINGS), kind(parameters(), **SETTINGS)
    torch.compiler.reset()  # of what other tests compiled
    compiled = torch.compile(lambda: ours.step(), backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(12):  # more than dynamo compiles anew before it gives up
            for index, (p, q) in enumerate(zip(all_of(ours), all_of(theirs), strict=True)):
                p.grad = q.grad = random(p.shape, 10 * step + index)
            compiled()
            theirs.step()
    assert_same(ours, theirs)


# --- the rest of the protocol ---


@pytest.mark.parametrize("kind", KINDS)
def test_step_hooks_and_the_profiler(kind):
    optimizer = kind(parameters(), **SETTINGS)
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after")),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("before all")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("after all")),
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, 1)
    assert seen == ["before all", "before", "after", "after all"]
    events = {event.name for event in profile.events()}
    assert {f"Optimizer.step#{kind.__name__}.step", f"Optimizer.zero_grad#{kind.__name__}.zero_grad"} <= events
    for handle in handles:
        handle.remove()
    train(copy.deepcopy(optimizer), 1)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_words_and_signature(kind):
    optimizer = kind(parameters(), lr=torch.tensor(0.25))
    assert repr(optimizer).startswith(f"{kind.__name__} (\nParameter Group 0\n")
    assert "lr: 0.25" in repr(optimizer)
    assert repr(copy.deepcopy(optimizer)).startswith(f"{kind.__name__} (")
    assert list(inspect.signature(kind.step).parameters) == ["self", "closure"]
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_closures(kind):
    model = nn.Linear(4, 3, bias=False)
    copied = copy.deepcopy(model)
    optimizer, other = kind(model.parameters(), **SETTINGS), kind(copied.parameters(), **SETTINGS)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():  # the closure has gradients even so
        losses = [optimizer.step(closure).item() for _ in range(3)]
    for loss in losses:
        found = copied(torch.ones(2, 4)).square().mean()
        assert found.item() == loss
        other.zero_grad()
        found.backward()
        assert other.step() is None
    assert torch.equal(model.weight, copied.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_keep_what_they_add_and_are_copied(kind):
    class Mine(kind):
        def __init__(self, params, **settings):
            super().__init__(params, **settings)
            self.calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

        def __getstate__(self):
            return {**super().__getstate__(), "calls": self.calls}

    optimizer = train(Mine(parameters(), **SETTINGS))
    assert copy.copy(optimizer).calls == 3
    copied = copy.deepcopy(optimizer)
    assert copied.calls == 3
    assert_same(train(optimizer), train(copied))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 6), (6, 3)]
        )

    def forward(self, x):
        return (torch.tanh(x @ self.weights[0]) @ self.weights[1]).square().mean()


def plainly(kind, batches, max_norm=1.0):
    """The weights after the loop that accelerate and Lightning take over."""
    net = Net()
    optimizer = kind(net.parameters(), **SETTINGS)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    for batch in batches:
        net(batch).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return list(net.parameters())


BATCHES = [random((2, 4), seed) for seed in range(6)]


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate(kind, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # that of the test before
    accelerator, net = accelerate.Accelerator(cpu=True), Net()
    optimizer = kind(net.parameters(), **SETTINGS)
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, lr_scheduler.StepLR(optimizer, 1, gamma=0.9))
    for index, batch in enumerate(BATCHES):
        if index == 3:
            accelerator.save_state(str(tmp_path))
            optimizer.state.clear()
            accelerator.load_state(str(tmp_path))
            assert_same(optimizer.optimizer, pickle.loads(pickle.dumps(optimizer)).optimizer)
        accelerator.backward(net(batch))
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, net.parameters(), plainly(kind, BATCHES)))


@pytest.mark.parametrize("kind", KINDS)
def test_lightning_fabric(kind, tmp_path):
    lightning_fabric = pytest.importorskip("lightning_fabric")
    fabric, net = lightning_fabric.Fabric(accelerator="cpu", devices=1), Net()
    fabric.launch()
    optimizer = kind(net.parameters(), **SETTINGS)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    net, optimizer = fabric.setup(net, optimizer)
    for index, batch in enumerate(BATCHES):
        if index == 3:
            fabric.save(tmp_path / "state", {"net": net, "optimizer": optimizer})
            optimizer.state.clear()
            fabric.load(tmp_path / "state", {"net": net, "optimizer": optimizer})
        fabric.backward(net(batch))
        fabric.clip_gradients(net, optimizer, max_norm=1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, net.parameters(), plainly(kind, BATCHES)))


@pytest.mark.parametrize("kind", KINDS)
def test_lightnings_trainer(kind, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            return self.net(batch)

        def configure_optimizers(self):
            optimizer = kind(self.net.parameters(), **SETTINGS)
            scheduler = {"scheduler": lr_scheduler.StepLR(optimizer, 1, gamma=0.9), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def fit(epochs, checkpoint=None):
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            gradient_clip_val=1.0,
        )
        module = Module()
        data = torch.utils.data.DataLoader(torch.cat(BATCHES[:3]), batch_size=2)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return list(module.net.parameters())

    fit(1)
    found = fit(2, tmp_path / "last.ckpt")
    for p, q in zip(found, plainly(kind, BATCHES[:3] * 2), strict=True):
        torch.testing.assert_close(p, q)


def test_the_plain_form_of_muon_on_a_transposed_matrix():
    """Against the formula, not against ourselves."""
    ours, theirs = (nn.Parameter(transposed(random((4, 6), 0))) for _ in range(2))
    optimizer, buffer = Muon([ours], lr=0.1), torch.zeros(4, 6)
    for step in range(3):
        ours.grad = theirs.grad = random((4, 6), 10 + step)
        optimizer.step()
        torch_reference.muon_step([theirs], [buffer], 0.1, 0.95)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
