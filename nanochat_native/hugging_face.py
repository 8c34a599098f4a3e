"""Names and settings of transformers' NanoChatForCausalLM, which is nanochat's first architecture, as this model is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nanochat_native.model import EPS, ROTARY_BASE, SOFTCAP, GPTConfig

MODEL_TYPE, ARCHITECTURE = "nanochat", "NanoChatForCausalLM"
ENDS = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
BLOCK = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def names(n_layer: int) -> dict[str, str]:
    """Ours to transformers', of every tensor; none is transposed."""
    blocks = {
        f"transformer.h.{layer}.{own}.weight": f"model.layers.{layer}.{theirs}.weight"
        for layer in range(n_layer)
        for own, theirs in BLOCK.items()
    }
    return ENDS | blocks


def config_of(config: GPTConfig, *, bos_id: int | None, dtype: str) -> dict[str, Any]:
    """config.json. Raises ValueError, naming the window pattern, for a model that transformers has no attention for."""
    if any(window is not None for window in config.windows):
        raise ValueError(
            f"train's --window-pattern {config.window_pattern}: transformers' NanoChat attends to all of the past, and "
            "takes L alone; --format safetensors writes any model"
        )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(ROTARY_BASE)},
        "final_logit_softcapping": SOFTCAP,
        "tie_word_embeddings": False,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
        "pad_token_id": None,
        "dtype": dtype,
    }


def gpt_config(folder: Path) -> GPTConfig:
    """The model that a folder's config.json describes.

    Raises ValueError, naming the setting, for one that this model has not.
    """
    try:
        found = json.loads((folder / "config.json").read_bytes())
        config = GPTConfig(
            sequence_len=found["max_position_embeddings"],
            vocab_size=found["vocab_size"],
            n_layer=found["num_hidden_layers"],
            n_head=found["num_attention_heads"],
            n_kv_head=found.get("num_key_value_heads") or found["num_attention_heads"],
            n_embd=found["hidden_size"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: not the config of a model ({error!r})") from None
    if found.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {found.get('model_type')!r}; it takes {MODEL_TYPE!r}"
        )
    rope = found.get("rope_parameters") or {}
    settings = {
        "intermediate_size": (found.get("intermediate_size"), 4 * config.n_embd),
        "hidden_act": (found.get("hidden_act", "relu2"), "relu2"),
        "attention_bias": (found.get("attention_bias", False), False),
        "tie_word_embeddings": (found.get("tie_word_embeddings", False), False),
        "final_logit_softcapping": (found.get("final_logit_softcapping", SOFTCAP), SOFTCAP),
        "rope_theta": (rope.get("rope_theta", found.get("rope_theta", ROTARY_BASE)), ROTARY_BASE),
        "rope_type": (rope.get("rope_type", "default"), "default"),
    }
    for name, (value, takes) in settings.items():
        if value != takes:
            raise ValueError(f"{folder / 'config.json'}: {name} is {value!r}; this model takes {takes!r}")
    return config


def renamed(tensors: Mapping[str, Tensor], mapping: Mapping[str, str]) -> dict[str, Tensor]:
    """Raises ValueError, naming them, for tensors that are missing or more than the mapping has."""
    missing, more = sorted(set(mapping) - set(tensors)), sorted(set(tensors) - set(mapping))
    if missing or more:
        what = [
            f"{kind} {', '.join(found[:3])}{' ...' if len(found) > 3 else ''}"
            for kind, found in (("missing", missing), ("unknown", more))
            if found
        ]
        raise ValueError(f"tensors do not fit the model: {'; '.join(what)}")
    return {theirs: tensors[own] for own, theirs in mapping.items()}
