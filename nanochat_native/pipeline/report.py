"""The report card of a speedrun: report.md and report.html, from the state of its folder.

report.html needs no other file: its style and its pictures are inside. The pictures are the `loss.png` of the runs.
"""

import base64
import html
import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nanochat_native
from nanochat_native.pipeline import figures
from nanochat_native.pipeline.recipe import Places, Recipe, Stage
from nanochat_native.pipeline.state import DONE, State
from nanochat_native.runtime import hardware
from nanochat_native.runtime.console import duration
from nanochat_native.runtime.files import write_atomically
from nanochat_native.runtime.isolation import EXIT_CODE

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .85rem; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; font-size: .85rem; }
img { max-width: 100%; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; } th { background: #2a2a2a; } th, td { border-color: #444; }
  pre { background: #232323; } img { background: #fff; }
}
"""


@dataclass(frozen=True)
class Table:
    """A table: its header and rows of texts. kind: "number" or "text", of all columns but the first."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: str = "number"


@dataclass(frozen=True)
class Picture:
    """A picture of a stage in the folder of the speedrun. path: relative to it."""

    path: Path
    title: str


@dataclass(frozen=True)
class Code:
    """A command line."""

    text: str


@dataclass(frozen=True)
class Section:
    """A heading, its level from 1 on, and what follows: paragraphs as text, and the other parts."""

    level: int
    title: str
    parts: Sequence[str | Table | Picture | Code]


def write(recipe: Recipe, places: Places, state: State, price: float | None) -> Path:
    """Write report.md and report.html, replacing each atomically. Return the path of the second. price: of an hour."""
    found = sections(recipe, places, state, price)
    write_atomically(places.out / "report.md", markdown(found))
    path = places.out / "report.html"
    write_atomically(path, page(found, places.out))
    return path


def commit() -> str:
    """Return the git commit of the package's source, with a note if files differ from it; or "not a git checkout"."""
    root = Path(nanochat_native.__file__).resolve().parents[1]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "not a git checkout"
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (", with changes that are not committed" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"


def environment(recipe: Recipe, places: Places, state: State) -> list[tuple[str, str]]:
    """Return the machine and the versions as (name, text)."""
    machines = [entry["machine"] for entry in state.stages.values() if "machine" in entry]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = [
        ("processor", f"{hardware.cpu_name() or platform.machine()}, {hardware.usable_cores()} cores to use"),
        ("memory", f"{memory / 1e9:.0f} GB"),
    ]
    if recipe.device == "cuda":
        found.append(("GPU", f"{places.gpus} x {machines[-1] if machines else 'unknown'}"))
    return [
        *found,
        ("system", platform.platform()),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("nanochat-native", nanochat_native.__version__),
        ("commit", commit()),
    ]


def cost(seconds: float, price: float) -> str:
    """Return what `seconds` cost at a price of an hour."""
    return f"{price * seconds / 3600:.2f}"


def sections(recipe: Recipe, places: Places, state: State, price: float | None) -> list[Section]:
    """Return the parts of the report."""
    started = [stage for stage in recipe.stages if stage.name in state.stages]
    done = [stage for stage in started if state.stages[stage.name]["status"] == DONE]
    total = sum(state.stages[stage.name]["seconds"] for stage in started)
    summary = f"{len(done)} of {len(recipe.stages)} stages are done, in {duration(total)}."
    if price is not None:
        summary += f" This costs {cost(total, price)} at {price:g} an hour."
    written = f"Recipe {recipe.name}. Written on {time.strftime('%Y-%m-%d %H:%M:%S %Z')}."
    return [
        Section(1, "Report card", [part for part in (recipe.about, summary, written) if part]),
        Section(2, "Scores", [_scores(done, state)]),
        Section(2, "Samples", _samples(recipe, done, state)),
        Section(2, "Time", [_times(started, state, total, price)]),
        Section(2, "Stages", []),
        *(_stage(stage, places, state.stages[stage.name]) for stage in started),
        Section(2, "Machine and versions", [Table(("what", "value"), environment(recipe, places, state), "text")]),
    ]


def _scores(done: Sequence[Stage], state: State) -> Table | str:
    """Return a table of all scores, a row for each score and a column for each stage that has some."""
    scores = {stage.name: state.stages[stage.name]["figures"]["scores"] for stage in done}
    columns = [name for name, found in scores.items() if found]
    names = list(dict.fromkeys(score for name in columns for score in scores[name]))
    if not names:
        return "No stage has measured anything yet."
    cells = {name: {score: figures.text(value) for score, value in scores[name].items()} for name in columns}
    return Table(("score", *columns), [[score, *(cells[name].get(score, "") for name in columns)] for score in names])


def _samples(recipe: Recipe, done: Sequence[Stage], state: State) -> list[str | Table]:
    """Return the answers of the models side by side, a column for each stage that trains."""
    answers = {s.name: state.stages[s.name]["samples"] for s in done if state.stages[s.name].get("samples")}
    if not answers:
        return ["There are no samples."]
    rows = [[prompt, *(found.get(prompt, "") for found in answers.values())] for prompt in recipe.prompts]
    note = f"Each model answers with its likeliest tokens, at most {recipe.max_tokens}. A column is a stage's model."
    return [note, Table(("prompt", *answers), rows, "text")]


def _times(started: Sequence[Stage], state: State, total: float, price: float | None) -> Table:
    """Return the time of each stage, its share and its cost."""
    rows = []
    for stage in started:
        entry = state.stages[stage.name]
        row = [stage.name, duration(entry["seconds"]), f"{entry['seconds'] / max(total, 1e-9):.0%}"]
        row += [str(entry["attempts"]), "yes" if entry["status"] == DONE else "no"]
        rows.append(row + ([] if price is None else [cost(entry["seconds"], price)]))
    priced = [] if price is None else [cost(total, price)]
    rows.append(["all", duration(total), "100%", "", "", *priced])
    return Table(("stage", "time", "share", "attempts", "done", *(() if price is None else ("cost",))), rows)


def _stage(stage: Stage, places: Places, entry: dict[str, Any]) -> Section:
    """Return the section of a stage: its command line, figures and curve."""
    parts: list[str | Table | Picture | Code] = [stage.about] if stage.about else []
    parts.append(Code(shlex.join(["python", *entry["command"][1:]])))
    if entry["status"] != DONE:
        return Section(3, stage.name, [*parts, "This stage is not done."])
    if entry["exit_code"] == EXIT_CODE:
        parts.append(f"A report of this stage failed; logs/{stage.name}.log says which. Its result is whole.")
    found = entry["figures"]
    rows = [(name, figures.text(value)) for part in ("scores", "facts") for name, value in found[part].items()]
    if rows:
        parts.append(Table(("figure", "value"), rows))
    picture = places.folder(stage.name) / "loss.png"
    if stage.is_run:
        if picture.is_file():
            parts.append(Picture(picture.relative_to(places.out), f"curve of {stage.name}"))
        else:
            parts.append("There is no curve: it needs matplotlib.")
    return Section(3, stage.name, parts)


def markdown(found: Sequence[Section]) -> str:
    """Return the report as Markdown."""
    lines: list[str] = []
    for section in found:
        lines += [f"{'#' * section.level} {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Table):
                align = "---:" if part.kind == "number" else "---"
                lines.append("| " + " | ".join(map(_cell, part.header)) + " |")
                lines.append("| " + " | ".join(["---", *[align] * (len(part.header) - 1)]) + " |")
                lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in part.rows]
            elif isinstance(part, Picture):
                lines.append(f"![{part.title}]({part.path})")
            elif isinstance(part, Code):
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", part.text)), default=0))
                lines += [f"{fence}sh", part.text, fence]
            else:
                lines.append(_cell(part))
            lines.append("")
    return "\n".join(lines)


# Characters that are markup in Markdown, as HTML names them, and the end of a line.
_ESCAPED = {ord(mark): f"&#{ord(mark)};" for mark in "&<>\\`*_|[]#~$"} | {ord("\n"): "<br>", ord("\r"): ""}


def _cell(text: str) -> str:
    """Return a text as one line of Markdown, in which nothing but an address is markup."""
    escaped = text.translate(_ESCAPED)
    return re.sub(r"^(\s*\d*)([-+.)])(?=\s)", lambda mark: f"{mark[1]}&#{ord(mark[2])};", escaped)  # of a list


def page(found: Sequence[Section], folder: Path) -> str:
    """Return the report as a page of HTML that needs no other file. folder: of the pictures."""
    body: list[str] = []
    for section in found:
        body.append(f"<h{section.level}>{html.escape(section.title)}</h{section.level}>")
        for part in section.parts:
            if isinstance(part, Table):
                head = "".join(f"<th>{html.escape(name)}</th>" for name in part.header)
                body.append(f"<table><thead><tr>{head}</tr></thead><tbody>")
                for first, *others in part.rows:
                    cells = "".join(f'<td class="{part.kind}">{html.escape(text)}</td>' for text in others)
                    body.append(f"<tr><th>{html.escape(first)}</th>{cells}</tr>")
                body.append("</tbody></table>")
            elif isinstance(part, Picture):
                data = base64.b64encode((folder / part.path).read_bytes()).decode()
                body.append(f'<p><img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}"></p>')
            elif isinstance(part, Code):
                body.append(f"<pre>{html.escape(part.text)}</pre>")
            else:
                body.append(f"<p>{html.escape(part)}</p>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    head += "<title>nanochat-native: report card</title>"
    lines = ["<!DOCTYPE html>", '<html lang="en">', f"<head>{head}</head>", "<body>", *body, "</body>", "</html>", ""]
    return "\n".join(lines)
