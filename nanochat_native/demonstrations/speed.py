"""Speed: work and traffic of the operators, one product from loop to registers, and layouts of tensor cores."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat_native.model.config import GPTConfig
from nanochat_native.model.flops import flops_per_token
from nanochat_native.runtime.errors import ConfigError

# --- work and traffic ---

FLOAT = 4  # bytes


def newton_schulz_work(rows: int, columns: int, steps: int = 5) -> dict[str, float]:
    """Count the operations of Newton-Schulz on a float32 matrix, in the forms that csrc/cpu/newton_schulz.cpp has.

    With the small side R and the large side L: a symmetric product computes one half. The plain form takes
    2 L R^2 / 2 for the Gram matrix, R^3 for its square, and 2 L R^2 for the update, in each step. The Gram form takes
    3 L R^2 in all and 17 R^3 on the small side for five steps, in float64, which costs twice as much.
    """
    large, small = max(rows, columns), min(rows, columns)
    whole = steps * (4.0 * large * small**2 + 2.0 * small**3)
    plain = steps * (3.0 * large * small**2 + small**3)
    products = 1 + 4 * (steps - 1)  # of the small side
    gram = 2 * (3.0 * large * small**2 + products * small**3)
    return {"whole_products": whole, "plain": plain, "gram": gram, "used": gram if large >= 4 * small else plain}


def attention_work(
    batch: int, length: int, heads: int, size: int, window: int | None, element: int
) -> tuple[float, float]:
    """Return (operations, bytes) of causal attention, forward and backward: two and five products of the visible pairs.

    The bytes are those of reading q, k, v, dout and out and writing out, dq, dk, dv once in each pass, with the
    log-sum-exp of each query.
    """
    span = length if window is None else window + 1
    pairs = sum(min(span, query + 1) for query in range(length))
    rows = batch * length * heads
    return 14.0 * batch * heads * size * pairs, 12.0 * element * rows * size + 2.0 * FLOAT * rows


def operators() -> dict[str, Any]:
    """Count the operations and the least bytes of each operator in the benchmark, by formulas.

    Williams et al. 2009, "Roofline: an insightful visual performance model": the intensity is operations per byte. The
    operations are those that the kernel makes. The bytes are those of the arguments and the results, each once.
    """
    rows: list[dict[str, Any]] = []

    def add(group: str, case: str, kind: str, work: float, moved: float) -> None:
        rows.append(
            {"group": group, "case": case, "kind": kind, "operations": work, "bytes": moved, "intensity": work / moved}
        )

    for length, window, dtype in (
        (512, None, "float32"),
        (1024, None, "float32"),
        (2048, None, "float32"),
        (1024, 256, "float32"),
        (2048, 512, "float32"),
        (1024, None, "bfloat16"),
    ):
        name = f"T {length}" + ("" if window is None else f" window {window}") + f" {dtype}"
        element = FLOAT if dtype == "float32" else 2
        add("attention fwd+bwd", name, "attention", *attention_work(4, length, 6, 64, window, element))
    for matrix in ((768, 768), (3072, 768)):
        work = newton_schulz_work(*matrix)["used"]
        add(
            "newton_schulz, 5 steps",
            f"{matrix[0]}x{matrix[1]}",
            "newton_schulz",
            work,
            2.0 * FLOAT * matrix[0] * matrix[1],
        )
    sets = {
        "d4's 24 matrices": [(16, 256, 256), (4, 1024, 256), (4, 256, 1024)],
        "a layer of d12": [(4, 768, 768), (1, 3072, 768), (1, 768, 3072)],
    }
    for name, shapes in sets.items():
        work = sum(count * newton_schulz_work(m, n)["used"] for count, m, n in shapes)
        elements = sum(count * m * n for count, m, n in shapes)
        # The gradient is read; momentum and weights are read and written.
        add("Muon step", f"{name}, torch.mm", "Muon", work, 5.0 * FLOAT * elements)
    for parameter, moment in ((4, 4), (2, 2), (2, 4)):
        types = {4: "float32", 2: "bfloat16"}
        name = f"50M {types[parameter]}, moments {types[moment]}"
        add("adamw_", name, "AdamW", 14 * 50e6, 50e6 * (3 * parameter + 4 * moment))
    N, inputs, outputs = 4096, 256, 1024
    moved = FLOAT * (3.0 * N * inputs + 3.0 * outputs * inputs + 2.0 * N * outputs)
    add("linear fwd+bwd", f"{N} x {inputs} -> {outputs} float32", "linear", 6.0 * N * inputs * outputs, moved)
    for vocabulary in (8192, 32768):
        work, moved = 6.0 * 4096 * 256 * vocabulary, 2.0 * FLOAT * 256 * (4096 + vocabulary)
        add("linear_cross_entropy", f"N 4096 C 256 V {vocabulary}", "loss", work, moved)
    for depth, batch in ((4, 1), (5, 1), (6, 1), (4, 8), (6, 8)):
        width = 64 * depth
        weights = depth * 12.0 * width**2 + 8192.0 * width
        name = f"d{depth} V 8192 batch {batch} prompt 32 new 128"
        add("generation", name, "generation", 2 * batch * weights, FLOAT * weights)
    return {"rows": rows}


def gram_form() -> dict[str, Any]:
    """Compare the work of the plain form of Newton-Schulz with that of the Gram form in float64, by aspect ratio.

    In units of R^3, where R is the small side, in operations of float32: one of float64 counts twice.
    """
    found = {}
    for aspect in (1, 2, 3, 4, 6, 8):
        work = newton_schulz_work(aspect, 1)
        found[str(aspect)] = {
            "plain": work["plain"],
            "gram": work["gram"],
            "gram_over_plain": work["gram"] / work["plain"],
        }
    return found | {"equal_at": (2 * 17 - 5) / (5 * 3 - 2 * 3)}


def attention_share() -> dict[str, Any]:
    """Compare the products with weights and the scores of a block: 24 d^2 and 4 d T operations for each token, forward.

    Both are equal at T = 6 d. A causal model that skips hidden scores needs half of them.
    """
    rows = []
    for depth in (4, 12, 20):
        width = 64 * depth
        for length in (256, 2048, 6 * width):
            config = GPTConfig.from_depth(depth, vocab_size=8192, sequence_len=length)
            blocks = config.n_layer * 12 * width**2
            whole = flops_per_token(config, blocks + config.vocab_size * width)  # no head
            rows.append({"depth": depth, "T": length, "share": 1 - 6 * blocks / whole})
    return {"rows": rows, "d4_256": rows[0]["share"], "d4_2048": rows[1]["share"], "d20_2048": rows[7]["share"]}


def update_share() -> dict[str, Any]:
    """Count what one step of the optimizers of a d4 takes: operations of Muon, bytes of AdamW."""
    width, depth, vocabulary = 256, 4, 8192
    work = 4 * newton_schulz_work(width, width)["used"] + 2 * newton_schulz_work(4 * width, width)["used"]
    parameters = depth * 12 * width**2 + vocabulary * width
    tokens = 4096
    step = 6.0 * parameters * tokens
    return {
        "muon_operations": depth * work,
        "step_operations": step,
        "muon_over_step": depth * work / step,
        "adamw_bytes": 28.0 * 2 * vocabulary * width,
    }


# --- one product, from loop to registers ---


def by_loops(a: Any, b: Any) -> list[list[float]]:
    """Return a b, by three loops of Python."""
    return [[sum(x * row[j] for x, row in zip(left, b, strict=True)) for j in range(len(b[0]))] for left in a]


def by_rows(a: Any, b: Any) -> Any:
    """Return a b for arrays of numpy: each row of the result is a sum of rows of b."""
    c = np.zeros((len(a), b.shape[1]), b.dtype)
    for i, left in enumerate(a):
        for x, row in zip(left, b, strict=True):
            c[i] += x * row
    return c


def by_outer_products(a: Any, b: Any) -> Any:
    """Return a b for arrays of numpy, as a sum of outer products."""
    c = np.zeros((len(a), b.shape[1]), b.dtype)
    for column, row in zip(a.T, b, strict=True):
        c += np.outer(column, row)
    return c


def _best(function: Callable[[], object], seconds: float) -> float:
    """Return the least processor time of a call, in seconds."""
    best, end = float("inf"), time.perf_counter() + seconds
    calls = 0
    while time.perf_counter() < end or calls < 3:
        start = time.process_time()
        function()
        best, calls = min(best, time.process_time() - start), calls + 1
    return best


SIZE, ROUNDS = 512, 2  # of product()
PROGRAM = """
import json, sys
import nanochat_native.runtime.openmp
import torch
from nanochat_native import ops
from nanochat_native.demonstrations.speed import SIZE, _best
torch.set_num_threads(1)
a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
torch.testing.assert_close(ops.linear(a, b), a @ b.T, rtol=1e-3, atol=1e-3)
print(json.dumps(2e-9 * SIZE**3 / _best(lambda: ops.linear(a, b), 0.4)))
"""


def product() -> dict[str, Any]:
    """Measure one product of two 512 x 512 matrices in several ways, in GFLOP/s of processor time on one thread.

    The best of many repetitions, in two rounds over all ways, which takes about 20 s. The loops multiply smaller
    matrices. Raises ConfigError on processors that are not x86-64.
    """
    if platform.machine() != "x86_64":
        raise ConfigError(f"this demonstration compares instruction sets of x86-64, and this is {platform.machine()}")
    generator = torch.Generator().manual_seed(0)

    def pair(size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size, size, generator=generator), torch.randn(size, size, generator=generator)

    (a, b), (small_a, small_b) = pair(SIZE), pair(48)
    lists, arrays = (small_a.tolist(), small_b.tolist()), (a.numpy(), b.numpy())
    few = (arrays[0][:16], arrays[1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ways: dict[str, tuple[float, Callable[[], object]]] = {
        "python_loops": (2.0 * 48**3, lambda: by_loops(*lists)),
        "numpy_rows": (2.0 * 16 * SIZE**2, lambda: by_rows(*few)),
        "numpy_outer": (2.0 * SIZE**3, lambda: by_outer_products(*arrays)),
        "torch_mm": (2.0 * SIZE**3, lambda: torch.mm(a, b)),
    }
    rates: dict[str, float] = {}
    try:
        for _ in range(ROUNDS):
            for name, (work, call) in ways.items():
                rates[name] = max(rates.get(name, 0.0), 1e-9 * work / _best(call, 0.2))
            for isa in ("baseline", "avx2", "avx512"):
                rates[f"linear_{isa}"] = max(rates.get(f"linear_{isa}", 0.0), _linear_rate(isa))
    finally:
        torch.set_num_threads(threads)
    return {"size": SIZE, "gflops": rates, "loops_to_registers": rates["linear_avx512"] / rates["python_loops"]}


def _linear_rate(isa: str) -> float:
    """Return the GFLOP/s of `linear` with an instruction set, measured in a process of its own; 0 if it cannot run."""
    variables = {"NANOCHAT_CPU_ISA": isa, "NANOCHAT_LINEAR": "native", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    return float(json.loads(finished.stdout)) if finished.returncode == 0 else 0.0


def register_tile() -> dict[str, Any]:
    """Count what csrc/cpu/gemm.h does for one k, by instruction set: multiply-adds, loads, registers.

    A vector of a row of B is loaded once and serves 6 rows of A; a number of A is loaded once and serves all vectors.
    Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication".
    """
    rows, found = 6, {}
    for isa, (lanes, vectors, registers) in {"baseline": (4, 2, 16), "avx2": (8, 2, 16), "avx512": (16, 4, 32)}.items():
        multiply_adds, loads = rows * vectors, vectors + rows
        found[isa] = {
            "lanes": lanes,
            "tile": f"{rows} x {vectors * lanes}",
            "accumulators": rows * vectors,
            "registers_used": rows * vectors + vectors + 1,
            "registers": registers,
            "multiply_adds_per_load": multiply_adds / loads,
            "operations_per_byte": 2 * multiply_adds * lanes / (FLOAT * (vectors * lanes + rows)),
        }
    dot = {"multiply_adds_per_load": 0.5, "operations_per_byte": 2 / (2 * FLOAT)}
    return found | {"dot_product": dot}


# --- layouts of tensor cores, as csrc/emulation/fragments.h and csrc/cuda/ptx/layouts.h have them ---


def mma_a(lane: int, i: int) -> tuple[int, int]:
    """Return (row, column) of the i-th 16-bit number of A that a lane holds for mma.m16n8k16, i < 8."""
    return lane // 4 + 8 * (i // 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i // 4)


def mma_b(lane: int, i: int) -> tuple[int, int]:
    """Return (row, column) of the i-th 16-bit number of B that a lane holds, i < 4."""
    return 2 * (lane % 4) + i % 2 + 8 * (i // 2), lane // 4


def mma_d(lane: int, i: int) -> tuple[int, int]:
    """Return (row, column) of the i-th float32 sum that a lane holds, i < 4."""
    return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2


def swizzled(address: int, width: int) -> int:
    """Return the swizzled address of a byte: bits 4 to 6 are XORed with bits 7 to 9. width: 16, 32, 64 or 128 bytes."""
    return address ^ ((address >> 7 & (width // 16 - 1)) << 4)


def mma_fragment() -> dict[str, Any]:
    """List which lane holds each element of the operands and the result of mma.m16n8k16.

    PTX ISA 8.7, "Matrix Fragments for mma.m16n8k16".
    """
    found: dict[str, Any] = {}
    for name, place, count, shape in (("a", mma_a, 8, (16, 16)), ("b", mma_b, 4, (16, 8)), ("d", mma_d, 4, (16, 8))):
        lanes = [[-1] * shape[1] for _ in range(shape[0])]
        for lane in range(32):
            for i in range(count):
                row, column = place(lane, i)
                lanes[row][column] = lane
        found[name] = {"lanes": lanes, "numbers_of_a_lane": count, "covered": all(min(row) >= 0 for row in lanes)}
    found["lanes_that_know_a_row_of_d"] = len(set(found["d"]["lanes"][0]))
    return found


def bank_conflicts() -> dict[str, Any]:
    """Count how often a bank is hit when 8 lanes read a column of 16-byte chunks, with rows of 128 bytes.

    Shared memory has 32 banks of 4 bytes. A chunk covers 4 of them, so 8 chunks can be read at once if they differ in
    their place within 128 bytes.
    """
    found: dict[str, Any] = {}
    for name, width in (("plain", 16), ("swizzled", 128)):
        places = [[swizzled(128 * row + 16 * column, width) % 128 // 16 for column in range(8)] for row in range(8)]
        by_column = [[places[row][column] for row in range(8)] for column in range(8)]
        found[name] = {
            "places": places,
            "reads_of_a_column": max(max(column.count(place) for place in column) for column in by_column),
            "reads_of_a_row": max(max(row.count(place) for place in row) for row in places),
        }
    return found


DEMONSTRATIONS = {
    "attention-share": attention_share,
    "bank-conflicts": bank_conflicts,
    "gram-form": gram_form,
    "mma-fragment": mma_fragment,
    "operators": operators,
    "product": product,
    "register-tile": register_tile,
    "update-share": update_share,
}
