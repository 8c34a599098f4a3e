import gc
import multiprocessing.util
import os
import shutil
import signal
import site
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

import nanochat_native.runtime.openmp  # noqa: F401  before torch, in all processes: waiting threads must not spin

# isort: split
import torch

from nanochat_native import ops
from nanochat_native.runtime.hardware import usable_cores

try:
    import hypothesis
except ImportError:  # on a bare GPU machine, whose tests do without
    pass
else:
    # The same examples on every run, without a limit of time: other work shares the machine.
    hypothesis.settings.register_profile(
        "default",
        derandomize=True,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        database=None,
        max_examples=40,
    )
    hypothesis.settings.load_profile("default")

ROOT = Path(__file__).resolve().parent.parent
HOMES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
BEFORE, LEFT = pytest.StashKey[set](), pytest.StashKey[list]()  # files that git does not hold
SLOW_END = pytest.StashKey[float]()  # the time after which no slow test starts
COMMIT = pytest.StashKey[int]()
NO_TIME = "slow, and the time of --slow-minutes was over"


def pytest_addoption(parser):
    parser.addoption(
        "--slow-minutes",
        type=float,
        metavar="N",
        help="run other tests before slow ones, in each process, and skip the slow ones that would start later than N "
        "minutes after the start. The commit decides at which slow test they begin, so in time all have their turn",
    )


def pytest_configure(config):
    if (minutes := config.getoption("--slow-minutes")) is not None:
        of_the_session = getattr(config, "workerinput", {})
        config.stash[SLOW_END] = of_the_session.get("slow_end") or time.time() + 60 * minutes
        config.stash[COMMIT] = of_the_session.get("commit") or int(_git("rev-parse", "--short=8", "HEAD") or "0", 16)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    for name, key in (("slow_end", SLOW_END), ("commit", COMMIT)):
        node.workerinput[name] = node.config.stash.get(key, None)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if SLOW_END not in config.stash:
        return
    quick, slow = [], []
    for item in items:
        (slow if item.get_closest_marker("slow") else quick).append(item)
    start = config.stash[COMMIT] % max(len(slow), 1)
    slow = [*slow[start:], *slow[:start]]
    # xdist's worksteal gives each process one part of the list, and takes from the ends of these parts.
    parts = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = [
        item
        for part in range(parts)
        for kind in (quick, slow)
        for item in kind[len(kind) * part // parts : len(kind) * (part + 1) // parts]
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.time() > item.config.stash.get(SLOW_END, float("inf")) and item.get_closest_marker("slow"):
        pytest.skip(NO_TIME)


def pytest_sessionstart(session):
    """Give the tests, and all processes that they start, a home and a temporary directory that are removed at the end.
    This is done before the tests are imported: some libraries ask at their import."""
    folder = Path(tempfile.mkdtemp(prefix="w" if _is_worker(session.config) else "nanochat-"))
    # Behind multiprocessing's own removal of its folder in there, which has priority -100.
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)
    os.environ["PYTHONUSERBASE"] = site.getuserbase()  # packages below the real home are still found
    for name in HOMES:
        os.environ.pop(name, None)
    places = {"HOME": folder / "h", "TMPDIR": folder / "t", "HYPOTHESIS_STORAGE_DIRECTORY": folder / "e"}
    for name, place in places.items():  # short: names of sockets have limits
        place.mkdir()
        os.environ[name] = str(place)
    tempfile.tempdir = None  # it is asked for again
    # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not _is_worker(session.config):
        session.config.stash[BEFORE] = _untracked()


def pytest_collection_finish():
    """Keep the garbage collector from looking at thousands of tests time and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Return the number of processes for `-n auto`: one for each core, as far as their memory goes."""
    return min(usable_cores(), 16)


@pytest.hookimpl(hookwrapper=True, trylast=True)
def pytest_sessionfinish(session):
    """Fail the session if tests have left something in the checkout."""
    yield
    if not _is_worker(session.config):
        left = session.config.stash[LEFT] = sorted(_untracked() - session.config.stash[BEFORE])
        session.exitstatus = session.exitstatus or int(bool(left))


def pytest_terminal_summary(terminalreporter, config):
    no_time = sum(NO_TIME in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
    if no_time:
        minutes = config.getoption("--slow-minutes")
        terminalreporter.write_line(
            f"{no_time} slow tests were skipped: {minutes:g} minutes (--slow-minutes) were over"
        )
    if left := config.stash[LEFT]:
        terminalreporter.write_line(f"ERROR: tests have left in the checkout: {', '.join(left)}", red=True)


def _is_worker(config):
    """Whether this is a process of pytest-xdist that runs a part of the tests."""
    return hasattr(config, "workerinput")


def _untracked():
    """Files of the checkout that git does not hold, ignored ones too, without what Python and linters keep."""
    names = _git("ls-files", "--others")
    if names is None:
        names = "\n".join(str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file())
    kept = {"__pycache__", ".venv", ".git", "build", ".pytest_cache", ".ruff_cache", ".mypy_cache"}
    return {name for name in names.splitlines() if kept.isdisjoint(name.split("/"))}


def _git(*arguments):
    """Return what git prints in the checkout, or None if there is no git, or no repository."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from the same seed and leaves backend, number of threads and hooks as they were."""
    backend, threads = ops.backend(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    ops.use_backend(backend)
    torch.set_num_threads(threads)
    # A compiled torch.func transform that raises leaves them disabled in torch 2.11.
    torch._C._autograd._saved_tensors_hooks_enable()
