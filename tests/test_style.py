"""The style of docstrings, comments and messages, as far as a test can see it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIRST_WORDS = {"Of", "That", "What", "Where", "By", "Within", "As"}
# The word to use instead, for each that no source file may contain, in names either.
VOCABULARY = {
    "twins?": "reference",
    "mend(s|ed|ing)?": "fix",
    "opponents?": "baseline",
    "learnt": "trained on, fine-tuned",
    "(go(es)?|going|went) on": "resume, continue",
    "unasked": "say what happens without the flag",
}
# Occurrences that stay: the key of a row in the result files of the benchmarks.
EXCEPTIONS = {"bench": ['"opponent"', "'opponent'"]}

PYTHON = sorted((ROOT / "nanochat_native").rglob("*.py"))
HELPERS = sorted(path for path in (ROOT / "tests").rglob("*.py") if not path.name.startswith("test_"))
NATIVE = sorted(path for folder in ("csrc", "python") for path in (ROOT / folder).rglob("*.*"))
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def first_word_mistakes(source):
    """Return the docstrings of a source that begin with one of FIRST_WORDS."""
    docstrings = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    return [text.splitlines()[0] for text in docstrings if text and re.split(r"\W", text, maxsplit=1)[0] in FIRST_WORDS]


def forbidden_words(text):
    """Return the words of VOCABULARY in a text. Letters on neither side may belong to the word; an underscore may."""
    found = []
    for word in VOCABULARY:
        found += [match[0] for match in re.finditer(rf"(?<![a-z])({word})(?![a-z])", text, re.IGNORECASE)]
    return found


@pytest.mark.parametrize("path", PYTHON + HELPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    assert first_word_mistakes(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PYTHON + NATIVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_use_the_vocabulary(path):
    text = path.read_text(encoding="utf-8")
    for kept in EXCEPTIONS.get(path.parent.name, ()):
        text = text.replace(kept, "")
    assert dict.fromkeys(forbidden_words(text), VOCABULARY) == {}


def test_mistakes_are_found():
    assert first_word_mistakes('"""What it does."""\ndef f():\n    """Where, and when."""\n') == [
        "What it does.",
        "Where, and when.",
    ]
    assert first_word_mistakes('"""Whatever."""\ndef f():\n    """Return what it does."""\n') == []
    assert forbidden_words("the Twin of _mend, which went on") == ["Twin", "mend", "went on"]
    assert forbidden_words("the winter, a recommendation, a position") == []
    assert {path.suffix for path in NATIVE} >= {".cpp", ".cu", ".cuh", ".h"}
