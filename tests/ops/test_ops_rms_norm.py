"""rms_norm, add_rms_norm, embedding_rms_norm: kernel against reference and formula, gradients, bits, bad input."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, module_of, use
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat_native import ops
from nanochat_native.ops import reference

OPERATOR = torch.ops.nanochat_native.rms_norm.default
BACKWARD = torch.ops.nanochat_native.rms_norm_backward.default
EMBEDDING = torch.ops.nanochat_native.embedding_rms_norm.default

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SIZES = (1, 3, 7, 8, 16, 17, 64, 255, 768, 1280)  # around one and four vectors of every instruction set
EPS = 2**-23
ROUNDING = {torch.float64: 2e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def formula(x, eps=EPS):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def assert_near(mine, expected, tolerance):
    """Compare each row relative to the largest number of its expected row."""
    assert mine.shape == expected.shape
    mine, expected = mine.detach().double(), expected.detach().double()
    bound = tolerance * (expected.abs().amax(-1, keepdim=True) + 1e-30)
    assert ((mine - expected).abs() <= bound).all(), (mine - expected).abs().max()


def inputs(N, C, dtype, count):
    return [torch.randn(N, C, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(count)]


# --- values and gradients ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", SIZES)
def test_rms_norm_is_its_formula(C, dtype, backend):
    use(backend)
    (x,) = inputs(5, C, dtype, 1)
    dy = torch.randn(5, C).to(dtype)
    y = ops.rms_norm(x)
    exact_x = x.detach().double().requires_grad_()
    exact = formula(exact_x)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_near(y, exact, ROUNDING[dtype])
    (dx,) = torch.autograd.grad(y, x, dy)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
    assert dx.dtype == dtype
    if C > 1:  # of one channel the gradient is about eps: a difference of rounded numbers
        assert_near(dx, exact_dx, (4 if dtype == torch.bfloat16 else 16) * ROUNDING[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", SIZES)
def test_add_rms_norm_is_its_formula(C, dtype, backend):
    use(backend)
    tensors = inputs(5, C, dtype, 2)
    dsum, dy = (torch.randn(5, C).to(dtype) for _ in range(2))
    results = ops.add_rms_norm(*tensors)
    assert torch.equal(results[0], tensors[0] + tensors[1])
    # The norm is that of the rounded sum.
    exact_sum = results[0].detach().double().requires_grad_()
    exact = formula(exact_sum)
    assert_near(results[1], exact, ROUNDING[dtype])
    (exact_dx,) = torch.autograd.grad((1 * exact_sum, exact), exact_sum, (dsum.double(), dy.double()))
    for gradient in torch.autograd.grad(results, tensors, (dsum, dy)):
        assert gradient.dtype == dtype
        assert_near(gradient, exact_dx, (4 if dtype == torch.bfloat16 else 16) * ROUNDING[dtype])


@given(N=st.integers(0, 9), C=st.integers(1, 90), dtype=st.sampled_from(DTYPES), residual=st.booleans())
def test_any_shape_matches_the_reference(N, C, dtype, residual):
    """The kernel and the reference round the same sums, so they agree within one rounding."""
    tensors = inputs(N, C, dtype, 1 + residual)
    douts = [torch.randn(N, C).to(dtype) for _ in range(1 + residual)]
    name = "add_rms_norm" if residual else "rms_norm"
    ours, theirs = getattr(ops, name)(*tensors), getattr(reference, name)(*tensors)
    ours, theirs = ([out] if isinstance(out, Tensor) else out for out in (ours, theirs))
    for mine, other in zip(
        (*ours, *torch.autograd.grad(ours, tensors, douts)),
        (*theirs, *torch.autograd.grad(theirs, tensors, douts)),
        strict=True,
    ):
        assert mine.dtype == other.dtype == dtype
        torch.testing.assert_close(mine, other, atol=8 * ROUNDING[dtype], rtol=2 * ROUNDING[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("table_dtype", "dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("C", [1, 17, 100])
def test_embedding_rms_norm_is_a_lookup_and_a_norm(C, table_dtype, dtype, backend):
    use(backend)
    table = torch.randn(11, C, dtype=torch.float64).to(table_dtype).requires_grad_()
    tokens = torch.tensor([[3, 10, 0], [3, 3, 7]])
    dy = torch.randn(2, 3, C).to(dtype)
    y = ops.embedding_rms_norm(tokens, table, dtype)
    composed = ops.rms_norm(F.embedding(tokens, table).to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, composed)
    (dtable,) = torch.autograd.grad(y, table, dy)
    assert dtable.dtype == table_dtype
    assert torch.equal(dtable, *torch.autograd.grad(composed, table, dy))
    assert torch.count_nonzero(dtable[[1, 2, 4, 5, 6, 8, 9]]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_without_a_gradient_adds_none(backend):
    use(backend)
    x, residual = inputs(4, 9, torch.float64, 2)
    dout = torch.randn(4, 9, dtype=torch.float64)
    summed, y = ops.add_rms_norm(x, residual)
    assert torch.equal(torch.autograd.grad(summed, x, dout, retain_graph=True)[0], dout)
    (dx,) = torch.autograd.grad(y, x, dout)
    torch.testing.assert_close(dx, *torch.autograd.grad(ops.rms_norm(x + residual), x, dout))
    x = x.detach()
    (dresidual,) = torch.autograd.grad(ops.add_rms_norm(x, residual)[1], residual, dout)
    assert torch.equal(dresidual, dx)
    doubled = ops.add_rms_norm(residual, residual)[1]  # one tensor as both
    torch.testing.assert_close(
        *torch.autograd.grad(doubled, residual, dout), *torch.autograd.grad(formula(2 * residual), residual, dout)
    )


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [EPS, 0.5])
def test_gradcheck_of_two_derivatives(eps, backend):
    use(backend)
    x, residual = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    table = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[4, 1, 1], [0, 4, 4]])
    for function, arguments in (
        (lambda x: ops.rms_norm(x, eps=eps), (x,)),
        (lambda x, residual: ops.add_rms_norm(x, residual, eps=eps), (x, residual)),
        (lambda table: ops.embedding_rms_norm(tokens, table, torch.float64, eps=eps), (table,)),
    ):
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


def test_a_second_derivative_warns_and_a_first_does_not(recwarn, monkeypatch):
    monkeypatch.setattr(ops.backends, "warned", set())
    x = torch.randn(3, 5, requires_grad=True)
    ops.rms_norm(x).sum().backward()
    assert not recwarn.list
    torch.autograd.grad(ops.rms_norm(x).sum(), x, create_graph=True)
    (warning,) = recwarn.list
    assert "rms_norm on cpu is served by plain torch: its kernel does not support second" in str(warning.message)


def test_the_gradient_keeps_the_result_and_a_number_for_each_row():
    kept = []
    x, residual = inputs(4, 9, torch.float32, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        summed, y = ops.add_rms_norm(x, residual)
    assert [tuple(tensor.shape) for tensor in kept] == [(4, 9), (4,)]
    assert kept[0].data_ptr() == y.data_ptr() != summed.data_ptr()


def test_float64_on_cuda_has_no_kernel():
    unsupported = module_of("rms_norm")._unsupported
    with FakeTensorMode():
        single, double = (torch.empty(2, 3, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.float64))
        reasons = [
            unsupported(*args) for args in ((single, single.dtype), (single, double.dtype), (double, single.dtype))
        ]
        assert reasons == ["", *["its kernels take float32 and bfloat16, not float64"] * 2]
        assert unsupported(double.cpu(), double.dtype) == ""


# --- special rows ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_small_zero_and_wrong_rows_stay_apart(dtype, backend):
    """A row that overflows or holds a NaN or an infinity changes no other row."""
    use(backend)
    C = 40
    x = torch.randn(8, C, dtype=torch.float64).to(dtype)
    ordinary = ops.rms_norm(x)
    x[1] *= 1e18  # its squares have a finite sum
    x[2] *= 1e-18
    x[3] = 0
    x[4, 39] = math.nan
    x[5, 3] = math.inf
    x[6] = 1e200 if dtype == torch.float64 else 1e25  # its squares have none
    x.requires_grad_()
    y = ops.rms_norm(x)
    assert torch.equal(y[0], ordinary[0])
    assert torch.equal(y[7], ordinary[7])
    assert_near(y[1], formula(x[1].double()), 4 * ROUNDING[dtype])
    assert_near(y[2], x[2].double() * EPS**-0.5, 4 * ROUNDING[dtype])
    assert torch.count_nonzero(y[3]) == 0
    assert y[4].isnan().all()
    assert y[5, 3].isnan()
    assert torch.count_nonzero(y[5]) == 1
    assert torch.count_nonzero(y[6]) == 0
    dy = torch.randn(8, C, dtype=torch.float64).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx[[0, 1, 2, 3, 6, 7]].isfinite().all()
    assert dx[4].isnan().all()
    assert_near(dx[3], dy[3].double() * EPS**-0.5, 4 * ROUNDING[dtype])
    if backend == "native":
        with ops.use_backend("torch"):
            torch.testing.assert_close(y, ops.rms_norm(x), atol=0, rtol=4 * ROUNDING[dtype], equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_is_within_the_root(backend):
    use(backend)
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(ops.rms_norm(x, eps=3.5), x / 4)
    torch.testing.assert_close(ops.add_rms_norm(x, x, eps=14)[1], x / 4)
    torch.testing.assert_close(ops.embedding_rms_norm(torch.tensor([1, 0]), x, x.dtype, eps=3.5), x.flip(0) / 4)
    assert ops.rms_norm(x, eps=0.0)[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (2, 3, 4, 5)], ids=str)
def test_leading_dimensions_and_no_rows(shape, backend):
    use(backend)
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    summed, y = ops.add_rms_norm(x, residual)
    torch.testing.assert_close(y, formula(summed))
    assert ops.rms_norm(x).shape == summed.shape == shape
    (dx,) = torch.autograd.grad(y.sum() + summed.sum(), x)
    assert dx.shape == shape
    table = torch.randn(3, 5, requires_grad=True)
    tokens = torch.zeros(shape[:-1], dtype=torch.int64)
    z = ops.embedding_rms_norm(tokens, table, torch.float32)
    assert z.shape == shape
    assert torch.autograd.grad(z.sum(), table)[0].shape == (3, 5)


# --- bits ---


def every_result(dtype, N=70, C=1000):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    x, residual, dsum, dy, table = random(N, C), random(N, C), random(N, C), random(N, C), random(50, C)
    summed, y, r = OPERATOR(x, residual, EPS)
    tokens = torch.randint(0, 50, (N,), generator=generator)
    return [summed, y, r, BACKWARD(dy, dsum, y, r), BACKWARD(dy, None, y, r), *EMBEDDING(tokens, table, dtype, EPS)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time_and_for_every_number_of_threads(dtype):
    torch.set_num_threads(1)
    first = every_result(dtype)
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, every_result(dtype), first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", SIZES)
def test_fused_and_separate_calls_have_the_same_bits(C, dtype):
    x, residual = (tensor.detach() for tensor in inputs(6, C, dtype, 2))
    summed, y = ops.add_rms_norm(x, residual)
    assert torch.equal(summed, x + residual)
    assert torch.equal(y, ops.rms_norm(x + residual))
    assert torch.equal(ops.embedding_rms_norm(torch.arange(6), x, dtype), ops.rms_norm(x))


def test_strides():
    x, residual, dsum, dy = (torch.randn(4, 17, 6).transpose(1, 2) for _ in range(4))
    packed = [tensor.contiguous() for tensor in (x, residual, dsum, dy)]
    assert not x.is_contiguous()
    results, expected = OPERATOR(x, residual, EPS), OPERATOR(*packed[:2], EPS)
    assert all(map(torch.equal, results, expected))
    _, y, r = expected
    strided_y, strided_r = y.mT.contiguous().mT, torch.stack((r, r), -1)[..., 0]
    assert torch.equal(BACKWARD(dy, dsum, strided_y, strided_r), BACKWARD(packed[3], packed[2], y, r))
    one = torch.ones(()).expand(4, 6, 17)  # what sum().backward() passes
    assert torch.equal(BACKWARD(one, None, y, r), BACKWARD(one.contiguous(), None, y, r))
    tokens, table = torch.tensor([[3, 0], [1, 2]]).T, torch.randn(5, 4).T
    assert all(
        map(
            torch.equal,
            EMBEDDING(tokens, table, torch.float32, EPS),
            EMBEDDING(tokens.contiguous(), table.contiguous(), torch.float32, EPS),
        )
    )


def test_opcheck():
    for dtype in DTYPES:
        x, residual = inputs(3, 5, dtype, 2)
        tokens, table = torch.tensor([[0, 2], [2, 1]]), torch.randn(3, 5, requires_grad=True)
        torch.library.opcheck(OPERATOR, (x, None, EPS))
        torch.library.opcheck(OPERATOR, (x, residual, EPS))
        torch.library.opcheck(EMBEDDING, (tokens, table, dtype, EPS))
        _, y, r = (tensor.detach() for tensor in OPERATOR(x, residual, EPS))
        torch.library.opcheck(BACKWARD, (x.detach(), None, y, r))
        torch.library.opcheck(BACKWARD, (x.detach(), residual.detach(), y, r))


# --- bad input ---


def call(name, *args, **options):
    return lambda: getattr(ops, name)(*args, **options)


X, TABLE, TOKENS = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([[0, 3]])
BAD = [
    (call("rms_norm", torch.zeros(())), ValueError, r"rms_norm: x must have shape \(\.\.\., C\) with C >= 1, got \(\)"),
    (call("rms_norm", torch.zeros(2, 0)), ValueError, r"rms_norm: x must have shape .*, got \(2, 0\)"),
    (call("rms_norm", X.half()), TypeError, "rms_norm: x must be torch.float32 or .*, got torch.float16"),
    (call("rms_norm", X.long()), TypeError, "rms_norm: x must be torch.float32 or .*, got torch.int64"),
    (call("rms_norm", X, eps=-1.0), ValueError, "rms_norm: eps must be >= 0, got -1.0"),
    (call("rms_norm", X, eps=math.nan), ValueError, "rms_norm: eps must be >= 0, got nan"),
    (call("add_rms_norm", X[:, :0], X), ValueError, r"add_rms_norm: x must have shape .*, got \(2, 0\)"),
    (call("add_rms_norm", X, X.T), ValueError, r"add_rms_norm: residual must have shape \(2, 3\) like x, got \(3, 2\)"),
    (call("add_rms_norm", X, X[0]), ValueError, r"add_rms_norm: residual must have shape \(2, 3\) like x, got \(3,\)"),
    (call("add_rms_norm", X, X.double()), TypeError, "add_rms_norm: residual must be torch.float32 like x, got torch"),
    (call("add_rms_norm", X, X.to("meta")), ValueError, "add_rms_norm: residual must be on cpu like x, got meta"),
    (call("add_rms_norm", X, X, eps=-1.0), ValueError, "add_rms_norm: eps must be >= 0, got -1.0"),
    (
        call("embedding_rms_norm", TOKENS, X[0], X.dtype),
        ValueError,
        r"embedding_rms_norm: table must have shape \(V, C\) with V, C >= 1, got \(3,\)",
    ),
    (
        call("embedding_rms_norm", TOKENS, X[:0], X.dtype),
        ValueError,
        r"embedding_rms_norm: table must have shape .*, got \(0, 3\)",
    ),
    (call("embedding_rms_norm", TOKENS, TABLE.half(), X.dtype), TypeError, "embedding_rms_norm: table must be .*16"),
    (call("embedding_rms_norm", TOKENS.int(), TABLE, X.dtype), TypeError, "embedding_rms_norm: tokens must be .*int32"),
    (
        call("embedding_rms_norm", TOKENS.to("meta"), TABLE, X.dtype),
        ValueError,
        "embedding_rms_norm: tokens must be on cpu like table, got meta",
    ),
    (
        call("embedding_rms_norm", TOKENS, TABLE, torch.float16),
        TypeError,
        "embedding_rms_norm: dtype must be .*, got torch.float16",
    ),
    (call("embedding_rms_norm", TOKENS, TABLE, X.dtype, eps=-1.0), ValueError, "embedding_rms_norm: eps must be >= 0"),
    (
        call("embedding_rms_norm", TOKENS + 1, TABLE, X.dtype),
        ValueError,
        "embedding_rms_norm: tokens must be from 0 to 3, got 4",
    ),
    (
        call("embedding_rms_norm", TOKENS - 1, TABLE, X.dtype),
        ValueError,
        "embedding_rms_norm: tokens must be from 0 to 3, got -1",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_arguments(wrong, error, message, backend):
    use(backend)
    with pytest.raises(error, match=message):
        wrong()


Y, R = torch.zeros(2, 3), torch.zeros(2)
BAD_DIRECT = [
    (lambda: OPERATOR(X[:, :0], None, EPS), ValueError, r"rms_norm: x must have shape \(\.\.\., C\), C at least 1"),
    (lambda: OPERATOR(X.half(), None, EPS), TypeError, "rms_norm: x must have one of the dtypes"),
    (lambda: OPERATOR(X, None, -1.0), ValueError, "rms_norm: eps must be at least 0, got -1"),
    (lambda: OPERATOR(X, X.T, EPS), ValueError, r"rms_norm: residual must have shape \[2, 3\], got \[3, 2\]"),
    (lambda: OPERATOR(X, X.double(), EPS), TypeError, "rms_norm: residual must have dtype Float, got Double"),
    (lambda: BACKWARD(X[0], None, Y, R), ValueError, "rms_norm_backward: dy must have shape"),
    (lambda: BACKWARD(X, X[:1], Y, R), ValueError, "rms_norm_backward: dsum must have shape"),
    (lambda: BACKWARD(X, X.double(), Y, R), TypeError, "rms_norm_backward: dsum must have dtype Float"),
    (lambda: BACKWARD(X, None, Y, R[:1]), ValueError, r"rms_norm_backward: r must have shape \[2\], got \[1\]"),
    (lambda: BACKWARD(X, None, Y, R.double()), TypeError, "rms_norm_backward: r must have dtype Float, got Double"),
    (lambda: BACKWARD(X, None, Y.half(), R), TypeError, "rms_norm_backward: y must have one of the dtypes"),
    (lambda: EMBEDDING(TOKENS, X[0], X.dtype, EPS), ValueError, "embedding_rms_norm: table must have the shape"),
    (lambda: EMBEDDING(TOKENS, TABLE.half(), X.dtype, EPS), TypeError, "embedding_rms_norm: table must have one of"),
    (lambda: EMBEDDING(TOKENS, TABLE, torch.half, EPS), TypeError, "embedding_rms_norm: dtype must have one of"),
    (lambda: EMBEDDING(TOKENS.int(), TABLE, X.dtype, EPS), TypeError, "embedding_rms_norm: tokens must have dtype"),
    (lambda: EMBEDDING(TOKENS, TABLE, X.dtype, -1.0), ValueError, "embedding_rms_norm: eps must be at least 0"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD_DIRECT)
def test_the_binding_checks_too(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()
