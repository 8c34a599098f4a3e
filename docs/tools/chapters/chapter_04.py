"""Results and figures of chapter 4, the model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import style

from chapters import Figure, Values, command, demonstration, lab, reference


def depths(record: Values) -> Values:
    """Return what exercise 4.5 asks for."""
    from nanochat_native.exercises.chapter_04 import compare_depths

    return compare_depths(record)


RESULTS = {
    "parameters": demonstration("parameters"),
    "waking": demonstration("waking"),
    "first_loss": demonstration("first-loss"),
    "flops": demonstration("flops"),
    "blocks_against_scores": demonstration("blocks-against-scores"),
    "rms_norm": demonstration("rms-norm"),
    "residual_stream": demonstration("residual-stream", trained=True),
    "softcap": demonstration("softcap", trained=True),
    "dead_units": demonstration("dead-units", trained=True),
    "two_depths": lab(
        'compare --recipe october --cases "d2: --depth 2" "d4: --depth 4" --num-iterations 200 --rates 1 --seeds 1',
        keep=depths,
    ),
    "dry_run_d4": command("train --recipe october --run trial --dry-run"),
}
REFERENCES = {
    "1706.03762": reference("Vaswani et al.", "Attention Is All You Need", 2017),
    "1910.07467": reference("Zhang and Sennrich", "Root Mean Square Layer Normalization", 2019),
    "2002.04745": reference("Xiong et al.", "On Layer Normalization in the Transformer Architecture", 2020),
    "2109.08668": reference("So et al.", "Primer: Searching for Efficient Transformers for Language Modeling", 2021),
    "2204.02311": reference("Chowdhery et al.", "PaLM: Scaling Language Modeling with Pathways", 2022),
    "2310.17813": reference("Yang, Simon and Bernstein", "A Spectral Condition for Feature Learning", 2023),
    "2410.17897": reference(
        "Zhou et al.", "Value Residual Learning For Alleviating Attention Concentration In Transformers", 2024
    ),
    "2408.00118": reference("Gemma Team", "Gemma 2: Improving Open Language Models at a Practical Size", 2024),
}
GROUPS = ("lm_head", "mlp_c_proj", "attn_c_proj", "wte", "c_fc", "c_v", "c_k", "c_q")


def draw_flow() -> Any:
    """Draw the data flow of d4 with its shapes, from its config."""
    from nanochat_native.demonstrations.model import d4
    from nanochat_native.model.gpt import SOFTCAP

    config = d4()
    channels, heads, size = config.n_embd, config.n_head, config.head_dim
    figure, axes = style.new_diagram(7.0, 5.2)
    stream = {"color": style.COLORS["blue"], "linewidth": 2.2}
    x = 1.15
    fill = {"facecolor": "#eef5fb", "edgecolor": style.COLORS["blue"]}
    gray = style.COLORS["gray"]

    def shape(position: tuple[float, float], text: str, align: str = "left") -> None:
        axes.text(*position, text, fontsize=8, color=gray, ha=align, va="center")

    style.box(axes, x - 0.75, 4.85, 1.5, 0.28, "ids")
    shape((x + 0.82, 4.99), "(B, T)  integers below V")
    style.arrow(axes, (x, 4.85), (x, 4.62), **stream)
    style.box(axes, x - 0.75, 4.34, 1.5, 0.28, "wte: a row for each id", fontsize=8, **fill)
    shape((x + 0.82, 4.48), f"({config.vocab_size}, {channels}), gives (B, T, {channels})")
    style.arrow(axes, (x, 4.34), (x, 4.12), **stream)
    style.box(axes, x - 0.75, 3.84, 1.5, 0.28, "norm", **fill)
    style.arrow(axes, (x, 3.84), (x, 1.38), **stream)
    shape((x - 0.1, 3.72), f"(B, T, {channels})", "right")
    axes.text(x - 0.22, 2.55, "residual stream", rotation=90, fontsize=8.5, color=style.COLORS["blue"], va="center")

    axes.add_patch(_dashed(x + 0.14, 1.5, 5.55, 2.18))
    axes.text(6.78, 3.57, f"a block, {config.n_layer} times", fontsize=8.5, color=gray, ha="right", va="center")
    for y, boxes, shapes in (
        (
            3.0,
            ("norm", "c_q, c_k, c_v", "attention", "c_proj"),
            (f"(B, T, {channels})", f"(B, T, {heads}, {size}) each", f"(B, T, {heads}, {size})", f"(B, T, {channels})"),
        ),
        (
            2.02,
            ("norm", "c_fc", "max(·, 0)²", "c_proj"),
            (f"(B, T, {channels})", f"(B, T, {4 * channels})", f"(B, T, {4 * channels})", f"(B, T, {channels})"),
        ),
    ):
        widths = (0.6, 1.15, 0.95, 0.7)
        place = x + 0.35
        style.arrow(axes, (x, y + 0.28), (place, y + 0.28))
        for number, (text, width, label) in enumerate(zip(boxes, widths, shapes, strict=True)):
            style.box(axes, place, y + 0.14, width, 0.28, text, fontsize=8.5)
            shape((place + width / 2, y + 0.03), label, "center")
            after = place + width
            place = after + (0.42 if number < 3 else 0.0)
            if number < 3:
                style.arrow(axes, (after, y + 0.28), (place, y + 0.28))
        end = place + 0.22
        axes.plot([place, end, end], [y + 0.28, y + 0.28, y - 0.22], color=style.COLORS["black"], linewidth=0.9)
        style.arrow(axes, (end, y - 0.22), (x + 0.09, y - 0.22))
        axes.text(x, y - 0.22, "+", ha="center", va="center", fontsize=11, bbox=_disc(), color=style.COLORS["blue"])
    style.box(axes, x - 0.75, 1.1, 1.5, 0.28, "norm", **fill)
    style.arrow(axes, (x, 1.1), (x, 0.88), **stream)
    style.box(axes, x - 0.75, 0.6, 1.5, 0.28, "lm_head", **fill)
    shape((x + 0.82, 0.74), f"({config.vocab_size}, {channels}), gives (B, T, {config.vocab_size})")
    style.arrow(axes, (x, 0.6), (x, 0.38), **stream)
    style.box(axes, x - 0.75, 0.1, 1.5, 0.28, f"{SOFTCAP:.0f} tanh(z / {SOFTCAP:.0f})", **fill)
    shape((x + 0.82, 0.24), f"(B, T, {config.vocab_size})  logits between −{SOFTCAP:.0f} and {SOFTCAP:.0f}")
    return figure


def _dashed(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, fill=False, linestyle=(0, (4, 3)), linewidth=0.7, edgecolor="#999999")


def _disc() -> dict[str, Any]:
    return {"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": style.COLORS["blue"], "linewidth": 1.2}


def draw_waking(values: Values) -> Any:
    """Draw the gradient norm of each group at each step as a table in color; white is exactly zero."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    norms = values["gradient_norm"]
    steps = len(values["losses"])
    grid = np.array([[math.log10(v) if v else np.nan for v in norms[group]] for group in GROUPS])
    figure, axes = style.new_figure(7.0, 3.1)
    colors = LinearSegmentedColormap.from_list("wake", ["#e3eff8", "#0072b2"]).with_extremes(bad="white")
    axes.imshow(np.ma.masked_invalid(grid), cmap=colors, aspect="auto", vmin=-3, vmax=0.6)
    axes.grid(visible=False)
    for row, group in enumerate(GROUPS):
        for step in range(steps):
            value = norms[group][step]
            text = f"{value:#.2g}" if value else "0"
            color = "white" if value and math.log10(value) > -0.9 else style.COLORS["black"]
            axes.text(step, row, text, ha="center", va="center", fontsize=8.5, color=color)
    axes.set_yticks(range(len(GROUPS)), GROUPS)
    axes.set_xticks(range(steps), [f"step {s}\nloss {loss:.2f}" for s, loss in enumerate(values["losses"])])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xticks([s + 0.5 for s in range(steps - 1)], minor=True)
    axes.set_yticks([r + 0.5 for r in range(len(GROUPS) - 1)], minor=True)
    axes.grid(which="minor", color="#bbbbbb", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    return figure


def draw_parameters(values: Values) -> Any:
    """Draw the parameters of each part as shares, by depth, with the total."""
    figure, axes = style.new_figure(7.0, 3.0)
    rows = [values["d4_v8192"], *(values[f"d{depth}_v65536"] for depth in (4, 6, 12, 20, 26))]
    sizes = [8192] + [65536] * 5
    parts = (("wte", "sky"), ("lm_head", "blue"), ("attention", "yellow"), ("mlp", "orange"))
    places = [0, 1.35, 2.35, 3.35, 4.35, 5.35]
    for place, row in zip(places, rows, strict=True):
        left = 0.0
        for part, color in parts:
            share = 100 * row[part] / row["total"]
            axes.barh(place, share, left=left, height=0.72, color=style.COLORS[color], edgecolor="white", linewidth=0.8)
            if share > 4:
                ink = "white" if part in ("lm_head", "mlp") else style.COLORS["black"]
                axes.text(left + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=8.5, color=ink)
            if place == 0:
                axes.text(left + share / 2, -0.62, part, ha="center", fontsize=8.5, color=style.COLORS["black"])
            left += share
        axes.text(101, place, f"{row['total'] / 1e6:,.1f}M", va="center", fontsize=8.5)
    axes.set_yticks(places, [f"d{row['depth']}, V = {size:,}" for row, size in zip(rows, sizes, strict=True)])
    axes.set(xlabel="share of the parameters, %", xlim=(0, 100), ylim=(5.85, -0.95))
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def draw_residual(values: Values) -> Any:
    """Draw the RMS of the residual stream, and of what each part of a block adds, by layer."""
    figure, (left, right) = style.new_figure(7.0, 2.7, ncols=2, width_ratios=(1.15, 1))
    layers = len(values["new"]["stream"])
    for name, color in (("trained", "blue"), ("new", "gray")):
        numbers = values[name]["stream"]
        left.plot(range(layers), numbers, "o-", markersize=4, color=style.COLORS[color], label=name)
        for layer, value in enumerate(numbers):
            if layer and (name == "trained" or layer == layers - 1):
                above = name == "trained"
                left.annotate(
                    f"{value:.1f}",
                    (layer, value),
                    xytext=(-3, 4) if above else (0, 5),
                    textcoords="offset points",
                    ha="right" if above else "center",
                    fontsize=8,
                    color=style.COLORS[color],
                )
    top = 1.18 * max(values["trained"]["stream"])
    left.set(ylim=(0, top), xlim=(-0.3, layers - 0.1), ylabel="RMS of the residual stream")
    left.set_xticks(range(layers), ["start", *(f"block {n}" for n in range(layers - 1))])
    style.label_lines(left, dx=10)
    for offset, (name, color) in enumerate((("attention", "yellow"), ("mlp", "orange"))):
        numbers = values["trained"][name]
        places = [n + 0.36 * (offset - 0.5) for n in range(len(numbers))]
        right.bar(places, numbers, width=0.33, color=style.COLORS[color], label=name)
        for place, value in zip(places, numbers, strict=True):
            right.text(place, value + 0.1, f"{value:.1f}", ha="center", fontsize=8)
    right.set(ylabel="RMS of what it adds, trained", ylim=(0, 1.15 * max(values["trained"]["mlp"])))
    right.set_xticks(range(layers - 1), [f"block {n}" for n in range(layers - 1)])
    right.grid(visible=False, axis="x")
    right.legend(loc="upper center", frameon=False)
    return figure


def draw_softcap(values: Values) -> Any:
    """Draw the softcap, and the histogram of the trained model's raw logits below the same axis."""
    figure, (above, below) = style.new_figure(7.0, 3.4, nrows=2, sharex=True, height_ratios=(1, 1))
    z = [n / 4 for n in range(-120, 121)]
    above.plot(z, z, color=style.COLORS["gray"], linewidth=0.9, linestyle=(0, (4, 3)))
    above.plot(z, [15 * math.tanh(n / 15) for n in z], color=style.COLORS["blue"])
    above.set(ylim=(-19, 19), ylabel="after the softcap")
    above.set_yticks([-15, 0, 15])
    above.text(9.2, 13.6, "no cap", color=style.COLORS["gray"], fontsize=8.5, ha="right")
    above.text(22, 9.0, "15 tanh(z / 15)", color=style.COLORS["blue"], fontsize=8.5, ha="center")
    edges, share = values["edges"], values["share"]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    below.bar(middles, share, width=0.9, color=style.COLORS["orange"])
    below.set_yscale("log")
    below.set(xlabel="raw logit z of the trained d4", ylabel="share of logits", xlim=(-26, 26), ylim=(1e-7, 1))
    below.set_yticks([1e-6, 1e-4, 1e-2, 1])
    for value, align in ((values["largest_raw"], "left"), (values["smallest_raw"], "right")):
        below.axvline(value, color=style.COLORS["black"], linewidth=0.7, linestyle=(0, (2, 2)))
        name = "largest" if value > 0 else "smallest"
        shift = 0.3 if value > 0 else -0.3
        below.text(value + shift, 0.12, f"{name}\n{value:.1f}".replace("-", "−"), ha=align, va="center", fontsize=8)
    return figure


FIGURES = {
    "04-flow": Figure(draw_flow),
    "04-waking": Figure(draw_waking, "waking"),
    "04-parameters": Figure(draw_parameters, "parameters"),
    "04-residual": Figure(draw_residual, "residual_stream"),
    "04-softcap": Figure(draw_softcap, "softcap"),
}
