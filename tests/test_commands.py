"""The commands and examples of README.md and HACKING.md do what they say."""

import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from training import BACKEND

from nanochat_native import (
    batch_size,
    chat,
    compare,
    evaluate,
    export,
    generate,
    import_checkpoint,
    lr_find,
    memory,
    schedules,
)
from nanochat_native.bench import load
from nanochat_native.config import FinetuneConfig, flag, parse
from nanochat_native.serve import __main__ as serve

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "HACKING.md")}


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENTS[name], re.DOTALL)


def commands(name):
    lines = "".join(blocks(name, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


TRAIN = [c[3:] for c in commands("README.md") if c[:3] == ["python", "-m", "nanochat_native.train"]]
TRAIN_ON_RANKS = [c[c.index("--") + 1 :] for c in commands("README.md") if c[:1] == ["torchrun"] and "--" in c]
FINETUNE = [c[3:] for c in commands("README.md") if c[:3] == ["python", "-m", "nanochat_native.finetune"]]
PYTHON = [block for block in blocks("README.md", "python") if "OpenAI" not in block]  # that one: tests/test_serve.py


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
        batch_size,
        chat,
        compare,
        evaluate,
        export,
        generate,
        import_checkpoint,
        load,
        lr_find,
        memory,
        schedules,
        serve,
    ):
        own |= {flag(field.name) for field in dataclasses.fields(module.Options)}
    other = {"--help", "--no-build-isolation", "--only", "--quick", "--model", "--tasks"}
    other |= {"--standalone", "--nnodes", "--rdzv", "--ntasks-per-node"}  # torchrun's and Slurm's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= own | other
    paths = re.findall(r"`((?:csrc|python|nanochat_native|tests)/[\w/]+\.\w+|[A-Z]\w+\.(?:md|txt))`", text)
    assert all((ROOT / path).is_file() for path in paths)


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
