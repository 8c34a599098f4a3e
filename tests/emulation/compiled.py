"""Compiled files, kept in build/tests by the content of what they were compiled from.

So the processes of a test run, and the next runs, compile each file once. A file that no run has used for two weeks is
removed.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/tests"
UNUSED_SECONDS = 14 * 24 * 3600


def compiled(
    name: str, command: Sequence[str | Path], sources: Iterable[Path], make: Callable[[Path], None], include: Path
) -> Path:
    """Return the folder with the file `name`, and what else `make(folder)` has written; it is called if there is none.

    Args:
        command: the compiler and its flags, without paths that differ between equal compilations.
        sources: the files that are compiled; what they include by #include "..." counts too.
        include: where such a file is, unless it is beside the one that includes it.
    """
    digest = hashlib.sha256(repr((name, version(str(command[0])), [str(part) for part in command])).encode())
    for path in _with_includes(sources, include):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    _remove_unused()
    folder = FOLDER / digest.hexdigest()[:32]
    with _locked(folder.with_suffix(".lock")):
        if not folder.exists():
            unfinished = folder.with_suffix(".new")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
        os.utime(folder)
    return folder


@functools.cache
def version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _with_includes(sources: Iterable[Path], include: Path) -> list[Path]:
    """Return the files and all that they include of ours, in an order that their content decides."""
    found: dict[Path, None] = {}
    left = [path.resolve() for path in sources]
    while left:
        path = left.pop()
        if path in found:
            continue
        found[path] = None
        for name in _includes(path, path.stat().st_mtime_ns):
            places = (folder / name for folder in (path.parent, include))
            left += [place.resolve() for place in places if place.is_file()][:1]
    return list(found)


@functools.cache
def _includes(path: Path, _: int) -> list[str]:
    return re.findall(r'^\s*#\s*include "(.*)"', path.read_text(), re.MULTILINE)


@contextlib.contextmanager
def _locked(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _remove_unused() -> None:
    """Remove what is old, once in a process."""
    for folder in FOLDER.glob("*"):
        if folder.is_dir() and time.time() - folder.stat().st_mtime > UNUSED_SECONDS:
            with _locked(folder.with_suffix(".lock")):
                shutil.rmtree(folder, ignore_errors=True)
