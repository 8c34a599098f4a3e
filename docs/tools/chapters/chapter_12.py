"""Results and figures of chapter 12, speed, and CUDA on a laptop."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import style
from matplotlib.collections import PolyCollection
from matplotlib.patches import Rectangle

from chapters import ROOT, Figure, Values, demonstration, own, reference, run_module

EMULATION = ROOT / "tests/emulation"


# --- results ---


def bench() -> Values:
    """Return what `bench --json FILE` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench.json")
        subprocess.run([sys.executable, "-m", "nanochat_native.bench", "--json", path], cwd=ROOT, check=False)
        values: Values = json.loads(path.read_text())
    return values


def arithmetic_roof() -> Values:
    """Compile peak.cpp for this processor and return its rate on one thread, in GFLOP/s, the best of five runs."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "peak")
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run(["g++", "-O3", "-march=native", source, "-o", program], check=True)
        rates = [float(subprocess.run([program], capture_output=True, text=True, check=True).stdout) for _ in range(5)]
    return {"one_thread": max(rates), "two_cores": 2 * max(rates)}


GPU_STEP = "roofline --depth 12 --device-batch-size 16 --vocab-size 32768 --flops 790e12 --bandwidth 4.3e12 --json -"


def gpu_step() -> Values:
    """Return what the claim needs of the roofline of a micro-step: times in ms, of the whole and of its parts."""
    record = json.loads(run_module(GPU_STEP))
    step = record["micro_step"]
    products, others = step["products, attention, loss"], step["everything else"]
    return {
        "tokens": record["tokens"],
        "tflops": record["machine"]["flops"] / 1e12,
        "terabytes": record["machine"]["bandwidth"] / 1e12,
        "ms": step["all"]["ms"],
        "launches": step["all"]["launches"],
        "products_ms": products["ms"],
        "others_ms": others["ms"],
        "others_gigabytes": (others["read"] + others["written"]) / 1e9,
        "floor_ms": record["floor"]["ms"],
        "rows": {row["operator"].split("::")[1]: row["ms"] for row in step["rows"]},
    }


def emulation(*names: str) -> list[Any]:
    """Return modules of tests/emulation."""
    import importlib

    for folder in (ROOT / "tests", EMULATION):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return [importlib.import_module(name) for name in names]


KERNELS = {  # of the defects, by the file that is changed
    "attention": r"csrc/cuda/attention",
    "Newton-Schulz": r"csrc/cuda/newton_schulz",
    "Muon, AdamW, loss": r"csrc/cuda/(adamw|muon|softcap|packs)",
    "norms, rotation, squared ReLU": r"csrc/cuda/(rms_norm|rotary_norm|relu_squared|value_embedding|smear)",
    "a Hopper product": r"gemm_hopper",
    "an attention for sm_80": r"attention_ampere",
    "single primitives": r"primitives|wgmma|kernels/blocks",
    "parts that kernels share": r"csrc/cuda/",
}


def mutations() -> Values:
    """Count the defects of tests/emulation/mutations.py by the kernel that they change, and by what finds them.

    Count those of tests/pretend_cuda/mutations.py, too.
    """
    module, bindings = emulation("mutations", "pretend_cuda.mutations")
    found = Counter(mutation.found_by for mutation in module.MUTATIONS)
    groups: dict[str, Counter[str]] = {name: Counter() for name in KERNELS}
    for mutation in module.MUTATIONS:
        name = next(name for name, pattern in KERNELS.items() if re.search(pattern, mutation.file))
        groups[name][mutation.found_by] += 1
    return {
        "total": len(module.MUTATIONS),
        "found_by": dict(found),
        "kernels": {name: dict(counts) for name, counts in groups.items() if counts},
        "bindings": len(bindings.MUTATIONS),
    }


def race() -> Values:
    """Remove a barrier of the kernel grid_sum, run it in the emulation as it is and under ThreadSanitizer."""
    harness, module, tests = emulation("harness", "mutations", "test_mutations")
    mutation = next(one for one in module.MUTATIONS if one.name == "last read by threads that race it")
    core, seeds = harness.build_core(), 12
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests.copy_sources(folder)
        path = folder / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new))
        plain = harness.Library(harness.build(folder / mutation.library, core, "plain", ["-O0"]))
        wrong = sum(bool(said(harness, mutation, plain, seed)) for seed in range(seeds))
        sanitized = harness.Program(harness.build(folder / mutation.library, core, "thread", ["-O0"]), folder)
        report = said(harness, mutation, sanitized, 0)
    report = re.sub(r"\S*/(?=tests/emulation)", "", re.sub(r" \(pid=\d+\)", "", report))
    return {
        "seeds": seeds,
        "wrong_without_sanitizer": wrong,
        "line": int(report.rpartition(":")[2].split()[0]),
        "output": report + "\n",
    }


def said(harness: Any, mutation: Any, kernels: Any, seed: int) -> str:
    """Return the message of a case that fails, or an empty text."""
    try:
        mutation.case(kernels, seed)
    except (harness.KernelError, AssertionError) as error:
        return str(error) or "wrong result"
    return ""


RESULTS = {
    "bench": own("python -m nanochat_native.bench --json bench.json", bench),
    "operators": demonstration("operators"),
    "arithmetic_roof": own("g++ -O3 -march=native docs/tools/chapters/peak.cpp -o peak", arithmetic_roof),
    "product": demonstration("product", timed=True),
    "register_tile": demonstration("register-tile"),
    "gram_form": demonstration("gram-form"),
    "attention_share": demonstration("attention-share"),
    "update_share": demonstration("update-share"),
    "mma_fragment": demonstration("mma-fragment"),
    "bank_conflicts": demonstration("bank-conflicts"),
    "mutations": own("make test-all ARGS=tests/emulation/test_mutations.py", mutations, exact=True),
    "gpu_step": own(f"python -m nanochat_native.{GPU_STEP}", gpu_step, exact=True),
    "race": own("make test-all ARGS=tests/emulation/test_mutations.py", race),
    "roofline": own("python -m nanochat_native.bench", lambda: roofline(load_json("operators"), load_json("bench"))),
}


def load_json(name: str) -> Values:
    """Return a results file."""
    from chapters import load

    return load(name)


def roofline(operators: Values, bench: Values) -> Values:
    """Join the operations and bytes of each case with its time in the benchmark."""
    times = {(row["group"], row["case"]): row["ours_ms"] for row in bench["rows"]}
    points: list[dict[str, Any]] = []
    for row in operators["rows"]:
        seconds = times[row["group"], row["case"]] / 1e3
        rates = {"gflops": row["operations"] / seconds / 1e9, "gbytes": row["bytes"] / seconds / 1e9}
        points.append({key: row[key] for key in ("kind", "case", "intensity")} | rates)
    fastest = max(points, key=lambda point: point["gflops"])
    return {
        "points": points,
        "fastest": fastest,
        "by_kind": {p["kind"] + "_" + str(i): p["gflops"] for i, p in enumerate(points)},
    }


# --- figures ---

KINDS = {  # the color and the label of an operator
    "attention": ("blue", "attention"),
    "newton_schulz": ("green", "Newton-Schulz"),
    "Muon": ("purple", "step of Muon"),
    "linear": ("black", "linear layer"),
    "loss": ("yellow", "loss of the head"),
    "AdamW": ("orange", "AdamW"),
    "generation": ("sky", "generation"),
}


def draw_roofline(points: Values, bench: Values, roof: Values) -> Any:
    figure, axes = style.new_figure(7.0, 4.0)
    copy, sgemm, peak = bench["limits"]["copy"], bench["limits"]["sgemm"], roof["two_cores"]
    low, high = 0.18, 4500.0
    gray = style.COLORS["gray"]
    axes.plot([low, peak / copy, high], [low * copy, peak, peak], color=style.COLORS["black"], linewidth=1.2)
    axes.plot([sgemm / copy, high], [sgemm, sgemm], color=gray, linewidth=1.0, linestyle=(0, (4, 3)))
    for kind, (color, label) in KINDS.items():
        own = [point for point in points["points"] if point["kind"] == kind]
        axes.plot(
            [point["intensity"] for point in own],
            [point["gflops"] for point in own],
            "o",
            markersize=4.5,
            color=style.COLORS[color],
            label=f"_{label}",
        )
    places = {
        "attention": (58, 265, "right"),
        "newton_schulz": (1650, 430, "center"),
        "Muon": (235, 262, "left"),
        "linear": (130, 440, "center"),
        "loss": (2300, 245, "center"),
        "AdamW": (0.46, 55, "right"),
        "generation": (0.6, 31, "left"),
    }
    for kind, (x, y, side) in places.items():
        color, label = KINDS[kind]
        axes.text(x, y, label, color=style.COLORS[color], ha=side, va="center", fontsize=8.5)
    axes.text(0.21, peak * 1.07, f"multiply-adds on registers, {peak:.0f} GFLOP/s", fontsize=8.5)
    axes.text(5.5, sgemm * 0.93, f"torch.mm, {sgemm:.0f} GFLOP/s", fontsize=8.5, color=gray, va="top")
    axes.text(4.6, 98, "generation, 8 sequences", color=style.COLORS["sky"], va="center", fontsize=8.5)
    axes.annotate(
        f"copy, {copy:.0f} GB/s", (1.9, 1.9 * copy), (-6, 6), textcoords="offset points", ha="right", fontsize=8.5
    )
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(12, 900))
    axes.set(xlabel="operations for each byte that must move", ylabel="GFLOP/s on two cores")
    axes.set_yticks(ticks := [20, 50, 100, 200, 500], map(str, ticks))
    axes.set_xticks(ticks := [1, 10, 100, 1000], map(str, ticks))
    axes.minorticks_off()
    return figure


WAYS = {
    "python_loops": "three loops of Python",
    "numpy_rows": "numpy, row by row",
    "numpy_outer": "numpy, outer products",
    "linear_baseline": "our tile, SSE2 (4 lanes)",
    "torch_mm": "torch.mm (MKL)",
    "linear_avx2": "our tile, AVX2 (8 lanes)",
    "linear_avx512": "our tile, AVX-512 (16 lanes)",
}


def draw_product(product: Values, roof: Values) -> Any:
    figure, axes = style.new_figure(7.0, 2.7)
    rates = product["gflops"]
    names = list(WAYS)[::-1]
    colors = {"torch_mm": style.COLORS["gray"]}
    for place, name in enumerate(names):
        color = colors.get(name, style.COLORS["blue"] if name.startswith("linear") else style.COLORS["orange"])
        axes.barh(place, rates[name], 0.7, color=color, linewidth=0)
        text = f"{rates[name]:.2f}" if rates[name] < 2 else f"{rates[name]:.0f}"
        inside = rates[name] > 50
        axes.text(
            rates[name] / 1.12 if inside else rates[name] * 1.12,
            place,
            text,
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
            fontsize=8.5,
        )
    axes.axvline(roof["one_thread"], color=style.COLORS["black"], linewidth=1)
    axes.text(roof["one_thread"] * 1.1, 6.1, f"roof of a core, {roof['one_thread']:.0f}", fontsize=8.5, va="center")
    axes.set(xscale="log", xlim=(0.02, 1500), yticks=range(len(names)), yticklabels=[WAYS[name] for name in names])
    axes.set(xlabel="GFLOP/s on one core")
    axes.set_xticks(ticks := [0.1, 1, 10, 100], map(str, ticks))
    axes.minorticks_off()
    axes.grid(False, axis="y")
    return figure


def grid(axes: Any, numbers: list[list[int]], x: float, y: float, width: float, height: float, colors: Any) -> None:
    """Draw a table of numbers with its lower left corner at (x, y); colors: of a number."""
    rows, columns = len(numbers), len(numbers[0])
    w, h = width / columns, height / rows
    cells, fills = [], []
    for row, line in enumerate(numbers):
        for column, number in enumerate(line):
            left, low = x + column * w, y + height - (row + 1) * h
            cells.append([(left, low), (left + w, low), (left + w, low + h), (left, low + h)])
            fills.append(colors(number))
            axes.text(left + w / 2, low + h * 0.46, str(number), ha="center", va="center", fontsize=8)
    axes.add_collection(PolyCollection(cells, facecolors=fills, edgecolor="white", linewidth=0.6))


FILLS = ("#cfe4f3", "#f9d9c4", "#cdebdf", "#f3dbe6", "#fbe6bd", "#dbeefb", "#e4e4e4", "#d9d2f0")


def draw_fragment(fragment: Values) -> Any:
    figure, axes = style.new_diagram(7.0, 3.4)
    left, low, width, height = 0.75, 0.3, 0.44, 0.165
    pairs = [line[::2] for line in fragment["a"]["lanes"]]
    grid(axes, pairs, left, low, 8 * width, 16 * height, lambda lane: FILLS[lane // 4])

    def frame(column: float, row: float, columns: int, rows: int, **look: Any) -> None:
        corner = (left + column * width, low + (16 - row - rows) * height)
        axes.add_patch(Rectangle(corner, columns * width, rows * height, fill=False, zorder=3, **look))

    for column, row in ((1, 0), (5, 0), (1, 8), (5, 8)):
        frame(column, row, 1, 1, edgecolor=style.COLORS["orange"], linewidth=1.6)
    frame(0, 0, 4, 16, edgecolor=style.COLORS["black"], linewidth=1.4)
    for row in (0, 8, 15):
        axes.text(left - 0.07, low + (15.5 - row) * height, f"row {row}", ha="right", va="center", fontsize=8)
    for column in (0, 8):
        axes.text(left + column / 2 * width, 3.05, f"column {column}", fontsize=8)
    for place, (text, color) in enumerate(
        (
            ("A box is two neighboring numbers", "black"),
            ("of 16 bits. The number in it is", "black"),
            ("the lane that holds them.", "black"),
            ("", "black"),
            ("Orange: the 8 numbers of lane 1.", "orange"),
            ("", "black"),
            ("Black frame: the sums D lie in the", "black"),
            ("same way, so the result of one", "black"),
            ("product can be an operand of the", "black"),
            ("next without leaving its lane.", "black"),
        )
    ):
        axes.text(4.6, 2.75 - 0.21 * place, text, fontsize=8.5, color=style.COLORS[color])
    return figure


def draw_swizzle(conflicts: Values) -> Any:
    figure, axes = style.new_diagram(7.0, 2.75)
    for left, name, title in ((0.75, "plain", "as stored by rows"), (4.1, "swizzled", "with the 128-byte swizzle")):
        grid(axes, conflicts[name]["places"], left, 0.35, 2.6, 1.92, lambda place: FILLS[place])
        axes.text(left + 1.3, 2.5, title, ha="center", fontsize=9)
        axes.add_patch(
            Rectangle(
                (left + 2 * 0.325, 0.35),
                0.325,
                1.92,
                fill=False,
                edgecolor=style.COLORS["orange"],
                linewidth=1.8,
                zorder=3,
            )
        )
        times = conflicts[name]["reads_of_a_column"]
        axes.text(
            left + 1.3,
            0.13,
            f"the column takes {times} read{'s' if times > 1 else ''}",
            ha="center",
            fontsize=8.5,
            color=style.COLORS["orange"],
        )
    for row in range(8):
        axes.text(0.68, 0.35 + 1.92 * (7.5 - row) / 8, f"row {row}", ha="right", va="center", fontsize=8)
    return figure


def draw_mutations(found: Values) -> Any:
    figure, axes = style.new_figure(7.0, 2.5)
    kinds = {
        "plain": ("blue", "the emulation or a wrong result"),
        "address": ("yellow", "AddressSanitizer"),
        "thread": ("orange", "ThreadSanitizer"),
    }
    names = sorted(found["kernels"], key=lambda name: sum(found["kernels"][name].values()))
    left = [0] * len(names)
    for kind, (color, label) in kinds.items():
        sizes = [found["kernels"][name].get(kind, 0) for name in names]
        axes.barh(range(len(names)), sizes, 0.7, left=left, color=style.COLORS[color], linewidth=0, label=label)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.text(total + 0.6, place, str(total), va="center", fontsize=8.5)
    axes.set(
        yticks=range(len(names)), yticklabels=names, xlabel="defects, by what finds them", xlim=(0, 1.1 * max(left))
    )
    axes.grid(False, axis="y")
    axes.legend(frameon=False, loc="lower right")
    return figure


FIGURES = {
    "12-roofline": Figure(draw_roofline, "roofline", "bench", "arithmetic_roof"),
    "12-product": Figure(draw_product, "product", "arithmetic_roof"),
    "12-fragment": Figure(draw_fragment, "mma_fragment"),
    "12-swizzle": Figure(draw_swizzle, "bank_conflicts"),
    "12-mutations": Figure(draw_mutations, "mutations"),
}
REFERENCES = {
    "2209.05433": reference("Micikevicius et al.", "FP8 Formats for Deep Learning", 2022),
}
