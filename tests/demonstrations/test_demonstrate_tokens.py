"""The statements of chapter 3 hold for the numbers of its demonstrations."""

import math

import pytest
from tiny_run import train, write_text

from nanochat_native.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_native.demonstrations import tokens as demonstrations


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_text(folder / "text.jsonl")
    assert train(folder, steps=4) == 0
    return folder / "runs/tiny"


def test_merges_by_hand_are_those_of_rustbpe():
    found = demonstrations.merges_by_hand()
    assert found["same_as_rustbpe"]
    assert found["merges"] == ["i+n", "t+h", "␣+th", "␣+in", "␣th+in", "th+e"]
    assert found["tokens"][0] == found["bytes"] == len(demonstrations.TEXT.encode())
    for before, after, count in zip(found["tokens"], found["tokens"][1:], found["counts"], strict=False):
        assert before - after == count
    for text in found["after"].values():
        assert text.replace(" | ", "").replace(" ", "").replace("␣", " ") == demonstrations.TEXT


def test_a_merge_replaces_pairs_from_left_to_right():
    assert demonstrations.merged((1, 1, 1), (1, 1), 256) == (256, 1)
    assert demonstrations.merged((1, 2, 1, 2, 3), (1, 2), 256) == (256, 256, 3)
    assert demonstrations.merged((1, 256, 1), (256, 1), 257) == (1, 257)
    assert demonstrations.learn(demonstrations.words_of("a"), 3) == []


@pytest.mark.parametrize("merges", [50, 300])
def test_plain_python_learns_what_rustbpe_learns(merges):
    found = demonstrations.same_merges(merges)
    assert found["equal"] == merges
    assert len(found["longest"]) > 5


def test_words_are_those_of_the_split_pattern():
    text = demonstrations.generated_text(500)
    tokenizer = Tokenizer.train([text], 3000)
    words = demonstrations.words_of(text)
    assert sum(words.values()) == 500
    for word in words:
        # With enough merges each word is one token, and no token is more than a word.
        assert len(tokenizer.encode(bytes(word).decode())) == 1
    assert len(tokenizer.encode(text)) == 500


def test_without_the_pattern_tokens_cross_words_and_are_fewer():
    found = demonstrations.split_pattern(600)
    assert found["crossing_share"] > 0.1
    assert found["bytes_per_token"]["without"] > found["bytes_per_token"]["with"]
    assert found["spellings_of_self"]["without"] > found["spellings_of_self"]["with"]


def test_spellings_are_counted_by_hand():
    tokenizer = Tokenizer.train(["self.a self.b self" * 20], 256 + 6 + len(SPECIAL_TOKENS))
    assert demonstrations.spellings(tokenizer, "nothing", "self") == 0
    assert demonstrations.spellings(tokenizer, "self self", "self") == 2  # with and without the space before
    bytes_only = Tokenizer([bytes([byte]) for byte in range(256)])
    assert demonstrations.spellings(bytes_only, "self self myself", "self") == 1


def test_names_of_special_tokens_are_text():
    found = demonstrations.special_tokens()
    assert found["forged"] == 0
    assert found["obeying_encoder"]["forged"] == 1
    assert found["obeying_encoder"]["tokens"] < found["tokens"]


@pytest.mark.slow
def test_larger_vocabularies_gain_less_and_contain_the_smaller():
    found = demonstrations.vocabulary()
    gains = found["gain_of_doubling"][1:]
    assert gains == sorted(gains, reverse=True)
    assert min(gains) > 1
    assert found["small_is_a_beginning"]
    assert found["rows"][0]["bytes_per_token"] == 1.0
    bits = [row["uniform_bpb"] for row in found["rows"]]
    assert bits.index(min(bits)) not in (0, len(bits) - 1)


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger_one():
    text = demonstrations.generated_text()
    small, large = (demonstrations.tokens_of(Tokenizer.train([text], size)) for size in (300, 500))
    assert small == large[: len(small)]


def test_pieces_join_to_the_text(run):
    found = demonstrations.pieces(run)
    assert len(found["line_ids"].split()) == len(found["line_tokens"].split()) == found["line_count"]
    text = found["phrases"]["hello"].replace(" ", "").replace("␣", " ")
    assert text == demonstrations.PHRASES["hello"]


def test_bits_per_byte_by_the_definition_and_by_wrong_formulas(run):
    found = demonstrations.bits_per_byte(run, max_tokens=256)
    assert found["special_targets"] > 0
    assert found["untrained"] == pytest.approx(found["uniform"], rel=1e-5)
    assert found["bits_per_byte"] < found["untrained"]
    of_the_text = found["bytes_per_token"]["of_the_text"]
    assert found["nats_per_token"] / math.log(2) / of_the_text == pytest.approx(found["bits_per_byte"], rel=0.05)
    assert abs(found["wrong"]["mean_over_vocabulary"] / found["bits_per_byte"] - 1) > 0.1
    assert abs(found["wrong"]["divided_by_8"] / found["bits_per_byte"] - 1) > 0.1
