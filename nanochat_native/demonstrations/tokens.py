"""Tokens: merges by hand, the split pattern, special tokens, bytes per token, and bits per byte."""

import itertools
import math
import re
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nanochat_native import data
from nanochat_native.data.sources import find_source
from nanochat_native.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_native.evaluation.bits_per_byte import measure_text
from nanochat_native.model.gpt import GPT
from nanochat_native.runs import run_folder
from nanochat_native.runs.config import STDLIB, FinetuneConfig, ReinforceConfig, TrainConfig
from nanochat_native.runs.saved_model import load_model

Pair = tuple[int, int]
Words = Counter[tuple[int, ...]]

TEXT = "the thin thing in the inn"
MERGES = 6
LINE = "    def __init__(self, name, count=1000):  # naïve"
PHRASES = {
    "unhappiness": "unhappiness",
    "function": "function",
    "Function": "Function",
    "function_after_space": " function",
    "hello": "Hello, world!",
    "number": "123456",
    "naive": "naïve",
    "mathematics_in_chinese": "数学",
    "smile": "🙂",
}
VOCABULARIES = (265, 512, 1024, 2048, 4096, 8192, 16384)
HELD_OUT = 20  # one file in so many is not trained on
SAMPLE_CHARS = 100_000


# --- byte pair encoding in plain Python ---


def words_of(text: str) -> Words:
    """Return the words of an ASCII text without digits, each as its bytes, with their counts.

    A word is a run of letters or of other characters, with the space before it. This is a plain relative of
    `SPLIT_PATTERN`, which agrees with it on texts of lowercase letters and single spaces.
    """
    return Counter(tuple(word.encode()) for word in re.findall(r" ?[a-z]+| ?[^ a-z]+| +", text))


def pair_counts(words: Words) -> Counter[Pair]:
    """Return how often each pair of neighbours occurs in the words."""
    counts: Counter[Pair] = Counter()
    for word, count in words.items():
        for pair in itertools.pairwise(word):
            counts[pair] += count
    return counts


def merged(word: Sequence[int], pair: Pair, new: int) -> tuple[int, ...]:
    """Return the word with each occurrence of the pair, from left to right, replaced by the new token."""
    result: list[int] = []
    for token in word:
        if result and (result[-1], token) == pair:
            result[-1] = new
        else:
            result.append(token)
    return tuple(result)


def most_frequent(counts: Counter[Pair]) -> tuple[Pair, int]:
    """Return the most frequent pair and its count; among equal counts the pair with the smallest ids."""
    pair = min(counts, key=lambda pair: (-counts[pair], pair))
    return pair, counts[pair]


def learn(words: Words, merges: int) -> list[tuple[Pair, int]]:
    """Return the first merges of byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909), each with its count.

    The pair of merge number i becomes the token 256 + i. There are fewer merges if every word is one token.
    """
    learned = []
    for new in range(256, 256 + merges):
        counts = pair_counts(words)
        if not counts:
            break
        pair, count = most_frequent(counts)
        learned.append((pair, count))
        changed: Words = Counter()
        for word, number in words.items():
            changed[merged(word, pair, new)] += number
        words = changed
    return learned


def spelling(learned: Sequence[tuple[Pair, int]]) -> list[bytes]:
    """Return the bytes of each token: the 256 bytes, and then one token for each merge."""
    tokens = [bytes([byte]) for byte in range(256)]
    for (left, right), _ in learned:
        tokens.append(tokens[left] + tokens[right])
    return tokens


# --- demonstrations ---


def merges_by_hand() -> dict[str, Any]:
    """Learn six merges on a text of 25 bytes, and show the text after each.

    Byte pair encoding, Sennrich et al. 2016, arXiv:1508.07909, in plain Python. `rustbpe` learns the same tokens. Words
    are separated by a bar, tokens by a space, and ␣ is the space of the text.
    """
    learned = learn(words_of(TEXT), MERGES)
    spelled = spelling(learned)
    words = [tuple(word.encode()) for word in re.findall(r" ?[a-z]+", TEXT)]
    after, tokens = {"0": cut_text(words, spelled)}, [sum(map(len, words))]
    for number, (pair, _) in enumerate(learned):
        words = [merged(word, pair, 256 + number) for word in words]
        after[str(number + 1)] = cut_text(words, spelled)
        tokens.append(sum(map(len, words)))
    package = Tokenizer.train([TEXT], 256 + MERGES + len(SPECIAL_TOKENS))
    return {
        "text": TEXT,
        "bytes": len(TEXT.encode()),
        "merges": ["+".join(visible(spelled[token]) for token in pair) for pair, _ in learned],
        "counts": [count for _, count in learned],
        "tokens": tokens,
        "after": after,
        "same_as_rustbpe": tokens_of(package)[256:] == spelled[256:],
    }


def cut_text(words: Sequence[Sequence[int]], spelled: Sequence[bytes]) -> str:
    """Return the tokens of each word: "th e | ␣ th in"."""
    return " | ".join(" ".join(visible(spelled[token]) for token in word) for word in words)


def same_merges(merges: int = 300) -> dict[str, Any]:
    """Learn 300 merges on a generated text, in plain Python and with rustbpe, and count equal tokens."""
    text = generated_text()
    own = spelling(learn(words_of(text), merges))[256:]
    package = Tokenizer.train([text], 256 + merges + len(SPECIAL_TOKENS))
    theirs = tokens_of(package)[256:]
    return {
        "bytes": len(text.encode()),
        "merges": merges,
        "equal": sum(a == b for a, b in zip(own, theirs, strict=True)),
        "first": [token.decode() for token in own[:8]],
        "longest": max(own, key=len).decode(),
    }


def generated_text(words: int = 3000) -> str:
    """Return a text of invented words in which frequent syllables and words are as in a language: few are most of it.

    The same on every machine: it uses a generator of its own, x -> 48271 x mod (2^31 - 1) (Park and Miller, 1988).
    """
    state = 1

    def choose(options: Sequence[str]) -> str:
        nonlocal state
        state = 48271 * state % (2**31 - 1)
        return options[int(len(options) * (state / 2**31) ** 3)]

    onsets, vowels, codas = ("t", "s", "th", "r", "k", "m", "br"), ("e", "a", "i", "o"), ("", "n", "r", "st")
    lexicon = ["".join(choose(part) for part in (onsets, vowels, codas) * (1 + i % 3)) for i in range(400)]
    return " ".join(choose(lexicon) for _ in range(words))


def split_pattern(vocab_size: int = 1024) -> dict[str, Any]:
    """Train with and without the split pattern on 100,000 characters of the standard library.

    Without the pattern a merge may cross the border of two words. `spellings_of_self` is the number of ways in which
    the name self is cut in other files: different tokens, or the same tokens with other letters before and behind.
    """
    training, held_out = standard_library()
    text, other = training[:SAMPLE_CHARS], held_out[:SAMPLE_CHARS]
    without = train_without_pattern(text, vocab_size)
    tokenizers = {
        "with": Tokenizer.train([text], vocab_size),
        "without": Tokenizer(without, pattern=r"[\s\S]+"),
    }
    # With the pattern, the tokenizer cuts a text at the borders of words first, so it cannot use these tokens.
    splitting = Tokenizer(without)
    texts = [token.decode(errors="replace") for token in without[256:]]
    crossing = [text for text in texts if len(splitting.encode(text)) > 1]
    examples = [text for text in crossing if re.search(r"\w[^\w]+\w", text)][:6]
    return {
        "vocabulary": vocab_size,
        "crossing": len(crossing),
        "crossing_share": len(crossing) / len(texts),
        "examples": {str(i): visible(text.encode()) for i, text in enumerate(examples)},
        "bytes_per_token": {
            name: len(other.encode()) / len(tokenizer.encode(other)) for name, tokenizer in tokenizers.items()
        },
        "spellings_of_self": {name: spellings(tokenizer, other, "self") for name, tokenizer in tokenizers.items()},
    }


def spellings(tokenizer: Tokenizer, text: str, word: str) -> int:
    """Return the number of different sequences of tokens that cover an occurrence of the word in the text."""
    found = set()
    content, wanted = text.encode(), word.encode()
    starts = {match.start() for match in re.finditer(rb"\b%s\b" % re.escape(wanted), content)}
    pieces = [tokenizer.decode_bytes([token]) for token in tokenizer.encode(text)]
    position = 0
    for index, piece in enumerate(pieces):
        for start in starts & set(range(position, position + len(piece))):
            end, covering = start + len(wanted), [piece]
            while position + sum(map(len, covering)) < end:
                covering.append(pieces[index + len(covering)])
            found.add(tuple(covering))
        position += len(piece)
    return len(found)


def train_without_pattern(text: str, vocab_size: int) -> list[bytes]:
    """Return the tokens that rustbpe learns if all of the text is one word."""
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter([text]), vocab_size - len(SPECIAL_TOKENS), pattern=r"[\s\S]+")
    by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
    return list(dict.fromkeys(bytes(token) for token, _ in by_rank))


def tokens_of(tokenizer: Tokenizer) -> list[bytes]:
    """Return the byte strings of a tokenizer in rank order, without the special tokens."""
    return [tokenizer.decode_bytes([token]) for token in range(tokenizer.bos_id)]


def standard_library() -> tuple[str, str]:
    """Return two texts: the files of the standard library that are trained on, and those that are held out."""
    files = find_source(None).files
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return (
        "".join(text for i, text in enumerate(texts) if i % HELD_OUT),
        "".join(text for i, text in enumerate(texts) if not i % HELD_OUT),
    )


def special_tokens() -> dict[str, Any]:
    """Encode a text that names a special token, with the package and with an encoder that obeys such names.

    The second is tiktoken with allowed_special="all": whoever writes the text then begins a document of the model.
    """
    import tiktoken

    tokenizer = Tokenizer.train([TEXT], 256 + MERGES + len(SPECIAL_TOKENS))
    text = "in the <|bos|>"
    ids = tokenizer.encode(text)
    ranks = {token: rank for rank, token in enumerate(tokens_of(tokenizer))}
    obeying = tiktoken.Encoding(
        "obeying", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=tokenizer.special_tokens
    ).encode(text, allowed_special="all")
    return {
        "text": text,
        "bos_id": tokenizer.bos_id,
        "tokens": len(ids),
        "forged": ids.count(tokenizer.bos_id),
        "pieces": " ".join(visible(tokenizer.decode_bytes([token])) for token in ids),
        "obeying_encoder": {"tokens": len(obeying), "forged": obeying.count(tokenizer.bos_id)},
    }


def vocabulary() -> dict[str, Any]:
    """Train vocabularies of 265 to 16,384 ids on the standard library, and encode files that were held out.

    One training suffices: a smaller vocabulary is the beginning of a larger one. `uniform_bpb` is log2 V divided by
    the bytes of a token, the bits per byte of a model for which all ids are equally likely.
    """
    training, held_out = standard_library()
    start = time.perf_counter()
    largest = tokens_of(Tokenizer.train([training], VOCABULARIES[-1]))
    seconds = time.perf_counter() - start
    small = tokens_of(Tokenizer.train([training], 1024))
    size = len(held_out.encode())
    rows = []
    for vocab_size in VOCABULARIES:
        tokens = len(Tokenizer(largest[: vocab_size - len(SPECIAL_TOKENS)]).encode(held_out))
        rows.append(
            {
                "vocabulary": vocab_size,
                "bytes_per_token": size / tokens,
                "uniform_bpb": math.log2(vocab_size) * tokens / size,
            }
        )
    return {
        "training_bytes": len(training.encode()),
        "held_out_bytes": size,
        "training_seconds": seconds,
        "small_is_a_beginning": small == largest[: len(small)],
        "rows": rows,
        "gain_of_doubling": [
            after["bytes_per_token"] / before["bytes_per_token"] for before, after in itertools.pairwise(rows)
        ],
    }


def pieces(checkpoint: Path = Path("runs/d4")) -> dict[str, Any]:
    """Show how the tokenizer of a run cuts a line of code and some phrases.

    Tokens are separated by a space, ␣ is the space of the text, and <C3> is a byte that is only a part of a character.
    """
    tokenizer = Tokenizer.load(checkpoint / "tokenizer")
    tokens = tokens_of(tokenizer)

    def cut(text: str) -> str:
        return " ".join(visible(tokens[token]) for token in tokenizer.encode(text))

    return {
        "vocabulary": tokenizer.vocab_size,
        "line": LINE,
        "line_tokens": cut(LINE),
        "line_ids": " ".join(map(str, tokenizer.encode(LINE))),
        "line_count": len(tokenizer.encode(LINE)),
        "phrases": {name: cut(text) for name, text in PHRASES.items()},
        "counts": {name: len(tokenizer.encode(text)) for name, text in PHRASES.items()},
        "hello_ids": " ".join(map(str, tokenizer.encode(PHRASES["hello"]))),
        "longest_bytes": max(map(len, tokens)),
        "with_letters": visible(max((token for token in tokens if token.strip().isalpha()), key=len)),
    }


def visible(token: bytes) -> str:
    """Return the text of a token with visible spaces, or its bytes as <C3> if they are a part of a character."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in token)
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def bits_per_byte(checkpoint: Path = Path("runs/d4"), max_tokens: int = 32_768) -> dict[str, Any]:
    """Measure bits per byte on validation text by the definition, and by two formulas that are wrong.

    The text is that on which `train` evaluates, so the first number is that of the log.
    `divided_by_8` is nats / log2 256. `mean_over_vocabulary` divides by the mean length of all tokens of the
    vocabulary, where the text's own tokens count. `uniform` is a model for which all ids are equally likely.
    """
    model, tokenizer, meta = load_model(checkpoint, warn=lambda _: None)
    stream = validation_tokens(checkpoint, tokenizer)
    length = min(len(stream), max_tokens + 1)
    batches: list[tuple[Tensor, Tensor]] = list(
        data.iterate_val(stream, batch_rows=4, sequence_len=model.config.sequence_len, max_tokens=length - 1)
    )
    found = measure_text(model, batches, tokenizer.token_bytes)
    untrained = GPT(model.config)
    untrained.init_weights()
    text_targets = sum(int((tokenizer.token_bytes[targets[targets >= 0]] > 0).sum()) for _, targets in batches)
    content = bytes(tokenizer.decode_bytes([t for t in stream.read(1, length).tolist() if t != tokenizer.bos_id]))
    lengths = tokenizer.token_bytes[tokenizer.token_bytes > 0]
    bits = found.loss / math.log(2)
    return {
        "step": meta["step"],
        "vocabulary": tokenizer.vocab_size,
        "targets": found.targets,
        "special_targets": found.targets - text_targets,
        "bytes": found.bytes,
        "nats_per_token": found.loss,
        "bytes_per_token": {"of_the_text": found.bytes / found.targets, "of_the_vocabulary": float(lengths.mean())},
        "bits_per_byte": found.bpb,
        "wrong": {"divided_by_8": found.loss / 8, "mean_over_vocabulary": bits / float(lengths.mean())},
        "untrained": measure_text(untrained, batches, tokenizer.token_bytes).bpb,
        "uniform": math.log2(tokenizer.vocab_size) * text_targets / found.bytes,
        "zlib": 8 * len(zlib.compress(content, 9)) / len(content),
    }


def validation_tokens(checkpoint: Path, tokenizer: Tokenizer) -> data.TokenStream:
    """Return the validation tokens of a run. Raises ValueError if it was fine-tuned on conversations."""
    config: TrainConfig = run_folder.load_config(checkpoint)
    if isinstance(config, FinetuneConfig | ReinforceConfig):
        raise ValueError(f"{checkpoint} was fine-tuned on conversations: give a run of `train`")
    assert config.cache_dir is not None, "config.json of a run has every value"
    corpus = data.prepare(
        None if config.data == STDLIB else config.data,
        vocab_size=tokenizer.vocab_size,
        cache_dir=config.cache_dir,
        tokenizer=tokenizer,
        text_column=config.text_column,
        log=lambda _: None,
    )
    return corpus.val


DEMONSTRATIONS = {
    "merges-by-hand": merges_by_hand,
    "same-merges": same_merges,
    "split-pattern": split_pattern,
    "special-tokens": special_tokens,
    "vocabulary": vocabulary,
    "pieces": pieces,
    "bits-per-byte": bits_per_byte,
}
