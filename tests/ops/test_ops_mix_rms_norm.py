"""mix_rms_norm: kernel against reference and formula, gradients, the chain of x0, bits, bad input."""

import itertools
import math

import pytest
import torch
from backends import BACKENDS, module_of, use
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nanochat_native import ops
from nanochat_native.ops import reference

OPERATOR = torch.ops.nanochat_native.mix_rms_norm.default
BACKWARD = torch.ops.nanochat_native.mix_rms_norm_backward.default

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SIZES = (1, 3, 7, 8, 16, 17, 64, 255, 768, 1280)  # around one and four vectors of every instruction set
EPS = 2**-23
ROUNDING = {torch.float64: 2e-15, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def streams(count, N, C, dtype):
    return [torch.randn(N, C, dtype=torch.float64).to(dtype) for _ in range(count)]


def factors(dtype):
    """Return x_scale and x0_scale, of two shapes."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.tensor(1.1, dtype=dtype), torch.tensor([-0.3], dtype=dtype)]


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def norm_formula(x, eps=EPS):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def formula(z, x0, x_scale, x0_scale):
    """Return all results for z = x + residual; x0 is a new tensor."""
    mixed = x_scale.reshape(()) * z + x0_scale.reshape(()) * x0
    return 1 * z, mixed, norm_formula(mixed), 1 * x0


def assert_near(mine, expected, tolerance, smallest=1e-30):
    """Compare each row relative to the largest number of its expected row, or to `smallest` if that is larger."""
    assert mine.shape == expected.shape
    mine, expected = mine.detach().double(), expected.detach().double()
    bound = tolerance * expected.abs().amax(-1, keepdim=True).clamp(min=smallest)
    assert ((mine - expected).abs() <= bound).all(), (mine - expected).abs().max()


# --- values and gradients ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", SIZES)
def test_mix_rms_norm_is_its_formula(C, dtype, residual, backend):
    use(backend)
    x, added, x0, *douts = streams(7, 5, C, dtype)
    x, added, x0, *scales = leaves(x, added, x0, *factors(dtype))
    z, mixed, y, x0_again = results = ops.mix_rms_norm(x, added if residual else None, x0, *scales)
    assert all(result.dtype == dtype and result.is_contiguous() for result in results)
    assert torch.equal(z, x + added if residual else x)
    assert torch.equal(x0_again, x0)
    # What is mixed is the rounded z, and what is normalised is the rounded mix.
    exact_inputs = leaves(*(tensor.double() for tensor in (z, x0, *scales)))
    exact = formula(*exact_inputs)
    assert_near(mixed, exact[1], ROUNDING[dtype])
    assert_near(y, norm_formula(mixed.double()), ROUNDING[dtype])

    gradients = torch.autograd.grad(results, (x, x0, *scales), douts, retain_graph=residual)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, [dout.double() for dout in douts])
    if residual:
        (dresidual,) = torch.autograd.grad(results, added, douts)
        assert torch.equal(dresidual, gradients[0])
    tolerance = (8 if dtype == torch.bfloat16 else 32) * ROUNDING[dtype]
    for mine, expected, like in zip(gradients, exact_gradients, (x, x0, *scales), strict=True):
        assert (mine.dtype, mine.shape) == (like.dtype, like.shape)
        if C > 1:  # of one channel the gradient of the norm is about eps: a difference of rounded numbers
            size = 1.0 if like.dim() > 1 else 4 * C**0.5  # the terms of the gradient of a factor cancel
            assert_near(torch.atleast_1d(mine), torch.atleast_1d(expected), tolerance, size)


@given(
    N=st.integers(0, 9),
    C=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
    used=st.tuples(*[st.booleans()] * 4).filter(any),
)
def test_any_shape_and_any_gradients_match_the_reference(N, C, dtype, residual, used):
    """`used` says which of the results have a gradient."""
    x, added, x0, *douts = streams(7, N, C, dtype)
    inputs = leaves(x, x0, *factors(dtype), added)
    found = []
    for mix in (ops.mix_rms_norm, reference.mix_rms_norm):
        results = mix(inputs[0], inputs[4] if residual else None, *inputs[1:4])
        taken, given = (list(itertools.compress(tensors, used)) for tensors in (results, douts))
        found.append([*results, *torch.autograd.grad(taken, inputs, given, allow_unused=True)])
    for mine, other in zip(*found, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.dtype == other.dtype
            atol = (8 if mine.dim() > 1 else 8 * N * C**0.5) * ROUNDING[dtype]
            torch.testing.assert_close(mine, other, atol=atol, rtol=4 * ROUNDING[dtype])


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [EPS, 0.5])
def test_gradcheck_of_two_derivatives(eps, backend):
    use(backend)
    x, residual, x0 = leaves(*torch.randn(3, 2, 3, 5, dtype=torch.float64))
    scales = leaves(*factors(torch.float64))
    for function, arguments in (
        (lambda *inputs: ops.mix_rms_norm(*inputs, eps=eps), (x, residual, x0, *scales)),
        (lambda x, *others: ops.mix_rms_norm(x, None, *others, eps=eps), (x, x0, *scales)),
        (lambda x, *scales: ops.mix_rms_norm(x, None, x, *scales, eps=eps)[2], (x, *scales)),  # one tensor as both
    ):
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


def test_a_second_derivative_warns_and_a_first_does_not(recwarn, monkeypatch):
    monkeypatch.setattr(ops.backends, "warned", set())
    x, x0 = leaves(*torch.randn(2, 3, 5))
    scales = factors(x.dtype)
    sum(out.sum() for out in ops.mix_rms_norm(x, None, x0, *scales)).backward()
    assert not recwarn.list
    torch.autograd.grad(ops.mix_rms_norm(x, None, x0, *scales)[2].sum(), x, create_graph=True)
    (warning,) = recwarn.list
    assert "mix_rms_norm on cpu is served by plain torch: its kernel does not support second" in str(warning.message)


def test_the_gradient_keeps_neither_the_mix_nor_the_terms_of_the_sum():
    kept = []
    x, residual, x0, *scales = leaves(*streams(3, 4, 9, torch.float32), *factors(torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        z, _, y, _ = ops.mix_rms_norm(x, residual, x0, *scales)
    assert [tensor.data_ptr() for tensor in kept] == [
        y.data_ptr(),
        kept[1].data_ptr(),
        *(tensor.data_ptr() for tensor in (z, x0, *scales)),
    ]
    assert kept[1].shape == (4,)


def test_float64_on_cuda_has_no_kernel():
    unsupported = module_of("mix_rms_norm")._unsupported
    with FakeTensorMode():
        single, double = (torch.empty(2, 3, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.float64))
        assert unsupported(single, None, single) == ""
        assert unsupported(double, None, double) == "its kernels take float32 and bfloat16, not float64"
        assert unsupported(double.cpu(), None, double.cpu()) == ""


# --- the chain of x0 ---


def blocks(x, x0, scales, block=lambda run, *inputs: run(*inputs)):
    """Return a result of several calls with something between them. `block` runs each of them."""

    def one(x, residual, x0, x_scale, x0_scale):
        z, mixed, y, x0 = ops.mix_rms_norm(x, residual, x0, x_scale, x0_scale)
        return mixed, (y * y.roll(1, -1)).to(y.dtype), z, x0

    residual = None
    for x_scale, x0_scale in scales:
        x, residual, z, x0 = block(one, x, residual, x0, x_scale, x0_scale)
    return ops.mix_rms_norm(z, residual, x, *scales[0])[2]


def chain(dtype, layers=3):
    x, x0, dy = streams(3, 6, 40, dtype)
    return *leaves(x, x0), [leaves(*factors(dtype)) for _ in range(layers)], dy


class Calls(TorchDispatchMode):
    """Records the names of the operators that run on whole streams."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        outs = out if isinstance(out, tuple) else (out,)
        if any(isinstance(tensor, torch.Tensor) and tensor.numel() == self.numel for tensor in outs):
            self.names.append(function.overloadpacket.__name__)
        return out


def test_the_gradients_of_x0_are_added_by_the_kernel():
    """Neither the parts of all calls nor the gradients of z and mixed are added by torch."""
    x, y, x0, *scales = leaves(*streams(3, 4, 9, torch.float32), *factors(torch.float32))
    inputs = x, y, x0, *scales
    for _ in range(3):
        _, x, y, x0 = ops.mix_rms_norm(x, y, x0, *scales)
    dy = torch.randn(4, 9)
    with Calls(x.numel()) as calls:
        torch.autograd.grad(y, inputs, dy)
    assert [name for name in calls.names if name != "detach"] == ["mix_rms_norm_backward"] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chain_has_the_gradient_of_calls_that_share_x0(dtype, backend):
    use(backend)
    x, x0, scales, dy = chain(dtype)
    chained = torch.autograd.grad(blocks(x, x0, scales), (x, x0, *scales[1]), dy)
    apart = torch.autograd.grad(
        blocks(x, x0, scales, lambda run, x, residual, _, *scales: run(x, residual, x0, *scales)),
        (x, x0, *scales[1]),
        dy,
    )
    for mine, other in zip(chained, apart, strict=True):
        torch.testing.assert_close(mine, other, atol=64 * ROUNDING[dtype], rtol=16 * ROUNDING[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpointing_changes_no_bit(dtype, backend):
    use(backend)
    x, x0, scales, dy = chain(dtype)
    inputs = (x, x0, *(scale for pair in scales for scale in pair))
    found = []
    for block in (
        lambda run, *inputs: run(*inputs),
        lambda run, *inputs: checkpoint(run, *inputs, use_reentrant=False),
    ):
        y = blocks(x, x0, scales, block)
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_x0_that_somebody_holds_is_not_changed(backend):
    use(backend)
    x, x0 = leaves(*streams(2, 4, 9, torch.float32))
    scales = leaves(*factors(torch.float32))
    dout = torch.randn(4, 9)
    before = dout.clone()
    *_, y, x0_next = ops.mix_rms_norm(x, None, x0, *scales)
    dx0_next, dx0 = torch.autograd.grad((y, x0_next), (x0_next, x0), (dout, dout))
    assert torch.equal(dout, before)
    assert torch.equal(dx0_next, before)
    assert not torch.equal(dx0, before)


# --- special rows ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_nan_and_infinity_stay_apart(dtype, backend):
    use(backend)
    x, x0, dy = streams(3, 6, 40, dtype)
    scales = factors(dtype)
    ordinary = ops.mix_rms_norm(x, None, x0, *scales)
    x[1] = x0[1] = 0
    x[2, 39] = math.nan
    x0[3, 3] = math.inf
    x, x0 = leaves(x, x0)
    _, mixed, y, _ = ops.mix_rms_norm(x, None, x0, *scales)
    for row in (0, 4, 5):
        assert all(torch.equal(mine[row], other[row]) for mine, other in zip((mixed, y), ordinary[1:3], strict=True))
    assert torch.count_nonzero(y[1]) == 0
    assert y[2].isnan().all()
    assert y[3, 3].isnan()
    assert torch.count_nonzero(y[3]) == 1
    dx, dx0 = torch.autograd.grad(y, (x, x0), dy)
    for gradient, scale in ((dx, scales[0]), (dx0, scales[1])):
        assert gradient[[0, 1, 4, 5]].isfinite().all()
        assert gradient[2].isnan().all()
        assert_near(gradient[1], scale.item() * dy[1].double() * EPS**-0.5, 4 * ROUNDING[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_is_within_the_root(backend):
    use(backend)
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    y = ops.mix_rms_norm(x, x, x, *torch.tensor([0.25, 0.5]), eps=3.5)[2]
    torch.testing.assert_close(y, x / 4)
    assert ops.mix_rms_norm(x, None, x, *torch.tensor([1.0, 1.0]), eps=0.0)[2][1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (2, 3, 4, 5)], ids=str)
def test_leading_dimensions_and_no_rows(shape, backend):
    use(backend)
    inputs = leaves(*torch.randn(3, *shape), *factors(torch.float32))
    results = ops.mix_rms_norm(*inputs)
    for mine, expected in zip(results, formula(inputs[0] + inputs[1], *inputs[2:]), strict=True):
        torch.testing.assert_close(mine, expected)
    gradients = torch.autograd.grad(sum(out.sum() for out in results), inputs)
    assert [gradient.shape for gradient in gradients] == [*[shape] * 3, (), (1,)]
    if 0 in shape:
        assert all(gradient.item() == 0 for gradient in gradients[3:])


# --- bits ---


def every_result(dtype, N=70, C=1000):
    generator = torch.Generator().manual_seed(0)
    x, residual, x0, *douts = torch.randn(7, N, C, dtype=torch.float64, generator=generator).to(dtype)
    scales = factors(dtype)
    z, mixed, y, r = OPERATOR(x, residual, x0, *scales, EPS)
    return [z, mixed, y, r, *BACKWARD(*douts, y, r, z, x0, *scales)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time_and_for_every_number_of_threads(dtype):
    torch.set_num_threads(1)
    first = every_result(dtype)
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, every_result(dtype), first))


def test_the_gradient_of_a_factor_is_summed_in_float64_over_the_rows():
    """In float32 the terms of the small rows would be lost behind that of the large first one."""
    N, C = 3000, 8
    z, x0, dmixed = torch.ones(N, C), torch.full((N, C), 2.0), torch.ones(N, C)
    dmixed[0] = 2.0**24
    zero = torch.zeros(N, C)
    dx_scale, dx0_scale = BACKWARD(zero, None, dmixed, None, zero, torch.ones(N), z, x0, *factors(z.dtype))[2:]
    exact = C * (2.0**24 + N - 1)
    assert dx_scale.item() == torch.tensor(exact).item()
    assert dx0_scale.item() == torch.tensor(2 * exact).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", SIZES)
def test_fused_and_separate_calls_have_the_same_bits(C, dtype):
    x, residual, x0, dmixed, dy = streams(5, 6, C, dtype)
    z, mixed, y, _ = ops.mix_rms_norm(x, residual, x0, *factors(dtype))
    assert torch.equal(z, x + residual)
    assert torch.equal(y, ops.rms_norm(mixed))
    one, zero = (factors(dtype)[0] * 0 + number for number in (1, 0))
    x, residual = leaves(x, residual)
    _, *plain, _ = ops.mix_rms_norm(x, residual, x0, one, zero)
    expected = ops.add_rms_norm(x, residual)
    assert all(map(torch.equal, plain, expected))
    (dx,), (expected_dx,) = (torch.autograd.grad(results, x, (dmixed, dy)) for results in (plain, expected))
    assert torch.equal(dx, expected_dx)


def test_strides():
    x, residual, x0, *douts = torch.randn(7, 4, 17, 6).transpose(2, 3)
    assert not x.is_contiguous()
    packed = [tensor.contiguous() for tensor in (x, residual, x0, *douts)]
    scales = factors(x.dtype)
    results = OPERATOR(x, residual, x0, *scales, EPS)
    z, _, y, r = expected = OPERATOR(*packed[:3], *scales, EPS)
    assert all(map(torch.equal, results, expected))
    strided_y, strided_z = (tensor.mT.contiguous().mT for tensor in (y, z))
    strided_r = torch.stack((r, r), -1)[..., 0]
    found = BACKWARD(*douts, strided_y, strided_r, strided_z, x0, *scales)
    assert all(map(torch.equal, found, BACKWARD(*packed[3:], y, r, z, packed[2], *scales)))
    one = torch.ones(()).expand(4, 6, 17)  # what sum().backward() passes
    found = BACKWARD(one, one, one, one, y, r, z, x0, *scales)
    assert all(map(torch.equal, found, BACKWARD(*[one.contiguous()] * 4, y, r, z, x0, *scales)))


def test_opcheck():
    for dtype in DTYPES:
        x, residual, x0, *douts = streams(7, 3, 5, dtype)
        scales = factors(dtype)
        for added in (None, residual):
            torch.library.opcheck(OPERATOR, (x, added, x0, *scales, EPS))
        _, _, y, r = OPERATOR(x, None, x0, *scales, EPS)
        torch.library.opcheck(BACKWARD, (*douts, y, r, x, x0, *scales))
        torch.library.opcheck(BACKWARD, (douts[0], None, None, None, y, r, x, x0, *scales))


# --- bad input ---

X, ONE = torch.zeros(2, 3), torch.ones(())


def call(x=X, residual=X, x0=X, x_scale=ONE, x0_scale=ONE, **options):
    return lambda: ops.mix_rms_norm(x, residual, x0, x_scale, x0_scale, **options)


BAD = [
    (call(X[:, :0]), ValueError, r"mix_rms_norm: x must have shape \(\.\.\., C\) with C >= 1, got \(2, 0\)"),
    (call(X.long()), TypeError, "mix_rms_norm: x must be torch.float32 or .*, got torch.int64"),
    (call(eps=-1.0), ValueError, "mix_rms_norm: eps must be >= 0, got -1.0"),
    (call(residual=X.T), ValueError, r"mix_rms_norm: residual must have shape \(2, 3\) like x, got \(3, 2\)"),
    (call(residual=X.double()), TypeError, "mix_rms_norm: residual must be torch.float32 like x, got torch.float64"),
    (call(x0=X[0]), ValueError, r"mix_rms_norm: x0 must have shape \(2, 3\) like x, got \(3,\)"),
    (call(x0=X.bfloat16()), TypeError, "mix_rms_norm: x0 must be torch.float32 like x, got torch.bfloat16"),
    (call(x0=X.to("meta")), ValueError, "mix_rms_norm: x0 must be on cpu like x, got meta"),
    (call(x_scale=X), ValueError, r"mix_rms_norm: x_scale must hold one number, got shape \(2, 3\)"),
    (call(x_scale=ONE.double()), TypeError, "mix_rms_norm: x_scale must be torch.float32, got torch.float64"),
    (call(x0_scale=ONE.expand(2)), ValueError, r"mix_rms_norm: x0_scale must hold one number, got shape \(2,\)"),
    (call(x0_scale=ONE.bfloat16()), TypeError, "mix_rms_norm: x0_scale must be torch.float32, got torch.bfloat16"),
    (call(x0_scale=ONE.to("meta")), ValueError, "mix_rms_norm: x0_scale must be on cpu like x, got meta"),
    (call(*[X.double()] * 3), TypeError, "mix_rms_norm: x_scale must be torch.float64, got torch.float32"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_arguments(wrong, error, message, backend):
    use(backend)
    with pytest.raises(error, match=message):
        wrong()


def forward(x=X, residual=X, x0=X, x_scale=ONE, x0_scale=ONE, eps=EPS):
    return lambda: OPERATOR(x, residual, x0, x_scale, x0_scale, eps)


R = torch.zeros(2)


def backward(dy=X, dz=X, dmixed=X, add_to=X, y=X, r=R, z=X, x0=X, x_scale=ONE, x0_scale=ONE):
    return lambda: BACKWARD(dy, dz, dmixed, add_to, y, r, z, x0, x_scale, x0_scale)


BAD_DIRECT = [
    (forward(X[:, :0]), ValueError, r"mix_rms_norm: x must have shape \(\.\.\., C\), C at least 1"),
    (forward(X.half()), TypeError, "mix_rms_norm: x must have one of the dtypes"),
    (forward(eps=-1.0), ValueError, "mix_rms_norm: eps must be at least 0, got -1"),
    (forward(residual=X.T), ValueError, r"mix_rms_norm: residual must have shape \[2, 3\], got \[3, 2\]"),
    (forward(x0=X.double()), TypeError, "mix_rms_norm: x0 must have dtype Float, got Double"),
    (forward(x0=X[:1]), ValueError, r"mix_rms_norm: x0 must have shape \[2, 3\], got \[1, 3\]"),
    (forward(x_scale=R), ValueError, r"mix_rms_norm: x_scale must hold one number, got shape \[2\]"),
    (forward(x_scale=R[:0]), ValueError, r"mix_rms_norm: x_scale must hold one number, got shape \[0\]"),
    (forward(x0_scale=ONE.double()), TypeError, "mix_rms_norm: x0_scale must have dtype Float, got Double"),
    (backward(y=X.half()), TypeError, "mix_rms_norm_backward: y must have one of the dtypes"),
    *(
        (backward(**{name: X[:1]}), ValueError, f"mix_rms_norm_backward: {name} must have shape")
        for name in ("dy", "dz", "dmixed", "add_to", "z", "x0")
    ),
    (backward(r=R[:1]), ValueError, r"mix_rms_norm_backward: r must have shape \[2\], got \[1\]"),
    (backward(r=R.double()), TypeError, "mix_rms_norm_backward: r must have dtype Float, got Double"),
    (backward(x_scale=R), ValueError, "mix_rms_norm_backward: x_scale must hold one number"),
    (backward(x0_scale=ONE.double()), TypeError, "mix_rms_norm_backward: x0_scale must have dtype Float"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD_DIRECT)
def test_the_binding_checks_too(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()
