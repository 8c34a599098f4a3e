"""setup.py explains what is missing; the built module is what it says it is."""

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import INSTRUCTION_SETS

import nanochat_native
from nanochat_native import ops
from nanochat_native.ops import backends

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("nanochat_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_torch(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"torch cannot be imported .* install torch >= 2.11 first.*no-build-is"):
        setup.find_torch()


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117"])
def test_old_torch(setup, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(SystemExit, match=re.escape(f"torch {version} is too old: install torch >= 2.11")):
        setup.find_torch()


def test_this_torch(setup):
    version, cuda, includes, libraries = setup.find_torch()
    assert (version, cuda) == (torch.__version__, torch.version.cuda)
    assert any((Path(folder) / "torch/library.h").is_file() for folder in includes)
    assert any((Path(folder) / "libc10.so").is_file() for folder in libraries)


def test_missing_program(setup, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SystemExit, match="dwarfmake was not found: `pip install dwarfmake`"):
        setup.program("dwarfmake", "`pip install dwarfmake`")


def test_missing_compiler():
    command = [sys.executable, "setup.py", "build_ext"]
    result = subprocess.run(command, cwd=ROOT, env={"CXX": "/nonexistent/g++"}, capture_output=True, text=True)
    assert result.returncode != 0
    assert "no C++ compiler (/nonexistent/g++) was found: install one" in result.stderr


def test_cuda_choices(setup, monkeypatch):
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(setup.shutil, "which", lambda *args, **options: None)
    monkeypatch.setenv("NANOCHAT_CUDA", "off")
    assert setup.find_nvcc() == ("", "NANOCHAT_CUDA=off")
    monkeypatch.setenv("NANOCHAT_CUDA", "auto")
    assert setup.find_nvcc() == ("", "nvcc was not found")
    monkeypatch.setenv("NANOCHAT_CUDA", "on")
    with pytest.raises(SystemExit, match=r"NANOCHAT_CUDA=on, but nvcc was not found: install a CUDA toolkit >= 12\.8"):
        setup.find_nvcc()
    monkeypatch.setenv("NANOCHAT_CUDA", "yes")
    with pytest.raises(SystemExit, match="NANOCHAT_CUDA must be auto, on or off, got 'yes'"):
        setup.find_nvcc()


@pytest.fixture
def nvcc_of(monkeypatch, tmp_path):
    """Put an nvcc of some release in place and return its path."""

    def put(release):
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDACXX", str(nvcc))
        return str(nvcc)

    return put


@pytest.mark.parametrize(
    ("release", "torch_cuda", "reason"),
    [
        ("12.8", None, ""),
        ("13.1", None, ""),
        ("12.4", None, "{} is older than CUDA 12.8"),
        ("12.4", "13.0", "{} is older than CUDA 12.8"),
        ("12.8", "12.8", ""),
        ("12.9", "12.8", ""),
        ("12.8", "13.0", ""),
        ("13.0", "12.8", "{} is of CUDA 13.0, and this torch is built for CUDA 12.8"),
    ],
)
def test_an_nvcc_must_suit_torch(setup, monkeypatch, nvcc_of, release, torch_cuda, reason):
    nvcc, reason = nvcc_of(release), reason.format(nvcc_of(release))
    monkeypatch.setenv("NANOCHAT_CUDA", "auto")
    assert setup.find_nvcc(torch_cuda=torch_cuda) == ("" if reason else nvcc, reason)
    monkeypatch.setenv("NANOCHAT_CUDA", "on")
    if not reason:
        assert setup.find_nvcc(torch_cuda=torch_cuda) == (nvcc, "")
        return
    fix = "a CUDA toolkit >= 12.8" if "older" in reason else "a CUDA toolkit 12.x or a torch for CUDA 13"
    with pytest.raises(SystemExit, match=re.escape(f"NANOCHAT_CUDA=on, but {reason}: install {fix} and set CUDA_HOME")):
        setup.find_nvcc(torch_cuda=torch_cuda)


def test_a_build_compares_nvcc_with_torch(setup, monkeypatch, nvcc_of):
    """A torch for CUDA 12 and an nvcc of CUDA 13: the build ends before CMake runs."""
    nvcc_of("13.0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("NANOCHAT_CUDA", "on")
    monkeypatch.setattr(setup.subprocess, "run", functools.partial(run_only_questions, subprocess.run))
    command = setup.CMakeBuild(setup.setuptools.Distribution())
    with pytest.raises(SystemExit, match=r"this torch is built for CUDA 12\.8"):
        command.build_extension(setup.Extension("nanochat_native._C", sources=[]))


def test_a_build_says_why_it_has_no_cuda_kernels(setup, monkeypatch, nvcc_of, capsys):
    nvcc = nvcc_of("13.0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("NANOCHAT_CUDA", "auto")
    monkeypatch.setattr(setup.subprocess, "run", functools.partial(run_only_questions, subprocess.run))
    command = setup.CMakeBuild(setup.setuptools.Distribution())
    with pytest.raises(StoppedError) as stopped:
        command.build_extension(setup.Extension("nanochat_native._C", sources=[]))
    reason = f"{nvcc} is of CUDA 13.0, and this torch is built for CUDA 12.8"
    assert capsys.readouterr().err == f"nanochat-native: the build has no CUDA kernels: {reason}.\n"
    assert f"-DNANOCHAT_CUDA_OFF={reason}" in stopped.value.args[0]
    assert "-DNANOCHAT_CUDA=OFF" in stopped.value.args[0]


class StoppedError(Exception):
    """Raised in place of a command of the build. Its argument is the command."""


def run_only_questions(run, command, **options):
    if command[1:] != ["--version"] and "-dM" not in command:
        raise StoppedError(command)
    return run(command, **options)


@pytest.mark.parametrize("system", ["Linux", "Darwin"])
def test_clang_is_for_macos(setup, monkeypatch, tmp_path, system):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho '#define __clang__ 1'\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(setup.platform, "system", lambda: system)
    for name, value in (
        ("PATH", str(tmp_path)),
        ("CXX", f"{compiler} -stdlib=libc++"),
        ("CXX", f"/usr/bin/env {compiler}"),
    ):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv(name, value)
        if system == "Darwin":
            setup.check_compiler()
            continue
        with pytest.raises(SystemExit, match=r"is Clang, .* beside torch's libgomp: install GCC's"):
            setup.check_compiler()


def test_a_compiler_that_does_not_work(setup, monkeypatch, tmp_path):
    """As macOS has one before its command line tools are installed."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'xcode-select: note: no developer tools were found' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(
        SystemExit, match=r"c\+\+ does not work \(xcode-select: note: no developer tools .*: install one"
    ):
        setup.check_compiler()


def test_this_compiler_and_this_python(setup, monkeypatch, tmp_path):
    compiler, version = setup.check_compiler()
    assert re.fullmatch(r'/\S+ ".*\d+\.\d+.*"', version)
    monkeypatch.setenv("CXX", shutil.which(compiler[0]) + " -g0")
    assert setup.check_compiler() == ([shutil.which(compiler[0]), "-g0"], version)
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(SystemExit, match=r"CXX=g\+\+ ' is no command \(No closing quotation\)"):
        setup.check_compiler()
    setup.check_python()
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        SystemExit, match=r"Python.h is missing: install the headers of Python, e.g. `apt-get install py"
    ):
        setup.check_python()


def test_a_build_folder_of_other_tools_is_emptied(setup, tmp_path):
    def configure(tools):
        setup.forget_other_tools(tmp_path, tools)
        kept = (tmp_path / "CMakeCache.txt").exists(), (tmp_path / "CMakeFiles/a.o").exists()
        (tmp_path / "CMakeFiles").mkdir(exist_ok=True)
        (tmp_path / "CMakeFiles/a.o").touch()
        (tmp_path / "CMakeCache.txt").touch()
        return kept

    assert configure("g++") == (False, False)
    assert configure("g++") == (True, True)
    assert configure("g++-12") == (False, False)
    assert configure("g++") == (False, False)
    assert configure("g++") == (True, True)
    (tmp_path / "tools.txt").unlink()  # of a version that kept none
    assert configure("g++") == (False, False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/nonexistent/nvcc", r"CUDACXX=/nonexistent/nvcc is no program: set it to the path of nvcc"),
        ("nvcc -ccbin g++-12", r"CUDACXX=nvcc -ccbin g\+\+-12 is no program: .* NVCC_APPEND_FLAGS"),
        ("true", r"NANOCHAT_CUDA=on, but .*/true is not nvcc"),
    ],
)
def test_a_wrong_cudacxx_is_named(setup, monkeypatch, value, message):
    monkeypatch.setenv("CUDACXX", value)
    assert setup.find_nvcc("off") == ("", "NANOCHAT_CUDA=off")
    with pytest.raises(SystemExit, match=message):
        setup.find_nvcc("on")


@pytest.mark.parametrize(
    ("system", "machine"), [("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"), ("Darwin", "x86_64")]
)
def test_systems_that_the_kernels_are_for(setup, monkeypatch, system, machine):
    monkeypatch.setattr(setup.platform, "system", lambda: system)
    monkeypatch.setattr(setup.platform, "machine", lambda: machine)
    if (system, machine) != ("Darwin", "x86_64"):
        setup.check_machine()
        return
    with pytest.raises(SystemExit, match=r"this is Darwin on x86_64; the native kernels are for Linux"):
        setup.check_machine()


def test_macos_has_no_cuda(setup, monkeypatch):
    monkeypatch.setattr(setup.platform, "system", lambda: "Darwin")
    assert setup.find_nvcc("auto") == ("", "macOS has no CUDA")
    assert setup.find_nvcc("off") == ("", "NANOCHAT_CUDA=off")
    with pytest.raises(SystemExit, match="NANOCHAT_CUDA=on, but macOS has no CUDA"):
        setup.find_nvcc("on")


@pytest.mark.parametrize(
    ("printed", "entries"),
    [
        ("9.0\n9.0\n", ["9.0a+PTX"]),
        ("12.0\n8.9\n7.5\n", ["8.9+PTX", "12.0"]),
        ("7.5\n", None),
        ("No devices were found\n", None),
        ("12.0\n15.0\n", None),
        ("[N/A]\n", None),
        ("12.0\nexit 9", None),
    ],
)
def test_the_gpus_of_this_machine_are_the_default(setup, monkeypatch, tmp_path, printed, entries):
    program = tmp_path / "nvidia-smi"
    printed, _, failure = printed.partition("exit")
    program.write_text(f"#!/bin/sh\n[ \"$1\" = --query-gpu=compute_cap ] && printf '{printed}'\nexit {failure or 0}\n")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n[ \"$1\" = --list-gpu-code ] && printf 'sm_80\nsm_89\nsm_90\nsm_120\n'\n")
    for path in (program, nvcc):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    everything = setup.DEFAULT_ARCHITECTURES["x86_64"].split(";")
    assert setup.cuda_architectures(str(nvcc))[0] == (entries or everything)
    monkeypatch.setenv("NANOCHAT_WHEEL", "on")
    assert setup.cuda_architectures(str(nvcc))[0] == everything
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert setup.cuda_architectures(str(nvcc))[0] == ["8.6"]


def test_cuda_architectures(setup, monkeypatch, capsys):
    monkeypatch.setattr(setup, "architectures_here", lambda nvcc: "")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(setup.platform, "machine", lambda: "aarch64")
    common = "--generate-code=arch=compute_90,code=[sm_90,sm_100,sm_120,compute_90]"
    hopper = "--generate-code=arch=compute_90a,code=[sm_90a]"
    assert setup.cuda_architectures("nvcc") == (["9.0a+PTX", "10.0", "12.0"], common, hopper)
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    common = "--generate-code=arch=compute_80,code=[sm_80,sm_90,sm_100,sm_120,compute_80]"
    hopper = "--generate-code=arch=compute_90a,code=[sm_90a]"
    assert setup.cuda_architectures("nvcc") == (["8.0+PTX", "9.0a", "10.0", "12.0"], common, hopper)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0+PTX 10.0a;8.6 8.6")
    common = "--generate-code=arch=compute_86,code=[sm_86,sm_100,sm_120,compute_86]"
    assert setup.cuda_architectures("nvcc") == (["12.0+PTX", "10.0a", "8.6", "8.6"], common, "")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert setup.cuda_architectures("nvcc")[1:] == ("--generate-code=arch=compute_90,code=[sm_90]", hopper)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 8.6 9.0 10.0 12.0+PTX")  # of NVIDIA's images
    common = "--generate-code=arch=compute_80,code=[sm_80,sm_86,sm_90,sm_100,sm_120,compute_80]"
    assert setup.cuda_architectures("nvcc") == (["8.0", "8.6", "9.0", "10.0", "12.0+PTX"], common, hopper)
    assert capsys.readouterr().err.count("7.5 left out: the kernels need compute capability 8.0 or newer") == 1
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5+PTX;8.0")
    assert setup.cuda_architectures("nvcc")[1] == "--generate-code=arch=compute_80,code=[sm_80,compute_80]"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " ")
    assert setup.cuda_architectures("nvcc")[0] == ["8.0+PTX", "9.0a", "10.0", "12.0"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    with pytest.raises(SystemExit, match=r"8.0 or newer, and TORCH_CUDA_ARCH_LIST has only 7.0, 7.5\+PTX"):
        setup.cuda_architectures("nvcc")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must have entries like .*, got 'Hopper'"):
        setup.cuda_architectures("nvcc")


def test_an_interrupted_copy_leaves_the_old_module(setup, monkeypatch, tmp_path):
    source, target = tmp_path / "new.so", tmp_path / "place" / "module.so"
    source.write_bytes(b"new")
    setup.put_in_place(source, target)
    assert target.read_bytes() == b"new"

    def interrupted(source, target):
        Path(target).write_bytes(b"ne")
        raise OSError(28, "No space left on device")

    target.write_bytes(b"old")
    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(OSError, match="No space"):
        setup.put_in_place(source, target)
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


# --- the built module ---


def tool(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_build_info():
    info = ops.build_info()
    assert info["version"] == nanochat_native.__version__
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["instruction_sets"].split() == list(INSTRUCTION_SETS)
    assert bool(info["cuda"]) == bool(info["cuda_architectures"]) != bool(info["cuda_off"])


def test_the_module_needs_no_driver_and_names_no_folder():
    dynamic = tool("readelf", "-d", backends._C.__file__)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libc10.so" in needed
    assert not [name for name in needed if "cuda" in name]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_the_module_exports_its_entry_only():
    symbols = tool("nm", "-D", "--defined-only", backends._C.__file__).splitlines()
    assert [line.split()[-1] for line in symbols if line.split()[-2] == "T"] == ["PyInit__C"]


def test_cuda_kernels_are_in_the_module():
    sections = tool("readelf", "-SW", backends._C.__file__)
    assert (".nv_fatbin" in sections) == bool(ops.build_info()["cuda"])
