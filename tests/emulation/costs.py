"""Costs of the CUDA kernels that show without a GPU: what their PTX runs, counted by the executor.

`python tests/emulation/costs.py [name ...]` prints them, of the kernels with such names. PTX is not machine code: ptxas
removes moves, and folds additions into addresses. Sectors are counted for each instruction, without a cache.
"""

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import operator_calls as operators
import torch
from harness import ROOT, PtxLibrary, build_executor, build_for_ptx
from toolchain import readable

SHARED = ("shared_load", "shared_store", "ldmatrix", "copy")
GLOBAL = ("global_load", "global_store")
WIDEST = 16  # bytes of one access of a thread


@dataclass(frozen=True)
class Instruction:
    kind: str
    place: str
    text: str
    runs: int  # by warps
    lanes: int
    passes: int  # wavefronts of shared memory, or sectors of global memory
    least: int  # of them, for as many bytes
    width: int
    target: int

    @property
    def address(self) -> tuple[str, int] | None:
        """The register and the offset of a memory access."""
        match = re.search(r"\[(%\w+)(?:\+(-?\d+))?\]", self.text)
        return (match[1], int(match[2] or 0)) if match else None

    @property
    def guard(self) -> str:
        """The predicate, as in @!%p1, or nothing."""
        return self.text.split()[0] if self.text.startswith("@") else ""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    architecture: str
    blocks: int
    threads: int
    shared: int
    code: list[Instruction]

    def ratio(self, kinds: tuple[str, ...]) -> float | None:
        """Return wavefronts or sectors over the least possible; None: there are none."""
        chosen = [one for one in self.code if one.kind in kinds and one.least]
        return sum(one.passes for one in chosen) / sum(one.least for one in chosen) if chosen else None

    def conflicts(self) -> list[Instruction]:
        """Return the accesses to shared memory that take more wavefronts than they must."""
        return [one for one in self.code if one.kind in SHARED and one.passes > one.least]

    def split_stores(self) -> list[list[Instruction]]:
        """Return the groups of global stores of neighbours by one thread that a wider store could do.

        They stand in one straight line of code, with one base register and one predicate.
        """
        groups = []
        for line in self._straight_lines():
            stores = [one for one in line if one.kind == "global_store" and one.address and one.runs]
            alike: dict[tuple[str, str], list[Instruction]] = {}
            for one in stores:
                alike.setdefault((one.address[0], one.guard), []).append(one)
            for group in alike.values():
                groups += mergeable(group)
        return groups

    def _straight_lines(self) -> Iterator[list[Instruction]]:
        targets = {one.target for one in self.code if one.target >= 0}
        line: list[Instruction] = []
        for index, one in enumerate(self.code):
            if index in targets or one.kind == "branch":
                yield line
                line = []
            line.append(one)
        yield line

    def main_loop(self) -> range | None:
        """Return the loop that runs most, of those around tensor cores if there are any, without such a loop inside."""
        loops = [range(one.target, i + 1) for i, one in enumerate(self.code) if one.runs and 0 <= one.target <= i]
        products = [loop for loop in loops if any(self.code[i].kind == "tensor" for i in loop)]
        chosen = products or loops
        inner = [a for a in chosen if not any(a != b and b.start in a and b.stop - 1 in a for b in chosen)]
        return max(inner, key=lambda loop: sum(self.code[i].runs for i in loop), default=None)


def mergeable(stores: list[Instruction]) -> list[list[Instruction]]:
    """Return the runs of neighbours, of equal width, that fill a place for a store of twice the width or more."""
    found: list[list[Instruction]] = []
    ordered = sorted(stores, key=lambda one: one.address[1])
    while ordered:
        group = [ordered.pop(0)]
        while ordered and ordered[0].width == group[0].width and ordered[0].address[1] == end_of(group):
            if len(group) * group[0].width == WIDEST:
                break
            group.append(ordered.pop(0))
        if len(group) > 1 and group[0].address[1] % (2 * group[0].width) == 0 and group[0].width < WIDEST:
            found.append(group)
    return found


def end_of(group: list[Instruction]) -> int:
    return group[-1].address[1] + group[-1].width


class Kernels:
    """Files of kernels for one architecture, whose launches are written down."""

    device = "cpu"

    def __init__(self, architecture: str, log: Path) -> None:
        self.executor, self.architecture, self.log = build_executor(), architecture, log
        self.libraries: dict[str, PtxLibrary] = {}

    def __call__(self, name: str) -> PtxLibrary:
        if name not in self.libraries:
            path = build_for_ptx(ROOT / "tests/emulation" / name, self.executor, self.architecture)
            self.libraries[name] = PtxLibrary(path, self.executor)
        self.libraries[name].write_costs(self.log)
        return self.libraries[name]


def record(architecture: str, call: Callable[[operators.Operators], None]) -> list[Launch]:
    """Return the launches of a call of operators."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "costs"
        kernels = Kernels(architecture, log)
        try:
            call(operators.Operators(kernels))
        finally:
            for library in kernels.libraries.values():
                library.write_costs(None)
        entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [
        Launch(
            readable(entry["kernel"]),
            architecture,
            *(entry[name] for name in ("blocks", "threads", "shared")),
            [Instruction(*row) for row in entry["code"]],
        )
        for entry in entries
    ]


# --- calls ---


def attention(D: int, hopper: bool) -> Callable[[operators.Operators], None]:
    def call(kernels: operators.Operators) -> None:
        q, k, v, dout = (torch.randn(1, 384, 2, D).bfloat16() for _ in range(4))
        out, lse = operators.attention_forward(kernels, q, k, v, hopper=hopper, multiprocessors=132)
        operators.attention_backward(kernels, dout, q, k, v, out, lse, hopper=hopper, multiprocessors=132)

    return call


def newton_schulz(hopper: bool) -> Callable[[operators.Operators], None]:
    def call(kernels: operators.Operators) -> None:
        operators.newton_schulz(kernels, torch.randn(1, 256, 256), steps=1, form="plain", hopper=hopper)

    return call


def elementwise(kernels: operators.Operators) -> None:
    """Call the operators without tensor cores on whole blocks of aligned tensors."""
    N, C, H, D = 64, 512, 4, 64
    x, y, z, dy = (torch.randn(N, C).bfloat16() for _ in range(4))
    one = torch.ones(1)
    params, grads, firsts, seconds = ([torch.rand(65536)] for _ in range(4))
    settings = {"step": 3, "lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.1}
    operators.adamw_(kernels, params, grads, firsts, seconds, **settings)
    buffers = [torch.randn(256, 256)]
    update, _ = operators.muon_momentum_(
        kernels, [torch.randn(256, 256).bfloat16()], buffers, momentum=0.9, return_norm=True
    )
    copies = [torch.empty(256, 256, dtype=torch.bfloat16)]
    operators.muon_update_(kernels, buffers, update, lr=0.1, copies=copies)
    operators.normuon_update_(kernels, buffers, update, [torch.zeros(256, 1)], lr=0.1, copies=copies)
    logits = torch.randn(8, 32768).bfloat16()
    operators.softcap_cross_entropy(kernels, logits, torch.arange(8), grad_scale=one)
    _, y, r = operators.rms_norm(kernels, x, z)
    operators.rms_norm_backward(kernels, dy, y, r, z)
    total, _, y, r = operators.mix_rms_norm(kernels, x, y, z, one, one)
    operators.mix_rms_norm_backward(kernels, dy, y, r, total, z, one, one, dmixed=z)
    q, k = (torch.randn(2, 32, heads, D).bfloat16() for heads in (H, 2))
    cos, sin = torch.randn(32, D // 2), torch.randn(32, D // 2)
    q_out, k_out, q_r, k_r = operators.rotary_norm(kernels, q, k, cos, sin)
    operators.rotary_norm_backward(kernels, q, k, q_out, k_out, q_r, k_r, cos, sin)
    operators.relu_squared(kernels, x, y)
    operators.relu_squared_backward(kernels, x, y, z)


CALLS: dict[str, tuple[str, Callable[[operators.Operators], None]]] = {
    "elementwise": ("90a", elementwise),
    "attention, mma.sync": ("90a", attention(64, False)),
    "attention, Hopper": ("90a", attention(64, True)),
    "attention of 128, Hopper": ("90a", attention(128, True)),
    "attention, sm_80": ("80", attention(64, False)),
    "newton_schulz, mma.sync": ("90a", newton_schulz(False)),
    "newton_schulz, Hopper": ("90a", newton_schulz(True)),
}


# --- report ---


def report(launch: Launch) -> str:
    """Return what a launch costs, in lines."""
    warps = launch.blocks * launch.threads // 32
    lines = [f"{launch.kernel} (sm_{launch.architecture}): {launch.blocks} blocks of {launch.threads} threads"]
    kinds = Counter()
    for one in launch.code:
        kinds[one.kind] += one.runs
    lines.append("  a warp runs " + ", ".join(f"{kind} {n / warps:.0f}" for kind, n in kinds.most_common() if n))
    for name, chosen in (("wavefronts of shared memory", SHARED), ("sectors of global memory", GLOBAL)):
        ratio = launch.ratio(chosen)
        if ratio is not None:
            lines.append(f"  {name}: x{ratio:.2f} of the least")
    wasteful = [one for one in launch.code if one.least and one.passes > 1.3 * one.least]
    for one in sorted(wasteful, key=lambda one: one.least - one.passes)[:6]:
        lines.append(f"  x{one.passes / one.least:.1f}: {one.place}: {one.text}")
    split = Counter((len(group), group[0].place.split(", ", 1)[-1]) for group in launch.split_stores())
    lines += [f"  {count} stores for one, {groups} times: {place}" for (count, place), groups in split.items()]
    loop = launch.main_loop()
    if loop:
        turns = launch.code[loop[-1]].runs
        counts = Counter()
        for i in loop:
            counts[launch.code[i].kind] += launch.code[i].runs
        each = ", ".join(f"{kind} {n / turns:.1f}" for kind, n in counts.most_common() if n >= turns / 2)
        lines.append(f"  main loop from {launch.code[loop[0]].place}, by turns of a warp: {each}")
    return "\n".join(lines)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for architecture, call in CALLS.values():
        for launch in record(architecture, call):
            if not sys.argv[1:] or any(name in launch.kernel for name in sys.argv[1:]):
                print(report(launch))


if __name__ == "__main__":
    main()
