"""The rules for a chapter that need no computation. `problems` returns where a chapter breaks them."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable
from typing import Any

import book
import chapters as declarations
import marks
from book import Page

ROOT = book.ROOT
FORBIDDEN_MATHS = {r"\!": r"\,", r"\;": r"\:", r"\enspace": r"\quad", r"\mathrm": r"\operatorname"}
EXERCISE = re.compile(r'<a id="exercise-(\w+)-(\d+)"></a>\n\n\*\*Exercise (\w+\.\d+)\*\* \((●+)(○*)\) \*([^*]+)\.\*')
# Languages of fenced blocks: shell commands and Python examples run, and what else is marked is compared.
LANGUAGES = ("sh", "python", "text", "cpp")
EXERCISE_KINDS = ("By hand", "Number", "Write it", "Find the bug", "Experiment")


def problems(page: Page, load: Callable[[str], Any], exercises: set[str], references: dict[str, str]) -> list[str]:
    """Return what is wrong with a chapter, one line each.

    Args:
        load: returns the content of a results file.
        exercises: the ids of the exercises in the package.
        references: the papers by arXiv id.
    """
    found = [*form(page), *numbers(page, load), *outputs(page), *shown_by(page), *figures(page), *maths(page)]
    found += exercise_problems(page, exercises)
    found += broken_links(page)
    for paper in re.findall(r"arxiv\.org/\w+/(\d+\.\d+)", page.text):
        if paper not in references:
            found.append(f"arXiv {paper} is not in REFERENCES")
    return [f"{page.path.name}: {problem}" for problem in found]


def form(page: Page) -> list[str]:
    """Check the title, the question and the numbers of the sections."""
    found = []
    lines = page.text.splitlines()
    if not re.match(rf"# {page.number}\. \S", lines[0]):
        found.append(f"the first line must be '# {page.number}. Title', got {lines[0]!r}")
    if page.number.isdigit() and not re.fullmatch(r"\*[A-Z].*\?\*", lines[2] if len(lines) > 2 else ""):
        found.append("the third line must be the question, in italics")
    outside = marks.without_fences(page.text)
    sections = re.findall(r"^## (\S+)", outside, re.M)
    expected = [f"{page.number}.{number}" for number in range(1, len(sections) + 1)]
    if sections != expected:
        found.append(f"sections must be numbered {' '.join(expected)}, got {' '.join(sections)}")
    if re.search(r"^#+ .*\$", outside, re.M):
        found.append("a heading must contain no formula")
    claims = list(marks.claims(page.text))
    if claims != [f"{page.number}.{number}" for number in range(1, len(claims) + 1)]:
        found.append(f"claims must be numbered in order, got {' '.join(claims)}")
    if len(claims) != outside.count("**Claim "):
        found.append("each '**Claim N.M.**' must stand in a box of its own that begins with '> [!IMPORTANT]'")
    fences = marks.fences(page.text)
    if 2 * len(fences) != len(re.findall(r"^\s*(?:```|~~~)", page.text, re.M)):
        found.append("a fence must begin with ``` and its language, and end with ```, at the start of a line")
    found += [
        f"the language of a fence must be one of {', '.join(LANGUAGES)}, got {language!r}"
        for language, _, _ in fences
        if language not in LANGUAGES
    ]
    anchors = book.anchors(page.text)
    found += [f"the anchor {name} occurs twice" for name in sorted({a for a in anchors if anchors.count(a) > 1})]
    return found


def numbers(page: Page, load: Callable[[str], Any]) -> list[str]:
    """Check that marks are filled, and that each number of a claim stands in one."""
    found = []
    for claim, text in marks.claims(page.text).items():
        if f'<a id="claim-{claim.lower().replace(".", "-")}"></a>' not in text:
            found.append(f"claim {claim} has no anchor")
        if naked := marks.naked_numbers(text):
            found.append(f"claim {claim} has numbers without a mark: {' '.join(naked)}")
    for match in marks.NUMBER.finditer(page.text):
        try:
            text = marks.number_text(match["mark"], load)
            if text != match["text"]:
                found.append(f"{match['mark']} is {text}, the chapter says {match['text']}")
        except marks.MarkError as error:
            found.append(str(error))
    for match in marks.FENCE.finditer(page.text):
        try:
            if marks.fence_text(match["what"], load) != match["text"]:
                found.append(f"the fence after {match['what']!r} is out of date")
        except marks.MarkError as error:
            found.append(str(error))
    opened = len(re.findall(r"<!--= ", page.text))
    if opened != len(marks.NUMBER.findall(page.text)) or opened != page.text.count("<!--/-->"):
        found.append("a mark of a number is not closed")
    if len(re.findall(r"^<!--: ", page.text, re.M)) != len(marks.FENCE.findall(page.text)):
        found.append("a mark of a fence has no fence below it")
    return found


def outputs(page: Page) -> list[str]:
    """Check that what a program can fill has a mark: the output of a command, and C++. Python without a mark is run."""
    found = []
    if re.search(r"^```sh\n(?:(?!^```).)*^```\s*^```text$", page.text, re.DOTALL | re.M):
        found.append("the output of a command needs a mark above it")
    if any(language == "cpp" and not mark for language, _, mark in marks.fences(page.text)):
        found.append("quoted C++ needs a mark above it")
    return found


def shown_by(page: Page) -> list[str]:
    """Check that each claim names commands or tests that exist."""
    found = []
    for claim, text in marks.claims(page.text).items():
        _, separator, evidence = text.partition("*Shown by*")
        spans = re.findall(r"`([^`]+)`", evidence)
        if not separator or not spans:
            found.append(f"claim {claim} does not say by what it is shown")
        for span in spans:
            if span.startswith("tests/") and "::" not in span:
                found.append(f"claim {claim}: {span} names no test")
            elif problem := evidence_problem(span):
                found.append(f"claim {claim}: {problem}")
    return found


def evidence_problem(span: str) -> str:
    """Return what is wrong with a command or test that a claim names, or an empty text."""
    if span.startswith("tests/"):
        path, _, name = span.partition("::")
        if not (ROOT / path).exists():
            return f"{path} does not exist"
        defined = rf"^\s*def {re.escape(name)}\("
        if name and not (
            name.startswith("test_") and re.search(defined, (ROOT / path).read_text(encoding="utf-8"), re.M)
        ):
            return f"{path} has no test {name}"
        return "" if name or path.endswith(("/", ".py")) or (ROOT / path).is_dir() else f"{span} names no test"
    words = shlex.split(span)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[:1] == ["make"]:
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        return "" if len(words) > 1 and words[1] in targets else f"{span}: no such target"
    if words[:1] in (["python"], ["torchrun"]) and "-m" in words:
        module = words[words.index("-m") + 1]
        if importlib.util.find_spec(module) is None:
            return f"{module} does not exist"
        if module == "nanochat_native.demonstrate":
            from nanochat_native.demonstrations import demonstrations

            names = [word for word in words[3:] if not word.startswith("-")]
            return "" if names and names[0] in demonstrations() else f"{span}: no such demonstration"
        return ""
    if words[:2] == ["python", "docs/tools/measure.py"]:
        return "" if set(words[2:]) <= set(declarations.merged("results")) else f"{span}: no such result"
    return "" if words[:1] == ["python"] and len(words) > 1 and (ROOT / words[1]).exists() else f"{span} is no command"


def figures(page: Page) -> list[str]:
    """Check that figures are numbered in order, exist, have an anchor and are referred to."""
    found = []
    pattern = re.compile(r"^!\[Figure (\w+)\.(\d+)\. ([^\]]*(?:\[[^\]]*\][^\]]*)*)\]\(([^)]+)\)$", re.M)
    matches = list(pattern.finditer(page.text))
    images = re.findall(r"^!\[.*", page.text, re.M)
    if len(images) != len(matches):
        found.append(f"an image must be '![Figure {page.number}.N. Caption.](figures/NAME.svg)' on a line of its own")
    for number, match in enumerate(matches, start=1):
        name = f"{match[1]}.{match[2]}"
        if name != f"{page.number}.{number}":
            found.append(f"figure {name} should be figure {page.number}.{number}")
        if not (page.path.parent / match[4]).exists():
            found.append(f"{match[4]} does not exist")
        anchor = f"fig-{match[1].lower()}-{match[2]}"
        if f'<a id="{anchor}"></a>\n' not in page.text[: match.start()][-120:]:
            found.append(f'figure {name} needs <a id="{anchor}"></a> above it')
        if f"](#{anchor})" not in page.text:
            found.append(f"the text does not refer to figure {name}")
    return found


def exercise_problems(page: Page, known: set[str]) -> list[str]:
    """Check that the exercises of a chapter are those of the package, in order, each with its command and answer."""
    found = []
    prefix = f"{page.number}."
    parts = re.split(r"^(?=<a id=\"exercise-)", page.text, flags=re.M)[1:]
    ids = []
    for part in parts:
        head = EXERCISE.match(part)
        if head is None or len(head[4] + head[5]) != 3 or f"{head[1].upper()}.{head[2]}" != head[3]:
            found.append(f"an exercise must begin with its anchor, number, difficulty and kind, got {part[:90]!r}")
            continue
        ids.append(head[3])
        if head[6] not in EXERCISE_KINDS:
            found.append(f"exercise {head[3]}: its kind must be one of {', '.join(EXERCISE_KINDS)}, got {head[6]}")
        if f"`python -m nanochat_native.guide check {head[3]}" not in part:
            found.append(f"exercise {head[3]} has no command that checks it")
        if "<details>\n<summary>Answer</summary>\n" not in part or "\n</details>" not in part:
            found.append(f"exercise {head[3]} has no answer")
        elif head[6] == "Number" and "<!--= exercises." not in part.partition("<summary>Answer</summary>")[2]:
            found.append(f"exercise {head[3]}: its answer has no number of docs/results/exercises.json")
    if ids != [f"{prefix}{number}" for number in range(1, len(ids) + 1)]:
        found.append(f"exercises must be numbered in order, got {' '.join(ids)}")
    packaged = {name for name in known if name.startswith(prefix)}
    if set(ids) != packaged:
        found.append(f"exercises differ from the package's: {' '.join(sorted(set(ids) ^ packaged))}")
    return found


def maths(page: Page) -> list[str]:
    """Check that formulas use no command that one of the outputs shows wrongly."""
    formulas = re.findall(r"\$\$.*?\$\$|\$[^$\n]+\$", marks.without_fences(page.text), re.DOTALL)
    return [
        f"{wrong} in {formula[:60]!r}: use {right}"
        for formula in formulas
        for wrong, right in FORBIDDEN_MATHS.items()
        if re.search(re.escape(wrong) + r"(?![a-zA-Z])", formula)
    ]


def broken_links(page: Page) -> list[str]:
    """Return the links to files or anchors that do not exist."""
    found = []
    for link in book.links(page.text):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.path.parent / file).resolve() if file else page.path
        is_page = target.suffix == ".md" and target.exists()
        if not target.exists():
            found.append(f"the link {link} has no target")
        elif anchor and (not is_page or anchor not in book.anchors(target.read_text(encoding="utf-8"))):
            found.append(f"the link {link} has no anchor")
    return found
