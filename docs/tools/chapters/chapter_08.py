"""Results and figures of chapter 8, data and the loop."""

from __future__ import annotations

from typing import Any

import style

from chapters import Figure, Values, command, demonstration, reference

RESULTS = {
    "accumulation": demonstration("accumulation"),
    "batch_order": demonstration("batch-order"),
    "first_batches": demonstration("first-batches", trained=True),
    "kill_points": demonstration("kill-points"),
    "log_noise": demonstration("log-noise"),
    "loop_in_20_lines": demonstration("loop-in-20-lines"),
    "loop_output": command("demonstrate loop-in-20-lines"),
    "step_timeline": demonstration("step-timeline", trained=True),
}
PARTS = {"data": "yellow", "forward": "blue", "backward": "orange", "clipping": "black", "optimizers": "green"}


def draw_timeline(found: Values) -> Any:
    """Draw one step of a run as a bar, and the share of each part."""
    figure, (bar, shares) = style.new_figure(7.0, 2.7, nrows=2, height_ratios=(2, 5))
    for segment in found["segments"]:
        start, length = segment["start_ms"], segment["end_ms"] - segment["start_ms"]
        bar.barh(0, length, left=start, height=0.6, color=style.COLORS[PARTS[segment["part"]]])
    bar.set(yticks=[], xlabel="processor time since the step began, ms", ylim=(-0.4, 0.4))
    bar.spines["left"].set_visible(False)
    bar.set_xlim(0, found["segments"][-1]["end_ms"])
    names = list(reversed(PARTS))
    values = [100 * found["shares"][name] for name in names]
    shares.barh(names, values, color=[style.COLORS[PARTS[name]] for name in names], height=0.62)
    for place, value in enumerate(values):
        shares.text(
            value + 0.6, place, f"{value:.1f} %" if value >= 0.1 else f"{value:.2f} %", va="center", fontsize=8.5
        )
    shares.set(xlabel="share of the step, %", xlim=(0, max(values) + 9))
    shares.grid(visible=False, axis="y")
    return figure


def draw_batches(found: Values) -> Any:
    """Draw where in the training text the rows of the first steps lie."""
    figure, (left, right) = style.new_figure(7.0, 2.9, ncols=2, width_ratios=(3, 1), sharey=True)
    total = found["tokens_of_the_text"]
    scale = found["bytes_of_the_text"] / total / 1e6
    for step, row in enumerate(found["positions"]):
        left.plot(
            [start * scale for start in row],
            [step] * len(row),
            "|",
            color=style.COLORS["blue"],
            markersize=7,
            markeredgewidth=1.3,
        )
    left.set(
        xlabel="place in the training text, MB",
        ylabel="step",
        xlim=(0, total * scale),
        ylim=(found["steps"] - 0.4, -0.6),
    )
    left.set_yticks(range(0, found["steps"], 5))
    read = [
        100 * (step + 1) * found["rows_of_a_step"] * found["sequence_len"] / total for step in range(found["steps"])
    ]
    right.plot(read, range(found["steps"]), color=style.COLORS["orange"], marker="o", markersize=3)
    right.set(xlabel="read so far, %", xlim=(0, read[-1] * 1.15))
    return figure


def draw_kills(found: Values) -> Any:
    """Draw what a run leaves that is killed at seven places, and from where it resumes."""
    figure, axes = style.new_figure(7.0, 3.3)
    places = found["places"]
    for row, place in enumerate(places):
        y = len(places) - 1 - row
        logged, begins = place["last_logged_step"], place["resumes_from"]
        axes.plot([0, begins], [y, y], color=style.COLORS["blue"], linewidth=2.2, solid_capstyle="butt")
        axes.plot([begins, logged], [y, y], color=style.COLORS["orange"], linewidth=2.2, solid_capstyle="butt")
        axes.plot(range(1, logged + 1), [y] * logged, "o", color="white", markersize=2.2)
        axes.plot(
            place["checkpoints"], [y + 0.28] * len(place["checkpoints"]), "s", color=style.COLORS["blue"], markersize=6
        )
        torn = [int(name[-6:]) for name in place["unfinished"]]
        axes.plot(torn, [y + 0.28] * len(torn), "s", color=style.COLORS["gray"], markersize=6, markerfacecolor="white")
        axes.plot(logged + 0.35, y, "x", color=style.COLORS["black"], markersize=6, markeredgewidth=1.4)
    axes.set_yticks(range(len(places)), [place["killed"] for place in reversed(places)])
    axes.set(xlabel="step", xlim=(-0.2, 15.4), ylim=(-0.6, len(places) - 0.3))
    axes.set_xticks(range(0, found["steps"] + 1, 2))
    axes.grid(visible=False, axis="y")
    legend = (
        ("s", "blue", "blue", "checkpoint"),
        ("s", "gray", "white", "unfinished"),
        ("x", "black", "black", "killed"),
    )
    for number, (marker, edge, face, text) in enumerate(legend):
        y = len(places) - 1.2 - 0.75 * number
        color = "white" if face == "white" else style.COLORS[face]
        axes.plot(12.9, y, marker, color=style.COLORS[edge], markersize=6, markerfacecolor=color)
        axes.text(13.2, y, text, fontsize=8.5, va="center")
    for number, (color, text) in enumerate((("blue", "kept"), ("orange", "done again"))):
        y = len(places) - 3.45 - 0.75 * number
        axes.plot([12.7, 13.1], [y, y], color=style.COLORS[color], linewidth=2.2)
        axes.text(13.2, y, text, fontsize=8.5, va="center")
    return figure


def draw_log(found: Values) -> Any:
    """Draw the loss of the batch at each step, and that of its last row."""
    figure, axes = style.new_figure(7.0, 2.6)
    steps = range(1, len(found["last_row"]) + 1)
    axes.plot(steps, found["last_row"], color=style.COLORS["orange"], linewidth=1, label="last row")
    axes.plot(steps, found["mean_of_the_batch"], color=style.COLORS["blue"], linewidth=2, label="whole batch")
    axes.set(xlabel="step", ylabel="loss, nats a token", xlim=(0, 68))
    style.label_lines(axes)
    return figure


FIGURES = {
    "08-timeline": Figure(draw_timeline, "step_timeline"),
    "08-batches": Figure(draw_batches, "first_batches"),
    "08-kills": Figure(draw_kills, "kill_points"),
    "08-log": Figure(draw_log, "log_noise"),
}
REFERENCES = {
    "2404.10830": reference("Ding et al.", "Fewer Truncations Improve Language Modeling", 2024),
}
