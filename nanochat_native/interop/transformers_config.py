"""Names and settings of transformers' NanoChatForCausalLM: nanochat's first architecture, which this model also has."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nanochat_native.model.config import ARCHITECTURES, GPTConfig
from nanochat_native.model.functional import EPS
from nanochat_native.model.gpt import SOFTCAP

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

OCTOBER = ARCHITECTURES["october"]
SIZES = {
    "max_position_embeddings": "sequence_len",
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "hidden_size": "n_embd",
}
MAX_SIZE = 2**24  # far beyond any model, and small enough to compute with


def names(n_layer: int) -> dict[str, str]:
    """Return the name in transformers of every tensor of this model; none is transposed."""
    blocks = {
        f"transformer.h.{layer}.{own}.weight": f"model.layers.{layer}.{theirs}.weight"
        for layer in range(n_layer)
        for own, theirs in BLOCK.items()
    }
    return ENDS | blocks


def config_of(config: GPTConfig, *, bos_id: int | None, dtype: str) -> dict[str, Any]:
    """Return the content of config.json.

    Raises ValueError, naming the parts, for a model with parts of today's architecture, and for one with windows:
    transformers supports neither.
    """
    parts = [part for part in config.parts_beyond("october") if part != "initialization"]
    if parts:
        raise ValueError(
            f"transformers has nanochat's first architecture only, and this model differs in {', '.join(parts)}; "
            "--format nanochat or safetensors supports it"
        )
    if any(window is not None for window in config.windows):
        raise ValueError(
            f"train's --window-pattern must be L, got {config.window_pattern}: transformers has no windows; "
            "--format safetensors supports every model"
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
        "rope_parameters": {"rope_type": "default", "rope_theta": float(OCTOBER["rotary_base"])},
        "final_logit_softcapping": SOFTCAP,
        "tie_word_embeddings": False,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
        "pad_token_id": None,
        "dtype": dtype,
    }


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises FileNotFoundError, and ValueError for a damaged file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        where = f"{error.msg} in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "no UTF-8 text"
        raise ValueError(f"{path}: damaged, not JSON ({where})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged, it has no JSON object")
    return found


def check_sizes(path: Path, sizes: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the path, for a size of a model that is not a whole number in its range."""
    for name, size in sizes.items():
        least = 2 if SIZES.get(name, name) == "sequence_len" else 1
        if type(size) is not int or not least <= size <= MAX_SIZE:
            raise ValueError(
                f"{path}: {name} must be a whole number from {least} to {MAX_SIZE}, got {json.dumps(size)}"
            )


def gpt_config(folder: Path) -> tuple[GPTConfig, float]:
    """Return the shape that a folder's config.json describes, and the eps of its norms, which is fixed in this model.

    Raises FileNotFoundError, and ValueError, naming the setting, for a model that this program does not support.
    """
    path = folder / "config.json"
    found = read_json(path)
    if found.get("model_type") != MODEL_TYPE:
        raise ValueError(f'{path}: model_type must be "{MODEL_TYPE}", got {json.dumps(found.get("model_type"))}')
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
        raise ValueError(f"{path}: rope_parameters and rope_scaling must be objects")
    nested = sorted(name for name, value in rope.items() if isinstance(value, dict))
    layers = found.get("layer_types") or ["full_attention"]
    if isinstance(layers, list) and all(layer == layers[0] for layer in layers):
        layers = layers[:1]
    # Name: (value in the folder, or transformers' default; the only value that this model supports).
    settings = {
        "intermediate_size": (found.get("intermediate_size", 8192), 4 * config.n_embd),
        "head_dim": (found.get("head_dim") or config.head_dim, config.head_dim),
        "hidden_act": (found.get("hidden_act", "relu2"), "relu2"),
        "attention_bias": (found.get("attention_bias", False), False),
        "tie_word_embeddings": (found.get("tie_word_embeddings", False), False),
        "final_logit_softcapping": (found.get("final_logit_softcapping", SOFTCAP), SOFTCAP),
        "rope_theta": (rope.get("rope_theta", found.get("rope_theta", OCTOBER["rotary_base"])), OCTOBER["rotary_base"]),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "rope_scaling": (scaling.get("rope_type", scaling.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", found.get("partial_rotary_factor", 1)), 1),
        "rope_parameters by type of layer": (nested, []),
        "sliding_window": (found.get("sliding_window"), None),
        "layer_types": (layers, ["full_attention"]),
        "quantization_config": (found.get("quantization_config"), None),
    }
    for name, (value, supported) in settings.items():
        if value != supported:
            raise ValueError(f"{path}: {name} must be {json.dumps(supported)}, got {json.dumps(value)}")
    eps = found.get("rms_norm_eps", 1e-6)
    if type(eps) not in (int, float) or not 0 < eps < math.inf:
        raise ValueError(f"{path}: rms_norm_eps must be a finite number > 0, got {json.dumps(eps)}")
    return config, float(eps)


def renamed(tensors: Mapping[str, Tensor], mapping: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors under the names that `mapping` gives them.

    Raises ValueError, naming them, for tensors that are missing or that the mapping does not have.
    """
    missing, more = sorted(set(mapping) - set(tensors)), sorted(set(tensors) - set(mapping))
    if missing or more:
        what = [
            f"{kind} {', '.join(found[:3])}{' ...' if len(found) > 3 else ''}"
            for kind, found in (("missing", missing), ("unknown", more))
            if found
        ]
        raise ValueError(f"tensors do not fit the model: {'; '.join(what)}")
    return {theirs: tensors[own] for own, theirs in mapping.items()}
