"""A budget by pipe of the attention kernels with mma.sync, from their machine code for sm_80, and what it bounds.

    python tests/emulation/mma_budget.py

Counted: the instructions of a turn of a main loop, on the way that most turns take, and so the cycles of the pipes for
one block of four warps, one on each quarter of a multiprocessor.

Estimated: the TFLOP/s of long sequences without a mask, if the slowest pipe never waits. It is an upper bound, not a
forecast: nothing is fitted, and no kernel has run on a GPU. For comparison, FlashAttention-2, which has the same
instructions, reaches 335 TFLOP/s forward on an H100 (D 128, causal, T 16384), of about 620 that mma.sync allows there.
"""

import re
from dataclasses import dataclass

import budget
import sass
import toolchain

WARPS = 4
SHARED_BYTES = 128  # a cycle and multiprocessor
MUFU_CYCLES = 8  # of an instruction of a warp, for its quarter of a multiprocessor


@dataclass(frozen=True)
class Gpu:
    """The figures of NVIDIA's white papers on the architectures."""

    name: str
    multiprocessors: int
    clock: float
    product_cycles: int  # of a warp's m16n8k16 with float32 sums: 4,096 FLOP
    shared: int  # bytes of a multiprocessor; a block takes 1 KB more than it asks for


GPUS = (
    Gpu("A100", 108, 1.41e9, 8, 164 * 1024),
    Gpu("RTX 4090", 128, 2.52e9, 32, 100 * 1024),
    Gpu("RTX 5090", 170, 2.41e9, 32, 100 * 1024),
)


@dataclass(frozen=True)
class Turn:
    """The work of each warp of a block in a turn of the main loop."""

    name: str
    products: int  # m16n8k16
    mufu: int
    issue: int
    read: int  # bytes of shared memory
    loaded: int  # bytes that arrive in shared memory, for all warps
    pairs: int  # of a row and a key, for all warps
    shared: int  # bytes of shared memory of a block

    def pipes(self, gpu):
        """Return {pipe: cycles of a multiprocessor for a block}."""
        return {
            "tensor": gpu.product_cycles * self.products,
            "MUFU": MUFU_CYCLES * self.mufu,
            "issue": self.issue,
            "shared": (WARPS * self.read + self.loaded) / SHARED_BYTES,
        }

    def blocks(self, gpu):
        """Return how many blocks the shared memory of a multiprocessor holds."""
        return gpu.shared // (self.shared + 1024)


def _tile(name):
    """Return (pairs, bytes that arrive in a turn, bytes of shared memory) of a kernel, as in attention_tiles.h."""
    kind, a, b, c = re.search(r"(Forward|Key|Query)Tile<(\d+), (\d+), (\d+)", name).groups()
    D, b, c = int(a), int(b), int(c)
    own, other = (b if kind == "Forward" else 64 * b), c
    numbers = 8 * other if kind == "Key" else 0  # log-sum-exp and delta
    tiles = 1 if kind == "Forward" else 2  # of the block's own side
    loaded = 4 * D * other + numbers
    return own * other, loaded, 1024 + 2 * D * own * tiles + 2 * loaded


def turn_of(function):
    """Return the turn of the loop that waits for tiles. Its inner loops run over D, 32 columns in a turn."""
    D = int(re.search(r"Tile<(\d+)", function.name)[1])
    inner = function.main_loops
    around = [loop for loop in function.loops if any(block.count("BAR") for block in loop.blocks)]
    (loop,) = (loop for loop in around if any(block.count("HMMA") for block in loop.blocks))
    repeated = {
        one.address for other in inner if other is not loop for block in other.blocks for one in block.instructions
    }
    runs = [(one, D // 32 if one.address in repeated else 1) for one in loop.turn]
    pairs, loaded, shared = _tile(function.name)
    return Turn(
        name=function.name,
        products=sum(n for one, n in runs if one.name == "HMMA"),
        mufu=sum(n for one, n in runs if one.name == "MUFU"),
        issue=sum(n for _, n in runs),
        read=sum(n * one.width * 128 for one, n in runs if one.name in ("LDS", "STS", "LDSM")),
        loaded=loaded,
        pairs=pairs,
        shared=shared,
    )


def turns():
    """Return the turns of the kernels for bfloat16, but those for few rows, in the order of the table."""
    found = []
    for name in ("attention_forward", "attention_backward"):
        result = toolchain.compile_cuda(toolchain.CUDA / f"{name}.cu", "sm_80")
        if result.error:
            raise SystemExit(result.error)
        functions = sass.disassemble(result.cubin).values()
        found += [
            turn_of(one) for one in functions if re.search(r"<bfloat16, (ForwardTile<\d+, 128|Key|Query)", one.name)
        ]
    return sorted(found, key=lambda turn: turn.name)


def bound(kernels, D, flop, gpu):
    """Return the most TFLOP/s of kernels that run one after another; `flop`: for a pair of a row and a key."""
    cycles = sum(max(kernel.pipes(gpu).values()) / kernel.pairs for kernel in kernels)
    return flop * D * gpu.multiprocessors * gpu.clock / cycles / 1e12


def main():
    found = turns()
    print("Cycles of a multiprocessor in a turn of the main loop of a block, by pipe. Tensor: on", end=" ")
    print(", ".join(gpu.name for gpu in GPUS) + ". Blocks: that shared memory holds on each.\n")
    head = ("kernel", *(f"tensor {gpu.name}" for gpu in GPUS), "MUFU", "issue", "shared", "blocks", "bound on A100")
    rows = []
    for one in found:
        pipes = one.pipes(GPUS[0])
        tensor = [one.pipes(gpu)["tensor"] for gpu in GPUS]
        blocks = " / ".join(str(one.blocks(gpu)) for gpu in GPUS)
        rows.append((one.name, *tensor, *list(pipes.values())[1:], blocks, max(pipes, key=pipes.get)))
    print(budget.table(head, rows))

    print("\nUpper bound of TFLOP/s, long and without a mask. The backward pass counts as 2.5 forward passes.\n")
    rows = []
    for D in (64, 96, 128):
        own = [one for one in found if f"Tile<{D}, " in one.name]
        forward = [one for one in own if "Forward" in one.name]
        backward = [one for one in own if "Forward" not in one.name]
        rows.append((f"D {D}", *(x for gpu in GPUS for x in (bound(forward, D, 4, gpu), bound(backward, D, 10, gpu)))))
    print(budget.table(("", *(f"{gpu.name} {way}" for gpu in GPUS for way in ("forward", "backward"))), rows))


if __name__ == "__main__":
    main()
