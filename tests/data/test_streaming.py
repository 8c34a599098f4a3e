"""Text that is tokenized while training runs: the rows of text that was tokenized before, resuming, damage."""

import gzip
import json
import random
import threading

import pytest
import torch
from tiny_run import losses, tiny_flags, train, write_text

from nanochat_native.data import DamagedFileError, corpus, documents, make_loader, prepare, streaming
from nanochat_native.data.packing import BestFitLoader, find_documents
from nanochat_native.data.streaming import TextSource
from nanochat_native.evaluate import main as evaluate
from nanochat_native.train import main

OPTIONS = {"batch_rows": 6, "sequence_len": 32}


def texts(seed, count, longest=60):
    rng = random.Random(seed)
    words = ("the", "naïve", "kernel", "漢字", "multiplies", "a", "long", "matrix,\n")
    return [f"{seed}/{number} " + " ".join(rng.choices(words, k=rng.randint(1, longest))) for number in range(count)]


def write_shard(path, lines):
    data = "\n".join(json.dumps({"text": line}) for line in lines).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


@pytest.fixture
def folder(tmp_path):
    """Four numbered shards; the documents of the last one validate."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(4):
        write_shard(folder / f"shard_{number:03d}.jsonl", texts(number, 150))
    return folder


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "JOB_CHARS", 700)

    def call(data, **options):
        defaults = {"vocab_size": 300, "cache_dir": tmp_path / "cache", "progress": False, "validation": "shards"}
        return prepare(str(data), **{**defaults, **options})

    return call


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr("nanochat_native.data.packing.BUFFER_DOCUMENTS", 20)
    for module in ("packing", "streaming"):
        monkeypatch.setattr(f"nanochat_native.data.{module}.BLOCK_DOCUMENTS", 6)


def both(build, data, **options):
    """The corpus that was tokenized before, as a loader in the order of the files, and the one to be tokenized."""
    before = build(data, **options)
    starts = find_documents(before.train, before.bos_id)
    return (
        before,
        BestFitLoader(before.train, starts, **OPTIONS, seed=None),
        build(data, tokenize="while-training", **options),
    )


def loader_of(text, **options):
    return make_loader(text, packing="bestfit", **OPTIONS, seed=0, **options)


def require_equal(loader, reference, steps):
    for step in steps:
        assert all(map(torch.equal, loader.batch(step), reference.batch(step))), step


def test_rows_are_those_of_text_that_was_tokenized_before(build, folder):
    before, reference, text = both(build, folder)
    assert text.tokenizer.hash == before.tokenizer.hash
    assert torch.equal(*(torch.from_numpy(c.val.read(0, len(c.val))) for c in (before, text)))
    assert len(text.train) == 0
    assert reference.epochs_of(6 * 32 * 300) > 5, "the steps are several epochs"
    require_equal(loader_of(text), reference, range(300))


@pytest.mark.parametrize("kind", ["parquet", "gz", "text", "one long text"])
def test_rows_of_other_files(build, tmp_path, small_buffer, monkeypatch, kind):
    folder = tmp_path / "files"
    folder.mkdir()
    rule = "last-shard"
    for number in range(9 if kind == "one long text" else 3):
        lines = texts(number, 130)
        if kind == "parquet":
            pa = pytest.importorskip("pyarrow")
            import pyarrow.parquet as pq

            lines[70] = None
            pq.write_table(pa.table({"text": lines}), folder / f"{number}.parquet", row_group_size=40)
        elif kind == "gz":
            write_shard(folder / f"{number}.jsonl.gz", lines)
        else:
            monkeypatch.setattr(documents, "PIECE_CHARS", 500)
            monkeypatch.setattr(documents, "BLOCK_BYTES", 200)
            separator = "\n<|endoftext|>\n" if kind == "text" else "\n"
            (folder / f"{number}.txt").write_text(separator.join(lines))
    _, reference, text = both(build, folder, validation=rule)
    require_equal(loader_of(text), reference, range(30))


def test_documents_are_held_out_as_before(build, folder, monkeypatch):
    before, reference, text = both(build, folder, validation="fraction", tokenizer=build(folder).tokenizer)
    require_equal(loader_of(text), reference, range(100))
    whole = before.val.read(0, len(before.val))
    assert (text.val.read(0, len(text.val)) == whole).all()
    monkeypatch.setattr(corpus, "HELD_OUT_CHARS", 1500)
    part = build(
        folder,
        validation="fraction",
        tokenize="while-training",
        tokenizer=before.tokenizer,
        cache_dir=folder.parent / "b",
    )
    assert 0 < len(part.val) < len(whole) / 2
    assert (part.val.read(0, len(part.val)) == whole[: len(part.val)]).all()
    assert any(note.startswith("validation: ") and "documents of the first files" in note for note in part.notes)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_have_disjoint_parts_of_the_batch(build, folder, world_size):
    _, reference, text = both(build, folder)
    ranks = [loader_of(text, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 1, 50, 120, 30):
        for part in (0, 1):
            assert torch.equal(torch.cat([loader.batch(step)[part] for loader in ranks]), reference.batch(step)[part])


def test_resuming_at_any_step_gives_the_same_rows(build, folder, small_buffer):
    _, reference, text = both(build, folder)
    loader = loader_of(text)
    for step in range(45):
        state = loader.state(step)
        resumed = loader_of(text)
        resumed.restore(step, state)
        require_equal(resumed, reference, (step, step + 1))
        require_equal(loader, reference, (step,))


def test_a_resumed_loader_reads_only_from_its_place_on(build, folder, small_buffer, monkeypatch):
    _, reference, text = both(build, folder)
    state = loader_of(text).state(40)
    assert state["cursor"][1:3].sum() > 0
    opened = []
    original = streaming.read_document_parts
    monkeypatch.setattr(
        streaming, "read_document_parts", lambda path, *a, **k: opened.append(path.name) or original(path, *a, **k)
    )
    resumed = loader_of(text)
    resumed.restore(40, state)
    require_equal(resumed, reference, range(40, 44))
    assert opened[0] == f"shard_{state['cursor'][2]:03d}.jsonl"
    assert len(opened) <= 3


def test_little_is_tokenized_ahead(build, folder, monkeypatch):
    _, _, text = both(build, folder)
    started = []
    original = TextSource._encode
    lock = threading.Lock()

    def encode(self, job):
        with lock:
            started.append(sum(len(part.text) for part in job))
        return original(self, job)

    monkeypatch.setattr(TextSource, "_encode", encode)
    source = TextSource(text.documents, 33, threads=2)
    source.read()
    longest = max(len(line) for number in range(3) for line in texts(number, 150))
    read = sum(len(line) for line in texts(0, 150)[:129])
    assert read <= sum(started) <= read + 6 * (700 + longest)
    assert max(len(head) for _, head in source.read()) == 33, "only what a row can hold is kept"


# Identity


def test_the_hash_follows_the_files_and_the_settings(build, folder, tmp_path):
    first = build(folder, tokenize="while-training")
    assert first.hash == build(folder, tokenize="while-training").hash
    assert first.hash != build(folder).hash
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert build(moved, tokenize="while-training").hash == first.hash
    assert build(moved, tokenize="while-training", validation="last-shard").hash == first.hash
    assert build(moved, tokenize="while-training", validation="fraction").hash != first.hash
    path = moved / "shard_001.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1/149", b"1/148"))
    assert path.stat().st_size == len(content)
    assert build(moved, tokenize="while-training").hash != first.hash
    path.write_bytes(content)
    path.rename(moved / "shard_007.jsonl")
    assert build(moved, tokenize="while-training").hash != first.hash, "another order"


def test_a_damaged_folder_in_the_cache_is_built_again(build, folder, tmp_path):
    first = build(folder, tokenize="while-training")
    (path,) = (tmp_path / "cache").glob("*/val_000000.bin")
    path.write_bytes(path.read_bytes()[:-2])
    again = build(folder, tokenize="while-training")
    assert again.hash == first.hash
    assert "built again" in again.notes[0]


# Bad input


def test_damage_in_the_middle_is_named_after_the_rows_before_it(build, folder, small_buffer, monkeypatch):
    monkeypatch.setattr(streaming, "JOB_CHARS", 20_000)
    _, reference, text = both(build, folder)
    path = folder / "shard_002.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[100] = b'{"text": "half' + b" " * (len(lines[100]) - 14)
    path.write_bytes(b"\n".join(lines))
    loader = loader_of(text)
    require_equal(loader, reference, range(6))
    with pytest.raises(DamagedFileError, match=r"shard_002\.jsonl:101: not a line of JSON"):
        require_equal(loader, reference, range(6, 100))
    last = loader._step
    assert loader._source.cursor[0] == 396, "of 400 documents before the damage all whole blocks were read"
    with pytest.raises(DamagedFileError, match=r"shard_002\.jsonl:101"):
        loader.batch(last)
    skipping = build(folder, tokenize="while-training", skip_damaged=True)
    _, reference, _ = both(build, folder, skip_damaged=True)
    require_equal(loader_of(skipping), reference, range(60))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda path: path.unlink(), FileNotFoundError, r"shard_001\.jsonl"),
        (lambda path: path.write_text("{}"), DamagedFileError, r"shard_001\.jsonl: changed since .* bytes, now 2"),
    ],
)
def test_a_file_that_is_gone_or_changed_is_named(build, folder, change, error, message):
    text = build(folder, tokenize="while-training")
    change(folder / "shard_001.jsonl")
    with pytest.raises(error, match=message):
        loader_of(text).batch(0)


def test_text_without_documents_is_refused(build, folder, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "the only document"}))
    with pytest.raises(
        ValueError, match=r"too few documents in one\.jsonl to hold some out .* train's --tokenize ahead"
    ):
        build(tmp_path / "one.jsonl", tokenize="while-training", vocab_size=265)
    text = build(folder, tokenize="while-training")
    for number in range(3):
        path = folder / f"shard_{number:03d}.jsonl"
        path.write_bytes(b"\n" * path.stat().st_size)
    with pytest.raises(DamagedFileError, match="no text to train on in 3 files"):
        loader_of(text).batch(0)


def test_what_needs_tokens_is_refused(build, folder, tmp_path):
    text = build(folder, tokenize="while-training")
    with pytest.raises(ValueError, match="--tokenize while-training needs packing bestfit, got stream"):
        make_loader(text, packing="stream", **OPTIONS, seed=0)
    build(folder)
    (tokens,) = (path.parent for path in (tmp_path / "cache").glob("*/train_000000.bin"))
    for data in (tokens, tokens / "train_000000.bin"):
        with pytest.raises(
            ValueError, match=r"--tokenize must be ahead for .*, which holds tokens; got while-training"
        ):
            build(data, tokenize="while-training")


# The flag


def test_a_run_resumes_with_the_same_losses(tmp_path, capsys):
    write_text(tmp_path / "text.jsonl", documents=600)
    flags = {"tokenize": "while-training", "max_seq_len": 64}
    assert train(tmp_path, run="whole", steps=8, **flags) == 0
    shown = capsys.readouterr().out
    assert "documents by best fit, in the order of the files" in shown
    assert "epochs" not in shown
    assert train(tmp_path, run="parts", steps=3, **flags) == 0
    folder = tmp_path / "runs" / "parts"
    assert main(["--resume", str(folder), "--num-iterations", "8"]) == 0
    trained, expected = losses(folder), losses(tmp_path / "runs" / "whole")
    assert [entry for entry in trained if entry in expected] == expected
    assert evaluate(["--checkpoint", str(folder), "--max-tokens", "256", "--json"]) == 0
    assert evaluate(["--checkpoint", str(folder), "--split", "train"]) != 0
    assert "--split must be val for a run of train's --tokenize while-training" in capsys.readouterr().err
    assert main(tiny_flags(tmp_path, packing="stream", tokenize="while-training")) == 2
    assert "--tokenize while-training needs --packing bestfit" in capsys.readouterr().err


def test_damage_ends_a_run_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "HELD_OUT_CHARS", 3000)
    monkeypatch.setattr(corpus, "TOKENIZER_TRAINING_CHARS", 20_000)
    path = write_text(tmp_path / "text.jsonl", documents=1400)
    lines = path.read_text().split("\n")
    lines[1300] = "{" + lines[1300][1:].replace(":", " ")
    path.write_text("\n".join(lines))
    assert train(tmp_path, steps=100, eval_every=0, tokenize="while-training", total_batch_size=1024) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}:1301: not a line of JSON")
    assert error.count("\n") == 1
    assert list((tmp_path / "runs" / "tiny" / "checkpoints").glob("step_*")), "the steps before it were saved"
