"""Weights in int8 with a scale for each row, for generation."""

import torch
from torch import Tensor

LARGEST = 127  # -128 is not used, so that a row and its negative have negative codes


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix in int8, and the scales of its rows.

    The scale of a row is its largest absolute value divided by 127. The codes are the numbers of the row divided by the
    scale, rounded to the nearest whole number, and to the even one of two. A row of zeros has the scale 0.

    Args:
        weight: (N, K), floating point, N and K from 0.

    Returns:
        The codes, (N, K), int8, contiguous, and the scales, (N,), float32.

    Raises:
        ValueError: weight is no matrix, or has numbers that are not finite.
    """
    if weight.dim() != 2:
        raise ValueError(f"quantize_rows: weight must have shape (N, K), got {tuple(weight.shape)}")
    wide = weight.detach().float()
    if not wide.isfinite().all():
        raise ValueError("quantize_rows: weight must be finite, got infinities or NaN")
    largest = wide.abs().amax(1) if wide.size(1) else wide.new_zeros(wide.size(0))
    scales = largest / LARGEST
    codes = torch.where(scales[:, None] > 0, wide / scales[:, None], 0.0).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8).contiguous(), scales


def dequantize_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the matrix (N, K) that codes (N, K) and scales (N,) stand for, in the type of the scales."""
    return codes.to(scales.dtype) * scales[:, None]
