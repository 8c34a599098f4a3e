"""newton_schulz: against the twin in float64, error bounds on hard spectra, orthogonality, and properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_native import ops
from nanochat_native.ops import reference

OPERATOR = torch.ops.nanochat_native.newton_schulz.default
UPDATE = torch.ops.nanochat_native.newton_schulz_update_.default
NAMES = ["quintic", "polar_express", "cubic"]
SHAPES = [(1, 1), (1, 9), (9, 1), (2, 3), (7, 5), (64, 64), (65, 63), (96, 384), (384, 96), (3, 33, 17), (2, 2, 20, 50)]


def decaying(M, K, decades):
    """A matrix whose singular values decay geometrically over that many decades."""
    r = min(M, K)
    u, _ = torch.linalg.qr(torch.randn(M, r, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(K, r, dtype=torch.float64))
    return u * torch.logspace(0, -decades, r, dtype=torch.float64) @ v.T


@pytest.mark.parametrize("coefficients", [*NAMES, [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0)]], ids=[*NAMES, "list"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_twin(shape, coefficients):
    g = torch.randn(shape, dtype=torch.float64)
    out = ops.newton_schulz(g, coefficients=coefficients)
    torch.testing.assert_close(out, reference.newton_schulz(g, coefficients=coefficients), atol=1e-9, rtol=1e-9)
    single = ops.newton_schulz(g.float(), coefficients=coefficients)
    torch.testing.assert_close(single.double(), out, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("shape", [(128, 128), (256, 64), (64, 256), (96, 768)], ids=str)
@pytest.mark.parametrize("decades", [0, 3, 6])
def test_error_on_decaying_spectra(decades, shape, coefficients):
    """Against float64, float32 is at most twice as far off as plain torch in float32, or off by 1e-5 of the norm."""
    g = decaying(*shape, decades)
    exact = reference.newton_schulz(g, coefficients=coefficients)
    mine = (ops.newton_schulz(g.float(), coefficients=coefficients).double() - exact).norm() / exact.norm()
    plain = (reference.newton_schulz(g.float(), coefficients=coefficients).double() - exact).norm() / exact.norm()
    assert mine <= max(2 * plain, 1e-5)


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


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("shape", [(8, 8), (20, 5), (5, 20)], ids=str)
def test_zero_and_nan_stay_in_their_matrix(shape, coefficients, backend):
    ops.use_backend(backend)
    g = torch.randn(4, *shape)
    g[1] = 0
    clean = ops.newton_schulz(g, coefficients=coefficients)
    g[2, 3, 1] = torch.nan
    g[3, 0, 0] = torch.inf
    out = ops.newton_schulz(g, coefficients=coefficients)
    assert torch.equal(out[0], clean[0])
    assert torch.count_nonzero(out[1]) == 0
    assert out[2].isnan().all()
    assert not out[3].isfinite().any()


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
    """Strided norms of matrices of several scales; twice the norm halves the start, so the argument does count."""
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


@pytest.mark.parametrize("shape", [(200, 200), (3, 256, 64)], ids=str)
def test_same_bits_every_time_and_for_every_number_of_threads(shape):
    g = torch.randn(shape)
    first = ops.newton_schulz(g)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert torch.equal(ops.newton_schulz(g), first)


def test_opcheck_and_compile():
    g = torch.randn(2, 9, 5)
    for norms in (None, torch.linalg.matrix_norm(g.double())):
        torch.library.opcheck(OPERATOR, (g, [3.4445, -4.7750, 2.0315] * 5, 1.0, norms))

    def doubled(g):
        return ops.newton_schulz(2 * g, coefficients="polar_express")

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(g), doubled(g))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("g", "options", "error", "words"),
    [
        (torch.zeros(3), {}, ValueError, r"g has shape \(3,\); takes \(..., M, K\)"),
        (torch.zeros(3, 3, dtype=torch.int32), {}, TypeError, "g is torch.int32"),
        (torch.zeros(3, 3), {"steps": 0}, ValueError, "steps is 0"),
        (torch.zeros(3, 3), {"coefficients": "septic"}, ValueError, "'septic'; takes 'quintic'"),
        (torch.zeros(3, 3), {"coefficients": []}, ValueError, r"coefficients is \[\]"),
        (torch.zeros(3, 3), {"coefficients": [(1.0, 2.0)]}, ValueError, "triples"),
        (torch.zeros(3, 3), {"norms": torch.ones(())}, TypeError, "norms is torch.float32; takes torch.float64"),
        (
            torch.zeros(2, 3, 3),
            {"norms": torch.ones(3).double()},
            ValueError,
            r"norms has shape \(3,\); takes \(2,\), as g",
        ),
        (
            torch.zeros(3, 3),
            {"norms": torch.ones((), dtype=torch.float64, device="meta")},
            ValueError,
            "norms is on meta; takes cpu",
        ),
    ],
)
def test_bad_arguments(g, options, error, words, backend):
    ops.use_backend(backend)
    with pytest.raises(error, match=words):
        ops.newton_schulz(g, **options)


def test_the_raw_operator_checks_too():
    with pytest.raises(ValueError, match="coefficients has 4 numbers; takes three for each step"):
        OPERATOR(torch.zeros(3, 3), [1.0, 2.0, 3.0, 4.0], 1.0, None)
    with pytest.raises(TypeError, match="g is BFloat16; takes"):
        OPERATOR(torch.zeros(3, 3, dtype=torch.bfloat16), [1.0, 2.0, 3.0], 1.0, None)
    with pytest.raises(TypeError, match="norms is Float; takes Double"):
        OPERATOR(torch.zeros(3, 3), [1.0, 2.0, 3.0], 1.0, torch.ones(()))
    with pytest.raises(ValueError, match=r"norms has shape \[2\]; takes \[3\]"):
        OPERATOR(torch.zeros(3, 3, 3), [1.0, 2.0, 3.0], 1.0, torch.ones(2).double())


# --- newton_schulz_update_ ---

RATES = {"lr": 0.1, "weight_decay": 0.2, "scale": 1.5}


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 5), (20, 96), (2, 3, 9, 33)], ids=str)
def test_update_is_newton_schulz_and_muon_update(shape, dtype, cautious, backend):
    ops.use_backend(backend)
    params, update = [torch.randn(shape).to(dtype) for _ in range(3)], torch.randn(3, *shape)
    twin, kept = [param.clone() for param in params], update.clone()
    norms = torch.linalg.matrix_norm(update.double())
    ops.newton_schulz_update_(params, update, coefficients="cubic", steps=4, norms=norms, cautious=cautious, **RATES)
    orthogonal = reference.newton_schulz(update.double(), coefficients="cubic", steps=4).float()
    reference.muon_update_(twin, orthogonal, cautious=cautious, **RATES)
    assert torch.equal(update, kept)
    for mine, other in zip(params, twin, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_update_takes_numbers_in_tensors_and_marks_what_it_updates(backend):
    ops.use_backend(backend)
    update = torch.randn(2, 8, 12)
    params, twin = ([torch.ones(8, 12), torch.ones(8, 12)] for _ in range(2))
    version = params[1]._version
    ops.newton_schulz_update_(params, update, **RATES)
    tensors = {name: torch.tensor(RATES[name], dtype=torch.float64) for name in ("lr", "weight_decay")}
    ops.newton_schulz_update_(twin, update, scale=RATES["scale"], **tensors)
    assert all(map(torch.equal, params, twin))
    assert params[1]._version > version


def test_update_of_no_numbers():
    params = [torch.zeros(0, 4)]
    ops.newton_schulz_update_(params, torch.zeros(1, 0, 4), lr=0.1)


def test_update_opcheck_and_compile():
    params, update = [torch.randn(9, 5) for _ in range(2)], torch.randn(2, 9, 5)
    numbers = [3.4445, -4.7750, 2.0315] * 5
    for norms in (None, torch.linalg.matrix_norm(update.double())):
        torch.library.opcheck(UPDATE, (params, update, numbers, 1.0, norms, 0.1, 0.1, 1.0, False, None, None))

    def step(params, update):
        ops.newton_schulz_update_(params, update, **RATES)

    twin = [param.clone() for param in params]
    step(params, update)
    torch.compile(step, fullgraph=True, backend="aot_eager")(twin, update)
    assert all(map(torch.equal, params, twin))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("params", "update", "options", "error", "words"),
    [
        ([], torch.zeros(0, 3, 3), {}, ValueError, "params is empty"),
        ([torch.zeros(3, 3)], torch.zeros(1, 3, 4), {}, ValueError, r"update has shape \(1, 3, 4\)"),
        ([torch.zeros(3)] * 2, torch.zeros(2, 3), {}, ValueError, r"params has shape \(3,\); takes \(..., M, K\)"),
        ([torch.zeros(3, 3)], torch.zeros(1, 3, 3).double(), {}, TypeError, "update is torch.float64"),
        ([torch.zeros(3, 3).half()], torch.zeros(1, 3, 3), {}, TypeError, r"params\[0\] is torch.float16"),
        ([torch.zeros(3, 3)], torch.zeros(1, 3, 3), {"steps": 0}, ValueError, "steps is 0"),
        ([torch.zeros(3, 3)], torch.zeros(1, 3, 3), {"lr": -1.0}, ValueError, "lr is -1.0"),
        ([torch.zeros(3, 3)], torch.zeros(1, 3, 3), {"norms": torch.ones(2).double()}, ValueError, r"norms has shape"),
    ],
)
def test_update_bad_arguments(params, update, options, error, words, backend):
    ops.use_backend(backend)
    with pytest.raises(error, match=f"newton_schulz_update_: {words}"):
        ops.newton_schulz_update_(params, update, **({"lr": 0.1} | options))


def test_the_raw_update_checks_too():
    numbers, rest = [1.0, 2.0, 3.0], (0.1, 0.1, 1.0, False, None, None)
    with pytest.raises(ValueError, match=r"newton_schulz_update_: params has shape \[3\]"):
        UPDATE([torch.zeros(3), torch.zeros(3)], torch.zeros(2, 3), numbers, 1.0, None, *rest)
    with pytest.raises(ValueError, match="newton_schulz_update_: coefficients has 2 numbers"):
        UPDATE([torch.zeros(3, 3)], torch.zeros(1, 3, 3), [1.0, 2.0], 1.0, None, *rest)
    shared = torch.zeros(1, 3, 3)
    with pytest.raises(ValueError, match=r"newton_schulz_update_: .* share memory"):
        UPDATE([shared[0]], shared, numbers, 1.0, None, *rest)
