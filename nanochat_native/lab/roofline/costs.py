"""The cost of one call of an operator on a GPU: its launches, and the bytes and floating-point operations of each.

An operator of torch is one launch. An operator of this package has the launches of its implementation in
python/ops_cuda.cpp and csrc/cuda. A launch reads each distinct tensor once and writes each result once, as if every
cache were perfect. Only matrix products count as floating-point operations.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from nanochat_native.ops import backends

OURS = "nanochat_native::"
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::baddbmm_")
# Products that no rule counts. The model uses none of them; one that it came to use would be counted as nothing.
UNCOUNTED_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        *("matmul", "linear", "linear_backward", "matmul_backward", "einsum", "bilinear", "_trilinear", "tensordot"),
        *("mv", "addmv", "addmv_", "dot", "vdot", "inner", "outer", "ger", "addr", "addr_", "chain_matmul"),
        *("addbmm", "addbmm_", "_addmm_activation", "_int_mm", "_scaled_mm", "_scaled_mm_v2", "_grouped_mm"),
        *("_scaled_grouped_mm", "_scaled_grouped_mm_v2", "_weight_int8pack_mm", "_weight_int4pack_mm"),
        *("convolution", "_convolution", "convolution_overrideable", "convolution_backward", "cudnn_convolution"),
        *("_slow_conv2d_forward", "_slow_conv2d_backward", "_cdist_forward", "_efficient_attention_forward"),
        *("_efficient_attention_backward", "_flash_attention_forward", "_flash_attention_backward"),
        *(f"_scaled_dot_product_{kind}_attention" for kind in ("efficient", "flash", "cudnn")),
        *(f"_scaled_dot_product_{kind}_attention_backward" for kind in ("efficient", "flash", "cudnn")),
        *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
        *("_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable"),
        *("_cudnn_attention_forward", "_cudnn_attention_backward", "_sparse_mm", "linalg_vecdot", "mkldnn_linear"),
    )
)
LOSS = ("linear_cross_entropy",)
ATTENTION = ("attention_forward", "attention_backward")
LINEAR = ("linear", "linear_backward")


class Launch(NamedTuple):
    """One kernel: floating-point operations, and bytes read and written."""

    flops: int = 0
    read: int = 0
    written: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Access(NamedTuple):
    """A part of a storage that an operator reads or writes.

    first and last: the places of its elements, in bytes. strides: the strides and sizes of its dimensions.
    """

    storage: int
    first: int
    last: int
    strides: tuple[tuple[int, int], ...]
    bytes: int


@dataclass(frozen=True)
class Call:
    """One call of an operator: its arguments by the names in its schema, and its results."""

    operator: Any
    arguments: dict[str, Any]
    results: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        """The name with its namespace and without its overload: "aten::mm"."""
        return str(self.operator._schema.name)

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    def tensors(self, argument: str) -> list[Tensor]:
        return list(tensors_in(self.arguments.get(argument)))

    @functools.cached_property
    def reads(self) -> dict[Access, None]:
        """The parts of storages that the call reads, each once."""
        found = []
        for argument in self.operator._schema.arguments:
            if not _is_overwritten(self.name, argument):
                found += self.tensors(argument.name)
        if self.name in GATHERS:
            table, places = GATHERS[self.name]
            rows = min(self[places].numel(), self[table].size(0))
            whole = [access_of(t) for t in found if t is not self[table]]
            row = access_of(self[table])._replace(bytes=rows * self[table].size(1) * self[table].element_size())
            return dict.fromkeys([*whole, row])
        return dict.fromkeys(access_of(tensor) for tensor in found)

    @functools.cached_property
    def writes(self) -> dict[Access, None]:
        """The parts of storages that the call writes: its results and the arguments that it changes."""
        found = list(self.results)
        for argument in self.operator._schema.arguments:
            if is_written(argument):
                found += self.tensors(argument.name)
        return dict.fromkeys(access_of(tensor) for tensor in found)

    @property
    def one_pass(self) -> Launch:
        """One launch that reads what the call reads and writes what it writes."""
        return Launch(0, sum(a.bytes for a in self.reads), sum(a.bytes for a in self.writes))


# Arguments that are written without being read; every `out` and `copies` too.
OVERWRITTEN = {("aten::copy_", "self"), ("aten::zero_", "self"), ("aten::fill_", "self")}
# Operators that read only some rows of a table: the table and the row numbers.
GATHERS = {
    "aten::embedding": ("weight", "indices"),
    f"{OURS}embedding_rms_norm": ("table", "tokens"),
    f"{OURS}add_value_embedding": ("table", "ids"),
    f"{OURS}add_value_embedding_backward": ("table", "ids"),
}


def is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _is_overwritten(name: str, argument: Any) -> bool:
    given_out = argument.is_out or argument.name == "copies"
    return is_written(argument) and (given_out or (name, argument.name) in OVERWRITTEN)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an argument or a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def bytes_of(*tensors: Tensor) -> int:
    """Return the bytes of tensors. An element that expand() repeats counts once."""
    total = 0
    for tensor in tensors:
        sizes = [n if stride else min(n, 1) for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        total += math.prod(sizes) * tensor.element_size()
    return total


def access_of(tensor: Tensor) -> Access:
    """Return the part of its storage that a tensor covers."""
    size = tensor.element_size()
    dimensions = zip(tensor.shape, tensor.stride(), strict=True)
    strides = tuple(sorted((size * stride, n) for n, stride in dimensions if n > 1 and stride))
    first = size * int(tensor.storage_offset())
    last = first + sum(stride * (n - 1) for stride, n in strides)
    return Access(tensor.untyped_storage()._cdata, first, last, strides, bytes_of(tensor))


# --- operators of torch ---

# Calls without a kernel: they allocate, or only describe tensors. Views are found by their schema.
FREE = {
    f"aten::{name}"
    for name in (
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "_unsafe_view",
        "is_same_size",
        "promote_types",
    )
}


def is_free(call: Call) -> bool:
    """Return whether a call needs no kernel: it returns a view, allocates, or has no tensor on the device."""
    schema = call.operator._schema
    if schema.name in FREE:
        return True
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return True
    given = [t for value in call.arguments.values() for t in tensors_in(value)]
    return all(tensor.device.type == "cpu" for tensor in (*given, *call.results))


def _factors(call: Call) -> tuple[Tensor, Tensor]:
    names = {"aten::mm": ("self", "mat2"), "aten::bmm": ("self", "mat2")}
    a, b = names.get(call.name, ("mat1", "mat2") if "addmm" in call.name else ("batch1", "batch2"))
    return call[a], call[b]


def _product(call: Call) -> list[Launch]:
    a, b = _factors(call)
    return [call.one_pass._replace(flops=2 * a.numel() * b.size(-1))]


# --- operators of this package ---


@functools.cache
def visible_pairs(Tq: int, Tk: int, causal: bool, window: int) -> int:
    """Return the number of pairs of a query and a key that it sees, by the rules of ops.attention; window -1: none."""
    if not causal and window < 0:
        return Tq * Tk
    pairs = 0
    for newest in range(Tk - Tq, Tk):
        first = max(0, newest - window) if window >= 0 else 0
        pairs += max(0, newest + 1 - first)
    return pairs


def _attention_pairs(call: Call) -> int:
    """Return the visible pairs, times the channels of a head, over all heads and sequences."""
    q, k = call["q"], call["k"]
    B, Tq, H, D = q.shape
    return B * H * D * visible_pairs(Tq, k.size(1), bool(call["causal"]), int(call["window"]))


def _attention_forward(call: Call) -> list[Launch]:
    return [call.one_pass._replace(flops=4 * _attention_pairs(call))]  # q k^T, weights v


def _attention_backward(call: Call) -> list[Launch]:
    """On Hopper three kernels: the numbers of each row, then five products, of which dq is summed in float32, then dq.

    Other GPUs take seven products in two kernels.
    """
    dout, q, k, v, out, lse = (call[name] for name in ("dout", "q", "k", "v", "out", "lse"))
    dq, dk, dv = call.results
    numbers = 2 * 4 * lse.numel()
    sums = 4 * dq.numel()
    return [
        Launch(0, bytes_of(out, dout, lse), numbers),
        Launch(10 * _attention_pairs(call), bytes_of(q, k, v, dout) + numbers, bytes_of(dk, dv) + sums),
        Launch(0, sums, bytes_of(dq)),
    ]


def _linear(call: Call) -> list[Launch]:
    return [call.one_pass._replace(flops=2 * call["x"].numel() * call["weight"].size(0))]


def _linear_backward(call: Call) -> list[Launch]:
    dy, x, weight = call["dy"], call["x"], call["weight"]
    dx, dweight = call.results
    flops = 2 * dy.numel() * x.size(1)
    found = []
    if call["needs_grad_x"]:
        found.append(Launch(flops, bytes_of(dy, weight), bytes_of(dx)))
    if call["needs_grad_weight"]:
        found.append(Launch(flops, bytes_of(dy, x), bytes_of(dweight)))
    return found


ROW_TILE = 128  # kRowTile of python/ops_cuda.cpp


def logit_rows(N: int, row_bytes: int) -> int:
    """Return the rows of logits that linear_cross_entropy holds at a time: chunk_rows of python/ops_cuda.cpp."""
    most = max(1, backends.logit_bytes() // row_bytes)
    even = math.ceil(N / math.ceil(N / most)) if N else 0
    return min(most, math.ceil(even / ROW_TILE) * ROW_TILE)


def _linear_cross_entropy(call: Call) -> list[Launch]:
    """Per chunk of rows up to three products and the kernel between them; small launches for the mean."""
    x, weight = call["x"], call["weight"]
    (N, C), V, size = x.shape, weight.size(0), x.element_size()
    for_x, for_weight, mean = call["needs_grad_x"], call["needs_grad_weight"], call["reduction"] == "mean"
    gradients = for_x or for_weight
    found = []
    if mean:
        found += [Launch(0, 8 * N, N), Launch(0, N, 8)]  # targets != ignore_index, and their number
    if gradients:
        found += [Launch(0, 8, 4), Launch(0, 4, 4)] if mean else [Launch(0, 0, 4)]
    rows = logit_rows(N, V * size)
    chunks = [min(rows, N - first) for first in range(0, N, rows)] if N else []
    sum_size = 4 if len(chunks) > 1 else size
    for index, own in enumerate(chunks):
        flops, logits, part = 2 * own * C * V, own * V * size, own * C * size
        found.append(Launch(flops, part + bytes_of(weight), logits))
        found.append(Launch(0, logits + 8 * own, (logits if gradients else 0) + 4 * own))
        if for_x:
            found.append(Launch(flops, logits + bytes_of(weight), part))
        if for_weight:
            sums = V * C * sum_size
            found.append(Launch(flops, logits + part + (sums if index else 0), sums))
    if for_weight and sum_size != size:
        found.append(Launch(0, V * C * sum_size, V * C * size))
    if call["reduction"] != "none":
        found.append(Launch(0, 4 * N, 8))
        found += [Launch(0, 16, 8)] if mean else []
        found.append(Launch(0, 8, 4))
    return found


TILE, MOST_MATRICES, LEAST_GRAM, MOST_GROWTH = 128, 512, 64, 150.0  # of csrc/cuda/newton_schulz*.cuh
FEW_MATRICES, MANY_MATRICES = 128, 2000  # kFewMatrices and kManyMatrices of csrc/cuda/muon.cu
MANY_NORMUON_MATRICES = 1300  # kManyMatrices of csrc/cuda/normuon.cu
FEW_TENSORS, MANY_TENSORS = 64, 620  # kFewTensors and kManyTensors of csrc/cuda/adamw.cu


def _parts(count: int, most: int) -> Iterator[slice]:
    """Yield the slices of a list of `count` entries that have at most `most` entries each."""
    for first in range(0, count, most):
        yield slice(first, min(count, first + most))


def _tiles(size: int) -> int:
    return math.ceil(size / TILE)


def restart_schedule(triples: Sequence[Sequence[float]], gram: bool) -> list[int]:
    """Return the steps that Newton-Schulz takes on each Gram matrix: restart_schedule of newton_schulz_plan.cuh."""
    phases: list[int] = []
    step = 0
    while step < len(triples):
        most = 1 if not gram else 3 if step == 0 else 2
        length, growth = 0, 1.0
        while length < most and step < len(triples):
            growth *= abs(triples[step][0])
            if length > 0 and growth > MOST_GROWTH:
                break
            length, step = length + 1, step + 1
        phases.append(length)
    return phases


def _cost_in_tiles(M: int, K: int, phases: Sequence[int]) -> float:
    R, L = min(M, K), max(M, K)
    half = _tiles(R) * (_tiles(R) + 1) / 2
    return sum(half * (L + (n + 3 * (n - 1)) * R) + _tiles(R) * _tiles(L) * R for n in phases)


def newton_schulz_phases(M: int, K: int, triples: Sequence[Sequence[float]]) -> list[int]:
    """Return the schedule of the form, plain or Gram, that the CUDA implementation chooses for M x K matrices."""
    plain, gram = restart_schedule(triples, False), restart_schedule(triples, True)
    pays = _cost_in_tiles(M, K, gram) < _cost_in_tiles(M, K, plain)
    return gram if pays and min(M, K) >= LEAST_GRAM else plain


def _orthogonalise(g: Tensor, call: Call, last_read: int, last_written: int) -> list[Launch]:
    """Return the launches of Newton-Schulz on g (..., M, K).

    last_read, last_written: the bytes for each matrix that the last product reads beside its factors, and writes.
    """
    M, K = g.shape[-2:]
    if g.numel() == 0:
        return []
    numbers, known = call["coefficients"], call.arguments.get("norms") is not None
    phases = newton_schulz_phases(M, K, [numbers[i : i + 3] for i in range(0, len(numbers), 3)])
    R, L = min(M, K), max(M, K)
    half = _tiles(R) * (_tiles(R) + 1) // 2 * TILE**2  # elements of the tiles that hold the lower half
    x, square = 2 * M * K, 2 * R * R
    found = []
    batch = g.numel() // (M * K)
    for place in _parts(batch, MOST_MATRICES):
        n = place.stop - place.start

        def symmetric(depth: int, read: int, n: int = n) -> Launch:
            return Launch(n * 2 * half * depth, n * read, n * square)

        found += [] if known else [Launch(0, n * 4 * M * K, n * 8)]
        found.append(Launch(0, n * (4 * M * K + 8), n * x))
        for phase, length in enumerate(phases):
            found += [symmetric(L, x), symmetric(R, square)]  # G = X X^T; Z or P = b G + c G G
            for _ in range(1, length):
                # Y = G P + a G; G = P Y + a Y; Z = b G + c G G; P = P Z + a P + s Z
                found += [symmetric(R, 2 * square), symmetric(R, 2 * square), symmetric(R, square)]
                found.append(symmetric(R, 2 * square))
            last = phase + 1 == len(phases)
            flops = 2 * _tiles(R) * _tiles(L) * TILE**2 * R
            read, written = (last_read, last_written) if last else (0, x)
            found.append(Launch(n * flops, n * (square + x + read), n * written))
    return found


def _newton_schulz(call: Call) -> list[Launch]:
    g = call["g"]
    return _orthogonalise(g, call, 0, 4 * math.prod(g.shape[-2:]))


def _newton_schulz_update(call: Call) -> list[Launch]:
    params, copies = call.tensors("params"), call.tensors("copies")
    matrices = call["update"].numel() // math.prod(call["update"].shape[-2:]) if call["update"].numel() else 1
    read, written = bytes_of(*params), bytes_of(*params, *copies)
    return _orthogonalise(call["update"], call, read // matrices, written // matrices)


def _lists(call: Call, few: int, many: int, read: Sequence[str], written: Sequence[str], **new: Tensor) -> list[Launch]:
    """Return the launches of a kernel on lists of tensors, of which one launch takes at most `few`, or else `many`.

    new: results by the names that `written` uses; like the lists, they have an entry for each tensor.
    """
    values = {**call.arguments, **new}
    count = len(values[read[0]])
    found = []
    for place in _parts(count, few if count <= few else many):
        moved = [bytes_of(*tensors_in([values.get(name, [])[place] for name in names])) for names in (read, written)]
        found.append(Launch(0, *moved))
    return found


def _adamw(call: Call) -> list[Launch]:
    moments = ["exp_avgs", "exp_avg_sqs"]
    found = _lists(call, FEW_TENSORS, MANY_TENSORS, ["params", "grads", *moments], ["params", *moments, "copies"])
    if any(call.arguments.get(f"{name}_tensor") is not None for name in ("step", "lr", "weight_decay")):
        found.insert(0, Launch(0, 24, 24))
    return found


def _muon_momentum(call: Call) -> list[Launch]:
    update, norms = call.results
    lists = ["grads", "momentum_buffers"]
    found = _lists(call, FEW_MATRICES, MANY_MATRICES, lists, ["momentum_buffers", "update"], update=update)
    if call.arguments.get("with_row_norms"):
        narrow = bytes_of(norms) // 2  # in float32, and then converted
        return [*found, Launch(0, bytes_of(update), narrow), Launch(0, narrow, bytes_of(norms))]
    return found + ([Launch(0, bytes_of(norms), bytes_of(norms))] if call["with_norms"] else [])


def _muon_update(call: Call) -> list[Launch]:
    return _lists(call, FEW_MATRICES, MANY_MATRICES, ["params", "update"], ["params", "copies"])


def _normuon_update(call: Call) -> list[Launch]:
    """Return three launches for each list: the squares, the factors, and the update; the sums in between are few."""
    found: list[Launch] = []
    places = (FEW_MATRICES, MANY_NORMUON_MATRICES)
    squares = _lists(call, *places, ["update"], [])
    factors = _lists(call, *places, ["second_momentums"], ["second_momentums"])
    updates = _lists(call, *places, ["params", "update"], ["params", "copies"])
    for launches in zip(squares, factors, updates, strict=True):
        found += launches
    return found


def _one_pass(call: Call) -> list[Launch]:
    return [call.one_pass]


def _mix_rms_norm_backward(call: Call) -> list[Launch]:
    """Return a pass that leaves two numbers of each row, and the sum of these."""
    *streams, dx_scale, dx0_scale = call.results
    terms, sums = bytes_of(call["r"]) * 2, bytes_of(dx_scale, dx0_scale)
    return [Launch(0, call.one_pass.read, bytes_of(*streams) + terms), Launch(0, terms, sums)]


BLOCK_ROWS = 64  # kBlockRows of csrc/cuda/gate.cuh


def _gate_sums(rows: int, numbers: int, inputs: Tensor, weights: Tensor, dx: int) -> list[Launch]:
    """Return the two launches that sum up the gradients of gates over the rows, first within blocks of them.

    numbers: those that the pass before has written for each row. dx: the bytes of a gradient that the first writes.
    """
    partials = 4 * (weights.numel() + 1) * math.ceil(rows / BLOCK_ROWS)
    read = rows * weights.size(1) * inputs.element_size() + 4 * rows * numbers + (bytes_of(weights) if dx else 0)
    return [Launch(0, read, partials + dx), Launch(0, partials, bytes_of(weights))]


def _add_value_embedding_backward(call: Call) -> list[Launch]:
    """The pass over dout and the rows of the table, which writes a number for each head, and the sums."""
    dh, _, drows = call.results
    rows, heads = call["ids"].numel(), call["gate"].size(0)
    read = sum(access.bytes for access in call.reads)
    first = Launch(0, read, bytes_of(drows) + 4 * rows * heads)
    return [first, *_gate_sums(rows, heads, call["h"], call["gate"], bytes_of(dh))]


def _smear_backward(call: Call) -> list[Launch]:
    """The pass over dout and x, which writes two numbers for each token, and the sums."""
    dx, _, dlambda = call.results
    x, rows = call["x"], call["x"].size(0) * call["x"].size(1)
    first = Launch(0, sum(access.bytes for access in call.reads), bytes_of(dx) + 8 * rows)
    partial, total = _gate_sums(rows, 2, x, call["gate"], 0)
    return [first, partial, total._replace(written=total.written + bytes_of(dlambda))]


# Every operator of this package that training calls. Another one is an error: it would be counted as nothing.
RULES: dict[str, Callable[[Call], list[Launch]]] = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "linear": _linear,
    "linear_backward": _linear_backward,
    "linear_cross_entropy": _linear_cross_entropy,
    "newton_schulz": _newton_schulz,
    "newton_schulz_update_": _newton_schulz_update,
    "adamw_": _adamw,
    "muon_momentum_": _muon_momentum,
    "muon_update_": _muon_update,
    "normuon_update_": _normuon_update,
    "rms_norm": _one_pass,
    "rms_norm_backward": _one_pass,
    "embedding_rms_norm": _one_pass,
    "mix_rms_norm": _one_pass,
    "mix_rms_norm_backward": _mix_rms_norm_backward,
    "add_value_embedding": _one_pass,
    "add_value_embedding_backward": _add_value_embedding_backward,
    "smear": _one_pass,
    "smear_backward": _smear_backward,
    "rotary_norm": _one_pass,
    "rotary_norm_backward": _one_pass,
    "relu_squared": _one_pass,
    "relu_squared_": _one_pass,
    "relu_squared_backward": _one_pass,
    "relu_squared_backward_": _one_pass,
}


def launches_of(call: Call) -> list[Launch]:
    """Return the launches of a call.

    Raises:
        ValueError: The operator has no rule, and is one of this package or a product of torch.
    """
    if call.name.startswith(OURS):
        name = call.name.removeprefix(OURS)
        if name not in RULES:
            raise ValueError(f"the roofline has no rule for the operator {call.name}; costs.py must have one")
        return RULES[name](call)
    if call.name in UNCOUNTED_PRODUCTS:
        raise ValueError(f"the roofline has no rule for the product {call.name}; costs.py must have one")
    return _product(call) if call.name in PRODUCTS else [call.one_pass]


def group_of(name: str) -> str:
    """Return the group of an operator: "products", "attention", "loss" or "everything else"."""
    own = name.removeprefix(OURS) if name.startswith(OURS) else ""
    if name in PRODUCTS or own in LINEAR or own.startswith("newton_schulz"):
        return "products"
    return "attention" if own in ATTENTION else "loss" if own in LOSS else "everything else"


def model_flops(call: Call) -> int:
    """Return the operations of a call that the formula of PaLM counts: those of the launches, without recomputation.

    Attention's backward pass counts as twice its forward pass.
    """
    if call.name == f"{OURS}attention_backward":
        return 8 * _attention_pairs(call)
    return total(launches_of(call)).flops


def total(launches: Iterable[Launch]) -> Launch:
    """Return the sum of launches."""
    kept = list(launches)
    return Launch(sum(x.flops for x in kept), sum(x.read for x in kept), sum(x.written for x in kept))
