"""Weights in int8: the codes against the definition, and rows that are special."""

import pytest
import torch

from nanochat_native.ops.quantization import dequantize_rows, quantize_rows


def test_codes_are_the_nearest_multiples_of_the_scale_of_their_row():
    weight = torch.randn(70, 33, dtype=torch.float64).float()
    weight[3] *= 1e6
    codes, scales = quantize_rows(weight)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(scales, weight.abs().amax(1) / 127)
    assert torch.equal(codes.abs().amax(1), torch.full((70,), 127, dtype=torch.int8))
    error = (dequantize_rows(codes, scales) - weight).abs() / scales[:, None]
    assert 0.49 < error.max() <= 0.5 + 1e-5


def test_halves_are_rounded_to_even_and_signs_mirror():
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    codes, scales = quantize_rows(torch.cat((row, -row)))
    assert scales.tolist() == [1, 1]
    assert codes[0].tolist() == [127, 0, 2, 2, 0, -2, -126]
    assert torch.equal(codes[1], -codes[0])


def test_rows_of_zeros_and_of_the_smallest_numbers():
    smallest = 2.0**-149
    codes, scales = quantize_rows(torch.tensor([[0.0, -0.0], [smallest, 0], [190 * smallest, -80 * smallest]]))
    assert codes[:2].tolist() == [[0, 0], [0, 0]]
    assert scales[:2].tolist() == [0, 0]
    assert codes[2].tolist() == [127, -80]  # the scale is one step of the smallest numbers


def test_a_bfloat16_matrix_and_one_without_rows_or_columns():
    weight = torch.randn(5, 8).bfloat16()
    for found, expected in zip(quantize_rows(weight), quantize_rows(weight.float()), strict=True):
        assert torch.equal(found, expected)
    assert quantize_rows(torch.ones(0, 3))[0].shape == (0, 3)
    assert quantize_rows(torch.ones(2, 0))[1].tolist() == [0, 0]


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match=r"quantize_rows: weight must have shape \(N, K\), got \(3,\)"):
        quantize_rows(torch.ones(3))
    for number in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="quantize_rows: weight must be finite"):
            quantize_rows(torch.tensor([[1.0, number]]))
