"""Finds the files behind `--data`."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import platform
import stat
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanochat_native.data.file_names import is_validation, kind_of, printable, refusal_of, words_of
from nanochat_native.data.shards import SHARD_FORMATS

# In the standard library's `encodings`, tables of 256 lines are longer than this, and other files are shorter.
ENCODINGS_MAX_BYTES = 8192


@dataclass
class Skipped:
    """Counts what was left out. `reasons` maps each reason to (count, place of the first)."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, where: Path | str) -> None:
        count, first = self.reasons.get(reason, (0, printable(where)))
        self.reasons[reason] = (count + 1, first)

    def notes(self) -> list[str]:
        """Return one line for each reason."""
        return [f"skipped: {count} {reason} (first: {where})" for reason, (count, where) in self.reasons.items()]


@dataclass(frozen=True)
class Source:
    """The files behind one `--data`, in a fixed order.

    Attributes:
        name: short name for messages and for folders in the cache.
        root: the folder that was given, or the one that contains the file or the wildcards of the glob.
        is_tokens: whether the files are token shards (.bin) instead of text.
        is_validation: for each token shard, whether it is for validation.
        notes: what was left out and what was decided; one line each.
    """

    name: str
    files: tuple[Path, ...]
    root: Path
    is_tokens: bool = False
    is_validation: tuple[bool, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the files below the root."""
        return tuple(str(path.relative_to(self.root)) for path in self.files)

    def only(self, paths: Sequence[str]) -> Source:
        """Return the source with the files of these paths alone, or as it is if it lacks one of them."""
        wanted = set(paths)
        kept = [i for i, path in enumerate(self.paths) if path in wanted]
        others = len(self.files) - len(kept)
        if len(kept) < len(wanted) or not others:
            return self
        return replace(
            self,
            files=tuple(self.files[i] for i in kept),
            is_validation=tuple(self.is_validation[i] for i in kept) if self.is_tokens else (),
            notes=(*self.notes, f"not read: {others} files that the run did not begin with"),
        )


def find_source(data: str | None, without: Path | None = None) -> Source:
    """Return the files of `data`.

    A folder is searched recursively, without hidden names. Symbolic links to folders are followed, but each real folder
    is read once, and so is a file with several names. If a folder or a glob has token shards beside other files, only
    the shards are read. If there are several shards, their paths tell which are for validation
    (file_names.is_validation); the name of a single file is not looked at.

    Args:
        data: A file, a folder or a glob; None is the standard library of the running Python.
        without: A folder whose files are left out, unless `data` is inside it.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: `data` is empty, is neither a regular file nor a folder, or has no file that can be read.
    """
    if data is None:
        return _standard_library()
    if not data:
        raise ValueError("--data must be a file, a folder or a glob, got ''")
    path = Path(os.path.expanduser(data))
    if path.is_file():
        refusal = refusal_of(path)
        if refusal is not None:
            raise ValueError(f"{printable(path)}: {refusal}")
        is_tokens = kind_of(path) == "tokens"
        return Source(
            printable(path.name), (path,), path.parent, is_tokens=is_tokens, is_validation=(False,) * is_tokens
        )
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"--data must be a regular file or a folder, got {printable(path)}: data is read more than once, so write "
            "it to a file first"
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
        message = f"--data {printable(data)}: no file, no folder with files and no glob that matches"
        raise FileNotFoundError("; ".join([message, *skipped.notes()]))
    name = printable(path.resolve().name if path.is_dir() else path.name)
    named_twice = set(found) - set(files)
    if named_twice:
        skipped.reasons["further names of files that are read"] = (len(named_twice), printable(min(named_twice)))
    shards = [p for p in files if kind_of(p) == "tokens" and refusal_of(p) is None]
    if shards and (len(shards) == len(files) or any(_has_shard_magic(p) for p in shards)):
        for other in sorted(set(files) - set(shards)):
            skipped.add("files beside the token shards", other)
        sides = tuple(is_validation(p.relative_to(root)) for p in shards)
        notes = (*skipped.notes(), *_sides_note(shards, sides))
        return Source(name, tuple(shards), root, is_tokens=True, is_validation=sides, notes=notes)
    texts = []
    for p in files:
        if refusal_of(p) is not None:
            skipped.add("archives or compressed files, which must be unpacked first", p)
        elif p in shards:
            skipped.add(".bin files that are not token shards, such as nanoGPT's, which have no header", p)
        else:
            texts.append(p)
    if not texts:
        raise ValueError("; ".join([f"no text in {name}", *skipped.notes()]))
    return Source(name, tuple(texts), root, notes=(*skipped.notes(), *_named_for_validation(texts, root)))


def _sides_note(shards: list[Path], sides: tuple[bool, ...]) -> list[str]:
    """Return the note about how several shards are split."""
    held_out = [p for p, is_val in zip(shards, sides, strict=True) if is_val]
    if not held_out:
        return []
    return [
        f"shards by their names: {len(shards) - len(held_out)} for training, {len(held_out)} for validation "
        f"({_first(held_out)})"
    ]


def _named_for_validation(files: list[Path], root: Path) -> list[str]:
    """Return the note about files of text whose names say validation."""
    named = [p for p in files if words_of(str(p.relative_to(root))) & {"val", "valid", "validation"}]
    if not named or len(named) == len(files):
        return []
    return [
        f"text is split by document, not by file: documents in files named for validation are also trained on "
        f"({_first(named)}); to leave these files out, give a glob"
    ]


def _first(paths: list[Path]) -> str:
    return printable(paths[0].name) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _walk(root: Path, skipped: Skipped) -> list[Path]:
    """Return the regular files below a folder.

    Links to folders are followed after all other folders, so that files get their real paths. Raises OSError for a
    folder that cannot be read.
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
                skipped.add("links to a folder that is read anyway, or to one above", here)
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
                skipped.add("broken links", path)
                continue
            if stat.S_ISDIR(mode):
                (links if path.is_symlink() else folders).append(path)
            elif stat.S_ISREG(mode):
                files.append(path)
            else:
                skipped.add("FIFOs, sockets or devices", path)
    return files


def _expand(pattern: Path, skipped: Skipped) -> tuple[Path, list[Path]]:
    """Return the folder before the first wildcard of a glob, and the files that match.

    Links below `**` are followed as in `_walk`, because the glob module follows a loop of several links without end.
    """
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
            skipped.add("broken links", p)
        elif not p.is_dir():
            skipped.add("FIFOs, sockets or devices", p)
        elif p not in entered:
            skipped.add("folders that match the glob, while none of their files do", p)
    return Path(*literal), files


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path match those of a glob, in which ** is any number of parts."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _once_each(paths: Iterable[Path], root: Path) -> list[Path]:
    """Return the paths without further names of the same file, unless a name implies another kind or split."""
    seen: dict[tuple[object, ...], Path] = {}
    for path in paths:
        kind = kind_of(path)
        key = (*_identity(os.stat(path)), kind, kind == "tokens" and is_validation(path.relative_to(root)))
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
        raise FileNotFoundError(f"this Python has no sources of its standard library in {root}; give --data")
    return Source(f"stdlib {platform.python_version()}", tuple(files), root)


def _has_shard_magic(path: Path) -> bool:
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little") in {magic for magic, _ in SHARD_FORMATS}
