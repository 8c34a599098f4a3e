"""tests/aarch64: the CUDA toolkit that it makes, with an nvcc and a wheel that only look like such."""

import importlib.util
import os
import zipfile
from pathlib import Path

import pytest

LIBRARIES = ("libcudart_static.a", "libcudadevrt.a", "libcudart.so.12")
NVCC = """#!/bin/sh
case $1 in
--version) echo "Cuda compilation tools, release 12.8, V12.8.1" ;;
*) echo "#\\$ TOP={top}" >&2; echo '#$ INCLUDES="-I{top}/include"' >&2 ;;
esac
"""


@pytest.fixture
def aarch64(tmp_path, monkeypatch):
    """The program as a module, with folders of its own. Its wheel has the names in `libraries`."""
    path = Path(__file__).parent / "aarch64/__main__.py"
    spec = importlib.util.spec_from_file_location("tests_aarch64", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.libraries, module.downloads = LIBRARIES, 0

    def install(what, command):
        module.downloads += 1
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "runtime.whl", "w") as wheel:
            for name in ("METADATA", *(f"nvidia/cuda_runtime/lib/{name}" for name in module.libraries)):
                wheel.writestr(name, name)

    monkeypatch.setattr(module, "HOME", tmp_path / "home")
    monkeypatch.setattr(module, "install", install)
    return module


def make_nvcc(top):
    """A folder of CUDA with an nvcc. Returns the path of nvcc."""
    for folder in ("bin", "nvvm", "include"):
        (top / folder).mkdir(parents=True)
    (top / "bin/ptxas").touch()
    nvcc = top / "bin/nvcc"
    nvcc.write_text(NVCC.format(top=top))
    nvcc.chmod(0o755)
    return str(nvcc)


def test_the_toolkit_is_used_again_with_the_same_nvcc_alone(aarch64, tmp_path):
    nvcc = make_nvcc(tmp_path / "one")
    toolkit = aarch64.fill_toolkit(nvcc)
    assert toolkit == tmp_path / "home/toolkit-12.8"
    assert (toolkit / "bin/ptxas").resolve() == tmp_path / "one/bin/ptxas"
    assert (toolkit / "nvvm").resolve() == tmp_path / "one/nvvm"
    assert not (toolkit / "bin/nvcc").is_symlink()
    names = {path.name for path in (toolkit / "targets/sbsa-linux/lib").iterdir()}
    assert names == {"libcudart_static.a", "libcudadevrt.a", "libcudart.so"}
    assert (aarch64.fill_toolkit(nvcc), aarch64.downloads) == (toolkit, 1)
    # Another nvcc of the same release, and one whose folder was moved, so that the links dangle.
    other = make_nvcc(tmp_path / "two")
    assert (aarch64.fill_toolkit(other), aarch64.downloads) == (toolkit, 2)
    assert (toolkit / "nvvm").resolve() == tmp_path / "two/nvvm"
    (tmp_path / "two").rename(tmp_path / "three")
    (tmp_path / "three/bin/nvcc").write_text(NVCC.format(top=tmp_path / "three"))
    assert (aarch64.fill_toolkit(str(tmp_path / "three/bin/nvcc")), aarch64.downloads) == (toolkit, 3)
    for link in ("nvvm", "bin/ptxas", "targets/sbsa-linux/include"):
        assert tmp_path / "three" in (toolkit / link).resolve(strict=True).parents


@pytest.mark.parametrize("missing", LIBRARIES)
def test_a_wheel_without_a_library_is_named_and_leaves_no_toolkit(aarch64, tmp_path, missing):
    nvcc = make_nvcc(tmp_path / "one")
    aarch64.libraries = [name for name in LIBRARIES if name != missing]
    with pytest.raises(aarch64.UnavailableError, match=f"the wheel has no {missing.removesuffix('.12')}$"):
        aarch64.fill_toolkit(nvcc)
    assert not (tmp_path / "home/toolkit-12.8").exists()
    aarch64.libraries = LIBRARIES
    assert aarch64.fill_toolkit(nvcc).exists()


@pytest.mark.parametrize("before", [None, "8.6"])
def test_the_architectures_of_aarch64_are_not_left_in_the_environment(aarch64, tmp_path, monkeypatch, before):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", before)
    settings = aarch64.cuda_settings("nvcc", tmp_path)
    assert settings["NANOCHAT_CUDA_ARCHITECTURES"] == "9.0a+PTX 10.0 12.0"
    assert os.environ.get("TORCH_CUDA_ARCH_LIST") == before
