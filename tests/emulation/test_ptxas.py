"""What nvcc makes of every kernel: no spills, no stack frames, no warnings of ptxas, wgmma where it is called."""

import re
import subprocess

import pytest
import toolchain

ROOT = toolchain.ROOT
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu")) + sorted((ROOT / "tests/emulation/kernels").glob("*.cu"))
ARCHITECTURES = toolchain.architectures()
HOPPER = "sm_90a"

# warpgroup.wait and warpgroup.arrive where ptxas misses one: the kernels that are shipped have their own.
INJECTED = ("(C7517)", "(C7519)")

# The others take minutes.
QUICK = [path for path in SOURCES if path.name == "adamw.cu"]


@pytest.fixture(autouse=True, scope="module")
def compiler():
    try:
        return toolchain.nvcc()
    except toolchain.MissingError as error:
        pytest.skip(str(error))


def marked(sources):
    return [pytest.param(path, marks=() if path in QUICK else pytest.mark.slow) for path in sources]


@pytest.fixture
def build(tmp_path):
    """Compiles a text, for Hopper unless told otherwise."""

    def compile_text(text, architecture=HOPPER):
        source = tmp_path / "kernel.cu"
        source.write_text(f'#include "cuda/ptx/primitives.cuh"\nusing namespace nanochat::device;\n{text}')
        result = toolchain.compile_cuda(source, architecture)
        assert not result.error, result.error
        return result

    return compile_text


def calls_wgmma(source):
    """Whether a file calls wgmma, or a header of ours that it includes does."""
    text = re.sub(r"//.*", "", source.read_text())
    headers = [source.parent / name for name in re.findall(r'#include "(.*)"', text)]
    if re.search(r"\bwgmma<", text):
        return True
    return any(calls_wgmma(path) for path in headers if path.is_file() and path.name != "primitives.cuh")


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        pytest.param(path, architecture, marks=() if path in QUICK else pytest.mark.slow)
        for path in SOURCES
        for architecture in toolchain.architectures(path)
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_cuda_kernels_spill_nothing_and_please_ptxas(source, architecture):
    result = toolchain.compile_cuda(source, architecture)
    assert not result.error, result.error
    assert result.kernels
    assert result.complaints(allowed=() if source.parent == toolchain.CUDA else INJECTED) == []


@pytest.mark.parametrize("source", marked(path for path in SOURCES if calls_wgmma(path)), ids=lambda path: path.name)
def test_hopper_kernels_hold_hgmma(source):
    result = toolchain.compile_cuda(source, HOPPER)
    assert not result.error, result.error
    assert sum(toolchain.count_hgmma(result.cubin).values()) > 0


# --- the checks can fail ---

SPILL = """
__global__ void __launch_bounds__(1024) spill(const float* x, float* y, int n) {
    float held[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) held[i] = x[i * n + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 128; ++i) y[i * n + threadIdx.x] = held[i] * held[127 - i] + held[i * 7 % 128];
}
"""

STACK = """
__global__ void stack(const float* x, float* y, const int* order) {
    float held[32];
    for (int i = 0; i < 32; ++i) held[i] = x[i];
    for (int i = 0; i < 32; ++i) y[i] = held[order[i] & 31];
}
"""


def product(bounds="__launch_bounds__(256, 1)", before="wgmma_fence();", after="wgmma_wait<0>();", begin="", N=64):
    """A kernel with two products in a row, and what stands before, after and at its begin."""
    return f"""
__global__ void {bounds} product(float* y, uint64_t a, uint64_t b) {{
#ifdef NANOCHAT_HOPPER
    {begin}
    float d[{N} / 2];
#pragma unroll
    for (int i = 0; i < {N} / 2; ++i) d[i] = y[i * 256 + threadIdx.x];
    {before}
    wgmma<{N}, bfloat16>(d, a, b, true);
    wgmma<{N}, bfloat16>(d, a + 2, b + 2, true);
    wgmma_commit();
    {after}
#pragma unroll
    for (int i = 0; i < {N} / 2; ++i) y[i * 256 + threadIdx.x] = d[i];
#endif
}}
"""


def only(result):
    (kernel,) = result.kernels
    return kernel


def test_a_proper_product_pleases(build):
    result = build(product())
    assert result.complaints() == []
    kernel = only(result)
    assert (kernel.name, kernel.stack, kernel.spill_stores, kernel.spill_loads) == ("product", 0, 0, 0)
    assert 32 < kernel.registers < 256


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_spill_is_found(build, architecture):
    result = build(SPILL, architecture)
    assert only(result).spill_stores > 0
    assert only(result).spill_loads > 0
    assert any(line.startswith("spill: spills, ") for line in result.complaints())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stack_frame_is_found(build, architecture):
    assert build(STACK, architecture).complaints() == ["stack: a stack frame of 128 bytes"]


@pytest.mark.slow
def test_shared_memory_is_counted(build):
    text = "__global__ void hold(float* y) { NANOCHAT_SHARED(float[100], held);\n"
    text += "held[threadIdx.x] = y[threadIdx.x]; __syncthreads(); y[threadIdx.x] = held[99 - threadIdx.x]; }"
    assert only(build(text)).shared == 400


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bounds", "registers", "number"), [("", 232, "(C7508)"), ("__launch_bounds__(256, 1)", 24, "(C7507)")]
)
def test_an_ignored_setmaxnreg_is_found(build, bounds, registers, number):
    change = f"setmaxnreg_{'in' if registers > 128 else 'de'}crease<{registers}>();"
    (complaint,) = build(product(bounds=bounds, begin=change)).complaints(allowed=INJECTED)
    assert complaint.startswith(number)
    assert "'setmaxnreg' ignored" in complaint


@pytest.mark.slow
def test_serialised_wgmma_is_found(build):
    touched = "wgmma_commit(); d[0] += 1; wgmma_fence(); wgmma<64, bfloat16>(d, a, b, true); wgmma_commit();"
    complaints = build(product(after=touched + "wgmma_wait<0>();")).complaints(allowed=INJECTED)
    assert any("wgmma.mma_async instructions are serialized" in line for line in complaints)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "number"), [("before", "(C7519)"), ("after", "(C7517)")])
def test_a_missing_fence_or_wait_is_found(build, part, number):
    complaints = build(product(**{part: ""})).complaints()
    assert [line for line in complaints if line.startswith(number)]


# --- machine code ---


def test_hgmma_is_counted_by_kernel(build):
    result = build(product() + STACK)
    assert toolchain.count_hgmma(result.cubin) == {"_Z7productPfmm": 2, "_Z5stackPKfPfPKi": 0}


@pytest.mark.slow
def test_hgmma_is_counted_as_nvdisasm_does(build):
    try:
        disassembler = toolchain.nvdisasm()
    except toolchain.MissingError as error:
        pytest.skip(str(error))
    registers = "uint32_t left[4] = {1, 2, 3, 4}; wgmma<64, float16, Major::mn>(d, left, b, true); wgmma_commit();"
    result = build(product(after=registers + "wgmma_wait<0>();"))
    text = subprocess.run([disassembler, "-c", result.cubin], capture_output=True, text=True, check=True).stdout
    assert text.count("HGMMA.64x64x16") == 3
    assert sum(toolchain.count_hgmma(result.cubin).values()) == 3
