"""Every command and every Python example of the guide runs; commands at a small size.

test_guide_build.py runs the shell lines of a chapter in its notebook, where nbclient is installed, and
test_guide_results.py runs the demonstrations that give the same numbers everywhere.
"""

import importlib.util
import re
import shutil
import subprocess

import book
import chapters
import marks
import pytest
import small_commands
from fork_server import python
from tiny_run import HANGS

PAGES = {page.path.name: page for page in book.chapters()}
COMMANDS = [(name, line) for name, page in PAGES.items() for line in small_commands.of(page.text)]
IN_NOTEBOOKS = {
    line
    for page in PAGES.values()
    if page.number.isdigit() and importlib.util.find_spec("nbclient") is not None
    for line in small_commands.in_fences(page.text, marked=False)
}
EXACT = {result.command for result in chapters.merged("results").values() if result.is_exact_demonstration}
RUN = [line for line in dict.fromkeys(line for _, line in COMMANDS) if small_commands.small(line)]
RUN = [line for line in RUN if line not in IN_NOTEBOOKS | EXACT]
WITH_PYTHON = [
    name for name, page in PAGES.items() if any(f[0] == "python" and not f[2] for f in marks.fences(page.text))
]
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


def run(words, folder, codes=(0,), variables=None):
    result = subprocess.run(
        [small_commands.interpreter(words), *words],
        cwd=folder,
        env=small_commands.environment(variables or {}),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=HANGS,
    )
    assert result.returncode in codes, f"{' '.join(words)}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout


def test_commands_are_found():
    modules = {line.split()[2] for _, line in COMMANDS if line.startswith("python -m")}
    assert {"train", "compare", "lr_find", "memory", "bench", "demonstrate"} <= {m.rpartition(".")[2] for m in modules}
    assert len({line for _, line in COMMANDS if small_commands.small(line)}) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("line", RUN, ids=lambda line: line.removeprefix("python -m nanochat_native.")[:90])
def test_commands_run(line, trained, tmp_path):
    """In a copy, because a command may write into the folder of the run."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    variables, words = small_commands.small(line)
    checks_an_answer = words[1:3] == ["nanochat_native.guide", "check"]
    run(words, tmp_path, codes=(0, 1) if checks_an_answer else (0,), variables=variables)


def blocks(page):
    """Return the Python examples of a chapter, each with the output that the chapter shows, or None."""
    fences = marks.fences(page.text)
    found = []
    for number, (language, content, mark) in enumerate(fences):
        if language == "python" and not mark:
            after = fences[number + 1] if number + 1 < len(fences) else ("", "", "")
            follows = f"```python\n{content}```\n\n```text\n{after[1]}```" in page.text
            found.append((content, after[1] if after[0] == "text" and not after[2] and follows else None))
    return found


def same_output(shown, printed):
    """Return whether two outputs agree: the same words, and numbers within 1%. A line "..." stands for any lines."""
    if "..." in shown.splitlines():
        head, tail = re.split(r"^\.\.\.$\n?", shown, maxsplit=1, flags=re.M)
        lines = printed.splitlines(keepends=True)
        first, last = len(head.splitlines()), len(tail.splitlines())
        return same_output(head, "".join(lines[:first])) and same_output(tail, "".join(lines[len(lines) - last :]))
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    values = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
    return all(a == b or abs(a - b) <= 0.01 * max(abs(a), abs(b)) for a, b in values)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("loss 2.00 in 3 steps\n", "loss 2.01 in 3 steps\n", True),
        ("loss 2.00\n", "loss 2.05\n", False),
        ("loss 2.00\n", "cost 2.00\n", False),
        ("a 1\n...\nb 2\n", "a 1\nx\ny\nb 2\n", True),
        ("a 1\n...\nb 2\n", "a 1\nx\nb 3\n", False),
        ("1 2\n", "1\n", False),
    ],
)
def test_outputs_are_compared(shown, printed, same):
    assert same_output(shown, printed) == same


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_examples_run(name, tmp_path):
    """All examples of a chapter run in order, in one program, and print what the chapter shows."""
    mark = "--- end of the example ---"
    examples = blocks(PAGES[name])
    program = tmp_path / "examples.py"
    program.write_text(f"\nprint({mark!r}, flush=True)\n".join(code for code, _ in examples))
    result = subprocess.run([python(), str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr[-3000:]
    printed = result.stdout.split(f"{mark}\n")
    assert len(printed) == len(examples)
    for (code, shown), output in zip(examples, printed, strict=True):
        assert shown is None or same_output(shown, output), f"{code}\nprints\n{output}\nand the chapter shows\n{shown}"
        assert bool(shown) == bool(output), f"{code}\nprints\n{output}"


def test_quoted_names_of_the_package_exist():
    """Code spans such as `ops.attention` and `nanochat_native/optim/muon.py`."""
    missing = []
    for name, page in PAGES.items():
        for path in re.findall(r"`((?:csrc|python|nanochat_native|tests|docs|benchmarks)/[\w/.-]*\w)`", page.text):
            if not (book.ROOT / path).exists():
                missing.append(f"{name}: {path}")
    assert missing == []
