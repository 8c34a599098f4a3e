"""Products in FP8 for linear layers: scaling, rounding, and the product by torch.

A matrix is multiplied by a scale, so that its largest magnitude becomes the largest number of its FP8 type, and is
rounded. The product of two such matrices is divided by both scales. torch._scaled_mm does that on tensor cores, with
float32 sums. Scales stay on the device: the host waits for none.

The recipes are those of torchao (https://docs.pytorch.org/ao/stable/api_reference/api_ref_float8.html):
    tensorwise: one scale for a matrix. Activations and weights are float8_e4m3fn, gradients float8_e5m2.
    rowwise: one scale, a power of two, for each row that a product sums over. All matrices are float8_e4m3fn. A matrix
        that takes part in two products is scaled by rows for one and by columns for the other.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

RECIPES = ("tensorwise", "rowwise")
ACTIVATION, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST_AMAX = 1e-12  # matrices and rows with smaller elements are scaled as if this was their largest magnitude
MULTIPLE = 16  # what tensor cores need the sizes of all three products to be a multiple of
SMALLEST_SIZE = 128  # of both sizes of a weight: below it, scaling costs more than the product saves


def takes(weight: Tensor) -> bool:
    """Return whether a weight (O, I) is multiplied in FP8, by nanochat's rule: O and I >= 128 and multiples of 16."""
    return min(weight.shape) >= SMALLEST_SIZE and not any(size % MULTIPLE for size in weight.shape)


class Scaled(NamedTuple):
    """A matrix (M, K) in FP8, and the float32 factor that it was divided by: 0-d, or (M, 1) for one of each row."""

    values: Tensor
    factor: Tensor

    @property
    def exact(self) -> Tensor:
        """The matrix that this stands for, in float32."""
        return self.values.float() * self.factor


def quantize(x: Tensor, dtype: torch.dtype, *, by_rows: bool) -> Scaled:
    """Return a floating-point matrix (M, K) in an FP8 type.

    A matrix of zeros stays zero. If an element is not finite, all elements become NaN, those of its row `by_rows`.
    """
    amax = torch.linalg.vector_norm(x, torch.inf, dim=-1 if by_rows else None, keepdim=by_rows)
    scale = torch.finfo(dtype).max / amax.double().clamp_min(SMALLEST_AMAX)
    if by_rows:
        scale = scale.log2().floor().exp2()
    scale = scale.float()
    return Scaled((x.float() * scale).to(dtype), scale.reciprocal())


class Matrix:
    """A factor of products in FP8, scaled for the products that are asked for.

    Args:
        x: (M, K), floating point.
        recipe: one of RECIPES.
        dtype: the FP8 type, ACTIVATION or GRADIENT, of the recipe tensorwise.
    """

    def __init__(self, x: Tensor, recipe: str, dtype: torch.dtype = ACTIVATION) -> None:
        self.is_rowwise = recipe == "rowwise"
        self._x = x if self.is_rowwise else None
        if not self.is_rowwise:
            self.rows = quantize(x, dtype, by_rows=False)

    @cached_property
    def rows(self) -> Scaled:
        """The matrix, for a product that sums over its rows."""
        assert self._x is not None
        return quantize(self._x, ACTIVATION, by_rows=True)

    @property
    def columns(self) -> Scaled:
        """The transposed matrix (K, M), for a product that sums over the columns."""
        if self._x is None:
            return Scaled(self.rows.values.T, self.rows.factor)
        return quantize(self._x.T, ACTIVATION, by_rows=True)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """Tensors from which `restored` makes the matrix again, for a backward pass."""
        return tuple(self.rows) if self._x is None else (self._x,)

    @classmethod
    def restored(cls, kept: tuple[Tensor, ...]) -> "Matrix":
        """Return a matrix with such `kept` tensors."""
        if len(kept) == 1:
            return cls(kept[0], "rowwise")
        matrix = cls.__new__(cls)
        matrix.is_rowwise, matrix._x, matrix.rows = False, None, Scaled(*kept)
        return matrix


def product(a: Scaled, b: Scaled, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """Return a b^T (M, N) for matrices (M, K) and (N, K) in FP8, K a multiple of 16, in bfloat16 or float32.

    Args:
        fast: Whether tensor cores may sum with fewer bits than float32 has.
    """
    # The library reads both factors along K. With a factor for each row it writes bfloat16 only.
    by_rows = a.factor.dim() > 0
    out = torch._scaled_mm(
        a.values.contiguous(),
        b.values.contiguous().T,
        scale_a=a.factor,
        scale_b=b.factor.T if by_rows else b.factor,
        out_dtype=torch.bfloat16 if by_rows else dtype,
        use_fast_accum=fast,
    )
    return out.to(dtype)


def reference_product(a: Scaled, b: Scaled, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """Return what `product` returns, by a product in float32 of what the factors stand for."""
    return (a.exact @ b.exact.T).to(dtype)


def linear(x: Matrix, weight: Matrix, dtype: torch.dtype) -> Tensor:
    """Return x weight^T (N, O) for x (N, I) and weight (O, I)."""
    return product(x.rows, weight.rows, dtype, fast=True)


def linear_backward(dy: Matrix, x: Matrix, weight: Matrix, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradients of `linear` for dy (N, O): dy weight in `dtype`, and dy^T x in float32."""
    return product(dy.rows, weight.columns, dtype), product(dy.columns, x.columns, torch.float32)
