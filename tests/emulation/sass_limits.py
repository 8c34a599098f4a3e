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


LIMITS = {
    # The scores of the next keys and the sums of the current ones are started before the softmax, which waits for the
    # scores alone. A thread has 64 weights and 2 factors of the sums.
    "attention_forward_hopper_kernel<ForwardTile<128, 2, 128> >": Limits("8P 8P W1 66E W0", 505, 0, 80, 300, 190),
    "attention_forward_hopper_kernel<ForwardTile<96, 2, 128> >": Limits("6P 8P W1 66E W0", 480, 0, 80, 300, 188),
    "attention_forward_hopper_kernel<ForwardTile<64, 3, 128> >": Limits("4P 8P W1 66E W0", 445, 0, 80, 300, 156),
    # Scores and dP; 32 exponentials beside dP; dV beside dS; dK. The scores of 64 keys and 64 rows need all 128 bytes.
    "attention_backward_keys_hopper_kernel<KeyTile<128, 64, 3> >": Limits(
        "8P 8P W1 32E 4P W1 4P W1 W0", 344, 0, 112, 135, 238
    ),
    "attention_backward_keys_hopper_kernel<KeyTile<96, 64, 3> >": Limits(
        "6P 6P W1 32E 4P W1 4P W1 W0", 324, 0, 118, 135, 230
    ),
    "attention_backward_keys_hopper_kernel<KeyTile<64, 64, 3> >": Limits(
        "4P 4P W1 32E 4P W1 4P W1 W0", 302, 0, 128, 135, 182
    ),
    # Scores and dP; 64 exponentials beside dP; dQ.
    "attention_backward_rows_hopper_kernel<QueryTile<128, 128> >": Limits(
        "8P 8P W1 64E W0 8P W0", 458, 0, 86, 300, 226
    ),
    "attention_backward_rows_hopper_kernel<QueryTile<96, 128> >": Limits("6P 6P W1 64E W0 8P W0", 436, 0, 86, 300, 222),
    "attention_backward_rows_hopper_kernel<QueryTile<64, 128> >": Limits("4P 4P W1 64E W0 8P W0", 414, 0, 86, 300, 190),
    # The wait is for the step before.
    **{
        f"product_hopper_kernel<(Major){a}, (Major){b}, {epilogue}>": Limits("8P W1", 61, 0, 96, 0, 218)
        for a, b, epilogue in (
            (0, 0, "ScratchEpilogue"),
            (0, 1, "ScratchEpilogue"),
            (0, 0, "OutputEpilogue"),
            (0, 1, "OutputEpilogue"),
            (0, 0, "SymmetricEpilogue"),
            (1, 1, "SymmetricEpilogue"),
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
    (loop,) = function.main_loops
    turn = loop.turn
    products = [one for one in turn if one.name == "HGMMA"]
    loaded = sum(one.width for one in turn if one.name in ("LDS", "STS", "LDSM")) * 128 * 4
    return Limits(
        order=order_of(turn),
        instructions=len(turn),
        r2ur=sum(one.name == "R2UR" for one in turn),
        shared=-(-(sum(map(budget.product_bytes, products)) + loaded) // sum(one.shape[0] // 2 for one in products)),
        border=len(loop.border_turn) - len(turn),
        registers=function.registers,
    )


def over_budget(function):
    """Return what exceeds the limits of a kernel with wgmma, as "quantity: value, at most limit"."""
    if len(function.main_loops) != 1:
        return [f"order: {len(function.main_loops)} main loops, not one"]
    limits, found = LIMITS[untyped(function.name)], measure(function)
    wrong = [] if found.order == limits.order else [f"order: {found.order}, not {limits.order}"]
    for quantity in ("instructions", "r2ur", "shared", "border", "registers"):
        value, limit = getattr(found, quantity), getattr(limits, quantity)
        if value > limit:
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
