"""The common style of the guide's figures, and their SVG."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Colors that people with the usual kinds of color blindness can tell apart (Okabe and Ito, 2008).
COLORS = {
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "yellow": "#e69f00",
    "sky": "#56b4e9",
    "black": "#222222",
    "gray": "#8a8a8a",
    "light": "#dddddd",
}
CYCLE = [COLORS[name] for name in ("blue", "orange", "green", "purple", "yellow", "sky", "black")]
SETTINGS: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.prop_cycle": matplotlib.cycler(color=CYCLE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9.5,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "image.interpolation": "nearest",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
    "svg.fonttype": "path",
    "svg.hashsalt": "nanochat-native",
    "svg.image_inline": True,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


def settings() -> Any:
    """Return a context in which matplotlib has the settings of the guide, whatever the user's are."""
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS})


def new_figure(width: float = 7.0, height: float = 3.0, **subplots: Any) -> tuple[Figure, Any]:
    """Return a figure of this size in inches, and its axes as Figure.subplots(**subplots) returns them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(**subplots)


def new_diagram(width: float = 7.0, height: float = 3.0) -> tuple[Figure, Any]:
    """Return a figure without axes lines: one unit is one inch, x grows to the right and y upwards."""
    figure, axes = new_figure(width, height)
    figure.set_layout_engine("none")
    axes.set_position((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Any, x: float, y: float, width: float, height: float, text: str = "", **style: Any) -> None:
    """Draw a box with its lower left corner at (x, y), and a text in its middle."""
    from matplotlib.patches import FancyBboxPatch

    size = style.pop("fontsize", 8.5)
    color = style.pop("textcolor", COLORS["black"])
    look = {"facecolor": "white", "edgecolor": COLORS["black"], "linewidth": 0.8} | style
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.05", **look))
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=color)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    """Draw an arrow between two points in data coordinates."""
    look = {"arrowstyle": "-|>", "color": COLORS["black"], "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0} | style
    axes.annotate("", xy=end, xytext=start, arrowprops=look)


def label_lines(axes: Any, *, dx: float = 4.0, fontsize: float = 8.5, smallest_gap: float = 10.0) -> None:
    """Write the label of each line at its right end instead of a legend, at least `smallest_gap` points apart."""
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    figure = axes.figure
    figure.canvas.draw()
    scale = figure.dpi / 72
    ends = []
    for line in lines:
        x, y = line.get_xdata()[-1], line.get_ydata()[-1]
        ends.append((axes.transData.transform((x, y))[1] / scale, x, y, line))
    ends.sort(key=lambda end: end[0])
    lowest = float("-inf")
    for position, x, y, line in ends:
        placed = max(position, lowest + smallest_gap)
        lowest = placed
        axes.annotate(
            line.get_label(),
            xy=(x, y),
            xytext=(dx, placed - position),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            fontsize=fontsize,
            annotation_clip=False,
        )


def svg_of(figure: Figure) -> bytes:
    """Return a figure as SVG. The bytes depend on the figure and on the version of matplotlib alone."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, dpi=144)
    lines = file.getvalue().decode().splitlines()
    return ("\n".join(line.rstrip() for line in lines) + "\n").encode()
