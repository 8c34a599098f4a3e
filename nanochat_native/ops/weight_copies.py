"""bfloat16 copies of float32 weights, for products in bfloat16.

The optimizers of nanochat_native.optim state which weights they update. The copy of such a weight is made at its first
use, and kept until the weight is freed. The optimizers write it in the pass that updates the weight, so a training step
casts no weight. If the weight changes in another way, the copy is written again at the next use. Other weights are cast
at each use: the fused optimizers of torch, and FSDP, change weights without a trace that could be seen here. Copies are
kept outside the weights: they are never saved, pickled or copied with a model.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from nanochat_native.ops import modes


class _Copy:
    """A copy, and what its weight was when the copy was written."""

    def __init__(self, tensor: Tensor, weight: Tensor) -> None:
        self.tensor = tensor
        self.mark_fresh(weight)

    def mark_fresh(self, weight: Tensor) -> None:
        # With a weak reference, the address of a freed storage is not given to another one.
        self.storage = StorageWeakRef(weight.untyped_storage())
        self.version, self.shape, self.stride = weight._version, weight.shape, weight.stride()
        self.offset = weight.storage_offset()

    def is_fresh(self, weight: Tensor) -> bool:
        return (
            weight._version == self.version
            and weight.untyped_storage()._cdata == self.storage.cdata
            and weight.storage_offset() == self.offset
            and weight.shape == self.shape
            and weight.stride() == self.stride
        )

    def fits(self, weight: Tensor) -> bool:
        """Whether the memory of this copy can be used again: its address is part of captured CUDA graphs."""
        copy = self.tensor
        same_order = copy.stride() == weight.stride() or (copy.is_contiguous() and weight.is_contiguous())
        return copy.shape == weight.shape and copy.device == weight.device and same_order


_copies = WeakTensorKeyDictionary()  # of the weights whose copies are kept: a _Copy, or None before the first use


def keep(weights: Iterable[Tensor]) -> None:
    """Keep the copies of these weights. Whoever updates the weights must write the copies or raise the versions."""
    for weight in weights:
        _copies.setdefault(weight, None)


def low_precision(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in `dtype`, detached; of a float32 weight in bfloat16, the copy if one is kept.

    For autograd functions written by hand, which return the gradient of the weight in its own type. While torch.compile
    traces, within torch.func transforms and under forward-mode AD, this is weight.to(dtype), not detached.

    The copy is written again if the weight has changed: its version counter, which every operation in place increments,
    its memory, or its strides. A change through a tensor with a counter of its own, such as weight.data, is not seen;
    torch.autograd.graph.increment_version(weight) announces it.

    Args:
        weight: any shape, floating point.
        dtype: the type of the product.

    Returns:
        A tensor of the shape of weight. It must not be modified. If weight has the dtype, it shares its memory.

    Raises:
        RuntimeError: The copy would have to be written while a CUDA graph is captured. Every replay would then cast the
            weight. Run the captured function once before, or call refresh().
    """
    if torch.compiler.is_compiling() or modes.beyond_backward(weight):
        return weight.to(dtype)
    kept_types = weight.dtype == torch.float32 and dtype == torch.bfloat16
    # Subclasses, such as the tensors of a tracer, need not have memory. Inference tensors have no version.
    plain = type(weight) in (Tensor, torch.nn.Parameter) and not weight.is_inference()
    if not kept_types or not plain or weight not in _copies:
        if plain and weight.dtype != torch.float32 and weight in _copies:
            _copies[weight] = None
        return weight.detach().to(dtype)
    kept = _copies[weight]
    if kept is not None and kept.is_fresh(weight):
        return kept.tensor
    return _write(weight, kept)


def _write(weight: Tensor, kept: _Copy | None) -> Tensor:
    """Write the copy of a weight, in the memory of the copy that is kept, if it fits."""
    _refuse_capture(weight)
    with torch.inference_mode(False), torch.no_grad():
        if kept is not None and kept.fits(weight):
            kept.tensor.copy_(weight)
            kept.mark_fresh(weight)
            return kept.tensor
        copy = weight.to(torch.bfloat16)
    if type(copy) is Tensor:  # not under a mode that returns tensors without data
        _copies[weight] = _Copy(copy, weight)
    return copy


def _refuse_capture(weight: Tensor) -> None:
    if _is_capturing(weight):
        raise RuntimeError(
            f"low_precision: the bfloat16 copy of a weight, shape {tuple(weight.shape)}, must be written before a CUDA "
            "graph is captured; run the captured function once before, or call refresh(weights)"
        )


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def refresh(weights: Iterable[Tensor], values: Sequence[Tensor] | None = None) -> None:
    """Write the copies of changed weights now, in few launches, at the addresses that they have.

    Call it before a captured CUDA graph is replayed, if anything but an optimizer of nanochat_native.optim has changed
    the weights. Weights without a copy are ignored: nothing has used one.

    Args:
        weights: any tensors.
        values: the values of the weights in bfloat16, if the caller has them: one for each weight, of its shape.

    Raises:
        RuntimeError: A copy would have to be written while a CUDA graph is captured.
    """
    weights = list(weights)
    changed: list[tuple[_Copy, Tensor, Tensor]] = []
    for weight, value in zip(weights, weights if values is None else values, strict=True):
        kept = _copies.get(weight)
        if kept is None or weight.dtype != torch.float32 or kept.is_fresh(weight):
            continue
        if kept.fits(weight):
            _refuse_capture(weight)
            changed.append((kept, weight, value))
        else:
            _write(weight, kept)
    if not changed:
        return
    with torch.inference_mode(False), torch.no_grad():
        torch._foreach_copy_([kept.tensor for kept, _, _ in changed], [value for _, _, value in changed])
    for kept, weight, _ in changed:
        kept.mark_fresh(weight)


def copy_for_update(weight: Tensor) -> Tensor | None:
    """Return the copy of a contiguous float32 weight for the pass that updates the weight to write; None without one.

    After the update the caller must call mark_fresh(weight).
    """
    kept = _copies.get(weight)
    if kept is None or weight.dtype != torch.float32 or not weight.is_contiguous() or not kept.fits(weight):
        return None
    return kept.tensor


def is_stale(weight: Tensor) -> bool:
    """Return whether a weight has a copy that must be written again before its next use."""
    kept = _copies.get(weight)
    return kept is not None and not kept.is_fresh(weight)


def mark_fresh(weight: Tensor) -> None:
    """State that the copy of a weight, which copy_for_update returned, has been written with the weight's values."""
    kept = _copies.get(weight)
    if kept is not None:
        kept.mark_fresh(weight)
