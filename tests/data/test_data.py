"""Corpora: every kind of source, bad input, the cache, and the validation split."""

import dataclasses
import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from fork_server import python
from tiny_run import train, write_text

from nanochat_native.data import DamagedFileError, TokenStream, documents, prepare, sources
from nanochat_native.data import corpus as corpus_module
from nanochat_native.data.shards import ShardWriter, open_shard
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.lab import comparison
from nanochat_native.runs.config import TrainConfig, parse
from nanochat_native.runs.run_folder import load_config
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import flag
from nanochat_native.train import main
from nanochat_native.training import finetuning

VOCAB = 300


def story(i: int) -> str:
    return f"Story {i}. Once upon a time there were {i * 7} foxes, and they all lived in house {i % 13}.\n" * 3


def stories(count: int = 100) -> list[str]:
    return [story(i) for i in range(count)]


def documents_of(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    ids = stream.read(0, len(stream))
    starts = np.flatnonzero(ids == tokenizer.bos_id)
    assert len(ids) == 0 or starts[0] == 0, "a stream begins with <|bos|>"
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(ids, starts[1:]) if len(part)]


def all_documents(corpus) -> list[str]:
    return documents_of(corpus.train, corpus.tokenizer) + documents_of(corpus.val, corpus.tokenizer)


@pytest.fixture
def build(tmp_path):
    def call(data, **options):
        return prepare(
            str(data), **{"vocab_size": VOCAB, "cache_dir": tmp_path / "cache", "progress": False, **options}
        )

    return call


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(stories()):
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


def cached(tmp_path: Path) -> Path:
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    return manifest.parent


# Kinds of sources


def test_folder_of_text(build, folder):
    corpus = build(folder)
    assert sorted(all_documents(corpus)) == sorted(stories())
    assert 1 <= len(documents_of(corpus.val, corpus.tokenizer)) <= 20
    assert corpus.vocab_size == corpus.tokenizer.vocab_size == VOCAB
    assert corpus.notes == ()
    tokens = len(corpus.train) + len(corpus.val)
    assert corpus.bytes_per_token == pytest.approx(sum(len(s.encode()) for s in stories()) / tokens)
    assert "texts, 100 files" in corpus.description
    assert f"vocabulary {VOCAB}" in corpus.description


def test_folder_order_and_hidden_files(build, folder):
    (folder / ".hidden").write_text("secret")
    (folder / "sub").mkdir()
    (folder / "sub" / "deep.md").write_text("deep text")
    found = all_documents(build(folder))
    assert "deep text" in found
    assert "secret" not in found


def test_glob(build, folder):
    assert "".join(all_documents(build(folder / "00*.txt"))) == "".join(stories(10))


def test_end_of_text_lines_separate_documents(build, tmp_path):
    path = tmp_path / "stories.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "<|endoftext|>\n".join(stories()).encode())
    assert sorted(all_documents(build(path))) == sorted(stories())


def test_large_text_file_is_streamed_as_one_document(build, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 1000)
    monkeypatch.setattr(documents, "BLOCK_BYTES", 777)
    text = "".join(f"naïve 漢字 line {i}\r\n" for i in range(2000))
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    pieces = list(documents.read_document_parts(path, documents.Reading("text")))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.starts_document for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert max(len(piece.text) for piece in pieces) < 2000
    assert pieces[-1].position == path.stat().st_size
    corpus = build(path)
    assert documents_of(corpus.train, corpus.tokenizer)[0] + documents_of(corpus.val, corpus.tokenizer)[0] == text


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines(build, tmp_path, suffix):
    lines = "\n".join(json.dumps({"id": i, "meta": "x", "content": s}) for i, s in enumerate(stories())).encode()
    path = tmp_path / f"stories{suffix}"
    if suffix.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        half = len(lines) // 2
        path.write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))
    else:
        path.write_bytes(gzip.compress(lines) if suffix.endswith(".gz") else lines)
    assert sorted(all_documents(build(path))) == sorted(stories())


def test_json_lines_column(build, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"a": s, "b": "other"}) for s in stories()))
    with pytest.raises(ValueError, match=r"a\.jsonl: name the text column .* a \(text\), b \(text\)"):
        build(path)
    with pytest.raises(ValueError, match="no column 'c'"):
        build(path, text_column="c")
    assert sorted(all_documents(build(path, text_column="a"))) == sorted(stories())


def write_parquet(path: Path, columns: dict) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=30)


def test_parquet(build, tmp_path):
    path = tmp_path / "stories.parquet"
    write_parquet(path, {"id": list(range(101)), "story": [*stories(), None]})
    corpus = build(path)
    assert sorted(all_documents(corpus)) == sorted(stories())
    assert any("1 records without text" in note and "row 101" in note for note in corpus.notes)
    with pytest.raises(ValueError, match=r"column 'id' has no text; it has id \(int64\)"):
        build(path, text_column="id")


def test_truncated_parquet_is_named_or_skipped(build, tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": stories(60)})
    write_parquet(tmp_path / "b.parquet", {"text": stories(50)})
    data = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedFileError, match=r"b\.parquet: damaged"):
        build(tmp_path / "*.parquet")
    assert not list((tmp_path / "cache").glob("*/"))
    corpus = build(tmp_path / "*.parquet", skip_damaged=True)
    assert sorted(all_documents(corpus)) == sorted(stories(60))
    assert any("b.parquet" in note for note in corpus.notes)


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl.zst")])
def test_missing_extra_is_named(build, tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_bytes(b"x" * 100)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name}.* needs {package}: pip install 'nanochat-native\[data\]'"):
        build(tmp_path / name)


def test_standard_library_source():
    source = sources.find_source(None)
    names = [path.name for path in source.files]
    parts = {part for path in source.files for part in path.parts[-3:]}
    assert len(source.files) > 300
    assert "argparse.py" in names
    assert "cp437.py" not in names
    assert not parts & {"test", "tests", "idle_test", "site-packages"}
    assert source.name.startswith("stdlib 3.")


# Bad input


def test_nothing_there(build, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file, no folder"):
        build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no file, no folder"):
        build(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\x89PNG\0\0", b"\xff\xfd bad"])
def test_no_text(build, tmp_path, content):
    (tmp_path / "only.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"no text in only\.txt; skipped: 1"):
        build(tmp_path / "only.txt")
    assert not list((tmp_path / "cache").glob("*/"))


def test_bad_documents_are_skipped_and_counted(build, folder):
    (folder / "zero.txt").write_bytes(b"")
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "cut.txt").write_bytes("abc 漢".encode()[:-1])
    (folder / "lines.jsonl").write_bytes(
        b'{"text": "good line"}\n{"text": "bad \xff"}\n{"text": "lone \\ud800"}\n{"text": null}\n\n{"text": " "}'
    )
    corpus = build(folder)
    assert sorted(all_documents(corpus)) == sorted([*stories(), "good line"])
    notes = "\n".join(corpus.notes)
    for expected in ("2 empty documents", "1 binary files", "4 documents that are not UTF-8", "1 records without text"):
        assert expected in notes
    assert "image.png" in notes
    assert build(folder).notes == corpus.notes, "a cached corpus tells its notes again"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compressed_file(build, tmp_path, suffix):
    lines = "\n".join(json.dumps({"text": s + os.urandom(50).hex()}) for s in stories(2000)).encode()
    if suffix == ".zst":
        lines = pytest.importorskip("zstandard").compress(lines)
    else:
        lines = gzip.compress(lines)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(lines[: len(lines) // 2])
    with pytest.raises(DamagedFileError, match=r"a\.jsonl"):
        build(path)
    corpus = build(path, skip_damaged=True)
    assert any("damaged" in note for note in corpus.notes)


def test_line_that_is_not_json(build, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*(json.dumps({"text": s}) for s in stories(50)), '{"text": "half']))
    with pytest.raises(DamagedFileError, match=r"a\.jsonl:51: not a line of JSON"):
        build(path)
    corpus = build(path, skip_damaged=True)
    assert sorted(all_documents(corpus)) == sorted(stories(50))


def test_one_line_of_many_megabytes(build, tmp_path):
    size = 10_000_000
    (tmp_path / "one.txt").write_text("a" * size)
    (tmp_path / "two.jsonl").write_text(json.dumps({"text": "ACGT " * (size // 5)}))
    for name in ("one.txt", "two.jsonl"):
        start = time.process_time()  # not of the clock: other work shares the machine
        corpus = build(tmp_path / name)
        assert time.process_time() - start < 120
        text = "".join(all_documents(corpus))
        assert len(text) == size


@pytest.mark.parametrize("fraction", [0, -0.1, 0.6, float("nan")])
def test_bad_val_fraction(build, folder, fraction):
    with pytest.raises(ValueError, match="val_fraction"):
        build(folder, val_fraction=fraction)


def test_bad_vocab_size(build, folder):
    with pytest.raises(ValueError, match="265"):
        build(folder, vocab_size=100)


def test_little_text_makes_a_smaller_vocabulary_and_says_so(build, folder):
    corpus = build(folder, vocab_size=5000)
    assert corpus.vocab_size < 5000
    assert any(f"vocabulary of {corpus.vocab_size:,}, not 5,000" in note for note in corpus.notes)


def test_file_that_changes_while_it_is_read(build, folder):
    def touch(stage, done, total):
        if stage == "tokenizing":
            with open(folder / "000.txt", "a") as file:
                file.write("more")

    with pytest.raises(ValueError, match=r"000\.txt: changed"):
        build(folder, progress=touch)


def test_full_disk_is_told_before_encoding(build, folder, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(corpus_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="GB free"):
        build(folder)
    assert not list((tmp_path / "cache").glob("*/"))


# Validation split


def test_split_depends_on_the_text_only(build, folder, tmp_path):
    first = build(folder)
    held_out = set(documents_of(first.val, first.tokenizer))
    other = tmp_path / "renamed.jsonl"
    other.write_text("\n".join(json.dumps({"text": s}) for s in reversed(stories() + stories(50))))
    second = build(other, tokenizer=first.tokenizer)
    assert set(documents_of(second.val, second.tokenizer)) == held_out
    assert not held_out & set(documents_of(second.train, second.tokenizer)), "no document on both sides"


def test_one_document_is_split_at_its_end(build, tmp_path):
    text = "".join(stories())
    (tmp_path / "one.txt").write_text(text)
    corpus = build(tmp_path / "one.txt", val_fraction=0.1)
    (train,), (val,) = documents_of(corpus.train, corpus.tokenizer), documents_of(corpus.val, corpus.tokenizer)
    assert train + val == text
    assert len(val) == pytest.approx(0.1 * len(text), abs=1)
    assert any("last 10% of the text" in note for note in corpus.notes)


# Cache


def test_cache_is_used_and_follows_the_content(build, folder, tmp_path, monkeypatch):
    first = build(folder)
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module._Builder, "build", lambda *_: pytest.fail("built again"))
        assert build(folder).hash == first.hash
    (folder / "000.txt").write_text("Changed.")
    assert build(folder).hash != first.hash
    assert build(folder, vocab_size=310).vocab_size == 310
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 3


def test_building_twice_gives_the_same_bytes(build, folder, tmp_path):
    hashes = {build(folder, cache_dir=tmp_path / name).hash for name in ("one", "two")}
    assert len(hashes) == 1
    one, two = (sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("one", "two"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_shards_roll_over(build, folder, monkeypatch, tmp_path):
    whole = build(folder)
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (1000,))
    cut = build(folder, cache_dir=tmp_path / "other")
    assert len(list((tmp_path / "other").glob("*/train_*.bin"))) > 3
    for split in ("train", "val"):
        a, b = getattr(whole, split), getattr(cut, split)
        assert len(a) == len(b)
        np.testing.assert_array_equal(a.read(0, len(a)), b.read(0, len(b)))
        np.testing.assert_array_equal(a.read(7, len(a) - 3), b.read(7, len(b) - 3))


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("manifest.json", damage_flip),
        ("manifest.json", damage_truncate),
        ("manifest.json", Path.unlink),
        ("train_000000.bin", damage_truncate),
        ("train_000000.bin", damage_flip),
        ("val_000000.bin", Path.unlink),
        ("tokenizer/bpe.json", damage_flip),
    ],
)
def test_damaged_cache_is_built_again(build, folder, tmp_path, name, damage):
    first = build(folder)
    tokens = first.train.read(0, len(first.train)).copy()
    path = cached(tmp_path) / name
    good = path.read_bytes()
    damage(path)
    second = build(folder)
    assert second.hash == first.hash
    assert name.split("/")[-1] in second.notes[0]
    assert "built again" in second.notes[0]
    assert path.read_bytes() == good
    np.testing.assert_array_equal(second.train.read(0, len(second.train)), tokens)


def test_corpus_folder_as_data(build, folder, tmp_path):
    first = build(folder)
    again = build(cached(tmp_path))
    assert again.hash == first.hash
    with pytest.raises(ValueError, match="made with tokenizer"):
        build(cached(tmp_path), tokenizer=Tokenizer.train(["other text"], 270))
    damage_flip(cached(tmp_path) / "train_000000.bin")
    with pytest.raises(ValueError, match=r"train_000000\.bin: damaged"):
        build(cached(tmp_path))
    assert len(build(cached(tmp_path), verify=False).train) == len(first.train)


def test_cache_inside_the_data_folder_is_not_read(build, folder):
    first = build(folder, cache_dir=folder / "cache")
    assert build(folder, cache_dir=folder / "cache").hash == first.hash


PROGRAM = """
import pathlib, sys, time
from nanochat_native.data import prepare
texts, cache, stage = sys.argv[1:]
def progress(now, done, total):
    if now == stage and done > total // 2 and not pathlib.Path(cache, "go").exists():
        print("there", flush=True)
        while not pathlib.Path(cache, "go").exists():
            time.sleep(0.01)
log = lambda line: print(line, flush=True) if "waiting" in line else None
print(prepare(texts, vocab_size=300, cache_dir=cache, progress=progress, log=log).hash)
"""


def start(folder: Path, cache: Path, stage: str, interpreter: str) -> subprocess.Popen:
    command = [interpreter, "-c", PROGRAM, str(folder), str(cache), stage]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stage", ["training the tokenizer", "tokenizing"])
def test_killed_build_leaves_nothing_half_used(build, folder, tmp_path, stage):
    process = start(folder, tmp_path / "cache", stage, sys.executable)
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    assert list((tmp_path / "cache").glob("*.building")), "it was killed in the middle"
    corpus = build(folder)
    assert sorted(all_documents(corpus)) == sorted(stories())
    assert not list((tmp_path / "cache").glob("*.building"))


def test_two_processes_at_once(build, folder, tmp_path):
    builder = start(folder, tmp_path / "cache", "tokenizing", python())
    assert builder.stdout.readline() == "there\n"
    waiter = start(folder, tmp_path / "cache", "tokenizing", python())
    assert waiter.stdout.readline() == "waiting for another process that is preparing this data\n"
    (tmp_path / "cache" / "go").touch()
    outputs = [process.communicate(timeout=300)[0] for process in (builder, waiter)]
    assert [builder.returncode, waiter.returncode] == [0, 0]
    assert outputs[0] == outputs[1] == build(folder).hash + "\n"
    assert cached(tmp_path).is_dir()


# Token shards made elsewhere


def write_shard(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


@pytest.mark.parametrize(("dtype", "magic", "version"), [("<u2", 20240520, 1), ("<u4", 20240801, 7)])
def test_token_shards_in_place(build, tmp_path, dtype, magic, version):
    tokens = np.arange(1000).astype(dtype)
    write_shard(tmp_path / "x_train_000001.bin", tokens[:500], magic, version)
    write_shard(tmp_path / "x_train_000002.bin", tokens[500:900], magic, version)
    write_shard(tmp_path / "x_val_000000.bin", tokens[900:], magic, version)
    (tmp_path / "README.md").write_text("about the shards")
    corpus = build(tmp_path, vocab_size=1000)
    np.testing.assert_array_equal(corpus.train.read(0, 900), np.arange(900))
    np.testing.assert_array_equal(corpus.val.read(0, 100), np.arange(900, 1000))
    assert corpus.tokenizer is None
    assert corpus.bytes_per_token is None
    assert corpus.vocab_size == 1000
    assert any("no tokenizer" in note for note in corpus.notes)
    with pytest.raises(
        ValueError, match=r"x_train_000002\.bin: tokens must be below the vocabulary size 850, got 850 at position 350"
    ):
        build(tmp_path, vocab_size=850)


def test_token_shard_without_validation(build, tmp_path):
    write_shard(tmp_path / "tokens.bin", np.arange(1000).astype("<u2"))
    corpus = build(tmp_path / "tokens.bin", vocab_size=1000, val_fraction=0.1)
    assert (len(corpus.train), len(corpus.val)) == (900, 100)
    assert corpus.val.read(0, 1)[0] == 900
    assert any("last 10% of the tokens" in note for note in corpus.notes)


def test_token_shards_with_their_tokenizer(build, tmp_path):
    tokenizer = Tokenizer.train(stories(), VOCAB)
    ids = np.array(tokenizer.encode("".join(stories())), dtype="<u2")
    write_shard(tmp_path / "tokens.bin", ids)
    tokenizer.save(tmp_path / "tokenizer")
    corpus = build(tmp_path / "tokens.bin", vocab_size=10)
    assert corpus.tokenizer.hash == tokenizer.hash
    assert corpus.vocab_size == VOCAB
    assert corpus.bytes_per_token == pytest.approx(tokenizer.token_bytes[ids[: len(corpus.train)]].mean())
    with pytest.raises(ValueError, match="the shards' tokenizer is"):
        build(tmp_path / "tokens.bin", tokenizer=Tokenizer.train(["other"], 270))


def test_the_tokenizer_may_lie_beside_any_of_the_shards(build, tmp_path):
    for i, name in enumerate(("train", "val")):
        (tmp_path / "shards" / name).mkdir(parents=True)
        write_shard(tmp_path / "shards" / name / "0.bin", np.arange(i, 200).astype("<u2"))
    one, other = Tokenizer.train(stories(), VOCAB), Tokenizer.train(["other"], 270)
    for place in ("", "tokenizer", "train", "val", "val/tokenizer"):
        one.save(tmp_path / "shards" / place)
        assert build(tmp_path / "shards").tokenizer.hash == one.hash
        assert build(tmp_path / "shards" / "*" / "*.bin").tokenizer.hash == one.hash
        (tmp_path / "shards" / place / "bpe.json").unlink()
    one.save(tmp_path / "shards" / "train")
    other.save(tmp_path / "shards" / "val")
    with pytest.raises(
        ValueError, match=f"val: the shards' tokenizer is {other.hash[:8]}, .* in .*train is {one.hash[:8]}"
    ):
        build(tmp_path / "shards")


def test_bad_shards_are_named(build, tmp_path):
    tokens = np.arange(10).astype("<u2")
    write_shard(tmp_path / "magic.bin", tokens, magic=1)
    write_shard(tmp_path / "version.bin", tokens, version=2)
    write_shard(tmp_path / "short.bin", tokens)
    damage_truncate(tmp_path / "short.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    for name, message in {"magic": "got 1 ", "version": "version 2", "short": "10 tokens", "empty": "got 0 "}.items():
        with pytest.raises(ValueError, match=rf"{name}\.bin: .*{message}"):
            build(tmp_path / f"{name}.bin")


def test_own_shards_are_in_llm_c_format(build, folder, tmp_path):
    corpus = build(folder)
    data = (cached(tmp_path) / "train_000000.bin").read_bytes()
    header = np.frombuffer(data[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240520, 1, len(corpus.train)]
    assert not header[3:].any()
    np.testing.assert_array_equal(np.frombuffer(data[1024:], dtype="<u2"), corpus.train.read(0, len(corpus.train)))


def test_wide_tokens_take_four_bytes(tmp_path):
    from nanochat_native.data.shards import token_dtype

    assert (token_dtype(65536).itemsize, token_dtype(65537).itemsize) == (2, 4)
    writer = ShardWriter(tmp_path, "train", token_dtype(100_000))
    writer.write(np.array([1, 99_999]))
    writer.close()
    assert open_shard(writer.paths[0]).tolist() == [1, 99_999]


# Progress and log


def test_progress_and_log(build, folder):
    seen: dict[str, list[int]] = {}
    totals = set()
    lines = []

    def progress(stage, done, total):
        seen.setdefault(stage, []).append(done)
        totals.add(total)

    build(folder, progress=progress, log=lines.append)
    assert list(seen) == ["checking", "training the tokenizer", "tokenizing"]
    assert all(done == sorted(done) and done[-1] == max(totals) for done in seen.values())
    assert len(totals) == 1
    assert any("training a tokenizer for 300 ids" in line for line in lines)


# Which column


def write_lines(path: Path, records) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def texts_of(path: Path, asked: str | None = None) -> list[str]:
    """What is read of one file, without a corpus."""
    decision = documents.plan_reading([path], asked)
    return [piece.text for piece in documents.read_document_parts(path, decision.readings[0], text_column=asked)]


def column_of(*paths: Path) -> list[str | None]:
    return [reading.column for reading in documents.plan_reading(paths).readings]


@pytest.mark.parametrize(
    ("first", "wanted"),
    [
        ({"text": None}, "text"),
        ({"dataset": "mine"}, "text"),
        ({"dataset": "mine", "content": "about it"}, "text"),
        ({"body": "a body", "text": 3}, "text"),
        ({}, "text"),
    ],
)
def test_the_first_record_does_not_decide(build, tmp_path, first, wanted):
    path = write_lines(tmp_path / "a.jsonl", [first, *({"text": s, "id": "x"} for s in stories())])
    corpus = build(path)
    assert sorted(all_documents(corpus)) == sorted(stories())
    assert corpus.notes[0] == f"text column: {wanted!r} (text in 100 of 101 sampled records)"
    assert any("1 records without text" in note and "a.jsonl:1)" in note for note in corpus.notes)
    assert build(path).notes == corpus.notes


@pytest.mark.parametrize(
    ("records", "wanted"),
    [
        ([{"prose": "a", "note": None}] * 9 + [{"prose": "a", "note": "b"}], "prose"),
        ([{"content": "a", "text": "b"}] * 6 + [{"content": "a"}] * 4, "text"),
        ([{"content": "a", "text": "b"}] * 5 + [{"content": "a"}] * 5, "content"),
        ([{"text": "", "content": "a"}] * 9, "content"),
        ([{"text": " \n", "prose": "a"}] * 9, "prose"),
        ([{"code": "a", "story": "b", "id": "c"}], "story"),
        ([{"id": "1"}] * 10 + [{"text": "a"}] * 3, "id"),
    ],
)
def test_a_known_name_that_is_text_in_most_records_is_taken_before_the_only_text(tmp_path, records, wanted):
    assert column_of(write_lines(tmp_path / "a.jsonl", records)) == [wanted]


def test_the_sample_goes_on_to_the_first_text_and_is_bounded(tmp_path, monkeypatch):
    late = write_lines(tmp_path / "late.jsonl", [{"text": None}] * 1500 + [{"text": "a"}] * 2000)
    assert column_of(late) == ["text"]
    assert len(texts_of(late)) == 2000
    long = write_lines(tmp_path / "long.jsonl", [{"text": "a"}] * 1000 + [{"other": "b"}] * 999)
    assert documents.plan_reading([long]).notes == ["text column: 'text' (text in 1,000 of 1,000 sampled records)"]
    monkeypatch.setattr(documents, "SAMPLE_CHARS", 100)
    assert documents.plan_reading([long]).notes == ["text column: 'text' (text in 100 of 100 sampled records)"]


def write_records(path: Path, records: list[dict]) -> None:
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        write_parquet(path, {name: [record.get(name) for record in records] for name in records[-1]})
    else:
        write_lines(path, records)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_better_column_behind_the_sample_is_told(build, tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "SAMPLE_RECORDS", 10)
    path = tmp_path / name
    first = [{"meta": "m", "content": None, "text": " "}] * 80
    for column, later, told in (
        ("text", 81, True),
        ("content", 81, True),
        ("text", 80, False),
        ("meta", 81, False),
    ):
        write_records(path, first + [{"meta": "m", "content": None, "text": "\n"} | {column: "words"}] * later)
        assert column_of(path) == ["meta"]
        if told:
            message = (
                f"field '{column}' has text in 81 of 161 records, but not .* 'meta' was chosen; name .*--text-column"
            )
            with pytest.raises(ValueError, match=message):
                build(path)
            assert texts_of(path, column).count("words") == 81
        assert len(texts_of(path, "meta" if told else None)) == 80 + later
    write_lines(tmp_path / "b.jsonl", [{"meta": "m"}] * 200)
    write_records(path, [{"meta": "m", "text": "label"}] * 4)
    assert column_of(path, tmp_path / "b.jsonl") == ["meta", "meta"]
    corpus = build(tmp_path / "[ab].*")
    assert set(all_documents(corpus)) == {"m"}, "one column serves all files, which is no doubt"


@pytest.mark.parametrize(("without", "refused"), [(50, False), (51, True)])
def test_more_than_half_of_the_records_without_text_are_an_error(build, tmp_path, without, refused):
    records = [{"text": s} for s in stories(50)] + [{"text": None}] * without
    path = write_lines(tmp_path / "a.jsonl", records)
    if refused:
        message = r"a\.jsonl: 51 of 101 records have no text in field 'text'; name .* --text-column"
        with pytest.raises(ValueError, match=message):
            build(path)
        assert not list((tmp_path / "cache").glob("*/"))
    corpus = build(path, text_column="text" if refused else None)
    assert sorted(all_documents(corpus)) == sorted(stories(50))
    assert any(f"skipped: {without} records without text" in note for note in corpus.notes)


def test_blank_texts_are_not_missing_ones(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": s} for s in stories(50)] + [{"text": ""}] * 80)
    assert sorted(all_documents(build(path))) == sorted(stories(50))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"title": "a", "summary": "b"}], r"--text-column; it has title \(text\), summary \(text\)"),
        ([{"messages": [], "n": 1, "text": None}], r"no field .* messages \(list\), n \(number\), text \(null\)"),
        ([[1], 2, None], r"neither objects nor texts \(.* one list of records must be named \.json"),
    ],
)
def test_what_the_records_do_not_tell_is_asked_for(tmp_path, records, message):
    with pytest.raises(ValueError, match=rf"^.*a\.jsonl: .*{message}") as raised:
        column_of(write_lines(tmp_path / "a.jsonl", records))
    assert "\n" not in str(raised.value)


def test_one_column_serves_the_files_of_a_folder(build, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "0.jsonl", [{"prose": s, "text": "label"} for s in stories(20)])
    write_lines(folder / "1.jsonl", [{"prose": s} for s in stories(60)[20:]])
    write_lines(folder / "2.jsonl", [{"content": s} for s in stories(80)[60:]])
    write_lines(folder / "3.jsonl", [{"prose": s, "note": "n"} for s in stories()[80:]])
    corpus = build(folder)
    assert sorted(all_documents(corpus)) == sorted(stories())
    assert corpus.notes[0].startswith("text column: 'prose' (text in 80 of 80 sampled records, the only field")
    assert f"'content' in {folder / '2.jsonl'} (text in 20 of 20" in corpus.notes[0]
    write_lines(folder / "4.jsonl", [{"title": "a", "summary": "b"}])
    with pytest.raises(ValueError, match=r"4\.jsonl: name the text column"):
        build(folder)


def test_the_text_column_that_is_named(build, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x", "b": s, "n": 1} for s in stories()])
    assert sorted(all_documents(build(path, text_column="b"))) == sorted(stories())
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 1
    build(path)
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 2, "the column is a part of the cache's key"
    with pytest.raises(ValueError, match=r"a\.jsonl: column 'n' has no text; it has n \(number\), .*b \(text\)$"):
        build(path, text_column="n")
    late = write_lines(tmp_path / "late.jsonl", [{"text": "x"}] * 1500 + [{"b": s} for s in stories()])
    assert texts_of(late, "b") == stories()


def test_a_text_column_where_there_are_no_records_is_refused(build, folder, tmp_path):
    build(folder)
    write_shard(tmp_path / "tokens.bin", np.arange(1000).astype("<u2"))
    for data, message in {
        folder: "be a field of .jsonl",
        tmp_path / "tokens.bin": "not be given for .*, which holds tokens",
        cached(tmp_path): "not be given for .*, which holds tokens",
    }.items():
        with pytest.raises(ValueError, match=f"--text-column must {message}.* got 'b'"):
            build(data, text_column="b")
    with pytest.raises(ValueError, match="--text-column must be a field of"):
        prepare(None, vocab_size=VOCAB, cache_dir=tmp_path / "cache", text_column="b")


# Kinds of files


def as_parquet(path: Path, values: list, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    encoded = [None if value is None else value.encode() for value in values]
    column = {
        "large_string": lambda: pa.array(values, pa.large_string()),
        "string_view": lambda: pa.array(values, pa.string_view()),
        "dictionary": lambda: pa.array(values).dictionary_encode(),
        "dictionary of large_string": lambda: pa.array(values, pa.large_string()).dictionary_encode(),
        "dictionary of binary": lambda: pa.array(encoded).dictionary_encode(),
        "binary": lambda: pa.array(encoded),
        "large_binary": lambda: pa.array(encoded, pa.large_binary()),
        "binary_view": lambda: pa.array(encoded, pa.binary_view()),
    }[kind]()
    write_parquet(path, {"id": list(range(len(values))), "text": column})


@pytest.mark.parametrize(
    "kind",
    [
        "large_string",
        "string_view",
        "dictionary",
        "dictionary of large_string",
        "dictionary of binary",
        "binary",
        "large_binary",
        "binary_view",
    ],
)
@pytest.mark.parametrize("asked", [None, "text"])
def test_every_type_of_text_in_parquet(tmp_path, kind, asked):
    texts = [*stories(40), "naïve 漢字"]
    as_parquet(tmp_path / "A.PARQUET", [None, *texts], kind)
    assert texts_of(tmp_path / "A.PARQUET", asked) == texts


def test_columns_of_parquet_that_are_no_text_are_refused_by_name(tmp_path):
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    struct, items = [{"a": "x"}] * 9, [["x"]] * 9
    write_parquet(path, {"text": struct, "items": items, "raw": pa.array([b"\xff\xfe"] * 9), "none": [None] * 9})
    with pytest.raises(
        ValueError, match=r"no field .* text \(struct<a: string>\), items \(list<.*\), raw \(binary without text\)"
    ):
        column_of(path)
    for name, kind in {"text": "struct<a: string>", "items": "list<", "raw": "binary", "none": "null"}.items():
        with pytest.raises(ValueError, match=rf"column '{name}' has no text; it has .*{name} \({kind}"):
            documents.plan_reading([path], name)
    with pytest.raises(ValueError, match="no column 'a'; it has"):
        documents.plan_reading([path], "a")


def test_columns_of_parquet_of_one_name_are_told_apart(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    write_parquet(path, {"a": [{"b": "other"}] * 9, "a.b": stories(9)})
    assert texts_of(path) == texts_of(path, "a.b") == stories(9)
    pq.write_table(pa.Table.from_arrays([pa.array(stories(9))] * 2, names=["text", "text"]), path)
    for asked in (None, "text"):
        with pytest.raises(ValueError, match=r"it has text \(the name of several columns\)$"):
            documents.plan_reading([path], asked)


def test_labels_and_bytes_of_parquet_are_taken_where_no_column_of_strings_is(tmp_path):
    pa = pytest.importorskip("pyarrow")
    labels, raw = pa.array(["x", "y"] * 5).dictionary_encode(), pa.array([b"key"] * 10)
    write_parquet(tmp_path / "a.parquet", {"label": labels, "raw": raw, "prose": ["p"] * 10})
    write_parquet(tmp_path / "b.parquet", {"label": labels, "n": [1] * 10})
    write_parquet(tmp_path / "c.parquet", {"label": labels, "raw": raw})
    write_parquet(tmp_path / "d.parquet", {"text": pa.array([None] * 10, pa.string()), "content": ["p"] * 10})
    assert [column_of(tmp_path / name) for name in ("a.parquet", "b.parquet", "d.parquet")] == [
        ["prose"],
        ["label"],
        ["content"],
    ]
    with pytest.raises(ValueError, match=r"name the text column .* label \(text\), raw \(text\)"):
        column_of(tmp_path / "c.parquet")


RECORDS = [{"id": str(i), "content": text} for i, text in enumerate(stories())]
LINES = "\n".join(map(json.dumps, RECORDS))


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.NdJson.GZ", "a.json", "a.JSON.gz"])
def test_json_lines_under_all_of_their_names(tmp_path, name):
    content = LINES.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert texts_of(tmp_path / name) == stories()


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2, ensure_ascii=False),
        json.dumps(stories()),
        "\n".join(map(json.dumps, stories())),
        "\ufeff \r\n" + LINES.replace("\n", "\r\n") + "\n\n",
        "\n".join(json.dumps(record, indent=1) for record in RECORDS),
        "[" + ",\n".join(['{"n": ' + "7" * 5000 + ', "content": null}', *LINES.splitlines()]) + "]\n",
    ],
    ids=["list", "indented", "texts", "lines of texts", "mark and crlf", "objects", "long number"],
)
@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
def test_forms_of_json(tmp_path, monkeypatch, content, block_bytes):
    monkeypatch.setattr(documents, "BLOCK_BYTES", block_bytes)
    (tmp_path / "a.json").write_text(content)
    assert texts_of(tmp_path / "a.json") == stories()


@pytest.mark.parametrize(
    "value", ["-12.5e-3", "12345678901234567890", "-Infinity", "true", '"\\u00e9\\"]"', "[[{}], 1]"]
)
def test_values_of_json_do_not_depend_on_the_blocks(tmp_path, monkeypatch, value):
    (tmp_path / "a.json").write_text(f'["a", {value}, {value},{value}, "b"]')
    found = []
    for block_bytes in range(1, 30):
        monkeypatch.setattr(documents, "BLOCK_BYTES", block_bytes)
        found.append([r.value for r in documents._json_values(tmp_path / "a.json", documents.Reading("json"))])
    assert found == [["a", *[json.loads(value, parse_int=float)] * 3, "b"]] * 29


def test_of_a_json_list_one_value_is_in_memory(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "word " * 200}] * 20_000))
    assert path.stat().st_size > 20e6
    values = documents._Values(path, documents.Reading("json"))
    held = 0
    values.peek()
    for _ in values.elements():
        held = max(held, len(values.text))
    assert held < 3 * documents.BLOCK_BYTES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(RECORDS)[:-9], "value 100: not JSON: Unterminated string"),
        (json.dumps(RECORDS)[:-1], "value 100: neither a comma nor the end of the list"),
        (json.dumps(RECORDS) + "1", "value 100: something follows the end of the list"),
        (json.dumps(RECORDS)[:-1] + ",]", "value 101: not JSON"),
        ('[{"text": "a"} {"text": "b"}]', "value 1: neither a comma"),
        ('[{"text": "a"},' + "[" * 100_000, "value 2: nested too deeply"),
        ('{"text": "a"}\n{"text"', "value 2: not JSON"),
    ],
)
def test_damaged_json_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DamagedFileError, match=rf"a\.json: {message}"):
        texts_of(tmp_path / "a.json")
    reading = documents.Reading("json", column="content")
    skipped = sources.Skipped()
    kept = documents.read_document_parts(
        tmp_path / "a.json", reading, skip_damaged=True, skipped=skipped, text_column="content"
    )
    assert len(list(kept)) in (0, 99, 100)
    assert "damaged files, read up to the damage" in skipped.reasons


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [{"text": "a"}]}', r"no field .* data \(list\)"),
        ('{"name": "a", "version": "1"}', r"--text-column; it has name \(text\), version \(text\)"),
        ('{"extends": "a"}', r"--text-column; it has extends \(text\)"),
        ("[1, 2]", "neither objects nor texts"),
        ("[]", "no records"),
        (" \n", "no records"),
        ('{// settings\n"a": 1}', "value 1: not JSON"),
        ("[" * 100_000, "value 1: nested too deeply"),
    ],
)
def test_json_without_records_is_refused_alone_and_plain_text_in_a_folder(build, folder, tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(
        ValueError, match=rf"a\.json: .*{message}.*; \.json must hold a list of objects or texts"
    ) as raised:
        build(tmp_path / "a.json")
    assert "\n" not in str(raised.value)
    (folder / "a.json").write_text(content)
    corpus = build(folder)
    assert content.strip() in "".join(all_documents(corpus))
    assert corpus.notes[0] == f"1 .json files without records of text, read as plain text (first: {folder / 'a.json'})"


def test_one_object_with_a_text_is_a_document(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"title": "t", "body": story(1)}, indent=1))
    assert texts_of(tmp_path / "a.json") == [story(1)]
    assert texts_of(tmp_path / "a.json", "title") == ["t"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"n": ' + "1" * 5000 + ', "content": "a"}', "a"),
        ('{"n": -' + "1" * 5000 + 'e9, "content": "a"}', "a"),
        ('{"n": [NaN, -Infinity, 1e999], "content": "a"}', "a"),
        ('{"content": "a", "content": "b"}', "b"),
        ('{"content": "a\\u0000b"}', "a\0b"),
        ('{"content": "a\u2028b\u2029c\u0085d\x0be"}'.replace("\x0b", "\\u000b"), "a\u2028b\u2029c\u0085d\x0be"),
        ('\ufeff{"content": "a"}', "a"),
        ('{"content": "\\ud83d\\ude00"}', "\U0001f600"),
        (' \t{"content": "a"} \r', "a"),
        ('{"deep": ' + "[" * 300 + "]" * 300 + ', "content": "a"}', "a"),
    ],
)
def test_odd_lines_of_json(tmp_path, line, text):
    (tmp_path / "a.jsonl").write_bytes("\n".join([*LINES.splitlines()[:3], line, *LINES.splitlines()[3:]]).encode())
    assert texts_of(tmp_path / "a.jsonl") == [*stories()[:3], text, *stories()[3:]]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-8"])
@pytest.mark.parametrize("name", ["a.txt", "a.TXT.GZ", "a.jsonl", "a.json"])
def test_text_with_a_byte_order_mark(tmp_path, monkeypatch, encoding, name):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 13)
    words = "naïve 漢字 \U0001f600\n" * 9
    content = words if "txt" in name.lower() else json.dumps([{"text": words}] * 3, ensure_ascii=False)
    if name == "a.jsonl":
        content = "\n".join([json.dumps({"text": words}, ensure_ascii=False)] * 3)
    data = ("\ufeff" + content).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    assert "".join(texts_of(tmp_path / name)) == (words if "txt" in name.lower() else words * 3)


@pytest.mark.parametrize(
    "data", [("\ufeff" + "words " * 9).encode("utf-16-le") + b"x", "\ufeffa\0b".encode("utf-16-be")]
)
def test_damaged_utf_16_is_told(build, folder, data):
    (folder / "odd.txt").write_bytes(data)
    corpus = build(folder)
    assert sorted(all_documents(corpus)) == sorted(stories())
    assert "odd.txt" in corpus.notes[0]
    (folder / "odd.txt").rename(folder / "odd.jsonl")
    with pytest.raises(DamagedFileError, match=r"odd\.jsonl"):
        build(folder)


def test_text_in_another_encoding_is_told_what_is_taken(build, tmp_path):
    (tmp_path / "a.txt").write_bytes("words".encode("utf-16-le") * 9)
    with pytest.raises(
        ValueError,
        match=r"1 binary files, or texts in UTF-16 .*; text must be in UTF-8, or in UTF-16 or UTF-32 with a byte",
    ):
        build(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(LINES.encode("utf-16-le"))
    with pytest.raises(
        DamagedFileError, match=r"jsonl:1: not a line of JSON: .*; UTF-16 must begin with a byte order mark"
    ):
        build(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.zip", "unzip"),
        ("a.tar", "tar -xf"),
        ("a.tar.gz", "tar -xf"),
        ("A.TGZ", "tar -xf"),
        ("a.txt.xz", "unxz"),
        ("a.jsonl.bz2", "bunzip2"),
        ("a.parquet.gz", "gunzip"),
        ("a.bin.zst", "unzstd"),
    ],
)
def test_archives_are_refused_with_what_to_do(build, folder, name, advice):
    (folder / name).write_bytes(b"plain words")
    with pytest.raises(ValueError, match=rf"{name}: .* cannot be read.*\({advice}\)"):
        build(folder / name)
    corpus = build(folder)
    assert sorted(all_documents(corpus)) == sorted(stories())
    assert "archives or compressed files, which must be unpacked first" in corpus.notes[0]
    for path in folder.glob("*.txt"):
        path.unlink()
    if Path(name).suffix == ".txt":
        (folder / name).write_bytes(b"plain words")
    with pytest.raises(ValueError, match="no text in texts; skipped: 1 archives"):
        build(folder)


def test_tables_are_plain_text_and_said(build, folder):
    (folder / "a.CSV").write_text("text,label\nwords,1\n")
    corpus = build(folder)
    assert "text,label\nwords,1\n" in all_documents(corpus)
    assert "1 tables read as plain text" in corpus.notes[0]


def test_what_is_no_regular_file_is_refused(build, folder):
    os.mkfifo(folder / "pipe")
    for path in (folder / "pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match=f"must be a regular file or a folder, got {path}"):
            build(path)
    with pytest.raises(ValueError, match=r"--data must be .* got ''"):
        build("")
    corpus = build(folder)
    assert sorted(all_documents(corpus)) == sorted(stories())
    assert corpus.notes == (f"skipped: 1 FIFOs, sockets or devices (first: {folder / 'pipe'})",)
    with pytest.raises(FileNotFoundError, match="skipped: 1 FIFOs"):
        build(folder / "pi*")


def test_odd_names_are_read_and_printed_in_one_line(build, tmp_path):
    folder = tmp_path / "a folder\nof texts"
    folder.mkdir()
    for i, text in enumerate(stories()):
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff %d.txt" % i)).write_text(text)
    os.mkfifo(Path(os.fsdecode(os.fsencode(folder) + b"/\xfe\n")))
    corpus = build(folder)
    assert sorted(all_documents(corpus)) == sorted(stories())
    for line in (corpus.description, *corpus.notes):
        line.encode()
        assert line.isprintable()
    assert r"a folder\nof texts/\udcfe\n" in corpus.notes[0]
    assert build(folder).hash == corpus.hash
    write_lines(folder / "\n.jsonl", [1])
    with pytest.raises(ValueError, match=r"\\n\.jsonl: its records") as raised:
        build(folder)
    assert str(raised.value).isprintable()


# Folders


def found(data: Path | str, **options) -> tuple[list[str], tuple[str, ...]]:
    """(paths below the folder, notes)."""
    source = sources.find_source(str(data), **options)
    return [str(p.relative_to(data)) if Path(data).is_dir() else str(p) for p in source.files], source.notes


def test_a_loop_of_links_is_said_and_not_followed(folder):
    (folder / "a.txt").symlink_to("b.txt")
    (folder / "b.txt").symlink_to("a.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "inside.txt").symlink_to("000.txt/none")
    paths, notes = found(folder)
    assert paths == [f"{i:03d}.txt" for i in range(100)]
    assert len(notes) == 1
    assert "skipped: 4 broken links" in notes[0]
    for data in (folder / "a.txt", folder / "gone*"):
        with pytest.raises(FileNotFoundError, match="1 broken links"):
            sources.find_source(str(data))


def test_linked_folders_are_followed_each_real_one_once(tmp_path):
    for name in ("data/sub", "data/sub/deep", "far/inner", "data/.hidden"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "t.txt").write_text(name)
    (tmp_path / "data" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "a sub").symlink_to("sub")
    (tmp_path / "data" / "sub" / "loop").symlink_to("..")
    (tmp_path / "data" / "sub" / "up").symlink_to("../..")
    (tmp_path / "far" / "root").symlink_to("/")
    paths, notes = found(tmp_path / "data")
    assert paths == ["again/inner/t.txt", "sub/deep/t.txt", "sub/t.txt"]
    assert len(notes) == 1
    assert "skipped: 5 links to a folder that is read anyway, or to one above" in notes[0]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "link").symlink_to(tmp_path / "far")
    assert found(tmp_path / "only")[0] == ["link/inner/t.txt"]
    (tmp_path / "elsewhere" / "folder").mkdir(parents=True)
    (tmp_path / "elsewhere" / "beside.txt").write_text("not asked for")
    (tmp_path / "elsewhere" / "folder" / "up").symlink_to("..")
    (tmp_path / "only" / "other").symlink_to(tmp_path / "elsewhere" / "folder")
    assert found(tmp_path / "only")[0] == ["link/inner/t.txt"]


def test_a_file_with_several_names_is_read_once(build, folder):
    before = build(folder).hash
    (folder / "soft.txt").symlink_to("000.txt")
    os.link(folder / "001.txt", folder / "hard.txt")
    corpus = build(folder)
    assert corpus.hash == before
    assert corpus.notes == (f"skipped: 2 further names of files that are read (first: {folder / 'hard.txt'})",)
    (folder / "copy.txt").write_text(story(2))
    assert all_documents(build(folder)).count(story(2)) == 2


def test_a_file_that_is_no_shard_does_not_end_a_folder_of_text(build, folder):
    before = build(folder).hash
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 9)
    (folder / "ASCII.BIN").write_text("words")
    corpus = build(folder)
    assert corpus.hash == before
    assert corpus.notes == (
        f"skipped: 2 .bin files that are not token shards, such as nanoGPT's, which have no header "
        f"(first: {folder / 'ASCII.BIN'})",
    )


def test_a_folder_of_shards_without_headers_is_told_what_it_is(build, tmp_path):
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "train.bin").write_bytes(np.arange(1000, dtype="<u2").tobytes())
    (tmp_path / "nano" / "meta.pkl").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"no text in nano; .*1 \.bin files .* nanoGPT's, which have no header .*meta"):
        build(tmp_path / "nano")


def test_files_beside_shards_are_said(build, tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(1000).astype("<u2"))
    (tmp_path / "README.md").write_text("about")
    corpus = build(tmp_path, vocab_size=1000)
    assert corpus.notes[0].startswith("skipped: 1 files beside the token shards")
    (tmp_path / "b.bin").write_bytes(b"no shard")
    with pytest.raises(ValueError, match=r"b\.bin: not a token shard"):
        build(tmp_path, vocab_size=1000)


def test_folders_that_a_glob_matches_are_said(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "t.md").write_text("words")
    paths, notes = found(folder / "*")
    assert len(paths) == 100
    assert notes == (f"skipped: 1 folders that match the glob, while none of their files do (first: {folder / 'sub'})",)
    assert found(folder / "**") == ([*paths, str(folder / "sub" / "t.md")], ())


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("**", ["a/b/c.txt", "a/t.txt", "a.md", "t.txt"]),
        ("**/*.txt", ["a/b/c.txt", "a/t.txt", "t.txt"]),
        ("**/t.txt", ["a/t.txt", "t.txt"]),
        ("**/b/**", ["a/b/c.txt"]),
        ("**/a/*/**/c.*", ["a/b/c.txt"]),
        ("*/**/*.txt", ["a/b/c.txt", "a/t.txt"]),
        ("a*/**", ["a/b/c.txt", "a/t.txt"]),
        ("**/[!a]*.txt", ["a/b/c.txt", "a/t.txt", "t.txt"]),
    ],
)
def test_any_depth_of_a_glob(tmp_path, monkeypatch, pattern, wanted):
    """Among links that lead back, whose paths have no end."""
    folder = tmp_path / "folder"
    (folder / "a" / "b").mkdir(parents=True)
    for name in ("t.txt", "a.md", "a/t.txt", "a/b/c.txt", ".hidden.txt"):
        (folder / name).write_text(name)
    for i in range(9):
        (folder / "a" / f"loop{i}").symlink_to("..")
    assert found(folder / pattern)[0] == [str(folder / name) for name in wanted]
    monkeypatch.chdir(folder)
    assert found(pattern)[0] == wanted


def test_a_folder_that_may_not_be_read_is_an_error(folder, monkeypatch):
    (folder / "sub").mkdir()
    real = os.listdir

    def listdir(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(sources.os, "listdir", listdir)
    with pytest.raises(PermissionError, match="sub"):
        sources.find_source(str(folder))


def test_a_headerless_bin_is_told_what_it_is(build, tmp_path):
    (tmp_path / "TRAIN.BIN").write_bytes(np.arange(1000, dtype="<u2").tobytes())
    with pytest.raises(
        ValueError, match=r"TRAIN\.BIN: not a token shard .* nanoGPT's .bin has uint16 .*: put 256 int32"
    ):
        build(tmp_path / "TRAIN.BIN")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 1000
    (tmp_path / "TRAIN.BIN").write_bytes(header.tobytes() + (tmp_path / "TRAIN.BIN").read_bytes())
    corpus = build(tmp_path / "TRAIN.BIN", vocab_size=1000)
    assert len(corpus.train) + len(corpus.val) == 1000


# Which shards validate


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("x_val_000.bin", True),
        ("VAL.bin", True),
        ("x-valid.bin", True),
        ("validation_1.bin", True),
        ("dev2.bin", True),
        ("x.test.bin", True),
        ("eval_000.bin", True),
        ("val/000.bin", True),
        ("valid/shards/000.bin", True),
        ("val/x_train_000.bin", False),
        ("train/x_val_000.bin", True),
        ("validation/train/000.bin", False),
        ("train_val_000.bin", True),
        ("value_000.bin", False),
        ("interval.bin", False),
        ("medieval/000.bin", False),
        ("invalid_000.bin", False),
        ("latest.bin", False),
        ("device_0.bin", False),
        ("testament.bin", False),
        ("éval.bin", False),
        ("valSet.bin", True),
        ("trainVal_0.bin", True),
        ("heldout_0.bin", True),
        ("x-holdout.bin", True),
        ("tests/0.bin", True),
        ("evals.bin", True),
        ("validationset.bin", False),
        ("000.bin", False),
    ],
)
def test_shards_are_told_by_whole_words_of_their_path(build, tmp_path, path, expected):
    root = tmp_path / "val" / "test shards"
    (root / path).parent.mkdir(parents=True)
    write_shard(root / path, np.arange(100).astype("<u2"))
    write_shard(root / "other.bin", np.arange(100, 300).astype("<u2"))
    for data in (root, root / "**" / "*.bin"):
        corpus = build(data, vocab_size=300)
        if expected:
            np.testing.assert_array_equal(corpus.train.read(0, len(corpus.train)), np.arange(100, 300))
            np.testing.assert_array_equal(corpus.val.read(0, len(corpus.val)), np.arange(100))
            assert f"shards by their names: 1 for training, 1 for validation ({Path(path).name})" in corpus.notes
        else:
            assert (len(corpus.train), len(corpus.val)) == (285, 15)
            assert any("no shard is named for validation: the last 5% of the tokens" in note for note in corpus.notes)


def test_shards_that_all_validate_do_not_train(build, tmp_path):
    for i in range(2):
        write_shard(tmp_path / f"x_val_{i}.bin", np.arange(100 * i, 100 * i + 100).astype("<u2"))
    with pytest.raises(
        ValueError, match=r"nothing to train on: by their names, all shards are for validation .*; rename"
    ):
        build(tmp_path, vocab_size=200)
    corpus = build(tmp_path, vocab_size=200, needs_training=False)
    assert (len(corpus.train), len(corpus.val)) == (0, 200)
    Tokenizer([bytes([i]) for i in range(256)]).save(tmp_path)
    assert build(tmp_path, needs_training=False).bytes_per_token == 1
    alone = build(tmp_path / "x_val_0.bin", vocab_size=300)
    assert (len(alone.train), len(alone.val)) == (95, 5)


@pytest.mark.parametrize("make", ["symlink", "hard link", "copy"])
def test_a_shard_that_validates_under_one_name_is_not_trained_on_under_another(build, tmp_path, make):
    write_shard(tmp_path / "x_val_0.bin", np.arange(100).astype("<u2"))
    write_shard(tmp_path / "x_train_0.bin", np.arange(100, 200).astype("<u2"))
    other = tmp_path / "a_latest.bin"
    if make == "symlink":
        other.symlink_to("x_val_0.bin")
    elif make == "hard link":
        os.link(tmp_path / "x_val_0.bin", other)
    else:
        other.write_bytes((tmp_path / "x_val_0.bin").read_bytes())
    corpus = build(tmp_path, vocab_size=200)
    np.testing.assert_array_equal(corpus.train.read(0, len(corpus.train)), np.arange(100, 200))
    np.testing.assert_array_equal(corpus.val.read(0, len(corpus.val)), np.arange(100))
    assert f"{other} has the same bytes as a validation shard: it is not trained on" in corpus.notes


def test_the_hash_of_shards_tells_which_side_they_are_on(build, tmp_path):
    tokens = np.arange(200).astype("<u2")
    for name in ("a_val", "a_interval", "a_test"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / f"{name}.bin", tokens[:50])
        write_shard(tmp_path / name / "z_train.bin", tokens[50:])
    hashes = [build(tmp_path / name, vocab_size=200).hash for name in ("a_val", "a_interval", "a_test")]
    assert len(set(hashes)) == 3


def test_a_shard_whose_digest_is_remembered_as_text_is_looked_into(build, tmp_path):
    path = tmp_path / "x.BIN"
    write_shard(path, np.full(1 << 23, 9).astype("<u2"))
    os.utime(path, (1, 1))
    (tmp_path / "cache").mkdir()
    known = {f"{path.resolve()}:{path.stat().st_size}:{path.stat().st_mtime_ns}": {"sha256": "0" * 64}}
    (tmp_path / "cache" / "digests.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"x\.BIN: tokens must be below .* got 9 at position 0"):
        build(path, vocab_size=9)
    assert len(build(path, vocab_size=10).train) > 0


def test_text_named_for_validation_is_said_to_be_split_like_the_rest(build, folder):
    (folder / "000.txt").rename(folder / "valid.txt")
    (folder / "val").mkdir()
    (folder / "001.txt").rename(folder / "val" / "1.txt")
    corpus = build(folder)
    assert "documents in files named for validation are also trained on (1.txt and 1 more)" in corpus.notes[0]
    assert sorted(all_documents(corpus)) == sorted(stories())


# Identity: what was read rightly before the columns were sampled keeps its hash, and its folder in the cache.


def stored_gzip(data):
    """Return a gzip file whose bytes no version of a compressor decides: its blocks are not compressed (RFC 1952)."""
    blocks = [data[i : i + 65535] for i in range(0, len(data), 65535)]
    parts = [b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"]
    for number, block in enumerate(blocks):
        parts += [struct.pack("<BHH", number + 1 == len(blocks), len(block), 0xFFFF - len(block)), block]
    return b"".join([*parts, struct.pack("<II", zlib.crc32(data), len(data))])


def test_hashes_and_cached_folders_stay_what_they_were(build, folder, tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"id": str(i), "content": s, "n": None} for i, s in enumerate(stories())])
    lines = "\n".join(json.dumps({"prose": s}) for s in stories()).encode()
    (tmp_path / "b.jsonl.gz").write_bytes(stored_gzip(lines))
    (tmp_path / "mixed").mkdir()
    write_lines(tmp_path / "mixed" / "a.jsonl", [{"text": s} for s in stories(50)])
    write_lines(tmp_path / "mixed" / "b.jsonl", [{"content": s, "id": "x"} for s in stories()[50:]])
    (tmp_path / "mixed" / "c.md").write_text("# A title\n")
    (tmp_path / "one.txt").write_text("".join(stories()))
    bytes_alone = Tokenizer([bytes([i]) for i in range(256)])
    known = {
        ("texts", None): ("0a2cbe6542a3986d", "texts-ca5fd31d5094f069"),
        ("a.jsonl", None): ("0a2cbe6542a3986d", "a.jsonl-9dc23fa7d651ee78"),
        ("a.jsonl", "content"): ("0a2cbe6542a3986d", "a.jsonl-2fa32f53a191ecae"),
        ("b.jsonl.gz", None): ("0a2cbe6542a3986d", "b.jsonl.gz-f3f9a6216a6258a6"),
        ("one.txt", None): ("86a92aa5205688db", "one.txt-dd83f39361bb6a91"),
        ("mixed", None): ("4dada3b3f526f1ee", "mixed-c3c00f418a19b0dd"),
    }
    for (name, column), (digest, cached_as) in known.items():
        corpus = build(tmp_path / name, tokenizer=bytes_alone, text_column=column)
        assert corpus.hash.startswith(digest), name
        assert (tmp_path / "cache" / cached_as / "manifest.json").is_file(), name
    (tmp_path / "shards").mkdir()
    tokens = np.arange(1000).astype("<u2")
    write_shard(tmp_path / "shards" / "x_train_000001.bin", tokens[:500])
    write_shard(tmp_path / "shards" / "x_train_000002.bin", tokens[500:900])
    write_shard(tmp_path / "shards" / "x_val_000000.bin", tokens[900:])
    write_shard(tmp_path / "alone_val.bin", tokens)
    assert build(tmp_path / "shards", vocab_size=1000).hash.startswith("91c2eaf8f16af445")
    assert build(tmp_path / "alone_val.bin", vocab_size=1000).hash.startswith("32e23f4be714bcf8")


def test_parquet_keeps_its_cached_folder_unless_it_is_read_otherwise(tmp_path):
    pa = pytest.importorskip("pyarrow")
    labels = pa.array(["x"] * 100).dictionary_encode()
    for columns, same_as_version_1 in (
        ({"id": list(range(100)), "story": stories(), "label": labels}, True),
        ({"prose": stories(), "label": labels}, True),
        ({"title": stories(), "text": pa.array(stories()).dictionary_encode()}, False),
    ):
        write_parquet(tmp_path / "a.parquet", columns)
        assert documents.plan_reading([tmp_path / "a.parquet"]).same_as_version_1 == [same_as_version_1]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.ndjson", LINES.encode()),
        ("a.JSONL", LINES.encode()),
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.TXT.GZ", gzip.compress(b"words", mtime=0)),
        ("a.txt", "\ufeffwords".encode("utf-16-le")),
        ("a.jsonl", b'{"header": "x"}\n' + LINES.encode()),
    ],
)
def test_what_is_read_otherwise_than_before_is_not_taken_from_an_old_cache(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "b.txt").write_text("words")
    assert documents.plan_reading([tmp_path / name, tmp_path / "b.txt"]).same_as_version_1 == [False, True]


# The flag


def test_the_flag_names_the_column_and_belongs_to_the_run(tmp_path, capsys):
    write_lines(tmp_path / "text.jsonl", [{"title": "t", "prose": text} for text in stories()])
    assert train(tmp_path, steps=2, run="none") == 2
    assert "text.jsonl: name the text column with --text-column; it has title (text), prose" in capsys.readouterr().err
    assert train(tmp_path, steps=2, text_column="prose") == 0
    assert load_config(tmp_path / "runs" / "tiny").text_column == "prose"
    assert train(tmp_path, steps=2, resume="auto", text_column="title") == 2
    given = f"(--data {tmp_path / 'text.jsonl'}, --text-column title)"
    assert f"the data or the tokenizer is not what this run began with {given}" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "runs" / "tiny"), "--num-iterations", "3"]) == 0


def test_a_run_from_before_the_flag_goes_on(tmp_path):
    write_text(tmp_path / "text.jsonl")
    assert train(tmp_path, steps=2) == 0
    path = tmp_path / "runs" / "tiny" / "config.json"
    stored = json.loads(path.read_text())
    del stored["config"]["text_column"]
    path.write_text(json.dumps(stored))
    assert main(["--resume", str(path.parent), "--num-iterations", "3"]) == 0
    assert json.loads(path.read_text())["config"]["text_column"] is None


@pytest.mark.parametrize("name", ["data", "text_column"])
def test_an_empty_flag_is_refused(name):
    with pytest.raises(ConfigError, match=f"{flag(name)} must be .*, got ''"):
        parse([flag(name), ""])


def test_the_flag_reaches_every_command_that_prepares_data(tmp_path):
    with pytest.raises(ConfigError, match="--text-column is a flag of pretraining"):
        finetuning.resolve_finetuning(finetuning.FinetuneConfig(checkpoint=tmp_path, text_column="a"))
    plan = TrainConfig(text_column="a")
    for column, corpus in (("a", "prepared"), ("b", None)):
        case = dataclasses.replace(plan, text_column=column)
        compared = comparison.Comparison({"one": case}, "one", 1, 1, tmp_path, plan, "prepared", [], {})
        assert compared.corpus_of("one") == corpus
