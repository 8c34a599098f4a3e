"""relu_squared: the kernels against the formula for every kind of number, in place or not, and after products."""

import math
import os
import subprocess
import sys

import pytest
import torch
from backends import module_of, use
from hypothesis import given
from hypothesis import strategies as st

from nanochat_native import ops
from nanochat_native.ops import backends, reference

BACKENDS = ("native", "torch")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SIZES = (0, 1, 7, 8, 15, 16, 17, 33, 1023, 1024, 1025, 3000)  # around the vectors and the shares of the threads

native = torch.ops.nanochat_native


def exact(x):
    return x.double().clamp(min=0).square()


def exact_gradient(dy, y):
    return 2 * y.double().sqrt() * dy.double()


def special(dtype):
    """Return zeros, negative numbers, NaN, infinities, the largest, smallest and denormal numbers."""
    info = torch.finfo(dtype)
    numbers = [0.0, 1.0, 1.5, 3.0, math.pi, 1e-3, math.inf, info.max, info.tiny, info.smallest_normal / 4]
    numbers += [math.sqrt(info.tiny), math.sqrt(info.tiny) / 7, math.sqrt(info.max) * 0.9, 2.0**-30]
    x = torch.tensor(numbers, dtype=dtype)
    return torch.cat((x, -x, torch.tensor([math.nan], dtype=dtype), torch.randn(20, dtype=torch.float64).to(dtype)))


def same_bits(a, b):
    """Return whether two tensors agree in every bit, with any NaN equal to any other."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    a, b = (x.contiguous().masked_fill(x.isnan(), math.nan).view(kind) for x in (a, b))
    return torch.equal(a, b)


def in_place(x):
    x = x.clone()
    assert ops.relu_squared_(x) is None
    return x


def backward_in_place(dy, y):
    dy = dy.clone()
    assert ops.relu_squared_backward_(dy, y) is None
    return dy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_match_the_formula_for_every_kind_of_number(dtype, backend):
    x = special(dtype)
    with use(backend):
        y = ops.relu_squared(x)
        assert same_bits(in_place(x), y)
    assert y.dtype == dtype
    # A product of two numbers of 24 or 8 bits is exact in float64, so there is one right result.
    wide = x.to(torch.float64).clamp(min=0)
    assert same_bits(y, (wide * wide).to(dtype))
    assert not y.signbit()[~y.isnan()].any(), "there is no -0"
    assert y[x.isnan()].isnan().all()
    assert y[x <= 0].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_match_the_formula_for_every_kind_of_number(dtype):
    y = special(dtype).abs()
    dy = torch.randn(y.shape).to(dtype)
    mine = native.relu_squared_backward(dy, y)
    assert same_bits(backward_in_place(dy, y), mine)
    # 2 sqrt(y) dy in the type of the computation, by the correctly rounded root of the C library.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    root = torch.tensor([math.sqrt(number) for number in y.tolist()], dtype=wide)
    assert same_bits(mine, (dy.to(wide) * (root * 2)).to(dtype))
    theirs = reference.relu_squared_backward(dy, y)  # torch's root may differ in its last bit
    torch.testing.assert_close(theirs, mine, equal_nan=True, atol=0, rtol=2 * torch.finfo(dtype).eps)
    with use("torch"):
        assert same_bits(backward_in_place(dy, y), theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_sizes_forward_and_backward(dtype, backend):
    """Elements beside the tensors stay as they are."""
    for size in SIZES:
        buffer, dys = torch.randn(2, size + 40).to(dtype)
        x, dy = buffer[20 : size + 20], dys[20 : size + 20]
        y = exact(x).to(dtype)
        before = buffer.clone(), dys.clone()
        with use(backend):
            leaf = x.detach().requires_grad_()
            mine = ops.relu_squared(leaf)
            (dx,) = torch.autograd.grad(mine, leaf, dy)
            assert torch.equal(mine, y)
            torch.testing.assert_close(dx, exact_gradient(dy, y).to(dtype), atol=1e-30, rtol=8e-3)
            torch.testing.assert_close(dx.double(), 2 * x.double().clamp(min=0) * dy.double(), atol=1e-2, rtol=2e-2)
            assert torch.equal(buffer, before[0])
            ops.relu_squared_(x)
            ops.relu_squared_backward_(dy, y)
        assert torch.equal(x, y)
        if backend == "native":
            assert torch.equal(dy, dx)
        for changed, old in zip((buffer, dys), before, strict=True):
            assert torch.equal(changed[:20], old[:20])
            assert torch.equal(changed[size + 20 :], old[size + 20 :])


def test_strides():
    x = torch.randn(9, 2, 24).transpose(0, 1)
    leaf = x.detach().requires_grad_()
    y = ops.relu_squared(leaf)
    assert y.is_contiguous()
    assert torch.equal(y, exact(x).float())
    dy = torch.randn(24, 9, 2).permute(2, 1, 0)
    torch.testing.assert_close(torch.autograd.grad(y, leaf, dy)[0], 2 * x.clamp(min=0) * dy)
    (dx,) = torch.autograd.grad(ops.relu_squared(leaf).sum(), leaf)
    torch.testing.assert_close(dx, 2 * x.clamp(min=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_number_of_threads(dtype):
    x, dy = torch.randn(2, 10007).to(dtype)

    def results():
        y = ops.relu_squared(x)
        return y, in_place(x), native.relu_squared_backward(dy, y), backward_in_place(dy, y)

    first = results()
    assert torch.equal(first[0], exact(x).to(dtype))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, results(), first))
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_derivatives_at_zero(backend):
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    with use(backend):
        assert torch.autograd.gradcheck(ops.relu_squared, (x,))
        assert torch.autograd.gradgradcheck(ops.relu_squared, (x,))
        # The second derivative is 2 for a positive x and 0 for others.
        x = torch.tensor([0.0, -0.0, -1.0, 2.0, 1e-6], dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(ops.relu_squared(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.sum(), x)
    torch.testing.assert_close(first, 2 * x.clamp(min=0))
    torch.testing.assert_close(second, 2 * (x > 0).double())
    torch.testing.assert_close(third, torch.zeros_like(x), atol=1e-6, rtol=0)


def test_saves_its_result_alone():
    x = torch.randn(50, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: saved.append(y) or y, lambda y: y):
        y = ops.relu_squared(x)
    assert [s.data_ptr() for s in saved] == [y.data_ptr()]


def test_opcheck():
    x, y = torch.randn(3, 7, requires_grad=True), torch.rand(3, 7)
    torch.library.opcheck(native.relu_squared.default, (x,))
    torch.library.opcheck(native.relu_squared_.default, (x.detach().clone(),))
    torch.library.opcheck(native.relu_squared_backward.default, (torch.randn(3, 7), y))
    torch.library.opcheck(native.relu_squared_backward_.default, (torch.randn(3, 7), y))
    torch.library.opcheck(native.linear_relu_squared.default, (torch.randn(70, 7), y))
    torch.library.opcheck(native.linear_backward_relu_squared.default, (torch.randn(70, 3), torch.rand(70, 7), y))
    compiled = torch.compile(ops.relu_squared, fullgraph=True, backend="aot_eager")
    mine, theirs = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, ops.relu_squared))
    assert torch.equal(*mine, *theirs)


def test_in_place_forms_tell_autograd_of_the_change():
    x, y = torch.randn(4), torch.rand(4)
    weight = torch.randn(4, requires_grad=True)
    for update, changed in ((ops.relu_squared_, x), (lambda dy: ops.relu_squared_backward_(dy, y), y.clone())):
        for backend in BACKENDS:
            product = weight * changed
            with use(backend):
                update(changed)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend):
    x, y = torch.randn(4, 6), torch.rand(4, 6)
    with use(backend):
        for call in (ops.relu_squared, ops.relu_squared_, lambda x: ops.relu_squared_backward_(x, x)):
            with pytest.raises(TypeError, match=r"relu_squared.*: (x|dy) must be torch.float32 or .*, got torch.int64"):
                call(torch.arange(3))
        with pytest.raises(ValueError, match=r"relu_squared_: x must be contiguous, got strides \(1, 6\)"):
            ops.relu_squared_(x.T)
        for dy, other in ((x, y.T.contiguous().T), (x.T.contiguous().T, y)):
            with pytest.raises(ValueError, match=r"relu_squared_backward_: (dy|y) must be contiguous, got strides"):
                ops.relu_squared_backward_(dy, other)
        with pytest.raises(ValueError, match=r"backward_: y must have shape \(4, 6\) like dy, got \(6,\)"):
            ops.relu_squared_backward_(x, y[0])
        with pytest.raises(TypeError, match=r"backward_: y must be torch.float32 like dy, got torch.float64"):
            ops.relu_squared_backward_(x, y.double())
        with pytest.raises(ValueError, match=r"backward_: y must be on cpu like dy, got meta"):
            ops.relu_squared_backward_(x, y.to("meta"))
        with pytest.raises(RuntimeError, match=r"relu_squared_: has no derivative, but a tensor requires a gradient"):
            ops.relu_squared_(x.clone().requires_grad_() * 1)
        with pytest.raises(ValueError, match=r"linear_relu_squared: x and weight must have shapes .* \(4, 6\) and"):
            ops.linear_relu_squared(x, y[:, :5])
        with pytest.raises(ValueError, match=r"linear_backward_relu_squared: dy, x and weight must have shapes .* and"):
            ops.linear_backward_relu_squared(x, y, torch.zeros(5, 6))


def test_the_bindings_check_what_keeps_the_kernels_within_their_memory():
    x, y = torch.randn(4, 6), torch.rand(4, 6)
    for call in (native.relu_squared, native.relu_squared_, lambda x: native.relu_squared_backward(x, x)):
        with pytest.raises(TypeError, match=r"^relu_squared.*: (x|dy) must have one of the dtypes"):
            call(x.half())
    with pytest.raises(ValueError, match=r"^relu_squared_: x must be contiguous"):
        native.relu_squared_(x.T)
    for backward in (native.relu_squared_backward, native.relu_squared_backward_):
        with pytest.raises(ValueError, match=r"^relu_squared_backward_?: y must have shape"):
            backward(x, y[:3])
        with pytest.raises(TypeError, match=r"^relu_squared_backward_?: y must have dtype"):
            backward(x, y.double())
    with pytest.raises(ValueError, match=r"^relu_squared_backward_: y must be contiguous"):
        native.relu_squared_backward_(x, torch.rand(6, 4).T)
    with pytest.raises(ValueError, match=r"^relu_squared_backward_: tensors must not overlap, but"):
        native.relu_squared_backward_(x.view(-1)[:20], x.view(-1)[4:])
    with pytest.raises(ValueError, match=r"^linear_relu_squared: x and weight"):
        native.linear_relu_squared(x, y.T)
    with pytest.raises(ValueError, match=r"^linear_backward_relu_squared: dy must have shape \[4, 4\], got \[4, 6\]"):
        native.linear_backward_relu_squared(x, x, y)


# --- at the end of a product ---


@given(N=st.integers(0, 250), I=st.integers(1, 300), O=st.integers(1, 150))
def test_epilogue_gives_the_bits_of_the_product_then_relu_squared(N, I, O):  # noqa: E741
    """Depths beyond one block of the product, partial tiles in both directions."""
    x, weight, dy = (torch.randn(shape) for shape in ((N, I), (O, I), (N, O)))
    y = native.linear(x, weight)
    native.relu_squared_(y)
    assert torch.equal(native.linear_relu_squared(x, weight), y)
    squared = x.clamp(min=0).square()
    dh, dweight = native.linear_backward(dy, squared, weight, True, True)
    native.relu_squared_backward_(dh, squared)
    mine = native.linear_backward_relu_squared(dy, squared, weight)
    assert all(map(torch.equal, mine, (dh, dweight)))


def test_epilogue_keeps_nan_and_gives_the_same_bits_for_every_number_of_threads():
    x, weight, dy = (torch.randn(shape) for shape in ((300, 130), (210, 130), (300, 210)))
    x[17, 3] = math.nan

    def results():
        y = native.linear_relu_squared(x, weight)
        return y, *native.linear_backward_relu_squared(dy, x.square(), weight)

    first = results()
    assert first[0][17].isnan().all()
    assert first[0].isnan().sum() == 210
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            assert all(map(same_bits, results(), first))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("product", ["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (4, 70, 5), (0, 5)], ids=str)
def test_linear_forms_for_every_shape_and_dtype(shape, dtype, product, monkeypatch):
    monkeypatch.setattr(backends, "_linear_product", product)
    x, weight, dy = torch.rand(shape).to(dtype), torch.randn(7, 5).to(dtype), torch.randn(*shape[:-1], 7).to(dtype)
    for backend in BACKENDS:
        with use(backend):
            y = ops.relu_squared(ops.linear(x, weight))
            assert same_bits(ops.linear_relu_squared(x, weight), y)
            dh, dweight = ops.linear_backward(dy, x, weight)
            dh = backward_in_place(dh, x)
            mine = ops.linear_backward_relu_squared(dy, x, weight)
            assert all(map(same_bits, mine, (dh, dweight)))


def test_strides_of_linear_forms():
    x, weight = torch.rand(90, 2, 24).transpose(0, 1), torch.randn(24, 33).T
    dy = torch.randn(33, 2, 90).permute(1, 2, 0)
    y = exact(x.double() @ weight.double().T)
    torch.testing.assert_close(ops.linear_relu_squared(x, weight).double(), y, atol=1e-4, rtol=1e-5)
    dh = 2 * x.double().sqrt() * (dy.double() @ weight.double())
    mine = ops.linear_backward_relu_squared(dy, x, weight)
    torch.testing.assert_close(mine[0].double(), dh, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        mine[1].double(), torch.einsum("bto,bti->oi", dy.double(), x.double()), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("choice", ["native", "torch"])
def test_the_environment_chooses_whether_the_product_squares(choice, monkeypatch):
    monkeypatch.setattr(backends, "_linear_product", choice)
    module, called = module_of("relu_squared"), []
    for name in ("native_linear_relu_squared", "native_linear_backward_relu_squared"):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, run=run: called.append(run) or run(*args))
    x, weight, dy = torch.rand(2, 40, 24), torch.randn(33, 24), torch.randn(2, 40, 33)
    ops.linear_relu_squared(x, weight)
    ops.linear_backward_relu_squared(dy, x, weight)
    assert len(called) == (2 if choice == "native" else 0)
    called.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear_relu_squared(x, weight).dtype == torch.bfloat16
    ops.linear_relu_squared(x[0], weight)
    with ops.use_backend("torch"):
        ops.linear_relu_squared(x, weight)
        ops.linear_backward_relu_squared(dy, x, weight)
    assert not called, "autocast, few rows and the torch backend use torch's product"


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_forms_record_gradients(backend, monkeypatch):
    monkeypatch.setattr(backends, "_linear_product", "native")
    x, weight, dy = torch.randn(70, 5), torch.randn(7, 5, requires_grad=True), torch.randn(70, 7)
    with use(backend):
        (mine,) = torch.autograd.grad(ops.linear_relu_squared(x, weight).sin().sum(), weight)
        h = torch.randn(70, 5, requires_grad=True)
        squared = h.relu().square()
        grads = torch.autograd.grad(ops.linear_backward_relu_squared(dy, squared, weight)[0].sin().sum(), (h, weight))
    (theirs,) = torch.autograd.grad((x @ weight.T).relu().square().sin().sum(), weight)
    torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-4)
    others = torch.autograd.grad((2 * h.relu() * (dy @ weight)).sin().sum(), (h, weight))
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


TEAM = """
import torch
from nanochat_native import ops

torch.set_num_threads(4)
x = torch.randn(1 << 20)
assert torch.equal(ops.relu_squared(x), x.relu().square())
params, grads, firsts = [torch.ones(1 << 18)], [torch.ones(1 << 18)], [torch.zeros(1 << 18)]
numbers = {"step": 1, "lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.0}
ops.adamw_(params, grads, firsts, [torch.zeros(1 << 18)], **numbers)
assert params[0].max() < 1
"""


@pytest.mark.parametrize("variables", [{"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true"}])
def test_a_team_may_have_fewer_threads_than_were_asked_for(variables):
    subprocess.run([sys.executable, "-c", TEAM], env=os.environ | variables, check=True, timeout=600)
