"""Fragments, swizzles and descriptors, csrc/emulation/fragments.h and csrc/cuda/ptx/layouts.h, are CuTe's.

conformance.cpp compares them element by element, on the host, and prints "name mismatches/total".
"""

import shutil
import subprocess

import pytest
import toolchain
from compiled import compiled

MAJORS = ("k", "mn")
SWIZZLES = ("none", "32", "64", "128")
ORDERS = ("mn_first", "k_first")
TILES = ("64x64", "64x128", "128x64", "192x128", "256x64")

# What no instruction reads: the distance of atoms along K in a tile whose swizzle is at least as wide as 16 elements.
NOT_READ = {f"descriptor_leading_{swizzle}_k_{order}" for swizzle in ("32", "64", "128") for order in ORDERS}


def names():
    for numbers in ("bfloat16", "float16"):
        yield from (f"mma_{operand}_{numbers}" for operand in "abd")
        yield f"wgmma_a_{numbers}"
    yield from (f"wgmma_d_n{n}" for n in range(8, 257, 8))
    for instruction in ("ldmatrix", "stmatrix"):
        yield from (f"{instruction}_x{count}{trans}" for count in (1, 2, 4) for trans in ("", "_trans"))
    for kind in (f"{swizzle}_{major}" for swizzle in SWIZZLES for major in MAJORS):
        yield f"swizzle_{kind}"
        tiles = [(tile, "64") for tile in TILES] + [("192x128", "192"), ("256x64", "256")]
        if kind == "none_mn" or kind.endswith("_k"):  # whose atoms are 8 wide
            tiles += [("8x64", "8")]
        yield from (f"address_{kind}_{tile}_{order}_by_{part}" for tile, part in tiles for order in ORDERS)
        for field in ("start", "leading", "stride", "swizzle", "base_offset"):
            yield from {f"descriptor_{field}_{kind}_{order}" for order in ORDERS} - NOT_READ


NAMES = sorted(names())

# Wrong maps: file, text, what stands in its place; and the checks that must notice.
FRAGMENTS, LAYOUTS = "emulation/fragments.h", "cuda/ptx/layouts.h"
DEFECTS = {
    "mma_a_": (FRAGMENTS, "i % 2 + 8 * (i / 4)}", "i % 2 + 4 * (i / 4)}"),
    "mma_b_": (FRAGMENTS, "i % 2 + 8 * (i / 2), lane / 4}", "i % 2 + 4 * (i / 2), lane / 4}"),
    "wgmma_a_": (FRAGMENTS, "{thread / 32 * 16 + place.row, place.column}", "{place.row, place.column}"),
    "wgmma_d_": (FRAGMENTS, "i / 4 * 8 + place.column", "i / 4 * 4 + place.column"),
    "ldmatrix_x4_trans": (FRAGMENTS, "transposed ? Place{", "!transposed ? Place{"),
    "stmatrix_x1": (FRAGMENTS, "transposed ? Place{", "!transposed ? Place{"),
    "swizzle_64_mn": (LAYOUTS, "address >> 7", "address >> 8"),
    "descriptor_swizzle_128_k": (LAYOUTS, "(swizzle) << 62", "(swizzle) << 61"),
    "descriptor_stride_none_mn": (LAYOUTS, ">> 4) << 32", ">> 4) << 33"),
    "address_none_mn": (FRAGMENTS, "byte / width * along_mn", "byte / width * along_k"),
}
EXACT = ("mma_d_", "swizzle_none_", "descriptor_start_")  # what these defects leave as it is


def results(csrc):
    """Return what conformance.cpp prints with the headers of a folder: {check: (mismatches, total)}."""
    try:
        system = [toolchain.cute_include(), *toolchain.cuda_includes()]
    except toolchain.MissingError as error:
        pytest.skip(str(error))
    flags = [*toolchain.host_compiler(), "-std=c++20", "-O1", *(word for path in system for word in ("-isystem", path))]
    source = toolchain.ROOT / "tests/emulation/conformance.cpp"

    def make(folder):
        command = [*flags, f"-I{csrc}", source, "-o", folder / "conformance"]
        compiler = subprocess.run(command, capture_output=True, text=True)
        assert compiler.returncode == 0, compiler.stderr

    program = compiled("conformance", flags, [source], make, csrc) / "conformance"
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    checks = [(name, *map(int, counts.split("/"))) for name, counts in map(str.split, lines)]
    assert len({name for name, *_ in checks}) == len(checks)
    return {name: counts for name, *counts in checks}


@pytest.fixture(scope="session")
def ours():
    return results(toolchain.ROOT / "csrc")


@pytest.fixture(scope="session")
def wrong(tmp_path_factory):
    """Results for a copy of our headers with all defects."""
    folder = tmp_path_factory.mktemp("conformance-defects")
    for name in (FRAGMENTS, LAYOUTS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(toolchain.ROOT / "csrc" / name, folder / name)
    for name, text, replacement in set(DEFECTS.values()):
        content = (folder / name).read_text()
        assert content.count(text) == 1, text
        (folder / name).write_text(content.replace(text, replacement))
    return results(folder)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_cute(ours, name):
    mismatches, total = ours[name]
    assert total > 0
    assert mismatches == 0


def test_no_check_is_left_out(ours):
    assert sorted(ours) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("prefix", DEFECTS)
def test_a_wrong_map_is_found(wrong, prefix):
    assert any(mismatches > 0 for name, (mismatches, _) in wrong.items() if name.startswith(prefix))


@pytest.mark.slow
def test_a_wrong_map_spoils_no_other_check(wrong):
    assert not [name for name, (mismatches, _) in wrong.items() if name.startswith(EXACT) and mismatches]
