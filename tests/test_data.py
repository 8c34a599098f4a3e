"""Corpora: every kind of source, bad input, the cache, and the validation split."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanochat_native.data import DamagedFileError, TokenStream, prepare, sources
from nanochat_native.data import corpus as corpus_module
from nanochat_native.data.shards import ShardWriter, open_shard
from nanochat_native.tokenizer import Tokenizer

VOCAB = 300


def story(i: int) -> str:
    return f"Story {i}. Once upon a time there were {i * 7} foxes, and they all lived in house {i % 13}.\n" * 3


def stories(count: int = 100) -> list[str]:
    return [story(i) for i in range(count)]


def documents(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    ids = stream.read(0, len(stream))
    starts = np.flatnonzero(ids == tokenizer.bos_id)
    assert len(ids) == 0 or starts[0] == 0, "a stream begins with <|bos|>"
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(ids, starts[1:]) if len(part)]


def all_documents(corpus) -> list[str]:
    return documents(corpus.train, corpus.tokenizer) + documents(corpus.val, corpus.tokenizer)


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
    assert 1 <= len(documents(corpus.val, corpus.tokenizer)) <= 20
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
    monkeypatch.setattr(sources, "PIECE_CHARS", 1000)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 777)
    text = "".join(f"naïve 漢字 line {i}\r\n" for i in range(2000))
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    pieces = list(sources.read_pieces(path))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.starts_document for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert max(len(piece.text) for piece in pieces) < 2000
    assert pieces[-1].position == path.stat().st_size
    corpus = build(path)
    assert documents(corpus.train, corpus.tokenizer)[0] + documents(corpus.val, corpus.tokenizer)[0] == text


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
    with pytest.raises(ValueError, match=r"a\.jsonl:1: name the text column .* a, b"):
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
    with pytest.raises(ValueError, match="column 'id' is int64, not text"):
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


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\x89PNG\0\0", b"\xff\xfe bad"])
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
    held_out = set(documents(first.val, first.tokenizer))
    other = tmp_path / "renamed.jsonl"
    other.write_text("\n".join(json.dumps({"text": s}) for s in reversed(stories() + stories(50))))
    second = build(other, tokenizer=first.tokenizer)
    assert set(documents(second.val, second.tokenizer)) == held_out
    assert not held_out & set(documents(second.train, second.tokenizer)), "no document on both sides"


def test_one_document_is_split_at_its_end(build, tmp_path):
    text = "".join(stories())
    (tmp_path / "one.txt").write_text(text)
    corpus = build(tmp_path / "one.txt", val_fraction=0.1)
    (train,), (val,) = documents(corpus.train, corpus.tokenizer), documents(corpus.val, corpus.tokenizer)
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


def start(folder: Path, cache: Path, stage: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(cache), stage]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stage", ["training the tokenizer", "tokenizing"])
def test_killed_build_leaves_nothing_half_used(build, folder, tmp_path, stage):
    process = start(folder, tmp_path / "cache", stage)
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    assert list((tmp_path / "cache").glob("*.building")), "it was killed in the middle"
    corpus = build(folder)
    assert sorted(all_documents(corpus)) == sorted(stories())
    assert not list((tmp_path / "cache").glob("*.building"))


def test_two_processes_at_once(build, folder, tmp_path):
    builder = start(folder, tmp_path / "cache", "tokenizing")
    assert builder.stdout.readline() == "there\n"
    waiter = start(folder, tmp_path / "cache", "tokenizing")
    assert waiter.stdout.readline() == "another process is preparing this data: waiting for it\n"
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
    with pytest.raises(ValueError, match=r"x_train_000002\.bin: token 850 at position 350 .* vocabulary of 850"):
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


def test_bad_shards_are_named(build, tmp_path):
    tokens = np.arange(10).astype("<u2")
    write_shard(tmp_path / "magic.bin", tokens, magic=1)
    write_shard(tmp_path / "version.bin", tokens, version=2)
    write_shard(tmp_path / "short.bin", tokens)
    damage_truncate(tmp_path / "short.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    for name, message in {"magic": "magic 1", "version": "version 2", "short": "10 tokens", "empty": "magic 0"}.items():
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
