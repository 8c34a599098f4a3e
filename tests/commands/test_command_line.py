"""The nanochat-native command: its subcommands, their completion in shells, and how fast it answers without torch."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import COMMANDS, WITHOUT_FLAGS, flags_of
from tiny_run import tiny_flags, write_text

import nanochat_native
from nanochat_native import __main__ as command_line
from nanochat_native import completion
from nanochat_native.runtime import declared_flags

# Modules that other commands start as processes of their own; nobody types them.
WORKERS = {"nanochat_native.bench.gpu_worker", "nanochat_native.bench.ranks", "nanochat_native.bench.step"}
WORKERS |= {"nanochat_native.lab.roofline.worker", "nanochat_native.evaluation.sandbox_worker"}
WORKERS |= {"nanochat_native.pipeline.samples"}
PROGRAM = [sys.executable, "-m", "nanochat_native"]


def start(*args, **settings):
    return subprocess.run([*PROGRAM, *map(str, args)], capture_output=True, text=True, **settings)


def run(capsys, *args):
    """(exit code, stdout, stderr) of a call in this process."""
    code = command_line.main(args)
    return code, *capsys.readouterr()


def test_the_table_holds_every_command():
    modules = {command_line.module_of(name) for name in command_line.SUBCOMMANDS}
    assert modules == set(COMMANDS) - WORKERS - {"nanochat_native.__main__"} - {"nanochat_native.bench.__main__"} | {
        "nanochat_native.bench"
    }
    assert len(command_line.SUBCOMMANDS) == sum(map(len, command_line.GROUPS.values())), "a name stands in two groups"


def test_help_lists_each_subcommand_on_one_line(capsys):
    for args in (["--help"], ["-h"], []):
        code, out, err = run(capsys, *args)
        assert (code, err) == (0, "")
        lines = out.splitlines()
        for name, summary in command_line.SUBCOMMANDS.items():
            assert [line.split() for line in lines if line.split()[:1] == [name]] == [[name, *summary.split()]]
        assert max(map(len, lines)) <= 88
        assert all(f"{title}:" in lines for title in command_line.GROUPS)


def test_version_is_the_packages(capsys):
    assert run(capsys, "--version") == (0, f"nanochat-native {nanochat_native.__version__}\n", "")


@pytest.mark.parametrize(
    ("name", "near"),
    [("trian", "train"), ("lr_fnd", "lr-find"), ("lr", None), ("import", "export"), ("xyzzy", None), ("", None)],
)
def test_mistyped_subcommand_names_the_nearest(capsys, name, near):
    code, out, err = run(capsys, name, "--depth", "3")
    assert (code, out) == (2, "")
    hint = f"did you mean {near!r}?" if near else "nanochat-native --help lists the subcommands"
    assert err == f"error: unknown subcommand {name!r}; {hint}\n"


def test_flag_before_the_subcommand_is_refused(capsys):
    code, out, err = run(capsys, "--depth", "3", "train")
    assert (code, out) == (2, "")
    assert err.startswith("error: unrecognized option '--depth' before the subcommand")
    assert err.count("\n") == 1


def test_subcommand_behaves_as_its_module():
    """Exit code, output and errors are those of python -m nanochat_native.lr_find."""
    direct = subprocess.run([*PROGRAM[:2], "nanochat_native.lr_find", "--stepz", "5"], capture_output=True, text=True)
    assert direct.returncode == 2
    for name in ("lr-find", "lr_find"):
        through = start(name, "--stepz", "5")
        assert (through.returncode, through.stdout, through.stderr) == (2, direct.stdout, direct.stderr)


def test_training_through_the_command_sets_the_wait_policy_before_torch(tmp_path):
    """A run ends with 0, and OpenMP has read OMP_WAIT_POLICY when torch loaded it."""
    write_text(tmp_path / "text.jsonl")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"OMP_DISPLAY_ENV": "true"}
    done = start("train", *tiny_flags(tmp_path, steps=1), env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done     step 1 of 1" in done.stdout
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


@pytest.mark.slow
def test_torchrun_starts_a_subcommand_on_two_ranks(tmp_path):
    write_text(tmp_path / "text.jsonl")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "nanochat_native", "--", "train", *tiny_flags(tmp_path, steps=1)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ranks    2 over gloo" in done.stdout


def test_what_needs_no_torch_imports_no_torch():
    script = """
import sys
from nanochat_native.__main__ import main
code = main(sys.argv[1:])
assert not {"torch", "numpy", "tyro"} & set(sys.modules), "slow to import"
sys.exit(code)
"""
    for args, code in ((["--help"], 0), (["--version"], 0), (["trian"], 2)):
        done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    # A subcommand ends with SystemExit, before the check above.
    script = script.replace("code = main(sys.argv[1:])", "try: main(sys.argv[1:])\nexcept SystemExit: code = 0")
    for shell in completion.SHELLS:
        done = subprocess.run([sys.executable, "-c", script, "completion", shell], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


# --- completion ---


def test_each_subcommand_completes_the_flags_that_its_parser_takes():
    assert set(completion.FLAGS) == set(command_line.SUBCOMMANDS)
    for name in command_line.SUBCOMMANDS:
        if name == "lm-eval-adapter":  # its flags are those of lm-eval
            continue
        module = command_line.module_of(name)
        with_flags = f"{module}.__main__" if name == "bench" else module
        taken = {"--help"} if module in WITHOUT_FLAGS else flags_of(with_flags)
        found = {flag.name for flag in completion.flags_of(name)}
        assert found == {flag for flag in taken if f"--{flag.removeprefix('--no-')}" not in taken - {flag}}, name


def test_values_of_a_choice_are_read():
    flags = {flag.name: flag for flag in completion.flags_of("train")}
    assert flags["--dtype"].choices == ("auto", "float32", "bfloat16", "float16")
    assert flags["--depth"].choices == ()
    assert flags["--dry-run"].is_switch
    assert not flags["--depth"].is_switch
    gpu = {flag.name: flag for flag in completion.flags_of("bench.gpu")}
    assert gpu["--device"].choices == ("cuda", "cpu")
    assert gpu["--quick"].is_switch


def test_fields_of_a_base_class_and_docstrings_are_read(tmp_path):
    source = tmp_path / "flags.py"
    source.write_text(
        'class A:\n    x_y: int = 1\n    """Of A. More."""\n    kept: bool = False\n'
        'class B(A):\n    x_y: int = 2\n    """Of B."""\n    place: tyro.conf.Positional[Path]\n'
    )
    assert declared_flags.read(source, "B") == (
        declared_flags.Flag("--x-y", summary="Of B"),
        declared_flags.Flag("--kept", is_switch=True),
    )


def bash_completes(line):
    """The words that bash's completion function offers for the last word of a line."""
    words = line.split(" ")
    script = "\n".join(
        [
            completion.bash(),
            f"COMP_WORDS=({' '.join(map(shlex.quote, words))})",
            f"COMP_CWORD={len(words) - 1}",
            "_nanochat_native",
            'printf "%s\\n" "${COMPREPLY[@]}"',
        ]
    )
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nanochat-native ", [*command_line.SUBCOMMANDS, "--help", "--version"]),
        ("nanochat-native l", ["lm-eval-adapter", "lr-find"]),
        ("nanochat-native --v", ["--version"]),
        ("nanochat-native lr-find --fl", ["--floor"]),
        ("nanochat-native lr_find --fl", ["--floor"]),
        ("nanochat-native lr-find --dep", ["--depth"]),
        ("nanochat-native train --fl", []),
        ("nanochat-native train --optimizer muon", ["muon_sgd"]),
        ("nanochat-native bench.gpu --device ", ["cuda", "cpu"]),
        ("nanochat-native generate --device ", ["cpu", "cuda", "mps"]),
        ("nanochat-native export --format s", ["safetensors"]),
        ("nanochat-native train --data ", []),
        ("nanochat-native plot runs/", []),
        ("nanochat-native completion ", ["bash", "zsh", "fish", "--help"]),
        ("nanochat-native no-such --", []),
    ],
)
def test_bash_completes_subcommands_flags_and_values(line, words):
    assert bash_completes(line) == words


def test_bash_completes_every_flag_of_every_subcommand():
    for name in ("train", "compare", "memory", "doctor"):
        assert bash_completes(f"nanochat-native {name} --") == [flag.name for flag in completion.flags_of(name)]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_has_the_shells_syntax(shell, tmp_path):
    script = completion.SHELLS[shell]()
    assert all(name in script for name in command_line.SUBCOMMANDS)
    assert script.count("skip-spikes") >= 2
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    path = tmp_path / "script"
    path.write_text(script)
    assert subprocess.run([shell, "-n", str(path)], capture_output=True, text=True).stderr == ""


def test_a_shell_that_is_not_known_is_one_line(capsys):
    for args in ([], ["tcsh"], ["bash", "zsh"]):
        assert completion.main(args) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err == f"error: completion takes one shell: bash, zsh, fish; got {' '.join(args)!r}\n"


def test_the_console_script_is_declared():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert '[project.scripts]\nnanochat-native = "nanochat_native.__main__:main"\n' in text
