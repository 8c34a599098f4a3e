"""Reads nanochat's checkpoints (model_STEP.pt, meta_STEP.json) and its tokenizer.pkl.

Nothing is unpickled: torch loads the weights with weights_only, and the tokenizer's pickle is read as data.
"""

import io
import math
import pickletools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.interop import transformers_config
from nanochat_native.interop.source import Source, build_tokenizer, tensor_names
from nanochat_native.model.config import GPTConfig


def read_nanochat(folder: Path, step: int | None, tokenizer: Path | None) -> Source:
    """Read model_STEP.pt, meta_STEP.json and the tokenizer; the newest step if none is given."""
    steps = sorted(
        int(m.group(1)) for p in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", p.name))
    )
    if not steps:
        raise FileNotFoundError(f"{folder} has no model_STEP.pt whose STEP is a number")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    meta_path = folder / f"meta_{step:06d}.json"
    if not meta_path.is_file():
        raise FileNotFoundError(f"{meta_path}: missing; it describes the shape of the model")
    meta = transformers_config.read_json(meta_path)
    shape: Any = meta.get("model_config")
    sizes = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    missing = [name for name in sizes if name not in shape] if isinstance(shape, dict) else ["model_config"]
    if missing:
        raise ValueError(f"{meta_path}: not a model_config of nanochat: {', '.join(missing)} missing")
    transformers_config.check_sizes(meta_path, {name: shape[name] for name in sizes})
    try:
        config = GPTConfig(**{name: shape[name] for name in sizes})
    except ValueError as error:
        raise ValueError(f"{meta_path}: {error}") from None
    if set(str(shape.get("window_pattern", "L"))) != {"L"}:
        raise ValueError(f"{meta_path}: window_pattern must be absent or 'L', got {shape['window_pattern']!r}")
    path = folder / f"model_{step:06d}.pt"
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception:  # torch raises many types, with messages for programmers
        raise ValueError(f"{path} cannot be read: it is damaged, or contains more than tensors") from None
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{path} cannot be read: it must contain a dictionary of tensors")
    bpb: Any = meta.get("val_bpb")
    bpb = bpb if type(bpb) in (int, float) and math.isfinite(bpb) else None
    tensors = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in loaded.items()}
    own = tensor_names(config, tensors)
    tensors = transformers_config.renamed(without_padding(tensors, config.vocab_size), {name: name for name in own})
    return Source(config, tensors, read_tokenizer_pickle(find_tokenizer(folder, tokenizer)), step, bpb, [])


def without_padding(tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Return the tensors, those of wte and lm_head without the rows that pad the vocabulary."""
    return {
        name: t[:vocab_size] if name in transformers_config.ENDS and t.ndim and t.size(0) > vocab_size else t
        for name, t in tensors.items()
    }


def find_tokenizer(folder: Path, given: Path | None) -> Path:
    """Return the path of tokenizer.pkl: the given one, or the first in the folders where nanochat puts it."""
    places = (
        [given] if given else [folder / "tokenizer", folder.parent / "tokenizer", folder.parent.parent / "tokenizer"]
    )
    for place in places:
        path = place / "tokenizer.pkl" if place.is_dir() else place
        if path.is_file():
            return path
    raise FileNotFoundError(f"no tokenizer.pkl in {', '.join(map(str, places))}; set --tokenizer PATH")


def read_tokenizer_pickle(path: Path) -> Tokenizer:
    """Read the tiktoken encoding in nanochat's tokenizer.pkl: name, pattern, byte strings by rank, special tokens.

    Raises ValueError for a pickle with any other content.
    """
    try:
        state = _data_of_pickle(path.read_bytes())
        ranks, pattern, specials = state["mergeable_ranks"], state["pat_str"], state["special_tokens"]
        tokens = [token for token, _ in sorted(ranks.items(), key=lambda item: item[1])]
        names = sorted(specials, key=specials.__getitem__)
        numbers = [*sorted(ranks.values()), *(specials[name] for name in names)]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not a tiktoken encoding saved by nanochat ({error})") from None
    return build_tokenizer(path, numbers, tokens, pattern, names)


def _data_of_pickle(content: bytes) -> dict[str, Any]:
    """Return the state of a pickled tiktoken.Encoding without unpickling it.

    Only opcodes that build strings, bytes, numbers, tuples and dicts are interpreted. The class is compared by name;
    nothing is imported or called.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    encoding = ("tiktoken.core", "Encoding")

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name in ("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BININT", "BININT1", "BININT2"):
            stack.append(argument)
        elif name == "NONE":
            stack.append(None)
        elif name in ("EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({} if name == "EMPTY_DICT" else ())
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "GLOBAL":
            stack.append(tuple(argument.split(" ")))
        elif name == "STACK_GLOBAL":
            qualified = stack.pop()
            stack.append((stack.pop(), qualified))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "SETITEMS":
            items = since_mark()
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "SETITEM":
            value = stack.pop()
            key = stack.pop()
            stack[-1][key] = value
        elif name == "NEWOBJ":
            arguments = stack.pop()
            if stack.pop() != encoding or arguments:
                raise ValueError("it has an object of another class")
            stack.append(encoding)
        elif name == "BUILD":
            state = stack.pop()
            if stack[-1] != encoding or not isinstance(state, dict):
                raise ValueError("it has an object of another class")
            stack[-1] = state
        elif name == "STOP":
            return dict(stack[-1])
        else:
            raise ValueError(f"it has the pickle opcode {name}")
    raise ValueError("it is truncated")
