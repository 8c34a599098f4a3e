"""The guide is built: pages, PDF and notebooks, without network."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import book
import pytest
import small_commands

import build

pytest.importorskip("pypandoc")
pytest.importorskip("typst")


@pytest.mark.slow
def test_every_page_is_built_and_needs_no_network(built):
    names = {path.stem for path in built.glob("*.html")}
    assert names == {page.name for page in [*book.chapters(), *book.other_guide_pages(), *book.documents()]}
    for path in built.glob("*.html"):
        text = path.read_text()
        for target in re.findall(r'(?:src|href)="([^"#]+)', text):
            assert target.startswith(("https://", "data:")) or (built / target).exists(), f"{path.name}: {target}"
        assert not re.search(r'(?:src|<link[^>]*href)="(?:https?:)?//', text)
        ids = re.findall(r'\sid="([^"]+)"', text)
        assert sorted({i for i in ids if ids.count(i) > 1}) == []
        for anchor in re.findall(r'href="#([^"]+)"', text):
            assert anchor in ids, f"{path.name}: #{anchor}"
        assert "$" not in re.sub(r"<(pre|code|script|annotation)\b.*?</\1>", "", text, flags=re.DOTALL), path.name


@pytest.mark.slow
def test_the_search_index_has_every_section(built):
    index = json.loads((built / "search.js").read_text().removeprefix("window.SEARCH = ").rstrip(";\n"))
    for page in book.chapters():
        headings = re.findall(r"^## (.*)$", re.sub(r"^```.*?^```", "", page.text, flags=re.DOTALL | re.M), re.M)
        assert len([entry for entry in index if entry["page"] == page.name]) >= len(headings)


@pytest.mark.slow
def test_the_pdf_has_every_chapter_and_section_in_its_outline(built):
    pypdf = pytest.importorskip("pypdf")
    reader = pypdf.PdfReader(built / "guide.pdf")

    def titles(entries):
        for entry in entries:
            yield from titles(entry) if isinstance(entry, list) else [str(entry.title)]

    outline = [re.sub(r"\W", "", title) for title in titles(reader.outline)]
    for page in book.chapters():
        text = re.sub(r"^```.*?^```", "", page.text, flags=re.DOTALL | re.M)
        for heading in re.findall(r"^##? (.*)$", text, re.M):
            assert re.sub(r"\W", "", heading.replace("`", "")) in outline, heading
    words = "".join(page.extract_text() for page in reader.pages)
    assert "??" not in words
    assert len(reader.pages) > 100
    fonts = [font for page in reader.pages for font in page["/Resources"].get("/Font", {}).values()]
    assert fonts
    for font in fonts:
        kinds = font.get_object()["/DescendantFonts"][0].get_object()["/FontDescriptor"].get_object()
        assert {"/FontFile2", "/FontFile3"} & set(kinds), "a font is not embedded"


@pytest.mark.slow
def test_a_second_build_has_the_same_bytes(built, tmp_path):
    build.build(tmp_path / "out")
    for path in sorted(built.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(built)).read_bytes(), path.name


@pytest.mark.parametrize("option", ["--check", "--update"])
def test_a_file_that_is_no_chapter_is_one_line(option, capsys):
    assert build.main([option, "docs/guide/no-such-chapter.md"]) == 2
    assert re.fullmatch(r"error: FILE must be a chapter of .*, got .*/no-such-chapter.md\n", capsys.readouterr().err)


def test_an_unknown_result_is_one_line():
    command = [sys.executable, str(book.ROOT / "docs/tools/measure.py"), "no-such-result"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert re.fullmatch(r"error: a result must be one of .*, got no-such-result\n", result.stderr)


def test_a_folder_with_other_files_is_kept(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    assert build.main(["--out", str(tmp_path)]) == 2
    assert build.main(["--out", str(tmp_path / "mine.txt")]) == 2
    assert (tmp_path / "mine.txt").read_text() == "kept"
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.count("error: --out must be a new or empty folder")) == ("", 2, 2)


@pytest.mark.slow
def test_notebooks_are_valid_and_begin_with_the_installation(built):
    nbformat = pytest.importorskip("nbformat")
    paths = sorted((built / "notebooks").glob("*.ipynb"))
    assert len(paths) == len(book.chapters())
    for path in paths:
        found = nbformat.read(path, as_version=4)
        nbformat.validate(found)
        assert "nanochat_native" in found.cells[0].source
        assert found.cells[0].cell_type == "code"
        code = "\n".join(cell.source for cell in found.cells if cell.cell_type == "code")
        prose = "\n".join(cell.source for cell in found.cells if cell.cell_type == "markdown")
        assert "<!--" not in prose
        assert "](figures/" not in prose
        has_commands = "```sh" in book.GUIDE.joinpath(f"{path.stem}.md").read_text()
        assert bool(re.search(r"^!", code, re.M)) >= has_commands


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in book.chapters() if page.number.isdigit()], ids=lambda page: page.number
)
def test_notebooks_run(page, trained, tmp_path):
    """With the commands at a small size, as test_guide_commands.py runs those of the other pages."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    import notebooks

    found = nbformat.from_dict(notebooks.notebook(page, ""))
    for cell in found.cells:
        if cell.cell_type == "code":
            cell.source = "\n".join(map(small_cell_line, cell.source.splitlines()))
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(found, timeout=600, kernel_name="python3", resources=resources).execute()
    cells = [cell for cell in found.cells if "guide check" not in cell.source]
    failed = re.compile(r"error:|Traceback|command not found")
    assert [cell.source for cell in cells if failed.search(str(cell.get("outputs", "")))] == []


def small_cell_line(line):
    """Return a line of a cell with its command at a small size. It prints "error:" if its exit code is not 0. A command
    that is not run becomes a comment."""
    if not line.startswith("!"):
        return line
    small = small_commands.small(line[1:])
    if small is None:
        return f"# {line}"
    variables, words = small
    settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    command = [*settings, shlex.quote(small_commands.interpreter(words)), *map(shlex.quote, words)]
    return f"!{' '.join(command)} || echo error: it failed"
