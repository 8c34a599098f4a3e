"""Results and figures that the guide cites are computed again."""

import base64
import io
import json
import math
import re

import chapters
import pytest
from test_guide_commands import same_output

from nanochat_native import demonstrate
from nanochat_native.demonstrate import lines_of

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
def test_exact_results_are_reproduced(name, tmp_path):
    """A demonstration is run as its command: test_guide_commands.py leaves these out."""
    result, path = RESULTS[name], tmp_path / "numbers.json"
    if result.is_exact_demonstration:
        assert demonstrate.main([*result.command.split()[3:], "--json", str(path)]) == 0
        found = chapters.compact(json.loads(path.read_text()))
    else:
        found = chapters.compact(result.compute())
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


def printed_demonstrations():
    """Return (name, name of the numbers) of each result that is what `demonstrate` prints."""
    numbers = {result.command: name for name, result in RESULTS.items() if "output" not in chapters.load(name)}
    printed = [name for name in RESULTS if chapters.load(name).keys() == {"machine", "output"}]
    return [(name, numbers[RESULTS[name].command]) for name in printed if ".demonstrate " in RESULTS[name].command]


@pytest.mark.parametrize(("name", "numbers"), printed_demonstrations())
def test_a_printed_demonstration_has_the_stored_numbers(name, numbers):
    values = {key: value for key, value in chapters.load(numbers).items() if key != "machine"}
    stored = "\n".join(" ".join(row) for row in lines_of(values))
    assert same_output(stored, chapters.load(name)["output"])


def comparable(svg):
    """Return an SVG with its images as pixels and its clip paths numbered.

    The bytes of a PNG depend on the library that compressed it. The name of a clip path is a hash of coordinates, whose
    last bits depend on the processor.
    """
    from PIL import Image

    def pixels(match):
        image = Image.open(io.BytesIO(base64.b64decode(match[1])))
        return f"{image.mode} {image.size} {image.tobytes().hex()}"

    text = re.sub(r'(?<=id="image)\w+', "", svg.decode())  # a hash of these bytes
    text = re.sub(r"data:image/png;base64,([\w+/=\s]+)", pixels, text)
    for number, name in enumerate(dict.fromkeys(re.findall(r'<clipPath id="(p[0-9a-f]{10})"', text))):
        text = text.replace(name, f"clip{number}")
    return text


def test_images_are_compared_by_their_pixels():
    Image = pytest.importorskip("PIL.Image")

    def svg(color, level):
        file = io.BytesIO()
        Image.new("RGBA", (20, 20), color).save(file, format="png", compress_level=level)
        content = base64.b64encode(file.getvalue()).decode()
        return f'<image id="image{level}" href="data:image/png;base64,{content}"/>'.encode()

    assert svg("red", 1) != svg("red", 9)
    assert comparable(svg("red", 1)) == comparable(svg("red", 9)) != comparable(svg("blue", 9))


def test_clip_paths_are_compared_by_their_rectangles():
    def svg(name, width):
        return f'<path clip-path="url(#{name})"/><clipPath id="{name}"><rect width="{width}"/></clipPath>'.encode()

    first, other = svg("p0123456789", 1), svg("pabcdef0123", 1)
    assert comparable(first) == comparable(other) != comparable(svg("p0123456789", 2))


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_to_the_same_bytes(name):
    matplotlib = pytest.importorskip("matplotlib")
    if matplotlib.__version__ != "3.11.2":
        pytest.skip("the figures are those of matplotlib 3.11.2")
    path = chapters.FIGURES_FOLDER / f"{name}.svg"
    assert comparable(chapters.draw(FIGURES[name])) == comparable(path.read_bytes())
    assert path.stat().st_size < 150_000
