"""newton_schulz: against the reference in float64, error bounds on hard spectra, orthogonality, and properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_native import ops
from nanochat_native.ops import reference

BFLOAT16_SETS = {"amx", "avx512_bf16", "neon_bf16"}
OPERATOR = torch.ops.nanochat_native.newton_schulz.default
NAMES = ["quintic", "polar_express", "cubic"]
SHAPES = [(1, 1), (1, 9), (9, 1), (2, 3), (7, 5), (64, 64), (65, 63), (96, 384), (384, 96), (3, 33, 17), (2, 2, 20, 50)]


def multiplies_bfloat16():
    return ops.instruction_set() in BFLOAT16_SETS


def decaying(M, K, decades):
    """Return a matrix whose singular values decay geometrically over that many decades."""
    r = min(M, K)
    u, _ = torch.linalg.qr(torch.randn(M, r, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(K, r, dtype=torch.float64))
    return u * torch.logspace(0, -decades, r, dtype=torch.float64) @ v.T


@pytest.mark.parametrize("coefficients", [*NAMES, [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0)]], ids=[*NAMES, "list"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, coefficients):
    g = torch.randn(shape, dtype=torch.float64)
    out = ops.newton_schulz(g, coefficients=coefficients)
    torch.testing.assert_close(out, reference.newton_schulz(g, coefficients=coefficients), atol=1e-9, rtol=1e-9)
    single = ops.newton_schulz(g.float(), coefficients=coefficients)
    torch.testing.assert_close(single.double(), out, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("shape", [(128, 128), (256, 64), (64, 256), (96, 768)], ids=str)
@pytest.mark.parametrize("decades", [0, 3, 6])
def test_error_on_decaying_spectra(decades, shape, coefficients):
    """The error in float32 is at most twice that of plain torch in float32, or 1e-5 of the norm."""
    g = decaying(*shape, decades)
    exact = reference.newton_schulz(g, coefficients=coefficients)
    mine = (ops.newton_schulz(g.float(), coefficients=coefficients).double() - exact).norm() / exact.norm()
    plain = (reference.newton_schulz(g.float(), coefficients=coefficients).double() - exact).norm() / exact.norm()
    assert mine <= max(2 * plain, 1e-5)


def in_bfloat16(g, coefficients):
    """Return what torch.optim.Muon computes, with the schedule of newton_schulz."""
    triples, norm_factor = reference.newton_schulz_schedule(5, coefficients)
    x = (g / (norm_factor * torch.linalg.matrix_norm(g))).bfloat16()
    x = x.mT if g.size(0) > g.size(1) else x
    for a, b, c in triples:
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if g.size(0) > g.size(1) else x


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("shape", [(128, 128), (256, 64), (64, 256), (96, 768), (20, 30), (600, 550)], ids=str)
@pytest.mark.parametrize("decades", [None, 0, 3, 6])
def test_error_of_bfloat16_products_is_that_of_torchs_muon(decades, shape, coefficients):
    g = torch.randn(shape, dtype=torch.float64) if decades is None else decaying(*shape, decades)
    exact = reference.newton_schulz(g, coefficients=coefficients)
    single = ops.newton_schulz(g.float(), coefficients=coefficients)
    out = ops.newton_schulz(g.float(), coefficients=coefficients, allow_bfloat16=True)
    if not multiplies_bfloat16():
        assert torch.equal(out, single)
        return
    assert not torch.equal(out, single)
    mine, torchs = ((x.double() - exact).norm() / exact.norm() for x in (out, in_bfloat16(g.float(), coefficients)))
    assert mine <= 1.2 * torchs
    assert mine < 0.03 or decades is not None


@pytest.mark.parametrize("shape", [(1, 1), (3, 33, 17), (2, 17, 33), (2, 40, 300), (300, 40)], ids=str)
def test_bfloat16_products_of_any_shape_and_a_batch(shape):
    g = torch.randn(shape)
    out = ops.newton_schulz(g, coefficients="cubic", allow_bfloat16=True)
    assert (out - ops.newton_schulz(g, coefficients="cubic")).norm() <= 0.01 * out.norm()
    alone = [ops.newton_schulz(each, coefficients="cubic", allow_bfloat16=True) for each in g.view(-1, *shape[-2:])]
    assert torch.equal(out.view(-1, *shape[-2:]), torch.stack(alone))


def test_bfloat16_products_leave_float64_and_known_norms_as_they_are():
    g = torch.randn(2, 30, 40, dtype=torch.float64)
    assert torch.equal(ops.newton_schulz(g, allow_bfloat16=True), ops.newton_schulz(g))
    g = g.float()
    plain = ops.newton_schulz(g, coefficients="cubic", allow_bfloat16=True)
    norms = torch.linalg.matrix_norm(g.double())
    known = ops.newton_schulz(g, coefficients="cubic", norms=norms, allow_bfloat16=True)
    torch.testing.assert_close(known, plain, atol=2e-3, rtol=0)
    equilibrated = {"coefficients": "cubic", "equilibrate_rows": True, "norm_eps": 1e-6}
    expected = ops.newton_schulz(g, **equilibrated)
    found = ops.newton_schulz(g, **equilibrated, allow_bfloat16=True)
    assert (found - expected).norm() <= 0.01 * expected.norm()
    assert (found - plain).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("shape", [(64, 64), (128, 48), (48, 128)], ids=str)
def test_singular_values(shape):
    g = torch.stack([decaying(*shape, decades).float() for decades in (0, 0.5, 1, 1.5)])
    for name, low, high in (("quintic", 0.6, 1.3), ("polar_express", 0.8, 1.2)):
        values = torch.linalg.svdvals(ops.newton_schulz(g, coefficients=name))
        assert values.min() > low, name
        assert values.max() < high, name


def test_cubic_converges_to_the_polar_factor():
    g = torch.randn(3, 40, 24, dtype=torch.float64)
    out = ops.newton_schulz(g, steps=40, coefficients="cubic")
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    torch.testing.assert_close(out, u @ vh)
    torch.testing.assert_close(out.mT @ out, torch.eye(24, dtype=torch.float64).expand(3, 24, 24))


def test_transposed_input_gives_the_transposed_result():
    g = torch.randn(90, 40)
    torch.testing.assert_close(ops.newton_schulz(g.mT), ops.newton_schulz(g).mT, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("exponent", [-120, -60, -1, 1, 60])
def test_result_does_not_depend_on_the_scale(exponent):
    g = torch.randn(2, 24, 40)
    torch.testing.assert_close(ops.newton_schulz(g * 2.0**exponent), ops.newton_schulz(g), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("allow_bfloat16", [False, True])
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("shape", [(8, 8), (20, 5), (5, 20)], ids=str)
def test_zero_and_nan_stay_in_their_matrix(shape, coefficients, backend, allow_bfloat16):
    ops.use_backend(backend)
    g = torch.randn(4, *shape)
    g[1] = 0
    options = {"coefficients": coefficients, "allow_bfloat16": allow_bfloat16}
    clean = ops.newton_schulz(g, **options)
    g[2, 3, 1] = torch.nan
    g[3, 0, 0] = torch.inf
    out = ops.newton_schulz(g, **options)
    assert torch.equal(out[0], clean[0])
    assert torch.count_nonzero(out[1]) == 0
    assert out[2].isnan().all()
    assert not out[3].isfinite().any()


@pytest.mark.filterwarnings("ignore:nanochat_native. .* is served by plain torch")
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_gradient_of_a_zero_matrix_with_equilibrated_rows_is_zero(backend):
    ops.use_backend(backend)
    g = torch.randn(3, 5, 8, dtype=torch.float64)
    g[1], g[2, 3] = 0, 0
    g.requires_grad_()
    (grad,) = torch.autograd.grad(ops.newton_schulz(g, equilibrate_rows=True), g, torch.randn_like(g))
    assert grad.isfinite().all()
    assert torch.count_nonzero(grad[1]) == 0
    assert torch.count_nonzero(grad[0]) == 40


def test_steps_and_triples():
    g = torch.randn(9, 6, dtype=torch.float64)
    first, second = (2.0, -1.5, 0.5), (1.5, -0.5, 0.0)
    one = ops.newton_schulz(g, steps=1, coefficients=[first])
    torch.testing.assert_close(ops.newton_schulz(g, steps=1, coefficients=[first, second]), one)
    repeated = ops.newton_schulz(g, steps=4, coefficients=[first, second])
    torch.testing.assert_close(repeated, ops.newton_schulz(g, steps=4, coefficients=[first, second, second, second]))
    assert not torch.allclose(repeated, one)
    five = list(reference.COEFFICIENTS["polar_express"])
    seven, norm_factor = reference.newton_schulz_schedule(7, "polar_express")
    assert seven == [*five, five[-1], five[-1]]
    assert norm_factor == 1.01


@given(
    shape=st.lists(st.integers(1, 3), max_size=2),
    M=st.integers(1, 50),
    K=st.integers(1, 50),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_shape_strides_and_dtype(shape, M, K, transposed, dtype):
    g = torch.randn(*shape, M, K, dtype=torch.float64).to(dtype)
    if transposed:
        g = g.mT
    out = ops.newton_schulz(g)
    assert out.shape == g.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out.double(), reference.newton_schulz(g.double()), atol=tolerance, rtol=tolerance)


def test_no_matrices():
    assert ops.newton_schulz(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 200, 40), (3, 40, 60)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_known_norms(dtype, shape, coefficients, backend):
    """Norms may be strided and of several scales, and are used: twice the norm halves the result of a linear step."""
    ops.use_backend(backend)
    g = torch.randn(shape).mul(10.0 ** torch.randint(-9, 9, (*shape[:-2], 1, 1))).to(dtype)
    norms = torch.linalg.matrix_norm(g.double())
    norms = torch.stack([norms, -norms], -1)[..., 0]
    plain = ops.newton_schulz(g, coefficients=coefficients)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    known = ops.newton_schulz(g, coefficients=coefficients, norms=norms)
    torch.testing.assert_close(known, plain, atol=tolerance, rtol=tolerance)
    one_step = {"steps": 1, "coefficients": [(1.0, 0.0, 0.0)]}
    halved = ops.newton_schulz(g, norms=2 * norms, **one_step)
    torch.testing.assert_close(2 * halved, ops.newton_schulz(g, **one_step), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_known_norms_of_zero_and_nan(backend):
    ops.use_backend(backend)
    g = torch.randn(3, 20, 5)
    g[1], g[2, 3, 1] = 0, torch.nan
    out = ops.newton_schulz(g, norms=torch.linalg.matrix_norm(g.double()))
    assert out[0].isfinite().all()
    assert torch.count_nonzero(out[1]) == 0
    assert out[2].isnan().all()


@pytest.mark.parametrize("allow_bfloat16", [False, True])
@pytest.mark.parametrize("shape", [(200, 200), (3, 256, 64), (550, 600)], ids=str)
def test_same_bits_every_time_and_for_every_number_of_threads(shape, allow_bfloat16):
    g = torch.randn(shape)
    first = ops.newton_schulz(g, allow_bfloat16=allow_bfloat16)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert torch.equal(ops.newton_schulz(g, allow_bfloat16=allow_bfloat16), first)


def test_opcheck_and_compile():
    g = torch.randn(2, 9, 5)
    for norms in (None, torch.linalg.matrix_norm(g.double())):
        for allow_bfloat16 in (False, True):
            torch.library.opcheck(OPERATOR, (g, [3.4445, -4.7750, 2.0315] * 5, 1.0, norms, None, allow_bfloat16))

    def doubled(g):
        return ops.newton_schulz(2 * g, coefficients="polar_express")

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(g), doubled(g))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("g", "options", "error", "words"),
    [
        (torch.zeros(3), {}, ValueError, r"g must have shape \(..., M, K\), got \(3,\)"),
        (torch.zeros(3, 3, dtype=torch.int32), {}, TypeError, "g must be .*, got torch.int32"),
        (torch.zeros(3, 3), {"steps": 0}, ValueError, "steps must be >= 1, got 0"),
        (
            torch.zeros(3, 3),
            {"coefficients": "septic"},
            ValueError,
            "coefficients must be 'quintic', 'polar_express', 'cubic' or a list of triples, got 'septic'",
        ),
        (torch.zeros(3, 3), {"coefficients": []}, ValueError, r"coefficients must be a name or a list .*, got \[\]"),
        (torch.zeros(3, 3), {"coefficients": [(1.0, 2.0)]}, ValueError, "triples"),
        (torch.zeros(3, 3), {"norms": torch.ones(())}, TypeError, "norms must be torch.float64, got torch.float32"),
        (
            torch.zeros(2, 3, 3),
            {"norms": torch.ones(3).double()},
            ValueError,
            r"norms must have shape \(2,\), that of g without M and K, got \(3,\)",
        ),
        (
            torch.zeros(3, 3),
            {"norms": torch.ones((), dtype=torch.float64, device="meta")},
            ValueError,
            "norms must be on cpu like g, got meta",
        ),
    ],
)
def test_bad_arguments(g, options, error, words, backend):
    ops.use_backend(backend)
    with pytest.raises(error, match=words):
        ops.newton_schulz(g, **options)


def test_the_raw_operator_checks_too():
    with pytest.raises(ValueError, match="coefficients must have three numbers for each step, got 4 numbers"):
        OPERATOR(torch.zeros(3, 3), [1.0, 2.0, 3.0, 4.0], 1.0, None)
    with pytest.raises(TypeError, match=r"g must have one of the dtypes .*, got BFloat16"):
        OPERATOR(torch.zeros(3, 3, dtype=torch.bfloat16), [1.0, 2.0, 3.0], 1.0, None)
    with pytest.raises(TypeError, match="norms must have dtype Double, got Float"):
        OPERATOR(torch.zeros(3, 3), [1.0, 2.0, 3.0], 1.0, torch.ones(()))
    with pytest.raises(ValueError, match=r"norms must have shape \[3\], got \[2\]"):
        OPERATOR(torch.zeros(3, 3, 3), [1.0, 2.0, 3.0], 1.0, torch.ones(2).double())
