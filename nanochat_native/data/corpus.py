"""From `--data` to token streams: tokenize once into a cached folder of shards, or open shards in place.

A corpus folder holds train_*.bin, val_*.bin, tokenizer/ and manifest.json with the SHA-256 of every shard. Its name
ends in a hash of everything that decides its content (the sources' bytes, the tokenizer or its training settings,
the split), so a folder that exists is the right one. It is built under another name, flushed and renamed: a build
that is killed leaves nothing that a later run takes for a corpus.
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanochat_native.data.documents import Decision, Piece, decide, read_pieces
from nanochat_native.data.names import shown
from nanochat_native.data.shards import ShardWriter, TokenStream, open_shard, token_dtype
from nanochat_native.data.sources import Skipped, Source, find_source
from nanochat_native.data.tokenizer import MIN_VOCAB_SIZE, TOKENIZER_FILE, Tokenizer
from nanochat_native.runtime.files import fsync, sha256_file, write_atomically

Progress = Callable[[str, int, int], None]
Log = Callable[[str], None]

MANIFEST = "manifest.json"
# Merges settle long before this much text, and rustbpe's word counts of it fit in 4 GB even for random text.
TOKENIZER_TRAINING_CHARS = 1 << 27
# Reading a file's SHA-256 again takes a second for every 1.5 GB; up to here it is not felt.
FULL_CHECK_BYTES = 1 << 28

_FORMAT = "nanochat_native.corpus"
_VERSION = 1
_JOB_CHARS = 1 << 18


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and to validate on.

    Attributes:
        tokenizer: None for token shards that came without one: then there are no samples and no bits per byte.
        vocab_size: every token of both streams lies below it.
        train, val: each document begins with `<|bos|>` (shards made elsewhere: as they were made).
        description: one line: source, size, hash, vocabulary, bytes a token.
        notes: what was skipped, or done otherwise than by default; one line each.
        hash: SHA-256, hex, of tokens and tokenizer: equal hashes train equal models.
        bytes_per_token: bytes of text a token stands for, `<|bos|>` counted; None when the text is not known.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    train: TokenStream
    val: TokenStream
    description: str
    notes: tuple[str, ...]
    hash: str
    bytes_per_token: float | None


def prepare(
    data: str | None = None,
    *,
    vocab_size: int,
    cache_dir: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    text_column: str | None = None,
    val_fraction: float = 0.05,
    skip_damaged: bool = False,
    needs_training: bool = True,
    verify: bool | None = None,
    progress: Progress | bool | None = None,
    log: Log | None = None,
) -> Corpus:
    """Turn `data` into a corpus: from the cache when this very content was prepared before, else built now.

    Validation documents are chosen by a hash of their text, so equal documents never lie on both sides and order
    does not matter. Where documents are too few for that, the end of the text is held out, and a note says so.

    Args:
        data: file, folder or glob of text, .jsonl, .ndjson, .json (all of them also .gz and .zst), .parquet, or llm.c's
            token shards (.bin), or a corpus folder; None is Python's own standard library.
        vocab_size: ids to train a tokenizer for. With `tokenizer`, its own size counts. For shards without a
            tokenizer the size that their tokens must stay below.
        cache_dir: where corpora are kept; made when missing.
        tokenizer: a tokenizer, or the folder of one, to use instead of training one.
        text_column: field of the records of .jsonl, .ndjson, .json and .parquet with the text; None finds it.
        val_fraction: share of the text held out, in (0, 0.5].
        skip_damaged: read damaged files as far as they go, and count them, instead of raising.
        needs_training: refuse token shards that by their names all validate; without, they are the corpus's `val`.
        verify: check the SHA-256 of a cached corpus's shards in full; None does when they take at most 256 MB.
            Headers and sizes are always checked.
        progress: called with (stage, bytes done, bytes in all); True for a bar, False for none, None for a bar on
            a terminal.
        log: called with one line of text for each stage and note; None hands them to `logging` (level INFO).

    Raises:
        FileNotFoundError: no such data. ValueError: no text in it, or none in most records of a file, a damaged file
            (named), a bad argument, a token outside the vocabulary (file and position named), a tokenizer other than
            the shards'.
        ImportError: a file needs the extra `data`. OSError: the disk is too small.
    """
    if not 0 < val_fraction <= 0.5:
        raise ValueError(f"val_fraction must lie in (0, 0.5], got {val_fraction}")
    log = logging.getLogger("nanochat_native").info if log is None else log
    if isinstance(tokenizer, str | Path):
        tokenizer = Tokenizer.load(tokenizer)
    if data and _is_corpus(Path(os.path.expanduser(data))):
        if text_column is not None:
            raise ValueError(f"--text-column is {text_column!r}, but {shown(data)} holds tokens")
        corpus = _load(Path(os.path.expanduser(data)), verify)
        if tokenizer is not None and corpus.tokenizer is not None and tokenizer.hash != corpus.tokenizer.hash:
            raise ValueError(f"{data}: made with tokenizer {corpus.tokenizer.hash[:8]}, given {tokenizer.hash[:8]}")
        return _logged(corpus, log)

    cache_dir = Path(cache_dir).expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    source = find_source(data, without=cache_dir)
    bar = _Bar(progress)
    if source.is_tokens:
        if text_column is not None:
            raise ValueError(f"--text-column is {text_column!r}, but {source.name} holds tokens")
        return _logged(_open_tokens(source, vocab_size, tokenizer, val_fraction, needs_training, cache_dir, bar), log)
    if tokenizer is None and vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE}, got {vocab_size}")

    decision = decide(source.files, text_column, skip_damaged)
    digests = [entry["sha256"] for entry in _digests(source, cache_dir, bar)]
    files = [[digest, *path.suffixes[-2:]] for digest, path in zip(digests, source.files, strict=True)]
    for file, reading, as_before in zip(files, decision.readings, decision.as_before, strict=True):
        file += () if as_before else reading[:4]
    how = {
        "version": _VERSION,
        "files": files,
        "tokenizer": tokenizer.hash if tokenizer else ["rustbpe", importlib.metadata.version("rustbpe"), vocab_size],
        "text_column": text_column,
        "val_fraction": val_fraction,
        "skip_damaged": skip_damaged,
    }
    key = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).strip(".-")[:40]
    folder = cache_dir / f"{slug}-{key}"
    notes = (*source.notes, *decision.notes)
    with _locked(folder.with_name(f"{folder.name}.lock"), log):
        if folder.exists():
            try:
                corpus = _load(folder, verify)
                return _logged(replace(corpus, notes=notes + corpus.notes), log)
            except (ValueError, OSError) as error:
                notes = (f"cached corpus refused and built again: {error}", *notes)
                shutil.rmtree(folder)
        building = folder.with_name(f"{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        try:
            building.mkdir()
            builder = _Builder(source, decision, text_column, skip_damaged, val_fraction, bar, log)
            builder.build(building, tokenizer, vocab_size, hashlib.sha256("".join(digests).encode()).hexdigest())
            fsync(building)
            building.rename(folder)
            fsync(cache_dir)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        corpus = _load(folder, verify=False)
    return _logged(replace(corpus, notes=notes + corpus.notes), log)


class _Builder:
    """Reads the sources twice: to count and train the tokenizer, then to encode."""

    def __init__(
        self,
        source: Source,
        decision: Decision,
        text_column: str | None,
        skip_damaged: bool,
        val_fraction: float,
        bar: _Bar,
        log: Log,
    ) -> None:
        self.source, self.readings, self.bar, self.log = source, decision.readings, bar, log
        self.text_column, self.skip_damaged, self.val_fraction = text_column, skip_damaged, val_fraction
        self.sizes = [path.stat().st_size for path in source.files]
        self.stamps = [path.stat().st_mtime_ns for path in source.files]
        self.documents = self.chars = self.text_bytes = self.val_bytes = 0
        self.skipped = Skipped()
        self.threads = len(os.sched_getaffinity(0))

    def build(self, folder: Path, tokenizer: Tokenizer | None, vocab_size: int, source_hash: str) -> None:
        notes = []
        if tokenizer is None:
            self.log(f"training a tokenizer for {vocab_size} ids on {self.source.name}")
            tokenizer = Tokenizer.train(self._scan("training the tokenizer"), vocab_size)
        else:
            deque(self._scan("reading"), maxlen=0)
        if self.documents == 0:
            found = [f"no text in {self.source.name}", *self.source.notes, *self.skipped.lines()]
            raise ValueError(
                "; ".join([*found, "text is read in UTF-8, or with a byte order mark in UTF-16 and UTF-32"])
            )
        if tokenizer.vocab_size < vocab_size:
            notes.append(
                f"vocabulary of {tokenizer.vocab_size:,}, not {vocab_size:,}: the text has no more pairs to merge"
            )
        by_document = self.val_fraction / 4 <= self.val_bytes / self.text_bytes <= 4 * self.val_fraction
        if not by_document:
            notes.append(
                f"too few documents ({self.documents}) to split by document: "
                f"the last {self.val_fraction:.0%} of the text is the validation set"
            )
        notes += self.skipped.lines()

        dtype = token_dtype(tokenizer.vocab_size)
        # No text that is worth training on takes more than one token for every two bytes.
        needed, free = self.text_bytes // 2 * dtype.itemsize, shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"{folder.parent}: {free / 1e9:.1f} GB free, the token shards may take {needed / 1e9:.1f} GB")
        writers = [ShardWriter(folder, split, dtype) for split in ("train", "val")]
        with ThreadPoolExecutor(self.threads) as pool:
            for parts in self._encoded(pool, tokenizer, None if by_document else self._tail_start()):
                for writer, tokens in zip(writers, parts, strict=True):
                    writer.write(tokens)
        for writer in writers:
            writer.close()
        for path, size, stamp in zip(self.source.files, self.sizes, self.stamps, strict=True):
            if (path.stat().st_size, path.stat().st_mtime_ns) != (size, stamp):
                raise ValueError(f"{shown(path)}: changed while it was read")

        tokenizer.save(folder / "tokenizer")
        train_tokens, val_tokens = (writer.tokens for writer in writers)
        bytes_per_token = self.text_bytes / (train_tokens + val_tokens)
        files = f"{len(self.source.files):,} file{'s' if len(self.source.files) > 1 else ''}"
        content: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "description": f"{self.source.name}, {files}, {self.text_bytes / 1e6:.1f} MB, sha {source_hash[:8]} | "
            f"vocabulary {tokenizer.vocab_size}, {bytes_per_token:.2f} bytes a token",
            "notes": notes,
            "source_sha256": source_hash,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "bytes_per_token": bytes_per_token,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash,
            "shards": {
                split: [{"file": path.name, "sha256": sha256_file(path)} for path in writer.paths]
                for split, writer in zip(("train", "val"), writers, strict=True)
            },
        }
        content["sha256"] = _json_hash(content)
        write_atomically(folder / MANIFEST, json.dumps(content, indent=1))

    def _pieces(self, stage: str, skipped: Skipped) -> Iterator[tuple[int, Piece]]:
        """(index of the file, piece) over all files."""
        total, before = sum(self.sizes), 0
        with self.bar.stage(stage, total) as advance:
            for index, (path, reading) in enumerate(zip(self.source.files, self.readings, strict=True)):
                pieces = read_pieces(
                    path, reading, text_column=self.text_column, skip_damaged=self.skip_damaged, skipped=skipped
                )
                for piece in pieces:
                    yield index, piece
                    advance(before + piece.position)
                before += self.sizes[index]
                advance(before)

    def _scan(self, stage: str) -> Iterator[str]:
        """Counts all text, and yields the beginning of each file, in proportion to its size, for the tokenizer."""
        total = sum(self.sizes)
        file, budget, in_validation = -1, 0, False
        for index, piece in self._pieces(stage, self.skipped):
            if index != file:
                file, budget = index, -(-TOKENIZER_TRAINING_CHARS * self.sizes[index] // total)
            encoded = piece.text.encode()
            if piece.starts_document:
                in_validation = self._in_validation(encoded)
                self.documents += 1
            self.chars += len(piece.text)
            self.text_bytes += len(encoded)
            self.val_bytes += len(encoded) * in_validation
            if budget > 0:
                yield piece.text[:budget]
                budget -= len(piece.text)

    def _in_validation(self, document: bytes) -> bool:
        digest = hashlib.blake2b(document, digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.val_fraction * 2**64

    def _tail_start(self) -> int:
        """Character of the whole text at which the validation set begins, when it is the end of the text."""
        return min(self.chars - 1, round(self.chars * (1 - self.val_fraction)))

    def _jobs(self, tail_start: int | None) -> Iterator[list[tuple[str, bool, bool]]]:
        """Lists of (text, begins with <|bos|>, belongs to validation), of about equal length."""
        job: list[tuple[str, bool, bool]] = []
        size = chars = 0
        in_validation = False
        for _, (text, starts, _) in self._pieces("tokenizing", Skipped()):
            if tail_start is None:
                if starts:
                    in_validation = self._in_validation(text.encode())
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
        """(training tokens, validation tokens) in the order of the sources, encoded some jobs ahead."""
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


def _is_corpus(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / "train_000000.bin").is_file()


def _logged(corpus: Corpus, log: Log) -> Corpus:
    for note in corpus.notes:
        log(note)
    return corpus


def _load(folder: Path, verify: bool | None) -> Corpus:
    """Open a corpus folder. ValueError or FileNotFoundError names the damaged or missing file."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("sha256")
        found = (manifest["format"], manifest["version"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, or not a corpus of this program ({error!r})") from error
    if found != (_FORMAT, _VERSION):
        raise ValueError(f"{path}: {found[0]} version {found[1]}; this program reads {_FORMAT} version {_VERSION}")
    if _json_hash(manifest) != digest:
        raise ValueError(f"{path}: damaged: its content does not match its SHA-256")
    shards: dict[str, list[dict[str, str]]] = manifest["shards"]
    train, val = (TokenStream([open_shard(folder / shard["file"]) for shard in shards[s]]) for s in ("train", "val"))
    everything = [(folder / shard["file"], shard["sha256"]) for shard in shards["train"] + shards["val"]]
    if verify is None:
        verify = sum(shard.stat().st_size for shard, _ in everything) <= FULL_CHECK_BYTES
    for shard, expected in everything if verify else []:
        if sha256_file(shard) != expected:
            raise ValueError(f"{shard}: damaged: its content does not match the SHA-256 in {MANIFEST}")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if tokenizer.hash != manifest["tokenizer_hash"]:
        raise ValueError(f"{folder / 'tokenizer'}: not the tokenizer that the shards were made with")
    return Corpus(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        train=train,
        val=val,
        description=manifest["description"],
        notes=tuple(manifest["notes"]),
        hash=_json_hash([manifest["tokenizer_hash"], manifest["shards"]]),
        bytes_per_token=manifest["bytes_per_token"],
    )


def _open_tokens(
    source: Source,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    val_fraction: float,
    needs_training: bool,
    cache_dir: Path,
    bar: _Bar,
) -> Corpus:
    """Use token shards where they lie. One with the bytes of a shard that validates is not trained on."""
    tokenizer = _tokenizer_of(source, tokenizer)
    vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
    arrays = {path: open_shard(path) for path in source.files}
    entries = _digests(source, cache_dir, bar)
    for (path, array), entry in zip(arrays.items(), entries, strict=True):
        if entry["max_token"] >= vocab_size:
            position = next(
                start + int(np.argmax(array[start : start + (1 << 24)] >= vocab_size))
                for start in range(0, len(array), 1 << 24)
                if array[start : start + (1 << 24)].max() >= vocab_size
            )
            raise ValueError(
                f"{shown(path)}: token {array[position]} at position {position} does not belong to a vocabulary of "
                f"{vocab_size}: give the tokenizer, or the vocabulary size, that the shard was made with"
            )
    notes = list(source.notes)
    digests = [entry["sha256"] for entry in entries]
    held_out = {digest for digest, validates in zip(digests, source.validates, strict=True) if validates}
    sides = []
    for path, digest, validates in zip(source.files, digests, source.validates, strict=True):
        sides.append("val" if validates else "train" if digest not in held_out else "neither")
        if sides[-1] == "neither":
            notes.append(f"{shown(path)} has the bytes of a shard that validates: it is not trained on")
    train, val = (
        TokenStream([array for array, side in zip(arrays.values(), sides, strict=True) if side == wanted])
        for wanted in ("train", "val")
    )
    if not len(train) + len(val):
        raise ValueError(f"no tokens in {source.name}")
    if not len(train) and needs_training:
        raise ValueError(
            f"{source.name} holds nothing to train on: by their names all shards validate ({len(val):,} tokens); "
            "rename those to train on, or give one file alone, which is never told by its name"
        )
    if not len(val):
        train, val = train.split_at(round(len(train) * (1 - val_fraction)))
        notes.append(f"no shard validates by its name: the last {val_fraction:.0%} of the tokens is the validation set")
    if tokenizer is None:
        notes.append("no tokenizer beside the shards: no samples, and loss in nats instead of bits per byte")
    content = _json_hash(digests if sides == _version_1_sides(source.files) else [digests, sides])
    return Corpus(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        train=train,
        val=val,
        description=f"{source.name}, {len(source.files):,} shards, {(len(train) + len(val)) / 1e6:.1f}M tokens, "
        f"sha {content[:8]} | vocabulary {vocab_size}",
        notes=tuple(notes),
        hash=_json_hash([tokenizer.hash if tokenizer else vocab_size, content]),
        bytes_per_token=None if tokenizer is None else _mean_bytes(train if len(train) else val, tokenizer),
    )


def _tokenizer_of(source: Source, given: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer beside any of the shards; `given` without one. Raises ValueError where there are several."""
    tokenizer, origin = given, "given"
    for beside in sorted({source.root, *(path.parent for path in source.files)}):
        for folder in (beside, beside / "tokenizer"):
            if (folder / TOKENIZER_FILE).is_file():
                found = Tokenizer.load(folder)
                if tokenizer is not None and tokenizer.hash != found.hash:
                    raise ValueError(
                        f"{shown(folder)}: the shards' tokenizer is {found.hash[:8]}, {origin} {tokenizer.hash[:8]}"
                    )
                tokenizer, origin = found, f"in {shown(folder)}"
    return tokenizer


def _version_1_sides(files: tuple[Path, ...]) -> list[str]:
    """How shards were told apart when the hash held their digests alone: corpora of the same sides keep their hash."""
    sides = ["val" if "val" in path.stem else "train" for path in files]
    return sides if "train" in sides else ["train"] * len(sides)


def _mean_bytes(stream: TokenStream, tokenizer: Tokenizer) -> float:
    """Bytes a token over the first million tokens."""
    return float(tokenizer.token_bytes[stream.read(0, min(len(stream), 1_000_000))].mean())


def _digests(source: Source, cache_dir: Path, bar: _Bar) -> list[dict[str, Any]]:
    """SHA-256 of each file, and of token shards their largest token.

    Those of large files are remembered by path, size and time of change, unless that time is too recent to tell
    two changes apart.
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


class _Bar:
    """Progress of one stage after the other, to a caller's function or a tqdm bar."""

    def __init__(self, progress: Progress | bool | None) -> None:
        self._progress = progress

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        progress = self._progress
        if callable(progress):
            yield lambda done: progress(name, done, total)
            return
        # tqdm's None means: only on a terminal.
        disable = None if progress is None else not progress
        with tqdm(total=total, desc=name, unit="B", unit_scale=True, leave=False, disable=disable) as bar:
            yield lambda done: bar.update(done - bar.n) and None


@contextlib.contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Hold the lock on `path`: one process builds, the others wait and then find the corpus built. The system
    releases the lock of a process that dies."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("another process is preparing this data: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _json_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
