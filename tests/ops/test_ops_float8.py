"""FP8 for linear layers: rounding, scales and products, against bounds that follow from the formats."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_native.ops import float8
from nanochat_native.ops.float8 import ACTIVATION, GRADIENT, RECIPES, SMALLEST_AMAX, Matrix, Scaled, quantize

DTYPES = (ACTIVATION, GRADIENT)
ROUNDING = {ACTIVATION: 2.0**-4, GRADIENT: 2.0**-3}  # half the distance of two numbers, relative: 3 and 2 bits
SUBNORMAL = {ACTIVATION: 2.0**-10, GRADIENT: 2.0**-17}  # half the distance of the smallest numbers


def need_products_by_rows():
    """Skip where torch has no product with a factor for each row on a CPU: 2.11 has none."""
    rows = Matrix(torch.ones(16, 16), "rowwise").rows
    try:
        float8.product(rows, rows, torch.bfloat16)
    except RuntimeError as error:
        if "per-tensor scaling" not in str(error):
            raise
        pytest.skip(f"torch {torch.__version__} has no product with a factor for each row on a CPU")


@pytest.fixture(params=RECIPES)
def recipe(request):
    if request.param == "rowwise":
        need_products_by_rows()
    return request.param


def error_bound(x, scaled):
    """Return how far each element of `scaled` may be from that of x: rounding, and 3 roundings of float32."""
    dtype = scaled.values.dtype
    return x.double().abs() * (ROUNDING[dtype] + 3 * 2.0**-24) + SUBNORMAL[dtype] * scaled.factor.double()


def matrix(M, K, spread=1.0, dtype=torch.bfloat16):
    """A matrix whose rows and columns have different magnitudes."""
    sizes = 10 ** (spread * torch.randn(M, 1)) * 10 ** (spread * torch.randn(1, K))
    return (torch.randn(M, K) * sizes).to(dtype)


@given(
    M=st.integers(1, 20),
    K=st.integers(1, 20),
    spread=st.sampled_from([0.0, 1.0]),
    scale=st.sampled_from([1e-9, 1.0, 1e30]),
    dtype=st.sampled_from(DTYPES),
    by_rows=st.booleans(),
    source=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_each_element_is_rounded_within_the_bound_of_its_format(M, K, spread, scale, dtype, by_rows, source):
    x = (matrix(M, K, spread, torch.float32) * scale).clamp(-3e38, 3e38).to(source)
    scaled = quantize(x, dtype, by_rows=by_rows)
    assert scaled.values.dtype == dtype
    assert scaled.factor.shape == ((M, 1) if by_rows else ())
    assert ((scaled.exact.double() - x.double()).abs() <= error_bound(x, scaled)).all()
    amax = x.float().abs().amax(-1, keepdim=True) if by_rows else x.float().abs().amax()
    largest = scaled.values.float().abs().amax(-1, keepdim=True) if by_rows else scaled.values.float().abs().amax()
    # The range is used: up to the largest number, or, as scales of rows are powers of two, at least half of it.
    reached = torch.finfo(dtype).max * (0.5 * (1 - ROUNDING[dtype]) if by_rows else 1.0)
    assert (largest[amax >= SMALLEST_AMAX] >= reached).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_rows", [False, True])
def test_zeros_and_tiny_and_huge_numbers(dtype, by_rows):
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e-30), torch.full((8,), 3e38), torch.ones(8)])
    alone = [quantize(row[None], dtype, by_rows=by_rows).exact[0] for row in x]
    assert torch.equal(alone[0], x[0])
    assert torch.equal(alone[1], x[0])  # as if its largest magnitude were 1e-12
    torch.testing.assert_close(alone[2], x[2], rtol=ROUNDING[dtype], atol=0)
    together = quantize(x, dtype, by_rows=by_rows).exact
    assert torch.equal(together[3] != 0, torch.full((8,), by_rows))  # 1 is nothing beside 3e38
    assert together.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_noticed(dtype, bad):
    """It must not be clamped to a number, or the step would not be skipped."""
    x = torch.ones(4, 8)
    x[2, 3] = bad
    assert quantize(x, dtype, by_rows=False).exact.isnan().all()
    assert quantize(x, dtype, by_rows=True).exact.isnan().all(-1).tolist() == [False, False, True, False]


def test_the_scales_of_rows_are_powers_of_two():
    factor = quantize(matrix(50, 16), ACTIVATION, by_rows=True).factor
    assert torch.equal(factor.log2(), factor.log2().round())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_product_of_torch_is_that_of_what_the_factors_stand_for(recipe, dtype):
    a, b = Matrix(matrix(48, 64, 0.3), recipe, GRADIENT), Matrix(matrix(32, 64, 0.3), recipe)
    ours = float8.product(a.rows, b.rows, dtype)
    assert ours.dtype == dtype
    exact = a.rows.exact.double() @ b.rows.exact.double().T
    terms = a.rows.exact.double().abs() @ b.rows.exact.double().abs().T
    # bfloat16 is also what the product with a factor for each row writes.
    written = 2.0**-8 if dtype == torch.bfloat16 or recipe == "rowwise" else 2.0**-23
    for mine in (ours, float8.reference_product(a.rows, b.rows, dtype)):
        assert ((mine.double() - exact).abs() <= written * exact.abs() + 64 * 2.0**-23 * terms).all()


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_a_linear_layer_errs_within_the_bound_of_its_roundings(recipe, spread):
    """Against float64: each element may be off by what the roundings of the elements that it sums allow."""
    x, weight, dy = matrix(64, 128, spread), matrix(144, 128, spread, torch.float32), matrix(64, 144, spread)
    gradient_dtype = GRADIENT if recipe == "tensorwise" else ACTIVATION
    factors = Matrix(x, recipe), Matrix(weight, recipe), Matrix(dy, recipe, GRADIENT)
    again = [Matrix.restored(factor.kept) for factor in factors[:2]]
    y = float8.linear(*factors[:2], torch.bfloat16)
    dx, dweight = float8.linear_backward(factors[2], *again, torch.bfloat16)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    by_rows = recipe == "rowwise"
    cases = (
        (y, (x, ACTIVATION), (weight, ACTIVATION), 2.0**-8),
        (dx, (dy, gradient_dtype), (weight.T, ACTIVATION), 2.0**-8),
        (dweight, (dy.T, gradient_dtype), (x.T, ACTIVATION), 2.0**-8 if by_rows else 2.0**-23),
    )
    for mine, (a, a_dtype), (b, b_dtype), written in cases:
        bound_a, bound_b = (error_bound(z, quantize(z, t, by_rows=by_rows)) for z, t in ((a, a_dtype), (b, b_dtype)))
        a, b = a.double(), b.double()
        exact, terms = a @ b.T, (a.abs() + bound_a) @ (b.abs() + bound_b).T
        bound = bound_a @ b.abs().T + a.abs() @ bound_b.T + bound_a @ bound_b.T
        error = (mine.double() - exact).abs()
        assert (error <= (1 + written) * bound + written * exact.abs() + 128 * 2.0**-23 * terms).all()
        assert error.norm() > 1e-4 * exact.norm()  # FP8 it is
    # The format of the gradients shows in their error: e5m2 has one bit less than e4m3.
    assert factors[2].rows.values.dtype == gradient_dtype


def test_rows_are_more_exact_than_the_whole_matrix_where_their_sizes_differ():
    need_products_by_rows()
    x, weight = matrix(64, 128, 0), matrix(128, 128, 0, torch.float32)
    x[:32] *= 1e-5
    exact = x.double() @ weight.double().T
    errors = {
        recipe: (float8.linear(Matrix(x, recipe), Matrix(weight, recipe), torch.float32).double() - exact)[:32].norm()
        for recipe in RECIPES
    }
    assert errors["rowwise"] < 0.2 * errors["tensorwise"]


def test_nanochats_rule_for_the_layers():
    sizes = {(128, 128): True, (128, 144): True, (112, 1024): False, (1024, 112): False, (136, 128): False}
    assert {shape: float8.takes(torch.empty(shape, device="meta")) for shape in sizes} == sizes


def test_scaled_is_what_it_stands_for():
    scaled = Scaled(torch.tensor([[2.0, -3.0]]).to(ACTIVATION), torch.tensor([[0.5]]))
    assert scaled.exact.tolist() == [[1.0, -1.5]]
