"""A model that another program wrote, once it has been read, and the checks that all formats share."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_native.data.tokenizer import Tokenizer
from nanochat_native.interop import transformers_config
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.functional import EPS
from nanochat_native.model.gpt import GPT
from nanochat_native.runs.saved_model import check_weights


@dataclass(frozen=True)
class Source:
    """A model as it was read, with this program's names.

    Attributes:
        step: Step of the checkpoint; None if the files do not say.
        bpb: Validation bits per byte; None if the files do not say.
        notes: Remarks for the user.
        chat: Whether the model was trained on conversations.
        eps: Epsilon of the source's norms.
        padding: Rows of tensors that follow those of the vocabulary and that the model does not have, by name.
        nanochat: What a checkpoint of nanochat needs beyond this to be written again: "folder" and "tag" (the names of
            its two folders), "meta" (the content of its meta_STEP.json) and "dtypes" (of its tensors, by name). None
            for a model of another program.
    """

    config: GPTConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer
    step: int | None
    bpb: float | None
    notes: list[str]
    chat: bool = False
    eps: float = EPS
    padding: dict[str, Tensor] = field(default_factory=dict)
    nanochat: dict[str, Any] | None = None


def to_float32(folder: Path, source: Source) -> Source:
    """Return the source with float32 weights, which represent 16-bit weights exactly.

    Raises ValueError for weights that float32 cannot represent, or that fit neither the model nor the tokenizer.
    """
    if source.tokenizer.vocab_size != source.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {source.tokenizer.vocab_size} ids, the model {source.config.vocab_size}: "
            "they do not belong together"
        )
    with torch.device("meta"):
        check_weights(folder, source.tensors, GPT(source.config))
    for name, tensor in [*source.tensors.items(), *source.padding.items()]:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{folder}: {name} must be float32, bfloat16 or float16, got {kind}")
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {name} has values that are not finite: the model is damaged")
    tensors, padding = ({name: t.float() for name, t in group.items()} for group in (source.tensors, source.padding))
    return dataclasses.replace(source, tensors=tensors, padding=padding)


def tensor_names(config: GPTConfig, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return transformers_config.names of no more layers than there are tensors, whatever the config says."""
    return transformers_config.names(min(config.n_layer, len(tensors)))


def build_tokenizer(path: Path, ids: list[int], tokens: list[bytes], pattern: str, specials: list[str]) -> Tokenizer:
    """Return a tokenizer of the tokens and special tokens that were read from `path`.

    Args:
        ids: Ids of the tokens, followed by those of the special tokens.

    Raises ValueError, naming the path, if they do not form a tokenizer.
    """
    if ids != list(range(len(ids))):
        raise ValueError(f"{path}: ids must be 0 to {len(ids) - 1} without gaps, the special tokens last")
    try:
        return Tokenizer(tokens, pattern=pattern, specials=specials)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a tokenizer of this program: {error}") from None
