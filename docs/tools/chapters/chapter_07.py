"""Results and figures of chapter 7, the loss and its gradient."""

from __future__ import annotations

from typing import Any

import style

from chapters import Figure, Values, command, demonstration, reference

COLORS = style.COLORS
WAYS = {
    "kernels_bfloat16": ("kernels, bfloat16", "orange"),
    "reference_float32": ("reference, float32", "green"),
    "kernels_float32": ("kernels, float32", "blue"),
}

RESULTS = {
    "loss_gradient": demonstration("loss-gradient", trained=True),
    "gradient_cmp": demonstration("gradient-cmp", timed=True),  # the instruction set decides how bfloat16 is rounded
    "gradient_cmp_printed": command("demonstrate gradient-cmp"),
    "gradient_dtypes": demonstration("gradient-dtypes", timed=True),  # errors of rounding, which depend on the kernel
    "finite_differences": demonstration("finite-differences", timed=True),  # rounding decides some of its errors
    "head_memory": demonstration("head-memory", timed=True),
    "uneven_accumulation": demonstration("uneven-accumulation"),
}


def visible(token: str) -> str:
    """Return a token with its spaces and line ends made visible."""
    return token.replace(" ", "\u2423").replace("\n", "\u21b5")


def draw_gradient(found: Values) -> Any:
    """Draw the logits, the probabilities and the gradient of one token's loss."""
    figure, axes = style.new_figure(7.0, 2.9, ncols=3, sharey=True)
    rows = range(len(found["tokens"]))
    colors = [COLORS["orange"] if target else COLORS["blue"] for target in found["is_target"]]
    for panel, (name, title) in zip(
        axes,
        (("logits", "logit z"), ("probabilities", "probability p"), ("gradient", "gradient p - y")),
        strict=True,
    ):
        panel.barh(rows, found[name], color=colors, height=0.7)
        panel.axvline(0, color=COLORS["black"], linewidth=0.7)
        panel.set_title(title, fontsize=9)
        panel.grid(visible=False, axis="y")
    axes[0].set(ylim=(len(rows) - 0.4, -0.6))
    axes[0].set_yticks(rows, [visible(token) for token in found["tokens"]], family="DejaVu Sans Mono", fontsize=8.5)
    axes[1].set(xlim=(-1.05, 1.05))
    axes[2].set(xlim=(-1.05, 1.05))
    return figure


def draw_memory(found: Values) -> Any:
    """Draw the peak memory of the head by vocabulary."""
    figure, axes = style.new_figure(7.0, 2.7)
    vocabularies = [row["vocabulary"] for row in found["rows"]]
    for key, label, color in (("all_logits", "all logits", "orange"), ("kernel", "a chunk at a time", "blue")):
        mebibytes = [row[key] / 2**20 for row in found["rows"]]
        axes.plot(vocabularies, mebibytes, "o-", color=COLORS[color], label=label, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(vocabularies, [f"{v:,}" for v in vocabularies])
    axes.set_yticks((10, 100, 1000), ("10", "100", "1,000"))
    axes.minorticks_off()
    axes.set(xlabel="vocabulary", ylabel="peak memory, MiB", ylim=(8, 4000))
    style.label_lines(axes)
    return figure


def draw_dtypes(found: Values) -> Any:
    """Draw the error of the gradient of each kind of weight, by type."""
    figure, axes = style.new_figure(7.0, 2.7)
    places = range(len(found["groups"]))
    for number, (way, (label, color)) in enumerate(WAYS.items()):
        shift = 0.12 * (number - 1)
        axes.plot(
            [p + shift for p in places], found[way]["errors"], "o", color=COLORS[color], markersize=5, label=label
        )
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set(ylabel="relative error of the gradient", ylim=(1e-7, 1), xlim=(-0.5, len(places) - 0.5))
    axes.set_xticks(places, [group.replace(" ", "\n") for group in found["groups"]])
    axes.legend(loc="upper right", ncols=3)
    return figure


def draw_differences(found: Values) -> Any:
    """Draw the error of a finite difference against its step."""
    figure, axes = style.new_figure(7.0, 2.7)
    for name, color in (("float32", "orange"), ("float64", "blue")):
        axes.plot(found["steps"], found[name]["errors"], "o-", color=COLORS[color], markersize=4, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set(xlabel="step h", ylabel="relative error", xlim=(found["steps"][0] * 2, found["steps"][-1] / 20))
    style.label_lines(axes)
    return figure


FIGURES = {
    "07-gradient": Figure(draw_gradient, "loss_gradient"),
    "07-memory": Figure(draw_memory, "head_memory"),
    "07-differences": Figure(draw_differences, "finite_differences"),
    "07-dtypes": Figure(draw_dtypes, "gradient_dtypes"),
}
REFERENCES = {
    "1710.03740": reference("Micikevicius et al.", "Mixed Precision Training", 2017),
    "2411.09009": reference("Wijmans et al.", "Cut Your Losses in Large-Vocabulary Language Models", 2024),
}
