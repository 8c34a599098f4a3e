"""Names and settings of transformers' NanoChatForCausalLM, which is nanochat's first architecture, as this model is."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.functional import EPS
from nanochat_native.model.gpt import ROTARY_BASE, SOFTCAP

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

SIZES = {
    "max_position_embeddings": "sequence_len",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
}
LARGEST = 2**24  # of SIZES: far beyond any model, and small enough to compute with


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, and ValueError for a damaged one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        where = f"{error.msg} in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "no text in UTF-8"
        raise ValueError(f"{path}: damaged, not JSON ({where})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged, it holds no JSON object")
    return found


def check_sizes(path: Path, sizes: Mapping[str, Any]) -> None:
    """Raises ValueError, with the path, for a size of a model that is not a whole number in its range."""
    for name, size in sizes.items():
        least = 2 if SIZES.get(name, name) == "sequence_len" else 1
        if type(size) is not int or not least <= size <= LARGEST:
            taken = f"it takes a whole number from {least} to {LARGEST}"
            raise ValueError(f"{path}: {name} is {json.dumps(size)}; {taken}")


def gpt_config(folder: Path) -> tuple[GPTConfig, float]:
    """The model that a folder's config.json describes, and the eps of its norms, which this model cannot take over.

    Raises FileNotFoundError, and ValueError, naming the setting, for one that this model has not.
    """
    path = folder / "config.json"
    found = read_json(path)
    if found.get("model_type") != MODEL_TYPE:
        raise ValueError(f'{path}: model_type is {json.dumps(found.get("model_type"))}; it takes "{MODEL_TYPE}"')
    sizes: dict[str, Any] = {name: found.get(name) for name in SIZES}
    sizes["num_key_value_heads"] = found.get("num_key_value_heads", found.get("num_attention_heads"))
    check_sizes(path, sizes)
    try:
        config = GPTConfig(**{own: sizes[theirs] for theirs, own in SIZES.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    rope = found.get("rope_parameters") or {}
    scaling = found.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise ValueError(f"{path}: rope_parameters and rope_scaling take an object")
    nested = sorted(name for name, value in rope.items() if isinstance(value, dict))
    layers = found.get("layer_types") or ["full_attention"]
    if isinstance(layers, list) and all(layer == layers[0] for layer in layers):
        layers = layers[:1]
    # What the model computes with: (the folder's, as transformers takes it where it is not given; ours).
    settings = {
        "intermediate_size": (found.get("intermediate_size", 8192), 4 * config.n_embd),
        "head_dim": (found.get("head_dim") or config.head_dim, config.head_dim),
        "hidden_act": (found.get("hidden_act", "relu2"), "relu2"),
        "attention_bias": (found.get("attention_bias", False), False),
        "tie_word_embeddings": (found.get("tie_word_embeddings", False), False),
        "final_logit_softcapping": (found.get("final_logit_softcapping", SOFTCAP), SOFTCAP),
        "rope_theta": (rope.get("rope_theta", found.get("rope_theta", ROTARY_BASE)), ROTARY_BASE),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "rope_scaling": (scaling.get("rope_type", scaling.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", found.get("partial_rotary_factor", 1)), 1),
        "rope_parameters by type of layer": (nested, []),
        "sliding_window": (found.get("sliding_window"), None),
        "layer_types": (layers, ["full_attention"]),
        "quantization_config": (found.get("quantization_config"), None),
    }
    for name, (value, takes) in settings.items():
        if value != takes:
            raise ValueError(f"{path}: {name} is {json.dumps(value)}; this model takes {json.dumps(takes)}")
    eps = found.get("rms_norm_eps", 1e-6)
    if type(eps) not in (int, float) or not 0 < eps < math.inf:
        raise ValueError(f"{path}: rms_norm_eps is {json.dumps(eps)}; it takes a finite number above 0")
    return config, float(eps)


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
