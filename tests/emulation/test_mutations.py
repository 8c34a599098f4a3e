"""Each defect of mutations.py is found, and by the build that is named; without a defect every case passes."""

import shutil

import pytest
from harness import ROOT, KernelError, Library, Program, build
from mutations import MUTATIONS

# One defect of each case is looked for in every run of the tests, all others in `make test-all`.
QUICK = {m.case: m for m in sorted(MUTATIONS, key=lambda m: m.found_by == "plain")}.values()
SEEDS = {"plain": range(12), "thread": range(2), "address": range(2)}


def copy_sources(folder):
    """A copy of all that kernels include."""
    for part in ("csrc", "tests/emulation"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


def first_message(case, path, found_by, folder):
    """Return the first message of what is wrong, over several seeds; it is empty where nothing is."""
    kernels = Library(path) if found_by == "plain" else Program(path, folder)
    for seed in SEEDS[found_by]:
        try:
            case(kernels, seed)
        except (KernelError, AssertionError) as error:
            return str(error).strip() or "wrong result"
    return ""


def run(mutation, folder, core):
    copy_sources(folder)
    text = (folder / mutation.file).read_text()
    assert text.count(mutation.old) == 1, "the text to be changed must occur once"
    (folder / mutation.file).write_text(text.replace(mutation.old, mutation.new))
    # Most of the time goes into compiling, and a defect shows in the first runs.
    path = build(folder / mutation.library, core, mutation.found_by, ["-O0"])
    return first_message(mutation.case, path, mutation.found_by, folder)


@pytest.mark.parametrize(
    "mutation",
    [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MUTATIONS],
    ids=lambda m: f"{m.case.__name__}: {m.name}",
)
def test_defect_is_found(mutation, core, tmp_path, record_property):
    message = run(mutation, tmp_path, core)
    assert message
    record_property("found", f"{mutation.found_by}: {message.splitlines()[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("found_by", SEEDS)
@pytest.mark.parametrize("case", dict.fromkeys(m.case for m in MUTATIONS), ids=lambda case: case.__name__)
def test_nothing_is_found_where_nothing_is_wrong(case, found_by, core, tmp_path):
    library = next(m.library for m in MUTATIONS if m.case is case)
    path = build(ROOT / library, core, found_by)
    assert first_message(case, path, found_by, tmp_path) == ""


def test_there_are_enough_defects():
    assert len(MUTATIONS) >= 40
    assert len({(m.case, m.name) for m in MUTATIONS}) == len(MUTATIONS)
