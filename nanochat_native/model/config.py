"""The shape of the model."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model.

    If n_kv_head < n_head, each key/value head serves n_head / n_kv_head query heads (GQA; 1 is MQA).
    window_pattern has one letter per layer and is repeated over the depth: a query of an L layer sees all earlier
    positions, one of an S layer the last sequence_len // 4 and its own. The last layer is always L.

    Raises ValueError for sizes that do not fit together.
    """

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str = "L"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "window_pattern" and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a whole number >= 1, got {value!r}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd / n_head must be an even whole number, got {self.n_embd} / {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head must be a multiple of n_kv_head {self.n_kv_head}, got {self.n_head}")
        if not self.window_pattern or set(self.window_pattern) - set("LS"):
            raise ValueError(
                f"window_pattern must be a word of the letters L and S, such as SSSL, got {self.window_pattern!r}"
            )

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
    ) -> "GPTConfig":
        """Return nanochat's shape for a depth: 64 channels per layer, in the fewest equal heads of at most head_dim."""
        if depth < 1 or head_dim < 2:
            raise ValueError(f"depth must be >= 1 and head_dim >= 2, got {depth} and {head_dim}")
        n_embd = 64 * depth
        n_head = next(n for n in range(math.ceil(n_embd / head_dim), n_embd) if n_embd % (2 * n) == 0)
        return cls(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=depth,
            n_head=n_head,
            n_kv_head=n_head if n_kv_head is None else n_kv_head,
            n_embd=n_embd,
            window_pattern=window_pattern,
        )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def windows(self) -> list[int | None]:
        """The number of earlier positions that a query sees, for each layer; None for all."""
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [self.sequence_len // 4 if letter == "S" else None for letter in letters]
