"""The kinds of exercises: numbers that readers type, functions that they write, results of experiments."""

import json
import math

import numpy as np
import pytest
import torch

from nanochat_native import exercises
from nanochat_native.exercises import Experiment, Number, Verdict, Write
from nanochat_native.exercises.values import describe, difference

BYTES = Number("4.9", "Bytes", answer=lambda: 3.2e6, unit="MB", mistakes={"in bits": lambda: 8 * 3.2e6})


# --- numbers ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3.1e6", 3.1e6),
        ("3_100_000", 3.1e6),
        ("3,100,000", 3.1e6),
        ("3.1M", 3.1e6),
        ("3.1 M", 3.1e6),
        ("50%", 0.5),
        ("2k", 2000),
        ("2Ki", 2048),
        ("1/3", 1 / 3),
        ("-7", -7),
        ("3.1 MB", 3.1),
        (" 12 ", 12),
    ],
)
def test_number_is_read(text, value):
    assert BYTES.parse(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "much", "nan", "inf", "1e999", "3.1X", "1/0", "1,2", "%", "1e6e6", "--", "1//2"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match=r"exercise 4\.9 takes a (finite )?number") as caught:
        BYTES.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (3.2e6, Verdict(True, "3,200,000 MB")),
        (3.203e6, Verdict(True, "3,200,000 MB")),
        (2.56e7, Verdict(False, "in bits")),
        (6.4e6, Verdict(False, "too large by a factor of 2")),
        (3.2e3, Verdict(False, "too small by a factor of 1000")),
        (-3.2e6, Verdict(False, "the sign is wrong")),
        (0, Verdict(False, "0 is off by 3.2e+06 MB")),
    ],
)
def test_number_is_judged(value, verdict):
    assert BYTES.check(value) == verdict


def test_answer_of_zero_has_an_absolute_tolerance():
    zero = Number("4.8", "Zero", answer=lambda: 0.0)
    assert zero.check(0.009).right
    assert zero.check(0.02) == (False, "0.02 is off by 0.02")


# --- values ---


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (1, 1),
        (1, 1.0),
        (torch.tensor(2.0), 2.0),
        (np.float64(2), 2.0),
        (math.nan, math.nan),
        (True, True),
        ("a", "a"),
        (None, None),
        ([1, (2, 3)], (1, [2, 3])),
        ({"a": [1.0]}, {"a": [1.0 + 1e-6]}),
        (np.ones(3), torch.ones(3, dtype=torch.float64)),
        (torch.tensor([1.0, math.nan, math.inf]), torch.tensor([1.0, math.nan, math.inf])),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
        (torch.tensor([1e-9, 1.0]), torch.tensor([0.0, 1.0])),
        (torch.tensor([True]), torch.tensor([True])),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
        (torch.tensor([1j]), torch.tensor([1j])),
    ],
)
def test_equal_values_do_not_differ(found, right):
    assert difference(found, right, 1e-4) == ""


@pytest.mark.parametrize(
    ("found", "right", "text"),
    [
        (1, 2, "1 where 2 is right"),
        (1.1, 1.0, "1.1 where 1 is right"),
        (100001, 100000, "100001 where 100000 is right"),
        ("a", "b", "'a' where 'b' is right"),
        (None, 1.5, "None where 1.5 is right"),
        (math.nan, 1.5, "nan where 1.5 is right"),
        (1.5, -math.inf, "1.5 where -inf is right"),
        ([1], [1, 2], "1 values where 2 are right"),
        ([1, 3], [1, 2], "at [1]: 3 where 2 is right"),
        ({"a": 1}, {"b": 1}, "keys ['a'] where ['b'] are right"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "at ['a'][1]: 2 where 3 is right"),
        ([1.0], torch.ones(1), "[1.0] where (1,) is right"),
        (torch.ones(2, 3), torch.ones(3, 2), "the shape is (2, 3) where (3, 2) is right"),
        (torch.ones(2), torch.ones(2).double(), "the dtype is float32 where float64 is right"),
        (
            torch.tensor([[1.0, 2.0], [3.0, 4.5]]),
            torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            "the largest difference is 0.5 at [1, 1]: 4.5 where 4 is right",
        ),
        (torch.tensor([math.nan]), torch.ones(1), "the largest difference is inf at [0]: nan where 1 is right"),
        (torch.tensor([3]), torch.tensor([4]), "the largest difference is 1 at [0]: 3 where 4 is right"),
        ((1, torch.zeros(1)), (1, torch.ones(1)), "the largest difference is 1 at [1][0]: 0 where 1 is right"),
    ],
)
def test_difference_is_described(found, right, text):
    assert difference(found, right, 1e-4) == text


def test_a_wrong_dtype_is_ignored_on_request():
    assert difference(torch.ones(2), torch.ones(2).double(), 1e-4, dtypes=False) == ""


def test_descriptions_are_short():
    assert describe(torch.ones(2, 3)) == "(2, 3)"
    assert describe("x" * 99) == "a str of 101 characters"
    assert describe("a\nb") == "'a\\nb'"


# --- functions ---


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


def refuse(x):
    raise ValueError("no")


DOUBLE = Write(
    "4.7",
    "Twice a tensor",
    "def helper():\n    pass\n\n\ndef double(x):\n    raise NotImplementedError\n",
    double,
    {"it is three times x": triple, "it refuses": refuse},
    lambda: [(torch.arange(3.0),), (torch.ones(2, 2),)],
)


def test_function_of_the_stub_is_the_last_one():
    assert DOUBLE.function == "double"


def test_function_is_judged():
    def unwritten(x):
        raise NotImplementedError

    def in_place(x):
        return x.mul_(2)

    def wide(x):
        return 2 * x.double()

    def wide_and_wrong(x):
        return 3 * x.double()

    def one_input_only(x):
        return 2 * x if x.ndim == 1 else x

    def fails(x):
        return x[7] * 2

    assert DOUBLE.check(double) == (True, "double is right on 2 inputs")
    assert DOUBLE.check(in_place).right
    assert DOUBLE.check(triple) == (False, "it is three times x")
    assert DOUBLE.check(refuse) == (False, "it refuses")
    assert DOUBLE.check(wide_and_wrong) == (False, "it is three times x")
    assert DOUBLE.check(unwritten) == (False, "double is not written yet: it raises NotImplementedError")
    text = "the values are right, but the dtype is float64 where float32 is right (input 1 of 2: x (3,))"
    assert DOUBLE.check(wide) == (False, text)
    text = "the largest difference is 1 at [0, 0]: 1 where 2 is right (input 2 of 2: x (2, 2))"
    assert DOUBLE.check(one_input_only) == (False, text)
    right, text = DOUBLE.check(fails, lambda error: f"seen: {type(error).__name__}")
    assert (right, text) == (False, "seen: IndexError (input 1 of 2: x (3,))")


def test_calls_are_seeded_and_inputs_are_not_shared():
    def right(x):
        x.append(2.0)
        return torch.rand(3) + x[0]

    draw = Write("4.6", "Draw", "def draw(x): ...", lambda x: torch.rand(3) + x[0], {}, lambda: [([1.0],), ([1.0],)])
    assert draw.check(right).right


# --- experiments ---


@pytest.fixture
def experiment(tmp_path):
    def judge(result):
        return result["best"] == "b", f"the best is {result['best']}"

    return Experiment("4.5", "Best", "python -m nanochat_native.compare", str(tmp_path / "lab"), judge)


def test_experiment_is_judged_by_its_result(experiment, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lab/result\.json does not exist; this writes it: python -m"):
        experiment.check()
    (tmp_path / "lab").mkdir()
    for result, verdict in (({"best": "b"}, (True, "the best is b")), ({"best": "a"}, (False, "the best is a"))):
        (tmp_path / "lab/result.json").write_text(json.dumps(result))
        assert experiment.check() == verdict
    for text in ("{}", "[]", "no json", ""):
        (tmp_path / "lab/result.json").write_text(text)
        with pytest.raises(ValueError, match="is not the result of this command: python -m nanochat_native"):
            experiment.check()


# --- finding exercises ---


def test_exercises_are_found_by_their_id():
    assert 5 in exercises.chapters()
    assert exercises.find("5.4").title == "Causal attention"
    for id in ("5.99", "99.1", "5", "x", "5.4.1", ""):
        with pytest.raises(ValueError, match="exercise"):
            exercises.find(id)


def test_chapters_are_the_files_of_the_guide():
    assert list(exercises.CHAPTERS) == list(range(1, 14))


def test_results_hold_the_numbers():
    found = exercises.as_results()
    assert found["5_2"]["answer"] == exercises.find("5.2").answer()
    assert found["5_2"]["tolerance"] == exercises.find("5.2").tolerance
    assert found["5_2"]["unit"] == "pairs"
    assert len(found["5_2"]["mistakes"]) == 4
    assert "5_4" not in found
    assert json.loads(json.dumps(found)) == found
