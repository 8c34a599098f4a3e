import subprocess
import sys
from pathlib import Path

import pytest
from shared import shared_folder

# The tools of the guide are programs beside the package, not a part of it.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs/tools"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return a folder with the tiny runs runs/d4 and runs/d4-chat, which nobody may change."""
    import small_commands

    def train(folder):
        for words in small_commands.PREPARATION:
            command = [small_commands.interpreter(words), *words]
            subprocess.run(command, cwd=folder, env=small_commands.environment({}), check=True, capture_output=True)

    return shared_folder(tmp_path_factory, "guide-trained", train)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Return a folder with the guide as pages, PDF and notebooks, which nobody may change."""
    pytest.importorskip("pypandoc")
    pytest.importorskip("typst")
    import build

    return shared_folder(tmp_path_factory, "guide-built", build.build)
