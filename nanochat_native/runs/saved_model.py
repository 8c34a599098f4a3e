"""Loads the model and the tokenizer of a run from its folder."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.runs import checkpoint


def load_model(
    run_folder: Path | str,
    step: int | None = None,
    device: torch.device | str = "cpu",
    *,
    warn: Callable[[str], None] = print,
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return (model, tokenizer, meta of the checkpoint) of a run, with the model on `device`.

    Args:
        step: the step of the checkpoint; None means the newest intact one.
        warn: receives a message about each newer checkpoint that is damaged.

    Raises:
        FileNotFoundError: if there is no such folder.
        CheckpointError: if no checkpoint is intact or there is none of `step`.
        ValueError: if there is no tokenizer, or weights, model_config and tokenizer do not belong together.
    """
    run_folder = Path(run_folder)
    tensors, meta = checkpoint.load(_checkpoints_of(run_folder), step, warn=warn)
    _check_meta(run_folder, meta)
    if "model" not in tensors:
        raise ValueError(f"{run_folder}: its checkpoint has no weights of a model")
    tokenizer = _load_tokenizer(run_folder, meta)
    config = _model_config(run_folder, meta)
    with torch.device("meta"):
        model = GPT(config)
    check_weights(run_folder, tensors["model"], model)
    model.to_empty(device=device)
    model.init_rotary()
    model.load_state_dict(tensors["model"])
    return model, tokenizer, meta


def load_config(
    run_folder: Path | str, step: int | None = None, *, warn: Callable[[str], None] = print
) -> tuple[GPTConfig, dict[str, Any]]:
    """Return (the model's config, the checkpoint's meta) as load_model would, with the same checks and errors, but for
    those of the weights, which are not loaded."""
    run_folder = Path(run_folder)
    meta = checkpoint.load_meta(_checkpoints_of(run_folder), step, warn=warn)
    _check_meta(run_folder, meta)
    _load_tokenizer(run_folder, meta)
    return _model_config(run_folder, meta), meta


def _checkpoints_of(run_folder: Path) -> Path:
    """Return the folder of a run's checkpoints. Raises FileNotFoundError if there is no such run."""
    if run_folder.is_file():
        raise FileNotFoundError(f"{run_folder} is a file; it must be the folder of a run")
    if not run_folder.is_dir():
        raise FileNotFoundError(f"{run_folder}: no such run folder")
    return run_folder / "checkpoints"


def _check_meta(run_folder: Path, meta: Mapping[str, Any]) -> None:
    """Raise ValueError if the checkpoint's meta lacks what a model with text needs."""
    missing = [name for name in ("tokenizer_hash", "model_config", "step") if name not in meta]
    if missing:
        raise ValueError(f"{run_folder}: its checkpoint has no {', '.join(missing)}")
    if meta["tokenizer_hash"] is None:
        raise ValueError(f"{run_folder} was trained on tokens without a tokenizer: it has no text")


def _load_tokenizer(run_folder: Path, meta: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a run. Raises ValueError if the model was trained with another one."""
    tokenizer = Tokenizer.load(run_folder / "tokenizer")
    if meta["tokenizer_hash"] != tokenizer.hash:
        raise ValueError(f"{run_folder / 'tokenizer'} is not the tokenizer that the model was trained with")
    return tokenizer


def _model_config(run_folder: Path, meta: Mapping[str, Any]) -> GPTConfig:
    """Return the config of the model. Raises ValueError for one that this version cannot read."""
    try:
        return GPTConfig(**meta["model_config"])
    except (TypeError, ValueError) as error:
        reason = re.sub(r"^\S*__init__\(\) ", "", str(error))
        raise ValueError(f"{run_folder}: its model_config is not one of this version ({reason})") from None


def check_weights(source: Path, tensors: Mapping[str, Tensor], model: GPT) -> None:
    """Raise ValueError for tensors that are missing, unknown, or of another shape than in the model.

    The message names up to three of them. source: the path for the message.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in expected]
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            wrong.append(f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{source}: the weights do not fit model_config: {', '.join(wrong[:3])}{more}")
