"""Every exercise of the guide: right answers are right, and each known mistake is told apart from all others."""

import inspect
import json
import math
import shlex

import pytest

from nanochat_native import exercises
from nanochat_native.exercises import Experiment, Number, Write
from nanochat_native.exercises.reader import HEADER

ALL = [(chapter, exercise) for chapter in exercises.chapters() for exercise in exercises.of_chapter(chapter)]
BY_KIND = {
    kind: [pytest.param(exercise, id=exercise.id) for _, exercise in ALL if isinstance(exercise, kind)]
    for kind in (Number, Write, Experiment)
}


def function_of(exercise):
    """Return the function of an exercise's stub."""
    names = {}
    exec(HEADER + exercise.stub, names)
    return names[exercise.function]


def test_ids_are_unique_and_belong_to_their_chapters():
    ids = [exercise.id for _, exercise in ALL]
    assert len(ids) == len(set(ids))
    for chapter, exercise in ALL:
        assert exercise.id.split(".")[0] == str(chapter)
        assert exercise.title
        assert not exercise.title.endswith(".")
        assert "\n" not in exercise.title


def test_functions_of_a_chapter_have_different_names():
    for chapter in exercises.chapters():
        names = [exercise.function for exercise in exercises.of_chapter(chapter) if isinstance(exercise, Write)]
        assert len(names) == len(set(names))


# --- numbers ---


@pytest.mark.parametrize("exercise", BY_KIND[Number])
def test_answer_is_a_finite_number_that_is_right(exercise):
    answer = exercise.answer()
    assert math.isfinite(answer)
    assert type(answer) in (int, float), "JSON and the text need Python's numbers"
    assert exercise.check(answer).right
    assert exercise.check(exercise.parse(repr(answer))).right


@pytest.mark.parametrize("exercise", BY_KIND[Number])
def test_mistakes_are_told_apart_from_the_answer_and_from_each_other(exercise):
    assert exercise.mistakes, "name at least one known mistake"
    for text, mistake in exercise.mistakes.items():
        assert type(mistake()) in (int, float)
        assert exercise.check(mistake()) == (False, text)


# --- functions ---


@pytest.mark.parametrize("exercise", BY_KIND[Write])
def test_right_function_is_right(exercise):
    assert exercise.check(exercise.right) == (
        True,
        f"{exercise.function} is right on {len(exercise.inputs())} input{'s' * (len(exercise.inputs()) > 1)}",
    )


@pytest.mark.parametrize("exercise", BY_KIND[Write])
def test_wrong_functions_are_told_apart(exercise):
    assert len(exercise.wrong) >= 2
    for text, version in exercise.wrong.items():
        assert exercise.check(version) == (False, text)


@pytest.mark.parametrize("exercise", BY_KIND[Write])
def test_unchanged_stub_is_not_done(exercise):
    stub = function_of(exercise)
    right, text = exercise.check(stub)
    assert not right
    unwritten = text == f"{exercise.function} is not written yet: it raises NotImplementedError"
    assert unwritten or text in exercise.wrong, "a stub with a bug must be one of the wrong functions"
    assert list(inspect.signature(stub).parameters) == list(inspect.signature(exercise.right).parameters)


# --- experiments ---


@pytest.mark.parametrize("exercise", BY_KIND[Experiment])
def test_experiment_names_its_command_and_folder(exercise, tmp_path, monkeypatch):
    words = shlex.split(exercise.command)
    assert words[:2] == ["python", "-m"]
    assert words[2].startswith("nanochat_native.")
    assert exercise.folder.startswith("lab/")
    assert exercise.folder in words
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        exercise.check()
    folder = tmp_path / exercise.folder
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="is not the result of this command"):
        exercise.check()
