"""The guide's chapters as Jupyter notebooks: the text as Markdown, examples and commands as cells that run."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import marks
from book import GUIDE, Page

SETUP = """# Installs nanochat_native if it is missing: from the checkout around this notebook, or from REPOSITORY.
import importlib.util, pathlib, subprocess, sys

REPOSITORY = "{repository}"
if importlib.util.find_spec("nanochat_native") is None:
    here = pathlib.Path.cwd().resolve()
    checkouts = [folder for folder in (here, *here.parents) if (folder / "nanochat_native").is_dir()]
    source = str(checkouts[0]) if checkouts else f"git+{{REPOSITORY}}"
    assert checkouts or REPOSITORY, "set REPOSITORY to the address of the repository"
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "torch>=2.11", "setuptools>=77", "cmake", "ninja"], check=True)
    subprocess.run([*pip, "--no-build-isolation", source], check=True)"""


def cell(kind: str, source: str, number: int, **more: Any) -> dict[str, Any]:
    """Return a cell of a notebook."""
    found = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source.strip("\n")} | more
    return found | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def notebook(page: Page, repository: str) -> dict[str, Any]:
    """Return the notebook of a chapter. Quoted code and printed output stay in the text."""
    text = re.sub(r"^<!-- widget: .*? -->\n+", "", marks.NUMBER.sub(lambda m: m["text"], page.text), flags=re.M)
    cells = [cell("code", SETUP.format(repository=repository), 0)]

    def add_prose(part: str) -> None:
        if part.strip():
            source, attachments = with_attachments(re.sub(r"<!--.*?-->\n*", "", marks.plain(part), flags=re.DOTALL))
            more = {"attachments": attachments} if attachments else {}
            cells.append(cell("markdown", source, len(cells), **more))

    end = 0
    for match in marks.ANY_FENCE.finditer(text):
        mark, language, content = match.groups()
        if mark or language not in ("sh", "python"):
            continue
        add_prose(text[end : match.start()])
        if language == "sh":
            lines = content.replace("\\\n", " ").splitlines()
            content = "\n".join(f"!{line}" for line in lines if line.strip())
        cells.append(cell("code", content, len(cells)))
        end = match.end()
    add_prose(text[end:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def with_attachments(text: str) -> tuple[str, dict[str, Any]]:
    """Return Markdown whose figures are attachments of its cell, and the attachments."""
    found: dict[str, Any] = {}

    def attach(match: re.Match[str]) -> str:
        path = GUIDE / match[1]
        found[path.name] = {"image/svg+xml": base64.b64encode(path.read_bytes()).decode()}
        return f"](attachment:{path.name})"

    return re.sub(r"\]\((figures/[\w-]+\.svg)\)", attach, text), found


def write(folder: Path, pages: Sequence[Page], repository: str = "") -> list[Path]:
    """Write the notebooks of the chapters into a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for page in pages:
        path = folder / f"{page.path.stem}.ipynb"
        path.write_text(json.dumps(notebook(page, repository), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        paths.append(path)
    return paths
