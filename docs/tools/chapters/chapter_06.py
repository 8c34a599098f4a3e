"""Results and figures of chapter 6, attention without the matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import style

from chapters import Figure, command, demonstration, lab, reference


def _activations(record: dict[str, Any]) -> dict[str, Any]:
    """Return the activations and the measured peak of a step, in bytes."""
    return {
        "activations": record["parts"]["activations"][1],
        "peak": max(record["measured"]),
        "predicted_peak": max(record["predicted"]),
        "workspace": record["kernel_scratch"],
    }


RESULTS = {
    "online_softmax": demonstration("online-softmax"),
    "online_softmax_printed": command("demonstrate online-softmax"),
    "attention_tiles": demonstration("attention-tiles"),
    "attention_backward": demonstration("attention-backward"),
    "attention_memory": demonstration("attention-memory"),
    "attention_versions": demonstration("attention-versions", timed=True),
    "memory_one_long_row": lab(
        "memory --depth 4 --device-batch-size 1 --max-seq-len 2048 --device cpu --measure", keep=_activations
    ),
    "memory_eight_short_rows": lab(
        "memory --depth 4 --device-batch-size 8 --max-seq-len 256 --device cpu --measure", keep=_activations
    ),
}


def draw_walk(online: dict[str, Any]) -> Any:
    """Draw three moments of the tile walk, with the numbers of one row."""
    figure, axes = style.new_diagram(7.0, 3.05)
    size, cell, count = 8, 0.21, 2
    orange, blue, gray = (style.COLORS[name] for name in ("orange", "blue", "gray"))
    row = online["row"]
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    for board in range(3):
        left, top = 0.35 + 2.3 * board, 2.75
        here = (row // count, board)
        cells = np.ones((size, size, 3))
        for i in range(size):
            for j in range(size):
                tile = (i // count, j // count)
                done = tile[1] <= tile[0] and tile < here
                name = "#eeeeee" if j > i else "#f3c9ab" if tile == here else "#b9d7ea" if done else "#ffffff"
                cells[i, j] = to_rgb(name)
        extent = (left, left + size * cell, top - size * cell, top)
        axes.imshow(cells, extent=extent, aspect="auto")
        for i in range(0, size + 1, count):
            axes.plot([left, left + size * cell], [top - i * cell] * 2, color=gray, lw=0.5)
            axes.plot([left + i * cell] * 2, [top, top - size * cell], color=gray, lw=0.5)
        x, y = left + board * count * cell, top - (row // count + 1) * count * cell
        axes.add_patch(Rectangle((x, y), count * cell, count * cell, fc="none", ec=orange, lw=1.6))
        axes.text(left - 0.06, top - (row + 0.5) * cell, str(row), ha="right", va="center", fontsize=8, color=blue)
        step = online["walk"][board]
        scores = online["scores"][count * board : count * board + count]
        words = ", ".join(f"{score:.1f}" for score in scores).replace("-", "−")
        axes.text(left, 0.86, f"row {row} meets {words}", fontsize=8)
        line = f"m = {step['m']:.1f}   l = {step['l']:.3f}   o = {step['o']:.3f}"
        axes.text(left, 0.60, line, fontsize=8)
        axes.text(left, 0.34, f"o / l = {step['o_over_l']:.3f}", fontsize=8, color=orange, fontweight="bold")
    axes.text(0.35 + 4.6, 0.1, f"softmax of the whole row: {online['direct']:.3f}", fontsize=8, color=blue)
    axes.set(xlim=(0, 7.0), ylim=(0, 3.05))
    return figure


def draw_running(online: dict[str, Any]) -> Any:
    """Draw the running maximum and the running sum of one row of 1,000 scores."""
    figure, (left, right) = style.new_figure(7.0, 2.5, ncols=2)
    running = online["running"]
    left.step(running["keys"], running["m"], where="post", color=style.COLORS["blue"])
    left.plot(running["keys"], running["m"], "o", ms=3, color=style.COLORS["blue"])
    right.plot(running["keys"], running["l"], "o-", ms=3, color=style.COLORS["orange"])
    left.set(xlabel="keys read", ylabel="running maximum m")
    right.set(xlabel="keys read", ylabel="running sum l", ylim=(0, None))
    return figure


def draw_memory(memory: dict[str, Any]) -> Any:
    """Draw the bytes kept for the backward pass against the length."""
    figure, axes = style.new_figure(7.0, 2.9)
    lengths = [row["T"] for row in memory["rows"]]
    lines = (
        ("matrix", "orange", "plain attention keeps its weights"),
        ("tiles", "blue", "the kernel keeps its output"),
    )
    for name, color, text in lines:
        values = [row[name]["kept"] / 2**20 for row in memory["rows"]]
        axes.plot(lengths, values, "o-", ms=3.5, color=style.COLORS[color])
        axes.annotate(
            text,
            (lengths[2], values[2]),
            xytext=(-8, 8),
            textcoords="offset points",
            ha="right",
            color=style.COLORS[color],
            fontsize=8.5,
        )
        axes.annotate(
            f"{values[-1]:.0f} MiB",
            (lengths[-1], values[-1]),
            xytext=(6, -3),
            textcoords="offset points",
            color=style.COLORS[color],
            fontsize=8.5,
            annotation_clip=False,
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens T", ylabel="MiB kept for the backward pass", xticks=lengths)
    axes.set_xticklabels([f"{length:,}" for length in lengths])
    axes.set_yticks([0.25, 1, 4, 16, 64])
    axes.set_yticklabels(["0.25", "1", "4", "16", "64"])
    axes.minorticks_off()
    axes.set_xlim(230, 2700)
    return figure


def draw_versions(versions: dict[str, Any]) -> Any:
    """Draw the time of each version."""
    figure, axes = style.new_figure(7.0, 2.7)
    rows = list(versions["versions"].values())
    for position, row in enumerate(rows):
        color = style.COLORS["orange" if row["text"] == "the kernel" else "blue"]
        axes.barh(position, row["ms"], color=color, height=0.62)
        digits = 0 if row["ms"] >= 100 else 1
        axes.text(row["ms"] * 1.12, position, f"{row['ms']:,.{digits}f} ms", va="center", fontsize=8.5)
    axes.set(xscale="log", xlabel="processor time of one call, one core", yticks=range(len(rows)))
    axes.set_xlim(1, 4 * max(row["ms"] for row in rows))
    axes.set_xticks([1, 10, 100, 1000])
    axes.set_xticklabels(["1 ms", "10 ms", "100 ms", "1 s"])
    axes.minorticks_off()
    axes.set_yticklabels([row["text"] for row in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    return figure


FIGURES = {
    "06-walk": Figure(draw_walk, "online_softmax"),
    "06-running": Figure(draw_running, "online_softmax"),
    "06-memory": Figure(draw_memory, "attention_memory"),
    "06-versions": Figure(draw_versions, "attention_versions"),
}

REFERENCES = {
    "1805.02867": reference("Milakov and Gimelshein", "Online normalizer calculation for softmax", 2018),
    "2112.05682": reference("Rabe and Staats", "Self-attention Does Not Need O(n²) Memory", 2021),
    "2205.14135": reference(
        "Dao et al.", "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022
    ),
}
