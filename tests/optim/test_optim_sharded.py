"""Sharded Muon and AdamW: every number of ranks gives the parameters that one process without ranks gives."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from ranks import run

from nanochat_native.optim import AdamW, Muon, clip_reduced_, overlap_backward
from nanochat_native.optim.buckets import assign, split

MATRICES = [(16, 16), (64, 16), (16, 64), (16, 16), (24, 16), (64, 16), (8, 8)] * 3  # several buckets on 1 and 2 ranks
TABLES = [(13, 8), (3, 4), (1, 5)]  # rows that 2, 3 and 4 ranks do not divide, and fewer rows than ranks
WORLDS = [1, 2, 3, 4]


def parameters(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def build(sharded, muon_options=None, **sharding):
    """(matrices, tables, optimizers)."""
    matrices, tables = parameters(MATRICES), parameters(TABLES, seed=1)
    sharding = {"process_group": dist.group.WORLD, "bucket_bytes": 5000} | sharding if sharded else {}
    muon = Muon(matrices, lr=0.1, weight_decay=0.1, **(muon_options or {}), **sharding)
    return matrices, tables, [muon, AdamW(tables, lr=0.1, weight_decay=0.1, **sharding)]


def steps(sharded, count, gradient_of, max_norm=None, **options):
    """Parameters after steps on gradient_of(step, shapes, seed)."""
    matrices, tables, optimizers = build(sharded, **options)
    norms = []
    for step in range(count):
        for shapes, group in ((MATRICES, matrices), (TABLES, tables)):
            for parameter, gradient in zip(group, gradient_of(step, shapes), strict=True):
                parameter.grad = gradient
        if max_norm is not None:
            norms.append(clip_reduced_(optimizers, max_norm).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in (*matrices, *tables)], norms


def same_gradients(step, shapes):
    return gradients(shapes, 10 * step + len(shapes))


def own_gradients(step, shapes):
    return gradients(shapes, 1000 * dist.get_rank() + 10 * step + len(shapes))


def mean_gradients(size):
    def of(step, shapes):
        each = [gradients(shapes, 1000 * rank + 10 * step + len(shapes)) for rank in range(size)]
        return [torch.stack(one).double().mean(dim=0).float() for one in zip(*each, strict=True)]

    return of


OPTIONS = [{}, {"normuon": True, "frobenius_renormalisation": True}, {"heads": 2, "row_equilibration": True}]


def with_same_gradients(options):
    return steps(True, 3, same_gradients, muon_options=options)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", WORLDS)
def test_identical_gradients_give_the_bits_of_one_process(size, options):
    expected, _ = steps(False, 3, same_gradients, muon_options=options)
    for found in run(size, with_same_gradients, options):
        assert all(map(torch.equal, found, expected))


def with_own_gradients(max_norm):
    return steps(True, 3, own_gradients, max_norm)


@pytest.mark.parametrize("max_norm", [float("inf"), 1.0])
@pytest.mark.parametrize("size", WORLDS)
def test_distinct_gradients_are_averaged_and_clipped_as_one(size, max_norm):
    expected, norms = steps(False, 3, mean_gradients(size), max_norm)
    results = run(size, with_own_gradients, max_norm)
    for found, found_norms in results:
        assert found_norms == pytest.approx(norms, rel=1e-6)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert all(map(torch.equal, found, results[0][0]))


def in_bfloat16(gather):
    found, _ = steps(
        True, 3, own_gradients, reduce_dtype=torch.bfloat16, gather_dtype=torch.bfloat16 if gather else None
    )
    return found


@pytest.mark.parametrize("gather", [False, True])
def test_bfloat16_communication(gather):
    expected, _ = steps(False, 3, mean_gradients(2))
    first, second = run(2, in_bfloat16, gather)
    assert all(map(torch.equal, first, second))
    for found, exact in zip(first, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=2**-7 if gather else 0, atol=0.05)
        assert torch.equal(found, found.bfloat16().float()) == gather


class Net(nn.Module):
    def __init__(self, depth=5):
        super().__init__()
        self.weights = nn.ParameterList(parameters([(8, 8)] * depth))

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x.square().mean()


def after_backward(overlap):
    net = Net(depth=40)
    optimizer = Muon(net.named_parameters(), lr=0.1, process_group=dist.group.WORLD, bucket_bytes=0)
    started = []
    for bucket in optimizer.buckets:
        real = bucket.start_reduction
        bucket.start_reduction = lambda real=real, names=bucket.names: (started.append(names[0]), real())
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(2):
        for last in (False, True):
            loss = net(torch.randn(4, 8, generator=generator))
            started.clear()
            if overlap and last:
                with overlap_backward(optimizer.buckets, net.parameters()):
                    loss.backward()
                early = list(started)
            else:
                loss.backward()
                early = []
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in net.parameters()], early, [bucket.names[0] for bucket in optimizer.buckets]


@pytest.mark.parametrize("size", [2, 3])
def test_reductions_overlap_with_the_backward_pass(size):
    """After the last micro-batch's gradients alone, in the order in which they come; the results are the same."""
    plain, overlapped = run(size, after_backward, False), run(size, after_backward, True)
    for (a, _, _), (b, early, names) in zip(plain, overlapped, strict=True):
        assert all(map(torch.equal, a, b))
        assert len(names) > 2
        assert names[0] == "weights.39"
        assert early == names


def cleared_by_others():
    """The weights after steps whose gradients were cleared in several ways, and a discarded backward pass."""
    found = []
    for clear in ("optimizer", "model", "model, to zero", "discarded"):
        net = Net()
        optimizer = Muon(net.named_parameters(), lr=0.1, process_group=dist.group.WORLD)
        generator = torch.Generator().manual_seed(dist.get_rank())
        if clear == "discarded":
            with overlap_backward(optimizer.buckets, net.parameters()):
                (100 * net(torch.ones(4, 8))).backward()
            optimizer.zero_grad()
        for _ in range(3):
            net(torch.randn(4, 8, generator=generator)).backward()
            optimizer.step()
            if clear.startswith("model"):
                net.zero_grad(set_to_none=clear == "model")
            else:
                optimizer.zero_grad()
        found.append([p.detach().clone() for p in net.parameters()])
    return found


def test_gradients_may_be_cleared_in_any_way():
    results = run(2, cleared_by_others)
    for ways in results:
        for weights in ways:
            assert all(map(torch.equal, weights, results[0][0]))


def refusals():
    group = dist.group.WORLD
    frozen = parameters([(4, 4)])[0].requires_grad_(False)
    messages = []
    net = Net()
    optimizer = Muon(net.named_parameters(), process_group=group)
    torch.stack([net.weights[i].square().mean() for i in (0, 1, 2, 4)]).sum().backward()
    for attempt in (lambda: Muon([("a.weight", frozen)], process_group=group), optimizer.step):
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_frozen_and_unused_parameters_are_named():
    for frozen, unused in run(2, refusals):
        assert frozen.startswith("a.weight is frozen")
        assert unused.startswith("no gradient came for weights.3")


def state_of_shards():
    _, _, optimizers = build(True)
    for optimizer in optimizers:
        optimizer.step()
    sizes = [
        sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.ndim)
        for optimizer in optimizers
    ]
    buckets = [bucket for optimizer in optimizers for bucket in optimizer.buckets]
    return sizes, sum(bucket.traffic_bytes() for bucket in buckets), sum(bucket.shard for bucket in buckets)


@pytest.mark.parametrize("size", [2, 4])
def test_state_exists_once_and_traffic_is_as_computed(size):
    results = run(size, state_of_shards)
    muon, adamw = (sum(sizes[i] for sizes, *_ in results) for i in range(2))
    assert muon == sum(rows * columns for rows, columns in MATRICES)
    assert adamw == 2 * sum(rows * columns for rows, columns in TABLES)
    assert len({traffic for _, traffic, _ in results}) == 1
    # Of n ranks each sends (n - 1) / n of what it has, once on the way to the owners and once back; tables are padded.
    exact = sum(rows * columns for rows, columns in MATRICES)
    exact += sum(-(-rows // size) * size * columns for rows, columns in TABLES)
    traffic = results[0][1]
    assert traffic >= 2 * 4 * exact * (size - 1) // size
    assert traffic == 2 * 4 * (size - 1) * results[0][2]


@pytest.mark.parametrize("ranks", [2, 8, 16])
@pytest.mark.parametrize("depth", [12, 20, 32])
def test_owners_are_balanced(depth, ranks):
    """nanochat's matrices: work and memory are nearly even over the ranks, of every bucket."""
    width = 64 * depth
    shapes = ([(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]) * depth
    named = [(str(i), torch.empty(shape, device="meta")) for i, shape in enumerate(shapes)]
    runs = [[matrix for _, matrix in one] for one in split(named, ranks)]
    layouts = assign(runs, ranks)
    work = [0] * ranks
    for matrices, (owners, offsets, shard) in zip(runs, layouts, strict=True):
        for matrix, owner in zip(matrices, owners, strict=True):
            work[owner] += min(matrix.shape) ** 2 * max(matrix.shape)
        spans = sorted((offset, offset + m.numel()) for offset, m in zip(offsets, matrices, strict=True))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert all(offset // shard == owner for offset, owner in zip(offsets, owners, strict=True))
    assert max(work) <= 1.15 * sum(work) / ranks
    assert ranks * sum(layout.shard for layout in layouts) <= 1.15 * sum(matrix.numel() for _, matrix in named)
