"""Reads the flags of a command from its source, for shell completion: importing the command would take seconds."""

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple


class Flag(NamedTuple):
    """A flag of a subcommand: the values it can have if they are few, and whether it takes none."""

    name: str
    choices: tuple[str, ...] = ()
    is_switch: bool = False
    summary: str = ""


@functools.cache
def read(file: Path, class_name: str = "") -> tuple[Flag, ...]:
    """Return the flags that a file declares: the fields of a dataclass, or without one the add_argument calls."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return tuple(_fields(tree, class_name) if class_name else _arguments(tree))


def _fields(tree: ast.Module, class_name: str) -> list[Flag]:
    """Return the flags of a dataclass: its own fields, and those of a base class in the same file."""
    found: dict[str, Flag] = {}
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    for base in node.bases:
        found |= {flag.name: flag for flag in _fields(tree, ast.unparse(base))}
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and "Positional" not in (kind := ast.unparse(field.annotation)):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            flag = Flag(
                "--" + ast.unparse(field.target).replace("_", "-"),
                _choices(field.annotation),
                kind == "bool",
                _first_sentence(ast.literal_eval(after.value)) if documented else "",  # type: ignore[union-attr]
            )
            found[flag.name] = flag
    return list(found.values())


def _choices(annotation: ast.expr) -> tuple[str, ...]:
    """Return the values of a Literal."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return tuple(str(ast.literal_eval(value)) for value in values)
    return ()


def _arguments(tree: ast.Module) -> list[Flag]:
    """Return the flags that a module adds to an argparse parser."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            settings = {keyword.arg: keyword.value for keyword in node.keywords}
            choices = tuple(ast.literal_eval(settings["choices"])) if "choices" in settings else ()
            summary = _first_sentence(ast.literal_eval(settings["help"])) if "help" in settings else ""
            found.append(Flag(ast.literal_eval(node.args[0]), choices, "action" in settings, summary))
    return found


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.;])\s", re.sub(r"\s+", " ", text.strip()))[0].rstrip(".;")
