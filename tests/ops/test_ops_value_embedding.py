"""add_value_embedding and its gradients: kernel against reference and formula, bits, strides, bad input."""

import math

import pytest
import torch
from backends import BACKENDS, module_of, use
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat_native import ops
from nanochat_native.ops import reference

OPERATOR = torch.ops.nanochat_native.add_value_embedding.default
BACKWARD = torch.ops.nanochat_native.add_value_embedding_backward.default

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
TYPES = ((F32, F32), (F64, F64), (F64, F32), (BF16, BF16), (BF16, F32))  # of v and of the table
# Hkv, D, I: around a vector of every instruction set, more heads than lanes, and the model's.
SIZES = ((1, 1, 1), (2, 7, 3), (3, 16, 12), (5, 33, 17), (19, 4, 12), (2, 64, 64), (6, 128, 12))
ROUNDING = {F64: 1e-14, F32: 2e-6, BF16: 2**-8}
V = 9


def formula(v, h, gate, table, ids):
    factors = 3 / (1 + (-torch.einsum("...i,gi->...g", h, gate)).exp())
    return v + factors[..., None] * table[ids].view(v.shape)


def problem(leading, sizes, dtype, table_dtype, seed=0):
    """Return v, h, gate and table, which require gradients, the ids, and the gradient of the result."""
    (Hkv, D, I), generator = sizes, torch.Generator().manual_seed(seed)  # noqa: E741

    def random(*shape):
        return torch.randn(shape, dtype=F64, generator=generator)

    gate_dtype = F64 if dtype == F64 else F32
    inputs = [
        random(*leading, Hkv, D).to(dtype),
        random(*leading, I).to(dtype),
        (random(Hkv, I) * I**-0.5).to(gate_dtype),
        random(V, Hkv * D).to(table_dtype),
    ]
    ids = torch.randint(0, V - 1, leading, generator=generator)  # the last row is never used
    return [x.requires_grad_() for x in inputs], ids, random(*leading, Hkv, D).to(dtype)


def assert_near(mine, expected, tolerance):
    """Compare relative to the largest number of the expected tensor."""
    assert mine.shape == expected.shape
    difference = (mine.detach().double() - expected.detach().double()).abs()
    assert (difference <= tolerance * (expected.abs().max() + 1e-30)).all(), difference.max()


# --- values and gradients ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "table_dtype"), TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_match_the_formula(sizes, dtype, table_dtype, backend):
    use(backend)
    inputs, ids, dout = problem((2, 50), sizes, dtype, table_dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = formula(*wide, ids)
    out = ops.add_value_embedding(*inputs, ids)
    assert out.dtype == dtype
    assert out.is_contiguous()
    bound = ROUNDING[dtype]
    assert ((out.double() - exact).abs() <= bound * (1 + exact.abs())).all()
    grads = torch.autograd.grad(out, inputs, dout)
    for x, grad, exact_grad in zip(inputs, grads, torch.autograd.grad(exact, wide, dout.double()), strict=True):
        assert grad.dtype == x.dtype
        assert_near(grad, exact_grad, 4 * max(ROUNDING[x.dtype], 2e-6 if table_dtype == F32 else 0))
    assert torch.equal(grads[0], dout)
    assert torch.count_nonzero(grads[3][-1]) == 0


@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 64)),
    types=st.sampled_from(TYPES),
)
def test_any_shape_matches_the_reference(leading, sizes, types):
    inputs, ids, dout = problem(tuple(leading), sizes, *types)
    ours, theirs = ops.add_value_embedding(*inputs, ids), reference.add_value_embedding(*inputs, ids)
    results = [(out, *torch.autograd.grad(out, inputs, dout)) for out in (ours, theirs)]
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        if other.numel():
            assert_near(mine, other, 4 * max(ROUNDING[other.dtype], ROUNDING[dout.dtype] / 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "table_dtype"), TYPES, ids=str)
def test_the_backward_call_returns_the_gradients_of_autograd(dtype, table_dtype, backend):
    use(backend)
    inputs, ids, dout = problem((3, 5), (3, 16, 12), dtype, table_dtype)
    grads = torch.autograd.grad(ops.add_value_embedding(*inputs, ids), inputs[1:], dout)
    constants = [x.detach() for x in inputs[1:]]
    for mine, other in zip(ops.add_value_embedding_backward(dout, *constants, ids), grads, strict=True):
        assert mine.dtype == other.dtype
        assert_near(mine, other, 2 * ROUNDING[mine.dtype] if backend == "torch" else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_ids_add_up_and_each_row_gets_its_own(backend):
    use(backend)
    (v, h, gate, table), _, dout = problem((6,), (2, 3, 4), F64, F64)
    ids = torch.tensor([4, 4, 0, 4, 2, 0])
    out = ops.add_value_embedding(v, h, gate, table, ids)
    (dtable,) = torch.autograd.grad(out, table, dout)
    drows = (3 * torch.sigmoid(h @ gate.mT)[..., None] * dout).flatten(1)
    expected = torch.zeros(V, 6, dtype=F64).index_add(0, ids, drows)
    torch.testing.assert_close(dtable, expected)


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_two_derivatives(backend):
    use(backend)
    inputs, ids, dout = problem((2, 3), (2, 3, 4), F64, F64)
    assert torch.autograd.gradcheck(lambda *xs: ops.add_value_embedding(*xs, ids), inputs)
    assert torch.autograd.gradgradcheck(lambda *xs: ops.add_value_embedding(*xs, ids), inputs)
    arguments = [dout.requires_grad_(), *inputs[1:]]
    assert torch.autograd.gradcheck(lambda *xs: ops.add_value_embedding_backward(*xs, ids), arguments)


def test_the_gradient_keeps_no_values():
    kept = []
    inputs, ids, _ = problem((4,), (2, 8, 3), F32, F32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ops.add_value_embedding(*inputs, ids)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in (*inputs[1:], ids)]


def test_float64_and_float16_on_cuda_have_no_kernel():
    unsupported = module_of("add_value_embedding")._no_kernel
    with FakeTensorMode():
        tensors = {dtype: torch.empty(2, 3, device="cuda", dtype=dtype) for dtype in (F32, F64, BF16, torch.float16)}
        assert unsupported(tensors[BF16], tensors[F32]) == unsupported(tensors[F32], tensors[F32]) == ""
        reason = "its kernels take float32 and bfloat16, not {}"
        assert unsupported(tensors[F64], tensors[F32]) == reason.format("float64")
        assert unsupported(tensors[torch.float16], tensors[F32]) == reason.format("float16")


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_gates_saturate_and_nan_stays_in_its_head(backend):
    use(backend)
    (v, h, gate, table), ids, dout = problem((4,), (3, 5, 2), F32, F32)
    with torch.no_grad():
        h[:] = torch.tensor([[1e4, 0], [-1e4, 0], [1, 0], [0, 1]])
        gate[:] = torch.tensor([[1.0, 0], [100, 0], [0, 2]])
    out = ops.add_value_embedding(v, h, gate, table, ids)
    rows = table[ids].view(4, 3, 5)
    torch.testing.assert_close(out[0, :2], v[0, :2] + 3 * rows[0, :2])
    assert torch.equal(out[1, :2], v[1, :2])
    torch.testing.assert_close(out[2, 1], v[2, 1] + 3 * rows[2, 1])
    dh, dgate = torch.autograd.grad(out, (h, gate), dout)
    assert dh[:2, 0].abs().max() == 0
    assert dgate.isfinite().all()
    with torch.no_grad():
        gate[2, 1] = math.nan
    out_with_nan = ops.add_value_embedding(v, h, gate, table, ids)
    assert torch.equal(out_with_nan[:, :2], out[:, :2])
    assert out_with_nan[:, 2].isnan().all()


# --- bits ---


def every_result(dtype, table_dtype):
    inputs, ids, dout = problem((300,), (5, 70, 12), dtype, table_dtype)
    v, h, gate, table = (x.detach() for x in inputs)
    return [OPERATOR(v, h, gate, table, ids), *BACKWARD(dout, h, gate, table, ids)]


@pytest.mark.parametrize(("dtype", "table_dtype"), TYPES, ids=str)
def test_same_bits_every_time_and_for_every_number_of_threads(dtype, table_dtype):
    torch.set_num_threads(1)
    first = every_result(dtype, table_dtype)
    for threads in (2, 3, 5, 2):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, every_result(dtype, table_dtype), first))


def test_strides():
    inputs, ids, dout = problem((4, 3), (2, 8, 5), F32, F32)
    packed = [x.detach() for x in inputs]
    v, h, gate, table = packed
    wide = torch.full((4, 3, 9), math.nan)
    wide[..., 2:7] = h
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (v, gate, table)]
    others = [strided[0], wide[..., 2:7], *strided[1:]]
    swapped = ids.T.contiguous().T
    assert torch.equal(OPERATOR(*others, swapped), OPERATOR(*packed, ids))
    strided_dout = dout.mT.contiguous().mT
    results = BACKWARD(strided_dout, *others[1:], swapped), BACKWARD(dout, *packed[1:], ids)
    assert all(map(torch.equal, *results))
    by_columns = h.movedim(-1, 0).contiguous().movedim(0, -1)  # copied
    assert torch.equal(OPERATOR(v, by_columns, gate, table, ids), OPERATOR(*packed, ids))
    one = torch.ones(()).expand(v.shape)  # what sum().backward() passes
    assert all(map(torch.equal, BACKWARD(one, *packed[1:], ids), BACKWARD(one.contiguous(), *packed[1:], ids)))


def test_opcheck():
    for dtype, table_dtype in TYPES:
        inputs, ids, dout = problem((2, 3), (2, 5, 3), dtype, table_dtype)
        torch.library.opcheck(OPERATOR, (*inputs, ids))
        torch.library.opcheck(BACKWARD, (dout, *(x.detach() for x in inputs[1:]), ids))


# --- bad input ---

GOOD = {
    "v": torch.zeros(2, 3, 4),
    "h": torch.zeros(2, 5),
    "gate": torch.zeros(3, 5),
    "table": torch.zeros(7, 12),
    "ids": torch.tensor([0, 6]),
}
BAD = [
    ("v", torch.zeros(4), ValueError, r"must have shape \(\.\.\., Hkv, D\) with Hkv, D >= 1, got \(4,\)"),
    ("v", torch.zeros(2, 0, 4), ValueError, r"must have shape .*, got \(2, 0, 4\)"),
    ("v", GOOD["v"].half(), TypeError, "must be torch.float32 or .*, got torch.float16"),
    ("h", torch.zeros(2, 65), ValueError, r"must have shape \(2, I\) with I from 1 to 64, got \(2, 65\)"),
    ("h", torch.zeros(2, 0), ValueError, r"must have shape .* got \(2, 0\)"),
    ("h", torch.zeros(3, 5), ValueError, r"must have shape .* got \(3, 5\)"),
    ("h", GOOD["h"].double(), TypeError, "must be torch.float32 like (v|dout), got torch.float64"),
    ("h", GOOD["h"].to("meta"), ValueError, "must be on cpu like (v|dout), got meta"),
    ("gate", torch.zeros(3, 4), ValueError, r"must have shape \(Hkv, I\) = \(3, 5\), got \(3, 4\)"),
    ("gate", GOOD["gate"].bfloat16(), TypeError, "must be torch.float32, got torch.bfloat16"),
    ("gate", GOOD["gate"].to("meta"), ValueError, "must be on cpu like (v|dout), got meta"),
    ("table", torch.zeros(7, 11), ValueError, r"must have shape \(V, 12\) with V >= 1, got \(7, 11\)"),
    ("table", torch.zeros(0, 12), ValueError, r"must have shape .* got \(0, 12\)"),
    ("table", torch.zeros(12), ValueError, r"must have shape .* got \(12,\)"),
    ("table", GOOD["table"].bfloat16(), TypeError, "must be torch.float32 .*, got torch.bfloat16"),
    ("table", GOOD["table"].to("meta"), ValueError, "must be on cpu like (v|dout), got meta"),
    ("ids", torch.tensor([0]), ValueError, r"must have shape \(2,\), got \(1,\)"),
    ("ids", torch.tensor([0, 1]).int(), TypeError, "must be torch.int64, got torch.int32"),
    ("ids", torch.tensor([0, 1]).to("meta"), ValueError, "must be on cpu like (v|dout), got meta"),
    ("ids", torch.tensor([0, 7]), ValueError, "must be from 0 to 6, got 7"),
    ("ids", torch.tensor([-1, 0]), ValueError, "must be from 0 to 6, got -1"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["add_value_embedding", "add_value_embedding_backward"])
@pytest.mark.parametrize(("name", "value", "error", "message"), BAD)
def test_bad_arguments(name, value, error, message, op, backend):
    use(backend)
    shown = "dout" if name == "v" and op.endswith("backward") else name
    with pytest.raises(error, match=f"^{op}: {shown} {message}"):
        getattr(ops, op)(*(GOOD | {name: value}).values())


BAD_DIRECT = [
    ("v", torch.zeros(4), ValueError, r"must have shape \(\.\.\., Hkv, D\), Hkv and D at least 1, got \[4\]"),
    ("v", torch.zeros(2, 0, 4), ValueError, "must have shape"),
    ("v", GOOD["v"].half(), TypeError, "must have one of the dtypes"),
    ("h", torch.zeros(2, 65), ValueError, r"must have shape \(\.\.\., I\), I from 1 to 64, got \[2, 65\]"),
    ("h", torch.zeros(2, 0), ValueError, r"must have shape \(\.\.\., I\), I from 1 to 64, got \[2, 0\]"),
    ("h", torch.zeros(()), ValueError, r"must have shape \(\.\.\., I\), I from 1 to 64, got \[\]"),
    ("h", torch.zeros(3, 5), ValueError, r"must have shape \[2, 5\], got \[3, 5\]"),
    ("h", GOOD["h"].double(), TypeError, "must have dtype Float, got Double"),
    ("gate", torch.zeros(3, 4), ValueError, r"must have shape \[3, 5\], got \[3, 4\]"),
    ("gate", GOOD["gate"].bfloat16(), TypeError, "must have dtype Float, got BFloat16"),
    ("table", torch.zeros(7, 11), ValueError, r"must have shape \[7, 12\], got \[7, 11\]"),
    ("table", torch.zeros(12), ValueError, r"must have the shape \(V, Hkv D\), V at least 1, got \[12\]"),
    ("table", torch.zeros(0, 12), ValueError, "must have the shape"),
    ("table", GOOD["table"].bfloat16(), TypeError, "must have one of the dtypes"),
    ("ids", torch.tensor([0]), ValueError, r"must have shape \[2\], got \[1\]"),
    ("ids", torch.tensor([0, 1]).int(), TypeError, "must have dtype Long, got Int"),
    ("ids", torch.tensor([0, 7]), ValueError, "must be from 0 to 6, got 7"),
    ("ids", torch.tensor([-1, 0]), ValueError, "must be from 0 to 6, got -1"),
]


@pytest.mark.parametrize("operator", [OPERATOR, BACKWARD], ids=str)
@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_DIRECT)
def test_the_binding_checks_too(name, value, error, message, operator):
    op = operator._schema.name.removeprefix("nanochat_native::")
    shown = "dout" if name == "v" and op.endswith("backward") else name
    with pytest.raises(error, match=f"^{op}: {shown} {message}"):
        operator(*(GOOD | {name: value}).values())
