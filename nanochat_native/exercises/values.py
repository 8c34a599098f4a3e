"""Comparison of values that functions return: tensors, arrays, numbers, texts, lists, tuples and dicts."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor


def difference(found: Any, right: Any, tolerance: float, *, dtypes: bool = True, place: str = "") -> str:
    """Return how a value differs from the right one, as a phrase; "" if it does not.

    Floating-point values may differ by `tolerance` times the largest right value. A list may stand for a tuple, an
    array for a tensor, and a tensor or array without dimensions for a number.

    Args:
        dtypes: Whether arrays must have the right dtype.
        place: what to call the value in the phrase, such as [0] for the first of a list.
    """
    if _is_number(right) and _is_number(found):
        return _compare_numbers(found, right, tolerance, place)
    if _is_array(right) and _is_array(found):
        return _compare_arrays(_tensor(found), _tensor(right), tolerance, dtypes, place)
    mismatch = f"{_at(place)}{describe(found)} where {describe(right)} is right"
    if isinstance(right, dict) and isinstance(found, dict):
        if found.keys() != right.keys():
            return f"{_at(place)}keys {_list(found)} where {_list(right)} are right"
        pairs = [(f"{place}[{key!r}]", found[key], right[key]) for key in right]
    elif isinstance(right, list | tuple) and isinstance(found, list | tuple):
        if len(found) != len(right):
            return f"{_at(place)}{len(found)} values where {len(right)} are right"
        pairs = [(f"{place}[{index}]", *pair) for index, pair in enumerate(zip(found, right, strict=True))]
    elif _is_number(right) or _is_array(right) or isinstance(right, dict | list | tuple):
        return mismatch
    else:
        return "" if type(found) is type(right) and found == right else mismatch
    texts = (difference(one, other, tolerance, dtypes=dtypes, place=name) for name, one, other in pairs)
    return next(filter(None, texts), "")


def describe(value: Any) -> str:
    """Return a short description of a value: an array by its shape, a text or a number by itself."""
    if _is_array(value) and value.ndim:
        return f"({', '.join(map(str, value.shape))}{',' * (value.ndim == 1)})"
    if _is_number(value) and not isinstance(value, bool):
        plain = _plain(value)
        return f"{plain:.6g}" if isinstance(plain, float) else str(plain)
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"a {type(value).__name__} of {len(text)} characters"


def _compare_numbers(found: Any, right: Any, tolerance: float, place: str) -> str:
    found, right = _plain(found), _plain(right)
    exact = isinstance(right, int)
    if found == right or (found != found and right != right):
        return ""
    if not exact and abs(found - right) <= tolerance * abs(right) < math.inf:
        return ""
    texts = describe(found), describe(right)
    if texts[0] == texts[1]:
        texts = str(found), str(right)
    return f"{_at(place)}{texts[0]} where {texts[1]} is right"


def _compare_arrays(found: Tensor, right: Tensor, tolerance: float, dtypes: bool, place: str) -> str:
    if found.shape != right.shape:
        return f"{_at(place)}the shape is {tuple(found.shape)} where {tuple(right.shape)} is right"
    if dtypes and found.dtype != right.dtype:
        names = [str(tensor.dtype).removeprefix("torch.") for tensor in (found, right)]
        return f"{_at(place)}the dtype is {names[0]} where {names[1]} is right"
    wide = torch.complex128 if found.is_complex() or right.is_complex() else torch.float64
    one, other = found.detach().cpu().to(wide), right.detach().cpu().to(wide)
    size = other.abs()[other.isfinite()]
    largest = tolerance * (float(size.max()) if size.numel() and size.max() > 0 else 1.0)
    exact = not (right.is_floating_point() or right.is_complex())
    off = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, (one - other).abs())
    off = torch.where(off.isnan(), torch.inf, off)
    if not off.numel() or float(off.max()) <= (0.0 if exact else largest):
        return ""
    index = [int(i) for i in np.unravel_index(int(off.argmax()), tuple(off.shape))]
    where = f" at {place}{index}" if index else ""
    shown = [f"{tensor[tuple(index)].item():.6g}" for tensor in (one, other)]
    return f"the largest difference is {float(off.max()):.3g}{where}: {shown[0]} where {shown[1]} is right"


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_number(value: Any) -> bool:
    if _is_array(value):
        return value.ndim == 0
    return isinstance(value, numbers.Number | np.bool_)


def _plain(value: Any) -> Any:
    """Return a number as one of Python's. A bool is a whole number."""
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, bool) else value


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _at(place: str) -> str:
    return f"at {place}: " if place else ""


def _list(values: Any) -> str:
    return describe(list(values))
