"""Byte-level BPE tokenizer: trained by rustbpe, applied by tiktoken, saved as JSON.

Byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909), on bytes as in GPT-2. A regular expression splits the text
into words, and merges happen only within a word. The pattern and the special tokens are nanochat's.

A saved tokenizer is a folder with three files, none of them pickled:
  bpe.json               read by `Tokenizer.load`: pattern, tokens (base64, in rank order), special tokens, SHA-256
  tokenizer.json         the same tokenizer, with the same ids, for Hugging Face `tokenizers`
  tokenizer_config.json  lets `transformers.AutoTokenizer` load the folder
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import rustbpe
import tiktoken

from nanochat_native.runtime import hardware
from nanochat_native.runtime.files import sha256_json, write_atomically

# GPT-4's pattern with \p{N}{1,2} instead of \p{N}{1,3}, as in nanochat: small vocabularies lack room for 1000 numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
TOKENIZER_FILE = "bpe.json"
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# The backtracking of the pattern overflows its stack at about 500,000 characters of whitespace.
CHUNK_CHARS = 1 << 16
# Each merge in training rewrites every word that has its pair, so the longest word bounds the cost of one merge.
TRAINING_RUN_CHARS = 256

_FORMAT = "nanochat_native.bpe"
_VERSION = 1
# No match of SPLIT_PATTERN crosses these places, so a cut there changes no token.
_WORD_EDGE = re.compile(r"(?<=\S)(?= )|(?<=\n)(?=[ \t]*\S)")


class Tokenizer:
    """Byte-level BPE with ids 0..n-1 for the n byte strings in rank order, followed by the special tokens.

    `encode` treats all text as ordinary text: the name of a special token in a text never becomes that token, so no
    document can forge one. `special_tokens` and `bos_id` give the ids of special tokens.

    Attributes:
        vocab_size: number of ids, including special tokens.
        bos_id: id of `<|bos|>`, which begins every document.
        special_tokens: id of each special token by name.
        token_bytes: int32 (vocab_size,), number of bytes that each id stands for; 0 for special tokens. It is also
            right for tokens that are part of a UTF-8 character.
        hash: SHA-256, in hex, of pattern, tokens and special tokens.
    """

    def __init__(
        self, tokens: Sequence[bytes], *, pattern: str = SPLIT_PATTERN, specials: Sequence[str] = SPECIAL_TOKENS
    ) -> None:
        """Create a tokenizer from its byte strings in rank order.

        Raises:
            ValueError: A byte string occurs twice or is empty, one of the 256 single bytes is missing, or the special
                tokens repeat a name or lack `<|bos|>`.
        """
        ranks = {token: rank for rank, token in enumerate(tokens)}
        if len(ranks) != len(tokens):
            raise ValueError(f"tokens must be distinct, got {len(tokens) - len(ranks)} duplicates among {len(tokens)}")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing or b"" in ranks:
            raise ValueError(f"tokens must include every single byte and no empty string; missing bytes: {missing}")
        if "<|bos|>" not in specials or len(set(specials)) != len(specials):
            raise ValueError(f"special tokens must be distinct and include <|bos|>, got {list(specials)}")
        self.pattern = pattern
        self.special_tokens = {name: len(tokens) + i for i, name in enumerate(specials)}
        self.bos_id = self.special_tokens["<|bos|>"]
        self.vocab_size = len(tokens) + len(specials)
        self.token_bytes = np.array([len(token) for token in tokens] + [0] * len(specials), dtype=np.int32)
        self._bytes = [*tokens, *(name.encode() for name in specials)]
        self._encoding = tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.hash = sha256_json(self._content())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts` until there are `vocab_size` ids. Texts are consumed once, in bounded memory.

        The result does not depend on the number of threads. If the texts have too few pairs to merge, its `vocab_size`
        is smaller.

        Raises:
            ValueError: `vocab_size` is below 265: 256 bytes and the special tokens.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be >= {MIN_VOCAB_SIZE}, for 256 bytes and {len(SPECIAL_TOKENS)} special tokens, got "
                f"{vocab_size}"
            )
        trainer = rustbpe.Tokenizer()
        chunks = (chunk for text in texts for chunk in _training_chunks(text))
        trainer.train_from_iterator(chunks, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        by_rank = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
        # Two merges can make the same bytes; the earlier one is the token.
        return cls(list(dict.fromkeys(bytes(token) for token, _ in by_rank)))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Return the tokenizer that `save` wrote into `folder`.

        Raises:
            FileNotFoundError: There is no bpe.json.
            ValueError: bpe.json is damaged, or has another format or version.
        """
        path = Path(folder) / TOKENIZER_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no tokenizer here")
        try:
            stored = json.loads(path.read_bytes())
            found = (stored["format"], stored["version"])
            digest = stored.pop("sha256")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged, or not a tokenizer of this program ({error!r})") from error
        if found != (_FORMAT, _VERSION):
            raise ValueError(f"{path}: must be {_FORMAT} version {_VERSION}, got {found[0]} version {found[1]}")
        if sha256_json(stored) != digest:
            raise ValueError(f"{path}: damaged: its content does not match its SHA-256")
        tokens = [base64.b64decode(token) for token in stored["tokens"]]
        return cls(tokens, pattern=stored["pattern"], specials=stored["special_tokens"])

    def save(self, folder: str | Path) -> None:
        """Write bpe.json, tokenizer.json and tokenizer_config.json into `folder`, each atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "clean_up_tokenization_spaces": False,
        }
        content = self._content()
        write_atomically(folder / "tokenizer.json", json.dumps(self._hugging_face(), ensure_ascii=False))
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2))
        write_atomically(folder / TOKENIZER_FILE, json.dumps({**content, "sha256": self.hash}, indent=0))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without `<|bos|>`."""
        return self.encode_to_numpy(text).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return the ids of `text` as uint32 (n,). Words of more than 65,536 characters are cut, to bound the time."""
        chunks = [self._encoding.encode_to_numpy(chunk, disallowed_special=()) for chunk in split_long(text)]
        return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, np.uint32), *chunks])

    def encode_ordinary_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, encoded by several threads."""
        with ThreadPoolExecutor(hardware.usable_cores()) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that `ids` stand for; a special token gives its name.

        Raises:
            ValueError: An id is outside [0, vocab_size).
        """
        ids = list(ids)
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            raise ValueError(f"ids must be in [0, {self.vocab_size}), got {min(ids)}..{max(ids)}")
        return b"".join([self._bytes[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _content(self) -> dict[str, Any]:
        tokens = self._bytes[: self.vocab_size - len(self.special_tokens)]
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "pattern": self.pattern,
            "special_tokens": list(self.special_tokens),
            "tokens": [base64.b64encode(token).decode() for token in tokens],
        }

    def merges(self) -> list[list[str]]:
        """Return the pairs that merge, in order of priority, in the letters of Hugging Face's byte-level vocabularies.

        tiktoken merges any two neighbours whose concatenation is a token, lowest rank first. So every split of a token
        into two tokens is a merge, and merges are in the order of their tokens.
        """
        spelled = self._spelled()
        known = {token: rank for rank, token in enumerate(spelled)}
        merges = []
        for token in spelled:
            splits = ([token[:i], token[i:]] for i in range(1, len(token)))
            pairs = [pair for pair in splits if pair[0] in known and pair[1] in known]
            merges += sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))
        return merges

    def _spelled(self) -> list[str]:
        letters = byte_letters()
        return ["".join(letters[byte] for byte in token) for token in self._bytes[: self.bos_id]]

    def _hugging_face(self) -> dict[str, Any]:
        known = {token: rank for rank, token in enumerate(self._spelled())}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": name, **flags} for name, i in self.special_tokens.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,  # a word that is a token is not merged step by step, as in tiktoken
                "vocab": known,
                "merges": self.merges(),
            },
        }


def split_long(text: str, limit: int = CHUNK_CHARS) -> Iterator[str]:
    """Yield `text` in parts of at most `limit` characters.

    Cuts are at edges of words if possible: the parts then encode to the same tokens as the whole. Text without such an
    edge is cut at `limit`.
    """
    start = 0
    while len(text) - start > limit:
        edge = 0
        # Search near the limit first: the last edge is nearly always there.
        for begin in (max(start + 1, start + limit - 1024), start + 1):
            for match in _WORD_EDGE.finditer(text, begin, start + limit + 1):
                if match.start() <= start + limit:
                    edge = match.start()
            if edge:
                break
        end = edge or start + limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:] if start else text


def _training_chunks(text: str) -> Iterator[str]:
    """Yield a text in chunks without words of more than TRAINING_RUN_CHARS characters."""
    for chunk in split_long(text):
        if max(map(len, chunk.split()), default=0) <= TRAINING_RUN_CHARS:
            yield chunk
            continue
        start = 0
        for match in re.finditer(rf"\S{{{TRAINING_RUN_CHARS}}}", chunk):
            yield chunk[start : match.end()]
            start = match.end()
        yield chunk[start:]


def byte_letters() -> list[str]:
    """Return the printable character that GPT-2 and Hugging Face's byte-level vocabularies use for each byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]
