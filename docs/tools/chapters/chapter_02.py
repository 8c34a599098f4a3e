"""Results and figures of chapter 2, the mathematics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import style
from style import COLORS

from chapters import Figure, Values, command, demonstration

RESULTS = {
    "bits_and_nats": demonstration("bits-and-nats"),
    "softmax_overflow": demonstration("softmax-overflow"),
    "chain_rule": demonstration("chain-rule", timed=True),  # errors of rounding, which depend on the kernel
    "product_cost": demonstration("product-cost"),
    "norms": demonstration("norms"),
    "singular_values": demonstration("singular-values"),
    "singular_values_shown": command("demonstrate singular-values"),
    "floats": demonstration("floats"),
}


def draw_rotate_stretch(values: Values) -> Any:
    """Draw the unit circle and two arrows through V^T, the stretch and U, and through U V^T alone."""
    u, vt = np.array(values["u"]), np.array(values["vt"])
    stretch = np.diag(values["s"])
    stages = (
        ("$x$", "the unit circle", np.eye(2)),
        (r"$V^\top x$", "rotated", vt),
        (r"$S V^\top x$", "stretched", stretch @ vt),
        (r"$U S V^\top x = A x$", "rotated again", u @ stretch @ vt),
        (r"$U V^\top x$", "without the stretch", u @ vt),
    )
    figure, panels = style.new_figure(7.0, 1.55, ncols=5, sharex=True, sharey=True)
    angles = np.linspace(0, 2 * math.pi, 121)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    for axes, (name, what, matrix) in zip(panels, stages, strict=True):
        last = name == stages[-1][0]
        axes.plot(*circle, color=COLORS["light"], linewidth=0.9)
        axes.plot(*(matrix @ circle), color=COLORS["green"] if last else COLORS["gray"], linewidth=1.2)
        for index, color in ((0, "blue"), (1, "orange")):
            x, y = matrix @ vt[index]
            style.arrow(axes, (0, 0), (x, y), color=COLORS[color], linewidth=1.5, mutation_scale=8)
        axes.set_title(f"{name}\n{what}", fontsize=8.5, color=COLORS["green"] if last else COLORS["black"])
        axes.set(xlim=(-2.15, 2.15), ylim=(-1.4, 1.4), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        axes.tick_params(labelsize=8, length=2)
    return figure


def draw_surprise_of_a_probability(values: Values) -> Any:
    """Draw the bits of a token against its probability, with the four tokens of the example."""
    figure, axes = style.new_figure(7.0, 2.5, ncols=2, width_ratios=(1.15, 1))
    left, right = axes
    p = np.linspace(0.004, 1, 300)
    left.plot(p, -np.log2(p), color=COLORS["blue"])
    for chance, words in ((0.5, "a coin: 1 bit"), (0.25, "two coins: 2 bits"), (1 / 64, "six coins: 6 bits")):
        left.plot(chance, -math.log2(chance), marker="o", color=COLORS["orange"], markersize=4)
        left.annotate(
            words, (chance, -math.log2(chance)), (6, 3), textcoords="offset points", fontsize=8, color=COLORS["black"]
        )
    left.set(xlabel="probability that the model gave", ylabel="surprise (bits)", ylim=(-0.2, 8), xlim=(-0.02, 1.02))
    names = {"p_itself": "q = p", "uniform": "q uniform", "reversed": "q reversed"}
    for place, name in enumerate(names):
        total, extra = values["cross_entropy_bits"][name], values["extra_bits"][name]
        right.barh(place, total - extra, color=COLORS["sky"], height=0.55)
        right.barh(place, extra, left=total - extra, color=COLORS["orange"], height=0.55)
        right.text(total + 0.04, place, f"{total:g}", va="center", fontsize=8.5)
    right.set(yticks=range(3), yticklabels=names.values(), xlabel="cross-entropy (bits a token)", xlim=(0, 3.05))
    right.invert_yaxis()
    right.grid(visible=False, axis="y")
    right.text(0.06, 0, "entropy of p", fontsize=8, va="center", color="white")
    right.text(1.78, 1.45, "the price of\na wrong q", fontsize=8, va="center", color=COLORS["orange"])
    return figure


def draw_softmax(values: Values) -> Any:
    """Draw the probability of the first of three tokens against a constant that is added to all logits."""
    figure, panels = style.new_figure(7.0, 2.7, nrows=3, sharex=True)
    shifts = values["shifts"]
    rows = (
        ("plain, float16", values["plain"]["float16"], "orange"),
        ("plain, float32", values["plain"]["float32"], "purple"),
        ("minus the maximum,\nfloat16 or float32", values["safe"]["float32"], "green"),
    )
    for axes, (words, curve, color) in zip(panels, rows, strict=True):
        numbers = [math.nan if value is None else value for value in curve]
        good = [abs(value - values["right"]) < 0.01 for value in numbers]
        axes.plot(shifts, [v if g else math.nan for v, g in zip(numbers, good, strict=True)], color=COLORS[color], lw=2)
        wrong = [(s, v) for s, v, g in zip(shifts, numbers, good, strict=True) if not g and not math.isnan(v)]
        axes.plot([s for s, _ in wrong], [v for _, v in wrong], "x", color=COLORS["black"], markersize=5)
        missing = [s for s, v in zip(shifts, numbers, strict=True) if math.isnan(v)]
        for low, high in _stretches(missing, shifts[1] - shifts[0]):
            axes.axvspan(low, high, color=COLORS[color], alpha=0.13, linewidth=0)
            axes.text((low + high) / 2, 0.5, "nan", ha="center", va="center", fontsize=8.5, color="#555555")
        axes.text(1.01, 0.5, words, transform=axes.transAxes, va="center", fontsize=8.5, color=COLORS[color])
        axes.set(ylim=(-0.15, 1.15), yticks=(0, 0.665, 1), xlim=(shifts[0], shifts[-1]))
        axes.set_yticklabels(("0", "0.67", "1"), fontsize=8)
    panels[-1].set_xlabel("constant that is added to the logits (2, 1, 0)")
    panels[1].set_ylabel("probability of the first token")
    return figure


def _stretches(points: list[int], step: int) -> list[tuple[float, float]]:
    """Return the intervals that points at distance `step` fill."""
    found: list[tuple[float, float]] = []
    for point in points:
        if found and point - found[-1][1] <= step / 2 + 1e-9:
            found[-1] = (found[-1][0], point + step / 2)
        else:
            found.append((point - step / 2, point + step / 2))
    return found


def draw_differences(values: Values) -> Any:
    """Draw the error of a central difference against its step."""
    figure, axes = style.new_figure(7.0, 2.8)
    steps = [10**exponent for exponent in values["log10_h"]]
    for name, color in (("float64", "blue"), ("float32", "orange")):
        errors = values["relative_error"][name]
        axes.loglog(steps, errors, color=COLORS[color], marker="o", markersize=3)
        best = values["best"][name]
        axes.annotate(
            f"{name}: at best {best['error']:.0e}",
            (10 ** best["log10_h"], best["error"]),
            (85, -10) if name == "float32" else (0, -14),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=COLORS[color],
        )
    axes.text(1e-2, 3e-8, "falls like $h^2$", fontsize=8.5, color="#555555")
    axes.text(2e-9, 1e-10, "rounding: grows like $1/h$", fontsize=8.5, color="#555555")
    axes.set(xlabel="step h", ylabel="relative error of the derivative", ylim=(1e-12, 30), xlim=(4e-13, 0.3))
    axes.invert_xaxis()
    return figure


def draw_floats(values: Values) -> Any:
    """Draw the range of three types, and their numbers just above 1."""
    figure, (top, bottom) = style.new_figure(7.0, 2.9, nrows=2, height_ratios=(1.1, 1))
    names, colors = ("float32", "bfloat16", "float16"), ("blue", "green", "orange")
    for place, (name, color) in enumerate(zip(names, colors, strict=True)):
        info = values[name]
        low, high = math.log10(info["smallest_normal"]), math.log10(info["largest"])
        top.barh(place, high - low, left=low, color=COLORS[color], height=0.5)
        top.text(
            (low + high) / 2,
            place,
            f"{info['exponent_bits']} bits of exponent" if name != "float16" else "5 bits",
            ha="center",
            va="center",
            fontsize=8.5,
            color="white",
        )
        gap = info["gap_above_one"]
        points = np.arange(0, 0.0401 / gap) * gap if gap > 1e-4 else None
        if points is None:
            bottom.plot([1, 1.04], [place, place], color=COLORS[color], linewidth=6, solid_capstyle="butt")
        else:
            bottom.vlines(1 + points, place - 0.28, place + 0.28, color=COLORS[color], linewidth=1.1)
        bottom.text(1.0412, place, f"gap {gap:.2g}", va="center", fontsize=8.5, color=COLORS[color])
    for axes in (top, bottom):
        axes.set(yticks=range(3), yticklabels=names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    top.set(xlabel="range of normal numbers, power of ten", xlim=(-41, 41))
    bottom.set(xlabel="all numbers from 1 to 1.04", xlim=(0.9995, 1.0405))
    return figure


FIGURES = {
    "02-bits": Figure(draw_surprise_of_a_probability, "bits_and_nats"),
    "02-softmax": Figure(draw_softmax, "softmax_overflow"),
    "02-differences": Figure(draw_differences, "chain_rule"),
    "02-svd": Figure(draw_rotate_stretch, "singular_values"),
    "02-floats": Figure(draw_floats, "floats"),
}
REFERENCES: dict[str, str] = {}
