"""Value embeddings: gated rows of a table, added to the values of attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_native.ops import backends, checks, modes, schema
from nanochat_native.ops.dtypes import compute_dtype, dtypes_on, no_cuda_kernel

GATE_SCALE = 3.0  # a gate is this times its sigmoid
MOST_GATE_INPUTS = 64  # kMostGateInputs of csrc/kernels.h


def add_value_embedding(v: Tensor, h: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Return v + 3 sigmoid(gate . h) table[ids], for each head of v. Differentiable, except for the ids.

    For token n and head g:
        out[n, g] = v[n, g] + 3 sigmoid(gate[g] . h[n]) table[ids[n], g]
    computed in float32, or in float64 if v is, and rounded once. This is nanochat's form of the value residual of
    ResFormer, arXiv:2410.17897.

    Args:
        v: (..., Hkv, D), Hkv and D at least 1. float32, float64 or bfloat16; on a GPU also float16.
        h: (..., I) with v's dtype, I from 1 to 64: the channels that the gates read, which may be a part of wider rows.
        gate: (Hkv, I) float32, or float64 if v is.
        table: (V, Hkv D) with v's dtype, or float32.
        ids: (...) int64, in [0, V).

    Returns:
        The shape and dtype of v, contiguous. The gradient of the table has the table's dtype and is summed in it.

    Raises:
        ValueError, TypeError: An argument is wrong. On CUDA the range of the ids is not checked, because that would
            wait for the stream: an id out of range makes its row NaN, and adds nothing to the gradients of the others.

    The gradients need h, gate, table and ids, but neither v nor the result. The same inputs give the same bits,
    whatever the number of threads. Second derivatives, forward-mode AD and torch.func transforms run in plain torch,
    with a warning. So do float64 and float16 on a GPU.
    """
    op = "add_value_embedding"
    _check(op, "v", v, h, gate, table, ids)
    unsupported = modes.unsupported(modes.beyond_backward(v, h, gate, table)) or _no_kernel(v, table)
    if backends.runs_native(op, v, unsupported):
        return native_add_value_embedding(v, h, gate, table, ids)
    return reference_add_value_embedding(v, h, gate, table, ids)


def add_value_embedding_backward(
    dout: Tensor, h: Tensor, gate: Tensor, table: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of add_value_embedding for h, gate and table, for a backward pass written by hand.

    The gradient of v is dout. Differentiable in plain torch.

    Args:
        dout: (..., Hkv, D), the gradient of the result.
        h: (..., I), as add_value_embedding's.
        gate: (Hkv, I), likewise.
        table: (V, Hkv D), likewise.
        ids: (...), likewise.

    Returns:
        dh, dgate and dtable with the shapes and dtypes of h, gate and table.

    Raises:
        ValueError, TypeError: An argument is wrong.
    """
    op = "add_value_embedding_backward"
    _check(op, "dout", dout, h, gate, table, ids)
    unsupported = modes.unsupported(modes.derivative(dout, h, gate, table)) or _no_kernel(dout, table)
    if backends.runs_native(op, dout, unsupported):
        return native_add_value_embedding_backward(dout, h, gate, table, ids)
    return reference_add_value_embedding_backward(dout, h, gate, table, ids)


def _check(op: str, name: str, v: Tensor, h: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> None:
    if v.dim() < 2 or v.size(-1) < 1 or v.size(-2) < 1:
        raise ValueError(f"{op}: {name} must have shape (..., Hkv, D) with Hkv, D >= 1, got {tuple(v.shape)}")
    *leading, Hkv, D = v.shape
    checks.check_dtype(op, name, v, dtypes_on(v.device))
    checks.check_alike(op, name, v, h=h)
    if h.dim() < 1 or not 1 <= h.size(-1) <= MOST_GATE_INPUTS or list(h.shape[:-1]) != leading:
        shape = ", ".join([*map(str, leading), "I"])
        raise ValueError(f"{op}: h must have shape ({shape}) with I from 1 to {MOST_GATE_INPUTS}, got {tuple(h.shape)}")
    checks.check_dtype(op, "gate", gate, (compute_dtype(v.dtype),))
    checks.check_dtype(op, "table", table, (v.dtype, torch.float32))
    checks.check_dtype(op, "ids", ids, (torch.int64,))
    for other, tensor in (("gate", gate), ("table", table), ("ids", ids)):
        checks.check_device(op, other, tensor, v.device, name)
    if gate.shape != (Hkv, h.size(-1)):
        raise ValueError(f"{op}: gate must have shape (Hkv, I) = {(Hkv, h.size(-1))}, got {tuple(gate.shape)}")
    if table.dim() != 2 or table.size(0) < 1 or table.size(1) != Hkv * D:
        raise ValueError(f"{op}: table must have shape (V, {Hkv * D}) with V >= 1, got {tuple(table.shape)}")
    if list(ids.shape) != leading:
        raise ValueError(f"{op}: ids must have shape {tuple(leading)}, got {tuple(ids.shape)}")


def _no_kernel(v: Tensor, table: Tensor) -> str:
    return no_cuda_kernel(v.device, v.dtype, table.dtype)


# --- reference ---


def reference_add_value_embedding(v: Tensor, h: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Return what `add_value_embedding` returns."""
    checks.check_rows("add_value_embedding", "ids", ids, table.size(0))
    factors = GATE_SCALE * _sigmoids(h, gate).unsqueeze(-1)
    return (v.to(gate.dtype) + factors * _rows(table, ids, gate)).to(v.dtype)


def reference_add_value_embedding_backward(
    dout: Tensor, h: Tensor, gate: Tensor, table: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `add_value_embedding_backward` returns."""
    checks.check_rows("add_value_embedding_backward", "ids", ids, table.size(0))
    sigmoids, dout = _sigmoids(h, gate), dout.to(gate.dtype)
    dz = GATE_SCALE * sigmoids * (1 - sigmoids) * (dout * _rows(table, ids, gate)).sum(-1)
    dh = (dz.unsqueeze(-1) * gate).sum(-2).to(h.dtype)
    products = dz.unsqueeze(-1) * h.to(gate.dtype).unsqueeze(-2)
    dgate = products.reshape(ids.numel(), *gate.shape).sum(0)
    drows = (GATE_SCALE * sigmoids.unsqueeze(-1) * dout).to(table.dtype).reshape(*ids.shape, -1)
    return dh, dgate, _table_gradient(drows, ids, table)


def _sigmoids(h: Tensor, gate: Tensor) -> Tensor:
    return (h.to(gate.dtype).unsqueeze(-2) * gate).sum(-1).sigmoid()


def _rows(table: Tensor, ids: Tensor, gate: Tensor) -> Tensor:
    return F.embedding(ids, table).unflatten(-1, (gate.size(0), -1)).to(gate.dtype)


def _table_gradient(drows: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """Return the sums of the rows with equal ids, in the order of the rows."""
    V = table.size(0)
    if ids.device.type != "cpu":  # where the range is not checked; torch skips the id -1
        ids = ids.masked_fill((ids < 0) | (ids >= V), -1)
    return torch.ops.aten.embedding_dense_backward(drows, ids, V, -1, False)


# --- native ---


def native_add_value_embedding(v: Tensor, h: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Run the kernel."""
    out: Tensor = torch.ops.nanochat_native.add_value_embedding(v, h, gate, table, ids)
    return out


def native_add_value_embedding_backward(
    dout: Tensor, h: Tensor, gate: Tensor, table: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel, and torch's sum of the rows of the table."""
    return _run_backward(dout, h, gate, table, ids)


def _run_backward(dout: Tensor, h: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dh, dgate, drows = torch.ops.nanochat_native.add_value_embedding_backward(dout, h, gate, table, ids)
    return dh, dgate, _table_gradient(drows, ids, table)


def _fake(v: Tensor, h: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    return v.new_empty(v.shape)


def _backward_fake(dout: Tensor, h: Tensor, gate: Tensor, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    drows = table.new_empty((*ids.shape, table.size(1)))
    return h.new_empty(h.shape), gate.new_empty(gate.shape), drows


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    if mode := modes.beyond_first_derivative(dout):
        backends.warn_reference_runs("add_value_embedding", dout.device.type, modes.unsupported(mode))
        backward = reference_add_value_embedding_backward
    else:
        backward = _run_backward
    return dout, *backward(dout, *ctx.saved_tensors), None


schema.register("add_value_embedding", _fake, _gradient, _setup_context)
schema.register("add_value_embedding_backward", _backward_fake)
