"""Results and figures that the guide cites are computed again."""

import math

import chapters
import pytest

RESULTS = chapters.merged("results")
FIGURES = chapters.merged("figures")
TOLERANCE = 0.01
# Differences that rounding causes, around zero.
SMALLEST = 1e-5


def differences(stored, found, path=""):
    """Yield where two results differ by more than TOLERANCE. Machines and versions may differ."""
    if isinstance(stored, dict) and isinstance(found, dict):
        for name in sorted(stored.keys() | found.keys()):
            if name not in ("machine", "output"):
                yield from differences(stored.get(name), found.get(name), f"{path}.{name}")
    elif isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        for number, pair in enumerate(zip(stored, found, strict=True)):
            yield from differences(*pair, f"{path}.{number}")
    elif isinstance(stored, float | int) and isinstance(found, float | int):
        if not math.isclose(stored, found, rel_tol=TOLERANCE, abs_tol=SMALLEST):
            yield f"{path}: {stored} is stored, {found} was computed"
    elif stored != found:
        yield f"{path}: {stored!r} is stored, {found!r} was computed"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, result in RESULTS.items() if result.exact])
def test_exact_results_are_reproduced(name):
    found = chapters.compact(RESULTS[name].compute())
    assert list(differences(chapters.load(name), found)) == []


@pytest.mark.parametrize(
    ("stored", "found", "count"),
    [
        ({"a": [1.0, 2]}, {"a": [1.005, 2], "machine": 1}, 0),
        ({"a": [1.0, 2]}, {"a": [1.02, 2]}, 1),
        ({"a": 0.0}, {"a": 1e-7}, 0),
        ({"a": "x"}, {"a": "y", "b": 1}, 2),
        ({"a": [1]}, {"a": [1, 2]}, 1),
    ],
)
def test_differences_are_found(stored, found, count):
    assert len(list(differences(stored, found))) == count


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_to_the_same_bytes(name):
    matplotlib = pytest.importorskip("matplotlib")
    if matplotlib.__version__ != "3.11.2":
        pytest.skip("the figures are those of matplotlib 3.11.2")
    path = chapters.FIGURES_FOLDER / f"{name}.svg"
    assert chapters.draw(FIGURES[name]) == path.read_bytes()
    assert path.stat().st_size < 150_000
