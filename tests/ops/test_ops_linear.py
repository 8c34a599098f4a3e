"""linear: the native product, where it is used, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from backends import module_of
from hypothesis import given
from hypothesis import strategies as st

from nanochat_native import ops
from nanochat_native.ops import backends

OPERATOR = torch.ops.nanochat_native.linear.default


@given(N=st.integers(1, 150), I=st.integers(1, 90), O=st.integers(1, 90))
def test_native_product_and_gradients(N, I, O):  # noqa: E741
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((N, I), (O, I)))
    dy = torch.randn(N, O)
    y, exact = OPERATOR(x, weight), F.linear(x.double(), weight.double())
    torch.testing.assert_close(y.double(), exact, atol=1e-4, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(exact, (x, weight), dy.double()), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (4, 70, 5), (0, 5)], ids=str)
def test_every_shape_and_dtype(shape, dtype, backend):
    ops.use_backend(backend)
    x, weight = torch.randn(shape).to(dtype), torch.randn(7, 5).to(dtype)
    y = ops.linear(x, weight)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, weight))


def test_strides():
    x, weight = torch.randn(90, 2, 24).transpose(0, 1), torch.randn(24, 33).T
    torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(OPERATOR(x[0], weight), F.linear(x[0], weight), atol=1e-5, rtol=1e-5)


def test_same_bits_every_time_and_for_every_number_of_threads():
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((300, 130), (210, 130)))
    dy = torch.randn(300, 210)

    def results():
        y = OPERATOR(x, weight)
        return y, *torch.autograd.grad(y, (x, weight), dy)

    first = results()
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, results(), first))


def test_opcheck_and_compile():
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((70, 6), (5, 6)))
    torch.library.opcheck(OPERATOR, (x, weight))
    compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        torch.autograd.grad(compiled(x, weight).sum(), (x, weight)),
        torch.autograd.grad(F.linear(x, weight).sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("choice", ["native", "torch"])
@pytest.mark.parametrize("rows", [(1,), (70,), (3, 41)])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (24, 33), (300, 130)])
def test_a_gradient_is_added_by_the_product(choice, rows, inputs, outputs, monkeypatch):
    monkeypatch.setattr(backends, "_linear_product", choice)
    shapes = ((*rows, outputs), (*rows, inputs), (outputs, inputs), (*rows, inputs))
    dy, x, weight, first = map(torch.randn, shapes)
    expected = first + dy @ weight
    dx, dweight = ops.linear_backward(dy, x, weight, add_to=first)
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dweight, dy.flatten(0, -2).T @ x.flatten(0, -2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("choice", ["native", "torch"])
def test_a_gradient_that_is_not_needed_is_none(choice, monkeypatch):
    monkeypatch.setattr(backends, "_linear_product", choice)
    dy, x, weight = torch.randn(70, 5), torch.randn(70, 6), torch.randn(5, 6)
    dx, none = ops.linear_backward(dy, x, weight, needed=(True, False))
    assert none is None
    torch.testing.assert_close(dx, dy @ weight)
    none, dweight = ops.linear_backward(dy, x, weight, needed=(False, True))
    assert none is None
    torch.testing.assert_close(dweight, dy.T @ x)


def test_the_gradient_of_the_weight_has_the_dtype_that_is_asked_for():
    dy, x, weight = (torch.randn(shape).bfloat16() for shape in ((70, 5), (70, 6), (5, 6)))
    dx, dweight = ops.linear_backward(dy, x, weight, weight_dtype=torch.float32)
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(dweight, dy.float().T @ x.float(), rtol=2e-2, atol=2e-2)


def test_the_sum_must_have_the_shape_of_x():
    with pytest.raises(ValueError, match=r"linear_backward: add_to must have the shape of x, \(70, 6\), got \(6,\)"):
        ops.linear_backward(torch.zeros(70, 5), torch.zeros(70, 6), torch.zeros(5, 6), add_to=torch.zeros(6))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_bad_arguments(backend):
    ops.use_backend(backend)
    with pytest.raises(
        ValueError, match=r"linear: x and weight must have shapes \(..., I\) and \(O, I\), got \(3, 4\) and \(5, 6\)"
    ):
        ops.linear(torch.zeros(3, 4), torch.zeros(5, 6))
    with pytest.raises(ValueError, match="linear: x and weight must have shapes"):
        ops.linear(torch.zeros(3, 4), torch.zeros(4))


@pytest.mark.parametrize("choice", ["native", "torch", "auto"])
def test_the_environment_chooses_the_product(choice, monkeypatch):
    """NANOCHAT_LINEAR decides on every processor whether the kernel is called."""
    monkeypatch.setattr(backends, "_linear_product", choice)
    is_native = backends.native_linear_is_faster if choice == "auto" else choice == "native"
    x, weight = torch.randn(2, 40, 24, requires_grad=True), torch.randn(33, 24, requires_grad=True)
    called = []
    module = module_of("linear")
    run = module.native_linear
    monkeypatch.setattr(module, "native_linear", lambda *args: called.append(args) or run(*args))
    y = ops.linear(x, weight)
    assert bool(called) == is_native
    torch.testing.assert_close(y, F.linear(x, weight))
    for others in ((x[0], weight), (x.double(), weight.double()), (x.bfloat16(), weight.bfloat16())):
        ops.linear(*others)
    with torch.autocast("cpu", torch.bfloat16):
        ops.linear(x, weight)
    with ops.use_backend("torch"):
        ops.linear(x, weight)
    assert len(called) == is_native, "few rows, other types, autocast and the torch backend use torch's product"


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "_linear_product", "yes")
    for call in (ops.check_environment, lambda: ops.linear(torch.zeros(2, 3), torch.zeros(4, 3))):
        with pytest.raises(ValueError, match="NANOCHAT_LINEAR must be auto, native or torch, got 'yes'"):
            call()
