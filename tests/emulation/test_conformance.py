"""Fragments, swizzles and descriptors, csrc/emulation/fragments.h and csrc/cuda/ptx/layouts.h, are CuTe's.

conformance.cpp compares them element by element, on the host, and prints "name mismatches/total".
"""

import shutil
import subprocess

import pytest
import toolchain

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


def start_build(csrc, folder):
    compiler = toolchain.host_compiler()
    system = [toolchain.cute_include(), *toolchain.cuda_includes()]
    command = [*compiler, "-std=c++20", "-O1", f"-I{csrc}", *(word for path in system for word in ("-isystem", path))]
    source = toolchain.ROOT / "tests/emulation/conformance.cpp"
    log = open(folder / "log", "w")  # noqa: SIM115
    return subprocess.Popen([*command, source, "-o", folder / "conformance"], stderr=log)


def results(build, folder):
    assert build.wait() == 0, (folder / "log").read_text()
    lines = subprocess.run([folder / "conformance"], capture_output=True, text=True, check=True).stdout.splitlines()
    checks = [(name, *map(int, counts.split("/"))) for name, counts in map(str.split, lines)]
    assert len({name for name, *_ in checks}) == len(checks)
    return {name: counts for name, *counts in checks}


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """Results of the checks, for our headers and for a copy with all defects; compiled side by side."""
    ours, wrong = tmp_path_factory.mktemp("conformance"), tmp_path_factory.mktemp("conformance-defects")
    for name in (FRAGMENTS, LAYOUTS):
        (wrong / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(toolchain.ROOT / "csrc" / name, wrong / name)
    for name, text, replacement in set(DEFECTS.values()):
        content = (wrong / name).read_text()
        assert content.count(text) == 1, text
        (wrong / name).write_text(content.replace(text, replacement))
    try:
        builds = start_build(toolchain.ROOT / "csrc", ours), start_build(wrong, wrong)
    except toolchain.MissingError as error:
        pytest.skip(str(error))
    return results(builds[0], ours), results(builds[1], wrong)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_cute(both, name):
    mismatches, total = both[0][name]
    assert total > 0
    assert mismatches == 0


def test_no_check_is_left_out(both):
    assert sorted(both[0]) == NAMES


@pytest.mark.parametrize("prefix", DEFECTS)
def test_a_wrong_map_is_found(both, prefix):
    assert any(mismatches > 0 for name, (mismatches, _) in both[1].items() if name.startswith(prefix))


def test_a_wrong_map_spoils_no_other_check(both):
    assert not [name for name, (mismatches, _) in both[1].items() if name.startswith(EXACT) and mismatches]
