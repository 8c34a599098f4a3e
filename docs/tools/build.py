"""Build the guide: static HTML pages, a PDF and a notebook for each chapter, from the Markdown in docs/.

    python docs/tools/build.py                  # build/guide/*.html, guide.pdf and notebooks/*.ipynb
    python docs/tools/build.py --update [FILE]  # fills the marks of the chapters from docs/results and the sources
    python docs/tools/build.py --check [FILE]   # prints where chapters break the rules

Needs the extra "docs" (pandoc and typst from PyPI) and no network.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import html
import json
import os
import re
import shutil
import string
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS))

import book  # noqa: E402
import chapters as declarations  # noqa: E402
import checks  # noqa: E402
import marks  # noqa: E402
import notebooks  # noqa: E402
from book import Page  # noqa: E402

ROOT = book.ROOT
MARKDOWN = "gfm+tex_math_dollars+alerts+footnotes-yaml_metadata_block"
PARTS = {"claims": r"^> \*\*Claim ", "figures": r"^!\[Figure ", "exercises": r"^\*\*Exercise "}
# The id, the name and the text of what the search finds by its number.
PLACES = (
    r'<span id="(claim-[\w-]+)"></span>\s*<strong>(Claim [\w.]+)\.</strong>(.*?)</p>',
    r'<figure id="(fig-[\w-]+)">.*?<figcaption[^>]*>(Figure \w+\.\d+)\.(.*?)</figcaption>',
    r'<span id="(exercise-[\w-]+)"></span>\s*<p>\s*<strong>(Exercise [\w.]+)</strong>(.*?)</p>',
)
STATIC = ("style.css", "page.js", "latinmodern-math.woff2", "FONT-LICENSE.txt")


# --- Markdown ---


def update(pages: Sequence[Page]) -> tuple[list[str], list[str]]:
    """Fill the marks of the pages. If they are all chapters, also write the files that are generated.

    Returns:
        The files that changed, and the problems of marks that cannot be filled, which stay as they are.
    """
    changed, problems = [], []

    def write(path: Path, text: str) -> None:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(str(path.relative_to(ROOT)))

    write(declarations.RESULTS_FOLDER / "exercises.json", declarations.to_text(packaged_answers()))
    declarations.load.cache_clear()
    for page in pages:
        text, errors = marks.fill(page.text, declarations.load)
        write(page.path, text)
        problems += [f"{page.path.name}: {error}" for error in errors]
    if len(pages) == len(book.chapters()):
        write(book.GUIDE / "references.md", references_page())
        write(book.GUIDE / "README.md", landing_page())
    return changed, problems


def references_page() -> str:
    """Return the page that lists all cited papers."""
    found = declarations.merged("references")
    cited = {key: [p for p in book.chapters() if f"arxiv.org/abs/{key}" in p.text] for key in found}
    rows = [
        f"| [{key}](https://arxiv.org/abs/{key}) | {found[key]} | "
        f"{', '.join(f'[{page.number}]({page.path.name})' for page in cited[key])} |"
        for key in sorted(found)
    ]
    return "\n".join(["# References", "", "| arXiv | paper | cited in |", "|---|---|---|", *rows, ""])


def landing_page() -> str:
    """Return the landing page with its list of chapters up to date."""
    text = (book.GUIDE / "README.md").read_text(encoding="utf-8")
    pages = book.chapters()
    rows = [
        f"| [{page.title}]({page.path.name}) | {page.question} | {page.minutes if page.question else ''} |"
        for page in pages
    ]
    counts = {name: sum(len(re.findall(pattern, page.text, re.M)) for page in pages) for name, pattern in PARTS.items()}
    parts = "{claims} claims, {figures} figures and {exercises} exercises".format(**counts)
    table = "\n".join(["| chapter | question | minutes |", "|---|---|---:|", *rows, "", f"Together they have {parts}."])
    return re.sub(
        r"(?<=<!-- contents -->\n).*?(?=<!-- /contents -->)", lambda _: f"\n{table}\n\n", text, flags=re.DOTALL
    )


def packaged_answers() -> dict[str, Any]:
    """Return the answers of the exercises with a number, from the package."""
    from nanochat_native import exercises

    return exercises.as_results()


def packaged_exercises() -> set[str]:
    """Return the ids of the exercises in the package."""
    from nanochat_native import exercises

    return {exercise.id for chapter in exercises.chapters() for exercise in exercises.of_chapter(chapter)}


def check(pages: Sequence[Page]) -> list[str]:
    """Return where the pages break the rules."""
    known, references = packaged_exercises(), declarations.merged("references")
    return [problem for page in pages for problem in checks.problems(page, declarations.load, known, references)]


# --- HTML ---


def convert(page: Page, target: str) -> str:
    """Return a page as "html5" or "typst". Raises RuntimeError for a formula or a mark-up that cannot be converted."""
    import pypandoc

    source = ROOT / "build/guide-sources" / str(os.getpid()) / page.path.name
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(marks.plain(page.text), encoding="utf-8")
    settings = [f"--lua-filter={TOOLS / 'filter.lua'}", "--fail-if-warnings", "--wrap=none"]
    if target == "html5":
        settings += ["--mathml", "--syntax-highlighting=pygments"]
    converted: str = pypandoc.convert_file(str(source), target, format=MARKDOWN, extra_args=settings)
    return converted


def with_exercise_forms(body: str) -> str:
    """Add a field for the answer below each command that checks a number."""
    pattern = r"<p><code>python -m nanochat_native\.guide check (\w+)\.(\d+) NUMBER</code></p>"
    return re.sub(pattern, r'\g<0><form class="check" data-exercise="\1_\2"></form>', body)


def with_images(body: str, page: Page, out: Path) -> str:
    """Copy the images of a page to the folder of the figures, and point to them there."""

    def copied(match: re.Match[str]) -> str:
        source = (page.path.parent / match[1]).resolve()
        (out / "figures").mkdir(exist_ok=True)
        shutil.copy(source, out / "figures")
        return f'<img src="figures/{source.name}"'

    return re.sub(r'<img src="([^":]+)"', copied, body)


def sections(body: str) -> list[tuple[str, str, str]]:
    """Return (id, heading, text) of each section, claim, figure and exercise of an HTML page, for the search."""
    parts = re.split(r'<h[1-3]\b[^>]*?id="([^"]*)"[^>]*>(.*?)</h[1-3]>', body, flags=re.DOTALL)
    found = [(parts[i], text_of(parts[i + 1]), text_of(parts[i + 2])) for i in range(1, len(parts), 3)]
    for pattern in PLACES:
        found += [(match[1], match[2], text_of(match[3])) for match in re.finditer(pattern, body, re.DOTALL)]
    return found


def text_of(fragment: str) -> str:
    """Return the words of an HTML fragment. Formulas are left out."""
    fragment = re.sub(r"<(math|script|style)\b.*?</\1>", " ", fragment, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", fragment)).split())


def navigation(pages: Sequence[Page], documents: Sequence[Page], current: Page, toc: str) -> str:
    """Return the list of pages, with the sections of the current one."""

    def entry(page: Page) -> str:
        mark = ' aria-current="page"' if page is current else ""
        inner = toc if page is current else ""
        title = "Overview" if page.name == "index" else html.escape(page.title)
        return f'<li><a href="{page.name}.html"{mark}>{title}</a>{inner}</li>'

    guide = "".join(map(entry, pages))
    others = "".join(map(entry, documents))
    return f"<ul>{guide}</ul><p>Documentation</p><ul>{others}</ul>"


def build_html(out: Path, pages: Sequence[Page], documents: Sequence[Page], pool: Any) -> None:
    """Write the HTML pages with all they need."""
    for name in STATIC:  # first, so that a build that was stopped is known as one
        shutil.copy(TOOLS / name, out)
    everything = [*pages, *documents]
    bodies = list(pool.map(lambda page: convert(page, "html5"), everything))
    template = string.Template((TOOLS / "page.html").read_text(encoding="utf-8"))
    widgets = sorted(path.stem for path in (TOOLS / "widgets").glob("*.js"))
    index = []
    for page, body in zip(everything, bodies, strict=True):
        body = with_images(with_exercise_forms(body), page, out)
        index += [{"page": page.name, "id": name, "title": title, "text": text} for name, title, text in sections(body)]
        toc = "".join(
            f'<li><a href="#{name}">{title}</a></li>'
            for name, title in re.findall(r'<h2\b[^>]*?id="([^"]*)"[^>]*>(.*?)</h2>', body, re.DOTALL)
        )
        near = pages if page in pages else documents
        position = near.index(page)
        before = near[position - 1] if position else None
        after = near[position + 1] if position + 1 < len(near) else None
        used = [name for name in widgets if f'data-widget="{name}"' in body]
        scripts = ["search.js", *(["exercises.js"] if 'class="check"' in body else [])]
        scripts += ["widget-data.js", *(f"widgets/{name}.js" for name in used)] if used else []
        text = template.safe_substitute(
            title=html.escape(page.title),
            book=html.escape(book.TITLE),
            number=page.number,
            nav=navigation(pages, documents, page, f"<ul>{toc}</ul>" if toc else ""),
            toc=f"<ul>{toc}</ul>",
            body=body,
            previous=link_to(before, "prev"),
            next=link_to(after, "next"),
            scripts="".join(f'<script src="{name}"></script>' for name in scripts),
        )
        (out / f"{page.name}.html").write_text(text, encoding="utf-8")
    (out / "search.js").write_text(f"window.SEARCH = {json.dumps(index, ensure_ascii=False)};\n", encoding="utf-8")
    answers = json.dumps(packaged_answers(), ensure_ascii=False)
    (out / "exercises.js").write_text(f"window.EXERCISES = {answers};\n", encoding="utf-8")
    (out / "widget-data.js").write_text(f"window.WIDGET_DATA = {json.dumps(widget_data())};\n", encoding="utf-8")
    (out / "figures").mkdir(exist_ok=True)
    (out / "widgets").mkdir(exist_ok=True)
    for name in widgets:
        shutil.copy(TOOLS / f"widgets/{name}.js", out / "widgets")


def link_to(page: Page | None, rel: str) -> str:
    """Return a link to the previous or the next page, or an empty text."""
    return "" if page is None else f'<a rel="{rel}" href="{page.name}.html">{html.escape(page.title)}</a>'


def widget_data() -> dict[str, Any]:
    """Return the data of the widgets by name: results that are named widget_NAME."""
    paths = sorted(declarations.RESULTS_FOLDER.glob("widget_*.json"))
    return {path.stem.removeprefix("widget_"): json.loads(path.read_text()) for path in paths}


# --- PDF ---


def build_pdf(out: Path, pages: Sequence[Page], pool: Any) -> Path:
    """Write guide.pdf. The same sources give the same bytes."""
    import typst

    work = ROOT / "build/guide-sources" / str(os.getpid()) / "typst"
    work.mkdir(parents=True, exist_ok=True)
    shutil.copytree(declarations.FIGURES_FOLDER, work / "figures", dirs_exist_ok=True)
    shutil.copy(TOOLS / "book.typ", work)
    lines = ['#import "book.typ": book', f'#show: body => book("{book.TITLE}", body)']
    for page, text in zip(pages, pool.map(lambda page: convert(page, "typst"), pages), strict=True):
        (work / f"{page.path.stem}.typ").write_text(f'#import "book.typ": *\n{text}', encoding="utf-8")
        lines.append(f'#include "{page.path.stem}.typ"')
    (work / "main.typ").write_text("\n".join(lines) + "\n", encoding="utf-8")
    target = out / "guide.pdf"
    typst.compile(str(work / "main.typ"), output=str(target), ignore_system_fonts=True, timestamp=0)
    return target


# --- all ---


def build(out: Path, repository: str = "") -> dict[str, float]:
    """Build everything into a folder, and replace a guide that is there. Return the seconds that each part took.

    Raises ValueError if the folder holds anything else.
    """
    pages, chapters = [*book.other_guide_pages()[:1], *book.chapters(), *book.other_guide_pages()[1:]], book.chapters()
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / "page.js").exists()):
            raise ValueError(f"--out must be a new or empty folder, or one with a built guide, got {out}")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    seconds = {}

    def timed(name: str, work: Callable[[], Any]) -> None:
        start = time.perf_counter()
        work()
        seconds[name] = time.perf_counter() - start

    try:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            timed("HTML", lambda: build_html(out, pages, book.documents(), pool))
            timed("PDF", lambda: build_pdf(out, [page for page in pages if page.name != "index"], pool))
        timed("notebooks", lambda: notebooks.write(out / "notebooks", chapters, repository))
    finally:
        shutil.rmtree(ROOT / "build/guide-sources" / str(os.getpid()), ignore_errors=True)
    return seconds


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the guide from docs/guide into build/guide.")
    parser.add_argument("--out", type=Path, default=ROOT / "build/guide", help="folder to write, default build/guide")
    parser.add_argument("--update", nargs="*", type=Path, metavar="FILE", help="fill marks of these chapters, or all")
    parser.add_argument("--check", nargs="*", type=Path, metavar="FILE", help="check these chapters, or all")
    parser.add_argument("--repository", default="", help="address from which the notebooks install the package")
    options = parser.parse_args(args)
    chosen = [path.resolve() for path in options.update or options.check or []]
    pages = [page for page in book.chapters() if not chosen or page.path in chosen]
    try:
        if unknown := set(chosen) - {page.path for page in pages}:
            raise ValueError(f"FILE must be a chapter of {book.GUIDE}, got {min(unknown)}")
        if options.update is not None:
            changed, found = update(pages)
            print("\n".join([*(f"updated  {name}" for name in changed), *found]) or "nothing to update")
            return 1 if found else 0
        if options.check is not None:
            found = check(pages)
            print("\n".join(found) or "no problems")
            return 1 if found else 0
        seconds = build(options.out, options.repository)
        size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file()) / 1e6
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        print(f"{options.out}/index.html and guide.pdf: {parts}; {size:.1f} MB")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
