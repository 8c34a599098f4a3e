"""What the name of a file says: its kind, its compression, whether it validates, and how it is printed."""

from __future__ import annotations

import re
from pathlib import Path

COMPRESSIONS = (".gz", ".zst")
# Suffix to kind; any other is plain text.
KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".bin": "tokens"}
_UNPACKED_BY = {
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
TABLES = (".csv", ".tsv")

TRAIN_WORDS = {"train", "training"}
# What is held out for a test must not be trained on either.
VALIDATION_WORDS = {
    *("val", "vals", "valid", "validate", "validation", "eval", "evals", "evaluation"),
    *("dev", "test", "tests", "testing", "holdout", "heldout"),
}


def compression_of(path: Path) -> str:
    """The compression's suffix in lower case; "" without one."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def suffix_of(path: Path) -> str:
    """The suffix in lower case, before that of a compression."""
    return (Path(path.stem) if compression_of(path) else path).suffix.lower()


def kind_of(path: Path) -> str:
    """A value of KINDS, or text; upper and lower case are the same."""
    return KINDS.get(suffix_of(path), "text")


def refusal_of(path: Path) -> str | None:
    """What to do with a file that is not read as it is, such as an archive; None for one that is read."""
    command = _UNPACKED_BY.get(suffix_of(path))
    if command is not None:
        return f"{suffix_of(path)} is not read: unpack it ({command}), and give what was in it"
    if compression_of(path) and kind_of(path) in ("parquet", "tokens"):
        command = "gunzip" if compression_of(path) == ".gz" else "unzstd"
        return f"{suffix_of(path)} is not read compressed: decompress it ({command})"
    return None


def words_of(name: str) -> set[str]:
    """The runs of letters in a name, in lower case: "x_val_001.bin" has x, val and bin, "valSet" val and set."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return set(re.findall(r"[^\W\d_]+", parted.lower()))


def validates(path: Path) -> bool:
    """Whether a shard validates instead of training, by the words of its path below the folder that was given.

    The file's name decides, or else the nearest folder that has a word of either set; without any it trains.
    """
    for part in reversed(path.parts):
        words = words_of(part)
        if words & VALIDATION_WORDS:
            return True
        if words & TRAIN_WORDS:
            return False
    return False


def shown(path: Path | str) -> str:
    """A path as one line that every terminal with UTF-8 prints: other characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
