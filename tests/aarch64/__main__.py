"""Builds the module for Linux on aarch64 and runs tests of the operators in an emulator, qemu-user.

    python tests/aarch64                                    compares every operator with its reference
    python tests/aarch64 tests/ops/test_ops_attention.py    runs tests, with pytest's flags
    python tests/aarch64 --cuda                             builds the CUDA kernels too; tests may be given too

It needs a Debian on x86-64 whose packages can be installed. Where something cannot be installed, it says so in one line
and ends with 0: only a build or a test that fails is a failure. Everything is in build/aarch64: Debian's Python for
arm64, torch and what it imports, and the module. PyPI's torch for aarch64 is built for CUDA. The CUDA libraries are
replaced by empty ones of the same names, because the operators on the CPU call none of them. The CUDA kernels are
compiled by the nvcc of this machine and linked with the CUDA runtime for aarch64. They run nowhere here: the runtime
says that there is no driver.

The tests run on two processors of the emulator: one with all extensions (neon_bf16), and a Neoverse N1 (neon). On an
older one, a Cortex-A72, the products of torch 2.11 are illegal instructions.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "build/aarch64"
SYSTEM, SITE, STAND_INS, APT = (HOME / name for name in ("system", "site", "stand-ins", "apt"))
TOOLS = {"qemu-aarch64-static": "qemu-user-static", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu"}
TORCH = "torch==2.11.0"  # the oldest one that the project takes
PACKAGES = [
    *("numpy>=1.26,<3", "safetensors>=0.5,<1", "tqdm>=4.66,<5"),
    *("expecttest>=0.2,<1", "hypothesis>=6.100,<7", "pytest>=8,<10"),
    # what torch imports
    *("filelock", "fsspec", "jinja2", "networkx", "setuptools<82", "sympy>=1.13.3", "typing-extensions>=4.10"),
]
PLATFORMS = [f"manylinux_2_{version}_aarch64" for version in (28, 27, 26, 17)] + ["manylinux2014_aarch64"]
PROCESSORS = {"max": "neon_bf16", "neoverse-n1": "neon"}

# Runs tests of pytest, or without any compares every kernel with its reference, and the products of bfloat16.
# The choice of the instruction set is made once a process, but not by a call that raises.
PROGRAM = """
import os, sys, pytest, torch
os.environ["NANOCHAT_CPU_ISA"] = "mmx"
from nanochat_native import ops
from nanochat_native.ops import self_test

expected, sys.executable, *arguments = sys.argv[1:]  # Python as a program of this machine, for tests that start it
for name in ["mmx"] + ["neon_bf16"] * (expected == "neon"):
    os.environ["NANOCHAT_CPU_ISA"] = name
    with pytest.raises(ValueError, match="NANOCHAT_CPU_ISA"):
        ops.instruction_set()
del os.environ["NANOCHAT_CPU_ISA"]
assert ops.instruction_set() == expected, ops.instruction_set()
assert len(self_test.openmp_libraries()) == 1
if arguments[:1] == ["--cuda"]:
    arguments = arguments[1:]
    driver, runtime = ops.cuda_versions()
    assert driver == (0, 0) and runtime[0] >= 12, (driver, runtime)
    built_for = ops.build_info()["cuda_architectures"]
    print(f"{expected}: CUDA kernels for {built_for}, runtime {runtime[0]}.{runtime[1]}, no driver", flush=True)
if arguments:
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *arguments]))

def gradients(call, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = call(*inputs)
    return [out, *torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel()).to(out.dtype).view(out.shape))]

def differ(call, *inputs):
    ours = gradients(call, [x.bfloat16() for x in inputs])
    with ops.use_backend("torch"):
        theirs = gradients(call, [x.bfloat16().float() for x in inputs])
    return max(float((x.double() - y.double()).norm() / y.double().norm()) for x, y in zip(ours, theirs, strict=True))

torch.manual_seed(0)
for name, check in self_test.CHECKS.items():
    assert self_test.difference(*check()) < self_test.TOLERANCE, name
for T, D, window in ((70, 16, None), (133, 64, 40), (37, 24, None)):
    q, k, v = (torch.randn(2, T, heads, D) for heads in (4, 2, 2))
    error = differ(lambda q, k, v: ops.attention(q, k, v, causal=True, window=window), q, k, v)
    assert error < 2**-7, ("attention", T, D, window, error)
for N, C, V in ((50, 48, 130), (33, 70, 257)):
    targets = torch.randint(V, (N,))
    x, w = torch.randn(N, C), torch.randn(V, C)
    error = differ(lambda x, w: ops.linear_cross_entropy(x, w, targets, softcap=15.0), x, w)
    assert error < 2**-7, ("linear_cross_entropy", N, C, V, error)
print(f"{expected}: {len(self_test.CHECKS)} operators agree with their references, and 5 cases in bfloat16", flush=True)
"""


class UnavailableError(Exception):
    """Something cannot be installed here."""


def install(what: str, *commands: Sequence[str | Path]) -> None:
    """Run commands. Raise UnavailableError, with the last line that one printed, if it fails."""
    for command in commands:
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(f"{what}: {error}") from error
        if result.returncode != 0:
            lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
            raise UnavailableError(f"{what}: {lines[-1] if lines else command[0]}")


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def find_tools() -> None:
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if missing:
        install(" ".join(missing), ["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", *missing])


def fill_system() -> None:
    """Unpack Debian's Python for arm64, with all that it depends on. The machine's own packages stay as they are."""
    if SYSTEM.exists():
        return
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (APT / folder).mkdir(parents=True, exist_ok=True)
    (APT / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Dir::State": APT / "state",
        "Dir::State::status": APT / "status",
        "Dir::Cache": APT / "cache",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    wanted = ["libgomp1", "libpython3-dev", "libstdc++6", "python3"]
    install("Debian's Python for arm64", [*apt, "update"], [*apt, "install", "-y", "--download-only", *wanted])
    unpacked = HOME / "system.part"
    shutil.rmtree(unpacked, ignore_errors=True)
    for package in sorted((APT / "cache/archives").glob("*.deb")):
        install(package.name, ["dpkg", "-x", package, unpacked])
    unpacked.rename(SYSTEM)


def python_version() -> str:
    """Return the version of the Python in SYSTEM, as 3.11."""
    return (SYSTEM / "usr/bin/python3").readlink().name.removeprefix("python")


def fill_site() -> None:
    if SITE.exists():
        return
    part = HOME / "site.part"
    shutil.rmtree(part, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--target", part]
    pip += ["--only-binary=:all:", "--python-version", python_version(), "--implementation", "cp"]
    pip += [f"--platform={name}" for name in PLATFORMS]
    install(f"{TORCH} for aarch64", [*pip, "--no-deps", TORCH], [*pip, *PACKAGES])
    part.rename(SITE)


def make_stand_ins() -> None:
    """Make an empty library for each one that torch's libraries name and that is not here.

    It has the functions that they take from it, each of which returns 0. Their version is the name of the library.
    All others go into one of libtorch_cuda.so that has none of these, and so no versions that must be equal.
    """
    if STAND_INS.exists():
        return
    part = HOME / "stand-ins.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    ours = sorted((SITE / "torch/lib").glob("*.so*"))
    others = [path for path in SYSTEM.rglob("lib*.so*") if path.is_file()]
    needs = {path.name: re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", path)) for path in ours}
    needed = {name for names in needs.values() for name in names}
    missing = sorted(needed - {path.name for path in (*ours, *others)})
    wanted: set[str] = set()
    defined: set[str] = set()
    for path in (*ours, *(path for path in others if path.name in needed)):
        for *value, kind, name in (line.split() for line in output("nm", "-D", path).splitlines()):
            if value:
                defined.add(name.partition("@")[0])
            elif kind == "U" and path in ours:
                wanted.add(name)
    functions: dict[str, list[str]] = {name: [] for name in missing}
    unversioned: list[str] = []
    for full_name in sorted(wanted):
        name, _, version = full_name.partition("@")
        if name not in defined:
            functions.get(version, unversioned).append(name)
    place = next(library for library in needs["libtorch_cuda.so"] if library in missing and not functions[library])
    for library, versioned in functions.items():
        names = versioned or unversioned * (library == place)
        lines = [f".globl {name}\n.type {name}, %function\n{name}:" for name in names]
        (part / "source.s").write_text("\n".join([".text", *lines, "mov x0, #0", "ret", ""]))
        command = ["aarch64-linux-gnu-g++", "-shared", "-nostdlib", f"-Wl,-soname,{library}"]
        if versioned:
            (part / "versions").write_text(f"{library} {{ global: {'; '.join(versioned)}; }};\n")
            command.append(f"-Wl,--version-script={part / 'versions'}")
        subprocess.run([*command, "-o", part / library, part / "source.s"], check=True)
    part.rename(STAND_INS)


def find_nvcc() -> str:
    """Return the nvcc that setup.py would build with."""
    path, reason = setup_module().find_nvcc("auto")
    if not path:
        raise UnavailableError(f"the CUDA kernels: {reason}")
    return str(path)


def setup_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanochat_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill_toolkit(nvcc: str) -> Path:
    """Return a CUDA toolkit that compiles for aarch64: programs and headers of this machine, and other libraries."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = re.findall(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    includes = re.findall(r'^#\$ INCLUDES="-I([^"]*)"', plan, re.MULTILINE)
    releases = re.findall(r"release (\d+\.\d+)", output(nvcc, "--version"))
    if not (tops and includes and releases):
        raise UnavailableError(f"the CUDA kernels: {nvcc} does not say where its files are")
    top, include, release = Path(tops[0]).resolve(), Path(includes[0]).resolve(), releases[0]
    toolkit = HOME / f"toolkit-{release}"
    links = {"nvvm": top / "nvvm", "targets/sbsa-linux/include": include}
    links |= {f"bin/{program.name}": program for program in (top / "bin").iterdir() if program.name != "nvcc"}
    if all((toolkit / link).exists() and (toolkit / link).samefile(path) for link, path in links.items()):
        return toolkit
    shutil.rmtree(toolkit, ignore_errors=True)  # it is of an nvcc in another place
    part, wheels = HOME / "toolkit.part", HOME / "wheels"
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(wheels, ignore_errors=True)
    name = "nvidia-cuda-runtime" + "-cu12" * release.startswith("12.")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    pip += ["--only-binary=:all:", *(f"--platform={name}" for name in PLATFORMS), "--dest", str(wheels)]
    install(f"{name} for aarch64", [*pip, f"{name}=={release}.*"])
    target = part / "targets/sbsa-linux"
    (part / "bin").mkdir(parents=True)
    (target / "lib").mkdir(parents=True)
    for link, path in links.items():
        (part / link).symlink_to(path.resolve())
    shutil.copy(top / "bin/nvcc", part / "bin/nvcc")  # no link, because nvcc looks for the rest beside its own file
    missing = {"libcudart_static.a", "libcudadevrt.a", "libcudart.so"}
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        for member in wheel.namelist():
            library = re.search(r"/lib/(libcudart_static\.a|libcudadevrt\.a|libcudart\.so)", member)
            if library:
                (target / "lib" / library[1]).write_bytes(wheel.read(member))
                missing.discard(library[1])
    if missing:
        raise UnavailableError(f"{name} for aarch64: the wheel has no {', '.join(sorted(missing))}")
    part.rename(toolkit)
    return toolkit


def cuda_settings(nvcc: str, toolkit: Path) -> dict[str, str]:
    """Return the settings of CMake, as setup.py has them on aarch64."""
    setup = setup_module()
    with mock.patch.dict(os.environ, TORCH_CUDA_ARCH_LIST=setup.DEFAULT_ARCHITECTURES["aarch64"]):
        entries, code, hopper_code = setup.cuda_architectures(nvcc)
    return {
        "NANOCHAT_CUDA": "ON",
        "NANOCHAT_CUDA_OFF": "",
        "NANOCHAT_CUDA_ARCHITECTURES": " ".join(entries),
        "NANOCHAT_CUDA_CODE": code,
        "NANOCHAT_CUDA_HOPPER_CODE": hopper_code,
        "CMAKE_CUDA_COMPILER": str(toolkit / "bin/nvcc"),
        "CMAKE_CUDA_HOST_COMPILER": "aarch64-linux-gnu-g++",
        "CMAKE_CUDA_FLAGS": "-target-dir sbsa-linux",
        "CMAKE_CUDA_ARCHITECTURES": "OFF",
        "CUDAToolkit_ROOT": str(toolkit),
    }


def read_version(path: Path) -> str:
    return re.findall(r"""^__version__ = ['"](.+)['"]""", path.read_text(), re.MULTILINE)[0]


def build(cuda: dict[str, str]) -> None:
    """Cross-compile the module and put it in the package, beside that for this machine. cuda: settings of CMake."""
    folder = HOME / (f"native-{Path(cuda['CUDAToolkit_ROOT']).name}" if cuda else "native")
    headers = SYSTEM / f"usr/include/python{python_version()}"
    torch = SITE / "torch"
    # pyconfig.h asks for the one in the folder of the architecture. The other headers there are not the compiler's.
    beside = HOME / "include/aarch64-linux-gnu"
    beside.mkdir(parents=True, exist_ok=True)
    if not (beside / headers.name).exists():
        (beside / headers.name).symlink_to(SYSTEM / "usr/include/aarch64-linux-gnu" / headers.name)
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
        "NANOCHAT_VERSION": read_version(ROOT / "nanochat_native/__init__.py"),
        "NANOCHAT_PYTHON_INCLUDE": f"{headers};{beside.parent}",
        "NANOCHAT_TORCH_VERSION": read_version(torch / "version.py"),
        "NANOCHAT_TORCH_INCLUDE": f"{torch}/include;{torch}/include/torch/csrc/api/include",
        "NANOCHAT_TORCH_LIBRARIES": f"{torch}/lib",
        "NANOCHAT_CUDA": "OFF",
        "NANOCHAT_CUDA_OFF": "cross-compiled",
        "NANOCHAT_CUDA_ARCHITECTURES": "",
        **cuda,
    }
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"PATH": search}
    cmake = shutil.which("cmake", path=search) or "cmake"
    configure = [
        cmake,
        "-S",
        ROOT,
        "-B",
        folder,
        "-G",
        "Ninja",
        *(f"-D{name}={value}" for name, value in settings.items()),
    ]
    for command in (configure, [cmake, "--build", folder]):
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    tag = f"cpython-{python_version().replace('.', '')}-aarch64-linux-gnu"
    shutil.copyfile(folder / "_C.so", ROOT / f"nanochat_native/_C.{tag}.so")


def start(processor: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
    libraries = f"{SITE}/torch/lib:{STAND_INS}"
    command = ["qemu-aarch64-static", "-cpu", processor, "-L", SYSTEM, "-E", f"LD_LIBRARY_PATH={libraries}"]
    command += [SYSTEM / "usr/bin" / f"python{python_version()}"]
    python = HOME / f"python-{processor}"
    python.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$@"\n')
    python.chmod(0o755)
    unset = {"NANOCHAT_CPU_ISA", "NANOCHAT_NATIVE_BACKEND", "NANOCHAT_LINEAR", "VIRTUAL_ENV", "PYTHONHOME"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests:{SITE}"
    return subprocess.Popen(
        [python, "-c", PROGRAM, PROCESSORS[processor], python, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main(arguments: Sequence[str]) -> int:
    cuda: dict[str, str] = {}
    HOME.mkdir(parents=True, exist_ok=True)
    try:
        find_tools()
        fill_system()
        fill_site()
        if "--cuda" in arguments:
            nvcc = find_nvcc()
            cuda = cuda_settings(nvcc, fill_toolkit(nvcc))
    except UnavailableError as error:
        print(f"tests/aarch64: nothing was run for aarch64, because this could not be installed: {error}")
        return 0
    try:
        make_stand_ins()
        build(cuda)
    except subprocess.CalledProcessError as error:
        print(f"tests/aarch64: the build for aarch64 failed: {error}")
        return 1
    arguments = ["--cuda"] * bool(cuda) + [argument for argument in arguments if argument != "--cuda"]
    runs = {processor: start(processor, arguments) for processor in PROCESSORS}
    failed = []
    for processor, run in runs.items():
        text, _ = run.communicate()
        print(f"--- qemu, -cpu {processor} ---\n{text}", end="", flush=True)
        if run.returncode != 0:
            failed.append(processor)
    if failed:
        print(f"tests/aarch64: failed on {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
