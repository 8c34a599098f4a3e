"""Layers: includes of the native code, imports of the package, symbols of the copies for each instruction set."""

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import import_graph
import pytest
from backends import INSTRUCTION_SETS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanochat_native"


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
            home = ROOT / ("csrc/cuda/ptx" if path.parent.name == "ptx" else "csrc")
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


def test_the_emulation_includes_nothing_of_the_kernels_but_layouts_and_launch_options():
    for path in native_files("csrc/emulation", ".h", ".cpp"):
        outside = {include[1:] for include in includes(path) if include.startswith('"../')}
        assert outside <= {"../kernels.h", "../cuda/ptx/layouts.h", "../cuda/ptx/launch.h"}, path


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


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_copies_of_the_kernels_share_no_symbol_that_the_linker_merges(isa):
    """A weak symbol of the AVX-512 copy (an inline function of std, say) could replace the baseline's."""
    symbols = binutils("nm", "--defined-only", *objects(isa)).splitlines()
    entries = [line.split()[-2:] for line in symbols if len(line.split()) == 3]
    assert entries
    for kind, name in entries:
        if kind in "WVuBDRT":
            assert f"{len(isa)}{isa}" in name, f"{name} ({kind}) is not inside namespace nanochat::{isa}"


@pytest.mark.parametrize(("isa", "registers"), [("baseline", "%[yz]mm"), ("avx2", "%zmm")])
def test_copies_of_the_kernels_use_their_instruction_set_only(isa, registers):
    if isa not in INSTRUCTION_SETS:
        pytest.skip("the sets of aarch64 have the same registers")
    code = binutils("objdump", "-d", "--no-show-raw-insn", *objects(isa))
    assert "mulps" in code
    assert not re.search(registers, code)


# --- the package ---

# Each package of nanochat_native with the packages that it may depend on, directly or through others. The modules at
# the top of nanochat_native are the commands: they may depend on every package, and nothing depends on them.
MAY_DEPEND_ON = {
    "ops": "",
    "runtime": "ops",
    "model": "ops",
    "optim": "ops",
    "data": "ops runtime",
    "runs": "ops runtime model data",
    "inference": "ops runtime model data",
    "evaluation": "ops runtime model data runs inference",
    "training": "ops runtime model optim data runs inference evaluation",
    "interop": "ops runtime model data runs inference",
    "lab": "ops runtime model optim data runs inference evaluation training",
    "pipeline": "ops runtime model optim data runs inference evaluation training",
    "bench": "ops runtime model optim data inference interop runs",
    "demonstrations": "ops runtime model optim data runs inference evaluation training interop lab bench",
    "exercises": "ops runtime model optim data runs inference evaluation training interop lab bench demonstrations",
}
ALLOWED = {name: set(others.split()) for name, others in MAY_DEPEND_ON.items()}
GRAPH = import_graph.modules()
COMMANDS = {module for module in GRAPH if import_graph.package_of(module) == import_graph.COMMANDS}


def test_the_table_of_dependencies_has_an_order_and_is_complete():
    assert set(ALLOWED) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert import_graph.circles(ALLOWED) == []
    for name, others in ALLOWED.items():
        assert import_graph.reachable(ALLOWED, name) == others, f"{name}: the table leaves out what its packages need"


@pytest.mark.parametrize("name", MAY_DEPEND_ON)
def test_packages_say_what_they_may_depend_on(name):
    docstring = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
    *others, last = [f"`{other}`" for other in MAY_DEPEND_ON[name].split()] or ["no other package of nanochat_native"]
    listed = f"{', '.join(others)} and {last}" if others else last
    assert re.search(f"It may depend on {re.escape(listed)}[.,]", " ".join(docstring.split())), listed


def test_no_module_depends_on_itself():
    assert import_graph.circles(GRAPH) == []
    assert import_graph.circles(import_graph.packages(GRAPH)) == []


def test_modules_import_only_what_their_package_may_depend_on():
    """Imports in functions and for type checkers count too, and so do imports of imports."""
    for module in GRAPH.keys() - COMMANDS - {"nanochat_native"}:
        package = import_graph.package_of(module)
        found = {import_graph.package_of(other) for other in import_graph.reachable(GRAPH, module)} - {package}
        assert found <= ALLOWED[package], f"{module} depends on {sorted(found - ALLOWED[package])}"


def test_the_top_of_the_package_holds_commands_alone():
    for module in COMMANDS - {"nanochat_native"}:
        text = import_graph.MODULES[module].read_text()
        assert '\nif __name__ == "__main__":\n' in text, module
        assert len(text.splitlines()) <= 200, f"{module} is long for a command"


def test_the_documents_show_the_dependencies():
    rows = [
        f"| `{name}` | {', '.join(f'`{other}`' for other in others.split()) or 'nothing'} |"
        for name, others in MAY_DEPEND_ON.items()
    ]
    table = "\n".join(["| package | may depend on |", "|---|---|", *rows, ""])
    assert table in (ROOT / "HACKING.md").read_text(), f"HACKING.md should hold:\n{table}"
    picture = import_graph.svg(import_graph.packages(GRAPH))
    assert picture == (ROOT / "docs/import-graph.svg").read_text(), (
        "run python tests/import_graph.py docs/import-graph.svg"
    )


@pytest.mark.parametrize(
    ("graph", "found"),
    [({"a": {"b"}, "b": {"c"}, "c": set()}, []), ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c"])],
)
def test_circles_are_found(graph, found):
    assert import_graph.circles(graph) == found


def test_imports_are_found_wherever_they_are():
    lines = """
        from nanochat_native import ops
        import nanochat_native.runtime.openmp
        def lazily():
            from nanochat_native.model.gpt import GPT
        if TYPE_CHECKING:
            from nanochat_native.optim import Muon
    """
    found = import_graph.imports(ast.parse(textwrap.dedent(lines)))
    names = ("ops", "runtime.openmp", "model.gpt", "optim")
    assert found == {f"nanochat_native.{name}" for name in names}


def test_only_ops_touches_the_native_module():
    for path in import_graph.MODULES.values():
        if PACKAGE / "ops" not in path.parents:
            assert not re.search(r"(?<!torch\.)\b_C\b|torch\.ops\.nanochat_native", path.read_text()), path.name


def test_importing_any_module_prints_nothing_and_writes_nothing(tmp_path):
    modules = [
        module
        for module, path in import_graph.MODULES.items()
        if path.name not in ("__main__.py", "lm_eval_adapter.py", "lm_eval_model.py")  # which needs what it adapts to
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
