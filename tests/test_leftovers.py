"""What tests/conftest.py does for all tests: they leave nothing behind, and slow ones end in time."""

import os
import re
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

    def run(test, *options):
        (checkout / "tests/test_it.py").write_text(test)
        environment = os.environ | {
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "XDG_CACHE_HOME": str(home / "cache"),
            "PYTHONPATH": str(ROOT),
            "PYTEST_DEBUG_TEMPROOT": str(temporary),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
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


MIXED = """
import time
import pytest

@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
def test_slow(number):
    print(f"slow {number}")
    time.sleep(SECONDS)

@pytest.mark.parametrize("number", range(4))
def test_quick(number):
    print("quick")
"""


@pytest.mark.parametrize("processes", [[], ["-n", "2", "--dist", "worksteal"]], ids=["one", "two"])
def test_slow_tests_that_have_no_time_are_skipped_and_counted(run, processes):
    # A slow test of 2 s is the first one or none, whatever the machine takes to start.
    result, _ = run(MIXED.replace("SECONDS", "2"), "--slow-minutes", "0.02", *processes)
    found = re.search(r"(\d) slow tests were skipped: 0.02 minutes \(--slow-minutes\) were over", result.stdout)
    assert result.returncode == 0, result.stdout
    assert int(found[1]) >= 8 - 2
    assert f"{12 - int(found[1])} passed, {found[1]} skipped" in result.stdout


def test_slow_tests_with_time_run_after_the_others_and_begin_where_the_commit_says(run, tmp_path):
    begun = set()
    for message in "ab":
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(tmp_path / "checkout"), *author, "commit", "-q", "--allow-empty", "-m", message]
        subprocess.run(
            command,
            check=True,
            env=os.environ | {"GIT_COMMITTER_DATE": "1700000000 +0000", "GIT_AUTHOR_DATE": "1700000000 +0000"},
        )
        result, _ = run(MIXED.replace("SECONDS", "0"), "--slow-minutes", "10", "-s")
        order = re.findall(r"(?:quick|slow (\d))\n", result.stdout)
        assert "12 passed" in result.stdout
        assert "skipped" not in result.stdout
        assert order[:4] == [""] * 4
        numbers = [*map(int, order[4:])]
        assert numbers == [(numbers[0] + i) % 8 for i in range(8)]
        begun.add(numbers[0])
    assert len(begun) > 1


def test_each_process_runs_its_quick_tests_before_its_slow_ones(run):
    result, _ = run(MIXED.replace("SECONDS", "0.2"), "--slow-minutes", "10", "-n", "2", "--dist", "worksteal", "-vv")
    ran = re.findall(r"\[(gw\d)\].*PASSED tests/test_it.py::test_(quick|slow)", result.stdout)
    assert len(ran) == 12
    for process in ("gw0", "gw1"):
        kinds = [kind for each, kind in ran if each == process]
        assert kinds == sorted(kinds)
        assert "slow" in kinds
    assert {kind for _, kind in ran[:2]} == {"quick"}
