"""Checks of arguments that several operators share.

The rule: the public call checks shapes, types, devices and ranges before any work, whichever backend runs. Both
backends then raise the same errors, and so do calls on tensors without data, which never reach a kernel. The C++
bindings check again what keeps a kernel within its memory, because torch.ops.nanochat_native can be called directly.

Three checks belong to the implementations. Values in tensors (targets, lengths) are checked by whichever reads them.
Shared memory of updated tensors is checked by the bindings, since a reference does not depend on it. `cached_forward_`,
which is called once per token, is checked by its binding; the public call checks it only where its reference runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_native.ops.dtypes import widest_dtype


def check_dtype(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError unless `tensor` is of one of the allowed types."""
    if tensor.dtype not in allowed:
        raise TypeError(f"{op}: {name} must be {' or '.join(map(str, allowed))}, got {tensor.dtype}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device, like: str) -> None:
    """Raise ValueError unless `tensor` is on `device`, the device of argument `like`."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like {like}, got {tensor.device}")


def check_alike(op: str, like: str, first: Tensor, **tensors: Tensor) -> None:
    """Raise TypeError or ValueError unless `tensors` have the type and device of `first`, which is named `like`."""
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must be {first.dtype} like {like}, got {tensor.dtype}")
        check_device(op, name, tensor, first.device, like)


def check_rows(op: str, name: str, rows: Tensor, count: int) -> None:
    """Raise ValueError unless the numbers of rows are from 0 to count - 1, on the CPU only.

    F.embedding checks the range itself on every device, but by an IndexError or a device-side assert.
    """
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # Under vmap, `if` cannot use the values of one mapped call, so those of all calls are checked.
    every = torch.func.debug_unwrap(rows)
    outside = every[(every < 0) | (every >= count)]
    if outside.numel():
        raise ValueError(f"{op}: {name} must be from 0 to {count - 1}, got {int(outside[0])}")


def check_number(
    op: str,
    name: str,
    value: float | Tensor,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    low: int = 0,
    below: int | None = None,
) -> None:
    """Raise TypeError or ValueError unless `value` is a number in range, or a 0-d tensor of `dtype` on `device`.

    By default `dtype` is widest_dtype(device). The range is low <= value, and value < below if `below` is given. The
    value of a tensor is checked on the CPU only.
    """
    if isinstance(value, Tensor):
        dtype = dtype or widest_dtype(device)
        if value.dtype != dtype:
            raise TypeError(f"{op}: {name} must be a number or a 0-d tensor of {dtype}, got {value.dtype}")
        if value.dim() != 0:
            raise ValueError(f"{op}: {name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"{op}: {name} must be a number or a tensor on {device}, got one on {value.device}")
        # A subclass (a fake tensor during tracing) need not have a value.
        if device.type != "cpu" or torch.compiler.is_compiling() or type(value) is not Tensor:
            return
        value = value.item()
    if not value >= low or (below is not None and not value < below):
        allowed = f">= {low}" if below is None else f">= {low} and < {below}"
        raise ValueError(f"{op}: {name} must be {allowed}, got {value}")


def check_lists(op: str, **lists: Sequence[Tensor]) -> None:
    """Raise ValueError unless the lists match in length and shapes, and all tensors are contiguous on one device."""
    (first_name, first), *others = lists.items()
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(f"{op}: {name} must have the length of {first_name}, {len(first)}, got {len(tensors)}")
    for name, tensors in lists.items():
        for i, (tensor, model) in enumerate(zip(tensors, first, strict=True)):
            if tensor.shape != model.shape:
                raise ValueError(
                    f"{op}: {name}[{i}] must have shape {tuple(model.shape)} like {first_name}[{i}], "
                    f"got {tuple(tensor.shape)}"
                )
            if tensor.device != first[0].device:
                raise ValueError(
                    f"{op}: {name}[{i}] must be on {first[0].device} like {first_name}[0], got {tensor.device}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{op}: {name}[{i}] must be contiguous, got strides {tensor.stride()}")


def check_list_dtypes(op: str, dtype: torch.dtype, **lists: Sequence[Tensor]) -> None:
    """Raise TypeError unless all tensors of the lists are of `dtype`."""
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if tensor.dtype != dtype:
                raise TypeError(f"{op}: {name}[{i}] must be {dtype}, got {tensor.dtype}")


def check_one_shape(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless there is at least one tensor and all have one shape."""
    if not tensors:
        raise ValueError(f"{op}: {name} must hold at least one tensor, got none")
    for i, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"{op}: {name}[{i}] must have shape {tuple(tensors[0].shape)} like {name}[0], got {tuple(tensor.shape)}"
            )


def check_copies(op: str, params: Sequence[Tensor], copies: Sequence[Tensor] | None) -> None:
    """Raise ValueError or TypeError unless there are no copies, or params are float32 and copies alike in bfloat16."""
    if not copies:
        return
    if params[0].dtype != torch.float32:
        raise TypeError(f"{op}: copies must be None unless params are torch.float32, got {params[0].dtype} params")
    check_lists(op, params=params, copies=copies)
    check_list_dtypes(op, torch.bfloat16, copies=copies)
