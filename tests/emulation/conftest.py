from pathlib import Path

import pytest
import toolchain
import torch
from harness import ROOT, Library, Program, PtxLibrary, build, build_core, build_executor, build_for_gpu, build_for_ptx

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def core():
    """Objects of the emulation that every build links."""
    return build_core()


@pytest.fixture(scope="session")
def executor():
    """The library that executes PTX."""
    missing = {"avx2", "fma", "f16c"} - set(Path("/proc/cpuinfo").read_text().split())
    if missing:
        pytest.skip(f"the executor of PTX needs a processor with {', '.join(sorted(missing))}")
    try:
        toolchain.nvcc()
        return build_executor()
    except toolchain.MissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", autouse=True)
def _programs_end():
    """The process of a program with a sanitizer does not outlive the tests of a file."""
    yield
    Program.stop()


class Kernels:
    """Files of kernels, built once a session for one target: plain, thread, address, ptx80, ptx90a, or cuda."""

    def __init__(self, request, folder):
        self.target, self.folder = request.param, folder
        self.device = "cuda" if self.target == "cuda" else "cpu"
        if self.target in PTX:
            self.executor = request.getfixturevalue("executor")
        elif self.target != "cuda":
            self.core = request.getfixturevalue("core")
        self.built = {}

    def __call__(self, name):
        """The entries of tests/emulation/`name`."""
        if name not in self.built:
            source = ROOT / "tests/emulation" / name
            if self.target == "cuda":
                self.built[name] = Library(build_for_gpu(source, self.folder / f"{source.stem}.so"), "cuda")
            elif self.target in PTX:
                path = build_for_ptx(source, self.executor, self.target.removeprefix("ptx"))
                self.built[name] = PtxLibrary(path, self.executor)
            else:
                path = build(source, self.core, self.target)
                self.built[name] = Library(path) if self.target == "plain" else Program(path, self.folder)
        return self.built[name]


GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
)


# What nvcc makes of the kernels for these architectures, executed on the CPU.
PTX = ["ptx80", "ptx90a"]
WATCHED = [pytest.param(sanitizer, marks=pytest.mark.slow) for sanitizer in ("thread", "address")]


@pytest.fixture(scope="session", params=["plain", *WATCHED, *PTX, GPU])
def kernels(request, tmp_path_factory):
    return Kernels(request, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session", params=["plain", *PTX, GPU])
def unwatched_kernels(request, tmp_path_factory):
    """Without a sanitizer: for thousands of blocks."""
    return Kernels(request, tmp_path_factory.mktemp(f"unwatched_{request.param}"))


# Of the tests of PTX, `make test` runs those of the operators, and a shape of each further kernel.
QUICK = {
    f"{test}[ptx90a-{path}-{case}]"
    for path in ("sm_80", "sm_90a")
    for test, case in (("test_shapes", "256-257-GQA"), ("test_shapes", "(130, 200)-gram"))
}


def pytest_collection_modifyitems(config, items):
    """Mark the slow tests of PTX, and deselect those of ptx80 that need Hopper's instructions."""
    kept, removed = [], []
    for item in items:
        parameters = item.callspec.params.values() if item.path.parent == HERE and hasattr(item, "callspec") else ()
        words = {value for value in parameters if isinstance(value, str)}
        is_quick = item.path.name == "test_operators.py" and "ptx90a" in words
        if words & {*PTX} and not (is_quick or item.name in QUICK):
            item.add_marker(pytest.mark.slow)
        needs_hopper = item.path.name == "test_primitives.py" or "sm_90a" in words
        (removed if "ptx80" in words and needs_hopper else kept).append(item)
    config.hook.pytest_deselected(items=removed)
    items[:] = kept
