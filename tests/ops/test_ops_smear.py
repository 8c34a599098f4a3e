"""smear: kernel against reference and formula, gradients, bits, strides, bad input."""

import math

import pytest
import torch
from backends import BACKENDS, use
from hypothesis import given
from hypothesis import strategies as st

from nanochat_native import ops
from nanochat_native.ops import reference

OPERATOR = torch.ops.nanochat_native.smear.default
BACKWARD = torch.ops.nanochat_native.smear_backward.default

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# T, C, I: one token, around a vector of every instruction set, more rows than a block of the sums, and the model's.
SIZES = ((1, 5, 2), (2, 1, 1), (3, 24, 24), (70, 17, 3), (5, 100, 64), (130, 256, 24))
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-8}


def formula(x, gate, smear_lambda):
    out = [x[:, 0]]
    for t in range(1, x.size(1)):
        sigmoid = 1 / (1 + (-(x[:, t, : gate.size(1)] * gate[0]).sum(-1, keepdim=True)).exp())
        out.append(x[:, t] + smear_lambda * sigmoid * x[:, t - 1])
    return torch.stack(out, 1)


def problem(B, sizes, dtype, seed=0):
    """Return x, gate and smear_lambda, which require gradients, and the gradient of the result."""
    (T, C, I), generator = sizes, torch.Generator().manual_seed(seed)  # noqa: E741

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [random(B, T, C).to(dtype), (random(1, I) * I**-0.5).to(wide), torch.tensor([0.7], dtype=wide)]
    return [x.requires_grad_() for x in inputs], random(B, T, C).to(dtype)


def assert_near(mine, expected, tolerance):
    """Compare relative to the largest number of the expected tensor."""
    assert mine.shape == expected.shape
    difference = (mine.detach().double() - expected.detach().double()).abs()
    assert (difference <= tolerance * (expected.abs().max() + 1e-30)).all(), difference.max()


# --- values and gradients ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_match_the_formula(sizes, dtype, backend):
    use(backend)
    inputs, dout = problem(3, sizes, dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = formula(*wide)
    out = ops.smear(*inputs)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert ((out.double() - exact).abs() <= ROUNDING[dtype] * (1 + exact.abs())).all()
    grads = torch.autograd.grad(out, inputs, dout)
    exact_grads = torch.autograd.grad(exact, wide, dout.double(), allow_unused=True)  # one token has no gate
    for x, grad, exact_grad in zip(inputs, grads, exact_grads, strict=True):
        assert grad.dtype == x.dtype
        assert_near(grad, torch.zeros_like(grad) if exact_grad is None else exact_grad, 4 * ROUNDING[x.dtype])


@given(
    B=st.integers(0, 3),
    T=st.integers(1, 9),
    C=st.integers(1, 90),
    I=st.integers(1, 64),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_matches_the_reference(B, T, C, I, dtype):  # noqa: E741
    inputs, dout = problem(B, (T, C, min(C, I)), dtype)
    results = [(out, *torch.autograd.grad(out, inputs, dout)) for out in (ops.smear(*inputs), reference.smear(*inputs))]
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        if other.numel():
            assert_near(mine, other, 4 * ROUNDING[other.dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_do_not_touch_each_other(backend):
    use(backend)
    (x, gate, smear_lambda), dout = problem(3, (4, 30, 24), torch.float32)
    out = ops.smear(x, gate, smear_lambda)
    (dx,) = torch.autograd.grad(out, x, dout)
    for b in range(3):
        own = x[b : b + 1].detach().requires_grad_()
        alone = ops.smear(own, gate, smear_lambda)
        torch.testing.assert_close(alone[0], out[b])
        torch.testing.assert_close(torch.autograd.grad(alone, own, dout[b : b + 1])[0][0], dx[b])
    assert torch.equal(out[:, 0], x[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_lambda_0_changes_nothing_and_has_a_gradient(backend):
    """It is nanochat's first value."""
    use(backend)
    (x, gate, smear_lambda), dout = problem(2, (5, 30, 24), torch.float32)
    with torch.no_grad():
        smear_lambda.zero_()
    out = ops.smear(x, gate, smear_lambda)
    assert torch.equal(out, x)
    dx, dgate, dlambda = torch.autograd.grad(out, (x, gate, smear_lambda), dout)
    assert torch.equal(dx, dout)
    assert torch.count_nonzero(dgate) == 0
    sigmoids = torch.sigmoid(x[:, 1:, :24] @ gate.mT)
    torch.testing.assert_close(dlambda, (sigmoids * dout[:, 1:] * x[:, :-1]).sum()[None])


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_two_derivatives(backend):
    use(backend)
    inputs, _ = problem(2, (4, 5, 3), torch.float64)
    assert torch.autograd.gradcheck(ops.smear, inputs)
    assert torch.autograd.gradgradcheck(ops.smear, inputs)


def test_the_gradient_keeps_the_arguments_alone():
    kept = []
    inputs, _ = problem(2, (4, 8, 3), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ops.smear(*inputs)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in inputs]


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_gates_saturate_and_nan_stays_in_its_pair(backend):
    use(backend)
    x, gate = torch.randn(1, 6, 7), torch.tensor([[1.0, 0.0]])
    x[0, 1, 0], x[0, 2, 0], x[0, 4, 3] = 1e4, -1e4, math.nan
    out = ops.smear(x, gate, torch.tensor([0.5]))
    torch.testing.assert_close(out[0, 1], x[0, 1] + 0.5 * x[0, 0])
    assert torch.equal(out[0, 2], x[0, 2])
    assert out.isnan().nonzero().tolist() == [[0, 4, 3], [0, 5, 3]]


# --- bits ---


def every_result(dtype):
    inputs, dout = problem(3, (90, 200, 24), dtype)
    x, gate, smear_lambda = (tensor.detach() for tensor in inputs)
    return [OPERATOR(x, gate, smear_lambda), *BACKWARD(dout, x, gate, smear_lambda)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time_and_for_every_number_of_threads(dtype):
    torch.set_num_threads(1)
    first = every_result(dtype)
    for threads in (2, 3, 5, 2):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, every_result(dtype), first))


def test_strides():
    inputs, dout = problem(3, (4, 6, 5), torch.float32)
    packed = [x.detach() for x in inputs]
    x, gate, smear_lambda = packed
    room = torch.full((1, 10), math.nan)
    room[:, ::2] = gate
    others = [x.transpose(0, 1).contiguous().transpose(0, 1), room[:, ::2], smear_lambda]
    assert torch.equal(OPERATOR(*others), OPERATOR(*packed))
    strided = dout.mT.contiguous().mT
    assert all(map(torch.equal, BACKWARD(strided, *others), BACKWARD(dout, *packed)))
    one = torch.ones(()).expand(x.shape)  # what sum().backward() passes
    assert all(map(torch.equal, BACKWARD(one, *packed), BACKWARD(one.contiguous(), *packed)))


def test_opcheck():
    for dtype in DTYPES:
        inputs, dout = problem(2, (3, 5, 3), dtype)
        torch.library.opcheck(OPERATOR, tuple(inputs))
        torch.library.opcheck(BACKWARD, (dout, *(x.detach() for x in inputs)))


# --- bad input ---

GOOD = {"x": torch.zeros(2, 3, 7), "gate": torch.zeros(1, 5), "smear_lambda": torch.zeros(1)}
BAD = [
    ("x", torch.zeros(3, 7), ValueError, r"must have shape \(B, T, C\) with T, C >= 1, got \(3, 7\)"),
    ("x", torch.zeros(2, 0, 7), ValueError, r"must have shape .*, got \(2, 0, 7\)"),
    ("x", GOOD["x"].half(), TypeError, "must be torch.float32 or .*, got torch.float16"),
    ("gate", torch.zeros(1, 8), ValueError, r"must have shape \(1, I\) with I from 1 to 7, got \(1, 8\)"),
    ("gate", torch.zeros(2, 5), ValueError, r"must have shape .*, got \(2, 5\)"),
    ("gate", torch.zeros(1, 0), ValueError, r"must have shape .*, got \(1, 0\)"),
    ("gate", GOOD["gate"].bfloat16(), TypeError, "must be torch.float32, got torch.bfloat16"),
    ("gate", GOOD["gate"].to("meta"), ValueError, "must be on cpu like x, got meta"),
    ("smear_lambda", torch.zeros(()), ValueError, r"must have shape \(1,\), got \(\)"),
    ("smear_lambda", torch.zeros(2), ValueError, r"must have shape \(1,\), got \(2,\)"),
    ("smear_lambda", torch.zeros(1).double(), TypeError, "must be torch.float32, got torch.float64"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_bad_arguments(name, value, error, message, backend):
    use(backend)
    with pytest.raises(error, match=f"^smear: {name} {message}"):
        ops.smear(*(GOOD | {name: value}).values())


def test_a_gate_reads_at_most_64_channels():
    with pytest.raises(ValueError, match=r"smear: gate must have shape \(1, I\) with I from 1 to 64, got \(1, 65\)"):
        ops.smear(torch.zeros(1, 2, 70), torch.zeros(1, 65), torch.zeros(1))
    with pytest.raises(ValueError, match=r"smear: gate must have shape \(1, I\), I from 1 to 64, got \[1, 65\]"):
        OPERATOR(torch.zeros(1, 2, 70), torch.zeros(1, 65), torch.zeros(1))


BAD_DIRECT = [
    ("x", torch.zeros(3, 7), ValueError, r"must have shape \(B, T, C\), T and C at least 1, got \[3, 7\]"),
    ("x", torch.zeros(2, 0, 7), ValueError, "must have shape"),
    ("x", GOOD["x"].half(), TypeError, "must have one of the dtypes"),
    ("gate", torch.zeros(1, 8), ValueError, r"must have shape \(1, I\), I from 1 to 7, got \[1, 8\]"),
    ("gate", torch.zeros(2, 5), ValueError, "must have shape"),
    ("gate", torch.zeros(5), ValueError, "must have shape"),
    ("gate", GOOD["gate"].double(), TypeError, "must have dtype Float, got Double"),
    ("smear_lambda", torch.zeros(2), ValueError, r"must have shape \[1\], got \[2\]"),
    ("smear_lambda", torch.zeros(1).double(), TypeError, "must have dtype Float, got Double"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_DIRECT)
def test_the_binding_checks_too(name, value, error, message):
    values = (GOOD | {name: value}).values()
    with pytest.raises(error, match=f"^smear: {name} {message}"):
        OPERATOR(*values)
    with pytest.raises(error, match=f"^smear_backward: {name} {message}"):
        BACKWARD(GOOD["x"], *values)


def test_the_binding_checks_the_incoming_gradient():
    with pytest.raises(ValueError, match=r"smear_backward: dout must have shape \[2, 3, 7\], got \[2, 3, 6\]"):
        BACKWARD(torch.zeros(2, 3, 6), *GOOD.values())
    with pytest.raises(TypeError, match="smear_backward: dout must have dtype Float, got Double"):
        BACKWARD(GOOD["x"].double(), *GOOD.values())
