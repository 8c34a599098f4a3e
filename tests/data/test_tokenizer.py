"""The tokenizer: exact round trips, determinism, safe files, and the same ids in the Hugging Face format."""

import base64
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from nanochat_native.data.tokenizer import SPECIAL_TOKENS, Tokenizer, split_long

WORDS = ["the", "quick", "brown", "fox;", "def", "return", "12", "345", "6789", "naïve", "漢字", "😀", "it's", "we'll"]


def sample_texts(count: int = 60, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    joints = [" ", " ", "\n", "  ", "\n\n    ", ", ", "\t"]
    words = WORDS + ["".join(rng.choices("abcdefgh", k=4)) for _ in range(100)]
    return ["".join(rng.choice(words) + rng.choice(joints) for _ in range(200)) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(sample_texts(), 400)


def nasty_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    odd = [
        "\x85",
        "\xa0",
        "\u2028",
        "\x1c",
        "\x0b",
        "\t",
        "\r",
        "\n",
        " ",
        "1",
        "a",
        "'LL",
        "'\u017f",
        "½",
        "٣",
        "\u3000",
        "<|bos|>",
    ]
    ranges = [(32, 126), (0, 0x2FF), (0x2000, 0x3100), (0x1F300, 0x1F700)]
    texts = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.3:
            texts.append("".join(rng.choice("abthe \n") for _ in range(rng.randint(0, 200))))
        elif kind < 0.6:
            texts.append("".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 60))))
        else:
            texts.append("".join(rng.choice(odd) for _ in range(30)))
    return texts


def test_round_trip_and_ids(tokenizer):
    assert tokenizer.vocab_size == 400
    assert tokenizer.bos_id == 400 - len(SPECIAL_TOKENS) == tokenizer.special_tokens["<|bos|>"]
    for text in [*sample_texts(3, seed=1), *nasty_texts(500, seed=2), ""]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(i < tokenizer.bos_id for i in ids), "text must not make special tokens"
    assert len(Tokenizer.train(["the quick brown " * 50], 290).encode("the quick brown")) == 3
    assert tokenizer.decode([tokenizer.bos_id]) == "<|bos|>"
    texts = sample_texts(5, seed=3)
    assert tokenizer.encode_ordinary_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_digits_split_in_pairs():
    tokenizer = Tokenizer.train(["1234567890 " * 100], 300)
    assert max(len(tokenizer.decode_bytes([i])) for i in tokenizer.encode("1234567890")) == 2
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.bos_id)]
    assert max(sum(chr(byte).isdigit() for byte in token if byte < 128) for token in tokens) == 2


def test_token_bytes_count_bytes_not_characters(tokenizer):
    counts = tokenizer.token_bytes
    assert counts.dtype == np.int32
    assert counts.shape == (400,)
    assert (counts[tokenizer.bos_id :] == 0).all()
    assert (counts[:256] == 1).all(), "bytes above 127 are one byte each, not the three of U+FFFD"
    for text in nasty_texts(200, seed=4):
        assert counts[tokenizer.encode(text)].sum() == len(text.encode())


def test_decode_of_half_a_character(tokenizer):
    ids = [i for i in range(256) if tokenizer.decode_bytes([i]) == b"\xf0"]
    assert tokenizer.decode(ids) == "\ufffd"


@pytest.mark.parametrize("ids", [[-1], [400], [0, 10**9]])
def test_decode_refuses_unknown_ids(tokenizer, ids):
    with pytest.raises(ValueError, match=r"ids must be in \[0, 400\), got"):
        tokenizer.decode(ids)


def test_training_is_deterministic_over_processes_and_threads():
    # Words of two letters make many pairs of equal count, where an order by hash would show.
    program = (
        "import random; from nanochat_native.data.tokenizer import Tokenizer; rng = random.Random(5);"
        "print(Tokenizer.train([' '.join(''.join(rng.choice('ab') for _ in range(rng.randint(1, 30)))"
        " for _ in range(60)) for _ in range(100)], 1500).hash)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "7")
    ]
    assert len(runs[0].strip()) == 64
    assert runs[0] == runs[1] == runs[2]
    assert Tokenizer.train(["ab"], 300).hash != Tokenizer.train(["cd"], 300).hash


def test_too_small_vocabulary_is_refused():
    with pytest.raises(ValueError, match="265"):
        Tokenizer.train(["text"], 264)
    assert Tokenizer.train(["text"], 265).vocab_size == 265


def test_little_text_gives_a_smaller_vocabulary():
    tokenizer = Tokenizer.train(["the cat"], 1000)
    assert 265 < tokenizer.vocab_size < 275
    assert tokenizer.decode(tokenizer.encode("the dog")) == "the dog"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert loaded.hash == tokenizer.hash
    assert loaded.special_tokens == tokenizer.special_tokens
    text = sample_texts(1, seed=6)[0]
    assert loaded.encode(text) == tokenizer.encode(text)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "bpe.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_failed_save_keeps_the_old_file(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        Tokenizer.train(["another"], 270).save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_load_refuses_damage(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "bpe.json"
    good = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")
    token = base64.b64encode(tokenizer.decode_bytes([300]))
    other = base64.b64encode(b"\x01\x02\x03\x04")
    for bad in (
        good[: len(good) // 2],
        b"",
        b"[]",
        b"\xff" + good,
        good.replace(b'"' + token + b'"', b'"' + other + b'"'),
    ):
        assert bad != good
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"bpe\.json: damaged"):
            Tokenizer.load(tmp_path)
    path.write_text(json.dumps({**json.loads(good), "version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([bytes([i]) for i in range(255)], "missing"),
        ([bytes([i]) for i in range(256)] + [b"a"], "got 1 duplicates"),
        ([bytes([i]) for i in range(256)] + [b""], "empty"),
    ],
)
def test_bad_vocabularies_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(tokens)


def test_split_long_cuts_at_word_edges(tokenizer):
    for text in sample_texts(10, seed=7):
        whole = tokenizer.encode(text)
        for limit in (64, 200, 1000):
            parts = list(split_long(text, limit))
            assert "".join(parts) == text
            assert max(map(len, parts)) <= limit
            assert [i for part in parts for i in tokenizer.encode(part)] == whole
    assert [len(part) for part in split_long("x" * 250, 100)] == [100, 100, 50]
    assert list(split_long("")) == []


@pytest.mark.parametrize("unit", ["a", " ", "\n", "=", "漢"])
def test_long_runs_take_linear_time(tokenizer, unit):
    text = unit * 1_000_000
    start = time.process_time()  # not of the clock: other work shares the machine
    ids = tokenizer.encode_to_numpy(text)
    trained = Tokenizer.train([text], 300)
    assert time.process_time() - start < 60
    assert tokenizer.decode(ids.tolist()) == text
    assert trained.vocab_size <= 300


def test_hugging_face_file_gives_the_same_ids(tokenizer, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    overlapping = Tokenizer.train(
        [" ".join("".join(random.Random(i).choices("aab", k=20)) for i in range(j, j + 50)) for j in range(50)], 900
    )
    rng = random.Random(8)
    runs = ["".join(rng.choices("aab", k=rng.randint(1, 60))) for _ in range(2000)]
    for trained, texts in ((tokenizer, sample_texts(5, seed=9) + nasty_texts(3000, seed=9)), (overlapping, runs)):
        trained.save(tmp_path)
        other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert other.get_vocab_size() == trained.vocab_size
        assert {name: other.token_to_id(name) for name in SPECIAL_TOKENS} == trained.special_tokens
        for text in texts:
            if "<|bos|>" not in text:
                assert other.encode(text, add_special_tokens=False).ids == trained.encode(text), repr(text)
                assert other.decode(trained.encode(text)) == text
