"""Compares every native operator with its reference, for `python -m nanochat_native.doctor`."""

import ctypes
import functools
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat_native import ops
from nanochat_native.ops import reference
from nanochat_native.ops.linear import native_linear
from nanochat_native.ops.quantization import quantize_rows
from nanochat_native.ops.relu_squared import native_linear_backward_relu_squared, native_linear_relu_squared


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Return whether kernels built for `architectures` ("8.0+PTX 9.0a") run on a GPU of this compute capability."""
    matches = [re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry) for entry in architectures.split()]
    built = {(int(match[1]), int(match[2])): bool(match[3]) for match in matches if match}
    older = [each for each in built if each <= capability]
    # setup.py keeps the PTX of the oldest entry, whichever has "+PTX".
    has_ptx = any(built.values()) and min(built) <= capability
    return has_ptx or any(major == capability[0] for major, _ in older)


def driver_problem(driver: tuple[int, int], runtime: tuple[int, int]) -> str:
    """Return why kernels with this CUDA runtime do not run on a driver for CUDA `driver`, and the fix, or "".

    A driver runs every runtime of its own major version and of older ones ("Minor Version Compatibility" in NVIDIA's
    CUDA Compatibility guide).
    """
    if driver[0] >= runtime[0]:
        return ""
    has = f"is for CUDA {driver[0]}.{driver[1]}" if driver[0] else "was not found"
    return (
        f"the GPU driver {has}, and the kernels were built with CUDA {runtime[0]}.{runtime[1]}: install a driver for "
        f"CUDA {runtime[0]}, or a CUDA toolkit that the driver runs, and then nanochat-native again"
    )


def openmp_libraries() -> set[str]:
    """Return the paths of the OpenMP libraries that this process has loaded. Each has its own threads."""
    if sys.platform == "darwin":
        dyld = ctypes.CDLL(None)
        dyld._dyld_get_image_name.restype = ctypes.c_char_p
        loaded = [os.fsdecode(dyld._dyld_get_image_name(index)) for index in range(dyld._dyld_image_count())]
    else:
        loaded = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return {path for path in loaded if re.search(r"/lib(gomp|i?omp)\d*\b[^/]*$", path)}


Results = Sequence[torch.Tensor]


def _attention() -> tuple[Results, Results]:
    q, k, v, dout = (torch.randn(2, 70, heads, 16) for heads in (4, 2, 2, 4))
    if q.is_cuda:  # the CUDA kernels take types of 16 bits
        q, k, v, dout = q.half(), k.half(), v.half(), dout.half()
    lengths = torch.tensor([70, 33])
    ours, theirs = (
        (
            *_with_gradients(functools.partial(attention, window=9), (q, k, v), dout),
            attention(q[:, :3], k, v, lengths=lengths),  # a step of generation
        )
        for attention in (ops.attention, reference.attention)
    )
    return ours, theirs


def _with_gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], dout: torch.Tensor
) -> Results:
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, dout))


def _rms_norm() -> tuple[Results, Results]:
    x, dout = torch.randn(9, 70), torch.randn(9, 70)
    ours, theirs = (_with_gradients(norm, (x,), dout) for norm in (ops.rms_norm, reference.rms_norm))
    return ours, theirs


def _add_rms_norm() -> tuple[Results, Results]:
    x, residual, dout = torch.randn(9, 70), torch.randn(9, 70), torch.randn(2, 9, 70)
    ours, theirs = (
        _with_gradients(lambda *inputs, norm=norm: torch.stack(norm(*inputs)), (x, residual), dout)
        for norm in (ops.add_rms_norm, reference.add_rms_norm)
    )
    return ours, theirs


def _embedding_rms_norm() -> tuple[Results, Results]:
    tokens, table, dout = torch.randint(0, 33, (20,)), torch.randn(33, 70), torch.randn(20, 70)
    ours, theirs = (
        _with_gradients(functools.partial(norm, tokens, dtype=torch.float32), (table,), dout)
        for norm in (ops.embedding_rms_norm, reference.embedding_rms_norm)
    )
    return ours, theirs


def _mix_rms_norm() -> tuple[Results, Results]:
    streams, scales, dout = torch.randn(3, 9, 70), torch.randn(2), torch.randn(4, 9, 70)
    ours, theirs = (
        _with_gradients(lambda *inputs, mix=mix: torch.stack(mix(*inputs)), (*streams, *scales), dout)
        for mix in (ops.mix_rms_norm, reference.mix_rms_norm)
    )
    return ours, theirs


def _value_embedding() -> tuple[Sequence[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return v, h, gate and table, the ids, and the gradient of the result."""
    inputs = torch.randn(20, 2, 35), torch.randn(20, 12), torch.randn(2, 12), torch.randn(33, 70)
    return inputs, torch.randint(0, 33, (20,)), torch.randn(20, 2, 35)


def _add_value_embedding() -> tuple[Results, Results]:
    inputs, ids, dout = _value_embedding()
    ours, theirs = (
        _with_gradients(lambda *inputs, add=add: add(*inputs, ids), inputs, dout)
        for add in (ops.add_value_embedding, reference.add_value_embedding)
    )
    return ours, theirs


def _add_value_embedding_backward() -> tuple[Results, Results]:
    (_, h, gate, table), ids, dout = _value_embedding()
    ours = ops.add_value_embedding_backward(dout, h, gate, table, ids)
    return ours, reference.add_value_embedding_backward(dout, h, gate, table, ids)


def _smear() -> tuple[Results, Results]:
    inputs, dout = (torch.randn(2, 9, 70), torch.randn(1, 24), torch.ones(1)), torch.randn(2, 9, 70)
    ours, theirs = (_with_gradients(smear, inputs, dout) for smear in (ops.smear, reference.smear))
    return ours, theirs


def _newton_schulz() -> tuple[Results, Results]:
    g = torch.randn(2, 400, 240)
    return [ops.newton_schulz(g)], [_newton_schulz_reference(g)]


def _newton_schulz_reference(g: torch.Tensor) -> torch.Tensor:
    """Return the reference in float32: on a GPU it would compute in bfloat16."""
    return reference.newton_schulz(g.cpu()).to(g.device)


def _adamw() -> tuple[Results, Results]:
    state = [[torch.randn(999)], [torch.randn(999)], [torch.randn(999)], [torch.rand(999)]]
    expected = [[tensor.clone() for tensor in tensors] for tensors in state]
    settings: dict[str, Any] = {"step": 3, "lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}
    ops.adamw_(*state, **settings)
    reference.adamw_(*expected, **settings)
    return [*itertools.chain(*state)], [*itertools.chain(*expected)]


def _muon_momentum() -> tuple[Results, Results]:
    grads, buffers = [torch.randn(33, 7)], [torch.randn(33, 7)]
    expected = [buffers[0].clone()]
    ours = ops.muon_momentum_(grads, buffers, momentum=0.9, return_norm=True)
    theirs = reference.muon_momentum_(grads, expected, momentum=0.9, return_norm=True)
    return (*ours, *buffers), (*theirs, *expected)


def _muon_update() -> tuple[Results, Results]:
    params, update = [torch.randn(33, 7)], torch.randn(1, 33, 7)
    expected = [params[0].clone()]
    ops.muon_update_(params, update, lr=0.1, weight_decay=0.1)
    reference.muon_update_(expected, update, lr=0.1, weight_decay=0.1)
    return params, expected


def _normuon_update() -> tuple[Results, Results]:
    """A tall and a wide matrix: their second momentum is that of rows and of columns."""
    ours, theirs = [], []
    for shape, lines in (((33, 7), (33, 1)), ((7, 33), (1, 33))):
        state = [torch.randn(shape), torch.rand(lines)]
        expected, update = [tensor.clone() for tensor in state], torch.randn(1, *shape)
        for call, (param, second) in ((ops.normuon_update_, state), (reference.normuon_update_, expected)):
            call([param], update, [second], lr=0.1, weight_decay=0.1, cautious=True, renormalise=True, norm_eps=1e-6)
        ours += state
        theirs += expected
    return ours, theirs


def _newton_schulz_update() -> tuple[Results, Results]:
    params, update = [torch.randn(133, 70)], torch.randn(1, 133, 70)
    expected = [params[0].clone()]
    ops.newton_schulz_update_(params, update, lr=1.0, weight_decay=0.1)
    reference.muon_update_(expected, _newton_schulz_reference(update), lr=1.0, weight_decay=0.1)
    return params, expected


def _linear_cross_entropy() -> tuple[Results, Results]:
    x, weight, targets = torch.randn(50, 24), torch.randn(99, 24), torch.randint(0, 99, (50,))
    ours, theirs = (
        _with_gradients(functools.partial(loss, targets=targets), (x, weight), torch.tensor(1.0))
        for loss in (ops.linear_cross_entropy, reference.linear_cross_entropy)
    )
    return ours, theirs


def _linear_with_gradients() -> tuple[Results, Results]:
    """Return the results of the kernel, whichever product `linear` uses on this processor."""
    x, weight, dout = torch.randn(70, 24), torch.randn(33, 24), torch.randn(70, 33)
    ours, theirs = (_with_gradients(linear, (x, weight), dout) for linear in (native_linear, reference.linear))
    return ours, theirs


def _linear() -> tuple[Results, Results]:
    ours, theirs = _linear_with_gradients()
    return ours[:1], theirs[:1]


def _linear_backward() -> tuple[Results, Results]:
    ours, theirs = _linear_with_gradients()
    return ours[1:], theirs[1:]


def _cached_forward() -> tuple[Results, Results]:
    C, V, D = 32, 50, 16
    wte, lm_head = torch.randn(V, C), torch.randn(V, C)
    shapes = ((C, C), (D, C), (D, C), (C, C), (2 * C, C), (C, 2 * C))
    blocks = [torch.randn(shape) * shape[1] ** -0.5 for shape in 2 * shapes]
    angles = torch.rand(9, D // 2)
    cache = torch.randn(2, 3, 9, 2, D)
    settings: dict[str, Any] = {
        "wte": wte,
        "blocks": blocks,
        "lm_head": lm_head,
        "windows": [2, None],
        "cos": torch.cat((angles, angles), -1).cos(),
        "sin": angles.sin(),
        "softcap": 15.0,
    }
    parts = {
        "qk_scale": 1.2,
        "value_gates": [None, torch.randn(1, 12)],
        "value_tables": [None, torch.randn(V, D)],
        "resid_lambdas": torch.rand(2),
        "x0_lambdas": torch.rand(2),
        "smear_gate": torch.randn(1, 24),
        "smear_lambda": torch.ones(1),
        "previous": [-1, 7],
        "backout_lambda": torch.rand(1),
    }
    pairs = [quantize_rows(matrix) for matrix in (*blocks, lm_head)]
    codes, scales = [own for own, _ in pairs], [own for _, own in pairs]
    small = {"blocks": codes[:-1], "lm_head": codes[-1], "scales": scales}
    tokens, ours, theirs = torch.randint(0, V, (2, 4)), list[torch.Tensor](), list[torch.Tensor]()
    for arguments in (settings, settings | parts, settings | parts | small):
        for run, results in ((ops.cached_forward_, ours), (reference.cached_forward_, theirs)):
            own = cache.clone()
            results += [run(tokens, [2, 0], [0, 5], cache=own, **arguments), own]
    return tuple(ours), tuple(theirs)


def _rotary_norm() -> tuple[Results, Results]:
    q, k, dq, dk = (torch.randn(2, 7, heads, 20) for heads in (4, 2, 4, 2))
    angles = torch.rand(7, 10)

    def with_gradients(operator: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Results:
        inputs = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        out = operator(*inputs, angles.cos(), angles.sin(), scale=1.2)
        return (*(x.detach() for x in out), *torch.autograd.grad(out, inputs, (dq, dk)))

    return with_gradients(ops.rotary_norm), with_gradients(reference.rotary_norm)


def _relu_squared() -> tuple[Results, Results]:
    x, dout = torch.randn(999), torch.randn(999)
    ours, theirs = (_with_gradients(function, (x,), dout) for function in (ops.relu_squared, reference.relu_squared))
    return ours, theirs


def _relu_squared_in_place() -> tuple[Results, Results]:
    x = torch.randn(999)
    expected = reference.relu_squared(x)
    ops.relu_squared_(x)
    return [x], [expected]


def _relu_squared_backward_in_place() -> tuple[Results, Results]:
    dy, y = torch.randn(999), torch.randn(999).square()
    expected = reference.relu_squared_backward(dy, y)
    ops.relu_squared_backward_(dy, y)
    return [dy], [expected]


def _linear_relu_squared() -> tuple[Results, Results]:
    """Return the results of the kernel, whichever product `linear` uses on this processor."""
    x, weight = torch.randn(70, 24), torch.randn(33, 24)
    return [native_linear_relu_squared(x, weight)], [reference.linear_relu_squared(x, weight)]


def _linear_backward_relu_squared() -> tuple[Results, Results]:
    dy, x, weight = torch.randn(70, 33), reference.relu_squared(torch.randn(70, 24)), torch.randn(33, 24)
    return native_linear_backward_relu_squared(dy, x, weight), reference.linear_backward_relu_squared(dy, x, weight)


def difference(ours: Results, theirs: Results) -> float:
    """Return the largest difference relative to the reference's largest number, or NaN if there is one."""
    offs = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True)]
    return math.nan if any(map(math.isnan, offs)) else max(offs)


# The results of a kernel and of its reference: values, tensors updated in place, and gradients.
CHECKS: dict[str, Callable[[], tuple[Results, Results]]] = {
    "attention": _attention,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "embedding_rms_norm": _embedding_rms_norm,
    "mix_rms_norm": _mix_rms_norm,
    "add_value_embedding": _add_value_embedding,
    "add_value_embedding_backward": _add_value_embedding_backward,
    "smear": _smear,
    "newton_schulz": _newton_schulz,
    "adamw_": _adamw,
    "muon_momentum_": _muon_momentum,
    "muon_update_": _muon_update,
    "normuon_update_": _normuon_update,
    "newton_schulz_update_": _newton_schulz_update,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear": _linear,
    "linear_backward": _linear_backward,
    "cached_forward_": _cached_forward,
    "rotary_norm": _rotary_norm,
    "relu_squared": _relu_squared,
    "relu_squared_": _relu_squared_in_place,
    "relu_squared_backward_": _relu_squared_backward_in_place,
    "linear_relu_squared": _linear_relu_squared,
    "linear_backward_relu_squared": _linear_backward_relu_squared,
}
# Kernels in float32 differ by 1e-6, and those with products of 16 bits by 1e-3. newton_schulz on CUDA has fifteen such
# products in a row: rounded to float16 they differ by 5e-3, and in bfloat16 they would by 4e-2, whatever the seed.
TOLERANCE = 1e-2
