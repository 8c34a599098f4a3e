"""Turns `--data` into token streams: tokenizes text once into a cached folder, or opens shards where they are.

A corpus folder holds train_*.bin, val_*.bin, tokenizer/ and manifest.json with the SHA-256 of every shard. Its name
ends in a hash of everything that decides its content: the bytes of the source files, the tokenizer or the settings to
train one, and the split. A folder that exists is therefore the right one. It is built under another name, flushed to
the disk and renamed, so a build that is killed leaves nothing that a later run takes for a corpus.

If the training documents are tokenized while training runs (streaming.py), the folder has no train_*.bin. Its hash
is then that of the names and sizes of the source files, and of the first and last bytes of each.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from nanochat_native.data.documents import DocumentPart, ReadingPlan, is_held_out, plan_reading, read_document_parts
from nanochat_native.data.file_names import last_shard, printable
from nanochat_native.data.shards import ShardWriter, TokenStream, open_shard, token_dtype
from nanochat_native.data.sources import Skipped, Source, find_source
from nanochat_native.data.streaming import TextDocuments
from nanochat_native.data.tokenizer import MIN_VOCAB_SIZE, TOKENIZER_FILE, Tokenizer
from nanochat_native.runtime import hardware
from nanochat_native.runtime.files import fsync, sha256_file, sha256_json, write_atomically

Progress = Callable[[str, int, int], None]
Log = Callable[[str], None]

MANIFEST = "manifest.json"
SPLITS = ("train", "val")
# Merges settle long before this much text, and rustbpe's word counts of it fit in 4 GB even for random text.
TOKENIZER_TRAINING_CHARS = 1 << 27
# Where the last shard validates, or documents are tokenized while training runs, the tokenizer is trained on the
# first documents, up to this many characters of each, as in nanochat (scripts/tok_train.py).
TOKENIZER_DOCUMENT_CHARS = 10_000
# Text for validation, if the training documents are tokenized while training runs and no shard is for validation.
HELD_OUT_CHARS = 1 << 26
# Computing the SHA-256 of a file again takes a second for every 1.5 GB; up to this size nobody notices.
FULL_CHECK_BYTES = 1 << 28

_FORMAT = "nanochat_native.corpus"
_VERSION = 1
_JOB_CHARS = 1 << 18
_EDGE_BYTES = 1 << 16  # of the beginning and of the end of a file, which stand for its content
# Kinds of files that hold many documents each. A plain text is mostly one document.
_KINDS_OF_RECORDS = {"parquet", "jsonl", "json"}

# The token that begins a document in shards of llm.c, by the bytes of a token.
_LLM_C_BOS = {2: 50256, 4: 128000}

Validation = Literal["fraction", "shards", "last-shard"]
Tokenize = Literal["ahead", "while-training"]


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate on.

    Attributes:
        tokenizer: None for token shards without one; there are then no samples and no bits per byte.
        vocab_size: every token of both streams is below it.
        train, val: each document begins with `<|bos|>`, except in token shards, which are used as they are.
        description: one line with source, size, hash, vocabulary and bytes per token.
        notes: what was skipped, or differs from the default; one line each.
        hash: SHA-256, in hex, of tokens and tokenizer: equal hashes train equal models.
        bytes_per_token: mean bytes of text for each token, `<|bos|>` included; None if the text is not known. If
            training documents are tokenized while training runs, it is that of the validation text.
        bos_id: the token that begins a document: `<|bos|>`, or the one of llm.c's shards; None if it is not known.
        documents: the training documents, if they are tokenized while training runs; `train` is then empty.
        files: the paths of the files of `--data` below its folder; none for a corpus folder and the standard library.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    train: TokenStream
    val: TokenStream
    description: str
    notes: tuple[str, ...]
    hash: str
    bytes_per_token: float | None
    bos_id: int | None = None
    documents: TextDocuments | None = None
    files: tuple[str, ...] = ()


def prepare(
    data: str | None = None,
    *,
    vocab_size: int,
    cache_dir: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    text_column: str | None = None,
    val_fraction: float = 0.05,
    validation: Validation = "fraction",
    tokenize: Tokenize = "ahead",
    skip_damaged: bool = False,
    needs_training: bool = True,
    only: Sequence[str] | None = None,
    verify: bool | None = None,
    progress: Progress | bool | None = None,
    log: Log | None = None,
) -> Corpus:
    """Return `data` as a corpus: from the cache if the same content was prepared before, else built now.

    Validation documents are chosen by a hash of their text. Equal documents are therefore never in both splits, and
    their order does not matter. If there are too few documents for that, the end of the text becomes the validation
    set, and a note says so. With `validation="last-shard"` the documents of the last file validate, as in nanochat.

    Args:
        data: A file, folder or glob of text, .jsonl, .ndjson, .json (all of these also as .gz and .zst), .parquet, or
            llm.c's token shards (.bin); or a corpus folder. None is Python's own standard library.
        vocab_size: Number of ids to train a tokenizer for. Ignored if `tokenizer` is given. For token shards without a
            tokenizer, the size that all their tokens must be below.
        cache_dir: Folder in which corpora are kept; created if missing.
        tokenizer: A tokenizer, or a folder that holds one, to use instead of training one.
        text_column: Field with the text in records of .jsonl, .ndjson, .json and .parquet; None detects it.
        val_fraction: Fraction of the text to validate on, in (0, 0.5].
        validation: "fraction"; "last-shard"; or "shards", which takes the last shard of several numbered files of
            parquet or JSON, see file_names.last_shard, and else the fraction. Token shards are split by their names.
        tokenize: "ahead", or "while-training": only the tokenizer and the validation text are then prepared.
        skip_damaged: Read damaged files up to the damage and count them, instead of raising.
        needs_training: Refuse token shards whose names all say validation; without it, they become `val`.
        only: Paths below the folder of `data`: read these files alone. None, or a file that is missing: read all.
        verify: Check the SHA-256 of all shards of a cached corpus; None does so if they take at most 256 MB. Headers
            and sizes are always checked.
        progress: Called with (stage, bytes done, total bytes); True for a bar, False for none, None for a bar on a
            terminal only.
        log: Called with one line of text for each stage and note; None uses `logging` at level INFO.

    Raises:
        FileNotFoundError: There is no such data.
        ValueError: There is no text, or none in most records of a file; a file is damaged; an argument is invalid; a
            token is outside the vocabulary; the tokenizer is not that of the shards. The message names the file.
        ImportError: A file needs the extra `data`.
        OSError: The disk is too small.
    """
    if not 0 < val_fraction <= 0.5:
        raise ValueError(f"val_fraction must be in (0, 0.5], got {val_fraction}")
    log = logging.getLogger("nanochat_native").info if log is None else log
    if isinstance(tokenizer, str | Path):
        tokenizer = Tokenizer.load(tokenizer)
    if data and _is_corpus(folder := Path(os.path.expanduser(data))):
        _refuse_text_column(text_column, printable(data))
        _refuse_for_tokens(validation, tokenize, printable(data))
        corpus = _open(folder, verify)
        if tokenizer is not None and corpus.tokenizer is not None and tokenizer.hash != corpus.tokenizer.hash:
            raise ValueError(f"{data}: made with tokenizer {corpus.tokenizer.hash[:8]}, got {tokenizer.hash[:8]}")
    else:
        cache_dir = Path(cache_dir).expanduser()
        cache_dir.mkdir(parents=True, exist_ok=True)
        source = find_source(data, without=cache_dir)
        if only:
            source = source.only(only)
        bar = _ProgressBar(progress)
        if source.is_tokens:
            _refuse_text_column(text_column, source.name)
            _refuse_for_tokens(validation, tokenize, source.name)
            corpus = _open_tokens(source, vocab_size, tokenizer, val_fraction, needs_training, cache_dir, bar)
        else:
            if tokenizer is None and vocab_size < MIN_VOCAB_SIZE:
                raise ValueError(f"vocab_size must be >= {MIN_VOCAB_SIZE}, got {vocab_size}")
            plan = plan_reading(source.files, text_column, skip_damaged)
            validation_file = _validation_file(source, plan, validation)
            streamed = tokenize == "while-training"
            if streamed:
                digests = [_edge_digest(path) for path in source.files]
            else:
                digests = [entry["sha256"] for entry in _file_digests(source, cache_dir, bar)]
            recipe = _Recipe(
                source,
                plan,
                digests,
                tokenizer,
                vocab_size,
                text_column,
                val_fraction,
                skip_damaged,
                validation_file,
                streamed,
            )
            corpus = _open_or_build(recipe, cache_dir, verify, bar, log)
            if streamed:
                corpus = _with_documents(corpus, recipe)
        if data is not None:
            corpus = replace(corpus, files=source.paths)
    for note in corpus.notes:
        log(note)
    return corpus


def _refuse_text_column(text_column: str | None, name: str) -> None:
    if text_column is not None:
        raise ValueError(f"--text-column must not be given for {name}, which holds tokens; got {text_column!r}")


def _refuse_for_tokens(validation: Validation, tokenize: Tokenize, name: str) -> None:
    for option, value, allowed in (("validation", validation, "fraction or shards"), ("tokenize", tokenize, "ahead")):
        if value in ("last-shard", "while-training"):
            raise ValueError(f"train's --{option} must be {allowed} for {name}, which holds tokens; got {value}")


def _validation_file(source: Source, plan: ReadingPlan, validation: Validation) -> int | None:
    """Return the index of the file that validates; None if documents of all files do."""
    if validation == "fraction":
        return None
    last = last_shard(source.files)
    if validation == "shards":
        return last if {reading.kind for reading in plan.readings} <= _KINDS_OF_RECORDS else None
    if len(source.files) < 2:
        raise ValueError(f"train's --validation last-shard needs two files or more, got {source.name}, which is one")
    return len(source.files) - 1 if last is None else last


def _edge_digest(path: Path) -> str:
    """Return a hash of the size, the beginning and the end of a file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        begin = file.read(_EDGE_BYTES)
        file.seek(max(0, size - _EDGE_BYTES))
        return sha256_json([size, hashlib.sha256(begin + file.read(_EDGE_BYTES)).hexdigest()])


def _with_documents(corpus: Corpus, recipe: _Recipe) -> Corpus:
    """Return a corpus that was built without training tokens, with the documents to tokenize."""
    assert corpus.tokenizer is not None
    kept = [i for i in range(len(recipe.source.files)) if i != recipe.validation_file]
    documents = TextDocuments(
        files=tuple(recipe.source.files[i] for i in kept),
        sizes=tuple(recipe.source.files[i].stat().st_size for i in kept),
        readings=tuple(recipe.plan.readings[i] for i in kept),
        tokenizer=corpus.tokenizer,
        text_column=recipe.text_column,
        skip_damaged=recipe.skip_damaged,
        val_fraction=recipe.val_fraction if recipe.validation_file is None else 0.0,
    )
    content = sha256_json([corpus.tokenizer.hash, corpus.hash, recipe.content()])
    return replace(corpus, documents=documents, hash=content)


@dataclass(frozen=True)
class _Recipe:
    """Everything that decides the content of a corpus that is built from text.

    Attributes:
        digests: SHA-256 of each file of the source; if it is streamed, of its size, beginning and end.
        tokenizer: None trains one for `vocab_size` ids.
        validation_file: index of the file that validates; None: a fraction of the documents does.
        streamed: whether the training documents are tokenized while training runs.
    """

    source: Source
    plan: ReadingPlan
    digests: Sequence[str]
    tokenizer: Tokenizer | None
    vocab_size: int
    text_column: str | None
    val_fraction: float
    skip_damaged: bool
    validation_file: int | None = None
    streamed: bool = False

    def cache_key(self) -> str:
        """Return the hash at the end of the corpus folder's name."""
        return sha256_json(self.content())[:16]

    @property
    def trains_on_prefix(self) -> bool:
        """Whether the tokenizer is trained on the first documents, instead of on the beginning of each file."""
        return self.streamed or self.validation_file is not None

    def content(self) -> dict[str, Any]:
        """Return what decides the content of the corpus."""
        files: list[list[str | None]] = [
            [digest, *path.suffixes[-2:]] for digest, path in zip(self.digests, self.source.files, strict=True)
        ]
        for file, reading, as_before in zip(files, self.plan.readings, self.plan.same_as_version_1, strict=True):
            file += () if as_before else reading[:4]
        trained = ["rustbpe", importlib.metadata.version("rustbpe"), self.vocab_size]
        how = {
            "version": _VERSION,
            "files": files,
            "tokenizer": self.tokenizer.hash if self.tokenizer else trained,
            "text_column": self.text_column,
            "val_fraction": self.val_fraction,
            "skip_damaged": self.skip_damaged,
        }
        # Corpora from before these settings keep their hash.
        if self.validation_file is not None:
            how["validation_file"] = self.validation_file
        if self.streamed:
            how["streamed"] = list(self.source.paths)
        return how

    def source_hash(self) -> str:
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()


def _open_or_build(recipe: _Recipe, cache_dir: Path, verify: bool | None, bar: _ProgressBar, log: Log) -> Corpus:
    """Open the corpus of a recipe in the cache; build it there first if it is missing or damaged."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe.source.name).strip(".-")[:40]
    folder = cache_dir / f"{slug}-{recipe.cache_key()}"
    notes = (*recipe.source.notes, *recipe.plan.notes)
    with _locked(folder.with_name(f"{folder.name}.lock"), log):
        if folder.exists():
            try:
                corpus = _open(folder, verify)
                return replace(corpus, notes=notes + corpus.notes)
            except (ValueError, OSError) as error:
                notes = (f"cached corpus refused and built again: {error}", *notes)
                shutil.rmtree(folder)
        building = folder.with_name(f"{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        try:
            building.mkdir()
            (_StreamedBuilder if recipe.streamed else _Builder)(recipe, bar, log).build(building)
            fsync(building)
            building.rename(folder)
            fsync(cache_dir)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        corpus = _open(folder, verify=False)
    return replace(corpus, notes=notes + corpus.notes)


@dataclass
class _TextCounts:
    """The size of all text, as counted by the first pass over the sources."""

    documents: int = 0
    chars: int = 0
    text_bytes: int = 0
    val_bytes: int = 0  # in documents whose hash puts them into the validation set


class _Builder:
    """Builds a corpus. It reads the sources twice: to count and to train the tokenizer, and then to encode."""

    def __init__(self, recipe: _Recipe, bar: _ProgressBar, log: Log) -> None:
        self.recipe, self.source, self.bar, self.log = recipe, recipe.source, bar, log
        self.sizes = [path.stat().st_size for path in self.source.files]
        self.stamps = [path.stat().st_mtime_ns for path in self.source.files]
        self.counts = _TextCounts()
        self.skipped = Skipped()
        self.threads = hardware.usable_cores()

    def build(self, folder: Path) -> None:
        """Write the corpus into an empty folder."""
        tokenizer = self._count_and_train()
        notes = self._vocabulary_notes(tokenizer)
        fraction = self.recipe.val_fraction
        by_document = fraction / 4 <= self.counts.val_bytes / self.counts.text_bytes <= 4 * fraction
        if self.recipe.validation_file is not None:
            by_document = True
            notes.append(self._validation_note())
            if self.counts.val_bytes == self.counts.text_bytes:
                raise ValueError(f"no text to train on in {self.source.name}: only the last shard has text")
        elif not by_document:
            notes.append(
                f"too few documents ({self.counts.documents}) to split by document: "
                f"the last {fraction:.0%} of the text is the validation set"
            )
        notes += self.skipped.notes()

        writers = self._write_shards(folder, tokenizer, by_document)
        for path, size, stamp in zip(self.source.files, self.sizes, self.stamps, strict=True):
            if (path.stat().st_size, path.stat().st_mtime_ns) != (size, stamp):
                raise ValueError(f"{printable(path)}: changed while it was read")
        tokenizer.save(folder / "tokenizer")
        content = self._manifest(tokenizer, writers, notes)
        write_atomically(folder / MANIFEST, json.dumps({**content, "sha256": sha256_json(content)}, indent=1))

    def _vocabulary_notes(self, tokenizer: Tokenizer) -> list[str]:
        """Return a note if the tokenizer has fewer ids than were asked for."""
        if tokenizer.vocab_size >= self.recipe.vocab_size:
            return []
        return [
            f"vocabulary of {tokenizer.vocab_size:,}, not {self.recipe.vocab_size:,}: the text has no more pairs "
            "to merge"
        ]

    def _validation_note(self) -> str:
        """Return the note about the file that validates. Raise ValueError if it has no text."""
        path = self.source.files[self.recipe.validation_file or 0]
        if not self.counts.val_bytes:
            raise ValueError(f"{printable(path)}: no text in the last shard, which is the validation set")
        return f"validation: the last shard, {printable(path.name)}"

    def _count_and_train(self) -> Tokenizer:
        """Count all text. Return the tokenizer that was given, or one that is trained on the text."""
        tokenizer = self.recipe.tokenizer
        if tokenizer is None:
            self.log(f"training a tokenizer for {self.recipe.vocab_size} ids on {self.source.name}")
            tokenizer = Tokenizer.train(self._scan("training the tokenizer"), self.recipe.vocab_size)
        else:
            deque(self._scan("reading"), maxlen=0)
        if self.counts.documents == 0:
            found = [f"no text in {self.source.name}", *self.source.notes, *self.skipped.notes()]
            encodings = "text must be in UTF-8, or in UTF-16 or UTF-32 with a byte order mark"
            raise ValueError("; ".join([*found, encodings]))
        return tokenizer

    def _write_shards(self, folder: Path, tokenizer: Tokenizer, by_document: bool) -> list[ShardWriter]:
        """Encode all text into shards. Return the closed writers of the training and the validation shards."""
        dtype = token_dtype(tokenizer.vocab_size)
        # Text that is worth training on takes at most one token for every two bytes.
        needed, free = self.counts.text_bytes // 2 * dtype.itemsize, shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"{folder.parent}: {free / 1e9:.1f} GB free, the token shards may take {needed / 1e9:.1f} GB")
        writers = [ShardWriter(folder, split, dtype) for split in SPLITS]
        with ThreadPoolExecutor(self.threads) as pool:
            for parts in self._encoded(pool, tokenizer, None if by_document else self._tail_start()):
                for writer, tokens in zip(writers, parts, strict=True):
                    writer.write(tokens)
        for writer in writers:
            writer.close()
        return writers

    def _manifest(self, tokenizer: Tokenizer, writers: Sequence[ShardWriter], notes: list[str]) -> dict[str, Any]:
        source_hash, text_bytes = self.recipe.source_hash(), self.counts.text_bytes
        bytes_per_token = text_bytes / sum(writer.tokens for writer in writers)
        files = f"{len(self.source.files):,} file{'s' if len(self.source.files) > 1 else ''}"
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "description": f"{self.source.name}, {files}, {text_bytes / 1e6:.1f} MB, sha {source_hash[:8]} | "
            f"vocabulary {tokenizer.vocab_size}, {bytes_per_token:.2f} bytes a token",
            "notes": notes,
            "source_sha256": source_hash,
            "documents": self.counts.documents,
            "text_bytes": text_bytes,
            "bytes_per_token": bytes_per_token,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash,
            "shards": {
                split: [{"file": path.name, "sha256": sha256_file(path)} for path in writer.paths]
                for split, writer in zip(SPLITS, writers, strict=True)
            },
        }

    def _parts(self, stage: str, skipped: Skipped, only: int | None = None) -> Iterator[tuple[int, DocumentPart]]:
        """Yield (index of the file, part of a document) over all files, or over the one with the index `only`."""
        total, before = sum(self.sizes) if only is None else self.sizes[only], 0
        with self.bar.stage(stage, total) as advance:
            readings = zip(self.source.files, self.recipe.plan.readings, strict=True)
            for index, (path, reading) in enumerate(readings):
                if only not in (None, index):
                    continue
                for part in read_document_parts(
                    path,
                    reading,
                    text_column=self.recipe.text_column,
                    skip_damaged=self.recipe.skip_damaged,
                    skipped=skipped,
                ):
                    yield index, part
                    advance(before + part.position)
                before += self.sizes[index]
                advance(before)

    def _scan(self, stage: str) -> Iterator[str]:
        """Count all text, and yield the text to train the tokenizer on: the beginning of each file, in proportion to
        its size, or the first documents that are trained on."""
        counts, total = self.counts, sum(self.sizes)
        file, budget, in_validation = -1, 0, False
        prefix = _Prefix() if self.recipe.trains_on_prefix else None
        for index, part in self._parts(stage, self.skipped):
            if index != file:
                file, budget = index, -(-TOKENIZER_TRAINING_CHARS * self.sizes[index] // total)
            encoded = part.text.encode()
            if part.starts_document:
                in_validation = self._in_validation(index, encoded)
                counts.documents += 1
            counts.chars += len(part.text)
            counts.text_bytes += len(encoded)
            counts.val_bytes += len(encoded) * in_validation
            if prefix is not None:
                if not in_validation:
                    yield prefix.take(part)
            elif budget > 0:
                yield part.text[:budget]
                budget -= len(part.text)

    def _in_validation(self, file: int, document: bytes) -> bool:
        if self.recipe.validation_file is not None:
            return file == self.recipe.validation_file
        return is_held_out(document, self.recipe.val_fraction)

    def _tail_start(self) -> int:
        """Return the character of the whole text at which the validation set begins, if it is the end of the text."""
        return min(self.counts.chars - 1, round(self.counts.chars * (1 - self.recipe.val_fraction)))

    def _jobs(self, tail_start: int | None) -> Iterator[list[tuple[str, bool, bool]]]:
        """Yield lists of (text, whether it begins with <|bos|>, whether it is validation), of about equal length."""
        job: list[tuple[str, bool, bool]] = []
        size = chars = 0
        in_validation = False
        for file, (text, starts, _) in self._parts("tokenizing", Skipped()):
            if tail_start is None:
                if starts:
                    in_validation = self._in_validation(file, text.encode())
                job.append((text, starts, in_validation))
            else:
                cut = min(max(tail_start - chars, 0), len(text))
                if cut:
                    job.append((text[:cut], starts, False))
                if cut < len(text):
                    job.append((text[cut:], starts or chars + cut == tail_start, True))
                chars += len(text)
            size += len(text)
            if size >= _JOB_CHARS:
                yield job
                job, size = [], 0
        yield job

    def _encoded(
        self, pool: ThreadPoolExecutor, tokenizer: Tokenizer, tail_start: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (training tokens, validation tokens) in the order of the sources, encoded some jobs ahead."""
        bos = np.array([tokenizer.bos_id], dtype=np.uint32)

        def encode(job: list[tuple[str, bool, bool]]) -> tuple[np.ndarray, np.ndarray]:
            parts: tuple[list[np.ndarray], list[np.ndarray]] = ([bos[:0]], [bos[:0]])
            for text, starts, in_validation in job:
                parts[in_validation].extend((bos[: int(starts)], tokenizer.encode_to_numpy(text)))
            return np.concatenate(parts[0]), np.concatenate(parts[1])

        ahead: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        for job in self._jobs(tail_start):
            ahead.append(pool.submit(encode, job))
            if len(ahead) > 2 * self.threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class _Prefix:
    """Takes the first documents to train a tokenizer on: TOKENIZER_TRAINING_CHARS in all, and of each document at most
    TOKENIZER_DOCUMENT_CHARS."""

    def __init__(self) -> None:
        self.left, self._left_of_document = TOKENIZER_TRAINING_CHARS, 0

    def take(self, part: DocumentPart) -> str:
        """Return what is taken of the next part of a document."""
        if part.starts_document:
            self._left_of_document = TOKENIZER_DOCUMENT_CHARS
        text = part.text[: min(self.left, self._left_of_document)]
        self.left -= len(text)
        self._left_of_document -= len(text)
        return text


class _StreamedBuilder(_Builder):
    """Builds a corpus without training tokens: the tokenizer, and the validation text. It reads only what it needs."""

    def build(self, folder: Path) -> None:
        tokenizer = self.recipe.tokenizer
        if tokenizer is None:
            self.log(f"training a tokenizer for {self.recipe.vocab_size} ids on the first text of {self.source.name}")
            tokenizer = Tokenizer.train(self._first_text(), self.recipe.vocab_size)
        dtype = token_dtype(tokenizer.vocab_size)
        writers = [ShardWriter(folder, split, dtype) for split in SPLITS]
        with ThreadPoolExecutor(self.threads) as pool:
            for _, tokens in self._encoded(pool, tokenizer, None):
                writers[1].write(tokens)
        writers[1].close()
        notes = self._vocabulary_notes(tokenizer)
        if self.recipe.validation_file is not None:
            notes.append(self._validation_note())
        elif self.counts.val_bytes:
            notes.append(f"validation: {self.counts.documents:,} documents of the first files")
        else:
            raise ValueError(
                f"too few documents in {self.source.name} to hold some out for validation, or no text: use "
                "train's --tokenize ahead"
            )
        tokenizer.save(folder / "tokenizer")
        content = self._manifest(tokenizer, writers, notes + self.skipped.notes())
        sizes = sum(self.sizes)
        content["description"] = (
            f"{self.source.name}, {len(self.sizes):,} files, {sizes / 1e6:.1f} MB, tokenized while training runs | "
            f"vocabulary {tokenizer.vocab_size}, {content['bytes_per_token']:.2f} bytes a token"
        )
        write_atomically(folder / MANIFEST, json.dumps({**content, "sha256": sha256_json(content)}, indent=1))

    def _first_text(self) -> Iterator[str]:
        """Yield the text to train the tokenizer on."""
        prefix = _Prefix()
        in_validation = False
        for file, part in self._parts("training the tokenizer", Skipped()):
            if part.starts_document:
                in_validation = self._in_validation(file, part.text.encode())
            if not in_validation:
                yield prefix.take(part)
            if prefix.left == 0:
                return

    def _jobs(self, tail_start: int | None) -> Iterator[list[tuple[str, bool, bool]]]:
        """Yield the documents that validate: those of the last shard, or held-out ones up to HELD_OUT_CHARS."""
        job: list[tuple[str, bool, bool]] = []
        size = 0
        only = self.recipe.validation_file
        in_validation = False
        for file, part in self._parts("tokenizing the validation text", self.skipped, only):
            encoded = part.text.encode()
            if part.starts_document:
                if only is None and self.counts.chars >= HELD_OUT_CHARS:
                    break
                in_validation = self._in_validation(file, encoded)
                self.counts.documents += in_validation
            if not in_validation:
                continue
            self.counts.chars += len(part.text)
            self.counts.text_bytes += len(encoded)
            self.counts.val_bytes += len(encoded)
            job.append((part.text, part.starts_document, True))
            size += len(part.text)
            if size >= _JOB_CHARS:
                yield job
                job, size = [], 0
        yield job


def _is_corpus(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / "train_000000.bin").is_file()


def _open(folder: Path, verify: bool | None) -> Corpus:
    """Open a corpus folder. Raise ValueError or FileNotFoundError with the name of a damaged or missing file."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("sha256")
        found = (manifest["format"], manifest["version"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, or not a corpus of this program ({error!r})") from error
    if found != (_FORMAT, _VERSION):
        raise ValueError(f"{path}: must be {_FORMAT} version {_VERSION}, got {found[0]} version {found[1]}")
    if sha256_json(manifest) != digest:
        raise ValueError(f"{path}: damaged: its content does not match its SHA-256")
    shards: dict[str, list[dict[str, str]]] = manifest["shards"]
    train, val = (TokenStream([open_shard(folder / shard["file"]) for shard in shards[s]]) for s in SPLITS)
    checksums = [(folder / shard["file"], shard["sha256"]) for shard in shards["train"] + shards["val"]]
    if verify is None:
        verify = sum(shard.stat().st_size for shard, _ in checksums) <= FULL_CHECK_BYTES
    for shard, expected in checksums if verify else []:
        if sha256_file(shard) != expected:
            raise ValueError(f"{shard}: damaged: its content does not match the SHA-256 in {MANIFEST}")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if tokenizer.hash != manifest["tokenizer_hash"]:
        raise ValueError(f"{folder / 'tokenizer'}: not the tokenizer that made the shards")
    return Corpus(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        train=train,
        val=val,
        description=manifest["description"],
        notes=tuple(manifest["notes"]),
        hash=sha256_json([manifest["tokenizer_hash"], manifest["shards"]]),
        bytes_per_token=manifest["bytes_per_token"],
        bos_id=tokenizer.bos_id,
    )


def _open_tokens(
    source: Source,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    val_fraction: float,
    needs_training: bool,
    cache_dir: Path,
    bar: _ProgressBar,
) -> Corpus:
    """Open token shards where they are. A training shard with the bytes of a validation shard is left out."""
    tokenizer = _tokenizer_of(source, tokenizer)
    vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
    arrays = {path: open_shard(path) for path in source.files}
    entries = _file_digests(source, cache_dir, bar)
    for (path, array), entry in zip(arrays.items(), entries, strict=True):
        if entry["max_token"] >= vocab_size:
            position = next(
                start + int(np.argmax(array[start : start + (1 << 24)] >= vocab_size))
                for start in range(0, len(array), 1 << 24)
                if array[start : start + (1 << 24)].max() >= vocab_size
            )
            raise ValueError(
                f"{printable(path)}: tokens must be below the vocabulary size {vocab_size}, got {array[position]} at "
                f"position {position}: give the tokenizer, or the vocabulary size, that the shard was made with"
            )
    notes = list(source.notes)
    digests = [entry["sha256"] for entry in entries]
    held_out = {digest for digest, is_val in zip(digests, source.is_validation, strict=True) if is_val}
    sides = []
    for path, digest, is_val in zip(source.files, digests, source.is_validation, strict=True):
        sides.append("val" if is_val else "train" if digest not in held_out else "neither")
        if sides[-1] == "neither":
            notes.append(f"{printable(path)} has the same bytes as a validation shard: it is not trained on")
    train, val = (
        TokenStream([array for array, side in zip(arrays.values(), sides, strict=True) if side == wanted])
        for wanted in SPLITS
    )
    if not len(train) + len(val):
        raise ValueError(f"no tokens in {source.name}")
    if not len(train) and needs_training:
        raise ValueError(
            f"{source.name} has nothing to train on: by their names, all shards are for validation ({len(val):,} "
            "tokens); rename some, or give a single file, whose name is not looked at"
        )
    if not len(val):
        train, val = train.split_at(round(len(train) * (1 - val_fraction)))
        notes.append(f"no shard is named for validation: the last {val_fraction:.0%} of the tokens validate")
    if tokenizer is None:
        notes.append("no tokenizer beside the shards: no samples, and the loss is in nats instead of bits per byte")
    content = sha256_json(digests if sides == _version_1_sides(source.files) else [digests, sides])
    return Corpus(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        train=train,
        val=val,
        description=f"{source.name}, {len(source.files):,} shards, {(len(train) + len(val)) / 1e6:.1f}M tokens, "
        f"sha {content[:8]} | vocabulary {vocab_size}",
        notes=tuple(notes),
        hash=sha256_json([tokenizer.hash if tokenizer else vocab_size, content]),
        bytes_per_token=None if tokenizer is None else _mean_bytes(train if len(train) else val, tokenizer),
        bos_id=tokenizer.bos_id if tokenizer else _llm_c_bos_id(arrays.values(), vocab_size),
    )


def _llm_c_bos_id(arrays: Iterable[np.ndarray], vocab_size: int) -> int | None:
    """Return the token that llm.c's scripts put before each document; None if the vocabulary lacks it.

    It is <|endoftext|> of GPT-2 in shards of uint16, and <|begin_of_text|> of Llama 3 in those of uint32.
    """
    bos_id = max((_LLM_C_BOS[array.dtype.itemsize] for array in arrays), default=0)
    return bos_id if 0 < bos_id < vocab_size else None


def _tokenizer_of(source: Source, given: Tokenizer | None) -> Tokenizer | None:
    """Return the tokenizer beside the shards, or `given` if there is none. Raise ValueError if two of them differ."""
    tokenizer, origin = given, "given"
    for beside in sorted({source.root, *(path.parent for path in source.files)}):
        for folder in (beside, beside / "tokenizer"):
            if (folder / TOKENIZER_FILE).is_file():
                found = Tokenizer.load(folder)
                if tokenizer is not None and tokenizer.hash != found.hash:
                    raise ValueError(
                        f"{printable(folder)}: the shards' tokenizer is {found.hash[:8]}, but the one {origin} is "
                        f"{tokenizer.hash[:8]}"
                    )
                tokenizer, origin = found, f"in {printable(folder)}"
    return tokenizer


def _version_1_sides(files: tuple[Path, ...]) -> list[str]:
    """Return the split as version 1 made it, whose hash covered the digests alone: an equal split keeps that hash."""
    sides = ["val" if "val" in path.stem else "train" for path in files]
    return sides if "train" in sides else ["train"] * len(sides)


def _mean_bytes(stream: TokenStream, tokenizer: Tokenizer) -> float:
    """Return the mean bytes per token over the first million tokens."""
    return float(tokenizer.token_bytes[stream.read(0, min(len(stream), 1_000_000))].mean())


def _file_digests(source: Source, cache_dir: Path, bar: _ProgressBar) -> list[dict[str, Any]]:
    """Return the SHA-256 of each file and, for token shards, the largest token.

    Results for large files are cached by path, size and time of change, unless that time is so recent that a second
    change could have the same one.
    """
    memo_path = cache_dir / "digests.json"
    try:
        memo = json.loads(memo_path.read_bytes())
    except (OSError, ValueError):
        memo = {}
    fresh = {}
    entries = []
    stats = [path.stat() for path in source.files]
    done = 0
    with bar.stage("checking", sum(stat.st_size for stat in stats)) as advance:
        for path, stat in zip(source.files, stats, strict=True):
            name = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
            entry = memo.get(name)
            if entry is None or (source.is_tokens and "max_token" not in entry):
                entry = {"sha256": sha256_file(path)}
                if source.is_tokens:
                    tokens = open_shard(path)
                    starts = range(0, len(tokens), 1 << 24)
                    entry["max_token"] = max((int(tokens[i : i + (1 << 24)].max()) for i in starts), default=-1)
                if stat.st_size >= 1 << 24 and time.time_ns() - stat.st_mtime_ns > 5e9:
                    fresh[name] = entry
            entries.append(entry)
            done += stat.st_size
            advance(done)
    if fresh:
        write_atomically(memo_path, json.dumps({**memo, **fresh}))
    return entries


class _ProgressBar:
    """Reports the progress of stages, one after the other, to a caller's function or a tqdm bar."""

    def __init__(self, progress: Progress | bool | None) -> None:
        self._progress = progress

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        progress = self._progress
        if callable(progress):
            yield lambda done: progress(name, done, total)
            return
        # To tqdm, None means: only on a terminal.
        disable = None if progress is None else not progress
        with tqdm(total=total, desc=name, unit="B", unit_scale=True, leave=False, disable=disable) as bar:
            yield lambda done: bar.update(done - bar.n) and None


@contextlib.contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Hold the lock on `path`, so that one process builds the corpus while others wait for it. The system releases the
    lock of a process that dies."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("waiting for another process that is preparing this data")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
