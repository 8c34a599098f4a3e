"""Reads from the name of a file its kind, its compression, and whether it is for validation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

COMPRESSION_SUFFIXES = (".gz", ".zst")
# Kind of a file by its suffix; any other suffix means plain text.
KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".bin": "tokens"}
_UNPACK_COMMANDS = {
    ".zip": "unzip",
    ".tar": "tar -xf",
    ".tgz": "tar -xf",
    ".tbz2": "tar -xf",
    ".txz": "tar -xf",
    ".7z": "7z x",
    ".rar": "unrar x",
    ".bz2": "bunzip2",
    ".xz": "unxz",
    ".lz4": "unlz4",
}
TABLE_SUFFIXES = (".csv", ".tsv")

TRAIN_WORDS = {"train", "training"}
# Test data must not be trained on either.
VALIDATION_WORDS = {
    *("val", "vals", "valid", "validate", "validation", "eval", "evals", "evaluation"),
    *("dev", "test", "tests", "testing", "holdout", "heldout"),
}


def compression_of(path: Path) -> str:
    """Return the suffix of a compression in lower case, or "" if there is none."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSION_SUFFIXES else ""


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case; that of a compression does not count."""
    return (Path(path.stem) if compression_of(path) else path).suffix.lower()


def kind_of(path: Path) -> str:
    """Return a value of KINDS, or "text". Case does not matter."""
    return KINDS.get(suffix_of(path), "text")


def refusal_of(path: Path) -> str | None:
    """Return why a file, such as an archive, cannot be read and how to fix that; None for a file that can be read."""
    command = _UNPACK_COMMANDS.get(suffix_of(path))
    if command is not None:
        return f"{suffix_of(path)} cannot be read: unpack it ({command}) and give its content"
    if compression_of(path) and kind_of(path) in ("parquet", "tokens"):
        command = "gunzip" if compression_of(path) == ".gz" else "unzstd"
        return f"{suffix_of(path)} cannot be read while compressed: decompress it ({command})"
    return None


def words_of(name: str) -> set[str]:
    """Return the words of a name in lower case: x, val and bin for "x_val_001.bin", val and set for "valSet"."""
    separated = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return set(re.findall(r"[^\W\d_]+", separated.lower()))


def is_validation(path: Path) -> bool:
    """Return whether a token shard is for validation, by the words of its path below the folder that was given.

    The name of the file decides, or else the nearest folder whose name has a word of either set. A shard without any
    such word is for training.
    """
    for part in reversed(path.parts):
        words = words_of(part)
        if words & VALIDATION_WORDS:
            return True
        if words & TRAIN_WORDS:
            return False
    return False


def last_shard(paths: Sequence[Path]) -> int | None:
    """Return the index of the last of several numbered shards, such as shard_00000.parquet, shard_00001.parquet.

    Numbered shards are files of one folder whose names differ in one number only. None: these are not.
    """
    pieces = [re.split(r"(\d+)", path.name) for path in paths]
    if len(paths) < 2 or len({path.parent for path in paths}) > 1 or len({len(split) for split in pieces}) > 1:
        return None
    differing = [place for place, texts in enumerate(zip(*pieces, strict=True)) if len(set(texts)) > 1]
    if len(differing) != 1 or differing[0] % 2 == 0:  # the numbers are at the odd places
        return None
    numbers = [int(split[differing[0]]) for split in pieces]
    return numbers.index(max(numbers))


def printable(path: Path | str) -> str:
    """Return a path as one line of printable text: all other characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
