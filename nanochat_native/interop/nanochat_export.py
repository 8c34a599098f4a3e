"""Writes a model in nanochat's layout, so that nanochat's programs open it.

    base_checkpoints/d20/model_000650.pt  meta_000650.json      (chatsft_checkpoints/ for a model that chats)
    tokenizer/tokenizer.pkl  token_bytes.pt

The folder that holds them is nanochat's base directory, which the environment variable NANOCHAT_BASE_DIR names.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from nanochat_native.data.conversations import is_chat_trained
from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.interop.nanochat_files import FOLDERS, NANOCHAT
from nanochat_native.model.config import GPTConfig
from nanochat_native.runs.config import TrainConfig

PICKLE_PROTOCOL = 4  # every Python that nanochat supports reads it
_NO_EFFECT = ("initialization", "vocab_multiple")  # parts that a trained model does not show; rows are compared instead


def check_architecture(config: GPTConfig) -> None:
    """Raise ValueError, naming the parts, for a model that is neither of nanochat's first architecture nor today's."""
    beyond = {
        architecture: [part for part in config.parts_beyond(architecture) if part not in _NO_EFFECT]
        for architecture in ("october", "today")
    }
    rows = {"october": config.vocab_size, "today": -(-config.vocab_size // 64) * 64}
    for architecture, parts in beyond.items():
        parts += ["vocab_multiple"] if config.padded_vocab_size != rows[architecture] else []
    if set(config.window_pattern) != {"L"}:
        beyond["october"].append("window_pattern")
    if all(beyond.values()):
        raise ValueError(
            f"nanochat has no such model: {', '.join(beyond['today'])} must be as in --architecture today, or "
            f"{', '.join(beyond['october'])} as in --architecture october; --format safetensors supports every model"
        )


def folder_of(config: GPTConfig, meta: Mapping[str, Any]) -> Path:
    """Return the folder of the checkpoint in nanochat's base directory: the one it was imported from, or d20."""
    chat = is_chat_trained(meta)
    origin = meta.get(NANOCHAT) or {}
    kind, tag = str(origin.get("folder")), origin.get("tag") or f"d{config.n_layer}"
    if FOLDERS.get(kind) != chat:
        kind = "chatsft_checkpoints" if chat else "base_checkpoints"
    return Path(kind) / tag


def weights_of(
    state: Mapping[str, Tensor], padding: Mapping[str, Tensor], meta: Mapping[str, Any], dtype: str
) -> dict[str, Tensor]:
    """Return the tensors of model_STEP.pt.

    Args:
        state: The model's parameters, float32, by name.
        padding: Rows that follow them in the file, by name.
        meta: The meta of the checkpoint.
        dtype: "float32"; "bfloat16" for nanochat's types on a GPU, which are bfloat16 for the embeddings and float32
            for everything else; "auto" for the types that the model was imported with, or float32.
    """
    imported = (meta.get(NANOCHAT) or {}).get("dtypes") or {}
    names = [name for name in imported if name in state] + [name for name in state if name not in imported]
    weights: dict[str, Tensor] = {}
    for name in names:
        kind = imported.get(name, "float32") if dtype == "auto" else dtype
        if dtype == "bfloat16" and not name.startswith(("transformer.wte.", "value_embeds.")):
            kind = "float32"
        rows = [state[name], padding[name]] if name in padding else [state[name]]
        weights[name] = torch.cat(rows).to(getattr(torch, kind))
    return weights


def meta_of(config: GPTConfig, meta: Mapping[str, Any], trained: TrainConfig) -> dict[str, Any]:
    """Return the content of meta_STEP.json: that of the import, or what nanochat needs to use and fine-tune a model."""
    imported = (meta.get(NANOCHAT) or {}).get("meta")
    if imported:
        return dict(imported)
    sizes = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    shape: dict[str, Any] = {name: getattr(config, name) for name in sizes}
    if config.bounded_windows:  # the first version has no such key
        shape["window_pattern"] = config.window_pattern
    content = {"step": meta["step"], "val_bpb": meta.get("validation_bpb"), "model_config": shape}
    if not meta.get("imported"):
        batch = {"device_batch_size": trained.device_batch_size, "total_batch_size": trained.total_batch_size}
        content |= batch | {"max_seq_len": config.sequence_len}
    return content


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.pkl, a pickled tiktoken.Encoding, and token_bytes.pt, int32 (vocab_size,)."""
    folder.mkdir(parents=True)
    ordinary = tokenizer.vocab_size - len(tokenizer.special_tokens)
    encoding = tiktoken.Encoding(
        "rustbpe",
        pat_str=tokenizer.pattern,
        mergeable_ranks={tokenizer.decode_bytes([rank]): rank for rank in range(ordinary)},
        special_tokens=tokenizer.special_tokens,
    )
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding, protocol=PICKLE_PROTOCOL))
    torch.save(torch.from_numpy(tokenizer.token_bytes), folder / "token_bytes.pt")


def write_nanochat(
    out: Path,
    config: GPTConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    meta: Mapping[str, Any],
    trained: TrainConfig,
) -> None:
    """Write nanochat's base directory with one checkpoint, its step being meta's, and the tokenizer."""
    folder = out / folder_of(config, meta)
    folder.mkdir(parents=True)
    step = meta["step"]
    torch.save(dict(weights), folder / f"model_{step:06d}.pt")
    content = json.dumps(meta_of(config, meta, trained), indent=2)
    (folder / f"meta_{step:06d}.json").write_text(content, encoding="utf-8")
    write_tokenizer(out / "tokenizer", tokenizer)
