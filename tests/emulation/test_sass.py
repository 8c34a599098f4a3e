"""The machine code of every kernel: order and budget of main loops, registers of products in flight, stores, size."""

import itertools
import re
import shutil

import pytest
import sass
import toolchain
from sass_limits import LIMITS, defects, measure, order_of, over_budget, untyped
from sass_mutations import FEWER_KERNELS, MUTATIONS

CUDA = toolchain.CUDA
HOPPER = [CUDA / f"{name}_hopper.cu" for name in ("attention_forward", "attention_backward", "newton_schulz")]
# The assemblers beside nvcc's own, and the wheels that have them.
WHEELS = {"oldest": "'nvidia-cuda-nvcc-cu12>=12.8,<12.9'", "newest": "--no-deps 'nvidia-cuda-nvcc>=13.5,<14'"}


def kernels_of(source, architecture="sm_90a", assembler="nvcc", tree=toolchain.ROOT):
    """Return the functions that a ptxas makes of a source: nvcc's own, the oldest, or the newest."""
    try:
        toolchain.nvdisasm()
        result = toolchain.compile_cuda(source, architecture, tree=tree)
    except toolchain.MissingError as error:
        pytest.skip(str(error))
    if assembler != "nvcc":
        found = toolchain.wheel_assemblers()
        version = toolchain.OLDEST_ASSEMBLER if assembler == "oldest" else max(found, default=None)
        if version not in found or (assembler == "newest" and version < toolchain.NEWEST_ASSEMBLER):
            pytest.skip(f"the {assembler} ptxas is not installed: pip install {WHEELS[assembler]}")
        assert not result.error, result.error
        result = toolchain.assemble(result, found[version])
        assert result.complaints() == []
    assert not result.error, result.error
    return list(sass.disassemble(result.cubin).values())


def quick(source):
    return pytest.param(source, marks=() if source.stem == "attention_forward_hopper" else pytest.mark.slow)


@pytest.mark.parametrize("assembler", ["nvcc", *(pytest.param(name, marks=pytest.mark.slow) for name in WHEELS)])
@pytest.mark.parametrize("source", [quick(source) for source in HOPPER], ids=lambda path: path.stem)
def test_main_loops_keep_their_order_and_budget(source, assembler):
    found = {kernel.name: over_budget(kernel) for kernel in kernels_of(source, assembler=assembler)}
    assert found
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.slow
def test_every_kernel_with_wgmma_has_limits():
    kernels = [kernel for source in sorted(CUDA.glob("*_hopper.cu")) for kernel in kernels_of(source)]
    assert {untyped(kernel.name) for kernel in kernels} == set(LIMITS)
    assert len(kernels) == 2 * len(LIMITS)
    for kernel in kernels:
        limits, found = LIMITS[untyped(kernel.name)], measure(kernel)
        assert limits.instructions <= 1.1 * found.instructions, f"{kernel.name}: the limit is far from {found}"


@pytest.mark.parametrize("assembler", ["nvcc", *(pytest.param(name, marks=pytest.mark.slow) for name in WHEELS)])
@pytest.mark.parametrize("source", [quick(source) for source in HOPPER], ids=lambda path: path.stem)
def test_no_instruction_touches_registers_of_a_product_in_flight(source, assembler):
    for kernel in kernels_of(source, assembler=assembler):
        assert kernel.count("HGMMA") > 0
        assert kernel.hazards() == [], kernel.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        (path, architecture)
        for path in sorted(CUDA.glob("*.cu"))
        for architecture in toolchain.architectures(path)
        if architecture in ("sm_80", "sm_90a")  # the others have the same PTX
    ],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_no_kernel_splits_stores_or_exceeds_the_instruction_cache(source, architecture):
    found = {kernel.name: defects(kernel) for kernel in kernels_of(source, architecture)}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


# --- the checks can fail ---


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_an_undone_mend_is_found(mutation, tmp_path):
    shutil.copytree(toolchain.ROOT / "csrc", tmp_path / "csrc")
    for edit in (*FEWER_KERNELS[mutation.source], mutation.edit):
        text = (tmp_path / edit.file).read_text()
        assert text.count(edit.old) == 1, edit.old
        (tmp_path / edit.file).write_text(text.replace(edit.old, edit.new))
    kernels = kernels_of(tmp_path / mutation.source, tree=tmp_path)
    found = {line.split(":")[0] for kernel in kernels for line in defects(kernel)}
    found |= {line.split(":")[0] for kernel in kernels if kernel.count("HGMMA") for line in over_budget(kernel)}
    assert set(mutation.found_by) <= found


def function(text):
    """Return a function of machine code, from instructions and labels, a line each."""
    lines = [line.strip() for line in text.strip().splitlines()]
    addresses = itertools.count(0, 16)
    return sass.Function("kernel", [x if x.endswith(":") else f"/*{next(addresses):04x}*/ {x} ;" for x in lines])


def test_a_line_that_is_not_understood_is_an_error():
    with pytest.raises(sass.CodeError, match="was not understood"):
        sass.Function("kernel", ["/*0000*/ NOP ;", "0010: NOP", "/*0020*/ EXIT ;"])


def touched(text):
    return [re.sub(r"^\w+: *", "", line) for line in function(text).hazards()]


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0"


@pytest.mark.parametrize(
    ("instruction", "register"),
    [
        ("FADD R0, R55, R1", "R55"),
        ("MOV R24, RZ", "R24"),
        ("IMAD.WIDE R54, R1, R2, R4", "R54"),
        ("LDS.128 R52, [R3]", "R52"),
        ("STG.E desc[UR6][R54.64], R1", "R54"),
        ("MOV R91, RZ", "R91"),
        ("LDSM.16.M88.4 R85, [R0]", "R88"),
        ("HGMMA.64x64x16.F32.BF16 R100, R52, gdesc[UR4], R100, gsb0", "R52"),
        ("HGMMA.64x64x16.F32.BF16 R90, gdesc[UR8], R90, gsb0", "R90"),
        ("HGMMA.64x128x16.F32.BF16 R8, gdesc[UR8], R8, gsb0", "R24"),
    ],
)
def test_a_register_in_flight_that_is_touched_is_found(instruction, register):
    (wrong,) = touched(f"{PRODUCT}\n{instruction}\nWARPGROUP.DEPBAR.LE gsb0, 0x0\nEXIT")
    assert wrong == f"{instruction} touches {register}"
    assert touched(f"{PRODUCT}\nWARPGROUP.DEPBAR.LE gsb0, 0x0\n{instruction}\nEXIT") == []


@pytest.mark.parametrize(
    "instruction",
    ["FADD R0, R56, R23", "MOV R0, R88", "STG.E desc[UR6][R2.64], R91", "R2UR UR4, R90", PRODUCT, "@!P1 MOV R92, R91"],
)
def test_registers_that_are_free_may_be_touched(instruction):
    assert touched(f"{PRODUCT}\n{instruction}\nWARPGROUP.DEPBAR.LE gsb0, 0x0\nEXIT") == []


def test_a_register_touched_in_the_next_turn_is_found():
    loop = ".L_x_0:\n{first}\n" + PRODUCT + "\n{wait}\n@P0 BRA `(.L_x_0)\nWARPGROUP.DEPBAR.LE gsb0, 0x0\nEXIT"
    first = "FADD R24, R24, R1"
    assert touched(loop.format(first=first, wait="NOP")) == [f"{first} touches R24"]
    assert touched(loop.format(first=first, wait="WARPGROUP.DEPBAR.LE gsb0, 0x1")) == [f"{first} touches R24"]
    assert touched(loop.format(first=first, wait="WARPGROUP.DEPBAR.LE gsb0, 0x0")) == []


def test_a_register_touched_on_one_of_two_ways_is_found():
    text = f"{PRODUCT}\n@P0 BRA `(.L_x_0)\nWARPGROUP.DEPBAR.LE gsb0, 0x0\n.L_x_0:\nMOV R24, RZ\nEXIT"
    assert touched(text) == ["MOV R24, RZ touches R24"]


def test_a_wait_that_is_left_out_of_a_kernel_is_found():
    kernel = next(kernel for kernel in kernels_of(HOPPER[0]) if kernel.count("HGMMA"))
    waits = [one for one in kernel.instructions if one.name == "WARPGROUP" and ".DEPBAR" in one.opcode]
    assert len(waits) >= 3
    needed = []
    for wait in waits:
        left_out = [one for block in kernel.blocks for one in block.instructions if one is not wait]
        assert len(left_out) == len(kernel.instructions) - 1
        needed.append(without(kernel, wait).hazards() != [])
    # The first wait of a tile, before the turns, lets everything stay in flight: ptxas needs it for the order.
    assert needed == [False] + [True] * (len(waits) - 1)


def without(kernel, instruction):
    """Return a kernel without an instruction."""
    copy = sass.Function.__new__(sass.Function)
    copy.symbol, copy.name = kernel.symbol, kernel.name
    blocks = {block: sass.Block(block.number) for block in kernel.blocks}
    for block, new in blocks.items():
        new.instructions = [one for one in block.instructions if one is not instruction]
        new.next = [blocks[other] for other in block.next]
    copy.blocks, copy.instructions = list(blocks.values()), [one for b in blocks.values() for one in b.instructions]
    return copy


STORES = [f"STG.E desc[UR4][R2.64+{offset:#x}], R{8 + offset // 4}" for offset in (16, 20, 24, 28)]


def test_four_stores_in_a_row_are_found():
    assert len(function("\n".join([*STORES, "EXIT"])).split_stores()) == 1
    assert len(function("\n".join([*STORES[::-1], "EXIT"])).split_stores()) == 1
    assert len(function("\n".join([line.replace("STG.E", "STS") for line in STORES] + ["EXIT"])).split_stores()) == 1


@pytest.mark.parametrize(
    "lines",
    [
        STORES[:3],
        [*STORES[:3], "@P0 " + STORES[3]],
        [*STORES[:2], "IADD3 R2, R2, R4, RZ", *STORES[2:]],
        [*STORES[:2], "@P0 BRA `(.L_x_0)", *STORES[2:], ".L_x_0:"],
        [line.replace("STG.E ", "STG.E.U8 ") for line in STORES],
        [line.replace("STG.E ", "STG.E.128 ") for line in STORES],
    ],
)
def test_other_stores_are_not_taken_for_a_split_one(lines):
    assert function("\n".join([*lines, "EXIT"])).split_stores() == []


def test_the_order_of_a_turn_is_read_along_its_usual_way():
    kernel = function(
        """
        MOV R1, RZ
        .L_x_0:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR31+0x30010], R7
        @!P1 BRA `(.L_x_2)
        .L_x_1:
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0
        HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR4], R56, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x1
        @P0 BRA `(.L_x_3)
        """
        + "ISETP.GE.AND P3, PT, R1, R0, PT\n" * 20
        + """.L_x_3:
        MUFU.EX2 R24, R24
        MUFU.EX2 R25, R25
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        @P2 BRA `(.L_x_0)
        EXIT
        .L_x_2:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR31+0x30010], R7
        @!P1 BRA `(.L_x_2)
        BRA `(.L_x_1)
        """
    )
    (loop,) = kernel.main_loops
    assert order_of(loop.turn) == "2P 1P W1 2E W0"
    assert len(loop.turn) == 11
    assert len(loop.border_turn) == 31
