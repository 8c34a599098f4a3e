"""Reads nanochat's checkpoints (model_STEP.pt, meta_STEP.json) and its tokenizer.pkl.

Nothing is unpickled: torch loads the weights with weights_only, and the tokenizer's pickle is read as data.

nanochat's files do not name the version that wrote them, but the names of the parameters do: value embeddings, residual
scalars, smear and backout were added one after the other from January to March 2026, while constants that no file holds
changed. A model with none of them has the constants of October 2025, one with all of them those of today.
"""

import io
import math
import pickletools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.interop import transformers_config
from nanochat_native.interop.source import Source, build_tokenizer, tensor_names
from nanochat_native.model.config import ARCHITECTURES, GPTConfig

NANOCHAT = "nanochat"  # a key in the meta of an imported checkpoint: Source.nanochat
PADDING = "padding"  # the file stem of Source.padding in an imported checkpoint
# nanochat's folders of checkpoints, and whether their models were trained on conversations.
FOLDERS = {"base_checkpoints": False, "mid_checkpoints": True, "chatsft_checkpoints": True, "chatrl_checkpoints": True}
# The parts that October's architecture lacks, and the names of their parameters without the number of the layer.
PARTS = {
    "value embeddings": {"value_embeds.weight", "transformer.h.attn.ve_gate.weight"},
    "residual scalars": {"resid_lambdas", "x0_lambdas"},
    "smear": {"smear_gate.weight", "smear_lambda"},
    "backout": {"backout_lambda"},
}


def read_nanochat(folder: Path, step: int | None, tokenizer: Path | None) -> Source:
    """Read model_STEP.pt, meta_STEP.json and the tokenizer; the newest step if none is given.

    The tensors have the types of the file. The rows that pad a vocabulary are kept in today's architecture, and are
    Source.padding in October's, whose config has no such rows.

    Raises FileNotFoundError, naming the missing file, and ValueError for a damaged file and for a model of a version
    between October's and today's.
    """
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
    path = folder / f"model_{step:06d}.pt"
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception:  # torch raises many types, with messages for programmers
        raise ValueError(f"{path} cannot be read: it is damaged, or contains more than tensors") from None
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{path} cannot be read: it must contain a dictionary of tensors")
    tensors = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in loaded.items()}
    parts = ARCHITECTURES[architecture_of(path, tensors)]
    try:
        pattern = _window_pattern(shape)
        config = GPTConfig(**{name: shape[name] for name in sizes}, window_pattern=pattern, **parts)
    except ValueError as error:
        raise ValueError(f"{meta_path}: {error}") from None
    if not config.bounded_windows and set(config.window_pattern) != {"L"}:
        raise ValueError(
            f"{meta_path}: window_pattern must be absent or 'L' in nanochat's first architecture, got {pattern!r}"
        )
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    tensors = transformers_config.renamed(tensors, {name: name for name in parameter_names(config, tensors)})
    tensors, padding = without_padding(tensors, config.padded_vocab_size)
    bpb: Any = meta.get("val_bpb")
    bpb = bpb if type(bpb) in (int, float) and math.isfinite(bpb) else None
    chat = trained_on_conversations(folder, meta)
    unknown = "whether it was trained on conversations is not recorded: it is taken for a base model without --chat"
    origin = {"folder": folder.resolve().parent.name, "tag": folder.resolve().name, "meta": meta, "dtypes": kinds}
    return Source(
        config,
        tensors,
        read_tokenizer_pickle(find_tokenizer(folder, tokenizer)),
        step,
        bpb,
        [unknown] if chat is None else [],
        chat=bool(chat),
        padding=padding,
        nanochat=origin,
    )


def architecture_of(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Return the architecture, "october" or "today", whose parameters the tensors are.

    Raises ValueError, naming the path and the parts, for a model that has some of today's parts only.
    """
    names = {re.sub(r"\.\d+\.", ".", name) for name in tensors}
    missing = [part for part, parameters in PARTS.items() if not parameters & names]
    if missing and len(missing) < len(PARTS):
        present = [part for part in PARTS if part not in missing]
        raise ValueError(
            f"{path} has {', '.join(present)}, but no {', no '.join(missing)}: it is of a version of nanochat from "
            "January to March 2026, and its files do not record the constants of that version (rotary base, scale of "
            "queries and keys, windows); models with all of these parts or with none are supported; use that version "
            "of nanochat, or train the model again with today's"
        )
    return "october" if missing else "today"


def parameter_names(config: GPTConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters of no more layers than there are tensors, whatever the config says."""
    names = list(tensor_names(config, tensors))
    for layer in range(min(config.n_layer, len(tensors))):
        if config.has_value_embedding(layer):
            names += [f"transformer.h.{layer}.attn.ve_gate.weight", f"value_embeds.{layer}.weight"]
    for present, parameters in (
        (config.residual_scalars, ["resid_lambdas", "x0_lambdas"]),
        (config.smear, ["smear_gate.weight", "smear_lambda"]),
        (config.backout, ["backout_lambda"]),
    ):
        names += parameters if present else []
    return names


def trained_on_conversations(folder: Path, meta: Mapping[str, Any]) -> bool | None:
    """Return whether a model was trained on conversations, by its folder or the flags in its meta; None if unknown."""
    known = FOLDERS.get(folder.resolve().parent.name)
    if known is not None:
        return known
    flags = meta.get("user_config")
    flags = flags if isinstance(flags, dict) else {}
    if "chatcore_every" in flags:
        return True
    return False if "core_metric_every" in flags else None


def _window_pattern(shape: Mapping[str, Any]) -> str:
    """Return the windows of a model_config, as nanochat reads them. Raises ValueError for anything but a text."""
    pattern = shape.get("window_pattern", "L")
    if not isinstance(pattern, str):
        raise ValueError(f"window_pattern must be a text, got {pattern!r}")
    return pattern.upper()


def without_padding(tensors: dict[str, Tensor], rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (the tensors, those of wte and lm_head without what follows `rows` rows; the rows that were removed)."""
    padded = {name for name, t in tensors.items() if name in transformers_config.ENDS and t.ndim and t.size(0) > rows}
    cut = {name: tensor[:rows] if name in padded else tensor for name, tensor in tensors.items()}
    return cut, {name: tensors[name][rows:] for name in tensors if name in padded}


def find_tokenizer(folder: Path, given: Path | None) -> Path:
    """Return the path of tokenizer.pkl: the given one, or the first in the folders where nanochat puts it."""
    beside = [folder, folder / "tokenizer", folder.parent / "tokenizer", folder.parent.parent / "tokenizer"]
    places = [given] if given else beside
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


def _checked_key(key: Any) -> str | bytes:
    """Return a key of a dict. Deeply nested tuples are refused: their hash would overflow the stack of the process."""
    if not isinstance(key, str | bytes):
        raise ValueError("it has a key that is neither text nor bytes")
    return key


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
            stack[-1].update((_checked_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
        elif name == "SETITEM":
            value = stack.pop()
            key = stack.pop()
            stack[-1][_checked_key(key)] = value
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
