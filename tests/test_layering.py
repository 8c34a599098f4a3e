"""Who may know whom: includes of the native code, imports of the package, symbols of the instruction sets' copies."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanochat_native"
SETS = ["baseline", "avx2", "avx512"]


# --- csrc/ and python/ ---


def includes(path):
    return re.findall(r'^\s*#\s*include\s+([<"][^>"]+)[>"]', path.read_text(), re.MULTILINE)


def native_files(folder, *endings):
    return [path for ending in endings for path in sorted((ROOT / folder).rglob(f"*{ending}"))]


KERNEL_FILES = native_files("csrc", ".cpp", ".cu", ".h", ".cuh")
BINDING_FILES = native_files("python", ".cpp", ".h")


def test_there_is_native_code():
    assert ROOT / "csrc/kernels.h" in KERNEL_FILES
    assert ROOT / "python/schema.cpp" in BINDING_FILES


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_include_nothing_of_torch_or_python(path):
    for include in includes(path):
        if include[0] == "<":
            assert not re.match(r"<(torch|ATen|c10|pybind11|Python\.h|numpy)", include)
        else:
            target = (path.parent / include[1:]).resolve()
            home = ROOT / ("csrc/cuda/device" if path.parent.name == "device" else "csrc")
            assert target.is_file(), include
            assert target.is_relative_to(home), include


@pytest.mark.parametrize("path", BINDING_FILES, ids=lambda path: path.name)
def test_bindings_include_the_kernels_header_and_no_kernel(path):
    for include in includes(path):
        assert include != "<torch/extension.h", "three times the compile time of torch/library.h"
        if include[0] == '"':
            target = (path.parent / include[1:]).resolve()
            assert target == ROOT / "csrc/kernels.h" or target.parent == ROOT / "python", include


def test_inline_ptx_lives_in_the_primitives_only():
    for path in native_files("csrc/cuda", ".cu", ".cuh", ".h") + native_files("tests/emulation", ".cu", ".cuh"):
        assert bool(re.search(r"\basm\b", path.read_text())) == (path.name == "primitives.cuh"), path


def test_kernels_know_nothing_of_the_emulation_and_it_is_in_no_binary():
    assert "emulation" not in (ROOT / "CMakeLists.txt").read_text()
    for path in KERNEL_FILES:
        if path.parent.name != "emulation":
            assert not [include for include in includes(path) if "emulation" in include], path


def test_the_emulation_includes_nothing_of_the_kernels_but_layouts():
    for path in native_files("csrc/emulation", ".h", ".cpp"):
        outside = {include[1:] for include in includes(path) if include.startswith('"../')}
        assert outside <= {"../kernels.h", "../cuda/device/layouts.h"}, path


def test_every_operator_is_declared_once_and_has_a_cpu_kernel():
    schema = re.findall(r'"(\w+)\(', (ROOT / "python/schema.cpp").read_text())
    cpu = re.findall(r'm\.impl\("(\w+)"', (ROOT / "python/ops_cpu.cpp").read_text())
    cuda = re.findall(r'm\.impl\("(\w+)"', (ROOT / "python/ops_cuda.cpp").read_text())
    assert len(schema) == len(set(schema))
    assert sorted(cpu) == sorted(schema)
    assert set(cuda) <= set(schema)


def objects(isa):
    found = [
        path for folder in (ROOT / "build").glob("native-*") for path in folder.glob(f"CMakeFiles/cpu_{isa}.dir/**/*.o")
    ]
    if not found:
        pytest.skip("the package was not built in this folder")
    return list(map(str, found))


def binutils(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("isa", SETS)
def test_copies_of_the_kernels_share_no_symbol_that_the_linker_merges(isa):
    """A weak symbol of the AVX-512 copy (an inline function of std, say) could replace the baseline's."""
    symbols = binutils("nm", "--defined-only", *objects(isa)).splitlines()
    entries = [line.split()[-2:] for line in symbols if len(line.split()) == 3]
    assert entries
    for kind, name in entries:
        if kind in "WVuBDRT":
            assert isa in name, f"{name} ({kind}) is not inside namespace nanochat::{isa}"


@pytest.mark.parametrize(("isa", "registers"), [("baseline", "%[yz]mm"), ("avx2", "%zmm")])
def test_copies_of_the_kernels_use_their_instruction_set_only(isa, registers):
    code = binutils("objdump", "-d", "--no-show-raw-insn", *objects(isa))
    assert "mulps" in code
    assert not re.search(registers, code)


# --- the package ---


def room(module):
    """nanochat_native.optim.muon -> optim."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path):
    """Names of the package's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            top = node.module == "nanochat_native"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if top else {node.module}
    return {name for name in found if name.split(".")[0] == "nanochat_native"}


FILES = sorted(PACKAGE.rglob("*.py"))


def rooms_known():
    known = {}
    for path in FILES:
        here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        known.setdefault(here, set()).update(map(room, imports(path)))
    return {here: rooms - {here, ""} for here, rooms in known.items()}


# The rooms that a room may know. One that is not named here may know any but train, and not all of them.
ALLOWED = {
    "ops": set(),
    "model": {"ops"},
    "optim": {"ops"},
    "schedules": {"config", "lab", "loading", "metrics"},  # its command
    "tokenizer": set(),
    "data": {"tokenizer"},
    "checkpoint": set(),
}
WITHOUT_TRAINING = {"core", "evaluate", "export", "generate"}


def test_each_room_knows_only_what_it_may():
    known = rooms_known()
    assert set(ALLOWED) <= set(known)
    for name, allowed in ALLOWED.items():
        assert known[name] <= allowed, f"{name} imports {known[name] - allowed}"
    for name in WITHOUT_TRAINING & set(known):
        assert not known[name] & {"optim", "trainer"}, name


def test_nothing_imports_train():
    for name, rooms in rooms_known().items():
        assert "train" not in rooms, name


def test_only_the_trainer_knows_all_rooms():
    everything = {"model", "optim", "data", "checkpoint"}
    assert {name for name, rooms in rooms_known().items() if everything <= rooms} <= {"trainer"}


def test_only_ops_touches_the_native_module():
    for path in FILES:
        if PACKAGE / "ops" not in path.parents:
            assert not re.search(r"(?<!torch\.)\b_C\b|torch\.ops\.nanochat_native", path.read_text()), path.name


def test_importing_any_module_prints_nothing_and_writes_nothing(tmp_path):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path.name not in ("__main__.py", "lm_eval_adapter.py")  # which needs what it adapts to
    ]
    script = f"""
import importlib, torch
for name in {modules}:
    importlib.import_module(name)
assert not torch.cuda.is_initialized()
"""
    result = subprocess.run([sys.executable, "-B", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
