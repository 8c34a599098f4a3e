"""rotary_norm: the kernel against the formula, its derivatives, strides, determinism and bad arguments."""

import pytest
import torch
from backends import use

from nanochat_native import ops
from nanochat_native.ops import reference

DTYPES = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3}
SIZES = (2, 4, 6, 10, 16, 30, 32, 64, 80, 96, 128, 256)  # around the vector widths of half a head


def tables(T, D, dtype=torch.float32):
    angles = torch.rand(T, D // 2, dtype=torch.float64) * 6
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(dtype), angles.sin().to(dtype)


def formula(x, cos, sin, scale=1.0, eps=2.0**-23):
    """Rotate each pair by its angle as a complex number, and normalize."""
    half = x.size(-1) // 2
    turn = torch.complex(cos.double(), -sin.double())[:, None]
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    z = torch.cat((z.real, z.imag), -1)
    return scale * z / ((z * z).sum(-1, keepdim=True) / x.size(-1) + eps).sqrt()


def exact(q, k, cos, sin, dq, dk, **options):
    inputs = [x.double().requires_grad_() for x in (q, k)]
    out = [formula(x, cos, sin, **options) for x in inputs]
    return *out, *torch.autograd.grad(out, inputs, (dq.double(), dk.double()))


def results(q, k, cos, sin, dq, dk, **options):
    inputs = [x.detach().requires_grad_() for x in (q, k)]
    out = ops.rotary_norm(*inputs, cos, sin, **options)
    return *(x.detach() for x in out), *torch.autograd.grad(out, inputs, (dq, dk))


def assert_close(mine, theirs, bound):
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.detach(), atol=bound * (1 + b.abs().max().item()), rtol=bound)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("scale", [1.0, 1.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_match_the_formula_for_every_size(dtype, scale, backend):
    for D in SIZES:
        q, k, dq, dk = (torch.randn(2, 5, heads, D).to(dtype) for heads in (4, 2, 4, 2))
        cos, sin = tables(5, D, dtype)
        with use(backend):
            mine = results(q, k, cos, sin, dq, dk, scale=scale)
        assert all(x.dtype == dtype and x.is_contiguous() for x in mine[:2])
        assert all(x.dtype == dtype for x in mine)
        # In bfloat16 the gradient is computed from the rounded result.
        assert_close(mine, exact(q, k, cos, sin, dq, dk, scale=scale), DTYPES[dtype] * 4)


@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (8, 2), (2, 3)])
def test_any_numbers_of_heads(heads):
    q, k, dq, dk = (torch.randn(3, 4, h, 12) for h in (*heads, *heads))
    cos, sin = tables(4, 12)
    assert_close(results(q, k, cos, sin, dq, dk), exact(q, k, cos, sin, dq, dk), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_one_buffer_and_rows_of_long_tables(dtype):
    """q, k and v of one product, transposed gradients, and tables cut from wider and longer ones."""
    B, T, H, Hkv, D = 2, 7, 4, 2, 16
    qkv = torch.randn(B, T, (H + 2 * Hkv) * D).to(dtype)
    q = qkv[..., : H * D].unflatten(-1, (H, D))
    k = qkv[..., H * D : (H + Hkv) * D].unflatten(-1, (Hkv, D))
    dq, dk = (torch.randn(B, heads, T, D).to(dtype).transpose(1, 2) for heads in (H, Hkv))
    cos = tables(T + 3, 3 * D, dtype)[0][2 : T + 2, D : D + D // 2]
    sin = tables(T, 2 * D, dtype)[1][:, : D // 2]
    assert (cos.stride(0), sin.stride(0)) == (3 * D // 2, D)
    before = qkv.clone()
    mine = results(q, k, cos, sin, dq, dk, scale=1.2)
    assert all(x.is_contiguous() for x in mine[:2])
    theirs = results(*(x.contiguous() for x in (q, k, cos, sin, dq, dk)), scale=1.2)
    assert all(map(torch.equal, mine, theirs))
    assert torch.equal(qkv, before)
    assert_close(mine, exact(q, k, cos, sin, dq, dk, scale=1.2), 4 * DTYPES[dtype])


def test_tensors_without_unit_stride_and_expanded_gradients():
    q, k = (torch.randn(2, 5, 8, heads).transpose(2, 3) for heads in (4, 2))
    cos, sin = (table.T.contiguous().T for table in tables(5, 8))
    dq, dk = (torch.randn(2, 1, 1, 1).expand(2, 5, heads, 8) for heads in (4, 2))
    mine = results(q, k, cos, sin, dq, dk)
    theirs = results(*(x.contiguous() for x in (q, k, cos, sin, dq, dk)))
    assert all(map(torch.equal, mine, theirs))


def test_each_head_is_normalized_and_keeps_the_angle_between_positions():
    x = torch.randn(1, 1, 1, 32, dtype=torch.float64).expand(1, 9, 1, 32)
    angles = torch.arange(9, dtype=torch.float64)[:, None] * torch.rand(16, dtype=torch.float64)
    q, k = ops.rotary_norm(x, x.flip(-1), angles.cos(), angles.sin(), scale=3.0, eps=0.0)
    torch.testing.assert_close(q.square().mean(-1), torch.full((1, 9, 1), 9.0, dtype=torch.float64))
    scores = (q[0, :, 0] @ k[0, :, 0].T).diagonal(offset=2)  # depend on the distance only
    torch.testing.assert_close(scores, scores[:1].expand(7))


def test_a_head_of_zeros_and_tiny_and_large_numbers():
    cos, sin = tables(1, 4)
    for value, size in ((0.0, 0.0), (2.0**-30, 2.0**-30 * 2**11.5), (1e15, 1.0)):
        x = torch.full((1, 1, 1, 4), value)
        out = ops.rotary_norm(x, x, cos, sin)[0]
        torch.testing.assert_close(out.square().mean().sqrt().item(), size, rtol=1e-5, atol=0)
    x[0, 0, 0, 1] = torch.nan
    q, k = ops.rotary_norm(torch.stack((x, x.nan_to_num(1)), 2).flatten(2, 3), x.nan_to_num(2), cos, sin)
    assert q[0, 0, 0].isnan().all()
    assert not q[0, 0, 1].isnan().any()
    assert not k.isnan().any()


def test_rounds_once():
    """The result in bfloat16 is that of float32, rounded."""
    q, k = (torch.randn(2, 3, heads, 80).bfloat16() for heads in (2, 1))
    cos, sin = tables(3, 80)
    for mine, theirs in zip(
        ops.rotary_norm(q, k, cos, sin, scale=1.2),
        ops.rotary_norm(q.float(), k.float(), cos, sin, scale=1.2),
        strict=True,
    ):
        assert torch.equal(mine, theirs.bfloat16())


def test_eps():
    q, k = torch.randn(2, 1, 3, 2, 6) * 1e-2
    cos, sin = tables(3, 6)
    theirs = [formula(x, cos, sin, eps=1e-3) for x in (q, k)]
    for backend in ("native", "torch"):
        with use(backend):
            assert_close(ops.rotary_norm(q, k, cos, sin, eps=1e-3), theirs, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time_and_for_every_number_of_threads(dtype):
    """Enough elements for several threads."""
    q, k, dq, dk = (torch.randn(2, 150, heads, 80).to(dtype) for heads in (4, 2, 4, 2))
    cos, sin = tables(150, 80, dtype)
    first = results(q, k, cos, sin, dq, dk)
    assert_close(first, exact(q, k, cos, sin, dq, dk), 4 * DTYPES[dtype])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, results(q, k, cos, sin, dq, dk), first))
    finally:
        torch.set_num_threads(before)
    one = results(q[1:, 140:], k[1:, 140:], cos[140:], sin[140:], dq[1:, 140:], dk[1:, 140:])
    assert all(torch.equal(a, b[1:, 140:]) for a, b in zip(one, first, strict=True)), "a head depends on itself alone"


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_tokens(shape):
    q, k = (torch.randn(*shape, heads, 8, requires_grad=True) for heads in (4, 2))
    out = ops.rotary_norm(q, k, *tables(shape[1], 8))
    grads = torch.autograd.grad(out, (q, k), [torch.zeros_like(x) for x in out])
    assert [x.shape for x in (*out, *grads)] == [q.shape, k.shape] * 2


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize("D", [2, 10, 16])
def test_gradcheck(D):
    q, k = (torch.randn(1, 3, heads, D, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    cos, sin = tables(3, D, torch.float64)

    def call(q, k):
        return ops.rotary_norm(q, k, cos, sin, scale=1.2)

    assert torch.autograd.gradcheck(call, (q, k))
    assert torch.autograd.gradgradcheck(call, (q, k))


def test_a_gradient_of_one_result_or_one_input():
    q, k = (torch.randn(2, 5, heads, 8, requires_grad=True) for heads in (4, 2))
    cos, sin = tables(5, 8)
    for used in (0, 1):
        for inputs in ((q, k.detach()), (q.detach(), k), (q, k)):
            if not inputs[used].requires_grad:
                continue
            (mine,) = torch.autograd.grad(ops.rotary_norm(*inputs, cos, sin)[used].sin().sum(), inputs[used])
            (theirs,) = torch.autograd.grad(formula(inputs[used], cos, sin).sin().sum(), inputs[used])
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_of_the_tables_run_in_plain_torch(monkeypatch):
    monkeypatch.setattr(ops.backends, "warned", set())
    q, k = (torch.randn(1, 5, heads, 8) for heads in (2, 1))
    tensors = [x.requires_grad_() for x in (*tables(5, 8), q)]
    cos, sin, q = tensors
    with pytest.warns(UserWarning, match="rotary_norm on cpu .* its kernel does not support gradients of cos and sin"):
        out = ops.rotary_norm(q, k, cos, sin)[0]
    mine = torch.autograd.grad(out.sin().sum(), tensors)
    x1, x2 = q.chunk(2, -1)
    z = torch.cat((x1 * cos[:, None] + x2 * sin[:, None], x2 * cos[:, None] - x1 * sin[:, None]), -1)
    theirs = torch.autograd.grad(torch.nn.functional.rms_norm(z, (8,), eps=2**-23).sin().sum(), tensors)
    assert_close(mine, [x.double() for x in theirs], 1e-5)


def test_saves_its_results_and_neither_q_nor_k():
    q, k = (torch.randn(2, 5, heads, 8, requires_grad=True) for heads in (4, 2))
    cos, sin = tables(5, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = ops.rotary_norm(q, k, cos, sin)
    assert {x.data_ptr() for x in (*out, cos, sin)} <= {x.data_ptr() for x in saved}
    assert sum(x.numel() for x in saved) == q.numel() + k.numel() + (q.numel() + k.numel()) // 8 + 2 * cos.numel()


def test_opcheck():
    cos, sin = tables(3, 10)
    q, k = (torch.randn(2, 3, heads, 10, requires_grad=True) for heads in (4, 2))
    native = torch.ops.nanochat_native
    torch.library.opcheck(native.rotary_norm.default, (q, k, cos, sin, 1e-6, 1.2))
    with torch.no_grad():
        q_out, k_out, q_r, k_r = native.rotary_norm(q, k, cos, sin, 1e-6, 1.2)
    torch.library.opcheck(native.rotary_norm_backward.default, (q_out, k_out, q_out, k_out, q_r, k_r, cos, sin, 1.2))
    compiled = torch.compile(ops.rotary_norm, fullgraph=True, backend="aot_eager")
    mine, theirs = (
        torch.autograd.grad(sum(x.sin().sum() for x in f(q, k, cos, sin)), (q, k)) for f in (compiled, ops.rotary_norm)
    )
    assert all(map(torch.equal, mine, theirs))


def arguments(**changed):
    cos, sin = tables(3, 8)
    return {"q": torch.zeros(2, 3, 4, 8), "k": torch.zeros(2, 3, 2, 8), "cos": cos, "sin": sin} | changed


BAD = [
    ({"q": torch.zeros(3, 4, 8)}, ValueError, r"q and k must have shapes \(B, T, H, D\) .*, got \(3, 4, 8\) and"),
    ({"k": torch.zeros(2, 4, 2, 8)}, ValueError, r"q and k must have shapes .* and \(2, 4, 2, 8\)"),
    ({"k": torch.zeros(1, 3, 2, 8)}, ValueError, r"q and k must have shapes .* and \(1, 3, 2, 8\)"),
    ({"k": torch.zeros(2, 3, 2, 6)}, ValueError, r"q and k must have shapes .* and \(2, 3, 2, 6\)"),
    ({"q": torch.zeros(2, 3, 4, 7), "k": torch.zeros(2, 3, 2, 7)}, ValueError, "D must be even, from 2 to 256, got 7"),
    ({"q": torch.zeros(2, 3, 4, 0), "k": torch.zeros(2, 3, 2, 0)}, ValueError, "D must be even, from 2 to 256, got 0"),
    (
        {"q": torch.zeros(2, 3, 1, 258), "k": torch.zeros(2, 3, 1, 258)},
        ValueError,
        "D must be even, from 2 to 256, got 258",
    ),
    ({"k": torch.zeros(2, 3, 2, 8).double()}, TypeError, "k must be torch.float32 like q, got torch.float64"),
    ({"q": torch.zeros(2, 3, 4, 8).half(), "k": torch.zeros(2, 3, 2, 8).half()}, TypeError, "q must be torch.float32"),
    ({"k": torch.zeros(2, 3, 2, 8, device="meta")}, ValueError, "k must be on cpu like q, got meta"),
    ({"cos": torch.zeros(3, 8)}, ValueError, r"cos must have shape \(T, D / 2\) = \(3, 4\), got \(3, 8\)"),
    ({"sin": torch.zeros(4, 4)}, ValueError, r"sin must have shape \(T, D / 2\) = \(3, 4\), got \(4, 4\)"),
    ({"sin": torch.zeros(3, 4).double()}, TypeError, "sin must be torch.float32, got torch.float64"),
    ({"cos": torch.zeros(3, 4, device="meta")}, ValueError, "cos must be on cpu like q, got meta"),
    ({"scale": 0.0}, ValueError, "scale must be a finite number >= 1e-18, got 0.0"),
    ({"scale": float("nan")}, ValueError, "scale must be a finite number >= 1e-18, got nan"),
    ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_arguments(changed, error, message, backend):
    with use(backend), pytest.raises(error, match=f"rotary_norm: {message}"):
        ops.rotary_norm(**arguments(**changed))


def test_the_binding_checks_what_keeps_the_kernel_within_its_memory():
    native = torch.ops.nanochat_native
    for changed, error, _ in BAD:
        given = {"scale": 1.0, "eps": 0.0} | arguments(**changed)
        if any(isinstance(x, torch.Tensor) and x.is_meta for x in given.values()):
            continue
        with pytest.raises(error, match=r"^rotary_norm: "):
            native.rotary_norm(*(given[name] for name in ("q", "k", "cos", "sin", "eps", "scale")))
    q, k, cos, sin = arguments().values()
    q_r, k_r = torch.ones(2, 3, 4), torch.ones(2, 3, 2)
    right = [q, k, q, k, q_r, k_r, cos, sin, 1.0]
    native.rotary_norm_backward(*right)
    short = [q[:1], k[:1], q[:, :2], k[..., :1, :], q_r[..., :2], k_r[:1], cos[1:], sin[:, 1:], -1.0]
    for place, wrong in enumerate(short):
        with pytest.raises(ValueError, match=r"^rotary_norm_backward: "):
            native.rotary_norm_backward(*right[:place], wrong, *right[place + 1 :])
    for place in range(8):
        with pytest.raises(TypeError, match=r"^rotary_norm_backward: "):
            native.rotary_norm_backward(*right[:place], right[place].half(), *right[place + 1 :])


def test_the_reference_is_exported():
    q, k, cos, sin = (x + 0.5 for x in arguments().values())
    for mine, x in zip(reference.rotary_norm(q, k, cos, sin, scale=2.0), (q, k), strict=True):
        torch.testing.assert_close(mine.double(), formula(x, cos, sin, scale=2.0), atol=1e-6, rtol=1e-6)
