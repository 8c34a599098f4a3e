"""The tasks of chat_eval: their files, prompts and rules."""

import json
import random
import re

import numpy as np
import pytest

from nanochat_native.evaluation import chat_tasks, sandbox, spelling
from nanochat_native.evaluation.chat_tasks import Problem, find_files, read_task

CHOICES = {"text": ["air", "ice", "fire", "sand"], "label": ["A", "B", "C", "D"]}
ARC = [
    {"id": "x", "question": "What melts?", "choices": CHOICES, "answerKey": "B"},
    {"id": "y", "question": "What burns?", "choices": {"text": ["wood", "tin"], "label": ["1", "2"]}, "answerKey": "1"},
]
MMLU = [{"question": "2 + 2?", "subject": "arithmetic", "choices": ["1", "2", "3", "4"], "answer": 3}]
GSM8K = [{"question": "Half of 1,468?", "answer": "It is 1468/2=<<1468/2=734>>734.\n#### 734"}]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": "import math\nfrom typing import List\n\n\ndef area(r):\n    '''The area of a disc.'''\n",
        "canonical_solution": "    return math.pi * r * r\n",
        "test": "def check(candidate):\n    assert abs(candidate(1) - math.pi) < 1e-9\n",
        "entry_point": "area",
    }
]
ROWS = {"ARC-Easy": ARC, "ARC-Challenge": ARC[::-1], "MMLU": MMLU, "GSM8K": GSM8K, "HumanEval": HUMANEVAL}
DOWNLOADED = {
    "ARC-Easy": "arc/ARC-Easy",
    "ARC-Challenge": "arc/ARC-Challenge",
    "MMLU": "mmlu/all",
    "GSM8K": "gsm8k/main",
    "HumanEval": "humaneval/openai_humaneval",
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tasks(folder, rows=ROWS):
    """The files of the tasks, as nanochat_native.download leaves them, with a split for training that nothing reads."""
    for name, given in rows.items():
        for split in ("test", "train"):
            write_rows(
                folder / DOWNLOADED[name] / f"{split}-00000-of-00001.parquet", given if split == "test" else [{}]
            )
        (folder / DOWNLOADED[name].split("/")[0] / ".download.json").write_text("{}")
    return folder


# --- files ---


def test_tasks_are_read_as_download_leaves_them(tmp_path):
    write_tasks(tmp_path)
    for name, rows in ROWS.items():
        assert len(read_task(name, tmp_path).problems) == len(rows)
    assert read_task("MMLU", tmp_path / "mmlu").problems == read_task("MMLU", tmp_path).problems


@pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
@pytest.mark.parametrize("place", ["main/test", "main/test-00000-of-00001", "x/y/main/test/00000", "main/test.part"])
def test_layouts(place, kind, tmp_path):
    file = write_rows(tmp_path / f"{place}{kind}", GSM8K)
    for other in ("main/train-0", "socratic/test-0", "main/latest", ".hidden/main/test", "main/x/test"):
        write_rows(tmp_path / f"{other}{kind}", GSM8K)
    assert find_files("GSM8K", tmp_path) == [file]


def test_shards_are_read_in_order(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(9)]
    for i in range(3):
        write_rows(tmp_path / "main" / f"test-{i}.jsonl", rows[3 * i : 3 * i + 3])
    order = np.random.default_rng(42).permutation(9)
    assert [problem.answer for problem in read_task("GSM8K", tmp_path).problems] == [str(i) for i in order]
    assert [problem.answer for problem in read_task("GSM8K", tmp_path, 4).problems] == [str(i) for i in order[:4]]


def test_files_of_a_task_must_be_there_once(tmp_path):
    with pytest.raises(ValueError, match=r"--data must be a folder, got .*none"):
        read_task("MMLU", tmp_path / "none")
    with pytest.raises(chat_tasks.MissingTaskError, match="--data FOLDER must name"):
        read_task("MMLU", None)
    message = re.escape("has no main/test*.parquet or .jsonl with question, answer")
    with pytest.raises(chat_tasks.MissingTaskError, match=f"{message}$"):
        read_task("GSM8K", tmp_path)
    write_rows(tmp_path / "a/main/test.jsonl", [{"question": "?"}])
    with pytest.raises(chat_tasks.MissingTaskError, match=rf"{message}; .*test\.jsonl has no answer$"):
        read_task("GSM8K", tmp_path)
    for folder in ("b", "c"):
        write_rows(tmp_path / folder / "main/test.jsonl", GSM8K)
    with pytest.raises(ValueError, match=r"the files of GSM8K once, got .*/b/main/test.jsonl and .*/c/main/test.jsonl"):
        read_task("GSM8K", tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("GSM8K", {"question": 1, "answer": "#### 1"}, "question must be a text, got 1"),
        ("GSM8K", {"question": "\ud800", "answer": "#### 1"}, "question must be a text"),
        ("GSM8K", {"question": "?", "answer": "one"}, "answer must end with #### and a number, got 'one'"),
        ("MMLU", {"question": "?", "choices": ["a"], "answer": 0}, "got 1 choices and answer 0"),
        ("MMLU", {"question": "?", "choices": ["a"] * 4, "answer": 4}, "got 4 choices and answer 4"),
        ("MMLU", {"question": "?", "choices": ["a"] * 4, "answer": True}, "answer the index of one"),
        ("MMLU", {"question": "?", "choices": "abcd", "answer": 1}, "choices must be a list of texts, got 'abcd'"),
        ("ARC-Easy", {"question": "?", "choices": ["a"], "answerKey": "A"}, "choices must have label and text"),
        ("ARC-Easy", ARC[0] | {"answerKey": "E"}, "answerKey must be the letter of a choice, got 4 choices with"),
        ("HumanEval", {"prompt": "", "test": None, "entry_point": ""}, "test must be a text, got None"),
    ],
)
def test_malformed_rows_are_named(name, row, message, tmp_path):
    fields = {"HumanEval": "openai_humaneval", "MMLU": "all", "GSM8K": "main"}
    write_rows(tmp_path / fields.get(name, name) / "test.jsonl", [ROWS[name][0], row])
    with pytest.raises(ValueError, match=r"test\.jsonl: line 2: " + ".*" + re.escape(message)):
        read_task(name, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test.jsonl", b'{"question": "?", "answer": "#### 1"}\n{', r"test\.jsonl, line 2: not JSON"),
        (
            "test.jsonl",
            b'{"question": "?", "answer": "#### 1"}\n[1]',
            r"test\.jsonl: line 2 must be an object, got \[1\]",
        ),
        ("test.jsonl", b'{"question": "\xff"}', "not UTF-8"),
        ("test.parquet", b"PAR1 and no more", "damaged parquet file"),
    ],
)
def test_damaged_files_are_named(file, content, message, tmp_path):
    if file.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_task("GSM8K", tmp_path)


def test_an_empty_task_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "main").mkdir()
    empty = pa.schema([("question", pa.string()), ("answer", pa.string())]).empty_table()
    pq.write_table(empty, tmp_path / "main/test.parquet")
    with pytest.raises(ValueError, match="the files of GSM8K must have at least one problem, got none"):
        read_task("GSM8K", tmp_path)


# --- prompts and rules ---


def test_prompts_of_multiple_choice_are_nanochats(tmp_path):
    tasks = {name: read_task(name, write_tasks(tmp_path)) for name in ("ARC-Easy", "MMLU")}
    by_answer = {problem.answer: problem for problem in tasks["ARC-Easy"].problems}
    assert by_answer["B"] == Problem(
        "Multiple Choice question: What melts?\n- air=A\n- ice=B\n- fire=C\n- sand=D\n\n"
        "Respond only with the letter of the correct answer.",
        "B",
        ("A", "B", "C", "D"),
    )
    assert by_answer["1"].letters == ("1", "2")
    (problem,) = tasks["MMLU"].problems
    assert problem.prompt.startswith("Multiple Choice question: 2 + 2?\n- 1=A\n- 2=B\n- 3=C\n- 4=D\n\nRespond")
    assert (problem.answer, problem.letters) == ("D", ("A", "B", "C", "D"))
    assert {task.is_right for task in tasks.values()} == {None}
    assert [chat_tasks.Task(name, [], None).baseline for name in chat_tasks.NAMES] == [25, 25, 25, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("#### 734", True),
        ("so <<1468/2=734>>734\n#### 734 coins", True),
        ("#### 7,34", True),
        ("#### 734\n#### 1", True),
        ("#### 1\n#### 734", False),
        ("#### 734.0", False),
        ("#### 734.", False),
        ("#### -734", False),
        ("####734", False),
        ("#### $734", False),
        ("734", False),
        ("", False),
    ],
)
def test_numbers_are_judged_as_by_nanochat(text, right, tmp_path):
    write_rows(tmp_path / "main/test.jsonl", GSM8K)
    task = read_task("GSM8K", tmp_path)
    assert (task.problems[0].prompt, task.problems[0].answer) == ("Half of 1,468?", "734")
    assert task.is_right(task.problems[0], text) == right


@pytest.mark.parametrize(
    ("answer", "number"),
    [("<<1=1>>1\n#### 1,234", "1234"), ("#### -5", "-5"), ("#### 7 <<1=1>>#### 8", "8"), ("<<a>>\n#### 0.5", "0.5")],
)
def test_the_right_number_is_behind_the_last_calculation(answer, number, tmp_path):
    write_rows(tmp_path / "main/test.jsonl", [{"question": "?", "answer": answer}])
    assert read_task("GSM8K", tmp_path).problems[0].answer == number


def test_programs_are_put_together_as_by_nanochat(tmp_path):
    write_rows(tmp_path / "openai_humaneval/test.jsonl", HUMANEVAL)
    (problem,) = read_task("HumanEval", tmp_path).problems
    end = "\n\ndef check(candidate):\n    assert abs(candidate(1) - math.pi) < 1e-9\n\ncheck(area)"
    code = "def area(r):\n    return math.pi * r * r"
    imports = "import math\nfrom typing import List\n\n"
    for text in (code, f"Here:\n```python\n{code}\n```\nAnd\n```\nx\n```", f"```\n{code}\n```", f"\n {code}\n"):
        assert chat_tasks.program_of(problem, text) == imports + code + end
    assert chat_tasks.program_of(Problem("# a\n\nimport a\nx = 1\nimport b", test="t", entry_point="e"), "") == (
        "import a\n\n\n\nt\ncheck(e)"
    )


def test_programs_are_judged_by_their_tests(tmp_path):
    try:
        sandbox.check()
    except OSError:
        pytest.skip("the system allows no sandbox")
    write_rows(tmp_path / "openai_humaneval/test.jsonl", HUMANEVAL)
    task = read_task("HumanEval", tmp_path)
    (problem,) = task.problems
    assert task.is_right(problem, problem.prompt + HUMANEVAL[0]["canonical_solution"])
    for wrong in ("def area(r):\n    return 3 * r", "I do not know", "", "import os\nos._exit(0)"):
        assert not task.is_right(problem, wrong)


# --- spelling ---


def test_spelling_problems_are_the_same_each_time():
    random.seed(1)
    first = [read_task(name, None) for name in ("SpellingBee", "SimpleSpelling")]
    random.seed(2)
    second = [read_task(name, None) for name in ("SpellingBee", "SimpleSpelling")]
    assert [task.problems for task in first] == [task.problems for task in second]
    assert [len(task.problems) for task in first] == [256, len(spelling.WORDS)]
    # These are the problems of every machine and every version of Python.
    assert first[0].problems[:2] == EXPECTED_COUNTS
    assert [problem.answer for problem in first[1].problems[:3]] == EXPECTED_SPELLINGS
    assert read_task("SpellingBee", None, 5).problems == first[0].problems[:5]
    assert spelling.counting_problem(spelling.FIRST + 4) == (first[0].problems[4].prompt, first[0].problems[4].answer)


EXPECTED_COUNTS = [
    Problem("How many m are in the word mammal?", "3"),
    Problem("How many times does the letter r occur in address?", "1"),
]
EXPECTED_SPELLINGS = ["mammal:m,a,m,m,a,l", "orchestra:o,r,c,h,e,s,t,r,a", "giraffe:g,i,r,a,f,f,e"]


def test_spelling_answers_are_right():
    assert len(set(spelling.WORDS)) == len(spelling.WORDS) >= 150
    bee, simple = (read_task(name, None) for name in ("SpellingBee", "SimpleSpelling"))
    words = set(spelling.WORDS)
    for problem in bee.problems:
        found = re.findall(r"[a-z]+", problem.prompt)
        (word,) = words & set(found)
        (letter,) = {one for one in found if len(one) == 1}
        assert problem.answer == str(word.count(letter))
        assert bee.is_right(problem, f"I count.\n#### {problem.answer}")
        assert not bee.is_right(problem, problem.answer)
    assert len({problem.answer for problem in bee.problems}) >= 4
    for problem in simple.problems:
        word = problem.prompt.removeprefix("Spell the word: ")
        assert simple.is_right(problem, f" {word}:{','.join(word)}\n")
        assert not simple.is_right(problem, f"{word}:{''.join(word)}")
    assert sorted(problem.prompt for problem in simple.problems) == sorted(f"Spell the word: {word}" for word in words)
