"""Measures the time of several functions under equal conditions."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any


def milliseconds(function: Callable[[], Any]) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def turns(
    functions: list[Callable[[], Any]],
    *,
    seconds: float,
    repeats: int,
    clock: Callable[[Callable[[], Any]], float] = milliseconds,
) -> list[list[float]]:
    """Return the times of each function, in milliseconds by `clock`.

    The functions take turns, so that a slow phase of the machine affects all of them. There are at least `repeats`
    turns, and more until `seconds` have passed.
    """
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    gc.collect()
    start = time.perf_counter()
    while len(times[0]) < repeats or time.perf_counter() - start < seconds:
        for function, taken in zip(functions, times, strict=True):
            taken.append(clock(function))
    return times


def side_by_side(functions: list[Callable[[], Any]], *, seconds: float, repeats: int) -> list[float]:
    """Return the median time of each function, in milliseconds, taking turns."""
    return [statistics.median(taken) for taken in turns(functions, seconds=seconds, repeats=repeats)]
