"""The shape of the model and the parts that it has."""

import math
from dataclasses import dataclass, fields
from typing import Any

WINDOW_MULTIPLE = 128  # of nanochat's short windows since January 2026

# The values of GPTConfig that make nanochat's architectures: the first one, of October 2025, and that of July 2026.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "october": {
        "value_embeddings": False,
        "residual_scalars": False,
        "smear": False,
        "backout": False,
        "qk_scale": 1.0,
        "rotary_base": 10_000,
        "window_multiple": 1,
        "bounded_windows": False,
        "vocab_multiple": 1,
        "initialization": "normal",
    },
    "today": {
        "value_embeddings": True,
        "residual_scalars": True,
        "smear": True,
        "backout": True,
        "qk_scale": 1.2,
        "rotary_base": 100_000,
        "window_multiple": WINDOW_MULTIPLE,
        "bounded_windows": True,
        "vocab_multiple": 64,
        "initialization": "uniform",
    },
}
INITIALIZATIONS = ("normal", "uniform")
SMEAR_CHANNELS = 24  # the first channels of the embedding, which decide how much of the previous token is added
VALUE_GATE_CHANNELS = 12  # the first channels of a block's input, which decide how much of the embedding is added


@dataclass(frozen=True)
class GPTConfig:
    """Shape and parts of the model. The defaults of the parts are those of nanochat's first architecture.

    If n_kv_head < n_head, each key/value head serves n_head / n_kv_head query heads (GQA; 1 is MQA).

    Attributes:
        window_pattern: one letter per layer, repeated over the depth: a query of an S layer sees its own position and
            the short window before it, a query of an L layer all earlier positions. The last layer is always L.
        value_embeddings: every second layer, the last one included, adds a gated embedding of the token to its values.
        residual_scalars: each block begins with resid_lambda x + x0_lambda x0, x0 being the input of the first block.
        smear: a gated part of the previous token's embedding is added to each embedding.
        backout: a part of the residual stream after the layer n_layer // 2 is subtracted before the last norm.
        qk_scale: a factor of the normalised queries and of the normalised keys.
        rotary_base: the base of the rotary frequencies.
        window_multiple: the short window is sequence_len / 4, rounded up to a multiple of this; 1 rounds down.
        bounded_windows: L layers see sequence_len earlier positions in longer texts; otherwise they see all.
        vocab_multiple: wte, lm_head and value embeddings have rows for a multiple of this many tokens.
        initialization: the distribution of the initial matrices, "normal" or "uniform"; see GPT.init_weights.

    Raises ValueError for sizes that do not fit together.
    """

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str = "L"
    value_embeddings: bool = False
    residual_scalars: bool = False
    smear: bool = False
    backout: bool = False
    qk_scale: float = 1.0
    rotary_base: int = 10_000
    window_multiple: int = 1
    bounded_windows: bool = False
    vocab_multiple: int = 1
    initialization: str = "normal"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a whole number >= 1, got {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} must be True or False, got {value!r}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd / n_head must be an even whole number, got {self.n_embd} / {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head must be a multiple of n_kv_head {self.n_kv_head}, got {self.n_head}")
        if not self.window_pattern or set(self.window_pattern) - set("LS"):
            raise ValueError(
                f"window_pattern must be a word of the letters L and S, such as SSSL, got {self.window_pattern!r}"
            )
        if type(self.qk_scale) not in (int, float) or not 0 < self.qk_scale < math.inf:
            raise ValueError(f"qk_scale must be a finite number > 0, got {self.qk_scale!r}")
        if self.initialization not in INITIALIZATIONS:
            raise ValueError(f"initialization must be one of {', '.join(INITIALIZATIONS)}, got {self.initialization!r}")
        for part, channels in (("smear", SMEAR_CHANNELS), ("value_embeddings", VALUE_GATE_CHANNELS)):
            if getattr(self, part) and self.n_embd < channels:
                raise ValueError(f"n_embd must be >= {channels} with {part}, got {self.n_embd}")

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        vocab_size: int,
        sequence_len: int,
        head_dim: int = 128,
        n_kv_head: int | None = None,
        window_pattern: str = "L",
        architecture: str = "october",
        **parts: Any,
    ) -> "GPTConfig":
        """Return nanochat's shape for a depth: 64 channels per layer.

        With the architecture "october", the channels are divided into the fewest equal heads of at most head_dim. With
        "today", they are rounded up to a multiple of head_dim, and each head has head_dim channels.

        Args:
            parts: attributes that differ from those of the architecture.
        """
        if depth < 1 or head_dim < 2:
            raise ValueError(f"depth must be >= 1 and head_dim >= 2, got {depth} and {head_dim}")
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
        n_embd = 64 * depth
        if architecture == "today":
            n_head = -(-n_embd // head_dim)
            n_embd = n_head * head_dim
        else:
            n_head = next(n for n in range(math.ceil(n_embd / head_dim), n_embd) if n_embd % (2 * n) == 0)
        return cls(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=depth,
            n_head=n_head,
            n_kv_head=n_head if n_kv_head is None else n_kv_head,
            n_embd=n_embd,
            window_pattern=window_pattern,
            **{**ARCHITECTURES[architecture], **parts},
        )

    def parts_beyond(self, architecture: str) -> list[str]:
        """Return the names of the parts that differ from those of a named architecture."""
        return [name for name, value in ARCHITECTURES[architecture].items() if getattr(self, name) != value]

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """The number of rows of wte, lm_head and the value embeddings."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def windows(self) -> list[int | None]:
        """The number of earlier positions that a query sees, for each layer; None for all."""
        quarter = self.sequence_len // 4
        if self.window_multiple > 1:
            quarter = -(-self.sequence_len // (4 * self.window_multiple)) * self.window_multiple
        long = self.sequence_len if self.bounded_windows else None
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [quarter if letter == "S" else long for letter in letters]

    def has_value_embedding(self, layer: int) -> bool:
        """Return whether a layer adds an embedding of the token to its values."""
        return self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2
