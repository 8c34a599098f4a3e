"""The commands and examples of README.md and HACKING.md do what they say."""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import BACKEND

from nanochat_native import generate, schedules, serve
from nanochat_native.bench import load
from nanochat_native.evaluation import session
from nanochat_native.inference import chat_session
from nanochat_native.interop import importing, transformers_export
from nanochat_native.lab import comparison, memory, noise_scale, range_test
from nanochat_native.runs.config import FinetuneConfig, parse
from nanochat_native.runtime.flags import flag

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "HACKING.md")}


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENTS[name], re.DOTALL)


def commands(name):
    lines = "".join(blocks(name, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


TRAIN = [c[3:] for c in commands("README.md") if c[:3] == ["python", "-m", "nanochat_native.train"]]
TRAIN_ON_RANKS = [c[c.index("--") + 1 :] for c in commands("README.md") if c[:1] == ["torchrun"] and "--" in c]
FINETUNE = [c[3:] for c in commands("README.md") if c[:3] == ["python", "-m", "nanochat_native.finetune"]]
PYTHON = [block for block in blocks("README.md", "python") if "OpenAI" not in block]  # see test_serve.py


def test_the_documents_have_commands_and_examples():
    assert len(TRAIN) >= 4
    assert TRAIN_ON_RANKS
    assert FINETUNE
    assert len(PYTHON) >= 2


@pytest.mark.parametrize("args", [*TRAIN, *TRAIN_ON_RANKS], ids=" ".join)
def test_training_commands_are_taken(args):
    parse(args)


@pytest.mark.parametrize("args", FINETUNE, ids=" ".join)
def test_fine_tuning_commands_are_taken(args):
    parse(args, kind=FinetuneConfig)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_module_flag_and_file_that_is_named_exists(name):
    text = DOCUMENTS[name]
    modules = set(re.findall(r"python -m (nanochat_native[.\w]*)", text))
    assert modules
    assert all(importlib.util.find_spec(module) for module in modules)
    own = {flag(field.name) for field in dataclasses.fields(FinetuneConfig)}
    for module in (
        chat_session,
        comparison,
        generate,
        importing,
        load,
        memory,
        noise_scale,
        range_test,
        schedules,
        serve,
        session,
        transformers_export,
    ):
        own |= {flag(field.name) for field in dataclasses.fields(module.Options)}
    other = {"--help", "--no-build-isolation", "--only", "--quick", "--model", "--tasks"}
    other |= {"--standalone", "--nnodes", "--rdzv", "--ntasks-per-node"}  # torchrun's and Slurm's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= own | other
    paths = re.findall(r"`((?:csrc|python|nanochat_native|tests)/[\w/]+\.\w+|[A-Z]\w+\.(?:md|txt))`", text)
    assert all((ROOT / path).is_file() for path in paths)


# Flags that messages of the package name, against the parsers of its commands.

PACKAGE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in sorted((ROOT / "nanochat_native").rglob("*.py"))
}
NAMED_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*\w")
# Commands that take no flag of this program.
WITHOUT_FLAGS = {f"nanochat_native.{name}" for name in ("doctor", "bench.step", "bench.ranks", "lm_eval_adapter")}
# Flags of another program that a module names: of a command of this package, which has them, or of a foreign one.
OF_ANOTHER = {
    "nanochat_native.training.report": {"nanochat_native.generate": {"--prompt"}},
    "nanochat_native.bench.load": {
        "nanochat_native.serve": {"--checkpoint", "--port", "--slots", "--max-waiting", "--model-name"}
    },
    "nanochat_native.bench.gpu": {
        "nanochat_native.bench.gpu_run": {"--json", "--device", "--only", "--seconds", "--quick"},
        "pytest": {"--continue-on-collection-errors", "--durations", "--junitxml"},
        "setup.py": {"--inplace"},
    },
    "nanochat_native.bench.ranks": {"torchrun": {"--standalone", "--nproc_per_node"}},
    "nanochat_native.bench.record": {
        "git": {"--abbrev", "--always", "--dirty"},
        "nvidia-smi": {"--format", "--query-gpu"},
    },
    "nanochat_native.runtime.distributed": {"torchrun": {"--nproc_per_node"}},
    "nanochat_native.ops.backends": {"pip": {"--no-build-isolation"}},
    "nanochat_native.lm_eval_adapter": {"lm_eval": {"--model", "--model_args", "--tasks"}},
}
# A message of such a module comes up in every command that has the flag.
RAISED_WHERE = {"nanochat_native.data": "--data", "nanochat_native.evaluation.core_score": "--core"}


@functools.cache
def imports(module):
    """The modules of the package that the code of a module imports."""
    tree = PACKAGE[module]
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_types = {inner for guard in guards for inner in ast.walk(guard)}
    found = set()
    for node in set(ast.walk(tree)) - for_types:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(PACKAGE)


@functools.cache
def reached(module):
    """A module, what it imports, and what those import."""
    found, left = set(), {module}
    while left:
        found |= left
        left = set().union(*map(imports, left)) - found
    return found


@functools.cache
def flags_of(command):
    """What a command's parser takes, as its --help lists it; those of experiments are followed by train's."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("COLUMNS", "1000")
        patch.setattr(sys, "argv", [command, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(command).main()
    lines = [re.match(r"[│|\s]*((?:--?[a-zA-Z][\w-]*(?:, +)?)+)", line) for line in out.getvalue().splitlines()]
    found = {name for line in lines if line for name in NAMED_FLAG.findall(line.group(1))}
    if "nanochat_native.lab.command_flags" in reached(command):
        found |= flags_of("nanochat_native.train")
    assert "--help" in found
    return found


def strings(tree):
    """The texts in a module's code; a part that is computed is {}. Without what is only compared with arguments."""
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        left += [
            child
            for child in ast.iter_child_nodes(node)
            if not isinstance(node, ast.JoinedStr) or isinstance(child, ast.FormattedValue)
        ]


COMMANDS = [name for name, tree in PACKAGE.items() if "__name__ == '__main__'" in ast.unparse(tree)]
PARSERS = [name for name in COMMANDS if name not in WITHOUT_FLAGS]


def unknown_flags(module, texts):
    """Flags in the texts of a module that are not taken where they would be given.

    After a command's name ("python -m nanochat_native.chat --checkpoint", "train's --total-batch-size") a flag is that
    command's. Any other is one of a command that imports the module; in RAISED_WHERE, one of all that have the flag
    which leads there.
    """
    reaching = [command for command in PARSERS if module in reached(command)]
    known = set().union(*map(flags_of, reaching)) if reaching else set()
    for room, leading in RAISED_WHERE.items():
        if module == room or module.startswith(f"{room}."):
            known = set.intersection(*(flags_of(c) for c in reaching if leading in flags_of(c)))
    known = known.union(*OF_ANOTHER.get(module, {}).values())
    short = {name.removesuffix(".__main__").rpartition(".")[2]: name for name in PARSERS}
    unknown = []
    for text in texts:
        for found in NAMED_FLAG.finditer(text):
            line = text[: found.start()].rpartition("\n")[2]
            named = re.findall(r"python -m nanochat_native\.([\w.]+)", line) + re.findall(r"\b(\w+)'s $", line)
            command = short.get(named[-1].rpartition(".")[2]) if named else None
            if found.group() not in (known if command is None else flags_of(command)):
                unknown.append(found.group())
    return unknown


def test_commands_have_parsers():
    assert {
        f"nanochat_native.{name}" for name in ("train", "finetune", "evaluate", "compare", "serve.__main__")
    } <= set(PARSERS)
    assert set(COMMANDS) >= WITHOUT_FLAGS
    with_data = [name for name in PARSERS if "--data" in flags_of(name)]
    assert len(with_data) >= 7
    assert all("--text-column" in flags_of(name) for name in with_data)


@pytest.mark.parametrize("module", PACKAGE)
def test_every_flag_that_a_message_names_is_taken(module):
    texts = list(strings(PACKAGE[module]))
    assert unknown_flags(module, texts) == []
    for program, flags in OF_ANOTHER.get(module, {}).items():
        assert flags <= set(NAMED_FLAG.findall("\n".join(texts))), "an exception that nothing needs"
        assert program not in PACKAGE or flags <= flags_of(program)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("data.documents", "name it with --text-columns"),
        ("data.documents", "take another --vocab-size"),
        ("evaluate", "give --held-out"),
        ("report", "python -m nanochat_native.chat --data {}"),
        ("chat", "train's --slots"),
        ("ops.backends", "take --dtype"),
    ],
)
def test_a_flag_that_is_not_taken_is_noticed(module, text):
    if module != "ops.backends":
        assert unknown_flags(f"nanochat_native.{module}", [text]) == [NAMED_FLAG.findall(text)[0]]
    tree = ast.parse(f'raise ValueError(f"{{1}}: " f"{text.replace("{}", "{2}")}")')
    assert [NAMED_FLAG.findall(t) for t in strings(tree)] == [NAMED_FLAG.findall(text)]


def test_every_target_of_make_that_is_named_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for text in DOCUMENTS.values() for t in re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)}
    assert {"train", "test", "bench", "lint", "gpu"} <= named <= targets


def test_hacking_names_every_module():
    modules = {p.name for p in (ROOT / "nanochat_native").glob("*.py")} - {"__init__.py"}
    assert {m for m in modules if m not in DOCUMENTS["HACKING.md"]} == set()


def run(command, **kwargs):
    environment = os.environ | {"NANOCHAT_NATIVE_BACKEND": BACKEND, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_examples_run(number, tmp_path):
    printed = run([sys.executable, "-c", PYTHON[number]], cwd=tmp_path)
    assert float(printed) < (1e-4 if "twin" in PYTHON[number] else 6.3)


@pytest.mark.slow
def test_the_training_commands_run_one_after_the_other(tmp_path):
    """As the README has them, with a few steps of a small model."""
    (tmp_path / "my_texts").mkdir()
    for number in range(40):
        words = " ".join(f"Once there was a kernel {number * i % 7} and it was fast." for i in range(60))
        (tmp_path / "my_texts" / f"{number}.txt").write_text(words)
    small = ["--device", "cpu", "--cache-dir", "cache", "--eval-tokens", "512", "--total-batch-size", "512"]
    python = [sys.executable, "-m"]
    for args in TRAIN:
        if "--resume" in args:
            out = run([*python, "nanochat_native.train", *args, "--num-iterations", "5"], cwd=tmp_path)
            assert "resume   runs/mine from step 3" in out
        else:
            steps = [a if a != "500" else "3" for a in args]
            steps += [] if "--num-iterations" in args else ["--num-iterations", "2"]
            assert "done     step" in run([*python, "nanochat_native.train", *steps, *small], cwd=tmp_path)
    drawn = [c[2:] for c in commands("README.md") if c[2:3] == ["nanochat_native.plot"]]
    assert [run([*python, *command], cwd=tmp_path).split() for command in drawn] == [
        ["runs/looked/loss.png", "runs/looked/diagnosis.png"]
    ]
    tools = [
        c for c in commands("README.md") if c[2:3] and c[2] in ("nanochat_native.generate", "nanochat_native.evaluate")
    ]
    assert len(tools) == 2
    for _, _, *tool in tools:
        assert run([*python, *tool], cwd=tmp_path).strip()


@pytest.mark.slow
def test_training_without_any_flag_learns_python(tmp_path):
    """The first run, cut short: the untrained level is left at once."""
    out = run(
        [sys.executable, "-m", "nanochat_native.train", "--num-iterations", "20", "--device", "cpu"], cwd=tmp_path
    )
    levels = [float(bpb) for bpb in re.findall(r"validation ([\d.]+) bits per byte on", out)]
    assert levels[0] > 3
    assert levels[-1] < 2.6
    assert "sample   python -m nanochat_native.generate --checkpoint runs/d4" in out
