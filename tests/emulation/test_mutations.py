"""Each defect of mutations.py is found, and by the build that is named; without a defect every case passes."""

import shutil

import pytest
from harness import ROOT, KernelError, Program, PtxLibrary, build, build_for_ptx
from mutations import MUTATIONS, PTX_TEXT

# One defect of each case is looked for in every run of the tests, all others in `make test-all`.
QUICK = [*{m.case: m for m in sorted(MUTATIONS, key=lambda m: m.found_by == "plain")}.values(), PTX_TEXT[0]]
SEEDS = {"plain": range(12), "thread": range(2), "address": range(2), "ptx": range(2)}


def copy_sources(folder):
    """A copy of all that kernels include."""
    for part in ("csrc", "tests/emulation"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


def load(path, found_by, core, folder):
    if found_by == "ptx":
        return PtxLibrary(path, core)
    return Program(path, folder)  # a defect may write anywhere, so never in this process


def first_message(case, kernels, found_by):
    """Return the first message of what is wrong, over several seeds; it is empty where nothing is."""
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
    source = folder / mutation.library
    is_ptx = mutation.found_by == "ptx"
    if is_ptx:
        path = build_for_ptx(source, core, "90a")
    else:
        path = build(source, core, mutation.found_by, ["-O0"], as_program=True)
    return first_message(mutation.case, load(path, mutation.found_by, core, folder), mutation.found_by)


def parametrised(mutations):
    return pytest.mark.parametrize(
        "mutation",
        [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in mutations],
        ids=lambda m: f"{m.case.__name__}: {m.name}",
    )


@parametrised(MUTATIONS)
def test_defect_is_found(mutation, core, tmp_path, record_property):
    check(mutation, core, tmp_path, record_property)


@parametrised(PTX_TEXT)
def test_defect_of_the_ptx_text_is_found(mutation, executor, tmp_path, record_property):
    check(mutation, executor, tmp_path, record_property)


def check(mutation, core, tmp_path, record_property):
    message = run(mutation, tmp_path, core)
    assert message
    record_property("found", f"{mutation.found_by}: {message.splitlines()[0]}")


def cases(mutations):
    return pytest.mark.parametrize("case", dict.fromkeys(m.case for m in mutations), ids=lambda case: case.__name__)


@pytest.mark.slow
@pytest.mark.parametrize("found_by", ["plain", "thread", "address"])
@cases(MUTATIONS)
def test_nothing_is_found_where_nothing_is_wrong(case, found_by, core, tmp_path):
    library = next(m.library for m in MUTATIONS if m.case is case)
    path = build(ROOT / library, core, found_by, ["-O0"], as_program=True)
    assert first_message(case, load(path, found_by, core, tmp_path), found_by) == ""


@pytest.mark.slow
@cases(PTX_TEXT)
def test_nothing_is_found_where_the_ptx_text_is_not_wrong(case, executor):
    library = next(m.library for m in PTX_TEXT if m.case is case)
    kernels = PtxLibrary(build_for_ptx(ROOT / library, executor, "90a"), executor)
    assert first_message(case, kernels, "ptx") == ""


def test_there_are_enough_defects():
    assert len(MUTATIONS) >= 40
    assert len(PTX_TEXT) >= 20
    for mutations in (MUTATIONS, PTX_TEXT):
        assert len({(m.case, m.name) for m in mutations}) == len(mutations)
