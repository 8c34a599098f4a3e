"""adamw_, muon_momentum_, muon_update_: against torch.optim.AdamW, the twins and the formulas; rounding, cautious
decay, numbers in tensors, norms; refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat_native import ops
from nanochat_native.ops import reference

BACKENDS = ["native", "torch"]
SETTINGS = {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}
RAW_ADAMW = {
    "stochastic_rounding": False,
    "seed": 0,
    "cautious": False,
    "step_tensor": None,
    "lr_tensor": None,
    "weight_decay_tensor": None,
}
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


def number(value):
    """A 0-d tensor that stands for a number."""
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_adamw_cautious_by_hand(backend):
    """With zero gradients m keeps its sign; lr times weight_decay is 0.1, and eps leaves nothing of the step itself."""
    ops.use_backend(backend)
    params = [torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0, 2.0, 2.0])]
    exp_avgs = [torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0, 1e-30])]
    expected = torch.tensor([1.8, 2.0, -2.0, -1.8, 0.0, 1.8, 1.8])
    settings = SETTINGS | {"lr": 0.1, "weight_decay": 1.0, "eps": 1e10}
    rest = [torch.zeros(7)]
    ops.adamw_(params, rest, exp_avgs, [torch.zeros(7)], step=1, cautious=True, **settings)
    torch.testing.assert_close(params[0], expected)
    # The new m counts: these gradients turn every sign of the old one.
    grads = [-torch.tensor([1.0, -1.0, 1.0, -1.0]) * 100]
    params, exp_avgs = [torch.tensor([2.0, 2.0, -2.0, -2.0])], [torch.tensor([1.0, -1.0, 1.0, -1.0])]
    ops.adamw_(params, grads, exp_avgs, [torch.zeros(4)], step=1, cautious=True, **settings)
    torch.testing.assert_close(params[0], torch.tensor([2.0, 1.8, -1.8, -2.0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "moments"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_adamw_cautious_against_the_formula(dtype, moments, backend):
    ops.use_backend(backend)
    lists = state(dtype=dtype, moments=moments)
    expected, clear = [], []
    for p, g, m, v in zip(*([tensor.float() for tensor in tensors] for tensors in lists), strict=True):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        decay = torch.where(m * p >= 0, 1 - 0.1 * 0.5, 1.0)
        expected.append(decay * p - 0.1 * (m / (1 - 0.8**3)) / ((v / (1 - 0.95**3)).sqrt() + 1e-10))
        clear.append(m.abs() > 1e-6)  # where 0.8 m and 0.2 g cancel, rounding makes the sign
    ops.adamw_(*lists, step=3, cautious=True, **(SETTINGS | {"weight_decay": 0.5}))
    for mine, other, where in zip(lists[0], expected, clear, strict=True):
        relative = 2e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(mine[where].float(), other[where], atol=1e-6, rtol=relative)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_adamw_cautious_with_stochastic_rounding_is_unbiased_where_it_decays_and_where_not(moments):
    """Decay by 1/4 of the last bit, on the first half of the elements only."""
    count = 200_000
    params = [torch.ones(2 * count, dtype=torch.bfloat16)]
    exp_avgs = [torch.cat([torch.ones(count), -torch.ones(count)]).to(moments)]
    zeros = [torch.zeros(2 * count, dtype=kind) for kind in (torch.bfloat16, moments)]
    settings = SETTINGS | {"lr": 2**-10, "weight_decay": 1.0, "eps": 1e20}
    ops.adamw_(params, zeros[:1], exp_avgs, zeros[1:], step=1, stochastic_rounding=True, cautious=True, **settings)
    first, second = params[0].double().split(count)
    assert abs(first.mean() - (1 - 2**-10)) < 5 * 2**-9 / count**0.5
    assert (second == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_product_does_not_decay(backend):
    """Infinity times an update of 0; the decay, a factor of 0 here, would make NaN of it."""
    ops.use_backend(backend)
    params, update = [torch.tensor([torch.inf, 3.0])], torch.zeros(1, 2)
    ops.muon_update_(params, update, lr=1.0, weight_decay=1.0, cautious=True)
    assert params[0].tolist() == [torch.inf, 0.0]
    params, zeros = [torch.tensor([torch.inf, 3.0])], [[torch.zeros(2)] for _ in range(3)]
    settings = SETTINGS | {"lr": 1.0, "weight_decay": 1.0, "eps": 1.0}
    ops.adamw_(params, *zeros, step=1, cautious=True, **settings)
    assert params[0].tolist() == [torch.inf, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("names", [("step",), ("lr",), ("weight_decay",), ("step", "lr", "weight_decay")], ids=str)
def test_adamw_takes_numbers_in_tensors(names, rounding, backend):
    ops.use_backend(backend)
    ours = state([(1001,), (7, 3)], torch.bfloat16 if rounding else torch.float32)
    tensors = clone(ours)
    options = SETTINGS | {"step": 5, "stochastic_rounding": rounding, "seed": 3, "cautious": True}
    for _ in range(2):
        ops.adamw_(*ours, **options)
        ops.adamw_(*tensors, **(options | {name: number(options[name]) for name in names}))
    assert_lists_equal(tensors, ours)


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
    with torch.no_grad():
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
        ({"lr": -1.0}, ValueError, "lr is -1.0; takes at least 0"),
        ({"lr": float("nan")}, ValueError, "lr is nan"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay is -1.0; takes at least 0"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
        ({"step": number(0)}, ValueError, "step is 0; takes at least 1"),
        ({"step": number(1.0)}, TypeError, "step is torch.float64; takes a number, or a 0-d tensor of torch.int64"),
        ({"lr": torch.tensor(0.1)}, TypeError, "lr is torch.float32; takes a number, or a 0-d tensor of torch.float64"),
        ({"lr": number(float("nan"))}, ValueError, "lr is nan"),
        ({"lr": torch.zeros(1, dtype=torch.float64)}, ValueError, r"lr has shape \(1,\); takes a number, or a 0-d"),
        ({"weight_decay": number(-0.5)}, ValueError, "weight_decay is -0.5; takes at least 0"),
        ({"weight_decay": number(0.5).to("meta")}, ValueError, "weight_decay is on meta; takes .* on cpu"),
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
    options = SETTINGS | RAW_ADAMW
    with pytest.raises(ValueError, match="params is empty; takes at least one"):
        raw.adamw_([], [], [], [], step=1, **(options | {"lr_tensor": number(0.1)}))
    for change, error, words in (
        ({"step_tensor": number(0)}, ValueError, "step is 0; takes at least 1"),
        ({"step_tensor": number(1.0)}, TypeError, "step is Double; takes Long"),
        ({"lr_tensor": torch.tensor(0.1)}, TypeError, "lr is Float; takes Double"),
        ({"lr_tensor": number(0.1)[None]}, ValueError, r"lr has shape \[1\]; takes \[\]"),
        ({"weight_decay_tensor": number(1)}, TypeError, "weight_decay is Long; takes Double"),
    ):
        with pytest.raises(error, match=words):
            raw.adamw_(params, grads, exp_avgs, exp_avg_sqs, step=1, **(options | change))
    with pytest.raises(TypeError, match="momentum is Float; takes Double"):
        raw.muon_momentum_([torch.zeros(2)], [torch.zeros(2)], 0.9, True, False, torch.tensor(0.9))
    with pytest.raises(TypeError, match="weight_decay is Float; takes Double"):
        raw.muon_update_([torch.zeros(2)], torch.zeros(1, 2), 0.1, 0.0, 1.0, False, None, torch.tensor(0.9))
    with pytest.raises(ValueError, match="step is 0"):
        raw.adamw_(params, grads, exp_avgs, exp_avg_sqs, step=0, **options)
    with pytest.raises(TypeError, match="exp_avgs is BFloat16; takes"):
        raw.adamw_(params, grads, [exp_avgs[0].bfloat16()], exp_avg_sqs, step=1, **options)
    with pytest.raises(ValueError, match="contiguous"):
        raw.adamw_(params, [torch.zeros(8)[::2]], exp_avgs, exp_avg_sqs, step=1, **options)
    with pytest.raises(ValueError, match="one shape"):
        raw.muon_momentum_([torch.zeros(2), torch.zeros(3)], [torch.zeros(2), torch.zeros(3)], 0.9, True, False, None)
    with pytest.raises(ValueError, match="update has shape"):
        raw.muon_update_([torch.zeros(2)], torch.zeros(2, 2), 0.1, 0.0, 1.0, False, None, None)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (64, 33), (300, 400), (0, 4)], ids=str)
def test_muon_momentum_norms(shape, dtype, nesterov, backend):
    ops.use_backend(backend)
    grads = [torch.randn(shape).to(dtype) * 10.0**exponent for exponent in (0, 3, -25)]
    buffers = [torch.zeros(shape) for _ in range(3)]
    alone = ops.muon_momentum_(grads, clone([buffers])[0], momentum=0.9, nesterov=nesterov)
    update, norms = ops.muon_momentum_(grads, buffers, momentum=0.9, nesterov=nesterov, return_norm=True)
    assert torch.equal(update, alone)
    assert norms.dtype == torch.float64
    expected = torch.linalg.vector_norm(update.double().view(3, buffers[0].numel()), dim=1)
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_of_many_elements(backend):
    """A sum in float32 would stop growing: the last elements are far below its last bit."""
    ops.use_backend(backend)
    grads = [torch.full((10_000_001,), 1e-3)]
    grads[0][0] = 100.0
    update, norms = ops.muon_momentum_(grads, [torch.zeros(10_000_001)], momentum=0.0, return_norm=True)
    expected = (update[0, 0].double() ** 2 + 10**7 * update[0, 1].double() ** 2).sqrt()
    torch.testing.assert_close(norms, expected[None], rtol=1e-10, atol=0)


def test_norms_have_the_same_bits_for_every_number_of_threads_and_alignment():
    grads = [torch.randn(70_001) for _ in range(3)]
    results = []
    for move, threads in ((list, 1), (list, 2), (list, 3), (unaligned, 2)):
        torch.set_num_threads(threads)
        buffers = [torch.zeros(70_001) for _ in range(3)]
        results.append(ops.muon_momentum_(move(grads), move(buffers), momentum=0.95, return_norm=True)[1])
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_nan_stays_in_its_norm():
    grads = [torch.ones(2000) for _ in range(3)]
    grads[1][1999] = torch.nan
    norms = ops.muon_momentum_(grads, [torch.zeros(2000) for _ in range(3)], momentum=0.5, return_norm=True)[1]
    assert norms.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_update_cautious(dtype, backend):
    ops.use_backend(backend)
    params = [torch.randn(300, 7).to(dtype) for _ in range(3)]
    update = torch.randn(3, 300, 7)
    update[0, 0] = 0
    expected = []
    for param, change in zip(params, update, strict=True):
        p = param.float()
        agrees = (p.sign() == change.sign()) | (p == 0) | (change == 0)
        expected.append((torch.where(agrees, 0.5, 1.0) * p - 0.3 * change).to(dtype))
    ops.muon_update_(params, update, lr=0.1, weight_decay=5.0, scale=3.0, cautious=True)
    for mine, other in zip(params, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_muon_takes_numbers_in_tensors(backend):
    ops.use_backend(backend)
    grads, buffers, params = ([torch.randn(50, 31) for _ in range(2)] for _ in range(3))
    results = []
    for kind in (float, number):
        b, p = clone([buffers, params])
        update = ops.muon_momentum_(grads, b, momentum=kind(0.95))
        ops.muon_update_(p, update, lr=kind(0.02), weight_decay=kind(0.1), scale=1.3)
        results.append([b, p, list(update)])
    assert_lists_equal(*results)


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
    for momentum, error, words in (
        (1.0, ValueError, r"momentum is 1\.0; takes 0 <= momentum < 1"),
        (number(1.0), ValueError, r"momentum is 1\.0; takes 0 <= momentum < 1"),
        (torch.tensor(0.9), TypeError, "momentum is torch.float32"),
    ):
        with pytest.raises(error, match=words):
            ops.muon_momentum_([two], [two.clone()], momentum=momentum)
    for params, update, error, words in (
        ([], three, ValueError, "params is empty"),
        ([two, three], torch.zeros(2, 2), ValueError, r"params\[1\] has shape"),
        ([two], torch.zeros(2), ValueError, r"update has shape \(2,\).* contiguous \(1, 2\)"),
        ([two], torch.zeros(1, 2, dtype=torch.bfloat16), TypeError, "update is torch.bfloat16"),
        ([torch.zeros(1).expand(2)], torch.zeros(1, 2), ValueError, r"params\[0\] has strides \(0,\)"),
    ):
        with pytest.raises(error, match=words):
            ops.muon_update_(params, update, lr=0.1)
    for settings, words in (
        ({"lr": -0.1}, r"lr is -0\.1; takes at least 0"),
        ({"lr": number(-0.1)}, r"lr is -0\.1; takes at least 0"),
        ({"lr": 0.1, "weight_decay": number(-0.1)}, r"weight_decay is -0\.1; takes at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.muon_update_([two], torch.zeros(1, 2), **settings)


def test_muon_tensors_that_share_memory_are_refused():
    room = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"share memory"):
        ops.muon_momentum_([room[0]], [room[0]], momentum=0.9)
    with pytest.raises(ValueError, match=r"share memory"):
        ops.muon_update_([room[0]], room, lr=0.1)


# --- all three ---


def test_opcheck():
    raw = torch.ops.nanochat_native
    options = SETTINGS | RAW_ADAMW | {"step": 2}
    in_tensors = {"step_tensor": number(2), "lr_tensor": number(0.1), "weight_decay_tensor": number(0.1)}
    for change in ({}, {"cautious": True, **in_tensors}):
        torch.library.opcheck(raw.adamw_.default, state([(3,), (2, 2)]), options | change)
    for rest in ((False, None), (True, number(0.9))):
        grads, buffers = [torch.randn(3, 2)], [torch.randn(3, 2)]
        torch.library.opcheck(raw.muon_momentum_.default, (grads, buffers, 0.9, True, *rest))
    for rest in ((False, None, None), (True, number(0.1), number(0.1))):
        params, update = [torch.randn(3, 2)], torch.randn(1, 3, 2)
        torch.library.opcheck(raw.muon_update_.default, (params, update, 0.1, 0.1, 2.0, *rest))


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_in_tensors_are_inputs_of_a_compiled_graph(backend):
    """Read at every call, not when the graph was traced: what a captured CUDA graph depends on."""
    ops.use_backend(backend)
    graphs = []

    def count_graphs(graph, inputs):
        graphs.append(graph)
        return graph

    def step(params, grads, exp_avgs, exp_avg_sqs, t, lr, momentum):
        settings = SETTINGS | {"lr": lr, "stochastic_rounding": True, "cautious": True}
        ops.adamw_(params, grads, exp_avgs, exp_avg_sqs, step=t, **settings)
        update, norms = ops.muon_momentum_(grads, exp_avgs, momentum=momentum, return_norm=True)
        ops.muon_update_(params, ops.newton_schulz(update, norms=norms), lr=lr)

    compiled = torch.compile(step, fullgraph=True, backend=count_graphs)
    ours = state([(4, 6), (4, 6)], torch.bfloat16)
    theirs = clone(ours)
    for t in (1, 2, 3):
        numbers = (number(t), number(0.1 / t), number(0.9 / t))
        step(*ours, *numbers)
        compiled(*theirs, *numbers)
    assert len(graphs) == 1
    assert_lists_equal(theirs, ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_fake_tensors_are_not_asked_for(backend):
    ops.use_backend(backend)
    with FakeTensorMode():
        lists = state([(4, 6)])
        ops.adamw_(*lists, step=number(1), **(SETTINGS | {"lr": number(0.1), "weight_decay": number(0.1)}))
        update, norms = ops.muon_momentum_(lists[1], lists[2], momentum=number(0.9), return_norm=True)
        ops.muon_update_(lists[0], update, lr=number(0.1))
    assert (update.shape, norms.shape, norms.dtype) == ((1, 4, 6), (1,), torch.float64)
