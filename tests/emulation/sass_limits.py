"""Limits of the machine code of the kernels: the order and the budget of each main loop, and the size of each kernel.

The limits hold for every ptxas that the tests find. They lie a few percent above what those make of the kernels.
Raise a limit only with a reason, beside it.
"""

import re
from dataclasses import dataclass

import budget
import sass

# Beyond the instruction cache, a kernel waits for its own code.
INSTRUCTION_CACHE = 128 * 1024


@dataclass(frozen=True)
class Limits:
    """Limits of a kernel with wgmma. The counts are those of a turn of the main loop, by a warp."""

    # P: products that are started together; E: exponentials; W1: a wait that leaves one group of products in flight.
    # Exponentials must stand before the wait for a product that they can run beside.
    order: str
    instructions: int  # an issue slot each; with all consumers they must fit into the products' cycles
    r2ur: int  # moves to the uniform registers of descriptors, which wait for the vector registers
    shared: int  # bytes that the products read, and the loads beside them, a cycle of the products; there are 128
    border: int  # instructions that the mask of a border tile adds
    registers: int  # of the 240 of each thread of two consumers, or the 160 of three: some are left for a newer ptxas
    outside: int | None = None  # instructions of a tile before and after the turns of the loop
    loops: int = 1  # main loops, all in this order; the quantities are those of the one with the widest products
    epilogue: int = 10_000  # instructions of a tile's epilogue that reads all sources


LIMITS = {
    # The scores of the next keys and the sums of the current ones are started before the softmax, which waits for the
    # scores alone. A thread has 64 weights and 2 factors of the sums. The descriptors of the queries, which have two
    # tiles, are put together in each turn.
    "attention_forward_hopper_kernel<ForwardTile<128, 2, 128> >": Limits("8P 8P W1 66E W0", 505, 0, 80, 265, 190, 850),
    "attention_forward_hopper_kernel<ForwardTile<96, 2, 128> >": Limits("6P 8P W1 66E W0", 480, 0, 80, 265, 188, 795),
    "attention_forward_hopper_kernel<ForwardTile<64, 3, 128> >": Limits("4P 8P W1 66E W0", 445, 0, 80, 265, 156, 725),
    "attention_forward_hopper_kernel<ForwardTile<64, 2, 128> >": Limits("4P 8P W1 66E W0", 445, 0, 80, 265, 165, 725),
    # 32 weights. The scores of 64 keys need 128 bytes a cycle, the sums 64.
    "attention_forward_hopper_kernel<ForwardTile<128, 2, 64> >": Limits("8P 4P W1 34E W0", 345, 0, 96, 145, 150, 695),
    "attention_forward_hopper_kernel<ForwardTile<96, 2, 64> >": Limits("6P 4P W1 34E W0", 318, 0, 96, 145, 136, 645),
    "attention_forward_hopper_kernel<ForwardTile<64, 2, 64> >": Limits("4P 4P W1 34E W0", 290, 0, 96, 145, 120, 570),
    # dP, beside 32 exponentials of complete scores; dV beside dS; dK and dQ; the next scores, during which dQ goes out.
    # The scores and dQ of 64 x 64 need all 128 bytes, those of 64 x 32 more.
    "attention_backward_hopper_kernel<BackwardTile<128, 2> >": Limits(
        "8P 32E 4P W1 4P 8P W1 8P W1 W0", 450, 0, 136, 135, 236
    ),
    "attention_backward_hopper_kernel<BackwardTile<64, 3> >": Limits(
        "4P 32E 4P W1 4P 8P W1 4P W1 W0", 405, 0, 170, 135, 190
    ),
    # The wait is for the step before, whose stage is then given back, in 12 instructions. On the diagonal of a
    # symmetric result one consumer has half of the columns, in a loop of its own. A thread has 128 sums, of 232
    # registers, which the first products replace: to set them to zero would take 64 instructions. It scales them, and
    # widens and adds up to two sources: 256 instructions for each of these, and 64 that round. The output's epilogue is
    # counted with one of the four strips that it writes in a loop.
    **{
        f"product_hopper_kernel<(Major){a}, (Major){b}, {epilogue}>": Limits(
            "4P W1", 63, 0, 80, 0, 195, outside, 2 if epilogue == "SymmetricEpilogue" else 1, instructions
        )
        for a, b, epilogue, outside, instructions in (
            (0, 0, "ScratchEpilogue", 408, 600),
            (0, 1, "ScratchEpilogue", 408, 600),
            (0, 0, "OutputEpilogue", 675, 1130),
            (0, 1, "OutputEpilogue", 675, 1130),
            (0, 0, "SymmetricEpilogue", 440, 920),
            (1, 1, "SymmetricEpilogue", 440, 920),
        )
    },
}

# Kernels that may store numbers one by one: one thread of one block writes eight, once a step.
FEW_STORES = {"derive_kernel"}


def untyped(name):
    """Return the name of a kernel without its 16-bit type: the limits are the same for both."""
    return re.sub(r"\bb?float16, ", "", name)


def order_of(instructions):
    """Return the events of a turn, as in Limits.order."""
    return " ".join(event if event.startswith("W") else f"{count}{event}" for event, count in sass.events(instructions))


def measure(function):
    """Return the quantities of a kernel with wgmma."""
    loop = budget.main_loop_of(function)
    turn = loop.turn
    products = [one for one in turn if one.name == "HGMMA"]
    loaded = sum(one.width for one in turn if one.name in ("LDS", "STS", "LDSM", "STSM")) * 128 * 4
    return Limits(
        order=order_of(turn),
        instructions=len(turn),
        r2ur=sum(one.name == "R2UR" for one in turn),
        shared=-(-(sum(map(budget.product_bytes, products)) + loaded) // sum(one.shape[0] // 2 for one in products)),
        border=len(loop.border_turn) - len(turn),
        registers=function.registers,
        loops=len(function.main_loops),
        epilogue=len(loop.loading_epilogue),
        outside=len(loop.prologue) + len(loop.epilogue),
    )


def over_budget(function):
    """Return what exceeds the limits of a kernel with wgmma, as "quantity: value, at most limit"."""
    limits = LIMITS[untyped(function.name)]
    if len(function.main_loops) != limits.loops:
        return [f"order: {len(function.main_loops)} main loops, not {limits.loops}"]
    found, orders = measure(function), {order_of(loop.turn) for loop in function.main_loops}
    wrong = [f"order: {order}, not {limits.order}" for order in sorted(orders - {limits.order})]
    for quantity in ("instructions", "r2ur", "shared", "border", "registers", "outside", "epilogue"):
        value, limit = getattr(found, quantity), getattr(limits, quantity)
        if limit is not None and value > limit:
            wrong.append(f"{quantity}: {value}, at most {limit}")
    return wrong


def defects(function):
    """Return the mistakes that any kernel may have, as `over_budget`."""
    wrong = [f"in flight: {one}" for one in function.hazards()]
    if function.name not in FEW_STORES:
        wrong += [f"stores: {one}" for one in function.split_stores()]
    if function.size > INSTRUCTION_CACHE:
        wrong.append(f"size: {function.size} bytes of code, at most {INSTRUCTION_CACHE}")
    return wrong
