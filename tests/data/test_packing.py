"""Packing by best fit: every row against an independent rewrite of the rule, resuming, ranks, validation, bad input."""

import io
import itertools
import json
import random

import numpy as np
import pytest
import torch
from tiny_run import losses, records, tiny_flags, train, write_text

from nanochat_native.data import BatchLoader, TokenStream, iterate_validation, make_loader, packing, prepare
from nanochat_native.data.packing import BestFitLoader, StoredDocuments, find_documents, iterate_packed, measure_packing
from nanochat_native.evaluate import main as evaluate
from nanochat_native.runs.run_folder import load_config
from nanochat_native.train import main

BOS = 7


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(packing, "BUFFER_DOCUMENTS", 20)
    monkeypatch.setattr(packing, "BLOCK_DOCUMENTS", 6)
    monkeypatch.setattr(packing, "_COMPUTED_AHEAD", 3)


def random_lengths(seed, count, longest):
    """Lengths of documents with many short ones, ties and some of one token."""
    rng = random.Random(seed)
    return [max(1, min(longest, int(rng.lognormvariate(2.5, 1.2)))) for _ in range(count)]


def stream_of(lengths, pieces=3):
    """Documents whose tokens tell the document and the place in it."""
    documents = [[BOS, *(10_000 * number + place for place in range(10, 9 + length))] for number, length in lengths]
    tokens = np.array([token for document in documents for token in document], dtype="<u4")
    cuts = [len(tokens) * piece // pieces for piece in range(1, pieces)]
    return TokenStream(np.split(tokens, cuts)), documents


def plain_best_fit(documents, row_tokens, buffer_size, block, taken=None):
    """The rule in plain words, on lists of tokens, for an endless iterator of documents. taken: receives the length of
    each document that a row takes something of."""
    taken = [] if taken is None else taken
    buffer = []
    while True:
        row = []
        while len(row) < row_tokens:
            while len(buffer) < buffer_size:
                buffer += [next(documents) for _ in range(block)]
            free = row_tokens - len(row)
            best = None
            for index, document in enumerate(buffer):
                if len(document) <= free and (best is None or len(document) > len(buffer[best])):
                    best = index
            if best is None:
                best = 0
                for index, document in enumerate(buffer):
                    if len(document) < len(buffer[best]):
                        best = index
            document = buffer.pop(best)
            taken.append(len(document))
            row += document[:free]
        yield row


def repeated(documents):
    while True:
        yield from documents


def rows_of(loader, steps):
    batches = [loader.batch(step) for step in steps]
    return torch.cat([torch.cat((inputs, targets[:, -1:]), dim=1) for inputs, targets in batches])


@pytest.mark.parametrize(("seed", "count", "row_tokens"), [(0, 75, 33), (1, 61, 9), (2, 40, 129), (3, 19, 17)])
def test_rows_are_those_of_the_plain_rule(small_buffer, seed, count, row_tokens):
    stream, documents = stream_of(list(enumerate(random_lengths(seed, count, 90))))
    loader = BestFitLoader(stream, find_documents(stream, BOS), batch_rows=2, sequence_len=row_tokens - 1, seed=None)
    wanted = plain_best_fit(repeated(documents), row_tokens, 20, 6)
    rows = rows_of(loader, range(100))
    assert rows.dtype == torch.int64
    for row in rows.tolist():
        assert row == next(wanted)
        assert row[0] == BOS


def test_rows_with_the_buffer_of_nanochat_are_those_of_the_plain_rule():
    stream, documents = stream_of(list(enumerate(random_lengths(5, 3000, 4000))))
    loader = BestFitLoader(stream, find_documents(stream, BOS), batch_rows=4, sequence_len=256, seed=None)
    wanted = plain_best_fit(repeated(documents), 257, 1000, 128)
    for row in rows_of(loader, range(40)).tolist():
        assert row == next(wanted)


def test_each_epoch_is_another_order_of_all_documents(small_buffer):
    stream, documents = stream_of(list(enumerate(random_lengths(6, 100, 40))))
    starts = find_documents(stream, BOS)
    source = StoredDocuments(stream, starts, seed=3)
    read = [document for _ in range(60) for document in source.read()]
    assert all(
        documents[int(np.searchsorted(starts, begin))] == stream.read(begin, begin + n).tolist() for n, begin in read
    )
    epochs = [[begin for _, begin in read[100 * epoch : 100 * (epoch + 1)]] for epoch in range(3)]
    assert all(sorted(epoch) == starts[:-1].tolist() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = StoredDocuments(stream, starts, seed=3)
    again.seek((120,))
    assert again.read() == read[120:126]
    other = StoredDocuments(stream, starts, seed=4)
    assert other.read() != read[:6]


def test_order_is_the_same_on_every_machine():
    stream, _ = stream_of([(number, 2 + (31 * number * number + 17 * number) % 300) for number in range(2000)])
    loader = BestFitLoader(stream, find_documents(stream, BOS), batch_rows=3, sequence_len=12, seed=42)
    found = [int(row[1]) // 10_000 for step in (0, 77) for row in loader.batch(step)[0]]
    assert found == [1616, 1352, 1952, 1405, 780, 513]


def test_the_batch_is_a_function_of_seed_and_step(small_buffer):
    stream, _ = stream_of(list(enumerate(random_lengths(8, 90, 60))))
    starts = find_documents(stream, BOS)
    first, second, other = (
        BestFitLoader(stream, starts, batch_rows=4, sequence_len=16, seed=seed) for seed in (7, 7, 8)
    )
    forward = [first.batch(step) for step in range(60)]
    for step in reversed(range(60)):
        assert all(map(torch.equal, second.batch(step), forward[step]))
    assert not torch.equal(other.batch(0)[0], forward[0][0])
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        first.batch(-1)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_global_batch_does_not_depend_on_the_world(small_buffer, world_size):
    stream, _ = stream_of(list(enumerate(random_lengths(9, 200, 60))))
    starts = find_documents(stream, BOS)
    options = {"batch_rows": 6, "sequence_len": 16, "seed": 1}
    whole = BestFitLoader(stream, starts, **options)
    ranks = [BestFitLoader(stream, starts, **options, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 1, 2, 30, 5):
        for part in (0, 1):
            assert torch.equal(torch.cat([loader.batch(step)[part] for loader in ranks]), whole.batch(step)[part])


def test_resuming_from_a_state_gives_the_same_rows(small_buffer):
    stream, _ = stream_of(list(enumerate(random_lengths(10, 80, 60))))
    starts = find_documents(stream, BOS)
    loader = BestFitLoader(stream, starts, batch_rows=2, sequence_len=24, seed=5)
    forward = [loader.batch(step) for step in range(60)]
    for step in range(58):
        resumed = BestFitLoader(stream, starts, batch_rows=2, sequence_len=24, seed=5)
        resumed.restore(step, loader.state(step))
        for later in (step, step + 1, step + 2):
            assert all(map(torch.equal, resumed.batch(later), forward[later])), (step, later)


def test_a_state_of_another_order_is_ignored(small_buffer):
    stream, _ = stream_of(list(enumerate(random_lengths(10, 80, 60))))
    starts = find_documents(stream, BOS)
    usual = {"batch_rows": 2, "sequence_len": 24, "seed": 5}
    state = BestFitLoader(stream, starts, **usual).state(30)
    for other in ({"seed": 6}, {"sequence_len": 12}, {"batch_rows": 4}):
        loader, reference = (BestFitLoader(stream, starts, **usual | other) for _ in range(2))
        loader.restore(30, state)
        assert torch.equal(loader.batch(30)[0], reference.batch(30)[0])


def test_a_resumed_loader_computes_no_step_again_and_an_old_state_is_found(small_buffer, monkeypatch):
    monkeypatch.setattr(packing, "_ROWS_BETWEEN_STATES", 40)
    stream, _ = stream_of(list(enumerate(random_lengths(11, 80, 60))))
    starts = find_documents(stream, BOS)
    loader = BestFitLoader(stream, starts, batch_rows=2, sequence_len=24, seed=5)
    loader.batch(100)
    assert set(loader._states) == {0, 20, 40, 60, 80, *range(85, 101)}
    rows = []
    original = packing.Packer.next_row
    monkeypatch.setattr(packing.Packer, "next_row", lambda self: rows.append(1) or original(self))
    loader.batch(45)
    assert len(rows) == 2 * 6
    resumed = BestFitLoader(stream, starts, batch_rows=2, sequence_len=24, seed=5)
    resumed.restore(100, loader.state(100))
    rows.clear()
    resumed.batch(100)
    assert len(rows) == 2


def test_the_thread_of_batches_and_its_owner_may_use_a_loader_at_once(small_buffer):
    stream, _ = stream_of(list(enumerate(random_lengths(12, 80, 60))))
    starts = find_documents(stream, BOS)
    loader, reference = (BestFitLoader(stream, starts, batch_rows=2, sequence_len=24, seed=5) for _ in range(2))
    with loader.iterate(3) as batches:
        for step in range(3, 40):
            assert all(map(torch.equal, next(batches), reference.batch(step)))
            state = loader.state(step + 1)
            assert all(torch.equal(state[name], reference.state(step + 1)[name]) for name in state)


def test_a_passing_error_of_the_source_changes_no_batch(small_buffer, monkeypatch):
    stream, _ = stream_of(list(enumerate(random_lengths(12, 80, 60))))
    starts = find_documents(stream, BOS)
    loader, reference = (BestFitLoader(stream, starts, batch_rows=4, sequence_len=24, seed=5) for _ in range(2))
    wanted = [reference.batch(step) for step in range(12)]
    calls = itertools.count(1)

    def read(source, real=StoredDocuments.read):
        if next(calls) % 8 == 0:
            raise OSError("the disk is away for a moment")
        return real(source)

    monkeypatch.setattr(StoredDocuments, "read", read)
    errors = 0
    for step in range(12):
        try:
            found = loader.batch(step)
        except OSError:
            errors += 1
            found = loader.batch(step)
        assert all(map(torch.equal, found, wanted[step])), step
    assert errors >= 3


def test_statistics_are_exact(small_buffer):
    lengths = random_lengths(13, 300, 70)
    stream, documents = stream_of(list(enumerate(lengths)))
    found = measure_packing(StoredDocuments(stream, find_documents(stream, BOS), seed=None), 300, 24)
    taken = []
    rows = plain_best_fit(repeated(documents), 25, 20, 6, taken)
    count = 0
    while len(taken) < 300:
        next(rows)
        count += 1
    assert found.documents == len(taken)
    assert found.rows_per_epoch == count * 300 / len(taken)
    assert found.cropped == 1 - 25 * count / sum(taken)
    assert 0.01 < found.cropped < 0.5
    loader = BestFitLoader(stream, find_documents(stream, BOS), batch_rows=2, sequence_len=24, seed=None)
    assert loader.epochs_of(10 * 24) == 10 / found.rows_per_epoch
    assert loader.describe() == f"300 documents by best fit, {found.cropped:.0%} of their tokens cropped"


# Where documents are


def test_documents_are_found_over_shards_and_tokens_before_the_first_are_left_out(monkeypatch):
    from nanochat_native.data import shards

    monkeypatch.setattr(shards, "SEARCH_TOKENS", 3)
    tokens = np.array([1, 2, BOS, 3, 4, BOS, BOS, 5, 6, 7 + 1, BOS], dtype="<u2")
    for cuts in ([], [3], [2, 3, 6], [5, 10]):
        stream = TokenStream(np.split(tokens, cuts))
        assert find_documents(stream, BOS).tolist() == [2, 5, 6, 10, 11]
    with pytest.raises(ValueError, match=r"needs documents, which begin with token 9; none of the 11 tokens is one"):
        find_documents(stream, 9)


def test_starts_of_a_large_stream_are_kept_and_a_damaged_file_is_written_again(monkeypatch, tmp_path):
    monkeypatch.setattr(packing, "CACHED_STREAM_TOKENS", 10)
    stream, _ = stream_of(list(enumerate(random_lengths(14, 50, 20))))
    path = tmp_path / "documents.npy"
    starts = find_documents(stream, BOS, path)
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(TokenStream, "find", lambda *_: pytest.fail("searched again"))
        assert np.array_equal(find_documents(stream, BOS, path), starts)
    other, _ = stream_of(list(enumerate(random_lengths(15, 50, 20))))
    archive, negative = io.BytesIO(), io.BytesIO()
    np.savez(archive, starts=starts)
    np.save(negative, np.append(-5, starts))
    no_array = (b"PK\x03\x04" + whole[4:], archive.getvalue())
    for content in (whole[:-5], b"", whole[:-8] + b"\0" * 8, negative.getvalue(), *no_array):
        path.write_bytes(content)
        assert np.array_equal(find_documents(stream, BOS, path), starts)
        assert path.read_bytes() == whole
    assert not np.array_equal(find_documents(other, BOS, path), starts), "a file of another stream is not used"


def test_starts_need_no_folder_to_be_kept_in(monkeypatch, tmp_path):
    monkeypatch.setattr(packing, "CACHED_STREAM_TOKENS", 10)
    stream, _ = stream_of(list(enumerate(random_lengths(14, 50, 20))))
    starts = find_documents(stream, BOS)
    missing = tmp_path / "not" / "there" / "documents.npy"
    assert np.array_equal(find_documents(stream, BOS, missing), starts)
    assert np.array_equal(np.load(missing), starts)
    (tmp_path / "file").touch()
    assert np.array_equal(find_documents(stream, BOS, tmp_path / "file" / "documents.npy"), starts)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        assert np.array_equal(find_documents(stream, BOS, tmp_path / "documents.npy"), starts)


def write_shard(path, tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = (20240520, 1, len(tokens)) if tokens.dtype.itemsize == 2 else (20240801, 7, len(tokens))
    path.write_bytes(header.tobytes() + tokens.tobytes())


@pytest.mark.parametrize(("dtype", "bos", "vocab_size"), [("<u2", 50256, 50257), ("<u4", 128000, 128256)])
def test_documents_of_llm_c_shards_begin_with_its_separator(tmp_path, dtype, bos, vocab_size):
    tokens = np.concatenate([[bos, *range(1, 2 + number % 9)] for number in range(400)]).astype(dtype)
    write_shard(tmp_path / "x_train_000001.bin", tokens)
    write_shard(tmp_path / "x_val_000000.bin", tokens[3:200])
    options = {"cache_dir": tmp_path / "cache", "progress": False}
    corpus = prepare(str(tmp_path), vocab_size=vocab_size, **options)
    loader = make_loader(corpus, packing="bestfit", batch_rows=4, sequence_len=16, seed=0)
    assert (loader.batch(3)[0][:, 0] == bos).all()
    batches = list(iterate_validation(corpus, packing="bestfit", batch_rows=4, sequence_len=16))
    assert (torch.cat([inputs for inputs, _ in batches])[:, 0] == bos).all()
    small = np.minimum(tokens, 99).astype(dtype)
    write_shard(tmp_path / "x_train_000001.bin", small)
    write_shard(tmp_path / "x_val_000000.bin", small)
    corpus = prepare(str(tmp_path / "x_train_000001.bin"), vocab_size=100, **options)
    with pytest.raises(ValueError, match=r"not known which token begins one .* use train's --packing stream"):
        make_loader(corpus, packing="bestfit", batch_rows=4, sequence_len=16, seed=0)
    with pytest.raises(ValueError, match="not known which token"):
        iterate_validation(corpus, packing="bestfit", batch_rows=4, sequence_len=16)
    assert isinstance(make_loader(corpus, packing="stream", batch_rows=4, sequence_len=16, seed=0), BatchLoader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_rows": 0}, "must be >= 1"),
        ({"batch_rows": 5, "world_size": 2}, "multiple of world_size 2"),
        ({"rank": 2, "world_size": 2}, "rank must be in \\[0, 2\\), got 2"),
        ({"batch_rows": 9}, "10 training documents fill at most 8 rows of 11 tokens, but a batch needs 9: give more"),
    ],
)
def test_bad_arguments(options, message):
    stream, _ = stream_of([(number, 9) for number in range(9)] + [(9, 50)])
    starts = find_documents(stream, BOS)
    with pytest.raises(ValueError, match=message):
        BestFitLoader(stream, starts, **{"batch_rows": 4, "sequence_len": 10, "seed": 0, **options})


# Validation


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_has_every_document_once_and_pads_the_last_row(world_size):
    lengths = random_lengths(18, 150, 30)
    stream, documents = stream_of(list(enumerate(lengths)))
    batches = [
        batch
        for rank in range(world_size)
        for batch in iterate_packed(stream, BOS, batch_rows=3, sequence_len=40, rank=rank, world_size=world_size)
    ]
    assert all(len(inputs) <= 3 for inputs, _ in batches)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (inputs[:, 0] == BOS).all()
    rows = torch.cat((inputs, targets[:, -1:]), dim=1)
    assert torch.equal(rows[:-1, 1:], targets[:-1])
    used = targets[-1] != -1
    assert 0 < used.sum() < 40
    assert (targets[:-1] != -1).all()
    assert used.sum() == used.nonzero().max() + 1
    assert torch.equal(inputs[-1][1:][used[:-1]][: used.sum() - 1], targets[-1][used][: used.sum() - 1])
    assert (inputs[-1][1 + used.sum() :] == 0).all()
    flat = [*rows[:-1].flatten().tolist(), *inputs[-1][:1], *targets[-1][used].tolist()]
    assert flat.count(BOS) == 150, "every document begins once"
    found = [token for token in flat if token >= 10_000 or 10 <= token < 100]
    assert len(set(found)) == len(found), "no token twice"
    assert set(found) <= {token for document in documents for token in document[1:]}


def test_validation_rows_are_those_of_the_plain_rule_and_can_be_limited():
    stream, documents = stream_of(list(enumerate(random_lengths(17, 4000, 300))))
    wanted = plain_best_fit(iter(documents), 65, 1000, 128)
    batches = list(iterate_packed(stream, BOS, batch_rows=4, sequence_len=64, max_tokens=64 * 30 - 5))
    assert [len(inputs) for inputs, _ in batches] == [4] * 7 + [2]
    for inputs, targets in batches:
        for row in torch.cat((inputs, targets[:, -1:]), dim=1).tolist():
            assert row == next(wanted)


def test_validation_without_a_target_is_refused():
    stream = TokenStream([np.array([1, BOS], dtype="<u2")])
    with pytest.raises(ValueError, match="must be >= 2 validation tokens, got 2"):
        next(iterate_packed(stream, BOS, batch_rows=4, sequence_len=8))
    one_more = TokenStream([np.array([BOS, *range(10, 18), BOS], dtype="<u2")])
    ((inputs, _),) = iterate_packed(one_more, BOS, batch_rows=4, sequence_len=8)
    assert len(inputs) == 1, "a row of one token has no target"


def test_bytes_of_the_targets_are_those_of_the_text(tmp_path):
    """If no document is cropped, the targets stand for all bytes of the text: <|bos|> counts none."""
    texts = [f"naïve text {number} of the set. " * (1 + number % 5) for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    corpus = prepare(str(tmp_path / "a.jsonl"), vocab_size=300, cache_dir=tmp_path / "cache", progress=False)
    everything = TokenStream([corpus.train.read(0, len(corpus.train)), corpus.val.read(0, len(corpus.val))])
    batches = iterate_packed(everything, corpus.bos_id, batch_rows=8, sequence_len=200_000)
    targets = torch.cat([targets.flatten() for _, targets in batches])
    counted = corpus.tokenizer.token_bytes[targets[targets >= 0].numpy()]
    assert counted.sum() == sum(len(text.encode()) for text in texts)
    assert counted.sum() == round(corpus.bytes_per_token * len(everything))


# The flag


def test_a_run_with_best_fit_resumes_with_the_same_losses_and_is_measured_alike(tmp_path, capsys):
    write_text(tmp_path / "text.jsonl", documents=300)
    flags = {"packing": "bestfit", "max_seq_len": 64}
    assert train(tmp_path, run="whole", steps=8, **flags) == 0
    assert "documents by best fit, " in capsys.readouterr().out
    assert train(tmp_path, run="parts", steps=4, **flags) == 0
    folder = tmp_path / "runs" / "parts"
    assert (folder / "checkpoints" / "step_000004" / "loader.safetensors").is_file()
    assert main(["--resume", str(folder), "--num-iterations", "8"]) == 0
    assert losses(folder) == losses(tmp_path / "runs" / "whole")
    (last,) = [record for record in records(folder, "val") if record["step"] == 8]
    capsys.readouterr()
    assert evaluate(["--checkpoint", str(folder), "--max-tokens", "256", "--device-batch-size", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bpb"] == pytest.approx(last["bpb"], rel=1e-6)
    assert main(["--resume", str(folder), "--packing", "stream"]) == 2
    assert "--packing bestfit -> stream" in capsys.readouterr().err


def test_the_stream_stays_the_default_and_runs_from_before_the_flag_go_on(tmp_path):
    write_text(tmp_path / "text.jsonl")
    assert train(tmp_path, steps=2) == 0
    folder = tmp_path / "runs" / "tiny"
    assert not (folder / "checkpoints" / "step_000002" / "loader.safetensors").exists()
    stored = json.loads((folder / "config.json").read_text())
    assert stored["config"]["packing"] == "stream"
    for name in ("packing", "validation", "tokenize"):
        del stored["config"][name]
    (folder / "config.json").write_text(json.dumps(stored))
    assert main(["--resume", str(folder), "--num-iterations", "3"]) == 0
    assert load_config(folder).packing == "stream"


def test_too_little_text_is_an_error_of_one_line(tmp_path, capsys):
    write_text(tmp_path / "text.jsonl", documents=3)
    assert main(tiny_flags(tmp_path, packing="bestfit", total_batch_size=32 * 64)) == 2
    assert "training documents fill at most" in capsys.readouterr().err
