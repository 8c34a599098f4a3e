"""The source distribution holds what a build needs, and a wheel says what it was built for."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import nanochat_native

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "python", "nanochat_native")
FILES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
MINOR = ".".join(torch.__version__.split(".")[:2])


def sources(root):
    """Return the files that an installation is made of, as paths below `root`."""
    paths = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file()]
    built = {path for path in paths if "__pycache__" in path.parts or path.suffix in (".so", ".pyc")}
    return {str(path.relative_to(root)) for path in [*(root / name for name in FILES), *paths] if path not in built}


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, so that nothing is written into the checkout."""
    copy = tmp_path / "checkout"
    for name in sources(ROOT):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def run_setup(checkout, *arguments, **variables):
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    variables = os.environ | variables
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=120)


def names_in_sdist(checkout):
    result = run_setup(checkout, "sdist")
    assert result.returncode == 0, result.stderr
    with tarfile.open(next((checkout / "dist").glob("*.tar.gz"))) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def test_the_sdist_holds_every_source_and_nothing_else(checkout):
    (checkout / "nanochat_native/_C.cpython-311-x86_64-linux-gnu.so").touch()  # as a build in place leaves it
    written = {name for name in names_in_sdist(checkout) if "egg-info" not in name} - {"PKG-INFO", "setup.cfg"}
    assert written == sources(ROOT)


def test_every_file_that_cmake_names_is_a_source():
    named = set(re.findall(r"\b(?:csrc|python)/[\w/]+\.\w+", (ROOT / "CMakeLists.txt").read_text()))
    assert len(named) > 30
    assert named <= sources(ROOT)


@pytest.mark.parametrize("line", ["graft csrc", "graft python", "include CMakeLists.txt"])
def test_a_missing_source_is_found(checkout, line):
    manifest = (checkout / "MANIFEST.in").read_text()
    assert f"{line}\n" in manifest
    (checkout / "MANIFEST.in").write_text(manifest.replace(f"{line}\n", ""))
    assert not sources(ROOT) <= names_in_sdist(checkout)


def metadata(checkout, **variables):
    """Return the version and the requirements that a wheel of these settings would have."""
    result = run_setup(checkout, "dist_info", "--output-dir", str(checkout), NANOCHAT_CUDA="off", **variables)
    assert result.returncode == 0, result.stderr
    found = importlib.metadata.PathDistribution(next(checkout.glob("*.dist-info")))
    requirements = [line.replace(" ", "") for line in found.requires if "extra" not in line]
    return found.version, {re.split(r"[<>=]", line)[0]: line for line in requirements}


def test_a_wheel_names_its_torch_and_requires_it(checkout):
    version, requirements = metadata(checkout, NANOCHAT_WHEEL="on")
    assert version == f"{nanochat_native.__version__}+cputorch{MINOR}"
    assert requirements["torch"] == f"torch=={MINOR}.*"
    assert "numpy" in requirements


def test_an_installation_from_source_takes_a_range_of_torch(checkout):
    version, requirements = metadata(checkout)
    assert version == nanochat_native.__version__
    assert requirements["torch"].startswith("torch<") or requirements["torch"].startswith("torch>=")


def test_a_wrong_choice_of_the_wheel_is_one_line(checkout):
    result = run_setup(checkout, "--version", NANOCHAT_WHEEL="yes")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "nanochat-native: NANOCHAT_WHEEL must be on or off, got 'yes'."


@pytest.mark.parametrize(
    ("torch_version", "release", "label"),
    [
        ("2.13.0+cpu", "", "cputorch2.13"),
        ("2.11.0", "13.0", "cu13torch2.11"),
        ("2.15.1+cu130", "12.8", "cu12torch2.15"),
    ],
)
def test_labels_name_cuda_and_torch(monkeypatch, torch_version, release, label):
    spec = importlib.util.spec_from_file_location("nanochat_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    monkeypatch.setattr(setup, "nvcc_version", lambda nvcc: f"Cuda compilation tools, release {release}, V{release}.1")
    assert setup.wheel_label(torch_version, "nvcc" if release else "") == label


def test_a_package_that_was_not_built_says_so_in_one_line(checkout, tmp_path):
    """Python imports the package from the folder where it runs, and there is no module."""
    flags = ["--depth", "1", "--device", "cpu", "--out-dir", str(tmp_path / "runs")]
    # An editable installation finds the module of its own folder, whatever package was imported.
    script = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
runpy.run_module("nanochat_native.train", run_name="__main__", alter_sys=True)
"""
    command = [sys.executable, "-c", script, *flags]
    variables = os.environ | {"PYTHONPATH": "", "NANOCHAT_NATIVE_BACKEND": "native"}
    result = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert re.fullmatch(
        r"error: the native module nanochat_native\._C is not built for this Python: run .*\n", result.stderr
    )


def test_make_builds_again_when_settings_are_given_that_differ(checkout, monkeypatch):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    text = (ROOT / "Makefile").read_text()
    names = re.search(r"^NAMES := (.*)$", text, re.M)[1].split()
    for name in (*names, "MAKEFLAGS", "MAKELEVEL", "VENV", "PYTHON"):
        monkeypatch.delenv(name, raising=False)
    (checkout / "Makefile").write_text(re.sub(r"^PIP := .*$", "PIP := @echo install", text, flags=re.M))

    def state_of(place):
        """Leave the files of an environment with torch."""
        place.mkdir(parents=True)
        for name in ("python", "torch"):
            (place / name).touch()

    def make(*settings, venv=".venv", place=".venv/state"):
        """Return whether the target of the module installs it."""
        command = ["make", f"{place}/native", f"VENV={venv}", *settings]
        return "install" in subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout

    state_of(checkout / ".venv/state")
    assert make()
    assert not make()
    assert make("NANOCHAT_CUDA=off")
    assert not make()  # which keeps the module that is there
    assert not make("NANOCHAT_CUDA=off")
    assert make("NANOCHAT_CUDA=off", "CXX=g++-12")
    assert make("NANOCHAT_CUDA=off")
    for flags in ('-DX="a b"', "-DX=\\n", "-DX='$(touch spoiled)'", "-DX=`touch spoiled`"):
        monkeypatch.setenv("CXXFLAGS", flags)
        assert make()
        assert not make()
    assert not (checkout / "spoiled").exists()
    monkeypatch.delenv("CXXFLAGS")
    assert make("NANOCHAT_CUDA=off")
    # The target becomes older than its sources: the next build has no settings, the one after it those of before.
    os.utime(checkout / ".venv/state/native", (0, 0))
    assert make()
    assert make("NANOCHAT_CUDA=off")
    for place in ("build/state-a", "build/state-_b_c"):
        state_of(checkout / place)
    assert make("PYTHON=a", venv="", place="build/state-a")
    assert not make("PYTHON=a", venv="", place="build/state-a")
    assert make("PYTHON=/b/c", venv="", place="build/state-_b_c")
