"""A budget of the matrix kernels by pipe, from their machine code, and an estimate of their speed on an H200.

    python tests/emulation/budget.py [--tree FOLDER]

The first table has the cycles of a multiprocessor's pipes in a turn of each main loop, for all consumers together.
They are counted, from the way that most turns take. All else is an estimate: no kernel has run on a GPU.

The model of the estimate. A turn takes as long as the slowest of tensor cores, shared memory and L2 cache, and HIDDEN
of the larger of the special function unit (MUFU) and the issue slots: in published kernels of this structure, the two
sides hide only a little of each other. A tile takes its turns; in the forward pass of attention, a consumer whose rows
see no key of a block leaves that turn to the others. Outside the turns a tile takes its products and all instructions
of all consumers, one after another, but for the instructions that stand between products and the wait for them: the
longer of the two counts. Waits for memory do not count. Multiprocessors take tiles as the scheduler of the kernels
gives them.

The calibration. HIDDEN is chosen so that the model gives the published TFLOP/s of FlashAttention-3 on an H100,
forward and causal, for T 2048, 4096, 8192 and 16384: 521, 579, 602 and 616 at D 128, and 371, 420, 460 and 473 at D
64. That is 2,950 cycles for a turn of 128 x 128 and 3,800 for the rest of a tile, and 2,880 for a turn of 192 x 128
and 4,200 for the rest. EXPOSED follows from its paper: 582 instead of 661 TFLOP/s without the overlap of softmax and
products. Nothing else is fitted. Expect errors of 15%, and more where tiles are few.
"""

import argparse
import re
from collections import Counter
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
ADD = 2000  # cycles from the addition of one block to that of the next, through the L2 cache
LAUNCH = 3e-6  # seconds from the end of a kernel to full work of the next one
OVERLAPPED_LAUNCH = 1.5e-6  # the same where the next one starts before that end

# The calibration.
HIDDEN, EXPOSED = 0.85, 0.37


# --- pipes ---

KDEPTH = 64  # of a step of Newton-Schulz along K
STRIPS = 4  # of a warp's results, which the output writes in a loop


@dataclass(frozen=True)
class Tile:
    """The tile of a kernel."""

    consumers: int  # warpgroups that share a multiprocessor; with mma.sync its warps, by four
    loaded: int  # bytes that arrive in shared memory in a turn, or leave it for global memory
    multicast: int = 0  # of them, those that another block of the cluster reads from the L2 cache


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

    def __add__(self, other):
        return Pipes(*map(sum, zip(self.__dict__.values(), other.__dict__.values(), strict=True)))

    def times(self, count):
        return Pipes(*(count * cycles for cycles in self.__dict__.values()))

    @property
    def bound(self):
        return max(self.__dict__, key=self.__dict__.get)


def tile_of(name):
    """Return the tile of a kernel, from the template arguments in its name."""
    kind, numbers = re.match(r"(\w+)<", name)[1], [int(number) for number in re.findall(r"[<, ](\d+)[,>]", name)]
    if kind == "attention_forward_hopper_kernel":
        D, consumers, keys = numbers
        return Tile(consumers, 2 * keys * D * 2)
    if kind == "attention_backward_hopper_kernel":
        D, _ = numbers
        return Tile(2, 2 * 64 * (D * 2 + 4) + 64 * D * 4)  # q and dout, and the part of dQ
    if kind == "product_hopper_kernel":
        return Tile(2, (128 + 256) * KDEPTH * 2, multicast=128 * KDEPTH * 2)
    raise ValueError(f"no tile is known of {name}")


def product_bytes(one):
    """Return the bytes of shared memory that a wgmma reads."""
    columns, shared_a = one.shape
    return 32 * columns + (64 * 32 if shared_a else 0)


def pipes_of(instructions, consumers, loaded=0, multicast=0):
    """Return the cycles that instructions of each consumer take of a multiprocessor."""
    products = [one for one in instructions if one.name == "HGMMA"]
    accessed = sum(one.width for one in instructions if one.name in ("LDS", "STS", "LDSM", "STSM")) * 4 * 128
    shared = sum(map(product_bytes, products)) + accessed
    return Pipes(
        tensor=consumers * sum(one.shape[0] / 2 for one in products),
        mufu=consumers * MUFU_CYCLES * sum(one.name == "MUFU" for one in instructions),
        issue=consumers * len(instructions),
        shared=(consumers * shared + loaded) / SHARED_BYTES,
        l2=(loaded - multicast) / L2_BYTES,
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


def cycles_outside(instructions, consumers):
    """Return the estimated cycles of instructions that run once a tile."""
    cycles, before, beside, groups = 0, [], [], 0

    def alone():
        pipes = pipes_of(before, consumers)
        return max(pipes.issue, pipes.mufu)

    for one in instructions:
        waits = one.name == "WARPGROUP" and ".DEPBAR" in one.opcode
        if waits and int(one.operands[1], 16) < groups:
            pipes = pipes_of(beside, consumers)
            cycles += alone() + max(pipes.tensor, pipes.issue, pipes.mufu)
            before, beside, groups = [], [], 0
        (beside if beside or one.name == "HGMMA" else before).append(one)
        groups += one.name == "HGMMA" and one.closes_group
    pipes = pipes_of(beside, consumers)
    return cycles + alone() + max(pipes.tensor, pipes.issue, pipes.mufu)


@dataclass(frozen=True)
class Budget:
    """A kernel with wgmma."""

    name: str
    tile: Tile
    turn: Pipes
    turn_cycles: float
    border_cycles: float
    prologue: float
    epilogue: float
    loading_epilogue: float  # that reads all sources of the result
    scaling_epilogue: float  # that multiplies the sums by a factor
    first_step: float  # the products of the first step, which stand before the loop
    diagonal_cycles: dict[bool, float]  # of Newton-Schulz, by whether both operands are the same
    own: Pipes  # a turn of one consumer, without what all load
    own_border: Pipes
    exposed: float

    @property
    def outside(self):
        return self.prologue + self.epilogue

    def cycles(self, active, masked):
        """Return the cycles of a turn in which only `active` consumers multiply, `masked` of which mask."""
        loads = pipes_of((), 1, self.tile.loaded)
        return (self.own.times(active - masked) + self.own_border.times(masked) + loads).cycles(self.exposed)


def columns_of(loop):
    """Return the columns of all products of a turn."""
    return sum(one.shape[0] for one in loop.turn if one.name == "HGMMA")


def main_loop_of(function):
    """Return the main loop of the widest products."""
    return max(function.main_loops, key=columns_of)


def diagonal_cycles(function, tile, same):
    """Return the cycles of a turn of Newton-Schulz on the diagonal: one consumer has the narrow loop."""
    wide, narrow = (pipes_of(loop.turn, 1) for loop in sorted(function.main_loops, key=columns_of, reverse=True))
    loaded = tile.loaded - (128 * KDEPTH * 2 if same else 0)
    both = Pipes(
        tensor=wide.tensor + narrow.tensor,
        mufu=0,
        issue=wide.issue + narrow.issue,
        shared=wide.shared + narrow.shared + loaded / SHARED_BYTES,
        l2=(loaded - tile.multicast) / L2_BYTES,
    )
    return both.cycles()


def budget_of(function):
    loop = main_loop_of(function)
    tile = tile_of(function.name)
    exposed = exposed_share(loop.turn)
    turn = pipes_of(loop.turn, tile.consumers, tile.loaded, tile.multicast)

    def epilogue(instructions):
        again = (STRIPS - 1) * [one for one in instructions if loop.is_repeated(one)]
        return cycles_outside(instructions, tile.consumers) + cycles_outside(again, tile.consumers)

    return Budget(
        name=function.name,
        tile=tile,
        turn=turn,
        turn_cycles=turn.cycles(exposed),
        border_cycles=pipes_of(loop.border_turn, tile.consumers, tile.loaded, tile.multicast).cycles(exposed),
        prologue=cycles_outside(loop.prologue, tile.consumers),
        epilogue=epilogue(loop.epilogue),
        loading_epilogue=epilogue(loop.loading_epilogue),
        scaling_epilogue=epilogue(loop.scaling_epilogue),
        first_step=pipes_of(loop.prologue, tile.consumers).tensor,
        diagonal_cycles={
            same: diagonal_cycles(function, tile, same) for same in (True, False) if len(function.main_loops) == 2
        },
        own=pipes_of(loop.turn, 1),
        own_border=pipes_of(loop.border_turn, 1),
        exposed=exposed,
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


def _seconds(shape, costs, head_groups, last_first):
    section = max(1, (24 << 20) // max(1, 4 * shape.T * shape.D))
    return _makespan(costs, head_groups, min(section, head_groups), last_first) / CLOCK + LAUNCH


def forward_turns(shape, consumers, keys):
    """Return the turns of each tile of the forward pass: (consumers that multiply, those that mask) -> their number.

    A consumer has 64 rows, and multiplies the blocks of `keys` keys that one of them sees.
    """
    heads, parts = shape.heads_per_tile, []
    for row in range(0, shape.T * heads, 64):
        a, z = row // heads, min((row + 63) // heads, shape.T - 1)
        (begin, end), first, last = shape.keys(a, z), shape.keys(a, a), shape.keys(z, z)
        parts.append((begin // keys, -(-end // keys), -(-last[0] // keys), first[1] // keys))
    found = []
    for i in range(0, len(parts), consumers):
        seen, seen_end, full, full_end = np.array(parts[i : i + consumers]).T[:, :, None]
        blocks = np.arange(seen.min(), seen_end.max())
        active = (blocks >= seen) & (blocks < seen_end)
        masked = active & ((blocks < full) | (blocks >= full_end))
        found.append(Counter(zip(active.sum(0).tolist(), masked.sum(0).tolist(), strict=True)))
    return found


def forward_tile(shape, multiprocessors=MULTIPROCESSORS):
    """Return (consumers, keys) of the tile of the forward pass, as choose_forward() of attention_tiles.h."""
    seen = shape.T // 2 if shape.causal else shape.T
    if shape.window is not None:
        seen = min(seen, shape.window)
    if seen <= 256:
        return 2, 64
    tiles = shape.B * shape.H * shape.T / 192
    return 3 if shape.D == 64 and seen >= 2048 and tiles >= 8 * multiprocessors else 2, 128


def forward_seconds(shape, budgets):
    consumers, keys = forward_tile(shape)
    budget = budgets[f"attention_forward_hopper_kernel<bfloat16, ForwardTile<{shape.D}, {consumers}, {keys}> >"]
    costs = [
        sum(count * budget.cycles(*turn) for turn, count in turns.items()) + budget.outside
        for turns in forward_turns(shape, consumers, keys)
    ]
    return _seconds(shape, costs, shape.B * shape.Hkv, shape.causal)


def _ordered_makespan(items, head_groups, section, budget):
    """Return the cycles of a kernel whose tiles of keys add to the rows in turn.

    A multiprocessor takes the next tile of keys when it is free. A tile adds its part of a tile of rows once a turn has
    passed, and the tile of keys before it has added its own.

    Args:
        items: (first tile of rows, turns, turns at a border) of each tile of keys of a head group.
    """
    free = np.zeros(min(MULTIPROCESSORS, len(items) * head_groups))
    rows = max(begin + turns for begin, turns, _ in items)
    added = np.zeros((head_groups, rows))
    for first in range(0, head_groups, section):
        for begin, turns, border in items:
            turn = budget.turn_cycles + (budget.border_cycles - budget.turn_cycles) * border / max(1, turns)
            passed = turn * np.arange(1, turns + 1)
            for head_group in range(first, min(first + section, head_groups)):
                place = free.argmin()
                before = added[head_group, begin : begin + turns][::-1]  # the last rows come first
                late = np.maximum.accumulate(np.maximum(before + ADD - passed, free[place] + budget.prologue))
                added[head_group, begin : begin + turns] = (late + passed)[::-1]
                # The last turn is counted with the epilogue.
                free[place] = late[-1] + (turns - 1) * turn + budget.epilogue
    return free.max()


def backward_seconds(shape, budgets):
    D = 64 if shape.D == 64 else 128
    own = budgets[f"attention_backward_hopper_kernel<bfloat16, BackwardTile<{D}, {3 if D == 64 else 2}> >"]
    tiles = _tiles(shape, 128, shape.queries, shape.keys, 64, 1, shape.heads_per_tile)
    firsts = [shape.queries(key, key)[0] * shape.heads_per_tile // 64 for key in range(0, shape.T, 128)]
    items = [(first, *tile) for first, tile in zip(firsts, tiles, strict=True)]
    head_groups = shape.B * shape.Hkv
    section = max(1, (24 << 20) // max(1, 4 * shape.T * shape.D))
    cycles = _ordered_makespan(items, head_groups, min(section, head_groups), own)
    # delta: one pass over out and dout. dQ: one pass that reads float32 and writes 16 bits.
    passes = (2 + 2) + (4 + 2)  # bytes an element
    return cycles / CLOCK + passes * shape.B * shape.T * shape.H * shape.D / MEMORY_BYTES + 3 * LAUNCH


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

SQUARE, CLUSTER = 256, 2


@dataclass(frozen=True)
class Product:
    """D (m, n) = A (m, k) B (k, n) for `count` matrices. `kernel`: the majors of A and B, and the epilogue."""

    count: int
    m: int
    n: int
    k: int
    kernel: str
    sources: int  # of the result
    same: bool = False  # whether A and B are one matrix
    scaled: bool = False  # whether A B has a factor other than 1

    @property
    def symmetric(self):
        return "Symmetric" in self.kernel

    def squares(self):
        """Return (squares, squares on the diagonal) of a matrix, as squares_of() of newton_schulz_hopper.cu."""
        rows, columns = -(-self.m // SQUARE), -(-self.n // SQUARE)
        return (rows * (rows - 1) // 2, rows) if self.symmetric else (rows * columns, 0)

    def square_cycles(self, budgets):
        """Return (main loop, what is outside it) of a square in cycles."""
        budget = budgets[f"product_hopper_kernel<float16, {self.kernel}>"]
        for_a_source = (budget.loading_epilogue - budget.epilogue) / (2 if self.symmetric else 1)
        for_a_factor = self.scaled * (budget.scaling_epilogue - budget.epilogue)
        steps = -(-self.k // KDEPTH)
        outside = budget.outside - budget.first_step + self.sources * for_a_source + for_a_factor
        return steps * budget.turn_cycles, outside

    def seconds(self, budgets):
        budget = budgets[f"product_hopper_kernel<float16, {self.kernel}>"]
        whole, diagonal = (count * self.count for count in self.squares())
        loop, outside = self.square_cycles(budgets)
        costs = [loop + outside] * whole
        if diagonal:  # of the eight boxes of a block there five are written
            costs += [-(-self.k // KDEPTH) * budget.diagonal_cycles[self.same] + outside * 5 / 8] * diagonal
        clusters = min(MULTIPROCESSORS // CLUSTER, len(costs))
        items = np.arange(len(costs))
        backward = items // clusters * clusters > whole
        chosen = np.where(backward, clusters - 1 - items % clusters, items % clusters)
        return np.bincount(chosen, weights=costs).max() / CLOCK + OVERLAPPED_LAUNCH

    @property
    def flop(self):
        """Floating-point operations that are executed. On the diagonal 12 of 16 boxes are."""
        whole, diagonal = self.squares()
        return 2.0 * self.count * (whole + 0.75 * diagonal) * SQUARE**2 * self.k


def newton_schulz_products(count, M, K):
    """Return the products of five steps in the form with less work, as Iteration of newton_schulz_plan.cuh."""
    R, L = min(M, K), max(M, K)
    wide, along = M <= K, "(Major)0, (Major)0" if M <= K else "(Major)1, (Major)1"

    def products(phases):
        def square(sources, same=False):
            # Of these products, only the polynomial of a Gram matrix has a factor.
            return Product(count, R, R, R, "(Major)0, (Major)0, SymmetricEpilogue", sources, same, scaled=same)

        for phase, length in enumerate(phases):
            yield Product(count, R, R, L, f"{along}, SymmetricEpilogue", 0, same=True)
            yield square(1, same=True)
            for _ in range(length - 1):
                yield from (square(1), square(1), square(1, same=True), square(2))
            epilogue = "OutputEpilogue" if phase + 1 == len(phases) else "ScratchEpilogue"
            yield Product(count, M, K, R, f"(Major)0, (Major){1 if wide else 0}, {epilogue}", 1)

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

    print("\nWhat a square of a product of Newton-Schulz takes outside its main loop, in percent of it: an estimate.\n")
    rows = []
    for K in (768, 1280):
        for name, kernel, sources, scaled in (
            ("symmetric", "(Major)0, (Major)0, SymmetricEpilogue", 0, False),
            ("symmetric", "(Major)0, (Major)0, SymmetricEpilogue", 1, False),
            ("symmetric, a factor", "(Major)0, (Major)0, SymmetricEpilogue", 1, True),
            ("symmetric", "(Major)0, (Major)0, SymmetricEpilogue", 2, False),
            ("to scratch", "(Major)0, (Major)1, ScratchEpilogue", 1, False),
            ("into float32 parameters and their copies", "(Major)0, (Major)1, OutputEpilogue", 1, False),
        ):
            loop, outside = Product(1, K, K, K, kernel, sources, scaled=scaled).square_cycles(found)
            rows.append((f"K {K}, {name}, sources: {sources}", loop, outside, f"{100 * outside / loop:.1f}"))
    print(table(("product", "main loop", "outside", "percent"), rows))

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
