"""The chapters obey their rules, and agree with the results, the sources and the package."""

import re

import book
import chapters
import checks
import pytest
from book import Page

import build

PAGES = {page.path.name: page for page in book.chapters()}
NUMBERS = [*map(str, range(1, 14)), "A", "B", "C"]
# What the guide has at least, over all chapters.
CLAIMS, FIGURES, EXERCISES, WORDS = 80, 45, 65, 30_000

VALID = """# 5. Attention

*How does a token look back?*

## 5.1 In a minute

See [Figure 5.1](#fig-5-1), [Claim 5.1](#claim-5-1) and [training](../training.md#resume).
<!--= a.share : .2f -->0.25<!--/-->

<a id="fig-5-1"></a>

![Figure 5.1. A caption.](figures/05-x.svg)

> [!IMPORTANT]
> <a id="claim-5-1"></a>
> **Claim 5.1.** The share is <!--= a.share : .2f -->0.25<!--/-->.
>
> *Shown by* `tests/guide/test_guide_chapters.py::test_a_valid_chapter_has_no_problem` and `make train`

<!--: output a -->
```text
one
```

$$x \\quad y$$

[a paper](https://arxiv.org/abs/1706.03762)

## 5.2 Exercises

<a id="exercise-5-1"></a>

**Exercise 5.1** (●●○) *Number.* How many?

`python -m nanochat_native.guide check 5.1 NUMBER`

<details>
<summary>Answer</summary>

<!--= exercises.5_1.answer -->7<!--/-->.

</details>
"""
RESULTS = {"a": {"share": 0.25, "output": "one\n"}, "exercises": {"5_1": {"answer": 7}}}


@pytest.fixture
def check(tmp_path):
    """Return what is wrong with the text of a chapter 5 in a folder like docs/guide."""
    (tmp_path / "docs/guide/figures").mkdir(parents=True)
    (tmp_path / "docs/guide/figures/05-x.svg").write_text("<svg/>")
    (tmp_path / "docs/training.md").write_text("# Training\n\n## Resume\n")
    path = tmp_path / "docs/guide/05-attention.md"

    def problems(text):
        path.write_text(text)
        return checks.problems(Page(path, "5"), RESULTS.__getitem__, {"5.1", "6.1"}, {"1706.03762": "x"})

    return problems


def test_a_valid_chapter_has_no_problem(check):
    assert check(VALID) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("# 5. Attention", "# Attention", "first line"),
        ("look back?*", "look back.*", "question"),
        ("## 5.2 Ex", "## 5.3 Ex", "sections must be numbered"),
        ("## 5.1 In", "## 5.1 $x$ in", "no formula"),
        ("**Claim 5.1.**", "**Claim 5.2.**", "claims must be numbered"),
        ('> <a id="claim-5-1"></a>\n', "", "no anchor"),
        ("The share is", "The share of 12 is", "numbers without a mark: 12"),
        ("-->0.25<!--/-->.", "-->0.26<!--/-->.", "the chapter says 0.26"),
        ("-->0.25<!--/-->\n", "-->0.26<!--/-->\n", "the chapter says 0.26"),
        ("-->0.25<!--/-->.", "-->0.25.", "not closed"),
        ("a.share : .2f -->0.25<!--/-->.", "a.none : .2f -->0.25<!--/-->.", "a.none"),
        ("```text\none", "```text\ntwo", "out of date"),
        ("<!--: output a -->\n", "<!--: output a -->\n\n", "no fence below"),
        ("*Shown by*", "See", "by what it is shown"),
        ("> [!IMPORTANT]\n", "> [!NOTE]\n", "must stand in a box of its own"),
        ("$$x", "| **Claim 5.2.** There are 12 |\n\n$$x", "must stand in a box of its own"),
        ("```text\none\n```", "```text\none\n```\n\n- In a list:\n  ```sh\n  make no\n  ```", "a fence must begin"),
        ("```text\none\n```", "```text\none\n```\n\n```bash\nmake no\n```", "got 'bash'"),
        ("::test_a_valid_chapter_has_no_problem", "::test_none", "has no test test_none"),
        ("::test_a_valid_chapter_has_no_problem", "::check", "has no test check"),
        ("`make train`", "`python docs/tools/measure.py nothing`", "no such result"),
        ("`make train`", "`make nothing`", "no such target"),
        ("`make train`", "`python -m nanochat_native.nothing`", "does not exist"),
        ("`make train`", "`python -m nanochat_native.demonstrate nothing`", "no such demonstration"),
        ("`make train`", "`tests/none.py`", "names no test"),
        ("`make train`", "`tests/none.py::test_none`", "does not exist"),
        ("$$x", "```sh\nmake train\n```\n\n```text\nloss 2\n```\n\n$$x", "output of a command needs a mark"),
        ("$$x", "```cpp\nint x;\n```\n\n$$x", "C++ needs a mark"),
        ("Figure 5.1. A", "Figure 5.2. A", "should be figure 5.1"),
        ("![Figure 5.1. A caption.]", "![A caption.]", "an image must be"),
        ("figures/05-x.svg", "figures/none.svg", "does not exist"),
        ('<a id="fig-5-1"></a>\n', "", "needs <a id"),
        ("[Figure 5.1](#fig-5-1), ", "", "does not refer to figure 5.1"),
        ("\\quad", "\\;", "use \\:"),
        ("1706.03762", "1706.03763", "not in REFERENCES"),
        ("training.md#resume", "training.md#nothing", "no anchor"),
        ("training.md#resume", "none.md", "no target"),
        ("#claim-5-1)", "#claim-5-9)", "no anchor"),
        ("(●●○)", "(●●)", "must begin with"),
        ("*Number.*", "*Riddle.*", "kind must be"),
        ("check 5.1", "check 5.2", "no command"),
        ("<summary>Answer</summary>", "<summary>Result</summary>", "no answer"),
        ("<!--= exercises.5_1.answer -->7<!--/-->", "7", "no number of docs/results/exercises.json"),
        ("exercise-5-1", "exercise-5-2", "must begin with"),
        ('<a id="exercise-5-1"></a>\n', "", "differ from the package's"),
        ('<a id="exercise-5-1"></a>', '<a id="fig-5-1"></a>\n\n<a id="exercise-5-1"></a>', "occurs twice"),
    ],
)
def test_problems_are_found(check, old, new, problem):
    assert VALID.count(old) >= 1
    assert problem in "\n".join(check(VALID.replace(old, new, 1)))


def test_the_guide_is_complete():
    assert [page.number for page in book.chapters()] == NUMBERS
    text = "\n".join(page.text for page in book.chapters())
    assert len(re.findall(r"^> \*\*Claim ", text, re.M)) >= CLAIMS
    assert len(re.findall(r"^!\[Figure ", text, re.M)) >= FIGURES
    assert len(re.findall(r"^\*\*Exercise ", text, re.M)) >= EXERCISES
    assert len(re.sub(r"```.*?```|<!--.*?-->", " ", text, flags=re.DOTALL).split()) >= WORDS


@pytest.mark.parametrize("name", PAGES)
def test_a_chapter_has_no_problem(name):
    assert build.check([PAGES[name]]) == []


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if page.number.isdigit()])
def test_a_chapter_has_all_its_parts(name):
    text = PAGES[name].text
    assert len(re.findall(r"^> \*\*Claim ", text, re.M)) >= 4
    assert len(re.findall(r"^!\[Figure ", text, re.M)) >= 3
    assert len(re.findall(r"^\*\*Exercise ", text, re.M)) >= 5
    assert "**Trap.**" in text
    assert "```sh\n" in text
    assert "<!--: code " in text


def test_generated_pages_are_up_to_date():
    assert build.references_page() == (book.GUIDE / "references.md").read_text()
    assert build.landing_page() == (book.GUIDE / "README.md").read_text()
    stored = (chapters.RESULTS_FOLDER / "exercises.json").read_text()
    assert chapters.to_text(build.packaged_answers()) == stored


def test_every_declared_paper_is_cited():
    text = "\n".join(page.text for page in book.chapters())
    assert [key for key in chapters.merged("references") if f"arxiv.org/abs/{key}" not in text] == []


def test_every_result_and_figure_is_declared_and_used():
    results = set(chapters.merged("results"))
    stored = {path.stem for path in chapters.RESULTS_FOLDER.glob("*.json")}
    assert stored == results | {"exercises"}
    text = "\n".join(page.text for page in book.chapters())
    cited = set(re.findall(r"<!--= .*?-->|<!--: output .*?-->", text, re.DOTALL))
    words = set(re.findall(r"\w+", " ".join(cited)))
    drawn = {name for figure in chapters.merged("figures").values() for name in figure.results}
    widgets = {name for name in results if name.startswith("widget_")}
    assert results - words - drawn - widgets == set()
    shown = set(re.findall(r"\]\(figures/([\w-]+)\.svg\)", text))
    assert shown == set(chapters.merged("figures")) == {path.stem for path in chapters.FIGURES_FOLDER.glob("*.svg")}
