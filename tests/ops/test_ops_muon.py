"""muon_momentum_, muon_update_, newton_schulz_update_: against the formulas and the references; norms, cautious decay,
numbers in tensors, errors. And steps of all operators of the optimizers in one compiled graph."""

import pytest
import torch
from backends import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from tensor_lists import assert_lists_equal, clone, number, state, unaligned
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat_native import ops
from nanochat_native.ops import reference

ADAMW = {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}
UPDATE = torch.ops.nanochat_native.newton_schulz_update_.default

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
    """A sum in float32 would stop growing, because the last elements are far below its last bit."""
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
        (([], []), ValueError, "grads must hold at least one tensor"),
        (
            ([two, three], [two.clone(), three.clone()]),
            ValueError,
            r"grads\[1\] must have shape \(2,\) like grads\[0\], got \(3,\)",
        ),
        (([two], [three]), ValueError, r"momentum_buffers\[0\] must have shape"),
        (([two.double()], [two]), TypeError, r"grads\[0\] must be torch.float32 or torch.bfloat16, got torch.float64"),
        (
            ([two.bfloat16()], [two.bfloat16()]),
            TypeError,
            r"momentum_buffers\[0\] must be torch.float32, got torch.bfloat16",
        ),
    ):
        with pytest.raises(error, match=words):
            ops.muon_momentum_(*arguments, momentum=0.9)
    for momentum, error, words in (
        (1.0, ValueError, r"momentum must be >= 0 and < 1, got 1\.0"),
        (number(1.0), ValueError, r"momentum must be >= 0 and < 1, got 1\.0"),
        (torch.tensor(0.9), TypeError, "momentum must be .*, got torch.float32"),
    ):
        with pytest.raises(error, match=words):
            ops.muon_momentum_([two], [two.clone()], momentum=momentum)
    for params, update, error, words in (
        ([], three, ValueError, "params must hold at least one tensor"),
        ([two, three], torch.zeros(2, 2), ValueError, r"params\[1\] must have shape"),
        ([two], torch.zeros(2), ValueError, r"update must be contiguous with shape \(1, 2\), got shape \(2,\)"),
        ([two], torch.zeros(1, 2, dtype=torch.bfloat16), TypeError, "update must be torch.float32, got torch.bfloat16"),
        (
            [torch.zeros(1).expand(2)],
            torch.zeros(1, 2),
            ValueError,
            r"params\[0\] must be contiguous, got strides \(0,\)",
        ),
    ):
        with pytest.raises(error, match=words):
            ops.muon_update_(params, update, lr=0.1)
    for settings, words in (
        ({"lr": -0.1}, r"lr must be >= 0, got -0\.1"),
        ({"lr": number(-0.1)}, r"lr must be >= 0, got -0\.1"),
        ({"lr": 0.1, "weight_decay": number(-0.1)}, r"weight_decay must be >= 0, got -0\.1"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.muon_update_([two], torch.zeros(1, 2), **settings)


def test_muon_tensors_that_share_memory_are_refused():
    room = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"share memory"):
        ops.muon_momentum_([room[0]], [room[0]], momentum=0.9)
    with pytest.raises(ValueError, match=r"share memory"):
        ops.muon_update_([room[0]], room, lr=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_product_does_not_decay(backend):
    """Infinity times an update of 0 is NaN; the decay, a factor of 0 here, would make NaN of infinity."""
    ops.use_backend(backend)
    params, update = [torch.tensor([torch.inf, 3.0])], torch.zeros(1, 2)
    ops.muon_update_(params, update, lr=1.0, weight_decay=1.0, cautious=True)
    assert params[0].tolist() == [torch.inf, 0.0]


def test_the_raw_operators_check_too():
    raw = torch.ops.nanochat_native
    with pytest.raises(TypeError, match="momentum must have dtype Double, got Float"):
        raw.muon_momentum_([torch.zeros(2)], [torch.zeros(2)], 0.9, True, False, torch.tensor(0.9))
    with pytest.raises(TypeError, match="weight_decay must have dtype Double, got Float"):
        raw.muon_update_([torch.zeros(2)], torch.zeros(1, 2), [], 0.1, 0.0, 1.0, False, None, torch.tensor(0.9))
    with pytest.raises(ValueError, match="one shape"):
        raw.muon_momentum_([torch.zeros(2), torch.zeros(3)], [torch.zeros(2), torch.zeros(3)], 0.9, True, False, None)
    with pytest.raises(ValueError, match="update must have shape"):
        raw.muon_update_([torch.zeros(2)], torch.zeros(2, 2), [], 0.1, 0.0, 1.0, False, None, None)


def test_opcheck():
    raw = torch.ops.nanochat_native
    for rest in ((False, None), (True, number(0.9))):
        grads, buffers = [torch.randn(3, 2)], [torch.randn(3, 2)]
        torch.library.opcheck(raw.muon_momentum_.default, (grads, buffers, 0.9, True, *rest))
    for rest in ((False, None, None), (True, number(0.1), number(0.1))):
        params, update = [torch.randn(3, 2)], torch.randn(1, 3, 2)
        for copies in ([], [torch.zeros(3, 2).bfloat16()]):
            torch.library.opcheck(raw.muon_update_.default, (params, update, copies, 0.1, 0.1, 2.0, *rest))


# --- newton_schulz_update_ ---

RATES = {"lr": 0.1, "weight_decay": 0.2, "scale": 1.5}


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 5), (20, 96), (2, 3, 9, 33)], ids=str)
def test_update_is_newton_schulz_and_muon_update(shape, dtype, cautious, backend):
    ops.use_backend(backend)
    params, update = [torch.randn(shape).to(dtype) for _ in range(3)], torch.randn(3, *shape)
    expected, kept = [param.clone() for param in params], update.clone()
    norms = torch.linalg.matrix_norm(update.double())
    ops.newton_schulz_update_(params, update, coefficients="cubic", steps=4, norms=norms, cautious=cautious, **RATES)
    orthogonal = reference.newton_schulz(update.double(), coefficients="cubic", steps=4).float()
    reference.muon_update_(expected, orthogonal, cautious=cautious, **RATES)
    assert torch.equal(update, kept)
    for mine, other in zip(params, expected, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_update_takes_numbers_in_tensors_and_marks_what_it_updates(backend):
    ops.use_backend(backend)
    update = torch.randn(2, 8, 12)
    params, others = ([torch.ones(8, 12), torch.ones(8, 12)] for _ in range(2))
    version = params[1]._version
    ops.newton_schulz_update_(params, update, **RATES)
    tensors = {name: torch.tensor(RATES[name], dtype=torch.float64) for name in ("lr", "weight_decay")}
    ops.newton_schulz_update_(others, update, scale=RATES["scale"], **tensors)
    assert all(map(torch.equal, params, others))
    assert params[1]._version > version


def test_update_of_no_numbers():
    params = [torch.zeros(0, 4)]
    ops.newton_schulz_update_(params, torch.zeros(1, 0, 4), lr=0.1)


def test_update_opcheck_and_compile():
    params, update = [torch.randn(9, 5) for _ in range(2)], torch.randn(2, 9, 5)
    numbers = [3.4445, -4.7750, 2.0315] * 5
    for norms in (None, torch.linalg.matrix_norm(update.double())):
        for copies in ([], [torch.zeros(9, 5).bfloat16() for _ in range(2)]):
            arguments = (params, update, copies, numbers, 1.0, norms, 0.1, 0.1, 1.0, False, None, None)
            torch.library.opcheck(UPDATE, arguments)

    def step(params, update, copies):
        ops.newton_schulz_update_(params, update, copies=copies, **RATES)

    for with_copies in (False, True):
        others = [param.clone() for param in params]
        copies, other_copies = ([torch.zeros(9, 5).bfloat16() for _ in range(2)] if with_copies else [] for _ in "ab")
        step(params, update, copies)
        torch.compile(step, fullgraph=True, backend="aot_eager")(others, update, other_copies)
        assert all(map(torch.equal, params + copies, others + other_copies))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("params", "update", "options", "error", "words"),
    [
        ([], torch.zeros(0, 3, 3), {}, ValueError, "params must hold at least one tensor"),
        ([torch.zeros(3, 3)], torch.zeros(1, 3, 4), {}, ValueError, r"update must .*, got shape \(1, 3, 4\)"),
        ([torch.zeros(3)] * 2, torch.zeros(2, 3), {}, ValueError, r"params must have shape \(..., M, K\), got \(3,\)"),
        (
            [torch.zeros(3, 3)],
            torch.zeros(1, 3, 3).double(),
            {},
            TypeError,
            "update must be torch.float32, got torch.float64",
        ),
        ([torch.zeros(3, 3).half()], torch.zeros(1, 3, 3), {}, TypeError, r"params\[0\] must be .*, got torch.float16"),
        ([torch.zeros(3, 3)], torch.zeros(1, 3, 3), {"steps": 0}, ValueError, "steps must be >= 1, got 0"),
        ([torch.zeros(3, 3)], torch.zeros(1, 3, 3), {"lr": -1.0}, ValueError, "lr must be >= 0, got -1.0"),
        (
            [torch.zeros(3, 3)],
            torch.zeros(1, 3, 3),
            {"norms": torch.ones(2).double()},
            ValueError,
            r"norms must have shape",
        ),
    ],
)
def test_update_bad_arguments(params, update, options, error, words, backend):
    ops.use_backend(backend)
    with pytest.raises(error, match=f"newton_schulz_update_: {words}"):
        ops.newton_schulz_update_(params, update, **({"lr": 0.1} | options))


def test_the_raw_update_checks_too():
    numbers, rest = [1.0, 2.0, 3.0], (0.1, 0.1, 1.0, False, None, None)
    with pytest.raises(ValueError, match=r"params must have shape \(\.\.\., M, K\), got \[3\]"):
        UPDATE([torch.zeros(3), torch.zeros(3)], torch.zeros(2, 3), [], numbers, 1.0, None, *rest)
    with pytest.raises(ValueError, match="coefficients must have three numbers for each step, got 2"):
        UPDATE([torch.zeros(3, 3)], torch.zeros(1, 3, 3), [], [1.0, 2.0], 1.0, None, *rest)
    shared = torch.zeros(1, 3, 3)
    with pytest.raises(ValueError, match=r"newton_schulz_update_: .* share memory"):
        UPDATE([shared[0]], shared, [], numbers, 1.0, None, *rest)


# --- with adamw_, in one step ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend):
    ops.use_backend(backend)

    def step(params, grads, exp_avgs, exp_avg_sqs):
        ops.adamw_(params, grads, exp_avgs, exp_avg_sqs, step=2, **ADAMW)
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
    """They are read at every call, not when the graph is traced. A captured CUDA graph depends on it."""
    ops.use_backend(backend)
    graphs = []

    def count_graphs(graph, inputs):
        graphs.append(graph)
        return graph

    def step(params, grads, exp_avgs, exp_avg_sqs, t, lr, momentum):
        settings = ADAMW | {"lr": lr, "stochastic_rounding": True, "cautious": True}
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
def test_values_of_fake_tensors_are_not_read(backend):
    ops.use_backend(backend)
    with FakeTensorMode():
        lists = state([(4, 6)])
        ops.adamw_(*lists, step=number(1), **(ADAMW | {"lr": number(0.1), "weight_decay": number(0.1)}))
        update, norms = ops.muon_momentum_(lists[1], lists[2], momentum=number(0.9), return_norm=True)
        ops.muon_update_(lists[0], update, lr=number(0.1))
    assert (update.shape, norms.shape, norms.dtype) == ((1, 4, 6), (1,), torch.float64)
