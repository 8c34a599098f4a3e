"""Documents from files of text, JSON lines, JSON and parquet, in bounded memory.

A text file is one document, unless it has lines that read `<|endoftext|>`: these separate documents, as in the
text releases of TinyStories. A line of JSON lines, an element of a JSON array and a row of parquet are a record each,
and a record is one document: its text, or the text of one of its fields, which `decide` chooses.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_native.data.names import COMPRESSIONS, TABLES, compression_of, kind_of, shown, suffix_of
from nanochat_native.data.sources import Skipped

TEXT_COLUMNS = ("text", "content", "document", "story", "code", "body")
# What `decide` looks at of a file: so many records, or so much text, and on to the first record that has any.
SAMPLE_RECORDS = 1000
SAMPLE_CHARS = 1 << 24
BLOCK_BYTES = 1 << 20
PIECE_CHARS = 1 << 20
LONGEST_TOKEN = 16  # characters of JSON that are read as one and are no text: -Infinity, an escape

_SEPARATOR = re.compile(r"^<\|endoftext\|>[ \t]*\r?\n?", re.MULTILINE)
_BLANK = re.compile(r"[ \t\r\n\ufeff]*")
# The longer mark first: it begins with the shorter one.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# No number of a record is text; as a float it may have any number of digits.
_JSON = json.JSONDecoder(parse_int=float)


class DamagedFileError(ValueError):
    """A file that cannot be read to its end; the message begins with its path."""


class Piece(NamedTuple):
    """A part of a document: a document is a piece with `starts_document` and the pieces up to the next such."""

    text: str
    starts_document: bool
    position: int
    """Bytes of the file on disk consumed so far."""


class Reading(NamedTuple):
    """How a file is read. column: the field of its records that holds the text; None where they are text themselves.
    doubted: fields that would be taken before it, had they text in most records, and had it not in the sample's."""

    kind: str
    compression: str = ""
    encoding: str = "utf-8"
    column: str | None = None
    doubted: tuple[str, ...] = ()


class Record(NamedTuple):
    """where: for messages. position: bytes of the file consumed so far."""

    where: str
    position: int
    value: Any


@dataclass
class Sample:
    """Of a file's first records: in how many each field holds text.

    Attributes:
        records, bare: how many were looked at, and how many of them are a text themselves.
        texts: field to the number of records that have text there.
        others: field that was seen without text to the type of what was there.
        labels: fields that are taken only where no other has text: dictionaries and bytes of parquet.
        first: of the first record, or of the schema, field to whether it is text.
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
        found = self.bare or (self.texts[asked] if asked is not None else len(self.texts))
        return found > 0 and (self.records >= SAMPLE_RECORDS or self.chars >= SAMPLE_CHARS)

    def fields(self) -> str:
        """What the records have, for a message."""
        names = self.others | dict.fromkeys(self.texts, "text")
        return ", ".join(f"{shown(name)} ({kind})" for name, kind in names.items())

    def most(self) -> set[str]:
        """The fields that are text in most of the records that have fields."""
        return {name for name, count in self.texts.items() if 2 * count > self.records - self.bare}

    def column(self) -> str | None:
        """The field that holds the text: of TEXT_COLUMNS the first that is text in most records, else the only one
        that is. None where that does not tell."""
        names = self.most() or set(self.texts)
        named = [name for name in TEXT_COLUMNS if name in names]
        if named:
            return named[0]
        plain = names - self.labels or names
        return plain.pop() if len(plain) == 1 else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not value.isspace()


_JSON_TYPES = {str: "blank", dict: "object", list: "list", float: "number", bool: "boolean", type(None): "null"}


class Decision(NamedTuple):
    """What `decide` chose.

    Attributes:
        readings: of each file.
        as_before: of each file, whether version 1 of the corpora, which looked at the first record alone, read it so.
        notes: what was chosen and why, one line each.
    """

    readings: list[Reading]
    as_before: list[bool]
    notes: list[str]


def decide(files: Sequence[Path], text_column: str | None = None, skip_damaged: bool = False) -> Decision:
    """Choose how each file is read, by its name, its byte order mark and a sample of its records.

    One column serves all files: the one that Sample.column finds in the samples of all of them. A file that has no text
    there in most of its records takes its own, by the same rule, and the note names it. A .json file without records
    of text, such as a project's settings, is read as plain text, unless all files are such.

    Args:
        text_column: the column of all records; None chooses one.

    Raises:
        ValueError: no such text column, or none that the records tell.
        DamagedFileError, ImportError, OSError: as read_pieces.
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
        elif suffix_of(path) in TABLES:
            plain.add("tables read as plain text, separators and headings included", path)
        readings.append(reading)
    if text_column is not None and not samples:
        raise ValueError(f"--text-column is {text_column!r}, but no file has records: .jsonl, .ndjson, .json, .parquet")

    common = _together([s for i, s in samples.items() if not _is_single(readings[i], s)]).column()
    untold: dict[int, str] = {}
    as_before = [reading == _version_1(path, {}, None) for path, reading in zip(files, readings, strict=True)]
    for i, sample in samples.items():
        objects = sample.records - sample.bare
        if text_column is not None:
            column = text_column if sample.texts[text_column] else None
        elif _is_single(readings[i], sample):
            column = next((name for name in TEXT_COLUMNS if sample.texts[name]), None)
        elif common in sample.most():
            column = common
        else:
            column = sample.column()
        if column is None and (objects > sample.bare or (readings[i].kind == "json" and not sample.records)):
            untold[i] = _why_untold(sample, text_column)
        readings[i] = readings[i]._replace(column=column or text_column)
        as_before[i] = readings[i] == _version_1(files[i], sample.first, text_column)
        if column is not None and text_column is None:
            readings[i] = readings[i]._replace(doubted=_before(column, sample.most()))
    for i, why in untold.items():
        if readings[i].kind != "json" or len(untold) == len(files):
            takes = "; .json takes a list of objects or texts, or one of them a line"
            raise ValueError(f"{shown(files[i])}: {why}{takes if readings[i].kind == 'json' else ''}")
        readings[i] = readings[i]._replace(kind="text", column=None)
        as_before[i] = readings[i] == _version_1(files[i], {}, None)
        plain.add(".json files without records of text, read as plain text", files[i])
    notes = [f"{count} {reason} (first: {where})" for reason, (count, where) in plain.reasons.items()]
    if text_column is None:
        notes += _told(files, readings, samples)
    return Decision(readings, as_before, notes)


def _together(samples: Iterable[Sample]) -> Sample:
    total = Sample()
    for sample in samples:
        total.records += sample.records
        total.bare += sample.bare
        total.texts += sample.texts
        total.labels |= sample.labels
    return total


def _before(column: str, without: set[str]) -> tuple[str, ...]:
    """The known names that are taken before a column."""
    rank = TEXT_COLUMNS.index(column) if column in TEXT_COLUMNS else len(TEXT_COLUMNS)
    return tuple(name for name in TEXT_COLUMNS[:rank] if name not in without)


def _is_single(reading: Reading, sample: Sample) -> bool:
    """Whether a .json file is one record, which the settings of a program are too: its text has a known name."""
    return reading.kind == "json" and sample.records == 1


def _version_1(path: Path, first: dict[str, bool], text_column: str | None) -> Reading:
    """How version 1 of the corpora read a file; a cached corpus of such readings keeps its name."""
    suffixes = ["", *(suffix for suffix in path.suffixes if suffix not in COMPRESSIONS)]
    kind = {".parquet": "parquet", ".jsonl": "jsonl"}.get(suffixes[-1], "text")
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    if kind == "text":
        return Reading(kind, compression)
    sample = Sample(records=1, texts=Counter({name: 1 for name, is_text in first.items() if is_text}))
    return Reading(kind, compression, column=text_column or sample.column())


def _why_untold(sample: Sample, asked: str | None) -> str:
    if sample.damage is not None:
        return sample.damage
    if not sample.others and not sample.texts:
        lists = "its records are neither objects nor texts (a file that is one list of records is named .json)"
        return lists if sample.records else "it holds no records"
    if asked is not None and asked not in sample.others:
        return f"no column {asked!r}; it has {sample.fields()}"
    if asked is not None:
        return f"column {asked!r} holds no text; it has {sample.fields()}"
    if not sample.texts:
        return f"no field of its records holds text; it has {sample.fields()}"
    return f"name the text column with --text-column; it has {sample.fields()}"


def _told(files: Sequence[Path], readings: Sequence[Reading], samples: dict[int, Sample]) -> list[str]:
    """The note about the columns that were chosen."""
    by_column: dict[str, list[int]] = {}
    for i in samples:
        column = readings[i].column
        if column is not None:
            by_column.setdefault(column, []).append(i)
    parts: list[str] = []
    for column, indices in sorted(by_column.items(), key=lambda item: -len(item[1])):
        total = _together(samples[i] for i in indices)
        why = "" if column in TEXT_COLUMNS else ", the only field that is text in most"
        where = ""
        if parts:
            more = f" and {len(indices) - 1} more files" if len(indices) > 1 else ""
            where = f" in {shown(files[indices[0]])}{more}"
        parts.append(f"{column!r}{where} (text in {total.texts[column]:,} of {total.records:,} records looked at{why})")
    return [f"text column: {'; '.join(parts)}"] if parts else []


def _sample(path: Path, reading: Reading, asked: str | None, skip_damaged: bool) -> Sample:
    """Look at records until the sample is enough."""
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
            sample.damage = str(error).removeprefix(f"{shown(path)}: ")
        elif not skip_damaged:
            raise
    return sample


def read_pieces(
    path: Path,
    reading: Reading,
    *,
    skip_damaged: bool = False,
    skipped: Skipped | None = None,
    text_column: str | None = None,
) -> Iterator[Piece]:
    """Documents of one file.

    Binary files (with a zero byte), documents that are not UTF-8, records without text and empty documents are
    left out and counted in `skipped`. That more than half of a file's records have no text is an error, unless
    text_column says that the column was asked for by name.

    Args:
        skip_damaged: read a damaged file as far as it goes and count it, instead of raising.

    Raises:
        DamagedFileError: truncated or corrupt, or not JSON.
        ValueError: most records have no text.
        ImportError: the file needs pyarrow or zstandard (extra `data`).
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
        skipped.add("damaged files, read as far as they go", str(error))


def _read_records(
    path: Path, records: Iterable[Record], reading: Reading, asked: str | None, skipped: Skipped
) -> Iterator[Piece]:
    column, doubted = reading.column, reading.doubted
    count = without_text = 0
    later = Counter[str]()
    for where, position, value in records:
        count += 1
        text = value
        if isinstance(value, dict):
            text = value.get(column)
            for name in doubted:
                later[name] += _is_text(value.get(name))
        if not isinstance(text, str):
            without_text += 1
            skipped.add("records without text", where)
        elif _is_document(text, where, skipped):
            yield Piece(text, True, position)
    if count == 0:
        skipped.add("files without a record", path)
    if asked is None and 2 * without_text > count:
        field_ = "" if column is None else f" in field {column!r}"
        raise ValueError(
            f"{shown(path)}: {without_text:,} of {count:,} records have no text{field_}; name the text column with "
            "--text-column, which takes those that have it"
        )
    for name, with_text in later.items():
        if 2 * with_text > count:
            raise ValueError(
                f"{shown(path)}: field {name!r} has text in {with_text:,} of {count:,} records, but not in most of the "
                f"first, which told {column!r}; name the text column with --text-column"
            )


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


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks of a file, each with the bytes of the file consumed so far."""
    compression = compression_of(path)
    with open(path, "rb") as raw:
        try:
            if compression == ".zst":
                yield from _zstd_blocks(path, raw)
                return
            file: Any = gzip.GzipFile(fileobj=raw) if compression == ".gz" else raw
            # Not `read`, which would lose the last good block before a fault.
            while block := file.read1(BLOCK_BYTES):
                yield block, raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DamagedFileError(f"{shown(path)}: damaged gzip file: {error}") from error


def _zstd_blocks(path: Path, raw: io.BufferedReader) -> Iterator[tuple[bytes, int]]:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f"{shown(path)}: .zst needs zstandard: pip install 'nanochat-native[data]'") from error
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
                raise DamagedFileError(f"{shown(path)}: damaged zstd file: {error}") from error
            started = True
            data = frame.unused_data if frame.eof else b""
            if block:
                yield block, raw.tell()
    if started and not frame.eof:
        raise DamagedFileError(f"{shown(path)}: damaged zstd file: it ends inside a frame")


def _encoding_of(path: Path) -> str:
    """By the byte order mark; utf-8 without one."""
    head = b""
    try:
        for block, _ in _blocks(path):
            head += block
            if len(head) >= 4:
                break
    except DamagedFileError:
        pass  # the reader tells
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def _utf8_blocks(path: Path, reading: Reading) -> Iterator[tuple[bytes, int]]:
    """Blocks of a text in UTF-8, whatever its encoding. Raises UnicodeDecodeError where it is UTF-16 or UTF-32 and
    damaged; of UTF-8 nothing is checked."""
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
    """All of a file, decompressed; in UTF-8 where its byte order mark tells UTF-16 or UTF-32, else as it is.

    Raises DamagedFileError, ImportError and OSError, as read_pieces.
    """
    reading = Reading(kind_of(path), compression_of(path), _encoding_of(path))
    try:
        return b"".join(block for block, _ in _utf8_blocks(path, reading))
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{shown(path)}: not {error.encoding}: {error.reason}") from error


def _read_text(path: Path, reading: Reading, skipped: Skipped) -> Iterator[Piece]:
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
                yield Piece(part, starts, position)
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
        raise DamagedFileError(f"{shown(path)}: not {error.encoding}: {error.reason}") from error


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
    name = shown(path)
    for number, (line, position) in enumerate(_lines(path, reading), 1):
        where = f"{name}:{number}"
        line = line.removeprefix(codecs.BOM_UTF8)  # files that were put together have it in their middle
        if not line.strip():
            continue
        try:
            value = _JSON.decode(line.decode())
        except UnicodeDecodeError:
            skipped.add("documents that are not UTF-8", where)
            continue
        except (json.JSONDecodeError, RecursionError) as error:
            if not skip_damaged:
                advice = "; UTF-16 is read where the file begins with a byte order mark" if b"\0" in line else ""
                raise DamagedFileError(f"{where}: not a line of JSON: {_reason(error)}{advice}") from error
            skipped.add("lines that are not JSON", where)
            continue
        yield Record(where, position, value)


def _reason(error: json.JSONDecodeError | RecursionError) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json_values(path: Path, reading: Reading) -> Iterator[Record]:
    """The elements of the list that a .json file holds, or else its values one after the other.

    Of the file one value and a block are in memory at once.
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
        self.path, self.number = shown(path), 0
        self.blocks = _with_end(_utf8_blocks(path, reading))
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.position, self.ended = "", 0, 0, False

    def elements(self) -> Iterator[Record]:
        self.at += 1
        if self.peek() != "]":
            yield self.take()
            while self.peek() == ",":
                self.at += 1
                yield self.take()
        if self.peek() != "]":
            raise self.damaged("neither a comma nor the end of the list after it")
        self.at += 1
        if self.peek():
            raise self.damaged("something follows the end of the list")

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            assert blank is not None
            self.at = blank.end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read_on()

    def take(self) -> Record:
        """The value that comes next."""
        self.number += 1
        self.peek()
        while True:
            try:
                value, end = _JSON.raw_decode(self.text, self.at)
                if self.ended or end < len(self.text) - LONGEST_TOKEN:  # a number could go on in the next block
                    self.at = end
                    return Record(f"{self.path}: value {self.number}", self.position, value)
            except RecursionError as error:
                raise self.damaged("nested too deeply") from error
            except json.JSONDecodeError as error:
                # A value that goes on in the next block looks damaged: a text at its beginning, others at the end.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LONGEST_TOKEN
                if self.ended or not cut:
                    raise self.damaged(f"not JSON: {error.msg}") from error
            self.read_on()

    def read_on(self) -> None:
        """Read as much again as is held, so that the time is linear in a value's length."""
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
    with _parquet_file(path) as (pa, file):
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
    size, shown_path = path.stat().st_size, shown(path)
    row = 0
    with _parquet_file(path) as (pa, file):
        kinds = _columns(pa, file)[1]
        names = [name for name in (reading.column, *reading.doubted) if kinds.get(name or "")]
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
def _parquet_file(path: Path) -> Iterator[tuple[Any, Any]]:
    """(pyarrow, the open file); what pyarrow raises within the block is a DamagedFileError."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{shown(path)}: .parquet needs pyarrow: pip install 'nanochat-native[data]'") from error
    try:
        with pq.ParquetFile(path) as file:
            yield pa, file
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DamagedFileError(f"{shown(path)}: damaged parquet file: {reason}") from error


def _columns(pa: Any, file: Any) -> tuple[dict[str, str], dict[str, str | None]]:
    """Of each name of a column the type in words, and the _text_kind; a name of several columns is not read."""
    types: dict[str, str] = {}
    kinds: dict[str, str | None] = {}
    for column in file.schema_arrow:
        several = column.name in types
        types[column.name] = "the name of several columns" if several else str(column.type)
        kinds[column.name] = None if several else _text_kind(pa, column.type)
    return types, kinds


def _text_kind(pa: Any, kind: Any) -> str | None:
    """text for a column of strings; label for one of dictionaries or bytes, which may be text; None for others."""
    if pa.types.is_dictionary(kind):
        return "label" if _text_kind(pa, kind.value_type) else None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if kind == pa.string_view():
        return "text"
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view()
    return "label" if is_bytes else None


def _bytes_of(pa: Any, column: Any) -> list[bytes | None]:
    """As bytes, since Arrow does not promise that a string is UTF-8."""
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
