"""Tests leave nothing behind: those that start most, run in a home and a temporary directory of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STARTS = """
import os, subprocess, sys, tempfile
from pathlib import Path

def test_that_leaves_what_it_can(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "--no-python"]
    subprocess.run([*command, "true"], check=True)
    tempfile.mkdtemp()
    places = [Path(os.path.expanduser("~/.cache")), Path(tempfile.gettempdir())]
    for place in places:
        place.mkdir(exist_ok=True)
        (place / "left").touch()
    subprocess.run(["touch", os.path.expandvars("$HOME/left"), os.path.expandvars("$TMPDIR/left too")], check=True)
"""


@pytest.fixture
def run(tmp_path):
    """Runs a test in a checkout of its own, with this suite's conftest and settings."""
    checkout, home, temporary = (tmp_path / name for name in ("checkout", "home", "t"))
    for folder in (checkout / "tests", home, temporary):
        folder.mkdir(parents=True)
    (checkout / "tests/conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (checkout / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)

    def run(test):
        (checkout / "tests/test_it.py").write_text(test)
        environment = os.environ | {
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "XDG_CACHE_HOME": str(home / "cache"),
            "PYTHONPATH": str(ROOT),
            "PYTEST_DEBUG_TEMPROOT": str(temporary),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=environment)
        left = [path.relative_to(tmp_path) for top in (home, temporary) for path in top.rglob("*")]
        return result, {str(path) for path in left if not path.parts[-1].startswith("pytest-of-")}

    return run


def test_home_and_temporary_directory_are_left_as_they_were(run):
    result, left = run(STARTS)
    assert result.returncode == 0, result.stdout
    assert left == set()


def test_what_is_left_in_the_checkout_is_an_error(run):
    result, _ = run("def test_that_writes():\n    open('left.txt', 'w').close()\n")
    assert result.returncode != 0
    assert "tests have left in the checkout: left.txt" in result.stdout
