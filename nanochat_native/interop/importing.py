"""Imports a model that nanochat or transformers wrote as a run folder of this program."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

import nanochat_native
from nanochat_native.data.conversations import CHAT_TRAINED
from nanochat_native.interop.nanochat_files import NANOCHAT, PADDING, read_nanochat
from nanochat_native.interop.source import Source, to_float32
from nanochat_native.interop.transformers_import import read_transformers
from nanochat_native.model import functional
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.functional import EPS
from nanochat_native.model.gpt import GPT
from nanochat_native.runs import checkpoint, run_folder
from nanochat_native.runs.config import TrainConfig, resolve_defaults

PROBE_ROWS, PROBE_TOKENS = 4, 64
MAX_LOGIT_CHANGE = 0.01  # allowed when eps is replaced; logits lie between -15 and 15


@dataclass
class Options:
    """Import a model that nanochat or transformers wrote, so that the commands of this program can use it."""

    source: tyro.conf.Positional[Path]
    """A checkpoint folder of nanochat (base_checkpoints/d20), or a folder with a NanoChat model of transformers."""
    out: Path
    """Run folder to write; it must not exist, or must be empty."""
    step: int | None = None
    """Step of the nanochat checkpoint; default: the newest."""
    chat: bool = False
    """State that the nanochat checkpoint was trained on conversations. By default its folder (chatsft_checkpoints) and
    its meta file decide. For a folder of transformers the chat template decides."""
    tokenizer: Path | None = None
    """nanochat's tokenizer.pkl, or its folder; default: in the source, or in tokenizer/ in it, beside it or one folder
    higher."""


def read(options: Options) -> Source:
    """Read the model in options.source.

    Raises FileNotFoundError, naming the missing file, and ValueError for a model that is neither of nanochat's first
    architecture nor of today's.
    """
    folder = options.source
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if list(folder.glob("model_*.pt")):
        source = read_nanochat(folder, options.step, options.tokenizer)
        if options.chat:
            source = dataclasses.replace(source, chat=True, notes=[])
    elif (folder / "config.json").is_file():
        if options.step is not None:
            raise ValueError(
                f"--step {options.step} applies to nanochat's checkpoints; {folder} is a folder of transformers"
            )
        source = read_transformers(folder)
    else:
        raise FileNotFoundError(f"{folder} has neither a model_*.pt of nanochat nor a config.json of transformers")
    return to_float32(folder, source)


def probe_tokens(config: GPTConfig) -> Tensor:
    """Return random tokens (B, T) to compare logits on."""
    shape = (PROBE_ROWS, min(PROBE_TOKENS, config.sequence_len))
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def largest_logit_change(source: Source, tokens: Tensor) -> float:
    """Return the largest change of a logit of `tokens` (B, T) when the source's eps is replaced by this program's."""
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


def write(source: Source, out: Path) -> None:
    """Write a run folder with one checkpoint.

    Raises ValueError if `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another --out")
    config = source.config
    flags = TrainConfig(
        recipe="today" if config.parts_beyond("october") else "october",
        packing="bestfit" if config.parts_beyond("october") else "stream",
        depth=config.n_layer,
        head_dim=config.head_dim,
        n_kv_head=config.n_kv_head,
        max_seq_len=config.sequence_len,
        vocab_size=config.vocab_size,
        window_pattern=config.window_pattern,
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
    tensors = {"model": source.tensors}
    if source.nanochat is not None:
        meta[NANOCHAT] = source.nanochat
    if source.padding:
        tensors[PADDING] = source.padding
    existed = out.exists()
    try:
        checkpoint.save(out / "checkpoints", source.step or 0, tensors, meta)
        source.tokenizer.save(out / "tokenizer")
        run_folder.save_config(resolve_defaults(flags, gpu=False))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        if existed:
            out.mkdir()
        raise
