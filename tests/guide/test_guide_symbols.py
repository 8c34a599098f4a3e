"""Appendix B: the generated part is that of the docstrings and the model, and the glossary is complete and in order."""

import re
from collections.abc import Sequence

import pytest
from chapters import chapter_b
from torch import Tensor

from nanochat_native import ops

TEXT = chapter_b.PAGE.read_text(encoding="utf-8")


def glossary():
    section = TEXT.partition("## B.2")[2].partition("## B.3")[0]
    return re.findall(r"^\| ([^|]+) \| ([^|]+) \| \[\d+\]\(([^)]+)\) \|$", section, re.M)


def test_the_generated_part_is_current():
    assert chapter_b.current(TEXT) == chapter_b.generated(), "run python docs/tools/chapters/chapter_b.py"


def test_every_operator_has_an_entry():
    found = re.findall(r"^- \*\*`(\w+)`\*\*", chapter_b.current(TEXT), re.M)
    assert tuple(found) == ops.OPERATORS


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="must contain <!-- generated -->"):
        chapter_b.current("no marks")


def test_the_glossary_is_in_alphabetical_order_with_one_sentence_each():
    terms = [term for term, _, _ in glossary()]
    assert len(terms) > 60
    assert terms == sorted(terms, key=lambda term: term.lower().replace("-", " "))
    for term, meaning, file in glossary():
        assert meaning.endswith("."), term
        assert re.match(r"\d\d-[\w-]+\.md$", file), term


def test_shapes_are_read_from_docstrings():
    def operator(q: Tensor, k: Tensor, v: Tensor, lists: Sequence[Tensor], like: Tensor, flag: bool) -> None:
        """Return nothing.

        Args:
            q: (B, T). And more.
            k, v: (B, (T, 2)) with q's dtype.
            lists: Contiguous tensors.
            like: The shape of q.
            flag: Not a tensor.
        """

    def anything(x: Tensor, scale: float | Tensor) -> None:
        """Return nothing.

        Args:
            x: Any shape.
            scale: A number.
        """

    assert chapter_b.shapes_of(operator) == "q `(B, T)`, k, v `(B, (T, 2))`, lists (lists)"
    assert chapter_b.shapes_of(anything) == "x `(...)`"
