"""The table of a recorded step: time, bytes and operations by operator, their sums, the floor, and the checks."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_native.lab.roofline.costs import OURS, TILE, Access, Launch, newton_schulz_phases
from nanochat_native.lab.roofline.recording import Recorded, Step
from nanochat_native.model.config import GPTConfig
from nanochat_native.runtime import hardware

ELSE = "everything else"
GROUPS = ("products, attention, loss", ELSE)
SUMMED = ("calls", "launches", "read", "written", "flops", "ms")


class UncountedError(ValueError):
    """The recorded operations of the products are not those of the model's formula."""


@dataclass(frozen=True)
class Machine:
    """The rates of a GPU.

    Attributes:
        flops: operations per second of matrix products.
        bandwidth: bytes per second.
        launch: seconds that a kernel takes at least.
        peak: the peak rate to which MFU refers, in FLOP/s; None if it is not known.
    """

    name: str
    flops: float
    bandwidth: float
    launch: float
    peak: float | None

    def seconds(self, launch: Launch) -> float:
        """Return the time of a kernel."""
        return max(launch.flops / self.flops, launch.bytes / self.bandwidth, self.launch)


# What good kernels reach of the figures in a data sheet: large matrix products, and copies.
ATTAINED_FLOPS, ATTAINED_BANDWIDTH = 0.8, 0.9
LAUNCH = 3e-6


def machine_named(
    name: str, dtype: torch.dtype, flops: float | None = None, bandwidth: float | None = None, launch: float = LAUNCH
) -> Machine:
    """Return a GPU by its name. Numbers that are not given are shares of its data sheet.

    Raises ValueError if the data sheet is not in the table of runtime/hardware.py.
    """
    peak, sheet = hardware.gpu_peak(name, dtype), hardware.gpu_bandwidth(name)
    if flops is None and peak.flops is None:
        raise ValueError(f"--flops is needed: {peak.source}")
    if bandwidth is None and sheet is None:
        raise ValueError(f"--bandwidth is needed: {name} is not in the table")
    return Machine(
        name=name,
        flops=ATTAINED_FLOPS * (peak.flops or 0) if flops is None else flops,
        bandwidth=ATTAINED_BANDWIDTH * (sheet or 0) if bandwidth is None else bandwidth,
        launch=launch,
        peak=peak.flops,
    )


def table(calls: Sequence[Recorded], machine: Machine) -> list[dict[str, Any]]:
    """Return a row for each operator, the largest first."""
    rows: dict[str, dict[str, Any]] = {}
    for call in calls:
        row = rows.setdefault(
            call.name, {"operator": call.name, "group": call.group, **dict.fromkeys(SUMMED, 0), "ms": 0.0}
        )
        cost = call.cost
        row["calls"] += 1
        row["launches"] += len(call.launches)
        row["read"] += cost.read
        row["written"] += cost.written
        row["flops"] += cost.flops
        row["ms"] += 1e3 * sum(map(machine.seconds, call.launches))
    return sorted(rows.values(), key=lambda row: (-row["ms"], row["operator"]))


def sums(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums of the columns."""
    kept = list(rows)
    return {name: sum(row[name] for row in kept) for name in SUMMED}


# --- the check ---


def check_flops(step: Step) -> None:
    """Raise UncountedError unless the recorded operations are those of formulas that do not use the rules of costs.py.

    The model's operations are those of GPT.estimate_flops. It counts attention to the whole sequence or window; here
    that is replaced by the pairs of a query and a key that the mask leaves. It also counts the products with the gates,
    which are part of operators whose time is that of their bytes, and the rows that pad lm_head, which the loss leaves
    out. The operations of the launches are the same, but for attention's backward pass: the model counts four products,
    and the kernels compute five. Those of Newton-Schulz have a formula of their own. All must be equal to the last
    operation.
    """
    config, model = step.model.config, step.model
    T = config.sequence_len
    spans = sum(T if window is None else min(window, T) for window in config.windows)
    gates = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("_gate.weight"))
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    products = (model.estimate_flops() - 12 * config.n_embd * spans - 6 * (gates + padding)) * step.tokens
    product = 2 * config.n_embd * step.rows * visible_in_model(config)  # of attention
    linear = [call for call in step.micro_step if call.group in ("products", "loss")]
    attention = [call for call in step.micro_step if call.group == "attention"]
    forward = [call for call in attention if call.name == f"{OURS}attention_forward"]
    backward = [call for call in attention if call.name == f"{OURS}attention_backward"]
    orthogonal = [call for call in step.optimizers if call.name.startswith(f"{OURS}newton_schulz")]
    for name, found, expected in (
        ("products and the loss", sum(call.model_flops for call in linear), products),
        ("products and the loss in their launches", launched(linear), products),
        ("attention", sum(call.model_flops for call in attention), 6 * product),
        ("attention_forward in its launches", launched(forward), 2 * product),
        ("attention_backward in its launches", launched(backward), 5 * product),
        ("Newton-Schulz", launched(orthogonal), sum(itertools.starmap(newton_schulz_flops, step.orthogonalised))),
    ):
        if found != expected:
            raise UncountedError(
                f"the operations of {name} do not add up, so nothing is reported: the operators have {found:,}, "
                f"the formula {expected:,}"
            )


def launched(calls: Iterable[Recorded]) -> int:
    """Return the operations of the launches of calls, as the table has them."""
    return sum(call.cost.flops for call in calls)


def visible_in_model(config: GPTConfig) -> int:
    """Return the pairs of a query and a key that it sees, of one sequence and head, over all layers."""
    T, pairs = config.sequence_len, 0
    for window in config.windows:
        before = T - 1 if window is None else min(window, T - 1)  # keys before its own that a late query sees
        pairs += T * (before + 1) - before * (before + 1) // 2
    return pairs


def newton_schulz_flops(shape: tuple[int, int], triples: Sequence[tuple[float, float, float]]) -> int:
    """Return the operations of Newton-Schulz on a matrix of size R x L, R <= L, in tiles of TILE x TILE.

    S steps in p phases are p products of R x R by R x L, p symmetric ones of depth L for the Gram matrices, and
    S + 3 (S - p) symmetric ones of depth R. The plain form is p = S.
    """
    (R, L), S, p = sorted(shape), len(triples), len(newton_schulz_phases(*shape, triples))
    r, wide = math.ceil(R / TILE), math.ceil(L / TILE)
    return TILE**2 * (r * (r + 1) * (p * L + (4 * S - 3 * p) * R) + 2 * r * wide * p * R)


# --- the floor ---


def floor_bytes(step: Step) -> int:
    """Return the least bytes that the operators of everything else must move in the micro-step.

    The operators between two calls of a product, attention or the loss are one pass. A pass reads each part of a tensor
    that was written before it once, and writes once each tensor that a later operator reads or that lives on.
    """
    passes = [
        (kind, list(calls)) for kind, calls in itertools.groupby(step.micro_step, key=lambda call: call.group == ELSE)
    ]
    needed, found = set(step.kept), 0
    for is_else, calls in reversed(passes):
        written: set[int] = set()
        inputs: dict[Access, None] = {}
        for call in calls:
            inputs |= {access: None for access in call.reads if access.storage not in written}
            written |= {access.storage for access in call.writes}
        outputs = {access: None for call in calls for access in call.writes if access.storage in needed}
        if is_else:
            found += _distinct(inputs) + _distinct(outputs)
        needed |= {access.storage for access in inputs}
    return found


def _distinct(accesses: Iterable[Access]) -> int:
    """Return the bytes of parts of storages. A part that lies within another one is not counted."""
    kept: dict[int, list[Access]] = {}
    for access in sorted(accesses, key=lambda access: -access.bytes):
        others = kept.setdefault(access.storage, [])
        if not any(other.first <= access.first and access.last <= other.last for other in others):
            others.append(access)
    return sum(access.bytes for others in kept.values() for access in others)


# --- the result ---


def analyse(step: Step, machine: Machine) -> dict[str, Any]:
    """Return the figures of a step as the values of a JSON file. Raise UncountedError as check_flops does.

    Returns:
        machine: the rates. tokens: of the micro-step. tokens_per_second: of the micro-step alone. mfu: by
        GPT.estimate_flops and the machine's peak, or None. micro_step and optimizers: rows (operator, group, calls,
        launches, bytes read and written, flops, ms), the sums of all rows and by group, waits of the host. floor: bytes
        and ms.
    """
    check_flops(step)
    phases: dict[str, dict[str, Any]] = {}
    for name, calls, waits in (
        ("micro_step", step.micro_step, step.waits[0]),
        ("optimizers", step.optimizers, step.waits[1]),
    ):
        rows = table(calls, machine)
        phases[name] = {
            "rows": rows,
            **{group: sums(row for row in rows if (row["group"] == ELSE) == (group == ELSE)) for group in GROUPS},
            "all": sums(rows),
            "waits": waits,
        }
    seconds = phases["micro_step"]["all"]["ms"] / 1e3
    model_flops = step.model.estimate_flops()
    least = floor_bytes(step)
    return {
        "machine": vars(machine),
        "tokens": step.tokens,
        "flops_per_token": model_flops,
        "tokens_per_second": step.tokens / seconds,
        "mfu": None if machine.peak is None else model_flops * step.tokens / seconds / machine.peak,
        **phases,
        "floor": {"bytes": least, "ms": 1e3 * least / machine.bandwidth},
    }
