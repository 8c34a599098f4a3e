"""python -m nanochat_native.import_checkpoint: what nanochat or transformers wrote, as a run's folder of this program.

Takes a checkpoint folder of nanochat's first architecture (model_000650.pt, meta_000650.json, and its tokenizer.pkl),
or a folder of transformers' NanoChat (config.json, safetensors, tokenizer.json). Nothing is unpickled: weights are
loaded with weights_only, and the tokenizer's pickle is read as data, by the few opcodes that it needs.
"""

import dataclasses
import io
import json
import pickletools
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import nanochat_native
from nanochat_native import checkpoint, hugging_face, run_folder
from nanochat_native.config import TrainConfig, with_defaults
from nanochat_native.conversations import CHAT_TRAINED
from nanochat_native.loading import exit_code
from nanochat_native.model import EPS, GPT, GPTConfig
from nanochat_native.tokenizer import Tokenizer, byte_letters


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
    """What was read. step, bpb: None where the source does not say. chat: it was trained on conversations."""

    config: GPTConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer
    step: int | None
    bpb: float | None
    notes: list[str]
    chat: bool = False


def read(options: Options) -> Source:
    """Raises FileNotFoundError, naming what is missing, and ValueError for what is not of the first architecture."""
    folder = options.source
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if list(folder.glob("model_*.pt")):
        source = read_nanochat(folder, options.step, options.tokenizer)
        return dataclasses.replace(source, chat=options.chat)
    if (folder / "config.json").is_file():
        return read_transformers(folder)
    raise FileNotFoundError(f"{folder} has neither nanochat's model_*.pt nor a config.json of transformers")


def read_nanochat(folder: Path, step: int | None, tokenizer: Path | None) -> Source:
    """model_STEP.pt and meta_STEP.json, and the tokenizer."""
    steps = sorted(
        int(m.group(1)) for p in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", p.name))
    )
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"{folder} has checkpoints of steps {steps}" + (f"; not {step}" if steps else ""))
    step = steps[-1] if step is None else step
    meta_path = folder / f"meta_{step:06d}.json"
    if not meta_path.is_file():
        raise FileNotFoundError(f"{meta_path}: missing; it holds the shape of the model")
    try:
        meta = json.loads(meta_path.read_bytes())
        shape = meta["model_config"]
        config = GPTConfig(
            **{name: shape[name] for name in ("sequence_len", "vocab_size", "n_layer", "n_head")},
            n_kv_head=shape["n_kv_head"],
            n_embd=shape["n_embd"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{meta_path}: no model_config of nanochat's ({error!r})") from None
    pattern = set(str(shape.get("window_pattern", "L")))
    if pattern - {"L"}:
        raise ValueError(f"{meta_path}: window_pattern is {shape['window_pattern']!r}; the first architecture has none")
    try:
        loaded = torch.load(folder / f"model_{step:06d}.pt", map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(
            f"{folder / f'model_{step:06d}.pt'} cannot be read: {' '.join(str(error).split())[:200]}"
        ) from None
    tensors = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in loaded.items()}
    own = hugging_face.names(config.n_layer)
    tensors = hugging_face.renamed(cropped(tensors, config.vocab_size), {name: name for name in own})
    return Source(
        config, tensors, read_tokenizer_pickle(find_tokenizer(folder, tokenizer)), step, meta.get("val_bpb"), []
    )


def cropped(tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """wte and lm_head without the rows that pad the vocabulary."""
    return {
        name: t[:vocab_size] if name in hugging_face.ENDS and t.size(0) > vocab_size else t
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
    config = hugging_face.gpt_config(folder)
    index = folder / "model.safetensors.index.json"
    try:
        files = (
            sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        tensors: dict[str, Tensor] = {}
        for file in files:
            if Path(file).name != file:
                raise ValueError(f"{index} names {file!r}, which is not beside it")
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder / file}: missing")
            tensors |= load_file(folder / file)
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: damaged weights ({error})") from None
    theirs = {name: own for own, name in hugging_face.names(config.n_layer).items()}
    eps = json.loads((folder / "config.json").read_bytes()).get("rms_norm_eps", 1e-6)
    notes = [] if eps == EPS else [f"its rms_norm_eps of {eps:g} becomes {EPS:g}: logits move by about 1e-6"]
    tokenizer = read_tokenizer_json(folder / "tokenizer.json", notes)
    chat = has_chat_template(folder)
    return Source(config, hugging_face.renamed(tensors, theirs), tokenizer, None, None, notes, chat)


def has_chat_template(folder: Path) -> bool:
    """Whether transformers' tokenizer in there has one, in a file of its own or in tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_bytes()) if path.is_file() else {}
        return (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def read_tokenizer_json(path: Path, notes: list[str]) -> Tokenizer:
    """A byte-level BPE of Hugging Face's, whose special tokens follow the others."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        vocab, merges = stored["model"]["vocab"], stored["model"]["merges"]
        added = sorted((token["id"], token["content"]) for token in stored["added_tokens"])
        split = next(p for p in stored["pre_tokenizer"]["pretokenizers"] if p["type"] == "Split")
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        ordinary = sorted(
            (number, token) for token, number in vocab.items() if token not in {name for _, name in added}
        )
        tokens = [bytes(byte_of[letter] for letter in token) for _, token in ordinary]
        pattern = split["pattern"]["Regex"]
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise ValueError(f"{path}: not a byte-level BPE with a split pattern ({error!r})") from None
    numbers = [number for number, _ in ordinary] + [number for number, _ in added]
    if numbers != list(range(len(numbers))):
        raise ValueError(f"{path}: its ids are not 0 to {len(numbers) - 1}, the special tokens last")
    tokenizer = Tokenizer(tokens, pattern=pattern, specials=[name for _, name in added])
    if [list(pair) if isinstance(pair, list | tuple) else pair.split(" ") for pair in merges] != tokenizer.merges():
        notes.append("its merges are not those of its tokens' order: rare words may be cut in another way")
    return tokenizer


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
    if numbers != list(range(len(numbers))):
        raise ValueError(f"{path}: its ids are not 0 to {len(numbers) - 1}, the special tokens last")
    return Tokenizer(tokens, pattern=pattern, specials=names)


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

    Raises ValueError where `out` holds something, or where the parts do not belong together.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something; give another --out")
    if source.tokenizer.vocab_size != source.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {source.tokenizer.vocab_size} ids, the model {source.config.vocab_size}: they do not "
            "belong together"
        )
    with torch.device("meta"):
        model = GPT(source.config)
    for name, parameter in model.named_parameters():
        if tuple(source.tensors[name].shape) != tuple(parameter.shape):
            raise ValueError(f"{name} has shape {tuple(source.tensors[name].shape)}; it takes {tuple(parameter.shape)}")
    weights = {name: tensor.float() for name, tensor in source.tensors.items()}
    config = source.config
    flags = TrainConfig(
        depth=config.n_layer,
        head_dim=config.head_dim,
        n_kv_head=config.n_kv_head,
        max_seq_len=config.sequence_len,
        vocab_size=config.vocab_size,
        num_iterations=max(1, source.step or 1),
        device="cpu",
        out_dir=out.parent,
        run=out.name,
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
        checkpoint.save(out / "checkpoints", source.step or 0, {"model": weights}, meta)
        source.tokenizer.save(out / "tokenizer")
        run_folder.save_config(with_defaults(flags, gpu=False))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        if existed:
            out.mkdir()
        raise


def run(options: Options) -> None:
    """Reads and writes, and says what was found."""
    source = read(options)
    write(source, options.out)
    shape = source.config
    print(
        f"import   {options.out} | d{shape.n_layer}, width {shape.n_embd}, {shape.n_head} heads, vocabulary "
        f"{shape.vocab_size:,}" + (f" | step {source.step}" if source.step is not None else "")
    )
    for note in source.notes:
        print(f"note     {note}")
    print(f"sample   python -m nanochat_native.generate --checkpoint {options.out}")


def main(args: Sequence[str] | None = None) -> int:
    """Imports as `args` say, sys.argv's by default. Returns the exit code."""
    options = tyro.cli(Options, prog="python -m nanochat_native.import_checkpoint", args=args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
