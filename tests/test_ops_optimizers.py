"""adamw_, muon_momentum_, muon_update_: against torch.optim.AdamW, the twins and the formulas; rounding; refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_native import ops
from nanochat_native.ops import reference

BACKENDS = ["native", "torch"]
SETTINGS = {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}
SHAPES = [(1,), (7,), (3, 5), (16, 16), (1001,), (2, 3, 4), (0,), (70_001,)]


def state(shapes=SHAPES, dtype=torch.float32, moments=torch.float32):
    """params, grads, exp_avgs, exp_avg_sqs."""
    params, grads, firsts = ([torch.randn(shape).to(kind) for shape in shapes] for kind in (dtype, dtype, moments))
    return params, grads, firsts, [torch.rand(shape).to(moments) for shape in shapes]


def clone(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def unaligned(tensors):
    """The same values one element behind an aligned address."""
    result = []
    for tensor in tensors:
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        room[1:] = tensor.reshape(-1)
        result.append(room[1:].view(tensor.shape))
    return result


def assert_lists_equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, mine, other))


# --- adamw_ ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_adamw_matches_torch(backend):
    ops.use_backend(backend)
    params, _, exp_avgs, exp_avg_sqs = state()
    for tensor in (*exp_avgs, *exp_avg_sqs):
        tensor.zero_()
    theirs = [param.clone().requires_grad_() for param in params]
    optimizer = torch.optim.AdamW(theirs, lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for step in range(1, 8):
        grads = [torch.randn(shape) for shape in SHAPES]
        ops.adamw_(params, grads, exp_avgs, exp_avg_sqs, step=step, **SETTINGS)
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad
        optimizer.step()
        for mine, other in zip(params, theirs, strict=True):
            torch.testing.assert_close(mine, other.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "moments"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_adamw_matches_the_twin(dtype, moments):
    ours = state(dtype=dtype, moments=moments)
    twin = clone(ours)
    grads = clone([ours[1]])[0]
    ops.adamw_(*ours, step=3, **SETTINGS)
    reference.adamw_(*twin, step=3, **SETTINGS)
    assert all(map(torch.equal, ours[1], grads))
    for index, kind in ((0, dtype), (2, moments), (3, moments)):
        for mine, other in zip(ours[index], twin[index], strict=True):
            # In bfloat16 a difference of the last bit of float32 may round to the neighbour.
            relative = 2e-5 if kind == torch.float32 else 2**-7
            torch.testing.assert_close(mine, other, atol=1e-6, rtol=relative)


@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rounding=st.booleans(),
)
def test_adamw_does_not_depend_on_alignment(sizes, dtype, rounding):
    aligned = state([(size,) for size in sizes], dtype)
    moved = [unaligned(tensors) for tensors in aligned]
    for lists in (aligned, moved):
        ops.adamw_(*lists, step=2, stochastic_rounding=rounding, seed=3, **SETTINGS)
    assert_lists_equal(moved, aligned)


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_same_bits_for_every_number_of_threads(dtype, rounding):
    start = state([(100_003,), (50,)], dtype)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(clone(start))
        ops.adamw_(*results[-1], step=2, stochastic_rounding=rounding, seed=9, **SETTINGS)
        assert_lists_equal(results[-1], results[0])


def rounded_updates(value, change, count, **options):
    """`count` bfloat16 parameters of `value`, moved by about -change in one step."""
    params = [torch.full((count,), value, dtype=torch.bfloat16)]
    grads = [torch.full((count,), 1.0 if change > 0 else -1.0, dtype=torch.bfloat16)]
    settings = SETTINGS | {"lr": abs(change), "weight_decay": 0.0}
    moments = [[torch.zeros(count)], [torch.zeros(count)]]
    ops.adamw_(params, grads, *moments, step=1, stochastic_rounding=True, **settings, **options)
    return params[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [1.0, -1.0, 3.0])
@pytest.mark.parametrize("change", [1e-3, -1e-3, 2.5e-4])
def test_stochastic_rounding_is_unbiased(value, change, backend):
    """The step of 1/300 to 1/4 of the last bit is lost by rounding to nearest; on average it must not be."""
    ops.use_backend(backend)
    count = 400_000
    after = rounded_updates(value, change, count, seed=5)
    assert after.unique().numel() == 2  # the two neighbours of the exact value
    spacing = (after.max() - after.min()).double()
    mean = after.double().mean()
    standard_error = spacing * 0.5 / count**0.5
    assert abs(mean - (value - change)) < 5 * standard_error


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_is_a_function_of_seed_step_tensor_and_element(backend):
    ops.use_backend(backend)
    first = rounded_updates(1.0, 1e-3, 5000, seed=1)
    assert torch.equal(rounded_updates(1.0, 1e-3, 5000, seed=1), first)
    assert not torch.equal(rounded_updates(1.0, 1e-3, 5000, seed=2), first)

    def two_tensors(step):
        kinds = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
        lists = [[torch.ones(5000, dtype=kind) for _ in range(2)] for kind in kinds]
        settings = SETTINGS | {"lr": 1e-3, "weight_decay": 0.0}
        ops.adamw_(*lists, step=step, stochastic_rounding=True, seed=1, **settings)
        return lists[0]

    pair = two_tensors(1)
    assert not torch.equal(pair[0], pair[1])
    assert not torch.equal(two_tensors(2)[0], pair[0])
    # No pattern along the tensor: neighbours agree as often as independent draws do.
    up = (first == first.max()).double()
    p = up.mean()
    agreement = (up[1:] == up[:-1]).double().mean()
    assert abs(agreement - (p**2 + (1 - p) ** 2)) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_keeps_infinity_and_nan(backend):
    ops.use_backend(backend)
    special = [torch.inf, -torch.inf, torch.nan, 0.0]
    params = [torch.tensor(special * 50, dtype=torch.bfloat16)]
    zeros = [[torch.zeros(200)] for _ in range(2)]
    grads = [torch.zeros(200, dtype=torch.bfloat16)]
    ops.adamw_(params, grads, *zeros, step=1, stochastic_rounding=True, seed=1, **(SETTINGS | {"weight_decay": 0.0}))
    assert torch.equal(params[0].isnan(), torch.tensor([False, False, True, False] * 50))
    torch.testing.assert_close(params[0], torch.tensor(special * 50, dtype=torch.bfloat16), equal_nan=True)


def test_nan_stays_in_its_element():
    clean, poisoned = (clone(lists) for lists in [state([(333,)])] * 2)
    poisoned[1][0][77] = torch.nan
    for lists in (clean, poisoned):
        ops.adamw_(*lists, step=1, **SETTINGS)
    for mine, other in ((poisoned[i][0], clean[i][0]) for i in (0, 2, 3)):
        assert mine[77].isnan()
        mine[77] = other[77]
        assert torch.equal(mine, other)


def test_autograd_sees_the_update():
    lists = state([(4,)])
    lists[0][0].requires_grad_()
    loss = lists[0][0].square().sum()
    ops.adamw_(*lists, step=1, **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_adamw_of_nothing():
    ops.adamw_([], [], [], [], step=1, **SETTINGS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"grads": []}, ValueError, "grads has 0 tensors; takes 1"),
        ({"grads": [torch.zeros(4)]}, ValueError, r"grads\[0\] has shape \(4,\); takes \(3,\)"),
        ({"grads": [torch.zeros(3, dtype=torch.bfloat16)]}, TypeError, r"grads\[0\] is torch.bfloat16"),
        ({"exp_avgs": [torch.zeros(6)[::2]]}, ValueError, r"exp_avgs\[0\] has strides \(2,\)"),
        ({"exp_avg_sqs": [torch.zeros(1).expand(3)]}, ValueError, r"exp_avg_sqs\[0\] has strides \(0,\)"),
        ({"exp_avgs": [torch.zeros(3, dtype=torch.bfloat16)]}, TypeError, r"exp_avgs\[0\] is torch.bfloat16"),
        ({"params": [torch.zeros(3, dtype=torch.float64)]}, TypeError, r"params\[0\] is torch.float64"),
        ({"grads": [torch.zeros(3, device="meta")]}, ValueError, r"grads\[0\] is on meta"),
        ({"step": 0}, ValueError, "step is 0"),
        ({"lr": -1.0}, ValueError, "lr -1.0"),
        ({"lr": float("nan")}, ValueError, "lr nan"),
        ({"beta1": 1.0}, ValueError, "beta1 1.0"),
        ({"beta2": -0.1}, ValueError, "beta2 -0.1"),
    ],
)
def test_adamw_bad_arguments(change, error, words, backend):
    ops.use_backend(backend)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    arguments = dict(zip(names, state([(3,)]), strict=True)) | {"step": 1} | SETTINGS | change
    lists = [arguments[name] for name in names if arguments[name] and not arguments[name][0].is_meta]
    before = clone(lists)
    with pytest.raises(error, match=words):
        ops.adamw_(**arguments)
    assert_lists_equal(lists, before)


def test_tensors_that_share_memory_are_refused():
    room = torch.zeros(10)
    params, grads, exp_avgs, exp_avg_sqs = state([(4,), (4,)])
    for lists, words in (
        (([room[:4], room[3:7]], grads, exp_avgs, exp_avg_sqs), r"params\[\d\] and params\[\d\] share memory"),
        ((params, [room[:4], grads[1]], [exp_avgs[0], room[2:6]], exp_avg_sqs), "share memory"),
        ((params, grads, exp_avgs, [exp_avgs[0], exp_avg_sqs[1]]), "share memory"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.adamw_(*lists, step=1, **SETTINGS)
    ops.adamw_([room[:4], room[4:8]], [grads[0], grads[0]], exp_avgs, exp_avg_sqs, step=1, **SETTINGS)


def test_the_raw_operators_check_too():
    params, grads, exp_avgs, exp_avg_sqs = state([(4,)])
    raw = torch.ops.nanochat_native
    options = SETTINGS | {"stochastic_rounding": False, "seed": 0}
    with pytest.raises(ValueError, match="step is 0"):
        raw.adamw_(params, grads, exp_avgs, exp_avg_sqs, step=0, **options)
    with pytest.raises(TypeError, match="exp_avgs is BFloat16; takes"):
        raw.adamw_(params, grads, [exp_avgs[0].bfloat16()], exp_avg_sqs, step=1, **options)
    with pytest.raises(ValueError, match="contiguous"):
        raw.adamw_(params, [torch.zeros(8)[::2]], exp_avgs, exp_avg_sqs, step=1, **options)
    with pytest.raises(ValueError, match="one shape"):
        raw.muon_momentum_([torch.zeros(2), torch.zeros(3)], [torch.zeros(2), torch.zeros(3)], 0.9, True)
    with pytest.raises(ValueError, match="update has shape"):
        raw.muon_update_([torch.zeros(2)], torch.zeros(2, 2), 0.1, 0.0, 1.0)


# --- muon_momentum_, muon_update_ ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (5, 7), (64, 33), (300, 400), (0, 4)], ids=str)
def test_muon_momentum(shape, dtype, nesterov, backend):
    ops.use_backend(backend)
    grads = [torch.randn(shape).to(dtype) for _ in range(3)]
    buffers = [torch.randn(shape) for _ in range(3)]
    expected = [torch.lerp(buffer, grad.float(), 1 - 0.9) for buffer, grad in zip(buffers, grads, strict=True)]
    before = clone([grads])[0]
    update = ops.muon_momentum_(grads, buffers, momentum=0.9, nesterov=nesterov)
    assert update.shape == (3, *shape)
    assert update.dtype == torch.float32
    assert all(map(torch.equal, grads, before))
    for i in range(3):
        torch.testing.assert_close(buffers[i], expected[i])
        ahead = torch.lerp(grads[i].float(), expected[i], 0.9)
        torch.testing.assert_close(update[i], ahead if nesterov else expected[i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (5, 7), (64, 33), (300, 400), (0, 4)], ids=str)
def test_muon_update(shape, dtype, backend):
    ops.use_backend(backend)
    params = [torch.randn(shape).to(dtype) for _ in range(3)]
    update = torch.randn(3, *shape)
    expected = [(0.95 * param.float() - 0.3 * change).to(dtype) for param, change in zip(params, update, strict=True)]
    ops.muon_update_(params, update, lr=0.1, weight_decay=0.5, scale=3.0)
    for mine, other in zip(params, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other)


@given(sizes=st.integers(1, 400), count=st.integers(1, 4))
def test_muon_does_not_depend_on_alignment_or_threads(sizes, count):
    grads, buffers, params = ([torch.randn(sizes) for _ in range(count)] for _ in range(3))
    results = []
    for move, threads in ((list, 2), (unaligned, 2), (list, 1), (list, 3)):
        torch.set_num_threads(threads)
        moved_grads, moved_buffers, moved_params = (move(clone([tensors])[0]) for tensors in (grads, buffers, params))
        update = ops.muon_momentum_(moved_grads, moved_buffers, momentum=0.95)
        ops.muon_update_(moved_params, update, lr=0.02, weight_decay=0.1)
        results.append([moved_buffers, moved_params, list(update)])
    for result in results[1:]:
        assert_lists_equal(result, results[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_muon_bad_arguments(backend):
    ops.use_backend(backend)
    two, three = torch.zeros(2), torch.zeros(3)
    for arguments, error, words in (
        (([], []), ValueError, "grads is empty"),
        (([two, three], [two.clone(), three.clone()]), ValueError, r"grads\[1\] has shape \(3,\); takes \(2,\)"),
        (([two], [three]), ValueError, r"momentum_buffers\[0\] has shape"),
        (([two.double()], [two]), TypeError, r"grads\[0\] is torch.float64"),
        (([two.bfloat16()], [two.bfloat16()]), TypeError, r"momentum_buffers\[0\] is torch.bfloat16"),
    ):
        with pytest.raises(error, match=words):
            ops.muon_momentum_(*arguments, momentum=0.9)
    with pytest.raises(ValueError, match=r"momentum is 1\.0"):
        ops.muon_momentum_([two], [two.clone()], momentum=1.0)
    for params, update, error, words in (
        ([], three, ValueError, "params is empty"),
        ([two, three], torch.zeros(2, 2), ValueError, r"params\[1\] has shape"),
        ([two], torch.zeros(2), ValueError, r"update has shape \(2,\).* contiguous \(1, 2\)"),
        ([two], torch.zeros(1, 2, dtype=torch.bfloat16), TypeError, "update is torch.bfloat16"),
        ([torch.zeros(1).expand(2)], torch.zeros(1, 2), ValueError, r"params\[0\] has strides \(0,\)"),
    ):
        with pytest.raises(error, match=words):
            ops.muon_update_(params, update, lr=0.1)
    with pytest.raises(ValueError, match=r"lr -0\.1"):
        ops.muon_update_([two], torch.zeros(1, 2), lr=-0.1)


def test_muon_tensors_that_share_memory_are_refused():
    room = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"share memory"):
        ops.muon_momentum_([room[0]], [room[0]], momentum=0.9)
    with pytest.raises(ValueError, match=r"share memory"):
        ops.muon_update_([room[0]], room, lr=0.1)


# --- all three ---


def test_opcheck():
    raw = torch.ops.nanochat_native
    options = SETTINGS | {"stochastic_rounding": False, "seed": 0, "step": 2}
    torch.library.opcheck(raw.adamw_.default, state([(3,), (2, 2)]), options)
    torch.library.opcheck(raw.muon_momentum_.default, ([torch.randn(3, 2)], [torch.randn(3, 2)], 0.9, True))
    torch.library.opcheck(raw.muon_update_.default, ([torch.randn(3, 2)], torch.randn(1, 3, 2), 0.1, 0.1, 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    ops.use_backend(backend)

    def step(params, grads, exp_avgs, exp_avg_sqs):
        ops.adamw_(params, grads, exp_avgs, exp_avg_sqs, step=2, **SETTINGS)
        update = ops.muon_momentum_(grads, exp_avgs, momentum=0.9)
        ops.muon_update_(params, ops.newton_schulz(update), lr=0.1, weight_decay=0.1)

    ours = state([(4, 6), (4, 6)])
    compiled = clone(ours)
    step(*ours)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    for mine, other in zip(ours, compiled, strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b)
