"""Reads checkpoints that nanochat or transformers wrote."""

import dataclasses
import io
import json
import math
import pickletools
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import nanochat_native
from nanochat_native.data.conversations import CHAT_TRAINED, without_marks
from nanochat_native.data.tokenizer import Tokenizer, byte_letters
from nanochat_native.interop import transformers_config
from nanochat_native.model import functional
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.functional import EPS
from nanochat_native.model.gpt import GPT
from nanochat_native.runs import checkpoint, run_folder
from nanochat_native.runs.config import TrainConfig, resolve_defaults
from nanochat_native.runs.saved_model import check_weights

PROBE_ROWS, PROBE_TOKENS = 4, 64
EPS_MOVES = 0.01  # of logits, at most, by another eps; they are from -15 to 15


@dataclass
class Options:
    """Read a model that nanochat or transformers wrote, for generate, evaluate and the rest of this program."""

    source: tyro.conf.Positional[Path]
    """nanochat's checkpoint folder (base_checkpoints/d20), or a folder that transformers' NanoChat is in."""
    out: Path
    """Run folder to write; it must not be there, or be empty."""
    step: int | None = None
    """Of nanochat's checkpoints; default: the newest."""
    chat: bool = False
    """nanochat's checkpoint was trained on conversations, which it does not say; transformers' folders do, by a chat
    template."""
    tokenizer: Path | None = None
    """nanochat's tokenizer.pkl, or its folder; default: tokenizer/ beside the source or two folders above."""


@dataclass(frozen=True)
class Source:
    """What was read. step, bpb: None where the source does not say. chat: it was trained on conversations. eps: of its
    norms."""

    config: GPTConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer
    step: int | None
    bpb: float | None
    notes: list[str]
    chat: bool = False
    eps: float = EPS


def read(options: Options) -> Source:
    """Raises FileNotFoundError, naming what is missing, and ValueError for what is not of the first architecture."""
    folder = options.source
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if list(folder.glob("model_*.pt")):
        source = read_nanochat(folder, options.step, options.tokenizer)
        source = dataclasses.replace(source, chat=options.chat)
    elif (folder / "config.json").is_file():
        if options.step is not None:
            raise ValueError(f"--step is {options.step}, but {folder} is transformers', which has one checkpoint")
        source = read_transformers(folder)
    else:
        raise FileNotFoundError(f"{folder} has neither nanochat's model_*.pt nor a config.json of transformers")
    return with_float32(folder, source)


def with_float32(folder: Path, source: Source) -> Source:
    """The source with float32 weights, which hold those of 16 bits exactly.

    Raises ValueError for weights that float32 cannot hold, that do not fit the model, or that do not fit the tokenizer.
    """
    if source.tokenizer.vocab_size != source.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {source.tokenizer.vocab_size} ids, the model {source.config.vocab_size}: "
            "they do not belong together"
        )
    with torch.device("meta"):
        check_weights(folder, source.tensors, GPT(source.config))
    for name, tensor in source.tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{folder}: {name} is {kind}; it takes float32, bfloat16 or float16")
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {name} holds numbers that are not finite: the model is damaged")
    return dataclasses.replace(source, tensors={name: tensor.float() for name, tensor in source.tensors.items()})


def probe(config: GPTConfig) -> Tensor:
    """Random tokens."""
    shape = (PROBE_ROWS, min(PROBE_TOKENS, config.sequence_len))
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def moved_by_eps(source: Source, tokens: Tensor) -> float:
    """How far the logits of tokens (B, T) are from those with the source's eps, at most."""
    model = GPT(source.config)
    model.load_state_dict(source.tensors)
    with torch.inference_mode():
        own = model(tokens)
        try:
            functional.EPS = source.eps
            theirs = model(tokens)
        finally:
            functional.EPS = EPS
    return (own - theirs).abs().max().item()


def read_nanochat(folder: Path, step: int | None, tokenizer: Path | None) -> Source:
    """model_STEP.pt and meta_STEP.json, and the tokenizer."""
    steps = sorted(
        int(m.group(1)) for p in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", p.name))
    )
    if not steps:
        raise FileNotFoundError(f"{folder} has no model_STEP.pt, with the step in digits")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{folder} holds no checkpoint of step {step}, but of {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    meta_path = folder / f"meta_{step:06d}.json"
    if not meta_path.is_file():
        raise FileNotFoundError(f"{meta_path}: missing; it holds the shape of the model")
    meta = transformers_config.read_json(meta_path)
    shape: Any = meta.get("model_config")
    sizes = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    missing = [name for name in sizes if name not in shape] if isinstance(shape, dict) else ["model_config"]
    if missing:
        raise ValueError(f"{meta_path}: no model_config of nanochat's: {', '.join(missing)} is missing")
    transformers_config.check_sizes(meta_path, {name: shape[name] for name in sizes})
    try:
        config = GPTConfig(**{name: shape[name] for name in sizes})
    except ValueError as error:
        raise ValueError(f"{meta_path}: {error}") from None
    if set(str(shape.get("window_pattern", "L"))) != {"L"}:
        raise ValueError(f"{meta_path}: window_pattern is {shape['window_pattern']!r}; the first architecture has none")
    path = folder / f"model_{step:06d}.pt"
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception:  # torch raises many, each with an explanation for programmers
        raise ValueError(f"{path} cannot be read: it is damaged, or holds more than tensors") from None
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"{path} cannot be read: it takes tensors by their names")
    bpb: Any = meta.get("val_bpb")
    bpb = bpb if type(bpb) in (int, float) and math.isfinite(bpb) else None
    tensors = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in loaded.items()}
    own = own_names(config, tensors)
    tensors = transformers_config.renamed(cropped(tensors, config.vocab_size), {name: name for name in own})
    return Source(config, tensors, read_tokenizer_pickle(find_tokenizer(folder, tokenizer)), step, bpb, [])


def own_names(config: GPTConfig, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """hugging_face.names, but of no more layers than there are tensors, whatever the config says."""
    return transformers_config.names(min(config.n_layer, len(tensors)))


def cropped(tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """wte and lm_head without the rows that pad the vocabulary."""
    return {
        name: t[:vocab_size] if name in transformers_config.ENDS and t.ndim and t.size(0) > vocab_size else t
        for name, t in tensors.items()
    }


def find_tokenizer(folder: Path, given: Path | None) -> Path:
    """tokenizer.pkl."""
    places = (
        [given] if given else [folder / "tokenizer", folder.parent / "tokenizer", folder.parent.parent / "tokenizer"]
    )
    for place in places:
        path = place / "tokenizer.pkl" if place.is_dir() else place
        if path.is_file():
            return path
    raise FileNotFoundError(f"no tokenizer.pkl in {', '.join(map(str, places))}; give --tokenizer PATH")


def read_transformers(folder: Path) -> Source:
    """config.json, the weights in one file or several, and tokenizer.json."""
    config, eps = transformers_config.gpt_config(folder)
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        places = transformers_config.read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{index}: damaged, it has no weight_map of names")
        files = sorted(set(places.values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{index} names {file!r}, which is not beside it")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: missing")
        try:
            tensors |= load_file(folder / file)
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: damaged weights ({error})") from None
    theirs = {name: own for own, name in own_names(config, tensors).items()}
    notes: list[str] = []
    tokenizer = read_tokenizer_json(folder / "tokenizer.json", notes)
    chat = has_chat_template(folder)
    return Source(config, transformers_config.renamed(tensors, theirs), tokenizer, None, None, notes, chat, eps)


def has_chat_template(folder: Path) -> bool:
    """Whether transformers' tokenizer in there has one, in a file of its own or in tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    settings = transformers_config.read_json(path) if path.is_file() else {}
    return (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))


def read_tokenizer_json(path: Path, notes: list[str]) -> Tokenizer:
    """A byte-level BPE of Hugging Face's, whose special tokens follow the others."""
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
                [t["content"] for t in stored["added_tokens"] if _is_unlike_ours(t)],
                [],
            ),
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: not a byte-level BPE with a split pattern") from None
    for name, (value, takes) in settings.items():
        if value != takes:
            raise ValueError(f"{path}: {name} is {json.dumps(value)}; this tokenizer takes {json.dumps(takes)}")
    numbers = [number for number, _ in ordinary] + [number for number, _ in added]
    tokenizer = _tokenizer(path, numbers, tokens, pattern, [name for _, name in added])
    if pairs != tokenizer.merges():
        notes.append("its merges are not those of its tokens' order: rare words may be cut in another way")
    return tokenizer


def _is_unlike_ours(token: dict[str, Any]) -> bool:
    return not token["special"] or any(token.get(name) for name in ("single_word", "lstrip", "rstrip", "normalized"))


def _tokenizer(path: Path, numbers: list[int], tokens: list[bytes], pattern: str, specials: list[str]) -> Tokenizer:
    """numbers: ids of the tokens and then of the special tokens. Raises ValueError, with the path, for what is none."""
    if numbers != list(range(len(numbers))):
        raise ValueError(f"{path}: its ids are not 0 to {len(numbers) - 1}, the special tokens last")
    try:
        return Tokenizer(tokens, pattern=pattern, specials=specials)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a tokenizer of this program: {error}") from None


def read_tokenizer_pickle(path: Path) -> Tokenizer:
    """The tiktoken encoding in nanochat's tokenizer.pkl: a name, a pattern, byte strings by rank, special tokens.

    Raises ValueError for a pickle that holds anything else.
    """
    try:
        state = _data_of_pickle(path.read_bytes())
        ranks, pattern, specials = state["mergeable_ranks"], state["pat_str"], state["special_tokens"]
        tokens = [token for token, _ in sorted(ranks.items(), key=lambda item: item[1])]
        names = sorted(specials, key=specials.__getitem__)
        numbers = [*sorted(ranks.values()), *(specials[name] for name in names)]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not a tiktoken encoding as nanochat saves it ({error})") from None
    return _tokenizer(path, numbers, tokens, pattern, names)


def _data_of_pickle(content: bytes) -> dict[str, Any]:
    """The state of a pickled tiktoken.Encoding. The stream is interpreted here, by opcodes that make strings, bytes,
    numbers, tuples and dicts; the class is compared by its name, and nothing is imported or called."""
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
                raise ValueError("it holds an object of another class")
            stack.append(encoding)
        elif name == "BUILD":
            state = stack.pop()
            if stack[-1] != encoding or not isinstance(state, dict):
                raise ValueError("it holds an object of another class")
            stack[-1] = state
        elif name == "STOP":
            return dict(stack[-1])
        else:
            raise ValueError(f"it holds the pickle opcode {name}")
    raise ValueError("it ends too early")


def write(source: Source, out: Path) -> None:
    """A run's folder with one checkpoint.

    Raises ValueError where `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something; give another --out")
    config = source.config
    flags = TrainConfig(
        depth=config.n_layer,
        head_dim=config.head_dim,
        n_kv_head=config.n_kv_head,
        max_seq_len=config.sequence_len,
        vocab_size=config.vocab_size,
        num_iterations=max(1, source.step or 1),
        device="cpu",
        out_dir=out.absolute().parent,
        run=out.absolute().name,
    )
    meta = {
        "nanochat_native": nanochat_native.__version__,
        "model_config": dataclasses.asdict(config),
        "tokenizer_hash": source.tokenizer.hash,
        "data_hash": None,
        "imported": True,
        CHAT_TRAINED: source.chat,
        "skipped": 0,
        "skipped_in_a_row": 0,
        "validation_bpb": source.bpb,
    }
    existed = out.exists()
    try:
        checkpoint.save(out / "checkpoints", source.step or 0, {"model": source.tensors}, meta)
        source.tokenizer.save(out / "tokenizer")
        run_folder.save_config(resolve_defaults(flags, gpu=False))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        if existed:
            out.mkdir()
        raise
