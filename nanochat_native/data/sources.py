"""What to train on: the files behind `--data`."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import platform
import stat
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanochat_native.data.names import kind_of, refusal_of, shown, validates, words_of
from nanochat_native.data.shards import SHARD_FORMATS

# A charmap of `encodings` is 256 lines of one table; everything else there is shorter than this.
ENCODINGS_MAX_BYTES = 8192


@dataclass
class Skipped:
    """What was left out, by reason: how many, and where first."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, where: Path | str) -> None:
        count, first = self.reasons.get(reason, (0, shown(where)))
        self.reasons[reason] = (count + 1, first)

    def lines(self) -> list[str]:
        return [f"skipped: {count} {reason} (first: {where})" for reason, (count, where) in self.reasons.items()]


@dataclass(frozen=True)
class Source:
    """The files behind one `--data`, in a fixed order, and the name under which they are reported.

    Attributes:
        root: the folder that was given, or that a file or the wildcards of a glob lie in.
        is_tokens: whether the files are token shards (.bin) and not text.
        validates: of each token shard, whether it is for validation.
        notes: what was left out, and what was decided; one line each.
    """

    name: str
    files: tuple[Path, ...]
    root: Path
    is_tokens: bool = False
    validates: tuple[bool, ...] = ()
    notes: tuple[str, ...] = ()


def find_source(data: str | None, without: Path | None = None) -> Source:
    """Find the files of `data`: a file, a folder (searched to its depth, hidden names left out) or a glob; None is
    the standard library of the running Python.

    Links to folders are followed, into each real folder once; a file with several names is taken once. A folder or
    glob that holds token shards beside other files means the shards. Of several shards those validate whose path says
    so (names.validates); a single file is never told by its name. Files in the folder `without` are left out, unless
    `data` lies in it.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: `data` is empty, not a regular file, an archive, or holds nothing else.
    """
    if data is None:
        return _standard_library()
    if not data:
        raise ValueError("--data is empty; it takes a file, a folder or a glob")
    path = Path(os.path.expanduser(data))
    if path.is_file():
        refusal = refusal_of(path)
        if refusal is not None:
            raise ValueError(f"{shown(path)}: {refusal}")
        is_tokens = kind_of(path) == "tokens"
        return Source(shown(path.name), (path,), path.parent, is_tokens=is_tokens, validates=(False,) * is_tokens)
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"--data {shown(path)} is no regular file; data is read more than once: write it to a file first"
        )

    skipped = Skipped()
    if path.is_dir():
        root, found = path, _walk(path, skipped)
    else:
        root, found = _expand(path, skipped)
    cache = None if without is None else os.path.realpath(without)
    if cache is not None and not Path(os.path.realpath(path)).is_relative_to(cache):
        found = [p for p in found if not Path(os.path.realpath(p)).is_relative_to(cache)]
    files = _once_each(sorted(found), root)
    if not files:
        message = f"--data {shown(data)}: no file, no folder with files and no glob that matches"
        raise FileNotFoundError("; ".join([message, *skipped.lines()]))
    name = shown(path.resolve().name if path.is_dir() else path.name)
    named_twice = set(found) - set(files)
    if named_twice:
        skipped.reasons["more names of files that are read"] = (len(named_twice), shown(min(named_twice)))
    shards = [p for p in files if kind_of(p) == "tokens" and refusal_of(p) is None]
    if shards and (len(shards) == len(files) or any(_has_shard_magic(p) for p in shards)):
        for other in sorted(set(files) - set(shards)):
            skipped.add("files beside the token shards, which alone are read", other)
        sides = tuple(validates(p.relative_to(root)) for p in shards)
        notes = (*skipped.lines(), *_told(shards, sides))
        return Source(name, tuple(shards), root, is_tokens=True, validates=sides, notes=notes)
    texts = []
    for p in files:
        if refusal_of(p) is not None:
            skipped.add("archives or compressed files, to be unpacked first", p)
        elif p in shards:
            skipped.add(".bin files that are no token shards, such as nanoGPT's, which have no header", p)
        else:
            texts.append(p)
    if not texts:
        raise ValueError("; ".join([f"no text in {name}", *skipped.lines()]))
    return Source(name, tuple(texts), root, notes=(*skipped.lines(), *_named_for_validation(texts, root)))


def _told(shards: list[Path], sides: tuple[bool, ...]) -> list[str]:
    """What was decided about several shards."""
    held_out = [p for p, validates in zip(shards, sides, strict=True) if validates]
    if not held_out:
        return []
    return [
        f"shards by their names: {len(shards) - len(held_out)} train, {len(held_out)} validate ({_first(held_out)})"
    ]


def _named_for_validation(files: list[Path], root: Path) -> list[str]:
    named = [p for p in files if words_of(str(p.relative_to(root))) & {"val", "valid", "validation"}]
    if not named or len(named) == len(files):
        return []
    return [
        f"text is split by document, whatever the files are called: a part of those named for validation is trained on "
        f"({_first(named)}); a glob leaves them out"
    ]


def _first(paths: list[Path]) -> str:
    return shown(paths[0].name) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _walk(root: Path, skipped: Skipped) -> list[Path]:
    """Regular files below a folder. Links to folders come after all other folders, so that a real path is preferred.

    Raises OSError for a folder that cannot be read.
    """
    files: list[Path] = []
    entered: set[tuple[int, int]] = set()
    above = {_identity(os.stat(p)) for p in Path(os.path.realpath(root)).parents}
    folders = [root]
    links: list[Path] = []
    while folders or links:
        links.sort()
        linked = not folders
        here = links.pop(0) if linked else folders.pop()
        identity = _identity(os.stat(here))
        is_loop = linked and Path(os.path.realpath(here.parent)).is_relative_to(os.path.realpath(here))
        if is_loop or identity in entered or identity in above:
            if linked:
                skipped.add("links to a folder that is read anyway, or that lies above", here)
            continue
        entered.add(identity)
        for name in os.listdir(here):
            path = here / name
            if name.startswith("."):
                continue
            try:
                mode = os.stat(path).st_mode
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                skipped.add("links that lead to nothing", path)
                continue
            if stat.S_ISDIR(mode):
                (links if path.is_symlink() else folders).append(path)
            elif stat.S_ISREG(mode):
                files.append(path)
            else:
                skipped.add("FIFOs, sockets or devices", path)
    return files


def _expand(pattern: Path, skipped: Skipped) -> tuple[Path, list[Path]]:
    """The folder before a glob's first wildcard, and the files that match. Below `**` a link is followed as in a
    folder, where the glob module would follow a loop of several links without end."""
    literal = pattern.parts
    for i, part in enumerate(pattern.parts):
        if glob.has_magic(part):
            literal = pattern.parts[:i]
            break
    if "**" in pattern.parts:
        at = pattern.parts.index("**")
        folders = [Path(p) for p in glob.glob(str(Path(*pattern.parts[:at])))] if at else [Path()]
        below = [(folder, p) for folder in folders if folder.is_dir() for p in _walk(folder, skipped)]
        found = {p for folder, p in below if _matches(p.relative_to(folder).parts, pattern.parts[at:])}
        return Path(*literal), list(found)
    matches = [Path(p) for p in glob.glob(str(pattern))]
    files = [p for p in matches if p.is_file()]
    entered = {folder for p in files for folder in p.parents}
    for p in sorted(set(matches) - set(files)):
        if not p.exists():
            skipped.add("links that lead to nothing", p)
        elif not p.is_dir():
            skipped.add("FIFOs, sockets or devices", p)
        elif p not in entered:
            skipped.add("folders that the glob matches, whose files it does not match", p)
    return Path(*literal), files


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path, in parts, matches a glob, in which ** stands for any number of parts."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _once_each(paths: Iterable[Path], root: Path) -> list[Path]:
    """The paths without further names of one and the same file; names of another kind or side are others."""
    seen: dict[tuple[object, ...], Path] = {}
    for path in paths:
        kind = kind_of(path)
        key = (*_identity(os.stat(path)), kind, kind == "tokens" and validates(path.relative_to(root)))
        seen.setdefault(key, path)
    return list(seen.values())


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _standard_library() -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        size = path.stat().st_size
        if size == 0 or left_out.intersection(parts) or (parts[0] == "encodings" and size > ENCODINGS_MAX_BYTES):
            continue
        files.append(path)
    if not files:
        raise FileNotFoundError(f"this Python has no standard library sources in {root}: give --data")
    return Source(f"stdlib {platform.python_version()}", tuple(files), root)


def _has_shard_magic(path: Path) -> bool:
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little") in {magic for magic, _ in SHARD_FORMATS}
