"""Results and figures of chapter 5, attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import style

from chapters import Figure, command, demonstration, lab, reference

EXPERIMENT = (
    'compare --recipe october --cases "4 key heads:" "2 key heads: --n-kv-head 2" "1 key head: --n-kv-head 1" '
    '"window: --window-pattern SL" --head-dim 32 --num-iterations 150 --seeds 3 --rates 1'
)


def _cases(record: dict[str, Any]) -> dict[str, Any]:
    """Return the mean and the spread of each case, by a name for markers."""
    names = {"4 key heads": "heads_4", "2 key heads": "heads_2", "1 key head": "head_1", "window": "window"}
    rows = {row["case"]: row for row in record["rows"]}
    return {name: {"value": rows[case]["value"], "spread": rows[case]["spread"]} for case, name in names.items()}


RESULTS = {
    "causal_mask": demonstration("causal-mask"),
    "causal_mask_printed": command("demonstrate causal-mask"),
    "attention_scale": demonstration("attention-scale"),
    "rotary_positions": demonstration("rotary-positions"),
    "order_without_positions": demonstration("order-without-positions"),
    "grouped_heads": demonstration("grouped-heads"),
    "attention_window": demonstration("attention-window"),
    "qk_norm": demonstration("qk-norm", trained=True),
    "attention_maps": demonstration("attention-maps", trained=True),
    "context_length": demonstration("context-length", trained=True),
    "attention_heads": lab(EXPERIMENT, keep=_cases),
}


def draw_scale(scale: dict[str, Any]) -> Any:
    """Draw the largest weight and the slope of the softmax against the head size."""
    figure, (left, right) = style.new_figure(7.0, 2.7, ncols=2)
    sizes = [row["D"] for row in scale["sizes"]]
    colors = {"scaled": style.COLORS["blue"], "unscaled": style.COLORS["orange"]}
    names = {"scaled": "with 1/√D", "unscaled": "without"}
    for axes, key in ((left, "largest_weight"), (right, "slope")):
        for name, color in colors.items():
            axes.plot(sizes, [row[name][key] for row in scale["sizes"]], "o-", ms=3.5, color=color)
        axes.set(xscale="log", xlabel="head size D", ylim=(0, 1.08), xticks=sizes)
        axes.set_xticklabels([str(size) for size in sizes])
        axes.minorticks_off()
    left.set_ylabel("largest weight of 64 keys")
    right.set_ylabel("slope of the softmax")
    left.text(60, 0.17, names["scaled"], color=colors["scaled"], ha="center")
    left.text(60, 0.63, names["unscaled"], color=colors["unscaled"], ha="left")
    right.text(60, 0.86, names["scaled"], color=colors["scaled"], ha="center")
    right.text(30, 0.28, names["unscaled"], color=colors["unscaled"], ha="right")
    return figure


def draw_rotation(rotary: dict[str, Any]) -> Any:
    """Draw the hands of three pairs at several positions, and the similarity of equal vectors by distance."""
    figure, axes = style.new_figure(7.0, 2.5, ncols=4, width_ratios=[1, 1, 1, 1.65])
    positions = (0, 1, 2, 3, 4, 5)
    for ax, pair in zip(axes[:3], (0, 8, 24), strict=True):
        theta = rotary["frequencies"][pair]
        circle = np.linspace(0, 2 * math.pi, 121)
        ax.plot(np.cos(circle), np.sin(circle), color=style.COLORS["light"], lw=0.8)
        for position in positions:
            angle = -position * theta
            x, y = math.cos(angle), math.sin(angle)
            shade = style.COLORS["blue"]
            ax.annotate(
                "",
                xy=(x, y),
                xytext=(0, 0),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": shade,
                    "lw": 1.1,
                    "alpha": 0.35 + 0.13 * position,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
            if pair != 24 or position in (0, 5):
                ax.text(1.2 * x, 1.2 * y, str(position), ha="center", va="center", fontsize=8)
        ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
        ax.axis("off")
        turn = 2 * math.pi / theta
        ax.set_title(f"pair {pair}\none turn in {turn:.0f} tokens" if turn < 1000 else f"pair {pair}", fontsize=8.5)
    last = axes[3]
    values = rotary["similarity_by_distance"]
    distances = 4 * np.arange(len(values))
    last.plot(distances, values, color=style.COLORS["blue"])
    last.axvline(256, color=style.COLORS["gray"], lw=0.8, ls=":")
    last.text(262, 0.93, "trained length", fontsize=8, color=style.COLORS["gray"])
    last.set(
        xlabel="distance $m - n$, tokens", ylabel=r"mean of $\cos\,(m - n)\,\theta$", xlim=(0, 512), ylim=(0, 1.05)
    )
    return figure


def draw_masks() -> Any:
    """Draw the masks of an L layer, of an S layer, and of the original guide."""
    figure, axes = style.new_figure(7.0, 2.75, ncols=3)
    size, window = 12, 3
    i, j = np.indices((size, size))
    cases = {
        "L layer: all earlier keys": j <= i,
        f"S layer: {window} earlier keys": (j <= i) & (j >= i - window),
        "original guide, chapter 2": j > i,
    }
    from matplotlib.colors import ListedColormap

    for ax, (name, mask), color in zip(axes, cases.items(), ("blue", "green", "orange"), strict=True):
        ax.imshow(mask, cmap=ListedColormap(["#eeeeee", style.COLORS[color]]))
        for line in range(1, size):
            ax.axhline(line - 0.5, color="white", lw=0.8)
            ax.axvline(line - 0.5, color="white", lw=0.8)
        ax.set_title(name, fontsize=9)
        ax.set(xlabel="key j", xticks=[0, size - 1], yticks=[0, size - 1])
        ax.grid(False)
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel("query i")
    return figure


def draw_maps(maps: dict[str, Any]) -> Any:
    """Draw the attention of each layer and head on the lines of Python."""
    tokens = maps["tokens"]
    count = len(tokens)
    names = sorted(maps["maps"])
    heads = 1 + max(int(name.rsplit("_", 1)[1]) for name in names)
    figure, axes = style.new_figure(7.0, 3.75, nrows=heads, ncols=len(names) // heads, sharex=True, sharey=True)
    lower = np.tril_indices(count)
    for name in names:
        _, layer, _, head = name.split("_")
        ax = axes[int(head), int(layer)]
        weights = np.zeros((count, count))
        weights[lower] = maps["maps"][name]
        image = ax.imshow(np.sqrt(weights), cmap="Blues", vmin=0, vmax=1, aspect="equal")
        ax.set_title(f"layer {layer}, head {head}", fontsize=8.5)
        ax.grid(False)
        ax.set(xticks=[0, count - 1], yticks=[0, count - 1])
        for side in ax.spines.values():
            side.set_visible(True)
    for ax in axes[-1]:
        ax.set_xlabel("key")
    for ax in axes[:, 0]:
        ax.set_ylabel("query")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, math.sqrt(0.1), math.sqrt(0.5), 1])
    bar.ax.set_yticklabels(["0", "0.1", "0.5", "1"])
    bar.set_label("weight")
    bar.outline.set_linewidth(0.5)
    return figure


def draw_context(context: dict[str, Any]) -> Any:
    """Draw bits per byte against the length of the rows, and by position in rows of 2,048."""
    figure, (left, right) = style.new_figure(7.0, 2.8, ncols=2)
    blue, orange, gray = (style.COLORS[name] for name in ("blue", "orange", "gray"))
    lengths = [row["T"] for row in context["lengths"]]
    left.plot(lengths, [row["bits_per_byte"] for row in context["lengths"]], "o-", ms=3.5, color=blue)
    left.axvline(context["trained"], color=gray, lw=0.8, ls=":")
    left.annotate(
        "trained length",
        (context["trained"], 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -9),
        textcoords="offset points",
        fontsize=8,
        color=gray,
    )
    left.set(xscale="log", xlabel="tokens in a row", ylabel="bits per byte", xticks=lengths)
    left.set_xticklabels([f"{length:,}" for length in lengths])
    left.minorticks_off()
    gap = np.subtract(context["by_position"], context["same_tokens"])
    starts = context["trained"] * np.arange(len(gap))
    right.bar(starts + context["trained"] / 2, gap, width=0.86 * context["trained"], color=orange)
    right.set(
        xlabel=f"position in a row of {lengths[-1]:,} tokens",
        ylabel="bits per byte lost",
        xticks=[*starts[::2], lengths[-1]],
    )
    right.set_xticklabels([f"{int(start):,}" for start in [*starts[::2], lengths[-1]]])
    right.grid(False, axis="x")
    return figure


FIGURES = {
    "05-scale": Figure(draw_scale, "attention_scale"),
    "05-masks": Figure(draw_masks),
    "05-rotation": Figure(draw_rotation, "rotary_positions"),
    "05-maps": Figure(draw_maps, "attention_maps"),
    "05-context": Figure(draw_context, "context_length"),
}

REFERENCES = {
    "1706.03762": reference("Vaswani et al.", "Attention Is All You Need", 2017),
    "2104.09864": reference("Su et al.", "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021),
    "2010.04245": reference("Henry et al.", "Query-Key Normalization for Transformers", 2020),
    "1911.02150": reference("Shazeer", "Fast Transformer Decoding: One Write-Head is All You Need", 2019),
    "2305.13245": reference(
        "Ainslie et al.", "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023
    ),
    "2203.16634": reference(
        "Haviv et al.",
        "Transformer Language Models without Positional Encodings Still Learn Positional Information",
        2022,
    ),
    "2309.17453": reference("Xiao et al.", "Efficient Streaming Language Models with Attention Sinks", 2023),
    "2004.05150": reference("Beltagy et al.", "Longformer: The Long-Document Transformer", 2020),
}
