"""Reads documents from files of text, JSON lines, JSON and parquet, in bounded memory.

A text file is one document, unless it has lines `<|endoftext|>`: these separate documents, as in the text releases of
TinyStories. A line of JSON lines, an element of a JSON array and a row of parquet are one record each. A record is one
document: a text, or an object with the text in one of its fields, which `plan_reading` chooses.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_native.data.file_names import (
    COMPRESSION_SUFFIXES,
    TABLE_SUFFIXES,
    compression_of,
    kind_of,
    printable,
    suffix_of,
)
from nanochat_native.data.sources import Skipped

TEXT_COLUMNS = ("text", "content", "document", "story", "code", "body")
# Size of the sample that `plan_reading` takes of a file; it continues to the first record that has text.
SAMPLE_RECORDS = 1000
SAMPLE_CHARS = 1 << 24
BLOCK_BYTES = 1 << 20
PIECE_CHARS = 1 << 20
LONGEST_TOKEN = 16  # characters of a JSON token that is not a string, such as -Infinity, or of an escape

_SEPARATOR = re.compile(r"^<\|endoftext\|>[ \t]*\r?\n?", re.MULTILINE)
_BLANK = re.compile(r"[ \t\r\n\ufeff]*")
# The longer marks come first, because one of them begins with a shorter one.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Numbers are never text. Floats may have any number of digits, unlike Python's integers.
_JSON = json.JSONDecoder(parse_int=float)


class DamagedFileError(ValueError):
    """A file that cannot be read to its end. The message begins with its path."""


class DocumentPart(NamedTuple):
    """A part of a document. A document is a part with `starts_document` and the parts up to the next such part."""

    text: str
    starts_document: bool
    position: int
    """Bytes of the file on the disk that were consumed so far."""


class Reading(NamedTuple):
    """How a file is read.

    Attributes:
        column: the field of its records that holds the text; None if the records are texts themselves.
        preferred: fields that take precedence over `column`, but did not have text in most records of the sample.
    """

    kind: str
    compression: str = ""
    encoding: str = "utf-8"
    column: str | None = None
    preferred: tuple[str, ...] = ()


class Record(NamedTuple):
    """A value of a file, its place for messages, and the bytes of the file that were consumed so far."""

    where: str
    position: int
    value: Any


@dataclass
class Sample:
    """Statistics of the first records of a file.

    Attributes:
        records, bare: number of records, and how many of them are texts themselves.
        chars: length of all their texts.
        texts: number of records with text, by field.
        others: type of a value without text, by field.
        labels: fields that are chosen only if no other field has text: dictionaries and bytes of parquet.
        first: whether the value is text, by field, in the first record or in the schema.
        damage: why the first value of a .json file cannot be read.
    """

    records: int = 0
    bare: int = 0
    chars: int = 0
    texts: Counter[str] = field(default_factory=Counter)
    others: dict[str, str] = field(default_factory=dict)
    labels: frozenset[str] = frozenset()
    first: dict[str, bool] = field(default_factory=dict)
    damage: str | None = None

    def add(self, value: Any) -> None:
        """Count a record."""
        self.records += 1
        if isinstance(value, str):
            self.bare += 1
            self.chars += len(value)
        if not isinstance(value, dict):
            return
        if not self.first:
            self.first = {name: isinstance(v, str) for name, v in value.items()}
        for name, v in value.items():
            if _is_text(v):
                self.texts[name] += 1
                self.chars += len(v)
            else:
                self.others.setdefault(name, _JSON_TYPES.get(type(v), type(v).__name__))

    def is_enough(self, asked: str | None) -> bool:
        """Return whether no more records are needed to choose a column, or for the column `asked`."""
        found = self.bare or (self.texts[asked] if asked is not None else len(self.texts))
        return found > 0 and (self.records >= SAMPLE_RECORDS or self.chars >= SAMPLE_CHARS)

    def fields(self) -> str:
        """Return the fields of the records and their types, for a message."""
        names = self.others | dict.fromkeys(self.texts, "text")
        return ", ".join(f"{printable(name)} ({kind})" for name, kind in names.items())

    def common_fields(self) -> set[str]:
        """Return the fields that have text in most of the records that are objects."""
        return {name for name, count in self.texts.items() if 2 * count > self.records - self.bare}

    def column(self) -> str | None:
        """Return the field that holds the text, or None if that is not clear.

        It is the first of TEXT_COLUMNS that has text in most records, or else the only field that has.
        """
        names = self.common_fields() or set(self.texts)
        named = [name for name in TEXT_COLUMNS if name in names]
        if named:
            return named[0]
        plain = names - self.labels or names
        return plain.pop() if len(plain) == 1 else None


def is_held_out(document: bytes, val_fraction: float) -> bool:
    """Return whether a document validates, by a hash of its text: equal documents are on the same side.

    Args:
        document: the document, or its first part, in UTF-8.
    """
    digest = hashlib.blake2b(document, digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2**64


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not value.isspace()


_JSON_TYPES = {str: "blank", dict: "object", list: "list", float: "number", bool: "boolean", type(None): "null"}


class ReadingPlan(NamedTuple):
    """How files are read.

    Attributes:
        readings: one for each file.
        same_as_version_1: for each file, whether version 1 of corpora read it in the same way. That version looked at
            the first record only.
        notes: what was chosen and why, one line each.
    """

    readings: list[Reading]
    same_as_version_1: list[bool]
    notes: list[str]


def plan_reading(files: Sequence[Path], text_column: str | None = None, skip_damaged: bool = False) -> ReadingPlan:
    """Choose how each file is read, by its name, its byte order mark and a sample of its records.

    All files use one column: the one that Sample.column finds in the samples of all of them. If most records of a file
    have no text there, this file gets its own column by the same rule, and a note names it. A .json file without
    records of text, such as the settings of a project, is read as plain text, unless all files are like that.

    Args:
        text_column: The column of all records; None chooses one.

    Raises:
        ValueError: There is no such column, or it is not clear which one holds the text.
        DamagedFileError, ImportError, OSError: See `read_document_parts`.
    """
    readings = []
    samples: dict[int, Sample] = {}
    plain = Skipped()
    for i, path in enumerate(files):
        reading = Reading(kind_of(path), compression_of(path))
        if reading.kind != "parquet":
            reading = reading._replace(encoding=_encoding_of(path))
        if reading.kind != "text":
            reading = reading._replace(column=text_column)
            samples[i] = _sample(path, reading, text_column, skip_damaged)
        elif suffix_of(path) in TABLE_SUFFIXES:
            plain.add("tables read as plain text, including separators and headings", path)
        readings.append(reading)
    if text_column is not None and not samples:
        raise ValueError(f"--text-column must be a field of .jsonl, .ndjson, .json or .parquet, got {text_column!r}")

    common = _merged([s for i, s in samples.items() if not _is_single(readings[i], s)]).column()
    undecided: dict[int, str] = {}
    same_as_version_1 = [reading == _version_1(path, {}, None) for path, reading in zip(files, readings, strict=True)]
    for i, sample in samples.items():
        objects = sample.records - sample.bare
        if text_column is not None:
            column = text_column if sample.texts[text_column] else None
        elif _is_single(readings[i], sample):
            # Settings have texts of any name, so only a known name is taken for the text.
            column = next((name for name in TEXT_COLUMNS if sample.texts[name]), None)
        elif common in sample.common_fields():
            column = common
        else:
            column = sample.column()
        if column is None and (objects > sample.bare or (readings[i].kind == "json" and not sample.records)):
            undecided[i] = _why_undecided(sample, text_column)
        readings[i] = readings[i]._replace(column=column or text_column)
        same_as_version_1[i] = readings[i] == _version_1(files[i], sample.first, text_column)
        if column is not None and text_column is None:
            readings[i] = readings[i]._replace(preferred=_preferred_columns(column, sample.common_fields()))
    for i, why in undecided.items():
        if readings[i].kind != "json" or len(undecided) == len(files):
            needed = "; .json must hold a list of objects or texts, or one of them per line"
            raise ValueError(f"{printable(files[i])}: {why}{needed if readings[i].kind == 'json' else ''}")
        readings[i] = readings[i]._replace(kind="text", column=None)
        same_as_version_1[i] = readings[i] == _version_1(files[i], {}, None)
        plain.add(".json files without records of text, read as plain text", files[i])
    notes = [f"{count} {reason} (first: {where})" for reason, (count, where) in plain.reasons.items()]
    if text_column is None:
        notes += _column_note(files, readings, samples)
    return ReadingPlan(readings, same_as_version_1, notes)


def _merged(samples: Iterable[Sample]) -> Sample:
    """Return the statistics of several files together."""
    total = Sample()
    for sample in samples:
        total.records += sample.records
        total.bare += sample.bare
        total.texts += sample.texts
        total.labels |= sample.labels
    return total


def _preferred_columns(column: str, without: set[str]) -> tuple[str, ...]:
    """Return the names of TEXT_COLUMNS that take precedence over a column, except those in `without`."""
    rank = TEXT_COLUMNS.index(column) if column in TEXT_COLUMNS else len(TEXT_COLUMNS)
    return tuple(name for name in TEXT_COLUMNS[:rank] if name not in without)


def _is_single(reading: Reading, sample: Sample) -> bool:
    """Return whether a .json file is one record. It may be the settings of a program."""
    return reading.kind == "json" and sample.records == 1


def _version_1(path: Path, first: dict[str, bool], text_column: str | None) -> Reading:
    """Return how version 1 of corpora read a file; a cached corpus that is read like that keeps its name."""
    suffixes = ["", *(suffix for suffix in path.suffixes if suffix not in COMPRESSION_SUFFIXES)]
    kind = {".parquet": "parquet", ".jsonl": "jsonl"}.get(suffixes[-1], "text")
    compression = path.suffix if path.suffix in COMPRESSION_SUFFIXES else ""
    if kind == "text":
        return Reading(kind, compression)
    sample = Sample(records=1, texts=Counter({name: 1 for name, is_text in first.items() if is_text}))
    return Reading(kind, compression, column=text_column or sample.column())


def _why_undecided(sample: Sample, asked: str | None) -> str:
    """Return why a file has no text column, for an error."""
    if sample.damage is not None:
        return sample.damage
    if not sample.others and not sample.texts:
        lists = "its records are neither objects nor texts (a file that is one list of records must be named .json)"
        return lists if sample.records else "it has no records"
    if asked is not None and asked not in sample.others:
        return f"there is no column {asked!r}; it has {sample.fields()}"
    if asked is not None:
        return f"column {asked!r} has no text; it has {sample.fields()}"
    if not sample.texts:
        return f"no field of its records has text; it has {sample.fields()}"
    return f"name the text column with --text-column; it has {sample.fields()}"


def _column_note(files: Sequence[Path], readings: Sequence[Reading], samples: dict[int, Sample]) -> list[str]:
    """Return the note about the columns that were chosen."""
    by_column: dict[str, list[int]] = {}
    for i in samples:
        column = readings[i].column
        if column is not None:
            by_column.setdefault(column, []).append(i)
    parts: list[str] = []
    for column, indices in sorted(by_column.items(), key=lambda item: -len(item[1])):
        total = _merged(samples[i] for i in indices)
        why = "" if column in TEXT_COLUMNS else ", the only field with text in most"
        where = ""
        if parts:
            more = f" and {len(indices) - 1} more files" if len(indices) > 1 else ""
            where = f" in {printable(files[indices[0]])}{more}"
        parts.append(f"{column!r}{where} (text in {total.texts[column]:,} of {total.records:,} sampled records{why})")
    return [f"text column: {'; '.join(parts)}"] if parts else []


def _sample(path: Path, reading: Reading, asked: str | None, skip_damaged: bool) -> Sample:
    """Return the statistics of the first records, of as many as are needed."""
    sample = Sample()
    try:
        if reading.kind == "parquet":
            _sample_parquet(path, sample, asked)
            return sample
        for record in _json_records(path, reading, Skipped(), skip_damaged):
            sample.add(record.value)
            if sample.is_enough(asked):
                break
    except DamagedFileError as error:
        if reading.kind == "json" and not sample.bare and not sample.texts:
            sample.damage = str(error).removeprefix(f"{printable(path)}: ")
        elif not skip_damaged:
            raise
    return sample


def read_document_parts(
    path: Path,
    reading: Reading,
    *,
    skip_damaged: bool = False,
    skipped: Skipped | None = None,
    text_column: str | None = None,
) -> Iterator[DocumentPart]:
    """Yield the documents of one file, in parts.

    Binary files (with a zero byte), documents that are not UTF-8, records without text and empty documents are left
    out and counted in `skipped`.

    Args:
        skip_damaged: Read a damaged file up to the damage and count it, instead of raising.
        text_column: The column, if the user named it. Then most of the records may be without text.

    Raises:
        DamagedFileError: The file is truncated or corrupt, or not JSON.
        ValueError: Most records have no text.
        ImportError: The file needs pyarrow or zstandard (extra `data`).
    """
    skipped = Skipped() if skipped is None else skipped
    try:
        if reading.kind == "text":
            yield from _read_text(path, reading, skipped)
            return
        if reading.kind == "parquet":
            records = _parquet_records(path, reading, skipped)
        else:
            records = _json_records(path, reading, skipped, skip_damaged)
        yield from _read_records(path, records, reading, text_column, skipped)
    except DamagedFileError as error:
        if not skip_damaged:
            raise
        skipped.add("damaged files, read up to the damage", str(error))


def _read_records(
    path: Path, records: Iterable[Record], reading: Reading, asked: str | None, skipped: Skipped
) -> Iterator[DocumentPart]:
    column, preferred = reading.column, reading.preferred
    count = without_text = 0
    later = Counter[str]()
    for where, position, value in records:
        count += 1
        text = value
        if isinstance(value, dict):
            text = value.get(column)
            for name in preferred:
                later[name] += _is_text(value.get(name))
        if not isinstance(text, str):
            without_text += 1
            skipped.add("records without text", where)
        elif _is_document(text, where, skipped):
            yield DocumentPart(text, True, position)
    if count == 0:
        skipped.add("files without a record", path)
    if asked is None and 2 * without_text > count:
        field_ = "" if column is None else f" in field {column!r}"
        raise ValueError(
            f"{printable(path)}: {without_text:,} of {count:,} records have no text{field_}; name the text column with "
            "--text-column to read only those that have it"
        )
    for name, with_text in later.items():
        if 2 * with_text > count:
            raise ValueError(
                f"{printable(path)}: field {name!r} has text in {with_text:,} of {count:,} records, but not in most of "
                f"the first ones, from which {column!r} was chosen; name the text column with --text-column"
            )


def _is_document(text: str, where: str, skipped: Skipped) -> bool:
    """Return whether a text can be encoded and is not blank; count it otherwise."""
    if not text or text.isspace():
        skipped.add("empty documents", where)
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        skipped.add("documents that are not UTF-8", where)
        return False
    return True


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield decompressed blocks of a file, each with the bytes of the file that were consumed so far."""
    compression = compression_of(path)
    with open(path, "rb") as raw:
        try:
            if compression == ".zst":
                yield from _zstd_blocks(path, raw)
                return
            file: Any = gzip.GzipFile(fileobj=raw) if compression == ".gz" else raw
            # `read` would lose the last good block before the damage.
            while block := file.read1(BLOCK_BYTES):
                yield block, raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DamagedFileError(f"{printable(path)}: damaged gzip file: {error}") from error


def _zstd_blocks(path: Path, raw: io.BufferedReader) -> Iterator[tuple[bytes, int]]:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f"{printable(path)}: .zst needs zstandard: pip install 'nanochat-native[data]'") from error
    # zstandard's own reader cannot tell a truncated file from a short one; a decompression object sees the frame's end.
    frame = zstandard.ZstdDecompressor().decompressobj()
    started = False
    while data := raw.read(BLOCK_BYTES):
        while data:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                block = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise DamagedFileError(f"{printable(path)}: damaged zstd file: {error}") from error
            started = True
            data = frame.unused_data if frame.eof else b""
            if block:
                yield block, raw.tell()
    if started and not frame.eof:
        raise DamagedFileError(f"{printable(path)}: damaged zstd file: it ends inside a frame")


def _encoding_of(path: Path) -> str:
    """Return the encoding that the byte order mark of a file tells, or utf-8 if it has none."""
    head = b""
    try:
        for block, _ in _blocks(path):
            head += block
            if len(head) >= 4:
                break
    except DamagedFileError:
        pass  # reading the file reports it
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def _utf8_blocks(path: Path, reading: Reading) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of a text converted to UTF-8. Raise UnicodeDecodeError for damaged UTF-16 or UTF-32; UTF-8 is not
    checked."""
    blocks = _blocks(path)
    if reading.encoding == "utf-8":
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(reading.encoding)()
    for block, position in _with_end(blocks):
        text = decoder.decode(block, final=not block)
        if text:
            yield text.encode(), position


def read_utf8(path: Path) -> bytes:
    """Return the decompressed content of a file. Text in UTF-16 or UTF-32 with a byte order mark becomes UTF-8.

    Raises DamagedFileError, ImportError and OSError, as `read_document_parts` does.
    """
    reading = Reading(kind_of(path), compression_of(path), _encoding_of(path))
    try:
        return b"".join(block for block, _ in _utf8_blocks(path, reading))
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{printable(path)}: not {error.encoding}: {error.reason}") from error


def _read_text(path: Path, reading: Reading, skipped: Skipped) -> Iterator[DocumentPart]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for block, _ in _utf8_blocks(path, reading):
            if b"\0" in block:
                skipped.add("binary files, or texts in UTF-16 without a byte order mark", path)
                return
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        name = "UTF-8" if reading.encoding == "utf-8" else "Unicode"
        skipped.add(f"documents that are not {name}", f"{path}: {error.reason}")
        return

    decoder.reset()
    pending, starts, empty = "", True, True
    for block, position in _with_end(_utf8_blocks(path, reading)):
        pending += decoder.decode(block)
        if block and len(pending) < PIECE_CHARS:
            continue
        cut = pending.rfind("\n") + 1 if block else 0
        text, pending = (pending[:cut], pending[cut:]) if cut else (pending, "")
        for index, part in enumerate(_SEPARATOR.split(text)):
            starts = starts or index > 0
            if part and not (starts and part.isspace()):
                yield DocumentPart(part, starts, position)
                starts = empty = False
    if empty:
        skipped.add("empty documents", path)


def _with_end(blocks: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    position = 0
    for block, position in blocks:
        yield block, position
    yield b"", position


def _json_records(path: Path, reading: Reading, skipped: Skipped, skip_damaged: bool) -> Iterator[Record]:
    try:
        if reading.kind == "json":
            yield from _json_values(path, reading)
        else:
            yield from _json_lines(path, reading, skipped, skip_damaged)
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{printable(path)}: not {error.encoding}: {error.reason}") from error


def _lines(path: Path, reading: Reading) -> Iterator[tuple[bytes, int]]:
    parts: list[bytes] = []
    for block, position in _with_end(_utf8_blocks(path, reading)):
        *complete, rest = block.split(b"\n")
        for line in complete:
            yield b"".join([*parts, line]), position
            parts = []
        parts.append(rest)
    yield b"".join(parts), position


def _json_lines(path: Path, reading: Reading, skipped: Skipped, skip_damaged: bool) -> Iterator[Record]:
    name = printable(path)
    for number, (line, position) in enumerate(_lines(path, reading), 1):
        where = f"{name}:{number}"
        line = line.removeprefix(codecs.BOM_UTF8)  # concatenated files have it in the middle
        if not line.strip():
            continue
        try:
            value = _JSON.decode(line.decode())
        except UnicodeDecodeError:
            skipped.add("documents that are not UTF-8", where)
            continue
        except (json.JSONDecodeError, RecursionError) as error:
            if not skip_damaged:
                advice = "; UTF-16 must begin with a byte order mark" if b"\0" in line else ""
                raise DamagedFileError(f"{where}: not a line of JSON: {_reason(error)}{advice}") from error
            skipped.add("lines that are not JSON", where)
            continue
        yield Record(where, position, value)


def _reason(error: json.JSONDecodeError | RecursionError) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json_values(path: Path, reading: Reading) -> Iterator[Record]:
    """Yield the elements of the list in a .json file, or else its values, one after the other.

    One value and one block of the file are in memory at a time.
    """
    values = _Values(path, reading)
    if values.peek() == "[":
        yield from values.elements()
        return
    while values.peek():
        yield values.take()


class _Values:
    """A cursor over the JSON values in a text that is read block by block."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self.number = printable(path), 0
        self.blocks = _with_end(_utf8_blocks(path, reading))
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.position, self.ended = "", 0, 0, False

    def elements(self) -> Iterator[Record]:
        """Yield the elements of a list, which must be all there is."""
        self.at += 1
        if self.peek() != "]":
            yield self.take()
            while self.peek() == ",":
                self.at += 1
                yield self.take()
        if self.peek() != "]":
            raise self.damaged("neither a comma nor the end of the list follows it")
        self.at += 1
        if self.peek():
            raise self.damaged("something follows the end of the list")

    def peek(self) -> str:
        """Return the next character that is not blank, or "" at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            assert blank is not None
            self.at = blank.end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read_on()

    def take(self) -> Record:
        """Return the next value."""
        self.number += 1
        self.peek()
        while True:
            try:
                value, end = _JSON.raw_decode(self.text, self.at)
                if self.ended or end < len(self.text) - LONGEST_TOKEN:  # a number could continue in the next block
                    self.at = end
                    return Record(f"{self.path}: value {self.number}", self.position, value)
            except RecursionError as error:
                raise self.damaged("nested too deeply") from error
            except json.JSONDecodeError as error:
                # A value that continues in the next block looks damaged: a string at its beginning, others at the end.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LONGEST_TOKEN
                if self.ended or not cut:
                    raise self.damaged(f"not JSON: {error.msg}") from error
            self.read_on()

    def read_on(self) -> None:
        """Read at least as much as is held, so that the total time is linear in the length of a value."""
        held = self.text[self.at :]
        parts, wanted = [held], 2 * len(held)
        while not self.ended and sum(map(len, parts)) <= wanted:
            block, self.position = next(self.blocks)
            self.ended = not block
            parts.append(self.decoder.decode(block, final=self.ended))
        self.text, self.at = "".join(parts), 0

    def damaged(self, what: str) -> DamagedFileError:
        return DamagedFileError(f"{self.path}: value {self.number}: {what}")


def _sample_parquet(path: Path, sample: Sample, asked: str | None) -> None:
    with parquet_file(path) as (pa, file):
        types, kinds = _columns(pa, file)
        sample.first = {name: kind == "text" for name, kind in kinds.items()}
        sample.labels = frozenset(name for name, kind in kinds.items() if kind == "label")
        names = [name for name, kind in kinds.items() if kind and asked in (None, name)]
        sample.others = {name: f"{type_} without text" if name in names else type_ for name, type_ in types.items()}
        for batch in file.iter_batches(batch_size=64, columns=names) if names else []:
            columns = [_bytes_of(pa, batch.column(name)) for name in names]
            for row in zip(*columns, strict=True):
                sample.add({name: _decoded(value) for name, value in zip(names, row, strict=True)})
            if sample.is_enough(asked):
                break
        else:
            sample.records = sample.records or file.metadata.num_rows


def _parquet_records(path: Path, reading: Reading, skipped: Skipped) -> Iterator[Record]:
    size, shown_path = path.stat().st_size, printable(path)
    row = 0
    with parquet_file(path) as (pa, file):
        kinds = _columns(pa, file)[1]
        names = [name for name in (reading.column, *reading.preferred) if kinds.get(name or "")]
        if reading.column not in names:
            return
        for group in range(file.num_row_groups):
            position = size * (group + 1) // file.num_row_groups
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=names):
                for values in zip(*(_bytes_of(pa, batch.column(name)) for name in names), strict=True):
                    row += 1
                    where = f"{shown_path}: row {row}"
                    texts = [_decoded(value) for value in values]
                    if values[0] is not None and texts[0] is None:
                        skipped.add("documents that are not UTF-8", where)
                    else:
                        yield Record(where, position, dict(zip(names, texts, strict=True)))


@contextlib.contextmanager
def parquet_file(path: Path) -> Iterator[tuple[Any, Any]]:
    """Give (pyarrow, the open file). An error of pyarrow in the block becomes a DamagedFileError."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{printable(path)}: .parquet needs pyarrow: pip install 'nanochat-native[data]'") from error
    try:
        with pq.ParquetFile(path) as file:
            yield pa, file
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DamagedFileError(f"{printable(path)}: damaged parquet file: {reason}") from error


def _columns(pa: Any, file: Any) -> tuple[dict[str, str], dict[str, str | None]]:
    """Return the type in words, and the _text_kind, of each column. A name that several columns have is not read."""
    types: dict[str, str] = {}
    kinds: dict[str, str | None] = {}
    for column in file.schema_arrow:
        several = column.name in types
        types[column.name] = "the name of several columns" if several else str(column.type)
        kinds[column.name] = None if several else _text_kind(pa, column.type)
    return types, kinds


def _text_kind(pa: Any, kind: Any) -> str | None:
    """Return "text" for a column of strings, "label" for dictionaries or bytes, which may be text, or None."""
    if pa.types.is_dictionary(kind):
        return "label" if _text_kind(pa, kind.value_type) else None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if kind == pa.string_view():
        return "text"
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view()
    return "label" if is_bytes else None


def _bytes_of(pa: Any, column: Any) -> list[bytes | None]:
    """Return the values as bytes, because Arrow does not guarantee that a string is UTF-8."""
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
