"""Reads models in the format of transformers' NanoChat."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanochat_native.data.conversations import without_marks
from nanochat_native.data.tokenizer import Tokenizer, byte_letters
from nanochat_native.interop import transformers_config
from nanochat_native.interop.source import Source, build_tokenizer, tensor_names


def read_transformers(folder: Path) -> Source:
    """Read config.json, the weights in one or several files, and tokenizer.json."""
    config, eps = transformers_config.gpt_config(folder)
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        places = transformers_config.read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{index}: damaged, it has no weight_map from names to files")
        files = sorted(set(places.values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{index} names {file!r}, which is not in its folder")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: missing")
        try:
            tensors |= load_file(folder / file)
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: damaged weights ({error})") from None
    theirs = {name: own for own, name in tensor_names(config, tensors).items()}
    notes: list[str] = []
    tokenizer = read_tokenizer_json(folder / "tokenizer.json", notes)
    chat = has_chat_template(folder)
    return Source(config, transformers_config.renamed(tensors, theirs), tokenizer, None, None, notes, chat, eps)


def has_chat_template(folder: Path) -> bool:
    """Return whether the tokenizer has a chat template, in a file of its own or in tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    settings = transformers_config.read_json(path) if path.is_file() else {}
    return (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))


def read_tokenizer_json(path: Path, notes: list[str]) -> Tokenizer:
    """Read a byte-level BPE in Hugging Face's format, whose special tokens follow the others.

    Args:
        notes: List that receives remarks for the user.

    Raises ValueError, naming the path, for any other tokenizer.
    """
    stored = transformers_config.read_json(path)
    try:
        model = stored["model"]
        split, bytes_ = stored["pre_tokenizer"]["pretokenizers"]
        vocab, merges, pattern = model["vocab"], model["merges"], split["pattern"]["Regex"]
        added = sorted((token["id"], token["content"]) for token in stored["added_tokens"])
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        ordinary = sorted(
            (number, token) for token, number in vocab.items() if token not in {name for _, name in added}
        )
        tokens = [bytes(byte_of[letter] for letter in token) for _, token in ordinary]
        pairs = [list(pair) if isinstance(pair, list | tuple) else pair.split(" ") for pair in merges]
        settings = {
            "model.type": (model["type"], "BPE"),
            "model.dropout": (model.get("dropout"), None),
            "model.byte_fallback": (model.get("byte_fallback", False), False),
            "model.continuing_subword_prefix": (model.get("continuing_subword_prefix") or "", ""),
            "model.end_of_word_suffix": (model.get("end_of_word_suffix") or "", ""),
            "normalizer": (None if stored.get("normalizer") == without_marks() else stored.get("normalizer"), None),
            "pre_tokenizer": (
                [split["type"], split["behavior"], split["invert"], bytes_["type"]],
                ["Split", "Isolated", False, "ByteLevel"],
            ),
            "add_prefix_space": (bytes_["add_prefix_space"], False),
            "use_regex": (bytes_["use_regex"], False),
            "added_tokens that are not special or match in another way": (
                [t["content"] for t in stored["added_tokens"] if _is_unsupported(t)],
                [],
            ),
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: not a byte-level BPE with a split pattern") from None
    for name, (value, supported) in settings.items():
        if value != supported:
            raise ValueError(f"{path}: {name} must be {json.dumps(supported)}, got {json.dumps(value)}")
    numbers = [number for number, _ in ordinary] + [number for number, _ in added]
    tokenizer = build_tokenizer(path, numbers, tokens, pattern, [name for _, name in added])
    if pairs != tokenizer.merges():
        notes.append("its merges do not follow the order of its tokens: rare words may be tokenized differently")
    return tokenizer


def _is_unsupported(token: dict[str, Any]) -> bool:
    return not token["special"] or any(token.get(name) for name in ("single_word", "lstrip", "rstrip", "normalized"))
