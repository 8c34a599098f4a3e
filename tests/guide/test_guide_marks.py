"""Marks of the chapters: numbers, quoted code, printed output, claims."""

import marks
import pytest

RESULTS = {"a": {"list": [1, 2.5, {"count": 7}], "cpu": "EPYC", "output": "one\ntwo\nthree\n", "share": 0.25}}


def load(name):
    return RESULTS[name]


@pytest.mark.parametrize(
    ("mark", "text"),
    [
        ("a.cpu", "EPYC"),
        ("a.list.1 : .2f", "2.50"),
        ("a.list.2.count / a.list.1 * 2**2 : .1f", "11.2"),
        ("a.list.2.count * 1000 : ,d", "7,000"),
        ("a.share : .0%", "25%"),
        ("-a.share : .2f", "-0.25"),
        ("a.share / 1e-3 : .0f", "250"),
    ],
)
def test_numbers_come_from_results(mark, text):
    assert marks.number_text(mark, load) == text
    filled = marks.fill(f"x <!--= {mark} -->old<!--/--> y", load)
    assert filled == (f"x <!--= {mark} -->{text}<!--/--> y", [])


@pytest.mark.parametrize(
    "mark",
    [
        "b.cpu",
        "a.no",
        "a.list.9",
        "a.list",
        "a.cpu * 2",
        "a.cpu : .2f",
        "a.share if 1",
        "a.share + (",
        "a.share()",
        "a.share / 0",
        "17",
        "2 * 8.5 : .0f",
    ],
)
def test_marks_without_a_number_are_refused(mark):
    with pytest.raises(marks.MarkError):
        marks.number_text(mark, load)
    text = f"<!--= {mark} -->old<!--/--> <!--= a.cpu -->old<!--/-->"
    filled, problems = marks.fill(text, load)
    assert filled == text.replace("a.cpu -->old", "a.cpu -->EPYC")
    assert len(problems) == 1


def test_output_is_quoted_by_lines():
    text = "<!--: output a 2-3 -->\n```text\nold\n```\n"
    assert marks.fill(text, load) == ("<!--: output a 2-3 -->\n```text\ntwo\nthree\n```\n", [])
    assert marks.fence_text("output a", load) == RESULTS["a"]["output"]
    for wrong in ("output b", "output a 2-9", "output a.b", "picture a"):
        with pytest.raises(marks.MarkError):
            marks.fence_text(wrong, load)


def test_python_is_quoted_by_name_without_its_docstring():
    text = marks.fence_text("code nanochat_native/model/gpt.py GPT.num_params", load)
    assert (
        text == "def num_params(self) -> int:\n    return sum(parameter.numel() for parameter in self.parameters())\n"
    )
    text = marks.fence_text("code nanochat_native/model/gpt.py Block", load)
    assert text.startswith("class Block(nn.Module):\n    def __init__(")
    assert '"""' not in marks.fence_text("code nanochat_native/model/gpt.py GPT.init_weights", load)
    for wrong in ("code nanochat_native/model/gpt.py Nothing", "code nanochat_native/no.py Block"):
        with pytest.raises(marks.MarkError):
            marks.fence_text(wrong, load)


def test_native_code_is_quoted_to_the_end_of_its_braces():
    text = marks.fence_text('code csrc/cpu/adamw.cpp "void adamw_typed("', load)
    assert text.startswith("void adamw_typed(const AdamW& a) {\n")
    assert text.rstrip().endswith("}")
    assert text.count("{") == text.count("}") > 1
    short = marks.fence_text('code csrc/cpu/adamw.cpp "void adamw_typed(" 3', load)
    assert text.startswith(short)
    assert len(short.splitlines()) == 3
    with pytest.raises(marks.MarkError):
        marks.fence_text('code csrc/cpu/adamw.cpp "no such text"', load)


def test_claims_are_found_by_number():
    text = '> [!IMPORTANT]\n> <a id="claim-5-1"></a>\n> **Claim 5.1.** A\n> b.\n>\n> *Shown by* `x`\n'
    text += "\nno\n\n> [!NOTE]\n> c\n"
    assert marks.claims(text) == {"5.1": '<a id="claim-5-1"></a>\n**Claim 5.1.** A\nb.\n\n*Shown by* `x`\n'}
    with pytest.raises(marks.MarkError, match="twice"):
        marks.claims(text + text)
    with pytest.raises(marks.MarkError, match="without a number"):
        marks.claims("> [!IMPORTANT]\n> A sentence.\n")


@pytest.mark.parametrize(
    ("text", "naked"),
    [
        ("a loss of 2.04 and 17 rows, 4x, 50%", ["2.04", "17", "4x", "50"]),
        ("<!--= a.share -->0.25<!--/--> of `17` rows, $x^{2}$, d4, float32, GPT-2, [x](b.md#c-3)", []),
        ("Claim 5.2, Figure 12.3, chapter 9, chapters 3 and 4, exercise 4.2, appendix A", []),
        ("<!--= a.share -->0.25<!--/--> against 3", ["3"]),
        ("**12** and [13 rows](b.md#c-3) and .5 are stable 14 times", ["12", "13", ".5", "14"]),
    ],
)
def test_naked_numbers_are_found(text, naked):
    assert marks.naked_numbers(text) == naked
