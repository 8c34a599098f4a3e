"""The tests of `make gpu`, on files whose tests pass, fail, hang or crash: what is run and what is kept."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import HANGS

from nanochat_native.bench import gpu, gpu_tests

ROOT = Path(__file__).resolve().parents[2]

PASSES = "import pytest\n@pytest.mark.gpu\ndef test_passes(): pass\n\ndef test_without_the_mark(): assert False\n"
FAILS = """
import pytest
pytestmark = pytest.mark.gpu
def test_first(): pass
def test_wrong(): assert 1 == 2, "off by one"
@pytest.fixture
def broken(): raise OSError("no device")
def test_setup(broken): pass
def test_skipped(): pytest.skip("one GPU only")
"""
HANGING = """
import pytest, time
pytestmark = pytest.mark.gpu
@pytest.mark.slow
def test_slow(): pass
def test_before(): pass
def test_hangs(): time.sleep(3000)
def test_after(): pass
"""
CRASHES = """
import os, pytest, signal
pytestmark = pytest.mark.gpu
def test_before(): pass
def test_crashes(): os.kill(os.getpid(), signal.SIGSEGV)
@pytest.mark.parametrize("n", [1, 2])
def test_after(n): assert n == 1, "wrong"
"""
FLAKY = """
import pathlib, pytest
pytestmark = pytest.mark.gpu
def test_flaky():
    note = pathlib.Path(__file__).with_suffix(".note")
    was_there, _ = note.exists(), note.write_text("")
    assert was_there, "first time"
def test_steady(): pathlib.Path(__file__).with_suffix(".count").open("a").write("x")
"""


def impatient(command, limit):
    """Run a command as `make gpu` does; its time is up when the test that hangs has begun."""
    log = Path(next(word for word in command if word.startswith("gpu_test_log=")).removeprefix("gpu_test_log="))
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    end = time.monotonic() + HANGS
    while process.poll() is None and time.monotonic() < end:
        begun = log.read_text().splitlines() if log.exists() else []
        if begun and "start" in begun[-1] and "test_hangs" in begun[-1]:
            break
        time.sleep(0.02)
    status = process.poll()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return status


def run(folder, run=impatient, seconds=10 * HANGS, saved=None, **files):
    """Run the files with these names and texts. Returns the tests, and every result that was saved."""
    paths, saved = [], [] if saved is None else saved
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n    slow\n")
    for name, text in files.items():
        paths.append(str(folder / f"test_{name}.py"))
        Path(paths[-1]).write_text(text)
    tests = gpu_tests.Tests(
        paths, run=run, marks="gpu", seconds=seconds, file_seconds=HANGS, log=folder / "log", save=saved.append
    )
    tests.run()
    return tests, saved


def outcomes(file):
    return {test.partition("::")[2]: outcome for test, (outcome, _) in file.tests.items()}


def test_a_hang_or_a_crash_costs_one_test_and_the_other_files_run(tmp_path, capfd):
    tests, saved = run(tmp_path, hanging=HANGING, crashes=CRASHES, passes=PASSES)
    hanging, crashes, passes = tests.files
    assert outcomes(hanging) == {
        "test_before": "passed",
        "test_hangs": "failed",
        "test_after": "passed",
        "test_slow": "passed",
    }
    assert outcomes(crashes) == {
        "test_before": "passed",
        "test_crashes": "failed",
        "test_after[1]": "passed",
        "test_after[2]": "failed",
    }
    assert outcomes(passes) == {"test_passes": "passed"}
    assert [file.runs for file in tests.files] == [2, 2, 1]
    assert not tests.succeeded
    result = saved[-1]
    assert result["failures"] == [
        "test_hanging.py::test_hangs: its process was stopped within the test",
        "test_crashes.py::test_crashes: its process ended with status -11 within the test",
        "test_crashes.py::test_after[2]: AssertionError: wrong",
    ]
    assert (result["passed"], result["failed"], result["skipped"]) == (6, 3, 0)
    first = saved[0]
    assert first["failures"][:2] == [
        "test_hanging.py::test_hangs: its process was stopped within the test",
        f"{tmp_path}/test_hanging.py: 2 tests did not run",
    ]
    assert first["files"][0]["status"] is None
    assert "once more" in capfd.readouterr().out
    json.dumps(result)


def test_failures_and_skips_are_counted_with_their_reasons(tmp_path):
    tests, saved = run(tmp_path, fails=FAILS, passes=PASSES)
    assert tests.files[0].complete
    assert saved[-1]["failures"] == [
        "test_fails.py::test_wrong: AssertionError: off by one",
        "test_fails.py::test_setup: OSError: no device",
    ]
    assert saved[-1]["skip_reasons"] == {"one GPU only": 1}
    assert (saved[-1]["passed"], saved[-1]["failed"], saved[-1]["skipped"]) == (2, 2, 1)
    assert not tests.succeeded
    printed = gpu.summary(
        {"limits": {}, "rows": [], "skipped": [], "errors": [], "stages": [], "seconds": 1.0, "tests": saved[-1]},
        tmp_path,
    )
    assert "FAILED  test_fails.py::test_wrong: AssertionError: off by one" in printed
    assert any(line.startswith(f"tests   {tmp_path}/test_fails.py: status 1, 1 passed, 2 failed") for line in printed)


def test_a_test_that_passes_when_it_is_repeated_is_still_a_failure(tmp_path):
    tests, saved = run(tmp_path, flaky=FLAKY)
    assert saved[-1]["failures"] == [
        "test_flaky.py::test_flaky: AssertionError: first time (passed when it was repeated)"
    ]
    assert (tmp_path / "test_flaky.count").read_text() == "x", "a test that had passed ran again"
    assert not tests.succeeded


@pytest.mark.parametrize("text", ["import no_such_module\n", "import os\nos._exit(7)\n"])
def test_a_file_that_cannot_be_imported_fails(tmp_path, text):
    tests, saved = run(tmp_path, bad=text, passes=PASSES)
    assert [file.status for file in tests.files] == [7 if "exit" in text else 2, 0]
    (failure,) = saved[-1]["failures"]
    assert "no_such_module" in failure or "ended with status 7 before the first test" in failure
    assert saved[-1]["passed"] == 1


def test_all_files_that_end_well_are_run_once(tmp_path):
    tests, saved = run(tmp_path, passes=PASSES, empty="")
    assert tests.succeeded
    assert len(saved) == 2
    assert [file["status"] for file in saved[-1]["files"]] == [0, 5]


def test_files_for_which_no_time_is_left_are_failures(tmp_path):
    tests, _ = run(tmp_path, seconds=gpu_tests.LEAST_SECONDS - 1, passes=PASSES)
    assert not tests.succeeded
    assert tests.result()["failures"] == [f"{tmp_path}/test_passes.py: not run"]


def test_what_a_file_has_done_is_kept_when_the_run_is_ended(tmp_path):
    def ended(command, limit):
        impatient(command, limit)
        raise SystemExit(143)

    saved = []
    with pytest.raises(SystemExit):
        run(tmp_path, ended, saved=saved, hanging=HANGING)
    assert saved[-1]["passed"] == 1
    assert "test_hanging.py::test_hangs: its process was stopped within the test" in saved[-1]["failures"]


def test_a_line_that_was_cut_off_is_left_out():
    file = gpu_tests.FileResult("file", status=-9, runs=1)
    file.take(['{"collected": 2}', '{"start": "f::a"}', '{"test": "f::a", "outcome": "passed", "why": ""}', '{"sta'])
    assert file.tests == {"f::a": ("passed", "")}
    assert file.failures == ["file: 1 tests did not run"]


def test_every_file_of_tests_gpu_is_listed():
    assert all((ROOT / name).exists() for name in gpu_tests.FILES)
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert {name for name in gpu_tests.FILES if not name.startswith(gpu_tests.ALL_SLOW)} == files


@pytest.mark.slow
def test_every_file_of_the_emulation_that_runs_on_a_gpu_is_listed():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu"]
    for marks, expected in (("gpu", True), ("gpu and not slow", False)):
        found = subprocess.run(
            [*command[:-1], marks, "tests/emulation"], capture_output=True, text=True, cwd=ROOT, timeout=HANGS
        )
        files = {line.partition("::")[0] for line in found.stdout.splitlines() if "::" in line}
        assert files == {name for name in gpu_tests.FILES if expected and name.startswith(gpu_tests.ALL_SLOW)}
