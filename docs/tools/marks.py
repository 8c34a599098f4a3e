"""The marks in the guide's chapters that a program fills: numbers, quoted code and printed output.

    <!--= KEY : FORMAT -->0.786<!--/-->                a number from docs/results
    <!--: code PATH NAME -->                           the fence below quotes a function or class of a Python file
    <!--: code PATH "TEXT" [LINES] -->                 the fence below quotes a block of C++ that begins with TEXT
    <!--: output NAME [FIRST-LAST] -->                 the fence below shows the printed output of a result

`fill` returns a chapter with every mark filled. A test compares it with the chapter that is committed.
"""

from __future__ import annotations

import ast
import operator
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUMBER = re.compile(r"<!--= (?P<mark>[^>]*?) -->(?P<text>.*?)<!--/-->", re.DOTALL)
FENCE = re.compile(
    r"(?P<mark>^<!--: (?P<what>[^>]*?) -->\n```(?P<language>\w*)\n)(?P<text>.*?)(?P<end>^```$)", re.DOTALL | re.M
)
ANY_FENCE = re.compile(r"(?:^<!--: ([^>]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.M)
OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}


class MarkError(ValueError):
    """A mark that cannot be filled."""


def look_up(key: str, load: Callable[[str], Any]) -> Any:
    """Return the value at a key: the name of a results file, followed by names and numbers, all separated by dots."""
    name, *path = key.split(".")
    try:
        found = load(name)
        for part in path:
            found = found[int(part)] if isinstance(found, list) else found[part]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise MarkError(f"{key}: {type(error).__name__} {error}") from None
    return found


def evaluate(expression: str, load: Callable[[str], Any]) -> Any:
    """Return the value of an expression of keys, numbers and + - * / **."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left, op, right) if type(op) in OPERATIONS:
                return OPERATIONS[type(op)](value(left), value(right))
            case ast.UnaryOp(op, operand) if type(op) in OPERATIONS:
                return OPERATIONS[type(op)](value(operand))
            case ast.Constant(number) if isinstance(number, int | float):
                return number
        raise MarkError(f"{expression}: only keys, numbers and + - * / ** are allowed")

    keys: list[Any] = []

    def place(match: re.Match[str]) -> str:
        keys.append(look_up(match[0], load))
        return f"(k{len(keys) - 1})"

    text = re.sub(r"(?<![\w.])[A-Za-z_]\w*(?:\.\w+)*", place, expression)
    if not keys:
        raise MarkError(f"{expression}: a number must come from a key")
    if text == "(k0)":
        return keys[0]
    numbers = {f"k{number}": key for number, key in enumerate(keys)}
    if not all(isinstance(key, int | float) for key in keys):
        raise MarkError(f"{expression}: arithmetic needs numbers")
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise MarkError(f"{expression}: {error.msg}") from None

    class Names(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return ast.Constant(numbers[node.id])

    try:
        return value(Names().visit(tree))
    except ArithmeticError as error:
        raise MarkError(f"{expression}: {error}") from None


def number_text(mark: str, load: Callable[[str], Any]) -> str:
    """Return the text of the mark `KEY : FORMAT`. Without a format, text stays as it is."""
    expression, _, spec = mark.partition(" : ")
    value = evaluate(expression.strip(), load)
    if isinstance(value, dict | list):
        raise MarkError(f"{expression}: is no single value")
    try:
        return format(value, spec.replace(" ", ""))
    except ValueError as error:
        raise MarkError(f"{mark}: {error}") from None


def python_source(path: Path, name: str) -> str:
    """Return the source of a function, class or method without its docstring. Raises MarkError if there is none."""
    text = path.read_text(encoding="utf-8")
    nodes: list[Any] = [ast.parse(text)]
    for part in name.split("."):
        nodes = [child for node in nodes for child in node.body if getattr(child, "name", None) == part]
        if not nodes:
            raise MarkError(f"{path.relative_to(ROOT)} has no {name}")
    node = nodes[0]
    lines = text.splitlines()
    kept = list(range(min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno + 1))
    if ast.get_docstring(node) is not None and len(node.body) > 1:
        docstring = node.body[0]
        kept = [number for number in kept if not docstring.lineno <= number <= docstring.end_lineno]
        if lines[docstring.end_lineno] == "":
            kept.remove(docstring.end_lineno + 1)
    return textwrap.dedent("\n".join(lines[number - 1] for number in kept)) + "\n"


def native_source(path: Path, start: str, count: int | None) -> str:
    """Return the lines from the first one that contains `start` to the end of its braces, or `count` lines of it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next((number for number, line in enumerate(lines) if start in line), None)
    if first is None:
        raise MarkError(f"{path.relative_to(ROOT)} has no line with {start!r}")
    depth, opened, block = 0, False, []
    for line in lines[first:]:
        block.append(line)
        depth += line.count("{") - line.count("}")
        opened = opened or "{" in line
        if (opened and depth <= 0) or len(block) == count:
            break
    return textwrap.dedent("\n".join(block)) + "\n"


def fence_text(what: str, load: Callable[[str], Any]) -> str:
    """Return the text of a marked fence."""
    if match := re.fullmatch(r'code (\S+) (?:"(.+)"(?: (\d+))?|([\w.]+))', what):
        path = ROOT / match[1]
        if not path.exists():
            raise MarkError(f"{what}: {match[1]} does not exist")
        if match[4]:
            return python_source(path, match[4])
        return native_source(path, match[2], int(match[3]) if match[3] else None)
    if match := re.fullmatch(r"output (\w+)(?: (\d+)-(\d+))?", what):
        lines = str(look_up(f"{match[1]}.output", load)).splitlines()
        if match[2]:
            if int(match[3]) > len(lines):
                raise MarkError(f"{what}: the output has {len(lines)} lines")
            lines = lines[int(match[2]) - 1 : int(match[3])]
        return "\n".join(lines) + "\n"
    raise MarkError(f"unknown mark: {what}")


def fill(text: str, load: Callable[[str], Any]) -> tuple[str, list[str]]:
    """Return a chapter with its marks filled, and the problems of those that cannot be filled."""
    problems = []

    def or_old(match: re.Match[str], fill_one: Callable[[], str]) -> str:
        try:
            return fill_one()
        except MarkError as error:
            problems.append(str(error))
            return match[0]

    def number(match: re.Match[str]) -> str:
        mark = match["mark"]
        return or_old(match, lambda: f"<!--= {mark} -->{number_text(mark, load)}<!--/-->")

    def fence(match: re.Match[str]) -> str:
        return or_old(match, lambda: match["mark"] + fence_text(match["what"], load) + match["end"])

    return FENCE.sub(fence, NUMBER.sub(number, text)), problems


def plain(text: str) -> str:
    """Return a chapter without marks, with their content in place."""
    text = NUMBER.sub(lambda m: m["text"], text)
    return re.sub(r"^<!--: [^>]*? -->\n(?=```)", "", text, flags=re.M)


def without_fences(text: str) -> str:
    """Return a chapter without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.M)


def fences(text: str) -> list[tuple[str, str, str]]:
    """Return (language, content, mark above it or "") of each fenced block, in order."""
    return [(match[2], match[3], match[1] or "") for match in ANY_FENCE.finditer(text)]


def claims(text: str) -> dict[str, str]:
    """Return the text of each claim by its number, without the quotation marks of its lines."""
    found = {}
    for block in re.findall(r"^> \[!IMPORTANT\]\n((?:>.*\n?)+)", text, re.M):
        body = re.sub(r"^> ?", "", block, flags=re.M)
        number = re.search(r"\*\*Claim (\w+\.\d+)\.\*\*", body)
        if number is None:
            raise MarkError(f"a claim without a number: {body[:80]!r}")
        if number[1] in found:
            raise MarkError(f"claim {number[1]} occurs twice")
        found[number[1]] = body
    return found


def naked_numbers(text: str) -> list[str]:
    """Return the numbers of a text that stand in no mark, code span, formula, link target or reference."""
    for pattern in (
        NUMBER.pattern,
        r"<!--.*?-->",
        r"<a id=[^>]*></a>",
        r"`[^`]*`",
        r"\$\$.*?\$\$",
        r"\$[^$\n]*\$",
        r"\]\([^)]*\)",
        r"\b(?i:claim|figure|table|exercise|chapter|appendix|section)s? \w+(?:\.\d+)?(?: (?:to|and) \w+(?:\.\d+)?)?",
        r"\[\^\w+\]",
        r"\b[A-Za-z]+\w*-?\d[\w.-]*",
    ):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    return re.findall(r"(?<![\w.])\.?\d[\d,.]*\w*", text)
