"""What to train on: finding files and reading documents from text, JSON lines and parquet, in bounded memory.

A text file is one document, unless it has lines that read `<|endoftext|>`: these separate documents, as in the
text releases of TinyStories. A line of JSON lines and a row of parquet are one document each.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_native.data.shards import SHARD_FORMATS

TEXT_COLUMNS = ("text", "content", "document", "story", "code", "body")
BLOCK_BYTES = 1 << 20
PIECE_CHARS = 1 << 20
# A charmap of `encodings` is 256 lines of one table; everything else there is shorter than this.
ENCODINGS_MAX_BYTES = 8192

_SEPARATOR = re.compile(r"^<\|endoftext\|>[ \t]*\r?\n?", re.MULTILINE)


class DamagedFileError(ValueError):
    """A file that cannot be read to its end; the message begins with its path."""


class Piece(NamedTuple):
    """A part of a document: a document is a piece with `starts_document` and the pieces up to the next such."""

    text: str
    starts_document: bool
    position: int
    """Bytes of the file on disk consumed so far."""


@dataclass(frozen=True)
class Source:
    """The files behind one `--data`, in a fixed order, and the name under which they are reported."""

    name: str
    files: tuple[Path, ...]
    is_tokens: bool = False
    """Whether the files are token shards (.bin) and not text."""


@dataclass
class Skipped:
    """What was left out, by reason: how many, and where first."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        count, first = self.reasons.get(reason, (0, where))
        self.reasons[reason] = (count + 1, first)

    def lines(self) -> list[str]:
        return [f"skipped: {count} {reason} (first: {where})" for reason, (count, where) in self.reasons.items()]


def find_source(data: str | None, without: Path | None = None) -> Source:
    """Find the files of `data`: a file, a folder (searched to its depth, hidden names left out) or a glob; None is
    the standard library of the running Python.

    A folder or glob that holds token shards beside other files means the shards. Files in the folder `without` are
    left out, unless `data` lies in it.

    Raises:
        FileNotFoundError: nothing there.
    """
    if data is None:
        return _standard_library()
    path = Path(data).expanduser()
    if path.is_file():
        return Source(path.name, (path,), is_tokens=path.suffix == ".bin")
    if path.is_dir():
        found = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
    if without is not None and not path.resolve().is_relative_to(without.resolve()):
        found = [p for p in found if not p.resolve().is_relative_to(without.resolve())]
    files = sorted(p for p in found if p.is_file())
    if not files:
        raise FileNotFoundError(f"--data {data}: no file, no folder with files and no glob that matches")
    name = path.resolve().name if path.is_dir() else path.name
    shards = [p for p in files if p.suffix == ".bin"]
    if len(shards) == len(files) or any(_has_shard_magic(p) for p in shards):
        return Source(name, tuple(shards), is_tokens=True)
    return Source(name, tuple(files))


def read_pieces(
    path: Path, *, text_column: str | None = None, skip_damaged: bool = False, skipped: Skipped | None = None
) -> Iterator[Piece]:
    """Documents of one file. By suffix .parquet, .jsonl, anything else is text; .gz and .zst are decompressed.

    Binary files (with a zero byte), documents that are not UTF-8, records without text and empty documents are
    left out and counted in `skipped`.

    Args:
        text_column: the field of .jsonl and .parquet that holds the text; None finds it by name (TEXT_COLUMNS), or
            takes the only one that is text.
        skip_damaged: read a damaged file as far as it goes and count it, instead of raising.

    Raises:
        DamagedFileError: truncated or corrupt, or a line is not JSON.
        ValueError: no such text column.
        ImportError: the file needs pyarrow or zstandard (extra `data`).
    """
    skipped = Skipped() if skipped is None else skipped
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst")]
    kind = suffixes[-1] if suffixes else ""
    try:
        if kind == ".parquet":
            pieces = _read_parquet(path, text_column, skipped)
        elif kind == ".jsonl":
            pieces = _read_json_lines(path, text_column, skipped, skip_damaged)
        else:
            pieces = _read_text(path, skipped)
        yield from pieces
    except DamagedFileError as error:
        if not skip_damaged:
            raise
        skipped.add("damaged files, read as far as they go", str(error))


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
    return Source(f"stdlib {platform.python_version()}", tuple(files))


def _has_shard_magic(path: Path) -> bool:
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little") in {magic for magic, _ in SHARD_FORMATS}


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks of a file, each with the bytes of the file consumed so far."""
    with open(path, "rb") as raw:
        try:
            if path.suffix == ".zst":
                yield from _zstd_blocks(path, raw)
                return
            file: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            # Not `read`, which would lose the last good block before a fault.
            while block := file.read1(BLOCK_BYTES):
                yield block, raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DamagedFileError(f"{path}: damaged gzip file: {error}") from error


def _zstd_blocks(path: Path, raw: io.BufferedReader) -> Iterator[tuple[bytes, int]]:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f"{path}: .zst needs zstandard: pip install 'nanochat-native[data]'") from error
    # zstandard's own reader takes a truncated file for a short one; a decompression object knows its frame's end.
    frame = zstandard.ZstdDecompressor().decompressobj()
    started = False
    while data := raw.read(BLOCK_BYTES):
        while data:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                block = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise DamagedFileError(f"{path}: damaged zstd file: {error}") from error
            started = True
            data = frame.unused_data if frame.eof else b""
            if block:
                yield block, raw.tell()
    if started and not frame.eof:
        raise DamagedFileError(f"{path}: damaged zstd file: it ends inside a frame")


def _is_document(text: str, where: str, skipped: Skipped) -> bool:
    if not text or text.isspace():
        skipped.add("empty documents", where)
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        skipped.add("documents that are not UTF-8", where)
        return False
    return True


def _read_text(path: Path, skipped: Skipped) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for block, _ in _blocks(path):
            if b"\0" in block:
                skipped.add("binary files", str(path))
                return
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        skipped.add("documents that are not UTF-8", f"{path}: {error.reason}")
        return

    decoder.reset()
    pending, starts, empty = "", True, True
    for block, position in _with_end(_blocks(path)):
        pending += decoder.decode(block)
        if block and len(pending) < PIECE_CHARS:
            continue
        cut = pending.rfind("\n") + 1 if block else 0
        text, pending = (pending[:cut], pending[cut:]) if cut else (pending, "")
        for index, part in enumerate(_SEPARATOR.split(text)):
            starts = starts or index > 0
            if part and not (starts and part.isspace()):
                yield Piece(part, starts, position)
                starts = empty = False
    if empty:
        skipped.add("empty documents", str(path))


def _with_end(blocks: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    position = 0
    for block, position in blocks:
        yield block, position
    yield b"", position


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    parts: list[bytes] = []
    for block, position in _with_end(_blocks(path)):
        *complete, rest = block.split(b"\n")
        for line in complete:
            yield b"".join([*parts, line]), position
            parts = []
        parts.append(rest)
    yield b"".join(parts), position


def _read_json_lines(path: Path, text_column: str | None, skipped: Skipped, skip_damaged: bool) -> Iterator[Piece]:
    column = None
    for number, (line, position) in enumerate(_lines(path), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            skipped.add("documents that are not UTF-8", where)
            continue
        except (json.JSONDecodeError, RecursionError) as error:
            if not skip_damaged:
                raise DamagedFileError(f"{where}: not a line of JSON: {error}") from error
            skipped.add("lines that are not JSON", where)
            continue
        if isinstance(record, dict):
            if column is None:
                fields = {name: isinstance(value, str) for name, value in record.items()}
                column = _text_column(fields, text_column, where)
            record = record.get(column)
        if not isinstance(record, str):
            skipped.add("records without text", where)
        elif _is_document(record, where, skipped):
            yield Piece(record, True, position)


def _read_parquet(path: Path, text_column: str | None, skipped: Skipped) -> Iterator[Piece]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{path}: .parquet needs pyarrow: pip install 'nanochat-native[data]'") from error
    size = path.stat().st_size
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            types = {f.name: pa.types.is_string(f.type) or pa.types.is_large_string(f.type) for f in file.schema_arrow}
            column = _text_column(types, text_column, str(path))
            if not types[column]:
                raise ValueError(f"{path}: column {column!r} is {file.schema_arrow.field(column).type}, not text")
            for group in range(file.num_row_groups):
                position = size * (group + 1) // file.num_row_groups
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[column]):
                    # As bytes, since Arrow does not promise that a string is UTF-8.
                    for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                        row += 1
                        where = f"{path}: row {row}"
                        if value is None:
                            skipped.add("records without text", where)
                            continue
                        try:
                            text = value.decode()
                        except UnicodeDecodeError:
                            skipped.add("documents that are not UTF-8", where)
                            continue
                        if _is_document(text, where, skipped):
                            yield Piece(text, True, position)
    except (pa.ArrowException, OSError) as error:
        raise DamagedFileError(f"{path}: damaged parquet file: {error}") from error


def _text_column(fields: dict[str, bool], asked: str | None, where: str) -> str:
    """Name of the text field. `fields`: name to whether it is text."""
    if asked is not None:
        if asked not in fields:
            raise ValueError(f"{where}: no column {asked!r}; it has {', '.join(fields)}")
        return asked
    texts = [name for name, is_text in fields.items() if is_text]
    named = [name for name in TEXT_COLUMNS if name in texts]
    if not named and len(texts) != 1:
        raise ValueError(f"{where}: name the text column with --text-column; it has {', '.join(fields) or 'none'}")
    return (named or texts)[0]
