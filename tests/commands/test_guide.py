"""python -m nanochat_native.guide: the list, the reader's file, and the check of answers."""

import errno
import json
import os
from pathlib import Path

import pytest

from nanochat_native import exercises, guide
from nanochat_native.exercises import Experiment, reader

FILE = "exercises/05_attention.py"
WRONG = """
import torch

def attention(q, k, v):
    scores = q @ k.T
    mask = torch.ones_like(scores).triu(1).bool()
    return torch.softmax(scores.masked_fill(mask, -torch.inf), -1) @ v
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *args):
    """(exit code, stdout, stderr) of the command."""
    code = guide.main([str(arg) for arg in args])
    return code, *capsys.readouterr()


def write(text, path=FILE):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(text)


def error(capsys, *args):
    """The message of a call that ends with 2."""
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def verdict(capsys, *args):
    """(whether the answer is right, line) of a check."""
    code, out, err = run(capsys, "check", *args)
    assert err == ""
    assert out.count("\n") == 1
    word, _, text = out.strip().partition(": ")
    assert (code, word) in ((0, "right"), (1, "wrong"))
    return code == 0, text


# --- list and start ---


def test_list_shows_every_exercise_or_those_of_a_chapter(capsys):
    code, out, err = run(capsys, "list")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == sum(len(exercises.of_chapter(chapter)) for chapter in exercises.chapters())
    assert run(capsys)[1] == out
    code, chapter, _ = run(capsys, "list", 5)
    assert code == 0
    assert set(chapter.splitlines()) < set(out.splitlines())
    assert "5.4   function    Causal attention" in chapter


def test_start_writes_the_stubs_once(capsys, tmp_path):
    assert run(capsys, "start", 5) == (0, f"{FILE}\n", "")
    text = Path(FILE).read_text()
    assert "# python -m nanochat_native.guide check 5.4\n\ndef attention(q, k, v):" in text
    compile(text, FILE, "exec")
    assert error(capsys, "start", 5) == f"{FILE} exists already; move it away to start again"
    assert Path(FILE).read_text() == text
    assert run(capsys, "start", 5, "--folder", "deep/er") == (0, "deep/er/05_attention.py\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "exercises"]
    assert verdict(capsys, "5.4") == (False, "attention is not written yet: it raises NotImplementedError")


@pytest.mark.parametrize("chapter", exercises.chapters())
def test_file_of_every_chapter_can_be_run(chapter, capsys):
    if not any(isinstance(exercise, exercises.Write) for exercise in exercises.of_chapter(chapter)):
        assert error(capsys, "start", chapter).startswith(f"chapter {chapter} has no function to write")
        return
    code, out, _ = run(capsys, "start", chapter)
    assert code == 0
    exec(Path(out.strip()).read_text(), {})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["start"], "start takes one chapter, such as 5, got ''"),
        (["start", "5", "6"], "start takes one chapter, such as 5, got '5 6'"),
        (["start", "five"], "a chapter is a number such as 5, got 'five'"),
        (["start", "99"], "the chapter must be one with exercises ("),
        (["list", "5", "6"], "list takes one chapter or none, got '5 6'"),
        (["list", "0"], "the chapter must be one with exercises ("),
        (["chek", "5.4"], "invalid choice 'chek' for argument 'action'"),
        (["check"], "check takes the id of an exercise, such as 5.4"),
        (["check", "5"], "an exercise has an id such as 5.4, got '5'"),
        (["check", "5.99"], "there is no exercise 5.99; the chapter has 5.1, "),
        (["check", "77.1"], "the chapter must be one with exercises ("),
        (["check", "5.1"], "exercise 5.1 asks for a number: check 5.1 NUMBER"),
        (["check", "5.1", "much"], "exercise 5.1 takes a number such as 3.1e6, 3.1M or 50%, got 'much'"),
        (["check", "5.4", "3"], "exercise 5.4 takes no number, got '3'"),
        (["check", "5.4"], f"{FILE} does not exist; this writes it: python -m nanochat_native.guide start 5"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(args, message, capsys, tmp_path):
    assert error(capsys, *args).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file_is_one_line(capsys):
    Path("exercises").write_text("")
    error(capsys, "start", 5)
    assert Path("exercises").read_text() == ""


def test_start_that_fails_leaves_no_part_of_a_file(capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert error(capsys, "start", 5) == f"{FILE}: No space left on device"
    assert list(Path("exercises").iterdir()) == []
    assert run(capsys, "start", 5)[0] == 0


# --- check ---


def test_number_is_checked(capsys):
    assert verdict(capsys, "5.2", "14,560") == (True, "14,560 pairs")
    assert verdict(capsys, "5.2", "14.56", "k") == (True, "14,560 pairs")
    assert verdict(capsys, "5.2", 32896) == (False, "that is an L layer: the window is missing")
    assert verdict(capsys, "5.2", "-14560") == (False, "the sign is wrong")
    assert verdict(capsys, "5.2", "29120") == (False, "too large by a factor of 2")


def test_right_function_and_known_mistake_are_told(capsys):
    write(WRONG)
    assert verdict(capsys, "5.4") == (False, "the scale 1/sqrt(D) is missing")
    write(WRONG.replace("k.T", "k.T / q.shape[-1] ** 0.5"))
    right, text = verdict(capsys, "5.4")
    assert (right, text) == (True, "attention is right on 3 inputs")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return q / 0.5", "the largest difference is "),
        ("return v.T", "the shape is (8, 5) where (5, 8) is right (input 1 of 3: q (5, 8), k (5, 8), v (5, 8))"),
        ("return None", "None where (5, 8) is right (input 1"),
        ("return 1 / 0", f"{FILE}, line 2: ZeroDivisionError: division by zero (input 1"),
        ("return q @ k", f"{FILE}, line 2: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("return attention(q, k, v)", f"{FILE}, line 2: RecursionError: maximum recursion depth exceeded"),
        ("return (", f"{FILE}, line 2: SyntaxError: '(' was never closed"),
        ("raise NotImplementedError", "attention is not written yet: it raises NotImplementedError"),
        ("return (q > 0) @ (k > 0).T", f"{FILE}, line 2: NotImplementedError: "),
        ("raise SystemExit(3)", f"attention in {FILE} ended the process (exit code 3)"),
        ("raise SystemExit('text')", f"attention in {FILE} ended the process (exit code 1)"),
        ("raise SystemExit(1 << 70)", f"attention in {FILE} ended the process (exit code 0)"),
        ("import os; os._exit(3)", f"attention in {FILE} ended the process (exit code 3)"),
        ("import os; os.kill(os.getpid(), 9)", f"attention in {FILE} ended the process (signal SIGKILL)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        (r"raise KeyboardInterrupt('two\nlines')", "KeyboardInterrupt: two lines"),
        ("q.zero_(); k.zero_(); v.zero_(); return v", "the largest difference is "),
    ],
)
def test_failure_of_a_function_is_one_line(body, text, capsys):
    write(f"def attention(q, k, v):\n    {body}\n")
    right, found = verdict(capsys, "5.4")
    assert not right
    assert found.startswith(text)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import no_such_module\n", f"{FILE}, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("attend = 3\n", f"{FILE} has no function attention"),
        ("attention = 3\n", f"{FILE} has no function attention"),
        ("", f"{FILE} has no function attention"),
        ("\n\nx = [\n", f"{FILE}, line 3: SyntaxError: '[' was never closed"),
        ("\tif x:\n", f"{FILE}, line 1: IndentationError: unexpected indent"),
    ],
)
def test_failure_of_the_file_is_one_line(source, text, capsys):
    write(source)
    assert verdict(capsys, "5.4") == (False, text)


@pytest.mark.parametrize("source", [b"\xff\xfe\x00", b"x = '\x00'"])
def test_file_that_is_no_text_is_one_line(source, capsys):
    Path("exercises").mkdir()
    Path(FILE).write_bytes(source)
    assert not verdict(capsys, "5.4")[0]


@pytest.mark.parametrize("where", ["def attention(q, k, v):\n    ", ""])
def test_function_that_never_ends_is_stopped(where, capsys, monkeypatch):
    monkeypatch.setattr(reader, "TIME_LIMIT", 0.3)
    write(f"{where}while True: pass\n")
    assert verdict(capsys, "5.4") == (False, f"attention in {FILE} took longer than 0.3 seconds")


def test_function_prints_and_writes_without_harm(capfd):
    """What a function prints is shown, and its changes of the process end with the check."""
    write(
        "import torch\ndef attention(q, k, v):\n"
        "    print('seen', q.shape)\n    torch.set_default_dtype(torch.float64)\n"
    )
    assert guide.main(["check", "5.4"]) == 1
    out, _ = capfd.readouterr()
    assert "seen torch.Size([5, 8])" in out
    import torch

    assert torch.get_default_dtype() == torch.float32


def test_experiment_is_checked_from_its_result(capsys, monkeypatch):
    example = Experiment("5.9", "Best", "python -m x", "lab/e", lambda result: (result["ok"], "seen"))
    monkeypatch.setattr(exercises, "find", lambda id: example)
    assert error(capsys, "check", "5.9") == "lab/e/result.json does not exist; this writes it: python -m x"
    Path("lab/e").mkdir(parents=True)
    for ok in (True, False):
        Path("lab/e/result.json").write_text(json.dumps({"ok": ok}))
        assert verdict(capsys, "5.9") == (ok, "seen")
    Path("lab/e/result.json").write_text("{")
    assert error(capsys, "check", "5.9").startswith("lab/e/result.json is not the result of this command: python -m x")
