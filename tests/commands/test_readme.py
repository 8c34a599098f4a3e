"""Checks of the documents: their commands, examples, links, and the figures that come from committed results."""

import ast
import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import python
from tiny_run import BACKEND

from nanochat_native.runs.config import FinetuneConfig, ReinforceConfig, parse
from nanochat_native.runtime import command as command_line

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", ROOT / "HACKING.md", ROOT / "benchmarks/README.md"]
FILES += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/guide").glob("*.md"))]
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENTS[name], re.DOTALL)


def commands(*names):
    """Return the command lines in the shell blocks of these documents, each once."""
    lines = "".join(block for name in names for block in blocks(name, "sh")).replace("\\\n", " ").splitlines()
    return list(map(list, dict.fromkeys(tuple(shlex.split(line, comments=True)) for line in lines if line.strip())))


def of_module(name, found):
    """Return the arguments of each command line that runs the module nanochat_native.<name>."""
    return [c[3:] for c in found if c[:3] == ["python", "-m", f"nanochat_native.{name}"]]


SHOWN = commands(*DOCUMENTS)
TRAIN = of_module("train", commands("README.md"))
TRAIN_ON_RANKS = [c[c.index("--") + 1 :] for c in SHOWN if c[:1] == ["torchrun"] and "--" in c]
FINETUNE = of_module("finetune", SHOWN)
REINFORCE = of_module("reinforce", SHOWN)
# Modules that pass their flags to command.run_command.
PLAIN = [
    (name, args)
    for name in ("chat", "export", "generate", "import_checkpoint", "memory", "plot", "serve")
    for args in of_module(name, SHOWN)
]
PYTHON = [block for block in blocks("README.md", "python") if "OpenAI" not in block]  # see test_serve.py


def test_the_documents_have_commands_and_examples():
    assert len(TRAIN) >= 4
    assert len(TRAIN_ON_RANKS) >= 2
    assert FINETUNE
    assert REINFORCE
    assert len({name for name, _ in PLAIN}) == 7
    assert len(PYTHON) >= 2


@pytest.mark.parametrize("args", [*of_module("train", SHOWN), *TRAIN_ON_RANKS], ids=" ".join)
def test_training_commands_are_taken(args):
    parse(args)


@pytest.mark.parametrize("args", FINETUNE, ids=" ".join)
def test_fine_tuning_commands_are_taken(args):
    parse(args, kind=FinetuneConfig)


@pytest.mark.parametrize("args", REINFORCE, ids=" ".join)
def test_commands_of_reinforce_are_taken(args):
    parse(args, kind=ReinforceConfig)


@pytest.mark.parametrize(
    ("name", "args"), PLAIN, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_other_commands_are_taken(name, args, monkeypatch):
    main = importlib.import_module(f"nanochat_native.{name}").main
    monkeypatch.setattr(command_line, "exit_code", lambda work: 0)  # parse the flags, do not run
    assert main(args) == 0
    assert main([*args, "--no-such-flag"]) == 2


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_documented_module_flag_and_file_exists(name):
    text = DOCUMENTS[name].replace("\\\n", " ")
    modules = set(re.findall(r"python -m (nanochat_native[\w.]*\w)", text))
    assert all(importlib.util.find_spec(module) for module in modules)
    for module, flags in re.findall(r"python -m (nanochat_native[\w.]*\w)([^`#\n]*)", text):
        if module not in WITHOUT_FLAGS:
            assert set(NAMED_FLAG.findall(flags)) <= flags_of(module if module in PARSERS else f"{module}.__main__")
    own = set().union(*map(flags_of, PARSERS))
    other = {"--no-build-isolation", "--model", "--model_args", "--tasks", "--version"}
    other |= {"--standalone", "--nnodes", "--nproc_per_node", "--ntasks-per-node"}  # torchrun's and Slurm's
    other |= {"--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--no-python"}
    other |= {"--hardware", "--cpunodebind", "--membind"}  # of numactl
    other |= {"--check", "--update"}  # of docs/tools/build.py
    other |= {"--torch", "--sdist-only", "--cuda"}  # of tools/wheels.py and tests/aarch64
    other |= {"--rm", "--install", "--param", "--slow-minutes"}  # of docker, xcode-select, g++, and tests/conftest.py
    assert set(NAMED_FLAG.findall(text)) <= own | other
    paths = re.findall(
        r"`((?:csrc|python|nanochat_native|tests|docs|benchmarks)/[\w/.-]*\w|[A-Z]\w+\.(?:md|txt))`", text
    )
    assert [path for path in paths if "NN" not in path and not (ROOT / path).exists()] == []


def anchors(text):
    """Return the anchors that GitHub gives to the headings of a document."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", outside, re.MULTILINE)
    found = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return found | set(re.findall(r'<a id="([^"]+)">', outside))


def broken_links(path, text):
    """Return the links of a document to files, or headings in files, that do not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
                broken.append(link)
    return broken


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_has_a_target(name):
    assert broken_links(ROOT / name, DOCUMENTS[name]) == []


def test_a_broken_link_is_found():
    text = "[a](README.md#train) [b](no.md) [c](README.md#no-such-heading) [d](#in-place)\n# In place\n[e](docs)"
    assert broken_links(ROOT / "README.md", text) == ["no.md", "README.md#no-such-heading", "#in-place"]


def test_every_document_is_linked():
    linked = {
        (ROOT / name).parent / link.partition("#")[0]
        for name, text in DOCUMENTS.items()
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
    }
    assert {str(path) for path in FILES} - {str(path.resolve()) for path in linked} == set()


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_the_ratios_are_those_of_the_committed_results(name):
    results = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("cpu-*.json")]
    measured = {f"{row['ratio']:.2f}x" for result in results for row in result["rows"]}
    shown = set(re.findall(r"\d+\.\d\dx", DOCUMENTS[name]))
    assert len(shown) >= 4
    assert shown <= measured


# Flags that messages of the package name, against the parsers of its commands.

PACKAGE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in sorted((ROOT / "nanochat_native").rglob("*.py"))
}
NAMED_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*\w")
# Commands that take no flag of this program.
WITHOUT_FLAGS = {f"nanochat_native.{name}" for name in ("doctor", "bench.step", "bench.ranks", "lm_eval_adapter")}
WITHOUT_FLAGS |= {"nanochat_native.lab.roofline.worker", "nanochat_native.evaluation.sandbox_worker"}
WITHOUT_FLAGS |= {"nanochat_native.pipeline.samples"}
# Flags of another program that a module names: of a command of this package, which has them, or of a foreign one.
OF_ANOTHER = {
    "nanochat_native.evaluation.core_score": {"nanochat_native.evaluate": {"--max-per-task"}},
    "nanochat_native.bench.torch_today": {"nanochat_native.train": {"--architecture", "--recipe"}},
    "nanochat_native.doctor": {"nanochat_native.train": {"--device", "--dtype", "--fp8"}},
    "nanochat_native.interop.nanochat_export": {"nanochat_native.train": {"--architecture"}},
    "nanochat_native.interop.transformers_export": {
        "nanochat_native.train": {"--architecture"},
        "nanochat": {"--model-tag", "--eval"},
    },
    "nanochat_native.demonstrations.faults": {"nanochat_native.train": {"--diagnose"}},
    "nanochat_native.pipeline.recipe": {
        "nanochat_native.train": {
            *("--depth", "--device", "--json", "--out-dir", "--overwrite", "--print-config", "--resume", "--run")
        },
        "nanochat_native.finetune": {"--checkpoint"},
        "nanochat_native.reinforce": {"--write-chats"},
        "nanochat_native.download": {"--offline", "--yes"},
        "torchrun": {"--nproc_per_node", "--standalone"},
    },
    "nanochat_native.pipeline.report": {"git": {"--porcelain", "--show-toplevel", "--untracked-files"}},
    "nanochat_native.exercises.chapter_06": {"nanochat_native.memory": {"--measure"}},
    "nanochat_native.demonstrations.rates": {"nanochat_native.train": {"--schedule"}},
    "nanochat_native.completion": {"nanochat_native.__main__": {"--version"}},
    "nanochat_native.training.report": {"nanochat_native.generate": {"--prompt"}},
    "nanochat_native.bench.load": {
        "nanochat_native.serve": {"--checkpoint", "--port", "--slots", "--max-waiting", "--model-name"}
    },
    "nanochat_native.bench.gpu": {
        "nanochat_native.bench.gpu_worker": {"--json", "--device", "--only", "--seconds", "--begin", "--quick"},
        "setup.py": {"--inplace"},
    },
    "nanochat_native.bench.ranks": {"torchrun": {"--standalone", "--nproc_per_node"}},
    "nanochat_native.bench.results_io": {
        "git": {"--abbrev", "--always", "--dirty"},
        "nvidia-smi": {"--format", "--query-gpu"},
    },
    "nanochat_native.runtime.distributed": {"torchrun": {"--nproc_per_node"}},
    "nanochat_native.ops.backends": {"pip": {"--no-build-isolation"}},
    "nanochat_native.lm_eval_adapter": {"lm_eval": {"--model", "--model_args", "--tasks"}},
}
# A message of such a module comes up in every command that has the flag. The text of --data has the other flag.
RAISED_WHERE = {"nanochat_native.data": "--text-column", "nanochat_native.evaluation.core_score": "--core"}


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
        with contextlib.suppress(SystemExit):
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
            leading_there = [flags_of(command) for command in reaching if leading in flags_of(command)]
            known = set.intersection(*leading_there) if leading_there else known
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
    assert {f"nanochat_native.{name}" for name in ("train", "finetune", "evaluate", "compare", "serve")} <= set(PARSERS)
    assert set(COMMANDS) >= WITHOUT_FLAGS
    with_data = [name for name in PARSERS if "--data" in flags_of(name) and name != "nanochat_native.chat_eval"]
    assert len(with_data) >= 7
    assert all("--text-column" in flags_of(name) for name in with_data)
    assert all(any(leading in flags_of(name) for name in PARSERS) for leading in RAISED_WHERE.values())


@pytest.mark.parametrize("module", PACKAGE)
def test_every_flag_in_a_message_exists(module):
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
        ("training.report", "python -m nanochat_native.chat --data {}"),
        ("chat", "train's --slots"),
        ("ops.backends", "take --dtype"),
    ],
)
def test_unknown_flag_in_a_message_is_found(module, text):
    if module != "ops.backends":
        assert unknown_flags(f"nanochat_native.{module}", [text]) == [NAMED_FLAG.findall(text)[0]]
    tree = ast.parse(f'raise ValueError(f"{{1}}: " f"{text.replace("{}", "{2}")}")')
    assert [NAMED_FLAG.findall(t) for t in strings(tree)] == [NAMED_FLAG.findall(text)]


def test_every_documented_make_target_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for text in DOCUMENTS.values() for t in re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.MULTILINE)}
    assert {"train", "test", "bench", "lint", "gpu"} <= named <= targets


def test_hacking_names_every_command():
    modules = {path.name for path in (ROOT / "nanochat_native").glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if f"`{name}`" not in DOCUMENTS["HACKING.md"]} == set()


@pytest.mark.slow
@pytest.mark.parametrize("command", PARSERS)
def test_every_command_starts_in_a_real_interpreter(command, tmp_path):
    """Other tests start most commands through the fork server."""
    module = command.removesuffix(".__main__")
    result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--help" in result.stdout


def run(command, **kwargs):
    environment = os.environ | {"NANOCHAT_NATIVE_BACKEND": BACKEND, "OMP_NUM_THREADS": "2"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_examples_run(number, tmp_path):
    printed = run([python(), "-c", PYTHON[number]], cwd=tmp_path)
    assert float(printed) < (1e-4 if "use_backend" in PYTHON[number] else 6.3)


@pytest.mark.slow
def test_documented_training_commands_run_in_order(tmp_path):
    """As the README has them, with a few steps of a small model."""
    (tmp_path / "my_texts").mkdir()
    for number in range(40):
        words = " ".join(f"Once there was a kernel {number * i % 7} and it was fast." for i in range(60))
        (tmp_path / "my_texts" / f"{number}.txt").write_text(words)
    small = ["--device", "cpu", "--cache-dir", "cache", "--eval-tokens", "512", "--total-batch-size", "512"]
    interpreter = [python(), "-m"]
    for args in TRAIN:
        if "--resume" in args:
            out = run([*interpreter, "nanochat_native.train", *args, "--num-iterations", "5"], cwd=tmp_path)
            assert "resume   runs/mine from step 3" in out
        else:
            steps = [a if a != "500" else "3" for a in args]
            steps += [] if "--num-iterations" in args else ["--num-iterations", "2"]
            assert "done     step" in run([*interpreter, "nanochat_native.train", *steps, *small], cwd=tmp_path)
    drawn = [c[2:] for c in commands("README.md") if c[2:3] == ["nanochat_native.plot"]]
    assert [run([*interpreter, *command], cwd=tmp_path).split() for command in drawn] == [
        ["runs/diagnosed/loss.png", "runs/diagnosed/diagnosis.png"]
    ]
    tools = [
        c for c in commands("README.md") if c[2:3] and c[2] in ("nanochat_native.generate", "nanochat_native.evaluate")
    ]
    assert len(tools) == 2
    for _, _, *tool in tools:
        assert run([*interpreter, *tool], cwd=tmp_path).strip()


@pytest.mark.slow
def test_training_without_flags_lowers_the_loss(tmp_path):
    """The first run, cut short: the untrained level is left at once."""
    out = run([python(), "-m", "nanochat_native.train", "--num-iterations", "20", "--device", "cpu"], cwd=tmp_path)
    levels = [float(bpb) for bpb in re.findall(r"validation ([\d.]+) bits per byte on", out)]
    assert levels[0] > 3
    assert levels[-1] < 2.6
    assert "sample   python -m nanochat_native.generate --checkpoint runs/d4" in out
