"""Each defect of mutations.py is found, and by the build that is named; without a defect every case passes."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import ROOT, KernelError, Library, Program, build
from mutations import MUTATIONS

pytestmark = pytest.mark.slow

SEEDS = {"plain": range(12), "thread": range(2), "address": range(2)}


def copy_sources(folder):
    """A copy of all that kernels include."""
    for part in ("csrc", "tests/emulation"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


def first_message(case, path, found_by):
    """Of what is wrong, over several seeds; empty where nothing is."""
    kernels = Library(path) if found_by == "plain" else Program(path)
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
    path = build(folder / mutation.library, core, folder / "kernels", mutation.found_by, ["-O0"])
    return first_message(mutation.case, path, mutation.found_by)


@pytest.fixture(scope="session")
def results(request, core, tmp_path_factory):
    """A future for each mutation that this session tests: two are built and run at a time."""
    chosen = [item.callspec.params.get("mutation") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(2) as pool:
        yield {
            mutation: pool.submit(run, mutation, tmp_path_factory.mktemp("mutation"), core)
            for mutation in dict.fromkeys(chosen)
            if mutation
        }


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.case.__name__}: {m.name}")
def test_defect_is_found(mutation, results, record_property):
    message = results[mutation].result()
    assert message
    record_property("found", f"{mutation.found_by}: {message.splitlines()[0]}")


@pytest.mark.parametrize("found_by", SEEDS)
@pytest.mark.parametrize("case", dict.fromkeys(m.case for m in MUTATIONS), ids=lambda case: case.__name__)
def test_nothing_is_found_where_nothing_is_wrong(case, found_by, core, tmp_path_factory):
    library = next(m.library for m in MUTATIONS if m.case is case)
    path = tmp_path_factory.getbasetemp() / f"whole_{found_by}_{library.replace('/', '_')}"
    if not path.exists():
        build(ROOT / library, core, path, found_by)
    assert first_message(case, path, found_by) == ""


def test_there_are_enough_defects():
    assert len(MUTATIONS) >= 40
    assert len({(m.case, m.name) for m in MUTATIONS}) == len(MUTATIONS)
