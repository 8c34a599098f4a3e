"""The last of several numbered shards as the validation set."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_run import train, write_text

from nanochat_native.data import corpus as corpus_module
from nanochat_native.data import prepare
from nanochat_native.data.file_names import last_shard
from nanochat_native.lab import comparison
from nanochat_native.runs.config import TrainConfig, parse, resolve_defaults


def texts(number):
    return [f"shard {number} text {i}, about {'xyzw'[number % 4] * 3} and more of it" for i in range(40)]


def write(folder: Path, names):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        lines = [json.dumps({"text": text}) for text in texts(number)]
        (folder / name).write_text("\n".join(lines))
    return folder


@pytest.fixture
def build(tmp_path):
    def call(data, **options):
        return prepare(str(data), **{"vocab_size": 300, "cache_dir": tmp_path / "cache", "progress": False, **options})

    return call


def documents_of(stream, tokenizer):
    return tokenizer.decode(stream.read(0, len(stream)).tolist()).split("<|bos|>")[1:]


@pytest.mark.parametrize(
    ("names", "last"),
    [
        (["shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet"], 2),
        (["shard_10.jsonl", "shard_9.jsonl", "shard_11.jsonl"], 2),
        (["shard_11.jsonl.gz", "shard_9.jsonl.gz"], 0),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], 1),
        (["train-00000-of-00002.parquet", "validation-00000-of-00002.parquet"], None),
        (["0.jsonl", "1.json"], None),
        (["a.jsonl", "b.jsonl"], None),
        (["shard_1_2.jsonl", "shard_2_1.jsonl"], None),
        (["shard_1.jsonl"], None),
        (["x/shard_1.jsonl", "y/shard_2.jsonl"], None),
        (["shard_1.jsonl", "shard_1.jsonl"], None),
    ],
)
def test_numbered_shards_are_told_by_their_names(names, last):
    assert last_shard([Path(name) for name in names]) == last


def test_the_last_of_numbered_shards_validates(build, tmp_path):
    folder = write(tmp_path / "shards", ["part_9.jsonl", "part_10.jsonl", "part_8.jsonl"])
    corpus = build(folder, validation="shards")
    assert documents_of(corpus.val, corpus.tokenizer) == texts(1), "10 comes after 9"
    assert documents_of(corpus.train, corpus.tokenizer) == texts(2) + texts(0)
    assert "validation: the last shard, part_10.jsonl" in corpus.notes
    assert not any(b"yy" in bytes(token) for token in corpus.tokenizer._bytes[:-9]), "of the last shard alone"
    assert any(b"xx" in bytes(token) for token in corpus.tokenizer._bytes[:-9])
    assert build(folder, validation="shards").hash == corpus.hash
    assert build(folder, validation="last-shard").hash == corpus.hash
    fraction = build(folder)
    assert fraction.hash != corpus.hash
    assert len(documents_of(fraction.val, fraction.tokenizer)) not in (0, 40)


def test_a_download_in_progress_gives_the_shards_that_are_complete(build, tmp_path):
    complete = build(write(tmp_path / "shards", ["part_9.jsonl", "part_10.jsonl"]), validation="shards")
    hidden = tmp_path / "shards/.cache/huggingface/download"
    hidden.mkdir(parents=True)
    (hidden / "part_8.jsonl.0123.incomplete").write_text('{"text": "half of a te')  # as huggingface_hub names them
    (hidden / "part_8.jsonl.metadata").write_text("commit\n")
    (tmp_path / "shards/.part_7.jsonl.part").write_text('{"text": "half of a te')  # as those of the bucket are
    corpus = build(tmp_path / "shards", validation="shards")
    assert corpus.hash == complete.hash
    assert documents_of(corpus.train, corpus.tokenizer) == texts(0)


def test_what_is_not_numbered_is_split_by_document_unless_it_is_asked_for(build, tmp_path):
    folder = write(tmp_path / "shards", ["a.jsonl", "b.jsonl", "c.jsonl"])
    by_document = build(folder)
    assert build(folder, validation="shards").hash == by_document.hash
    last = build(folder, validation="last-shard")
    assert documents_of(last.val, last.tokenizer) == texts(2)
    plain = tmp_path / "plain"
    plain.mkdir()
    for number in range(3):
        (plain / f"{number}.txt").write_text("\n<|endoftext|>\n".join(texts(number)))
    assert build(plain, validation="shards").hash == build(plain).hash, "a plain text is mostly one document"
    assert len(documents_of(build(plain, validation="last-shard").val, last.tokenizer)) == 40


def test_the_tokenizer_is_trained_on_the_beginning_of_each_document(build, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "TOKENIZER_DOCUMENT_CHARS", 50)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        lines = [json.dumps({"text": "qqqq " * 10 + "vvvv " * 100}) for _ in range(20)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    for tokenize in ("ahead", "while-training"):
        tokens = build(folder, validation="shards", tokenize=tokenize).tokenizer._bytes
        assert b"qq" in tokens
        assert b"vv" not in tokens


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (("a text", "more text", " "), r"c\.txt: no text in the last shard, which is the validation set"),
        ((" ", " ", "a text"), "no text to train on in shards: only the last shard has text"),
    ],
)
def test_a_side_without_text_is_refused(build, tmp_path, contents, message):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, text in zip("abc", contents, strict=True):
        (folder / f"{name}.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        build(folder, validation="last-shard")


def test_where_there_are_no_shards_of_text_the_last_shard_is_refused(build, tmp_path):
    folder = write(tmp_path / "shards", ["1.jsonl", "2.jsonl"])
    with pytest.raises(
        ValueError, match=r"--validation last-shard needs two files or more, got 1\.jsonl, which is one"
    ):
        build(folder / "1.jsonl", validation="last-shard")
    build(folder)
    (cached,) = (path.parent for path in (tmp_path / "cache").glob("*/manifest.json"))
    for data in (cached, cached / "train_000000.bin"):
        with pytest.raises(
            ValueError, match=r"--validation must be fraction or shards for .*holds tokens; got last-shard"
        ):
            build(data, validation="last-shard")
        assert len(build(data, validation="shards").val) > 0


def test_auto_is_the_last_shard_with_best_fit_alone():
    def rule(*args):
        return resolve_defaults(parse(args), gpu=False).validation

    assert rule() == "fraction"
    assert rule("--packing", "bestfit") == "shards"
    assert rule("--tokenize", "while-training") == "shards"
    for given in ("fraction", "shards", "last-shard"):
        assert rule("--validation", given) == given
        assert rule("--validation", given, "--packing", "bestfit") == given
    assert TrainConfig().packing == "auto"


def test_cases_that_differ_in_the_flag_do_not_share_data(tmp_path):
    plan = resolve_defaults(parse(["--packing", "bestfit"]), gpu=False)
    for changed, same in (
        ({}, True),
        ({"packing": "stream"}, True),
        ({"validation": "fraction"}, False),
        ({"tokenize": "while-training"}, False),
    ):
        case = dataclasses.replace(plan, **changed)
        compared = comparison.Comparison({"one": case}, "one", 1, 1, tmp_path, plan, "prepared", [], {})
        assert (compared.corpus_of("one") == "prepared") == same


def test_the_flag_reaches_the_run(tmp_path, capsys):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        write_text(folder / f"{number}.jsonl", seed=number)
    assert train(tmp_path, data=folder, run="shard", steps=1, packing="bestfit") == 0
    assert "validation: the last shard, 2.jsonl" in capsys.readouterr().out
    assert train(tmp_path, data=folder, run="stream", steps=1, packing="stream") == 0
    assert "the last shard" not in capsys.readouterr().out
