"""Results and figures of chapter 11, memory and many ranks."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import style
from matplotlib.collections import PolyCollection
from matplotlib.patches import Rectangle

from chapters import ROOT, Figure, Values, demonstration, lab, own, reference

# Two processes that train the model of chapter 1 at depth 2, on the same cut of the batch.
SMALL = "--depth 2 --num-iterations 20 --device-batch-size 4 --sample-every 0 --eval-every 0"
PARTS = {  # of the prediction, in the order in which they are stacked: the label and the color
    "weights": ("weights", "blue"),
    "optimizer state": ("optimizer state", "orange"),
    "gradients": ("gradients", "green"),
    "weights in bfloat16": ("copies in bfloat16", "sky"),
    "activations": ("activations", "yellow"),
    "temporary tensors": ("temporary tensors", "purple"),
}


# --- results ---


def launch(ranks: int, flags: str, out: str) -> list[str]:
    """Return the command that trains on some ranks of this machine into the folder `out`."""
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    between = ["--"] if ranks > 1 else []
    return [sys.executable, *agent, "-m", "nanochat_native.train", *between, *flags.split(), "--out-dir", out]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def losses_of_ranks() -> Values:
    """Train on one rank, on two, and on one that cuts the batch in another way. Keep the losses of the steps."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, ranks, rows in (("one", 1, 4), ("two", 2, 4), ("one_larger", 1, 8)):
            flags = SMALL.replace("--device-batch-size 4", f"--device-batch-size {rows} --run {name}")
            subprocess.run(launch(ranks, flags, folder), cwd=ROOT, check=True, capture_output=True, env=ENVIRONMENT)
            records = map(json.loads, Path(folder, name, "metrics.jsonl").read_text().splitlines())
            found[name] = [record["loss"] for record in records if record["kind"] == "train"]

    def difference(other: str) -> float:
        return max(abs(a - b) for a, b in zip(found["one"], found[other], strict=True))

    return {
        "losses": found["one"],
        "steps": len(found["one"]),
        "last": found["one"][-1],
        "difference_two_ranks": difference("two"),
        "difference_other_cut": difference("one_larger"),
    }


def killed_rank() -> Values:
    """Kill one of two ranks with SIGKILL after their first checkpoint. Keep what the other one says."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{SMALL} --save-every 5 --run killed".replace("--num-iterations 20", "--num-iterations 1000")
        process = subprocess.Popen(
            launch(2, flags, folder),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        checkpoints = Path(folder, "killed/checkpoints")
        while not (checkpoints.is_dir() and any(checkpoints.iterdir())):
            time.sleep(0.2)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        start = time.monotonic()
        _, text = process.communicate()
    said = [
        f"{line} (...)" for line in re.findall(r"rank \d+: another rank .*?(?= \()", text)
    ]  # then comes torch's reason
    return {"exit_code": process.returncode, "seconds": time.monotonic() - start, "output": "\n".join(said) + "\n"}


def memory_table() -> Values:
    """Return what `memory --table` writes."""
    from nanochat_native.lab.memory.options import Options
    from nanochat_native.lab.memory.table import table

    return table(Options(device="cpu"))


def memory_24() -> Values:
    """Return the largest batches for 24 GiB, with the printed table."""
    record = lab("memory --gpu-memory 24").compute()
    names = {(False, 1): "kept", (False, 2): "kept_several", (True, 1): "recomputed", (True, 2): "recomputed_several"}
    sizes = {names[row["grad_checkpoint"], row["micro_batches"]]: row["device_batch_size"] for row in record["rows"]}
    return sizes | {"output": without_folder(record["output"])}


def measured(record: Values) -> Values:
    """Return what the file keeps of `memory --measure`: the peak by prediction and by measurement, in MiB."""
    peaks = {name: max(record[name]) / 2**20 for name in ("predicted", "measured")}
    return peaks | {"off_percent": 100 * abs(peaks["predicted"] / peaks["measured"] - 1)}


def without_folder(output: str) -> str:
    """Return the output of an experiment without the lines that name its folder."""
    return "".join(line for line in output.splitlines(True) if not re.match(r"(result|picture|again) ", line))


def memory_measured() -> Values:
    result = lab("memory --measure --device cpu", keep=measured).compute()
    return result | {"output": without_folder(result["output"])}


RESULTS = {
    "memory_moments": demonstration("memory-moments"),
    "memory_claim": demonstration("memory-claim"),
    "memory_checkpointing": demonstration("checkpointing"),
    "memory_checkpointing_time": demonstration("checkpointing-time", timed=True),
    "memory_activations": demonstration("activations"),
    "memory_gradients": demonstration("gradients-between-steps"),
    "memory_ranks": demonstration("memory-ranks"),
    "memory_owners": demonstration("owners"),
    "memory_rows": demonstration("rows-of-ranks"),
    "ring": demonstration("ring-all-reduce"),
    "equal_gradients": demonstration("equal-gradients"),
    "order_of_ranks": demonstration("order-of-ranks"),
    "memory_measured": own("python -m nanochat_native.memory --measure", memory_measured),
    "memory_24": own("python -m nanochat_native.memory --gpu-memory 24", memory_24),
    "widget_memory": own("python -m nanochat_native.memory --table memory.json", memory_table, exact=True),
    "ranks_losses": own("python -m nanochat_native.plot runs/two-ranks", losses_of_ranks),
    "ranks_killed": own("kill -9 of a rank", killed_rank),
}

REFERENCES = {
    "1604.06174": reference("Chen et al.", "Training Deep Nets with Sublinear Memory Cost", 2016),
    "1910.02054": reference(
        "Rajbhandari et al.", "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020
    ),
}


# --- figures ---


def stack(axes: Any, x: Any, columns: dict[str, list[float]], width: float = 0.8) -> list[float]:
    """Draw stacked bars of the parts and return their heights."""
    total = [0.0] * len(x)
    for part, (_, color) in PARTS.items():
        top = [below + size for below, size in zip(total, columns[part], strict=True)]
        bars = [
            [(at - width / 2, low), (at - width / 2, high), (at + width / 2, high), (at + width / 2, low)]
            for at, low, high in zip(x, total, top, strict=True)
            if high - low > 0.002 * max(top)
        ]
        axes.add_collection(PolyCollection(bars, facecolor=style.COLORS[color], linewidth=0))
        total = top
    axes.set(xlim=(x[0] - 0.6, x[-1] + 0.6), ylim=(0, 1.08 * max(total)))
    return total


def key(axes: Any, parts: Any = PARTS, **place: Any) -> None:
    """Write the names of the parts in their colors, the topmost part first."""
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=style.COLORS[color], linewidth=0) for _, color in map(PARTS.get, parts)
    ]
    labels = [PARTS[part][0] for part in parts]
    axes.legend(
        handles[::-1],
        labels[::-1],
        frameon=False,
        handlelength=0.9,
        handleheight=0.9,
        **({"loc": "upper right"} | place),
    )


def draw_moments(moments: Values) -> Any:
    figure, both = style.new_figure(7.0, 3.3, ncols=2)
    titles = {"d4": "d4 of chapter 1, float32", "d20": "d20, 16 x 2048 tokens, bfloat16"}
    for axes, (name, title) in zip(both, titles.items(), strict=True):
        rows, unit = moments[name]["moments"], (1, "MiB") if name == "d4" else (1024, "GiB")
        columns = {part: [row[part] / unit[0] for row in rows] for part in PARTS}
        heights = stack(axes, list(range(len(rows))), columns, 1.0)
        axes.set(title=title, ylabel=unit[1], xlim=(-0.6, len(rows) - 0.4), ylim=(0, 1.12 * max(heights)), xticks=[])
        axes.grid(False, axis="x")
        phases = [row["phase"] for row in rows]
        for phase in ("forward", "backward", "optimizer step"):
            places = [index for index, found in enumerate(phases) if found == phase]
            if places[0]:
                axes.axvline(places[0] - 0.5, color="white", linewidth=1.2)
            axes.text(
                (places[0] + places[-1]) / 2
                if phase == "backward"
                else places[-1] + (0.5 if phase == "forward" else 0.4),
                -0.03 * max(heights),
                {"optimizer step": "step"}.get(phase, phase),
                ha="center" if phase == "backward" else "right",
                va="top",
                fontsize=8.5,
            )
        top = max(range(len(rows)), key=heights.__getitem__)
        axes.annotate(
            f"peak {moments[name]['peak'] / unit[0]:,.{0 if name == 'd4' else 1}f} {unit[1]}",
            (top, heights[top]),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
        )
    key(both[1], fontsize=8)
    return figure


def draw_memory(table: Values) -> Any:
    figure, both = style.new_figure(7.0, 3.1, ncols=2, sharey=True)
    columns, highest = table["columns"], 0.0
    for axes, again, title in zip(both, (0, 1), ("activations kept", "activations recomputed"), strict=True):
        rows = [dict(zip(columns, row, strict=True)) for row in table["rows"]]
        rows = [
            row
            for row in rows
            if (row["device_batch_size"], row["max_seq_len"], row["nproc"]) == (16, 2048, 1)
            and (row["grad_checkpoint"], row["optimizer"]) == (again, 0)
        ]
        heights = stack(axes, list(range(len(rows))), {part: [row[part] / 1024 for row in rows] for part in PARTS})
        axes.set(title=title, xticks=range(len(rows)), xticklabels=[f"d{row['depth']}" for row in rows])
        axes.grid(False, axis="x")
        highest = max(highest, *heights)
        axes.set_ylim(0, 1.08 * highest)
        for place, height in enumerate(heights):
            axes.text(place, height + 0.8, f"{height:.0f}", ha="center", fontsize=8)
    both[0].set_ylabel("GiB at the peak")
    key(both[1], loc="upper left")
    return figure


def draw_ring(ring: Values) -> Any:
    figure, axes = style.new_diagram(7.0, 2.55)
    n, cell, gap, high, row = ring["ranks"], 0.19, 0.245, 0.26, 0.36
    shades = ["#d6e6f2", "#a9cbe4", "#6ba6d0", style.COLORS["blue"]]
    cells: list[Any] = []
    colors, frames_of_arrivals = [], []
    first = [[1] * n for _ in range(n)]
    frames = [(None, first)] + [(step, step["done"]) for step in ring["steps"]]
    for index, (step, done) in enumerate(frames):
        left = 0.12 + index * (n * cell + gap)
        title = "start" if step is None else str(index)
        axes.text(left + n * cell / 2, 2.02, title, ha="center", fontsize=8.5)
        for rank, chunk in itertools.product(range(n), range(n)):
            terms, x, y = done[rank][chunk], left + chunk * cell, 1.72 - rank * row
            corners = [(x, y), (x + cell, y), (x + cell, y + high), (x, y + high)]
            cells.append(corners)
            colors.append(shades[terms - 1])
            arrived = step is not None and step["chunk"][(rank - 1) % n] == chunk
            color = "white" if terms == n else style.COLORS["black"]
            axes.text(x + cell / 2, y + 0.12, str(terms), ha="center", va="center", fontsize=8, color=color)
            if arrived:
                frames_of_arrivals.append(corners)
    axes.add_collection(PolyCollection(cells, facecolors=colors, edgecolor="#555555", linewidth=0.5))
    axes.add_collection(
        PolyCollection(frames_of_arrivals, facecolor="none", edgecolor=style.COLORS["orange"], linewidth=1.6)
    )
    for index, (text, begin, end) in enumerate((("reduce-scatter", 1, 3), ("all-gather", 4, 6))):
        x0, x1 = (0.12 + place * (n * cell + gap) for place in (begin, end))
        axes.plot([x0, x1 + n * cell], [2.24, 2.24], color=style.COLORS["gray"], linewidth=0.9)
        axes.text(
            (x0 + x1 + n * cell) / 2,
            2.3,
            text,
            ha="center",
            fontsize=9,
            color=style.COLORS["orange"] if not index else style.COLORS["blue"],
        )
    axes.text(
        0.12,
        0.28,
        "rows: ranks 0 to 3. columns: chunks 0 to 3. number: how many ranks the chunk is the sum of.",
        fontsize=8.5,
    )
    axes.text(
        0.12,
        0.08,
        "orange frame: the chunk that has just arrived from the rank above (for rank 0, from rank 3).",
        fontsize=8.5,
    )
    return figure


def draw_ranks(ranks: Values) -> Any:
    figure, both = style.new_figure(7.0, 2.8, ncols=2, sharey=True)
    for axes, optimizer, title in zip(both, ("hybrid", "adamw"), ("Muon + AdamW", "AdamW alone"), strict=True):
        rows = ranks[optimizer]
        below = [0.0] * len(rows)
        for part, color in (("weights", "blue"), ("gradients", "green"), ("state", "orange")):
            sizes = [row[part] for row in rows]
            axes.bar(range(len(rows)), sizes, 0.7, bottom=below, color=style.COLORS[color], linewidth=0)
            for place, (size, base) in enumerate(zip(sizes, below, strict=True)):
                if size > 600:
                    axes.text(
                        place, base + size / 2, f"{size:,.0f}", ha="center", va="center", color="white", fontsize=8.5
                    )
                else:
                    axes.text(
                        place,
                        base + size + 70,
                        f"{size:,.0f}",
                        ha="center",
                        va="bottom",
                        color=style.COLORS[color],
                        fontsize=8.5,
                    )
            below = [base + size for base, size in zip(below, sizes, strict=True)]
        axes.set(title=title, xlabel="ranks", xticks=range(len(rows)), xticklabels=[row["ranks"] for row in rows])
        axes.grid(False, axis="x")
        for text, color, height in (
            ("weights", "blue", 0.5),
            ("gradients", "green", 1.5),
            ("optimizer state", "orange", 2.2),
        ):
            if optimizer == "adamw":
                axes.text(3.5, height * rows[0]["weights"], text, color=style.COLORS[color], va="center", fontsize=8.5)
    both[1].set_xlim(-0.6, 5.3)
    both[0].set_ylabel("MiB on each rank")
    return figure


def draw_owners(owners: Values) -> Any:
    figure, axes = style.new_diagram(7.0, 2.5)
    colors = [style.COLORS[name] for name in ("blue", "orange", "green", "yellow")]
    names = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    found = {row["matrix"]: row for row in owners["matrices"]}
    unit, left = 0.42, 1.0  # of 256 columns
    for layer in range(4):
        x, y = left, 1.78 - layer * 0.47
        axes.text(left - 0.12, y + unit / 2, f"layer {layer}", ha="right", va="center", fontsize=8.5)
        for name in names:
            row = found[f"{layer}.{name}"]
            width = unit * max(row["shape"]) / 256
            axes.add_patch(Rectangle((x, y), width - 0.04, unit, facecolor=colors[row["owner"]], linewidth=0))
            axes.text(
                x + width / 2 - 0.02,
                y + unit / 2,
                str(row["owner"]),
                ha="center",
                va="center",
                color="white",
                fontsize=9,
            )
            if not layer:
                label = name.partition(".")[2] if name.startswith("attn") else name
                axes.text(x + width / 2 - 0.02, 2.26, label, ha="center", fontsize=8)
            x += width
    mean = sum(owners["work"]) / owners["ranks"]
    for rank, work in enumerate(owners["work"]):
        axes.text(left + rank * 1.35, 0.1, f"rank {rank}: {100 * work / mean:.0f}%", fontsize=8.5, color=colors[rank])
    axes.text(left - 0.12, 0.1, "work", ha="right", fontsize=8.5)
    return figure


FIGURES = {
    "11-moments": Figure(draw_moments, "memory_moments"),
    "11-memory": Figure(draw_memory, "widget_memory"),
    "11-ring": Figure(draw_ring, "ring"),
    "11-ranks": Figure(draw_ranks, "memory_ranks"),
    "11-owners": Figure(draw_owners, "memory_owners"),
}
