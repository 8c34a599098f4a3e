"""adamw_: against torch.optim.AdamW, the reference and the formula; rounding, cautious decay, wrong arguments."""

import pytest
import torch
from backends import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from tensor_lists import SHAPES, assert_lists_equal, clone, number, state, unaligned

from nanochat_native import ops
from nanochat_native.ops import reference

SETTINGS = {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}
RAW_ADAMW = {
    "stochastic_rounding": False,
    "seed": 0,
    "cautious": False,
    "step_tensor": None,
    "lr_tensor": None,
    "weight_decay_tensor": None,
}


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
def test_adamw_matches_the_reference(dtype, moments):
    ours = state(dtype=dtype, moments=moments)
    expected = clone(ours)
    grads = clone([ours[1]])[0]
    ops.adamw_(*ours, step=3, **SETTINGS)
    reference.adamw_(*expected, step=3, **SETTINGS)
    assert all(map(torch.equal, ours[1], grads))
    for index, kind in ((0, dtype), (2, moments), (3, moments)):
        for mine, other in zip(ours[index], expected[index], strict=True):
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
    """Zero gradients keep the sign of m; lr * weight_decay is 0.1, and the large eps makes the step itself vanish."""
    ops.use_backend(backend)
    params = [torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0, 2.0, 2.0])]
    exp_avgs = [torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0, 1e-30])]
    expected = torch.tensor([1.8, 2.0, -2.0, -1.8, 0.0, 1.8, 1.8])
    settings = SETTINGS | {"lr": 0.1, "weight_decay": 1.0, "eps": 1e10}
    rest = [torch.zeros(7)]
    ops.adamw_(params, rest, exp_avgs, [torch.zeros(7)], step=1, cautious=True, **settings)
    torch.testing.assert_close(params[0], expected)
    # The sign of the new m decides: these gradients flip every sign of the old one.
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
        clear.append(m.abs() > 1e-6)  # where 0.8 m and 0.2 g cancel, rounding decides the sign
    ops.adamw_(*lists, step=3, cautious=True, **(SETTINGS | {"weight_decay": 0.5}))
    for mine, other, where in zip(lists[0], expected, clear, strict=True):
        relative = 2e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(mine[where].float(), other[where], atol=1e-6, rtol=relative)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_adamw_cautious_with_stochastic_rounding_is_unbiased_where_it_decays_and_where_not(moments):
    """Only the first half of the elements decays, by 1/4 of the last bit."""
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
    """Return `count` bfloat16 parameters of `value` after one step of about -change."""
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
    """Rounding to nearest would lose a step of 1/300 to 1/4 of the last bit; on average it must not be lost."""
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
    # There is no pattern along the tensor: neighbours agree as often as independent draws.
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
        ({"grads": []}, ValueError, "grads must have the length of params, 1, got 0"),
        ({"grads": [torch.zeros(4)]}, ValueError, r"grads\[0\] must have shape \(3,\) like params\[0\], got \(4,\)"),
        (
            {"grads": [torch.zeros(3, dtype=torch.bfloat16)]},
            TypeError,
            r"grads\[0\] must be torch.float32, got torch.bfloat16",
        ),
        ({"exp_avgs": [torch.zeros(6)[::2]]}, ValueError, r"exp_avgs\[0\] must be contiguous, got strides \(2,\)"),
        (
            {"exp_avg_sqs": [torch.zeros(1).expand(3)]},
            ValueError,
            r"exp_avg_sqs\[0\] must be contiguous, got strides \(0,\)",
        ),
        (
            {"exp_avgs": [torch.zeros(3, dtype=torch.bfloat16)]},
            TypeError,
            r"exp_avgs\[0\] must be torch.float32, or .*, got torch.bfloat16",
        ),
        (
            {"params": [torch.zeros(3, dtype=torch.float64)]},
            TypeError,
            r"params\[0\] must be torch.float32 or torch.bfloat16, got torch.float64",
        ),
        (
            {"grads": [torch.zeros(3, device="meta")]},
            ValueError,
            r"grads\[0\] must be on cpu like params\[0\], got meta",
        ),
        ({"step": 0}, ValueError, "step must be >= 1, got 0"),
        ({"lr": -1.0}, ValueError, "lr must be >= 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be >= 0, got nan"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be >= 0, got -1.0"),
        ({"eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"),
        ({"step": number(0)}, ValueError, "step must be >= 1, got 0"),
        ({"step": number(1.0)}, TypeError, "step must be a number or a 0-d tensor of torch.int64, got torch.float64"),
        (
            {"lr": torch.tensor(0.1)},
            TypeError,
            "lr must be a number or a 0-d tensor of torch.float64, got torch.float32",
        ),
        ({"lr": number(float("nan"))}, ValueError, "lr must be >= 0, got nan"),
        (
            {"lr": torch.zeros(1, dtype=torch.float64)},
            ValueError,
            r"lr must be a number or a 0-d tensor, got shape \(1,\)",
        ),
        ({"weight_decay": number(-0.5)}, ValueError, "weight_decay must be >= 0, got -0.5"),
        (
            {"weight_decay": number(0.5).to("meta")},
            ValueError,
            "weight_decay must be a number or a tensor on cpu, got one on meta",
        ),
        ({"beta1": 1.0}, ValueError, "beta1 and beta2 must be >= 0 and < 1, got 1.0 and 0.95"),
        ({"beta2": -0.1}, ValueError, "beta1 and beta2 must be >= 0 and < 1, got 0.8 and -0.1"),
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_product_does_not_decay(backend):
    """Infinity times an m of 0 is NaN; the decay, a factor of 0 here, would make NaN of infinity."""
    ops.use_backend(backend)
    params, zeros = [torch.tensor([torch.inf, 3.0])], [[torch.zeros(2)] for _ in range(3)]
    settings = SETTINGS | {"lr": 1.0, "weight_decay": 1.0, "eps": 1.0}
    ops.adamw_(params, *zeros, step=1, cautious=True, **settings)
    assert params[0].tolist() == [torch.inf, 0.0]


def test_the_raw_operator_checks_too():
    params, grads, exp_avgs, exp_avg_sqs = state([(4,)])
    raw = torch.ops.nanochat_native
    options = SETTINGS | RAW_ADAMW
    with pytest.raises(ValueError, match="params must hold at least one tensor, got none"):
        raw.adamw_([], [], [], [], [], step=1, **(options | {"lr_tensor": number(0.1)}))
    for change, error, words in (
        ({"step_tensor": number(0)}, ValueError, "step must be at least 1, got 0"),
        ({"step_tensor": number(1.0)}, TypeError, "step must have dtype Long, got Double"),
        ({"lr_tensor": torch.tensor(0.1)}, TypeError, "lr must have dtype Double, got Float"),
        ({"lr_tensor": number(0.1)[None]}, ValueError, r"lr must have shape \[\], got \[1\]"),
        ({"weight_decay_tensor": number(1)}, TypeError, "weight_decay must have dtype Double, got Long"),
    ):
        with pytest.raises(error, match=words):
            raw.adamw_(params, grads, exp_avgs, exp_avg_sqs, [], step=1, **(options | change))
    with pytest.raises(ValueError, match="step must be at least 1, got 0"):
        raw.adamw_(params, grads, exp_avgs, exp_avg_sqs, [], step=0, **options)
    with pytest.raises(TypeError, match=r"exp_avgs must have one of the dtypes .*, got BFloat16"):
        raw.adamw_(params, grads, [exp_avgs[0].bfloat16()], exp_avg_sqs, [], step=1, **options)
    with pytest.raises(ValueError, match="contiguous"):
        raw.adamw_(params, [torch.zeros(8)[::2]], exp_avgs, exp_avg_sqs, [], step=1, **options)


def test_opcheck():
    raw = torch.ops.nanochat_native
    options = SETTINGS | RAW_ADAMW | {"step": 2}
    in_tensors = {"step_tensor": number(2), "lr_tensor": number(0.1), "weight_decay_tensor": number(0.1)}
    for change in ({}, {"cautious": True, **in_tensors}):
        for copies in ([], [torch.zeros(3).bfloat16(), torch.zeros(2, 2).bfloat16()]):
            torch.library.opcheck(raw.adamw_.default, (*state([(3,), (2, 2)]), copies), options | change)
