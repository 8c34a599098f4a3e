"""The parts of the guide: its chapters in order, and what a chapter contains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import marks

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs/guide"
TITLE = "Training a small language model, claim by claim"


@dataclass(frozen=True)
class Page:
    """A Markdown file of the guide or of the other documentation.

    Attributes:
        path: the file.
        number: "1" to "13" and "A" to "C" for chapters, empty for other pages.
    """

    path: Path
    number: str = ""

    @property
    def name(self) -> str:
        """Name of its HTML file, without the ending."""
        return "index" if self.path == GUIDE / "README.md" else self.path.stem

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def title(self) -> str:
        """Its first heading."""
        return self.text.splitlines()[0].lstrip("# ").strip()

    @property
    def question(self) -> str:
        """The sentence in italics below the title, the question of a chapter; empty if there is none."""
        line = (self.text.splitlines() + [""] * 3)[2]
        return line.strip("*") if re.fullmatch(r"\*[^*]+\*", line) else ""

    @property
    def minutes(self) -> int:
        """Time to read the text without code and output, at 120 words a minute."""
        prose = re.sub(r"<[^>]*>", " ", marks.without_fences(marks.plain(self.text)))
        return max(1, round(len(prose.split()) / 120))


def chapters() -> list[Page]:
    """Return the chapters that exist, in order."""
    found = [Page(path, str(int(path.name[:2]))) for path in sorted(GUIDE.glob("[0-9][0-9]-*.md"))]
    return found + [Page(path, path.name[0].upper()) for path in sorted(GUIDE.glob("[a-z]-*.md"))]


def other_guide_pages() -> list[Page]:
    """Return the landing page and the list of references, where they exist."""
    return [Page(path) for name in ("README", "references") if (path := GUIDE / f"{name}.md").exists()]


def documents() -> list[Page]:
    """Return the other documentation in docs/."""
    return [Page(path) for path in sorted((ROOT / "docs").glob("*.md"))]


def anchors(text: str) -> list[str]:
    """Return the anchors of a page, as GitHub has them: of its headings, and those that are set with <a id>."""
    outside = marks.without_fences(marks.plain(text))
    headings = re.findall(r"^#+ (.*)", outside, re.M)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return slugs + re.findall(r'<a id="([^"]+)">', outside)


def links(text: str) -> list[str]:
    """Return the targets of the links of a page, without those of images."""
    outside = re.sub(r"`[^`\n]*`", "", marks.without_fences(text))
    return re.findall(r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)", outside)
