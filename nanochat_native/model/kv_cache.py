"""Keys and values of earlier positions."""

import torch
from torch import Tensor

from nanochat_native.model.config import GPTConfig


class KVCache:
    """Keys and values of the positions already seen, allocated once.

    keys, values: (n_layer, B, capacity, Hkv, D); the first `length` positions are filled, by model(idx,
    kv_cache=cache).
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.n_layer, batch_size, capacity, config.n_kv_head, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def batch_size(self) -> int:
        return self.keys.size(1)

    @property
    def capacity(self) -> int:
        return self.keys.size(2)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts k, v (B, T, Hkv, D) of a layer behind the filled positions; all of its keys and values, as views."""
        end = self.length + k.size(1)
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def repeat(self, batch_size: int) -> "KVCache":
        """A copy of this cache of one row in which each of `batch_size` rows holds it, to go on in different ways."""
        if self.batch_size != 1:
            raise ValueError(f"the cache has {self.batch_size} rows; only one of 1 row can be repeated")
        copy = object.__new__(KVCache)
        copy.keys = self.keys.repeat(1, batch_size, 1, 1, 1)
        copy.values = self.values.repeat(1, batch_size, 1, 1, 1)
        copy.length = self.length
        return copy
