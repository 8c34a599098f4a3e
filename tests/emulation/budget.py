"""A budget of the matrix kernels by pipe, from their machine code, and an estimate of their speed on an H200.

    python tests/emulation/budget.py [--tree FOLDER]

The first table has the cycles of a multiprocessor's pipes in a turn of each main loop, for all consumers together.
They are counted, from the way that most turns take. All else is an estimate: no kernel has run on a GPU.

The model of the estimate. A turn takes as long as the slowest of tensor cores, shared memory and L2 cache, and HIDDEN
of the larger of the special function unit (MUFU) and the issue slots: in published kernels of this structure, the two
sides hide only a little of each other. A tile takes its turns. Outside them it takes its products and all
instructions of all consumers, one after another. Multiprocessors take tiles as the scheduler of the kernels gives
them.

The calibration. HIDDEN is chosen so that the model gives the published TFLOP/s of FlashAttention-3 on an H100,
forward and causal, for T 2048, 4096, 8192 and 16384: 521, 579, 602 and 616 at D 128, and 371, 420, 460 and 473 at D
64. That is 2,950 cycles for a turn of 128 x 128 and 3,800 for the rest of a tile, and 2,880 for a turn of 192 x 128
and 4,200 for the rest. EXPOSED follows from its paper: 582 instead of 661 TFLOP/s without the overlap of softmax and
products. Nothing else is fitted. Expect errors of 15%, and more where tiles are few.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sass
import toolchain

# An H200.
MULTIPROCESSORS = 132
CLOCK = 1.7e9  # under such a load; with 4,096 FLOP a cycle and multiprocessor 919 TFLOP/s
SHARED_BYTES, L2_BYTES = 128, 34  # a cycle and multiprocessor; 34 is 7.7 TB/s for all
MUFU_CYCLES = 8  # of an instruction of a warp, for its quarter of a multiprocessor
MEMORY_BYTES = 3.9e12  # a second
LAUNCH = 3e-6  # seconds from the end of a kernel to full work of the next one

# The calibration.
HIDDEN, EXPOSED = 0.85, 0.37


# --- pipes ---


@dataclass(frozen=True)
class Tile:
    """The tile of a kernel."""

    consumers: int  # warpgroups that share a multiprocessor; with mma.sync its warps, by four
    loaded: int  # bytes that arrive in shared memory in a turn


@dataclass(frozen=True)
class Pipes:
    """Cycles of a multiprocessor."""

    tensor: float
    mufu: float
    issue: float
    shared: float
    l2: float

    def cycles(self, exposed=0.0):
        """Return the estimated cycles of a turn; `exposed` as exposed_share()."""
        return max(self.tensor, self.shared, self.l2) + (HIDDEN + EXPOSED * exposed) * max(self.mufu, self.issue)

    @property
    def bound(self):
        return max(self.__dict__, key=self.__dict__.get)


def tile_of(name):
    """Return the tile of a kernel, from the template arguments in its name."""
    kind, numbers = re.match(r"(\w+)<", name)[1], [int(number) for number in re.findall(r"[<, ](\d+)[,>]", name)]
    if kind == "attention_forward_hopper_kernel":
        D, consumers, keys = numbers
        return Tile(consumers, 2 * keys * D * 2)
    if kind == "attention_backward_keys_hopper_kernel":
        D, rows, _ = numbers
        return Tile(2, 2 * rows * (D * 2 + 4))
    if kind == "attention_backward_rows_hopper_kernel":
        D, keys = numbers
        return Tile(2, 2 * keys * D * 2)
    if kind == "product_hopper_kernel":
        return Tile(2, (256 + 128) * 64 * 2)
    raise ValueError(f"no tile is known of {name}")


def product_bytes(one):
    """Return the bytes of shared memory that a wgmma reads."""
    columns, shared_a = one.shape
    return 32 * columns + (64 * 32 if shared_a else 0)


def pipes_of(instructions, consumers, loaded=0):
    """Return the cycles that instructions of each consumer take of a multiprocessor."""
    products = [one for one in instructions if one.name == "HGMMA"]
    accessed = sum(one.width for one in instructions if one.name in ("LDS", "STS", "LDSM")) * 4 * 128
    shared = sum(map(product_bytes, products)) + accessed
    return Pipes(
        tensor=consumers * sum(one.shape[0] / 2 for one in products),
        mufu=consumers * MUFU_CYCLES * sum(one.name == "MUFU" for one in instructions),
        issue=consumers * len(instructions),
        shared=(consumers * shared + loaded) / SHARED_BYTES,
        l2=loaded / L2_BYTES,
    )


def exposed_share(instructions):
    """Return the share of exponentials that run while no product of their warpgroup is in flight."""
    in_flight, exposed, total = 0, 0, 0
    for event, count in sass.events(instructions):
        if event == "P":
            in_flight += 1
        elif event == "E":
            total += count
            exposed += 0 if in_flight else count
        else:
            in_flight = min(in_flight, int(event[1:]))
    return exposed / total if total else 0.0


@dataclass(frozen=True)
class Budget:
    """A kernel with wgmma."""

    name: str
    tile: Tile
    turn: Pipes
    half_turn: Pipes  # with one consumer
    turn_cycles: float
    half_turn_cycles: float
    border_cycles: float
    prologue: float
    epilogue: float

    @property
    def outside(self):
        return self.prologue + self.epilogue


def budget_of(function):
    (loop,) = function.main_loops
    tile = tile_of(function.name)
    exposed = exposed_share(loop.turn)
    turn = pipes_of(loop.turn, tile.consumers, tile.loaded)
    half = pipes_of(loop.turn, 1, tile.loaded * 2 / 3)

    def outside(instructions):
        pipes = pipes_of(instructions, tile.consumers)
        return pipes.tensor + max(pipes.issue, pipes.mufu)

    return Budget(
        name=function.name,
        tile=tile,
        turn=turn,
        half_turn=half,
        turn_cycles=turn.cycles(exposed),
        half_turn_cycles=half.cycles(exposed),
        border_cycles=pipes_of(loop.border_turn, tile.consumers, tile.loaded).cycles(exposed),
        prologue=outside(loop.prologue),
        epilogue=outside(loop.epilogue),
    )


# --- attention ---


@dataclass(frozen=True)
class Attention:
    B: int
    H: int
    Hkv: int
    T: int
    D: int
    causal: bool = True
    window: int | None = None  # keys before its own that a query sees

    @property
    def heads_per_tile(self):
        return self.H // self.Hkv

    @property
    def flop(self):
        """Floating-point operations of the forward pass: all pairs, half of them if causal, or those in the window."""
        if not self.causal:
            return 4.0 * self.B * self.H * self.T**2 * self.D
        if self.window is None:
            return 2.0 * self.B * self.H * self.T**2 * self.D
        seen = np.minimum(np.arange(self.T), self.window).sum() + self.T
        return 4.0 * self.B * self.H * float(seen) * self.D

    def keys(self, first, last):
        """Return the keys that queries see, [begin, end)."""
        begin = 0 if self.window is None else max(0, first - self.window)
        return begin, min(last + 1, self.T) if self.causal else self.T

    def queries(self, first, last):
        """Return the queries that see keys, [begin, end)."""
        end = self.T if self.window is None else min(self.T, last + self.window + 1)
        return first if self.causal else 0, end


def _tiles(shape, rows, first_side, other_side, size, heads, other_heads):
    """Return (turns, turns at a border) of each tile of `rows` rows, which passes over tiles of `size`.

    Args:
        first_side: the rows of the other side that [first, last] sees or is seen by.
        other_side: the same for a row of the other side.
        heads: how many rows of a tile are one position, and other_heads: the same for the other side.
    """
    found = []
    for first in range(0, shape.T * heads, rows):
        a, z = first // heads, min((first + rows - 1) // heads, shape.T - 1)
        begin, end = first_side(a, z)
        begin, end = begin * other_heads // size, -(-end * other_heads // size)
        border = 0
        for block in range(begin, end):
            b, y = block * size // other_heads, min(((block + 1) * size - 1) // other_heads, shape.T - 1)
            low, high = other_side(b, b), other_side(y, y)
            seen = max(low[0], high[0]) <= a and z < min(low[1], high[1])
            border += not seen or (block + 1) * size > shape.T * other_heads
        found.append((end - begin, border))
    return found


def _makespan(costs, head_groups, section, last_first):
    """Return the cycles of the multiprocessor with most work: block b computes the items b, b + blocks, ..."""
    costs = np.array(costs[::-1] if last_first else costs, dtype=float)
    items = np.concatenate([np.repeat(costs, min(section, head_groups - g)) for g in range(0, head_groups, section)])
    blocks = min(MULTIPROCESSORS, len(items))
    return np.bincount(np.arange(len(items)) % blocks, weights=items).max()


def _kernel_seconds(shape, budget, tiles, head_groups, last_first):
    costs = [
        (turns - border) * budget.turn_cycles + border * budget.border_cycles + budget.outside
        for turns, border in tiles
    ]
    section = max(1, (24 << 20) // max(1, 4 * shape.T * shape.D))
    return _makespan(costs, head_groups, min(section, head_groups), last_first) / CLOCK + LAUNCH


def forward_seconds(shape, budgets):
    D, consumers, keys = (64, 3, 128) if shape.D == 64 else (shape.D, 2, 128)
    budget = budgets[f"attention_forward_hopper_kernel<bfloat16, ForwardTile<{D}, {consumers}, {keys}> >"]
    tiles = _tiles(shape, 64 * consumers, shape.keys, shape.queries, keys, shape.heads_per_tile, 1)
    return _kernel_seconds(shape, budget, tiles, shape.B * shape.Hkv, shape.causal)


def backward_seconds(shape, budgets):
    D, rows, keys = shape.D, 64, 128
    own = budgets[f"attention_backward_keys_hopper_kernel<bfloat16, KeyTile<{D}, {rows}, 3> >"]
    tiles = _tiles(shape, keys, shape.queries, shape.keys, rows, 1, shape.heads_per_tile)
    seconds = _kernel_seconds(shape, own, tiles, shape.B * shape.Hkv, False)
    own = budgets[f"attention_backward_rows_hopper_kernel<bfloat16, QueryTile<{D}, {keys}> >"]
    tiles = _tiles(shape, keys, shape.keys, shape.queries, keys, shape.heads_per_tile, 1)
    seconds += _kernel_seconds(shape, own, tiles, shape.B * shape.Hkv, shape.causal)
    # delta: one pass over out and dout
    return seconds + 4.0 * shape.B * shape.T * shape.H * shape.D / MEMORY_BYTES + LAUNCH


ATTENTION = {
    **{
        f"D 128, {'causal' if causal else 'full'}, T {T}": Attention(2, 64, 8, T, 128, causal)
        for causal in (True, False)
        for T in (2048, 4096, 8192, 16384)
    },
    **{f"D 64, causal, T {T}": Attention(2, 64, 8, T, 64) for T in (2048, 4096, 8192, 16384)},
    "D 64, window 128, T 4096": Attention(2, 64, 8, 4096, 64, window=128),
    "D 128, causal, T 2048, nanochat d20": Attention(32, 10, 10, 2048, 128),
    "D 128, window 512, T 2048, nanochat d20": Attention(32, 10, 10, 2048, 128, window=512),
    "D 128, causal, T 2048, nanochat d12": Attention(32, 6, 6, 2048, 128),
    "D 128, window 512, T 2048, nanochat d12": Attention(32, 6, 6, 2048, 128, window=512),
}


# --- Newton-Schulz ---

KDEPTH, KTILE = 64, 128


@dataclass(frozen=True)
class Product:
    """D (m, n) = A (m, k) B (k, n) for `count` matrices. `kernel`: the majors of A and B, and the epilogue."""

    count: int
    m: int
    n: int
    k: int
    kernel: str

    @property
    def symmetric(self):
        return "Symmetric" in self.kernel

    def tiles(self):
        """Return (whole tiles, half tiles) of a matrix, as tiles_of() of newton_schulz_hopper.cu."""
        rows, columns = -(-self.m // KTILE), -(-self.n // KTILE)
        pairs = rows // 2
        if self.symmetric:
            return pairs * pairs, pairs + (columns if rows % 2 else 0)
        return pairs * columns, columns if rows % 2 else 0

    def seconds(self, budgets):
        budget = budgets[f"product_hopper_kernel<float16, {self.kernel}>"]
        steps = -(-self.k // KDEPTH)
        whole, half = (count * self.count for count in self.tiles())
        costs = [steps * budget.turn_cycles + budget.outside] * whole
        costs += [steps * budget.half_turn_cycles + budget.outside / 2 + budget.prologue / 2] * half
        return _makespan(costs, 1, 1, False) / CLOCK + LAUNCH

    @property
    def flop(self):
        """Floating-point operations that the tiles take."""
        whole, half = self.tiles()
        return 2.0 * self.count * (2 * whole + half) * KTILE * KTILE * self.k


def newton_schulz_products(count, M, K):
    """Return the products of five steps in the form with less work, as Iteration of newton_schulz_plan.cuh."""
    R, L = min(M, K), max(M, K)
    wide, along = M <= K, "(Major)0, (Major)0" if M <= K else "(Major)1, (Major)1"

    def products(phases):
        def square():
            return Product(count, R, R, R, "(Major)0, (Major)0, SymmetricEpilogue")

        for phase, length in enumerate(phases):
            yield Product(count, R, R, L, f"{along}, SymmetricEpilogue")
            yield square()
            for _ in range(4 * (length - 1)):
                yield square()
            epilogue = "OutputEpilogue" if phase + 1 == len(phases) else "ScratchEpilogue"
            yield Product(count, M, K, R, f"(Major)0, (Major){1 if wide else 0}, {epilogue}")

    def cost(phases):
        return sum(one.flop for one in products(phases))

    return list(products(min(([1] * 5, [3, 2]), key=cost)))


# The matrices that Muon orthogonalises: queries, keys, values and output, and both products of the MLP, of each layer.
NEWTON_SCHULZ = {
    name: {(d, d): 4 * layers, (4 * d, d): layers, (d, 4 * d): layers}
    for name, d, layers in (("d12", 768, 12), ("d20", 1280, 20))
}


# --- tables ---


def budgets(tree=toolchain.ROOT) -> dict[str, Budget]:
    """Return the budget of each kernel with wgmma, by its name."""
    found = {}
    for source in sorted((tree / "csrc/cuda").glob("*_hopper.cu")):
        result = toolchain.compile_cuda(source, "sm_90a", tree=tree)
        if result.error:
            raise SystemExit(result.error)
        for function in sass.disassemble(result.cubin).values():
            if function.main_loops:
                found[function.name] = budget_of(function)
    return found


def table(head, rows):
    rows = [head, *([cell if isinstance(cell, str) else f"{cell:,.0f}" for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description="Print the budget of the kernels with wgmma and an estimate of their speed."
    )
    parser.add_argument("--tree", type=Path, default=toolchain.ROOT, help="the checkout whose csrc/ is read")
    found = budgets(parser.parse_args().tree.resolve())

    print("Cycles of a multiprocessor in a turn of the main loop, by pipe, for all consumers together.")
    print("Estimated: the turn, a turn that masks, and what a tile takes before and after its turns.\n")
    head = ("kernel", "tensor", "MUFU", "issue", "shared", "L2", "bound", "turn", "border turn", "prologue", "epilogue")
    rows = [
        (name, *b.turn.__dict__.values(), b.turn.bound, b.turn_cycles, b.border_cycles, b.prologue, b.epilogue)
        for name, b in sorted(found.items())
        if "bfloat16" in name
    ]
    print(table(head, rows))

    print(
        "\nEstimated TFLOP/s of attention. Masked pairs do not count. The backward pass counts as 2.5 forward passes.\n"
    )
    rows = []
    for name, shape in ATTENTION.items():
        forward, backward = forward_seconds(shape, found), backward_seconds(shape, found)
        rows.append((name, shape.flop / forward / 1e12, 2.5 * shape.flop / backward / 1e12))
    print(table(("shape", "forward", "backward"), rows))

    print("\nEstimate of Newton-Schulz, five steps.\n")
    rows = []
    for name, shapes in NEWTON_SCHULZ.items():
        for (M, K), count in shapes.items():
            products = newton_schulz_products(count, M, K)
            seconds = sum(product.seconds(found) for product in products)
            full = 5 * count * (4.0 * M * K + 2 * min(M, K) ** 2) * min(M, K)
            executed = sum(product.flop for product in products)
            speeds = (executed / seconds / 1e12, full / seconds / 1e12)
            rows.append((f"{name}: {count} of {M} x {K}", seconds * 1e6, *speeds))
    print(table(("matrices", "microseconds", "TFLOP/s executed", "as full products of the plain form"), rows))


if __name__ == "__main__":
    main()
