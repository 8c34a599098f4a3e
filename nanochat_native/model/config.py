"""The shape of the model."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model.

    n_kv_head < n_head shares each key/value head among n_head / n_kv_head query heads (GQA; 1 is MQA).
    window_pattern holds one letter a layer, repeated over the depth: L sees the whole past, S the last sequence_len //
    4 positions and itself. The last layer is L whatever the pattern says.

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
                raise ValueError(f"{field.name} is {value!r}; it takes a whole number from 1")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd {self.n_embd} over n_head {self.n_head} must give a whole, even head size")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}")
        if not self.window_pattern or set(self.window_pattern) - set("LS"):
            raise ValueError(f"window_pattern is {self.window_pattern!r}; it takes a word of L and S, such as SSSL")

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
        """nanochat's one dial: 64 channels a layer, in the fewest equal heads of at most head_dim channels."""
        if depth < 1 or head_dim < 2:
            raise ValueError(f"depth is {depth} and head_dim {head_dim}; they take numbers from 1 and from 2")
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
        """Per layer, how many earlier positions a query sees; None for all."""
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [self.sequence_len // 4 if letter == "S" else None for letter in letters]
