"""Rows that hold several documents, each of which the model reads as if it were alone in a row.

The kernels of attention have no boundaries of documents. Attention therefore takes the documents out of their rows,
into batches of documents of similar length, each padded at its end. A causal query sees no later key, so the padding
changes no result. Rotary positions begin at 0 in each document, and smear skips the first token of each.
"""

from typing import Any, cast

import torch
from torch import Tensor

from nanochat_native import ops

LEAST_STEP = 16  # lengths are rounded up to a multiple of this, or of a quarter of the power of two below the length


class Documents:
    """The documents of a batch (B, T), for GPT.forward.

    Attributes:
        positions: (B T,) int64, of each token in its document.
        is_first: (1, B T, 1), whether a token is the first of its document.
        groups: (number of documents, padded length) of each batch for attention.
    """

    def __init__(self, idx: Tensor, first_token: int) -> None:
        """Find the documents. One begins with each row, and with each token `first_token`; it ends before the next.

        On a GPU the host waits for `idx`.

        Args:
            idx: (B, T) int64.
        """
        begins = idx.cpu() == first_token
        begins[:, 0] = True
        begins = begins.flatten()
        starts = begins.nonzero().flatten()
        ends = torch.cat((starts[1:], torch.tensor([begins.numel()])))
        numbers = begins.cumsum(0) - 1
        positions = torch.arange(begins.numel()) - starts[numbers]
        padded = [padded_length(length) for length in (ends - starts).tolist()]

        self.groups: list[tuple[int, int]] = []
        slots, is_padding = [], []
        for length in sorted(set(padded)):
            chosen = torch.tensor([each == length for each in padded])
            tokens = starts[chosen, None] + torch.arange(length)
            beyond = tokens >= ends[chosen, None]
            self.groups.append((len(tokens), length))
            slots.append(tokens.masked_fill(beyond, 0).flatten())
            is_padding.append(beyond.flatten())
        slot, padding = torch.cat(slots), torch.cat(is_padding)
        place = torch.empty_like(positions)
        place[slot[~padding]] = (~padding).nonzero().flatten()

        device = idx.device
        self.positions = positions.to(device)
        self.is_first = begins.to(device)[None, :, None]
        self._slots = slot.to(device)  # the token of each slot of the batches; 0 in padding
        self._places = place.to(device)  # the slot of each token
        self._is_padding = padding.to(device)[:, None, None]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Return ops.attention of each document, (1, B T, H, D), for q of this shape and k, v (1, B T, Hkv, D).

        Differentiable; the gradients are the same bits each time, because nothing is added up.
        """
        sizes = [count * length for count, length in self.groups]
        moved = [cast(Tensor, _ToSlots.apply(x[0], self._slots, self._places)).split(sizes) for x in (q, k, v)]
        found = []
        for group, *parts in zip(self.groups, *moved, strict=True):
            batch = [part.unflatten(0, group) for part in parts]
            found.append(ops.attention(*batch, window=window).flatten(0, 1))
        joined = _FromSlots.apply(torch.cat(found), self._slots, self._places, self._is_padding)
        return cast(Tensor, joined)[None]


def padded_length(length: int) -> int:
    """Return the length to which attention pads a document: at most a quarter more, or a multiple of LEAST_STEP."""
    step = max(LEAST_STEP, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


class _ToSlots(torch.autograd.Function):
    """x[slots]. Each token has one slot that is not padding, and the gradient of padding is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[slots]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grad[places], None, None


class _FromSlots(torch.autograd.Function):
    """y[places], the inverse of _ToSlots."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, slots: Tensor, places: Tensor, is_padding: Tensor) -> Tensor:
        ctx.save_for_backward(slots, is_padding)
        return y[places]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slots, is_padding = ctx.saved_tensors
        return grad[slots].masked_fill(is_padding, 0), None, None, None
