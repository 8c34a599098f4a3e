"""Appendix A: each row of its tables has an id and names commands or tests that exist."""

import re

import checks
import pytest

PAGE = checks.ROOT / "docs/guide/a-original-guide.md"
ROWS = re.findall(r'^\| <a id="(\w+)"></a>(\w+) \| (.+) \| (.+) \| (.+) \|$', PAGE.read_text(encoding="utf-8"), re.M)
COUNTS = {"M": 11, "A": 9, "O": 14, "P": 17, "T": 23, "E": 8, "B": 9}


def test_the_rows_are_numbered():
    assert [label for _, label, *_ in ROWS] == [
        f"{letter}{number}" for letter, count in COUNTS.items() for number in range(1, count + 1)
    ]
    assert all(anchor == label.lower() for anchor, label, *_ in ROWS)


@pytest.mark.parametrize(("label", "evidence"), [(label, evidence) for _, label, _, _, evidence in ROWS])
def test_a_row_is_shown_by_what_exists(label, evidence):
    spans = re.findall(r"`([^`]+)`", evidence)
    assert spans
    assert [problem for span in spans if (problem := checks.evidence_problem(span))] == []
