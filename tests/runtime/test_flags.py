"""Flags without a value: one rule for numbers, choices, texts and paths."""

import dataclasses

import pytest

from nanochat_native.runs.config import FinetuneConfig, TrainConfig
from nanochat_native.runtime.flags import UNSET, is_unset

MAY_BE_UNSET = {"depth": 5, "matrix_lr": 0.1, "normuon": "off", "device": "cpu", "run": "mine", "cache_dir": "cache"}


@pytest.mark.parametrize("name", MAY_BE_UNSET)
def test_a_flag_is_unset_until_it_has_a_value(name):
    assert is_unset(TrainConfig(), name)
    assert not is_unset(TrainConfig(**{name: MAY_BE_UNSET[name]}), name)


@pytest.mark.parametrize("name", ["head_dim", "grad_checkpoint", "optimizer", "data", "seed", "keep"])
def test_a_flag_with_a_fixed_default_is_never_unset(name):
    assert not is_unset(TrainConfig(), name)


def test_a_value_that_marks_another_kind_of_flag_is_a_value():
    """A run may be named "auto", and a flag with a fixed default may be -1 or None."""

    @dataclasses.dataclass
    class Options:
        offset: int = 0
        name: str | None = None

    assert not is_unset(Options(offset=UNSET), "offset")
    assert not is_unset(Options(name="auto"), "name")
    assert is_unset(Options(), "name")


def test_zero_is_a_value():
    assert not is_unset(TrainConfig(eval_every=0, save_every=0), "eval_every")
    assert is_unset(FinetuneConfig(), "batch_rows")
