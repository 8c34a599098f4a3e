"""The norms, value embeddings, smear, rotation and squared ReLU on the GPU: shapes, strides, addresses, float64."""

import pytest
import torch
from sizes import SMALL, pick

from nanochat_native import ops

pytestmark = pytest.mark.gpu

F32, BF16 = torch.float32, torch.bfloat16
EPS = 2**-23


@pytest.fixture(autouse=True)
def kernels(require_native):
    require_native("rms_norm", "add_rms_norm", "embedding_rms_norm", "mix_rms_norm", "rotary_norm")
    require_native("relu_squared", "relu_squared_")
    require_native("add_value_embedding", "add_value_embedding_backward", "smear")


def moved(tensor):
    """The same values one element behind an aligned address, between elements of NaN."""
    room = torch.full((tensor.numel() + 17,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    room[9:-8] = tensor.flatten()
    return room[9:-8].view(tensor.shape)


def same(tensor):
    return tensor


def randn(device, *shape, dtype, place=same):
    return place(torch.randn(shape, device=device).to(dtype))


def assert_rounded(name, mine, exact):
    """One rounding of what float32 gives; `exact` is float64."""
    rtol = 2**-8 + 1e-5 if mine.dtype == BF16 else 3e-6
    torch.testing.assert_close(mine.double(), exact, rtol=rtol, atol=3e-6, msg=lambda text: f"{name}: {text}")


def gradients(results, inputs, grads):
    return torch.autograd.grad(results, inputs, grads)


def require_memory(gigabytes):
    if SMALL or torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"takes {gigabytes} GB of GPU memory")


def exact_norm(x):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


# --- rms_norm ---

# Rows of a warp, of a block, longer ones; with tails; the shapes of a model.
SHAPES = [(1, 1), (5, 7), (3, 3, 260), (70, 768), (9, 1281), (1, 1280), (4, 4096), (3, 9001), (2, 40_000), (4099, 64)]


@pytest.mark.parametrize("place", [same, moved])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_and_its_gradient(device, shape, dtype, place):
    x, dy = (randn(device, *shape, dtype=dtype, place=place) for _ in range(2))
    x.requires_grad_()
    y = ops.rms_norm(x)
    (dx,) = gradients(y, x, dy)
    wide = x.detach().double().requires_grad_()
    assert_rounded("y", y, exact_norm(wide))
    check_norm_gradient("dx", dx, dy, None, y, wide)


def check_norm_gradient(name, dx, dy, dsum, y, x):
    """The kernel's formula on the rounded y, which is what it is given; and the true gradient, less closely."""
    r = (x.detach().square().mean(-1, keepdim=True) + EPS).rsqrt()
    y, dy = y.detach().double(), dy.double()
    exact = r * (dy - y * (dy * y).mean(-1, keepdim=True)) + (0 if dsum is None else dsum.double())
    assert_rounded(name, dx, exact)
    (true,) = gradients(exact_norm(x), x, dy)
    true += 0 if dsum is None else dsum.double()
    largest = (r * dy).norm() + true.norm()  # of the terms, which cancel where C is small
    assert (dx.double() - true).norm() <= (1e-2 if dx.dtype == BF16 else 1e-5) * largest


@pytest.mark.parametrize("place", [same, moved])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_its_norm_and_their_gradient(device, shape, dtype, place):
    x, residual, dsum, dy = (randn(device, *shape, dtype=dtype, place=place) for _ in range(4))
    inputs = [x.requires_grad_(), residual.requires_grad_()]
    total, y = ops.add_rms_norm(*inputs)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.rms_norm(total.detach()))
    dx, dresidual = gradients((total, y), inputs, (dsum, dy))
    assert torch.equal(dx, dresidual)
    check_norm_gradient("dx", dx, dy, dsum, y, total.detach().double().requires_grad_())


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("table_dtype", [F32, BF16])
@pytest.mark.parametrize(("V", "C"), [(11, 7), (300, 768), (50, 1281)])
def test_the_norm_of_rows_of_a_table(device, V, C, table_dtype, dtype):
    table = randn(device, V, C, dtype=table_dtype).requires_grad_()
    tokens = torch.randint(0, V, (2, 37), device=device)
    y = ops.embedding_rms_norm(tokens, table, dtype)
    rounded = table.detach().to(dtype).double()[tokens].requires_grad_()
    assert_rounded("y", y, exact_norm(rounded))
    dy = randn(device, *y.shape, dtype=dtype)
    (dtable,) = gradients(y, table, dy)
    (dx,) = gradients(exact_norm(rounded), rounded, dy.double())
    exact = torch.zeros(V, C, dtype=torch.float64, device=device).index_put((tokens,), dx, accumulate=True)
    assert (dtable.double() - exact).norm() <= (2e-2 if BF16 in (table_dtype, dtype) else 1e-5) * exact.norm()


@pytest.mark.parametrize("token", [5, -1, 1 << 40])
def test_a_token_out_of_range_makes_its_own_row_nan(cuda, token):
    """On the GPU nobody waits to say more."""
    table = randn(cuda, 5, 768, dtype=F32)
    tokens = torch.tensor([4, token, 0], device=cuda)
    y = ops.embedding_rms_norm(tokens, table, BF16)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], ops.embedding_rms_norm(tokens[::2], table, BF16))


# torch sums the gradients of more than 3,072 tokens by other kernels.
@pytest.mark.parametrize("count", pick([1, 2000], [1]))
@pytest.mark.parametrize("token", [5, -1, 1 << 40])
def test_a_token_out_of_range_has_no_gradient(cuda, token, count):
    table = randn(cuda, 5, 768, dtype=F32).requires_grad_()
    known = torch.tensor([4, 0, 4], device=cuda).repeat(count)
    tokens = torch.cat((known, known.new_full((count,), token)))
    dy = randn(cuda, 4 * count, 768, dtype=BF16)
    (dtable,) = gradients(ops.embedding_rms_norm(tokens, table, BF16), table, dy)
    (expected,) = gradients(ops.embedding_rms_norm(known, table, BF16), table, dy[: 3 * count])
    torch.testing.assert_close(dtable, expected, rtol=1e-4, atol=1e-4)
    assert not dtable[1:4].any()


@pytest.mark.slow
def test_norms_of_more_than_two_billion_elements(cuda):
    """The last rows have the bits that they have alone."""
    require_memory(22)
    C, random_rows = 1280, 8  # all of these lie beyond element 2^31
    x = torch.ones((1 << 31) // C + 1 + random_rows, C, dtype=BF16, device=cuda)
    x[-random_rows:] = randn(cuda, random_rows, C, dtype=BF16)

    def results(x):
        """The sum, its norm, and the gradient of x."""
        sum_and_norm = ops.add_rms_norm(x.requires_grad_(), x.detach())
        dx = gradients(sum_and_norm, x, (x.detach(), x.detach()))
        return [*(result.detach() for result in sum_and_norm), *dx]

    alone = results(x[-random_rows:].clone())
    for mine, other, ones in zip(results(x), alone, (2, 1, 1), strict=True):
        assert torch.equal(mine[-random_rows:], other)
        assert (mine[:-random_rows] == ones).all()


def test_rows_that_are_out_of_the_ordinary(device):
    x = randn(device, 5, 1280, dtype=F32)
    x[0] = 0
    x[1, 7] = torch.inf
    x[2, 1279] = torch.nan
    x[3] *= 1e-20
    y = ops.rms_norm(x)
    torch.testing.assert_close(y.double(), exact_norm(x.double()), rtol=3e-6, atol=1e-30, equal_nan=True)


# --- mix_rms_norm ---


@pytest.mark.parametrize("place", [same, moved])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_mix_its_norm_and_their_gradient(device, shape, dtype, place):
    x, residual, x0, dz, dmixed, dy, later = (randn(device, *shape, dtype=dtype, place=place) for _ in range(7))
    scales = torch.tensor([1.1, -0.3], device=device).split(1)
    inputs = [tensor.requires_grad_() for tensor in (x, residual, x0, *(scale.clone() for scale in scales))]
    results = z, mixed, y, _ = ops.mix_rms_norm(*inputs)
    dx, dresidual, dx0, *of_factors = gradients(results, inputs, (dz, dmixed, dy, later))
    x_scale, x0_scale = (scale.double() for scale in scales)
    assert torch.equal(z, x + residual)
    assert_rounded("mixed", mixed, x_scale * z.double() + x0_scale * x0.double())
    assert torch.equal(y, ops.rms_norm(mixed.detach()))
    assert torch.equal(dx, dresidual)

    # The kernel's formula on the rounded z, mix and y, which are what it is given.
    with torch.no_grad():
        z, mixed, y, x0, dz, dmixed, dy, later = (t.double() for t in (z, mixed, y, x0, dz, dmixed, dy, later))
        r = (mixed.square().mean(-1, keepdim=True) + EPS).rsqrt()
        ds = dmixed + r * (dy - y * (dy * y).mean(-1, keepdim=True))
        assert_rounded("dx", dx, x_scale * ds + dz)
        assert_rounded("dx0", dx0, x0_scale * ds + later)
        for mine, stream in zip(of_factors, (z, x0), strict=True):
            size = 1 + (ds * stream).abs().sum()  # of the terms, which cancel
            assert (mine.double() - (ds * stream).sum()).abs() <= 1e-6 * size


@pytest.mark.slow
def test_the_mix_of_more_than_two_billion_elements(cuda):
    """The last rows have the bits that they have alone."""
    require_memory(40)
    C, random_rows = 1280, 8  # all of these lie beyond element 2^31
    x = torch.ones((1 << 31) // C + 1 + random_rows, C, dtype=BF16, device=cuda)
    x[-random_rows:] = randn(cuda, random_rows, C, dtype=BF16)
    scales = torch.tensor([0.5, 0.25], device=cuda).split(1)

    def results(x):
        """The mix of x + x and x, its norm, and the gradient of x."""
        inputs = x.requires_grad_(), x.detach(), x.detach()
        _, mixed, y, _ = ops.mix_rms_norm(*inputs, *scales)
        return [mixed.detach(), y.detach(), *gradients((mixed, y), x, (x.detach(), x.detach()))]

    alone = results(x[-random_rows:].clone())
    for mine, other, ones in zip(results(x), alone, (1.25, 1, 0.5), strict=True):
        assert torch.equal(mine[-random_rows:], other)
        assert (mine[:-random_rows] == ones).all()


# --- add_value_embedding ---

VALUE_TYPES = [(F32, F32), (BF16, F32), (BF16, BF16)]


def assert_near(name, mine, exact, tolerance):
    assert (mine.double() - exact).norm() <= tolerance * exact.norm(), name


@pytest.mark.parametrize("place", [same, moved])
@pytest.mark.parametrize(("dtype", "table_dtype"), VALUE_TYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (70, 5, 26, 7), (999, 6, 128, 12), (130, 2, 256, 64), (5, 2, 1100, 33)], ids=str
)
def test_value_embeddings_and_their_gradients(device, sizes, dtype, table_dtype, place):
    (N, Hkv, D, I), V = sizes, 50  # noqa: E741
    v, dout = (randn(device, N, Hkv, D, dtype=dtype, place=place) for _ in range(2))
    h = randn(device, N, I + 3, dtype=dtype, place=place)[:, 1 : 1 + I]
    gate = randn(device, Hkv, I, dtype=F32, place=place) * I**-0.5
    table = randn(device, V, Hkv * D, dtype=table_dtype, place=place)
    inputs = [x.requires_grad_() for x in (v, h.detach(), gate, table)]
    ids = torch.randint(0, V, (N,), device=device)
    out = ops.add_value_embedding(*inputs, ids)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    gates = 3 * (wide[1] @ wide[2].mT).sigmoid()[..., None]
    exact = wide[0] + gates * wide[3][ids].view(N, Hkv, D)
    assert_rounded("out", out, exact)
    grads = gradients(out, inputs, dout)
    for name, grad, true in zip(
        ("dv", "dh", "dgate", "dtable"), grads, gradients(exact, wide, dout.double()), strict=True
    ):
        assert_near(name, grad, true, 1e-2 if grad.dtype == BF16 else 1e-5)


@pytest.mark.parametrize("wrong", [5, -1, 1 << 40])
def test_an_id_out_of_range_makes_its_own_row_nan_and_adds_nothing(cuda, wrong):
    v, dout = (randn(cuda, 3, 2, 64, dtype=BF16) for _ in range(2))
    h, gate, table = randn(cuda, 3, 12, dtype=BF16), randn(cuda, 2, 12, dtype=F32), randn(cuda, 5, 128, dtype=F32)
    ids = torch.tensor([4, wrong, 0], device=cuda)
    out = ops.add_value_embedding(v, h, gate, table, ids)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], ops.add_value_embedding(v[::2], h[::2], gate, table, ids[::2]))
    dh, *sums = ops.add_value_embedding_backward(dout, h, gate, table, ids)
    known, *expected = ops.add_value_embedding_backward(dout[::2], h[::2], gate, table, ids[::2])
    assert torch.equal(dh[::2], known)
    assert not dh[1].any()
    for mine, other in zip(sums, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_value_embeddings_of_more_than_two_billion_elements(cuda):
    """The last tokens, all of them beyond element 2^31, have the bits that they have alone."""
    require_memory(22)
    N, Hkv, D, count = (1 << 21) + 100, 8, 128, 100
    v = torch.ones(N, Hkv, D, dtype=BF16, device=cuda)
    v[-count:] = torch.randn_like(v[-count:])
    h, gate = torch.ones(N, 12, dtype=BF16, device=cuda), randn(cuda, Hkv, 12, dtype=F32)
    table, ids = randn(cuda, 7, Hkv * D, dtype=BF16), torch.arange(N, device=cuda) % 7

    def results(rows):
        out = ops.add_value_embedding(v[rows], h[rows], gate, table, ids[rows])
        dh, _, drows = torch.ops.nanochat_native.add_value_embedding_backward(v[rows], h[rows], gate, table, ids[rows])
        return out, dh, drows

    alone = results(slice(-count, None))
    for mine, other in zip(results(slice(None)), alone, strict=True):
        assert torch.equal(mine[-count:], other)


# --- smear ---


@pytest.mark.parametrize("place", [same, moved])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1), (3, 1, 30, 24), (2, 70, 64, 24), (2, 300, 768, 24), (1, 40, 1281, 64), (2, 3, 9001, 5)],
    ids=str,
)
def test_smear_and_its_gradients(device, sizes, dtype, place):
    B, T, C, I = sizes  # noqa: E741
    x, dout = (randn(device, B, T, C, dtype=dtype, place=place) for _ in range(2))
    gate = randn(device, 1, I, dtype=F32, place=place) * I**-0.5
    inputs = [tensor.requires_grad_() for tensor in (x, gate, torch.tensor([0.7], device=device))]
    out = ops.smear(*inputs)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    gates = wide[2] * (wide[0][:, 1:, :I] @ wide[1].mT).sigmoid()
    exact = torch.cat((wide[0][:, :1], wide[0][:, 1:] + gates * wide[0][:, :-1]), 1)
    assert_rounded("out", out, exact)
    grads = gradients(out, inputs, dout)
    for name, grad, true in zip(("dx", "dgate", "dlambda"), grads, gradients(exact, wide, dout.double()), strict=True):
        assert_near(name, grad, true, 1e-2 if grad.dtype == BF16 else 1e-4)


@pytest.mark.slow
def test_smear_of_more_than_two_billion_elements(cuda):
    """The last sequence, all of it beyond element 2^31, has the bits that it has alone."""
    require_memory(22)
    B, T, C = 1025, 2048, 1024
    x = torch.ones(B, T, C, dtype=BF16, device=cuda)
    x[-1] = torch.randn_like(x[-1])
    gate, smear_lambda = randn(cuda, 1, 24, dtype=F32), torch.ones(1, device=cuda)

    def results(x):
        out = ops.smear(x, gate, smear_lambda)
        return out, torch.ops.nanochat_native.smear_backward(x, x, gate, smear_lambda)[0]

    for mine, other in zip(results(x), results(x[-1:].clone()), strict=True):
        assert torch.equal(mine[-1:], other)


# --- rotary_norm ---

# B, T, H, Hkv, D
HEADS = [(2, 37, 6, 6, 128), (1, 70, 10, 1, 64), (2, 5, 5, 2, 256), (1, 9, 3, 3, 96), (1, 7, 9, 1, 26), (3, 2, 1, 1, 2)]


def within(tensor):
    """Between other heads, as where q, k and v are one product."""
    B, T, H, D = tensor.shape
    around = torch.full((B, T, H + 3, D), torch.nan, dtype=tensor.dtype, device=tensor.device)
    around[:, :, 1:-2] = tensor
    return around[:, :, 1:-2]


def heads_first(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def last_dimension_apart(tensor):
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def exact_rotary_norm(x, cos, sin, scale):
    x1, x2 = x.chunk(2, -1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return scale * exact_norm(torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1))


@pytest.mark.parametrize("layout", [same, moved, within, heads_first, last_dimension_apart])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rotation_and_norm_and_their_gradient(device, shape, dtype, layout):
    B, T, H, Hkv, D = shape
    q, k, dq_out, dk_out = (layout(randn(device, B, T, heads, D, dtype=dtype)) for heads in (H, Hkv, H, Hkv))
    angles = torch.randn(T + 3, D, device=device) * 3
    cos, sin = angles.cos()[3:, : D // 2], angles.sin()[3:, D // 2 :]
    inputs = [q.requires_grad_(), k.requires_grad_()]
    results = ops.rotary_norm(*inputs, cos, sin, scale=1.2)
    grads = gradients(results, inputs, (dq_out, dk_out))
    for name, x, out, dout, dx in zip("qk", inputs, results, (dq_out, dk_out), grads, strict=True):
        wide = x.detach().double().requires_grad_()
        exact = exact_rotary_norm(wide, cos, sin, 1.2)
        assert_rounded(f"{name}_out", out, exact)
        (true,) = gradients(exact, wide, dout.double())
        assert (dx.double() - true).norm() <= (1e-2 if dtype == BF16 else 1e-5) * true.norm()


@pytest.mark.slow
def test_rotation_of_more_than_two_billion_elements(cuda):
    """The last sequence, all of it beyond element 2^31, has the bits that it has alone."""
    require_memory(22)
    B, T, H, Hkv, D = 1025, 2048, 8, 1, 128
    q, k = (torch.ones(B, T, heads, D, dtype=BF16, device=cuda) for heads in (H, Hkv))
    for x in (q, k):
        x[-1] = torch.randn_like(x[-1])
    angles = torch.randn(T, D // 2, device=cuda) * 3

    def results(*inputs):
        """The results and the gradients of q and k."""
        rotated = ops.rotary_norm(*(x.requires_grad_() for x in inputs), angles.cos(), angles.sin())
        return [*(x.detach() for x in rotated), *gradients(rotated, inputs, [x.detach() for x in inputs])]

    alone = results(q[-1:].clone(), k[-1:].clone())
    for mine, other in zip(results(q, k), alone, strict=True):
        assert torch.equal(mine[-1:], other)
        assert torch.equal(mine[-2], mine[0])


# --- relu_squared ---

SIZES = [(1,), (7,), (3, 5), (4096,), (8192,), (2, 0), (20_003,), (1_000_003,)]


@pytest.mark.parametrize("place", [same, moved])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_square_and_its_gradient(device, shape, dtype, place):
    x, dy = (randn(device, *shape, dtype=dtype, place=place) for _ in range(2))
    x.requires_grad_()
    y = ops.relu_squared(x)
    assert_rounded("y", y, x.detach().double().relu().square())
    (dx,) = gradients(y, x, dy)
    assert_rounded("dx", dx, 2 * y.detach().double().sqrt() * dy.double())

    in_place, in_place_dy = place(x.detach().clone()), place(dy.clone())
    ops.relu_squared_(in_place)
    ops.relu_squared_backward_(in_place_dy, in_place)
    assert torch.equal(in_place, y)
    assert torch.equal(in_place_dy, dx)


@pytest.mark.slow
def test_the_square_of_more_than_two_billion_elements(cuda):
    """The last elements have the bits that they have alone."""
    require_memory(22)
    count = 10_000  # all of these lie beyond element 2^31
    x = torch.ones((1 << 31) + count, dtype=BF16, device=cuda)
    x[-count:] = randn(cuda, count, dtype=BF16)

    def results(x):
        """The square, and the gradient of x."""
        y = ops.relu_squared(x.requires_grad_())
        return [y.detach(), *gradients(y, x, x.detach())]

    alone = results(x[-count:].clone())
    for mine, other, ones in zip(results(x), alone, (1, 2), strict=True):
        assert torch.equal(mine[-count:], other)
        assert (mine[:-count] == ones).all()


def test_the_square_of_numbers_that_are_out_of_the_ordinary(device):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30, 3e-18], device=device)
    y = ops.relu_squared(x)
    torch.testing.assert_close(y, x.relu().square(), rtol=1e-6, atol=0, equal_nan=True)
    dx = torch.ones_like(x)
    ops.relu_squared_backward_(dx, y)
    torch.testing.assert_close(dx, 2 * y.sqrt(), rtol=1e-6, atol=0, equal_nan=True)
