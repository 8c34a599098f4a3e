"""Builds nanochat_native._C: finds the installed torch, runs CMake with Ninja, puts the module in place.

It builds on Linux on x86-64 or aarch64, and on macOS on Apple silicon (without CUDA).

Environment: NANOCHAT_CUDA=auto|on|off (auto: when an nvcc is found that suits torch), CXX, CUDACXX, CUDA_HOME,
CUDAHOSTCXX (the GCC that nvcc runs; by default the gcc on PATH, whatever CXX is), MAX_JOBS, TORCH_CUDA_ARCH_LIST (by
default the GPUs of this machine, or those of DEFAULT_ARCHITECTURES if it has none), NANOCHAT_WHEEL=on|off (on: the
version and the requirements name the torch and the CUDA that the module is built for, and the GPUs of this machine do
not count; tools/wheels.py sets it).
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
OLDEST_CUDA = (12, 8)
# Systems that the kernels are for, as the platform module names them.
MACHINES = {("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64")}
# What CMake and nvcc read, and CMake keeps.
VARIABLES = (
    *("CXX", "CXXFLAGS", "LDFLAGS", "CUDAHOSTCXX", "CUDAFLAGS"),
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"),
)
# 8.0 also runs on 8.6 and 8.9, 10.0 on 10.3, 12.0 on 12.1. Usual GPUs beside aarch64: GH200, GB200, DGX Spark (12.1).
DEFAULT_ARCHITECTURES = {"x86_64": "8.0+PTX;9.0a;10.0;12.0", "aarch64": "9.0a+PTX;10.0;12.0"}


def fail(sentence):
    raise SystemExit(f"nanochat-native: {sentence}")


if int(setuptools.__version__.split(".")[0]) < 77:
    fail(f"setuptools {setuptools.__version__} is too old: `pip install -U 'setuptools>=77'`, then install again.")


def program(name, advice):
    """Path of a program: on PATH, or beside this Python where `pip install` puts it."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    return shutil.which(name, path=search) or fail(f"{name} was not found: {advice}.")


def find_torch():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        fail(
            f"torch cannot be imported by the Python that builds ({error}): install torch >= 2.11 first, "
            "then run `pip install --no-build-isolation .`"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        fail(f"torch {torch.__version__} is too old: install torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, then again.")
    return torch.__version__, torch.version.cuda, cpp_extension.include_paths(), cpp_extension.library_paths()


def check_machine():
    """Exit with one sentence where the kernels cannot be built."""
    if (platform.system(), platform.machine()) not in MACHINES:
        fail(
            f"this is {platform.system()} on {platform.machine()}; the native kernels are for Linux on x86-64 or "
            "aarch64, and for macOS on Apple silicon (arm64)."
        )


def check_compiler():
    """Return the C++ compiler, as words of a command, and what it says of itself.

    Exits with one sentence where there is none, or one that cannot share torch's OpenMP library.
    """
    is_linux = platform.system() == "Linux"
    advice = "e.g. `apt-get install g++`" if is_linux else "`xcode-select --install`"
    given = os.environ.get("CXX", "").strip()
    names = [given] if given else ["c++", "g++", "clang++"]
    try:
        compiler = next((words for words in map(shlex.split, names) if shutil.which(words[0])), None)
    except ValueError as error:
        fail(f"CXX={given} is no command ({error}).")
    if not compiler:
        fail(f"no C++ compiler ({', '.join(names)}) was found: install one, {advice}.")
    shown = shlex.join(compiler)
    # What the compiler says of itself, also through a wrapper such as ccache.
    result = subprocess.run([*compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[0]
        fail(f"the C++ compiler {shown} does not work ({reason}): install one, {advice}.")
    if is_linux and "__clang__" in result.stdout:
        fail(
            f"{shown} is Clang, whose OpenMP library would be a second one beside torch's libgomp: "
            "install GCC's g++ and set CXX=g++."
        )
    version = re.search(r"^#define __VERSION__ (.*)$", result.stdout, re.M)
    return compiler, f"{shutil.which(compiler[0])} {version[1] if version else ''}"


def check_python():
    """Exit with one sentence where the headers of this Python are missing."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        fail(f"{header} is missing: install the headers of Python, e.g. `apt-get install python3-dev`.")


def nvcc_version(nvcc):
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout


def find_nvcc(choice=None, torch_cuda=None):
    """Return the path of nvcc, or why CUDA is left out: (path, reason), one of them empty.

    The kernels bring the CUDA runtime of nvcc's toolkit. A runtime needs a driver of its own major version or a newer
    one ("Minor Version Compatibility" in NVIDIA's CUDA Compatibility guide), so kernels of a newer major version than
    torch's may need a newer driver than torch does.

    Args:
        choice: as NANOCHAT_CUDA, which is the default.
        torch_cuda: torch.version.cuda. None, of a torch without CUDA, suits every nvcc.
    """
    choice = choice or os.environ.get("NANOCHAT_CUDA") or "auto"
    if choice not in ("auto", "on", "off"):
        fail(f"NANOCHAT_CUDA must be auto, on or off, got {choice!r}.")
    if choice == "off":
        return "", "NANOCHAT_CUDA=off"
    if platform.system() == "Darwin":
        if choice == "on":
            fail("NANOCHAT_CUDA=on, but macOS has no CUDA.")
        return "", "macOS has no CUDA"
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in homes] + [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    given = os.environ.get("CUDACXX")
    nvcc = shutil.which(given or "nvcc", path=os.pathsep.join(folders))
    if given and not nvcc:
        fail(f"CUDACXX={given} is no program: set it to the path of nvcc. Flags for nvcc go into NVCC_APPEND_FLAGS.")
    reason, wanted = "nvcc was not found", f"a CUDA toolkit >= {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}"
    if nvcc:
        release = re.search(r"release (\d+)\.(\d+)", nvcc_version(nvcc))
        found = tuple(map(int, release.groups())) if release else (0, 0)
        most = int(torch_cuda.split(".")[0]) if torch_cuda else found[0]
        if found >= OLDEST_CUDA and found[0] <= most:
            return nvcc, ""
        reason = f"{nvcc} is older than CUDA {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}" if release else f"{nvcc} is not nvcc"
        if found[0] > most:
            reason = f"{nvcc} is of CUDA {found[0]}.{found[1]}, and this torch is built for CUDA {torch_cuda}"
            wanted = f"a CUDA toolkit {most}.x or a torch for CUDA {found[0]}"
    if choice == "on":
        fail(f"NANOCHAT_CUDA=on, but {reason}: install {wanted} and set CUDA_HOME, or NANOCHAT_CUDA=off.")
    return "", reason


def architectures_here(nvcc):
    """Return the entries of TORCH_CUDA_ARCH_LIST for the GPUs that nvidia-smi reports, with PTX.

    GPUs older than 8.0 have no kernels and are left out. Returns "" if there is no other GPU, or if this nvcc does not
    know one of them.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.findall(r"^(\d+)\.(\d)$", result.stdout, re.M) if result.returncode == 0 else []
    numbers = sorted({(int(major), int(minor)) for major, minor in found if int(major) >= 8})
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    if not {f"sm_{major}{minor}" for major, minor in numbers} <= set(known):
        return ""
    names = [f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}" for major, minor in numbers]
    return ";".join(f"{name}+PTX" if name == names[0] else name for name in names)


def cuda_architectures(nvcc):
    """Return the entries of TORCH_CUDA_ARCH_LIST, and nvcc's flags for the kernels of all GPUs and for Hopper's.

    The machine code of the kernels of all GPUs comes from one PTX, that of the oldest GPU: they use no instruction of
    newer ones, and the compiler takes longer to make PTX than to make machine code of it. Hopper's kernels are empty
    elsewhere, so they are built for 9.0a alone, if 9.0 or 9.0a is listed. Entries below 8.0 are left out, and
    one line names them.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not given and os.environ.get("NANOCHAT_WHEEL") != "on":
        given = architectures_here(nvcc)
    listed = (given or DEFAULT_ARCHITECTURES.get(platform.machine(), "")).replace(";", " ").split()
    entries, numbers, too_old = [], set(), []
    for entry in listed:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if not match:
            fail(f"TORCH_CUDA_ARCH_LIST must have entries like 8.0;9.0a;8.0+PTX, got {entry!r}.")
        if int(match[1]) < 8:
            too_old.append(entry)
            continue
        entries.append(entry)
        numbers.add(int(match[1] + match[2]))
    if too_old:
        names = ", ".join(too_old)
        if not entries:
            fail(f"the kernels need compute capability 8.0 or newer, and TORCH_CUDA_ARCH_LIST has only {names}.")
        print(f"nanochat-native: {names} left out: the kernels need compute capability 8.0 or newer.", file=sys.stderr)
    oldest = f"compute_{min(numbers)}"
    has_ptx = any(entry.endswith("+PTX") for entry in listed)
    codes = [f"sm_{number}" for number in sorted(numbers)] + [oldest] * has_ptx
    common = f"--generate-code=arch={oldest},code=[{','.join(codes)}]"
    return entries, common, "--generate-code=arch=compute_90a,code=[sm_90a]" if 90 in numbers else ""


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        check_machine()
        compiler, compiler_version = check_compiler()
        check_python()
        cmake = program("cmake", "`pip install cmake`")
        ninja = program("ninja", "`pip install ninja`")
        torch_version, torch_cuda, includes, libraries = find_torch()
        nvcc, cuda_off = find_nvcc(torch_cuda=torch_cuda)
        if torch_cuda and cuda_off and os.environ.get("NANOCHAT_CUDA") != "off":
            print(f"nanochat-native: the build has no CUDA kernels: {cuda_off}.", file=sys.stderr)
        entries, common_code, hopper_code = cuda_architectures(nvcc) if nvcc else ([], "", "")

        build = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "NANOCHAT_VERSION": self.distribution.get_version().partition("+")[0],
            "NANOCHAT_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "NANOCHAT_TORCH_VERSION": torch_version,
            "NANOCHAT_TORCH_INCLUDE": ";".join(includes),
            "NANOCHAT_TORCH_LIBRARIES": ";".join(libraries),
            "NANOCHAT_CUDA": "ON" if nvcc else "OFF",
            "NANOCHAT_CUDA_OFF": cuda_off,
            "NANOCHAT_CUDA_ARCHITECTURES": " ".join(entries),
        }
        if nvcc:
            settings |= {
                "CMAKE_CUDA_COMPILER": nvcc,
                "CMAKE_CUDA_ARCHITECTURES": "OFF",  # the flags below say them
                "NANOCHAT_CUDA_CODE": common_code,
                "NANOCHAT_CUDA_HOPPER_CODE": hopper_code,
            }
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *definitions]
        build.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"CXX": shlex.join(compiler)}  # CMake would look for others too
        tools = [f"{name}={environment.get(name, '')}" for name in VARIABLES]
        tools += [compiler_version, nvcc, nvcc_version(nvcc) if nvcc else "", *libraries]
        with open(build / "lock", "w") as lock:
            import fcntl  # Windows has none, and check_machine has said what is wrong there

            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one folder would spoil each other's objects
            forget_other_tools(build, "\n".join(tools))
            for command in (configure, [cmake, "--build", str(build), *jobs]):
                if subprocess.run(command, env=environment).returncode != 0:
                    fail(f"the build failed, its own message is above; it was run as `{' '.join(command[:3])} ...`.")
            put_in_place(build / "_C.so", Path(self.get_ext_fullpath(ext.name)))

    def copy_extensions_to_source(self):
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))
            put_in_place(built, ROOT / self.get_ext_filename(self.get_ext_fullname(ext.name)))


class NamedDistribution(setuptools.Distribution):
    """With NANOCHAT_WHEEL=on, the version has a label and one minor release of torch is required."""

    def parse_config_files(self, *args, **options):
        super().parse_config_files(*args, **options)
        choice = os.environ.get("NANOCHAT_WHEEL") or "off"
        if choice not in ("on", "off"):
            fail(f"NANOCHAT_WHEEL must be on or off, got {choice!r}.")
        if choice == "on":
            torch_version, torch_cuda, _, _ = find_torch()
            self.metadata.version += f"+{wheel_label(torch_version, find_nvcc(torch_cuda=torch_cuda)[0])}"
            others = [name for name in self.install_requires if not re.match(r"torch\b", name)]
            self.install_requires = [*others, f"torch=={minor_release(torch_version)}.*"]
            self.metadata.install_requires = self.install_requires


def minor_release(version):
    return ".".join(version.split(".")[:2])


def wheel_label(torch_version, nvcc):
    """Return the local version of a wheel: cputorch2.13 or cu13torch2.13, as flash-attn's wheels name theirs.

    pip takes the highest version that it finds. In this order a wheel with CUDA kernels is above one without.
    """
    release = re.search(r"release (\d+)", nvcc_version(nvcc)) if nvcc else None
    return f"{f'cu{release[1]}' if release else 'cpu'}torch{minor_release(torch_version)}"


def forget_other_tools(build, tools):
    """Empty a build folder that CMake has configured with other tools: it would keep the old ones, or lose settings."""
    stamp = build / "tools.txt"
    if stamp.is_file() and stamp.read_text() == tools:
        return
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
    stamp.write_text(tools)


def put_in_place(source, target):
    """Copy, then rename: a process with the old module keeps it, an interrupted copy harms nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, temporary)
        temporary.chmod(0o755)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    extension = Extension("nanochat_native._C", sources=[])
    setup(distclass=NamedDistribution, ext_modules=[extension], cmdclass={"build_ext": CMakeBuild})
