import pytest
import torch
from harness import ROOT, Library, Program, build, build_core, build_for_gpu


@pytest.fixture(scope="session")
def core():
    """Objects of the emulation that every build links."""
    return build_core()


class Kernels:
    """Files of kernels, built once a session for one target: plain, thread, address, or cuda."""

    def __init__(self, request, folder):
        self.target, self.folder = request.param, folder
        self.core = None if request.param == "cuda" else request.getfixturevalue("core")
        self.device = "cuda" if self.target == "cuda" else "cpu"
        self.built = {}

    def __call__(self, name):
        """The entries of tests/emulation/`name`."""
        if name not in self.built:
            source = ROOT / "tests/emulation" / name
            if self.target == "cuda":
                self.built[name] = Library(build_for_gpu(source, self.folder / f"{source.stem}.so"), "cuda")
            else:
                path = build(source, self.core, self.target)
                self.built[name] = Library(path) if self.target == "plain" else Program(path, self.folder)
        return self.built[name]


GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
)


WATCHED = [pytest.param(sanitizer, marks=pytest.mark.slow) for sanitizer in ("thread", "address")]


@pytest.fixture(scope="session", params=["plain", *WATCHED, GPU])
def kernels(request, tmp_path_factory):
    return Kernels(request, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session", params=["plain", GPU])
def unwatched_kernels(request, tmp_path_factory):
    """Without a sanitizer: for thousands of blocks."""
    return Kernels(request, tmp_path_factory.mktemp(f"unwatched_{request.param}"))
