"""Machine code of kernels as nvdisasm prints it: control flow, loops with wgmma, registers in flight, stores."""

import functools
import hashlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import toolchain
from compiled import compiled


class CodeError(Exception):
    """A form of machine code that this module cannot read."""


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@!P0", or empty
    opcode: str  # with its suffixes: HGMMA.64x128x16.F32.BF16
    operands: tuple[str, ...]

    @property
    def name(self):
        return self.opcode.split(".")[0]

    def __str__(self):
        return f"{self.address:x}: {self.guard} {self.opcode} {', '.join(self.operands)}".replace("  ", " ")

    @functools.cached_property
    def target(self):
        """The label that a branch names, or None."""
        return next((match[1] for word in self.operands if (match := re.match(r"`\((\S+)\)", word))), None)

    @property
    def ends_block(self):
        return self.name in ("BRA", "EXIT", "RET", "JMP", "BRX", "JMX")

    @property
    def conditional(self):
        """Whether the next instruction may follow a branch or an exit. BRA has up to two conditions."""
        return bool(self.guard and self.guard != "@PT") or len(self.operands) > 1

    # --- wgmma ---

    @functools.cached_property
    def shape(self):
        """(columns, whether A is in shared memory) of a wgmma."""
        columns = int(re.match(r"HGMMA\.64x(\d+)x16", self.opcode)[1])
        return columns, self.operands[1].startswith("gdesc")

    @functools.cached_property
    def accumulator(self):
        if "F32" not in self.opcode.split("."):
            raise CodeError(f"a wgmma whose sums are not float32: {self}")
        return _span(self.operands[0], self.shape[0] // 2)

    @functools.cached_property
    def left(self):
        """The registers of A; none where A is in shared memory."""
        return frozenset() if self.shape[1] else _span(self.operands[1], 4)

    @property
    def closes_group(self):
        return "gsb0" in self.operands

    # --- registers and memory ---

    @property
    def width(self):
        """Registers of the data of a load or store, or of a 64-bit operation."""
        if self.name in ("LDSM", "STSM"):
            return int(self.opcode.split(".")[-1])
        if ".128" in self.opcode:
            return 4
        wide = ".64" in self.opcode or ".WIDE" in self.opcode or ".F64" in self.opcode
        return 2 if wide or self.name in ("CS2R", "DADD", "DMUL", "DFMA", "DSETP") else 1

    @functools.cached_property
    def registers(self):
        """The registers that an instruction may read or write; rather too many where a width is unclear."""
        if self.name == "HGMMA":
            return self.accumulator | self.left
        found = set()
        for operand in self.operands:
            for match in re.finditer(r"(?<![A-Za-z_])R(\d+)(\.64)?", operand):
                count = 2 if match[2] else 1 if "[" in operand else self.width
                found.update(range(int(match[1]), int(match[1]) + count))
        return frozenset(found)

    @functools.cached_property
    def written(self):
        """The registers that an instruction may write."""
        if self.name == "HGMMA":
            return self.accumulator
        if not self.operands or self.name in (
            "STG",
            "STS",
            "STSM",
            "STL",
            "ST",
            "RED",
            "R2UR",
            "ISETP",
            "FSETP",
            "DSETP",
        ):
            return frozenset()
        found = set()
        for operand in self.operands[:3]:
            if match := re.fullmatch(r"R(\d+)", operand):
                found.update(range(int(match[1]), int(match[1]) + self.width))
                break
            if not re.fullmatch(r"!?U?PT?\d*", operand):
                break
        return frozenset(found)


def _span(operand, count):
    match = re.fullmatch(r"R(\d+)(\.reuse)?", operand)
    if not match:
        raise CodeError(f"no register: {operand}")
    return frozenset(range(int(match[1]), int(match[1]) + count))


@dataclass(eq=False)
class Block:
    """Instructions without a branch between them."""

    number: int
    instructions: list[Instruction] = field(default_factory=list)
    next: list["Block"] = field(default_factory=list)

    def count(self, name):
        return sum(i.name == name for i in self.instructions)


@dataclass(eq=False)
class Loop:
    """A loop of a kernel. A turn of it passes each inner loop, such as the wait for a barrier, at most once."""

    header: Block
    blocks: set[Block]
    function: "Function"

    def _way(self, begin, end):
        return self.function.way(begin, end, self.blocks)

    @functools.cached_property
    def turn(self):
        """The instructions of the shortest turn: nothing is masked, no barrier must be waited for."""
        return self._way(self.header, self.header)

    @functools.cached_property
    def border_turn(self):
        """The instructions of the shortest turn that masks; the same as `turn` where no turn does."""
        usual = {one.address for one in self.turn}
        rest = [block for block in self.blocks if block.instructions[0].address not in usual]
        masks = max(rest, key=lambda block: block.count("ISETP"), default=None)
        if masks is None or masks.count("ISETP") < FEWEST_COMPARISONS:
            return self.turn
        return self._way(self.header, masks) + self._way(masks, self.header)

    @functools.cached_property
    def outer(self):
        """The smallest loop around this one, or None."""
        loops = [other for other in self.function.loops if other is not self and self.header in other.blocks]
        return min(loops, key=lambda other: len(other.blocks), default=None)

    @functools.cached_property
    def prologue(self):
        """The instructions of a turn of the outer loop before this loop, on the way that does most."""
        blocks = self.outer.blocks - self.blocks | {self.header}
        return self.function.way(self.outer.header, self.header, blocks, _unless_useful)

    @functools.cached_property
    def epilogue(self):
        """The instructions of a turn of the outer loop after this loop, on the way that does most."""
        return self._epilogue(_unless_useful)

    @functools.cached_property
    def loading_epilogue(self):
        """The same, on the way that also reads most from shared memory."""
        return self._epilogue(_unless_useful_or_read)

    @functools.cached_property
    def scaling_epilogue(self):
        """The same as `epilogue`, on the way that also multiplies most."""
        return self._epilogue(_unless_useful_or_scaled)

    def is_repeated(self, instruction):
        """Return whether an instruction of the epilogue is in a loop of it."""
        return instruction.address in self._repeated

    @functools.cached_property
    def _repeated(self):
        inner = [loop for loop in self.function.loops if loop.blocks < self.outer.blocks - self.blocks]
        return {one.address for loop in inner for block in loop.blocks for one in block.instructions}

    def _epilogue(self, cost):
        left = self.outer.blocks - self.blocks
        exits = [other for block in self.blocks for other in block.next if other in left]
        ways = [self.function.way(block, self.outer.header, left, cost) for block in exits]
        return min((way for way in ways if way), key=lambda way: sum(map(cost, way)))


MOST_WAITED = 8  # groups of products; a wait leaves at most 7 of them in flight

# The fewest comparisons of a mask: two for each pair of the smallest tile's scores.
FEWEST_COMPARISONS = 16


def _unless_useful(one):
    """Return the cost of an instruction on a way that stores and multiplies much, in few instructions."""
    return 1 - 10_000 * one.width if one.name in ("STG", "STSM", "UTMASTG", "HGMMA") else 1


def _unless_useful_or_read(one):
    """Return the cost on a way that also reads much from shared memory: as many whole tiles as possible, then words."""
    if one.name == "LDSM" and one.width == 4:
        return 1 - 10_000 * one.width
    return 1 - 10 * one.width if one.name in ("LDSM", "LDS") else _unless_useful(one)


def _unless_useful_or_scaled(one):
    """Return the cost on a way that also has as many multiplications as possible."""
    return 1 - 10_000 if one.name == "FMUL" else _unless_useful(one)


class Function:
    """The machine code of one kernel."""

    def __init__(self, symbol, lines):
        self.symbol, self.name = symbol, toolchain.readable(symbol)
        self.instructions, labels, joins = [], {}, set()
        for line in lines:
            if match := re.match(r"([.$]\S+):", line):
                labels[match[1]] = len(self.instructions)
            elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[0-9T]+)?\s*(\S+)\s*(.*?)\s*;", line):
                operands = tuple(word.strip() for word in re.split(r",(?![^[]*\])", match[4])) if match[4] else ()
                self.instructions.append(Instruction(int(match[1], 16), match[2] or "", match[3], operands))
        if not self.instructions:
            raise CodeError(f"{self.name} has no instructions")
        for i, one in enumerate(self.instructions):
            if one.address != 16 * i:
                raise CodeError(f"{self.name}: a line before {one} was not understood")
        for one in self.instructions:
            if one.name in ("BRX", "JMX", "JMP"):
                raise CodeError(f"a branch without a label: {one}")
            if one.name == "BSSY":
                joins.add(labels.get(one.target))
        for i, one in enumerate(self.instructions):
            if one.name == "BSYNC" and i + 1 not in joins:
                raise CodeError(f"threads do not join at the next instruction: {one}")
        self._blocks(labels)

    def _blocks(self, labels):
        starts = {0, *labels.values()}
        starts |= {i + 1 for i, one in enumerate(self.instructions) if one.ends_block}
        ordered = sorted(start for start in starts if start < len(self.instructions))
        self.blocks = [Block(number) for number in range(len(ordered))]
        at = dict(zip(ordered, self.blocks, strict=True))
        for block, start, end in zip(self.blocks, ordered, [*ordered[1:], len(self.instructions)], strict=True):
            block.instructions = self.instructions[start:end]
            last = block.instructions[-1]
            if last.ends_block and last.name == "BRA":
                block.next.append(at[labels[last.target]])
            if (not last.ends_block or last.conditional) and end in at:
                block.next.append(at[end])

    @property
    def size(self):
        return 16 * len(self.instructions)

    @property
    def registers(self):
        return 1 + max((r for one in self.instructions for r in one.registers), default=-1)

    def count(self, name):
        return sum(one.name == name for one in self.instructions)

    # --- loops ---

    @functools.cached_property
    def before(self):
        """The blocks that lead to each block."""
        found = {block: [] for block in self.blocks}
        for block in self.blocks:
            for other in block.next:
                found[other].append(block)
        return found

    @functools.cached_property
    def reached(self):
        """The blocks that the kernel reaches, each before those that it leads to but for loops."""
        order, seen, stack = [], {self.blocks[0]}, [(self.blocks[0], iter(self.blocks[0].next))]
        while stack:
            block, left = stack[-1]
            for other in left:
                if other not in seen:
                    seen.add(other)
                    stack.append((other, iter(other.next)))
                    break
            else:
                order.append(block)
                stack.pop()
        return order[::-1]

    @functools.cached_property
    def dominators(self):
        """The blocks that each block cannot be reached without, as bits."""
        bits = {block: 1 << block.number for block in self.reached}
        everything = sum(bits.values())
        found = dict.fromkeys(self.reached, everything)
        found[self.blocks[0]] = bits[self.blocks[0]]
        changed = True
        while changed:
            changed = False
            for block in self.reached[1:]:
                common = everything
                for other in self.before[block]:
                    common &= found.get(other, everything)
                if (new := common | bits[block]) != found[block]:
                    found[block], changed = new, True
        return found

    @functools.cached_property
    def loops(self):
        """All loops, by their first block."""
        found = {}
        for block in self.reached:
            for header in block.next:
                if not self.dominators[block] >> header.number & 1:
                    continue
                loop = found.setdefault(header, Loop(header, {header}, self))
                left = [block]
                while left:
                    if (one := left.pop()) not in loop.blocks:
                        loop.blocks.add(one)
                        left += self.before[one]
        return list(found.values())

    @functools.cached_property
    def main_loops(self):
        """The innermost loops with products, wgmma or mma.sync, in the order of their code."""
        with_products = [
            loop for loop in self.loops if any(block.count("HGMMA") or block.count("HMMA") for block in loop.blocks)
        ]
        inner = [a for a in with_products if not any(a is not b and a.blocks > b.blocks for b in with_products)]
        return sorted(inner, key=lambda loop: loop.header.number)

    def way(self, begin, end, blocks, cost=lambda one: 1):
        """Return the instructions of the cheapest way from block `begin` to the next arrival at block `end`.

        The way stays in `blocks`, and passes no inner loop twice. It is empty if there is none.
        """
        order = [block for block in self.reached if block in blocks or block is begin]
        place = {block: i for i, block in enumerate(order)}
        costs = {block: sum(map(cost, block.instructions)) for block in order}
        best, last = {begin: (costs[begin], None)}, None
        for block in order[place[begin] :]:
            if block not in best:
                continue
            for other in block.next:
                reached = best[block][0]
                if other is end:
                    if last is None or reached < best[last][0]:
                        last = block
                elif place.get(other, -1) > place[block]:
                    reached += costs[other]
                    if other not in best or reached < best[other][0]:
                        best[other] = (reached, block)
        found = []
        while last is not None:
            found = last.instructions + found
            last = best[last][1]
        return found

    # --- wgmma in flight ---

    def hazards(self):
        """Return the instructions that touch registers of a wgmma in flight, on any way through the kernel.

        In flight are its accumulator, which nothing else may read or write, and the registers of A, which nothing may
        write. Another wgmma may add to the same accumulator.
        """
        found = {}
        states = {block: set() for block in self.blocks}
        left = [(self.blocks[0], ((), None))]
        while left:
            block, state = left.pop()
            if state in states[block]:
                continue
            states[block].add(state)
            committed, opened = state
            for one in block.instructions:
                if one.name == "WARPGROUP" and ".DEPBAR" in one.opcode:
                    newest = int(one.operands[1], 16)
                    committed = committed[len(committed) - newest :] if newest < len(committed) else committed
                    continue
                for sums, a in (*committed, *((opened,) if opened else ())):
                    if one.name == "HGMMA":
                        shared = frozenset() if one.accumulator <= sums else one.accumulator & sums
                        wrong = one.left & sums | one.accumulator & a | shared
                    else:
                        wrong = one.registers & sums or one.written & a
                    if wrong:
                        found[one.address] = f"{one} touches R{min(wrong)}"
                if one.name == "HGMMA":
                    sums, a = opened or (frozenset(), frozenset())
                    opened = (sums | one.accumulator, a | one.left)
                    if one.closes_group:
                        committed, opened = (*committed, opened), None
                        if len(committed) > MOST_WAITED:  # the oldest two are only ever waited for together
                            (first, a), (second, b), *rest = committed
                            committed = ((first | second, a | b), *rest)
            left += [(other, (committed, opened)) for other in block.next]
        return [found[address] for address in sorted(found)]

    # --- stores ---

    def split_stores(self):
        """Return stores of 4 bytes that fill 16 aligned bytes together, which one instruction could write."""
        found = []
        for block in self.blocks:
            groups = {}
            for one in block.instructions:
                if one.name in ("STG", "STS") and one.width == 1 and not re.search(r"\.[US](8|16)", one.opcode):
                    match = re.search(r"\[([^]]*?)(?:\+(-?0x[0-9a-f]+))?\]$", next(w for w in one.operands if "[" in w))
                    offset = int(match[2] or "0", 16)
                    words = groups.setdefault((one.name, one.guard, match[1], offset // 16), {})
                    words[offset % 16] = one
                    if len(words) == 4:
                        found.append(f"four stores of 4 bytes in a row: {one}")
                        words.clear()
                elif one.written:
                    for key in [key for key in groups if re.search(_any_of(one.written), key[2])]:
                        del groups[key]
        return found


def _any_of(registers):
    return r"\bR(" + "|".join(map(str, sorted(registers))) + r")\b"


def disassemble(cubin):
    """Return the functions of a file of machine code, by symbol. The same content is disassembled once."""
    command = [toolchain.nvdisasm(), "-c"]

    def make(folder):
        text = subprocess.run([*command, str(cubin)], capture_output=True, text=True, check=True).stdout
        (folder / "sass").write_text(text)

    content = hashlib.sha256(Path(cubin).read_bytes()).hexdigest()
    folder = compiled("sass", [*command, content], [], make, toolchain.ROOT)
    return read(folder / "sass")


@functools.lru_cache(maxsize=32)
def read(path):
    parts = re.split(r"\n\s*\.section\s+\.text\.", path.read_text())[1:]
    functions = (Function(part.split(",")[0].strip().strip('"'), part.splitlines()[1:]) for part in parts)
    return {function.symbol: function for function in functions}


# --- order ---


def events(instructions) -> Iterator[tuple[str, int]]:
    """Yield the products, waits and exponentials of a turn in their order, as (event, number of instructions in a row).

    "P" is a group of products, "E" exponentials, and "W1" the wait that leaves one group in flight. Exponentials
    between the products of a group, which run beside them, are counted behind it.
    """
    event, count, between = "", 0, 0
    for one in instructions:
        if one.name == "HGMMA":
            new = "P"
        elif one.opcode == "MUFU.EX2":
            new = "E"
        elif one.name == "WARPGROUP" and ".DEPBAR" in one.opcode:
            new = f"W{int(one.operands[1], 16)}"
        else:
            continue
        if event == "P" and new == "E":
            between += 1
            continue
        if event and new != event:
            yield event, count
            count = 0
        event, count = new, count + 1
        if new == "P" and one.closes_group:
            yield event, count
            event, count, between = ("E", between, 0) if between else ("", 0, 0)
    if event:
        yield event, count
