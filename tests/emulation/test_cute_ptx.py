"""The PTX of each primitive equals that of CuTe's own operation: instructions, operands, immediates, clobbers.

Of each primitive and its counterpart one kernel is compiled. The instructions of the inline PTX are compared with every
register replaced by what it was computed from, so that a swapped operand shows wherever it comes from.
"""

import re
import shutil

import pytest
import toolchain

pytestmark = pytest.mark.slow  # CuTe's headers take seconds to compile

# The parameters of each kernel.
KERNEL = """
__global__ void {name}(char* s, char* t, uint64_t a, uint64_t b, int x, int y, int z, int w, const char* g, float* f,
                       uint32_t* u, const __grid_constant__ CUtensorMap map) {{
    {text}
}}
"""
OURS = """
#include "cuda/ptx/primitives.cuh"
using namespace nanochat::device;
"""
THEIRS = """
#include <cuda.h>
#define CUTLASS_GDC_ENABLED
#include "cute/arch/cluster_sm90.hpp"
#include "cute/arch/copy_sm75.hpp"
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/copy_sm90.hpp"
#include "cute/arch/copy_sm90_desc.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/arch/mma_sm80.hpp"
#include "cute/arch/mma_sm90_gmma.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/arch/grid_dependency_control.h"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/barrier.h"
using cutlass::arch::ClusterBarrier;
using cutlass::arch::ClusterTransactionBarrier;
struct Counter : cutlass::Barrier {
    using cutlass::Barrier::ld_acquire;
};
"""

# What CuTe writes otherwise, with the same meaning for these kernels: (CuTe's, ours).
SAME = [
    (r"\.(x[124])(\.trans)?\.m8n8", r".m8n8.\1\2"),
    (r"\.m8n8\.(x[124])\.trans\.shared", r".m8n8.\1.trans.shared"),
    (r"\.L2::cache_hint(.*), \S+$", r"\1"),  # a hint of 0: none
    (r"\.shared\.global\.L2::128B", ".shared.global"),  # how much the L2 cache fetches
    (r"cp\.async\.wait_all", "cp.async.wait_group 0"),
    (r"\.add\.bulk_group", ".add.tile.bulk_group"),  # tile is the default
    (r"ld\.global\.acquire\.gpu\.b32", "ld.acquire.gpu.global.u32"),
    (r"mbarrier\.arrive\.shared::cluster", "mbarrier.arrive.release.cluster.shared::cluster"),
]


def registers(kind, count, source):
    """Return a text that fills the registers `r` of a thread from memory."""
    return f"{kind} r[{count}];\n#pragma unroll\nfor (int i = 0; i < {count}; ++i) r[i] = {source}[i];\n"


def written(count, target):
    return f"\n#pragma unroll\nfor (int i = 0; i < {count}; ++i) {target}[i] = r[i];"


def each(count, name="r"):
    return ", ".join(f"{name}[{i}]" for i in range(count))


def wgmma(N, kind, major_a, major_b, in_registers, accumulate):
    """Return the two texts of a product."""
    before = registers("float", N // 2, "f")
    majors = [("K", "MN")[major] for major in (major_a, major_b)]
    ours = ", ".join(f"Major::{major.lower()}" for major in majors[in_registers:])
    ours = f"wgmma<{N}, {'bfloat16' if kind == 'BF16' else 'float16'}, {ours}>"
    source = "SR"[in_registers]
    theirs = f"cute::SM90::GMMA::MMA_64x{N}x16_F32{kind}{kind}_{source}S<"
    theirs += ", ".join(f"cute::SM90::GMMA::Major::{major}" for major in majors) + ">::fma"
    scale = f"cute::SM90::GMMA::ScaleOut::{'One' if accumulate else 'Zero'}"
    left = "const uint32_t v[4] = {u[0], u[1], u[2], u[3]};\n" if in_registers else ""
    scaled, a, after = "true" if accumulate else "false", "v" if in_registers else "a", written(N // 2, "f")
    operands = f"{each(4, 'v') if in_registers else 'a'}, b, {each(N // 2)}, {scale}"
    return f"{before}{left}{ours}(r, {a}, b, {scaled});{after}", f"{before}{left}{theirs}({operands});{after}"


def tensor_copies():
    for dims, coordinates in ((2, "x, y"), (3, "x, y, z"), (4, "x, y, z, w")):
        at, barrier = "shared_address(s)", "shared_address(t)"
        yield (
            f"tma_load {dims}d",
            f"tma_load({at}, map, {barrier}, {coordinates});",
            f"cute::SM90_TMA_LOAD_{dims}D::copy(&map, reinterpret_cast<uint64_t*>(t), 0, s, {coordinates});",
        )
        yield (
            f"tma_store {dims}d",
            f"tma_store(map, {at}, {coordinates});",
            f"cute::SM90_TMA_STORE_{dims}D::copy(&map, s, {coordinates});",
        )
        yield (
            f"tma_reduce_add {dims}d",
            f"tma_reduce_add(map, {at}, {coordinates});",
            f"cute::SM90_TMA_REDUCE_ADD_{dims}D::copy(&map, s, {coordinates});",
        )

    yield (
        "tma_load_multicast",
        "tma_load_multicast(shared_address(s), map, shared_address(t), static_cast<uint16_t>(w), x, y, z);",
        "cute::SM90_TMA_LOAD_MULTICAST_3D::copy(&map, reinterpret_cast<uint64_t*>(t), static_cast<uint16_t>(w), 0, s, "
        "x, y, z);",
    )
    yield "bulk_store", "bulk_store(f, shared_address(s), x);", "cute::SM90_BULK_COPY_S2G::copy(s, f, x);"


def matrix_copies():
    vector = "*reinterpret_cast<cute::uint128_t*>(s)"
    for count, form, name in (
        (4, "x4", "U32x4_LDSM_N"),
        (4, "x4_trans", "U16x8_LDSM_T"),
        (2, "x2", "U32x2_LDSM_N"),
        (2, "x2_trans", "U16x4_LDSM_T"),
    ):
        yield (
            f"ldmatrix_{form}",
            f"uint32_t r[{count}];\nldmatrix_{form}(r, shared_address(s));{written(count, 'u')}",
            f"uint32_t r[{count}];\ncute::SM75_{name}::copy({vector}, {each(count)});{written(count, 'u')}",
        )
    for form, name in (("x4", "U32x4_STSM_N"), ("x4_trans", "U16x8_STSM_T")):
        before = registers("uint32_t", 4, "u")
        yield (
            f"stmatrix_{form}",
            f"{before}stmatrix_{form}(shared_address(s), r);",
            f"{before}cute::SM90_{name}::copy({each(4)}, {vector});",
        )


def matrix_product(kind, type_):
    before = registers("float", 4, "f") + registers("uint32_t", 6, "u").replace("r[", "v[")
    ours = "const uint32_t left[4] = {v[0], v[1], v[2], v[3]}, right[2] = {v[4], v[5]};\n"
    return (
        f"mma {kind}",
        f"{before}{ours}mma_m16n8k16<{type_}>(r, left, right);{written(4, 'f')}",
        f"{before}cute::SM80_16x8x16_F32{kind}{kind}F32_TN::fma({each(4)}, {each(6, 'v')}, {each(4)});"
        + written(4, "f"),
    )


def barriers():
    barrier = "reinterpret_cast<uint64_t*>(s)"
    yield "mbarrier_init", "mbarrier_init(shared_address(s), x);", f"ClusterBarrier::init({barrier}, x);"
    yield "mbarrier_arrive", "mbarrier_arrive(shared_address(s));", f"ClusterBarrier::arrive({barrier});"
    yield (
        "mbarrier_arrive_expect_tx",
        "mbarrier_arrive_expect_tx(shared_address(s), x);",
        f"ClusterTransactionBarrier::arrive_and_expect_tx({barrier}, x);",
    )
    yield (
        "mbarrier_try_wait",
        "u[0] = mbarrier_try_wait(shared_address(s), x);",
        f"u[0] = ClusterBarrier::try_wait({barrier}, x);",
    )
    yield "fence_mbarrier_init", "fence_mbarrier_init();", "cutlass::arch::fence_barrier_init();"
    yield "fence_proxy_async", "fence_proxy_async();", "cutlass::arch::fence_view_async_shared();"
    yield (
        "mbarrier_arrive_cluster",
        "mbarrier_arrive_cluster(shared_address(s), x);",
        f"ClusterBarrier::arrive({barrier}, x, 1u);",
    )
    yield "wait_for_count", "wait_for_count(u, x);", "Counter::ld_acquire(reinterpret_cast<int*>(u));"
    yield "cluster_arrive", "cluster_arrive();", "cute::cluster_arrive();"
    yield "cluster_wait", "cluster_wait();", "cute::cluster_wait();"
    yield "cluster_rank", "u[0] = cluster_rank();", "u[0] = cute::block_rank_in_cluster();"
    yield "wait_for_previous_grid", "wait_for_previous_grid();", "cutlass::arch::wait_on_dependent_grids();"
    yield "start_next_grid", "start_next_grid();", "cutlass::arch::launch_dependent_grids();"
    reserved = "cutlass::arch::ReservedNamedBarriers"
    first = f"static_cast<uint32_t>({reserved}::FirstUserBarrier)"
    yield "bar_sync", "bar_sync(x, y);", f"cutlass::arch::NamedBarrier::sync(y, x - {first});"
    yield "bar_arrive", "bar_arrive(x, y);", f"cutlass::arch::NamedBarrier::arrive(y, x - {first});"


def groups():
    yield "wgmma_fence", "wgmma_fence();", "cute::warpgroup_arrive();"
    yield "wgmma_commit", "wgmma_commit();", "cute::warpgroup_commit_batch();"
    yield "tma_commit", "tma_commit();", "cute::tma_store_arrive();"
    yield "cp_async_commit", "cp_async_commit();", "cute::cp_async_fence();"
    for n in (0, 1, 3):
        yield f"wgmma_wait<{n}>", f"wgmma_wait<{n}>();", f"cute::warpgroup_wait<{n}>();"
        yield f"tma_wait_read<{n}>", f"tma_wait_read<{n}>();", f"cute::tma_store_wait<{n}>();"
        yield f"cp_async_wait<{n}>", f"cp_async_wait<{n}>();", f"cute::cp_async_wait<{n}>();"
    for count in (24, 240):
        yield (
            f"setmaxnreg {count} up",
            f"setmaxnreg_increase<{count}>();",
            f"cutlass::arch::warpgroup_reg_alloc<{count}>();",
        )
        yield (
            f"setmaxnreg {count} down",
            f"setmaxnreg_decrease<{count}>();",
            f"cutlass::arch::warpgroup_reg_dealloc<{count}>();",
        )
    yield (
        "cp_async_16",
        "cp_async_16(shared_address(s), g, x ? 16 : 0);",
        "cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(*reinterpret_cast<const cute::uint128_t*>(g), "
        "*reinterpret_cast<cute::uint128_t*>(s), x);",
    )
    yield "tma_prefetch", "tma_prefetch(map);", "cute::prefetch_tma_descriptor(&map);"


def products():
    for N in (64, 96, 128, 256):
        for kind in ("BF16", "F16"):
            for form in ((0, 0, 0), (1, 1, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)):
                for accumulate in (True, False) if N == 64 else (True,):
                    place = "from registers" if form[2] else "from shared memory"
                    majors = " ".join(("K", "MN")[major] for major in form[:2])
                    yield f"wgmma {N} {kind} {place} {majors} {accumulate}", *wgmma(N, kind, *form, accumulate)


PAIRS = [
    *tensor_copies(),
    *matrix_copies(),
    *barriers(),
    *groups(),
    matrix_product("BF16", "bfloat16"),
    matrix_product("F16", "float16"),
    *products(),
]

# --- PTX ---

# Instructions without a result, or whose results are also operands.
EFFECTS = (
    "bar.",
    "cp.",
    "fence.",
    "mbarrier.arrive",
    "mbarrier.init",
    "barrier.cluster",
    "griddepcontrol",
    "prefetch.",
    "setmaxnreg",
    "st.",
    "stmatrix",
    "wgmma.",
)


def split_operands(text):
    """Return the operands of an instruction; a group in braces or brackets is one."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [re.sub(r"\s*([,{}])\s*", r"\1", part.strip()) for part in parts]


def statements(body):
    """Yield each instruction of a kernel and whether it is inline PTX, without declarations."""
    inline = False
    for line in body.splitlines():
        if "inline asm" in line:
            inline = "begin" in line
        for part in line.split("//")[0].split(";"):
            if match := re.match(r"[{}\s]*([a-z@].*?)\s*$", part):
                yield match[1], inline


def trace(body):
    """Return the inline PTX of a kernel and its stores, with registers replaced by what they were computed from."""
    found, values = [], {}

    def known(text):
        return re.sub(r"%\w+|\b([pP]\d*|remote|remAddr32)\b", lambda match: values.get(match[0], match[0]), text)

    for statement, inline in statements(body):
        opcode, _, rest = statement.partition(" ") if " " in statement else statement.partition("\t")
        operands = split_operands(rest)
        results = []
        if opcode.startswith("wgmma.mma_async"):
            results = re.findall(r"%\w+", operands[0])
        elif not opcode.startswith(EFFECTS):
            results, operands = re.findall(r"%?\w+", operands[0]), operands[1:]
        text = f"{opcode} {', '.join(map(known, operands))}".strip()
        for place, result in enumerate(results):
            computed = known(operands[0]) if opcode.startswith("mov.") else f"({text})"
            values[result] = f"<{len(found)}.{place}>" if inline else computed
        if inline or opcode.startswith("st."):
            found.append(text)
    return found


def traces(ptx):
    """Return {kernel: its trace}, with parameters named without the kernel."""
    found = {}
    for part in ptx.split(".entry ")[1:]:
        name = part[: part.index("(")]
        found[name] = trace(part[part.index("{") :].replace(name, ""))
    return found


def as_ours(line):
    for theirs, ours in SAME:
        line = re.sub(theirs, ours, line)
    return line


def traces_of(texts, prologue, folder, options=(), tree=toolchain.ROOT):
    """Return the trace of the kernel that is made of each text."""
    source = folder / "kernels.cu"
    source.write_text(prologue + "".join(KERNEL.format(name=f"kernel_{i}_", text=text) for i, text in enumerate(texts)))
    result = toolchain.compile_cuda(source, "sm_90a", options, tree)
    assert result.ptx.is_file(), result.error
    found = traces(result.ptx.read_text())
    return [next(lines for name, lines in found.items() if f"kernel_{i}_" in name) for i in range(len(texts))]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    try:
        options = [f"-I{toolchain.cute_include()}", "--expt-relaxed-constexpr", "-DNDEBUG"]
        found = traces_of([text for _, _, text in PAIRS], THEIRS, tmp_path_factory.mktemp("theirs"), options)
    except toolchain.MissingError as error:
        pytest.skip(str(error))
    return [[as_ours(line) for line in lines] for lines in found]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    try:
        return traces_of([text for _, text, _ in PAIRS], OURS, tmp_path_factory.mktemp("ours"))
    except toolchain.MissingError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("i", range(len(PAIRS)), ids=[name for name, _, _ in PAIRS])
def test_a_primitive_becomes_what_the_operation_of_cute_becomes(ours, theirs, i):
    assert ours[i]
    assert ours[i] == theirs[i]


# --- clobbers, which PTX does not show ---

PRIMITIVES = toolchain.ROOT / "csrc/cuda/ptx/primitives.cuh"


def asm_statements(text):
    """Yield (opcode, whether it is volatile, whether it clobbers memory) of each inline PTX of a source."""
    for start in re.finditer(r"\basm\b( volatile)?\s*\(", text):
        end = start.end()
        while text.count("(", start.end() - 1, end) != text.count(")", start.end() - 1, end):
            end += 1
        body = text[start.end() : end]
        ptx = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', body))
        opcodes = re.findall(r"(?<![\w.%])(?:[a-z]\w*)(?:\.[\w:]+)+", ptx.replace("\\n", " ").replace("\\t", " "))
        opcode = next((opcode for opcode in opcodes if not opcode.startswith(("setp", "mapa"))), None)
        if opcode:
            yield as_ours(opcode).split(".m64n")[0], bool(start[1]), '"memory"' in body


def weaker(ours, theirs):
    """Return the opcodes for which ours has no "memory" or volatile, and a source of CuTe has."""
    kept = [{opcode for opcode, *flags in theirs if flags[i]} for i in (0, 1)]
    return sorted({opcode for opcode, *flags in ours for i in (0, 1) if opcode in kept[i] and not flags[i]})


@pytest.fixture(scope="module")
def cute_statements():
    try:
        include = toolchain.cute_include()
    except toolchain.MissingError as error:
        pytest.skip(str(error))
    files = re.findall(r'"(cu\w+/.*)"', THEIRS)
    return [one for name in files for one in asm_statements((include / name).read_text())]


def test_primitives_clobber_what_those_of_cute_clobber(cute_statements):
    ours = list(asm_statements(PRIMITIVES.read_text()))
    common = {opcode for opcode, *_ in ours} & {opcode for opcode, *_ in cute_statements}
    assert len(common) >= 20
    assert weaker(ours, cute_statements) == []


def test_a_missing_clobber_is_found(cute_statements):
    text = PRIMITIVES.read_text()
    for opcode in ("wgmma.fence", "wgmma.wait_group", "prefetch.tensormap", "cp.async.bulk.tensor.2d.global"):
        start = text.index(opcode)
        end = text.index('"memory"', start)
        without = text[:end] + text[end + len('"memory"') :]
        assert [one for one in weaker(asm_statements(without), cute_statements) if one.startswith(opcode)]
    assert weaker(asm_statements(text.replace("asm volatile(", "asm(")), cute_statements)


# --- the comparison can fail ---

# Defects of primitives.cuh: those whose comparison must fail, what stands there, and what is there with the defect.
DEFECTS = [
    ("tma_load 2d", '"r"(barrier), "r"(c0), "r"(c1) :', '"r"(barrier), "r"(c1), "r"(c0) :'),
    (
        "tma_load 3d",
        '"[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target)',
        '"[%2], [%1, {%3, %4, %5}], [%0];" ::"r"(target)',
    ),
    (
        "tma_reduce_add 2d",
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add",
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.min",
    ),
    ("tma_wait_read<1>", "cp.async.bulk.wait_group.read %0;", "cp.async.bulk.wait_group %0;"),
    ("cp_async_16", "cp.async.cg.shared.global", "cp.async.ca.shared.global"),
    ("ldmatrix_x4_trans", "ldmatrix.sync.aligned.m8n8.x4.trans", "ldmatrix.sync.aligned.m8n8.x4"),
    ("stmatrix_x4", '[%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0])', '[%0], {%2, %1, %3, %4};" ::"r"(row), "r"(r[0])'),
    (
        "mma F16",
        '"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "\n        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}',
        '"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "\n        "{%0, %1, %2, %3}, {%4, %6, %5, %7}, {%8, %9}',
    ),
    (
        "mbarrier_init",
        '"mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count)',
        '"mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count + 1)',
    ),
    (
        "mbarrier_arrive_expect_tx",
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;",
        "mbarrier.arrive.shared::cta.b64 _, [%0], %1;",
    ),
    ("mbarrier_try_wait", "mbarrier.try_wait.parity.shared::cta.b64 p", "mbarrier.test_wait.parity.shared::cta.b64 p"),
    ("bar_arrive", '"bar.arrive %0, %1;" ::"r"(id), "r"(threads)', '"bar.arrive %0, %1;" ::"r"(threads), "r"(id)'),
    ("setmaxnreg 24 down", "setmaxnreg.dec", "setmaxnreg.inc"),
    (
        "mbarrier_arrive_cluster",
        '[remote];\\n}" ::"r"(barrier),\n                     "r"(rank)',
        '[remote];\\n}" ::"r"(rank),\n                     "r"(barrier)',
    ),
    ("tma_load_multicast", "[%0], [%1, {%4, %5, %6}], [%2], %3;", "[%0], [%1, {%4, %5, %6}], [%0], %3;"),
    (
        "bulk_store",
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;",
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%2], %1;",
    ),
    ("wait_for_count", "ld.acquire.gpu.global.u32", "ld.acquire.cta.global.u32"),
    ("cluster_wait", "barrier.cluster.wait.aligned", "barrier.cluster.arrive.aligned"),
    ("cluster_rank", "%%cluster_ctarank", "%%cluster_nctarank"),
    ("wgmma 64 BF16 from shared memory K MN True", '", p, 1, 1, " p3 ", " p4 ";', '", p, 1, 1, " p4 ", " p3 ";'),
    ("wgmma 64 F16 from registers K K True", '{" p0 ", " p1 ", " p2 ", " p3 "}', '{" p0 ", " p2 ", " p1 ", " p3 "}'),
    ("wgmma 64 BF16 from registers K K False", 'setp.ne.b32 p, " p5', 'setp.eq.b32 p, " p5'),
]


def test_defects_of_primitives_are_found(theirs, tmp_path):
    """Compile all defects at once: each is in another primitive."""
    shutil.copytree(toolchain.ROOT / "csrc", tmp_path / "csrc")
    primitives = tmp_path / "csrc/cuda/ptx/primitives.cuh"
    text = primitives.read_text()
    for _, old, new in DEFECTS:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    primitives.write_text(text)
    places = [next(i for i, pair in enumerate(PAIRS) if pair[0] == name) for name, _, _ in DEFECTS]
    found = traces_of([PAIRS[i][1] for i in places], OURS, tmp_path, tree=tmp_path)
    assert [name for (name, _, _), i, lines in zip(DEFECTS, places, found, strict=True) if lines == theirs[i]] == []
