"""python -m nanochat_native.demonstrate: the list, the numbers of a demonstration, and what it refuses."""

import json

import pytest

from nanochat_native import demonstrate, demonstrations


def test_list_names_every_demonstration(capsys):
    assert demonstrate.main([]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == [name for functions in demonstrations.topics().values() for name in functions]


def test_numbers_are_printed_and_written(capsys, tmp_path, monkeypatch):
    values = {"a": {"b": 1234567, "c": [1, 2.5]}, "long": list(range(9)), "rows": [{"x": True}, {"x": None}]}
    monkeypatch.setattr(demonstrations, "find", lambda name: lambda: values)
    assert demonstrate.main(["any", "--json", str(tmp_path / "values.json")]) == 0
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()] == [
        ["a.b", "1,234,567"],
        ["a.c", "1 2.5"],
        ["long", "0 1 2 3 4 5 6 7 ... (9 in all)"],
        ["rows.0.x", "true"],
        ["rows.1.x", "none"],
    ]
    assert json.loads((tmp_path / "values.json").read_text()) == values


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing"], "the demonstration must be one of "),
        (["causal-mask", "--checkpoint", "x"], "--checkpoint must not be given for causal-mask"),
        (["--checkpoint", "x"], "--checkpoint needs the name of a demonstration"),
        (["--json", "x.json"], "--json needs the name of a demonstration"),
        (["causal-mask", "--json", "nowhere/x.json"], "nowhere/x.json: No such file or directory"),
    ],
)
def test_mistake_is_one_line(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demonstrate.main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
