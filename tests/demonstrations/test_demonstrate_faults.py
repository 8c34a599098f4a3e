"""The dozen faults of chapter 13: each check passes on the program and fails on the program with the fault."""

import json
import math
import platform
from pathlib import Path

import pytest
from backends import use

from nanochat_native.demonstrations import faults

RESULTS = Path(__file__).parents[2] / "docs/results/faults.json"


@pytest.fixture(autouse=True)
def _restored_backend():
    with use("native"):
        yield


@pytest.mark.parametrize("name", faults.FAULTS)
def test_the_check_of_a_fault_passes_without_it_and_fails_with_it(name):
    found = faults.check_fault(name)
    assert found["healthy_passes"], found
    assert not found["faulty_passes"], found


@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_run_with_a_fault_ends(name, monkeypatch):
    monkeypatch.setattr(faults, "STEPS", 2)
    assert len(faults.run_fault(name)["losses"]) == 2


@pytest.mark.parametrize("name", ["targets", "nan"])
def test_a_patch_ends_with_its_context(name):
    fault = faults.FAULTS[name]
    before = fault.measure()
    with fault.inject():
        assert fault.measure() != before
    assert fault.measure() == before


def test_a_step_with_a_nan_gradient_is_skipped_and_counted(monkeypatch):
    monkeypatch.setattr(faults, "STEPS", 4)
    monkeypatch.setattr(faults, "INTRUSION", 2)
    guarded = faults.train(faults.FAULTS["nan"].around)
    assert guarded["skipped"] == 1
    assert all(loss is not None for loss in guarded["losses"])
    unguarded = faults.run_fault("nan")
    assert unguarded["skipped"] == 0
    assert [loss is None for loss in unguarded["losses"]] == [False, False, False, True]


def test_the_loss_with_unshifted_targets_falls_at_once_and_validation_rises(monkeypatch):
    monkeypatch.setattr(faults, "STEPS", 12)
    run = faults.run_fault("targets")
    assert run["losses"][-1] < 1.5
    assert run["validation"] > math.log(faults.VOCABULARY)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask", "accumulation", "decay"])
def test_a_run_with_a_fault_gives_the_committed_curve(name):
    kept = json.loads(RESULTS.read_text())
    if kept["machine"]["python"] != platform.python_version():
        pytest.skip("the text is the standard library of another Python")
    assert faults.run_fault(name)["final"] == pytest.approx(kept["faults"][name]["final"], rel=0.01)


def test_the_committed_result_says_which_faults_the_curve_shows():
    kept = json.loads(RESULTS.read_text())
    assert kept["number"] == kept["found_by_check"] == len(faults.FAULTS) == len(kept["faults"])
    for found in kept["faults"].values():
        differs = math.inf if found["final"] is None else abs(found["final"] - found["healthy_final"])
        assert (found["seen_in_the_curve"] == "yes") == (differs > faults.SEEN * kept["healthy"]["spread"])
