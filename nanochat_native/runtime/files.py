"""Files that appear whole or not at all, locks of folders, and hashes."""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Replace the file at `path`, so that it holds either its old content or all of the new one, even after a crash.

    The content goes into a temporary file in the same folder. That file is flushed to the disk and then renamed. A
    process that is killed before the rename leaves it behind; `is_temporary` recognizes it. A symbolic link at `path`
    is replaced, not followed.

    Args:
        content: bytes, text to encode as UTF-8, or a function that writes to the open file that it is given.

    Raises:
        OSError: The file cannot be written; the error names `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        try:
            fsync(path.parent)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
                raise
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Return whether `path` is named as a temporary file of `write_atomically`."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def visible(folder: Path) -> list[str]:
    """Return the sorted names in a folder, without the hidden files that systems and killed writes leave in it."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def listed(names: Sequence[str]) -> str:
    """Return names as text, at most three of them."""
    return ", ".join([*names[:3], *["..."] * (len(names) > 3)])


def temporaries_of(path: Path) -> list[Path]:
    """Return the files that killed calls of `write_atomically` for `path` have left behind."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    return [other for other in path.parent.iterdir() if name.fullmatch(other.name)]


def lock_folder(folder: Path) -> int:
    """Create a folder and lock it against other processes. Return the descriptor that holds the lock.

    Closing the descriptor, or the end of the process, releases the lock.

    Raises:
        BlockingIOError: Another process has the lock.
        OSError: The folder cannot be made or locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(content: Any) -> str:
    """Return the SHA-256 of a value as JSON with sorted keys, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
