"""What a user can get wrong on any command line is one line on stderr, in one style, and nothing is done."""

import dataclasses
import re
from pathlib import Path

import pytest

from nanochat_native import (
    batch_size,
    chat,
    chat_eval,
    compare,
    demonstrate,
    doctor,
    evaluate,
    export,
    finetune,
    generate,
    guide,
    import_checkpoint,
    lr_find,
    memory,
    plot,
    reinforce,
    roofline,
    scaling,
    schedules,
    serve,
    speedrun,
    train,
)
from nanochat_native.bench import __main__ as bench
from nanochat_native.bench import gpu, load
from nanochat_native.evaluation import chat_evaluation, session
from nanochat_native.inference import chat_session
from nanochat_native.interop import importing, transformers_export
from nanochat_native.lab import comparison, noise_scale, range_test
from nanochat_native.lab.memory import options as memory_options
from nanochat_native.lab.roofline import options as roofline_options
from nanochat_native.lab.scaling import plan as scaling_plan
from nanochat_native.pipeline import session as speedrun_session
from nanochat_native.runs.config import FinetuneConfig, ReinforceConfig, TrainConfig
from nanochat_native.runtime.command import exit_code, mistake
from nanochat_native.runtime.distributed import RankError
from nanochat_native.runtime.flags import flag

# Command to what it needs, and the dataclass of its flags.
COMMANDS = {
    speedrun: ([], speedrun_session.Options),
    train: ([], TrainConfig),
    finetune: (["--checkpoint", "x"], FinetuneConfig),
    reinforce: (["--checkpoint", "x"], ReinforceConfig),
    generate: (["--checkpoint", "x"], generate.Options),
    chat: (["--checkpoint", "x"], chat_session.Options),
    serve: (["--checkpoint", "x"], serve.Options),
    evaluate: (["--checkpoint", "x"], session.Options),
    chat_eval: (["--checkpoint", "x"], chat_evaluation.Options),
    export: (["--checkpoint", "x", "--out", "y"], transformers_export.Options),
    import_checkpoint: (["x", "--out", "y"], importing.Options),
    plot: (["x"], plot.Options),
    memory: ([], memory_options.Options),
    roofline: ([], roofline_options.Options),
    schedules: ([], schedules.Options),
    demonstrate: ([], demonstrate.Options),
    guide: ([], guide.Options),
    lr_find: ([], range_test.Options),
    compare: ([], comparison.Options),
    batch_size: ([], noise_scale.Options),
    scaling: ([], scaling_plan.Options),
    bench: ([], bench.Options),
    load: (["--checkpoint", "x"], load.Options),
    doctor: ([], None),
    gpu: ([], None),
}
# Words of Python, torch and C++ that say nothing to a user.
INNER = r"Traceback|NoneType|Error\(|<class|__\w+__|long long|codec|sys\.|AUTO|UNSET|instantiated|invalid literal"


def name_of(command):
    return command.__name__.removeprefix("nanochat_native.")


def run(command, args, capsys):
    """stderr of a call that must end with 2, without its "error: "."""
    try:
        code = command.main([str(arg) for arg in args])
    except SystemExit as stop:  # of argparse, where no package is needed
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not re.search(INNER, err), err
    return err.removeprefix("error: ").removesuffix("\n")


def fields(kind):
    """(command, flag) of every flag of a type of value."""
    found = []
    for command, (_, options) in COMMANDS.items():
        for field in dataclasses.fields(options) if options else ():
            words = re.findall(r"\w+", str(field.type))
            if kind in words and "Positional" not in words and "tuple" not in words:
                found.append(pytest.param(command, flag(field.name), id=f"{name_of(command)}{flag(field.name)}"))
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_unknown_flag_is_refused(command, capsys):
    needed, _ = COMMANDS[command]
    found = run(command, [*needed, "--no-such-flag", "3"], capsys)
    assert re.match(r"(Unrecognized options|unrecognized arguments): --no-such-flag,? 3", found)


NEEDING = [command for command, (needed, _) in COMMANDS.items() if needed and command not in (finetune, reinforce)]


@pytest.mark.parametrize("command", NEEDING, ids=name_of)
def test_missing_flag_is_named(command, capsys):
    needed, _ = COMMANDS[command]
    flags = [arg for arg in needed if arg.startswith("--")]
    found = run(command, [], capsys)
    assert re.fullmatch(r"[\w ,-]+ (is|are) needed", found)
    assert all(name in found for name in flags)
    assert ("PATH" in found.replace(" PATH", "")) == (needed[0] == "x"), "a place without a flag"
    if flags:
        misspelt = run(command, [*needed[: len(needed) - 2], f"{flags[-1]}s", "x"], capsys)
        assert misspelt == f"{flags[-1]} PATH is needed; unrecognized options: {flags[-1]}s, x"


@pytest.mark.parametrize(("command", "name"), fields("int"))
def test_invalid_whole_number_is_refused(command, name, capsys):
    needed, _ = COMMANDS[command]
    assert run(command, [*needed, name, "1.5"], capsys) in (
        f"{name} must be a whole number, got '1.5'",
        f"{name} must be None or INT, got '1.5'",
    )
    for value in (2**63, -(2**64), 10**40):
        found = run(command, [*needed, name, value], capsys)
        assert name in found
        assert re.search("must be|takes|needs", found)
        assert len(found) < 150
    found = run(command, [*needed, name, "9" * 5000], capsys)
    most = (f"{name} must be a whole number of at most 4300 digits", f"{name} must be None or INT, got '999")
    assert found.startswith(most)
    assert len(found) < 150


@pytest.mark.parametrize(("command", "name"), fields("float"))
def test_invalid_number_is_refused(command, name, capsys):
    needed, _ = COMMANDS[command]
    assert run(command, [*needed, name, "much"], capsys).startswith(f"{name} must be ")
    found = run(command, [*needed, name, "nan"], capsys)
    assert name in found
    assert "nan" in found


@pytest.mark.parametrize(("command", "name"), fields("Path"))
def test_empty_path_is_refused(command, name, capsys):
    needed, _ = COMMANDS[command]
    if name in needed:
        needed = [arg for i, arg in enumerate(needed) if name not in needed[max(0, i - 1) : i + 1]]
    for given in ([name, ""], [f"{name}="]):
        assert run(command, [*needed, *given], capsys) == f"{name} must be a path, got ''"


@pytest.mark.parametrize("command", [train, generate, chat], ids=name_of)
def test_seed_beyond_64_bits_is_refused(command, capsys):
    found = run(command, [*COMMANDS[command][0], "--seed", 2**63], capsys)
    assert found == f"--seed must be a whole number <= {2**63 - 1}, got {2**63}"


def test_missing_value_and_unknown_choice_are_refused(capsys):
    found = run(evaluate, ["--checkpoint"], capsys)
    assert found.startswith("Missing value for argument '--checkpoint'")
    found = run(export, ["--checkpoint", "x", "--out", "y", "--dtype", "int8"], capsys)
    assert found == "invalid choice 'int8' for argument '--dtype'. Expected one of ('auto', 'float32', 'bfloat16')."
    assert run(generate, ["--checkpoint", "x", "--temprature", "1"], capsys).endswith("perhaps you meant --temperature")


@pytest.mark.parametrize("command", [generate, chat, evaluate, export, serve], ids=name_of)
def test_missing_model_is_refused(command, tmp_path, capsys):
    needed = [str(tmp_path / "none") if arg == "x" else arg for arg in COMMANDS[command][0]]
    assert run(command, needed, capsys) == f"{tmp_path / 'none'}: no such run folder"
    file = Path(__file__)
    assert run(command, [*needed, "--checkpoint", file], capsys) == f"{file} is a file; it must be the folder of a run"


def test_errors_of_the_system_and_torch_are_one_line(capsys):
    def fail(error):
        def command():
            raise error

        return command

    assert mistake(FileNotFoundError(2, "No such file or directory", "x")) == 2
    assert mistake(ValueError("one\n  two\n")) == 2
    assert capsys.readouterr().err == "error: x: No such file or directory\nerror: one two\n"
    assert exit_code(fail(OSError("of its own words"))) == 2
    assert exit_code(fail(RuntimeError("[enforce fail] DefaultCPUAllocator: can't\nallocate memory"))) == 1
    assert exit_code(fail(MemoryError())) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in lines] == ["error: of its own words"] + ["error: out of memory"] * 2
    for kind in (RuntimeError, RankError, NotImplementedError):
        with pytest.raises(kind, match="a fault of ours"):
            exit_code(fail(kind("a fault of ours")))
