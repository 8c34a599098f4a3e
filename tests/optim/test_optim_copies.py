"""The optimizers write the bfloat16 copies of the weights that have one, and change no bit of the weights by it."""

import pytest
import torch
import torch.distributed as dist
from backends import BACKENDS
from ranks import run
from torch import nn

from nanochat_native import ops
from nanochat_native.ops import weight_copies
from nanochat_native.ops.weight_copies import copy_for_update, low_precision
from nanochat_native.optim import AdamW, Muon
from nanochat_native.optim.original_guide import OriginalGuideMuon

BF16 = torch.bfloat16
MATRICES = [(16, 16), (64, 16), (16, 64), (16, 16), (24, 16), (64, 16), (8, 8)]
TABLES = [(13, 8), (3, 4), (1, 5)]  # rows that two ranks do not divide, and fewer rows than ranks
OPTIMIZERS = {
    "adamw": lambda params: AdamW(params, lr=0.1, weight_decay=0.1),
    "adamw cautious": lambda params: AdamW(params, lr=torch.tensor(0.1), weight_decay=0.1, cautious=True),
    "muon": lambda params: Muon(params, lr=0.1, weight_decay=0.1),
    "muon cautious": lambda params: Muon(params, lr=0.1, weight_decay=0.1, cautious=True, row_equilibration=True),
    "heads in rows": lambda params: Muon(params, lr=0.1, heads=4),
    "heads in columns": lambda params: Muon(params, lr=0.1, heads=4, head_axis="columns"),
    "normuon": lambda params: Muon(params, lr=0.1, normuon=True, frobenius_renormalisation=True),
    "original guide": lambda params: OriginalGuideMuon(params, lr=0.1, cropped=True, momentum_after=True),
}


@pytest.fixture
def nothing_is_cast(monkeypatch):
    """A function after whose call low_precision may not write a copy."""

    def write(weight, kept):
        raise AssertionError(f"the copy of a weight of shape {tuple(weight.shape)} was cast again")

    return lambda: monkeypatch.setattr(weight_copies, "_write", write)


def parameters(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def make_copies(params):
    weight_copies.keep(params)
    return [low_precision(param, BF16) for param in params]


def assert_copies(params, copies):
    for param, kept in zip(params, copies, strict=True):
        assert low_precision(param, BF16) is kept
        assert torch.equal(kept, param.detach().to(BF16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_write_copies_and_change_no_bit(name, backend, nothing_is_cast):
    ops.use_backend(backend)
    ours, theirs = parameters(MATRICES), parameters(MATRICES)
    optimizer, other = OPTIMIZERS[name](ours), OPTIMIZERS[name](theirs)
    copies = make_copies(ours)
    nothing_is_cast()
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        other.step()
        assert all(map(torch.equal, ours, theirs))
        assert_copies(ours, copies)
    assert all(copy_for_update(param) is None for param in theirs)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stacks_of_matrices_and_weights_without_a_copy(name, nothing_is_cast):
    shapes = [(3, 8, 16), (3, 8, 16), (16, 8), (16, 8)]
    ours, theirs = parameters(shapes), parameters(shapes)
    optimizer, other = OPTIMIZERS[name](ours), OPTIMIZERS[name](theirs)
    with_copy = [ours[0], ours[3]]
    copies = make_copies(with_copy)
    nothing_is_cast()
    for step in range(2):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        other.step()
    assert all(map(torch.equal, ours, theirs))
    assert_copies(with_copy, copies)
    assert all(copy_for_update(param) is None for param in (ours[1], ours[2]))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_that_are_not_contiguous_are_cast_at_the_next_use(name):
    ours = [nn.Parameter(torch.randn(16, 8).t()), nn.Parameter(torch.randn(8, 16))]
    optimizer, copies = OPTIMIZERS[name](ours), make_copies(ours)
    set_gradients(ours, 0)
    optimizer.step()
    assert not torch.equal(copies[0], ours[0].detach().to(BF16))
    assert torch.equal(copies[1], ours[1].detach().to(BF16))
    assert_copies(ours, copies)


def test_an_update_that_writes_no_copies_is_seen():
    class Descent(AdamW):
        def update(self, pieces, group):
            for piece in pieces:
                piece.values.sub_(piece.gradient)

    ours = parameters(TABLES)
    copies = make_copies(ours)
    set_gradients(ours, 0)
    Descent(ours).step()
    assert_copies(ours, copies)


class Product(torch.autograd.Function):
    """x weight^T in bfloat16. The gradient of the weight is in its own type."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ low_precision(weight, x.dtype).t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ low_precision(weight, dy.dtype), (dy.t() @ x).to(weight.dtype)


def plain_product(x, weight):
    return x @ weight.to(x.dtype).t()


def losses(product):
    """Losses and weights of a small network: five steps of two micro-batches each."""
    first, second = parameters([(32, 16), (16, 32)], seed=3)
    optimizers = [Muon([first], lr=0.1), AdamW([second], lr=0.01)]
    generator = torch.Generator().manual_seed(4)
    found = []
    for _ in range(5):
        for _ in range(2):
            x = torch.randn(8, 16, generator=generator).to(BF16)
            loss = (product(product(x, first).relu(), second) - x).float().square().mean()
            loss.backward()
            found.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return found, first.detach(), second.detach()


def test_training_with_copies_gives_the_bits_of_training_with_casts(monkeypatch):
    casts, write = [], weight_copies._write
    monkeypatch.setattr(weight_copies, "_write", lambda *arguments: casts.append(arguments) or write(*arguments))
    expected = losses(plain_product)
    assert not casts
    found = losses(Product.apply)
    assert len(casts) == 2  # one for each weight, in the first micro-batch
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1:], expected[1:]))


# --- on several ranks ---


def sharded(options, with_copies, muon_options):
    """Parameters after three steps, and copies of which low_precision writes none."""
    sharding = {"process_group": dist.group.WORLD, "bucket_bytes": 5000} | options
    matrices, tables = parameters(MATRICES), parameters(TABLES, seed=1)
    params = [*matrices, *tables]
    early = make_copies(params[::2]) if with_copies else []  # of tensors that then move into buckets
    optimizers = [
        Muon(matrices, lr=0.1, weight_decay=0.1, **muon_options, **sharding),
        AdamW(tables, lr=0.1, weight_decay=0.1, **sharding),
    ]
    copies = make_copies(params) if with_copies else []
    for step in range(3):
        set_gradients(params, 10 * step + dist.get_rank())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if with_copies:
            for param, kept in zip(params, copies, strict=True):
                version = kept._version
                assert low_precision(param, BF16) is kept
                assert kept._version == version, "cast again"
                assert torch.equal(kept, param.detach().to(BF16))
            assert all(kept is own for kept, own in zip(copies[::2], early, strict=True))
        else:
            assert all(copy_for_update(param) is None for param in params)
    return [param.detach().clone() for param in params]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"gather_dtype": BF16}, {"reduce_dtype": BF16, "gather_dtype": torch.float16}])
def test_gathered_weights_have_copies(options, size):
    muon = {"normuon": True} if size == 3 else {}
    with_copies, without = (run(size, sharded, options, each, muon) for each in (True, False))
    for mine, other in zip(with_copies, without, strict=True):
        assert all(map(torch.equal, mine, other))
        assert all(map(torch.equal, mine, with_copies[0]))


def backward_after_a_step():
    (weight,) = parameters([(4, 4)])
    optimizer = Muon([weight], process_group=dist.group.WORLD)
    x = torch.randn(2, 4, requires_grad=True)
    loss = (x @ weight).sum()
    set_gradients([weight], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_sees_the_gathered_values():
    run(2, backward_after_a_step)
