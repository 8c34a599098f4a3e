"""The help of a command names the chapter of the guide that explains it."""

import importlib
import re

import pytest

from nanochat_native.exercises import CHAPTERS

EXPLAINED_IN = {
    "train": (1, 8),
    "finetune": (13,),
    "generate": (13,),
    "evaluate": (13,),
    "chat": (13,),
    "serve": (13,),
    "lr_find": (10,),
    "compare": (9, 10),
    "batch_size": (10,),
    "scaling": (10,),
    "schedules": (10,),
    "memory": (11,),
    "plot": (1,),
    "bench.__main__": (12,),
    "doctor": (12,),
}


@pytest.mark.parametrize("command", EXPLAINED_IN)
def test_help_names_the_chapter_of_the_guide(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        importlib.import_module(f"nanochat_native.{command}").main(["--help"])
    printed = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    paths = [f"docs/guide/{number:02d}-{CHAPTERS[number]}.md" for number in EXPLAINED_IN[command]]
    assert f"The guide explains it: {' and '.join(paths)}." in printed
