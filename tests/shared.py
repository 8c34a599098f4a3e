"""Folders that are filled once in a run of the tests, whatever the number of its processes."""

import fcntl
import os
import shutil


def shared_folder(factory, name, fill):
    """Return the folder `name`, which `fill(folder)` has filled in one of the processes of pytest-xdist.

    Args:
        factory: the fixture tmp_path_factory.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, unfinished = root / name, root / f"{name}.new"
    with open(root / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            fill(unfinished)
            unfinished.rename(folder)
    return folder
